"""Why a packet or message was dropped: one vocabulary for all rooms, also used as metric labels.

Bytes from a peer never raise out of the core; they end in one of these.
"""

from __future__ import annotations

from collections import Counter
from enum import StrEnum


class DropReason(StrEnum):
    """A reason to drop; the value is the metric label."""

    # inner IP packets
    MALFORMED_PACKET = "malformed_packet"
    FRAGMENTED = "fragmented"
    TOO_BIG = "too_big"
    MALFORMED_OFFLOAD = "malformed_offload"
    # outer datagrams
    UNKNOWN_DATAGRAM = "unknown_datagram"
    UNKNOWN_CONNECTION = "unknown_connection"
    UNKNOWN_CHANNEL = "unknown_channel"
    MALFORMED_STUN = "malformed_stun"
    STUN_UNAUTHENTICATED = "stun_unauthenticated"
    STUN_UNEXPECTED = "stun_unexpected"
    # WireGuard
    WG_MALFORMED = "wg_malformed"
    WG_BAD_MAC = "wg_bad_mac"
    WG_UNDER_LOAD = "wg_under_load"
    WG_BAD_HANDSHAKE = "wg_bad_handshake"
    WG_REPLAYED_HANDSHAKE = "wg_replayed_handshake"
    WG_UNKNOWN_SESSION = "wg_unknown_session"
    WG_EXPIRED_SESSION = "wg_expired_session"
    WG_BAD_PACKET = "wg_bad_packet"
    WG_REPLAYED_PACKET = "wg_replayed_packet"
    WG_BAD_COOKIE = "wg_bad_cookie"
    WG_NO_SESSION = "wg_no_session"
    # policy; these values are the reference's `error.type` labels (spec/tunnel.md §20)
    NOT_ALLOWED = "NotAllowed"
    EXPIRED_NAT_SESSION = "ExpiredNatSession"
    NOT_A_PEER = "NotAPeer"
    NO_PEER_STATE = "NoPeerState"
    OUTBOUND_ICMP_ERROR = "OutboundIcmpError"
    NOT_TUNNEL_SOURCE_IP = "NotTunnelSourceIp"
    PACKET_TO_SELF = "PacketToSelf"
    UNKNOWN_RESOURCE = "UnknownResource"
    UNSUPPORTED_PROTOCOL = "unsupported_protocol"
    NOT_CONFIGURED = "not_configured"
    MULTICAST = "multicast"
    FILTERED = "filtered"
    UNMAPPED_SENTINEL = "unmapped_sentinel"
    BAD_CONTROL = "bad_control"
    MALFORMED_DNS = "malformed_dns"
    PORTAL_MESSAGE = "portal_message"
    DNS_BUSY = "dns_busy"
    NAT_EXHAUSTED = "nat_exhausted"
    # sending
    NOT_CONNECTED = "not_connected"
    NO_CHANNEL = "no_channel"
    BUFFER_FULL = "buffer_full"
    SEND_REFUSED = "send_refused"
    RATE_LIMITED = "rate_limited"


class DropCounter(Counter[DropReason]):
    """Drops by reason."""

    def add(self, reason: DropReason) -> None:
        """Count one drop."""
        self[reason] += 1
