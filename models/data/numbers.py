"""Numbers and how English spells them: pairs for an encoder-decoder, made by rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from edgetrain.models.data.samples import IGNORE_INDEX, Dataset, Floats, Ints, held_out
from edgetrain.models.errors import ModelError

_SMALL = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]

PAD, BEGIN, END = 0, 1, 2
WORDS = ("<pad>", "<begin>", "<end>", *_SMALL, *_TENS, "hundred", "thousand")
NUM_WORDS = len(WORDS)
# Source symbols: 0 is padding, digit d is d + 1.
NUM_SYMBOLS = 11
MAX_DIGITS = 6
# "three hundred seventy three thousand three hundred seventy three" and the end: 9 + 1.
MAX_WORDS = 10
_CODES = {word: code for code, word in enumerate(WORDS)}


def spell(number: int) -> list[str]:
    """The words of a number from 0 to 999,999: 1042 -> one thousand forty two.

    Raises:
        ModelError: out of range.
    """
    if not 0 <= number < 10**MAX_DIGITS:
        raise ModelError(f"{number} is not between 0 and {10**MAX_DIGITS - 1}")
    if number < 20:
        return [_SMALL[number]]
    if number < 100:
        return [_TENS[number // 10 - 2], *(spell(number % 10) if number % 10 else [])]
    unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = number % unit
    return [*spell(number // unit), name, *(spell(rest) if rest else [])]


def encode_numbers(numbers: Iterable[int]) -> Ints:
    """Source symbols int64 [N, 6], most significant digit first, padded with 0 behind."""
    rows = [[int(digit) + 1 for digit in str(number)] for number in numbers]
    return _padded(rows, MAX_DIGITS, PAD)


def decode_words(codes: Iterable[int]) -> list[str]:
    """Words up to `END`."""
    words = []
    for code in codes:
        if code == END:
            break
        words.append(WORDS[code])
    return words


def spelled_numbers(
    *, count: int = 8000, max_digits: int = MAX_DIGITS, test_fraction: float = 0.1, seed: int = 0
) -> Dataset[tuple[Ints, Ints]]:
    """Different random numbers, about equally many of each length, and their spelling.

    Args:
        count: how many to draw; duplicates are dropped, so there will be fewer.
        max_digits: 1 to 6.
        test_fraction: share of the numbers that is held out.
        seed: the same seed gives the same numbers.

    Returns:
        Inputs (source int64 [N, 6], decoder input int64 [N, 10]); targets int64 [N, 10]. The decoder input
        is the target shifted right behind `BEGIN` (teacher forcing), padded with `PAD`; the targets are
        `IGNORE_INDEX` behind `END`.

    Raises:
        ModelError: `max_digits` is out of range.
    """
    if not 1 <= max_digits <= MAX_DIGITS:
        raise ModelError(f"max_digits is {max_digits}; it must be between 1 and {MAX_DIGITS}")
    rng = np.random.default_rng(seed)
    digits = rng.integers(1, max_digits + 1, count)
    lowest = np.where(digits == 1, 0, 10 ** (digits - 1))
    numbers = [int(number) for number in np.unique(rng.integers(lowest, 10**digits))]
    words = [[_CODES[word] for word in spell(number)] for number in numbers]
    begun = _padded([[BEGIN, *row] for row in words], MAX_WORDS, PAD)
    ended = _padded([[*row, END] for row in words], MAX_WORDS, IGNORE_INDEX)
    return held_out((encode_numbers(numbers), begun), ended, test_fraction=test_fraction, seed=seed)


def greedy_decode(predict: Callable[[Ints, Ints], Floats], source: Ints) -> Ints:
    """Spells by taking the likeliest word again and again.

    Args:
        predict: (source [N, 6], decoder input [N, 10]) -> logits [N, 10, words]; the torch module or a
            session's `infer`.
        source: int64 [N, 6].

    Returns:
        Words int64 [N, 10], `PAD` behind `END`.
    """
    decoder_input = np.full((len(source), MAX_WORDS), PAD, dtype=np.int64)
    decoder_input[:, 0] = BEGIN
    words = np.full_like(decoder_input, PAD)
    ended = np.zeros(len(source), dtype=np.bool_)
    for position in range(MAX_WORDS):
        word = np.where(ended, PAD, predict(source, decoder_input)[:, position].argmax(-1))
        words[:, position] = word
        ended |= word == END
        if position + 1 < MAX_WORDS:
            decoder_input[:, position + 1] = word
    return words


def exact_matches(words: Ints, targets: Ints) -> float:
    """Share of rows that are right in every word up to and including `END`."""
    return float(np.all((words == targets) | (targets == IGNORE_INDEX), axis=1).mean())


def _padded(rows: list[list[int]], length: int, padding: int) -> Ints:
    table = np.full((len(rows), length), padding, dtype=np.int64)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table
