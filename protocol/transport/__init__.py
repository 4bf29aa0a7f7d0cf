"""How bytes get from one end to the other: MQTT, or memory.

The network thread only puts events into a queue; whoever owns the state takes them out.
"""

from edgetrain.protocol.transport.base import Connected, Disconnected, Event, Noticed, Received, Transport
from edgetrain.protocol.transport.memory import MemoryBroker, MemoryTransport

__all__ = ["Connected", "Disconnected", "Event", "MemoryBroker", "MemoryTransport", "Noticed", "Received", "Transport"]
