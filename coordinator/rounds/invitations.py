"""Who is asked to take part, and what exactly each of them is asked to do."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import msgspec

from edgetrain.coordinator.clients.history import History
from edgetrain.coordinator.clients.roster import Roster
from edgetrain.coordinator.config import FederationConfig
from edgetrain.coordinator.rounds.adaptation import DeviceRule, adapted_setting, rule_for
from edgetrain.coordinator.rounds.open_round import OpenRound
from edgetrain.coordinator.rounds.pace import come_back_seconds
from edgetrain.coordinator.rounds.selection import Candidate, admitted, select
from edgetrain.coordinator.rounds.state import Part
from edgetrain.coordinator.run.records import RoundRecord
from edgetrain.coordinator.secure.settings import check_secure_aggregation
from edgetrain.coordinator.strategies import Setting, Strategy, check_strategy, make_strategy
from edgetrain.protocol.codecs import CodecSpec, negotiate
from edgetrain.protocol.messages import BlobRef, Plan
from edgetrain.protocol.training import TrainingConfig
from edgetrain.protocol.vectors import Vector, vector_digest

# What no client can encode with.
NO_CODEC = "secure aggregation only"
# Rounds whose mean duration tells how long a client will not be needed.
PACE_ROUNDS = 10


def checked_strategy(config: FederationConfig) -> Strategy:
    """The strategy of the settings, which can work in them and on every kind of device they name.

    Raises:
        CodecError, ConfigError: it cannot, or there is no such strategy or codec.
    """
    setting = Setting(
        codec=CodecSpec.parse(config.codec),
        training=config.training,
        minimum=config.rounds.least,
        goal=config.rounds.goal,
        only_sums=config.secure_aggregation.enabled,
    )
    strategy = make_strategy(config.strategy, setting)
    for rule in config.devices:
        check_strategy(strategy, adapted_setting(setting, rule))
    if config.secure_aggregation.enabled:
        check_secure_aggregation(config, strategy)
    return strategy


class Invitations:
    """Chooses clients and makes their plans.

    Args:
        config: the settings.
        strategy: may change the training.
        roster: the clients.
        history: what they have done.
        run: id of the run.
        bundle: its digest.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: FederationConfig,
        *,
        strategy: Strategy,
        roster: Roster,
        history: History,
        run: bytes,
        bundle: bytes,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._codec = CodecSpec.parse(config.codec)
        self._downlink_codec = CodecSpec.parse(config.downlink_codec)
        self._strategy = strategy
        self._roster = roster
        self._history = history
        self._run = run
        self._bundle = bundle
        self._clock = clock

    def pool(self, current: OpenRound) -> list[str]:
        """Those that can be invited to a round now."""
        names = [name for name in self._roster.eligible() if name not in current.collection.digests]
        least = self._config.rounds.least - current.state.count(Part.ACCEPTED)
        pool = admitted(
            self._config.selection,
            self._candidates(names),
            round_number=current.state.number,
            least=max(least, 1),
        )
        return [candidate.name for candidate in pool]

    def choose(self, names: Sequence[str], count: int, *, number: int, attempt: int) -> list[str]:
        """`count` of these names (or all, if the method is that), for an attempt at round `number`."""
        return select(
            self._config.selection,
            self._candidates(names),
            count,
            seed=self._config.seed,
            round_number=number,
            attempt=attempt,
        )

    def training(self, current: OpenRound, client: str) -> TrainingConfig:
        """How a client trains in a round; noted there."""
        training = self._training(current, rule_for(self._config.devices, self._roster.get(client)))
        current.trainings[client] = training
        return training

    def common_training(self, current: OpenRound) -> TrainingConfig:
        """How clients train that no rule is made for."""
        return self._training(current, DeviceRule())

    def _training(self, current: OpenRound, rule: DeviceRule) -> TrainingConfig:
        training = self._strategy.training(rule.adapt(self._config.training))
        if current.clip_norm:
            training = msgspec.structs.replace(training, max_delta_norm=current.clip_norm)
        return training

    def plan(self, current: OpenRound, client: str) -> Plan:
        """What a client is asked to do in a round; noted there."""
        rounds, record = self._config.rounds, self._roster.get(client)
        rule = rule_for(self._config.devices, record)
        codec = CodecSpec.parse(rule.codec) if rule.codec else self._codec
        if record:
            codec = negotiate(codec, record.stages)
        training = current.trainings[client] = self._training(current, rule)
        reads_patches = record is not None and self._downlink_codec.stages <= record.stages
        left = max(0.0, current.state.deadline_at - self._clock())
        return Plan(
            run=self._run,
            round=current.state.number,
            nonce=current.state.nonce,
            bundle=self._bundle,
            vector=current.vector,
            parameters=current.parameters,
            patches=current.patches if reads_patches else (),
            training=training,
            control=current.control,
            personal=self._config.personal,
            secure=current.secure.settings if current.secure else b"",
            # A client that knows nothing of secure aggregation must not send its update in the clear.
            codec=NO_CODEC if self._config.secure_aggregation.enabled else str(codec),
            deadline_seconds=rounds.deadline_seconds if self._strategy.asynchronous else left,
            seed=self._config.seed,
        )

    def evaluation_plan(self, number: int, parameters: Vector, reference: BlobRef, deadline_seconds: float) -> Plan:
        """What clients are asked to evaluate: the parameters after round `number`."""
        return Plan(
            run=self._run,
            round=number,
            nonce=os.urandom(16),
            task="evaluate",
            bundle=self._bundle,
            vector=vector_digest(parameters),
            parameters=reference,
            personal=self._config.personal,
            deadline_seconds=deadline_seconds,
        )

    def come_back_seconds(self, client: str, records: Sequence[RoundRecord]) -> float:
        """When a client whose update was just accepted should come back; 0 for: stay."""
        rounds, recent = self._config.rounds, records[-PACE_ROUNDS:]
        if not rounds.pace_seconds or not recent:
            return 0.0
        return come_back_seconds(
            population=len(self._roster),
            per_round=math.ceil(rounds.goal * rounds.over_selection),
            round_seconds=sum(record.seconds for record in recent) / len(recent),
            at_least=rounds.pace_seconds,
            client=client,
            round_number=recent[-1].round,
        )

    def _candidates(self, names: Sequence[str]) -> list[Candidate]:
        records = [self._roster[name] for name in names]
        return [
            Candidate(record.name, record.num_examples, record.state, self._history.of(record.name))
            for record in records
        ]
