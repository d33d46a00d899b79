"""WireGuard: one tunnel to one peer, without endpoints (floor 2)."""

from fz_core.wireguard.datagram import INIT, RESPONSE, receiver_index
from fz_core.wireguard.events import Expired, SessionEstablished
from fz_core.wireguard.noise import initiator_static_key_untrusted
from fz_core.wireguard.rate_limit import RateLimiter
from fz_core.wireguard.session import Session
from fz_core.wireguard.tunnel import Tunnel

__all__ = [
    "INIT",
    "RESPONSE",
    "Expired",
    "RateLimiter",
    "Session",
    "SessionEstablished",
    "Tunnel",
    "initiator_static_key_untrusted",
    "receiver_index",
]
