"""Settings of a federation: `federation.toml`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import tomli_w
from msgspec import Meta

from edgetrain.coordinator.observability.config import ObservabilityConfig
from edgetrain.coordinator.privacy.config import PrivacyConfig
from edgetrain.coordinator.rounds.adaptation import DeviceRule
from edgetrain.coordinator.rounds.selection import SelectionConfig
from edgetrain.coordinator.secure.config import SecureAggregationConfig
from edgetrain.coordinator.strategies import StrategyTable
from edgetrain.protocol.training import TrainingConfig
from edgetrain.protocol.transport.mqtt import BrokerConfig


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the sections: a misspelt key is an error, not a default."""


class RoundsConfig(Section, frozen=True, kw_only=True):
    """[rounds]: how many, with whom, for how long."""

    # Rounds to run at most.
    total: Annotated[int, Meta(ge=1)] = 20
    # Close a round at so many accepted updates.
    goal: Annotated[int, Meta(ge=1)] = 2
    # Close at the deadline with at least so many; 0 means the goal.
    minimum: Annotated[int, Meta(ge=0)] = 0
    # Invite goal times this, for those who will not make it.
    over_selection: Annotated[float, Meta(ge=1)] = 1.0
    # Seconds from the invitation to the deadline.
    deadline_seconds: Annotated[float, Meta(gt=0)] = 120.0
    # Shorten it to what clients were seen to need: this quantile of their times, times this margin, but no
    # less than the minimum.
    adaptive_deadline: bool = False
    deadline_quantile: Annotated[float, Meta(gt=0, le=1)] = 0.9
    deadline_margin: Annotated[float, Meta(ge=1)] = 1.5
    min_deadline_seconds: Annotated[float, Meta(gt=0)] = 5.0
    # Wait so much longer for updates whose bytes are arriving at the deadline.
    grace_seconds: Annotated[float, Meta(ge=0)] = 0.0
    # Send clients away that will not be needed for at least so many seconds; 0 to keep all connected.
    pace_seconds: Annotated[float, Meta(ge=0)] = 0.0
    # Asynchronous strategies: clients that may work at the same time; 0 for all that are ready.
    concurrency: Annotated[int, Meta(ge=0)] = 0
    # Wait for the goal to be there; after so many seconds start with the minimum.
    gather_seconds: Annotated[float, Meta(ge=0)] = 30.0
    # Give up after so many failed attempts in a row; 0 for never.
    max_failures: Annotated[int, Meta(ge=0)] = 5
    # Give up if nothing can start for so many seconds; 0 for never.
    idle_timeout_seconds: Annotated[float, Meta(ge=0)] = 0.0

    @property
    def least(self) -> int:
        """The minimum in force."""
        return min(self.minimum or self.goal, self.goal)


class StopConfig(Section, frozen=True, kw_only=True):
    """[stop]: when enough is enough, before the last round."""

    # Stop at this accuracy, 0 to 1; 0 for never.
    target_accuracy: Annotated[float, Meta(ge=0, le=1)] = 0.0
    # Stop when the metric has not improved by `min_improvement` over so many rounds; 0 for never.
    patience: Annotated[int, Meta(ge=0)] = 0
    min_improvement: Annotated[float, Meta(ge=0)] = 1e-3
    # Of the round's record (loss, accuracy, train_loss), or of the clients' evaluations (clients.accuracy).
    metric: Annotated[str, Meta(pattern=r"^(loss|accuracy|train_loss|clients\.[A-Za-z0-9_.-]+)$")] = "loss"


class EvaluationConfig(Section, frozen=True, kw_only=True):
    """[evaluation]: on the coordinator's own held-out data, and by the clients at the end."""

    # .npz, .csv or file.py:callable, as for a client; empty for none.
    data: str = ""
    # Every so many rounds.
    every: Annotated[int, Meta(ge=1)] = 1
    # Let the clients evaluate the final parameters on their own validation data.
    by_clients: bool = True
    # And those after every so many rounds; 0 for the final ones only.
    by_clients_every: Annotated[int, Meta(ge=0)] = 0
    threads: Annotated[int, Meta(ge=0)] = 1


class BansConfig(Section, frozen=True, kw_only=True):
    """[limits.bans]: repeated offenders are not listened to for a while."""

    # So many offences within the window; 0 for no bans. A late update is none.
    after: Annotated[int, Meta(ge=0)] = 10
    window_seconds: Annotated[float, Meta(gt=0)] = 60.0
    # The first ban; it doubles every time, up to a day.
    seconds: Annotated[float, Meta(gt=0)] = 300.0


class LimitsConfig(Section, frozen=True, kw_only=True):
    """[limits]: what a client may claim."""

    # Most examples of one client that count; more is refused.
    max_examples: Annotated[int, Meta(ge=1)] = 10_000_000
    # Bytes of one update; 0 means what the dense float32 update takes, and a little.
    max_update_bytes: Annotated[int, Meta(ge=0)] = 0
    chunk_bytes: Annotated[int, Meta(ge=1024)] = 60 << 10
    bans: BansConfig = BansConfig()


class FederationConfig(Section, frozen=True, kw_only=True):
    """The whole file."""

    # Name of the federation, part of every topic.
    federation: str
    # The bundle to train, as written by `edgetrain export`.
    bundle: str
    # Run directory; a run that was interrupted goes on where it was.
    out: str
    # Signing key, made if it is not there. Devices remember it, so it should outlive a run: by default it is
    # coordinator.key beside the run directory.
    key: str = ""
    # Federation directory made by `edgetrain init`: only clients enrolled there may take part. Empty: whoever
    # reaches the broker may, and a name belongs to the first key that used it.
    enrolments: str = ""
    # Start a broker on the address in [broker]: "mosquitto" or "embedded"; empty: one is running there.
    start_broker: Literal["", "mosquitto", "embedded"] = ""
    # With enrolments and a broker that runs elsewhere: a program with arguments that lets it read passwords, access
    # rules and revoked certificates again (after copying them there, if need be). Run after every change.
    reload_command: str = ""
    broker: BrokerConfig = BrokerConfig()
    # Let other processes take the updates: "processes:N" on this machine, "ray:N" on a Ray cluster; empty: none.
    workers: str = ""
    # How updates become the next parameters: a name, or a table with a name and options.
    strategy: StrategyTable = "fedavg"
    # Parameters that never leave the devices, as file name patterns of their names: "head.*".
    personal: tuple[str, ...] = ()
    # Codec of the updates; a client that lacks one of its stages gets the nearest that it can do.
    codec: str = "topk:0.05|int8:block=256|rice"
    # Codec of the way down, for clients that hold an earlier round's parameters: the change since then. What
    # it loses is made up for in later rounds. "dense|float32" always sends the parameters whole.
    downlink_codec: str = "dense|int8:block=256"
    # Chooses clients, shuffles their data.
    seed: Annotated[int, Meta(ge=0, lt=2**53)] = 0
    rounds: RoundsConfig = RoundsConfig()
    selection: SelectionConfig = SelectionConfig()
    training: TrainingConfig = TrainingConfig()
    stop: StopConfig = StopConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    limits: LimitsConfig = LimitsConfig()
    secure_aggregation: SecureAggregationConfig = SecureAggregationConfig()
    observability: ObservabilityConfig = ObservabilityConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    # What changes for devices of some kind; the first that fits counts.
    devices: tuple[DeviceRule, ...] = ()


def to_toml(settings: msgspec.Struct) -> str:
    """Settings as TOML text, without those that are nil: TOML has no word for it."""
    return tomli_w.dumps(_without_nil(msgspec.to_builtins(settings)))


def _without_nil(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nil(entry) for key, entry in value.items() if entry is not None}
    return [_without_nil(entry) for entry in value] if isinstance(value, list | tuple) else value
