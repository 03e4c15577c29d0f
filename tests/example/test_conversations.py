"""Conversations: lists and pages, conditional requests, repeated requests, branches, search."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.support.service import SECRET, Service, ask, exchange, load, new_conversation, settled, stored

FIELDS = {"id", "title", "archived", "pinned", "created_at", "updated_at", "etag"}


async def pages(client: httpx.AsyncClient, path: str, **params: Any) -> list[list[dict[str, Any]]]:
    """Return the items of all pages."""
    found = []
    params = dict(httpx.URL(path).params) | params
    while True:
        answer = await client.get(path, params=params)
        assert answer.status_code == 200, answer.text
        found.append(answer.json()["items"])
        params["after"] = answer.json()["next"]
        if params["after"] is None:
            return found


async def test_create(alice: httpx.AsyncClient) -> None:
    """A new conversation is found at its Location, with the same body and ETag."""
    answer = await alice.post("/api/conversations", json={"title": f"{SECRET} <b>\u2028"})
    created = answer.json()
    assert answer.status_code == 201
    assert set(created) == FIELDS
    assert (created["title"], created["archived"], created["pinned"]) == (f"{SECRET} <b>\u2028", False, False)
    assert answer.headers["etag"] == created["etag"]
    found = await alice.get(answer.headers["location"])
    assert found.headers["etag"] == answer.headers["etag"]
    body = found.json()
    assert set(body) == {"conversation", "messages", "versions", "before", "events"}
    assert (body["conversation"], body["messages"], body["versions"], body["before"]) == (created, [], {}, None)


@pytest.mark.parametrize("body", [{}, {"title": None}])
async def test_no_title(alice: httpx.AsyncClient, body: dict[str, None]) -> None:
    """The title may be null or missing."""
    answer = await alice.post("/api/conversations", json=body)
    assert (answer.status_code, answer.json()["title"]) == (201, None)


async def test_the_list(alice: httpx.AsyncClient) -> None:
    """The pages of the list have each conversation once, the newest first, with the newest text."""
    ids = [(await new_conversation(alice, f"{SECRET} {number}"))["id"] for number in range(5)]
    await ask(alice, ids[0], f"{SECRET} " + "long " * 100)
    await settled(alice, ids[0])
    found = await pages(alice, "/api/conversations", limit=2)
    assert [len(page) for page in found] == [2, 2, 1]
    assert [item["id"] for page in found for item in page] == [ids[0], *ids[:0:-1]]
    first, second = found[0]
    assert set(first) == FIELDS | {"preview"}
    assert first["preview"]["role"] == "assistant"
    assert 0 < len(first["preview"]["text"]) <= 200
    assert second["preview"] is None


async def test_archived_and_pinned(alice: httpx.AsyncClient) -> None:
    """Archived conversations have a list of their own, and all pinned ones come at once."""
    first, second, third = [(await new_conversation(alice))["id"] for _ in range(3)]
    for conversation, change in ((first, {"archived": True}), (second, {"pinned": True})):
        answer = await alice.patch(f"/api/conversations/{conversation}", json=change)
        assert (answer.status_code, answer.json() | change) == (200, answer.json())
    listed = {
        query: [item["id"] for page in await pages(alice, f"/api/conversations?{query}") for item in page]
        for query in ("archived=false", "archived=true", "pinned=true", "")
    }
    assert listed == {
        "archived=false": [third, second],
        "archived=true": [first],
        "pinned=true": [second],
        "": [third, second],
    }
    answer = await alice.patch(f"/api/conversations/{first}", json={"archived": False, "title": None})
    assert (answer.json()["archived"], answer.json()["title"]) == (False, None)


@pytest.mark.parametrize("after", ["x", SECRET, "c1AAAA", "c1" + "A" * 32, "", "\0", "é"])
@pytest.mark.parametrize("path", ["/api/conversations", "/api/search?q=x"])
async def test_forged_cursors(alice: httpx.AsyncClient, path: str, after: str) -> None:
    """A cursor that the service did not make is rejected, or begins a list of the user's own."""
    answer = await alice.get(path, params=dict(httpx.URL(path).params) | {"after": after})
    if after == "c1" + "A" * 32 and path == "/api/conversations":  # well-formed: before everything
        assert (answer.status_code, answer.json()["items"]) == (200, [])
    else:
        assert answer.status_code == 422


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "x", "1.5", "9" * 30, ""])
@pytest.mark.parametrize("path", ["/api/conversations", "/api/conversations/{}", "/api/search?q=x"])
async def test_limits(alice: httpx.AsyncClient, path: str, limit: str) -> None:
    """A page of nothing, of a thousand, or of no number is rejected."""
    conversation = (await new_conversation(alice))["id"]
    url = path.format(conversation)
    answer = await alice.get(url, params=dict(httpx.URL(url).params) | {"limit": limit})
    assert answer.status_code == 422


async def test_if_match(alice: httpx.AsyncClient) -> None:
    """A change or deletion with the current ETag succeeds, with an old one it changes nothing."""
    created = await new_conversation(alice)
    path, old = f"/api/conversations/{created['id']}", created["etag"]
    changed = await alice.patch(path, json={"title": f"{SECRET} 2"}, headers={"If-Match": old})
    assert changed.status_code == 200
    new = changed.headers["etag"]
    assert new != old
    await ask(alice, created["id"])
    await settled(alice, created["id"])
    for stale in (old, new):
        for method, url, body in (
            ("PATCH", path, {"title": f"{SECRET} 3"}),
            ("PUT", f"{path}/head", {"seq": 1}),
            ("DELETE", path, None),
        ):
            answer = await alice.request(method, url, json=body, headers={"If-Match": stale})
            assert answer.status_code == 412, (method, answer.text)
    loaded = await alice.get(path)
    assert loaded.json()["conversation"]["title"] == f"{SECRET} 2"
    assert len(loaded.json()["messages"]) == 2
    current = {"If-Match": loaded.headers["etag"]}
    answer = await alice.put(f"{path}/head", json={"seq": 1}, headers=current)
    assert answer.status_code == 200, answer.text
    assert (await alice.patch(path, json={"pinned": True}, headers={"If-Match": "*"})).status_code == 200
    current = {"If-Match": (await alice.get(path)).headers["etag"]}
    deleted = await alice.delete(path, headers=current)
    assert (deleted.status_code, deleted.json()) == (200, {"conversations": 1, "messages": 2})
    for header in ({}, current, {"If-Match": "*"}):
        assert (await alice.delete(path, headers=header)).status_code == 404


@pytest.mark.parametrize(
    "header", [SECRET, '"', '""', '"e1"', f'"{SECRET}"', 'W/"e1"', '"x", "y"', "e1AAAA", '"é"', ""]
)
async def test_a_malformed_if_match(alice: httpx.AsyncClient, header: str) -> None:
    """An If-Match that is no ETag of this service changes nothing."""
    path = f"/api/conversations/{(await new_conversation(alice))['id']}"
    for method, body in (("PATCH", {"title": "changed"}), ("DELETE", None)):
        answer = await alice.request(method, path, json=body, headers={"If-Match": header.encode("latin-1")})
        assert answer.status_code in (412, 422), (method, answer.status_code)
    assert (await alice.get(path)).json()["conversation"]["title"] == SECRET


async def test_a_weak_etag_does_not_match(alice: httpx.AsyncClient) -> None:
    """A weak ETag never matches in If-Match."""
    created = await new_conversation(alice)
    header = {"If-Match": f"W/{created['etag']}"}
    answer = await alice.patch(f"/api/conversations/{created['id']}", json={"title": "changed"}, headers=header)
    assert answer.status_code in (412, 422)


async def test_if_none_match(alice: httpx.AsyncClient) -> None:
    """A conversation that has not changed is not sent again."""
    conversation = await exchange(alice)
    path = f"/api/conversations/{conversation}"
    etag = (await alice.get(path)).headers["etag"]
    for header in (etag, f"W/{etag}", f'"x", {etag}'):
        answer = await alice.get(path, headers={"If-None-Match": header})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag), header
    assert (await alice.get(path, headers={"If-None-Match": '"x"'})).status_code == 200
    await alice.patch(path, json={"pinned": True})
    assert (await alice.get(path, headers={"If-None-Match": etag})).status_code == 200


async def test_a_growing_answer_is_sent_again(alice: httpx.AsyncClient) -> None:
    """A conversation whose answer grows, which does not change its ETag, is not taken for unchanged."""
    conversation = (await new_conversation(alice))["id"]
    await ask(alice, conversation, f"write a long story about {SECRET}")
    path = f"/api/conversations/{conversation}"
    first = await alice.get(path)
    await asyncio.sleep(0.5)
    second = await alice.get(path, headers={"If-None-Match": first.headers["etag"]})
    assert second.status_code == 200
    assert len(second.json()["messages"][1]["content"]) > len(first.json()["messages"][1]["content"])
    await alice.post(f"{path}/messages/2/stop")


async def test_a_repeated_creation(service: Service, alice: httpx.AsyncClient) -> None:
    """Ten requests at once with one key, on both workers, create one conversation; with another title none."""
    bearer = alice.headers["Authorization"].removeprefix("Bearer ")
    header = {"Idempotency-Key": "k" * 255}
    async with service.client(bearer, 0) as one, service.client(bearer, 1) as two:
        calls = [each.post("/api/conversations", json={"title": SECRET}, headers=header) for each in (one, two) * 5]
        answers = await asyncio.gather(*calls)
    assert {answer.status_code for answer in answers} <= {200, 201}
    assert len({answer.text for answer in answers}) == len({answer.headers["location"] for answer in answers}) == 1
    again = await alice.post("/api/conversations", json={"title": "other"}, headers=header)
    assert again.status_code == 422
    assert [len(page) for page in await pages(alice, "/api/conversations")] == [1]


@pytest.mark.parametrize("key", [b"", b"x" * 256, "é".encode(), b"\x01", b"a\tb"])
async def test_bad_keys(alice: httpx.AsyncClient, key: bytes) -> None:
    """A key that is empty, long or not printable is rejected."""
    conversation = (await new_conversation(alice))["id"]
    for path, body in (
        ("/api/conversations", {"title": "x"}),
        (f"/api/conversations/{conversation}/messages", {"content": "x"}),
        (f"/api/conversations/{conversation}/answers", {"parent_seq": 1}),
    ):
        answer = await alice.post(path, json=body, headers=[(b"Idempotency-Key", key)])
        assert answer.status_code in (400, 422), path  # the parser of HTTP rejects control characters


async def test_earlier_pages(service: Service, alice: httpx.AsyncClient) -> None:
    """A long line comes in pages, each oldest first, which together have each message once."""
    conversation = (await new_conversation(alice))["id"]
    for number in range(4):
        await ask(alice, conversation, f"{SECRET} {number}")
        await settled(alice, conversation)
    page = (await alice.get(f"/api/conversations/{conversation}", params={"limit": 3})).json()
    found = [[message["seq"] for message in page["messages"]]]
    while page["before"] is not None:
        path = f"/api/conversations/{conversation}/messages"
        answer = await alice.get(path, params={"limit": 3, "before": page["before"]})
        page = answer.json()
        assert set(page) == {"messages", "versions", "before"}
        found.append([message["seq"] for message in page["messages"]])
    assert found == [[6, 7, 8], [3, 4, 5], [1, 2]]
    for before in ("x", SECRET, "-1", "9" * 30, ""):
        answer = await alice.get(f"/api/conversations/{conversation}/messages", params={"before": before})
        assert answer.status_code == 422, before


async def test_versions(service: Service, alice: httpx.AsyncClient) -> None:
    """An edited question and another answer are versions, of which the head selects one."""
    conversation = await exchange(alice, f"first {SECRET}")
    path = f"/api/conversations/{conversation}"
    edited = await ask(alice, conversation, f"second {SECRET}", parent_seq=0)
    assert (edited["message"]["seq"], edited["answer"]["seq"], edited["message"]["parent_seq"]) == (3, 4, 0)
    await settled(alice, conversation)
    again = await alice.post(f"{path}/answers", json={"parent_seq": 3})
    assert (again.status_code, again.json()["answer"]["seq"]) == (202, 5)
    line = await settled(alice, conversation)
    assert [message["seq"] for message in line] == [3, 5]
    loaded = await load(alice, conversation)
    assert loaded["versions"] == {"3": [1, 3], "5": [4, 5]}
    for seq, expected, versions in ((4, [3, 4], {"3": [1, 3], "4": [4, 5]}), (1, [1, 2], {"1": [1, 3]})):
        answer = await alice.put(f"{path}/head", json={"seq": seq})
        assert answer.status_code == 200
        assert answer.headers["etag"] == answer.json()["conversation"]["etag"]
        body = await load(alice, conversation)
        assert answer.json() == body
        assert ([message["seq"] for message in body["messages"]], body["versions"]) == (expected, versions)
    assert (await alice.put(f"{path}/head", json={"seq": 99})).status_code == 404
    assert [row[0] for row in stored(service.dsn, conversation)] == [1, 2, 3, 4, 5]


async def test_search(alice: httpx.AsyncClient) -> None:
    """Search finds parts of words in all conversations, the newest first, page by page."""
    found = [await exchange(alice, f"{SECRET} needle{number} in the hay") for number in range(3)]
    await exchange(alice, f"{SECRET} nothing")
    items = [each for page in await pages(alice, "/api/search", q="eedle", limit=2) for each in page]
    questions = [item for item in items if item["role"] == "user"]
    assert [item["conversation_id"] for item in questions] == found[::-1]
    assert set(items[0]) >= {"conversation_id", "seq", "role", "snippet", "created_at"}
    assert "needle2" in questions[0]["snippet"]
    for text in ("", "\0", "x" * 10_001):
        assert (await alice.get("/api/search", params={"q": text})).status_code == 422
    assert (await alice.get("/api/search")).status_code == 422
    assert (await alice.get("/api/search", params={"q": "%_\\"})).json() == {"items": [], "next": None}
