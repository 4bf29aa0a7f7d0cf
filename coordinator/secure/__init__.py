"""Rounds with secure aggregation: the coordinator's side."""
