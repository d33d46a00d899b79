"""The commands' exit codes and messages, run as a user runs them: spec/binaries.md §2, §3."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

GATEWAY, CLIENT = "fz_gateway", "fz_headless"


def run(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FIREZONE", "MAX_PART", "HEALTH", "RUST", "LOG"))}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**clean, **environment}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(("module", "name"), [(GATEWAY, "firezone-gateway"), (CLIENT, "firezone-headless-client")])
def test_version_is_name_and_number(module: str, name: str) -> None:
    result = run(module, "--version")
    program, version = result.stdout.split()
    assert (result.returncode, program) == (0, name)
    assert len([int(part) for part in version.split(".")]) == 3


@pytest.mark.parametrize("module", [GATEWAY, CLIENT])
def test_help_is_worth_reading_and_keeps_secrets(module: str) -> None:
    result = run(module, "--help", FIREZONE_TOKEN="a-secret-token")
    assert result.returncode == 0
    assert "FIREZONE_API_URL" in result.stdout
    assert "exit status" in result.stdout
    assert "a-secret-token" not in result.stdout


@pytest.mark.parametrize(
    ("module", "arguments", "environment"),
    [
        (GATEWAY, ["--nonsense"], {}),
        (GATEWAY, ["--api-url", "nonsense"], {}),
        (GATEWAY, [], {"FIREZONE_MAX_PARTITION_TIME": "24"}),
        (GATEWAY, [], {"FIREZONE_NO_TELEMETRY": "1"}),
        (GATEWAY, [], {"FIREZONE_LOG_FORMAT": "JSON"}),
        (GATEWAY, [], {"HEALTH_CHECK_ADDR": "8080"}),
        (CLIENT, ["--token", "x"], {}),
        (CLIENT, ["--log-format", "json"], {}),
        (CLIENT, [], {"MAX_PARTITION_TIME": ""}),
        (CLIENT, [], {"FIREZONE_API_URL": ""}),
        (CLIENT, ["--activate-internet-resource=true"], {}),
        (CLIENT, ["sign-up"], {}),
    ],
)
def test_usage_errors(module: str, arguments: list[str], environment: dict[str, str]) -> None:
    result = run(module, *arguments, **environment)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_an_unknown_scheme_is_a_run_time_error() -> None:
    result = run(CLIENT, "--api-url", "ftp://portal", "-i", "x", FIREZONE_TOKEN="t")
    assert result.returncode == 1
    assert "use ws, wss, http or https" in result.stderr


def test_an_unknown_cipher_library_is_a_run_time_error() -> None:
    result = run(CLIENT, "-i", "x", FIREZONE_TOKEN="t", FZ_CIPHER="openssl")
    assert result.returncode == 1
    assert "FZ_CIPHER: 'openssl' is not a library for ciphers, use libsodium or libcrypto" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.root
def test_a_gateway_without_token_says_where_it_looked() -> None:
    result = run(GATEWAY, "--no-inc-buf", "-i", "x")
    assert result.returncode == 1
    assert "FIREZONE_TOKEN" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.root
@pytest.mark.parametrize(
    ("mode", "owner", "message"),
    [(0o644, 0, "chmod 600"), (0o600, 1234, "chown root:root"), (0o700, 0, "chmod 600")],
)
def test_the_token_file_must_be_roots_alone(tmp_path: Path, mode: int, owner: int, message: str) -> None:
    path = tmp_path / "token"
    path.write_text("secret-token\n")
    os.chown(path, owner, owner)
    path.chmod(mode)
    result = run(CLIENT, "--token-path", str(path), "-i", "x")
    assert result.returncode == 1
    assert message in result.stderr
    assert str(path) in result.stderr
    assert "secret-token" not in result.stderr + result.stdout


def test_a_missing_token_names_variable_and_path(tmp_path: Path) -> None:
    result = run(CLIENT, "--token-path", str(tmp_path / "none"), "-i", "x")
    assert result.returncode == 1
    assert "FIREZONE_TOKEN" in result.stderr
    assert str(tmp_path / "none") in result.stderr


@pytest.mark.root
def test_a_token_argument_disappears_from_the_process_list() -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FIREZONE")}
    process = subprocess.Popen(
        ["unshare", "-n", sys.executable, "-m", GATEWAY, "--no-inc-buf", "-i", "x", "--api-url", "ws://127.0.0.1:9",
         "positional-secret"],
        env={**clean, "HEALTH_CHECK_ADDR": "127.0.0.1:0"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "started logging" in line:
                break
        assert b"positional-secret" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    finally:
        process.terminate()
        process.communicate(timeout=20)


def test_a_hangup_does_not_end_a_client_that_starts() -> None:
    """The network may change while everything is still being imported."""
    program = """
import os, signal
import fz_headless
os.kill(os.getpid(), signal.SIGHUP)
print("lives")
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=30)
    assert (told.returncode, told.stdout) == (0, "lives\n"), told.stderr
