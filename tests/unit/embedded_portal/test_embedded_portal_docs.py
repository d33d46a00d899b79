"""The example in docs/embedded-portal.md is a valid policy."""

from __future__ import annotations

import re
from pathlib import Path

from fz_core.embedded.policy_file import read_policy

PAGE = Path(__file__).resolve().parents[3] / "docs" / "embedded-portal.md"


def test_the_example_works(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for name in ("relay-token", "gateway-token"):
        (tmp_path / name).write_text(f"{name}-0123456789\n")
    path = tmp_path / "portal.toml"
    path.write_text(example)
    policy = read_policy(path)
    assert set(policy.resources) == {"intranet", "web", "Internet", "laptops", "all devices"}
    assert policy.clients["alice"].expires_at == 1_896_134_399
