"""The policy file: what it gives, and that every mistake names thing, value, remedy and line."""

from __future__ import annotations

import hashlib
import re
from ipaddress import ip_network
from pathlib import Path

import pytest
from embedded_portal_world import policy_of, policy_text

from fz_core.embedded.policy_file import PolicyErrors, read_policy
from fz_core.embedded.policy_text import read_filter
from fz_core.portal.types import Filter


def errors_of(folder: Path, text: str) -> list[str]:
    path = folder / "portal.toml"
    path.write_text(text)
    with pytest.raises(PolicyErrors) as caught:
        read_policy(path)
    return [line.removeprefix(f"{path}:") for line in caught.value.lines]


def test_a_whole_policy(tmp_path: Path) -> None:
    policy = policy_of(tmp_path, net='filters = ["tcp/443"]', rule="expires_in = 3600", alice='email = "a@b.c"')
    assert (policy.account, policy.search_domain, policy.allow_iceless) == ("acme", "corp.example", False)
    assert [str(ip) for ip in policy.dns_servers] == ["1.1.1.1"]
    assert policy.doh_servers == ("https://dns.example/dns-query",)
    assert policy.resources["net"].address == ip_network("10.0.0.0/8")
    assert policy.resources["net"].filters == (Filter("tcp", 443, 443),)
    assert policy.rules[0].expires_in == 3600
    assert policy.clients["alice"].email == "a@b.c"


def test_an_empty_file_is_a_policy_that_lets_nobody_in(tmp_path: Path) -> None:
    assert policy_of(tmp_path, "").clients == {}


def test_ids_are_stable_and_may_be_given(tmp_path: Path) -> None:
    first, again = policy_of(tmp_path), policy_of(tmp_path, net='description = "x"')
    assert first.resources["net"].id == again.resources["net"].id
    given = "0F8FAD5B-D9CB-469F-A165-70867728950E"
    assert policy_of(tmp_path, net=f'id = "{given}"').resources["net"].id == given.lower()


def test_tokens_may_be_text_file_or_hash(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("in-a-file-0123456789\n")
    digest = hashlib.sha256(b"only-its-hash-0123456789").hexdigest()
    text = f'''
[relay]
tokens = ["one-0123456789abcdef", "two-0123456789abcdef"]
token_file = "secret"
token_sha256 = "{digest.upper()}"
'''
    wanted = ("one-0123456789abcdef", "two-0123456789abcdef", "in-a-file-0123456789", "only-its-hash-0123456789")
    policy = policy_of(tmp_path, text)
    assert policy.relay_tokens == {hashlib.sha256(t.encode()).hexdigest() for t in wanted}
    assert "0123456789" not in repr(policy)


@pytest.mark.parametrize(
    ("old", "new", "line_of", "message"),
    [
        ('account = "acme"', "account = 5", "account = 5", "account is 5, write text in quotes"),
        ('account = "acme"', 'acount = "acme"', "acount", "has no key 'acount', use account"),
        ('groups = ["staff", "admins"]', 'groups = ["staff"]', 'groups = ["admins"]', "'bob' is in group 'admins'"),
        ('"1.1.1.1"', '"one"', "servers", "DNS server 'one' is neither"),
        ('"1.1.1.1"', '"100.64.0.1"', "servers", "inside the range reserved"),
        ('token = "gateway-token-lab-00"', "", '[[gateways]]\nsite = "lab"', "gateway 'lab' has no token"),
        ("gateway-token-lab-00", "short", 'token = "short"', "token is shorter than 16"),
        ("gateway-token-lab-00", "gateway-token-office", "", "same token as gateway 'office'"),
        ('address = "10.0.0.0/8"', 'address = "10.0.0.1/8"', "address", "host bits set"),
        ('address = "10.0.0.0/8"', 'address = "100.64.0.0/16"', "address", "overlaps the range reserved"),
        ('address = "*.example.com"', 'address = "a b"', 'address = "a b"', "is no name"),
        ('address = "*.example.com"', 'address = "**x.com"', 'address = "**x.com"', "mixes ** with other"),
        ('type = "static_device_pool"\ndevices = ["bob"]', 'type = "dynamic_device_pool"\naddress = "a.*.com"',
         'address = "a.*.com"', "does not say where device names go"),
        ('account = "acme"', 'account = "acme"\nold_clients = 1', "old_clients", "old_clients is 1, write true"),
        ('type = "cidr"', 'type = "cider"', 'type = "cider"', "'net' has type 'cider', use one of dns"),
        ('site = "office"\n\n[[resources]]\nname = "web"', 'site = "of"\n\n[[resources]]\nname = "web"', 'site = "of"',
         "site 'of' does not exist, name one of [[sites]]: lab, office"),
        ('devices = ["bob"]', 'devices = ["rob"]', "devices", "names device 'rob'"),
        ('group = "everyone"', 'group = "all"', 'group = "all"', "group 'all' does not exist"),
        ('resource = "web"', 'resource = "wab"', 'resource = "wab"', "resource 'wab' does not exist"),
        ('resource = "web"', 'resource = "web"\nexpires_in = 1', "expires_in", "expires_in is 1"),
        ('name = "web"', 'name = "net"', 'name = "net"\ntype = "dns"', "the name 'net' is used twice"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_line(tmp_path: Path, old: str, new: str, line_of: str, message: str) -> None:
    text = policy_text().replace(old, new, 1)
    found = errors_of(tmp_path, text)
    assert any(message in line for line in found), found
    if line_of:
        number = text[: text.index(line_of)].count("\n") + 1
        assert any(line.startswith(f"{number}: ") and message in line for line in found), found


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = policy_text(net='ip_stack = "dual"', alice="expires = 3", rule="until = 5", web='ip_stack = "triple"')
    assert len(errors_of(tmp_path, text)) == 4


def test_what_is_not_toml_is_told_with_its_line(tmp_path: Path) -> None:
    (error,) = errors_of(tmp_path, 'account = "x"\n\noops\n')
    assert re.match("3: not TOML", error)


@pytest.mark.parametrize("text", ["sites = 3", "[sites]\nname='x'", "dns = 3", "relay = []", "clients = [1]"])
def test_wrong_shapes_are_told(tmp_path: Path, text: str) -> None:
    assert errors_of(tmp_path, text)


def test_bytes_that_are_no_text_are_told(tmp_path: Path) -> None:
    path = tmp_path / "portal.toml"
    path.write_bytes(b"\xff")
    with pytest.raises(PolicyErrors, match="UTF-8"):
        read_policy(path)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("icmp", Filter("icmp")), ("tcp", Filter("tcp", 0, 65535)), ("udp/53", Filter("udp", 53, 53)),
     ("tcp/1-2", Filter("tcp", 1, 2))],
)  # fmt: skip
def test_filters(text: str, wanted: Filter) -> None:
    assert read_filter(text) == wanted


@pytest.mark.parametrize("text", ["", "sctp", "tcp/", "tcp/2-1", "udp/65536", "icmp/8", "tcp/1-2-3"])
def test_bad_filters(text: str) -> None:
    with pytest.raises(ValueError, match="filter"):
        read_filter(text)
