"""Shapes, sizes and losses that the papers or a few lines of numpy give."""

import numpy as np
import pytest
import torch

from edgetrain.models import MODELS, ModelError, get_model
from edgetrain.models.data import DATA, IGNORE_INDEX, get_data
from edgetrain.models.losses import cross_entropy, token_cross_entropy
from edgetrain.models.mobilenet_v2 import MobileNetV2
from edgetrain.models.tensors import to_tensors
from edgetrain.models.transformer import Attention, padding_mask

SHAPES = {
    "digits-cnn": [(4, 1, 8, 8)],
    "mobilenet-v2": [(4, 3, 128, 128)],
    "ds-cnn": [(4, 1, 49, 10)],
    "resnet-8": [(4, 3, 32, 32)],
    "char-lm": [(4, 64)],
    "bert-tiny": [(4, 128), (4, 128)],
    "vit-tiny": [(4, 3, 32, 32)],
    "seq2seq": [(4, 6), (4, 10)],
}
SMALL = {"num_train": 8, "num_test": 8}
OPTIONS = {"mobilenet-v2": SMALL, "ds-cnn": SMALL, "resnet-8": SMALL, "vit-tiny": SMALL}


def leaves(half):
    if isinstance(half, dict):
        return list(half.values())
    return list(half) if isinstance(half, tuple) else [half]


def test_every_model_has_data_and_a_line_here():
    assert set(MODELS) == set(DATA) == set(SHAPES)


@pytest.mark.parametrize("name", MODELS)
def test_data_has_the_structure_of_the_example_batch(name):
    _, _, (inputs, targets) = get_model(name, batch_size=4)
    assert [tuple(leaf.shape) for leaf in leaves(inputs)] == SHAPES[name]
    for part in get_data(name, **OPTIONS.get(name, {})):
        data_inputs, data_targets = to_tensors(part)
        assert type(data_inputs) is type(inputs)
        for ours, theirs in zip(leaves(data_inputs), leaves(inputs), strict=True):
            assert ours.dtype == theirs.dtype
            assert ours.shape[1:] == theirs.shape[1:]
            assert len(ours) == len(data_targets)
        assert data_targets.dtype == targets.dtype == torch.int64
        assert data_targets.shape[1:] == targets.shape[1:]


def test_unknown_data_and_options_are_refused():
    with pytest.raises(ModelError, match="no data for a model 'lenet'"):
        get_data("lenet")
    with pytest.raises(ModelError, match="does not take size; it takes num_train"):
        get_data("ds-cnn", size=3)


@pytest.mark.parametrize(
    ("width", "parameters"),
    # With 1,000 classes, as other implementations count their trainable parameters (the paper says 3.4 M).
    [(1.0, 3_504_872), (0.35, 1_677_128)],
)
def test_mobilenet_v2_has_the_papers_size(width, parameters):
    assert sum(p.numel() for p in MobileNetV2(1000, width=width).parameters()) == parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0.0}, "width is 0.0"),
        ({"image_size": 100}, "image_size is 100"),
    ],
)
def test_impossible_mobilenets_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        get_model("mobilenet-v2", **options)


def test_impossible_level_is_refused():
    with pytest.raises(ModelError, match="level is 'line'"):
        get_model("char-lm", level="line")


def _log_softmax(x):
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_losses_are_numpys_and_zero_at_ignored_targets():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    targets = np.array([[1, 4, IGNORE_INDEX], [0, IGNORE_INDEX, 2]])
    expected = -np.take_along_axis(_log_softmax(logits), np.maximum(targets, 0)[..., None], -1)[..., 0]
    expected[targets == IGNORE_INDEX] = 0
    actual = token_cross_entropy(torch.from_numpy(logits), torch.from_numpy(targets))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    single = cross_entropy(torch.from_numpy(logits[:, 0]), torch.from_numpy(targets[:, 0]))
    np.testing.assert_allclose(single, expected[:, 0], rtol=1e-5)


def test_attention_is_numpys():
    torch.manual_seed(0)
    attention = Attention(6, heads=2)
    x, context = torch.randn(1, 3, 6), torch.randn(1, 4, 6)
    allowed = torch.tensor([[1, 1, 0, 1]])
    with torch.no_grad():
        actual = attention(x, context, padding_mask(allowed)).numpy()
        q, k, v = (
            layer(source).numpy()[0].reshape(-1, 2, 3)
            for layer, source in ((attention.query, x), (attention.key, context), (attention.value, context))
        )
        mixed = np.empty((3, 2, 3), dtype=np.float32)
        for head in range(2):
            scores = q[:, head] @ k[:, head].T / np.sqrt(3)
            scores[:, 2] = -np.inf
            mixed[:, head] = np.exp(_log_softmax(scores)) @ v[:, head]
        expected = attention.out(torch.from_numpy(mixed.reshape(1, 3, 6))).numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-6)
