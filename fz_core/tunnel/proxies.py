"""What one client's proxy addresses stand for, on a gateway (`spec/tunnel.md` §15.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MAX_NAMES = 16_384


class ProxiedName:
    """A name with its proxy addresses and, for each, the real one of today; and the resources that lead to it.

    `renew_at` is set for names of clients that never announce one twice: then it is to be looked up again.
    """

    __slots__ = ("_ips", "_real", "name", "renew_at", "resource_ids")

    def __init__(self, name: str) -> None:
        self.name = name
        self.resource_ids: tuple[str, ...] = ()
        self.renew_at: float | None = None
        self._ips: tuple[bytes, ...] = ()
        self._real: tuple[bytes | None, ...] = ()

    @property
    def ips(self) -> tuple[bytes, ...]:
        """Its proxy addresses."""
        return self._ips

    def real(self, ip: bytes) -> bytes | None:
        """The address behind one of its proxies."""
        return self._real[self._ips.index(ip)]

    def assign(self, ips: Sequence[bytes], real: Iterable[bytes], *, mix: bool) -> None:
        """Per family pair both in ascending order, the real ones repeating; see `Proxies.assign`."""
        by_family: dict[int, list[bytes]] = {4: [], 16: []}
        for address in sorted(set(real)):
            by_family[len(address)].append(address)
        pairs: dict[bytes, bytes | None] = dict(zip(self._ips, self._real, strict=True))
        for size in (4, 16):
            targets = by_family[size] or (by_family[20 - size] if mix else [])
            for position, ip in enumerate(sorted(ip for ip in ips if len(ip) == size)):
                pairs[ip] = targets[position % len(targets)] if targets else None
        self._ips, self._real = tuple(pairs), tuple(pairs.values())


class Proxies:
    """Proxy addresses of one client. They survive revocation, so that a new grant revives them."""

    def __init__(self) -> None:
        self._by_ip: dict[bytes, ProxiedName] = {}
        self._by_name: dict[str, ProxiedName] = {}

    def __len__(self) -> int:
        return len(self._by_ip)

    def get(self, ip: bytes) -> ProxiedName | None:
        """The name an address stands for."""
        return self._by_ip.get(ip)

    def assign(self, resource_id: str, name: str, ips: Sequence[bytes], real: Iterable[bytes], *, mix: bool) -> bool:
        """Let the addresses stand for a name's real ones; True if they belonged to another name, and all was cleared.

        Where a family has no real address its proxies lead to the other family's with `mix`, else nowhere.
        """
        was_cleared = any((known := self._by_ip.get(ip)) is not None and known.name != name for ip in ips)
        if was_cleared:
            self.clear()
        entry = self._by_name.get(name)
        if entry is None:
            if len(self._by_name) >= MAX_NAMES:
                self._remove(next(iter(self._by_name)))
            entry = self._by_name[name] = ProxiedName(name)
        entry.assign(ips, real, mix=mix)
        if resource_id not in entry.resource_ids:
            entry.resource_ids += (resource_id,)
        for ip in entry.ips:
            self._by_ip[ip] = entry
        return was_cleared

    def clear(self) -> None:
        """Forget everything."""
        self._by_ip.clear()
        self._by_name.clear()

    def _remove(self, name: str) -> None:
        for ip in self._by_name.pop(name).ips:
            del self._by_ip[ip]
