"""Letting a broker that runs elsewhere read its files again: by a command of the operator's."""

from __future__ import annotations

import logging
import shlex
import subprocess
import threading
from collections.abc import Callable

from edgetrain.protocol.errors import ConfigError

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 60.0


def reload_by(command: str) -> Callable[[], None]:
    """What runs a command whenever it is called, without waiting for it. One at a time; failures are logged.

    Args:
        command: as for a shell, which there is none of: a program and its arguments.

    Raises:
        ConfigError: it names no program, or its quotation marks do not match.
    """
    try:
        arguments = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"reload_command: {command!r}: {error}; quote arguments as for a shell") from error
    if not arguments:
        raise ConfigError(f"reload_command: {command!r} names no program: leave it out, or write one")
    lock = threading.Lock()

    def run() -> None:
        with lock:
            try:
                done = subprocess.run(  # noqa: S603 - the operator's own
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    timeout=TIMEOUT_SECONDS,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                logger.error("reload_command: %s: the broker has not read its files again", error)  # noqa: TRY400
                return
        if done.returncode:
            said = done.stdout.decode(errors="replace").strip()[-500:]
            logger.error(
                "reload_command ended with status %d: the broker may not have read its files again: %s",
                done.returncode,
                said,
            )

    return lambda: threading.Thread(target=run, name="reload-broker", daemon=True).start()
