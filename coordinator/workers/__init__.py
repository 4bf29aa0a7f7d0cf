"""Aggregation workers: processes that take updates from a shared subscription and give back exact partial sums."""
