"""A TCP proxy that is as bad as a mobile link: it cuts, delays, throttles, and doubles MQTT packets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any, Self

from support.mqtt_frames import PUBLISH, Account, Frames

# What the kernel may hide from us on either side: little, or the sender would believe that it has sent everything.
BUFFER_BYTES = 4096
STEP_SECONDS = 0.02


class _Direction:
    """One direction of the link, shared by all connections, as a link is."""

    def __init__(self, rate: float) -> None:
        self.account = Account()
        self.rate = rate
        self.free_at = 0.0

    async def pass_on(self, size: int) -> None:
        """Returns when so many bytes are through."""
        if self.rate:
            now = asyncio.get_running_loop().time()
            self.free_at = max(self.free_at, now) + size / self.rate
            await asyncio.sleep(self.free_at - now)


class FaultProxy:
    """Listens on the loopback interface and passes everything on to a port, with faults.

    Args:
        port: of the broker.
        rate: bytes per second in each direction; 0 for as fast as can be.
        delay: seconds that every piece takes longer.
        cut_every: cuts all connections so often, in seconds; 0 for never.
        double_every: sends every n-th PUBLISH of QoS 1 twice; 0 for none.
        watch: is called with ("up" or "down", packet) before a packet is passed on; may take its time.
    """

    def __init__(
        self,
        port: int,
        *,
        rate: float = 0,
        delay: float = 0,
        cut_every: float = 0,
        double_every: int = 0,
        watch: Callable[[str, bytes], None] = lambda _way, _packet: None,
    ) -> None:
        self._watch = watch
        self._upstream = port
        self._delay = delay
        self._cut_every = cut_every
        self._double_every = double_every
        self.up, self.down = _Direction(rate), _Direction(rate)
        self.connections = self.cuts = self.doubled = 0
        # What `watch` raised: shown at the end, or it would look like one more cut.
        self.failures: list[Exception] = []
        # Nobody gets through.
        self.closed_road = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(2000)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Cuts all connections now."""
        self._call(self._cut)

    def close(self) -> None:
        self._call(self._stop)
        self._thread.join(10)
        self._loop.close()

    def _call(self, function: Callable[[], Any]) -> None:
        done = threading.Event()

        def call() -> None:
            function()
            done.set()

        self._loop.call_soon_threadsafe(call)
        done.wait(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())

    def _stop(self) -> None:
        self._ended.set()

    async def _serve(self) -> None:
        self._ended = asyncio.Event()
        serving = [asyncio.create_task(self._accept())]
        if self._cut_every:
            serving.append(asyncio.create_task(self._cut_regularly()))
        await self._ended.wait()
        for task in (*serving, *self._tasks):
            task.cancel()
        await asyncio.gather(*serving, *self._tasks, return_exceptions=True)
        self._listener.close()

    async def _cut_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._cut_every)
            self._cut()

    def _cut(self) -> None:
        self.cuts += 1
        for task in self._tasks:
            task.cancel()

    async def _accept(self) -> None:
        while True:
            client, _ = await self._loop.sock_accept(self._listener)
            if self.closed_road:
                client.close()
                continue
            self.connections += 1
            task = asyncio.create_task(self._connect(client))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self, client: socket.socket) -> None:
        broker = socket.socket()
        try:
            client.setblocking(False)
            broker.setblocking(False)
            broker.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
            for sock in (client, broker):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.sock_connect(broker, ("127.0.0.1", self._upstream))
            ways = [
                asyncio.create_task(self._pass(client, broker, self.up)),
                asyncio.create_task(self._pass(broker, client, self.down)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except OSError:
            pass
        finally:
            client.close()
            broker.close()

    async def _pass(self, source: socket.socket, target: socket.socket, direction: _Direction) -> None:
        frames, account = Frames(), direction.account
        step = max(64, int(direction.rate * STEP_SECONDS)) if direction.rate else 1 << 16
        try:
            while data := await self._loop.sock_recv(source, step):
                await direction.pass_on(len(data))
                if self._delay:
                    await asyncio.sleep(self._delay)
                account.bytes += len(data)
                packets = list(frames.feed(data))
                for packet in packets:
                    account.packet(packet)
                    self._watched("up" if direction is self.up else "down", packet)
                if self._double_every:
                    data = b"".join(self._doubled(packet) for packet in packets)
                await self._loop.sock_sendall(target, data)
        except OSError:
            pass
        finally:
            account.lost += len(frames.rest)

    def _watched(self, way: str, packet: bytes) -> None:
        try:
            self._watch(way, packet)
        except Exception as error:
            self.failures.append(error)
            raise

    def _doubled(self, packet: bytes) -> bytes:
        if packet[0] >> 4 == PUBLISH and packet[0] & 0x06:
            self.doubled += 1
            if self.doubled % self._double_every == 0:
                return packet + bytes([packet[0] | 0x08]) + packet[1:]
        return packet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(RuntimeError):
            self.close()
        if self.failures:
            raise AssertionError(f"the proxy's watch failed: {self.failures[0]!r}") from self.failures[0]
