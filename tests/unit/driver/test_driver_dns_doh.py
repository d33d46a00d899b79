"""DNS over HTTPS with a real TLS server (RFC 8484; spec/tunnel.md 10 and 23)."""

from __future__ import annotations

import base64
import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import dns.message
import h11
import pytest
import trio
import trio.testing
from driver_dns_peers import LOOPBACK, Asked, Peer, reply, zone

from fz_core.driver.names.dns_client import DnsFailed, DnsTimeout, TooBusy
from fz_core.driver.names.doh import DohClient

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")

HOST = "doh.example"
# RFC 8484 §4.1.1 and its answer in §4.2.2, made of the fields printed there
RFC_QUERY = dns.message.make_query("www.example.com", "A", id=0xBEEF).to_wire()
RFC_ENCODED = "AAABAAABAAAAAAAAA3d3dwdleGFtcGxlA2NvbQAAAQAB"
QUERY = dns.message.make_query("www.example", "A", id=0x1234).to_wire()


class Request(NamedTuple):
    """What the server saw. `parameter` is the text after dns=."""

    parameter: str
    path: str
    headers: dict[str, str]
    server_name: str | None
    connection: int


Answer = Callable[[Request], "tuple[int, str, bytes] | None"]


@pytest.mark.shows("tunnel", 58)
async def test_the_first_query_fails_at_once_and_a_later_one_works(system: System) -> None:
    client = await system.start()
    with pytest.raises(DnsFailed, match="bootstrapping"):
        await client.exchange(system.url, QUERY)
    await system.ready(client)
    found = dns.message.from_wire(await client.exchange(system.url, QUERY))
    assert found.id == 0x1234
    assert found.answer[0][0].address == "192.0.2.7"


@pytest.mark.shows("tunnel", 56)
async def test_the_example_of_the_rfc(system: System) -> None:
    client = await system.start()
    system.answer = lambda request: ok(request, ttl=3709)
    await system.ready(client)
    found = dns.message.from_wire(await client.exchange(system.url, RFC_QUERY))
    assert system.requests[-1].parameter == RFC_ENCODED
    assert system.requests[-1].path == "/dns-query"
    assert system.requests[-1].headers["accept"] == "application/dns-message"
    assert (found.id, found.answer[0].ttl) == (0xBEEF, 3709)


async def test_the_name_is_asked_of_the_given_servers_and_shown_to_the_server(system: System) -> None:
    client = await system.start()
    await system.ready(client)
    await client.exchange(system.url, QUERY)
    assert {asked.name for asked in system.names.asked} == {HOST}
    assert system.requests[-1].server_name == HOST
    assert system.requests[-1].headers["host"] == f"{HOST}:{system.port}"


async def test_prepared_servers_are_ready_for_the_first_query(system: System) -> None:
    client = await system.start()
    client.prepare([system.url])
    await system.until(lambda: client.is_ready(system.url))
    assert await client.exchange(system.url, QUERY)
    client.prepare([])
    with pytest.raises(DnsFailed, match="bootstrapping"):
        await client.exchange(system.url, QUERY)


async def test_one_connection_serves_many_queries(system: System) -> None:
    client = await system.start()
    await system.ready(client)
    for _ in range(5):
        await client.exchange(system.url, QUERY)
    assert {request.connection for request in system.requests} == {1}


async def test_queries_at_the_same_time_get_their_own_answers(system: System) -> None:
    client = await system.start()
    await system.ready(client)
    found: dict[int, str] = {}

    async def ask(n: int) -> None:
        query = dns.message.make_query(f"n{n}.example", "A", id=n)
        message = dns.message.from_wire(await client.exchange(system.url, query.to_wire()))
        found[message.id] = message.question[0].name.to_text()

    async with trio.open_nursery() as nursery:
        for n in range(50):
            nursery.start_soon(ask, n)
    assert found == {n: f"n{n}.example." for n in range(50)}
    assert len({request.connection for request in system.requests}) <= 8


async def test_a_closed_connection_is_replaced_within_the_query(system: System) -> None:
    client = await system.start()
    await system.ready(client)
    await client.exchange(system.url, QUERY)
    await system.close_connections()
    assert await client.exchange(system.url, QUERY)
    assert [request.connection for request in system.requests] == [1, 2]


async def test_the_prepared_connection_may_close_before_it_is_used(system: System) -> None:
    client = await system.start()
    await system.ready(client)
    await system.close_connections()
    assert await client.exchange(system.url, QUERY)


async def test_a_server_that_went_away_is_bootstrapped_again(system: System) -> None:
    client = await system.start()
    await system.ready(client)
    await client.exchange(system.url, QUERY)
    await system.stop_serving()
    with pytest.raises(DnsFailed) as caught:
        await client.exchange(system.url, QUERY)
    assert "\n" not in str(caught.value)
    await system.serve()
    await system.ready(client)
    assert await client.exchange(system.url, QUERY)


class TestRefusals:
    @pytest.mark.parametrize(
        "answer",
        [
            (404, "application/dns-message", b""),
            (301, "application/dns-message", b""),
            (200, "application/dns-message; charset=utf-8", b""),
            (200, "text/html", b""),
            (200, "application/dns-message", b"garbage"),
            (200, "application/dns-message", b""),
            (200, "application/dns-message", bytes(65_536)),
        ],
    )
    async def test_answers_that_are_none(self, system: System, answer: tuple[int, str, bytes]) -> None:
        client = await system.start()
        await system.ready(client)

        def instead(request: Request) -> tuple[int, str, bytes]:
            _, _, body = ok(request)
            return answer[0], answer[1], answer[2] or (body if answer[0] != 200 or "/dns-m" not in answer[1] else b"")

        system.answer = instead
        with pytest.raises(DnsFailed) as caught:
            await client.exchange(system.url, QUERY)
        assert "\n" not in str(caught.value)

    async def test_an_answer_to_another_question(self, system: System) -> None:
        client = await system.start()
        await system.ready(client)
        other = dns.message.make_response(dns.message.make_query("evil.example", "A", id=0)).to_wire()
        system.answer = lambda request: (200, "application/dns-message", other)
        with pytest.raises(DnsFailed, match="another question"):
            await client.exchange(system.url, QUERY)

    async def test_a_certificate_for_another_name(self, system: System) -> None:
        client = await system.start()
        url = system.url.replace(HOST, "other.example")
        with pytest.raises(DnsFailed, match="bootstrapping"):
            await client.exchange(url, QUERY)
        await system.until(lambda: client.is_idle)
        assert not client.is_ready(url)
        assert system.requests == []

    async def test_an_unknown_authority(self, system: System) -> None:
        client = await system.start(tls=ssl.create_default_context())
        with pytest.raises(DnsFailed, match="bootstrapping"):
            await client.exchange(system.url, QUERY)
        await system.until(lambda: client.is_idle)
        assert not client.is_ready(system.url)

    @pytest.mark.parametrize("url", ["http://doh.example/x", "https:///x", "https://doh.example/x?y=z", "https://a:b/"])
    async def test_urls_that_are_none(self, system: System, url: str) -> None:
        client = await system.start()
        for _ in range(2):
            with pytest.raises(DnsFailed):
                await client.exchange(url, QUERY)
            await system.until(lambda: client.is_idle)

    async def test_no_query(self, system: System) -> None:
        client = await system.start()
        with pytest.raises(DnsFailed, match="not a DNS query"):
            await client.exchange(system.url, b"\x00")


async def test_silence_ends_after_five_seconds(system: System, autojump_clock: trio.testing.MockClock) -> None:
    autojump_clock.autojump_threshold = 0.1
    client = await system.start()
    await system.ready(client)
    system.answer = lambda request: None
    started = trio.current_time()
    with pytest.raises(DnsTimeout, match="within 5 s"):
        await client.exchange(system.url, QUERY)
    assert trio.current_time() - started == pytest.approx(5.0, abs=0.5)


async def test_a_server_that_never_finishes_bootstrapping(
    system: System, autojump_clock: trio.testing.MockClock
) -> None:
    """At most ten at once; each gives up after 5 s."""
    autojump_clock.autojump_threshold = 0.1
    client = await system.start()
    system.names.answer = lambda asked: None
    for n in range(20):
        with pytest.raises(DnsFailed, match="bootstrapping"):
            await client.exchange(f"https://n{n}.example/dns-query", QUERY)
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert len({asked.name for asked in system.names.asked}) == 10
    await trio.sleep(5.5)
    assert client.is_idle


async def test_a_reset_fails_what_is_under_way_and_starts_over(system: System) -> None:
    client = await system.start()
    await system.ready(client)
    system.answer = lambda request: None
    failed: list[str] = []

    async def ask() -> None:
        try:
            await client.exchange(system.url, QUERY)
        except DnsFailed as error:
            failed.append(str(error))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await system.until(lambda: len(system.requests) == 1)
        client.reset()
    assert failed == ["the network was reset"]
    system.answer = ok
    await system.ready(client)
    assert await client.exchange(system.url, QUERY)


async def test_above_a_thousand_queries(system: System) -> None:
    client = await system.start()
    await system.ready(client)
    system.answer = lambda request: None

    async def ask() -> None:
        with pytest.raises(DnsFailed, match="reset"):
            await client.exchange(system.url, QUERY)

    async with trio.open_nursery() as nursery:
        for _ in range(1000):
            nursery.start_soon(ask)
        await system.until(lambda: client.in_flight == 1000)
        with pytest.raises(TooBusy):
            await client.exchange(system.url, QUERY)
        client.reset()


def ok(request: Request, ttl: int = 300) -> tuple[int, str, bytes]:
    """An answer to the question in the request."""
    wire = base64.urlsafe_b64decode(request.parameter + "=" * (-len(request.parameter) % 4))
    message = dns.message.from_wire(wire)
    assert message.id == 0
    question = Asked("https", "", message.question[0].rdtype.name, 0, message)
    return 200, "application/dns-message", reply(question, "192.0.2.7", ttl=ttl)


class System:
    """A DoH server, the name server that knows it, and a client."""

    def __init__(self, nursery: trio.Nursery, certificates: Path, hosts: Path) -> None:
        self._nursery, self._certificates, self._hosts = nursery, certificates, hosts
        self.answer: Answer = ok
        self.requests: list[Request] = []
        self.names = Peer(zone({(name, "A"): ["127.0.0.1"] for name in (HOST, "other.example")}))
        self.port = 0
        self._connections = 0
        self._open: list[trio.SocketStream] = []
        self._serving = trio.CancelScope()

    @property
    def url(self) -> str:
        return f"https://{HOST}:{self.port}/dns-query"

    async def start(self, tls: ssl.SSLContext | None = None) -> DohClient:
        self._nursery.start_soon(self.names.run)
        await self.serve()
        trusting = tls or ssl.create_default_context(cafile=self._certificates / "ca.pem")
        client = DohClient(lambda: [LOOPBACK], marked=False, tls=trusting, hosts=self._hosts, dns_port=self.names.port)
        self._nursery.start_soon(client.run)
        return client

    async def ready(self, client: DohClient) -> None:
        client.prepare([self.url])
        await self.until(lambda: client.is_ready(self.url))

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(20):
            while not condition():
                await trio.lowlevel.checkpoint()

    async def serve(self) -> None:
        self._serving = trio.CancelScope()
        listeners = await trio.open_tcp_listeners(self.port, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        self._nursery.start_soon(self._serve, listeners)

    async def stop_serving(self) -> None:
        self._serving.cancel()
        await trio.testing.wait_all_tasks_blocked(0.01)

    async def close_connections(self) -> None:
        for stream in self._open:
            await trio.aclose_forcefully(stream)
        self._open.clear()
        await trio.testing.wait_all_tasks_blocked(0.01)

    async def _serve(self, listeners: list[trio.SocketListener]) -> None:
        with self._serving:
            await trio.serve_listeners(self._handle, listeners)

    async def _handle(self, plain: trio.SocketStream) -> None:
        self._connections += 1
        number = self._connections
        self._open.append(plain)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._certificates / "server.pem", self._certificates / "server.key")
        context.set_alpn_protocols(["http/1.1"])
        names: list[str | None] = []
        context.sni_callback = lambda sock, name, ctx: names.append(name)
        stream = trio.SSLStream(plain, context, server_side=True, https_compatible=True)
        try:
            await self._talk(stream, names, number)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            await trio.aclose_forcefully(stream)

    async def _talk(self, stream: trio.SSLStream[trio.SocketStream], names: list[str | None], number: int) -> None:
        http = h11.Connection(h11.SERVER)
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                data = await stream.receive_some()
                http.receive_data(bytes(data))
                if not data:
                    return
            elif isinstance(event, h11.Request):
                parts = urlsplit(event.target.decode())
                headers = {name.decode().lower(): value.decode() for name, value in event.headers}
                parameter = parse_qs(parts.query, keep_blank_values=True)["dns"][0]
                request = Request(parameter, parts.path, headers, names[0], number)
                self.requests.append(request)
            elif isinstance(event, h11.EndOfMessage):
                answer = self.answer(request)
                if answer is None:
                    await trio.sleep_forever()
                status, kind, body = answer
                head = h11.Response(
                    status_code=status, headers=[("Content-Type", kind), ("Content-Length", str(len(body)))]
                )
                for part in (head, h11.Data(data=body), h11.EndOfMessage()):
                    await stream.send_all(http.send(part) or b"")
                http.start_next_cycle()


@pytest.fixture
def system(nursery: trio.Nursery, certificates: Path, tmp_path: Path) -> System:
    return System(nursery, certificates, tmp_path / "hosts")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority (`ca.pem`), and a server certificate of it for HOST alone."""
    folder = tmp_path_factory.mktemp("certificates")
    for command in (
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.pem -days 2"
        " -subj /CN=test -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign",
        f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout server.key -out server.pem -days 2"
        f" -subj /CN={HOST} -addext subjectAltName=DNS:{HOST} -addext basicConstraints=critical,CA:FALSE"
        " -CA ca.pem -CAkey ca.key",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    return folder
