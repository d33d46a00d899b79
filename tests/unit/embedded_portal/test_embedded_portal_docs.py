"""The examples in docs/embedded-portal.md are valid policies."""

from __future__ import annotations

import re
from pathlib import Path

from fz_core.embedded.policy import Policy
from fz_core.embedded.policy_file import read_policy

PAGE = Path(__file__).resolve().parents[3] / "docs" / "embedded-portal.md"


def read_examples(folder: Path) -> list[Policy]:
    """Every TOML block of the page, as a file."""
    for name in ("relay-token", "gateway-token", "ada-token", "bob-token"):
        (folder / name).write_text(f"{name}-0123456789\n")
    path = folder / "portal.toml"
    policies = []
    for example in re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL):
        path.write_text(example)
        policies.append(read_policy(path))
    return policies


def test_the_examples_work(tmp_path: Path) -> None:
    policy, pools = read_examples(tmp_path)
    assert [pools.resources[n].kind for n in pools.resources] == ["static_device_pool", "dynamic_device_pool"]
    assert pools.pool_owners(pools.resources["staff laptops"]) == (pools.clients["bob"].id,)
    assert set(policy.resources) == {"intranet", "web", "Internet", "laptops", "all devices"}
    assert policy.clients["alice"].expires_at == 1_896_134_399
