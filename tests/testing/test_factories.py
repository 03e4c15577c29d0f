"""The conversations of chatdb.testing."""

from __future__ import annotations

import json
from itertools import pairwise

import asyncpg
import pytest

import chatdb
from chatdb.testing import ConversationFactory


async def test_turns_and_tools(tx: asyncpg.Connection) -> None:
    """A conversation has its turns, and each tool's result follows the call that it names."""
    made = await ConversationFactory(seed=1).create(tx, turns=30)
    messages = await chatdb.list_messages(tx, user_id="alice", conversation_id=made.id)
    assert sum(message.role == "user" for message in messages) == 30
    calls = 0
    for message, following in pairwise(messages):
        payload = json.loads(message.payload or "{}")
        if "tool_calls" in payload:
            (call,) = payload["tool_calls"]
            assert (following.role, json.loads(following.payload)) == ("tool", {"tool_call_id": call["id"]})
            calls += 1
    assert 1 < calls < 30
    assert calls == sum(message.role == "tool" for message in messages)
    context = await chatdb.get_context(tx, user_id="alice", conversation_id=made.id, max_tokens=200)
    assert context[0].role == "user"


async def test_versions_are_branches(tx: asyncpg.Connection) -> None:
    """Each version is another message of the user with an answer, and the last one is selected."""
    made = await ConversationFactory(seed=2).create(tx, turns=2, tools=False, versions=3)
    line = await chatdb.get_branch(tx, user_id="alice", conversation_id=made.id)
    log = await chatdb.list_messages(tx, user_id="alice", conversation_id=made.id)
    assert len(log) == 4 + 3 * 2
    assert [line[-2].seq, line[-1].seq] == [9, 10]
    assert made.head_seq == 10
    versions = await chatdb.list_versions(tx, user_id="alice", conversation_id=made.id)
    assert max(map(len, versions.values())) >= 2


def test_the_seed() -> None:
    """The same seed makes the same messages, in the same order, and another seed makes others."""
    made = [[factory.messages(turns=9) for _ in range(3)] for factory in map(ConversationFactory, (5, 5, 6))]
    assert made[0] == made[1]
    assert made[0] != made[2]
    assert made[0][0] != made[0][1]


@pytest.mark.parametrize("wrong", [0, 2_001, 1.5, "3", None])
def test_wrong_turns(wrong: object) -> None:
    """The error names the argument."""
    with pytest.raises(chatdb.InvalidInputError, match="turns"):
        ConversationFactory().messages(turns=wrong)  # type: ignore[arg-type]


async def test_wrong_versions_store_nothing(tx: asyncpg.Connection) -> None:
    """A wrong argument is found before anything is stored."""
    for wrong in ({"versions": -1}, {"turns": 0}, {"tools": 1}):
        with pytest.raises(chatdb.InvalidInputError):
            await ConversationFactory().create(tx, **wrong)  # type: ignore[arg-type]
    assert await chatdb.list_conversations(tx, user_id="alice") == []
