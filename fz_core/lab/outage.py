"""How long a tunnel was out: probes through it at a steady pace, each from a socket of its own.

    with Prober(client.host, "10.20.0.80") as prober:
        prober.wait_for_answer(20)
        began_at = time.monotonic()
        ...                                            # what goes wrong
        outage = prober.settle(began_at, watch=4, within=60)

An outage is the longest time between two answers, less the pace: what somebody on a call would miss. It is right to
about the pace, 20 ms, on an idle machine. `first_byte` measures a single exchange instead, after silence.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from itertools import pairwise
from types import TracebackType

from fz_core.lab.processes import LabError
from fz_core.lab.servers import ECHO_PORT
from fz_core.lab.topology import Host

PACE = 0.02
PATIENCE = 3.0  # an answer after this is not waited for: its question has long been asked again
STEADY = 1.5  # seconds of answers after which an outage counts as over
PAYLOAD = struct.Struct("!Q56x")


class Record:
    """What was asked and answered, one question every `pace` seconds."""

    def __init__(self, pace: float = PACE) -> None:
        self.pace = pace
        self.asked: list[float] = []  # when question n was asked
        self.answers: list[tuple[float, int]] = []  # when which one was answered

    def answered_at(self, asked_after: float) -> float | None:
        """When the first answer came to a question asked after this instant."""
        return next((at for at, number in list(self.answers) if self.asked[number] >= asked_after), None)

    def outage(self, since: float, until: float) -> float:
        """The longest time without answers between these instants."""
        return max(self.gaps(since, until), default=0.0)

    def gaps(self, since: float, until: float, least: float = 0.0) -> list[float]:
        """All times without answers of at least this many seconds, in order."""
        times = [at for at, _ in list(self.answers) if at <= until]
        before = max((at for at in times if at <= since), default=since)
        instants = [before, *(at for at in times if at > since), until]
        found = (max(0.0, b - a - self.pace) for a, b in pairwise(instants))
        return [gap for gap in found if gap >= least]

    def share(self, since: float, until: float) -> float:
        """Which share of the questions asked between these instants was answered."""
        answers = {number for _, number in list(self.answers)}
        asked = [number for number, at in enumerate(list(self.asked)) if since <= at < until]
        return sum(number in answers for number in asked) / len(asked) if asked else 0.0


class Prober(Record):
    """Asks the echo server at `target`, from the machine `host`, until stopped."""

    def __init__(self, host: Host, target: str, pace: float = PACE) -> None:
        super().__init__(pace)
        self._host, self._target = host, target
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.repeated = 0  # answers to what was answered before

    def __enter__(self) -> Prober:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ask no more."""
        self._stop.set()
        self._thread.join()

    def wait_for_answer(self, within: float, asked_after: float = 0.0) -> float:
        """When the first answer came to a question asked after this instant. LabError if none comes."""
        deadline = time.monotonic() + within
        while (at := self.answered_at(asked_after)) is None:
            if time.monotonic() > deadline:
                raise LabError(f"nothing came within {within:.0f} s")
            time.sleep(self.pace)
        return at

    def settle(self, since: float, watch: float = 4.0, within: float = 90.0) -> float:
        """The outage since this instant, once answers have been steady and `watch` seconds have gone.

        LabError if they are not steady `within` this many seconds.
        """
        deadline = since + within
        while True:
            time.sleep(0.1)
            now = time.monotonic()
            if now >= since + watch and self.share(now - STEADY, now - 0.3) > 0.9:
                return self.outage(since, now)
            if now > deadline:
                last = max((at for at, _ in list(self.answers)), default=0.0)
                state = f"{self.share(now - STEADY, now - 0.3):.0%} of probes are answered"
                raise LabError(f"not back within {within:.0f} s: {state}, the last one {now - last:.1f} s ago")

    def _run(self) -> None:
        """Sockets belong to the machine the thread is in."""
        poll = select.epoll()
        open_sockets: dict[int, tuple[socket.socket, int]] = {}
        answered: set[int] = set()
        oldest = 0
        waiting: dict[int, socket.socket] = {}
        family = socket.AF_INET6 if ":" in self._target else socket.AF_INET
        with self._host.entered():
            next_at = time.monotonic()
            while not self._stop.is_set():
                for fd, _ in poll.poll(max(0.0, next_at - time.monotonic())):
                    self._receive(*open_sockets[fd], answered)
                now = time.monotonic()
                if now < next_at:
                    continue
                next_at = max(next_at + self.pace, now)
                number = len(self.asked)
                self.asked.append(now)
                sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
                try:
                    sock.connect((self._target, ECHO_PORT))
                    sock.send(PAYLOAD.pack(number))
                except OSError:  # no way there, for now
                    sock.close()
                    continue
                waiting[number] = sock
                open_sockets[sock.fileno()] = sock, number
                poll.register(sock, select.EPOLLIN)
                while oldest < number and self.asked[oldest] < now - PATIENCE:
                    old = waiting.pop(oldest, None)
                    if old is not None:
                        del open_sockets[old.fileno()]
                        old.close()
                    oldest += 1
        for sock in waiting.values():
            sock.close()
        poll.close()

    def _receive(self, sock: socket.socket, number: int, answered: set[int]) -> None:
        try:
            sock.recv(2048)
        except OSError:  # refused, unreachable: no answer
            return
        if number in answered:
            self.repeated += 1
            return
        answered.add(number)
        self.answers.append((time.monotonic(), number))


def first_byte(host: Host, target: str, within: float = 20.0) -> float:
    """How long it takes to connect to the echo server and get one byte back."""
    began_at = time.monotonic()
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with host.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(within)
        try:
            sock.connect((target, ECHO_PORT))
            sock.sendall(b"?")
            if sock.recv(1) != b"?":
                raise LabError("the echo server ended the connection")
        except OSError as error:
            raise LabError(f"no first byte within {within:.0f} s: {error}") from None
    return time.monotonic() - began_at
