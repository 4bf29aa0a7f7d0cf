"""What a run writes down: a record per round, a row per client and round, a summary at the end."""

from __future__ import annotations

import msgspec

KnownClient = tuple[str, bytes, tuple[int, bytes] | None]
"""(name, public key, last accepted round and digest)."""


class RoundRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A line of rounds.jsonl."""

    round: int
    attempts: int
    seconds: float
    invited: int
    accepted: int
    declined: int
    refused: int
    lost: int
    # After the round, on the coordinator's held-out data, where evaluated.
    loss: float | None = None
    accuracy: float | None = None
    # Mean of the clients' own training loss, weighted by examples.
    train_loss: float | None = None
    num_examples: int = 0
    # All payload bytes from clients since the round before: updates, messages, requests.
    bytes_up: int = 0
    # The updates alone, and what they would be as dense float32.
    update_bytes: int = 0
    bytes_up_float32: int = 0
    # All payload bytes that clients say they received since the round before.
    bytes_down: int = 0
    # Spent of the privacy budget after the round, where there is one.
    epsilon: float | None = None
    # SHA-256 of the float32 vector after the round, little-endian.
    parameters_sha256: str
    # SHA-256 of the file with what the strategy remembers; empty if that is nothing.
    server_state_sha256: str = ""


class ClientRow(msgspec.Struct, frozen=True, kw_only=True):
    """A line of clients.csv."""

    round: int
    client: str
    status: str
    num_examples: int = 0
    steps: int = 0
    loss: float | None = None
    accuracy: float | None = None
    update_bytes: int = 0
    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    # How many versions old the parameters were that it started from; 0 in synchronous rounds.
    staleness: int = 0
    # It spoiled the round: lost, refused, or not there at the deadline.
    failed: bool = False


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """summary.json."""

    federation: str
    status: str
    reason: str
    rounds: int
    clients: int
    final_accuracy: float | None
    final_loss: float | None
    best_accuracy: float | None
    # All payload bytes from clients in closed rounds, and what their updates alone would be as dense float32.
    bytes_up: int
    bytes_up_float32: int
    # All payload bytes that they received.
    bytes_down: int
    # Accepted updates, their mean size, and how many times smaller than float32 they are.
    updates: int
    update_bytes_mean: float
    reduction: float
    seconds: float
    seconds_per_round: float
    # The largest peak RSS that any client reported, in MB.
    client_peak_mb: float
    accuracy_by_client: dict[str, float]
    # Spent of the privacy budget in all, by this run and those that share its ledger; None where there is none.
    epsilon: float | None = None
    delta: float | None = None
    # The round whose parameters are in best.safetensors.
    best_round: int | None = None
