"""Concurrent callers, each on its own connection: order, gaps, keys, and deletions."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from itertools import pairwise
from typing import Any

import pytest

import chatdb
from chatdb import ConflictError, Conversation, ConversationNotFoundError, Message, MessageNotFoundError

USER = "ada"
CALLERS = 16


@pytest.fixture
async def db(dsn: str, arguments_of: Callable[[str], dict[str, Any]]) -> AsyncIterator[chatdb.pool.Pool]:
    """Yield a pool with sixteen open connections, so that sixteen callers are sixteen sessions."""
    async with chatdb.create_pool(**arguments_of(dsn), min_size=CALLERS, max_size=CALLERS) as pool:
        yield pool


@pytest.fixture
async def conversation(db: chatdb.pool.Pool) -> Conversation:
    """Return an empty conversation."""
    return await chatdb.create_conversation(db, user_id=USER)


class _Rollback(Exception):  # noqa: N818 - not an error: it ends a transaction
    """Ends a transaction without its writes."""


@contextlib.asynccontextmanager
async def rolled_back(db: chatdb.pool.Pool) -> AsyncIterator[Any]:
    """Run a block in a transaction and roll it back."""
    with contextlib.suppress(_Rollback):
        async with chatdb.transaction(db) as connection:
            yield connection
            raise _Rollback


async def together(*calls: Coroutine[Any, Any, Any]) -> list[Any]:
    """Run the calls concurrently and return their results; a hang or the first error fails."""
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        tasks = [group.create_task(call) for call in calls]
    return [task.result() for task in tasks]


async def outcome(call: Coroutine[Any, Any, Any], *expected: type[Exception]) -> Any:
    """Return the result of a call, or its error if expected."""
    try:
        return await call
    except expected as error:
        return error


async def append(db: Any, conversation: Conversation, content: str, **fields: Any) -> Message:
    """Append a user message."""
    return await chatdb.append_message(
        db, user_id=USER, conversation_id=conversation.id, role="user", content=content, **fields
    )


async def append_batch(db: Any, conversation: Conversation, *messages: dict[str, Any]) -> list[Message]:
    """Append user messages in one batch."""
    return await chatdb.append_messages(
        db, user_id=USER, conversation_id=conversation.id, messages=[{"role": "user"} | fields for fields in messages]
    )


async def reload(db: Any, conversation: Conversation) -> Conversation:
    """Read the conversation again."""
    return await chatdb.get_conversation(db, user_id=USER, conversation_id=conversation.id)


async def stored(db: Any, conversation: Conversation) -> list[Message]:
    """Return all messages of the conversation."""
    return [
        message async for message in chatdb.iter_messages(db, user_id=USER, conversation_id=conversation.id, batch=1000)
    ]


async def in_order(db: Any, conversation: Conversation) -> list[Message]:
    """Check that seq has no gap, times never decrease and the conversation agrees; return all messages."""
    messages = await stored(db, conversation)
    now = await reload(db, conversation)
    assert [message.seq for message in messages] == list(range(1, len(messages) + 1))
    assert all(earlier.created_at <= later.created_at for earlier, later in pairwise(messages))
    assert now.last_seq == len(messages)
    assert now.updated_at == (messages[-1].created_at if messages else conversation.created_at)
    return messages


def by_writer(messages: list[Message]) -> dict[str, list[int]]:
    """Return each writer's serial numbers, from contents of the form `writer serial`."""
    found: dict[str, list[int]] = {}
    for message in messages:
        writer, serial = message.content.split()
        found.setdefault(writer, []).append(int(serial))
    return found


# --- order ---------------------------------------------------------------------------------------------------------


async def test_sixteen_writers_leave_no_gap_and_keep_their_order(db, conversation):
    """Each writer's messages are in the order it wrote them, at the seq that its call returned."""
    each = 40

    async def write(writer: int) -> list[Message]:
        return [await append(db, conversation, f"{writer} {serial}") for serial in range(each)]

    answers = await together(*(write(writer) for writer in range(CALLERS)))
    messages = await in_order(db, conversation)
    assert by_writer(messages) == {str(writer): list(range(each)) for writer in range(CALLERS)}
    assert sorted((message for answer in answers for message in answer), key=lambda message: message.seq) == messages


async def test_a_batch_is_never_interleaved(db, conversation):
    """The messages of a batch are consecutive and share a time, whatever other callers append."""
    each, size = 20, 5

    async def write(writer: int) -> None:
        for serial in range(0, each * size, size):
            contents = [{"content": f"{writer} {serial + place}"} for place in range(size)]
            if writer % 2:
                batch = await append_batch(db, conversation, *contents)
                assert [message.seq for message in batch] == list(range(batch[0].seq, batch[0].seq + size))
                assert len({message.created_at for message in batch}) == 1
            else:
                for fields in contents:
                    await append(db, conversation, **fields)

    await together(*(write(writer) for writer in range(CALLERS)))
    messages = await in_order(db, conversation)
    assert by_writer(messages) == {str(writer): list(range(each * size)) for writer in range(CALLERS)}


async def test_a_reader_sees_a_batch_whole_or_not_at_all(db, conversation):
    """A page read during batch appends ends at the end of a batch."""
    size, rounds = 7, 25
    done = asyncio.Event()

    async def write() -> None:
        for _ in range(rounds):
            await append_batch(db, conversation, *({"content": "x"} for _ in range(size)))

    async def write_all() -> None:
        await together(*(write() for _ in range(4)))
        done.set()

    async def read() -> int:
        reads = 0
        while not done.is_set():
            page = await chatdb.list_messages(db, user_id=USER, conversation_id=conversation.id, limit=10_000)
            newest = await chatdb.get_history(db, user_id=USER, conversation_id=conversation.id, limit=1)
            assert len(page) % size == 0
            assert not newest or newest[0].seq % size == 0
            reads += 1
        return reads

    reads = await together(write_all(), read(), read())
    assert min(reads[1:]) > 1


async def test_transactions_held_open_and_rolled_back_leave_no_gap(db, conversation):
    """A seq that a transaction rolled back goes to the next writer, and times still follow seq."""
    each = 6

    async def write_held(writer: int) -> None:
        chance = random.Random(writer)
        for serial in range(0, each * 3, 3):
            async with chatdb.transaction(db) as connection:
                # fix the transaction's now() before others append
                await connection.fetchval("select now()")
                await asyncio.sleep(chance.uniform(0, 0.01))
                await append(connection, conversation, f"{writer} {serial}")
                await append_batch(
                    connection,
                    conversation,
                    {"content": f"{writer} {serial + 1}", "key": f"{writer} {serial}"},
                    {"content": f"{writer} {serial + 2}"},
                )
                await asyncio.sleep(chance.uniform(0, 0.003))

    async def write_in_vain(writer: int) -> None:
        for serial in range(each):
            async with rolled_back(db) as connection:
                await append(connection, conversation, f"{writer} {serial}")
                await append(connection, conversation, f"{writer} {serial}", key=f"{writer} {serial}")
                await asyncio.sleep(0.002)

    async def write_short(writer: int) -> None:
        for serial in range(each * 3):
            if serial % 2:
                await append(db, conversation, f"{writer} {serial}", key=f"{writer} {serial}")
            else:
                await append(db, conversation, f"{writer} {serial}")

    kinds = (write_held, write_in_vain, write_short, write_short)
    await together(*(kinds[writer % 4](writer) for writer in range(CALLERS)))
    messages = await in_order(db, conversation)
    assert by_writer(messages) == {
        str(writer): list(range(each * 3)) for writer in range(CALLERS) if kinds[writer % 4] is not write_in_vain
    }


async def test_a_tail_reader_misses_nothing_and_sees_each_message_once(db, conversation):
    """A reader that continues from its last seq gets 1, 2, 3, ... while writers of every kind commit."""
    done = asyncio.Event()

    async def write(writer: int) -> None:
        chance = random.Random(writer)
        for serial in range(30):
            content = f"{writer} {serial}"
            match chance.choice(("single", "single", "keyed", "batch", "held", "lost")):
                case "single":
                    await append(db, conversation, content)
                case "keyed":
                    await append(db, conversation, content, key=content)
                case "batch":
                    await append_batch(db, conversation, *({"content": content} for _ in range(chance.randint(1, 5))))
                case "held":
                    async with chatdb.transaction(db) as connection:
                        await append(connection, conversation, content)
                        await asyncio.sleep(chance.uniform(0, 0.003))
                case "lost":
                    async with rolled_back(db) as connection:
                        await append(connection, conversation, content)

    async def write_all() -> None:
        await together(*(write(writer) for writer in range(CALLERS - 2)))
        done.set()

    async def follow(limit: int) -> list[Message]:
        seen: list[Message] = []
        while True:
            last = done.is_set()
            page = await chatdb.list_messages(
                db,
                user_id=USER,
                conversation_id=conversation.id,
                after_seq=seen[-1].seq if seen else 0,
                limit=limit,
            )
            seen += page
            if last and not page:
                return seen

    _, *readers = await together(write_all(), follow(3), follow(100))
    messages = await in_order(db, conversation)
    assert all(reader == messages for reader in readers)


async def test_writers_in_serializable_transactions_can_try_again(db, conversation):
    """A serialization failure raises UnavailableError with sent=True and no effect, so repeating it is safe."""
    each = 5

    failures: list[chatdb.UnavailableError] = []

    async def write_one(content: str) -> Message:
        async with db.acquire() as connection, connection.transaction(isolation="serializable"):
            return await append(connection, conversation, content)

    async def write(writer: int) -> None:
        for serial in range(each):
            content = f"{writer} {serial}"
            while isinstance(answer := await outcome(write_one(content), chatdb.UnavailableError), Exception):
                failures.append(answer)

    await together(*(write(writer) for writer in range(8)))
    assert {failure.sent for failure in failures} == {True}
    messages = await in_order(db, conversation)
    assert by_writer(messages) == {str(writer): list(range(each)) for writer in range(8)}


# --- keys ----------------------------------------------------------------------------------------------------------


async def test_sixteen_callers_of_the_same_keys_store_each_once(db, conversation):
    """Every call returns the one message per key, and the counter counts each key once."""
    keys = [f"key {number}" for number in range(128)]

    async def call() -> list[Message]:
        return [await append(db, conversation, key, key=key, payload={"k": key}, metadata={"m": 1}) for key in keys]

    answers = await together(*(call() for _ in range(CALLERS)))
    messages = await in_order(db, conversation)
    assert [message.key for message in messages] == keys
    assert all(answer == messages for answer in answers)

    before = await reload(db, conversation)
    assert await together(*(call() for _ in range(2))) == [messages, messages]
    assert await reload(db, conversation) == before


async def test_keys_in_any_order_and_transactions_leave_no_gap(db, conversation):
    """Callers that use the keys in different orders, some in rolled-back transactions, store each key once."""
    keys = [f"key {number}" for number in range(40)]

    async def call(caller: int) -> dict[str, Message]:
        chance = random.Random(caller)
        answers = {}
        for key in chance.sample(keys, len(keys)):
            if chance.random() < 0.2:
                async with rolled_back(db) as connection:
                    await append(connection, conversation, key, key=key)
            answers[key] = await append(db, conversation, key, key=key)
        return answers

    answers = await together(*(call(caller) for caller in range(CALLERS)))
    messages = await in_order(db, conversation)
    assert all(answer == {message.key: message for message in messages} for answer in answers)
    assert {message.key for message in messages} == set(keys)


async def test_of_different_bodies_under_one_key_one_wins(db, conversation):
    """The first body is stored and returned to its caller; every other caller gets ConflictError."""
    rounds = 25
    for number in range(rounds):
        answers = await together(
            *(
                outcome(append(db, conversation, f"body {caller}", key=f"key {number}"), ConflictError)
                for caller in range(CALLERS)
            )
        )
        winners = [answer for answer in answers if isinstance(answer, Message)]
        assert len(winners) == 1
        assert winners[0].content == f"body {answers.index(winners[0])}"
        assert winners[0].seq == number + 1
    messages = await in_order(db, conversation)
    assert len(messages) == rounds


async def test_the_same_keyed_batch_from_sixteen_callers_is_stored_once(db, conversation):
    """Every caller gets the stored messages in the order of its batch."""
    rounds, size = 20, 5
    for number in range(rounds):
        batch = [{"content": f"{place}", "key": f"{number} {place}"} for place in range(size)]
        answers = await together(
            *(append_batch(db, conversation, *(batch[::-1] if caller % 2 else batch)) for caller in range(CALLERS))
        )
        assert all(answer == answers[caller % 2] for caller, answer in enumerate(answers))
        assert [message.key for message in answers[0]] == [fields["key"] for fields in batch]
        assert answers[1] == answers[0][::-1]
    messages = await in_order(db, conversation)
    assert len(messages) == rounds * size


async def test_overlapping_keyed_batches_are_all_or_nothing(db, conversation):
    """A batch is stored whole, found whole, or raises ConflictError and stores nothing."""
    rounds = 20
    winners: list[set[str]] = []
    for number in range(rounds):
        chance = random.Random(number)
        keys = [f"{number} {place}" for place in range(12)]
        starts = [chance.randrange(len(keys) - 2) for _ in range(CALLERS)]
        wanted = [keys[start : start + chance.choice((1, 3))] for start in starts]

        def call(batch: list[str], *, alone: bool) -> Coroutine[Any, Any, Any]:
            if alone and len(batch) == 1:
                return append(db, conversation, batch[0], key=batch[0])
            return append_batch(db, conversation, *({"content": key, "key": key} for key in batch))

        answers = await together(
            *(outcome(call(batch, alone=bool(caller % 2)), ConflictError) for caller, batch in enumerate(wanted))
        )
        stored_whole = []
        for batch, answer in zip(wanted, answers, strict=True):
            if not isinstance(answer, ConflictError):
                found = [answer] if isinstance(answer, Message) else answer
                assert [message.key for message in found] == batch
                stored_whole.append(set(batch))
        for batch, answer in zip(wanted, answers, strict=True):
            if isinstance(answer, ConflictError):
                assert any(other & set(batch) for other in stored_whole)
        winners += stored_whole
    messages = await in_order(db, conversation)
    assert Counter(message.key for message in messages) == Counter(set().union(*winners))


async def test_keyed_batches_and_deletions_do_not_block_each_other(db, conversation):
    """Repeating a batch in another order while its messages are deleted never deadlocks."""
    keys = [f"{place}" for place in range(6)]
    stop = asyncio.Event()

    async def repeat(caller: int) -> None:
        chance = random.Random(caller)
        for _ in range(40):
            batch = chance.sample(keys, len(keys))
            await outcome(
                append_batch(db, conversation, *({"content": key, "key": key} for key in batch)), ConflictError
            )

    async def repeat_all() -> None:
        await together(*(repeat(caller) for caller in range(8)))
        stop.set()

    async def delete() -> None:
        while not stop.is_set():
            await chatdb.delete_messages_after(db, user_id=USER, conversation_id=conversation.id, after_seq=0)

    await together(repeat_all(), *(delete() for _ in range(4)))
    messages = await stored(db, conversation)
    assert len({message.key for message in messages}) == len(messages)


async def test_a_deleted_messages_key_is_free_for_one_of_many(db, conversation):
    """While a keyed message is deleted and appended again, each new one gets the next seq, exactly once."""
    rounds, callers = 25, 8
    stop = asyncio.Event()
    deleted = 0

    async def call() -> list[Message]:
        return [await append(db, conversation, "x", key="key") for _ in range(rounds)]

    async def call_all() -> list[Message]:
        answers = await together(*(call() for _ in range(callers)))
        stop.set()
        return [message for answer in answers for message in answer]

    async def delete() -> None:
        nonlocal deleted
        while not stop.is_set():
            here = {"user_id": USER, "conversation_id": conversation.id}
            found = await outcome(chatdb.get_message(db, key="key", **here), MessageNotFoundError)
            if isinstance(found, Message):
                gone = await outcome(chatdb.delete_message(db, seq=found.seq, **here), MessageNotFoundError)
                deleted += isinstance(gone, chatdb.Deleted)

    answers, *_ = await together(call_all(), delete(), delete())
    now = await reload(db, conversation)
    assert {message.seq for message in answers} == set(range(1, now.last_seq + 1))
    assert len(await stored(db, conversation)) == now.last_seq - deleted
    assert deleted > 1


# --- conversations -------------------------------------------------------------------------------------------------


async def test_get_or_create_creates_once(db):
    """Sixteen callers with the same hundred keys all get the same hundred conversations."""
    keys = [f"key {number}" for number in range(100)]

    async def call(caller: int) -> list[Conversation]:
        return [await chatdb.create_conversation(db, user_id=USER, key=key, title=f"{caller}") for key in keys]

    answers = await together(*(call(caller) for caller in range(CALLERS)))
    assert all(answer == answers[0] for answer in answers)
    assert [conversation.key for conversation in answers[0]] == keys
    assert await db.fetchval("select count(*) from chatdb.conversations") == len(keys)


async def test_get_or_create_raced_with_deletion_always_answers(db):
    """Creating with a key that others delete succeeds, makes no second conversation, and reuses no id."""
    stop = asyncio.Event()
    deleted: list[int] = []

    async def create(caller: int) -> list[int]:
        chance = random.Random(caller)
        found = []
        for _ in range(25):
            conversation = await chatdb.create_conversation(db, user_id=USER, key="key")
            assert conversation.key == "key"
            found.append(conversation.id)
            await asyncio.sleep(chance.uniform(0, 0.004))
        return found

    async def create_all() -> set[int]:
        answers = await together(*(create(caller) for caller in range(10)))
        stop.set()
        return {number for answer in answers for number in answer}

    async def delete() -> None:
        while not stop.is_set():
            for conversation in await chatdb.list_conversations(db, user_id=USER):
                call = chatdb.delete_conversation(db, user_id=USER, conversation_id=conversation.id)
                if not isinstance(await outcome(call, ConversationNotFoundError), Exception):
                    deleted.append(conversation.id)
            await asyncio.sleep(0.002)

    created, *_ = await together(create_all(), delete(), delete())
    left = {conversation.id for conversation in await chatdb.list_conversations(db, user_id=USER)}
    assert len(left) <= 1
    assert len(set(deleted)) == len(deleted) > 1
    assert created == left | set(deleted)


async def test_an_append_comes_before_the_deletion_or_finds_nothing(db):
    """An append racing delete_conversation succeeds or raises ConversationNotFoundError; no message is left behind."""
    rounds, lost = 25, 0
    appends = (
        lambda target: append(db, target, "x"),
        lambda target: append(db, target, "x", key="key"),
        lambda target: append_batch(db, target, {"content": "x"}, {"content": "y"}),
        lambda target: append_batch(db, target, {"content": "x", "key": "a"}, {"content": "y", "key": "b"}),
    )
    for number in range(rounds):
        conversation = await chatdb.create_conversation(db, user_id=USER)
        chance = random.Random(number)

        async def write(kind: int, target: Conversation, delay: float) -> list[bool]:
            await asyncio.sleep(delay)
            answers = [await outcome(appends[kind](target), ConversationNotFoundError) for _ in range(3)]
            return [not isinstance(answer, Exception) for answer in answers]

        async def delete(target: Conversation, delay: float) -> chatdb.Deleted:
            await asyncio.sleep(delay)
            return await chatdb.delete_conversation(db, user_id=USER, conversation_id=target.id)

        deleted, *answers = await together(
            delete(conversation, chance.uniform(0, 0.006)),
            *(write(kind % 4, conversation, chance.uniform(0, 0.006)) for kind in range(12)),
        )
        assert deleted.conversations == 1
        for answer in answers:
            assert answer == sorted(answer, reverse=True)  # once deleted, it stays deleted
            lost += answer.count(False)
    assert lost > 0
    assert await db.fetchval("select count(*) from chatdb.conversations") == 0
    assert await db.fetchval("select count(*) from chatdb.messages") == 0


async def test_delete_user_raced_with_appends_and_creations(db):
    """Two concurrent deletions of a user count each conversation once, and every remaining one is complete."""
    here = {"user_id": USER}
    for number in range(15):
        conversations = [await chatdb.create_conversation(db, key=f"{place}", **here) for place in range(6)]
        chance = random.Random(number)

        async def write(target: Conversation, delay: float) -> int:
            await asyncio.sleep(delay)
            answers = [await outcome(append(db, target, "x"), ConversationNotFoundError) for _ in range(3)]
            return sum(isinstance(answer, Message) for answer in answers)

        async def create(place: int, delay: float) -> tuple[int, int]:
            await asyncio.sleep(delay)
            conversation = await chatdb.create_conversation(db, key=f"new {place}", **here)
            answer = await outcome(append(db, conversation, "x"), ConversationNotFoundError)
            return conversation.id, int(isinstance(answer, Message))

        async def delete(delay: float) -> chatdb.Deleted:
            await asyncio.sleep(delay)
            return await chatdb.delete_user(db, **here)

        answers = await together(
            delete(chance.uniform(0, 0.005)),
            delete(chance.uniform(0, 0.005)),
            *(create(place, chance.uniform(0, 0.005)) for place in range(4)),
            *(write(conversations[place % 6], chance.uniform(0, 0.005)) for place in range(10)),
        )
        deletions, created, written = answers[:2], answers[2:6], answers[6:]
        left = await chatdb.list_conversations(db, **here)
        kept = {conversation.id for conversation in left}
        assert not kept & {conversation.id for conversation in conversations}
        assert kept <= {number for number, _ in created}
        assert sum(deleted.conversations for deleted in deletions) == len(conversations) + len(created) - len(left)
        assert sum(deleted.messages for deleted in deletions) <= sum(written) + sum(count for _, count in created)
        for conversation in left:
            assert len(await in_order(db, conversation)) == dict(created)[conversation.id]
        await chatdb.delete_user(db, **here)
        assert await db.fetchval("select count(*) from chatdb.messages") == 0


# --- changes to messages -------------------------------------------------------------------------------------------


async def test_changes_of_a_message_raced_with_appends_lose_nothing(db, conversation):
    """Callers that change different fields of one message each find their last value, and nothing else changes."""
    first = await append(db, conversation, "x", key="key")
    here = {"user_id": USER, "conversation_id": conversation.id}
    rounds = 40

    async def change(part: str, value: Any) -> None:
        for number in range(rounds):
            await chatdb.update_message(db, seq=first.seq, **{part: value(number)}, **here)
            for _ in range(2):  # nobody else writes this field
                found = await chatdb.get_message(db, seq=first.seq, **here)
                assert getattr(found, part) == value(number)

    async def rename() -> None:
        for number in range(rounds):
            await chatdb.update_conversation(db, title=f"{number}", **here)

    async def write(writer: int) -> None:
        for serial in range(rounds):
            await append(db, conversation, f"{writer} {serial}")

    await together(
        change("content", lambda number: f"x {number}"),
        change("token_count", lambda number: number),
        change("metadata", lambda number: {"number": number}),
        rename(),
        *(write(writer) for writer in range(8)),
    )
    messages = await in_order(db, conversation)
    last = rounds - 1
    changes = {"content": f"x {last}", "token_count": last, "metadata": {"number": last}}
    assert messages[0] == first.model_copy(update=changes)
    assert by_writer(messages[1:]) == {str(writer): list(range(rounds)) for writer in range(8)}
    assert (await reload(db, conversation)).title == f"{last}"


async def test_a_key_repeated_while_its_message_changes_stores_no_second(db, conversation):
    """A repeated call returns the message, or ConflictError if its body has changed, and writes nothing."""
    first = await append(db, conversation, "x 1", key="key")
    before = await reload(db, conversation)
    here = {"user_id": USER, "conversation_id": conversation.id}

    async def change() -> None:
        for number in range(60):
            await chatdb.update_message(db, seq=first.seq, content=f"x {number % 2}", **here)

    async def repeat() -> list[Any]:
        return [await outcome(append(db, conversation, "x 1", key="key"), ConflictError) for _ in range(30)]

    _, *answers = await together(change(), *(repeat() for _ in range(8)))
    assert all(answer == first or isinstance(answer, ConflictError) for found in answers for answer in found)
    assert await reload(db, conversation) == before.model_copy(update={"revision": 61})  # 60 updates
    assert len(await stored(db, conversation)) == 1


async def test_cutting_a_conversation_off_raced_with_appends(db, conversation):
    """Messages appended before delete_messages_after are gone, later ones remain, and no seq is used twice."""
    here = {"user_id": USER, "conversation_id": conversation.id}
    writers, each, keep = 10, 30, 5
    appended: list[int] = []
    cut_off: set[int] = set()
    deleted = 0
    stop = asyncio.Event()
    for _ in range(keep):
        await append(db, conversation, "kept")

    async def write(writer: int) -> None:
        for serial in range(each):
            message = await append(db, conversation, f"{writer} {serial}")
            appended.append(message.seq)

    async def write_all() -> None:
        await together(*(write(writer) for writer in range(writers)))
        stop.set()

    async def cut() -> None:
        nonlocal deleted
        while not stop.is_set():
            before = set(appended)
            gone = await chatdb.delete_messages_after(db, after_seq=keep, **here)
            deleted += gone.messages
            cut_off.update(before)
            left = await chatdb.list_messages(db, limit=10_000, **here)
            assert [message.seq for message in left[:keep]] == list(range(1, keep + 1))
            assert not before & {message.seq for message in left}
            await asyncio.sleep(0.01)

    await together(write_all(), cut(), cut())
    last = await append(db, conversation, "after all cuts")
    left = await stored(db, conversation)
    total = keep + writers * each + 1
    assert last.seq == total == (await reload(db, conversation)).last_seq
    assert left[-1] == last
    assert len(left) == total - deleted
    assert sorted(appended) == list(range(keep + 1, total))
    assert deleted >= len(cut_off) > 0


@pytest.mark.owner
async def test_a_change_that_waited_for_the_end_of_a_stream(db, conversation):
    """A new content that waits while another caller finishes the message is stored, and no error is raised."""
    at = {"user_id": USER, "conversation_id": conversation.id}
    message = await chatdb.start_message(db, **at)
    async with chatdb.transaction(db) as connection:
        await chatdb.finish_message(connection, **at, seq=message.seq, content="finished")
        change = asyncio.create_task(chatdb.update_message(db, **at, seq=message.seq, content="changed"))
        waiting = (
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        )
        async with asyncio.timeout(30):
            while not await db.fetchval(waiting):  # noqa: ASYNC110 - it changes in the server
                await asyncio.sleep(0.01)
    changed = await change

    assert (changed.content, changed.state) == ("changed", None)
    assert await chatdb.get_history(db, **at) == [changed]


async def test_appends_beside_deletions_of_the_conversation(db):
    """Appends that create their conversation, and deletions of it, raise no error however they meet."""
    at = {"user_id": USER, "conversation_key": "thread"}
    is_done = asyncio.Event()

    async def append_all() -> None:
        for _ in range(150):
            batch = [{"role": "user", "content": text} for text in ("a", "b")]
            await chatdb.append_messages(db, **at, create=True, messages=batch)

    async def delete_all() -> None:
        while not is_done.is_set():
            with contextlib.suppress(ConversationNotFoundError):
                await chatdb.delete_conversation(db, **at)

    deletions = [asyncio.create_task(delete_all()) for _ in range(2)]
    await asyncio.gather(*(append_all() for _ in range(4)))
    is_done.set()
    await asyncio.gather(*deletions)
    await append_all()
    assert len(await chatdb.get_history(db, **at, limit=1_000)) >= 300
