"""Live progress of a run: a table on a terminal, a line per round elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from edgetrain.coordinator import events
from edgetrain.coordinator.clients.spread import FederatedEvaluation
from edgetrain.coordinator.config import FederationConfig
from edgetrain.coordinator.run.records import RoundRecord

# Rounds shown at once; older ones scroll out of the table.
VISIBLE_ROUNDS = 12


class Progress:
    """An observer for `Coordinator`. A context manager, so that the terminal is left in order."""

    def __init__(self, config: FederationConfig, console: Console | None = None) -> None:
        self._config = config
        self._console = console or Console()
        self._records: list[RoundRecord] = []
        self._status = "starting"
        self._ready = 0
        self._initial: events.Evaluated | None = None
        self._live = Live(console=self._console, refresh_per_second=8) if self._console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.update(self._render(final=True))
            self._live.stop()

    def __call__(self, event: events.Event) -> None:
        """Takes one event."""
        match event:
            case events.Waiting():
                self._status = f"waiting for clients: {event.ready} ready, {event.wanted} wanted"
                self._line(self._status)
            case events.ClientJoined():
                self._ready += 1
                self._line(f"{event.client} joined with {event.num_examples} examples")
            case events.ClientLeft():
                self._ready -= 1
                self._line(f"{event.client} left: {event.reason}")
            case events.Evaluated():
                if event.round == 0:
                    self._initial = event
                    self._line(f"before training: loss {event.loss:.4f}{_percent(', accuracy ', event.accuracy)}")
            case events.RoundStarted():
                again = f", attempt {event.attempt}" if event.attempt > 1 else ""
                self._status = f"round {event.round}{again}: {event.invited} clients train"
            case events.UpdateAccepted():
                self._status = f"round {event.round}: {event.accepted} updates in"
            case events.Refused():
                self._line(f"refused from {event.client}: {event.reason}")
            case events.RoundEnded():
                self._records.append(event.record)
                self._line(_round_line(event.record))
            case events.ClientsEvaluated():
                self._line(_clients_line(event.evaluation))
            case events.Paused():
                self._status = "paused; `edgetrain runs resume` lets it go on"
                self._line(self._status)
            case events.Resumed():
                self._line("resumed")
            case events.RunEnded():
                self._status = f"{event.summary.status}: {event.summary.reason}"
                self._line(self._status)
        if self._live:
            self._live.update(self._render())

    def _line(self, text: str) -> None:
        if not self._live:
            self._console.print(Text(text), soft_wrap=True)

    def _render(self, *, final: bool = False) -> Group:
        table = Table(title=f"federation {self._config.federation}", title_justify="left")
        for name in (
            "round",
            "accuracy",
            "loss",
            "train loss",
            "clients in/out",
            "up",
            "down",
            "updates",
            "s",
            *(["epsilon"] if self._config.privacy.epsilon else []),
        ):
            table.add_column(name, justify="right")
        if self._initial:
            table.add_row("0", _percent("", self._initial.accuracy), f"{self._initial.loss:.4f}")
        shown = self._records if final else self._records[-VISIBLE_ROUNDS:]
        for record in shown:
            table.add_row(*_cells(record), *([_epsilon("", record.epsilon)] if self._config.privacy.epsilon else []))
        return Group(table, Text(f"{self._status}  ({self._ready} clients ready)"))


def _cells(record: RoundRecord) -> list[str]:
    return [
        str(record.round),
        _percent("", record.accuracy),
        "" if record.loss is None else f"{record.loss:.4f}",
        "" if record.train_loss is None else f"{record.train_loss:.4f}",
        f"{record.accepted}/{record.invited - record.accepted}",
        size(record.bytes_up),
        size(record.bytes_down),
        f"{record.bytes_up_float32 / record.update_bytes:.0f}x less" if record.update_bytes else "",
        f"{record.seconds:.2f}",
    ]


def _round_line(record: RoundRecord) -> str:
    loss = "" if record.loss is None else f", loss {record.loss:.4f}"
    return (
        f"round {record.round}{_percent(': accuracy ', record.accuracy)}{loss}, "
        f"{record.accepted} of {record.invited} clients, {size(record.bytes_up)} up, {size(record.bytes_down)} down, "
        f"{record.seconds:.2f} s{_epsilon(', epsilon ', record.epsilon)}"
    )


def _clients_line(evaluation: FederatedEvaluation) -> str:
    spreads = ", ".join(
        f"{metric} {spread.minimum:.4g} to {spread.maximum:.4g}, median {spread.median:.4g}"
        for metric, spread in evaluation.spread.items()
    )
    worse = f"; {len(evaluation.worse)} got worse" if evaluation.worse else ""
    return f"round {evaluation.round} by {len(evaluation.clients)} clients: {spreads}{worse}"


def _percent(prefix: str, value: float | None) -> str:
    return "" if value is None else f"{prefix}{value:.2%}"


def _epsilon(prefix: str, value: float | None) -> str:
    return "" if value is None else f"{prefix}{value:.3f}"


def size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
