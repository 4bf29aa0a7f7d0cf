"""Comparing the versions of runtimes."""

from __future__ import annotations

import re

from edgetrain.edge_client.errors import SessionError
from edgetrain.protocol.manifest import Manifest


def parse_version(version: str) -> tuple[int, int]:
    """(major, minor) of "1.22.0", "1.22" or "2.13.0+cpu"."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def check_minimum(manifest: Manifest, runtime: str, version: str, package: str) -> None:
    """Checks that the installed package can run the bundle's program.

    Raises:
        SessionError: it is older than the program needs.
        BundleError: the bundle has no program for this runtime.
    """
    needed = manifest.program(runtime).minimum_version
    if parse_version(version) < parse_version(needed):
        raise SessionError(
            f'bundle {manifest.name!r} needs {package} {needed}, here is {version}: pip install "{package}>={needed}"'
        )
