"""What a device is asked to do, by what it is: fewer epochs, smaller batches, another codec for the weak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Annotated

import msgspec
from msgspec import Meta

from edgetrain.coordinator.clients.roster import ClientRecord
from edgetrain.coordinator.strategies import Setting
from edgetrain.protocol.codecs import CodecSpec
from edgetrain.protocol.training import TrainingConfig


class DeviceRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[[devices]]: which devices, and what changes for them. The first rule that fits a device counts."""

    # Conditions; left out, everything fits. Names and machines as file name patterns: "pi-*", "armv7*".
    client: str = "*"
    machine: str = "*"
    runtime: str = "*"
    # At most so much memory in MB, so many processors, so many local examples; 0 for any.
    memory_mb_up_to: Annotated[int, Meta(ge=0)] = 0
    cpus_up_to: Annotated[int, Meta(ge=0)] = 0
    examples_up_to: Annotated[int, Meta(ge=0)] = 0

    # What they get instead of what [training] and `codec` say; 0 and "" leave it.
    epochs: Annotated[int, Meta(ge=0)] = 0
    batch_size: Annotated[int, Meta(ge=0)] = 0
    max_steps: Annotated[int, Meta(ge=0)] = 0
    codec: str = ""

    def fits(self, record: ClientRecord) -> bool:
        """Whether a device is one of those. An unknown capability does not fit a bound."""
        bounds = (
            (self.memory_mb_up_to, record.device.memory_mb),
            (self.cpus_up_to, record.device.cpus),
            (self.examples_up_to, record.num_examples),
        )
        patterns = (
            (self.client, record.name),
            (self.machine, record.device.machine),
            (self.runtime, record.runtime),
        )
        return all(not bound or 0 < value <= bound for bound, value in bounds) and all(
            fnmatchcase(text, pattern) for pattern, text in patterns
        )

    def adapt(self, training: TrainingConfig) -> TrainingConfig:
        """The training of such a device."""
        changes = {name: value for name in ("epochs", "batch_size", "max_steps") if (value := getattr(self, name))}
        return msgspec.structs.replace(training, **changes)


def adapted_setting(setting: Setting, rule: DeviceRule) -> Setting:
    """The setting in which devices of this rule work.

    Raises:
        CodecError: the rule's codec is none.
    """
    return replace(
        setting,
        training=rule.adapt(setting.training),
        codec=CodecSpec.parse(rule.codec) if rule.codec else setting.codec,
    )


def rule_for(rules: Sequence[DeviceRule], record: ClientRecord | None) -> DeviceRule:
    """The rule that counts for a device; one that changes nothing if none fits."""
    if record is None:
        return DeviceRule()
    return next((rule for rule in rules if rule.fits(record)), DeviceRule())
