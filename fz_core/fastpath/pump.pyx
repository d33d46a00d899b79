"""The pump: a thread that carries established flows between the TUN device and the UDP sockets, without the GIL.

    pump = Pump(tun_fd, wake_fd, seed, merges=True, has_gso=True)
    pump.set_sockets((fd4, port4), (fd6, port6))
    threading.Thread(target=pump.run).start()
    ...
    for record in pump.take():   # what it could not decide; then pump.finish()
    pump.install(...)            # a verdict: from now on the flow needs nobody

Everything is decided elsewhere: the pump knows flows, sessions and ways, and nothing of policy. Whatever does not
fit goes the slow way, in order: a packet never overtakes one of its own flow that the driver still has.
Not here: the driver's side (`driver/carrier`).

Up to three threads share this state: the sending half, the receiving half, and the driver. Each half has a mutex, held
for a batch; who else wants it announces that, so that a busy pump makes room. What belongs to which:
- `_out` to the sending half's and `_in` to the receiving half's: flows, ring, sockets, batches, counters;
- `_peers`, and what the driver says of a peer, to both: a half reads it under its own, only the driver writes it;
- of a peer, `sent_at`, `is_single` and the sending key to the sending half's, `heard_at` and the receiving keys to the
  receiving half's; `is_touched` and `touched` to one each;
- to none, but atomic (`wireguard/shared.pxd`, `fz_get`): a peer's `unheard_since`, its tunnel's `Traffic`, what a session
  counts, a ring's `done`, `barrier` and `dropped`, and all that is called atomic below. A session's replay window has
  a lock of its own, for the driver opens datagrams too;
- to the driver alone: `_held`, `_taken`; to the sending thread alone: `_shows_stall`, `_shown_on`.
"""

cimport cython
from libc.math cimport INFINITY
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from fz_core.fastpath.flows cimport (
    INSTALLED, NONE, PENDING, Flow, FlowKey, FlowTable, flows_enter, flows_find,
)
from fz_core.fastpath.inbound cimport Inbound, inbound_free, inbound_init, inbound_turn
from fz_core.fastpath.notes cimport Note, note_of, notes_copy, notes_sweep
from fz_core.fastpath.outbound cimport Outbound, outbound_forget, outbound_free, outbound_init, outbound_turn
from fz_core.fastpath.peers cimport (
    SESSIONS, Peer, PeerTable, peers_add, peers_free, peers_init, peers_remove, time_of,
)
from fz_core.fastpath.polls cimport (
    EVERYTHING, FROM_TUN, FROM_V4, FROM_V6, Density, Poll, is_dense, poll_close, poll_open, poll_wait, poll_watch,
)
from fz_core.fastpath.rewrite cimport prepare_rewrite
from fz_core.fastpath.ring cimport Ring, ring_bar, ring_is_barred, ring_read
from fz_core.fastpath.system cimport (
    EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, EPOLLIN, EPOLLOUT, SO_TIMESTAMPNS, SOL_SOCKET, fz_add, fz_get, fz_pause,
    fz_set, fz_signal, htons, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t,
    pthread_mutex_unlock, setsockopt,
)
from fz_core.fastpath.ways cimport fill_key, number_of, set_receiver, set_sender, set_way_in, set_way_out
from fz_core.wireguard.session cimport Session
from fz_core.wireguard.shared cimport fz_time_get
from fz_core.wireguard.tunnel cimport Tunnel

import os

cdef enum:
    OUT = 0
    IN = 1
    FEW = 16                   # reads and messages of a turn
    STALL_POLL_MS = 20         # how often a stalled send looks whether its patience has ended

cdef long LINGER = 30_000          # nanoseconds; the kernel makes 80,000 of it
cdef long BARRED_PAUSE = 50_000, POLITE_PAUSE = 20_000


@cython.final
@cython.auto_pickle(False)
cdef class Pump:
    """Both halves and their tables. `run` belongs to one thread (or one for each half), all else to the driver's.

    `wake_fd` is an eventfd that is written when there is something for the driver. The descriptors belong to the
    caller, who keeps them open until `run` has returned.
    """

    cdef Outbound _out
    cdef Inbound _in
    cdef PeerTable _peers
    cdef pthread_mutex_t _locks[2]
    cdef uint64_t _wanted[2]           # somebody waits for the lock; atomic
    cdef uint64_t _is_stopping         # atomic
    cdef uint64_t _tells_activity      # whether the driver wants to know of the next packet; atomic
    cdef uint64_t _taken[2]
    cdef uint64_t _published[2]        # records it was told of
    cdef Poll _waits[2]
    cdef Poll *_polls[2]               # the same one if a single thread serves both
    cdef int _wake
    cdef bint _shows_stall             # whether the poll waits for room instead of packets
    cdef int _shown_on                 # in the socket of this family
    cdef list _held                    # by slot: the tunnel and its sessions, whose memory the pump reads
    cdef readonly int threads

    def __cinit__(self):
        for i in range(2):
            self._waits[i].fd = self._waits[i].kick = -1
        memset(&self._out, 0, sizeof(Outbound))
        memset(&self._in, 0, sizeof(Inbound))
        memset(&self._peers, 0, sizeof(PeerTable))
        pthread_mutex_init(&self._locks[0], NULL)
        pthread_mutex_init(&self._locks[1], NULL)

    def __init__(self, int tun_fd, int wake_fd, bytes seed not None, *, bint merges=True, bint has_gso=True, int threads=1):
        if len(seed) < 16:
            raise ValueError(f"seed of {len(seed)} bytes, use 16 random ones")
        if threads not in (1, 2):
            raise ValueError(f"{threads} threads, use 1 or 2")
        first, second = int.from_bytes(seed[:8], "little"), int.from_bytes(seed[8:16], "little")
        if (peers_init(&self._peers) < 0 or outbound_init(&self._out, &self._peers, first) < 0
                or inbound_init(&self._in, &self._peers, second) < 0):
            raise MemoryError("no memory for the flow tables")
        self.threads = threads
        self._held = []
        self._wake = wake_fd
        self._out.tun = self._in.tun = tun_fd
        self._out.has_gso = has_gso
        self._in.merges = merges
        self._tells_activity = 1
        self._polls[OUT] = &self._waits[0]
        self._polls[IN] = &self._waits[threads - 1]
        if poll_open(self._polls[OUT]) < 0 or (threads == 2 and poll_open(self._polls[IN]) < 0):
            raise OSError("no file descriptors for the pump: raise the limit (ulimit -n)")
        poll_watch(self._polls[OUT], EPOLL_CTL_ADD, tun_fd, EPOLLIN, FROM_TUN)

    def __dealloc__(self):
        poll_close(&self._waits[0])
        poll_close(&self._waits[1])
        outbound_free(&self._out)
        inbound_free(&self._in)
        peers_free(&self._peers)
        pthread_mutex_destroy(&self._locks[0])
        pthread_mutex_destroy(&self._locks[1])

    # the thread

    def run(self, half=None):
        """Carry until `stop`; with two threads each serves the `half` 0 (sending) or 1 (receiving)."""
        cdef bint sends = half != IN
        cdef bint receives = half != OUT
        cdef Density density
        cdef int done, ready = EVERYTHING
        memset(&density, 0, sizeof(Density))
        with nogil:
            while not fz_get(&self._is_stopping):
                done = turn(self, sends, receives, &ready)
                if ready:
                    ready = EVERYTHING  # while one source is busy, all are asked
                elif done and done < FEW and is_dense(&density, done, time_of(&self._peers)):
                    fz_pause(LINGER)
                    ready = EVERYTHING
                else:
                    ready = wait(self, sends, receives)

    def step(self, double now=0.0):
        """One turn of both halves, in the caller's thread: for tests. How many reads and messages there were.

        `now` stands for the kernel's clock from here on, 0 for that itself.
        """
        cdef int done, ready = EVERYTHING
        self._peers.clock = now
        with nogil:
            done = turn(self, True, True, &ready)
        return done

    def stop(self):
        """Let `run` return soon."""
        fz_set(&self._is_stopping, 1)
        kick(self)

    # sockets

    def set_sockets(self, v4, v6):
        """Use these `(descriptor, port)`, None for a family without; the old ones may be closed afterwards."""
        cdef int family
        cdef int one = 1
        lock_both(self)
        for family, socket in enumerate((v4, v6)):
            if self._in.sockets[family] >= 0:
                poll_watch(&self._waits[0], EPOLL_CTL_DEL, self._in.sockets[family], 0, 0)
                poll_watch(&self._waits[1], EPOLL_CTL_DEL, self._in.sockets[family], 0, 0)
            self._in.sockets[family] = self._out.sockets[family] = -1
            if socket is not None:
                self._in.sockets[family] = self._out.sockets[family] = socket[0]
                self._in.ports[family] = htons(<uint16_t>socket[1])
                setsockopt(socket[0], SOL_SOCKET, SO_TIMESTAMPNS, &one, sizeof(one))  # without, no queue is seen
                poll_watch(self._polls[IN], EPOLL_CTL_ADD, socket[0], EPOLLIN, FROM_V4 << family)
        self._out.first = self._out.open_count = 0
        self._out.is_stalled = False
        unlock_both(self)
        kick(self)

    # what the driver gets

    def take(self):
        """Everything that waits for the driver, oldest first for each half.

        Tuples `(kind, peer, local, source, ecn, is_again, data)`: kind 0 is a read from the device, header included, 1 a
        datagram, 2 a packet opened for the peer of this number, 3 a forgery, 4 authentic bytes that are no packet.
        `local` and `source` are `(ip, port)`, None for the device's. `is_again`: it is not the first of its flow, or
        stands for several. After handling them all, and after writing what came of it: `finish`.
        """
        cdef list records = []
        drain(self, IN, records)
        drain(self, OUT, records)
        return records

    def finish(self):
        """Nothing of what was taken is on its way any more: flows may go on without the driver."""
        fz_set(&self._in.ring.done, self._taken[IN])
        fz_set(&self._out.ring.done, self._taken[OUT])

    def notice(self):
        """Have the driver woken by the next packet that is carried; see `take_peers`."""
        fz_set(&self._tells_activity, 1)

    def take_peers(self):
        """`(peer, sent_at, heard_at, unheard_since)` of peers with traffic since the last call; None for never."""
        cdef dict found = {}
        cdef int half
        cdef uint32_t i, slot
        cdef Peer *peer
        cdef double unheard_since
        lock_both(self)
        for half in range(2):
            for i in range(self._peers.touched_count[half]):
                slot = self._peers.touched[half][i]
                peer = self._peers.peers[slot]
                peer.is_touched[half] = False
                unheard_since = fz_time_get(&peer.unheard_since)
                if peer.is_used:
                    found[slot] = (
                        number_of(peer, slot),
                        None if peer.sent_at == -INFINITY else peer.sent_at,
                        None if peer.heard_at == -INFINITY else peer.heard_at,
                        None if unheard_since == INFINITY else unheard_since,
                    )
            self._peers.touched_count[half] = 0
        unlock_both(self)
        return list(found.values())

    def take_flows(self):
        """`(is_inbound, index, packets, payload bytes, last at)` of flows with traffic since the last call."""
        notes: list = []
        collect(self, OUT, &self._out.flows, notes)
        collect(self, IN, &self._in.flows, notes)
        return notes

    def take_refusals(self):
        """`(peer, errno, bytes)` of datagrams the kernel did not take."""
        cdef list refused = []
        cdef int i
        lock(self, OUT)
        for i in range(self._out.refusal_count):
            refused.append((self._out.refusals[i].peer, self._out.refusals[i].error, self._out.refusals[i].size))
        self._out.refusal_count = 0
        unlock(self, OUT)
        return refused

    @property
    def has_failed(self):
        """Whether the device is gone."""
        return fz_get(&self._out.device_failed) != 0

    @property
    def refused_merged(self):
        """Whether the device refused a merged packet, so that each goes alone now."""
        return fz_get(&self._in.refused_merged) != 0

    @property
    def lost(self):
        """Records for the driver that found the ring full."""
        return fz_get(&self._in.ring.dropped) + fz_get(&self._out.ring.dropped)

    def counters(self):
        """What was carried, by the two halves, and what was lost."""
        cdef dict counted
        lock_both(self)
        counted = {
            "out_reads": self._out.reads, "out_packets": self._out.packets, "out_bytes": self._out.bytes,
            "out_calls": self._out.calls, "out_datagrams": self._out.datagrams, "out_dropped": self._out.dropped, "out_signalled": self._out.signalled,
            "in_calls": self._in.calls, "in_datagrams": self._in.datagrams, "in_packets": self._in.packets,
            "in_bytes": self._in.bytes, "in_writes": self._in.writes, "in_oversized": self._in.oversized,
            "in_malformed": self._in.malformed, "in_errors": self._in.errors, "in_signalled": self._in.signalled,
            "in_write_errors": self._in.write_errors,
            "slow_out": self._out.ring.produced, "slow_in": self._in.ring.produced, "slow_lost": self.lost,
            "flows_out": self._out.flows.count, "flows_in": self._in.flows.count,
            "evictions": self._out.flows.evictions + self._in.flows.evictions,
        }  # fmt: skip
        unlock_both(self)
        return counted

    # peers

    def add_peer(self, uint32_t index):
        """A number for the peer whose receiver indices begin with these 24 bits; None where there is no room."""
        cdef uint32_t slot
        lock_both(self)
        slot = peers_add(&self._peers, index)
        unlock_both(self)
        if slot == NONE:
            return None
        while len(self._held) <= slot:
            self._held.append(None)
        return number_of(self._peers.peers[slot], slot)

    def set_peer(self, uint32_t number, Tunnel tunnel not None, send, double send_until, receive, int limit):
        """How a peer's data travels now: its sessions, `(remote ip, port, local ip or None, channel)` both ways.

        `send` or `receive` is None where the slow path must do it. Packets of more than `limit` bytes are slow too.
        """
        cdef uint32_t slot = self._slot_of(number)
        cdef Peer *peer = self._peers.peers[slot]
        cdef Session session
        cdef int i
        cdef list sessions = [tunnel.current]
        lock_both(self)
        try:
            set_sender(peer, tunnel.current)
            for i in range(SESSIONS):
                session = tunnel._sessions[i]
                set_receiver(&peer.receivers[i], session)
                sessions.append(session)
            self._held[slot] = tunnel, sessions
            peer.traffic = &tunnel.timers.traffic
            peer.limit = limit
            peer.send_until = send_until
            set_way_out(peer, send)
            set_way_in(peer, receive)
            if self._in.ring.produced > fz_get(&self._in.ring.done):
                # What the pump opens from now on must not overtake datagrams that it handed over before.
                ring_bar(&self._in.ring, self._in.ring.produced, time_of(&self._peers))
        finally:
            unlock_both(self)

    def remove_peer(self, uint32_t number):
        """The connection is gone, with all its flows."""
        cdef uint32_t slot = self._slot_of(number)
        lock_both(self)
        peers_remove(&self._peers, slot)
        outbound_forget(&self._out, slot)
        unlock_both(self)
        self._held[slot] = None

    cdef uint32_t _slot_of(self, uint32_t number) except? 0xFFFFFFFF:
        cdef uint32_t slot = number & 0xFFFF
        if slot >= self._peers.used or not self._peers.peers[slot].is_used:
            raise KeyError(number)
        if self._peers.peers[slot].serial != number >> 16:
            raise KeyError(number)
        return slot

    # flows

    def install(self, bint is_inbound, uint32_t number, before, after, double ttl, double until):
        """Carry a flow of the peer with this number: packets like `before` become packets like `after`.

        Both are `(version, protocol, src, dst, src_port, dst_port)`. The flow is decided anew after `ttl` seconds
        without a packet, and at `until`. Returns the flow's index for `take_flows`, and what is still to be noted
        of the verdict it had before, `(packets, payload bytes, last at)` or None.
        """
        cdef int half = IN if is_inbound else OUT
        cdef FlowTable *table = &self._in.flows if is_inbound else &self._out.flows
        cdef Ring *ring = &self._in.ring if is_inbound else &self._out.ring
        cdef FlowKey key
        cdef Flow *flow
        cdef uint32_t index
        cdef uint32_t slot = self._slot_of(number)
        cdef object note
        fill_key(&key, before, slot if is_inbound else 0)
        lock(self, half)
        index = flows_enter(table, &key)
        flow = &table.flows[index]
        note = note_of(flow)
        fill_key(&flow.after, after, 0)
        prepare_rewrite(flow)
        flow.state = INSTALLED
        flow.peer = slot
        flow.generation = table.generation
        flow.peer_generation = self._peers.peers[slot].generation
        flow.ttl = ttl
        flow.until = until
        flow.last_at = time_of(&self._peers)
        flow.is_referenced = 1
        if flow.diverted > self._taken[half]:
            # More of it came while the first packet was decided about: read nothing until the driver has seen that.
            ring_bar(ring, flow.diverted, flow.last_at)
        unlock(self, half)
        return index, note

    def remove(self, bint is_inbound, uint32_t number, before):
        """A verdict is void. None if there is none, else what `install` returns."""
        cdef object note = None
        cdef bint found
        cdef int half = IN if is_inbound else OUT
        cdef FlowTable *table = &self._in.flows if is_inbound else &self._out.flows
        cdef FlowKey key
        cdef uint32_t index
        cdef uint32_t slot = self._slot_of(number)
        fill_key(&key, before, slot if is_inbound else 0)
        lock(self, half)
        index = flows_find(table, &key)
        found = index != NONE and table.flows[index].state == INSTALLED
        if found:
            note = note_of(&table.flows[index])
            table.flows[index].state = PENDING
        unlock(self, half)
        return (index, note) if found else None

    def sweep(self, uint32_t most):
        """Forget what has lapsed, looking at `most` flows of each half; `(is_inbound, index, note)` of each."""
        cdef list gone = []
        cdef double now = time_of(&self._peers)
        lock(self, OUT)
        notes_sweep(&self._out.flows, &self._peers, fz_get(&self._out.ring.done), most, now, False, gone)
        unlock(self, OUT)
        lock(self, IN)
        notes_sweep(&self._in.flows, &self._peers, fz_get(&self._in.ring.done), most, now, True, gone)
        unlock(self, IN)
        return gone

    def void_all(self):
        """Every verdict is void."""
        lock_both(self)
        self._in.flows.generation += 1
        self._out.flows.generation += 1
        unlock_both(self)

    def void_peer(self, uint32_t number):
        """Every verdict about this peer is void."""
        cdef uint32_t slot = self._slot_of(number)
        lock_both(self)
        self._peers.peers[slot].generation += 1
        unlock_both(self)


# the thread's work


cdef int turn(Pump self, bint sends, bint receives, int *ready) noexcept nogil:
    """Every source that is ready, once, up to a budget; how much there was, and which sources may have more."""
    cdef int done = 0, more = 0
    cdef double now = time_of(&self._peers)
    if receives and ready[0] & (FROM_V4 | FROM_V6):
        done += turn_in(self, ready[0], &more, now)
    if sends and ready[0] & FROM_TUN:
        done += turn_out(self, &more, now)
    ready[0] = more
    if done and fz_get(&self._tells_activity):
        fz_set(&self._tells_activity, 0)
        fz_signal(self._wake)
    return done


cdef int turn_in(Pump self, int ready, int *more, double now) noexcept nogil:
    cdef int done = 0, family
    give_way(self, IN)
    pthread_mutex_lock(&self._locks[IN])
    if not ring_is_barred(&self._in.ring, now):
        for family in range(2):
            if self._in.sockets[family] >= 0 and ready & (FROM_V4 << family):
                done += inbound_turn(&self._in, family, now)
                if self._in.was_full:
                    more[0] |= FROM_V4 << family
    publish(self, IN, &self._in.ring)
    pthread_mutex_unlock(&self._locks[IN])
    return done


cdef int turn_out(Pump self, int *more, double now) noexcept nogil:
    cdef int done = 0
    give_way(self, OUT)
    pthread_mutex_lock(&self._locks[OUT])
    if not ring_is_barred(&self._out.ring, now):
        done = outbound_turn(&self._out, now)
        if not self._out.is_drained and not self._out.is_stalled:
            more[0] |= FROM_TUN
    if self._out.is_stalled != self._shows_stall or (self._shows_stall and self._out.stalled_on != self._shown_on):
        show_stall(self)
    publish(self, OUT, &self._out.ring)
    if fz_get(&self._out.device_failed):
        fz_set(&self._is_stopping, 1)
        fz_signal(self._wake)
    pthread_mutex_unlock(&self._locks[OUT])
    return done


cdef inline void give_way(Pump self, int half) noexcept nogil:
    """A mutex is not fair: who unlocks and locks again at once keeps all others out."""
    while fz_get(&self._wanted[half]):
        fz_pause(POLITE_PAUSE)


cdef inline void publish(Pump self, int half, Ring *ring) noexcept nogil:
    """Everything before these records is written: now the driver may have them."""
    if ring.produced != self._published[half]:
        self._published[half] = ring.produced
        fz_signal(self._wake)


cdef int wait(Pump self, bint sends, bint receives) noexcept nogil:
    """Until something is ready; what."""
    cdef bint is_stalled = sends and self._shows_stall
    cdef int ready
    if (sends and fz_get(&self._out.ring.barrier)) or (receives and fz_get(&self._in.ring.barrier)):
        fz_pause(BARRED_PAUSE)
        return EVERYTHING
    ready = poll_wait(self._polls[OUT if sends else IN], STALL_POLL_MS if is_stalled else -1)
    return EVERYTHING if is_stalled else ready


cdef void show_stall(Pump self) noexcept nogil:
    """While a socket is full, wait for room in it instead of packets from the device."""
    cdef int family, fd
    cdef bint is_full
    self._shows_stall, self._shown_on = self._out.is_stalled, self._out.stalled_on
    poll_watch(self._polls[OUT], EPOLL_CTL_MOD, self._out.tun, 0 if self._shows_stall else EPOLLIN, FROM_TUN)
    for family in range(2):
        fd = self._out.sockets[family]
        is_full = self._shows_stall and family == self._shown_on
        if fd >= 0 and self.threads == 1:
            poll_watch(self._polls[OUT], EPOLL_CTL_MOD, fd, EPOLLIN | EPOLLOUT if is_full else EPOLLIN, FROM_V4 << family)
        elif fd >= 0:
            poll_watch(self._polls[OUT], EPOLL_CTL_ADD if is_full else EPOLL_CTL_DEL, fd, EPOLLOUT, FROM_TUN)


# the driver's side of the locks


cdef void kick(Pump self) noexcept nogil:
    """Have each thread look at everything: one eventfd for both would wake one of them only."""
    fz_signal(self._polls[OUT].kick)
    if self.threads == 2:
        fz_signal(self._polls[IN].kick)


cdef void lock(Pump self, int half) noexcept:
    with nogil:
        fz_add(&self._wanted[half], 1)
        pthread_mutex_lock(&self._locks[half])
        fz_add(&self._wanted[half], <uint64_t>-1)


cdef void unlock(Pump self, int half) noexcept:
    pthread_mutex_unlock(&self._locks[half])


cdef void lock_both(Pump self) noexcept:
    lock(self, OUT)
    lock(self, IN)


cdef void unlock_both(Pump self) noexcept:
    unlock(self, IN)
    unlock(self, OUT)


# records and notes


cdef int drain(Pump self, int half, list records) except -1:
    """Change the buffers, then read at leisure."""
    cdef Ring *ring = &self._in.ring if half == IN else &self._out.ring
    cdef uint64_t filled
    lock(self, half)
    ring.filling, ring.taken = ring.taken, ring.filling
    filled, ring.filled = ring.filled, 0
    self._taken[half] = ring.produced
    unlock(self, half)
    return ring_read(ring, filled, records)


cdef int collect(Pump self, int half, FlowTable *table, list notes) except -1:
    """Copy what there is, then tell at leisure."""
    cdef uint32_t count = 0
    cdef Note *found
    lock(self, half)
    found = notes_copy(table, &count)
    unlock(self, half)
    for i in range(count):
        notes.append((half == IN, found[i].index, found[i].packets, found[i].bytes, found[i].last_at))
    free(found)
    return 0
