"""A Prometheus endpoint (text exposition format 0.0.4) from the standard library, in a thread of its own."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from edgetrain.coordinator import events
from edgetrain.coordinator.errors import CoordinatorError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# name -> (type, help)
_METRICS = {
    "edgetrain_clients_ready": ("gauge", "Clients that can be invited."),
    "edgetrain_round": ("gauge", "Last closed round."),
    "edgetrain_round_seconds": ("gauge", "Seconds from the first invitation of the last round to its end."),
    "edgetrain_rounds_total": ("counter", "Rounds closed by this process."),
    "edgetrain_attempts_total": ("counter", "Attempts of those rounds."),
    "edgetrain_updates_accepted_total": ("counter", "Updates accepted."),
    "edgetrain_refusals_total": ("counter", "Messages and updates refused."),
    "edgetrain_refusals_by_kind_total": ("counter", "The same, by kind."),
    "edgetrain_update_bytes_total": ("counter", "Bytes of accepted updates."),
    "edgetrain_bytes_up_total": ("counter", "Payload bytes from clients."),
    "edgetrain_bytes_down_total": ("counter", "Payload bytes that clients received."),
    "edgetrain_loss": ("gauge", "Held-out loss after the last evaluated round."),
    "edgetrain_accuracy": ("gauge", "Held-out accuracy after the last evaluated round."),
    "edgetrain_train_loss": ("gauge", "Mean training loss of the last round's clients."),
    "edgetrain_epsilon": ("gauge", "Spent of the federation's privacy budget."),
    "edgetrain_clients_metric": ("gauge", "A metric on the clients' own validation data, by statistic."),
    "edgetrain_clients_worse": ("gauge", "Clients that got worse since they were asked last."),
}


class Counters:
    """An observer that counts. Read from other threads by `text`.

    Args:
        federation: a label of every sample.
    """

    def __init__(self, federation: str) -> None:
        self._label = f'federation="{federation}"'
        self._lock = threading.Lock()
        self._values: dict[tuple[str, str], float] = {}
        for name, (kind, _) in _METRICS.items():
            if (kind == "counter" and not name.endswith("by_kind_total")) or name == "edgetrain_clients_ready":
                self._values[name, ""] = 0.0

    def __call__(self, event: events.Event) -> None:
        """Takes one event."""
        with self._lock:
            match event:
                case events.ClientJoined():
                    self._add("edgetrain_clients_ready", 1)
                case events.ClientLeft():
                    self._add("edgetrain_clients_ready", -1)
                case events.UpdateAccepted():
                    self._add("edgetrain_updates_accepted_total", 1)
                    self._add("edgetrain_update_bytes_total", event.update_bytes)
                case events.Refused():
                    self._add("edgetrain_refusals_total", 1)
                    if event.kind:
                        self._add("edgetrain_refusals_by_kind_total", 1, f'kind="{_escaped(event.kind)}"')
                case events.RoundStarted():
                    self._add("edgetrain_attempts_total", 1)
                case events.Evaluated():
                    self._set("edgetrain_loss", event.loss)
                    if event.accuracy is not None:
                        self._set("edgetrain_accuracy", event.accuracy)
                case events.RoundEnded(record):
                    self._set("edgetrain_round", record.round)
                    self._set("edgetrain_round_seconds", record.seconds)
                    self._add("edgetrain_rounds_total", 1)
                    self._add("edgetrain_bytes_up_total", record.bytes_up)
                    self._add("edgetrain_bytes_down_total", record.bytes_down)
                    if record.train_loss is not None:
                        self._set("edgetrain_train_loss", record.train_loss)
                    if record.epsilon is not None:
                        self._set("edgetrain_epsilon", record.epsilon)
                case events.ClientsEvaluated(evaluation):
                    self._set("edgetrain_clients_worse", len(evaluation.worse))
                    # Clients name the metrics: what they no longer report goes away.
                    for key in [key for key in self._values if key[0] == "edgetrain_clients_metric"]:
                        del self._values[key]
                    for metric, spread in evaluation.spread.items():
                        for statistic in ("mean", "minimum", "p10", "median", "maximum"):
                            labels = f'metric="{_escaped(metric)}",statistic="{statistic}"'
                            self._set("edgetrain_clients_metric", getattr(spread, statistic), labels)
                case _:
                    pass

    def text(self) -> str:
        """All samples, as Prometheus reads them."""
        with self._lock:
            values: Mapping[tuple[str, str], float] = dict(self._values)
        lines = []
        for name, (kind, description) in _METRICS.items():
            samples = [(labels, value) for (metric, labels), value in values.items() if metric == name]
            if samples:
                lines += [f"# HELP {name} {description}", f"# TYPE {name} {kind}"]
                for labels, value in samples:
                    joined = f"{self._label},{labels}" if labels else self._label
                    lines.append(f"{name}{{{joined}}} {value:.10g}")
        return "\n".join(lines) + "\n"

    def _add(self, name: str, amount: float, labels: str = "") -> None:
        self._values[name, labels] = self._values.get((name, labels), 0.0) + amount

    def _set(self, name: str, value: float, labels: str = "") -> None:
        self._values[name, labels] = float(value)


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class PrometheusServer:
    """Serves /metrics. A context manager.

    Args:
        counters: what to serve.
        host: address to listen on.
        port: 0 for any that is free.

    Raises:
        CoordinatorError: the address cannot be listened on.
    """

    def __init__(self, counters: Counters, *, host: str = "127.0.0.1", port: int = 0) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path.split("?")[0] != "/metrics":
                    self.send_error(404)
                    return
                body = counters.text().encode()
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_arguments: object) -> None:
                """Scrapes are no news."""

        try:
            self._server = http.server.ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise CoordinatorError(f"observability.prometheus_port: cannot listen on {host}:{port}: {error}") from error
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
