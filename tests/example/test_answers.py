"""Answers while they are written: events, resuming, stopping, repeated requests, several workers."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.support.service import (
    SECRET,
    STORY,
    Line,
    Service,
    ask,
    events,
    exchange,
    load,
    new_conversation,
    settled,
    stored,
    until_finished,
)


def texts(dsn: str, conversation: int) -> dict[int, str]:
    """Return the stored texts by seq."""
    return {seq: text for seq, text, _ in stored(dsn, conversation)}


async def test_an_answer(service: Service, alice: httpx.AsyncClient) -> None:
    """The stored question comes at once, and the answer grows until it is finished."""
    conversation = await new_conversation(alice)
    sent = await ask(alice, conversation["id"], f"hello {SECRET} 🎲\u2028\r\n<b>")
    assert (sent["message"]["seq"], sent["message"]["role"], sent["message"]["state"]) == (1, "user", None)
    assert sent["message"]["content"] == f"hello {SECRET} 🎲\u2028\r\n<b>"
    assert (sent["answer"]["seq"], sent["answer"]["role"], sent["answer"]["state"]) == (2, "assistant", "streaming")
    question, answer = await settled(alice, conversation["id"])
    assert question == sent["message"]
    assert answer["content"]
    assert "user_id" not in answer
    assert {"id", "conversation_id", "seq", "parent_seq", "role", "content", "created_at", "state", "tools"} <= set(
        answer
    )


async def test_a_tool(alice: httpx.AsyncClient) -> None:
    """An answer that used the tool says how."""
    conversation = await exchange(alice, f"please roll a die, {SECRET}")
    answer = (await load(alice, conversation))["messages"][1]
    (call,) = answer["tools"]
    assert set(call) == {"name", "arguments", "output"}
    assert call["name"]
    assert answer["content"]


async def test_the_deltas_are_the_text(service: Service, alice: httpx.AsyncClient) -> None:
    """The deltas add up to the stored text, on both workers, from before the question and from the middle."""
    bearer = alice.headers["Authorization"].removeprefix("Bearer ")
    conversation = (await new_conversation(alice))["id"]
    start = (await load(alice, conversation))["events"]
    async with service.client(bearer, 0) as one, service.client(bearer, 1) as two:
        readers = [asyncio.create_task(until_finished(each, conversation, 2, start)) for each in (one, two)]
        await ask(alice, conversation, f"🎲 {STORY}")
        await asyncio.sleep(0.5)
        late = asyncio.create_task(until_finished(alice, conversation, 2, None))
        lines = [line for line, _ in await asyncio.gather(*readers)]
        late_line, _ = await late
    final = texts(service.dsn, conversation)
    assert [line.texts for line in lines] == [final, final]
    assert late_line.texts[2] == final[2]
    assert min(line.deltas for line in lines) >= 5
    assert len(final[2].split()) >= 100


async def test_resume_at_every_event(service: Service, alice: httpx.AsyncClient) -> None:
    """From each event, in the middle of the answer and after it, the rest follows: nothing twice, nothing missing."""
    conversation = (await new_conversation(alice))["id"]
    start = (await load(alice, conversation))["events"]
    await ask(alice, conversation, STORY)
    line, last, cuts = Line(), start, 0
    while line.states.get(2, "streaming") == "streaming":  # a connection for each event
        stream = events(alice, conversation, last, in_header=bool(cuts % 2))
        async with asyncio.timeout(20):
            event = await anext(stream)
        await stream.aclose()
        line.take(event)
        last = event.id
        cuts += 1
    final = texts(service.dsn, conversation)
    assert line.texts == final
    assert cuts > 5

    conversation = (await new_conversation(alice))["id"]
    start = (await load(alice, conversation))["events"]
    await ask(alice, conversation, STORY)
    _, seen = await until_finished(alice, conversation, 2, start)
    final = texts(service.dsn, conversation)
    line = Line()
    for event in seen[:-1]:  # the answer is finished now
        line.take(event)
        resumed, _ = await until_finished(alice, conversation, 2, event.id, line.copy())
        assert resumed.texts == final, event.id


async def test_after_the_end(alice: httpx.AsyncClient) -> None:
    """A stream that starts after the newest message is silent until the next one."""
    conversation = await exchange(alice)
    for after in ((await load(alice, conversation))["events"], None):
        stream = events(alice, conversation, after)
        coming = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.7)
        assert not coming.done()
        sent = await ask(alice, conversation)
        async with asyncio.timeout(10):
            event = await coming
        assert (event.name, event.data["seq"], event.data["content"]) == (
            "message",
            sent["message"]["seq"],
            sent["message"]["content"],
        )
        await stream.aclose()
        await settled(alice, conversation)


@pytest.mark.parametrize("after", ["x", "", SECRET, "-1", "1.x", "1.-1", "9" * 30, "1." + "9" * 30, "1.2.3", "é", "٣"])
async def test_forged_event_ids(alice: httpx.AsyncClient, after: str) -> None:
    """An event id that the service did not make is rejected."""
    conversation = (await new_conversation(alice))["id"]
    path = f"/api/conversations/{conversation}/events"
    assert (await alice.get(path, params={"after": after})).status_code == 422
    if after:
        assert (await alice.get(path, headers={"Last-Event-ID": after.encode()})).status_code == 422


async def test_a_client_goes_away(service: Service, alice: httpx.AsyncClient) -> None:
    """The answer is finished and stored although nobody reads it any more."""
    conversation = (await new_conversation(alice))["id"]
    start = (await load(alice, conversation))["events"]
    async with service.client(alice.headers["Authorization"].removeprefix("Bearer ")) as reader:
        await ask(reader, conversation, STORY)
        stream = events(reader, conversation, start)
        async for event in stream:
            if event.name == "delta":
                break
        await stream.aclose()
    messages = await settled(alice, conversation)
    assert messages[1]["state"] is None
    assert len(messages[1]["content"].split()) >= 100


@pytest.mark.parametrize("worker", [0, 1])
async def test_stop(service: Service, alice: httpx.AsyncClient, worker: int) -> None:
    """An answer is stopped from either worker; its text so far stays, and readers hear of it."""
    bearer = alice.headers["Authorization"].removeprefix("Bearer ")
    conversation = (await new_conversation(alice))["id"]
    start = (await load(alice, conversation))["events"]
    async with service.client(bearer, 0) as writer, service.client(bearer, worker) as stopper:
        await ask(writer, conversation, STORY)
        reader = asyncio.create_task(until_finished(alice, conversation, 2, start))
        await asyncio.sleep(0.6)
        answer = await stopper.post(f"/api/conversations/{conversation}/messages/2/stop")
        assert answer.status_code == 200
        message = answer.json()["message"]
        assert message["state"] == "aborted"
        line, _ = await reader
        assert (line.texts[2], line.states[2]) == (message["content"], "aborted")
        await asyncio.sleep(0.5)
        again = await stopper.post(f"/api/conversations/{conversation}/messages/2/stop")
        assert again.json() == answer.json()
    assert stored(service.dsn, conversation)[1] == (2, message["content"], "aborted")
    assert 0 < len(message["content"].split()) < 190
    assert (await alice.post(f"/api/conversations/{conversation}/messages/1/stop")).json()["message"]["state"] is None
    assert (await alice.post(f"/api/conversations/{conversation}/messages/9/stop")).status_code == 404


async def test_a_conversation_is_deleted_in_the_middle(alice: httpx.AsyncClient) -> None:
    """Readers of a conversation that is deleted hear of its end, and the writer of the answer ends silently."""
    conversation = (await new_conversation(alice))["id"]
    await ask(alice, conversation, STORY)
    stream = events(alice, conversation, "0")
    names = []
    async with asyncio.timeout(10):
        async for event in stream:
            names.append(event.name)
            if names.count("delta") == 1 and event.name == "delta":
                assert (await alice.delete(f"/api/conversations/{conversation}")).status_code == 200
    assert names[-1] == "end"
    await asyncio.sleep(0.5)


async def test_a_repeated_question(service: Service, alice: httpx.AsyncClient) -> None:
    """Ten requests at once with one key, on both workers, store one question and one answer, generated once."""
    bearer = alice.headers["Authorization"].removeprefix("Bearer ")
    conversation = (await new_conversation(alice))["id"]
    start = (await load(alice, conversation))["events"]
    path, body = f"/api/conversations/{conversation}/messages", {"content": STORY}
    header = {"Idempotency-Key": "k1"}
    async with service.client(bearer, 0) as one, service.client(bearer, 1) as two:
        answers = await asyncio.gather(*(each.post(path, json=body, headers=header) for each in (one, two) * 5))
        assert {answer.status_code for answer in answers} == {202}
        assert {(a.json()["message"]["seq"], a.json()["answer"]["seq"]) for a in answers} == {(1, 2)}
        line, _ = await until_finished(alice, conversation, 2, start)
        for each in (one, two):
            again = await each.post(path, json=body, headers=header)
            assert again.status_code == 202
            assert (again.json()["message"]["seq"], again.json()["answer"]["content"]) == (1, line.texts[2])
            other = await each.post(path, json={"content": f"other {SECRET}"}, headers=header)
            assert other.status_code == 422
            other = await each.post(path, json=body | {"parent_seq": 0}, headers=header)
            assert other.status_code in (202, 422)
    assert [(seq, state) for seq, _, state in stored(service.dsn, conversation)] == [(1, None), (2, None)]
    assert line.texts == texts(service.dsn, conversation)
    plain = await exchange(alice, STORY)
    assert len(texts(service.dsn, plain)[2]) == len(line.texts[2])


async def test_a_repeated_regeneration(service: Service, alice: httpx.AsyncClient) -> None:
    """One key gives one further answer; without a key, each request gives another one."""
    bearer = alice.headers["Authorization"].removeprefix("Bearer ")
    conversation = await exchange(alice)
    path = f"/api/conversations/{conversation}/answers"
    async with service.client(bearer, 0) as one, service.client(bearer, 1) as two:
        calls = [
            each.post(path, json={"parent_seq": 1}, headers={"Idempotency-Key": "again"}) for each in (one, two) * 5
        ]
        answers = await asyncio.gather(*calls)
    assert {(answer.status_code, answer.json()["answer"]["seq"]) for answer in answers} == {(202, 3)}
    await settled(alice, conversation)
    assert (await alice.post(path, json={"parent_seq": 1})).json()["answer"]["seq"] == 4
    await settled(alice, conversation)
    assert (await load(alice, conversation))["versions"] == {"4": [2, 3, 4]}
    for parent, status in ((99, {404}), (2, {404, 409, 422})):
        assert (await alice.post(path, json={"parent_seq": parent})).status_code in status
    assert len(stored(service.dsn, conversation)) == 4


async def test_two_questions_at_once(service: Service, alice: httpx.AsyncClient) -> None:
    """Questions that are asked at the same time get an answer each."""
    conversation = (await new_conversation(alice))["id"]
    sent = await asyncio.gather(*(ask(alice, conversation, f"{SECRET} {number}", parent_seq=0) for number in range(4)))
    for each in sent:
        assert each["answer"]["parent_seq"] == each["message"]["seq"] or (
            each["answer"]["parent_seq"] is None and each["answer"]["seq"] == each["message"]["seq"] + 1
        )
    async with asyncio.timeout(20):
        while any(row[2] for row in stored(service.dsn, conversation)):  # noqa: ASYNC110 - in another process
            await asyncio.sleep(0.1)
    assert sorted(texts(service.dsn, conversation)) == list(range(1, 9))


@pytest.mark.parametrize(
    ("body", "statuses"),
    [
        ({"content": ""}, {422}),
        ({"content": f"{SECRET}\0"}, {422}),
        ({"content": "x" * 100_001}, {422}),
        ({"content": None}, {422}),
        ({"content": [SECRET]}, {422}),
        ({}, {422}),
        ({"content": SECRET, "parent_seq": -1}, {422}),
        ({"content": SECRET, "parent_seq": 2**63}, {422}),
        ({"content": SECRET, "parent_seq": 99}, {404}),
        ({"content": SECRET, "parent_seq": "x"}, {422}),
        ({"content": SECRET, "role": "system"}, {202, 422}),
    ],
    ids=str,
)
async def test_bad_questions(
    service: Service, alice: httpx.AsyncClient, body: dict[str, Any], statuses: set[int]
) -> None:
    """A question that cannot be stored is rejected before anything is written."""
    conversation = (await new_conversation(alice))["id"]
    answer = await alice.post(f"/api/conversations/{conversation}/messages", json=body)
    assert answer.status_code in statuses
    if answer.status_code == 202:
        assert answer.json()["message"]["role"] == "user"
    else:
        assert stored(service.dsn, conversation) == []
    await settled(alice, conversation)
