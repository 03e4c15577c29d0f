"""A database that records statements, and calls that send every statement."""

from __future__ import annotations

import asyncio
import inspect
import json
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import chatdb
from chatdb.formats.items import Skipped, SourceConversation, SourceMessage
from chatdb.records import UNSET, Conversation, SchemaPart
from chatdb.schema import EXPECTED_SCHEMA

NOW = datetime(2026, 1, 2, tzinfo=UTC)
STORED = {
    "id": 41,
    "conversation_id": 42,
    "user_id": "ann",
    "key": "k",
    "title": "T",
    "metadata": '{"m": 2}',
    "last_seq": 8,
    "created_at": NOW,
    "updated_at": NOW + timedelta(hours=1),
    "seq": 9,
    "role": "user",
    "content": "hello",
    "payload": '{"p": 1}',
    "token_count": 5,
    "conversations": 1,
    "messages": 2,
}
"""The server's answers, by column."""

USER = {"user_id": "ann"}
CHAT = USER | {"conversation_id": 6}
PLACE = CHAT | {"seq": 9}
KEY = {"key": "k"}
TITLED = {"title": "T", "metadata": {"m": 2}}
EMPTY = {"role": "user", "content": ""}
FULL = {"role": "tool", "content": "hello", "payload": {"p": 1}, "metadata": {"m": 2}, "token_count": 5}
BEFORE = Conversation(**{name: STORED[name] for name in Conversation.model_fields})
EDITS = [("title", "T"), ("title", None), ("metadata", {"m": 2}), ("metadata", None)]
MESSAGE_EDITS = [
    ("content", "new"),
    ("payload", {"p": 1}),
    ("payload", None),
    ("token_count", 5),
    ("token_count", None),
]
CALLS = [
    ("create_conversation", "create_conversation", USER),
    ("create_conversation", "create_conversation", USER | TITLED),
    ("create_conversation", "create_conversation_keyed", USER | KEY),
    ("create_conversation", "create_conversation_keyed", USER | TITLED | KEY),
    ("get_conversation", "get_conversation", CHAT),
    ("get_conversation_by_key", "get_conversation_by_key", USER | KEY),
    ("list_conversations", "list_conversations", USER | {"limit": 7}),
    ("list_conversations", "list_conversations_before", USER | {"limit": 7, "before": BEFORE}),
    ("update_conversation", "get_conversation", CHAT),
    *[("update_conversation", "update_conversation", CHAT | {name: value}) for name, value in EDITS],
    ("delete_conversation", "delete_conversation", CHAT),
    ("delete_user", "delete_user", USER | {"timeout": 3.5}),
    ("append_message", "append_message", CHAT | EMPTY),
    ("append_message", "append_message", CHAT | FULL),
    ("append_message", "append_message_keyed", CHAT | EMPTY | KEY),
    ("append_message", "append_message_keyed", CHAT | FULL | KEY),
    ("append_messages", "get_conversation", CHAT | {"messages": []}),
    ("append_messages", "append_messages", CHAT | {"messages": [EMPTY, FULL]}),
    ("append_messages", "append_messages_keyed", CHAT | {"messages": [EMPTY, FULL | KEY]}),
    ("get_history", "get_history", CHAT | {"limit": 7}),
    ("get_history", "get_history", CHAT | {"limit": 7, "before_seq": 9}),
    ("list_messages", "list_messages", CHAT | {"limit": 7, "after_seq": 9}),
    ("iter_messages", "list_messages", CHAT | {"batch": 7, "after_seq": 9}),
    ("get_message", "get_message", PLACE),
    ("get_message_by_key", "get_message_by_key", CHAT | KEY),
    ("update_message", "get_message", PLACE),
    *[("update_message", "update_message", PLACE | {name: value}) for name, value in EDITS[2:] + MESSAGE_EDITS],
    ("delete_message", "delete_message", PLACE),
    ("delete_messages_after", "delete_messages_after", PLACE),
    ("check_schema", "check_schema", {}),
]
"""Functions, each with the file that it sends and distinct arguments."""


def expected(parameter, given):
    """Return the expected value of a parameter in a file's header."""
    match parameter.split("_", 1):
        case ["set", name]:
            return given[name] is not UNSET
        case ["row", "limit"]:
            return given.get("limit", given.get("batch"))
        case ["before", name] if "before" in given:
            return getattr(given["before"], name)
    if "messages" in given and parameter not in given:
        return _texts(_as_sent(message.get(parameter[:-1])) for message in given["messages"])
    if parameter == "before_seq" and given[parameter] is None:
        return 2**63 - 1
    return _as_sent(given[parameter])


def _texts(values):
    """Return an array in the form in which it is sent."""
    return [None if value is None else str(value) for value in values]


def _as_sent(value):
    return json.dumps(value) if isinstance(value, dict) else None if value is UNSET else value


def module_of(function):
    """Return the module of a public function."""
    return inspect.getmodule(getattr(chatdb, function))


async def call(function, db, given):
    """Call a public function, or exhaust its iterator."""
    result = getattr(module_of(function), function)(db, **given)
    return [item async for item in result] if inspect.isasyncgen(result) else await result


def stored(record, without=()):
    """Return rows that the server might send."""
    if record is SchemaPart:
        parts = [(table, name, kind) for table, columns in EXPECTED_SCHEMA.items() for name, kind in columns.items()]
        return [dict(zip(record.model_fields, part, strict=True)) for part in parts]
    return [{name: STORED[name] for name in record.model_fields if name not in without}]


def name_of(query):
    """Return the name in the first line of a statement."""
    return query.partition("\n")[0].removeprefix("--chatdb.")


class Recorder:
    """A database that answers every statement with the same rows, after running it on the real one, if given."""

    def __init__(self, rows, real=None):
        self.rows = rows
        self.real = real
        self.sent = []
        self.timeout = None

    async def fetch(self, query, /, *args, timeout=None):
        """Answer a statement."""
        self.sent.append((query, tuple(list(value) if isinstance(value, tuple) else value for value in args)))
        self.timeout = timeout
        if self.real is not None:
            await self.real.fetch(query, *args)
        return self.rows.copy()


class Block(nullcontext):
    """A transaction that does nothing."""

    async def start(self):
        """Begin nothing."""

    commit = rollback = start


class Transfer(Recorder):
    """A pool and its only connection, for imports and exports, with separate rows for each file."""

    def __init__(self, rows, real=None, *, has_row_security=False):
        super().__init__(rows, real)
        self.has_row_security = has_row_security
        self.copied = ()
        self.users = []

    async def execute(self, query):
        """Accept a setting of the transaction."""

    async def fetchval(self, query, user):
        """Record the user of row-level security, and return that none was set."""
        self.users.append(user)

    async def fetch(self, query, /, *args, timeout=None):
        """Answer a statement."""
        return (await super().fetch(query, *args, timeout=timeout))[name_of(query)]

    async def fetchrow(self, query):
        """Answer the first query of an import."""
        return {"started_at": NOW, "sent": "[]", "has_row_security": self.has_row_security}

    async def cursor(self, query, *args):
        """Answer a statement with a cursor."""
        pages = [[], await self.fetch(query, *args)]
        return SimpleNamespace(fetch=lambda _: asyncio.sleep(0, pages.pop()))

    async def copy_records_to_table(self, table, *, schema_name, columns, records):
        """Record the copied rows, by column."""
        self.copied = [dict(zip(columns, record, strict=True)) for record in records]

    def acquire(self):
        """Return itself as the connection."""
        return nullcontext(self)

    def transaction(self, **options):
        """Begin nothing."""
        return Block()

    def is_in_transaction(self):
        """Report an open transaction, so that none is committed."""
        return True


def _days(number):
    return NOW + timedelta(days=number)


def _message(seq, key):
    full = SourceMessage(seq, "tool", f"content {key}", '{"p": 1}', '{"m": 2}', 5, key, _days(10 + seq))
    return full._replace(payload=None, metadata=None, token_count=None, key=None) if key == "b1" else full


IMPORT = [
    SourceConversation("a", "A", '{"m": 1}', 1, None, _days(1)),
    _message(1, "a1"),
    SourceConversation(None, None, None, 4, _days(2), _days(3)),
    _message(1, "b1"),
    Skipped("it is broken", messages=3),
    SourceConversation(None, "C", None, 3, _days(2), _days(4)),
    _message(2, "c2"),
    _message(3, "c3"),
]
"""A file: its second conversation ends early, and all but the last message of the third are already stored."""

TRANSFERRED = {
    "import_conversations_find": [
        {"ordinality": 3, "id": 53, "last_seq": 2, "created_at": _days(2), "final_seq": 2}
        | {"final_key": "c2", "final_created_at": _days(12)}
    ],
    "import_conversations": [{"id": 51}, {"id": 52}],
    "import_conversations_extend": [{"id": 53}],
    "import_conversations_messages": [{"messages": 3}],
    "export_conversations": [],
    "export_conversations_messages": [],
    "count_user": [{"conversations": 1, "messages": 2}],
}


def _extension(number, old, new, time):
    values = {"ids": number, "old_last_seqs": old, "new_last_seqs": new, "updated_ats": time}
    return {name: _texts([value]) for name, value in values.items()}


IMPORTED = [
    (
        "import_conversations_find",
        USER
        | {
            "keys": ["a", None, None],
            "created_ats": _texts([None, _days(2), _days(2)]),
            "occurrences": _texts([0, 0, 1]),
            "last_seqs": _texts([1, 4, 3]),
        },
    ),
    (
        "import_conversations",
        USER
        | {"keys": ["a", None], "titles": ["A", None], "metadatas": ['{"m": 1}', None], "last_seqs": _texts([1, 4])}
        | {"created_ats": _texts([NOW, _days(2)]), "updated_ats": _texts([_days(1), _days(3)])},
    ),
    (
        "import_conversations_extend",
        USER | _extension(53, 2, 3, _days(4)),
    ),
    (
        "import_conversations_extend",
        USER | _extension(52, 4, 1, _days(3)),
    ),
]
"""What the import of this file sends, by the names in the headers."""

COPIED = [
    USER | {"conversation_id": conversation} | _message(seq, key)._asdict()
    for conversation, seq, key in [(51, 1, "a1"), (52, 1, "b1"), (53, 3, "c3")]
]
"""What it copies, by column."""

INSERTED = [
    *IMPORTED[:3],
    (
        "import_conversations_messages",
        USER | {f"{name}s": _texts(row[name] for row in COPIED) for name in COPIED[0] if name != "user_id"},
    ),
    *IMPORTED[3:],
]
"""What it sends instead of IMPORTED and COPIED with row-level security on."""
