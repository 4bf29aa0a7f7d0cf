"""Starting a broker beside the coordinator: Mosquitto where it is installed, else an embedded one.

Both listen on the loopback interface only and without passwords: for demos, tests and simulations on one
machine. A federation across machines runs a broker of its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from edgetrain.coordinator.errors import BrokerError
from edgetrain.coordinator.processes import spawn, stop

HOST = "127.0.0.1"
START_SECONDS = 10.0
STOP_SECONDS = 1.0

BrokerKind = Literal["mosquitto", "embedded"]


class LocalBroker(Protocol):
    """A broker that we started."""

    # What it speaks at best; "auto" where clients can find out quickly.
    mqtt_version: Literal["auto", "3.1.1"]

    @property
    def port(self) -> int:
        """Its port on the loopback interface."""
        ...

    def stop(self) -> None:
        """Ends it. Idempotent."""
        ...


def start_broker(kind: BrokerKind | None = None, *, port: int = 0) -> LocalBroker:
    """Starts a broker and returns when it accepts connections.

    Args:
        kind: which; None takes Mosquitto if it is installed, else the embedded one.
        port: to listen on; 0 for any free one.

    Raises:
        BrokerError: not installed, or the port is taken.
    """
    if kind is None:
        kind = "mosquitto" if find_mosquitto() else "embedded"
    if port:
        check_free(port)
    return Mosquitto(port or free_port()) if kind == "mosquitto" else EmbeddedBroker(port or free_port())


def find_mosquitto() -> str | None:
    """Path of the mosquitto program; Debian puts it where users' PATH does not look."""
    return shutil.which("mosquitto", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Mosquitto:
    """A mosquitto process (MQTT 5 and 3.1.1).

    Args:
        port: to listen on, on the loopback interface.
        settings: further lines for mosquitto.conf.
        in_flight: messages that it sends ahead of their acknowledgements; clients of MQTT 5 may take fewer, others not.
    """

    mqtt_version: Literal["auto", "3.1.1"] = "auto"

    def __init__(self, port: int, *, settings: str = "", in_flight: int = 64) -> None:
        self.port = port
        program = find_mosquitto()
        if program is None:
            raise BrokerError(
                "mosquitto is not installed (Debian: apt install mosquitto); --broker embedded needs no installation"
            )
        self._directory = tempfile.TemporaryDirectory(prefix="edgetrain-mosquitto-")
        config = Path(self._directory.name) / "mosquitto.conf"
        log = Path(self._directory.name) / "mosquitto.log"
        config.write_text(
            f"listener {port} {HOST}\nallow_anonymous true\npersistence false\n"
            f"max_queued_messages 0\nmax_inflight_messages {in_flight}\nset_tcp_nodelay true\n{settings}",
            encoding="ascii",
        )
        with log.open("wb") as output:
            self._process = spawn([program, "-c", str(config)], stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        try:
            wait_until_open(port, alive=lambda: self._process.poll() is None)
        except BrokerError as error:
            text = log.read_text(errors="replace").strip()
            self.stop()
            raise BrokerError(f"mosquitto did not start: {text or error}") from error

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def stop(self) -> None:
        """See `LocalBroker`."""
        stop(self._process)
        self._directory.cleanup()


class EmbeddedBroker:
    """aMQTT in a thread of this process.

    It speaks MQTT 3.1.1 only and leaves an MQTT 5 CONNECT unanswered, so say so to those who connect.

    Args:
        port: to listen on, on the loopback interface.
        websocket_port: to listen on for MQTT over WebSockets; 0 for none.
    """

    mqtt_version: Literal["auto", "3.1.1"] = "3.1.1"

    def __init__(self, port: int, *, websocket_port: int = 0) -> None:
        self.port = port
        self._websocket_port = websocket_port
        self._loop = asyncio.SelectorEventLoop()
        self._failure: BaseException | None = None
        self._end = asyncio.Event()
        # Set when it listens, or never will.
        self._settled = threading.Event()
        self._thread = threading.Thread(target=self._run, name="embedded-broker", daemon=True)
        self._thread.start()
        self._settled.wait(START_SECONDS)
        if self._failure or not self._settled.is_set():
            self.stop()
            reason = self._failure or f"it does not listen after {START_SECONDS:.0f} s"
            raise BrokerError(f"the embedded broker did not start: {reason}") from self._failure

    def stop(self) -> None:
        """See `LocalBroker`."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join(START_SECONDS)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except Exception as error:  # noqa: BLE001
            self._failure = error
        finally:
            self._settled.set()
            self._loop.close()

    async def _serve(self) -> None:
        try:
            from edgetrain.coordinator.amqtt_broker import Broker  # noqa: PLC0415
        except ImportError as error:
            raise BrokerError("the embedded broker needs amqtt: pip install 'edgetrain[coordinator]'") from error
        for name in ("amqtt", "transitions", "websockets"):
            # It calls it an error when a client just goes away.
            logging.getLogger(name).setLevel(logging.CRITICAL)
        listeners = {"default": {"type": "tcp", "bind": f"{HOST}:{self.port}"}}
        if self._websocket_port:
            listeners["websocket"] = {"type": "ws", "bind": f"{HOST}:{self._websocket_port}"}
        broker = Broker(
            {
                "listeners": listeners,
                "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
            }
        )
        await broker.start()
        self._settled.set()
        try:
            await self._end.wait()
        finally:
            servers = [server.instance for server in broker._servers.values() if server.instance]  # noqa: SLF001
            # asyncio loses the socket of a connection whose listener is closed within two steps of accepting it.
            for server in servers:
                for listening in server.sockets:
                    self._loop.remove_reader(listening.fileno())
            for _ in range(3):
                await asyncio.sleep(0)
            # The broker would do so last, and wait for acknowledgements before, if need be for ever.
            for server in servers:
                server.close()
            await asyncio.wait({asyncio.create_task(broker.shutdown())}, timeout=STOP_SECONDS)
            await self._let_go()

    async def _let_go(self) -> None:
        """Ends every task and closes every connection: none is left to the garbage collector of a later test."""
        # asyncio would log a traceback for each connection that had not said who it is.
        self._loop.set_exception_handler(lambda _loop, _context: None)
        # Some of its tasks need to be told more than once, and make new ones meanwhile.
        deadline = self._loop.time() + STOP_SECONDS
        while self._loop.time() < deadline:
            await asyncio.sleep(0)
            # All that were ever accepted, also those that no task of the broker has looked at yet.
            open_transports = [
                transport
                for transport in list(self._loop._transports.values())  # type: ignore[attr-defined]  # noqa: SLF001
                if transport._sock is not None  # noqa: SLF001
            ]
            for transport in open_transports:
                transport.abort()
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            if not left and not open_transports:
                return
            if left:
                await asyncio.wait(left, timeout=0.1)


def check_free(port: int) -> None:
    """Returns if nobody listens on a port of the loopback interface.

    Raises:
        BrokerError: somebody does.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise BrokerError(
                f"port {port} on {HOST} is taken ({error}); stop what runs there or choose another"
            ) from error


def wait_until_open(port: int, *, alive: Callable[[], bool]) -> None:
    """Returns when a broker listens on a port of the loopback interface.

    Raises:
        BrokerError: it has ended, or takes too long.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                return
        if not alive():
            raise BrokerError("it ended at once")
        time.sleep(0.02)
    raise BrokerError(f"it does not listen on port {port} after {START_SECONDS:.0f} s")
