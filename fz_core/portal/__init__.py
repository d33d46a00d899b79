"""The portal protocol without sockets: framing, typed messages, login, the channel (floor 1)."""

from fz_core.portal.channel import (
    Channel,
    ChannelEvent,
    Connect,
    Connected,
    Fatal,
    Hiccup,
    MessageDropped,
    MessageReceived,
)
from fz_core.portal.login import BadUrl, Login, external_id, user_agent
from fz_core.portal.roles import client_channel, gateway_channel, relay_channel

__all__ = [
    "BadUrl",
    "Channel",
    "ChannelEvent",
    "Connect",
    "Connected",
    "Fatal",
    "Hiccup",
    "Login",
    "MessageDropped",
    "MessageReceived",
    "client_channel",
    "external_id",
    "gateway_channel",
    "relay_channel",
    "user_agent",
]
