"""Which program knocks, in which version, and what that version understands (`spec/portal-protocol.md` §1.4, §8.9)."""

from __future__ import annotations

import re
from dataclasses import dataclass

COMPONENTS = ("relay", "connlib", "headless-client", "gui-client", "apple-client", "android-client", "gateway")
VERSION = re.compile(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})")
Version = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Agent:
    """A User-Agent. `kind` is apple, gui, headless or android for clients; `version` None if unreadable."""

    text: str
    component: str
    kind: str
    version: Version | None

    @property
    def version_text(self) -> str | None:
        """`1.5.11`"""
        return None if self.version is None else ".".join(map(str, self.version))

    @property
    def os_name(self) -> str:
        """Up to the first slash."""
        return self.text.partition("/")[0]

    @property
    def os_version(self) -> str:
        """From the first slash to the next space."""
        return self.text.partition("/")[2].partition(" ")[0]


def parse_agent(text: str, *, is_service: bool = True) -> Agent | None:
    """Read a User-Agent; None if it names no component. A service account counts as headless."""
    for word in text.split(" "):
        component, slash, rest = word.partition("/")
        if slash and component in COMPONENTS:
            match = VERSION.match(rest)
            version = (int(match[1]), int(match[2]), int(match[3])) if match else None
            return Agent(text, component, _kind(text, is_service), version)
    return None


def _kind(text: str, is_service: bool) -> str:
    for kind in ("headless", "gui", "apple", "android"):
        if f"{kind}-client/" in text:
            return kind
    if text.startswith(("Mac OS", "macOS", "iOS")):
        return "apple"
    if text.startswith("Android"):
        return "android"
    return "headless" if is_service else "gui"


SITES = {"apple": (1, 5, 11), "gui": (1, 5, 10), "headless": (1, 5, 6), "android": (1, 5, 8)}
SITE_CHANGE = {"apple": (1, 5, 9), "gui": (1, 5, 9), "headless": (1, 5, 5), "android": (1, 5, 5)}
POOL_TARGET = {"apple": (1, 5, 14), "gui": (1, 5, 11), "headless": (1, 5, 7), "android": (1, 5, 9)}
POOL_LIST = {"apple": (1, 5, 16), "gui": (1, 5, 13), "headless": (1, 5, 9), "android": (1, 5, 11)}


def understands(agent: Agent, feature: dict[str, Version]) -> bool:
    """Whether a client is new enough for one of the tables above."""
    return agent.version is not None and agent.version >= feature[agent.kind]


LAST_OLD_MINOR = (1, 3)


def may_serve(gateway: Agent | None, client: Agent, *, serve_old: bool = False) -> bool:
    """Whether a gateway is at most one minor version away from a client.

    `serve_old`: all gateways know the scheme of clients before 1.4, whatever version they say they are.
    """
    if gateway is None or gateway.version is None or client.version is None:
        return False
    major, minor, _ = client.version
    if serve_old and (major, minor) <= LAST_OLD_MINOR:
        return True
    return (major, minor - 1, 0) <= gateway.version < (major, minor + 2, 0)
