"""What one client's proxy addresses stand for, on a gateway (`spec/tunnel.md` §15.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MAX_NAMES = 16_384


class Proxy:
    """One proxy address: the name behind it, the real address of today, the resources that lead to it."""

    __slots__ = ("name", "real", "resource_ids")

    def __init__(self, name: str) -> None:
        self.name = name
        self.real: bytes | None = None
        self.resource_ids: frozenset[str] = frozenset()


class Proxies:
    """Proxy addresses of one client. They survive revocation, so that a new grant revives them."""

    def __init__(self) -> None:
        self._by_ip: dict[bytes, Proxy] = {}
        self._by_name: dict[str, tuple[bytes, ...]] = {}

    def __len__(self) -> int:
        return len(self._by_ip)

    def get(self, ip: bytes) -> Proxy | None:
        """What the address stands for."""
        return self._by_ip.get(ip)

    def assign(self, resource_id: str, name: str, ips: Sequence[bytes], real: Iterable[bytes], *, mix: bool) -> bool:
        """Let the addresses stand for a name's real ones; True if they belonged to another name, and all was cleared.

        Per family both are paired in ascending order, the real ones repeating. Where a family has no
        real address its proxies lead to the other family's with `mix`, else nowhere.
        """
        was_cleared = any((known := self._by_ip.get(ip)) is not None and known.name != name for ip in ips)
        if was_cleared:
            self.clear()
        if name not in self._by_name and len(self._by_name) >= MAX_NAMES:
            self._remove(next(iter(self._by_name)))
        self._by_name[name] = tuple(dict.fromkeys((*self._by_name.get(name, ()), *ips)))
        by_family: dict[int, list[bytes]] = {4: [], 16: []}
        for address in sorted(set(real)):
            by_family[len(address)].append(address)
        for size in (4, 16):
            targets = by_family[size] or (by_family[20 - size] if mix else [])
            for position, ip in enumerate(sorted(ip for ip in ips if len(ip) == size)):
                proxy = self._by_ip.get(ip) or self._by_ip.setdefault(ip, Proxy(name))
                proxy.real = targets[position % len(targets)] if targets else None
                proxy.resource_ids |= {resource_id}
        return was_cleared

    def clear(self) -> None:
        """Forget everything."""
        self._by_ip.clear()
        self._by_name.clear()

    def _remove(self, name: str) -> None:
        for ip in self._by_name.pop(name):
            self._by_ip.pop(ip, None)
