"""Random calls on branched conversations, one after another and at once, beside a tree in Python."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

import chatdb
from chatdb import ChatDBError, Conversation, InvalidInputError, Message, MessageNotFoundError
from tests.support.chaos import figure, sized
from tests.support.tree import Node, Tree, outcome, stored_state, summary, tree_of

USER = {"user_id": "ann"}
TASKS = 8
ROLES = ("user", "assistant", "tool", "system")
chaos = (pytest.mark.chaos, pytest.mark.timeout(1200))
Call = tuple[str, dict[str, Any]]


def size(request: pytest.FixtureRequest, full: int, quick: int, small: int) -> int:
    """Return the size of a test: `small` in the ordinary suite, otherwise as the other reliability tests."""
    return sized(request, full, quick) if request.node.get_closest_marker("chaos") else small


def some_message(chance: random.Random, tree: Tree, number: object, *, new_only: bool = False) -> dict[str, Any]:
    """Return a message without a key, with a new one, or with one that is stored, sometimes with its body."""
    new = {"role": chance.choice(ROLES), "content": f"content {number}", "key": None}
    keyed = [] if new_only else [node for node in tree.nodes.values() if node.key is not None]
    if keyed and chance.random() < 0.15:
        node = chance.choice(keyed)
        return new | {"key": node.key} | chance.choice([{}, {"role": node.role, "content": node.content}])
    return new | {"key": f"key {number}"} if chance.random() < 0.4 else new


def some_seq(chance: random.Random, tree: Tree) -> int:
    """Return the seq of a stored message, or sometimes another one."""
    if tree.nodes and chance.random() < 0.9:
        return chance.choice(sorted(tree.nodes))
    return chance.randrange(tree.last_seq + 3)


def some_place(chance: random.Random, tree: Tree, seq: str = "seq", key: str = "key") -> dict[str, Any]:
    """Return arguments that name a message, by its seq or by its key."""
    keys = sorted(node.key for node in tree.nodes.values() if node.key is not None)
    if keys and chance.random() < 0.3:
        return {key: chance.choice([*keys, "no such key"])}
    return {seq: some_seq(chance, tree)}


def some_page(chance: random.Random, tree: Tree) -> dict[str, Any]:
    """Return arguments for a page of a line."""
    page = {"limit": chance.choice([1, 2, 3, 5, 8, 100])}
    return page if chance.random() < 0.3 else page | {"before_seq": chance.randrange(tree.last_seq + 3)}


def some_write(
    chance: random.Random, tree: Tree, conversation: Conversation, number: object, *, new_keys: bool = False
) -> Call:
    """Return a write that the conversation may accept or refuse; with `new_keys`, a batch has no stored keys."""
    old = conversation.model_copy(update={"revision": abs(conversation.revision - 1)})
    expected = {"expected": chance.choice([conversation, conversation, old])} if chance.random() < 0.3 else {}
    parent = {"parent_seq": chance.choice([0, *(some_seq(chance, tree) for _ in range(5))])}
    batch = {
        message["key"] or index: message
        for index in range(chance.randrange(1, 5))
        for message in [some_message(chance, tree, f"{number} {index}", new_only=new_keys)]
    }
    messages = {"messages": [*batch.values()]}
    unkeyed = {"messages": [message | {"key": None} for message in batch.values()]}
    skip = {"on_existing": "skip"}
    place = some_place(chance, tree)
    after = {"after_seq": max(0, tree.last_seq - chance.randrange(10))}
    new = some_message(chance, tree, number)
    upserted = new | {"key": new["key"] or f"key {number}"}
    empty = chance.choice([{"messages": []}, {"messages": []} | parent])
    weights: list[tuple[int, Call]] = [
        (20, ("append_message", new | expected)),
        (20, ("append_message", new | parent | expected)),
        (5, ("append_messages", messages | expected)),
        (5, ("append_messages", unkeyed)),
        (8, ("append_messages", messages | parent | expected)),
        (4, ("append_messages", messages | skip | chance.choice([{}, parent]) | expected)),
        (1, ("append_messages", empty | chance.choice([{}, skip]) | expected)),
        (6, ("upsert_message", upserted | expected)),
        (40 if tree.children(tree.head) else 8, ("pop_message", expected)),
        (14, ("delete_message", place | expected)),
        (3, ("delete_messages_after", chance.choice([after, some_place(chance, tree, "after_seq", "after_key")]))),
        (3, ("replace_messages_after", after | messages | {"expected": chance.choice([conversation, old])})),
        (16, ("switch_branch", place | expected)),
        (5 if len(tree.nodes) < 50 else 60, ("delete_branch", place | expected)),
        (3, ("fork_conversation", chance.choice([{}, place]))),
    ]
    return chance.choices([call for _, call in weights], [weight for weight, _ in weights])[0]


INVALID: list[Call] = [
    ("append_message", {"role": "user", "content": "x", "parent_seq": -1}),
    ("append_message", {"role": "user", "content": "x", "parent_seq": True}),
    ("append_messages", {"messages": [{"role": "user", "content": "x"}], "parent_seq": "1"}),
    ("get_branch", {"limit": 0}),
    ("get_branch", {"top_seq": -1}),
    ("get_context", {"max_tokens": 0}),
    ("list_versions", {"before_seq": -1}),
    ("switch_branch", {}),
    ("switch_branch", {"seq": 1, "key": "k"}),
    ("delete_branch", {"seq": 1, "key": "k"}),
    ("fork_conversation", {"seq": 1, "key": "k"}),
    ("fork_conversation", {"new_key": ""}),
]


async def perform(db: Any, at: dict[str, Any], name: str, arguments: dict[str, Any]) -> Any:
    """Return the result of a function, or its error; of a fork, return the messages."""
    try:
        result = await getattr(chatdb, name)(db, **at, **arguments)
        if name == "fork_conversation":
            result = await chatdb.list_messages(db, **USER, conversation_id=result.id)
            assert all(message.parent_seq is None for message in result)
    except ChatDBError as error:
        return error
    return result


def apply(tree: Tree, name: str, arguments: dict[str, Any]) -> Any:
    """Change the tree as a function changes the conversation, and return what `summary` makes of the result."""
    expected = arguments.get("expected")
    if isinstance(expected, Conversation):
        arguments = arguments | {"expected": expected.revision == tree.revision}
    return outcome(lambda: getattr(tree, name)(**arguments))


def seen(result: Any) -> Any:
    """Return what `apply` returns, of what `perform` returns."""
    return type(result) if isinstance(result, Exception) else summary(result)


async def compare(db: Any, at: dict[str, Any], tree: Tree, chance: random.Random) -> dict[int, Message]:
    """Compare everything that readers see with the tree, and return the stored messages."""
    conversation = await chatdb.get_conversation(db, **at)
    log = await chatdb.list_messages(db, **at, limit=10_000)
    assert stored_state(conversation, log) == tree.state()
    stored = {message.seq: message for message in log}
    line = [stored[seq] for seq in tree.line()]

    limit = chance.choice([1, 2, 3, 5, 100])
    assert await chatdb.load_conversation(db, **at, limit=limit) == (conversation, line[-limit:])
    previews = await chatdb.list_previews(db, **USER)
    assert [newest for each, newest in previews if each == conversation] == [line[-1] if line else None]
    assert await chatdb.get_branch(db, **at) == line
    assert await chatdb.list_versions(db, **at) == tree.list_versions()
    page, pages = await chatdb.get_branch(db, **at, limit=limit), list[Message]()
    while page:
        pages = page + pages
        page = await chatdb.get_branch(db, **at, limit=limit, before_seq=page[0].seq)
    assert pages == line

    arguments = some_page(chance, tree)
    assert await chatdb.list_versions(db, **at, **arguments) == tree.list_versions(**arguments)
    for arguments in (some_page(chance, tree), some_page(chance, tree) | {"top_seq": some_seq(chance, tree)}):
        result = await perform(db, at, "get_branch", arguments)
        assert seen(result) == apply(tree, "get_branch", arguments)
        assert isinstance(result, ChatDBError) or all(stored[message.seq] == message for message in result)
    return stored


@pytest.mark.parametrize("by_key", [False, True], ids=["id", "key"])
@pytest.mark.parametrize("part", ["sample", pytest.param("all", marks=chaos)])
async def test_one_call_after_another(db: chatdb.Pool, part: str, by_key: bool, request: pytest.FixtureRequest) -> None:
    """After each of 10,000 random calls, every reader sees what a tree in Python says, and so does the caller."""
    operations, per_conversation = size(request, 10_000, 1_000, 200), 200
    outcomes: Counter[str] = Counter()
    widest = 0
    for number in range(operations // per_conversation):
        chance, tree = random.Random(f"{part} {by_key} {number}"), Tree()
        created = await chatdb.create_conversation(db, **USER, key=f"k{number}")
        at = USER | ({"conversation_key": created.key} if by_key else {"conversation_id": created.id})
        stored: dict[int, Message] = {}
        for step in range(per_conversation):
            conversation = await chatdb.get_conversation(db, **at)
            if chance.random() < 0.05:
                name, arguments = chance.choice(INVALID)
                with pytest.raises(InvalidInputError):
                    await getattr(chatdb, name)(db, **at, **arguments)
            name, arguments = some_write(chance, tree, conversation, step)
            before = stored
            result = await perform(db, at, name, arguments)
            assert seen(result) == apply(tree, name, arguments), (number, step, name, arguments)
            stored = await compare(db, at, tree, chance)
            if name != "fork_conversation":
                for message in result if isinstance(result, list) else [result]:
                    if isinstance(message, Message):
                        assert message == (before if name == "pop_message" else stored)[message.seq]
            kind = type(result).__name__ if isinstance(result, Exception) else "done"
            outcomes[f"{name} {kind}"] += 1
            widest = max(widest, *(len(tree.children(seq)) for seq in [0, *tree.nodes]))
    assert widest > 3
    figure(f"{operations} calls, 0 differences, up to {widest} versions: {dict(sorted(outcomes.items()))}")


@dataclass
class Answer:
    """A call beside others, its answer, and the states before and after it."""

    name: str
    arguments: dict[str, Any]
    result: Any
    before: int
    after: int
    state: tuple[int, int, int, list[Node]]


def explain(tree: Tree, answers: list[Answer], final: int) -> dict[int, Tree]:
    """Apply the writes to a tree in the order in which they were committed, and return the tree at each revision."""
    states = {tree.revision: tree.copy()}
    left = list(answers)
    while tree.revision != final:
        for answer in left:
            if answer.before <= tree.revision < answer.after:
                next_tree = tree.copy()
                result = apply(next_tree, answer.name, answer.arguments)
                if (
                    result == seen(answer.result)
                    and next_tree.revision == answer.after
                    and next_tree.state() == answer.state
                ):
                    left.remove(answer)
                    tree = next_tree
                    break
        else:
            raise AssertionError(f"no answer explains what came after revision {tree.revision}")
        states[tree.revision] = tree.copy()
    for answer in left:
        possible = [states[revision] for revision in states if answer.before <= revision <= answer.after]
        assert any(is_answer(each.copy(), answer) for each in possible), answer
    return states


def is_answer(tree: Tree, answer: Answer) -> bool:
    """Return whether a call on the tree has this answer and changes nothing."""
    revision = tree.revision
    return apply(tree, answer.name, answer.arguments) == seen(answer.result) and tree.revision == revision


@pytest.mark.parametrize("part", ["sample", pytest.param("all", marks=chaos)])
async def test_calls_at_once(db: chatdb.Pool, part: str, request: pytest.FixtureRequest) -> None:
    """Calls of eight tasks have the answers, and leave the tree, of the same calls one after another."""
    operations, per_conversation = size(request, 10_000, 1_000, 200), 200
    outcomes: Counter[str] = Counter()
    for number in range(operations // per_conversation):
        created = await chatdb.create_conversation(db, **USER)
        at = USER | {"conversation_id": created.id}
        answers: list[Answer] = []
        loaded: list[tuple[Conversation, list[Message]]] = []

        async def work(
            task: int,
            number: int = number,
            at: dict[str, Any] = at,
            answers: list[Answer] = answers,
            loaded: list[tuple[Conversation, list[Message]]] = loaded,
        ) -> None:
            chance = random.Random(f"{part} {number} {task}")
            for step in range(per_conversation // TASKS):
                conversation = await chatdb.get_conversation(db, **at)
                tree = tree_of(conversation, await chatdb.list_messages(db, **at, limit=10_000))
                # the violated constraint of a stored key would end the transaction below
                name, arguments = some_write(chance, tree, conversation, f"{task} {step}", new_keys=True)
                if name == "fork_conversation":
                    name, arguments = chance.choice(
                        [
                            (name, arguments),
                            ("get_branch", some_page(chance, tree) | {"top_seq": some_seq(chance, tree)}),
                            ("get_branch", some_page(chance, tree)),
                            ("list_versions", some_page(chance, tree)),
                        ]
                    )
                # a call that wrote locked the conversation, so the reads after it see what it left
                async with chatdb.transaction(db) as connection:
                    result = await perform(connection, at, name, arguments)
                    now = await chatdb.get_conversation(connection, **at)
                    log = await chatdb.list_messages(connection, **at, limit=10_000)
                answers.append(
                    Answer(name, arguments, result, conversation.revision, now.revision, stored_state(now, log))
                )
                kind = type(result).__name__ if isinstance(result, Exception) else "done"
                outcomes[f"{name} {kind}"] += 1
                loaded.append(await chatdb.load_conversation(db, **at, limit=1000))

        await asyncio.gather(*(work(task) for task in range(TASKS)))
        last = await chatdb.get_conversation(db, **at)
        states = explain(Tree(), answers, last.revision)
        log = await chatdb.list_messages(db, **at, limit=10_000)
        assert stored_state(last, log) == states[last.revision].state()
        for conversation, line in loaded:
            tree = states[conversation.revision]
            assert conversation.head_seq == tree.head
            assert summary(line) == tree.get_branch(limit=1000)
    figure(f"{operations} calls of {TASKS} tasks, 0 differences: {dict(sorted(outcomes.items()))}")


DELETIONS: dict[str, Callable[..., Awaitable[Any]]] = {
    "delete_message": lambda db, at, seq: chatdb.delete_message(db, **at, seq=seq),
    "delete_branch": lambda db, at, seq: chatdb.delete_branch(db, **at, seq=seq),
    "delete_messages_after": lambda db, at, seq: chatdb.delete_messages_after(db, **at, after_seq=seq - 1),
    "pop_message": lambda db, at, seq: chatdb.pop_message(db, **at),
}


@pytest.mark.parametrize("part", ["sample", pytest.param("all", marks=chaos)])
async def test_a_parent_that_is_deleted_meanwhile(db: chatdb.Pool, part: str, request: pytest.FixtureRequest) -> None:
    """If the parent of an append is deleted at the same moment, the message follows a stored one, or is refused."""
    races = size(request, 1_000, 200, 40)
    chance, outcomes = random.Random(part), Counter[str]()
    hello = {"role": "user", "content": "hello"}
    waiters = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"

    async def waiting(calls: int) -> None:
        """Wait until so many statements wait for the lock of the conversation."""
        while calls > await db.fetchval(waiters):  # noqa: ASYNC110 - it changes on the server
            await asyncio.sleep(0.001)

    for race in range(races):
        created = await chatdb.create_conversation(db, **USER, messages=[hello, hello])
        at = USER | {"conversation_id": created.id}
        if chance.random() < 0.5:
            await chatdb.append_message(db, **at, **hello, parent_seq=1)
        parent = (await chatdb.get_conversation(db, **at)).head_seq
        under = at | {"parent_seq": parent}
        appends: list[Callable[[Any], Awaitable[Any]]] = [
            lambda db, under=under: chatdb.append_message(db, **under, **hello),
            lambda db, under=under: chatdb.append_message(db, **under, **hello, key="k"),
            lambda db, under=under: chatdb.append_messages(db, **under, messages=[hello, hello]),
            lambda db, under=under: chatdb.append_messages(
                db, **under, messages=[hello | {"key": "s"}], on_existing="skip"
            ),
        ]
        name = list(DELETIONS)[race % len(DELETIONS)]
        deletion = partial(DELETIONS[name], at=at, seq=parent)
        is_deleted_first = race // len(DELETIONS) % 2 == 0
        first, *others = [deletion, *appends] if is_deleted_first else [chance.choice(appends), deletion]
        # the others wait for the first one, and so their snapshots do not have what it wrote
        async with chatdb.transaction(db) as connection:
            results = [await first(connection)]
            started = [asyncio.create_task(outcome_of(call(db))) for call in others]
            await waiting(len(started))
        results += await asyncio.gather(*started)
        conversation = await chatdb.get_conversation(db, **at)
        tree = tree_of(conversation, await chatdb.list_messages(db, **at))
        assert tree.head == 0 or tree.head in tree.nodes
        assert summary(await chatdb.get_branch(db, **at)) == tree.get_branch()
        if is_deleted_first:
            assert [type(each) for each in results[1:]] == [MessageNotFoundError] * len(appends)
        outcomes[f"{name}, {'deleted' if is_deleted_first else 'appended'} first"] += 1
    figure(f"{races} races of an append with the deletion of its parent, 0 dangling parents: {dict(outcomes)}")


async def outcome_of(call: Awaitable[Any]) -> Any:
    """Return the result of a call, or that a message is missing."""
    try:
        return await call
    except MessageNotFoundError as error:
        return error
