"""Random and mutated bytes against everything of the name server that reads packets: nothing raises or grows.

The seed is fixed and printed on failure through the test id; FZ_FUZZ_ROUNDS asks for a longer run.
"""

from __future__ import annotations

import os
import random

import dns.exception
import dns.message
import dns.rrset
import pytest

from fz_core.dns import (
    AddressCache,
    DeviceNames,
    Pattern,
    ProxyNames,
    Query,
    ReplyCache,
    ResourceStub,
    StubAnswer,
    StubTcpServer,
    build_error,
    is_reply_to,
    parse_reverse_name,
    truncate,
    with_id,
)
from fz_core.packet import DropReason, Packet, build_tcp

ROUNDS = int(os.environ.get("FZ_FUZZ_ROUNDS", "5000"))
SEEDS = [1, 2021]
SENTINEL, OWN = bytes([100, 100, 111, 1]), bytes([100, 64, 0, 1])


@pytest.mark.parametrize("seed", SEEDS)
def test_queries(seed: int) -> None:
    """What is read as a query is answered with a reply to it, whatever it asks."""
    rng = random.Random(seed)
    names = ProxyNames(max_names=50)
    names.add_resource("r1", "**.example.com", "dual")
    names.add_resource("r2", "**", "ipv4_only")
    stub, pools = ResourceStub(names), DeviceNames()
    pools.add_pool("p1", "*.pool")
    read = agreed = 0
    for number in range(ROUNDS):
        data = mutate(rng, message(rng))
        query = Query.parse_untrusted(data)
        if query is None:
            continue
        read += 1
        agreed += agrees_with_dnspython(query)
        assert query.data == data
        parse_reverse_name(query.name)
        answer = stub.resolve(query, lambda name: False)
        if isinstance(answer, StubAnswer):
            assert is_reply_to(query, answer.reply)
            dns.message.from_wire(answer.reply)
        late = pools.handle_query(query, number, float(number))
        assert not isinstance(late, bytes) or is_reply_to(query, late)
        pools.handle_timeout(float(number))
        assert len(names) <= 50
    assert read > ROUNDS // 20
    assert agreed > read // 2


@pytest.mark.parametrize("seed", SEEDS)
def test_replies(seed: int) -> None:
    rng = random.Random(seed)
    cache = ReplyCache(max_entries=50, max_bytes=20_000)
    query = Query.parse_untrusted(dns.message.make_query("www.example.com", "A", id=7).to_wire())
    assert query is not None
    kept = 0
    for number in range(ROUNDS):
        reply = mutate(rng, message(rng, response=True))
        if rng.random() < 0.8:
            reply = with_id(reply, 7)
        assert len(truncate(reply, 300)) <= max(300, 12)
        is_reply_to(query, reply)
        cache.store(query, reply, float(number))
        found = cache.lookup(query, float(number) + rng.randrange(10))
        if found is not None:
            kept += 1
            assert is_reply_to(query, found)
        assert is_reply_to(query, build_error(query, 2))
    assert kept > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_address_cache(seed: int) -> None:
    rng = random.Random(seed)
    cache = AddressCache(max_entries=20)
    for number in range(ROUNDS // 4):
        try:
            response = dns.message.from_wire(mutate(rng, message(rng, response=True)), ignore_trailing=True)
        except (dns.exception.DNSException, ValueError):
            continue
        name, rdtype = rng.choice(["www.example.com", "a.example.com", "b"]), rng.choice([1, 28])
        for ip in cache.store(name, rdtype, response, float(number)):
            assert len(ip) == (4 if rdtype == 1 else 16)
        assert len(cache) <= 20


@pytest.mark.parametrize("seed", SEEDS)
def test_patterns(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(ROUNDS):
        text = "".join(rng.choice("ab.*?[]!-é\0") for _ in range(rng.randrange(12)))
        pattern = Pattern.parse(text)
        if pattern is not None:
            name = "".join(rng.choice("ab.-é") for _ in range(rng.randrange(20)))
            assert pattern.matches(name) == pattern.matches(name.upper().replace("É", "é"))


@pytest.mark.parametrize("seed", SEEDS)
def test_tcp(seed: int) -> None:
    """Mutated TCP packets, headers included."""
    rng = random.Random(seed)
    server = StubTcpServer(rng.randbytes)
    server.set_addresses([SENTINEL])
    now = 0.0
    seq = ack = 1
    for _ in range(ROUNDS):
        flags = rng.choice([0x02, 0x10, 0x18, 0x11, 0x04, rng.randrange(64)])
        body = rng.randbytes(rng.randrange(40))
        packet = build_tcp(OWN, SENTINEL, rng.randrange(1, 4), 53, flags, seq, ack, body, window=rng.randrange(65536))
        data = bytearray(packet.data)
        if rng.random() < 0.3:
            data[rng.randrange(len(data))] = rng.randrange(256)
        parsed = Packet.parse_untrusted(bytes(data))
        if not isinstance(parsed, DropReason):
            server.handle_packet(parsed, now)
        while (sent := server.poll_packet()) is not None:
            header = sent.data[sent.l4_offset :]
            seq, ack = int.from_bytes(header[8:12], "big"), (int.from_bytes(header[4:8], "big") + 1) % 2**32
        while (received := server.poll_query()) is not None:
            server.send_reply(received[0], bytes(rng.randrange(3000)), now)
        now += rng.random() / 4
        server.handle_timeout(now)


def message(rng: random.Random, *, response: bool = False) -> bytes:
    """A plausible message."""
    name = rng.choice(["www.example.com.", "a.pool.", ".", "1.0.96.100.in-addr.arpa.", "x" * 63 + ".example.com."])
    rdtype = rng.choice(["A", "AAAA", "PTR", "SRV", "TXT", "HTTPS", "ANY", "MX"])
    if response and rng.random() < 0.8:
        name, rdtype = "www.example.com.", "A"
    query = dns.message.make_query(name, rdtype, use_edns=rng.choice([False, 0]))
    made: dns.message.Message = dns.message.make_response(query) if response else query
    for _ in range(rng.randrange(4) if response else rng.choice([0, 0, 0, 1])):
        kind, data = rng.choice([("A", "192.0.2.1"), ("CNAME", "a.example.com."), ("MX", "1 www.example.com.")])
        owner = rng.choice([name, "a.example.com."])
        rrset = dns.rrset.from_text(owner, rng.choice([0, 5, 3600]), "IN", kind, data)
        made.answer.append(rrset)
    return made.to_wire()


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Leave alone, change some bytes, cut, lengthen, or make a pointer."""
    changed = bytearray(data)
    for _ in range(rng.choice([0, 0, 1, 1, 2, 8])):
        at = rng.randrange(len(changed))
        kind = rng.randrange(5)
        if kind == 0:
            changed[at] = rng.randrange(256)
        elif kind == 1:
            changed[at:] = b"" if at else changed
        elif kind == 2:
            changed[at:at] = rng.randbytes(rng.randrange(20))
        elif kind == 3:
            changed[at : at + 2] = bytes([0xC0, rng.randrange(len(changed) % 256 + 1)])
        else:
            changed[at] ^= 0x20
        if not changed:
            break
    return bytes(changed)


def agrees_with_dnspython(query: Query) -> bool:
    """Where dnspython reads the message too, it reads the same."""
    try:
        read = dns.message.from_wire(query.data, ignore_trailing=True, one_rr_per_rrset=True)
    except (dns.exception.DNSException, ValueError):
        return False
    (question,) = read.question
    assert (question.rdtype, question.rdclass) == (query.rdtype, query.rdclass)
    assert len(question.name.labels) - 1 == (len(query.name.split(".")) if query.name else 0)
    return True
