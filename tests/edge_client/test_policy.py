"""When a device takes part, and what it says when it does not."""

from __future__ import annotations

import datetime as dt

import msgspec
import pytest

from edgetrain.edge_client.host import surroundings
from edgetrain.edge_client.host.policy import LOOK_SECONDS, Policy, PolicyConfig, Surroundings, objection
from edgetrain.edge_client.host.surroundings import is_metered, throttled
from edgetrain.protocol.messages import DeviceState

FINE = {"battery_percent": 80.0, "charging": False, "network": "wifi", "free_memory_mb": 900, "temperature_c": 45.0}


def around(*, metered=False, throttling=(), time=dt.time(12), **device):
    return Surroundings(device=DeviceState(**(FINE | device)), metered=metered, throttling=tuple(throttling), time=time)


@pytest.mark.parametrize(
    ("policy", "now", "expected"),
    [
        ({}, {}, None),
        ({}, {"battery_percent": 19.0}, "battery at 19 %"),
        ({}, {"battery_percent": 19.0, "charging": True}, None),
        ({}, {"battery_percent": None, "charging": None}, None),
        ({"only_charging": True}, {}, "not charging"),
        ({"only_charging": True}, {"charging": True}, None),
        ({"only_charging": True}, {"charging": None}, None),  # no battery: mains
        ({"max_temperature_c": 44}, {}, "at 45 °C"),
        ({"max_temperature_c": 45}, {}, None),
        ({"max_temperature_c": 44}, {"temperature_c": None}, None),
        ({}, {"metered": True}, "metered network (wifi)"),
        ({}, {"metered": None, "network": "cellular"}, "metered network (cellular)"),
        ({}, {"metered": False, "network": "cellular"}, None),  # the owner said so
        ({"allow_metered": True}, {"metered": True}, None),
        ({}, {"throttling": ["under-voltage", "throttling"]}, "the firmware reports under-voltage, throttling"),
        ({"heed_throttling": False}, {"throttling": ["throttling"]}, None),
        ({"min_free_memory_mb": 901}, {}, "900 MB of memory free"),
        ({"quiet_hours": "22:00-07:00"}, {"time": dt.time(23, 59)}, "quiet hours"),
        ({"quiet_hours": "22:00-07:00"}, {"time": dt.time(6, 59)}, "quiet hours"),
        ({"quiet_hours": "22:00-07:00"}, {"time": dt.time(7)}, None),
        ({"quiet_hours": "09:00-17:30"}, {"time": dt.time(17, 29)}, "quiet hours"),
        ({"quiet_hours": "09:00-17:30"}, {"time": dt.time(8, 59)}, None),
    ],
)
def test_what_is_objected_to(policy, now, expected):
    found = objection(PolicyConfig(**policy), around(**now))
    assert found is None if expected is None else found and expected in found, found


@pytest.mark.parametrize("hours", ["22-7", "25:00-07:00", "22:60-07:00", "nights"])
def test_hours_that_are_none_are_an_error(hours):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"quiet_hours": hours}, PolicyConfig)


def test_sensors_are_asked_now_and_then_only():
    looks, now = [], [0.0]

    def look():
        looks.append(now[0])
        return around(battery_percent=10.0)

    policy = Policy(PolicyConfig(), clock=lambda: now[0], look=look)
    for step in range(100):
        now[0] = step * 0.1
        assert policy.objection()
    assert looks == [0.0, LOOK_SECONDS]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("0x0", ()),
        ("0x50000", ()),  # it was, but it is not any more
        ("0x50005", ("under-voltage", "throttling")),
        ("a", ("a capped frequency", "the soft temperature limit")),  # sysfs prints hex without a prefix
        ("rubbish", ()),
    ],
)
def test_the_firmwares_flags(tmp_path, monkeypatch, answer, expected):
    file = tmp_path / "get_throttled"
    file.write_text(answer + "\n")
    assert throttled(file) == expected
    # The same from the command, where the kernel does not show it.
    command = tmp_path / "vcgencmd"
    command.write_text(f"#!/bin/sh\n[ $1 = get_throttled ] && echo throttled={answer}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert throttled(tmp_path / "none") == expected


@pytest.mark.parametrize(("answer", "expected"), [("u 1", True), ("u 4", False), ("u 0", None), ("", None)])
def test_what_network_manager_says(tmp_path, monkeypatch, answer, expected):
    command = tmp_path / "busctl"
    command.write_text(f'#!/bin/sh\n[ "$6" = Metered ] || [ "$5" = Metered ] && echo {answer}\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert is_metered() is expected


def test_a_command_that_hangs_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(surroundings, "ASK_SECONDS", 0.2)
    for name in ("busctl", "vcgencmd"):
        (tmp_path / name).write_text("#!/bin/sh\nexec sleep 5\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert is_metered() is None
    assert throttled(tmp_path / "none") == ()
