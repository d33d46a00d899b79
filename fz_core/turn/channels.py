"""Channel numbers of one allocation: which peer has which, since when, and when to refresh.

Rules (spec/connectivity.md section 3.7): numbers 0x4000 to 0x4FFF, handed out in a ring; a binding lasts
600 s; the same peer may revive its number for another 300 s; after that the number is free. A binding is
refreshed from the age of 300 s on, and only if data came in over it.
"""

from __future__ import annotations

from fz_core.packet import Address

FIRST_CHANNEL = 0x4000
LAST_CHANNEL = 0x4FFF
CHANNEL_LIFETIME = 600.0
REBIND_TIMEOUT = 300.0
REFRESH_AGE = 300.0
NEVER = float("inf")


class Channel:
    """One number and its peer. `bound_at` is the last confirmed bind, None before the first."""

    def __init__(self, number: int, peer: Address, now: float) -> None:
        self.number = number
        self.peer = peer
        self.requested_at = now
        self.bound_at: float | None = None
        self.is_in_flight = True
        self.received_at: float | None = None

    def can_send(self, now: float) -> bool:
        """Optimistic: also while the bind is in flight."""
        return self.is_in_flight or (self.bound_at is not None and now < self.bound_at + CHANNEL_LIFETIME)

    def refresh_at(self) -> float | None:
        """When to bind again, if at all."""
        if self.is_in_flight or self.bound_at is None or self.received_at is None:
            return None
        return self.bound_at + REFRESH_AGE

    @property
    def free_at(self) -> float:
        """From when on another peer may get the number.

        Data received late shows that the relay still holds the binding.
        """
        if self.is_in_flight or self.bound_at is None:
            return NEVER
        ends_at = self.bound_at + CHANNEL_LIFETIME + REBIND_TIMEOUT
        return ends_at if self.received_at is None else max(ends_at, self.received_at + REBIND_TIMEOUT)


class Channels:
    """The channels of one allocation, by number and by peer."""

    def __init__(self) -> None:
        self._by_number: dict[int, Channel] = {}
        self._by_peer: dict[Address, Channel] = {}
        self._next = FIRST_CHANNEL
        self._refresh_at: float | None = None
        self._is_refresh_known = True
        self._full_until = 0.0
        self._changed: set[Address] = set()

    def __len__(self) -> int:
        return len(self._by_number)

    def request(self, peer: Address, now: float) -> Channel | None:
        """The channel to bind for `peer`; None if nothing is to be sent, or no number is left."""
        channel = self._by_peer.get(peer)
        if channel is not None:
            if channel.can_send(now):
                return None
            if now < channel.free_at:
                return self.begin(channel, now)
            self._drop(channel)
        number = self._next_number(now)
        if number is None:
            return None
        channel = Channel(number, peer, now)
        self._by_number[number] = channel
        self._by_peer[peer] = channel
        return channel

    def begin(self, channel: Channel, now: float) -> Channel:
        """A bind for this known channel is being sent."""
        self._stop_refresh(channel)
        channel.is_in_flight = True
        channel.requested_at = now
        return channel

    def confirm(self, number: int, now: float) -> None:
        """The relay accepted the bind."""
        channel = self._by_number.get(number)
        if channel is None:
            return
        self._stop_refresh(channel)
        channel.is_in_flight = False
        channel.bound_at = now
        channel.received_at = None
        self._changed.add(channel.peer)

    def reject(self, number: int) -> None:
        """The relay refused the bind: nothing remains of it."""
        channel = self._by_number.get(number)
        if channel is not None:
            self._drop(channel)

    def clear(self) -> None:
        """The allocation is gone."""
        self._changed.update(self._by_peer)
        self._by_number.clear()
        self._by_peer.clear()
        self._next = FIRST_CHANNEL
        self._refresh_at = None
        self._is_refresh_known = True
        self._full_until = 0.0

    def number_to(self, peer: Address, now: float) -> int | None:
        """The number to send to `peer` with."""
        channel = self._by_peer.get(peer)
        return channel.number if channel is not None and channel.can_send(now) else None

    def receive(self, number: int, now: float) -> Address | None:
        """Data came in: its peer, if the channel was ever confirmed."""
        channel = self._by_number.get(number)
        if channel is None or channel.bound_at is None:
            return None
        is_first, channel.received_at = channel.received_at is None, now
        refresh_at = channel.refresh_at() if is_first else None
        if refresh_at is not None and (self._refresh_at is None or refresh_at < self._refresh_at):
            self._refresh_at = refresh_at
        return channel.peer

    def confirmed_to(self, peer: Address) -> Channel | None:
        """The channel to `peer` if the relay ever confirmed it; its end may have passed."""
        channel = self._by_peer.get(peer)
        return None if channel is None or channel.bound_at is None else channel

    def peer_of(self, number: int) -> Address | None:
        """Whose channel this is, if it was ever confirmed."""
        channel = self._by_number.get(number)
        return None if channel is None or channel.bound_at is None else channel.peer

    def note_received(self, peer: Address, at: float) -> None:
        """Data came in over the channel to `peer`, maybe a while ago: before its last bind it does not count."""
        channel = self.confirmed_to(peer)
        if channel is not None and channel.bound_at is not None and at >= channel.bound_at:
            self.receive(channel.number, at if channel.received_at is None else max(at, channel.received_at))

    def poll_change(self) -> Address | None:
        """A peer whose channel was confirmed, or is gone."""
        return self._changed.pop() if self._changed else None

    def due(self, now: float) -> list[Channel]:
        """Channels to refresh now; none is a common and cheap answer."""
        at = self.next_refresh_at()
        if at is None or at > now:
            return []
        due = []
        for channel in self._by_number.values():
            refresh_at = channel.refresh_at()
            if refresh_at is not None and refresh_at <= now:
                if channel.can_send(now):
                    due.append(channel)
                else:
                    channel.received_at = None  # expired: a later send revives it, no timer does
        self._is_refresh_known = False
        return due

    def next_refresh_at(self) -> float | None:
        """The earliest refresh; computed anew only after the channel that it was for has changed."""
        if not self._is_refresh_known:
            times = (channel.refresh_at() for channel in self._by_number.values())
            self._refresh_at = min((at for at in times if at is not None), default=None)
            self._is_refresh_known = True
        return self._refresh_at

    def _stop_refresh(self, channel: Channel) -> None:
        """This channel is about to change, and is not to be refreshed then."""
        if self._refresh_at is not None and channel.refresh_at() == self._refresh_at:
            self._is_refresh_known = False

    def _drop(self, channel: Channel) -> None:
        self._stop_refresh(channel)
        self._full_until = 0.0
        del self._by_number[channel.number]
        if self._by_peer.get(channel.peer) is channel:
            del self._by_peer[channel.peer]
            self._changed.add(channel.peer)

    def _next_number(self, now: float) -> int | None:
        if now < self._full_until:
            return None
        for _ in range(FIRST_CHANNEL, LAST_CHANNEL + 1):
            number = self._next
            self._next = FIRST_CHANNEL if number == LAST_CHANNEL else number + 1
            old = self._by_number.get(number)
            if old is None:
                return number
            if now >= old.free_at:
                self._drop(old)
                return number
        # A bind in flight, should it be confirmed, holds its number for the longest time from now.
        longest = now + CHANNEL_LIFETIME + REBIND_TIMEOUT
        self._full_until = min(longest, *(channel.free_at for channel in self._by_number.values()))
        return None
