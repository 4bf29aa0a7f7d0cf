"""aMQTT's broker, that keeps its word."""

from __future__ import annotations

from typing import Any

from amqtt.broker import Broker as AmqttBroker


class Broker(AmqttBroker):  # type: ignore[misc]
    """Delivers everything that it has acknowledged.

    aMQTT 0.12.1 acknowledges a message when it has queued it, and forgets the queue when the sender disconnects.
    """

    async def _handle_disconnect(self, client_session: Any, handler: Any, disconnect_waiter: Any) -> None:
        queue = client_session.delivered_message_queue
        while not queue.empty():
            message = self._loop.create_future()
            message.set_result(queue.get_nowait())
            if not await self._handle_message_delivery(client_session, handler, message):
                break
        await super()._handle_disconnect(client_session, handler, disconnect_waiter)
