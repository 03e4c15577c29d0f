"""Two users who try each other's ids, cursors, event ids, keys and ETags."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from tests.support.service import SECRET, STORY, Service, ask, events, exchange, load, new_conversation, settled, stored

MISSING = 9_000_000_000_000
REQUESTS: list[tuple[str, str, Any]] = [
    ("GET", "", None),
    ("PATCH", "", {"title": "taken"}),
    ("PATCH", "", {"archived": True, "pinned": True}),
    ("DELETE", "", None),
    ("GET", "/messages", None),
    ("POST", "/messages", {"content": f"taken {SECRET}"}),
    ("POST", "/messages", {"content": f"taken {SECRET}", "parent_seq": 1}),
    ("POST", "/answers", {"parent_seq": 1}),
    ("PUT", "/head", {"seq": 1}),
    ("POST", "/messages/2/stop", None),
    ("GET", "/events", None),
]


def test_every_route_is_tried(service: Service) -> None:
    """Each route with the id of a conversation is tried below."""
    tried = {
        (f"/api/conversations/{{id}}{path.replace('/2/', '/{seq}/')}", method.lower()) for method, path, _ in REQUESTS
    }
    routes = {
        (path, method)
        for path, operations in service.documented["paths"].items()
        for method in operations
        if path.startswith("/api/conversations/{")
    }
    assert {(path.replace("conversation_id", "id"), method) for path, method in routes} == tried


async def test_foreign_conversations(service: Service, alice: httpx.AsyncClient, bob: httpx.AsyncClient) -> None:
    """On every route, the conversation of another user and a missing one get the same answer; nothing changes."""
    conversation = await exchange(alice)
    before, rows = await load(alice, conversation), stored(service.dsn, conversation)
    cursor = (await alice.get(f"/api/conversations/{conversation}?limit=1")).json()["before"]
    etag = before["conversation"]["etag"]
    variants: list[dict[str, Any]] = [
        {},
        {"headers": {"If-Match": etag, "If-None-Match": etag}},
        {"headers": {"If-Match": "*", "If-None-Match": "*"}},
        {"headers": {"Idempotency-Key": "k"}},
        {"params": {"before": cursor}},
        {"params": {"after": before["events"]}},
        {"headers": {"Last-Event-ID": before["events"]}},
    ]
    for method, path, body in REQUESTS:
        for variant in variants:
            foreign, missing = [
                await bob.request(method, f"/api/conversations/{each}{path}", json=body, **variant)
                for each in (conversation, MISSING)
            ]
            is_complete = (method, path) != ("GET", "/messages") or "before" in variant.get("params", {})
            assert foreign.status_code == (404 if is_complete else 422), (method, path, variant)
            assert (foreign.status_code, foreign.content) == (missing.status_code, missing.content)
            names = [sorted(name for name in answer.headers if name != "date") for answer in (foreign, missing)]
            assert names[0] == names[1]
    assert await load(alice, conversation) == before
    assert stored(service.dsn, conversation) == rows


async def test_foreign_answers(service: Service, alice: httpx.AsyncClient, bob: httpx.AsyncClient) -> None:
    """Another user neither stops nor follows an answer that is being written."""
    conversation = (await new_conversation(alice))["id"]
    await ask(alice, conversation, STORY)
    path = f"/api/conversations/{conversation}"
    assert (await bob.post(f"{path}/messages/2/stop")).status_code == 404
    assert (await bob.get(f"{path}/events", params={"after": "0"})).status_code == 404
    messages = await settled(alice, conversation)
    assert messages[1]["state"] is None


async def test_foreign_tokens(service: Service, alice: httpx.AsyncClient, bob: httpx.AsyncClient) -> None:
    """Cursors, event ids and ETags of another user reach nothing of that user."""
    for number in range(3):
        await exchange(alice, f"{SECRET} needle {number}")
    theirs = (await new_conversation(bob, "bob's"))["id"]
    for path in ("/api/conversations?limit=1", "/api/search?q=needle&limit=1"):
        cursor = (await alice.get(path)).json()["next"]
        assert cursor is not None
        answer = await bob.get(path, params=dict(httpx.URL(path).params) | {"after": cursor})
        assert answer.status_code in (200, 422)
        assert SECRET not in answer.text
        items = answer.json().get("items", [])
        assert all(item.get("id") == theirs for item in items)
    listed = (await alice.get("/api/conversations")).json()["items"]
    for item in listed:
        header = {"If-Match": item["etag"]}
        answer = await bob.patch(f"/api/conversations/{theirs}", json={"title": "x"}, headers=header)
        assert answer.status_code == 412
        answer = await bob.get(f"/api/conversations/{theirs}", headers={"If-None-Match": item["etag"]})
        assert answer.status_code == 200
    events_id = (await load(alice, listed[0]["id"]))["events"]
    stream = events(bob, theirs, events_id)
    coming = asyncio.create_task(anext(stream))
    await asyncio.sleep(1)
    assert not coming.done()
    coming.cancel()
    await asyncio.gather(coming, return_exceptions=True)
    await stream.aclose()


async def test_one_key_of_two_users(alice: httpx.AsyncClient, bob: httpx.AsyncClient) -> None:
    """The same Idempotency-Key of two users, or in two conversations, is two keys."""
    header = {"Idempotency-Key": "same"}
    ids = []
    for client in (alice, bob):
        answer = await client.post("/api/conversations", json={"title": SECRET}, headers=header)
        assert answer.status_code == 201
        ids.append(answer.json()["id"])
    assert ids[0] != ids[1]
    other = (await new_conversation(alice))["id"]
    for client, conversation in ((alice, ids[0]), (alice, other), (bob, ids[1])):
        sent = await ask(client, conversation, f"{SECRET} {conversation}", headers=header)
        assert sent["message"]["content"] == f"{SECRET} {conversation}"
        await settled(client, conversation)


async def test_search_and_list(alice: httpx.AsyncClient, bob: httpx.AsyncClient) -> None:
    """Lists, searches and exports have nothing of another user."""
    await exchange(alice, f"{SECRET} needle")
    assert (await bob.get("/api/search", params={"q": "needle"})).json()["items"] == []
    for query in ("", "?archived=true", "?pinned=true"):
        assert (await bob.get(f"/api/conversations{query}")).json()["items"] == []
    assert (await bob.get("/api/me/export")).text == ""
    assert (await bob.delete("/api/me")).json() == {"conversations": 0, "messages": 0}
    assert len((await alice.get("/api/search", params={"q": "needle"})).json()["items"]) >= 1
