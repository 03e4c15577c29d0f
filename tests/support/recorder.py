"""A database that records statements, and calls that send every statement."""

from __future__ import annotations

import asyncio
import inspect
import json
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import chatdb
from chatdb._core.decode import JOINED_FIELDS
from chatdb.formats.items import Skipped, SourceConversation, SourceMessage
from chatdb.records import NEW, UNSET, Conversation, Match, Message, NewMessage, SchemaPart
from chatdb.schema import EXPECTED_SCHEMA
from tests.support.package import given_of, query_of
from tests.support.sqlfiles import file_of

NOW = datetime(2026, 1, 2, tzinfo=UTC)
STORED = {
    "id": 41,
    "conversation_id": 42,
    "user_id": "ann",
    "key": "k",
    "title": "T",
    "metadata": '{"m": 2}',
    "last_seq": 8,
    "head_seq": 7,
    "revision": 11,
    "created_at": NOW,
    "updated_at": NOW + timedelta(hours=1),
    "archived_at": NOW + timedelta(hours=2),
    "pinned_at": NOW + timedelta(hours=3),
    "seq": 9,
    "parent_seq": 6,
    "role": "user",
    "content": "hello",
    "payload": '{"p": 1}',
    "token_count": 5,
    "state": "aborted",
    "text": "lo",
    "offset": 12,
    "length": 13,
    "start": 1,
    "seqs": ["9", "10"],
    "snippet": "hello",
    "conversations": 1,
    "messages": 2,
}
"""The server's answers, by column."""

USER = {"user_id": "ann"}
CHAT = USER | {"conversation_id": 6}
NAMED = USER | {"conversation_key": "c"}
KEY = {"key": "k"}
TITLED = {"title": "T", "metadata": {"m": 2}}
EMPTY = {"role": "user", "content": ""}
FULL = {"role": "tool", "content": "hello", "payload": {"p": 1}, "metadata": {"m": 2}, "token_count": 5}
BATCH = {"messages": [EMPTY, FULL]}
LONGER = {"messages": [EMPTY, FULL, EMPTY]}
KEYED = {"messages": [EMPTY, FULL | KEY, EMPTY | {"key": "l"}]}
READ = Conversation(**{name: STORED[name] for name in Conversation.model_fields})
FOUND = Match(**{name: STORED[name] for name in Match.model_fields})
EXPECTED = {"expected": READ}
PATCH = {"set": 1, "removed": None, "gone": None}
CREATE = {"create": True}
EDITS = [("title", "T"), ("title", None), ("metadata", {"m": 2}), ("metadata", None), ("metadata_patch", PATCH)]
MESSAGE_EDITS = [
    ("content", "new"),
    ("payload", {"p": 1}),
    ("payload", None),
    ("token_count", 5),
    ("token_count", None),
]
CONVERSATIONS = [CHAT, NAMED]
"""Both ways to name a conversation."""
MESSAGES = [CHAT | {"seq": 9}, CHAT | KEY, NAMED | {"seq": 9}, NAMED | KEY]
"""All ways to name a message."""
PAGES = [
    {},
    {"after": READ},
    {"after": READ.cursor},
    {"after_key": "k"},
]
OPTIONS = [
    NAMED | CREATE,
    CHAT | EXPECTED,
    CHAT | {"expected": READ.etag},
    NAMED | CREATE | {"expected": NEW},
    NAMED | CREATE | {"expected": READ.etag},
    CHAT | {"conversation_metadata_patch": PATCH},
    CHAT | {"conversation_metadata_patch": {}},
    CHAT | {"parent_seq": 6},
    NAMED | CREATE | {"parent_seq": 0},
]
"""The options of both appends."""


def _calls(function, stem, *given):
    return [(function, stem, each) for each in given]


def _searches():
    for mode, suffix in [("substring", ""), ("words", "_words")]:
        for page in ({}, {"after": FOUND}, {"after": FOUND.cursor}):
            given = {"query": "hello world", "mode": mode, "limit": 7} | page
            yield "search_messages", f"search_messages{suffix}", USER | given
            for each in CONVERSATIONS:
                yield "search_messages", f"search_messages{suffix}_conversation", each | given


def _lists(function):
    suffixes = [(False, ""), (True, "_archived"), (None, "_all")]
    for page in PAGES:
        given = USER | {"limit": 7} | page
        for archived, suffix in suffixes:
            is_later = function == "list_conversations" and not suffix and page != PAGES[0]
            yield function, f"{function}{'_after' if is_later else suffix}", given | {"archived": archived}
            for is_descending, direction in [(True, ""), (False, "_ascending")]:
                order = {"order_by": "created_at", "descending": is_descending, "archived": archived}
                yield function, f"{function}_created{direction}", given | order


CALLS = [
    *_calls("create_conversation", "create_conversation", USER, USER | TITLED),
    *_calls("create_conversation", "create_conversation_keyed", USER | KEY, USER | TITLED | KEY),
    *_calls("create_conversation", "create_conversation_messages", USER | BATCH, USER | TITLED | KEY | KEYED),
    *_calls("create_conversation", "create_conversation_messages", USER | KEY | BATCH | {"expected": NEW}),
    *_calls("create_conversation", "create_conversation_messages", USER | KEY | {"expected": NEW}),
    *_calls("create_conversation", "create_conversation", USER | {"expected": NEW}),
    *_calls("upsert_conversation", "upsert_conversation", USER | KEY, USER | KEY | TITLED),
    *_calls(
        "upsert_conversation", "upsert_conversation", *(USER | KEY | {"metadata_patch": each} for each in (PATCH, {}))
    ),
    *_calls("upsert_conversation", "upsert_conversation", *(USER | KEY | {"archived": flag} for flag in (True, False))),
    *_calls("get_conversation", "get_conversation", *CONVERSATIONS, CHAT | {"at_least": 6}),
    *_calls("load_conversation", "load_conversation", *(each | {"limit": 7} for each in CONVERSATIONS)),
    *_calls("load_conversation", "load_conversation", CHAT | {"at_least": 6}),
    *_lists("list_conversations"),
    *_lists("list_previews"),
    *_calls("list_pinned", "list_pinned", USER | {"limit": 7}),
    *_calls("update_conversation", "get_conversation", *CONVERSATIONS),
    *_calls("update_conversation", "update_conversation", *(CHAT | {name: value} for name, value in EDITS)),
    *_calls("update_conversation", "update_conversation", NAMED | {"metadata_patch": {}}, NAMED | EXPECTED),
    *_calls("update_conversation", "update_conversation", *(CHAT | {"archived": flag} for flag in (True, False))),
    *_calls("update_conversation", "update_conversation", *(CHAT | {"pinned": flag} for flag in (True, False))),
    *_calls("update_conversation", "update_conversation", CHAT | TITLED | {"expected": READ.etag}),
    *_calls("delete_conversation", "delete_conversation", *CONVERSATIONS, CHAT | EXPECTED),
    ("delete_user", "delete_user", USER | {"timeout": 3.5}),
    ("move_user", "move_user", USER | {"to_user_id": "bob", "timeout": 3.5}),
    *_calls("append_message", "append_message", CHAT | EMPTY, NAMED | FULL),
    *_calls("append_message", "append_message_conditional", CHAT | EMPTY | KEY, NAMED | FULL | KEY),
    *_calls("append_message", "append_message_conditional", *(option | EMPTY for option in OPTIONS)),
    *_calls("append_message", "append_message_conditional", *(option | FULL | KEY for option in OPTIONS)),
    *_calls("append_messages", "get_conversation", *(each | {"messages": []} for each in CONVERSATIONS)),
    *_calls("append_messages", "append_messages", NAMED | BATCH, *(each | LONGER for each in CONVERSATIONS)),
    *_calls("append_messages", "append_messages_two", CHAT | BATCH, CHAT | {"messages": [FULL, EMPTY]}),
    *_calls("append_messages", "append_messages_conditional", *(each | KEYED for each in CONVERSATIONS)),
    *_calls("append_messages", "append_messages_conditional", CHAT | KEYED | {"on_existing": "skip"}),
    *_calls("append_messages", "append_messages_conditional", *(option | BATCH for option in OPTIONS)),
    *_calls("append_messages", "append_messages_conditional", *(option | {"messages": []} for option in OPTIONS)),
    *_calls("upsert_message", "upsert_message", *(each | EMPTY | KEY for each in CONVERSATIONS)),
    *_calls("upsert_message", "upsert_message", CHAT | FULL | KEY | EXPECTED),
    *_calls(
        "replace_messages_after",
        "replace_messages_after",
        *(each | KEYED | EXPECTED | {"after_seq": 3} for each in CONVERSATIONS),
        CHAT | {"messages": [], "expected": READ.etag, "after_seq": 0},
    ),
    *_calls("pop_message", "pop_message", *CONVERSATIONS, CHAT | EXPECTED),
    *_calls("get_history", "get_history", CHAT | {"limit": 7}, CHAT | {"limit": 7, "before_seq": 9}),
    *_calls("get_history", "get_history_by_key", NAMED | {"limit": 7}, NAMED | {"limit": 7, "before_seq": 9}),
    *_calls(
        "get_history", "get_history_before_key", *(each | {"limit": 7, "before_key": "k"} for each in CONVERSATIONS)
    ),
    *_calls("get_history", "get_history", CHAT | {"at_least": 6}),
    *_calls("list_messages", "list_messages", *(each | {"limit": 7, "after_seq": 9} for each in CONVERSATIONS)),
    *_calls("list_messages", "list_messages", NAMED | {"at_least": 6}),
    *_calls(
        "list_messages", "list_messages_after_key", *(each | {"limit": 7, "after_key": "k"} for each in CONVERSATIONS)
    ),
    *_calls("iter_messages", "list_messages", *(each | {"batch": 7, "after_seq": 9} for each in CONVERSATIONS)),
    *_calls("get_message", "get_message", *MESSAGES),
    *_calls("update_message", "get_message", *MESSAGES),
    *_calls("update_message", "update_message", *(each | {"content": "new"} for each in MESSAGES)),
    *[("update_message", "update_message", MESSAGES[0] | {name: value}) for name, value in EDITS[2:] + MESSAGE_EDITS],
    *_calls("update_message", "update_message", MESSAGES[1] | EXPECTED, MESSAGES[1] | {"metadata_patch": {}}),
    *_calls("delete_message", "delete_message", *MESSAGES, MESSAGES[0] | EXPECTED),
    *_calls("delete_messages_after", "delete_messages_after", *(each | {"after_seq": 9} for each in CONVERSATIONS)),
    *_calls("delete_messages_after", "delete_messages_after", *(each | {"after_key": "k"} for each in CONVERSATIONS)),
    *_calls("delete_messages_after", "delete_messages_after", CHAT | {"after_seq": 0} | EXPECTED),
    *_calls("get_branch", "get_branch", CHAT | {"limit": 7}, CHAT | {"limit": 7, "before_seq": 9}),
    *_calls("get_branch", "get_branch_top", NAMED | {"limit": 7}),
    *_calls("get_branch", "get_branch_top", *(each | {"top_seq": 7, "before_seq": 9} for each in CONVERSATIONS)),
    *_calls("list_versions", "list_versions", *(each | {"limit": 7} for each in CONVERSATIONS)),
    *_calls("list_versions", "list_versions", CHAT | {"before_seq": 9}),
    *_calls("switch_branch", "switch_branch", *MESSAGES, MESSAGES[0] | EXPECTED),
    *_calls("delete_branch", "delete_branch", *MESSAGES, MESSAGES[0] | EXPECTED),
    *_calls("fork_conversation", "fork_conversation", *CONVERSATIONS, *(each | {"new_key": "n"} for each in MESSAGES)),
    *_calls("get_context", "get_context", *(each | {"max_tokens": 8000, "limit": 7} for each in CONVERSATIONS)),
    *_calls("start_message", "start_message", *CONVERSATIONS, CHAT | {"role": "tool"} | KEY),
    *_calls("start_message", "start_message", NAMED | {"metadata": {"m": 2}, "parent_seq": 6}),
    *_calls("extend_message", "extend_message", *(each | {"offset": 4, "text": "llo"} for each in MESSAGES)),
    *_calls("read_message", "read_message", *MESSAGES, MESSAGES[0] | {"offset": 4}),
    *_calls("finish_message", "finish_message", *MESSAGES, MESSAGES[0] | {"aborted": True}),
    *_calls("finish_message", "finish_message", *(MESSAGES[1] | {name: FULL[name]} for name in FULL if name != "role")),
    ("list_streaming", "list_streaming", USER | {"older_than": timedelta(minutes=5)}),
    *_searches(),
    ("check_schema", "check_schema", {}),
]
"""Functions, each with the file that it sends and distinct arguments."""

STARTS = {
    "get_history": {"before_seq": 2**63 - 1},
    "get_branch": {"before_seq": 2**63 - 1},
    "list_versions": {"before_seq": 2**63 - 1},
    "list_messages": {"after_seq": 0},
    "iter_messages": {"after_seq": 0},
}
"""The positions of the first pages."""


def expected(function, parameter, given):
    """Return the expected value of a parameter in a file's header, for a call with all its arguments."""
    state = given.get("expected")
    patch = given.get("conversation_metadata_patch", given.get("metadata_patch"))
    patch = None if patch is UNSET else patch
    position = given.get("after") if parameter.startswith("after_") else None
    match parameter.split("_", 1):
        case ["start"]:
            return given["offset"]
        case ["content"] if "text" in given:
            return given["text"]
        case ["set", name]:
            return given[name] is not UNSET
        case ["row", "limit"]:
            return given.get("limit", given.get("batch"))
        case ["after", ("created_at" | "conversation_id" | "seq") as name] if "query" in given:
            return None if position is None else getattr(FOUND, name)
        case ["words"]:
            return given["query"].split()
        case ["after", ("updated_at" | "created_at" | "id") as name]:
            return None if position is None else getattr(READ, name)
        case ["create", "missing"]:
            return given["create"] and state in (None, NEW)
        case ["must", "be_new"]:
            return state is NEW
        case ["skip", "stored"]:
            return given["on_existing"] == "skip"
        case ["expected", name]:
            return None if state is None else {"id": 0, "revision": -1}[name] if state is NEW else getattr(READ, name)
        case ["metadata", "patch"]:
            return (
                None if patch is None else json.dumps({name: item for name, item in patch.items() if item is not None})
            )
        case ["removed", "keys"]:
            return None if patch is None else [name for name, item in patch.items() if item is None]
        case [("before" | "after") as direction, "seq"]:
            if given.get(f"{direction}_key") is not None:
                return None
            return STARTS[function][parameter] if given[parameter] is None else given[parameter]
        case [("before" | "after"), "key"]:
            return given.get(parameter)  # iter_messages has none
        case ["second", name]:
            return _as_sent(given["messages"][1].get(name))
    if "messages" in given and parameter not in given:
        if parameter in NewMessage.model_fields:
            return _as_sent(given["messages"][0].get(parameter))
        values = _texts(_as_sent(message.get(parameter[:-1])) for message in given["messages"])
        return values if parameter in {"roles", "contents"} or any(value is not None for value in values) else None
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


def joined(conversation, message):
    """Return a row of a conversation and a message."""
    conversation = conversation or dict.fromkeys(Conversation.model_fields)
    message = message or dict.fromkeys(Message.model_fields)
    return {**conversation, **{f"message_{name}": message[name] for name in JOINED_FIELDS}}


def rows_of(stem, given):
    """Return the rows that the server might send for a call: the stored messages in the reverse order."""
    query, file, without = query_of(stem), file_of(stem), given_of(stem)
    refusal = {"refusal": None} if file.refusals else {}
    rows = stored(query.record, without=without)
    if file.second:
        [row], [message] = rows, stored(Message)
        rows = [joined(row, None), joined(None, message)] if file.has_own_rows else [joined(row, message)]
    elif query.record is Message and "messages" in given:
        [row] = rows
        rows = [row | {"seq": row["seq"] + number} for number, _ in enumerate(given["messages"])]
        if "key" in row:
            rows = [each | {"key": message.get("key")} for each, message in zip(rows, given["messages"], strict=True)]
        rows.reverse()
    elif query.record is Message and "conversation_id" in without and "conversation_id" not in given:
        rows.append(existence_of(stem))
    return [row | refusal for row in rows] or [existence_of(stem) | refusal]


def existence_of(stem):
    """Return the existence row of a file; that of a history has the id of the conversation and the page's key."""
    query, file = query_of(stem), file_of(stem)
    if file.second:
        return joined(None, None)
    row = dict.fromkeys(name for name in query.record.model_fields if name not in given_of(stem))
    if "conversation_id" in given_of(stem):
        row |= {"seq": STORED["conversation_id"], "key": STORED["key"]}
    return row | ({"refusal": None} if file.refusals else {})


def name_of(query):
    """Return the name in the first line of a statement."""
    return query.partition("\n")[0].removeprefix("--chatdb.")


class Row(dict):
    """A row whose values can also be read by their position, as those of asyncpg's rows."""

    def __getitem__(self, key):
        """Return the value of a column."""
        return [*self.values()][key] if isinstance(key, int) else super().__getitem__(key)


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
        return [Row(row) for row in self.rows] if isinstance(self.rows, list) else self.rows


class Block(nullcontext):
    """A transaction that does nothing."""

    async def start(self):
        """Begin nothing."""

    commit = rollback = start


class Refusing(Recorder):
    """A connection in a transaction that answers every statement with the same rows."""

    def transaction(self, **options):
        """Begin nothing."""
        return Block()

    async def execute(self, query):
        """Accept a setting of the transaction."""

    async def fetchval(self, query, user):
        """Return that no user of row-level security was set."""

    def is_in_transaction(self):
        """Report an open transaction, so that none is committed."""
        return True


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

    async def fetchrow(self, query, *_):
        """Answer the first query of an import."""
        return {"started_at": NOW, "sent": "[]", "has_row_security": self.has_row_security, "has_stored": True}

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
    parent_seq = 1 if key == "c3" else None
    full = SourceMessage(
        seq, "tool", f"content {key}", '{"p": 1}', '{"m": 2}', 5, key, _days(10 + seq), parent_seq, "aborted"
    )
    return full._replace(payload=None, metadata=None, token_count=None, key=None, state=None) if key == "b1" else full


IMPORT = [
    SourceConversation("a", "A", '{"m": 1}', 1, None, _days(1), beginnings=("b",)),
    _message(1, "a1"),
    SourceConversation(None, None, None, 4, _days(2), _days(3), _days(5), _days(6), 2),
    _message(1, "b1"),
    Skipped("it is broken", messages=3),
    SourceConversation(None, "C", None, 3, _days(2), _days(4), head_seq=2),
    _message(2, "c2"),
    _message(3, "c3"),
    SourceConversation("d", "D", None, 2, _days(2), _days(7), _days(9), has_ids=True, is_archived=True),
    _message(1, "d1"),
    _message(2, "d2"),
    SourceConversation("e", "E", None, 1, _days(2), _days(8), has_ids=True),
    _message(1, "e1")._replace(payload=None, metadata=None, state=None),
]
"""
A file: its second conversation ends early. Of the third, all but the last message were stored, and the user has deleted
the first since, which the last one follows. Of the last two, an earlier export is stored, the first one's with another
title, without its last message, and not archived.
"""

TRANSFERRED = {
    "import_conversations_find": [
        {"ordinality": place, "id": 50 + place, "last_seq": last_seq, "created_at": _days(2), "final_seq": last_seq}
        | {"final_key": key, "final_created_at": _days(10 + last_seq)}
        for place, last_seq, key in ((3, 2, "c2"), (4, 1, "d1"), (5, 1, "e1"))
    ],
    "import_conversations_begun": [],
    "import_conversations_stored": [
        {"id": number, "last_seq": 1, "edits": 7, "title": title, "imported_title": title, "head_seq": 1}
        | dict.fromkeys(("archived_at", "pinned_at", "imported_archived", "imported_pinned"))
        | {"seq": 1, "key": key, "state": "aborted", "digest": "another"}
        for number, key, title in ((54, "d1", "before"), (55, "e1", "E"))
    ],
    "import_conversations_contents": [{"ordinality": place, "content": "content", "payload": None} for place in (1, 2)],
    "import_conversations_change": [{"id": 54}, {"id": 55}],
    "import_conversations_update": [{"ordinality": 1, "seq": 1}, {"ordinality": 2, "seq": 1}],
    "import_conversations": [{"id": 51}, {"id": 52}],
    "import_conversations_extend": [{"id": 53}],
    "import_conversations_parents": [{"ordinality": 2, "seq": 2}],
    "import_conversations_messages": [{"messages": 3}],
    "export_user": [],
    "export_user_messages": [],
    "count_user": [{"conversations": 1, "messages": 2}],
}


def _extension(number, old, new, time, head):
    values = {"ids": number, "old_last_seqs": old, "new_last_seqs": new, "updated_ats": time, "head_seqs": head}
    return {name: _texts([value]) for name, value in values.items()}


IMPORTED = [
    (
        "import_conversations_find",
        USER
        | {
            "keys": ["a", None, None, "d", "e"],
            "created_ats": _texts([None, *[_days(2)] * 4]),
            "occurrences": _texts([0, 0, 1, 0, 0]),
            "last_seqs": _texts([1, 4, 3, 2, 1]),
        },
    ),
    ("import_conversations_begun", USER | {"keys": ["b"]}),
    (
        "import_conversations",
        USER
        | {"keys": ["a", None], "titles": ["A", None], "metadatas": ['{"m": 1}', None], "last_seqs": _texts([1, 4])}
        | {"created_ats": _texts([NOW, _days(2)]), "updated_ats": _texts([_days(1), _days(3)])}
        | {"archived_ats": _texts([None, _days(5)]), "pinned_ats": _texts([None, _days(6)])}
        | {"head_seqs": _texts([1, 2])},
    ),
    ("import_conversations_stored", USER | {"ids": _texts([54, 55])}),
    ("import_conversations_contents", USER | {"conversation_ids": _texts([54, 55]), "seqs": _texts([1, 1])}),
    (
        "import_conversations_change",
        USER
        | {"ids": _texts([54, 55]), "old_last_seqs": _texts([1, 1]), "old_edits": _texts([7, 7])}
        | {"new_last_seqs": _texts([2, 1]), "new_edits": _texts([9, 8]), "updated_ats": _texts([_days(7), _days(8)])}
        | {"head_seqs": _texts([2, 1]), "titles": ["D", None], "archived_ats": _texts([_days(9), None])}
        | {"pinned_ats": [None, None], "metadatas": ['{"imported_archived": true, "imported_title": "D"}', None]},
    ),
    (
        "import_conversations_update",
        USER
        | {"conversation_ids": _texts([54, 55]), "seqs": _texts([1, 1]), "contents": ["content d1", "content e1"]}
        | {"payloads": ['{"p": 1}', None], "metadatas": ['{"m": 2}', None], "states": ["aborted", None]},
    ),
    (
        "import_conversations_extend",
        USER | _extension(53, 2, 3, _days(4), 3),
    ),
    (
        "import_conversations_parents",
        USER | {"conversation_ids": _texts([53, 53]), "seqs": _texts([1, 2])},
    ),
    (
        "import_conversations_extend",
        USER | _extension(53, 3, 3, _days(4), 2),
    ),
    (
        "import_conversations_extend",
        USER | _extension(52, 4, 1, _days(3), 1),
    ),
]
"""What the import of this file sends, by the names in the headers."""

COPIED = [
    USER | {"conversation_id": conversation} | _message(seq, key)._asdict() | {"parent_seq": parent}
    for conversation, seq, key, parent in [
        (54, 2, "d2", None),
        (51, 1, "a1", None),
        (52, 1, "b1", None),
        (53, 3, "c3", 0),
    ]
]
"""What it copies, by column."""

INSERTED = [
    *IMPORTED[:10],
    (
        "import_conversations_messages",
        USER | {f"{name}s": _texts(row[name] for row in COPIED) for name in COPIED[0] if name != "user_id"},
    ),
    *IMPORTED[10:],
]
"""What it sends instead of IMPORTED and COPIED with row-level security on."""
