"""The `firezone-gateway` command (`spec/binaries.md` §2).

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
from fz_core.driver.health import HealthServer
from fz_core.driver.logs import LogFilterError, configure
from fz_core.driver.options import OptionParser, duration, feature_flag, hide_argument, socket_address, url
from fz_core.linux import HostError, device_id, forbid_core_dumps, has_net_admin, raise_socket_buffers

gc.freeze()  # or enabling looks at everything that was imported
gc.enable()

PROGRAM = "firezone-gateway"
VERSION = "1.6.1"
EPILOG = """\
The token is read from FIREZONE_TOKEN, else from the systemd credential FIREZONE_TOKEN. Forwarding and
masquerading on this host are the administrator's: see docs/gateway.md for the rules.
environment besides the options:
  FZFF_GATEWAY_USERSPACE_DNS_A_AAAA_RECORDS=false  resolve names with the system's functions, cached 30 s
  FZFF_ICMP_UNREACHABLE_INSTEAD_OF_NAT64=true      no translation between IPv4 and IPv6
  FZ_CIPHER=libsodium|libcrypto                    what seals and opens full packets; default: the faster one
  FZ_FASTPATH=off                                  every packet goes through Python: slower, else the same
  FZ_TUN_OFFLOADS=off, FZ_UDP_GSO=off, FZ_UDP_GRO=off  one packet or datagram per call
exit status: 0 clean end, 1 run-time failure, 2 usage error"""


def parser() -> OptionParser:
    """All options."""
    p = OptionParser(prog=PROGRAM, description="Give Firezone clients access to this host's network.", epilog=EPILOG)
    p.add_argument("--version", action="version", version=f"{PROGRAM} {VERSION}")
    p.add_option("-u", "--api-url", env="FIREZONE_API_URL", type=url, default="wss://api.firezone.dev", help="portal")
    p.add_option("token", nargs="?", env="FIREZONE_TOKEN", metavar="TOKEN", help="gateway token; prefer the variable")
    p.add_option("-n", "--firezone-name", env="FIREZONE_NAME", help="name shown in the portal, else the host name")
    p.add_option("-i", "--firezone-id", env="FIREZONE_ID", help="identity, else derived from this machine")
    p.add_option(
        "-m", "--max-partition-time", env="FIREZONE_MAX_PARTITION_TIME", type=duration, default=86_400.0,
        shown_default="24h", help="give up after this much time without the portal",
    )  # fmt: skip
    p.add_option(
        "--log-format",
        env="FIREZONE_LOG_FORMAT",
        choices=("human", "json"),
        default="human",
        help="of the log lines",
    )
    p.add_reporting_options()
    p.add_option("--no-check", action="store_true", default=False, help="skip the privilege check")
    p.add_option(
        "--no-inc-buf", env="FIREZONE_NO_INC_BUF", action="store_true", default=False,
        help="leave net.core.rmem_max and wmem_max as they are",
    )  # fmt: skip
    p.add_option(
        "--health-check-addr", env="HEALTH_CHECK_ADDR", type=socket_address, default=("0.0.0.0", 8080),
        shown_default="0.0.0.0:8080", help="serves /healthz and /readyz",
    )  # fmt: skip
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = parser().parse_args(arguments)
    hide_argument("fz_gateway", arguments, options.token, "FIREZONE_TOKEN")
    if not options.no_check and not has_net_admin():
        print(
            f"{PROGRAM}: needs root or the capability CAP_NET_ADMIN\n"
            f"run it as root, or with AmbientCapabilities=CAP_NET_ADMIN, or pass --no-check",
            file=sys.stderr,
        )
        sys.exit(1)
    try:
        configure(os.environ.get("RUST_LOG", "info"), as_json=options.log_format == "json", flow_logs=options.flow_logs)
    except LogFilterError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        sys.exit(1)
    log = structlog.get_logger("firezone_gateway")
    log.info("started logging", arch=os.uname().machine, os="linux", version=VERSION)
    forbid_core_dumps()
    if not options.no_inc_buf:
        log.info("Kernel limits of socket buffers", **raise_socket_buffers())
    try:
        config = TunnelConfig(
            role=Role.GATEWAY,
            api_url=options.api_url,
            device_id=options.firezone_id or device_id("gateway"),
            name=options.firezone_name or os.uname().nodename,
            version=VERSION,
            token=options.token if options.token is not None else credential(),
            max_partition_time=options.max_partition_time,
            userspace_dns=feature_flag("GATEWAY_USERSPACE_DNS_A_AAAA_RECORDS", True),
            flow_logs=options.flow_logs,
            flow_log_dir=Path("/var/lib/firezone/flow_logs"),
            mix_families=not feature_flag("ICMP_UNREACHABLE_INSTEAD_OF_NAT64", False),
        )
        serve(config, HealthServer(options.health_check_addr))
    except (ConfigError, HostError) as error:
        log.info(str(error))
        sys.exit(1)
    except TunnelFailed as error:
        log.error(str(error))
        sys.exit(1)
    log.info("Goodbye")


def credential() -> str:
    """The systemd credential FIREZONE_TOKEN, trimmed."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    path = Path(directory or ".") / "FIREZONE_TOKEN"
    if directory is None or not path.exists():
        raise ConfigError("no token: set FIREZONE_TOKEN, or LoadCredential=FIREZONE_TOKEN:<file> in the systemd unit")
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the credential {path}: {error}") from None


if __name__ == "__main__":
    main()
