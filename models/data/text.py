"""English text without a download: Python's own reference manual.

`pydoc_data.topics` in the standard library holds 79 topics (465 kB in Python 3.11, a little different in
other versions) of very different size and subject: natural clients of a federation. See `topics`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np

from edgetrain.models.data.samples import IGNORE_INDEX, Dataset, Ints, Samples, held_out
from edgetrain.models.errors import ModelError

# Newline and printable ASCII; whatever else the text holds becomes UNKNOWN. Fixed, so that every device has
# the same symbols whatever its Python version.
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
UNKNOWN = 0
NUM_CHARACTERS = 1 + len(ALPHABET)
_CODES = {character: code for code, character in enumerate(ALPHABET, start=1)}
_WORD = re.compile(r"[A-Za-z]+|\d+|[^\w\s]|_+")


@cache
def topics() -> dict[str, str]:
    """All topics, title -> text, sorted by title."""
    from pydoc_data.topics import topics as texts  # noqa: PLC0415  # half a megabyte

    return {title: texts[title] for title in sorted(texts)}


def encode_characters(text: str) -> Ints:
    """Codes [len(text)], 0 for what is not in `ALPHABET`."""
    return np.array([_CODES.get(character, UNKNOWN) for character in text], dtype=np.int64)


def decode_characters(codes: Iterable[int]) -> str:
    """The text of codes; "\N{REPLACEMENT CHARACTER}" for 0."""
    return "".join("\N{REPLACEMENT CHARACTER}" if code == UNKNOWN else ALPHABET[code - 1] for code in codes)


def split_words(text: str) -> list[str]:
    """Lower-case words, numbers and single punctuation marks."""
    return _WORD.findall(text.lower())


@cache
def word_codes(size: int) -> dict[str, int]:
    """The `size` - 1 most frequent words of all topics -> 1, 2, …; ties in alphabetical order."""
    counts = Counter(word for text in topics().values() for word in split_words(text))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return {word: code for code, word in enumerate(ranked[: size - 1], start=1)}


def encode_words(text: str, size: int) -> Ints:
    """Codes of the words of `text` under `word_codes(size)`, 0 for rare words."""
    codes = word_codes(size)
    return np.array([codes.get(word, UNKNOWN) for word in split_words(text)], dtype=np.int64)


def next_characters(
    *, length: int = 64, titles: Sequence[str] | None = None, test_fraction: float = 0.1
) -> Dataset[Ints]:
    """Windows of text and the characters that follow.

    Args:
        length: T, characters per window. Windows do not overlap; the last of a topic is padded.
        titles: the topics to use; all of them if None. One title makes one client's data.
        test_fraction: the end of each topic is held out.

    Returns:
        Inputs int64 [N, T] in [0, `NUM_CHARACTERS`); targets int64 [N, T], the inputs one character on,
        `IGNORE_INDEX` past the end of the topic.

    Raises:
        ModelError: a title that does not exist.
    """
    return _windows([encode_characters(text) for text in _texts(titles)], length, test_fraction, ignored=None)


def next_words(
    *,
    length: int = 64,
    vocabulary: int = 2000,
    titles: Sequence[str] | None = None,
    test_fraction: float = 0.1,
) -> Dataset[Ints]:
    """Windows of text and the words that follow; as `next_characters`.

    Rare words (code 0) are `IGNORE_INDEX` in the targets: "some rare word" is no prediction.
    """
    codes = [encode_words(text, vocabulary) for text in _texts(titles)]
    return _windows(codes, length, test_fraction, ignored=UNKNOWN)


def topic_paragraphs(
    *, num_topics: int = 8, length: int = 128, vocabulary: int = 2000, seed: int = 0
) -> Dataset[dict[str, Ints]]:
    """Which topic is this paragraph from?

    Paragraphs (text between blank lines) of at least eight words from the topics with most of them.

    Returns:
        Inputs {"input_ids": int64 [N, T] in [0, vocabulary), "attention_mask": int64 [N, T], 1 for words and
        0 for padding}. Position 0 holds the code `vocabulary` - 1, BERT's [CLS]. Targets int64 [N], the
        topic's rank by number of paragraphs. A random fifth is held out.

    Raises:
        ModelError: `num_topics` is below 2, or there are not so many.
    """
    paragraphs = {title: _paragraphs(text, vocabulary - 1) for title, text in topics().items()}
    chosen = sorted(paragraphs, key=lambda title: (-len(paragraphs[title]), title))[:num_topics]
    if not 2 <= num_topics <= len(paragraphs):
        raise ModelError(f"num_topics is {num_topics}; there are {len(paragraphs)}, and two make a choice")
    rows = [row[: length - 1] for title in chosen for row in paragraphs[title]]
    labels = [label for label, title in enumerate(chosen) for _ in paragraphs[title]]
    ids = np.zeros((len(rows), length), dtype=np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, 1 : len(row) + 1] = row
        mask[index, : len(row) + 1] = 1
    ids[:, 0] = vocabulary - 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    return held_out(inputs, np.array(labels, dtype=np.int64), test_fraction=0.2, seed=seed)


def _paragraphs(text: str, vocabulary: int) -> list[Ints]:
    rows = (encode_words(paragraph, vocabulary) for paragraph in re.split(r"\n\s*\n", text))
    return [row for row in rows if len(row) >= 8]


def _texts(titles: Sequence[str] | None) -> list[str]:
    if titles is None:
        return list(topics().values())
    missing = [title for title in titles if title not in topics()]
    if missing or not titles:
        raise ModelError(f"no topics {missing}; choose from {', '.join(topics())}")
    return [topics()[title] for title in titles]


def _windows(texts: list[Ints], length: int, test_fraction: float, ignored: int | None) -> Dataset[Ints]:
    train, test = [], []
    for codes in texts:
        end = len(codes) - round(test_fraction * len(codes))
        train.append(_pairs(codes[:end], length, ignored))
        test.append(_pairs(codes[end:], length, ignored))
    return Dataset(train=_join(train), test=_join(test))


def _join(parts: list[Samples[Ints]]) -> Samples[Ints]:
    return Samples(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _pairs(codes: Ints, length: int, ignored: int | None) -> Samples[Ints]:
    count = max(0, -(-(len(codes) - 1) // length))
    inputs = np.full(count * length, UNKNOWN, dtype=np.int64)
    targets = np.full(count * length, IGNORE_INDEX, dtype=np.int64)
    following = codes[1:]
    inputs[: len(following)] = codes[: len(following)]
    targets[: len(following)] = (
        following if ignored is None else np.where(following == ignored, IGNORE_INDEX, following)
    )
    return Samples(inputs.reshape(count, length), targets.reshape(count, length))
