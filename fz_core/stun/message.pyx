"""STUN messages: parse once into a table of attributes, read values on demand, build.

Layout: type 2, length 2, magic cookie 4, transaction id 12, then attributes of type 2, length 2, value, padding to 4.
All numbers big-endian. Sources: RFC 8489 sections 5 and 14, RFC 8656 section 18, spec/connectivity.md
sections 3.2 and 5.3.

Not here: who may ask what (turn/, ice/), and the old RFC 3489 form without a cookie.

Rules shared by all callers:
- the datagram must be exactly one message; anything else is MALFORMED_STUN;
- of an attribute that occurs twice the first counts;
- what follows MESSAGE-INTEGRITY is ignored, except FINGERPRINT (RFC 8489 section 14.5);
- unknown attributes are kept and ignored.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

import hashlib
import hmac
import struct
import zlib

from fz_core.packet import Address, DropReason

cdef enum:
    HEADER_LENGTH = 20
    MAX_ATTRIBUTES = 32
    INTEGRITY_LENGTH = 20

cdef object _hmac_digest = hmac.digest
cdef object _crc32 = zlib.crc32
cdef bytes _COOKIE = b"\x21\x12\xa4\x42"

cdef inline uint16_t _u16(const uint8_t *p) noexcept nogil:
    return <uint16_t>((p[0] << 8) | p[1])

cdef inline uint32_t _u32(const uint8_t *p) noexcept nogil:
    return (<uint32_t>p[0] << 24) | (<uint32_t>p[1] << 16) | (<uint32_t>p[2] << 8) | <uint32_t>p[3]


cdef struct Attribute:
    uint16_t kind
    uint16_t length
    Py_ssize_t offset


cdef class Message:
    """A parsed message. Values are read out of an own copy of the datagram."""

    cdef readonly bytes data
    cdef readonly int method
    cdef readonly int cls
    cdef readonly bytes transaction_id
    cdef Attribute _table[MAX_ATTRIBUTES]
    cdef int _count
    cdef Py_ssize_t _integrity_offset
    cdef Py_ssize_t _fingerprint_offset

    @staticmethod
    def parse_untrusted(data):
        """The message in `data` (any bytes-like object), or a DropReason."""
        cdef Message self = Message.__new__(Message)
        self.data = bytes(data)
        if not self._parse():
            return DropReason.MALFORMED_STUN
        self.transaction_id = self.data[8:20]
        return self

    cdef bint _parse(self) noexcept:
        cdef const uint8_t *p = <const uint8_t *>self.data
        cdef Py_ssize_t size = len(self.data)
        cdef Py_ssize_t at = HEADER_LENGTH
        cdef Py_ssize_t length
        cdef uint16_t kind
        self._count = 0
        self._integrity_offset = -1
        self._fingerprint_offset = -1
        if size < HEADER_LENGTH or p[0] & 0xC0 or _u32(p + 4) != 0x2112A442:
            return False
        if _u16(p + 2) % 4 or _u16(p + 2) + HEADER_LENGTH != size:
            return False
        kind = _u16(p)
        self.cls = ((kind >> 4) & 1) | ((kind >> 7) & 2)
        self.method = (kind & 0xF) | ((kind >> 1) & 0x70) | ((kind >> 2) & 0xF80)
        # size is a multiple of 4, so at + 4 <= size holds whenever at < size
        while at < size:
            kind = _u16(p + at)
            length = _u16(p + at + 2)
            at += 4
            if at + ((length + 3) & ~3) > size:
                return False
            self._note(kind, at, length)
            at += (length + 3) & ~3
        return True

    cdef void _note(self, uint16_t kind, Py_ssize_t offset, Py_ssize_t length) noexcept:
        if kind == 0x8028 and self._fingerprint_offset < 0 and length == 4:
            self._fingerprint_offset = offset - 4
        if self._integrity_offset >= 0 or self._count == MAX_ATTRIBUTES:
            return
        if kind == 0x0008:
            self._integrity_offset = offset - 4
        self._table[self._count].kind = kind
        self._table[self._count].length = <uint16_t>length
        self._table[self._count].offset = offset
        self._count += 1

    cdef Attribute *_find(self, int kind) noexcept:
        cdef int i
        for i in range(self._count):
            if self._table[i].kind == kind:
                return &self._table[i]
        return NULL

    def get(self, int attribute):
        """The value of the first such attribute, or None."""
        cdef Attribute *found = self._find(attribute)
        if found == NULL:
            return None
        return self.data[found.offset:found.offset + found.length]

    def has(self, int attribute):
        """Whether the attribute occurs, well formed or not."""
        return self._find(attribute) != NULL

    @property
    def is_request(self):
        return self.cls == 0

    @property
    def is_success(self):
        return self.cls == 2

    @property
    def is_error(self):
        return self.cls == 3

    cdef object _text(self, int kind, Py_ssize_t limit):
        cdef Attribute *found = self._find(kind)
        if found == NULL or found.length > limit:
            return None
        try:
            return self.data[found.offset:found.offset + found.length].decode("utf-8")
        except UnicodeDecodeError:
            return None

    @property
    def username(self):
        """At most 512 bytes of UTF-8; None where absent or malformed, as with all accessors below."""
        return self._text(0x0006, 512)

    @property
    def realm(self):
        return self._text(0x0014, 763)

    @property
    def nonce(self):
        return self._text(0x0015, 763)

    @property
    def software(self):
        return self._text(0x8022, 763)

    cdef object _number32(self, int kind):
        cdef Attribute *found = self._find(kind)
        if found == NULL or found.length != 4:
            return None
        return _u32(<const uint8_t *>self.data + found.offset)

    @property
    def lifetime(self):
        """Seconds."""
        return self._number32(0x000D)

    @property
    def priority(self):
        return self._number32(0x0024)

    cdef object _high_byte(self, int kind):
        value = self._number32(kind)
        return None if value is None else value >> 24

    @property
    def requested_transport(self):
        return self._high_byte(0x0019)

    @property
    def requested_address_family(self):
        return self._high_byte(0x0017)

    @property
    def additional_address_family(self):
        return self._high_byte(0x8000)

    @property
    def channel_number(self):
        value = self._number32(0x000C)
        return None if value is None else value >> 16

    @property
    def use_candidate(self):
        return self._find(0x0025) != NULL

    cdef object _number64(self, int kind):
        cdef Attribute *found = self._find(kind)
        cdef const uint8_t *p
        if found == NULL or found.length != 8:
            return None
        p = <const uint8_t *>self.data + found.offset
        return (<uint64_t>_u32(p) << 32) | _u32(p + 4)

    @property
    def ice_controlled(self):
        """The sender's tie-breaker if it has this role."""
        return self._number64(0x8029)

    @property
    def ice_controlling(self):
        return self._number64(0x802A)

    @property
    def error_code(self):
        """300 to 699, or None."""
        cdef Attribute *found = self._find(0x0009)
        cdef const uint8_t *p
        if found == NULL or found.length < 4:
            return None
        p = <const uint8_t *>self.data + found.offset
        if not 3 <= (p[2] & 7) <= 6 or p[3] > 99:
            return None
        return (p[2] & 7) * 100 + p[3]

    cdef object _address(self, Attribute *found):
        cdef const uint8_t *p = <const uint8_t *>self.data + found.offset
        cdef const uint8_t *mask = <const uint8_t *>self.data + 4
        cdef uint8_t ip[16]
        cdef int size, i
        if found.length == 8 and p[1] == 1:
            size = 4
        elif found.length == 20 and p[1] == 2:
            size = 16
        else:
            return None
        # 16 bytes from offset 4 are the cookie and the transaction id; the value holds 4 + size bytes
        for i in range(size):
            ip[i] = p[4 + i] ^ mask[i]
        return Address(ip[:size], _u16(p + 2) ^ 0x2112)

    cdef object _first_address(self, int kind):
        cdef Attribute *found = self._find(kind)
        return None if found == NULL else self._address(found)

    @property
    def xor_mapped_address(self):
        return self._first_address(0x0020)

    @property
    def xor_peer_address(self):
        return self._first_address(0x0012)

    @property
    def xor_relayed_addresses(self):
        """All well-formed ones, in order."""
        cdef int i
        found = []
        for i in range(self._count):
            if self._table[i].kind == 0x0016:
                address = self._address(&self._table[i])
                if address is not None:
                    found.append(address)
        return found

    @property
    def has_integrity(self):
        return self._integrity_offset >= 0

    def check_integrity(self, bytes key not None):
        """Whether MESSAGE-INTEGRITY is there and made with `key`; compares in constant time."""
        cdef Py_ssize_t at = self._integrity_offset
        cdef bytes mac
        if at < 0 or _u16(<const uint8_t *>self.data + at + 2) != INTEGRITY_LENGTH:
            return False
        mac = self.data[at + 4:at + 4 + INTEGRITY_LENGTH]
        return hmac.compare_digest(mac, _integrity(key, self.data[:at]))

    @property
    def has_fingerprint_ok(self):
        """Whether FINGERPRINT is the last attribute and right."""
        cdef Py_ssize_t at = self._fingerprint_offset
        if at < 0 or at + 8 != len(self.data):
            return False
        return _u32(<const uint8_t *>self.data + at + 4) == _fingerprint(self.data[:at])

    def __repr__(self):
        return f"<Message method={self.method:#05x} class={self.cls}>"


cdef bytes _with_length(bytes head, Py_ssize_t length):
    return head[:2] + length.to_bytes(2, "big") + head[4:]


cdef bytes _integrity(bytes key, bytes head):
    # the length field counts up to and with MESSAGE-INTEGRITY, whatever follows
    return _hmac_digest(key, _with_length(head, len(head) - HEADER_LENGTH + 24), "sha1")


cdef uint32_t _fingerprint(bytes head):
    return <uint32_t>_crc32(_with_length(head, len(head) - HEADER_LENGTH + 8)) ^ 0x5354554E


def build(int method, int cls, bytes transaction_id not None, attributes, *, integrity_key=None,
          bint fingerprint=False):
    """One message. `attributes` are pairs of type and value, written in order; padding is zero."""
    cdef bytes value, body
    if len(transaction_id) != 12:
        raise ValueError(f"transaction id has {len(transaction_id)} bytes, use 12")
    parts = []
    for kind, value in attributes:
        parts.append(struct.pack("!HH", kind, len(value)))
        parts.append(value)
        if len(value) % 4:
            parts.append(b"\0\0\0"[:4 - len(value) % 4])
    body = b"".join(parts)
    kind = (method & 0xF) | (method & 0x70) << 1 | (method & 0xF80) << 2 | (cls & 1) << 4 | (cls & 2) << 7
    message = struct.pack("!HH", kind, len(body)) + _COOKIE + transaction_id + body
    if integrity_key is not None:
        message += b"\x00\x08\x00\x14" + _integrity(integrity_key, message)
        message = _with_length(message, len(message) - HEADER_LENGTH)
    if fingerprint:
        message += b"\x80\x28\x00\x04" + (<object>_fingerprint(message)).to_bytes(4, "big")
        message = _with_length(message, len(message) - HEADER_LENGTH)
    return message


def is_stun_untrusted(data):
    """Whether `data` looks like STUN: leading zero bits, cookie, matching length."""
    cdef const uint8_t[::1] view = data
    cdef Py_ssize_t size = view.shape[0]
    if size < HEADER_LENGTH:
        return False
    return not view[0] & 0xC0 and _u32(&view[4]) == 0x2112A442 and _u16(&view[2]) + HEADER_LENGTH == size


def long_term_key(str username not None, str realm not None, str password not None):
    """MD5(username:realm:password), RFC 8489 section 9.2.2, without SASLprep."""
    text = f"{username}:{realm}:{password}".encode()
    try:
        return hashlib.md5(text, usedforsecurity=False).digest()
    except ValueError as error:
        raise RuntimeError("TURN needs MD5, which this host refuses (FIPS mode?)") from error
