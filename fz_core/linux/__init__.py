"""What touches this machine's kernel and files; knows nothing of policy (floor 5)."""

from fz_core.linux.alarm import Alarm
from fz_core.linux.device_id import device_id
from fz_core.linux.dns_control import DnsControl, make_dns_control, parse_resolv_conf
from fz_core.linux.errors import HostError
from fz_core.linux.file_watch import FileWatch
from fz_core.linux.marks import MARK, MarkError, set_mark
from fz_core.linux.network_monitor import DEBOUNCE, NetworkMonitor
from fz_core.linux.process import forbid_core_dumps, has_net_admin, os_version, raise_socket_buffers
from fz_core.linux.route_cache import RouteCache
from fz_core.linux.smbios import Smbios, read_smbios
from fz_core.linux.socket_factory import SocketFactory, open_socket
from fz_core.linux.token_file import read_token_file
from fz_core.linux.tun import TunDevice, TunError
from fz_core.linux.udp import PREFERRED_PORT, SocketError, UdpSocket

__all__ = [
    "DEBOUNCE",
    "MARK",
    "PREFERRED_PORT",
    "Alarm",
    "DnsControl",
    "FileWatch",
    "HostError",
    "MarkError",
    "NetworkMonitor",
    "RouteCache",
    "Smbios",
    "SocketError",
    "SocketFactory",
    "TunDevice",
    "TunError",
    "UdpSocket",
    "device_id",
    "forbid_core_dumps",
    "has_net_admin",
    "make_dns_control",
    "open_socket",
    "os_version",
    "parse_resolv_conf",
    "raise_socket_buffers",
    "read_smbios",
    "read_token_file",
    "set_mark",
]
