"""Seeds of one client, made of the plan's."""

from __future__ import annotations

import hashlib


def mix_seed(seed: int, name: str, round_number: int) -> int:
    """A seed of 56 bits for one purpose of one client in one round: the same arguments give the same."""
    digest = hashlib.sha256(f"{seed}/{name}/{round_number}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
