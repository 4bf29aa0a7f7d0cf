import numpy as np
import pytest
from sklearn.datasets import load_digits

from edgetrain.models import ModelError
from edgetrain.models.data import (
    IGNORE_INDEX,
    Samples,
    batches,
    digits,
    dirichlet_split,
    iid_split,
    take,
    token_weights,
)


def test_digits_are_scikit_learns_digits_each_once():
    (x_train, y_train), (x_test, y_test) = digits()
    assert x_train.shape == (1437, 1, 8, 8)
    assert x_test.shape == (360, 1, 8, 8)
    assert x_train.dtype == np.float32
    assert y_train.dtype == np.int64
    pixels = np.concatenate([x_train, x_test]).reshape(-1, 64) * 6.017 + 4.884
    rows = np.column_stack([np.rint(pixels), np.concatenate([y_train, y_test])])
    reference = load_digits()
    expected = np.column_stack([reference.data, reference.target])
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)])


def test_digits_have_mean_0_and_deviation_1():
    images = np.concatenate([part.inputs for part in digits()])
    assert abs(images.mean()) < 1e-3
    assert abs(images.std() - 1) < 1e-3


def test_digits_split_depends_on_the_seed_only():
    np.testing.assert_array_equal(digits().test.inputs, digits().test.inputs)
    assert not np.array_equal(digits(seed=1).test.targets, digits().test.targets)


def _partition(parts, size):
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(size))


def test_iid_split_deals_everything_evenly():
    parts = iid_split(10, 3, seed=0)
    _partition(parts, 10)
    assert [len(part) for part in parts] == [4, 3, 3]
    assert not np.array_equal(np.concatenate(parts), np.arange(10))


TARGETS = np.repeat(np.arange(10), 100)


@pytest.mark.parametrize("alpha", [0.01, 0.5, 100.0])
def test_dirichlet_split_gives_every_sample_to_one_client(alpha):
    parts = dirichlet_split(TARGETS, 7, alpha, seed=3, min_per_client=20)
    _partition(parts, 1000)
    assert min(len(part) for part in parts) >= 20


def _largest_share(alpha):
    """Mean over clients of the share of their most frequent class: 0.1 is balanced, 1 is a single class."""
    parts = dirichlet_split(TARGETS, 5, alpha, seed=0)
    return np.mean([np.bincount(TARGETS[part]).max() / len(part) for part in parts])


def test_smaller_alpha_is_more_skewed():
    shares = [_largest_share(alpha) for alpha in (0.05, 1.0, 1000.0)]
    assert shares[0] > 0.4 > shares[1] > shares[2]
    assert shares[2] < 0.12


def test_dirichlet_split_is_seeded():
    first, second, other = (dirichlet_split(TARGETS, 4, 0.5, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dirichlet_split(TARGETS, 0, 1.0, 0), "num_clients is 0"),
        (lambda: dirichlet_split(TARGETS, 5, 0.0, 0), "alpha is 0.0"),
        (lambda: dirichlet_split(TARGETS, 5, float("nan"), 0), "alpha is nan"),
        (lambda: dirichlet_split(TARGETS, 5, 1.0, 0, min_per_client=201), "cannot give 5 clients 201"),
        (lambda: dirichlet_split(TARGETS[:, None], 5, 1.0, 0), "shape"),
        (lambda: iid_split(3, 4, 0), "3 samples cannot give 4 clients"),
    ],
)
def test_impossible_splits_are_refused(call, message):
    with pytest.raises(ModelError, match=message):
        call()


def test_take_and_batches_keep_the_structure():
    for inputs in (np.arange(5), (np.arange(5), np.arange(5) * 2), {"a": np.arange(5)}):
        samples = Samples(inputs, np.arange(5) * 10)
        part = take(samples, np.array([3, 1]))
        assert type(part.inputs) is type(inputs)
        leaf = (
            part.inputs[0]
            if isinstance(inputs, tuple)
            else part.inputs["a"]
            if isinstance(inputs, dict)
            else part.inputs
        )
        np.testing.assert_array_equal(leaf, [3, 1])
        np.testing.assert_array_equal(part.targets, [30, 10])
        sizes = [len(batch.targets) for batch in batches(samples, 2, epochs=2, seed=0)]
        assert sizes == [2, 2, 1, 2, 2, 1]


def test_token_weights_are_zero_at_padding():
    np.testing.assert_array_equal(token_weights(np.array([[4, 0, IGNORE_INDEX]])), [[1, 1, 0]])
