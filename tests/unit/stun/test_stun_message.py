"""The STUN codec against RFC 5769, the worked example of the relay sheet, and damaged input."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fz_core.packet import Address, DropReason
from fz_core.stun import (
    Message,
    build,
    build_channel_data,
    channel_number_value,
    error_code_value,
    is_stun_untrusted,
    long_term_key,
    parse_channel_data_untrusted,
    u8_value,
    u32_value,
    u64_value,
    xor_address_value,
)


def load_vectors() -> ModuleType:
    path = Path(__file__).parents[2] / "vectors" / "stun_rfc5769.py"
    spec = importlib.util.spec_from_file_location("stun_rfc5769", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


V = load_vectors()
TXID = bytes(range(12))


def parse(data: bytes) -> Message:
    message = Message.parse_untrusted(data)
    assert isinstance(message, Message)
    return message


def test_rfc5769_request() -> None:
    message = parse(V.REQUEST)
    assert (message.method, message.cls, message.is_request) == (1, 0, True)
    assert message.transaction_id == V.TRANSACTION_ID
    assert message.software == "STUN test client"
    assert message.username == "evtj:h6vY"
    assert message.priority == 0x6E0001FF
    assert message.ice_controlled == 0x932FF9B151263B36
    assert message.ice_controlling is None
    assert message.check_integrity(V.PASSWORD)
    assert not message.check_integrity(b"other")
    assert message.has_fingerprint_ok


@pytest.mark.parametrize(
    ("name", "address"),
    [("RESPONSE_IPV4", "192.0.2.1:32853"), ("RESPONSE_IPV6", "[2001:db8:1234:5678:11:2233:4455:6677]:32853")],
)
def test_rfc5769_responses(name: str, address: str) -> None:
    message = parse(getattr(V, name))
    assert message.is_success
    assert message.xor_mapped_address == Address.parse(address)
    assert message.check_integrity(V.PASSWORD)
    assert message.has_fingerprint_ok


def test_rfc5769_long_term_request() -> None:
    message = parse(V.REQUEST_LONG_TERM)
    assert message.username == "マトリックス"
    assert message.nonce == "f//499k954d6OL34oL9FSTvy64sA"
    assert message.realm == "example.org"
    assert message.check_integrity(long_term_key("マトリックス", "example.org", "TheMatrIX"))
    assert not message.has_fingerprint_ok


def test_building_reproduces_the_rfc_response() -> None:
    # the vector pads with a blank, we pad with zero: so only a value without padding compares whole
    address = xor_address_value(Address.parse("192.0.2.1:32853"), V.TRANSACTION_ID)
    built = build(1, 2, V.TRANSACTION_ID, [(0x0020, address)], integrity_key=V.PASSWORD, fingerprint=True)
    assert built[20:32] == V.RESPONSE_IPV4[36:48]
    assert parse(built).check_integrity(V.PASSWORD)
    assert parse(built).has_fingerprint_ok


def test_relay_sheet_example() -> None:
    username, password = "2000000000:relaytest", "2UenLi1wA5Jc3kA3SEjWF+5iLFdyYfmiNkVPB51k2TE"
    key = long_term_key(username, "firezone", password)
    assert key.hex() == "027e5f25c89d28e71f8a684575de68ca"
    nonce = b"00000000-0000-0000-0000-000000000000"
    attributes = [(0x19, u8_value(17)), (0x8000, u8_value(2)), (0x8022, b"test")]
    attributes += [(0x06, username.encode()), (0x14, b"firezone"), (0x15, nonce)]
    built = build(3, 0, TXID, attributes, integrity_key=key)
    assert len(built) == 144
    assert built[-20:].hex() == "21c685a3a46d869987ff6968187380000ad35908"


def test_typed_accessors_read_what_was_built() -> None:
    six = Address.parse("[2001:db8::7]:9")
    four = Address.parse("10.1.2.3:65535")
    attributes = [
        (0x16, xor_address_value(four, TXID)),
        (0x16, xor_address_value(six, TXID)),
        (0x12, xor_address_value(six, TXID)),
        (0x09, error_code_value(438, "Stale Nonce")),
        (0x0D, u32_value(600)),
        (0x0C, channel_number_value(0x4001)),
        (0x17, u8_value(1)),
        (0x8000, u8_value(2)),
        (0x19, u8_value(17)),
        (0x25, b""),
        (0x802A, u64_value(2**63 + 5)),
    ]
    message = parse(build(9, 3, TXID, attributes))
    assert (message.method, message.cls) == (9, 3)
    assert message.xor_relayed_addresses == [four, six]
    assert message.xor_peer_address == six
    assert message.error_code == 438
    assert message.lifetime == 600
    assert message.channel_number == 0x4001
    assert (message.requested_address_family, message.additional_address_family) == (1, 2)
    assert message.requested_transport == 17
    assert message.use_candidate
    assert message.ice_controlling == 2**63 + 5


def test_the_first_duplicate_counts() -> None:
    message = parse(build(1, 0, TXID, [(0x0D, u32_value(1)), (0x0D, u32_value(2))]))
    assert message.lifetime == 1


def test_attributes_after_integrity_are_ignored() -> None:
    signed = build(1, 0, TXID, [(0x24, u32_value(7))], integrity_key=b"k")
    extended = signed[:2] + (len(signed) - 20 + 4).to_bytes(2, "big") + signed[4:] + b"\x00\x25\x00\x00"
    message = parse(extended)
    assert message.check_integrity(b"k")
    assert not message.use_candidate


def test_malformed_values_read_as_absent() -> None:
    attributes = [(0x0D, b"12"), (0x0006, b"\xff\xfe"), (0x20, b"1234567"), (0x0C, b"\x40\x00")]
    message = parse(build(1, 0, TXID, attributes))
    assert message.lifetime is None
    assert message.username is None
    assert message.xor_mapped_address is None
    assert message.channel_number is None
    assert message.has(0x0C)


def test_every_truncation_and_extension_is_refused() -> None:
    for size in range(len(V.REQUEST)):
        assert Message.parse_untrusted(V.REQUEST[:size]) is DropReason.MALFORMED_STUN
        assert not is_stun_untrusted(V.REQUEST[:size])
    assert Message.parse_untrusted(V.REQUEST + b"\0") is DropReason.MALFORMED_STUN
    assert Message.parse_untrusted(V.REQUEST + b"\0\0\0\0") is DropReason.MALFORMED_STUN


def test_an_attribute_that_leaves_the_message_is_refused() -> None:
    good = build(1, 0, TXID, [(0x8022, b"abcd")])
    assert Message.parse_untrusted(good[:22] + b"\x00\x05" + good[24:]) is DropReason.MALFORMED_STUN


def test_a_flipped_bit_never_passes_integrity() -> None:
    for bit in range(84 * 8):
        damaged = bytearray(V.REQUEST)
        damaged[bit // 8] ^= 1 << bit % 8
        message = Message.parse_untrusted(damaged)
        assert not isinstance(message, Message) or not message.check_integrity(V.PASSWORD)


def test_a_refused_message_leaves_no_state_for_the_next() -> None:
    assert Message.parse_untrusted(V.REQUEST[:40]) is DropReason.MALFORMED_STUN
    assert parse(V.REQUEST).check_integrity(V.PASSWORD)


def test_random_damage_never_raises() -> None:
    rng = random.Random(5769)
    for _ in range(20000):
        data = bytearray(rng.choice((V.REQUEST, V.RESPONSE_IPV6, V.REQUEST_LONG_TERM)))
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(20, len(data))] = rng.randrange(256)
        message = Message.parse_untrusted(data)
        if isinstance(message, Message):
            read_everything(message)


def read_everything(message: Message) -> None:
    for name in dir(type(message)):
        if not name.startswith("_") and not callable(getattr(type(message), name)):
            getattr(message, name)
    message.check_integrity(b"key")


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    message = Message.parse_untrusted(data)
    assert isinstance(message, Message | DropReason)
    is_stun_untrusted(data)
    parse_channel_data_untrusted(data)


def test_build_wants_a_whole_transaction_id() -> None:
    with pytest.raises(ValueError, match="12"):
        build(1, 0, b"short", [])


@given(st.integers(0x4000, 0x7FFF), st.binary(max_size=1500))
def test_channel_data_round_trip(number: int, payload: bytes) -> None:
    data = build_channel_data(number, payload)
    assert data == number.to_bytes(2, "big") + len(payload).to_bytes(2, "big") + payload
    parsed = parse_channel_data_untrusted(data)
    assert not isinstance(parsed, DropReason)
    assert (parsed[0], bytes(parsed[1])) == (number, payload)
    assert isinstance(parse_channel_data_untrusted(data + b"\0"), DropReason)
    if payload:
        assert isinstance(parse_channel_data_untrusted(data[:-1]), DropReason)


@pytest.mark.parametrize("data", [b"", b"\x40\x00\x00", b"\x3f\xff\x00\x00", b"\x80\x00\x00\x00"])
def test_what_is_not_channel_data(data: bytes) -> None:
    assert isinstance(parse_channel_data_untrusted(data), DropReason)


def test_channel_numbers_have_a_range() -> None:
    with pytest.raises(ValueError, match="range"):
        build_channel_data(0x3FFF, b"")
