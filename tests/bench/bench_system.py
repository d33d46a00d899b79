"""Throughput, latency and memory of whole systems, beside raw veth and wireguard-go in the same run.

    python -m tests.bench.bench_system [--seconds 5] [--peers FOLDER]

Both tunnel ends, the routers and iperf3 share this machine's cores. With --peers the official programs of
that folder are measured too. JSON on stdout, progress on stderr. QUIC is not measured: none of the system packages
makes such load; UDP stands for it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fz_core.lab import Host, Lab
from fz_core.lab.system import Programs, Shape, System
from tests.bench.program_load import Sample, drops, rest

SERVER = "10.20.0.80"


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def iperf(client: Host, target: str, seconds: float, *options: str) -> dict[str, Any]:
    """One run; the server must be up."""
    result = client.run("iperf3", "-J", "-c", target, "-t", str(seconds), *options, check=False, timeout=seconds + 30)
    report = json.loads(result.stdout)
    if "error" in report:
        return {"error": report["error"]}
    end = report["end"]
    total = end.get("sum_received") or end["sum"]
    answer = {"mbit_s": round(total["bits_per_second"] / 1e6, 1)}
    if "retransmits" in end.get("sum_sent", {}):
        answer["retransmits"] = end["sum_sent"]["retransmits"]
    if "lost_percent" in total:
        answer["lost_percent"] = round(total["lost_percent"], 2)
    return answer


def both_ways(client: Host, target: str, seconds: float) -> dict[str, Any]:
    return {"upload": iperf(client, target, seconds), "download": iperf(client, target, seconds, "-R")}


def serve_iperf(host: Host) -> None:
    host.spawn("iperf3", ["iperf3", "-s"])
    time.sleep(0.5)


def raw_veth(seconds: float) -> dict[str, Any]:
    """The same machines without any tunnel."""
    with Lab() as lab:
        server = lab.public_host("server", 10)
        client = lab.host("client", lab.router("router", 30))
        serve_iperf(server)
        assert server.ipv4 is not None
        return both_ways(client, server.ipv4, seconds)


def wireguard_go(seconds: float) -> dict[str, Any]:
    """wireguard-go between a machine behind a NAT and a public one, MTU 1280."""
    with Lab() as lab, tempfile.TemporaryDirectory() as folder:
        ends = {"a": lab.public_host("a", 10), "b": lab.host("b", lab.router("router", 30))}
        keys = {name: subprocess.run(["wg", "genkey"], capture_output=True, text=True).stdout for name in ends}
        public = {
            name: subprocess.run(["wg", "pubkey"], input=key, capture_output=True, text=True).stdout.strip()
            for name, key in keys.items()
        }
        for name, host in ends.items():
            device, path = f"wgb{os.getpid()}{name}", Path(folder) / name
            path.touch(mode=0o600)
            path.write_text(keys[name])
            host.spawn(f"wireguard-go-{name}", ["wireguard-go", "-f", device], {"LOG_LEVEL": "error"})
            time.sleep(1.0)
            other = "b" if name == "a" else "a"
            endpoint = [] if name == "a" else ["endpoint", f"{ends['a'].ipv4}:51820", "persistent-keepalive", "5"]
            host.run(
                "wg", "set", device, "private-key", str(path), "listen-port", "51820",
                "peer", public[other], "allowed-ips", "10.9.0.0/24", *endpoint,
            )  # fmt: skip
            host.ip("addr", "add", f"10.9.0.{1 if name == 'a' else 2}/24", "dev", device)
            host.ip("link", "set", device, "mtu", "1280", "up")
        serve_iperf(ends["a"])
        ends["b"].run("ping", "-c1", "-W5", "10.9.0.1")
        return both_ways(ends["b"], "10.9.0.1", seconds)


TRAFFIC = {
    "upload": (),
    "download": ("-R",),
    "udp_200": ("-u", "-b", "200M", "-l", "1200"),
    "udp_200_download": ("-u", "-b", "200M", "-l", "1200", "-R"),
}


def tunnel(programs: Programs, seconds: float, *, relayed: bool, delay_ms: float = 0.0) -> dict[str, Any]:
    """Client to gateway, with what it costs both ends and the relay."""
    with Lab() as lab:
        system = System(lab, programs, Shape(delay_ms=delay_ms))
        system.start()
        if relayed:
            system.block_direct()
        server = next(n for n in lab.namespaces if n.name == "gateway-web")
        assert isinstance(server, Host)
        serve_iperf(server)
        system.fetch(0.001, timeout=20)
        ends = {"client": system.clients[0].process, "gateway": system.gateways[0].process}
        if relayed:
            ends["relay"] = system.relays[0]
        memory = {name: [p.memory_kib()] for name, p in ends.items()}
        cpu = {name: p.cpu_seconds() for name, p in ends.items()}
        result: dict[str, Any] = {}
        for kind, options in TRAFFIC.items():
            before = {name: Sample.of(p.pid) for name, p in ends.items()}
            result[kind] = iperf(system.clients[0].host, SERVER, seconds, *options)
            result[kind]["load"] = {name: Sample.of(p.pid).since(before[name]) for name, p in ends.items()}
            for name, process in ends.items():
                memory[name].append(process.memory_kib())
        result["path"] = system.path_of()
        result["cpu_s"] = {name: round(p.cpu_seconds() - cpu[name], 2) for name, p in ends.items()}
        result["rss_kib"] = memory
        result["drops"] = {name: drops(p.pid) for name, p in ends.items()}
        result["at_rest"] = {name: rest(p.pid, 1.0) for name, p in ends.items()}
        result["warnings"] = len(system.warnings())
        return result


def first_byte(programs: Programs, runs: int, delay_ms: float) -> dict[str, Any]:
    """Seconds from curl's start to the first byte, each time with a client that is online but not connected."""
    samples = []
    with Lab() as lab:
        system = System(lab, programs, Shape(delay_ms=delay_ms))
        system.start()
        for run in range(runs):
            if run:
                system.restart(system.clients[0])
            time.sleep(1.5)
            samples.append(system.fetch(0.000001, timeout=20).first_byte_s)
    return {"median_s": round(statistics.median(samples), 4), "samples_s": [round(s, 4) for s in samples]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peers", type=Path)
    options = parser.parse_args()
    contestants = {"ours": Programs()}
    if options.peers is not None:
        programs = {n: (str(options.peers / f"firezone-{n}"),) for n in ("gateway", "headless-client", "relay")}
        contestants["official"] = Programs(
            gateway=(*programs["gateway"], "--no-inc-buf"), client=programs["headless-client"], relay=programs["relay"]
        )
    report: dict[str, Any] = {"cores": os.cpu_count(), "kernel": os.uname().release, "seconds": options.seconds}
    note("raw veth")
    report["raw veth"] = raw_veth(options.seconds)
    note("wireguard-go")
    report["wireguard-go"] = wireguard_go(options.seconds)
    for name, programs in contestants.items():
        for relayed, delay in ((False, 0.0), (True, 0.0), (False, 20.0), (True, 20.0)):
            kind = f"{name}, {'relayed' if relayed else 'direct'}" + (f", {delay:g} ms" if delay else "")
            note(kind)
            report[kind] = tunnel(programs, options.seconds, relayed=relayed, delay_ms=delay)
        for delay in (0.0, 20.0):
            note(f"{name}, first byte, {delay:g} ms")
            report[f"{name}, first byte, {delay:g} ms links"] = first_byte(programs, options.runs, delay)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
