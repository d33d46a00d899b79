"""A channel for each role: its topic and its two codecs, which are imported for that role only."""

from __future__ import annotations

from collections.abc import Callable

from fz_core.portal.channel import Channel

RandomBytes = Callable[[int], bytes]
DAY = 86_400.0


def client_channel(random_bytes: RandomBytes, budget: float | None = None) -> Channel:
    """A client's end; by default it never gives up once it has joined."""
    from fz_core.portal import client_wire

    return Channel("client", client_wire.TO_PORTAL, client_wire.TO_CLIENT, random_bytes, budget=budget)


def gateway_channel(random_bytes: RandomBytes, budget: float | None = DAY) -> Channel:
    """A gateway's end."""
    from fz_core.portal import gateway

    return Channel("gateway", gateway.TO_PORTAL, gateway.TO_GATEWAY, random_bytes, budget=budget)


def relay_channel(random_bytes: RandomBytes, stamp_secret: str, budget: float | None = DAY) -> Channel:
    """A relay's end; it joins with its secret."""
    from fz_core.portal import relay

    join = {"stamp_secret": stamp_secret}
    return Channel("relay", relay.TO_PORTAL, relay.TO_RELAY, random_bytes, budget=budget, join_payload=join)
