"""A name server for one machine of a lab: it knows the names it is given and denies all others.

python -m fz_core.lab.resolver --listen 127.0.0.53 portal=203:0:113::10
"""

from __future__ import annotations

import argparse
import ipaddress
import socket

import dns.exception
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

TTL = 60


def answer(query: dns.message.Message, names: dict[str, list[str]]) -> dns.message.Message:
    """The reply: addresses of the asked family, nothing for a known name, NXDOMAIN for an unknown one."""
    response = dns.message.make_response(query, recursion_available=True)
    response.flags |= dns.flags.AA
    question = query.question[0]
    known = names.get(question.name.to_text(omit_final_dot=True).lower())
    if known is None:
        response.set_rcode(dns.rcode.NXDOMAIN)
        return response
    version = {dns.rdatatype.A: 4, dns.rdatatype.AAAA: 6}.get(question.rdtype)
    addresses = [a for a in known if ipaddress.ip_address(a).version == version]
    if addresses:
        response.answer.append(dns.rrset.from_text(question.name, TTL, "IN", question.rdtype, *addresses))
    return response


def main() -> None:
    """Serve over UDP until killed; says 'serving' when ready."""
    parser = argparse.ArgumentParser(description="name server of the lab")
    parser.add_argument("--listen", default="127.0.0.53")
    parser.add_argument("names", nargs="*", metavar="NAME=IP")
    options = parser.parse_args()
    names: dict[str, list[str]] = {}
    for entry in options.names:
        name, _, ip = entry.partition("=")
        names.setdefault(name.lower(), []).append(ip)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((options.listen, 53))
        print("serving", flush=True)
        while True:
            data, source = sock.recvfrom(4096)
            try:
                sock.sendto(answer(dns.message.from_wire(data), names).to_wire(), source)
            except (dns.exception.DNSException, IndexError):
                continue


if __name__ == "__main__":
    main()
