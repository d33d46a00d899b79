"""The policy file a lab writes is one the portal reads, and says what was meant."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path

from fz_core.embedded.policy_file import read_policy
from fz_core.lab import policy as lab
from fz_core.portal.types import Filter

RESOURCES: dict[str, str | lab.ResourceSpec] = {
    "net": "10.20.0.0/24",
    "few": lab.cidr("10.21.0.0/24", "tcp/80", "icmp"),
    "app": lab.dns("*.example.com", "udp/1000-2000", ip_stack="ipv4_only"),
    "rest": lab.INTERNET,
    "laptops": lab.static_pool("bob", filters=("tcp/22",)),
    "names": lab.dynamic_pool("*.devices.test"),
}


def test_every_kind_of_resource_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    rules = lab.Rules(
        "gateway-token-0123456789", "relay-token-0123456789",
        {"ann": "ann-token-0123456789", "bob": "bob-token-0123456789"},
        RESOURCES, {"everyone": ["net"], "ann": ["app", "laptops", "names", "rest", "few"]}, 90,
        ["203.0.113.53", "https://203.0.113.54/dns-query"], 'a "quoted" domain', True,
    )  # fmt: skip
    path.write_text(rules.text())
    policy = read_policy(path)
    kinds = {name: rule.kind for name, rule in policy.resources.items()}
    assert kinds == {
        "net": "cidr", "few": "cidr", "app": "dns", "rest": "internet", "laptops": "static_device_pool",
        "names": "dynamic_device_pool",
    }  # fmt: skip
    assert policy.resources["net"].address == ip_network("10.20.0.0/24")
    assert policy.resources["few"].filters == (Filter("tcp", 80, 80), Filter("icmp"))
    app = policy.resources["app"]
    assert (app.address, app.ip_stack, app.filters) == ("*.example.com", "ipv4_only", (Filter("udp", 1000, 2000),))
    assert policy.resources["laptops"].devices == ("bob",)
    visible = {name: {r.name for r in policy.visible_to(policy.clients[name]).values()} for name in policy.clients}
    assert visible == {"ann": set(RESOURCES), "bob": {"net"}}
    assert {rule.expires_in for rule in policy.rules} == {90}
    assert policy.dns_servers == (ip_address("203.0.113.53"),)
    assert policy.doh_servers == ("https://203.0.113.54/dns-query",)
    assert policy.search_domain == 'a "quoted" domain'
    assert policy.old_clients
    assert "0123456" not in repr(rules)
