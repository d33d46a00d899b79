"""Flow logs of a client and its gateway about the same traffic, in virtual time."""

from __future__ import annotations

from typing import Any

import pytest

from fz_core.packet import build_echo, build_udp
from fz_core.portal.types import NO_FLOW_LOGS, FlowLogs
from fz_core.tunnel.events import FlowLogsConfigured
from fz_core.tunnel.flow_record import to_json
from fz_core.tunnel.flow_tracking import FlowTracking
from tests.sim import system
from tests.sim.names import Names, named
from tests.sim.system import EPOCH, SERVER, Peer, Scenario, System
from tests.unit.tunnel.flow_samples import assert_conforms, token_text


@pytest.fixture(autouse=True)
def tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "INGEST_TOKEN", token_text())


def track(net: System) -> None:
    net.client.state.flows = FlowTracking("client", EPOCH, is_local=True)
    net.gateway.state.flows = FlowTracking("gateway", EPOCH, is_local=True)


def ends(net: System, peer: Peer) -> list[dict[str, Any]]:
    peer.state.flows.shutdown(net.world.now)
    found = []
    while (record := peer.state.flows.poll_record()) is not None:
        assert_conforms(to_json(record), record.kind.value)
        if record.kind.value == "end":
            found.append(to_json(record))
    return found


def own_ip(net: System) -> bytes:
    return next(ips for role, peer, _, ips in net.portal.peers.values() if peer is net.client)[0].packed


@pytest.mark.shows("tunnel", 90)
@pytest.mark.parametrize("blocked", [False, True])
def test_both_ends_tell_the_same(blocked: bool) -> None:
    net = System(1, Scenario(blocked=blocked))
    track(net)
    for payload in (b"one", b"three"):
        net.client.send(build_udp(own_ip(net), SERVER, 5000, 80, payload))
        net.world.run_for(5.0)
    (sent,), (received,) = ends(net, net.client), ends(net, net.gateway)
    for report in (sent, received):
        assert (report["inner_dst_ip"], report["inner_dst_port"], report["inner_src_port"]) == ("10.0.0.80", 80, 5000)
        assert (report["tx_packets"], report["tx_bytes"]) == (2, 8)
        assert (report["rx_packets"], report["rx_bytes"]) == (2, 8)
        assert "domain" not in report
    assert "src_ip" in received["outers"][0]
    (gateway_id,) = net.client.state.node.peers
    assert ("src_ip" in sent["outers"][-1]) != net.client.state.node.path(gateway_id).via_relay


def test_a_name_is_its_proxy_address_here_and_its_real_one_there() -> None:
    names = Names(named(1, "*.corp.example"), zone={"wiki.corp.example": ("10.0.0.80",)})
    track(names)
    proxy = names.addresses("wiki.corp.example")[0]
    assert len(names.talk(proxy)) == 1
    (sent,), (received,) = ends(names, names.client), ends(names, names.gateway)
    assert (sent["inner_dst_ip"], received["inner_dst_ip"]) == (proxy, "10.0.0.80")
    for report in (sent, received):
        assert report["domain"] == "wiki.corp.example"
        assert (report["tx_packets"], report["rx_packets"]) == (1, 1)


def test_what_is_no_flow() -> None:
    net = System(1)
    track(net)
    gateway_ip = next(ips for role, peer, _, ips in net.portal.peers.values() if peer is net.gateway)[0].packed
    net.client.send(build_echo(own_ip(net), SERVER, 7))
    net.world.run_for(3.0)
    net.client.send(build_udp(own_ip(net), gateway_ip, 5000, 53535, b"x"))
    net.world.run_for(3.0)
    assert (ends(net, net.client), ends(net, net.gateway)) == ([], [])


def test_access_that_ends_ends_the_gateways_flow() -> None:
    net = System(1)
    track(net)
    net.client.send(build_udp(own_ip(net), SERVER, 5000, 80, b"one"))
    net.world.run_for(3.0)
    ((client_id, resource_id),) = net.portal.grants
    net.portal.revoke(client_id, resource_id)
    net.world.run_for(1.0)
    assert net.gateway.state.flows.tracker is not None
    assert len(net.gateway.state.flows.tracker) == 0


def test_the_portal_turns_tracking_on_and_off() -> None:
    net = System(1)
    net.client.state.flows = FlowTracking("client", EPOCH, has_spool=True)
    net.gateway.state.flows = FlowTracking("gateway", EPOCH, has_spool=True)
    for settings in (FlowLogs("https://api.example", 60, 0), NO_FLOW_LOGS):
        for peer in (net.client, net.gateway):
            init = net.portal.init(next(i for i, (_, p, *_) in net.portal.peers.items() if p is peer))
            peer.tell(type(init)(**{n: getattr(init, n) for n in init.__slots__} | {"flow_logs": settings}))
            assert FlowLogsConfigured(settings) in peer.events
            assert (peer.state.flows.tracker is not None) == (settings is not NO_FLOW_LOGS)
