"""The name server's parts without sockets: messages, patterns, names, caches, DNS over TCP (floor 1)."""

from fz_core.dns.messages import (
    Query,
    build_addresses,
    build_answer,
    build_error,
    build_ptr,
    is_reply_to,
    parse_reverse_name,
    truncate,
    with_id,
)
from fz_core.dns.names import DnsRecord, Match, NameEntry, ProxyNames
from fz_core.dns.patterns import Pattern
from fz_core.dns.stub import ResourceStub, SiteQuery, StubAnswer

__all__ = [
    "DnsRecord",
    "Match",
    "NameEntry",
    "Pattern",
    "ProxyNames",
    "Query",
    "ResourceStub",
    "SiteQuery",
    "StubAnswer",
    "build_addresses",
    "build_answer",
    "build_error",
    "build_ptr",
    "is_reply_to",
    "parse_reverse_name",
    "truncate",
    "with_id",
]
