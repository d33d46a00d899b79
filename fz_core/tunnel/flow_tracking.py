"""Whether flows are tracked, and under whose tokens (`spec/tunnel.md` §19); the state's side of flow logs.

    tracking = FlowTracking("gateway", unix_epoch, has_spool=True)
    tracking.configure(init.flow_logs, now)
    tracking.learn(client_id, resource_id, message.ingest_token)
    if tracking.tracker is not None:                    # all that a packet costs while nobody asks
        tracking.note_tx(client_id, resource_id, packet, node.path(client_id), now, domain=name)

Not here: what a flow is (`flows`). Tokens are kept while tracking is off too, since it may be turned on later.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

from fz_core.node.connection import Path
from fz_core.packet import Packet
from fz_core.portal.types import NO_FLOW_LOGS, FlowLogs
from fz_core.tunnel.flow_record import FlowRecord, IngestToken
from fz_core.tunnel.flows import FlowTracker
from fz_core.tunnel.verdict import Verdict


class FlowTracking:
    """Tracks while the portal wants uploads and there is a spool for them, or while `is_local`: the log wants them.

    With either, somebody must drain `poll_record`. Verdicts that stood on a flow that ended are in `revoked`.
    """

    def __init__(
        self,
        role: Literal["client", "gateway"],
        unix_epoch: float,
        *,
        is_local: bool = False,
        has_spool: bool = False,
    ) -> None:
        self._role: Literal["client", "gateway"] = role
        self._unix_epoch = unix_epoch
        self._is_local, self._has_spool = is_local, has_spool
        self._settings = NO_FLOW_LOGS
        # As text until the first flow needs it: most grants of a big gateway are idle.
        self._tokens: dict[str, dict[tuple[str, bool], str | IngestToken | None]] = {}
        self._records: deque[FlowRecord] = deque()
        self.revoked: list[Verdict] = []
        self.tracker: FlowTracker | None = self._new_tracker() if is_local else None

    def configure(self, settings: FlowLogs, now: float) -> bool:
        """What the portal's `init` says, and whether it is new. Turning tracking off ends every flow."""
        is_new, self._settings = settings != self._settings, settings
        is_wanted = self._is_local or (self._has_spool and settings.upload_interval_secs > 0)
        if is_wanted and self.tracker is None:
            self.tracker = self._new_tracker()
        elif not is_wanted and self.tracker is not None:
            self.shutdown(now)
            while (record := self.tracker.poll_record()) is not None:
                self._records.append(record)
            self.tracker = None
        return is_new

    # access

    def learn(self, peer_id: str, resource_id: str, token: str, *, opened_by_peer: bool = False) -> None:
        """Access was authorized with this token; a flow keeps the token it started under."""
        if self._is_local or self._has_spool:
            self._tokens.setdefault(peer_id, {})[resource_id, opened_by_peer] = token

    def end_access(self, peer_id: str, resource_id: str, now: float, *, opened_by_peer: bool = False) -> None:
        """The access is gone: nothing starts under its token; on a gateway its flows end now."""
        tokens = self._tokens.get(peer_id, {})
        tokens.pop((resource_id, opened_by_peer), None)
        if not tokens:
            self._tokens.pop(peer_id, None)
        if self.tracker is not None and self._role == "gateway":
            self.tracker.end_scope((peer_id, resource_id), now)

    def end_peer(self, peer_id: str, now: float) -> None:
        """The peer is forgotten with all access."""
        self._tokens.pop(peer_id, None)
        if self.tracker is not None:
            self.tracker.end_peer(peer_id, now)

    def shutdown(self, now: float) -> None:
        """Every flow ends."""
        if self.tracker is not None:
            self.tracker.shutdown(now)

    # packets, while there is a tracker

    def note_tx(
        self,
        peer_id: str,
        resource_id: str,
        packet: Packet,
        path: Path | None,
        now: float,
        *,
        domain: str | None = None,
        opened_by_peer: bool = False,
    ) -> None:
        """A packet from the initiator to this resource passed; see `FlowTracker.handle_tx`."""
        if self.tracker is None:
            return
        token = self._token(peer_id, (resource_id, opened_by_peer))
        scope = (peer_id, resource_id) if self._role == "gateway" else peer_id
        self.tracker.handle_tx(scope, packet, token, path, now, domain=domain, opened_by_peer=opened_by_peer)

    def support(self, verdict: Verdict, *, is_tx: bool) -> bool:
        """Whether a flow table may carry what a verdict is about; what it carries will be counted.

        False while the next packet may start a flow: that needs a token, and where one is learnt verdicts are void.
        """
        if self.tracker is None or self.tracker.support(verdict, is_tx=is_tx):
            return True
        return not self.tracker.has_flows(verdict.peer_id) and not any(self._tokens.get(verdict.peer_id, {}).values())

    def _token(self, peer_id: str, key: tuple[str, bool]) -> IngestToken | None:
        tokens = self._tokens.get(peer_id, {})
        token = tokens.get(key)
        if isinstance(token, str):
            token = tokens[key] = IngestToken.parse(token)
        return token

    # time and output

    def handle_timeout(self, now: float) -> None:
        """End flows whose time has come."""
        if self.tracker is not None:
            self.tracker.handle_timeout(now)

    def poll_timeout(self) -> float | None:
        """When to look again."""
        return None if self.tracker is None else self.tracker.poll_timeout()

    def poll_record(self) -> FlowRecord | None:
        """Something to log and report."""
        if self._records:
            return self._records.popleft()
        return None if self.tracker is None else self.tracker.poll_record()

    def _new_tracker(self) -> FlowTracker:
        return FlowTracker(self._role, self._unix_epoch, revoked=self.revoked)
