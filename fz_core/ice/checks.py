"""The STUN messages peers exchange: how they are written and what makes one acceptable.

Source: spec/connectivity.md section 5.3, RFC 8445 section 7.
"""

from __future__ import annotations

from fz_core.ice.credentials import Credentials
from fz_core.packet import Address
from fz_core.stun import Message, build, error_code_value, u32_value, u64_value, xor_address_value
from fz_core.stun.attributes import (
    BINDING,
    ERROR,
    ERROR_CODE,
    ICE_CONTROLLED,
    ICE_CONTROLLING,
    PRIORITY,
    REQUEST,
    SUCCESS,
    USE_CANDIDATE,
    USERNAME,
    XOR_MAPPED_ADDRESS,
)

ROLE_CONFLICT = 487


def build_check(
    transaction_id: bytes,
    local: Credentials,
    remote: Credentials,
    controlling: bool,
    tie_breaker: int,
    priority: int,
    use_candidate: bool,
) -> bytes:
    """A request, signed with the peer's password."""
    attributes = [
        (USERNAME, f"{remote.ufrag}:{local.ufrag}".encode()),
        (ICE_CONTROLLING if controlling else ICE_CONTROLLED, u64_value(tie_breaker)),
        (PRIORITY, u32_value(priority)),
    ]
    if use_candidate:
        attributes.append((USE_CANDIDATE, b""))
    return build(BINDING, REQUEST, transaction_id, attributes, integrity_key=remote.key, fingerprint=True)


def build_success(transaction_id: bytes, mapped: Address, local: Credentials) -> bytes:
    """The answer: where the request came from."""
    attributes = [(XOR_MAPPED_ADDRESS, xor_address_value(mapped, transaction_id))]
    return build(BINDING, SUCCESS, transaction_id, attributes, integrity_key=local.key, fingerprint=True)


def build_role_conflict(transaction_id: bytes, local: Credentials) -> bytes:
    """The answer to a peer that claims our role and lost."""
    attributes = [(ERROR_CODE, error_code_value(ROLE_CONFLICT, "Role Conflict"))]
    return build(BINDING, ERROR, transaction_id, attributes, integrity_key=local.key, fingerprint=True)


def is_addressed_to(message: Message, local: Credentials, remote: Credentials) -> bool:
    """Whether a request names both sides of this connection."""
    return message.username == f"{local.ufrag}:{remote.ufrag}"
