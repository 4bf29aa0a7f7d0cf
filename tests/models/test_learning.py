"""Each reference model learns its data in eager torch, with the optimizer that devices have."""

import numpy as np
import pytest
import torch

from edgetrain.models import get_model
from edgetrain.models.data import exact_matches, get_data, greedy_decode, next_characters, next_words
from support.learning import accuracy, call, mean_loss, train


def sgd(learning_rate):
    return lambda parameters: torch.optim.SGD(parameters, learning_rate, momentum=0.9)


# name, options of the data, steps, batch size, learning rate, clip, accuracy on held-out data to reach
LEVELS = [
    ("mobilenet-v2", {"size": 64}, 100, 32, 0.03, 0.0, 0.75),
    ("ds-cnn", {}, 80, 32, 0.1, 0.0, 0.97),
    ("resnet-8", {}, 150, 32, 0.06, 0.0, 0.88),
    ("vit-tiny", {}, 200, 32, 0.05, 1.0, 0.80),
    ("bert-tiny", {}, 150, 16, 0.03, 1.0, 0.42),
]


@pytest.mark.parametrize("case", LEVELS, ids=lambda case: case[0])
def test_classifier_reaches_its_level(case):
    name, options, steps, batch_size, rate, clip, level = case
    source, data = get_model(name), get_data(name, **options)
    guess = np.bincount(data.test.targets).max() / len(data.test.targets)
    assert level > 1.5 * guess
    train(source, data.train, steps=steps, batch_size=batch_size, optimizer=sgd(rate), max_grad_norm=clip)
    assert accuracy(source, data.test) >= level


def _entropy_of_single_tokens(train_targets, test_targets, size):
    """What a model that knows only frequencies would lose per token, in nats."""
    counts = np.bincount(train_targets[train_targets >= 0], minlength=size) + 1.0
    return -np.log(counts / counts.sum())[test_targets[test_targets >= 0]].mean()


# level, data, steps, batch size, learning rate, number of tokens, nats per token better than frequencies
LANGUAGE_LEVELS = [
    ("char", next_characters, 120, 16, 0.1, 97, 0.5),
    ("word", next_words, 150, 8, 0.2, 2000, 0.12),
]


@pytest.mark.parametrize("case", LANGUAGE_LEVELS, ids=lambda case: case[0])
def test_language_model_learns_more_than_frequencies(case):
    level, data, steps, batch_size, rate, size, gain = case
    source, (train_part, test_part) = get_model("char-lm", level=level), data()
    train(source, train_part, steps=steps, batch_size=batch_size, optimizer=sgd(rate), max_grad_norm=1.0)
    frequencies = _entropy_of_single_tokens(train_part.targets, test_part.targets, size)
    assert mean_loss(source, test_part, limit=256) < frequencies - gain


def test_seq2seq_spells_numbers_it_has_not_seen():
    source, data = get_model("seq2seq"), get_data("seq2seq")
    train(source, data.train, steps=250, batch_size=64, optimizer=sgd(0.1), max_grad_norm=1.0)

    def predict(numbers, words):
        with torch.no_grad():
            return source.module(torch.from_numpy(numbers), torch.from_numpy(words)).numpy()

    words = greedy_decode(predict, data.test.inputs[0])
    assert exact_matches(words, data.test.targets) >= 0.9


def test_language_model_is_causal():
    module, _, (tokens, _) = get_model("char-lm")
    changed = tokens.clone()
    changed[:, 40:] = 7
    with torch.no_grad():
        before, after = module(tokens), module(changed)
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


@pytest.mark.parametrize("name", ["bert-tiny", "seq2seq"])
def test_padding_changes_nothing_and_nothing_but_padding_is_finite(name):
    module, _, (inputs, _) = get_model(name)
    tokens = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs[0]
    with torch.no_grad():
        expected = call(module, inputs)
        if name == "bert-tiny":
            other = torch.where(inputs["attention_mask"] == 1, tokens, 5)
            assert not torch.equal(other, tokens)
            actual = module(other, inputs["attention_mask"])
            blank = module(torch.zeros_like(tokens), torch.zeros_like(tokens))
        else:
            # What stands at padded positions reaches nothing: change the embedding of padding.
            assert bool((tokens == 0).any())
            module.source_embedding.weight[0] += 3.0
            actual = module(*inputs)
            blank = module(torch.zeros_like(tokens), torch.zeros_like(inputs[1]))
    torch.testing.assert_close(actual, expected)
    assert bool(torch.isfinite(blank).all())
