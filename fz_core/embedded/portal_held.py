"""Requests that need not fail: their gateway is about to come back, or about to say what it can do."""

from __future__ import annotations

from collections.abc import Callable

from fz_core.embedded.portal_hub import Hub
from fz_core.embedded.portal_session import Session
from fz_core.portal.client import RequestAuthorization

MAX_HELD = 1024
Ask = Callable[[Session, RequestAuthorization, float], None]


class HeldRequests:
    """Each is asked again by `ask` whenever something about gateways changed, and at the latest at its deadline."""

    def __init__(self, hub: Hub, ask: Ask) -> None:
        self._hub, self._ask = hub, ask
        self._held: dict[tuple[int, str], tuple[Session, RequestAuthorization]] = {}

    def hold(self, client: Session, message: RequestAuthorization, until: float) -> bool:
        """Keep a request until then; False if there are too many."""
        key = (client.id, message.resource_id)
        if key not in self._held and len(self._held) >= MAX_HELD:
            return False
        self._held[key] = (client, message)
        self._hub.timers.set(self._timer(client, message.resource_id), until)
        return True

    def is_held(self, client: Session, resource_id: str) -> bool:
        """Whether a client waits for this resource."""
        return (client.id, resource_id) in self._held

    def drop(self, client: Session, resource_id: str) -> None:
        """Forget a request."""
        if self._held.pop((client.id, resource_id), None) is not None:
            self._hub.timers.cancel(self._timer(client, resource_id))

    def drop_all_of(self, client: Session) -> None:
        """Forget what a client asked for."""
        for client_id, resource_id in list(self._held):
            if client_id == client.id:
                self.drop(client, resource_id)

    def retry(self, now: float) -> None:
        """Ask all again; some may be held again."""
        for client, message in list(self._held.values()):
            self._release(client, message, now)

    def handle_due(self, client_id: int, resource_id: str, now: float) -> None:
        """The time of one is over."""
        found = self._held.get((client_id, resource_id))
        if found is not None:
            self._release(*found, now)

    def _release(self, client: Session, message: RequestAuthorization, now: float) -> None:
        self.drop(client, message.resource_id)
        if client.is_joined:
            self._ask(client, message, now)

    @staticmethod
    def _timer(client: Session, resource_id: str) -> tuple[str, str, str]:
        return ("held", str(client.id), resource_id)
