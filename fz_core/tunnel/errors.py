"""What a caller of the tunnel may be told about single packets of a batch (`spec/tunnel.md` §20)."""

from __future__ import annotations

from collections.abc import Sequence

from fz_core.packet import Address, DropReason


class PacketError(Exception):
    """One packet or datagram of a batch was dropped; the rest of the batch went on.

    `source` and `destination` are the packet's IPs (TUN side) or the endpoints (network side), as
    text made only when printed.
    """

    def __init__(self, reason: DropReason, source: object = None, destination: object = None) -> None:
        super().__init__(reason, source, destination)
        self.reason, self.source, self.destination = reason, source, destination

    def __str__(self) -> str:
        return f"dropped {_text(self.source)} -> {_text(self.destination)}: {self.reason}"


class TunnelErrors(ExceptionGroup[Exception]):
    """All errors of one batch, with their addresses. Nothing else of the batch was lost."""

    def derive(self, excs: Sequence[Exception]) -> TunnelErrors:  # type: ignore[override]
        return TunnelErrors(self.message, excs)


def _text(endpoint: object) -> str:
    if isinstance(endpoint, bytes) and len(endpoint) in (4, 16):
        return Address(endpoint, 0).host
    return "?" if endpoint is None else str(endpoint)
