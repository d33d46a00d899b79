"""One peer's end of the portal link as a state machine: join, heartbeats, messages, reconnects.

The owner dials when told to (`Connect`), reports what happened (`handle_*`), and sends the texts of
`poll_transmit`. Not here: sockets (`driver/portal`), and what messages mean (`tunnel`).

Source: `spec/portal-protocol.md` §2, §3.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from fz_core.portal.backoff import Backoff
from fz_core.portal.codec import Codec, ParseFailure
from fz_core.portal.framing import Frame, Truncated, parse_frame_untrusted

HEARTBEAT_INTERVAL = 10.0
MAX_UNANSWERED_HEARTBEATS = 3
JOIN_TIMEOUT = 5.0
PROBE_TIMEOUT = 2.0
MAX_QUEUE = 1024


@dataclass(frozen=True, slots=True)
class Connect:
    """Close what is open, wait `delay` seconds, resolve the host anew, and dial."""

    delay: float


@dataclass(frozen=True, slots=True)
class Connected:
    """The room was joined."""


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A typed message of the role."""

    message: Any


@dataclass(frozen=True, slots=True)
class MessageDropped:
    """A frame that is no message for us."""

    event: str
    reason: str


@dataclass(frozen=True, slots=True)
class Hiccup:
    """The link is down and will be tried again in `delay` seconds; `budget` is the total, None for ever."""

    delay: float
    budget: float | None
    error: str


@dataclass(frozen=True, slots=True)
class Fatal:
    """The link is down for good. `is_token_dead`: the portal does not know the token (any more)."""

    error: str
    is_token_dead: bool = False


ChannelEvent = Connect | Connected | MessageReceived | MessageDropped | Hiccup | Fatal


class Channel:
    """State of one link. `budget` is the seconds of delays after a first join; None for ever."""

    def __init__(
        self,
        topic: str,
        outbound: Codec,
        inbound: Codec,
        random_bytes: Callable[[int], bytes],
        *,
        budget: float | None = None,
        join_payload: Any = None,
    ) -> None:
        self._topic, self._outbound, self._inbound = topic, outbound, inbound
        self._random_bytes, self._budget, self._join_payload = random_bytes, budget, join_payload
        self._backoff: Backoff | None = None
        self._was_joined = self._was_hurried = False
        self.is_dead = False
        self._events: deque[ChannelEvent] = deque([Connect(0.0)])
        self._reset()

    def _reset(self) -> None:
        self._open = self.is_joined = False
        self._ref = 0
        self._join_ref: int | None = None
        self._join_due_at: float | None = None
        self._heartbeat_at: float | None = None
        self._heartbeats: set[int] = set()
        self._probe_ref: int | None = None
        self._probe_due_at: float | None = None
        self._queue: deque[tuple[str, Any]] = deque()
        self._out: deque[str] = deque()

    @property
    def is_open(self) -> bool:
        """Whether the WebSocket is thought to be up."""
        return self._open

    @property
    def reconnects_in(self) -> float | None:
        """The delay of a `Connect` that was not polled yet; None without one."""
        return next((e.delay for e in reversed(self._events) if isinstance(e, Connect)), None)

    # what the owner reports

    def handle_connected(self, now: float) -> None:
        """The WebSocket is open."""
        self._reset()
        self._open = True
        self._heartbeat_at = now + HEARTBEAT_INTERVAL
        self._join(now)

    def handle_text(self, text: str, now: float) -> None:
        """A text message arrived."""
        if not self._open:
            return
        try:
            frame = parse_frame_untrusted(text)
        except Truncated as error:
            self._hiccup(str(error), now)
            return
        if frame is None:
            self._events.append(MessageDropped("?", "not a frame"))
        elif frame.event == "phx_reply":
            self._handle_reply(frame, now)
        elif frame.event == "phx_close":
            self._hiccup("the portal closed the channel", now)
        elif frame.event == "disconnect":
            self._handle_disconnect(frame)
        elif frame.event != "phx_error":
            message = self._inbound.parse(frame.event, frame.payload)
            if isinstance(message, ParseFailure):
                self._events.append(MessageDropped(message.event, message.reason))
            else:
                self._events.append(MessageReceived(message))

    def handle_closed(self, error: str, now: float) -> None:
        """Dialling failed, or the WebSocket ended."""
        if self._probe_due_at is not None:
            self._hiccup(error, now, 0.0)
        elif not self.is_dead:
            self._hiccup(error, now)

    def handle_refused(self, status: int, headers: Mapping[str, str], body: str, unix_now: float, now: float) -> None:
        """The portal answered the upgrade with an HTTP status. Header names are lower case."""
        if status == 401:
            code = _problem_code(headers.get("content-type", ""), body)
            self._fail(f"the portal refused the token (401 {code or 'unauthorized'})", code in DEAD_TOKEN_CODES)
            return
        delay = _retry_after(headers.get("retry-after"), unix_now)
        if delay == 0.0 and self._was_hurried:
            delay = None  # a portal that says so for ever would have us spin
        self._was_hurried = delay == 0.0
        self._hiccup(
            f"the portal answered HTTP {status} {_problem_code('problem+json', body) or ''}".strip(),
            now,
            delay,
        )

    # what the owner wants

    def send(self, message: Any, now: float) -> bool:
        """Queue a message; False if dropped, since nothing is kept while the link is down."""
        if not self.is_joined or len(self._queue) >= MAX_QUEUE:
            return False
        item = self._outbound.build(message)
        if item not in self._queue:
            self._queue.append(item)
        return True

    def reconnect(self, now: float) -> None:
        """Start over at once, with a fresh budget (the network changed)."""
        if self.is_joined:
            self._events.append(Hiccup(0.0, self._budget, "starting over on request"))
        self._reset()
        self._backoff = None
        self._events.append(Connect(0.0))

    def probe(self, now: float) -> None:
        """There is reason to doubt the link: have the portal answer within 2 s, or start over at once.

        Nothing happens while the room is not joined, or while a probe is running. Heartbeats go on as before.
        """
        if not self.is_joined or self._probe_due_at is not None:
            return
        self._probe_ref, self._probe_due_at = self._beat(), now + PROBE_TIMEOUT

    def handle_timeout(self, now: float) -> None:
        """Send heartbeats; notice a portal that does not answer."""
        if self._probe_due_at is not None and now >= self._probe_due_at:
            self._hiccup("the portal did not answer a probe within 2 s", now, 0.0)
        if self._open and self._join_due_at is not None and now >= self._join_due_at:
            self._hiccup("the portal did not answer the join within 5 s", now)
        if not self._open or self._heartbeat_at is None or now < self._heartbeat_at:
            return
        self._heartbeat_at = now + HEARTBEAT_INTERVAL
        self._heartbeats.add(self._beat())
        if len(self._heartbeats) > MAX_UNANSWERED_HEARTBEATS:
            self._hiccup("the portal left more than 3 heartbeats unanswered", now)

    def poll_timeout(self) -> float | None:
        """When `handle_timeout` is next due."""
        due = (self._heartbeat_at, self._join_due_at, self._probe_due_at)
        return min((at for at in due if at is not None), default=None) if self._open else None

    def poll_transmit(self) -> str | None:
        """A text to send: control first, messages only once joined."""
        if self._out:
            return self._out.popleft()
        if self.is_joined and self._queue:
            event, payload = self._queue.popleft()
            return Frame(self._topic, event, payload, self._next_ref()).encode()
        return None

    def poll_event(self) -> ChannelEvent | None:
        """What happened."""
        return self._events.popleft() if self._events else None

    # inside

    def _beat(self) -> int:
        ref = self._next_ref()
        self._out.append(Frame("phoenix", "heartbeat", {}, ref).encode())
        return ref

    def _join(self, now: float) -> None:
        self.is_joined = False
        self._probe_ref = self._probe_due_at = None
        self._join_ref = self._next_ref()
        self._join_due_at = now + JOIN_TIMEOUT
        self._out.append(Frame(self._topic, "phx_join", self._join_payload, self._join_ref).encode())

    def _handle_reply(self, frame: Frame, now: float) -> None:
        payload = frame.payload if isinstance(frame.payload, dict) else {}
        if frame.ref is None:
            self._events.append(MessageDropped("phx_reply", "without ref"))
        elif payload.get("status") == "ok":
            self._heartbeats.discard(frame.ref)
            if frame.ref == self._probe_ref:
                self._probe_ref = self._probe_due_at = None
            if frame.ref == self._join_ref and not self.is_joined:
                self.is_joined = self._was_joined = True
                self._was_hurried = False
                self._join_due_at = self._backoff = None
                self._events.append(Connected())
        elif frame.topic == self._topic:
            response = payload.get("response")
            reason = response.get("reason") if isinstance(response, dict) else None
            if frame.ref == self._join_ref and not self.is_joined:
                self._fail(f"the portal refused the join: {reason}", False)
            elif reason == "unmatched topic":
                self._join(now)

    def _handle_disconnect(self, frame: Frame) -> None:
        reason = frame.payload.get("reason") if isinstance(frame.payload, dict) else None
        if reason == "token_expired":
            self._fail("the token has expired or was revoked", True)
        else:
            self._events.append(MessageDropped("disconnect", f"unknown reason {reason}"))

    def _hiccup(self, error: str, now: float, delay: float | None = None) -> None:
        self._reset()
        if delay is None:
            if self._backoff is None:
                self._backoff = Backoff.reconnect(self._budget, self._jitter) if self._was_joined else Backoff.initial()
            delay = self._backoff.next_delay()
        if delay is None:
            self._fail(f"gave up reaching the portal: {error}", False)
            return
        self._events.append(Hiccup(delay, self._backoff.budget if self._backoff else self._budget, error))
        if delay == 0.0:
            self._backoff = None
        self._events.append(Connect(delay))

    def _fail(self, error: str, is_token_dead: bool) -> None:
        self._reset()
        self.is_dead = True
        self._events.append(Fatal(error, is_token_dead))

    def _jitter(self) -> float:
        return int.from_bytes(self._random_bytes(4), "big") / 0xFFFFFFFF

    def _next_ref(self) -> int:
        self._ref += 1
        return self._ref - 1


DEAD_TOKEN_CODES = ("invalid_token", "missing_token")


def _problem_code(content_type: str, body: str) -> str | None:
    if "problem+json" not in content_type:
        return None
    try:
        code = json.loads(body)["code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return code if isinstance(code, str) else None


def _retry_after(value: str | None, unix_now: float) -> float | None:
    if value is None:
        return None
    if value.strip().isdecimal() and len(value) < 10:
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - unix_now)
    except (ValueError, TypeError, OverflowError):
        return None
