"""MQTT over WebSockets in front of a plain TCP broker, as a web server on port 443 does it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

logging.getLogger("websockets").setLevel(logging.CRITICAL)


class WebSocketBridge:
    """Listens on the loopback interface.

    Args:
        port: to listen on; 0 for any free one.
        upstream: port of the broker.
    """

    def __init__(self, port: int, upstream: int) -> None:
        self._upstream = upstream
        # Bound here: a port that was free a moment ago may be taken, and a thread could not say so.
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = int(self._listener.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        self._end = asyncio.Event()
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve(started)), daemon=True)
        self._thread.start()
        assert started.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self, started: threading.Event) -> None:
        server = await serve(
            self._connected, sock=self._listener,
            subprotocols=[Subprotocol("mqtt")], max_size=None, compression=None, close_timeout=0.5,
        )  # fmt: skip
        started.set()
        await self._end.wait()
        server.close()
        await server.wait_closed()

    async def _connected(self, client: ServerConnection) -> None:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        except OSError:
            return
        ways = [asyncio.create_task(self._up(client, writer)), asyncio.create_task(self._down(client, reader))]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def _up(self, client: ServerConnection, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionClosed, OSError):
            async for message in client:
                writer.write(message if isinstance(message, bytes) else message.encode())
                await writer.drain()

    async def _down(self, client: ServerConnection, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionClosed, OSError):
            while data := await reader.read(1 << 16):
                await client.send(data)
