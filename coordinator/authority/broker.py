"""A Mosquitto that runs with a federation directory's own configuration."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, Literal

from edgetrain.coordinator.authority.broker_files import CONFIG_FILE
from edgetrain.coordinator.broker import find_mosquitto
from edgetrain.coordinator.errors import BrokerError
from edgetrain.coordinator.processes import spawn, stop

START_SECONDS = 10.0
_RUNNING = b"running"


class FederationBroker:
    """The broker of a federation directory.

    Args:
        directory: as made by `edgetrain init`.
        port: that its mosquitto.conf names.

    Raises:
        BrokerError: not installed, or it does not start; the message says what Mosquitto says.
    """

    mqtt_version: Literal["auto", "3.1.1"] = "auto"

    def __init__(self, directory: Path, port: int) -> None:
        self.port = port
        program = find_mosquitto()
        if program is None:
            raise BrokerError("mosquitto is not installed (Debian: apt install mosquitto)")
        config = directory.absolute() / CONFIG_FILE
        if not config.is_file():
            raise BrokerError(f"{config}: no such file; `edgetrain init` writes it")
        self._log: IO[bytes] = tempfile.TemporaryFile(prefix="edgetrain-mosquitto-")
        self._process = spawn(
            [program, "-c", str(config)], stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL
        )
        deadline = time.monotonic() + START_SECONDS
        # It says so itself: somebody else's broker may have the port.
        while _RUNNING not in (said := self._said()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise BrokerError(f"mosquitto did not start with {config}: {said.decode(errors='replace').strip()}")
            time.sleep(0.02)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def reload(self) -> None:
        """Lets it read passwords, access rules and revoked certificates again; it drops whom they exclude."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        """Ends it. Idempotent."""
        stop(self._process)
        self._log.close()

    def _said(self) -> bytes:
        self._log.seek(0)
        return self._log.read()
