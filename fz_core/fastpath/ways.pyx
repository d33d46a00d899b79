"""Sessions, ways and keys as the driver names them, turned into what the pump looks at for each packet."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcmp, memcpy, memset

from fz_core.crypto.cipher cimport aead_init, aead_wipe
from fz_core.fastpath.flows cimport FlowKey
from fz_core.fastpath.peers cimport CONTROL_SIZE, Endpoint, Peer, Receiver
from fz_core.fastpath.system cimport (
    AF_INET, AF_INET6, CMSG_DATA, CMSG_LEN, CMSG_SPACE, IP_PKTINFO, IPPROTO_IP, IPPROTO_IPV6, IPV6_PKTINFO, cmsghdr,
    htons, in6_pktinfo, in_pktinfo, sockaddr_in, sockaddr_in6,
)
from fz_core.wireguard.session cimport Session


cdef void set_sender(Peer *peer, Session session) noexcept:
    if session is None:
        peer.current = NULL
        aead_wipe(&peer.seal)
    elif peer.current != &session.state:
        aead_wipe(&peer.seal)
        aead_init(&peer.seal, session.state.seal_key.key)
        peer.current = &session.state


cdef void set_receiver(Receiver *receiver, Session session) noexcept:
    if session is None or not session.is_confirmed:
        receiver.session = NULL
        aead_wipe(&receiver.key)
    elif receiver.session != &session.state:
        aead_wipe(&receiver.key)
        aead_init(&receiver.key, session.state.open_key.key)
        receiver.session = &session.state


cdef int set_way_out(Peer *peer, way) except -1:
    cdef Endpoint remote, local
    peer.may_send = way is not None
    if way is None:
        return 0
    remote_ip, remote_port, local_ip, peer.channel = way
    fill_endpoint(&remote, remote_ip, remote_port)
    if memcmp(&remote, &peer.remote, sizeof(Endpoint)) != 0:
        peer.is_single = False  # another destination may take segments
    peer.remote = remote
    peer.is_ipv4 = len(remote_ip) == 4
    fill_name(peer)
    peer.control_length = 0
    if local_ip is not None:
        fill_endpoint(&local, local_ip, 0)
        add_source(peer, &local)
    return 0


cdef int set_way_in(Peer *peer, way) except -1:
    peer.may_receive = way is not None
    if way is None:
        return 0
    source_ip, source_port, local, peer.receive_channel = way
    fill_endpoint(&peer.source, source_ip, source_port)
    memset(&peer.arrives_at, 0, sizeof(Endpoint))
    if local is not None:
        fill_endpoint(&peer.arrives_at, local[0], local[1])
    return 0


cdef int fill_endpoint(Endpoint *end, bytes ip, int port) except -1:
    if len(ip) not in (4, 16) or not 0 <= port <= 0xFFFF:
        raise ValueError(f"no endpoint: {len(ip)} bytes of address and port {port}")
    memset(end, 0, sizeof(Endpoint))
    memcpy(end.ip, <char *>ip, <size_t>len(ip))
    end.ip_size = <uint8_t>len(ip)
    end.port = htons(<uint16_t>port)
    return 0


cdef void fill_name(Peer *peer) noexcept:
    cdef sockaddr_in *v4 = <sockaddr_in *>&peer.name
    memset(&peer.name, 0, sizeof(sockaddr_in6))
    if peer.is_ipv4:
        v4.sin_family = AF_INET
        v4.sin_port = peer.remote.port
        memcpy(&v4.sin_addr, peer.remote.ip, 4)
        peer.name_length = sizeof(sockaddr_in)
    else:
        peer.name.sin6_family = AF_INET6
        peer.name.sin6_port = peer.remote.port
        memcpy(&peer.name.sin6_addr, peer.remote.ip, 16)
        peer.name_length = sizeof(sockaddr_in6)


cdef void add_source(Peer *peer, const Endpoint *local) noexcept:
    """The source address only: interface index 0 leaves the route to the kernel."""
    cdef cmsghdr *item = <cmsghdr *>peer.control
    cdef in_pktinfo v4
    cdef in6_pktinfo v6
    memset(peer.control, 0, CONTROL_SIZE)
    if peer.is_ipv4:
        memset(&v4, 0, sizeof(v4))
        memcpy(&v4.ipi_spec_dst, local.ip, 4)
        item.cmsg_len, item.cmsg_level, item.cmsg_type = CMSG_LEN(sizeof(v4)), IPPROTO_IP, IP_PKTINFO
        memcpy(CMSG_DATA(item), &v4, sizeof(v4))
        peer.control_length = CMSG_SPACE(sizeof(v4))
    else:
        memset(&v6, 0, sizeof(v6))
        memcpy(&v6.ipi6_addr, local.ip, 16)
        item.cmsg_len, item.cmsg_level, item.cmsg_type = CMSG_LEN(sizeof(v6)), IPPROTO_IPV6, IPV6_PKTINFO
        memcpy(CMSG_DATA(item), &v6, sizeof(v6))
        peer.control_length = CMSG_SPACE(sizeof(v6))


cdef int fill_key(FlowKey *key, flow_key, uint32_t slot) except -1:
    cdef bytes src, dst
    memset(key, 0, sizeof(FlowKey))
    key.version, key.protocol, src, dst, src_port, dst_port = flow_key
    if len(src) != len(dst) or len(src) != (4 if key.version == 4 else 16):
        raise ValueError(f"addresses of {len(src)} and {len(dst)} bytes in IPv{key.version}")
    memcpy(key.src, <char *>src, <size_t>len(src))
    memcpy(key.dst, <char *>dst, <size_t>len(dst))
    key.src_port = htons(<uint16_t>src_port)
    key.dst_port = htons(<uint16_t>dst_port)
    key.peer = <uint16_t>slot
    return 0
