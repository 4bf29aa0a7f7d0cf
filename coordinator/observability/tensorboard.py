"""TensorBoard event files, written by hand: a few bytes of protobuf in TFRecords, no dependency.

A file is a sequence of records:  length, u64 | masked CRC-32C of it, u32 | data | masked CRC-32C of it, u32,
little-endian. The data are `tensorflow.Event` messages: wall_time (1, double), step (2, varint),
file_version (3, string), or summary (5) with values (1) of tag (1, string) and simple_value (2, float).
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from edgetrain.coordinator import events


class TensorBoardWriter:
    """An observer that writes scalars per round.

    Args:
        directory: for the event files; made if it is not there.
        clock: wall time in seconds.
    """

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        directory.mkdir(parents=True, exist_ok=True)
        now = clock()
        # TensorBoard looks for this word in the name.
        self.path = directory / f"events.out.tfevents.{now:.6f}.edgetrain"
        with self.path.open("wb") as file:
            file.write(record(_double(1, now) + _bytes(3, b"brain.Event:2")))

    def __call__(self, event: events.Event) -> None:
        """Takes one event."""
        match event:
            case events.Evaluated():
                scalars = {"server/loss": event.loss}
                if event.accuracy is not None:
                    scalars["server/accuracy"] = event.accuracy
                self.write(event.round, scalars)
            case events.RoundEnded(ended):
                numbers = {
                    "round/seconds": ended.seconds,
                    "round/invited": ended.invited,
                    "round/accepted": ended.accepted,
                    "bytes/up": ended.bytes_up,
                    "bytes/updates": ended.update_bytes,
                    "bytes/down": ended.bytes_down,
                }
                if ended.train_loss is not None:
                    numbers["clients/train_loss"] = ended.train_loss
                if ended.epsilon is not None:
                    numbers["privacy/epsilon"] = ended.epsilon
                self.write(ended.round, numbers)
            case events.ClientsEvaluated(evaluation):
                self.write(
                    evaluation.round,
                    {
                        f"clients/{metric}/{statistic}": getattr(spread, statistic)
                        for metric, spread in evaluation.spread.items()
                        for statistic in ("mean", "minimum", "p10", "median", "maximum")
                    },
                )
            case _:
                pass

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends scalars; TensorBoard sees them at once."""
        values = b"".join(
            _bytes(1, _bytes(1, tag.encode()) + _key(2, 5) + struct.pack("<f", value)) for tag, value in scalars.items()
        )
        event = _double(1, self._clock()) + _key(2, 0) + _varint(step) + _bytes(5, values)
        with self.path.open("ab") as file:
            file.write(record(event))


def record(data: bytes) -> bytes:
    """A TFRecord."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", _masked(length)) + data + struct.pack("<I", _masked(data))


def crc32c(data: bytes) -> int:
    """CRC-32 with Castagnoli's polynomial (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _masked(data: bytes) -> int:
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _table() -> tuple[int, ...]:
    entries = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        entries.append(value)
    return tuple(entries)


_TABLE = _table()


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _key(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _bytes(field: int, data: bytes) -> bytes:
    return _key(field, 2) + _varint(len(data)) + data


def _double(field: int, value: float) -> bytes:
    return _key(field, 1) + struct.pack("<d", value)
