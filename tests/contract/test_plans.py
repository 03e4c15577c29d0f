"""
The plans that PostgreSQL keeps for a prepared statement.

A custom plan is made again on every call, which costs more than a read itself. PostgreSQL keeps to custom plans if they
look cheaper than the generic one: without the scalar subquery around $2, the planner folds `coalesce($2, ...)`.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

import chatdb
from chatdb import watching
from chatdb._core.query import statement_files
from tests.support.catalog import SEARCH_INDEX
from tests.support.sqlfiles import file_of

EXCEPTIONS = {
    "check_schema",  # once per start
    "count_user", "delete_user", "move_user",  # once per user
    "import_conversations", "import_conversations_extend", "import_conversations_find", "import_conversations_messages",
    "import_conversations_parents", "import_conversations_stored", "import_conversations_contents",
    "import_conversations_change", "import_conversations_update", "import_conversations_begun",
}  # fmt: skip
DATA = """
    insert into chatdb.conversations (user_id, key, last_seq, created_at)
    select case when n > 460 then 'ann' else 'u' || n % 50 end, 'c' || n, 100, now() - n * interval '1 minute'
    from generate_series(1, 500) as n;

    insert into chatdb.messages (user_id, conversation_id, seq, role, key, content, created_at)
    select user_id, id, n, 'user', 'm' || n, repeat('hello ', 50), created_at
    from chatdb.conversations, generate_series(1, 100) as n;

    update chatdb.messages set parent_seq = seq - 3 where seq % 20 = 10;

    analyze chatdb.conversations, chatdb.messages;
"""
CALLS = 8
"""PostgreSQL compares the generic plan with five custom plans."""


@pytest.mark.chaos
@pytest.mark.owner
async def test_every_statement_settles_on_its_generic_plan(dsn: str) -> None:
    """After five calls, no statement is planned again."""
    settings = {"random_page_cost": "4"}  # the default, with which a custom plan looks cheapest
    async with chatdb.create_pool(dsn, min_size=1, max_size=1, server_settings=settings) as db:
        user = {"user_id": "ann"}
        await db.execute(DATA)
        await db.execute("create extension btree_gin")
        await db.execute(SEARCH_INDEX)
        many = await chatdb.list_conversations(db, **user, limit=5 * CALLS)
        for number in range(CALLS):
            for call in calls(db, user, many[number * 5 : number * 5 + 5], number):
                await call()
        rows = await db.fetch(
            r"""
            select substring(statement from 'chatdb\.(\w+)') as name, generic_plans from pg_prepared_statements
            where statement like '--chatdb.%'
            """
        )
    plans = {row["name"]: row["generic_plans"] for row in rows}
    assert {path.stem for path in statement_files()} - EXCEPTIONS == plans.keys() - EXCEPTIONS
    assert [name for name, count in plans.items() if not count and name not in EXCEPTIONS] == []


@pytest.mark.owner
@pytest.mark.parametrize("is_stored", [False, True], ids=["new", "stored"])
async def test_keys_are_looked_up_without_statistics(dsn: str, is_stored: bool) -> None:
    """In a table without statistics, each key is looked up in its index, also by a retry with an old revision."""
    count = 200
    options = {"plan_cache_mode": "force_generic_plan"}
    async with chatdb.create_pool(dsn, max_size=1, server_settings=options) as db:
        for number in range(12):
            batch = [{"role": "user", "content": "", "key": f"{number:0100}{n}"} for n in range(1_000)]
            await chatdb.append_messages(db, user_id="ann", conversation_key="c", messages=batch, create=True)
        chat = await chatdb.get_conversation(db, user_id="ann", conversation_key="c")
        arguments = [
            *("ann", None, "c", ["user"] * count, ["x"] * count, *[[None] * count] * 3),
            [f"{5:0100}{n}" if is_stored else f"new {n}" for n in range(count)],
            *(False, True, *((chat.id, 1) if is_stored else (None, None)), None, None, None),
        ]
        sql = file_of("append_messages_conditional").sql
        rows = await db.fetch(f"explain (analyze, timing off, buffers off) {sql}", *arguments)
    lines = "\n".join(row[0] for row in rows)
    removed = re.findall(r"loops=(\d+)\)(?:(?!loops=)[\s\S])*?Rows Removed by Filter: ([\d.]+)", lines)
    assert max((int(loops) * float(each) for loops, each in removed), default=0) <= count


def calls(
    db: chatdb.Pool, user: dict[str, Any], five: list[chatdb.Conversation], number: int
) -> list[Callable[[], Awaitable[Any]]]:
    """Return a call for each statement."""
    first, second, third, fourth, fifth = ({**user, "conversation_id": each.id} for each in five)
    text = {"role": "user", "content": f"text {number}"}
    key = f"new {number}"
    lists = (chatdb.list_conversations, chatdb.list_previews)
    choices: list[dict[str, Any]] = [
        {"archived": False}, {"archived": True}, {"archived": None},
        {"order_by": "created_at"}, {"order_by": "created_at", "descending": False},
    ]  # fmt: skip
    return [
        lambda: chatdb.get_conversation(db, **first),
        lambda: chatdb.load_conversation(db, **first),
        lambda: chatdb.get_history(db, **first, limit=100),
        lambda: chatdb.get_history(db, **user, conversation_key=five[0].key, limit=100),
        lambda: chatdb.list_messages(db, **first, limit=100),
        lambda: chatdb.get_history(db, **first, limit=10, before_key="m50"),
        lambda: chatdb.list_messages(db, **first, limit=10, after_key="m50"),
        lambda: chatdb.get_message(db, **first, seq=3),
        *(lambda f=f, c=c: f(db, **user, **c) for f in lists for c in choices),
        lambda: chatdb.list_conversations(db, **user, after=five[0]),
        lambda: chatdb.list_pinned(db, **user),
        lambda: chatdb.append_message(db, **first, **text),
        lambda: chatdb.append_message(db, **first, **text, key=key),
        lambda: chatdb.append_messages(db, **first, messages=[text, text]),
        lambda: chatdb.append_messages(db, **first, messages=[text, text, text]),
        lambda: chatdb.append_messages(db, **first, messages=[{**text, "key": f"{key} 2"}]),
        lambda: chatdb.upsert_message(db, **first, **text, key=f"{key} 3"),
        lambda: chatdb.update_message(db, **first, seq=2, content=f"changed {number}"),
        lambda: chatdb.update_conversation(db, **first, title=f"title {number}"),
        lambda: chatdb.delete_message(db, **second, seq=5),
        lambda: chatdb.pop_message(db, **second),
        lambda: chatdb.delete_messages_after(db, **third, after_seq=18),
        lambda: chatdb.replace_messages_after(db, **fourth, after_seq=10, messages=[text], expected=five[3]),
        lambda: chatdb.append_message(db, **first, **text, parent_seq=50),
        lambda: chatdb.append_messages(db, **first, messages=[text, text], parent_seq=70),
        lambda: chatdb.get_branch(db, **first, limit=100),
        lambda: chatdb.get_branch(db, **first, limit=100, top_seq=90),
        lambda: chatdb.list_versions(db, **first, limit=100),
        lambda: chatdb.get_context(db, **first, max_tokens=8000),
        lambda: chatdb.switch_branch(db, **first, seq=30),
        lambda: chatdb.fork_conversation(db, **first),
        lambda: chatdb.delete_branch(db, **second, seq=30),
        lambda: chatdb.start_message(db, **first, key=f"{key} 4"),
        lambda: chatdb.extend_message(db, **first, key=f"{key} 4", offset=0, text="text"),
        lambda: chatdb.read_message(db, **first, key=f"{key} 4", offset=1),
        lambda: chatdb.list_streaming(db, **user, older_than=timedelta(0)),
        lambda: chatdb.finish_message(db, **first, key=f"{key} 4"),
        *(lambda m=m: chatdb.search_messages(db, **user, query="hello", mode=m) for m in ("substring", "words")),
        *(lambda m=m: chatdb.search_messages(db, **first, query="hello", mode=m) for m in ("substring", "words")),
        lambda: chatdb.Watcher(db)._look(db, [watching._Watch("ann", each.id, 0) for each in five]),
        lambda: chatdb.delete_conversation(db, **fifth),
        lambda: chatdb.create_conversation(db, **user),
        lambda: chatdb.create_conversation(db, **user, key=key),
        lambda: chatdb.create_conversation(db, **user, messages=[text]),
        lambda: chatdb.upsert_conversation(db, **user, key=key),
        lambda: chatdb.upsert_conversation(db, **user, key=key, metadata_patch={"a": number}, archived=True),
        lambda: _exhaust(chatdb.export_user(db, **user)),
    ]


async def _exhaust(records: AsyncIterator[Any]) -> None:
    async for _ in records:
        pass
