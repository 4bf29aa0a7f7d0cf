"""What runs on the device: runtimes, local training, data, and the client itself.

Importing it imports numpy and msgspec, no runtime and no network: those load when they are used.
"""

from edgetrain.edge_client.runtimes import available_runtimes, open_session

__all__ = ["available_runtimes", "open_session"]
