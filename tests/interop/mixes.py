"""Which official programs there are, what mixes they make with ours, and what has a point in which mix."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from fz_core.lab import LabError
from fz_core.lab.faults import FAULTS
from fz_core.lab.system import Programs
from tests.netns.name_scenarios import NAME_SCENARIOS
from tests.netns.path_mtu_scenarios import MTU_SCENARIOS
from tests.netns.scenarios import SCENARIOS as PATH_SCENARIOS
from tests.netns.traffic_scenarios import TRAFFIC_SCENARIOS

ORDINARY = {**PATH_SCENARIOS, **TRAFFIC_SCENARIOS, **MTU_SCENARIOS, **NAME_SCENARIOS}
WITHOUT_ICE = {
    # what depends on how a path is found; the rest happens above it
    "direct", "direct, IPv6 resource", "relayed", "both NATs symmetric", "IPv4 only", "IPv6-only underlay",
    "client IPv4, gateway IPv6", "20 ms to everybody", "two clients", "gateway restart", "client restart",
    "revocation during a transfer", "portal away", "names", "names, relayed", "device pools",
    "access to a name is revoked", "names and restarts", *MTU_SCENARIOS, *TRAFFIC_SCENARIOS,
}  # fmt: skip
STRICT_GATEWAY = (1, 6, 0)  # older ones let the internet resource into their own network
BEYOND_OLD_CLIENTS = {
    # they know one resource per name, ask the portal for every name, resolve SRV themselves, have no such option
    "overlapping resources", "names without the portal", "one source port for three names",
    "SRV, TXT, PTR, DNS over TCP", "internet resource", "device pools",
}  # fmt: skip
POOL_CLIENT = (1, 5, 9)  # older clients are not told of device pools (spec/portal-protocol.md §8.9)
ICELESS_GATEWAY, ICELESS_CLIENT = (1, 6, 0), (1, 5, 11)  # releases tried before these never offer it
UNNOTICED = {"router reboots", "local address changes"}  # by an official client, if its link to the portal lives on
NAMES = ("firezone-gateway", "firezone-headless-client", "firezone-relay")
CONTROL = {"our programs": Programs()}


@dataclass(frozen=True)
class Release:
    """One set of official programs; `gateway` is None where there is only a client."""

    folder: Path
    gateway: str | None
    client: str

    @classmethod
    def of(cls, folder: Path) -> Release:
        gateway = folder / NAMES[0]
        return cls(folder, version(gateway) if gateway.exists() else None, version(folder / NAMES[1]))

    def program(self, name: str) -> tuple[str, ...]:
        return (str(self.folder / name),)

    @property
    def title(self) -> str:
        return f"client {self.client}" if self.gateway is None else f"gateway {self.gateway}, client {self.client}"

    @property
    def knows_iceless(self) -> bool:
        return (
            self.gateway is not None
            and numbers(self.gateway) >= ICELESS_GATEWAY
            and numbers(self.client) >= ICELESS_CLIENT
        )


def version(program: Path) -> str:
    result = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"^(?:Error: )?firezone-[a-z-]+ (\d+\.\d+\.\d+)", result.stdout + result.stderr, re.MULTILINE)
    if found is None:  # clients before 1.4 tell their version as an error
        raise LabError(f"{program} --version failed: {result.stderr.strip() or result.returncode}")
    return found[1]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def releases(folder: Path) -> list[Release]:
    folders = [folder, *sorted((p for p in folder.iterdir() if p.is_dir()), reverse=True)]
    found = [[name for name in NAMES if os.access(f / name, os.X_OK)] for f in folders]
    whole = (list(NAMES), [NAMES[1]])
    return [Release.of(f) for f, names in zip(folders, found, strict=True) if names in whole]


def mixes(release: Release) -> dict[str, Programs]:
    gateway, client, relay = (release.program(name) for name in NAMES)
    if release.gateway is None:
        return {"their client, our gateway": Programs(client=client, old_clients=True)}
    return {
        "our client, their gateway": Programs(gateway=gateway),
        "their client, our gateway": Programs(client=client),
        "their client and gateway": Programs(gateway=gateway, client=client),
        "our client, their peer": Programs(peer=client),
        "their client, our peer": Programs(client=client, peer=Programs().client),
        "their relay": Programs(relay=relay),
        "our client, their gateway and relay": Programs(gateway=gateway, relay=relay),
        "their client and relay, our gateway": Programs(client=client, relay=relay),
        "all theirs but the portal": Programs(gateway=gateway, client=client, relay=relay),
    }


def decides(mix: str, name: str) -> bool:
    """Whether a failure is ours.

    What two official programs make of a fault is there to compare with; why an official client does not find out
    about its own address is in docs/fault-lab.md.
    """
    if name in UNNOTICED and "their client" in mix:
        return False
    return name not in FAULTS or mix != "their client and gateway"


def applies(mix: str, name: str, release: Release | None, iceless: bool) -> bool:
    """Some mixes have a point in some scenarios only, and old programs do not know everything."""
    if release is not None and not release_knows(release, mix, name, iceless):
        return False
    if name in FAULTS:
        return "relay" not in mix and "peer" not in mix and not mix.startswith("all")
    # Nothing large passes a narrow path between two official programs.
    if name in MTU_SCENARIOS and (mix == "their client and gateway" or "relay" in mix or mix.startswith("all")):
        return False
    # A peer is the other end of a device pool, and whose relay carries a name makes no difference beyond one scenario.
    if "peer" in mix and name != "device pools":
        return False
    return not ("relay" in mix or mix.startswith("all")) or name not in NAME_SCENARIOS or name == "names, relayed"


def release_knows(release: Release, mix: str, name: str, iceless: bool) -> bool:
    if iceless and not release.knows_iceless:
        return False
    if release.gateway is None:  # such clients are tried for their protocol; faults would tell nothing more
        return name not in BEYOND_OLD_CLIENTS and name not in FAULTS
    if name == "device pools" and numbers(release.client) < POOL_CLIENT:
        return "their client" not in mix
    if name == "internet resource" and numbers(release.gateway) < STRICT_GATEWAY:
        return "gateway" not in mix or "our gateway" in mix
    return True
