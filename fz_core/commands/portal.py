"""The command `firezone-portal`: options, files, signals (docs/embedded-portal.md).

Exit codes: 0 for SIGINT, SIGTERM, --help and a good --check, 1 for a failure at run time, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import ssl
import stat
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import trio

from fz_core.driver.logs import LogFilterError, configure
from fz_core.driver.options import OptionParser, socket_address
from fz_core.embedded.open_files import allow_open_files
from fz_core.embedded.policy import Policy
from fz_core.embedded.policy_file import PolicyErrors, read_policy
from fz_core.embedded.portal_server import PortalServer
from fz_core.embedded.portal_state import PortalState
from fz_core.embedded.store import Store, StoreError
from fz_core.linux import forbid_core_dumps

PROGRAM = "firezone-portal"
VERSION = "0.1.0"
log = logging.getLogger("firezone_portal")
DESCRIPTION = """\
A small Firezone portal for one machine: it reads who may reach what from a policy file, and brings
clients, gateways and relays together. Traffic never passes through it."""
EPILOG = """\
Start with a policy, see docs/embedded-portal.md:
  firezone-portal --policy portal.toml --check
  firezone-portal --policy portal.toml --state portal.sqlite3 --listen 0.0.0.0:8081

Peers are pointed here with FIREZONE_API_URL=ws://HOST:8081. They dial port 443 when the URL names none,
and also when it names 80, so listen elsewhere. Without TLS tokens travel in the clear: use it on a trusted
network, or give --tls-cert and --tls-key. Official peers accept publicly trusted certificates only.
/healthz and /readyz answer on the same port.

signals: SIGHUP reads the policy file again (a bad one is refused and the old one stays), SIGINT and SIGTERM end.
exit status: 0 clean end, 1 run-time failure, 2 usage error"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the portal."""
    options = parse_options(sys.argv[1:] if argv is None else argv)
    try:
        configure(os.environ.get("RUST_LOG", "info"), as_json=options.log_format == "json")
    except LogFilterError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    forbid_core_dumps()
    allow_open_files()
    policy = load(options.policy)
    if policy is None:
        return 1
    if options.check:
        counts = f"{len(policy.resources)} resources, {len(policy.clients)} clients, {len(policy.sites)} sites"
        print(f"{options.policy}: ok, {counts}")
        return 0
    try:
        tls = load_tls(options.tls_cert, options.tls_key)
        store = Store(options.state, secrets.token_bytes)
    except (OSError, StoreError) as error:
        log.error("Cannot start: %s", error)
        return 1
    failed = False
    try:
        trio.run(run, options, policy, store, tls)
    except* OSError as errors:
        log.error("Cannot serve %s:%d: %s", *options.listen, _first(errors))
        failed = True
    finally:
        store.close()
    log.info("Goodbye!")
    return int(failed)


async def run(options: argparse.Namespace, policy: Policy, store: Store, tls: ssl.SSLContext | None) -> None:
    """Serve until SIGINT or SIGTERM."""
    now = trio.current_time()
    state = PortalState(policy, store, unix_epoch=time.time() - now, random_bytes=secrets.token_bytes, now=now)
    server = PortalServer(state)
    host, port = options.listen
    # `[::]` means every address of both families, as elsewhere; trio would serve IPv6 alone.
    listeners: list[trio.SocketListener] = await trio.open_tcp_listeners(port, host=None if host == "::" else host)
    if port == 80 and tls is None:
        log.warning("Listening on port 80: peers given ws://HOST:80 dial 443, choose another port")
    with trio.open_signal_receiver(signal.SIGHUP, signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            wrapped = [trio.SSLListener(x, tls) for x in listeners] if tls else listeners
            await nursery.start(server.serve, wrapped)
            for listener in listeners:
                bound = listener.socket.getsockname()
                log.info("Listening address=%s port=%d tls=%s", bound[0], bound[1], "yes" if tls else "no")
            async for number in signals:
                log.info("Received signal name=%s", signal.Signals(number).name)
                if number != signal.SIGHUP:
                    nursery.cancel_scope.cancel()
                    break
                reload_tls(tls, options)
                changed = load(options.policy)
                if changed is None:
                    log.error("The new policy is refused, the old one stays in force")
                else:
                    server.set_policy(changed)
                    log.info("The new policy is in force")


def load(path: Path) -> Policy | None:
    """The policy, or None after logging every mistake."""
    try:
        policy = read_policy(path)
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO) & ~(stat.S_IRGRP | stat.S_IXGRP):
            log.warning("%s holds secrets and is open to others, use chmod 640", path)
        return policy
    except PolicyErrors as errors:
        for line in errors.lines:
            log.error("%s", line)
    except OSError as error:
        log.error("Cannot read the policy %s: %s; name another with --policy", path, error.strerror)
    return None


def load_tls(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """A context if certificate and key are given."""
    if cert is None or key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key)
    except OSError as error:  # ssl.SSLError is one
        raise OSError(f"TLS certificate {cert} with key {key}: {error}") from None
    return context


def reload_tls(context: ssl.SSLContext | None, options: argparse.Namespace) -> None:
    """A renewed certificate serves new connections; a bad one leaves the old in place."""
    if context is not None:
        try:
            context.load_cert_chain(options.tls_cert, options.tls_key)
        except OSError as error:
            log.error("TLS certificate %s is refused, the old one stays: %s", options.tls_cert, error)


def parser() -> OptionParser:
    """All options."""
    p = OptionParser(prog=PROGRAM, description=DESCRIPTION, epilog=EPILOG)
    p.add_argument("--version", action="version", version=f"{PROGRAM} {VERSION}")
    p.add_option("--policy", env="FIREZONE_PORTAL_POLICY", type=Path, metavar="FILE", help="the policy, TOML; required")
    p.add_option(
        "--state", env="FIREZONE_PORTAL_STATE", type=Path, metavar="FILE",
        default=Path("/var/lib/firezone/portal.sqlite3"), help="SQLite file for devices and grants, mode 0600",
    )  # fmt: skip
    p.add_option(
        "--listen", env="FIREZONE_PORTAL_LISTEN", type=socket_address, metavar="ADDR:PORT",
        default=("127.0.0.1", 8081), shown_default="127.0.0.1:8081", help="[::]:PORT means both families",
    )  # fmt: skip
    p.add_option("--tls-cert", env="FIREZONE_PORTAL_TLS_CERT", type=Path, metavar="FILE", help="certificate chain, PEM")
    p.add_option("--tls-key", env="FIREZONE_PORTAL_TLS_KEY", type=Path, metavar="FILE", help="its private key, PEM")
    p.add_option("--log-format", env="LOG_FORMAT", choices=("human", "json"), default="human", help="of the log lines")
    p.add_option("--check", action="store_true", default=False, help="check the policy, print what is wrong, and exit")
    return p


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Options that make sense together."""
    p = parser()
    options = p.parse_args(argv)
    if options.policy is None:
        p.error("--policy is required")
    if (options.tls_cert is None) != (options.tls_key is None):
        p.error("--tls-cert and --tls-key go together")
    return options


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    sys.exit(main())
