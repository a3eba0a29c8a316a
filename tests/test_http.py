"""The HTTP under the server, byte by byte: what a well-behaved client never sends, and what it may."""

from __future__ import annotations

import contextlib
import json
import re

import pytest
import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tickwork.server import http, http_answer

LARGE = 2**26


async def echo(request: Request) -> Response:
    body = await request.body()
    return JSONResponse(
        {"size": len(body), "path": request.url.path, "query": request.url.query, "body": body.decode()[:9]}
    )


async def stream(request: Request) -> Response:
    async def parts():
        for part in (b"one", b"", b"two"):
            yield part

    return StreamingResponse(parts())


async def unread(request: Request) -> Response:
    return JSONResponse({})


async def large(request: Request) -> Response:
    return Response(bytes(LARGE))


async def broken(request: Request) -> Response:
    raise RuntimeError("no")


APP = Starlette(
    routes=[
        Route("/echo/{rest:path}", echo, methods=["GET", "POST"]),
        Route("/stream", stream),
        Route("/large", large),
        Route("/unread", unread, methods=["POST"]),
        Route("/broken", broken),
        Route("/gone", lambda request: Response(status_code=204), methods=["DELETE"]),
    ]
)


@pytest.fixture
async def server(nursery):
    """Serve on a free port; the test is given its number and the event that ends it."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    done = trio.Event()
    await nursery.start(http.serve_http, APP, listeners[0], done, 0.5)
    yield listeners[0].socket.getsockname()[1], done
    done.set()


async def sent(port, *parts, until=None):
    """Send parts and return all that comes back until the server closes, or until a pattern is there."""
    client = await trio.open_tcp_stream("127.0.0.1", port)
    found = b""
    with trio.fail_after(10):
        for part in parts:
            await client.send_all(part)
            await trio.lowlevel.checkpoint()
        while until is None or not re.search(until, found, re.DOTALL):
            data = await client.receive_some()
            if not data:
                break
            found += data
    await client.aclose()
    return found


def post(path, body, *headers):
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def test_a_request_in_single_bytes(server):
    whole = post("/echo/a%20b?c=d", b"hello", "Connection: close")
    answer = await sent(server[0], *(whole[i : i + 1] for i in range(len(whole))))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"connection: close" in head
    assert json.loads(body) == {"size": 5, "path": "/echo/a b", "query": "c=d", "body": "hello"}


async def test_several_requests_at_once_are_answered_in_order(server):
    asked = [post(f"/echo/{i}", bytes([48 + i]) * i) for i in range(4)]
    answer = await sent(server[0], b"".join(asked), until=rb'"/echo/3".*\}')
    assert re.findall(rb'"size":(\d)', answer) == [b"0", b"1", b"2", b"3"]
    assert answer.count(b"HTTP/1.1 200 OK") == 4


async def test_chunked_bodies(server):
    head = b"POST /echo/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    answer = await sent(server[0], head, b"3\r\nabc\r\n", b"2\r\nde\r\n0\r\n\r\n")
    assert b'"size":5' in answer


async def test_a_client_that_waits_for_permission(server):
    head = b"POST /echo/ HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    assert (await sent(server[0], head, until=rb"100 Continue\r\n\r\n")) == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert b'"size":2' in await sent(server[0], head, b"ok")


async def test_streams_are_chunked_or_end_with_the_connection(server):
    answer = await sent(server[0], b"GET /stream HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.endswith(b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")
    old = await sent(server[0], b"GET /stream HTTP/1.0\r\n\r\n")
    assert old.endswith(b"\r\n\r\nonetwo")


async def test_answers_without_a_body(server):
    head = await sent(server[0], b"HEAD /echo/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert head.endswith(b"\r\n\r\n")
    assert b"content-length: " in head
    gone = await sent(server[0], b"DELETE /gone HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert gone.startswith(b"HTTP/1.1 204 No Content")
    assert gone.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01 tls\r\n\r\n", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n"]
)
async def test_what_is_no_http_is_told_and_closed(server, garbage):
    answer = await sent(server[0], garbage)
    assert answer.startswith(b"HTTP/1.1 400 Bad Request")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["detail"]


async def test_two_lengths_are_refused(server):
    smuggled = b"POST /echo/ HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert (await sent(server[0], smuggled)).startswith(b"HTTP/1.1 400")


async def test_headers_are_bounded(server):
    answer = await sent(server[0], b"GET /echo/ HTTP/1.1\r\n", *[b"a: %b\r\n" % (b"b" * 8000)] * 20)
    assert answer.startswith(b"HTTP/1.1 431")


async def test_an_upgrade_is_answered_as_plain_http(server):
    asked = b"GET /echo/ HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    answer = await sent(server[0], asked)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in answer


async def test_a_body_that_nobody_reads_ends_the_connection(server):
    answer = await sent(server[0], post("/unread", b"x" * 10)[:-5])
    assert answer.startswith(b"HTTP/1.1 200")


async def test_an_error_of_the_application_shows_nothing(server, caplog):
    answer = await sent(server[0], b"GET /broken HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 500")
    assert b"RuntimeError" not in answer
    assert "a request failed" in caplog.text


async def test_a_slow_client_is_let_go(server, monkeypatch):
    monkeypatch.setattr(http, "READ_SECONDS", 0.05)
    assert await sent(server[0], b"POST /echo/ HTTP/1.1\r\nHost: x\r\nContent-Le") == b""
    assert b"200" not in await sent(server[0], post("/echo/", b"hello")[:-1])


async def test_an_idle_client_is_let_go_in_time(server, autojump_clock):
    """One that asked before, and one that never did; nobody else."""
    client, silent = [await trio.open_tcp_stream("127.0.0.1", server[0]) for _ in range(2)]
    await client.send_all(post("/echo/", b"hello"))
    assert b'"size":5' in await client.receive_some()
    began = trio.current_time()
    for each in (client, silent):
        assert await each.receive_some() == b""
        assert http.IDLE_SECONDS <= trio.current_time() - began + 1 <= 1.2 * http.IDLE_SECONDS
        await each.aclose()
    assert b'"size":5' in await sent(server[0], post("/echo/", b"hello", "Connection: close"))


async def test_a_client_that_does_not_read_is_let_go(server, monkeypatch):
    monkeypatch.setattr(http_answer, "WRITE_SECONDS", 0.1)
    client = await trio.open_tcp_stream("127.0.0.1", server[0])
    await client.send_all(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
    await trio.sleep(0.3)
    size = 0
    with trio.fail_after(10), contextlib.suppress(trio.BrokenResourceError):
        while data := await client.receive_some():
            size += len(data)
    assert size < LARGE
    await client.aclose()


async def test_a_head_has_a_time_of_its_own(server, monkeypatch, autojump_clock):
    """Byte by byte, each in time, is too slow all the same."""
    client = await trio.open_tcp_stream("127.0.0.1", server[0])
    began = trio.current_time()
    with pytest.raises(trio.BrokenResourceError):
        while True:
            await client.send_all(b"GET /")
            await trio.sleep(10)
    assert trio.current_time() - began < 3 * http.READ_SECONDS
    await client.aclose()


async def test_trailers_are_not_kept_and_have_an_end(server):
    """What comes after a body is not a header, and no client can send it for ever."""
    head = (
        b"POST /echo/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n3\r\nabc\r\n0\r\n"
    )
    assert b'"size":3' in await sent(server[0], head, b"x-checksum: 1\r\n\r\n")
    parser = http.Parser()
    parser.feed(head)
    request = parser.ready[0]
    parser.feed(b"x-checksum: 1\r\n")
    assert all(name != b"x-checksum" for name, _ in request.headers)
    with pytest.raises(http.httptools.HttpParserError, match="too much"):
        for _ in range(64):
            parser.feed(b"x" * 60 + b": " + b"y" * 4000 + b"\r\n")


@pytest.fixture
async def narrow(nursery):
    """Serve two connections at once."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    done = trio.Event()
    await nursery.start(http.serve_http, APP, listeners[0], done, 0.5, 2)
    yield listeners[0].socket.getsockname()[1]
    done.set()


async def test_past_the_bound_the_longest_idle_connection_goes(narrow):
    first, second = [await trio.open_tcp_stream("127.0.0.1", narrow) for _ in range(2)]
    await trio.testing.wait_all_tasks_blocked(0.05)
    await first.send_all(post("/echo/", b"a"))
    assert b'"size":1' in await first.receive_some()
    assert b'"size":2' in await sent(narrow, post("/echo/", b"ab", "Connection: close"))
    with trio.fail_after(5):
        assert await second.receive_some() == b"", "it was idle for longer"
        await first.send_all(post("/echo/", b"abc"))
        assert b'"size":3' in await first.receive_some()
    for client in (first, second):
        await client.aclose()


async def test_past_the_bound_and_none_idle_the_new_connection_is_turned_away(narrow):
    busy = [await trio.open_tcp_stream("127.0.0.1", narrow) for _ in range(2)]
    for client in busy:
        await client.send_all(post("/echo/", b"hello")[:-1])
    await trio.testing.wait_all_tasks_blocked(0.05)
    answer = await sent(narrow, post("/echo/", b""))
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"retry-after: 1" in answer
    with trio.fail_after(5):
        for client in busy:
            await client.send_all(b"o")
            assert b'"size":5' in await client.receive_some()
            await client.aclose()
    assert b'"size":0' in await sent(narrow, post("/echo/", b"", "Connection: close"))


async def test_the_end_closes_idle_connections_and_lets_busy_ones_answer(server):
    port, done = server
    idle, busy = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(2)]
    await busy.send_all(post("/echo/", b"hello")[:-1])
    await trio.testing.wait_all_tasks_blocked(0.05)
    done.set()
    with trio.fail_after(5):
        assert await idle.receive_some() == b""
        await busy.send_all(b"o")
        answer = await busy.receive_some()
    assert b"connection: close" in answer
    assert b'"size":5' in answer
    with pytest.raises(OSError, match="connect"):
        await trio.open_tcp_stream("127.0.0.1", port)
    await idle.aclose()
    await busy.aclose()


async def test_no_header_breaks_the_line():
    with pytest.raises(ValueError, match="line break"):
        http_answer.head_of(200, [(b"a", b"b\r\nc: d")], keep=True)
