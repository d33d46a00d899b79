"""IP packets and socket addresses (floor 0)."""

from fz_core.packet.address import Address, Transmit
from fz_core.packet.build import build_control, build_echo, build_icmp, build_ip, build_tcp, build_udp
from fz_core.packet.checksum import checksum, ones_complement_sum, update_checksum
from fz_core.packet.drops import DropCounter, DropReason
from fz_core.packet.families import TooBig, growth_limit, to_family, translate_error
from fz_core.packet.icmp import (
    IcmpClass,
    IcmpError,
    IcmpErrorKind,
    build_icmp_prohibited,
    build_icmp_too_big,
    build_icmp_unreachable,
    classify_icmp,
    parse_icmp_error,
)
from fz_core.packet.packet import Packet, verify_checksums
from fz_core.packet.segments import clamp_mss, shorten_error, split_tcp

__all__ = [
    "Address",
    "DropCounter",
    "DropReason",
    "IcmpClass",
    "IcmpError",
    "IcmpErrorKind",
    "Packet",
    "TooBig",
    "Transmit",
    "build_control",
    "build_echo",
    "build_icmp",
    "build_icmp_prohibited",
    "build_icmp_too_big",
    "build_icmp_unreachable",
    "build_ip",
    "build_tcp",
    "build_udp",
    "checksum",
    "clamp_mss",
    "classify_icmp",
    "growth_limit",
    "ones_complement_sum",
    "parse_icmp_error",
    "shorten_error",
    "split_tcp",
    "to_family",
    "translate_error",
    "update_checksum",
    "verify_checksums",
]
