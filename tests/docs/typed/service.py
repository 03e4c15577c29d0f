"""What a service does with chatdb; `nox -s typed` checks it where chatdb is installed alone."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Literal, assert_type

from pydantic import JsonValue, PostgresDsn, SecretStr

import chatdb


async def prepare(connection: chatdb.Connection) -> None:
    """Configure a new connection of the pool."""
    assert_type(await connection.execute("set geqo = off"), str)


@asynccontextmanager
async def lifespan() -> AsyncGenerator[chatdb.Pool, None]:
    """Migrate, and open a pool for the lifetime of a service."""
    assert_type(await chatdb.migrate(wait=5), list[str])
    async with chatdb.create_pool(max_size=3, init=prepare, host=["a", "b"], server_settings={"geqo": "off"}) as db:
        assert_type(db, chatdb.Pool)
        await chatdb.check_schema(db)
        yield db


async def pools() -> None:
    """Open pools in other ways."""
    assert_type(await chatdb.create_pool("postgresql://localhost/chat", statement_cache_size=0), chatdb.Pool)
    await chatdb.create_pool(SecretStr("postgresql://localhost/chat"), row_level_security=True)
    db = await chatdb.create_pool(PostgresDsn("postgresql://localhost/chat"))
    await db.expire_connections()
    await db.close()
    chatdb.Pool("postgresql://localhost/chat", min_size=1, retries=0).terminate()
    async with chatdb.open_embedded("data") as embedded:
        await chatdb.delete_user(embedded, user_id="alice", timeout=60)
        assert_type(await chatdb.move_user(embedded, user_id="guest", to_user_id="alice"), chatdb.Moved)
        async for record in chatdb.export_user(embedded, user_id="alice"):
            assert_type(record, chatdb.Conversation | chatdb.Message)
        print(embedded.path)


async def conversations(db: chatdb.Database, user: str) -> None:
    """Call every function for conversations."""
    chat = await chatdb.create_conversation(
        db, user_id=user, title="Plans", key="one", metadata={"tags": ["a"], "n": 1}
    )
    assert_type(chat, chatdb.Conversation)
    assert_type(chat.id, int)
    assert_type(chat.user_id, str)
    assert_type(chat.key, str | None)
    assert_type(chat.title, str | None)
    assert_type(chat.metadata, dict[str, JsonValue] | None)
    assert_type(chat.last_seq + chat.head_seq + chat.revision, int)
    assert_type(chat.cursor + chat.etag, str)
    assert_type(chat.archived_at, datetime | None)
    assert_type(chat.created_at, datetime)
    assert_type(chat.updated_at, datetime)
    counts = {"unread": 3}
    await chatdb.update_conversation(db, user_id=user, conversation_id=chat.id, title=None, metadata=counts)
    await chatdb.update_conversation(db, user_id=user, conversation_id=chat.id, metadata=chat.metadata)
    assert_type(await chatdb.get_conversation(db, user_id=user, conversation_id=chat.id), chatdb.Conversation)
    assert_type(await chatdb.get_conversation(db, user_id=user, conversation_key="one"), chatdb.Conversation)
    await chatdb.create_conversation(
        db, user_id=user, key="two", messages=[{"role": "user", "content": "hi"}], expected=chatdb.NEW
    )
    assert_type(await chatdb.upsert_conversation(db, user_id=user, key="one", title="Plans"), chatdb.Conversation)
    await chatdb.upsert_conversation(db, user_id=user, key="one", metadata_patch={"n": None}, archived=True)
    await chatdb.update_conversation(
        db, user_id=user, conversation_key="one", metadata_patch={"n": None}, archived=True, pinned=False, expected=chat
    )
    page = await chatdb.list_conversations(db, user_id=user)
    assert_type(page, list[chatdb.Conversation])
    await chatdb.list_conversations(db, user_id=user, limit=50, after=page[-1], archived=None)
    await chatdb.list_conversations(db, user_id=user, after=page[-1].cursor, order_by="created_at", descending=False)
    assert_type(await chatdb.list_pinned(db, user_id=user), list[chatdb.Conversation])
    previews = await chatdb.list_previews(db, user_id=user, after_key="one")
    assert_type(previews, list[tuple[chatdb.Conversation, chatdb.Message | None]])
    loaded = await chatdb.load_conversation(db, user_id=user, conversation_key="one", limit=50)
    assert_type(loaded, tuple[chatdb.Conversation, list[chatdb.Message]])
    deleted = await chatdb.delete_conversation(db, user_id=user, conversation_id=chat.id, expected=chat.etag)
    assert_type(deleted, chatdb.Deleted)
    assert_type(deleted.conversations + deleted.messages, int)


async def messages(db: chatdb.Database, user: str, chat: int, title: str | chatdb.Unset = chatdb.UNSET) -> None:
    """Call every function for messages."""
    await chatdb.update_conversation(db, user_id=user, conversation_id=chat, title=title)
    message = await chatdb.append_message(
        db,
        user_id=user,
        conversation_id=chat,
        role="user",
        content="hi",
        payload={"a": [1, None]},
        token_count=1,
        key="k",
    )
    assert_type(message, chatdb.Message)
    assert_type(message.public(), dict[str, JsonValue])
    assert_type(message.seq, int)
    assert_type(message.parent_seq, int | None)
    assert_type(message.role, chatdb.Role)
    assert_type(message.content, str)
    assert_type(message.payload, chatdb.JsonText | None)
    assert_type(message.metadata, dict[str, JsonValue] | None)
    assert_type(message.token_count, int | None)
    assert_type(message.state, Literal["streaming", "aborted"] | None)
    assert_type(message.created_at, datetime)
    if message.payload is not None:
        assert_type(message.payload.parsed(), JsonValue)
    new = [chatdb.NewMessage(role="user", content="hi"), chatdb.NewMessage(role="tool", content="", payload=[1])]
    stored = await chatdb.append_messages(db, user_id=user, conversation_id=chat, messages=new)
    assert_type(stored, list[chatdb.Message])
    await chatdb.append_messages(
        db,
        user_id=user,
        conversation_id=chat,
        messages=[{"role": "user", "content": "hi", "metadata": {"a": 1}, "payload": chatdb.JsonText("{}")}],
    )
    assert_type(await chatdb.get_history(db, user_id=user, conversation_id=chat, before_seq=9), list[chatdb.Message])
    assert_type(await chatdb.list_messages(db, user_id=user, conversation_id=chat, after_seq=1), list[chatdb.Message])
    assert_type(chatdb.iter_messages(db, user_id=user, conversation_id=chat), AsyncIterator[chatdb.Message])
    async for each in chatdb.iter_messages(db, user_id=user, conversation_id=chat):
        assert_type(each, chatdb.Message)
    assert_type(await chatdb.get_message(db, user_id=user, conversation_id=chat, seq=1), chatdb.Message)
    assert_type(await chatdb.get_message(db, user_id=user, conversation_id=chat, key="k"), chatdb.Message)
    await chatdb.update_message(db, user_id=user, conversation_id=chat, seq=1, content="ho", payload=None)
    await chatdb.append_message(
        db, user_id=user, conversation_key="one", create=True, expected=chatdb.NEW, role="user", content="hi"
    )
    await chatdb.append_messages(
        db, user_id=user, conversation_id=chat, messages=new, on_existing="skip", conversation_metadata_patch={"n": 2}
    )
    upserted = await chatdb.upsert_message(db, user_id=user, conversation_id=chat, key="k", role="tool", content="")
    assert_type(upserted, chatdb.Message)
    before = await chatdb.get_conversation(db, user_id=user, conversation_id=chat)
    replaced = await chatdb.replace_messages_after(
        db, user_id=user, conversation_id=chat, after_seq=1, messages=new, expected=before
    )
    assert_type(replaced, list[chatdb.Message])
    assert_type(await chatdb.pop_message(db, user_id=user, conversation_id=chat), chatdb.Message | None)
    assert_type(await chatdb.delete_message(db, user_id=user, conversation_id=chat, seq=1), chatdb.Deleted)
    assert_type(await chatdb.delete_messages_after(db, user_id=user, conversation_id=chat, after_seq=0), chatdb.Deleted)


async def branches(db: chatdb.Database, user: str, chat: chatdb.Conversation) -> None:
    """Call every function for branches, and the one for a model's window."""
    assert_type(chat.head_seq, int)
    edited = await chatdb.append_message(
        db, user_id=user, conversation_id=chat.id, role="user", content="hi", parent_seq=0
    )
    assert_type(edited.parent_seq, int | None)
    await chatdb.append_messages(
        db,
        user_id=user,
        conversation_id=chat.id,
        messages=[{"role": "assistant", "content": ""}],
        parent_seq=edited.seq,
    )
    line = await chatdb.get_branch(db, user_id=user, conversation_key="one", limit=9, before_seq=9, top_seq=edited.seq)
    assert_type(line, list[chatdb.Message])
    versions = await chatdb.list_versions(db, user_id=user, conversation_id=chat.id, limit=9, before_seq=9)
    assert_type(versions, dict[int, list[int]])
    switched = await chatdb.switch_branch(db, user_id=user, conversation_id=chat.id, key="k", expected=chat)
    assert_type(switched, chatdb.Conversation)
    forked = await chatdb.fork_conversation(db, user_id=user, conversation_id=chat.id, seq=1, new_key="copy")
    assert_type(forked, chatdb.Conversation)
    deleted = await chatdb.delete_branch(db, user_id=user, conversation_id=chat.id, seq=1, expected=switched.etag)
    assert_type(deleted, chatdb.Deleted)
    context = await chatdb.get_context(db, user_id=user, conversation_id=chat.id, max_tokens=8000, limit=100)
    assert_type(context, list[chatdb.Message])


async def streams(db: chatdb.Database, user: str, chat: chatdb.Conversation) -> None:
    """Stream a message, with the helper and with the functions below it."""
    async with chatdb.stream_message(db, user_id=user, conversation_id=chat.id, flush_every=0.5) as stream:
        assert_type(stream, chatdb.MessageStream)
        await stream.write("hi")
        await stream.flush()
        assert_type(stream.offset, int)
        stream.finish(payload={"model": "a"}, metadata={"a": 1}, token_count=1)
    assert_type(stream.message, chatdb.Message)
    started = await chatdb.start_message(
        db, user_id=user, conversation_key="one", role="tool", key="k", metadata={"a": 1}, parent_seq=0
    )
    assert_type(started, chatdb.Message)
    length = await chatdb.extend_message(db, user_id=user, conversation_key="one", key="k", offset=0, text="hi")
    assert_type(length, int)
    tail = await chatdb.read_message(db, user_id=user, conversation_id=chat.id, seq=1, offset=length)
    assert_type(tail, chatdb.MessageTail)
    assert_type(tail.text, str)
    assert_type(tail.offset, int)
    assert_type(tail.state, Literal["streaming", "aborted"] | None)
    finished = await chatdb.finish_message(
        db, user_id=user, conversation_key="one", key="k", content="ho", payload=[1], token_count=1, aborted=True
    )
    assert_type(finished, chatdb.Message)
    left = await chatdb.list_streaming(db, user_id=user, older_than=timedelta(minutes=5))
    assert_type(left, list[chatdb.Message])


async def search(db: chatdb.Database, user: str, chat: chatdb.Conversation) -> None:
    """Search in all conversations and in one."""
    matches = await chatdb.search_messages(db, user_id=user, query="hi", limit=9, mode="words")
    assert_type(matches, list[chatdb.Match])
    more = await chatdb.search_messages(db, user_id=user, query="hi", conversation_id=chat.id, after=matches[-1])
    assert_type(more[0].cursor, str)
    assert_type(more[0].snippet, str)
    await chatdb.search_messages(db, user_id=user, query="hi", conversation_key="one", after=more[0].cursor)


async def watch(user: str) -> None:
    """Watch a conversation, with hints of a pool that sends them."""
    async with (
        chatdb.create_pool(notify=True) as db,
        chatdb.Watcher(db, listen_dsn=PostgresDsn("postgresql://localhost/chat"), poll=0.5) as watcher,
    ):
        assert_type(watcher, chatdb.Watcher)
        assert_type(watcher.watch(user_id=user, conversation_id=1), AsyncGenerator[chatdb.Message, None])
        async for message in watcher.watch(user_id=user, conversation_key="one", after_seq=1):
            assert_type(message, chatdb.Message)


async def replicas(user: str) -> None:
    """Read on replicas."""
    async with chatdb.create_pool(replicas=["postgresql://replica/chat", SecretStr("postgresql://b/chat")]) as db:
        reader = db.reader()
        assert_type(reader, chatdb.Reader)
        for state in db.replica_states():
            assert_type(state, chatdb.ReplicaState)
            assert_type(state.role, Literal["replica", "primary"] | None)
            assert_type(state.lag, float | None)
        await chatdb.get_history(reader, user_id=user, conversation_id=1, at_least=3)
        await chatdb.get_history(db, user_id=user, conversation_id=1, at_least=3)
        chat, _ = await chatdb.load_conversation(reader, user_id=user, conversation_key="one", at_least=3)
        assert_type(chat, chatdb.Conversation)


async def transactions(db: chatdb.Pool, user: str) -> None:
    """Group calls, with chatdb's transaction and with asyncpg's."""
    async with chatdb.transaction(db, user_id=user) as connection:
        assert_type(connection, chatdb.Connection)
        await chatdb.create_conversation(connection, user_id=user)
        async with chatdb.transaction(connection), connection.transaction(isolation="serializable"):
            await connection.executemany("insert into notes values ($1, $2)", [("a", 1), ("b", 2)])
        assert_type(connection.is_in_transaction(), bool)
        async for row in connection.cursor("select name from notes"):
            print(len(row))
    async with db.acquire(timeout=1) as connection:
        assert_type(connection, chatdb.Connection)
        await conversations(connection, user)
    connection = await db.acquire()
    try:
        await messages(connection, user, 1)
    finally:
        await db.release(connection)


async def statements(db: chatdb.Pool, connection: chatdb.Connection) -> None:
    """Run the service's own statements; rows have a type, and the values in their columns do not."""
    rows = await db.fetch("select name from notes where id = $1", 1, timeout=5)
    for row in rows:
        print(list(row.keys()), len(row), "name" in row)
    first = await db.fetchrow("select 1")
    print(first is None or len(first))
    assert_type(await db.execute("select 1"), str)
    await db.executemany("insert into notes values ($1)", [("a",)])
    await db.copy_records_to_table("notes", records=[("a",)])
    assert_type(db.get_size() + db.get_min_size() + db.get_max_size() + db.get_idle_size(), int)
    assert_type(db.get_waiting_count(), int)
    db.add_call_listener(listen)
    assert_type(db.is_closing(), bool)


def listen(call: chatdb.Call) -> None:
    """Hear of a call."""
    assert_type(call.operation + call.statement, str)
    assert_type(call.duration + call.wait, float)
    assert_type(call.rows + call.retries, int)
    assert_type(call.error, str | None)
    assert_type(call.sqlstate, str | None)


async def errors(db: chatdb.Database) -> str:
    """Handle every error."""
    try:
        await chatdb.get_conversation(db, user_id="alice", conversation_id=1)
    except chatdb.InvalidInputError as error:
        return error.parameter
    except (chatdb.ConversationNotFoundError, chatdb.MessageNotFoundError, chatdb.NotFoundError) as error:
        return error.public
    except (chatdb.AcquireTimeoutError, chatdb.CommandTimeoutError, chatdb.PoolClosedError) as error:
        assert_type(error.sent, bool | None)
    except chatdb.UnavailableError as error:
        assert_type(error.sent, bool | None)
    except chatdb.StaleError as error:
        return error.public
    except (chatdb.ConflictError, chatdb.SchemaError, chatdb.ConfigurationError) as error:
        return str(error)
    except chatdb.ChatDBError as error:
        return error.public
    return ""


async def mistakes(db: chatdb.Pool) -> None:
    """Mistakes that a type checker finds; an ignore that is not needed is an error."""
    await chatdb.append_message(db, user_id="alice", conversation_id=1, role="narrator", content="")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    await chatdb.create_conversation(3, user_id="alice")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    chatdb.create_pool(maxsize=3)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    chatdb.create_pool(max_size="3")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    chatdb.create_pool(statement_cache_size="0")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    chatdb.Pool("postgresql://localhost/chat", maxsize=3)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    chatdb.Watcher(db, listen_dsn=3)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    await chatdb.list_streaming(db, user_id="alice", older_than=60)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    db.add_call_listener(statements)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    await db.execute(3)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
