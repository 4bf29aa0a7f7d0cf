"""Groups of parameters by name."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt

from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.manifest import Manifest


def elements_of(manifest: Manifest, patterns: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which elements of the flat vector belong to parameters with such names, bool [num_parameters].

    Args:
        manifest: names the parameters.
        patterns: names, or with `*`, `?` and `[…]` as in file names: "head.*", "*.norm?.*".

    Raises:
        ConfigError: a pattern that no parameter matches.
    """
    mask = np.zeros(manifest.num_parameters, np.bool_)
    for pattern in patterns:
        found = [entry for entry in manifest.parameters if fnmatchcase(entry.name, pattern)]
        if not found:
            names = ", ".join(entry.name for entry in manifest.parameters[:6])
            raise ConfigError(f"{pattern!r} is no parameter of bundle {manifest.name!r}; it has {names}, …")
        for entry in found:
            entry.of(mask)[...] = True
    return mask
