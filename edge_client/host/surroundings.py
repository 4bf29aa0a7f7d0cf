"""What the operating system and a Pi's firmware say about network and power, where there is somebody to ask."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ASK_SECONDS = 2.0

# Where the Raspberry Pi's kernel shows what `vcgencmd get_throttled` prints.
THROTTLED_FILE = Path("/sys/devices/platform/soc/soc:firmware/get_throttled")
# Bits of the firmware's answer that are about this moment; 16 to 19 say the same of the time since the boot.
# (Raspberry Pi documentation, vcgencmd, get_throttled)
THROTTLED_BITS = {
    0: "under-voltage",
    1: "a capped frequency",
    2: "throttling",
    3: "the soft temperature limit",
}

# NMMetered of NetworkManager's D-Bus interface: yes, no, guessed yes, guessed no.
_METERED = {"1": True, "2": False, "3": True, "4": False}


def throttled(file: Path = THROTTLED_FILE) -> tuple[str, ...]:
    """What the firmware of a Raspberry Pi says is wrong now; nothing on other machines."""
    try:
        answer = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        answer = _answer("vcgencmd", "get_throttled").removeprefix("throttled=")
    try:
        bits = int(answer, 16)
    except ValueError:
        return ()
    return tuple(name for bit, name in THROTTLED_BITS.items() if bits >> bit & 1)


def is_metered() -> bool | None:
    """Whether NetworkManager takes the connection for a metered one; None if it does not know or is not there."""
    service = "org.freedesktop.NetworkManager"
    answer = _answer("busctl", "get-property", service, "/org/freedesktop/NetworkManager", service, "Metered")
    return _METERED.get(answer.removeprefix("u "))


def _answer(program: str, *arguments: str) -> str:
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        done = subprocess.run(  # noqa: S603 - fixed arguments
            [path, *arguments], capture_output=True, text=True, timeout=ASK_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout.strip()
