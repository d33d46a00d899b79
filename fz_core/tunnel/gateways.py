"""What a client knows of its gateways: what each serves, and what it may send us (`spec/tunnel.md` §6.2, §7)."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_network

from fz_core.tunnel.ranges import Network, RangeSet


class _Gateway:
    def __init__(self, tunnel_ips: tuple[bytes, bytes]) -> None:
        self.tunnel_ips = tunnel_ips
        self.resources: dict[str, tuple[Network, ...]] = {}
        self.sources = RangeSet(())

    def rebuild(self) -> None:
        networks = [n for granted in self.resources.values() for n in granted]
        self.sources = RangeSet([*networks, *(ip_network(ip) for ip in self.tunnel_ips)])


class Gateways:
    """Live gateways by id, and a memory of all ever seen that outlives them."""

    def __init__(self) -> None:
        self._live: dict[str, _Gateway] = {}
        self._by_tunnel_ip: dict[bytes, str] = {}
        self._by_resource: dict[str, str] = {}
        self._last_served_by: dict[str, str] = {}
        self._seen: set[str] = set()

    def authorize(
        self, gateway_id: str, tunnel_ips: tuple[bytes, bytes], resource_id: str, networks: Iterable[Network]
    ) -> None:
        """The gateway serves this resource; traffic of its networks may come from it."""
        gateway = self._live.get(gateway_id)
        if gateway is None or gateway.tunnel_ips != tunnel_ips:
            self.forget(gateway_id)
            gateway = self._live[gateway_id] = _Gateway(tunnel_ips)
        self.revoke(resource_id)
        self._live[gateway_id] = gateway
        gateway.resources[resource_id] = tuple(networks)
        gateway.rebuild()
        for ip in tunnel_ips:
            self._by_tunnel_ip[ip] = gateway_id
        self._by_resource[resource_id] = gateway_id
        self._last_served_by[resource_id] = gateway_id
        self._seen.add(gateway_id)

    def revoke(self, resource_id: str) -> str | None:
        """The resource is not served any more; the gateway's id if that was all it served."""
        gateway_id = self._by_resource.pop(resource_id, None)
        if gateway_id is None:
            return None
        gateway = self._live[gateway_id]
        del gateway.resources[resource_id]
        gateway.rebuild()
        return None if gateway.resources else gateway_id

    def forget(self, gateway_id: str) -> bool:
        """The gateway is gone; whether it was live."""
        gateway = self._live.pop(gateway_id, None)
        if gateway is None:
            return False
        for resource_id in gateway.resources:
            del self._by_resource[resource_id]
        for ip in gateway.tunnel_ips:
            if self._by_tunnel_ip.get(ip) == gateway_id:
                del self._by_tunnel_ip[ip]
        return True

    def resources_of(self, gateway_id: str) -> tuple[str, ...]:
        """Ids of what a live gateway serves, the latest at the end."""
        gateway = self._live.get(gateway_id)
        return () if gateway is None else tuple(gateway.resources)

    def serving(self, resource_id: str) -> str | None:
        """The gateway authorized for this resource."""
        return self._by_resource.get(resource_id)

    def by_tunnel_ip(self, ip: bytes) -> str | None:
        """The live gateway with this address inside the tunnel."""
        return self._by_tunnel_ip.get(ip)

    def tunnel_ips(self, gateway_id: str) -> tuple[bytes, bytes]:
        """A live gateway's own addresses inside the tunnel."""
        return self._live[gateway_id].tunnel_ips

    def may_send(self, gateway_id: str, source: bytes) -> bool:
        """Whether the gateway may send us packets with this source."""
        gateway = self._live.get(gateway_id)
        return gateway is not None and source in gateway.sources

    def preferred(self, resource_id: str) -> tuple[str, ...]:
        """Every gateway ever seen: the one that served this resource, then live ones, then by id."""
        last = self._last_served_by.get(resource_id)
        return tuple(sorted(self._seen, key=lambda g: (g != last, g not in self._live, g)))
