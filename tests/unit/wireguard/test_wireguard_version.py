"""A tunnel's version tells when what was learnt of its sessions is out of date."""

from __future__ import annotations

from wireguard_pair import Pair, ipv4

SESSION_LIFETIME = 180.0


def test_data_leaves_the_version_alone_and_new_keys_do_not() -> None:
    pair = Pair().connect()
    before = pair.a.tunnel.version, pair.b.tunnel.version
    for _ in range(3):
        pair.send(pair.a, ipv4(b"x"))
        pair.send(pair.b, ipv4(b"y"))
    assert (pair.a.tunnel.version, pair.b.tunnel.version) == before
    pair.a.tunnel.start_handshake(pair.now)
    assert pair.a.tunnel.version == before[0]
    pair.exchange()
    assert pair.a.tunnel.version > before[0]
    assert pair.b.tunnel.version > before[1]


def test_the_responder_counts_the_new_session_and_its_confirmation() -> None:
    pair = Pair().connect()
    tunnel = pair.b.tunnel
    versions = [tunnel.version]
    pair.a.tunnel.start_handshake(pair.now)
    init = pair.a.tunnel.poll_datagram()
    assert init is not None
    tunnel.handle_untrusted(init, None, pair.now)
    versions.append(tunnel.version)
    response = tunnel.poll_datagram()
    assert response is not None
    pair.a.tunnel.handle_untrusted(response, None, pair.now)
    keepalive = pair.a.tunnel.poll_datagram()
    assert keepalive is not None
    assert tunnel.handle_untrusted(keepalive, None, pair.now) == b""
    versions.append(tunnel.version)
    assert versions == sorted(set(versions))


def test_expiry_is_a_change() -> None:
    pair = Pair().connect()
    before = pair.b.tunnel.version
    pair.b.tunnel.handle_timeout(pair.now + SESSION_LIFETIME)
    assert not pair.b.tunnel.has_session
    assert pair.b.tunnel.version > before
    wiped = pair.b.tunnel.version
    pair.b.tunnel.handle_timeout(pair.now + 2 * SESSION_LIFETIME + 1)
    assert pair.b.tunnel.version == wiped
