from collections.abc import Callable
from typing import final

from fz_core.crypto import PrivateKey
from fz_core.packet import DropReason

@final
class RateLimiter:
    def __init__(
        self,
        private_key: PrivateKey | bytes,
        now: float,
        random_bytes: Callable[[int], bytes],
        limit: int = 100,
    ) -> None: ...
    @property
    def limit(self) -> int: ...
    def verify_untrusted(self, datagram: bytes, source_ip: bytes | None, now: float) -> DropReason | bytes | None: ...
