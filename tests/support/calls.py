"""The signatures of the public functions, and calls of each."""

from __future__ import annotations

import inspect
from datetime import UTC, datetime, timedelta
from typing import Any

import chatdb
from chatdb import NEW, UNSET, Conversation, Message, MessageStream

required = inspect.Parameter.empty
_CONVERSATION = {"user_id": required, "conversation_id": None, "conversation_key": None}
_MESSAGE = _CONVERSATION | {"seq": None, "key": None}
_OPTIONS = {"create": False, "parent_seq": None, "expected": None, "conversation_metadata_patch": None}
_PAGE = {
    "user_id": required,
    "limit": 20,
    "after": None,
    "after_key": None,
    "archived": False,
    "order_by": "updated_at",
    "descending": True,
}
SIGNATURES: dict[str, dict[str, Any]] = {
    "create_conversation": {
        "user_id": required,
        "title": None,
        "key": None,
        "metadata": None,
        "messages": (),
        "expected": None,
    },
    "upsert_conversation": {
        "user_id": required,
        "key": required,
        "title": None,
        "metadata": None,
        "metadata_patch": UNSET,
        "archived": UNSET,
    },
    "get_conversation": _CONVERSATION | {"at_least": None},
    "load_conversation": _CONVERSATION | {"limit": 100, "at_least": None},
    "list_conversations": _PAGE,
    "list_previews": _PAGE,
    "list_pinned": {"user_id": required, "limit": 100},
    "update_conversation": _CONVERSATION
    | {
        "title": UNSET,
        "metadata": UNSET,
        "metadata_patch": UNSET,
        "archived": UNSET,
        "pinned": UNSET,
        "expected": None,
    },
    "delete_conversation": _CONVERSATION | {"expected": None},
    "delete_user": {"user_id": required, "timeout": None},
    "move_user": {"user_id": required, "to_user_id": required, "timeout": None},
    "export_user": {"user_id": required},
    "append_message": _CONVERSATION
    | {
        "role": required,
        "content": required,
        "payload": None,
        "metadata": None,
        "token_count": None,
        "key": None,
        **_OPTIONS,
    },
    "append_messages": _CONVERSATION | {"messages": required, "on_existing": "conflict", **_OPTIONS},
    "upsert_message": _CONVERSATION
    | {
        "key": required,
        "role": required,
        "content": required,
        "payload": None,
        "metadata": None,
        "token_count": None,
        "expected": None,
    },
    "replace_messages_after": _CONVERSATION | {"after_seq": required, "messages": required, "expected": required},
    "pop_message": _CONVERSATION | {"expected": None},
    "get_history": _CONVERSATION | {"limit": 100, "before_seq": None, "before_key": None, "at_least": None},
    "list_messages": _CONVERSATION | {"after_seq": 0, "after_key": None, "limit": 100, "at_least": None},
    "iter_messages": _CONVERSATION | {"after_seq": 0, "batch": 500},
    "get_message": _MESSAGE,
    "update_message": _MESSAGE
    | {
        "content": UNSET,
        "payload": UNSET,
        "metadata": UNSET,
        "metadata_patch": UNSET,
        "token_count": UNSET,
        "expected": None,
    },
    "delete_message": _MESSAGE | {"expected": None},
    "delete_messages_after": _CONVERSATION | {"after_seq": None, "after_key": None, "expected": None},
    "get_branch": _CONVERSATION | {"limit": 100, "before_seq": None, "top_seq": None},
    "list_versions": _CONVERSATION | {"limit": 100, "before_seq": None},
    "switch_branch": _MESSAGE | {"expected": None},
    "delete_branch": _MESSAGE | {"expected": None},
    "fork_conversation": _MESSAGE | {"new_key": None},
    "get_context": _CONVERSATION | {"max_tokens": required, "limit": 1000},
    "start_message": _CONVERSATION | {"role": "assistant", "key": None, "metadata": None, "parent_seq": None},
    "extend_message": _MESSAGE | {"offset": required, "text": required},
    "read_message": _MESSAGE | {"offset": 0},
    "finish_message": _MESSAGE
    | {"content": None, "payload": None, "metadata": None, "token_count": None, "aborted": False},
    "list_streaming": {"user_id": required, "older_than": required},
    "search_messages": {
        "user_id": required,
        "query": required,
        "limit": 20,
        "after": None,
        "conversation_id": None,
        "conversation_key": None,
        "mode": "substring",
    },
    "stream_message": _CONVERSATION
    | {"role": "assistant", "key": None, "metadata": None, "parent_seq": None, "flush_every": 1.0},
}
"""Every function on user data, with the defaults of its keyword-only parameters."""
_HELLO = {"role": "user", "content": "hello"}
_FIRST = {"role": "user", "content": "first", "key": "first"}
_LISTS: list[dict[str, Any]] = [
    {},
    {"after": ...},
    {"after_key": "thread"},
    {"archived": True},
    {"archived": None},
    {"order_by": "created_at"},
    {"order_by": "created_at", "descending": False},
]
VARIANTS = (
    "",
    "_keyed",
    "_messages",
    "_two",
    "_conditional",
    "_archived",
    "_all",
    "_created",
    "_created_ascending",
    "_after",
    "_before_key",
    "_by_key",
    "_after_key",
    "_top",
    "_conversation",
)
"""How the files of a function's other statements end."""

CALLS: list[tuple[str, dict[str, Any]]] = [
    ("create_conversation", {}),
    ("create_conversation", {"key": "new"}),
    ("create_conversation", {"key": "thread"}),
    ("create_conversation", {"messages": [_HELLO]}),
    ("create_conversation", {"messages": [_HELLO], "key": "thread"}),
    ("create_conversation", {"key": "new", "expected": NEW}),
    ("upsert_conversation", {"key": "new"}),
    ("upsert_conversation", {"key": "thread", "title": "renamed"}),
    ("upsert_conversation", {"key": "thread", "metadata_patch": {"a": 1}, "archived": True}),
    ("get_conversation", {}),
    ("get_conversation", {"conversation_key": "thread"}),
    ("load_conversation", {}),
    *[("list_conversations", arguments) for arguments in _LISTS],
    *[("list_previews", arguments) for arguments in _LISTS],
    ("list_pinned", {}),
    ("update_conversation", {"title": "renamed"}),
    ("update_conversation", {"metadata_patch": {"a": 1}, "archived": True, "pinned": True, "expected": ...}),
    ("update_conversation", {}),
    ("append_message", _HELLO),
    ("append_message", _HELLO | {"key": "new"}),
    ("append_message", _FIRST),
    ("append_message", _HELLO | {"conversation_key": "new", "create": True}),
    ("append_message", _HELLO | {"expected": ..., "conversation_metadata_patch": {"a": 1}}),
    ("append_message", _HELLO | {"parent_seq": 1}),
    ("append_messages", {"messages": [_HELLO]}),
    ("append_messages", {"messages": [_HELLO, _HELLO]}),
    ("append_messages", {"messages": [_HELLO | {"key": "newer"}]}),
    ("append_messages", {"messages": [_FIRST]}),
    ("append_messages", {"messages": [_FIRST, _HELLO], "on_existing": "skip"}),
    ("append_messages", {"messages": [_HELLO], "conversation_key": "new", "create": True, "expected": NEW}),
    ("append_messages", {"messages": [_HELLO], "expected": ..., "conversation_metadata_patch": {"a": 1}}),
    ("append_messages", {"messages": [_HELLO], "parent_seq": 0}),
    ("append_messages", {"messages": []}),
    ("append_messages", {"messages": [], "conversation_key": "new", "create": True}),
    ("upsert_message", _HELLO | {"key": "new"}),
    ("upsert_message", _HELLO | {"key": "first"}),
    ("replace_messages_after", {"after_seq": 0, "messages": [_FIRST], "expected": ...}),
    ("get_history", {}),
    ("get_history", {"before_seq": 1}),
    ("get_history", {"conversation_key": "thread"}),
    ("get_history", {"before_key": "first"}),
    ("list_messages", {}),
    ("list_messages", {"after_key": "first"}),
    ("iter_messages", {}),
    ("get_message", {"seq": 1}),
    ("get_message", {"key": "first"}),
    ("update_message", {"seq": 1, "content": "first, corrected"}),
    ("update_message", {"key": "first", "metadata_patch": {"a": 1}, "expected": ...}),
    ("update_message", {"seq": 1}),
    ("delete_message", {"seq": 1}),
    ("delete_message", {"key": "first", "expected": ...}),
    ("delete_messages_after", {"after_seq": 0}),
    ("delete_messages_after", {"after_key": "first"}),
    ("get_branch", {}),
    ("get_branch", {"top_seq": 1, "before_seq": 1}),
    ("get_branch", {"conversation_key": "thread"}),
    ("list_versions", {}),
    ("switch_branch", {"seq": 1}),
    ("switch_branch", {"key": "first", "expected": ...}),
    ("fork_conversation", {}),
    ("fork_conversation", {"key": "first", "new_key": "fork"}),
    ("get_context", {"max_tokens": 8000}),
    ("start_message", {}),
    ("start_message", {"key": "new"}),
    ("start_message", {"key": "answer"}),
    ("start_message", {"parent_seq": 0}),
    ("extend_message", {"seq": 2, "offset": 5, "text": ""}),
    ("extend_message", {"key": "answer", "offset": 0, "text": "hello again"}),
    ("read_message", {"seq": 2}),
    ("read_message", {"key": "first", "offset": 2}),
    ("list_streaming", {"older_than": timedelta(0)}),
    ("search_messages", {"query": "first", "conversation_id": None}),
    ("search_messages", {"query": "first", "conversation_key": "thread"}),
    ("finish_message", {"seq": 2}),
    ("finish_message", {"key": "answer", "content": "hello, finished", "aborted": True}),
    ("finish_message", {"seq": 1}),
    ("delete_branch", {"seq": 1}),
    ("delete_branch", {"key": "first", "expected": ...}),
    ("pop_message", {}),
    ("delete_conversation", {}),
    ("export_user", {}),
    ("move_user", {"to_user_id": "another"}),
    ("delete_user", {}),
]
"""
Valid calls of every function that sends one statement, at least one per statement; `call` replaces an ellipsis by the
conversation.
"""
STREAM: tuple[str, dict[str, Any]] = ("stream_message", {"key": "new"})
"""A valid call of the function that sends several."""
NOBODYS = Conversation(
    id=-1,
    user_id="bob",
    key=None,
    title=None,
    metadata=None,
    last_seq=0,
    head_seq=0,
    revision=0,
    created_at=datetime.now(UTC),
    updated_at=datetime.now(UTC),
    archived_at=None,
    pinned_at=None,
)
"""A conversation that is not stored."""


async def conversation_with_a_message(db: Any) -> Conversation:
    """Create a conversation with the key "thread", a message with the key "first" and one that streams, "answer"."""
    conversation = await chatdb.create_conversation(db, user_id="alice", key="thread")
    at: dict[str, Any] = {"user_id": "alice", "conversation_id": conversation.id}
    await chatdb.append_message(db, **at, role="user", content="first", key="first")
    message = await chatdb.start_message(db, **at, key="answer")
    await chatdb.extend_message(db, **at, seq=message.seq, offset=0, text="hello")
    return conversation.model_copy(
        update={"last_seq": 2, "head_seq": 2, "revision": 2, "updated_at": message.created_at}
    )


ALTERNATIVES = {
    "conversation_key": "conversation_id",
    "seq": "key",
    "key": "seq",
    "before_key": "before_seq",
    "after_key": "after_seq",
    "metadata_patch": "metadata",
}
"""Parameters, each with the one that must not be given together with it."""


def arguments_with(name: str, parameter: str, value: object) -> dict[str, Any]:
    """Return valid arguments of a function, except for one value, without its alternative."""
    arguments = dict(reversed([*CALLS, STREAM]))[name] | {parameter: value}
    other = ALTERNATIVES.get(parameter)
    if value is not None and other in SIGNATURES[name] and SIGNATURES[name][other] is not required:
        arguments.pop(other, None)
    return arguments


async def call(db: Any, name: str, arguments: dict[str, Any], conversation: Conversation) -> Any:
    """Call a function on a conversation as its user."""
    arguments = {
        "user_id": conversation.user_id,
        **{parameter: conversation if value is ... else value for parameter, value in arguments.items()},
    }
    if "conversation_id" in SIGNATURES[name] and arguments.get("conversation_key") is None:
        arguments = {"conversation_id": conversation.id} | arguments
    answer = getattr(chatdb, name)(db, **arguments)
    if name in {"iter_messages", "export_user"}:
        return [record async for record in answer]
    if name == "stream_message":
        return await streamed(answer)
    return await answer


class Counting:
    """A database that records statements and passes them to a real one."""

    def __init__(self, db: Any) -> None:
        self.db = db
        self.statements: list[str] = []

    async def fetch(self, query: str, *args: Any, timeout: float | None = None) -> list[Any]:
        """Record a statement and run it."""
        self.statements.append(query)
        return await self.db.fetch(query, *args, timeout=timeout)


class Undoing(Counting):
    """A transaction that records statements and runs them after a savepoint, which it sets at the first one."""

    savepoint: Any = None

    async def fetch(self, query: str, *args: Any, timeout: float | None = None) -> list[Any]:
        """Record a statement and run it."""
        if self.savepoint is None:
            self.savepoint = self.db.transaction()
            await self.savepoint.start()
        return await super().fetch(query, *args, timeout=timeout)

    async def undo(self) -> None:
        """Roll back to the savepoint, if there is one."""
        if self.savepoint is not None:
            await self.savepoint.rollback()


MISSING = 2**62
"""An id that no conversation has."""


async def streamed(stream: MessageStream) -> Message:
    """Write a message with a stream, and return the stored record."""
    async with stream:
        await stream.write("hello")
    return stream.message


async def iterated(db: Any, **arguments: Any) -> list[Message]:
    """Exhaust `iter_messages`."""
    return [message async for message in chatdb.iter_messages(db, **arguments)]


CONVERSATION_CALLS: dict[str, dict[str, Any]] = {
    "append_message": {"role": "user", "content": "x", "key": "k"},
    "append_messages": {"messages": [{"role": "user", "content": "x", "key": "k"}, {"role": "user", "content": "y"}]},
    "delete_branch": {"seq": 1},
    "delete_conversation": {},
    "delete_message": {"seq": 1},
    "delete_messages_after": {"after_seq": 0},
    "extend_message": {"seq": 1, "offset": 0, "text": "x"},
    "finish_message": {"seq": 1},
    "fork_conversation": {},
    "get_branch": {},
    "get_context": {"max_tokens": 8000},
    "get_conversation": {},
    "get_history": {},
    "get_message": {"seq": 1},
    "iter_messages": {},
    "list_messages": {},
    "list_versions": {},
    "load_conversation": {},
    "pop_message": {},
    "read_message": {"seq": 1},
    "replace_messages_after": {
        "after_seq": 0,
        "messages": [{"role": "user", "content": "x", "key": "k"}],
        "expected": NOBODYS,
    },
    "search_messages": {"query": "x"},
    "start_message": {},
    "switch_branch": {"seq": 1},
    "update_conversation": {"title": "x"},
    "update_message": {"seq": 1, "content": "x"},
    "upsert_message": {"role": "user", "content": "x", "key": "k"},
}
"""A valid call of every function that takes a conversation."""
