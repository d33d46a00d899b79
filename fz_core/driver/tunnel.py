"""The Tunnel API: one client or gateway, from the portal to the TUN device.

    tunnel = Tunnel(config)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tunnel.run)          # until tunnel.stop(), or TunnelFailed
        async for event in tunnel.events: ...   # frozen dataclasses of fz_core.tunnel.events

Not here: command lines, signals, log configuration (`fz_gateway`, `fz_headless`, `service.py`).
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING

import structlog
import trio

from fz_core.crypto import PrivateKey, cipher_error, cipher_name
from fz_core.driver import clock
from fz_core.driver.carrier import wanted_threads
from fz_core.driver.config import ConfigError, Role, Start, TunnelConfig, TunnelFailed
from fz_core.driver.flow_logs.lines import log_record
from fz_core.driver.flow_logs.spool import FlowSpool
from fz_core.driver.flow_logs.uploading import upload_flow_logs
from fz_core.driver.loop import Loop
from fz_core.driver.portal import PortalLink
from fz_core.driver.roaming import FORGOTTEN_AFTER, RESETS, Change, RouteWatch, follow_routes
from fz_core.linux import (
    DEBOUNCE,
    HostError,
    NetworkMonitor,
    SocketFactory,
    TunDevice,
    UdpSocket,
    os_version,
    read_smbios,
)
from fz_core.packet import Address, DropReason
from fz_core.portal import (
    BadUrl,
    Connected,
    Fatal,
    Hiccup,
    Login,
    MessageDropped,
    MessageReceived,
    external_id,
    user_agent,
)
from fz_core.portal.client import RelaysPresence
from fz_core.portal.types import merge_relays
from fz_core.tunnel import PacketError, TunnelErrors
from fz_core.tunnel.events import (
    CheckPortal,
    DnsDecision,
    DnsRecordsChanged,
    FlowLogsConfigured,
    ForwardQuery,
    PacketsDropped,
    ResetWanted,
    ResolveName,
    ResourcesChanged,
    SendToPortal,
    TunConfigChanged,
    TunnelEvent,
)
from fz_core.tunnel.flow_tracking import FlowTracking

if TYPE_CHECKING:
    from fz_core.driver.client_side import ClientSide
    from fz_core.driver.gateway_side import GatewaySide
    from fz_core.driver.names.client_names import ClientNames
    from fz_core.driver.names.gateway_names import GatewayNames
    from fz_core.linux.netlink import Interface

EVENT_QUEUE = 256
COMPONENTS = {Role.CLIENT: "headless-client", Role.GATEWAY: "gateway"}
RATE_LIMIT = 60.0
DROPS_INTERVAL = 1.0

log = structlog.get_logger("tunnel")


class Tunnel:
    """One tunnel. Construct it anywhere, `run` it inside trio, once."""

    def __init__(self, config: TunnelConfig) -> None:
        if (error := cipher_error()) is not None:
            raise ConfigError(error)
        self._config = config
        spool, unix_epoch = config.flow_log_dir, clock.unix_epoch()
        start = Start(PrivateKey(secrets.token_bytes(32)), clock.now(), unix_epoch, secrets.token_bytes)
        flows = FlowTracking(config.role.value, unix_epoch, is_local=config.flow_logs, has_spool=spool is not None)
        self._spool = None if spool is None else FlowSpool(spool)
        self._side = _side_of(config.role)(config, start, flows)
        self._state = self._side.state
        self._login = _login(config)
        self._sockets = SocketFactory()
        self._watch = RouteWatch(self._sockets.routes, self._far_ends, self._own_ips)
        self._portal_ips: tuple[bytes, ...] = ()
        self._relays: dict[str, tuple[bytes, ...]] = {}
        self._tun_ips: tuple[bytes, ...] = ()
        self._loop: Loop | None = None
        self._names: ClientNames | GatewayNames | None = None
        self._link: PortalLink | None = None
        self._is_stopping = False
        self._is_resetting = False
        self._configs: trio.MemorySendChannel[TunConfigChanged]
        self._sender: trio.MemorySendChannel[TunnelEvent]
        self.events: trio.MemoryReceiveChannel[TunnelEvent]
        self._sender, self.events = trio.open_memory_channel[TunnelEvent](EVENT_QUEUE)
        self.missed_events = 0
        self.is_joined = False
        self._configured = trio.Event()
        self._logged_at: dict[str, float] = {}
        self._was_refused = False
        self._drops_told_at = 0.0

    @property
    def is_configured(self) -> bool:
        """Whether the device carries our addresses."""
        return self._configured.is_set()

    async def wait_configured(self) -> None:
        """Until then."""
        await self._configured.wait()

    @property
    def is_ready(self) -> bool:
        """Whether the portal knows us and the device carries our addresses."""
        return self.is_joined and self.is_configured

    @property
    def drops(self) -> dict[str, int]:
        """Dropped packets and messages by reason, since the start."""
        return {reason.value: count for reason, count in self._state.drops.items()}

    @property
    def carried(self) -> dict[str, int]:
        """What the fast path has carried, and what it left to Python (`docs/fast-path.md`); empty without one."""
        return {} if self._loop is None else self._loop.carried

    def stop(self) -> None:
        """Say goodbye to all peers and let `run` return."""
        self._is_stopping = True
        if self._loop is not None:
            self._loop.stop()

    def reset(self, reason: str) -> None:
        """Client: our network changed. Start over with new sockets, relays, keys, and a new link to the portal.

        Connections through the tunnel live on. From any thread; several calls at once are one. A gateway keeps
        its sockets and key: its relays are checked, and its link to the portal is made anew.
        """
        if self._loop is not None and not self._is_resetting:
            self._is_resetting = True
            self._loop.submit(partial(self._reset, reason))

    async def run(self) -> None:
        """Carry traffic until `stop`. TunnelFailed or HostError if it cannot go on."""
        with ExitStack() as stack:
            tun = stack.enter_context(TunDevice.open(self._config.tun_name))
            sockets = self._open_sockets()
            if not sockets:
                raise HostError("cannot open any UDP socket: is IP disabled on this host?")
            self._configs, configs = trio.open_memory_channel[TunConfigChanged](1024)
            loop = self._loop = Loop(
                self._state,
                tun,
                sockets,
                self._hand_up,
                self._report,
                self._handle_resume,
                pump_threads=wanted_threads(),
            )
            stack.callback(loop.close)
            if self._is_stopping:
                loop.stop()
            log.debug("Packets are sealed and opened", library=cipher_name())
            try:
                self._names = await self._side.open_names(loop.submit, self._sockets)
                self._link = PortalLink(
                    self._login, self._side.channel(), public_key=self._current_key, resolve=self._resolve_portal
                )
                await self._run_tasks(loop, self._link, tun.name, configs)
            finally:
                self._loop = None
                self._sender.close()
                with trio.CancelScope(shield=True):
                    if self._names is not None:
                        await self._names.restore()
                    await self._finish_flow_logs()

    async def _run_tasks(
        self,
        loop: Loop,
        link: PortalLink,
        device: str,
        configs: trio.MemoryReceiveChannel[TunConfigChanged],
    ) -> None:
        error: BaseException | None = None
        assert self._names is not None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._configure, device, configs, self._names)
                await nursery.start(self._names.run)
                nursery.start_soon(link.run)
                nursery.start_soon(self._listen, link, loop)
                nursery.start_soon(follow_routes, self._watch, self._handle_change)
                if self._config.flow_log_dir is not None:
                    nursery.start_soon(upload_flow_logs, self._config.flow_log_dir, self._names.resolve_portal)
                await loop.run()
                nursery.cancel_scope.cancel()
        except* (TunnelFailed, HostError) as failed:
            error = failed
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            if isinstance(error, HostError) and self._config.role is Role.GATEWAY:
                error = TunnelFailed(str(error))  # it ran already: an error, no trouble at the start
        if error is not None:  # not raised above: Python before 3.11.4 or so puts what except* raises in a group
            raise error

    async def _listen(self, link: PortalLink, loop: Loop) -> None:
        """Bring what the portal says into the loop's turns."""
        state = self._state
        async for event in link.events:
            match event:
                case Connected():
                    log.info("Connected to portal", host=self._login.endpoint()[0])
                    self.is_joined = True
                    self._watch.note_targets()
                    loop.submit(state.handle_portal_connected)
                case MessageReceived(message):
                    self._note_relays(message)
                    loop.submit(partial(state.handle_portal_message, message))
                case MessageDropped(name, reason):
                    state.drops.add(DropReason.PORTAL_MESSAGE)
                    if self._is_worth_a_line("portal message"):
                        log.warning("Portal message dropped", event_name=name, reason=reason)
                case Hiccup(delay, budget, error):
                    log.info("Portal connection hiccup", error=error, backoff=f"{delay:.1f}s", max_elapsed_time=budget)
                    self.is_joined = False
                    loop.submit(state.handle_portal_disconnected)
                case Fatal(error):
                    raise TunnelFailed(error)

    async def _configure(
        self,
        device: str,
        configs: trio.MemoryReceiveChannel[TunConfigChanged],
        names: ClientNames | GatewayNames,
    ) -> None:
        """Apply TUN configurations in order, off the loop: netlink may block. Then DNS, which needs the addresses."""
        interface = await trio.to_thread.run_sync(_open_interface, device)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_follow_link_scopes, interface)
            async for config in configs:
                await trio.to_thread.run_sync(_apply, interface, config)
                for warning in interface.warnings:
                    log.warning(warning)
                interface.warnings.clear()
                await names.apply(self._config.tun_name, config)
                if not self.is_configured:
                    log.debug("Tunnel ready")
                self._configured.set()

    # a changing network

    def _reset(self, reason: str, now: float) -> None:
        """Within a turn of the loop, whose end sends the first datagrams by the new sockets."""
        self._is_resetting = False
        if self._side.role is Role.GATEWAY:
            log.info("Network changed", reason=reason)
            self.is_joined = False  # by an address that is gone
            self._look_at_network(now)
            return
        assert self._loop is not None
        log.info("Resetting session", reason=reason)
        self._state.handle_timeout(now)
        self._sockets.reset()
        self._watch.learn(now)
        self._loop.rebind(self._open_sockets)
        self._side.reset(now)
        if self._names is not None:
            self._names.reset()
        if self._link is not None:
            self._link.reconnect()

    def _look_at_network(self, now: float) -> None:
        """Nothing needs to start over, but what was out of reach may not be any more, and the reverse."""
        self._state.handle_network_changed(now)
        if self._config.role is Role.GATEWAY and self._names is not None:
            self._names.reset()
        if self._link is not None:
            if self.is_joined:
                self._link.probe()
            else:
                self._link.reconnect()

    def _handle_change(self, change: Change) -> None:
        """The kernel's routes changed."""
        log.debug("Network changed", what=change.value)
        if change in RESETS:
            self.reset(change.value)
        elif self._loop is not None:
            self._loop.submit(self._look_at_network)

    def _handle_resume(self, seconds: float, now: float) -> None:
        """The machine was suspended: after a while, relays and peers have given us up."""
        if seconds >= FORGOTTEN_AFTER:
            self.reset(f"the machine slept for {seconds:.0f} s")
        elif self._loop is not None:
            self._loop.submit(self._look_at_network)

    def _open_sockets(self) -> Sequence[UdpSocket]:
        sockets, errors = self._sockets.bind_data(self._config.listen_port)
        for error in errors:
            log.debug(error.strerror)
        return sockets

    def _current_key(self) -> str:
        return base64.b64encode(self._state.public_key).decode()

    async def _resolve_portal(self, host: str) -> Sequence[str]:
        assert self._names is not None
        found = await self._names.resolve_portal(host)
        self._portal_ips = tuple(Address.parse(f"[{ip}]:0" if ":" in ip else f"{ip}:0").ip for ip in found)
        return found

    def _note_relays(self, message: object) -> None:
        """Their addresses, for the watch over routes."""
        if isinstance(message, self._side.init):
            self._relays.clear()
            relays = message.relays
        elif isinstance(message, RelaysPresence):
            for relay_id in message.disconnected_ids:
                self._relays.pop(relay_id, None)
            relays = message.connected
        else:
            return
        for relay in merge_relays(relays):
            self._relays[relay.id] = tuple(a.ip for a in (relay.v4, relay.v6) if a is not None)
        self._watch.note_targets()

    def _far_ends(self) -> Iterator[bytes]:
        yield from self._portal_ips
        for addresses in self._relays.values():
            yield from addresses

    def _own_ips(self) -> tuple[bytes, ...]:
        return self._tun_ips

    # what comes out of the state

    def _hand_up(self) -> None:
        """Runs at the end of each turn: what the state has to say, to the portal, the kernel and the caller."""
        while (event := self._state.poll_event()) is not None:
            match event:
                case SendToPortal(message):
                    if self._link is not None:
                        self._link.send(message)
                    continue
                case CheckPortal():
                    if self._link is not None:
                        self._link.probe()
                    continue
                case ResetWanted(reason):
                    self.reset(reason)
                case ForwardQuery() | ResolveName():
                    if self._names is not None:
                        self._names.handle(event)
                    continue
                case FlowLogsConfigured(settings):
                    if self._spool is not None:
                        self._spool.configure(settings)
                    continue
                case TunConfigChanged():
                    self._tun_ips = (event.ipv4.packed, event.ipv6.packed)
                    self._configs.send_nowait(event)
                case ResourcesChanged() if self._names is not None:
                    self._names.flush_caches()
            log_event(event)
            self._tell(event)
        self._store_flow_logs()

    def _store_flow_logs(self) -> None:
        while (record := self._state.flows.poll_record()) is not None:
            log_record(record)
            if self._spool is not None:
                self._spool.put(record)

    async def _finish_flow_logs(self) -> None:
        """Every flow has ended; what is queued gets a few seconds."""
        self._state.flows.shutdown(clock.now())  # done already, unless the loop failed
        self._store_flow_logs()
        if self._spool is not None:
            await trio.to_thread.run_sync(self._spool.close)

    def _tell(self, event: TunnelEvent) -> None:
        try:
            self._sender.send_nowait(event)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            self.missed_events += 1

    def _is_worth_a_line(self, kind: str) -> bool:
        """Whether a minute has passed since the last line of this kind."""
        if clock.now() - self._logged_at.get(kind, -RATE_LIMIT) < RATE_LIMIT:
            return False
        self._logged_at[kind] = clock.now()
        return True

    def _report(self, errors: TunnelErrors) -> None:
        """Drops are counted by the state; a line per kind and minute is enough for people."""
        for error in errors.exceptions:
            kind = str(getattr(error, "reason", None) or getattr(error, "errno", None) or type(error).__name__)
            if isinstance(error, PermissionError) and not self._was_refused:
                self._was_refused = True
                log.info("The host's firewall refuses our datagrams; tunnels may not work", error=str(error))
            if self._is_worth_a_line(kind):
                if isinstance(error, (PacketError, OSError)):
                    log.debug(str(error))
                else:
                    log.error("A message could not be handled", error=repr(error))
        if clock.now() - self._drops_told_at >= DROPS_INTERVAL:
            self._drops_told_at = clock.now()
            self._tell(PacketsDropped(tuple(sorted(self.drops.items()))))


def _side_of(role: Role) -> type[ClientSide | GatewaySide]:
    """Neither end takes the time to import the other's code."""
    if role is Role.CLIENT:
        from fz_core.driver.client_side import ClientSide

        return ClientSide
    from fz_core.driver.gateway_side import GatewaySide

    return GatewaySide


def log_event(event: TunnelEvent) -> None:
    """One line for people."""
    if isinstance(event, TunConfigChanged):
        servers = [server for _, server in event.sentinels]
        log.info("Updating TUN device", ipv4=event.ipv4, ipv6=event.ipv6, routes=len(event.routes), dns=servers)
    elif isinstance(event, ResourcesChanged):
        log.debug("Resources changed", resources=len(event.resources), devices=len(event.devices))
    elif isinstance(event, DnsRecordsChanged):
        log.debug("DNS records changed", names=[record.name for record in event.records])
    else:
        level = log.debug if isinstance(event, DnsDecision) else log.info
        level(type(event).__name__, **{field.name: getattr(event, field.name) for field in fields(event)})


def _login(config: TunnelConfig) -> Login:
    system, system_version, arch, kernel = os_version()
    login = Login(
        config.role.value,
        config.api_url,
        user_agent(system, system_version, COMPONENTS[config.role], config.version, arch, kernel),
        {"external_id": external_id(config.device_id), "name": config.name, **_hardware(config.role)},
        config.token,
    )
    try:
        login.endpoint()
    except BadUrl as error:
        raise ConfigError(str(error)) from None
    return login


def _hardware(role: Role) -> dict[str, str]:
    """What a client tells about its machine, as far as it can be read."""
    if role is not Role.CLIENT:
        return {}
    smbios = read_smbios()
    known = {"device_serial": smbios.serial, "device_uuid": smbios.uuid}
    return {name: value for name, value in known.items() if value is not None}


async def _follow_link_scopes(interface: Interface) -> None:
    """Keep the LAN's own routes ahead of the internet resource while networks come and go."""
    monitor = NetworkMonitor()
    try:
        while True:
            await trio.lowlevel.wait_readable(monitor.fileno())
            while monitor.drain():
                await trio.sleep(DEBOUNCE)
            if interface.families:
                await trio.to_thread.run_sync(interface.sync_link_scope_routes)
    finally:
        monitor.close()


def _open_interface(device: str) -> Interface:
    """In a thread while the portal is called: importing pyroute2 takes a while."""
    from fz_core.linux.netlink import Interface

    interface = Interface(device)
    interface.flush_tables()
    return interface


def _apply(interface: Interface, config: TunConfigChanged) -> None:
    interface.set_addresses(config.ipv4, config.ipv6)
    interface.set_routes(config.routes)
    interface.sync_link_scope_routes()
