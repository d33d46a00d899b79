"""Messages in both directions, v2 and legacy, lenient exactly where `spec/portal-protocol.md` §4 to §6 is."""

from __future__ import annotations

import base64
import json
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fz_core.packet import Address
from fz_core.portal import client, client_legacy, client_wire, gateway
from fz_core.portal import relay as relay_messages
from fz_core.portal import types as t
from fz_core.portal.codec import ParseFailure

ID = [f"11111111-1111-4111-8111-{n:012d}" for n in range(10)]
KEY = bytes(range(32))
KEY_B64 = base64.b64encode(KEY).decode()
CREDENTIALS = t.IceCredentials("ab12", "p" * 22)
V4, V6 = ip_address("100.64.0.1"), ip_address("fd00:2021:1111::1")
CLAIMS = {
    "account_id": "a", "iat": 1, "exp": 2, "uploads_enabled": False, "role": "initiator", "initiator_device_id": "i",
    "responder_device_id": "r", "policy_authorization_id": "p", "policy_id": "p", "resource_id": "r",
    "resource_name": "n", "initiator_actor_id": "i", "initiator_actor_name": "n", "authorized_at": "t",
    "authorization_expires_at": "t",
}  # fmt: skip


def segment(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def ingest_token(**changes: Any) -> str:
    claims = {k: v for k, v in (CLAIMS | changes).items() if v is not None}
    return f"{segment({'alg': 'HS256'})}.{segment(claims)}.c2ln"


TOKEN = ingest_token()
DNS = t.DnsResource(ID[3], "*.example.com", "web", (t.Filter("tcp", 80, 443), t.Filter("icmp")), (t.Site(ID[4], "s"),))
CIDR = t.CidrResource(ID[5], ip_network("10.0.0.0/8"), "net", (), (t.Site(ID[4], "s"),), "note")
INTERNET = t.InternetResource(ID[6], sites=(t.Site(ID[4], "s"),))
DEVICE = t.PoolDevice(ID[1], ip_network("100.64.0.1/32"), ip_network("fd00:2021:1111::1/128"))
POOL = t.StaticDevicePool(ID[7], "pool", (DEVICE,))
DYNAMIC = t.DynamicDevicePool(ID[8], "dyn", "*.dev")
RELAYS = (
    t.Relay(ID[9], Address.parse("1.2.3.4:3478"), "1:x", "secret", 1),
    t.Relay(ID[9], Address.parse("[2001:db8::1]:3478"), "1:x", "secret", 1),
)
INTERFACE = t.Interface(V4, V6, (ip_address("1.1.1.1"),), ("https://dns.example/dns-query",), "corp.example")
GRANTS = (t.Authorization(ID[1], ID[3], 1_800_000_000),)
NAME = t.ProxiedName("www.example.com", (ip_address("100.96.0.1"), ip_address("fd00:2021:1111:8000::1")))
LINES = ("candidate:1 1 udp 1 1.2.3.4 5 typ host",)

TO_CLIENT = [
    client.Init(INTERFACE, (DNS, CIDR, INTERNET, POOL, DYNAMIC), RELAYS, GRANTS, t.FlowLogs("https://x/", 0, 0)),
    client.ConfigChanged(INTERFACE),
    client.ResourceCreatedOrUpdated(DNS),
    client.ResourceDeleted(ID[3]),
    client.RelaysPresence((ID[9],), RELAYS),
    client.AuthorizationCreated(ID[3], ID[2], ID[4], KEY, V4, V6, KEY, CREDENTIALS, CREDENTIALS, True, TOKEN),
    client.AuthorizationCreationFailed(ID[3], client.FailReason.OFFLINE, ("remote_ip",)),
    client.GatewayIceCandidates(ID[2], LINES),
    client.InvalidateGatewayIceCandidates(ID[2], LINES),
    client.ClientIceCandidates(ID[1], LINES),
    client.InvalidateClientIceCandidates(ID[1], LINES),
    client.ClientIceCandidateError(ID[1], client.FailReason.OFFLINE),
    client.ClientDeviceAccessAuthorized(
        ID[1], "laptop", KEY, V4, V6, KEY, CREDENTIALS, CREDENTIALS, False, False,
        client.PoolGrant(ID[7], (t.Filter("udp", 53, 53),)), 1_800_000_000, TOKEN,
    ),
    client.ClientDeviceAccessAuthorized(ID[1], "laptop", KEY, V4, V6, KEY, CREDENTIALS, CREDENTIALS, True,
                                        ingest_token=TOKEN),
    client.ClientDeviceAccessDenied(V4, None, client.FailReason.AMBIGUOUS_ADDRESS),
    client.DevicePoolDomainResolved(ID[8], "a.dev", V4, V6),
    client.DevicePoolDomainResolutionFailed(ID[8], "a.dev", client.FailReason.NOT_FOUND),
    client.ResourceFiltersUpdated(ID[7], (t.Filter("tcp"),)),
    client.RejectAccess(ID[1], ID[7]),
]  # fmt: skip
FROM_CLIENT = [
    client.SetSnownetCapabilities(True),
    client.RequestAuthorization(ID[3], (ID[2],)),
    client.RequestAuthorization(ID[7], (), ipv4=V4),
    client.ResolveDevicePoolDomain(ID[8], "a.dev"),
    client.NewGatewayIceCandidates(ID[2], LINES),
    client.WithdrawGatewayIceCandidates(ID[2], LINES),
    client.NewClientIceCandidates(ID[1], LINES),
    client.WithdrawClientIceCandidates(ID[1], LINES),
    client.BroadcastIceCandidates((ID[2],), LINES),
    client.BroadcastInvalidatedIceCandidates((ID[2],), LINES),
    client.NoRelays(),
    client_legacy.PrepareConnection(ID[3], (ID[2],)),
    client_legacy.RequestConnection(ID[2], ID[3], CREDENTIALS, KEY, NAME),
    client_legacy.RequestConnection(ID[2], ID[3], CREDENTIALS, KEY),
    client_legacy.ReuseConnection(ID[2], ID[3], NAME),
    client_legacy.ReuseConnection(ID[2], ID[3]),
]
TO_GATEWAY = [
    gateway.Init(t.GatewayInterface(V4, V6), RELAYS, GRANTS, "acme", t.FlowLogs("https://x/", 0, 0)),
    gateway.CreateAuthorization(
        "ref", gateway.Client(ID[1], KEY, KEY, V4, V6, (("version", "1.5.11"),)),
        t.DnsResource(ID[3], "*.example.com", "web"), CREDENTIALS, CREDENTIALS, None, False, TOKEN,
    ),
    gateway.RequestConnection(
        "ref", gateway.Client(ID[1], KEY, KEY, V4, V6), t.DnsResource(ID[3], "*.example.com", "web"), CREDENTIALS,
        1_800_000_000, NAME, 25,
    ),
    gateway.AllowAccess("ref", ID[1], V4, V6, t.DnsResource(ID[3], "*.example.com", "web"), None, NAME),
    gateway.AllowAccess("ref", ID[1], V4, V6, t.InternetResource(ID[6]), 1_800_000_000),
    gateway.RejectAccess(ID[1], ID[3]),
    gateway.ResourceUpdated(t.CidrResource(ID[5], ip_network("10.0.0.0/8"), "net", (t.Filter("tcp", 1, 2),))),
    gateway.ResourceUpdated(t.InternetResource(ID[6])),
    gateway.IceCandidates(ID[1], LINES),
    gateway.InvalidateIceCandidates(ID[1], LINES),
    gateway.RelaysPresence((), ()),
]  # fmt: skip
FROM_GATEWAY = [
    gateway.SetSnownetCapabilities(False),
    gateway.AuthorizationCreated("ref"),
    gateway.ConnectionReady("ref", CREDENTIALS),
    gateway.BroadcastIceCandidates((ID[1],), LINES),
    gateway.BroadcastInvalidatedIceCandidates((ID[1],), LINES),
    gateway.NoRelays(),
]
ALL = [
    *((client_wire.TO_CLIENT, m) for m in TO_CLIENT),
    *((client_wire.TO_PORTAL, m) for m in FROM_CLIENT),
    *((gateway.TO_GATEWAY, m) for m in TO_GATEWAY),
    *((gateway.TO_PORTAL, m) for m in FROM_GATEWAY),
    (relay_messages.TO_RELAY, relay_messages.Init()),
]


@pytest.mark.parametrize("is_legacy", [False, True])
@pytest.mark.parametrize(("codec", "message"), ALL, ids=lambda v: type(v).__name__)
def test_what_is_built_is_read_back(codec: Any, message: Any, is_legacy: bool) -> None:
    event, payload = codec.build(message, is_legacy=is_legacy)
    payload = json.loads(json.dumps(payload))
    assert codec.parse(event, payload, is_legacy=is_legacy) == message


@pytest.mark.parametrize(("codec", "message"), ALL, ids=lambda v: type(v).__name__)
def test_secrets_stay_out_of_repr(codec: Any, message: Any) -> None:
    assert "secret" not in repr(message)
    assert "p" * 22 not in repr(message)
    assert TOKEN not in repr(message)


@pytest.mark.parametrize(
    ("codec", "v2", "legacy"),
    [
        (client_wire.TO_PORTAL, "request_authorization", "create_flow"),
        (client_wire.TO_CLIENT, "authorization_created", "flow_created"),
        (client_wire.TO_CLIENT, "authorization_creation_failed", "flow_creation_failed"),
        (gateway.TO_GATEWAY, "create_authorization", "authorize_flow"),
        (gateway.TO_PORTAL, "authorization_created", "flow_authorized"),
    ],
)
def test_each_endpoint_knows_its_own_names_only(codec: Any, v2: str, legacy: str) -> None:
    for event, is_legacy in ((legacy, False), (v2, True)):
        failure = codec.parse(event, {}, is_legacy=is_legacy)
        assert isinstance(failure, ParseFailure)
        assert "unknown event" in failure.reason
    for event, is_legacy in ((v2, False), (legacy, True)):
        assert "unknown event" not in codec.parse(event, {}, is_legacy=is_legacy).reason


def test_the_scheme_before_1_4_looks_as_specified() -> None:
    ice = {"username": "ab12", "password": "p" * 22}
    domain = {"name": "www.example.com", "proxy_ips": ["100.96.0.1", "fd00:2021:1111:8000::1"]}
    resource = {"id": ID[3], "type": "dns", "name": "web", "address": "*.example.com", "filters": []}
    order = gateway.RequestConnection(
        "ref", gateway.Client(ID[1], KEY, KEY, V4, V6), t.DnsResource(ID[3], "*.example.com", "web"), CREDENTIALS,
        7, NAME, 25,
    )  # fmt: skip
    peer = {
        "persistent_keepalive": 25, "public_key": KEY_B64, "preshared_key": KEY_B64, "ipv4": str(V4), "ipv6": str(V6),
    }  # fmt: skip
    assert gateway.TO_GATEWAY.build(order) == (
        "request_connection",
        {
            "ref": "ref", "resource": resource, "expires_at": 7,
            "client": {"id": ID[1], "payload": {"ice_parameters": ice, "domain": domain}, "peer": peer},
        },
    )  # fmt: skip
    access = gateway.AllowAccess("ref", ID[1], V4, V6, t.DnsResource(ID[3], "*.example.com", "web"), 7)
    assert gateway.TO_GATEWAY.build(access) == (
        "allow_access",
        {
            "ref": "ref", "client_id": ID[1], "client_ipv4": str(V4), "client_ipv6": str(V6), "resource": resource,
            "expires_at": 7, "payload": None,
        },
    )  # fmt: skip
    accepted = {"ConnectionAccepted": {"ice_parameters": ice}}
    ready = gateway.TO_PORTAL.build(gateway.ConnectionReady("ref", CREDENTIALS))
    assert ready == ("connection_ready", {"ref": "ref", "gateway_payload": accepted})
    reply = client_legacy.ConnectionAccepted(ID[3], KEY, CREDENTIALS)
    assert client_legacy.write_reply(reply) == {
        "resource_id": ID[3], "persistent_keepalive": 25, "gateway_public_key": KEY_B64, "gateway_payload": accepted,
    }  # fmt: skip


@pytest.mark.parametrize(
    "reply",
    [
        client_legacy.ConnectionPrepared(ID[3], ID[4], ID[2], "192.0.2.1"),
        client_legacy.ConnectionAccepted(ID[3], KEY, CREDENTIALS, 25),
    ],
)
def test_replies_are_read_back(reply: client_legacy.Reply) -> None:
    assert client_legacy.read_reply(json.loads(json.dumps(client_legacy.write_reply(reply)))) == reply
    assert "p" * 22 not in repr(reply)


def test_the_domain_of_an_old_client_may_be_missing() -> None:
    event, payload = client_wire.TO_PORTAL.build(client_legacy.RequestConnection(ID[2], ID[3], CREDENTIALS, KEY))
    del payload["client_payload"]["domain"]
    assert client_wire.TO_PORTAL.parse(event, payload).domain is None


def init(**changes: Any) -> Any:
    payload = client_wire.TO_CLIENT.build(TO_CLIENT[0])[1] | changes
    return client_wire.TO_CLIENT.parse("init", {k: v for k, v in payload.items() if v != "drop"})


def test_a_malformed_resource_is_skipped_alone() -> None:
    good = t.write_resource(DNS)
    bad = [{**good, "id": 1}, {**good, "type": "cidr"}, {**good, "filters": [{"protocol": "gre"}]}, None]
    future = {"type": "teleport", "id": ID[1]}
    parsed = init(resources=[*bad, future, good])
    assert parsed.resources == (DNS,)
    assert len(parsed.skipped) == len(bad)


@pytest.mark.parametrize("missing", ["interface", "flow_logs"])
def test_init_needs(missing: str) -> None:
    assert isinstance(init(**{missing: "drop"}), ParseFailure)


def test_the_rest_of_init_defaults_to_empty() -> None:
    parsed = init(resources="drop", relays="drop", authorizations="drop")
    assert (parsed.resources, parsed.relays, parsed.authorizations) == ((), (), ())


@pytest.mark.parametrize(
    "broken",
    [
        {"relays": [{"type": "carrier-pigeon"}]},
        {"interface": {"ipv4": "100.64.0.1", "ipv6": "fd00::1", "upstream_do53": [{"ip": "x"}]}},
        {"interface": {"ipv4": "100.64.0.1", "ipv6": "fd00::1", "upstream_doh": [{"url": "http://x/"}]}},
        {"interface": {"ipv4": "100.64.0.1", "ipv6": "fd00::1", "upstream_doh": [{"url": "https://x/?q"}]}},
        {"interface": {"ipv4": "fd00::1", "ipv6": "fd00::1"}},
    ],
)
def test_other_malformations_drop_the_whole_message(broken: Any) -> None:
    assert isinstance(init(**broken), ParseFailure)


def test_stun_relays_are_read_and_left_out() -> None:
    assert init(relays=[{"type": "stun", "id": ID[1], "addr": "1.2.3.4:1"}]).relays == ()


def test_legacy_dns_counts_only_without_the_new_form() -> None:
    legacy = [{"protocol": "ip_port", "address": "9.9.9.9:53"}]
    addresses = {"ipv4": "100.64.0.1", "ipv6": "fd00::1", "upstream_dns": legacy}
    assert init(interface=addresses).interface.upstream_do53 == (ip_address("9.9.9.9"),)
    both = {**addresses, "upstream_do53": [{"ip": "1.1.1.1"}]}
    assert init(interface=both).interface.upstream_do53 == (ip_address("1.1.1.1"),)


def test_sites_have_two_names_but_not_at_once() -> None:
    modern = t.write_resource(DNS)
    old = t.write_resource(DNS, modern=False)
    assert "gateway_groups" in old
    assert "sites" not in old
    assert t.read_resource(modern) == t.read_resource(old) == DNS
    with pytest.raises(ValueError, match="both"):
        t.read_resource(modern | old)


def test_neighbouring_relays_are_merged() -> None:
    (merged,) = t.merge_relays(RELAYS)
    assert (merged.v4, merged.v6) == (RELAYS[0].address, RELAYS[1].address)
    other = t.Relay(ID[8], RELAYS[0].address, "u", "p")
    assert [r.id for r in t.merge_relays((RELAYS[0], other, RELAYS[1]))] == [ID[9], ID[8], ID[9]]


@pytest.mark.parametrize("claim", sorted(CLAIMS))
def test_an_ingest_token_needs_every_claim(claim: str) -> None:
    assert t.read_ingest_token(TOKEN) == TOKEN
    with pytest.raises((KeyError, TypeError)):
        t.read_ingest_token(ingest_token(**{claim: None}))


@pytest.mark.parametrize("token", ["", "a.b", "a.b.c.d", f"{segment({'alg': 'none'})}.{segment(CLAIMS)}.x",
                                   f"{segment({'alg': 'HS256'})}.{segment(CLAIMS)}."])  # fmt: skip
def test_other_tokens_are_refused(token: str) -> None:
    with pytest.raises(ValueError):
        t.read_ingest_token(token)


@pytest.mark.parametrize("key", ["", "AAAA", KEY_B64[:-1], KEY_B64 + "AAAA", "!" * 44])
def test_keys_have_32_bytes(key: str) -> None:
    with pytest.raises(ValueError):
        t.read_key(key)


def test_unknown_reasons_are_kept_as_unknown() -> None:
    parsed = client_wire.TO_CLIENT.parse("authorization_creation_failed", {"resource_id": ID[1], "reason": "moon"})
    assert parsed.reason is client.FailReason.UNKNOWN


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda c: st.lists(c, max_size=3) | st.dictionaries(st.sampled_from(["id", "ipv4", "type", "ref", "x"]), c),
    max_leaves=8,
)


def mutations(payload: Any) -> st.SearchStrategy[Any]:
    """The payload with one part replaced by anything."""
    if isinstance(payload, dict) and payload:
        return st.sampled_from(sorted(payload)).flatmap(
            lambda k: mutations(payload[k]).map(lambda v: {**payload, k: v}) | ANYTHING.map(lambda v: {**payload, k: v})
        )
    if isinstance(payload, list) and payload:
        return mutations(payload[0]).map(lambda v: [v, *payload[1:]])
    return ANYTHING


@settings(max_examples=400)
@given(st.sampled_from(ALL).flatmap(lambda pair: st.tuples(st.just(pair), mutations(pair[0].build(pair[1])[1]))))
def test_no_payload_raises(case: Any) -> None:
    (codec, message), payload = case
    event, _ = codec.build(message)
    parsed = codec.parse(event, payload)
    assert isinstance(parsed, ParseFailure) or type(parsed).__module__.startswith("fz_core.portal")
