"""What offloads mean, written independently of the code under test: trains, super packets, headers."""

from __future__ import annotations

from struct import pack

from fz_core.packet import DropReason, Packet, build_tcp, build_udp

ADDRESSES = {4: (bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])), 6: (bytes(15) + b"\1", bytes(15) + b"\2")}
TCP, UDP = 6, 17
KINDS = [(4, TCP), (6, TCP), (4, UDP), (6, UDP)]
ACK, PSH = 0x10, 0x08
NO_OFFLOAD = bytes(10)
GSO_TYPE = {(4, TCP): 1, (6, TCP): 4, (4, UDP): 5, (6, UDP): 5}


def vnet(flags: int, gso_type: int, hdr_len: int, gso_size: int, csum_start: int, csum_offset: int) -> bytes:
    return pack("=BBHHHH", flags, gso_type, hdr_len, gso_size, csum_start, csum_offset)


def parsed(data: bytes | bytearray) -> Packet:
    packet = Packet.parse_untrusted(data)
    assert not isinstance(packet, DropReason)
    return packet


def patched(packet: Packet, *changes: tuple[int, bytes]) -> Packet:
    """The packet with some bytes replaced and its checksums made right again."""
    raw = bytearray(packet.data)
    for at, new in changes:
        raw[at : at + len(new)] = new
    changed = parsed(raw)
    changed.update_checksums()
    return changed


def packet_of(
    version: int,
    protocol: int,
    payload: bytes,
    *,
    seq: int = 0,
    ack: int = 77,
    flags: int = ACK,
    ident: int = 0,
    options: bytes = b"",
    ports: tuple[int, int] = (40000, 443),
) -> Packet:
    src, dst = ADDRESSES[version]
    if protocol == TCP:
        packet = build_tcp(src, dst, *ports, flags, seq % 2**32, ack, payload, options=options)
    else:
        packet = build_udp(src, dst, *ports, payload)
    return patched(packet, (4, pack("!H", ident % 65536))) if version == 4 else packet


def train(
    version: int,
    protocol: int,
    sizes: list[int],
    *,
    seq: int = 1000,
    ident: int = 0,
    options: bytes = b"",
    last_flags: int = ACK,
) -> list[Packet]:
    """What a host sends for one large write: consecutive packets with distinct payload bytes."""
    packets = []
    for i, size in enumerate(sizes):
        payload = bytes((i * 7 + k) % 251 for k in range(size))
        flags = last_flags if i == len(sizes) - 1 else ACK
        packets.append(packet_of(version, protocol, payload, seq=seq, flags=flags, ident=ident + i, options=options))
        seq += size
    return packets


def super_packet(packets: list[Packet], extra_flags: int = 0) -> bytes:
    """The train as the kernel hands it over in one read; the checksum field is left as garbage."""
    first, last = packets[0], packets[-1]
    header = len(first) - first.payload_length
    data = bytearray(first.data[:header] + b"".join(p.payload for p in packets))
    l4 = first.l4_offset
    if first.version == 4:
        data[2:4] = pack("!H", len(data))
        data[10:12] = b"\x12\x34"
    else:
        data[4:6] = pack("!H", len(data) - 40)
    if first.protocol == TCP:
        data[l4 + 13] = last.tcp_flags | extra_flags
        offset = 16
    else:
        data[l4 + 4 : l4 + 6] = pack("!H", len(data) - l4)
        offset = 6
    data[l4 + offset : l4 + offset + 2] = b"\xab\xcd"
    kind = GSO_TYPE[first.version, first.protocol]
    return vnet(1, kind, 0, first.payload_length, l4, offset) + data


def folded_sum(data: bytes) -> int:
    total = sum(int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big") for at in range(0, len(data), 2))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total
