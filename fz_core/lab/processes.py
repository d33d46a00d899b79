"""Programs started in a lab: their output kept, found by line, and always ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

POLL_INTERVAL = 0.02


class LabError(Exception):
    """The lab cannot be built or a program in it did not do what was expected; one line."""


class Process:
    """One program with its output in a file."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str] | None, log: Path) -> None:
        self.name, self.log = name, log
        self._file = log.open("ab")
        self._popen = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        self.started_at = time.monotonic()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._popen.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._popen.poll() is None

    @property
    def output(self) -> str:
        """Everything it wrote so far."""
        return self.log.read_text(errors="replace")

    def wait_for_line(self, pattern: str, timeout: float = 15.0) -> str:
        """The first output line that matches; LabError when it ends or time runs out before."""
        deadline = time.monotonic() + timeout
        while True:
            is_running = self.is_running
            for line in self.output.splitlines():
                if re.search(pattern, line):
                    return line
            if not is_running or time.monotonic() > deadline:
                state = "still runs" if is_running else f"ended with {self._popen.returncode}"
                raise LabError(f"{self.name} {state} without a line matching {pattern!r}:\n{self.tail()}")
            time.sleep(POLL_INTERVAL)

    def tail(self, lines: int = 20) -> str:
        """Its last lines."""
        return "\n".join(self.output.splitlines()[-lines:])

    def send_signal(self, number: int) -> None:
        """Signal it."""
        if self.is_running:
            self._popen.send_signal(number)

    def wait(self, timeout: float = 10.0) -> int:
        """Its exit status, negative for a signal."""
        return self._popen.wait(timeout)

    def stop(self, timeout: float = 5.0) -> int:
        """SIGTERM, then SIGKILL; its exit status."""
        self.send_signal(signal.SIGTERM)
        try:
            status = self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            status = self.kill()
        self._file.close()
        return status

    def kill(self) -> int:
        """SIGKILL to the program and what it started; its exit status."""
        if self.is_running:  # an ended one's number may belong to a stranger
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        status = self._popen.wait(5)
        self._file.close()
        return status

    def memory_kib(self) -> int:
        """Resident memory."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        return 0

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(command: Sequence[str], *, check: bool = True, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run to the end with its output captured; LabError on failure if `check`."""
    result = subprocess.run(list(command), capture_output=True, text=True, timeout=timeout, check=False)
    if check and result.returncode != 0:
        raise LabError(
            f"{' '.join(command)} failed with {result.returncode}: {(result.stderr or result.stdout).strip()}"
        )
    return result
