"""What stays on the device: SCAFFOLD's control variate and personal parameters."""

import numpy as np
import pytest

from edgetrain.edge_client.durable.control_variate import ControlVariate, control_change
from edgetrain.edge_client.durable.personal import PersonalParameters
from edgetrain.edge_client.errors import StateError
from edgetrain.protocol.codecs import SparseOrDense
from edgetrain.protocol.training import ScheduleConfig, TrainingConfig

RUN = bytes(range(16))
CHANGE = SparseOrDense(4, np.array([1, 3]), np.array([0.5, -2.0], np.float32))


def control(path, run=RUN, length=4):
    return ControlVariate(path / "control.bin", run=run, num_parameters=length)


def test_a_change_counts_once_also_after_a_crash(tmp_path):
    first = control(tmp_path)
    first.apply(b"a" * 32, CHANGE)
    first.apply(b"a" * 32, CHANGE)
    again = control(tmp_path)
    again.apply(b"a" * 32, CHANGE)
    assert again.vector.tolist() == [0, 0.5, 0, -2]
    again.apply(b"b" * 32, CHANGE)
    assert control(tmp_path).vector.tolist() == [0, 1, 0, -4]


def test_another_run_starts_anew(tmp_path):
    control(tmp_path).apply(b"a" * 32, CHANGE)
    assert control(tmp_path, run=bytes(16)).vector.tolist() == [0] * 4
    assert control(tmp_path, length=5).vector.tolist() == [0] * 5


def test_any_damaged_byte_is_noticed(tmp_path):
    control(tmp_path).apply(b"a" * 32, CHANGE)
    data = (tmp_path / "control.bin").read_bytes()
    # Byte 3 is reserved.
    for at in set(range(len(data))) - {3}:
        (tmp_path / "control.bin").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert control(tmp_path).vector.tolist() == [0] * 4, at


@pytest.mark.parametrize("steps", [1, 3])
def test_the_change_is_the_mean_gradient_less_the_own_variate(steps):
    rng = np.random.default_rng(steps)
    own, server, start = rng.normal(size=(3, 5)).astype(np.float32)
    gradients = rng.normal(size=(steps, 5)).astype(np.float32)
    end = start.astype(np.float64)
    for gradient in gradients:
        end = end - 0.25 * (gradient - own + server)
    change = control_change(server, start, end.astype(np.float32), TrainingConfig(learning_rate=0.25), steps)
    np.testing.assert_allclose(change, gradients.mean(axis=0) - own, rtol=1e-5, atol=1e-6)


def test_schedules_weigh_the_gradients():
    training = TrainingConfig(learning_rate=0.5, schedule=ScheduleConfig(name="step", step_size=1, gamma=0.5))
    # Rates 0.5, 0.25: gradients 1 and 4 move 0.5 + 1.
    change = control_change(*np.zeros((2, 1), np.float32), np.array([-1.5], np.float32), training, 2)
    assert change[0] == pytest.approx((0.5 * 1 + 0.25 * 4) / 0.75)


def test_no_steps_change_nothing():
    ones = np.ones(3, np.float32)
    assert control_change(ones, ones, ones, TrainingConfig(), 0).tolist() == [0, 0, 0]


MASK = np.array([False, True, False, True])


def personal(path, bundle=b"x" * 32, patterns=("head.*",)):
    return PersonalParameters(path / "personal.bin", bundle=bundle, patterns=patterns, mask=MASK)


def test_personal_parameters_are_kept_and_laid_over(tmp_path):
    mine = personal(tmp_path)
    received = np.array([1, 2, 3, 4], np.float32)
    assert mine.overlay(received).tolist() == [1, 2, 3, 4]
    mine.keep(np.array([9, 8, 7, 6], np.float32), training=(b"run", 1))
    assert mine.overlay(received).tolist() == [1, 8, 3, 6]
    assert personal(tmp_path).overlay(received).tolist() == [1, 8, 3, 6]
    assert personal(tmp_path, bundle=b"y" * 32).overlay(received).tolist() == [1, 2, 3, 4]
    assert personal(tmp_path, patterns=("other",)).overlay(received).tolist() == [1, 2, 3, 4]
    # The same round once more begins where it began before; without training, they are what they are.
    again = personal(tmp_path)
    assert again.overlay(received, training=(b"run", 1)).tolist() == [1, 2, 3, 4]
    assert again.overlay(received, training=(b"run", 2)).tolist() == [1, 8, 3, 6]
    again.keep(np.array([9, 80, 7, 60], np.float32), training=(b"run", 2))
    again.keep(np.array([9, 81, 7, 61], np.float32), training=(b"run", 2))
    assert personal(tmp_path).overlay(received, training=(b"run", 2)).tolist() == [1, 8, 3, 6]
    assert personal(tmp_path).overlay(received, training=(b"other", 2)).tolist() == [1, 81, 3, 61]
    data = (tmp_path / "personal.bin").read_bytes()
    (tmp_path / "personal.bin").write_bytes(data[:-1])
    assert personal(tmp_path).overlay(received).tolist() == [1, 2, 3, 4]
    assert received.tolist() == [1, 2, 3, 4]


def test_personal_parameters_that_cannot_be_stored_are_those_of_before(tmp_path):
    mine = personal(tmp_path)
    mine.keep(np.array([9, 8, 7, 6], np.float32), training=(b"run", 1))
    (tmp_path / "personal.bin").unlink()
    (tmp_path / "personal.bin").mkdir()
    with pytest.raises(StateError, match="cannot store the personal parameters"):
        mine.keep(np.array([9, 80, 7, 60], np.float32), training=(b"run", 2))
    # The round is trained again, from where it began.
    assert mine.overlay(np.ones(4, np.float32), training=(b"run", 2)).tolist() == [1, 8, 1, 6]
