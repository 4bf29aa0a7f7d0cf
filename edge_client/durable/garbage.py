"""Old bundles go: a phone has other uses for the space."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

# Besides the one in use.
KEPT_BUNDLES = 1


def forget_old_bundles(directory: Path, *, current: Path, keep: int = KEPT_BUNDLES) -> int:
    """Deletes all bundles but the current one and the `keep` used last before it.

    Args:
        directory: holds one directory per bundle; may be missing.
        current: the one in use; becomes the newest.
        keep: how many others stay.

    Returns:
        Bytes deleted.
    """
    if current.exists():
        os.utime(current)
    others = [path for path in directory.glob("*") if path.is_dir() and path != current]
    others.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    freed = 0
    for path in others[keep:]:
        freed += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        shutil.rmtree(path, ignore_errors=True)
        logger.info("old bundle %s… deleted", path.name[:12])
    return freed
