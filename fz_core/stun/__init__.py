"""STUN messages and TURN ChannelData (floor 1)."""

from fz_core.stun.attributes import (
    channel_number_value,
    error_code_value,
    u8_value,
    u32_value,
    u64_value,
    xor_address_value,
)
from fz_core.stun.channel_data import build_channel_data, parse_channel_data_untrusted
from fz_core.stun.message import Message, build, is_stun_untrusted, long_term_key

__all__ = [
    "Message",
    "build",
    "build_channel_data",
    "channel_number_value",
    "error_code_value",
    "is_stun_untrusted",
    "long_term_key",
    "parse_channel_data_untrusted",
    "u8_value",
    "u32_value",
    "u64_value",
    "xor_address_value",
]
