"""A Mosquitto that runs with a federation directory's own configuration."""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
from collections import deque
from pathlib import Path
from typing import Literal

from edgetrain.coordinator.authority.broker_files import CONFIG_FILE
from edgetrain.coordinator.broker import check_free, find_mosquitto, wait_until_open
from edgetrain.coordinator.errors import BrokerError
from edgetrain.coordinator.processes import spawn, stop

logger = logging.getLogger(__name__)


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
        check_free(port)
        self._process = spawn(
            [program, "-c", str(config)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        # The last that it said: others decide how much it says.
        self._said: deque[str] = deque(maxlen=20)
        self._reader = threading.Thread(target=self._listen, name="mosquitto-log", daemon=True)
        self._reader.start()
        try:
            wait_until_open(port, alive=lambda: self._process.poll() is None)
        except BrokerError as error:
            self.stop()
            said = "\n".join(self._said)
            raise BrokerError(f"mosquitto did not start with {config}: {said or error}") from error

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
        self._reader.join()

    def _listen(self) -> None:
        assert self._process.stdout is not None, "a pipe"
        with self._process.stdout as output:
            for line in output:
                text = line.decode(errors="replace").rstrip()
                self._said.append(text)
                logger.debug("mosquitto: %s", text)
