"""Domain names between wire and text, by dnspython (RFC 1035 §3.1, §4.1.4).

Text has no trailing dot and is lower case. Bytes that are not printable ASCII, dots inside labels and
backslashes are written `\\DDD`, so splitting at dots always gives the labels. Not here: whole messages.
"""

from __future__ import annotations

import re

import dns.exception
import dns.name

HEADER_BYTES = 12
QUESTION_POINTER = b"\xc0\x0c"


def read_name_untrusted(data: bytes, at: int) -> tuple[str, int] | None:
    """An uncompressed name and the offset behind it; None where it is cut off, compressed or too long."""
    try:
        name, size = dns.name.from_wire(data, at)
    except (dns.exception.DNSException, IndexError):
        return None
    labels = name.labels[:-1]
    if size != 1 + sum(1 + len(label) for label in labels):
        return None
    joined = b".".join(labels)
    if _PLAIN.fullmatch(joined) is None or joined.count(b".") >= len(labels) > 0:
        joined = b".".join(_UNPLAIN.sub(_escape, label) for label in labels)
    return joined.lower().decode("ascii"), at + size


def skip_name_untrusted(data: bytes, at: int) -> int | None:
    """The offset behind a name that may be compressed; None where it does not decode."""
    try:
        return at + dns.name.from_wire(data, at)[1]
    except (dns.exception.DNSException, IndexError):
        return None


def write_name(name: str) -> bytes | None:
    """The wire form of a text as read above; None where it is no name."""
    try:
        labels = [_unescape(label) for label in name.split(".")] if name else []
        return dns.name.Name([*labels, b""]).to_wire()
    except (dns.exception.DNSException, UnicodeEncodeError):
        return None


def _unescape(label: str) -> bytes:
    return _ESCAPED.sub(lambda found: bytes([int(found[1])]), label.encode("ascii"))


def _escape(found: re.Match[bytes]) -> bytes:
    return b"\\%03d" % found[0][0]


_PLAIN = re.compile(rb"[!-\[\]-~]*")
_UNPLAIN = re.compile(rb"[^!-\-/-\[\]-~]")
_ESCAPED = re.compile(rb"\\(25[0-5]|2[0-4][0-9]|[01][0-9][0-9])")
