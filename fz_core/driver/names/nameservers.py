"""The gateway's name servers, and which of them answers fastest right now (`spec/tunnel.md` §17).

    nameservers = Nameservers(read_resolv_conf(Path("/etc/resolv.conf")))
    nursery.start_soon(nameservers.run)
    nameservers.fastest                         # packed IP, or None

Each round of probes replaces what the last one found, so a server that died is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import dns.rcode
import dns.rdatatype
import trio

from fz_core.driver import clock
from fz_core.driver.names.bootstrap import ask_server
from fz_core.driver.names.dns_client import DNS_PORT, DnsFailed
from fz_core.linux import HostError, SocketFactory, parse_resolv_conf
from fz_core.packet import Address

PROBED_NAME = "firezone.dev"
PROBE_TIMEOUT = 2.0
PROBE_INTERVAL = 60.0
RETRY_INTERVAL = 5.0
MAX_PROBES = 20


class Nameservers:
    """`ips` in the order of configuration; `fastest` after the first round of probes.

    A server that answers, but does not know the probed name, is used if no other one does: it may serve a
    site without the internet.
    """

    def __init__(
        self,
        ips: Sequence[bytes],
        *,
        port: int = DNS_PORT,
        marked: bool = True,
        interval: float = PROBE_INTERVAL,
        now: Callable[[], float] = clock.now,
        sockets: SocketFactory | None = None,
    ) -> None:
        self.ips, self._sockets = tuple(ips), sockets
        self._port, self._marked, self._interval, self._now = port, marked, interval, now
        self._again = trio.Event()
        self.fastest: bytes | None = None
        self.rounds = 0

    async def run(self) -> None:
        """Probe now, every minute, and after `reset`; sooner while nobody answers."""
        while True:
            self._again = trio.Event()
            await self.probe()
            with trio.move_on_after(self._interval if self.fastest is not None else RETRY_INTERVAL):
                await self._again.wait()

    def reset(self) -> None:
        """The network changed: probe now."""
        self._again.set()

    async def probe(self) -> None:
        """One round: an A query to each server over UDP and TCP."""
        times: dict[bytes, tuple[bool, float]] = {}
        limiter = trio.CapacityLimiter(MAX_PROBES)

        async def ask(ip: bytes, tcp: bool) -> None:
            async with limiter:
                started = self._now()
                with suppress(DnsFailed):
                    response = await ask_server(
                        Address(ip, self._port),
                        PROBED_NAME,
                        dns.rdatatype.A,
                        tcp=tcp,
                        timeout=PROBE_TIMEOUT,
                        marked=self._marked,
                        sockets=self._sockets,
                    )
                    result = (response.rcode() != dns.rcode.NOERROR, self._now() - started)
                    times[ip] = min(result, times.get(ip, result))

        async with trio.open_nursery() as nursery:
            for ip in self.ips:
                nursery.start_soon(ask, ip, False)
                nursery.start_soon(ask, ip, True)
        self.fastest = min(times, key=times.__getitem__, default=None)
        self.rounds += 1


def read_resolv_conf(path: Path = Path("/etc/resolv.conf")) -> tuple[bytes, ...]:
    """The name servers of the file, duplicates removed. HostError if it cannot be read or is none."""
    try:
        text = path.read_text()
    except OSError as error:
        raise HostError(f"cannot read {path} ({error.strerror}): the gateway needs its name servers") from None
    except UnicodeDecodeError:
        raise HostError(f"{path} is not UTF-8 text: correct it") from None
    return tuple(dict.fromkeys(parse_resolv_conf(text, str(path)).servers))
