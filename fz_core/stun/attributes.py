"""STUN and TURN numbers, and how attribute values are written.

Reading them is `Message`'s work. Sources: RFC 8489 section 14, RFC 8656 section 18, RFC 8445 section 16.1,
RFC 5780 section 7.
"""

from __future__ import annotations

import struct
from typing import Final

from fz_core.packet import Address

MAGIC_COOKIE: Final = 0x2112A442
COOKIE_BYTES: Final = b"\x21\x12\xa4\x42"

# methods
BINDING: Final = 0x001
ALLOCATE: Final = 0x003
REFRESH: Final = 0x004
CREATE_PERMISSION: Final = 0x008
CHANNEL_BIND: Final = 0x009

# classes
REQUEST: Final = 0
INDICATION: Final = 1
SUCCESS: Final = 2
ERROR: Final = 3

# attributes
USERNAME: Final = 0x0006
MESSAGE_INTEGRITY: Final = 0x0008
ERROR_CODE: Final = 0x0009
CHANNEL_NUMBER: Final = 0x000C
LIFETIME: Final = 0x000D
XOR_PEER_ADDRESS: Final = 0x0012
REALM: Final = 0x0014
NONCE: Final = 0x0015
XOR_RELAYED_ADDRESS: Final = 0x0016
REQUESTED_ADDRESS_FAMILY: Final = 0x0017
REQUESTED_TRANSPORT: Final = 0x0019
XOR_MAPPED_ADDRESS: Final = 0x0020
PRIORITY: Final = 0x0024
USE_CANDIDATE: Final = 0x0025
PADDING: Final = 0x0026
ADDITIONAL_ADDRESS_FAMILY: Final = 0x8000
SOFTWARE: Final = 0x8022
FINGERPRINT: Final = 0x8028
ICE_CONTROLLED: Final = 0x8029
ICE_CONTROLLING: Final = 0x802A

FAMILY_IPV4: Final = 1
FAMILY_IPV6: Final = 2
TRANSPORT_UDP: Final = 17


def xor_address_value(address: Address, transaction_id: bytes) -> bytes:
    """An XOR-MAPPED, XOR-PEER or XOR-RELAYED address: 8 bytes for IPv4, 20 for IPv6."""
    mask = COOKIE_BYTES + transaction_id
    family = FAMILY_IPV4 if len(address.ip) == 4 else FAMILY_IPV6
    hidden = bytes(a ^ b for a, b in zip(address.ip, mask, strict=False))
    return struct.pack("!BBH", 0, family, address.port ^ 0x2112) + hidden


def error_code_value(code: int, reason: str) -> bytes:
    """ERROR-CODE: two zero bytes, class, number, reason."""
    return struct.pack("!HBB", 0, code // 100, code % 100) + reason.encode()


def u32_value(number: int) -> bytes:
    """LIFETIME, PRIORITY."""
    return struct.pack("!I", number)


def u64_value(number: int) -> bytes:
    """ICE-CONTROLLING, ICE-CONTROLLED."""
    return struct.pack("!Q", number)


def u8_value(number: int) -> bytes:
    """REQUESTED-TRANSPORT and the address family attributes: one byte, three reserved zeros."""
    return bytes((number, 0, 0, 0))


def channel_number_value(number: int) -> bytes:
    """CHANNEL-NUMBER: two bytes, two reserved zeros."""
    return struct.pack("!HH", number, 0)
