"""Making the records of a run from its state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgetrain.coordinator.clients.roster import ClientRecord
from edgetrain.coordinator.rounds.open_round import OpenRound
from edgetrain.coordinator.rounds.state import OUTSTANDING, Part
from edgetrain.coordinator.run.records import ClientRow, RoundRecord, Summary
from edgetrain.protocol.messages import Report
from edgetrain.protocol.vectors import Vector, vector_digest


def round_record(
    current: OpenRound,
    parameters: Vector,
    *,
    seconds: float,
    loss: float | None,
    accuracy: float | None,
    bytes_up: int,
    bytes_down: int,
    epsilon: float | None = None,
) -> RoundRecord:
    """The record of a round that closes with these parameters."""
    state, collection = current.state, current.collection
    accepted, declined, refused = (state.count(part) for part in (Part.ACCEPTED, Part.DECLINED, Part.REFUSED))
    weights = [(row.loss, row.num_examples) for row in collection.rows if row.loss is not None]
    total = sum(weight for _, weight in weights)
    return RoundRecord(
        round=state.number,
        attempts=state.attempt,
        seconds=round(seconds, 4),
        invited=len(state.parts),
        accepted=accepted,
        declined=declined,
        refused=current.refused,
        lost=len(state.parts) - accepted - declined - refused,
        loss=loss,
        accuracy=accuracy,
        train_loss=sum(value * weight for value, weight in weights) / total if total else None,
        num_examples=sum(row.num_examples for row in collection.rows),
        bytes_up=bytes_up,
        update_bytes=collection.update_bytes,
        bytes_up_float32=4 * len(parameters) * accepted,
        bytes_down=bytes_down,
        epsilon=epsilon,
        parameters_sha256=vector_digest(parameters).hex(),
    )


def client_rows(current: OpenRound) -> list[ClientRow]:
    """One row for every client that was invited."""
    # Whoever still works when the goal is reached has done nothing wrong.
    late = current.state.count(Part.ACCEPTED) < current.state.goal
    failures = {Part.LOST, Part.REFUSED} | (OUTSTANDING if late else frozenset())
    return current.collection.rows + [
        ClientRow(round=current.state.number, client=name, status=part.value, failed=part in failures)
        for name, part in sorted(current.state.parts.items())
        if part is not Part.ACCEPTED
    ]


def summarize(
    federation: str,
    records: Sequence[RoundRecord],
    clients: Sequence[ClientRecord],
    reports: Mapping[str, Report],
    *,
    status: str,
    reason: str,
    seconds: float,
    best_round: int | None = None,
    epsilon: float | None = None,
    delta: float | None = None,
) -> Summary:
    """The summary of a run; `seconds` is the time of this process."""
    last = records[-1] if records else None
    updates = sum(record.accepted for record in records)
    update_bytes = sum(record.update_bytes for record in records)
    float32 = sum(record.bytes_up_float32 for record in records)
    return Summary(
        federation=federation,
        status=status,
        reason=reason,
        rounds=len(records),
        clients=sum(1 for record in clients if record.last_accepted),
        final_accuracy=last.accuracy if last else None,
        final_loss=last.loss if last else None,
        best_accuracy=max((record.accuracy for record in records if record.accuracy is not None), default=None),
        bytes_up=sum(record.bytes_up for record in records),
        bytes_up_float32=float32,
        bytes_down=sum(record.bytes_down for record in records),
        updates=updates,
        update_bytes_mean=round(update_bytes / updates, 1) if updates else 0.0,
        reduction=round(float32 / update_bytes, 2) if update_bytes else 0.0,
        seconds=round(seconds, 3),
        seconds_per_round=round(sum(record.seconds for record in records) / len(records), 4) if records else 0.0,
        client_peak_mb=max((record.resources.peak_memory_mb for record in clients), default=0.0),
        best_round=best_round,
        epsilon=epsilon,
        delta=delta,
        accuracy_by_client={
            name: report.metrics["accuracy"] for name, report in sorted(reports.items()) if "accuracy" in report.metrics
        },
    )
