"""1,797 real handwritten digits of 8x8 pixels.

The test part of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998, as it lies
in every installation of scikit-learn.
"""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from edgetrain.models.data.samples import Dataset, Floats, held_out
from edgetrain.models.errors import ModelError

# Of the whole set, in the file's unit of 0 to 16.
PIXEL_MEAN = 4.884
PIXEL_DEVIATION = 6.017


def digits(*, test_fraction: float = 0.2, seed: int = 0) -> Dataset[Floats]:
    """The digits, shuffled, with a part held out.

    Args:
        test_fraction: share of the 1,797 images that is held out; 0.2 gives 1,437 and 360.
        seed: of the shuffle. Whoever shares the seed shares the split.

    Returns:
        Inputs float32 [N, 1, 8, 8], of mean 0 and deviation 1 over the whole set; targets int64 [N].

    Raises:
        ModelError: scikit-learn is not installed.
    """
    pixels, labels = _read()
    images = (pixels.reshape(-1, 1, 8, 8) - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_DEVIATION)
    return held_out(images, labels.astype(np.int64), test_fraction=test_fraction, seed=seed)


def _read() -> tuple[Floats, Floats]:
    # scikit-learn's own loader takes 90 MB and a second for its imports; a device has neither to give.
    spec = find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("the digits lie in scikit-learn, which is not installed: pip install scikit-learn")
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    try:
        with gzip.open(path) as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    except OSError as error:
        raise ModelError(f"{path}: cannot read scikit-learn's digits: {error}") from error
    return table[:, :-1], table[:, -1]
