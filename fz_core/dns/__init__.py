"""The name server's parts without sockets: messages, patterns, names, caches, DNS over TCP (floor 1)."""

from fz_core.dns.cache import ReplyCache
from fz_core.dns.device_names import PENDING, DeviceNames
from fz_core.dns.gateway_cache import AddressCache
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
from fz_core.dns.stub_tcp import StubTcpServer, TcpToken
from fz_core.dns.upstreams import Sentinels, Upstream, effective_upstreams, is_sentinel

__all__ = [
    "PENDING",
    "AddressCache",
    "DeviceNames",
    "DnsRecord",
    "Match",
    "NameEntry",
    "Pattern",
    "ProxyNames",
    "Query",
    "ReplyCache",
    "ResourceStub",
    "Sentinels",
    "SiteQuery",
    "StubAnswer",
    "StubTcpServer",
    "TcpToken",
    "Upstream",
    "build_addresses",
    "build_answer",
    "build_error",
    "build_ptr",
    "effective_upstreams",
    "is_reply_to",
    "is_sentinel",
    "parse_reverse_name",
    "truncate",
    "with_id",
]
