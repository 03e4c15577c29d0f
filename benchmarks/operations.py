"""The benchmarked operations. Each is a call without arguments that does the next unit of work."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import timedelta

import chatdb
from benchmarks.contenders import Chatdb, Contender, Keyed
from benchmarks.workload import (
    ADDED,
    ARCHIVED,
    BACK,
    EDITED,
    FLUSH,
    FORKED,
    FORKS,
    KEYS,
    LONG,
    MESSAGES,
    READ_FLUSHES,
    STREAMED,
    Place,
    Size,
)
from chatdb._core.validate import as_text_array
from chatdb.watching import _poll_conversations

TEXT = "Could you tell me what to cook tonight with what is left: rice, two eggs, half a cabbage, soy sauce? " * 4
REPLY = "Fry the rice with the cabbage in a very hot pan, push it aside, scramble the eggs, season with soy. " * 8
"""The appended texts: a question of median length and an answer of mean length."""

HOT = 20
"""Number of conversations that the hot read repeats."""
_serial = itertools.count()
_deleted = itertools.count()
_branches_deleted = itertools.count()
_messages_deleted = itertools.count()
_finished = itertools.count()
_flushes: Counter[int] = Counter()

WATCHES = 1_000
"""Conversations that one statement polls."""


def call_of(operation: str, by: Contender, size: Size) -> Callable[[], Awaitable[object]]:
    """Return a client's call of an operation, on random conversations that are the same in each run."""
    chance = random.Random(f"{operation} {by.name}")
    used = _Places(size, chance)
    place = used.any
    user = lambda: place().user_id  # noqa: E731 - a table of calls
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "history_100": lambda: by.history(place(), 100),
        "history_100_hot": lambda: by.history(used.hot(), 100),
        "last_20": lambda: by.history(place(), 20),
        "page_middle": lambda: by.history(size.long, 100, before=chance.randrange(LONG // 5, LONG - LONG // 5)),
        "whole_10000": lambda: by.whole(size.long),
        "append": lambda: by.append(place(), TEXT),
        "turn": lambda: by.turn(place(), TEXT, REPLY),
        "list_20": lambda: by.list(user()),
        "list_20_spread": lambda: by.list(size.spread),
        "list_20_busy": lambda: by.list(size.busy),
        "create": lambda: by.create(user()),
        "create_first": lambda: by.create_first(user(), TEXT),
        "delete": lambda: by.delete(size.place(size.conversations - 1 - next(_deleted))),
    }
    if isinstance(by, Chatdb):
        calls |= _counted_calls(by, size, chance, used) | _branch_calls(by, size, chance, used)
        calls |= _stream_calls(by, size)
    if isinstance(by, Keyed):
        calls |= {
            "append_keyed": lambda: by.append_keyed(place(), TEXT, f"{by.name} {next(_serial)}"),
            "append_again": _again(by, used),
            "get_or_create": lambda: by.get_or_create(size.keyed, f"key {chance.randrange(KEYS)}"),
        }
    return calls[operation]


def append_on(by: Chatdb, size: Size) -> Callable[[], Awaitable[object]]:
    """Return a call that appends to the conversations of `append_create`, by their ids and without an option."""
    chance = random.Random("append_create")
    return lambda: by.append(size.keyed_place(chance.randrange(KEYS)), TEXT)


def _counted_calls(
    by: Chatdb, size: Size, chance: random.Random, used: _Places
) -> dict[str, Callable[[], Awaitable[object]]]:
    """Return the calls that only chatdb offers, on the conversations that have keys or are archived."""
    db = by.pool
    place = lambda: {"user_id": (at := used.any()).user_id, "conversation_id": at.id}  # noqa: E731
    keyed = lambda: {"user_id": size.keyed, "conversation_key": f"key {chance.randrange(KEYS)}"}  # noqa: E731
    edited = {"user_id": size.keyed, "conversation_key": EDITED}
    message_key = lambda: f"message {chance.randrange(1, MESSAGES + 1)}"  # noqa: E731
    new = lambda: f"new {next(_serial)}"  # noqa: E731
    question = {"role": "user", "content": TEXT}
    turn = [question, {"role": "assistant", "content": REPLY}]
    archived = {"user_id": size.archived}
    spread = {"user_id": size.spread}
    state: dict[str, chatdb.Conversation] = {}

    async def append_expected() -> object:
        at = state.get("append") or await chatdb.get_conversation(db, user_id=size.keyed, conversation_key="key 0")
        appended = await chatdb.append_message(
            db, user_id=size.keyed, conversation_id=at.id, role="user", content=TEXT, expected=at
        )
        state["append"] = at.model_copy(update={"last_seq": appended.seq, "revision": at.revision + 1})
        return appended

    async def replace_after() -> object:
        at = state.get("replace") or await chatdb.get_conversation(db, **edited)
        stored = await chatdb.replace_messages_after(
            db, **edited, after_seq=at.last_seq - 2, messages=turn, expected=at
        )
        state["replace"] = at.model_copy(update={"last_seq": at.last_seq + 2, "revision": at.revision + 3})
        return stored

    async def list_after() -> object:
        state["list"] = state.get("list") or (await chatdb.list_conversations(db, **spread))[-1]
        return await chatdb.list_conversations(db, **spread, after=state["list"])

    return {
        "history_by_key": lambda: chatdb.get_history(db, **keyed()),
        "history_before_key": lambda: chatdb.get_history(
            db, **edited, before_key=f"message {chance.randrange(200, 900)}"
        ),
        "list_messages_after_key": lambda: chatdb.list_messages(
            db, **edited, after_key=f"message {chance.randrange(200, 900)}"
        ),
        "get_by_key": lambda: chatdb.get_conversation(db, **keyed()),
        "get_message_by_key": lambda: chatdb.get_message(db, **keyed(), key=message_key()),
        "append_by_key": lambda: chatdb.append_message(db, **keyed(), role="user", content=TEXT),
        "turn_by_key": lambda: chatdb.append_messages(db, **keyed(), messages=turn),
        "create_first_keyed": lambda: chatdb.create_conversation(
            db, user_id=size.keyed, key=new(), messages=[question]
        ),
        "append_create": lambda: chatdb.append_message(db, **keyed(), role="user", content=TEXT, create=True),
        "append_create_new": lambda: chatdb.append_message(
            db, user_id=size.keyed, conversation_key=new(), role="user", content=TEXT, create=True
        ),
        "append_expected": append_expected,
        "append_patch": lambda: chatdb.append_message(
            db, **place(), role="user", content=TEXT, conversation_metadata_patch={"model": new()}
        ),
        "turn_skip": lambda: chatdb.append_messages(
            db,
            **keyed(),
            messages=[question | {"key": message_key()}, question | {"key": new()}],
            on_existing="skip",
        ),
        "upsert_conversation": lambda: chatdb.upsert_conversation(
            db, user_id=size.keyed, key=f"key {chance.randrange(KEYS)}", title=new()
        ),
        "upsert_conversation_new": lambda: chatdb.upsert_conversation(
            db, user_id=size.keyed, key=new(), title="A title"
        ),
        "upsert_message": lambda: chatdb.upsert_message(
            db, **keyed(), key=message_key(), role="user", content=f"{new()} {TEXT}"
        ),
        "upsert_message_new": lambda: chatdb.upsert_message(db, **keyed(), key=new(), role="user", content=TEXT),
        "load": lambda: chatdb.load_conversation(db, **place()),
        "load_by_key": lambda: chatdb.load_conversation(db, **keyed()),
        "replace_after": replace_after,
        "pop": lambda: chatdb.pop_message(db, **edited),
        "update_patch": lambda: chatdb.update_conversation(db, **place(), metadata_patch={"model": new()}),
        "update_message_patch": lambda: chatdb.update_message(
            db, **place(), seq=chance.randrange(1, MESSAGES), metadata_patch={"rating": new()}
        ),
        "list_after": list_after,
        "list_after_key": lambda: chatdb.list_conversations(
            db, **archived, after_key=f"key {chance.randrange(ARCHIVED // 2, ARCHIVED)}"
        ),
        "list_unarchived": lambda: chatdb.list_conversations(db, **archived),
        "list_archived": lambda: chatdb.list_conversations(db, **archived, archived=True),
        "list_both": lambda: chatdb.list_conversations(db, **archived, archived=None),
        "list_created": lambda: chatdb.list_conversations(db, **spread, order_by="created_at"),
        "list_created_ascending": lambda: chatdb.list_conversations(
            db, **spread, order_by="created_at", descending=False
        ),
        "previews": lambda: chatdb.list_previews(db, user_id=used.any().user_id),
        "pinned": lambda: chatdb.list_pinned(db, **archived, limit=20),
    }


def _branch_calls(
    by: Chatdb, size: Size, chance: random.Random, used: _Places
) -> dict[str, Callable[[], Awaitable[object]]]:
    """Return the calls that follow or change branches. Each kind of write has branched conversations of its own."""
    db = by.pool
    place = lambda: {"user_id": (at := used.any()).user_id, "conversation_id": at.id}  # noqa: E731
    forked = lambda number: {"user_id": size.forked, "conversation_id": size.forked_place(number).id}  # noqa: E731
    read = lambda: forked(chance.randrange(10))  # noqa: E731
    # the first message of each branch, and the other message with the same parent
    versions = [MESSAGES + ADDED * branch + first for branch in range(FORKS) for first in (1, 1 - BACK)]

    def delete_branch() -> Awaitable[object]:
        number, branch = divmod(next(_branches_deleted), FORKS)
        newest = MESSAGES + ADDED * (FORKS - 1 - branch) + 1
        return chatdb.delete_branch(db, **forked(FORKED // 2 + number), seq=newest)

    def delete_message() -> Awaitable[object]:
        number = next(_messages_deleted)
        # every tenth message, among them each parent of a branch
        return chatdb.delete_message(db, **forked(15 + number % 5), seq=10 * (1 + number // 5))

    return {
        "branch_100": lambda: chatdb.get_branch(db, **place()),
        "branch_100_forked": lambda: chatdb.get_branch(db, **read()),
        "load_forked": lambda: chatdb.load_conversation(db, **read()),
        "previews_forked": lambda: chatdb.list_previews(db, user_id=size.forked),
        "versions": lambda: chatdb.list_versions(db, **place()),
        "versions_forked": lambda: chatdb.list_versions(db, **read()),
        "context": lambda: chatdb.get_context(db, **forked(FORKED), max_tokens=8_000),
        "context_forked": lambda: chatdb.get_context(db, **forked(FORKED + 1), max_tokens=8_000),
        "append_parent": lambda: chatdb.append_message(
            db, **place(), role="user", content=TEXT, parent_seq=chance.randrange(1, MESSAGES)
        ),
        "switch": lambda: chatdb.switch_branch(db, **forked(10), seq=chance.choice(versions)),
        "pop_forked": lambda: chatdb.pop_message(db, **forked(11 + chance.randrange(4))),
        "delete_message_forked": delete_message,
        "delete_branch": delete_branch,
        "fork": lambda: chatdb.fork_conversation(db, **place(), seq=MESSAGES),
    }


def _stream_calls(by: Chatdb, size: Size) -> dict[str, Callable[[], Awaitable[object]]]:
    """Return the calls on messages that are streamed, and the statement with which a Watcher polls."""
    db = by.pool
    chance = random.Random("streams")
    where = lambda place: {"user_id": place.user_id, "conversation_id": place.id}  # noqa: E731
    read = lambda: where(size.streamed_place(chance.randrange(STREAMED)))  # noqa: E731
    text = (REPLY + TEXT)[:FLUSH].ljust(FLUSH)
    places = [size.place(chance.randrange(size.conversations * 2 // 3)) for _ in range(WATCHES)]
    watched: list[list[str]] = []

    def extend() -> Awaitable[object]:
        number = chance.randrange(STREAMED)
        offset = _flushes[number] * FLUSH
        _flushes[number] += 1
        return chatdb.extend_message(db, **where(size.started_place(number)), seq=1, offset=offset, text=text)

    async def poll() -> object:
        if not watched:
            rows = await db.fetch(_REVISIONS, [place.id for place in places])
            known = {row["id"]: row["revision"] for row in rows}
            watched.append([place.user_id for place in places])
            watched.append(as_text_array(place.id for place in places))
            watched.append(as_text_array(known[place.id] for place in places))
        return await _poll_conversations.fetch_all(db, *watched)

    return {
        "start": lambda: chatdb.start_message(db, **where(size.started_place(chance.randrange(STREAMED)))),
        "extend": extend,
        "read": lambda: chatdb.read_message(db, **read(), seq=MESSAGES, offset=(READ_FLUSHES - 1) * FLUSH),
        "finish": lambda: chatdb.finish_message(db, **where(size.ended_place(next(_finished))), seq=1),
        "streaming": lambda: chatdb.list_streaming(db, user_id=size.streamed, older_than=timedelta(0)),
        "history_streamed": lambda: chatdb.get_history(db, **read()),
        "branch_streamed": lambda: chatdb.get_branch(db, **read()),
        "poll": poll,
    }


_REVISIONS = "select id, last_seq + edits as revision from chatdb.conversations where id = any($1::int8[])"


def mixed_of(by: Contender, size: Size) -> Callable[[int, int], Awaitable[None]]:
    """Return a task of the mixed load: `times` calls, 80 % reads of a history and 20 % appends."""
    chance = random.Random(f"mixed {by.name}")
    place = _Places(size, chance).any

    async def work(lane: int, times: int) -> None:
        for _ in range(times):
            if chance.random() < 0.8:
                await by.history(place(), 100, lane=lane)
            else:
                await by.append(place(), TEXT, lane=lane)

    return work


def _again(by: Keyed, used: _Places) -> Callable[[], Awaitable[object]]:
    key = f"{by.name} again {next(_serial)}"
    kept: set[Place] = set()

    async def call() -> object:
        at = used.hot()
        if at not in kept:  # the first call, during the warm-up
            kept.add(at)
            return await by.append_keyed(at, TEXT, key)
        return await by.append_again(at, TEXT, key)

    return call


class _Places:
    """Random conversations from the first two thirds; the delete operation uses the rest."""

    def __init__(self, size: Size, chance: random.Random) -> None:
        self._size = size
        self._chance = chance
        self._hot = [self.any() for _ in range(HOT)]

    def any(self) -> Place:
        return self._size.place(self._chance.randrange(self._size.conversations * 2 // 3))

    def hot(self) -> Place:
        return self._chance.choice(self._hot)
