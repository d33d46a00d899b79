"""The `firezone-headless-client` command (`spec/binaries.md` §3).

Exit codes: 0 clean end, 1 run-time failure, 2 usage error.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import structlog

from fz_core.driver import ConfigError, Role, TunnelConfig, TunnelFailed, serve
from fz_core.driver.logs import LogFilterError, configure
from fz_core.driver.options import OptionParser, duration, url
from fz_core.linux import HostError, device_id, forbid_core_dumps, raise_socket_buffers, read_token_file

gc.freeze()  # or enabling looks at everything that was imported
gc.enable()

PROGRAM = "firezone-headless-client"
VERSION = "1.5.12"
EPILOG = """\
commands:
  standalone            run; the default

The token is read from FIREZONE_TOKEN, else from the file --token-path, which must belong to root and
be closed to everybody else.
environment besides the options:
  FZ_CIPHER=libsodium|libcrypto  what seals and opens full packets; default: the faster one
  FZ_FASTPATH=off                every packet goes through Python: slower, else the same
  FZ_TUN_OFFLOADS=off, FZ_UDP_GSO=off, FZ_UDP_GRO=off  one packet or datagram per call
exit status: 0 clean end, 1 run-time failure, 2 usage error"""


def parser() -> OptionParser:
    """All options; they come before the command."""
    p = OptionParser(prog=PROGRAM, description="Connect this host to Firezone resources.", epilog=EPILOG)
    p.add_argument("--version", action="version", version=f"{PROGRAM} {VERSION}")
    p.add_option("-u", "--api-url", env="FIREZONE_API_URL", type=url, default="wss://api.firezone.dev/", help="portal")
    p.add_option("--firezone-name", env="FIREZONE_NAME", help="name shown in the portal, else the host name")
    p.add_option("-i", "--firezone-id", env="FIREZONE_ID", help="identity, else derived from this machine")
    p.add_option(
        "-m", "--max-partition-time", env="MAX_PARTITION_TIME", type=duration,
        help="give up after this much time without the portal; default: never",
    )  # fmt: skip
    p.add_option(
        "--activate-internet-resource", env="FIREZONE_ACTIVATE_INTERNET_RESOURCE", action="store_true", default=False,
        help="send all other traffic through the internet resource, if there is one",
    )  # fmt: skip
    p.add_option(
        "--token-path",
        env="FIREZONE_TOKEN_PATH",
        default="/etc/dev.firezone.client/token",
        help="file with the token",
    )
    p.add_option(
        "--dns-control",
        env="FIREZONE_DNS_CONTROL",
        choices=("systemd-resolved", "etc-resolv-conf", "disabled"),
        default="systemd-resolved",
        help="how the host's DNS is pointed at the tunnel, so that names of resources resolve",
    )
    p.add_reporting_options()
    p.add_option(
        "--inc-buf", env="FIREZONE_INC_BUF", action="store_true", default=False,
        help="raise net.core.rmem_max and wmem_max",
    )  # fmt: skip
    p.add_argument("command", nargs="?", choices=("standalone",), default="standalone", help="what to do")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    options = parser().parse_args(argv)
    token = os.environ.pop("FIREZONE_TOKEN", None)
    try:
        configure(os.environ.get("RUST_LOG", "info"), flow_logs=options.flow_logs)
        log = structlog.get_logger("firezone_headless_client")
        log.info("started logging", arch=os.uname().machine, version=VERSION)
        forbid_core_dumps()
        if options.inc_buf:
            log.info("Kernel limits of socket buffers", **raise_socket_buffers())
        identity = device_id("client") if options.firezone_id is None else options.firezone_id
        if token is None:
            token = read_token_file(options.token_path)
            log.info("Loaded token from disk", path=options.token_path)
        serve(
            TunnelConfig(
                role=Role.CLIENT,
                api_url=options.api_url,
                device_id=identity,
                name=options.firezone_name or os.uname().nodename,
                version=VERSION,
                token=token,
                max_partition_time=options.max_partition_time,
                internet_resource=options.activate_internet_resource,
                dns_control=options.dns_control,
                flow_logs=options.flow_logs,
                flow_log_dir=Path("/var/lib/dev.firezone.client/flow_logs"),
            )
        )
    except (ConfigError, HostError, LogFilterError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        sys.exit(1)
    except TunnelFailed as error:
        print(f"Firezone disconnected: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
