"""A program in a lab: its output goes to a file, which can be waited on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fz_core.lab.errors import LabError

POLL_INTERVAL = 0.02
GRACE = 5.0
TAIL_LINES = 20


class Process:
    """A started program. It leads its own process group, so that its children get its signals."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.command = tuple(command)
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._start = output.tell()
            try:
                self._popen = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
                    start_new_session=True,
                )
            except FileNotFoundError:
                raise LabError(f"program {self.command[0]} is missing: run 'make system-packages'") from None
        self.pid = self._popen.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._popen.poll()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self.returncode is None

    def output(self) -> str:
        """All it has written so far."""
        with self.log.open("rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace")

    def wait_for_line(self, pattern: str, timeout: float = 30.0) -> re.Match[str]:
        """The first match of the regular expression in its output, which may already be there."""
        deadline = time.monotonic() + timeout
        while True:
            ended = not self.is_running  # asked before reading, so that the last words count
            found = re.search(pattern, self.output(), re.MULTILINE)
            if found:
                return found
            if ended:
                raise LabError(f"{self} ended with {self.returncode} before writing '{pattern}':\n{self._tail()}")
            if time.monotonic() >= deadline:
                raise LabError(f"{self} did not write '{pattern}' within {timeout} s:\n{self._tail()}")
            time.sleep(POLL_INTERVAL)

    def wait(self, timeout: float = 30.0) -> int:
        """Its exit status, once it ended by itself."""
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise LabError(f"{self} did not end within {timeout} s:\n{self._tail()}") from None

    def signal(self, number: int) -> None:
        """Send a signal to the program alone."""
        self._popen.send_signal(number)

    def terminate(self, grace: float = GRACE) -> int:
        """Ask it to end, kill it if it does not; the exit status. Harmless when repeated."""
        if self.is_running:
            self._signal_group(signal.SIGTERM)
            try:
                self._popen.wait(grace)
            except subprocess.TimeoutExpired:
                pass
        return self.kill()

    def kill(self) -> int:
        """End it at once, with its children; the exit status."""
        self._signal_group(signal.SIGKILL)
        return self._popen.wait()

    def _signal_group(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            pass

    def _tail(self) -> str:
        return "\n".join(self.output().splitlines()[-TAIL_LINES:])

    def __str__(self) -> str:
        return f"'{' '.join(self.command)}'"
