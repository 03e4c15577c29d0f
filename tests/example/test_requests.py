"""Requests that no route takes, the page and its headers, and what health and readiness say."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.support.service import SECRET, Service, load, new_conversation, stored

JSON = {"Content-Type": "application/json"}


async def test_the_page(service: Service) -> None:
    """The page and its files come with strict headers, and name no other host."""
    async with service.client() as client:
        page = await client.get("/")
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert page.headers["content-security-policy"] == (
            "default-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
        )
        found = re.findall(r'(?:src|href)="(/[^"#]+)"', page.text)
        assert len(found) >= 2
        for path in found:
            file = await client.get(path)
            assert file.status_code == 200, path
            assert re.search(r"https?://(?!www\.w3\.org)", file.text) is None, path
            assert file.headers["x-content-type-options"] == "nosniff"
            assert file.headers["referrer-policy"] == "no-referrer"
        assert page.headers["x-content-type-options"] == "nosniff"
        assert page.headers["referrer-policy"] == "no-referrer"
        assert re.search(r"style=|<script>|https?://", page.text) is None
        for path in ("/static/../service.py", "/static/%2e%2e/service.py", "/static//etc/passwd", "/static/", "/x"):
            assert (await client.get(path)).status_code == 404, path


async def test_health_and_readiness(service: Service) -> None:
    """A service that works is alive and ready."""
    async with service.client() as client:
        for path in ("/health", "/ready"):
            assert (await client.get(path)).status_code == 200


async def test_no_docs_of_a_foreign_host(service: Service) -> None:
    """The interactive documentation, whose scripts come from a foreign host, is off."""
    async with service.client() as client:
        for path in ("/docs", "/redoc"):
            assert (await client.get(path)).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api", 404),
        ("GET", "/api/unknown", 404),
        ("PUT", "/api/conversations", 405),
        ("GET", "/api/guests", 405),
        ("POST", "/health", 405),
        ("DELETE", "/", 405),
        ("GET", "/api/conversations/x", 422),
        ("GET", "/api/conversations/0", 404),
        ("GET", "/api/conversations/-1", 422),
        ("GET", "/api/conversations/9223372036854775807", 404),
        ("GET", "/api/conversations/9223372036854775808", 422),
        ("GET", "/api/conversations/1.0", 422),
        ("GET", "/api/conversations/" + "9" * 5000, 422),
        ("GET", "/api/conversations/%00", 422),
        ("POST", "/api/conversations/1/messages/x/stop", 422),
    ],
)
async def test_wrong_addresses(alice: httpx.AsyncClient, method: str, path: str, status: int) -> None:
    """An unknown path, a wrong method and an id that is no number are problems too."""
    answer = await alice.request(method, path)
    assert answer.status_code in ({status, 404} if status == 422 else {status})
    if status == 405:
        assert answer.headers["allow"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", {400}),
        (b'{"title": "' + SECRET.encode() + b'"', {400}),
        (b"\xff\xfe", {400}),
        (b'{"title": "\xff"}', {400}),
        (b'{"title": "\\ud800"}', {422}),
        (b'{"title": "\\u0000"}', {422}),
        (b'{"title": NaN}', {400, 422}),
        (b'{"title": ' + b"9" * 5000 + b"}", {400, 422}),
        (b"[" * 100_000, {400}),
        (b'{"title":' * 50_000 + b"1" + b"}" * 50_000, {400, 422}),
        (b'["XYZZY"]', {422}),
        (b'"XYZZY"', {422}),
        (b"null", {422}),
        (json.dumps({"title": "x" * 1001}).encode(), {422}),
        (b'{"title": 7}', {422}),
        (b'{"title": {"XYZZY": 1}}', {422}),
    ],
    ids=lambda value: repr(value)[:25],
)
async def test_bad_bodies(alice: httpx.AsyncClient, content: bytes, status: set[int]) -> None:
    """A body that is no JSON, or another value, is a problem that does not repeat it."""
    answer = await alice.post("/api/conversations", content=content, headers=JSON)
    assert answer.status_code in status
    assert (await alice.get("/api/conversations")).json()["items"] == []


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonx", "", "x", None],
)
async def test_another_content_type(alice: httpx.AsyncClient, kind: str | None) -> None:
    """Only JSON is taken as JSON."""
    conversation = (await new_conversation(alice))["id"]
    for path in ("/api/conversations", f"/api/conversations/{conversation}/messages"):
        headers = {} if kind is None else {"Content-Type": kind}
        answer = await alice.post(path, content=json.dumps({"title": SECRET, "content": SECRET}), headers=headers)
        assert answer.status_code == 415
    assert len((await alice.get("/api/conversations")).json()["items"]) == 1


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "APPLICATION/JSON"])
async def test_json(alice: httpx.AsyncClient, kind: str) -> None:
    """The content type of JSON may have parameters, and any case."""
    answer = await alice.post("/api/conversations", content=b'{"title": "x"}', headers={"Content-Type": kind})
    assert answer.status_code == 201


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("size", "status"), [(1_000_000, 422), (1_000_001, 413), (5_000_000, 413)])
async def test_the_largest_body(alice: httpx.AsyncClient, size: int, status: int, chunked: bool) -> None:
    """A body over 1 MB is refused, whether or not its length is announced."""
    conversation = (await new_conversation(alice))["id"]
    body = b'{"content": "' + b"x" * (size - 15) + b'"}'
    assert len(body) == size

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, size, 100_000):
            yield body[start : start + 100_000]

    path = f"/api/conversations/{conversation}/messages"
    answer = await alice.post(path, content=chunks() if chunked else body, headers=JSON)
    assert answer.status_code == status
    assert (await alice.get("/api/me")).status_code == 200


async def test_a_body_that_never_ends(service: Service, alice: httpx.AsyncClient) -> None:
    """A client that goes away in the middle of its body leaves nothing behind, and no error in the log."""
    request = (
        f"POST /api/conversations HTTP/1.1\r\nHost: x\r\nAuthorization: {alice.headers['Authorization']}\r\n"
        'Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"title": "XYZZY'
    )
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(request.encode())
    assert (await alice.get("/api/conversations")).json()["items"] == []


async def test_text_is_text(service: Service, alice: httpx.AsyncClient) -> None:
    """Markup and scripts in titles and messages come back as they are, as JSON."""
    script = f"<script>alert('{SECRET}')</script>\u2028&amp;🎲\u202e"
    conversation = (await new_conversation(alice, script))["id"]
    path = f"/api/conversations/{conversation}"
    assert (await alice.post(f"{path}/messages", json={"content": script})).status_code == 202
    answer = await alice.get(path)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    loaded = await load(alice, conversation)
    assert loaded["conversation"]["title"] == loaded["messages"][0]["content"] == script
    assert stored(service.dsn, conversation)[0][1] == script
