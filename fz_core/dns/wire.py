"""Domain names between wire and text (RFC 1035 §3.1, §4.1.4).

Text has no trailing dot and is lower case. Bytes that are not printable ASCII, dots inside labels and
backslashes are written `\\DDD`, so splitting at dots always gives the labels. Not here: whole messages.
"""

from __future__ import annotations

import re

HEADER_BYTES = 12
MAX_NAME_BYTES = 255
MAX_LABEL_BYTES = 63
QUESTION_POINTER = b"\xc0\x0c"


def read_name_untrusted(data: bytes, at: int) -> tuple[str, int] | None:
    """An uncompressed name and the offset behind it; None where it is cut off, compressed or too long."""
    end = _end_of_plain_name(data, at)
    if end is None:
        return None
    labels = []
    while length := data[at]:
        labels.append(data[at + 1 : at + 1 + length])
        at += 1 + length
    joined = b".".join(labels)
    if _needs_escape(joined) or joined.count(b".") >= len(labels) > 0:
        joined = b".".join(_UNPLAIN.sub(_escape, label) for label in labels)
    return joined.lower().decode("ascii"), end


def skip_name_untrusted(data: bytes, at: int) -> int | None:
    """The offset behind a name that may end in a pointer to earlier bytes; the pointer is not followed."""
    start, size = at, len(data)
    while at < size:
        length = data[at]
        if length == 0:
            return at + 1
        if length >= 0xC0:
            is_backwards = at + 1 < size and HEADER_BYTES <= (length & 0x3F) << 8 | data[at + 1] < start
            return at + 2 if is_backwards else None
        at += 1 + length
        if length > MAX_LABEL_BYTES or at - start >= MAX_NAME_BYTES:
            return None
    return None


def write_name(name: str) -> bytes | None:
    """The wire form of a text as read above; None where it is no name."""
    if not name.isascii():
        return None
    wire = bytearray()
    for label in name.split(".") if name else ():
        raw = label.encode("ascii")
        if b"\\" in raw:
            raw = _ESCAPED.sub(lambda found: bytes([int(found[1])]), raw)
        if not 0 < len(raw) <= MAX_LABEL_BYTES:
            return None
        wire.append(len(raw))
        wire += raw
    wire.append(0)
    return bytes(wire) if len(wire) <= MAX_NAME_BYTES else None


def _end_of_plain_name(data: bytes, at: int) -> int | None:
    start, size = at, len(data)
    while at < size:
        length = data[at]
        at += 1 + length
        if length > MAX_LABEL_BYTES or at - start > MAX_NAME_BYTES:
            return None
        if length == 0:
            return at
    return None


def _needs_escape(text: bytes) -> bool:
    return _PLAIN.fullmatch(text) is None


def _escape(found: re.Match[bytes]) -> bytes:
    return b"\\%03d" % found[0][0]


_PLAIN = re.compile(rb"[!-\[\]-~]*")
_UNPLAIN = re.compile(rb"[^!-\-/-\[\]-~]")
_ESCAPED = re.compile(rb"\\(25[0-5]|2[0-4][0-9]|[01][0-9][0-9])")
