# Numbers that several threads read and write without a lock (relaxed atomics): each access is whole, and says nothing
# about other memory. On x86-64 and AArch64 they cost what plain loads and stores do.

from libc.stdint cimport uint64_t

cdef extern from *:
    """
    static inline double fz_time_get(const double *at) {
        double value;
        __atomic_load(at, &value, __ATOMIC_RELAXED);
        return value;
    }
    static inline void fz_time_set(double *at, double value) {
        __atomic_store(at, &value, __ATOMIC_RELAXED);
    }
    #define fz_word_get(at) __atomic_load_n(at, __ATOMIC_RELAXED)
    #define fz_word_set(at, value) __atomic_store_n(at, value, __ATOMIC_RELAXED)
    #define fz_flag_get(at) __atomic_load_n(at, __ATOMIC_RELAXED)
    #define fz_flag_set(at, value) __atomic_store_n(at, value, __ATOMIC_RELAXED)
    """
    double fz_time_get(const double *at) noexcept nogil
    void fz_time_set(double *at, double value) noexcept nogil
    uint64_t fz_word_get(const uint64_t *at) noexcept nogil
    void fz_word_set(uint64_t *at, uint64_t value) noexcept nogil
    bint fz_flag_get(const bint *at) noexcept nogil
    void fz_flag_set(bint *at, bint value) noexcept nogil
