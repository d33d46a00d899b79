"""DNS messages of the client's name server: read queries, build replies (RFC 1035; `spec/tunnel.md` §8, §10).

Replies carry id, opcode and RD of the query, QR, its question as it was spelt, and nothing else: AA, RA and TC
are clear, and there is no EDNS record. Owner names are pointers to the question.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import AddressValueError, IPv4Address
from struct import Struct

import dns.exception
import dns.name
import dns.rdata
from dns.rdataclass import RdataClass
from dns.rdatatype import RdataType

from fz_core.dns.wire import HEADER_BYTES, QUESTION_POINTER, read_name_untrusted, skip_name_untrusted, write_name

A, PTR, AAAA, OPT = 1, 12, 28, 41
IN = 1
NOERROR, SERVFAIL, NXDOMAIN = 0, 2, 3

QR, TC, OPCODE_AND_RD = 0x8000, 0x0200, 0x7900
DO = 0x80  # in the first byte of the EDNS flags
MAX_MESSAGE = 65_535
MAX_REMEMBERED = 1024
MAX_REMEMBERED_BYTES = 512

HEADER = Struct("!HHHHHH")
QUESTION_TAIL = Struct("!HH")
RECORD = Struct("!HHIH")


@dataclass(frozen=True, slots=True)
class Query:
    """A question somebody asked. `name` is lower case without trailing dot, `question` its section as spelt."""

    id: int
    name: str
    rdtype: int
    rdclass: int
    data: bytes = field(repr=False)
    question: bytes = field(repr=False)
    wants_dnssec: bool

    @classmethod
    def parse_untrusted(cls, data: bytes) -> Query | None:
        """A query with exactly one question whose answer section, if any, decodes (§8); else None."""
        if not HEADER_BYTES < len(data) <= MAX_MESSAGE:
            return None
        parse = _parse_remembered if len(data) <= MAX_REMEMBERED_BYTES else _parse_query
        found = parse(data[2:])
        if found is None:
            return None
        name, rdtype, rdclass, question, wants_dnssec = found
        return cls(data[0] << 8 | data[1], name, rdtype, rdclass, data, question, wants_dnssec)

    @property
    def is_lookup(self) -> bool:
        """Whether records are asked for: not for an update, a notification or the like."""
        return not self.data[2] & 0x78

    def __repr__(self) -> str:
        return f"<Query type {self.rdtype} (redacted)>"


def build_answer(query: Query, rdatas: Iterable[tuple[int, bytes | str]], ttl: int = 1) -> bytes:
    """NOERROR with one record per pair of type and data, the data in wire form or as in a zone file."""
    records = [(rdtype, _to_wire(rdtype, data) if isinstance(data, str) else data) for rdtype, data in rdatas]
    section = b"".join(QUESTION_POINTER + RECORD.pack(rdtype, IN, ttl, len(rdata)) + rdata for rdtype, rdata in records)
    return _header(query, NOERROR, len(records)) + query.question + section


def build_addresses(query: Query, ips: Iterable[bytes], ttl: int = 1) -> bytes:
    """NOERROR with an A or AAAA record per packed address, which may be none."""
    return build_answer(query, [(A if len(ip) == 4 else AAAA, ip) for ip in ips], ttl)


def build_ptr(query: Query, name: str) -> bytes:
    """The name behind an address."""
    wire = write_name(name)
    if wire is None:
        raise ValueError("cannot build a PTR record: the name is not valid")
    return build_answer(query, [(PTR, wire)])


def build_error(query: Query, rcode: int) -> bytes:
    """A reply without records; `rcode` may also be NOERROR."""
    return _header(query, rcode, 0) + query.question


def is_reply_to(query: Query, reply: bytes) -> bool:
    """Whether untrusted bytes are a response with the query's id and, ignoring case, its only question."""
    if len(reply) < HEADER_BYTES + len(query.question):
        return False
    message_id, flags, questions = reply[0] << 8 | reply[1], reply[2], reply[4] << 8 | reply[5]
    if message_id != query.id or not flags & 0x80 or questions != 1:
        return False
    question = reply[HEADER_BYTES : HEADER_BYTES + len(query.question)]
    return question == query.question or _fold(question) == _fold(query.question)


def truncate(reply: bytes, limit: int) -> bytes:
    """The reply itself where it fits `limit` bytes, else its header and question with TC set (§10)."""
    if len(reply) <= limit:
        return reply
    question = question_untrusted(reply)
    if question is None or HEADER_BYTES + len(question) > limit:
        question = b""
    message_id, flags, *_ = HEADER.unpack_from(reply)
    return (HEADER.pack(message_id, flags | TC, 1 if question else 0, 0, 0, 0) + question)[:limit]


def with_id(message: bytes, message_id: int) -> bytes:
    """The message under another id; what is too short to have one stays as it is."""
    return message_id.to_bytes(2, "big") + message[2:] if len(message) >= 2 else message


def parse_reverse_name(name: str) -> bytes | None:
    """The address of `d.c.b.a.in-addr.arpa` or of 32 nibbles under `ip6.arpa`, lower case; else None (§9.3)."""
    labels = name.split(".")
    if labels[-2:] == ["in-addr", "arpa"] and len(labels) == 6:
        try:
            return IPv4Address(".".join(labels[3::-1])).packed
        except AddressValueError:
            return None
    if labels[-2:] == ["ip6", "arpa"] and len(labels) == 34:
        nibbles = "".join(reversed(labels[:-2]))
        return bytes.fromhex(nibbles) if len(nibbles) == 32 and set(nibbles) <= _HEX else None
    return None


def question_untrusted(message: bytes) -> bytes | None:
    """The only question of a message, in wire form; None where there is not exactly one."""
    if len(message) <= HEADER_BYTES or message[4:6] != b"\0\1":
        return None
    found = read_name_untrusted(message, HEADER_BYTES)
    if found is None or found[1] + 4 > len(message):
        return None
    return message[HEADER_BYTES : found[1] + 4]


def _parse_query(tail: bytes) -> tuple[str, int, int, bytes, bool] | None:
    """Everything of a query but its id. `tail` is the message without it, so offsets are 2 less."""
    if tail[0] & 0x80 or tail[2:4] != b"\0\1":
        return None
    found = read_name_untrusted(tail, HEADER_BYTES - 2)
    if found is None or found[1] + 4 > len(tail):
        return None
    name, at = found
    rdtype, rdclass = QUESTION_TAIL.unpack_from(tail, at)
    at += 4
    answers = tail[4] << 8 | tail[5]
    if answers and not _answers_decode(b"\0\0" + tail, at + 2, answers):
        return None
    return name, rdtype, rdclass, tail[HEADER_BYTES - 2 : at], _has_do(tail, at)


_parse_remembered = lru_cache(MAX_REMEMBERED)(_parse_query)


def _answers_decode(data: bytes, at: int, count: int) -> bool:
    """Whether `count` whole records stand at `at`. Nobody sends such queries, so any work here is bounded."""
    if count > MAX_QUERY_ANSWERS:
        return False
    for _ in range(count):
        end = skip_name_untrusted(data, at)
        if end is None or end + RECORD.size > len(data):
            return False
        rdtype, rdclass, _, length = RECORD.unpack_from(data, end)
        at = end + RECORD.size
        if at + length > len(data):
            return False
        if rdclass != IN or rdtype not in KNOWN_TYPES:  # dnspython would remember each of these forever
            at += length
            continue
        try:
            dns.rdata.from_wire(rdclass, rdtype, data, at, length)
        except (dns.exception.DNSException, ValueError):
            return False
        at += length
    return True


def _has_do(tail: bytes, at: int) -> bool:
    """Whether an EDNS record follows the question at once and asks for DNSSEC records (RFC 3225)."""
    return tail[at : at + 3] == b"\0\0\x29" and len(tail) >= at + 11 and bool(tail[at + 7] & DO)


def _header(query: Query, rcode: int, answers: int) -> bytes:
    flags = QR | (query.data[2] << 8 & OPCODE_AND_RD) | rcode
    return HEADER.pack(query.id, flags, 1, answers, 0, 0)


def _to_wire(rdtype: int, text: str) -> bytes:
    rdata = dns.rdata.from_text(RdataClass.IN, RdataType(rdtype), text, origin=dns.name.root, relativize=False)
    return rdata.to_wire() or b""


def _fold(question: bytes) -> bytes:
    """Case folded where letters are: in the name, not in type and class. Length octets are never letters."""
    return question[:-4].lower() + question[-4:]


_HEX = set("0123456789abcdef")
MAX_QUERY_ANSWERS = 64
KNOWN_TYPES = frozenset(int(rdtype) for rdtype in RdataType)
