"""`/healthz` and `/readyz`."""

from __future__ import annotations

import pytest
import trio

from fz_core.driver.health import HealthServer


async def ask(port: int, request: bytes) -> bytes:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    await stream.send_all(request)
    data = b""
    try:
        async for chunk in stream:
            data += chunk
    except trio.BrokenResourceError:
        pass
    return data.partition(b"\r\n")[0]


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


async def test_health_is_always_200_and_readiness_the_truth() -> None:
    ready = [False]
    async with trio.open_nursery() as nursery:
        port = await nursery.start(HealthServer(("127.0.0.1", 0)).run, lambda: ready[0])
        assert await ask(port, get("/healthz")) == b"HTTP/1.1 200 "
        assert await ask(port, get("/readyz")) == b"HTTP/1.1 503 "
        ready[0] = True
        assert await ask(port, get("/readyz?x=1")) == b"HTTP/1.1 200 "
        assert await ask(port, get("/metrics")) == b"HTTP/1.1 404 "
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("junk", [b"\r\n\r\n", b"\x16\x03\x01\x00", b"GET " + b"a" * 100_000])
async def test_junk_does_not_end_it(junk: bytes) -> None:
    async with trio.open_nursery() as nursery:
        port = await nursery.start(HealthServer(("127.0.0.1", 0)).run, lambda: True)
        try:
            await ask(port, junk + b"\r\n\r\n")
        except trio.BrokenResourceError:
            pass
        assert await ask(port, get("/healthz")) == b"HTTP/1.1 200 "
        nursery.cancel_scope.cancel()


async def test_a_taken_port_is_no_reason_to_end() -> None:
    async with trio.open_nursery() as nursery:
        port = await nursery.start(HealthServer(("127.0.0.1", 0)).run, lambda: True)
        assert await nursery.start(HealthServer(("127.0.0.1", port)).run, lambda: True) is None
        nursery.cancel_scope.cancel()
