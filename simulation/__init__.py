"""Many virtual clients in one process, through the real trainer, codecs and strategies; no network."""

from edgetrain.simulation.simulate import SimulatedRound, SimulationConfig, Tamper, simulate
from edgetrain.simulation.virtual_client import LocalResult, VirtualClient

__all__ = ["LocalResult", "SimulatedRound", "SimulationConfig", "Tamper", "VirtualClient", "simulate"]
