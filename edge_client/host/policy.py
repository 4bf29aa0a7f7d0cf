"""When this device takes part: not on an empty battery, not while it is hot, not at its owner's expense."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable
from typing import Annotated

import msgspec
from msgspec import Meta

from edgetrain.edge_client.host.device import device_state
from edgetrain.edge_client.host.surroundings import is_metered, throttled
from edgetrain.protocol.messages import DeviceState

logger = logging.getLogger(__name__)

# Sensors are asked no more often than this, also between two micro-batches.
LOOK_SECONDS = 5.0


class PolicyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[policy]: what a device asks for before it trains. What it cannot measure does not stop it."""

    min_battery_percent: Annotated[
        float, Meta(description="decline below this charge, unless charging; 0 for any", ge=0, le=100)
    ] = 20.0
    only_charging: Annotated[bool, Meta(description="train only while charging")] = False
    max_temperature_c: Annotated[
        float, Meta(description="decline while the hottest sensor is above this; 0 for any", ge=0)
    ] = 0.0
    allow_metered: Annotated[bool, Meta(description="take part over cellular and other metered networks")] = False
    min_free_memory_mb: Annotated[int, Meta(description="decline with less free memory; 0 for any", ge=0)] = 0
    quiet_hours: Annotated[
        str,
        Meta(
            description="local time in which it does not train, as 22:00-07:00",
            pattern=r"^$|^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$",
        ),
    ] = ""
    heed_throttling: Annotated[
        bool, Meta(description="decline while a Raspberry Pi's firmware reports under-voltage or throttling")
    ] = True


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy looks at."""

    device: DeviceState
    # None: nobody knows.
    metered: bool | None
    # What the firmware says is wrong now.
    throttling: tuple[str, ...]
    # Local.
    time: dt.time


def objection(policy: PolicyConfig, now: Surroundings) -> str | None:
    """Why not now, or None."""
    device = now.device
    battery = device.battery_percent
    if policy.only_charging and device.charging is False:
        return "not charging (policy.only_charging)"
    if battery is not None and battery < policy.min_battery_percent and device.charging is not True:
        return f"battery at {battery:.0f} % (policy.min_battery_percent = {policy.min_battery_percent:g})"
    if (
        policy.max_temperature_c
        and device.temperature_c is not None
        and device.temperature_c > policy.max_temperature_c
    ):
        return f"at {device.temperature_c:.0f} °C (policy.max_temperature_c = {policy.max_temperature_c:g})"
    if policy.heed_throttling and now.throttling:
        return f"the firmware reports {', '.join(now.throttling)} (policy.heed_throttling)"
    if not policy.allow_metered and (now.metered or (now.metered is None and device.network == "cellular")):
        return f"on a metered network{f' ({device.network})' if device.network else ''} (policy.allow_metered)"
    free = device.free_memory_mb
    if free is not None and free < policy.min_free_memory_mb:
        return f"{free} MB of memory free (policy.min_free_memory_mb = {policy.min_free_memory_mb})"
    if policy.quiet_hours and _is_within(policy.quiet_hours, now.time):
        return f"quiet hours, {policy.quiet_hours} (policy.quiet_hours)"
    return None


def surroundings() -> Surroundings:
    """As they are now."""
    return Surroundings(
        device=device_state(), metered=is_metered(), throttling=throttled(), time=dt.datetime.now().astimezone().time()
    )


class Policy:
    """Asks now and then whether this device takes part.

    Args:
        config: what it asks for.
        clock: monotonic seconds.
        look: at the surroundings.
    """

    def __init__(
        self,
        config: PolicyConfig,
        *,
        clock: Callable[[], float],
        look: Callable[[], Surroundings] = surroundings,
    ) -> None:
        self._config = config
        self._clock = clock
        self._look = look
        self._looked_at: float | None = None
        self._found: str | None = None

    def objection(self) -> str | None:
        """Why not now, or None; looks again after `LOOK_SECONDS`."""
        now = self._clock()
        if self._looked_at is None or now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            self._found = objection(self._config, self._look())
        return self._found


def _is_within(hours: str, time: dt.time) -> bool:
    start, end = map(dt.time.fromisoformat, hours.split("-"))
    # From 22:00 to 07:00 goes over midnight.
    return start <= time < end if start <= end else time >= start or time < end
