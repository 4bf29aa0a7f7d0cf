"""Many virtual clients in one process, through the real trainer, codecs and strategies; no network."""

from edgetrain.simulation.simulate import SimulatedRound, SimulationConfig, simulate

__all__ = ["SimulatedRound", "SimulationConfig", "simulate"]
