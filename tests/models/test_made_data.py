"""The data that is made by rule, against rules written another way."""

import numpy as np
import pytest
from scipy.fft import dct

from edgetrain.models import ModelError
from edgetrain.models.data import (
    IGNORE_INDEX,
    digits,
    get_data,
    greedy_decode,
    keywords,
    mfcc,
    next_characters,
    next_words,
    rgb_digits,
    shapes,
    spell,
    spelled_numbers,
    topic_paragraphs,
    topics,
)
from edgetrain.models.data.audio import sounds
from edgetrain.models.data.images import SHAPES
from edgetrain.models.data.numbers import BEGIN, END, PAD, decode_words, encode_numbers
from edgetrain.models.data.text import decode_characters, encode_characters, split_words, word_codes

SMALL = {"num_train": 12, "num_test": 4}


@pytest.mark.parametrize("make", [shapes, rgb_digits, keywords])
def test_made_data_depends_on_the_seed_only(make):
    first, again, other = make(**SMALL), make(**SMALL), make(**SMALL, seed=1)
    np.testing.assert_array_equal(first.train.inputs, again.train.inputs)
    np.testing.assert_array_equal(first.test.targets, again.test.targets)
    assert not np.array_equal(first.train.inputs, other.train.inputs)


@pytest.mark.parametrize("make", [shapes, rgb_digits])
def test_images_are_roughly_standardized(make):
    images = make(num_train=300, num_test=0).train.inputs
    assert images.dtype == np.float32
    assert abs(images.mean()) < 0.4
    assert 0.8 < images.std() < 1.2


def test_shapes_are_shapes():
    # Without noise an image has two colours, and the rarer area tells a bar from a square.
    data = shapes(num_train=400, num_test=0, noise=0.0).train
    assert data.inputs.shape == (400, 3, 32, 32)
    assert set(data.targets) == set(range(len(SHAPES)))
    areas = []
    for image, target in zip(data.inputs[:, 0], data.targets, strict=True):
        values = np.unique(image)
        assert len(values) == 2
        areas.append((SHAPES[target], (image == values.min()).mean()))
    mean = {name: np.mean([area for n, area in areas if n == name]) for name in SHAPES}
    assert mean["disc"] > 1.5 * mean["half disc"]
    assert mean["square"] > mean["frame"]
    assert mean["square"] > mean["bar"]


def test_rgb_digits_keep_the_digit():
    # At 8 pixels, without noise, one channel is the original up to a linear map with negative slope.
    images = rgb_digits(size=8, num_train=5, num_test=0, noise=0.0).train
    originals = digits().train
    np.testing.assert_array_equal(images.targets, originals.targets[:5])
    for image, original in zip(images.inputs, originals.inputs[:5], strict=True):
        for channel in image:
            assert np.corrcoef(channel.ravel(), original.ravel())[0, 1] < -0.9999


def test_mfcc_is_the_textbooks():
    wave = sounds(np.array([5]), np.random.default_rng(0))
    frame = wave[0, 320 * 7 : 320 * 7 + 480].astype(np.float64)
    power = np.abs(np.fft.fft(frame * np.hanning(480), 512)[:257]) ** 2
    to_hertz = lambda mel: 700 * (10 ** (mel / 2595) - 1)
    to_mel = lambda hertz: 2595 * np.log10(1 + hertz / 700)
    edges = np.linspace(to_mel(20), to_mel(4000), 42)
    energies = np.zeros(40)
    for bin_, p in enumerate(power):
        mel = to_mel(bin_ * 16000 / 512)
        for band in range(40):
            energies[band] += p * np.interp(mel, edges[band : band + 3], [0, 1, 0], left=0, right=0)
    expected = dct(np.log(energies + 1e-6), norm="ortho")[:10]
    assert to_hertz(edges[-1]) == pytest.approx(4000)
    features = mfcc(wave)
    assert features.shape == (1, 49, 10)
    np.testing.assert_allclose(features[0, 7], expected, rtol=1e-3, atol=1e-3)


def test_keywords_sound_as_their_register_says():
    # Class 4 is the level sound around 300 Hz: its strongest frequency lies within a tenth of that.
    waves = sounds(np.array([4, 4, 4]), np.random.default_rng(1))
    assert np.abs(waves).max() < 2
    peaks = np.abs(np.fft.rfft(waves)).argmax(1)  # one second: a bin is a hertz
    assert all(265 <= peak <= 335 for peak in peaks)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (20, "twenty"),
        (47, "forty seven"),
        (100, "one hundred"),
        (1042, "one thousand forty two"),
        (70_000, "seventy thousand"),
        (373_373, "three hundred seventy three thousand three hundred seventy three"),
    ],
)
def test_numbers_are_spelled(number, words):
    assert spell(number) == words.split()


def test_numbers_out_of_range_are_refused():
    for number in (-1, 1_000_000):
        with pytest.raises(ModelError, match="is not between"):
            spell(number)
    with pytest.raises(ModelError, match="max_digits is 7"):
        spelled_numbers(max_digits=7)


def _value(words):
    """What words say: the rule of `spell` turned around."""
    small = {" ".join(spell(n)): n for n in (*range(20), *range(20, 100, 10))}
    total = current = 0
    for word in words:
        if word == "hundred":
            current *= 100
        elif word == "thousand":
            total, current = current * 1000, 0
        else:
            current += small[word]
    return total + current


def test_spelled_numbers_mean_their_source_and_are_shifted_right():
    data = spelled_numbers()
    seen = set()
    for (source, begun), targets in data:
        for row, words_in, words_out in zip(source, begun, targets, strict=True):
            number = int("".join(str(code - 1) for code in row if code))
            seen.add(number)
            real = words_out[words_out != IGNORE_INDEX]
            assert real[-1] == END
            assert _value(decode_words(real)) == number
            assert words_in[0] == BEGIN
            np.testing.assert_array_equal(words_in[1 : len(real)], real[:-1])
            assert (words_in[len(real) :] == PAD).all()
    assert len(seen) == len(data.train.targets) + len(data.test.targets)
    assert {len(str(number)) for number in seen} == {1, 2, 3, 4, 5, 6}


def test_greedy_decoding_stops_at_the_end():
    # A "model" that always wants word 7, then the end.
    def predict(source, words):
        logits = np.zeros((len(source), 10, 33), dtype=np.float32)
        position = (words != PAD).sum(1) - 1
        logits[np.arange(len(source)), position, np.where(position < 2, 7, END)] = 1
        return logits

    words = greedy_decode(predict, encode_numbers([44, 5]))
    np.testing.assert_array_equal(words, [[7, 7, END] + [PAD] * 7] * 2)


def test_windows_put_together_are_the_text():
    title = max(topics(), key=lambda t: len(topics()[t]))
    (inputs, targets), (_, test_targets) = next_characters(titles=[title])
    shown = decode_characters([inputs[0, 0], *targets[targets != IGNORE_INDEX]])
    text = decode_characters(encode_characters(topics()[title]))
    assert text.startswith(shown)
    assert len(shown) == len(text) - round(0.1 * len(text))
    held_out = decode_characters(test_targets[test_targets != IGNORE_INDEX])
    assert text.endswith(held_out)
    assert len(held_out) == len(text) - len(shown) - 1
    np.testing.assert_array_equal(inputs[0, 1:], targets[0, :-1])


def test_all_topics_together_are_the_topics_one_by_one():
    together = get_data("char-lm").train.targets
    one_by_one = [next_characters(titles=[title]).train.targets for title in topics()]
    np.testing.assert_array_equal(together, np.concatenate(one_by_one))
    assert min(len(part) for part in one_by_one) >= 1


def test_words_are_ranked_and_rare_ones_are_ignored_as_targets():
    assert split_words("It's `x_1` = 3.5\n") == ["it", "'", "s", "`", "x", "_", "1", "`", "=", "3", ".", "5"]
    codes = word_codes(50)
    assert len(codes) == 49
    assert sorted(codes.values()) == list(range(1, 50))
    data = next_words(vocabulary=50).train
    assert data.inputs.max() == 49
    assert set(np.unique(data.targets)) == {IGNORE_INDEX, *range(1, 50)}


def test_paragraphs_are_masked_behind_their_words():
    data = topic_paragraphs(num_topics=3, length=32, vocabulary=100).train
    ids, mask = data.inputs["input_ids"], data.inputs["attention_mask"]
    assert (ids[:, 0] == 99).all()
    assert ids[:, 1:].max() < 99
    assert (np.diff(mask, axis=1) <= 0).all()
    assert (mask.sum(1) >= 9).all()
    assert (ids[mask == 0] == 0).all()
    assert set(data.targets) == {0, 1, 2}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: next_characters(titles=["no such"]), "no topics .'no such'."),
        (lambda: next_words(titles=[]), "no topics"),
        (lambda: topic_paragraphs(num_topics=1), "num_topics is 1"),
    ],
)
def test_impossible_texts_are_refused(call, message):
    with pytest.raises(ModelError, match=message):
        call()
