"""The self-test passes on a right machine and fails on one that computes wrong numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edgetrain.edge_client import available_runtimes, open_session
from edgetrain.edge_client.errors import SessionError
from edgetrain.edge_client.training.selftest import read_self_test, run_self_test
from edgetrain.protocol.bundle import Bundle
from support.tiny_bundle import write_tiny_bundle

pytestmark = pytest.mark.skipif(not available_runtimes(), reason="needs a runtime")


class WrongMachine:
    """A session whose numbers are changed on the way out."""

    def __init__(self, session, change):
        self.session, self.change = session, change
        self.manifest, self.runtime, self.precision = session.manifest, session.runtime, session.precision

    def step(self, *arguments):
        result = self.session.step(*arguments)
        return self.change(dataclasses.replace(result, gradients=result.gradients.copy()))


@pytest.fixture(params=[{}, {"tokens": 3}, {"kind": "dict", "unused_input": True}])
def bundle(request, tmp_path):
    return Bundle(write_tiny_bundle(tmp_path / "tiny", **request.param))


def test_a_right_machine_passes(bundle):
    report = run_self_test(bundle, open_session(bundle))
    assert report.ok
    assert report.worst < 1e-5
    assert [gradient.name for gradient in report.gradients] == [p.name for p in bundle.manifest.parameters]
    report.raise_if_wrong()


def test_the_self_test_file_round_trips(tmp_path):
    bundle = Bundle(write_tiny_bundle(tmp_path / "tiny", kind="tuple", unused_input=True))
    ((x, ids), y), weights = read_self_test(bundle)
    assert (x.shape, x.dtype, ids.tolist(), y.dtype) == ((4, 5), np.float32, [0, 1, 2, 3], np.int64)
    np.testing.assert_allclose(weights, np.linspace(0.5, 1.5, 4), rtol=1e-6)


def scale_one_gradient(result):
    result.gradients[-1] *= 1.01
    return result


def swap_two_rows(result):
    # The norm stays: only the projection sees it.
    result.gradients[[0, 1]] = result.gradients[[1, 0]]
    return result


WRONG = {
    "gradient of second.bias": scale_one_gradient,
    "gradient of first.weight": swap_two_rows,
    "loss": lambda result: dataclasses.replace(result, loss_sum=result.loss_sum * 1.002),
    "weight sum": lambda result: dataclasses.replace(result, weight_sum=result.weight_sum + 1),
    "accuracy": lambda result: dataclasses.replace(result, metrics={"accuracy": np.float32(9)}),
    "gradient of first.bias": lambda result: (result.gradients.__setitem__(36, np.nan), result)[1],
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_machine_is_named(tmp_path, what):
    bundle = Bundle(write_tiny_bundle(tmp_path / "tiny"))
    report = run_self_test(bundle, WrongMachine(open_session(bundle), WRONG[what]))
    assert not report.ok
    with pytest.raises(SessionError, match=f"off are {what} by"):
        report.raise_if_wrong()
