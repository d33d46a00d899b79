# What pump and relay need of libc and the kernel: nothing here touches Python, everything runs without the GIL.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from fz_core.packet.socket_layout cimport (
    AF_INET, AF_INET6, CMSG_DATA, CMSG_FIRSTHDR, CMSG_LEN, CMSG_NXTHDR, CMSG_SPACE, IPPROTO_IP, IPPROTO_IPV6,
    IPV6_PKTINFO, IPV6_TCLASS, IP_PKTINFO, IP_TOS, MSG_CTRUNC, MSG_DONTWAIT, MSG_NOSIGNAL, MSG_TRUNC, SOL_SOCKET,
    SOL_UDP, SO_TIMESTAMPNS, UDP_GRO, UDP_SEGMENT, cmsghdr, htons, in6_addr, in6_pktinfo, in_addr, in_pktinfo, iovec,
    mmsghdr, msghdr, ntohs, sockaddr_in, sockaddr_in6,
)

cdef extern from "sys/uio.h" nogil:
    Py_ssize_t writev(int, const iovec *, int)

cdef extern from "sys/socket.h" nogil:
    int recvmmsg(int, mmsghdr *, unsigned int, int, void *)
    Py_ssize_t sendmsg(int, const msghdr *, int)
    int setsockopt(int, int, int, const void *, unsigned int)

cdef extern from "sys/epoll.h" nogil:
    enum: EPOLLIN, EPOLLOUT, EPOLLERR, EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL, EPOLL_CLOEXEC
    ctypedef union epoll_data_t:
        uint32_t u32
        void *ptr
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int)
    int epoll_ctl(int, int, int, epoll_event *)
    int epoll_wait(int, epoll_event *, int, int)

cdef extern from "sys/eventfd.h" nogil:
    enum: EFD_NONBLOCK, EFD_CLOEXEC
    int eventfd(unsigned int, int)

cdef extern from "pthread.h" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_mutex_destroy(pthread_mutex_t *)

cdef extern from *:
    """
    #include <sched.h>
    #include <string.h>
    #include <time.h>
    #include <unistd.h>
    static inline double fz_now(void) {
        struct timespec at;
        clock_gettime(CLOCK_BOOTTIME, &at);
        return (double)at.tv_sec + (double)at.tv_nsec * 1e-9;
    }
    static inline double fz_wall(void) {
        struct timespec at;
        clock_gettime(CLOCK_REALTIME, &at);
        return (double)at.tv_sec + (double)at.tv_nsec * 1e-9;
    }
    static inline double fz_timespec(const void *data) {
        struct timespec at;
        memcpy(&at, data, sizeof at);
        return (double)at.tv_sec + (double)at.tv_nsec * 1e-9;
    }
    static inline void fz_pause(long nanoseconds) {
        struct timespec gap = {0, nanoseconds};
        nanosleep(&gap, 0);
    }
    static inline void fz_signal(int fd) {
        unsigned long long one = 1;
        if (write(fd, &one, sizeof one) < 0) { }  /* full: the other side is awake already */
    }
    static inline void fz_unsignal(int fd) {
        unsigned long long count;
        if (read(fd, &count, sizeof count) < 0) { }
    }
    #define fz_get(at) __atomic_load_n(at, __ATOMIC_ACQUIRE)
    #define fz_set(at, value) __atomic_store_n(at, value, __ATOMIC_RELEASE)
    #define fz_add(at, value) __atomic_fetch_add(at, value, __ATOMIC_ACQ_REL)
    #ifdef __SANITIZE_ADDRESS__
    #include <sanitizer/asan_interface.h>
    static inline void fz_fence(const void *start, size_t used, size_t room) {
        ASAN_UNPOISON_MEMORY_REGION(start, used);
        ASAN_POISON_MEMORY_REGION((const char *)start + used, room - used);
    }
    #else
    #define fz_fence(start, used, room) ((void)0)
    #endif
    #define FZ_LIKELY(x) __builtin_expect(!!(x), 1)
    """
    # Seconds on the clock of the drivers (CLOCK_BOOTTIME), from the vDSO.
    double fz_now() noexcept nogil
    # The same by the wall clock, and what is in a struct timespec of it.
    double fz_wall() noexcept nogil
    double fz_timespec(const void *data) noexcept nogil
    # Under AddressSanitizer only the first `used` of `room` bytes may be touched from here on.
    void fz_fence(const void *start, size_t used, size_t room) noexcept nogil
    void fz_pause(long nanoseconds) noexcept nogil
    void fz_signal(int fd) noexcept nogil
    void fz_unsignal(int fd) noexcept nogil
    uint64_t fz_get(uint64_t *at) noexcept nogil
    void fz_set(uint64_t *at, uint64_t value) noexcept nogil
    uint64_t fz_add(uint64_t *at, uint64_t value) noexcept nogil

cdef enum:
    RELAY_PORT = 3478
