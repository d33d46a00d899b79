"""The command `firezone-relay`: options, logging, signals (spec/binaries.md sections 1.1 and 4).

Exit codes: 0 for --help, SIGINT and SIGTERM, 1 for a failure at run time, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import trio

from fz_core.embedded.relay import PortalLink, RelayConfig, run_relay

LinkFactory = Callable[[argparse.Namespace, RelayConfig], PortalLink]
log = logging.getLogger("firezone_relay")


def main(argv: Sequence[str] | None = None, make_link: LinkFactory | None = None) -> int:
    """Run the relay. `make_link` makes the portal connection out of the options."""
    options = parse_options(sys.argv[1:] if argv is None else argv)
    set_up_logging(options.log_format)
    if options.public_ip4_addr is None and options.public_ip6_addr is None:
        log.error("No public address: give --public-ip4-addr, --public-ip6-addr or both")
        return 1
    if urlsplit(options.api_url).scheme not in ("ws", "wss", "http", "https"):
        log.error("Unsupported scheme in --api-url: use ws or wss")
        return 1
    config = config_of(options)
    link = make_link(options, config) if make_link is not None else wait_for_ever
    try:
        trio.run(run_until_signal, config, link)
    except Exception as error:
        for cause in leaves(error):
            log.error("Relay failed: %s", cause)
        return 1
    log.info("Goodbye!")
    return 0


def leaves(error: BaseException) -> list[BaseException]:
    """The exceptions a nursery has wrapped."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]


async def run_until_signal(config: RelayConfig, link: PortalLink) -> None:
    """SIGINT and SIGTERM end the relay at once: clients notice and move on."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_relay, config, link)
            async for number in signals:
                log.info("Received signal name=%s", signal.Signals(number).name)
                nursery.cancel_scope.cancel()
                break


async def wait_for_ever(stamp_secret: str, set_ready: Callable[[bool], None]) -> None:
    """No portal link is built in: the relay works, and is never reported ready."""
    log.warning("Started without a portal connection")
    await trio.sleep_forever()


def config_of(options: argparse.Namespace) -> RelayConfig:
    """The part the relay itself is concerned with."""
    return RelayConfig(
        public_ip4=options.public_ip4_addr,
        public_ip6=options.public_ip6_addr,
        bind_ip4=options.bind_ip4_addr,
        bind_ip6=options.bind_ip6_addr,
        listen_port=options.listen_port,
        lowest_port=options.lowest_port,
        highest_port=options.highest_port,
        rng_seed=options.rng_seed,
        health_address=options.health_check_addr,
    )


# Options


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Command line before environment before default; exits with 2 and one line on wrong usage."""
    parser = argparse.ArgumentParser(
        prog="firezone-relay",
        description="TURN/STUN relay for Firezone clients and gateways.",
        allow_abbrev=False,
    )
    add = option_adder(parser)
    add("--public-ip4-addr", ipv4, None, "IPv4 address to hand out")
    add("--public-ip6-addr", ipv6, None, "IPv6 address to hand out")
    add("--bind-ip4-addr", ipv4, "0.0.0.0", "IPv4 address to listen on")
    add("--bind-ip6-addr", ipv6, "::", "IPv6 address to listen on")
    add("--listen-port", port_number, 3478, "TURN/STUN port")
    add("--lowest-port", port_number, 49152, argparse.SUPPRESS)
    add("--highest-port", port_number, 65535, argparse.SUPPRESS)
    add("--api-url", url, None, "WebSocket URL of the portal (required)", env="FIREZONE_API_URL")
    add("--rng-seed", unsigned, None, argparse.SUPPRESS)
    add("--log-format", log_format, "human", "human or json")
    add("--health-check-addr", socket_address, ("0.0.0.0", 8080), "where /healthz and /readyz answer")
    add("--num-worker-threads", unsigned, 2, argparse.SUPPRESS)
    add("token", str, None, "token from the portal (required)", env="FIREZONE_TOKEN")
    add("name", str, None, "name to show in the portal", env="FIREZONE_NAME")
    options = parser.parse_args(argv)
    for name, flag in (("api_url", "--api-url or FIREZONE_API_URL"), ("token", "TOKEN or FIREZONE_TOKEN")):
        if getattr(options, name) is None:
            parser.error(f"missing {flag}")
    if options.lowest_port > options.highest_port:
        parser.error("--lowest-port is above --highest-port")
    return options


def option_adder(parser: argparse.ArgumentParser) -> Callable[..., None]:
    """Adds one option with its environment variable; a set but empty variable counts as a value."""

    def add(name: str, kind: Callable[[str], Any], default: Any, text: str, env: str | None = None) -> None:
        variable = env or name.removeprefix("--").replace("-", "_").upper()
        value = os.environ.get(variable)
        if value is not None:
            try:
                default = kind(value)
            except (argparse.ArgumentTypeError, ValueError) as error:
                parser.error(f"environment variable {variable}: {error}")
        shown = text if text is argparse.SUPPRESS else f"{text} [env: {variable}]"
        if name.startswith("--"):
            parser.add_argument(name, type=kind, default=default, help=shown)
        else:
            parser.add_argument(name, nargs="?", type=kind, default=default, help=shown, metavar=name.upper())

    return add


def ipv4(text: str) -> str:
    """An IPv4 address."""
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IPv4 address") from None


def ipv6(text: str) -> str:
    """An IPv6 address."""
    try:
        return str(ipaddress.IPv6Address(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IPv6 address") from None


def unsigned(text: str) -> int:
    """Digits."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return int(text)


def port_number(text: str) -> int:
    """0 to 65535."""
    number = unsigned(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"port {number} is out of range, use 0 to 65535")
    return number


def socket_address(text: str) -> tuple[str, int]:
    """`1.2.3.4:5` or `[::1]:5`."""
    host, colon, port = text.rpartition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address with a port")
    if host.startswith("[") and host.endswith("]"):
        return ipv6(host[1:-1]), port_number(port)
    return ipv4(host), port_number(port)


def url(text: str) -> str:
    """Something with a scheme and a host."""
    parts = urlsplit(text)
    if not parts.scheme or not parts.netloc:
        raise argparse.ArgumentTypeError("not a URL with scheme and host")
    return text


def log_format(text: str) -> str:
    """human or json."""
    if text not in ("human", "json"):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of: human, json")
    return text


# Logging

LEVELS = {"WARNING": "WARN", "CRITICAL": "ERROR"}


class HumanFormatter(logging.Formatter):
    """`2026-08-22T01:08:00.123Z  INFO target: message`"""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        level = LEVELS.get(record.levelname, record.levelname)
        return f"{stamp}.{int(record.msecs):03d}Z {level:>5} {record.name}: {record.getMessage()}"


class JsonFormatter(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {
            "timestamp": f"{stamp}.{int(record.msecs * 1000):06d}Z",
            "level": LEVELS.get(record.levelname, record.levelname),
            "fields": {"message": record.getMessage()},
            "target": record.name,
        }
        return json.dumps(fields)


def set_up_logging(form: str) -> None:
    """To stdout; only the first bare level in RUST_LOG is understood here."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter() if form == "json" else HumanFormatter())
    names = {"off": 100, "error": 40, "warn": 30, "info": 20, "debug": 10, "trace": 5}
    words = [word.strip().lower() for word in os.environ.get("RUST_LOG", "info").split(",")]
    level = next((names[word] for word in words if word in names), logging.INFO)
    logging.basicConfig(level=level, handlers=[handler], force=True)


if __name__ == "__main__":
    sys.exit(main())
