"""RGB images: shapes drawn by rule, and real digits in colour."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from edgetrain.models.data.digits import PIXEL_DEVIATION, PIXEL_MEAN, digits
from edgetrain.models.data.samples import Dataset, Floats, Ints, Samples

SHAPES = (
    "disc",
    "ring",
    "square",
    "frame",
    "triangle",
    "cross",
    "bar",
    "two bars",
    "half disc",
    "checkers",
)

# Colours, in 0…1 at first, are brought to about mean 0 and deviation 1.
COLOUR_MEAN = 0.65
COLOUR_DEVIATION = 0.23

Mask: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


def shapes(
    *, size: int = 32, num_train: int = 2000, num_test: int = 400, noise: float = 0.05, seed: int = 0
) -> Dataset[Floats]:
    """Ten classes of shapes (`SHAPES`) at random places, sizes and angles, in random colours.

    Angles are up to 22.5° either way; Gaussian noise is added.

    Args:
        size: pixels a side.
        num_train: images to learn from.
        num_test: images held out.
        noise: standard deviation of Gaussian noise per pixel and channel, where colours span 0 to 1.
        seed: the same seed gives the same images.

    Returns:
        Inputs float32 [N, 3, size, size]; targets int64 [N].
    """
    rng = np.random.default_rng(seed)
    parts = []
    for count in (num_train, num_test):
        labels = rng.integers(0, len(SHAPES), count)
        u, v = _local_coordinates(rng, count, size)
        images = _paint(rng, _inside(u, v, labels).astype(np.float32), noise)
        parts.append(Samples(images, labels))
    return Dataset(*parts)


def rgb_digits(
    *, size: int = 32, num_train: int = 1437, num_test: int = 360, noise: float = 0.05, seed: int = 0
) -> Dataset[Floats]:
    """The real 8x8 digits, enlarged bilinearly and painted in random colours on random colours.

    Arguments as of `shapes`. At most 1,437 and 360 images, in the split of `digits`; 128 pixels a side take 197 kB an
    image.

    Returns:
        Inputs float32 [N, 3, size, size]; targets int64 [N].

    Raises:
        ModelError: scikit-learn is not installed.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for samples, count in zip(digits(), (num_train, num_test), strict=True):
        # Back from standardized pixels to 0 (paper) … 1 (ink).
        ink = (samples.inputs[:count, 0] * np.float32(PIXEL_DEVIATION) + np.float32(PIXEL_MEAN)) / 16
        masks = _enlarge(ink.astype(np.float32), size)
        parts.append(Samples(_paint(rng, masks, noise), samples.targets[:count]))
    return Dataset(*parts)


def _local_coordinates(rng: np.random.Generator, count: int, size: int) -> tuple[Floats, Floats]:
    """Pixel coordinates [N, size, size] in the frame of a shape: moved, turned, scaled to about ±1."""
    column = (count, 1, 1)
    radius = rng.uniform(0.45, 0.75, column)
    centre_x, centre_y = rng.uniform(-0.25, 0.25, (2, *column))
    angle = rng.uniform(-np.pi / 8, np.pi / 8, column)
    axis = np.linspace(-1, 1, size)
    x, y = axis[None, None, :] - centre_x, axis[None, :, None] - centre_y
    u = (np.cos(angle) * x + np.sin(angle) * y) / radius
    v = (np.cos(angle) * y - np.sin(angle) * x) / radius
    return u.astype(np.float32), v.astype(np.float32)


def _inside(u: Floats, v: Floats, labels: Ints) -> Mask:
    """Which pixels [N, size, size] belong to the shape."""
    r = np.hypot(u, v)
    box = np.maximum(abs(u), abs(v))
    thin_u, thin_v = abs(u) < 0.28, abs(v) < 0.28
    rules = (
        r < 0.9,
        (r < 0.95) & (r > 0.55),
        box < 0.8,
        (box < 0.85) & (box > 0.5),
        (v > -0.55) & (v < 1.1 - 1.9 * abs(u)),
        (box < 0.95) & (thin_u | thin_v),
        (abs(u) < 1) & thin_v,
        (abs(u) < 0.9) & (abs(v) > 0.25) & (abs(v) < 0.65),
        (r < 1) & (v > 0),
        (box < 0.9) & (np.sin(4.5 * u) * np.sin(4.5 * v) > 0),
    )
    inside = np.zeros(u.shape, dtype=np.bool_)
    for label, rule in enumerate(rules):
        chosen = labels == label
        inside[chosen] = rule[chosen]
    return inside


def _paint(rng: np.random.Generator, masks: Floats, noise: float) -> Floats:
    """Masks [N, size, size] in 0…1 to standardized RGB [N, 3, size, size]."""
    count = len(masks)
    # Ink is darker than paper by half the range in every channel, so that a shape is always visible.
    paper = rng.uniform(0.5, 1, (count, 3, 1, 1)).astype(np.float32)
    images = np.asarray(paper - np.float32(0.5) * masks[:, None], dtype=np.float32)
    images += np.float32(noise) * rng.standard_normal(images.shape, dtype=np.float32)
    images -= np.float32(COLOUR_MEAN)
    images /= np.float32(COLOUR_DEVIATION)
    return images


def _enlarge(images: Floats, size: int) -> Floats:
    """Bilinear: [N, 8, 8] to [N, size, size], corners on corners."""
    across = _interpolation(images.shape[-1], size)
    return np.asarray(across @ images @ across.T, dtype=np.float32)


def _interpolation(old: int, new: int) -> Floats:
    """The matrix [new, old] that interpolates linearly along one axis."""
    position = np.linspace(0, old - 1, new)
    return np.maximum(0, 1 - abs(position[:, None] - np.arange(old))).astype(np.float32)
