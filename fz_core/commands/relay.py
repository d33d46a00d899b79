"""The `firezone-relay` command (`spec/binaries.md` §4).

Exit codes: 0 after SIGINT or SIGTERM, 1 run-time failure, 2 usage error.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import signal
import sys
from collections.abc import Sequence

import trio

from fz_core.driver.health import HealthServer
from fz_core.driver.logs import LogFilterError, configure
from fz_core.driver.options import OptionParser, hide_argument, socket_address, url
from fz_core.driver.portal import PortalFailed, relay_link
from fz_core.embedded.open_files import allow_open_files
from fz_core.embedded.relay import RelayConfig, run_relay
from fz_core.linux import forbid_core_dumps, os_version
from fz_core.portal import BadUrl, Login, user_agent

PROGRAM = "firezone-relay"
VERSION = "1.6.1"
log = logging.getLogger("firezone_relay")


def parser() -> OptionParser:
    """All options; every variable is the flag's name in upper snake case."""
    p = OptionParser(prog=PROGRAM, description="TURN/STUN relay for Firezone clients and gateways.")
    p.add_argument("--version", action="version", version=f"{PROGRAM} {VERSION}")
    p.add_option("--public-ip4-addr", env="PUBLIC_IP4_ADDR", type=ip4, help="IPv4 address to hand out")
    p.add_option("--public-ip6-addr", env="PUBLIC_IP6_ADDR", type=ip6, help="IPv6 address to hand out")
    p.add_option("--bind-ip4-addr", env="BIND_IP4_ADDR", type=ip4, default="0.0.0.0", help="IPv4 address to listen on")
    p.add_option("--bind-ip6-addr", env="BIND_IP6_ADDR", type=ip6, default="::", help="IPv6 address to listen on")
    p.add_option("--listen-port", env="LISTEN_PORT", type=port, default=3478, help="port of STUN and TURN")
    p.add_option("--lowest-port", env="LOWEST_PORT", type=port, default=49152, help="first port for allocations")
    p.add_option("--highest-port", env="HIGHEST_PORT", type=port, default=65535, help="last port for allocations")
    p.add_option("--api-url", env="FIREZONE_API_URL", type=url, help="WebSocket URL of the portal, required")
    p.add_option("token", nargs="?", env="FIREZONE_TOKEN", metavar="TOKEN", help="relay token; prefer the variable")
    p.add_option("name", nargs="?", env="FIREZONE_NAME", metavar="NAME", help="name shown in the portal")
    p.add_option(
        "--allocations-per-source", env="ALLOCATIONS_PER_SOURCE", type=int, default=1024,
        help="most allocations of one IPv4 address or IPv6 /64",
    )  # fmt: skip
    p.add_option("--rng-seed", env="RNG_SEED", type=int, help="predictable allocation ports, for tests only")
    p.add_option("--log-format", env="LOG_FORMAT", choices=("human", "json"), default="human", help="of the log lines")
    p.add_option(
        "--health-check-addr", env="HEALTH_CHECK_ADDR", type=socket_address, default=("0.0.0.0", 8080),
        shown_default="0.0.0.0:8080", help="serves /healthz and /readyz",
    )  # fmt: skip
    p.add_option("--num-worker-threads", env="NUM_WORKER_THREADS", type=int, default=2, help="accepted; one is used")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    p = parser()
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = p.parse_args(arguments)
    for name, value in (("--api-url", options.api_url), ("TOKEN", options.token)):
        if value is None:
            p.error(f"{name} is required")
    hide_argument("fz_core.commands.relay", arguments, options.token, "FIREZONE_TOKEN")
    try:
        configure(os.environ.get("RUST_LOG", "info"), as_json=options.log_format == "json")
        forbid_core_dumps()
        allow_open_files()
        trio.run(run, options)
    except LogFilterError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        sys.exit(1)
    except BaseException as error:
        reason = expected(error)
        if reason is None:
            raise
        log.error(reason)
        sys.exit(1)
    log.info("Goodbye!")


async def run(options: argparse.Namespace) -> None:
    """Serve until a signal, then end at once: clients notice and move on."""
    config = config_of(options)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            relay = await nursery.start(run_relay, config, relay_link(login_of(options)))
            nursery.start_soon(HealthServer(options.health_check_addr).run, lambda: relay.is_ready)
            async for number in signals:
                log.info("Received %s", signal.Signals(number).name)
                nursery.cancel_scope.cancel()
                break


def config_of(options: argparse.Namespace) -> RelayConfig:
    """The part the relay itself is concerned with. PortalFailed without any public address."""
    if options.public_ip4_addr is None and options.public_ip6_addr is None:
        raise PortalFailed("no public address: give --public-ip4-addr, --public-ip6-addr or both")
    return RelayConfig(
        public_ip4=options.public_ip4_addr,
        public_ip6=options.public_ip6_addr,
        bind_ip4=options.bind_ip4_addr,
        bind_ip6=options.bind_ip6_addr,
        listen_port=options.listen_port,
        lowest_port=options.lowest_port,
        highest_port=options.highest_port,
        rng_seed=options.rng_seed,
        allocations_per_source=options.allocations_per_source,
    )


def login_of(options: argparse.Namespace) -> Login:
    """How the relay introduces itself."""
    params = {
        "name": options.name,
        "ipv4": options.public_ip4_addr,
        "ipv6": options.public_ip6_addr,
        "port": str(options.listen_port),
    }
    system, version, arch, kernel = os_version()
    agent = user_agent(system, version, "relay", VERSION, arch, kernel)
    login = Login("relay", options.api_url, agent, {k: v for k, v in params.items() if v is not None}, options.token)
    login.endpoint()
    return login


def expected(error: BaseException) -> str | None:
    """One line for a failure that is not a bug."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, OSError):
        return f"cannot listen: {error.strerror or error}"
    return str(error) if isinstance(error, PortalFailed | BadUrl) else None


def ip4(text: str) -> str:
    """An IPv4 address."""
    return _ip(text, 4)


def ip6(text: str) -> str:
    """An IPv6 address."""
    return _ip(text, 6)


def _ip(text: str, version: int) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        address = None
    if address is None or address.version != version:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IPv{version} address")
    return str(address)


def port(text: str) -> int:
    """A UDP port; 0 means any."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, use 0 to 65535")
    return int(text)


if __name__ == "__main__":
    main()
