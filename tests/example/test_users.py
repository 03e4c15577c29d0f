"""Tokens, guests, signing in, and what users do with all their data."""

from __future__ import annotations

import json
from uuid import uuid4

import httpx
import jwt
import pytest

from tests.support.service import KEY, SECRET, Service, ask, exchange, load, settled, stored, token

OPEN = {("/api/guests", "post"), ("/api/sign-in", "post")}
GOOD = token("user-x")
BAD = {
    "missing": {},
    "empty": {"Authorization": ""},
    "no token": {"Authorization": "Bearer"},
    "garbage": {"Authorization": f"Bearer {SECRET}"},
    "not ASCII": {"Authorization": b"Bearer \xff\xfe"},
    "basic": {"Authorization": f"Basic {GOOD}"},
    "without a scheme": {"Authorization": GOOD},
    "two tokens": {"Authorization": f"Bearer {GOOD} {GOOD}"},
    "another header": {"X-Authorization": f"Bearer {GOOD}"},
    "algorithm none": {"Authorization": "Bearer " + jwt.encode({"sub": "x", "exp": 4e9, "iat": 0}, "", "none")},
    "another algorithm": {"Authorization": "Bearer " + token("user-x", algorithm="HS512")},
    "wrong key": {"Authorization": "Bearer " + token("user-x", key=KEY[::-1])},
    "changed": {"Authorization": "Bearer " + ".".join([*token("user-y").split(".")[:2], GOOD.split(".")[2]])},
    "expired": {"Authorization": "Bearer " + token("user-x", lifetime=-3600)},
    "without an expiry": {"Authorization": "Bearer " + token("user-x", exp=None)},
    "expiry as text": {"Authorization": "Bearer " + token("user-x", exp=SECRET)},
    "without a user": {"Authorization": "Bearer " + token("user-x", sub=None)},
    "empty user": {"Authorization": "Bearer " + token("")},
    "user as a number": {"Authorization": "Bearer " + token("user-x", sub=7)},
}


@pytest.mark.parametrize("header", BAD.values(), ids=BAD)
async def test_a_bad_token(service: Service, header: dict[str, str]) -> None:
    """On every route of a user, a request without a valid token gets 401 and one sentence, whatever else is wrong."""
    bodies = set()
    routes = [
        (path, method)
        for path, operations in service.documented["paths"].items()
        for method in operations
        if path.startswith("/api/") and (path, method) not in OPEN
    ]
    assert len(routes) >= 14
    async with service.client() as client:
        for path, method in routes:
            answer = await client.request(method, path.replace("{id}", "1").replace("{seq}", "1"), headers=header)
            assert answer.status_code == 401, (method, path)
            bodies.add(answer.text)
    assert len(bodies) == 1


async def test_the_scheme_has_no_case(service: Service) -> None:
    """The word Bearer is read in any case."""
    async with service.client() as client:
        answer = await client.get("/api/me", headers={"Authorization": f"bEARER {GOOD}"})
    assert (answer.status_code, answer.json()) == (200, {"user": "user-x", "guest": False})


async def test_guests(service: Service) -> None:
    """Each guest is a new user, who keeps the token for 30 days."""
    async with service.client() as client:
        answers = [await client.post("/api/guests") for _ in range(2)]
        assert [answer.status_code for answer in answers] == [201, 201]
        first, second = (answer.json() for answer in answers)
        assert first["user"] != second["user"]
        assert first["user"].startswith("guest-")
        claims = jwt.decode(first["token"], KEY, ["HS256"])
        assert claims["sub"] == first["user"]
        assert claims["exp"] - claims["iat"] == 30 * 24 * 3600
        me = await client.get("/api/me", headers={"Authorization": f"Bearer {first['token']}"})
        assert me.json() == {"user": first["user"], "guest": True}


async def test_a_guest_becomes_a_user(service: Service) -> None:
    """Signing in with a guest's token moves everything of the guest, and the second time nothing."""
    name = f"Zoë {uuid4()}"
    async with service.client() as client:
        guest = (await client.post("/api/guests")).json()
    async with service.client(guest["token"]) as client:
        conversation = await exchange(client)
        before = await load(client, conversation)
        answer = await client.post("/api/sign-in", json={"name": name})
        assert answer.status_code == 200
        signed_in = answer.json()
        assert (signed_in["user"], signed_in["moved"]) == (f"user-{name}", {"conversations": 1, "messages": 2})
        assert (await client.get(f"/api/conversations/{conversation}")).status_code == 404
        again = (await client.post("/api/sign-in", json={"name": name})).json()
        assert again["moved"] == {"conversations": 0, "messages": 0}
    async with service.client(signed_in["token"]) as client:
        assert (await client.get("/api/me")).json() == {"user": f"user-{name}", "guest": False}
        after = await load(client, conversation)
        assert after["messages"] == before["messages"]
        assert after["conversation"]["id"] == conversation


async def test_a_guest_signs_in_during_an_answer(service: Service) -> None:
    """An answer that is written while its guest becomes a user keeps the text so far, and ends as one or the other."""
    async with service.client() as client:
        guest = (await client.post("/api/guests")).json()
    async with service.client(guest["token"]) as client:
        conversation = (await client.post("/api/conversations", json={"title": SECRET})).json()["id"]
        await ask(client, conversation, f"write a long story about {SECRET}")
        signed_in = (await client.post("/api/sign-in", json={"name": f"late {uuid4()}"})).json()
    async with service.client(signed_in["token"]) as client:
        path = f"/api/conversations/{conversation}/messages/2/stop"
        assert (await client.post(path)).status_code == 200
        assert [message["seq"] for message in await settled(client, conversation)] == [1, 2]


async def test_only_guests_are_moved(service: Service, alice: httpx.AsyncClient) -> None:
    """Signing in under another name with a user's token moves nothing."""
    conversation = await exchange(alice)
    answer = await alice.post("/api/sign-in", json={"name": f"other {uuid4()}"})
    assert answer.status_code == 200
    assert answer.json().get("moved") in (None, {"conversations": 0, "messages": 0})
    assert len((await load(alice, conversation))["messages"]) == 2


@pytest.mark.parametrize("name", ["", "x" * 101, None, 7, ["x"], "\ud800", f"{SECRET}\0"])
async def test_bad_names(service: Service, name: object) -> None:
    """A name that is empty, long, or not text is rejected without being repeated."""
    async with service.client() as client:
        body = json.dumps({"name": name})
        answer = await client.post("/api/sign-in", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422


async def test_the_export(service: Service, alice: httpx.AsyncClient, bob: httpx.AsyncClient) -> None:
    """The export has each conversation and message as it is stored, and nothing of another user."""
    await exchange(bob)
    mine = [await exchange(alice, f"🎲 roll a die\u2028for {SECRET}\r\n\0".strip("\0")) for _ in range(2)]
    answer = await alice.get("/api/me/export")
    assert answer.status_code == 200
    assert answer.headers["content-type"].partition(";")[0] == "application/x-ndjson"
    assert answer.headers["content-disposition"].replace('"', "") == "attachment; filename=chatdb-export.jsonl"
    rows = [json.loads(line) for line in answer.text.strip("\n").split("\n")]
    assert [row for row in rows if "seq" in row and "user_id" in row] == []
    assert {row["id"] for row in rows if "seq" not in row} == set(mine)
    exported = [(row["conversation_id"], row["seq"], row["content"], row["state"]) for row in rows if "seq" in row]
    assert sorted(exported) == [(each, *row) for each in sorted(mine) for row in stored(service.dsn, each)]


async def test_the_account_is_deleted(service: Service, alice: httpx.AsyncClient, bob: httpx.AsyncClient) -> None:
    """Deleting the account counts what it deleted, and leaves other users alone."""
    theirs = await exchange(bob)
    mine = [await exchange(alice) for _ in range(2)]
    answer = await alice.delete("/api/me")
    assert (answer.status_code, answer.json()) == (200, {"conversations": 2, "messages": 4})
    assert [stored(service.dsn, each) for each in mine] == [[], []]
    assert len(stored(service.dsn, theirs)) == 2
    assert (await alice.delete("/api/me")).json() == {"conversations": 0, "messages": 0}
    assert (await alice.get("/api/me/export")).text == ""
