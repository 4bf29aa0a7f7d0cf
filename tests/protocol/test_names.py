"""Names and topics: what may stand in a topic, and who wrote where."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.names import Topics, check_name
from edgetrain.protocol.transport.memory import topic_matches


@pytest.mark.parametrize("name", ["a", "pi-4", "A.b_c-9", "x" * 64, "0"])
def test_good_names(name):
    assert check_name(name, "client") == name


@pytest.mark.parametrize(
    "name", ["", "a/b", "+", "#", "a b", "é", ".hidden", "-x", "x" * 65, "a\n", "a\0", "..", "$SYS"]
)
def test_names_that_would_break_a_topic_or_a_path_are_refused(name):
    with pytest.raises(ConfigError, match="client name"):
        check_name(name, "client")
    with pytest.raises(ConfigError, match="federation name"):
        Topics(name)


def test_topics_by_hand():
    topics = Topics("f")
    assert topics.announce == "edgetrain/f/all/announce"
    assert topics.round == "edgetrain/f/all/round"
    assert topics.broadcast_blob(b"\x01" * 32) == "edgetrain/f/all/blob/" + "01" * 32
    assert topics.to_client("c", "blob") == "edgetrain/f/to/c/blob"
    assert topics.from_client("+", "#") == "edgetrain/f/from/+/#"


def test_two_broker_rules_suffice():
    """A client writes `from/<own name>/#` and reads `to/<own name>/#` and `all/#`."""
    topics = Topics("f")
    for kind in ("message", "blob"):
        assert topic_matches("edgetrain/f/from/c/#", topics.from_client("c", kind))
        assert topic_matches("edgetrain/f/to/c/#", topics.to_client("c", kind))
    for topic in (topics.announce, topics.round, topics.broadcast_blob(bytes(32))):
        assert topic_matches("edgetrain/f/all/#", topic)


def test_the_sender_of_a_topic():
    topics = Topics("f")
    assert topics.sender("edgetrain/f/from/c/message") == ("c", "message")
    assert topics.sender("edgetrain/f/from/c/blob/x") == ("c", "blob/x")
    for other in ("edgetrain/g/from/c/message", "edgetrain/f/to/c/message", "edgetrain/f/from//message",
                  "edgetrain/f/from/.c/message", "f", ""):  # fmt: skip
        assert topics.sender(other) is None


@given(st.text(max_size=80))
def test_any_topic_gives_a_usable_sender_or_none(rest):
    sender = Topics("f").sender("edgetrain/f/from/" + rest)
    if sender is not None:
        assert check_name(sender[0], "client") == sender[0]


@pytest.mark.parametrize(
    ("pattern", "topic", "matches"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/+", "a/b", True),
        ("a/+", "a", False),
        ("a/+", "a/b/c", False),
        ("a/#", "a/b/c", True),
        ("a/#", "a", True),  # MQTT 5, section 4.7.1.2: the parent level is included
        ("#", "a/b", True),
        ("+/b", "a/b", True),
        ("a", "b", False),
        ("a/+/#", "a/b/c/d", True),
        ("a/+/#", "a/b", True),
        ("a/+/#", "a", False),
        ("a.b/c", "a+b/c", False),
    ],
)
def test_topic_filters(pattern, topic, matches):
    assert topic_matches(pattern, topic) is matches
