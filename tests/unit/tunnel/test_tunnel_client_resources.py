"""Resources of a client and the configuration that follows from them (spec/tunnel.md §4, §13).

`shows` marks name items of the lists in spec/.
"""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest
from bare_client import FIXED, OTHER_SITE, OWN4, OWN6, SITE, Client, cidr, packed, uuid

from fz_core.packet import (
    DropReason,
    build_tcp,
)
from fz_core.portal import client as c
from fz_core.portal.types import (
    CidrResource,
    DynamicDevicePool,
    Filter,
    Interface,
    InternetResource,
    Resource,
    Site,
)
from fz_core.tunnel.events import (
    ResourceActivated,
    ResourceDeactivated,
    ResourcesChanged,
    TunConfigChanged,
)


def config_routes(client: Client) -> list[set[Any]]:
    return [set(e.routes) for e in client.events(TunConfigChanged)]


# routes and configuration


@pytest.mark.shows("tunnel", 18)
def test_routes_follow_the_resources() -> None:
    """spec/tunnel.md §23 item 18."""
    client = Client(cidr(1, "10.0.0.0/8"))
    assert [set(e.routes) for e in client.start if isinstance(e, TunConfigChanged)] == [
        FIXED | {ip_network("10.0.0.0/8")}
    ]
    client.tell(c.ResourceCreatedOrUpdated(cidr(2, "192.0.2.0/24")))
    assert config_routes(client) == [FIXED | {ip_network("10.0.0.0/8"), ip_network("192.0.2.0/24")}]
    client.tell(c.ResourceCreatedOrUpdated(cidr(1, "10.1.0.0/16")))
    assert config_routes(client) == [FIXED | {ip_network("10.1.0.0/16"), ip_network("192.0.2.0/24")}]
    client.tell(c.ResourceDeleted(uuid(2)))
    client.tell(c.ResourceDeleted(uuid(7)))
    assert config_routes(client) == [FIXED | {ip_network("10.1.0.0/16")}]


def test_pools_of_names_add_no_route_and_do_no_harm() -> None:
    client = Client(DynamicDevicePool(uuid(1), "pool", "*.pool"))
    assert client.state.resources.routes() == FIXED
    client.tell(c.ResourceDeleted(uuid(1)))
    assert [e.resource_id for e in client.events(ResourceDeactivated)] == [uuid(1)]


def test_default_routes_only_while_the_internet_resource_is_present_and_on() -> None:
    client = Client()
    client.state.set_internet_resource(True, client.now)
    assert config_routes(client) == []
    client.tell(c.ResourceCreatedOrUpdated(InternetResource(uuid(5), sites=(SITE,))))
    assert config_routes(client) == [FIXED | {ip_network("0.0.0.0/0"), ip_network("::/0")}]
    client.state.set_internet_resource(False, client.now)
    assert config_routes(client) == [FIXED]
    assert client.send("1.1.1.1") is DropReason.UNKNOWN_RESOURCE


@pytest.mark.shows("tunnel", 29)
def test_only_the_last_state_of_the_configuration_is_seen() -> None:
    """spec/tunnel.md §23 item 29."""
    client = Client(cidr(1, "10.0.0.0/8"))
    for network in ("10.1.0.0/16", "10.2.0.0/16", "10.1.0.0/16", "10.0.0.0/8"):
        client.tell(c.ResourceCreatedOrUpdated(cidr(1, network)))
    assert client.events(TunConfigChanged) == []
    client.tell(c.ResourceCreatedOrUpdated(cidr(1, "10.1.0.0/16")))
    client.tell(c.ConfigChanged(Interface(OWN4, OWN6, search_domain="example.com")))
    events = client.events()
    assert isinstance(events[0], TunConfigChanged)
    assert (events[0].search_domain, len([e for e in events if isinstance(e, TunConfigChanged)])) == ("example.com", 1)


# resources


@pytest.mark.shows("tunnel", 34)
def test_a_new_name_changes_nothing_but_the_name() -> None:
    """spec/tunnel.md §4 upsert; §23 item 34."""
    client = Client(cidr(1, "10.0.0.0/8", Filter("tcp", 80, 80), Filter("icmp")))
    client.send("10.0.0.1", 80)
    renamed = CidrResource(
        uuid(1),
        ip_network("10.0.0.0/8"),
        "renamed",
        (Filter("icmp"), Filter("tcp", 80, 80)),
        (Site(SITE.id, "renamed site"),),
        "described",
    )
    client.give(build_tcp(OWN4.packed, packed("10.0.0.1"), 1000, 80, flags=2))
    assert client.asked() == [uuid(1)]
    client.tell(c.ResourceCreatedOrUpdated(renamed))
    told = client.events()
    assert [type(event) for event in told] == [ResourcesChanged]
    assert [(view.name, view.sites) for view in told[0].resources] == [("renamed", ("renamed site",))]
    assert client.state.resources.get(uuid(1)) == renamed
    client.give(build_tcp(OWN4.packed, packed("10.0.0.1"), 1000, 80, flags=2, seq=9))
    assert client.asked() == []  # the pending request was kept


@pytest.mark.parametrize(
    "changed",
    [
        cidr(1, "10.0.0.0/16"),
        cidr(1, "10.0.0.0/8", Filter("udp", 80, 80)),
        cidr(1, "10.0.0.0/8", site=OTHER_SITE),
        InternetResource(uuid(1), "net", (SITE,)),
    ],
)
def test_any_other_change_starts_the_resource_anew(changed: Resource) -> None:
    """spec/tunnel.md §4 upsert."""
    client = Client(cidr(1, "10.0.0.0/8"))
    client.state.set_internet_resource(True, client.now)
    client.send("10.0.0.1")
    assert client.asked() == [uuid(1)]
    client.tell(c.ResourceCreatedOrUpdated(changed))
    assert len(client.events(ResourceActivated)) == 1
    client.send("10.0.0.1")
    assert client.asked() == [uuid(1)]  # at once: the old request was forgotten


def test_init_replaces_the_whole_list() -> None:
    client = Client(cidr(1, "10.0.0.0/8"), cidr(2, "192.0.2.0/24"))
    client.tell(c.Init(Interface(OWN4, OWN6), (cidr(2, "192.0.2.0/24"), cidr(3, "198.51.100.0/24"))))
    events = client.events()
    assert [e.resource_id for e in events if isinstance(e, ResourceDeactivated)] == [uuid(1)]
    assert [e.resource_id for e in events if isinstance(e, ResourceActivated)] == [uuid(3)]
    assert client.state.resources.ids == {uuid(2), uuid(3)}
    assert client.send("10.0.0.1") is DropReason.UNKNOWN_RESOURCE
