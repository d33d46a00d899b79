# The anti-replay window of one session, as a C struct a caller without the GIL may use.

from libc.stdint cimport uint64_t

from fz_core.wireguard.shared cimport fz_word_get, fz_word_set

cdef enum:
    WINDOW = 8192
    WORDS = 129            # WINDOW / 64, and one word that is being overwritten

ctypedef struct ReplayWindow:
    uint64_t next          # highest counter seen, plus one; 0 before the first
    uint64_t seen[WORDS]   # ring of bits; counter c is bit c % 64 of word (c / 64) % WORDS


cdef inline bint replay_is_fresh(const ReplayWindow *window, uint64_t counter) noexcept nogil:
    """Whether the counter is neither seen nor behind the window. Changes nothing.

    Beside a `replay_mark` it may call fresh what is not: ask again under the lock. What it calls stale is stale.
    """
    cdef uint64_t next = fz_word_get(&window.next)
    if counter >= next:
        return counter < <uint64_t>0xFFFFFFFFFFFFDFFF   # REJECT_AFTER_MESSAGES, paper section 6.1
    if next - counter > WINDOW:
        return False
    return not (fz_word_get(&window.seen[(counter >> 6) % WORDS]) >> (counter & 63)) & 1


cdef inline void replay_mark(ReplayWindow *window, uint64_t counter) noexcept nogil:
    """Note an authenticated counter that was fresh."""
    cdef uint64_t word, last, steps
    if counter >= window.next:
        word = counter >> 6
        last = (window.next - 1) >> 6 if window.next else 0
        steps = word - last
        if steps > WORDS:
            steps = WORDS
        while steps:
            fz_word_set(&window.seen[(word - steps + 1) % WORDS], 0)
            steps -= 1
        fz_word_set(&window.next, counter + 1)
    word = (counter >> 6) % WORDS
    fz_word_set(&window.seen[word], window.seen[word] | <uint64_t>1 << (counter & 63))
