"""Command lines that also read the environment (`spec/binaries.md` §1.1).

Command line beats environment beats default. An empty variable counts as set. A value that cannot
be read is a usage error, exit 2, whichever way it came. `--help` names variables, never their values.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn
from urllib.parse import urlsplit

DURATION_UNITS = {
    "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "hr": 3600.0,
    "d": 86_400.0, "day": 86_400.0, "days": 86_400.0, "w": 604_800.0, "week": 604_800.0, "weeks": 604_800.0,
}  # fmt: skip
DURATION_PART = re.compile(r"\s*(\d+)\s*([a-z]+)\s*")


class OptionParser(argparse.ArgumentParser):
    """An argument parser whose options may come from the environment."""

    def __init__(self, *args: Any, environ: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)
        self._environ = os.environ if environ is None else environ
        self._variables: list[tuple[argparse.Action, str, Callable[[str], Any]]] = []

    def add_option(
        self,
        *flags: str,
        env: str | None = None,
        type: Callable[[str], Any] = str,
        help: str = "",
        **kwargs: Any,
    ) -> None:
        """Add an option or positional; `env` names its variable."""
        default = kwargs.pop("default", None)
        notes = [f"env {env}"] if env else []
        if default not in (None, False):
            notes.append(f"default {kwargs.pop('shown_default', default)}")
        if help is not argparse.SUPPRESS and notes:
            help = f"{help} [{'; '.join(notes)}]"
        if kwargs.get("action") != "store_true":
            kwargs["type"] = type
        else:
            type = boolean
        action = self.add_argument(*flags, default=default, help=help, **kwargs)
        if env:
            self._variables.append((action, env, type))

    def add_reporting_options(self) -> None:
        """What both ends of a tunnel are told about flow logs and telemetry."""
        self.add_option(
            "--flow-logs", env="FIREZONE_FLOW_LOGS", action="store_true", default=False,
            help="log flows at target flow_logs, and track them even if the portal does not want them",
        )  # fmt: skip
        self.add_option(
            "--no-telemetry", env="FIREZONE_NO_TELEMETRY", action="store_true", default=False,
            help="accepted; this program never sends any",
        )  # fmt: skip

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        # Variables become defaults first, so that anything on the command line wins.
        for action, name, read in self._variables:
            text = self._environ.get(name)
            if text is None:
                continue
            try:
                action.default = read(text)
            except (ValueError, argparse.ArgumentTypeError) as error:
                self.error(f"environment variable {name}: {error}")
            if action.choices is not None and action.default not in action.choices:
                possible = ", ".join(str(c) for c in action.choices)
                self.error(f"environment variable {name}: invalid choice {text!r}, choose from {possible}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see '{self.prog} --help'\n")


def hide_argument(module: str, arguments: list[str], value: str | None, variable: str) -> None:
    """Start over with a secret argument moved into the environment, where `ps` does not show it."""
    if value is not None and value in arguments:
        rest = [a for a in arguments if a != value]
        os.execve(sys.executable, [sys.executable, "-m", module, *rest], {**os.environ, variable: value})
    os.environ.pop(variable, None)


def boolean(text: str) -> bool:
    """`true` or `false`, nothing else."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"invalid value {text!r}, use true or false")
    return text == "true"


def feature_flag(name: str, default: bool) -> bool:
    """A feature flag of the environment, `FZFF_<name>`; anything but true and false counts as unset."""
    return {"true": True, "false": False}.get(os.environ.get(f"FZFF_{name}", ""), default)


def duration(text: str) -> float:
    """Seconds from `30s`, `5m`, `1h 30m`, `30d`; a number needs a unit."""
    seconds, position = 0.0, 0
    while position < len(text) and (part := DURATION_PART.match(text, position)):
        if part[2] not in DURATION_UNITS:
            break
        seconds += int(part[1]) * DURATION_UNITS[part[2]]
        position = part.end()
    if not text.strip() or position < len(text):
        raise argparse.ArgumentTypeError(f"invalid duration {text!r}, write for example 30s, 5m, 1h 30m or 2d")
    return seconds


def url(text: str) -> str:
    """A URL with scheme and host; which schemes are served is checked later."""
    try:
        parts = urlsplit(text)
        valid = bool(parts.scheme and parts.hostname) and (parts.port is None or parts.port >= 0)
    except ValueError:
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError(f"invalid URL {text!r}, write for example wss://api.firezone.dev")
    return text


def socket_address(text: str) -> tuple[str, int]:
    """`ip:port`, IPv6 in brackets."""
    from fz_core.packet import Address

    try:
        address = Address.parse(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"invalid address {text!r}, write for example 0.0.0.0:8080 or [::]:8080"
        ) from None
    return address.host, address.port
