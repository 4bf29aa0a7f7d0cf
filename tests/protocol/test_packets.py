"""MQTT's PUBLISH and PUBACK to bytes and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetrain.protocol.transport.packets import (
    PacketBuffer,
    PacketError,
    Publish,
    decode_puback,
    decode_publish,
    encode_puback,
    encode_publish,
)

topics = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)
packets = st.integers(1, 65535)


def test_a_message_of_mqtt_3_to_the_byte():
    """Written out by MQTT 3.1.1, section 3.3: first byte, length, topic with its length, packet id, payload."""
    assert encode_publish("a/b", b"hi", 10, version_5=False) == b"\x32\x09\x00\x03a/b\x00\x0ahi"
    assert encode_publish("a/b", b"hi", 10, retain=True, version_5=False)[0] == 0x33


def test_a_message_of_mqtt_5_to_the_byte():
    """Properties: 0x02 is the expiry, four bytes; 0x23 an alias, two (MQTT 5.0, section 3.3.2.3)."""
    data = encode_publish("", b"hi", 258, version_5=True, expiry_seconds=120, alias=7)
    assert data == b"\x32\x0f\x00\x00\x01\x02\x08\x02\x00\x00\x00\x78\x23\x00\x07hi"
    assert encode_publish("t", b"", 1, version_5=True) == b"\x32\x06\x00\x01t\x00\x01\x00"


def test_acknowledgements_to_the_byte():
    assert encode_puback(0x1234) == b"\x40\x02\x12\x34"
    assert decode_puback(memoryview(b"\x12\x34")) == (0x1234, 0)
    assert decode_puback(memoryview(b"\x12\x34\x87\x00")) == (0x1234, 0x87)
    with pytest.raises(PacketError):
        decode_puback(memoryview(b"\x12"))


@given(topics, st.binary(max_size=300), packets, st.booleans(), st.integers(0, 2**32 - 1))
def test_what_was_written_is_read(topic, payload, packet, version_5, expiry):
    data = encode_publish(topic, payload, packet, version_5=version_5, expiry_seconds=expiry)
    buffer = PacketBuffer()
    buffer.feed(data)
    first, body = buffer.next()
    assert decode_publish(first, body, version_5=version_5) == Publish(topic, payload, 1, packet)
    assert buffer.next() is None


@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=400)), max_size=8), st.randoms())
def test_a_stream_is_cut_into_its_packets_however_it_arrives(expected, random):
    stream = b"".join(bytes([first]) + length_of(body) + body for first, body in expected)
    buffer, found = PacketBuffer(), []
    while stream:
        count = random.randint(1, len(stream))
        buffer.feed(stream[:count])
        stream = stream[count:]
        while (packet := buffer.next()) is not None:
            found.append((packet[0], bytes(packet[1])))
    assert found == expected


def length_of(body):
    """Section 2.2.3, by its own pseudo code."""
    out, rest = [], len(body)
    while True:
        rest, digit = divmod(rest, 128)
        out.append(digit | (128 if rest else 0))
        if not rest:
            return bytes(out)


def test_a_length_of_more_than_four_bytes_is_none():
    buffer = PacketBuffer()
    buffer.feed(b"\x32\xff\xff\xff\xff")
    assert buffer.next() is None
    buffer.feed(b"\xff")
    with pytest.raises(PacketError, match="four bytes"):
        buffer.next()


@given(st.integers(0x30, 0x3F), st.binary(max_size=60), st.booleans())
def test_whatever_a_broker_sends_is_a_message_or_an_error(first, body, version_5):
    try:
        message = decode_publish(first, memoryview(body), version_5=version_5)
    except PacketError:
        return
    assert message.qos in {0, 1}
    assert message.topic


def test_a_topic_that_is_no_text_is_no_reason_to_hang_up():
    """Somebody else may have chosen it; nobody has that name."""
    message = decode_publish(0x32, memoryview(b"\x00\x03a\xff\xfe\x00\x01x"), version_5=False)
    assert message == Publish("a��", b"x", 1, 1)
