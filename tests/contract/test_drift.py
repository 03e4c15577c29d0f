"""
The SQL files, the schema, the records and the functions agree.

Each check is a plain function that raises AssertionError. Most tests run a check on the real files; those at the end
run it on mutations and fail if it misses one.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections import defaultdict
from contextlib import suppress
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Literal, NamedTuple

import asyncpg
import pglast
import psycopg
import pytest
from pglast.parser import scan
from pydantic import create_model

import chatdb
from chatdb import (
    ChatDBError,
    ConfigurationError,
    ConflictError,
    ConversationNotFoundError,
    InvalidInputError,
    MessageNotFoundError,
    StaleError,
    UnavailableError,
    watching,
)
from chatdb._core import decode, validate
from chatdb._core.driver_errors import CONFLICTS, CONSTRAINTS, STALE_COUNTERS, map_driver_error
from chatdb._core.query import AppendQuery, HistoryQuery, JoinedQuery, RunAgainError, _refusal
from chatdb.pool import _ATTEMPTS
from chatdb.records import Conversation, Message, Role, State
from chatdb.schema import EXPECTED_SCHEMA
from chatdb.testing.databases import Databases
from chatdb.transfer import exporter, importer
from tests.support.catalog import DATA, SEARCH_INDEX, Live
from tests.support.mutants import less, misfilled, swaps, without_user
from tests.support.package import bindings, fields_of, given_of, query_of, record_of
from tests.support.paths import ROOT
from tests.support.plans import check_addressing, check_plan
from tests.support.recorder import (
    CALLS,
    COPIED,
    IMPORT,
    IMPORTED,
    INSERTED,
    TRANSFERRED,
    Recorder,
    Refusing,
    Transfer,
    call,
    existence_of,
    expected,
    joined,
    module_of,
    name_of,
    rows_of,
    stored,
)
from tests.support.sqlfiles import (
    ALWAYS,
    TEXTS,
    existence_gaps,
    file_of,
    isolation_gaps,
    meetings,
    nullable,
    outputs,
    parse,
    refusal_gaps,
    tables_of_keys,
    ungiven,
)

OTHERS_MAPPED = {
    "fk_messages_conversation": "a message",
    "fk_message_parts_message": "a part",
    "pk_message_parts": "no insert can violate it: a new message has no parts, and every other insert has ON CONFLICT",
}
"""The constraints with no words in a table."""
OF_A_CLASS = {"poll_conversations": "Watcher"}
"""The Query objects that a method sends."""

every_file = pytest.mark.parametrize("stem", TEXTS)


@pytest.fixture(scope="module")
def live(databases: Databases, template):
    """Yield a database with enough rows for realistic plans."""
    with (
        databases.new(template) as dsn,
        psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as connection,
    ):
        connection.execute(DATA)
        yield Live(connection)


@pytest.fixture(scope="module")
def indexed(databases: Databases, template):
    """Yield such a database with the index for a search by words."""
    with (
        databases.new(template) as dsn,
        psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as connection,
    ):
        connection.execute(DATA)
        connection.execute("create extension btree_gin")
        connection.execute(SEARCH_INDEX)
        yield Live(connection)


@pytest.fixture
def planned(stem, request, server):
    """Give the database that has the indexes of a file."""
    return request.getfixturevalue("indexed" if "ix_messages_search" in file_of(stem).indexes else "live")


# 1. Every file has one Query, every Query has a file.


def check_bindings(texts, bound):
    """Raise unless each file has one Query, next to a function of its name."""
    assert sorted(query.name for _, _, query in bound) == sorted(texts)
    for module, variable, query in bound:
        functions = [name for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != "_"]
        assert variable == f"_{query.name}"
        beside = [name for name in functions if query.name == name or query.name.startswith(f"{name}_")]
        assert beside or hasattr(module, OF_A_CLASS.get(query.name, "")), query.name
        assert query.sql == parse(texts[query.name]).sql, f"{query.name} is not sent as name line and body"


def test_files_and_queries_are_pairs():
    """One Query per file sends the statement without its header, next to a function of its name."""
    check_bindings(TEXTS, bindings())


@every_file
def test_a_read_may_be_repeated(stem):
    """Each statement of a function that writes nothing is sent again after a lost connection."""
    query = query_of(stem)
    is_transfer = (ROOT / "sql" / "transfer" / f"{stem}.sql").exists()  # on one connection, where nothing is repeated
    writes = re.search(r"^\W*(?:insert|update|delete|merge)\b", query.sql, re.MULTILINE)
    assert query.idempotent or writes or is_transfer


def check_verbs(file, module):
    """Raise unless the module reads the rows as the header's `returns` says."""
    query = query_of(file.name)
    source = inspect.getsource(module)
    verbs = set(re.findall(rf"\b_{file.name}\.(\w+)\b", source)) - {"sql"}
    for variable, value in vars(module).items():
        if isinstance(value, dict) and any(each is query for each in value.values()):
            calls = [inspect.getsource(each) for _, each in inspect.getmembers(module, inspect.isfunction)]
            verbs |= {verb for each in calls if f"({variable}," in each for verb in re.findall(r"\bquery\.(\w+)", each)}
    assert verbs
    assert verbs <= _verbs_of(file, query)


def _verbs_of(file, query):
    """Return the methods of a Query that read a file's rows."""
    if file.second:
        return {"fetch_with_messages"} if file.has_own_rows else {"fetch_pairs"} if file.existence else set()
    if isinstance(query, HistoryQuery):
        return {"fetch_history"} if file.existence and file.number == "many" else set()
    if isinstance(query, AppendQuery):
        return {"fetch_appended"} if file.number == "many" else set()
    if file.existence:
        return {"fetch_optional", "fetch_message"} if file.number == "one" else {"fetch_page"}
    return {"fetch_one"} if file.number == "one" else {"fetch_all", "iterate"}


@pytest.mark.parametrize(("module", "query"), [(module, query) for module, _, query in bindings()])
def test_rows_are_read_as_the_header_says(module, query):
    """A function reads one row, many rows or an existence row, as the header says."""
    check_verbs(file_of(query.name), module)


# 2. Every statement prepares. 3. Its parameters match the header.


def check_prepares(live, file):
    """Raise unless the server prepares the statement."""
    live.described(file.sql)


def check_parameters(live, file):
    """Raise unless the header's parameters match the server's and the names of the columns they are used with."""
    types, _ = live.described(file.sql)
    assert [(parameter.number, parameter.type) for parameter in file.parameters] == list(enumerate(types, 1))
    met = meetings(file)
    for number, name in [(parameter.number, parameter.name) for parameter in file.parameters]:
        assert met[number], f"${number} {name} meets no column"
        for column in met[number]:
            known = {column, f"{column}s", column.removesuffix("_at"), *OTHER_NAMES.get(column, ())}
            known |= {
                f"{prefix}_{column}"
                for prefix in (
                    "set",
                    "before",
                    "after",
                    "expected",
                    "parent",
                    "top",
                    "new",
                    "min",
                    "max",
                    "to",
                    "second",
                )
            }
            is_flag = column == "condition" and types[number - 1] == "bool"
            assert name in known or is_flag, f"${number} {name} meets {column}"
    names = {parameter.name for parameter in file.parameters}
    for number, tables in tables_of_keys(file).items():
        name = file.parameters[number - 1].name
        is_conversations = name in {"conversation_key", "new_key"} or "conversation_key" not in names
        assert tables == {"conversations" if is_conversations else "messages"}, f"${number} {name} meets {tables}"


OTHER_NAMES = {
    "id": {"conversation_id"},
    "key": {"conversation_key"},
    "metadata": {"metadata_patch", "removed_keys"},
    "new conversations": {"create_missing"},
    "head_seq": {"after_seq"},
    "top": {"top_seq"},
    "total": {"max_tokens"},
    "bytes_before": {"max_bytes"},
    "length": {"start"},
    "last_start": {"start"},
    "flushed_at": {"older_than"},
    "state": {"aborted"},
}
"""Names of parameters that differ from the column's by more than a prefix."""


@every_file
def test_the_statement_prepares(live, stem):
    """The server prepares every statement on the migrated schema."""
    check_prepares(live, file_of(stem))


@every_file
def test_the_header_has_the_parameters(live, stem):
    """The header gives each parameter's number, type and column name."""
    check_parameters(live, file_of(stem))


# 4. The columns match the record's fields. 5. So does their nullability.


def check_columns(live, file, record=None):
    """Raise unless the columns have the names, order and types of the record's fields."""
    query = query_of(file.name)
    python = {"int8": int, "int4": int, "text": str, "timestamptz": datetime, "text[]": list[int]}
    _, columns = live.described(file.sql)
    assert file.record == (record or query.record).__name__
    assert file.second == ("Message" if isinstance(query, JoinedQuery) else None)
    assert file.given == (JOINED_GIVEN if file.has_own_rows else given_of(file.name))
    assert bool(file.refusals) == query.has_refusal
    fields = [field[:2] for field in _fields(file, record)] + [("refusal", str)] * query.has_refusal
    assert [(name, python.get(kind)) for name, kind, _ in columns] == fields


def _fields(file, record=None):
    """Return the fields of a file's records, those of a second one with a prefix."""
    record = record or record_of(file.name)
    if not file.second:
        return fields_of(record, without=file.given)
    fields = fields_of(Message, without=JOINED_GIVEN)
    return fields_of(record) + [(f"message_{name}", *rest) for name, *rest in fields]


JOINED_GIVEN = ("user_id", "conversation_id")
"""The fields of a message that its conversation has too."""


def check_nullability(live, file, record=None):
    """Raise unless exactly the nullable columns are Optional and the header declares any existence row."""
    found = nullable(file, live.columns)
    assert found == [optional for _, _, optional in _fields(file, record)]
    columns = live.described(file.sql)[1][: len(found)]
    for (name, _, not_null), may_be_null in zip(columns, found, strict=True):
        is_known = not_null is not None and "left join" not in file.sql
        assert not is_known or not_null != may_be_null, f"the server knows better of {name}"


def check_given(live, file):
    """Raise unless each omitted field is stored from, or compared with, the parameter that has its value."""
    query = query_of(file.name)
    parameters = {parameter.name: parameter for parameter in file.parameters}
    types = dict(zip(parameters, live.described(file.sql)[0], strict=True))
    first = JOINED_GIVEN if file.has_own_rows else query.from_arguments
    assert [parameter.name for parameter in file.parameters][: len(first)] == [*first] == [*file.given[: len(first)]]
    kinds = {name: kind for name, kind, _ in fields_of(Message)}
    for name in file.given:
        is_array = file.number == "many" and name in query.from_messages
        kind = types.get(f"{name}s" if is_array else name)
        if is_array:
            assert kind in {"text[]", None}
        else:
            assert {"text": str, "int8": int, "int4": int, None: str}[kind] == kinds[name]
    assert ungiven(file) == []


@every_file
def test_what_the_rows_do_without_is_given(live, stem):
    """The statement stores each omitted field from an argument or message, or compares it with that."""
    check_given(live, file_of(stem))


@every_file
def test_the_columns_are_the_fields(live, stem):
    """The columns have the names, order and types of the record's fields."""
    check_columns(live, file_of(stem))


@every_file
def test_the_columns_are_as_nullable_as_the_fields(live, stem):
    """A field is Optional exactly if its column is nullable."""
    check_nullability(live, file_of(stem))


def check_existence(live, file):
    """Raise unless existence rows and refusals come alone or last, as the header says, under any plan."""
    assert existence_gaps(file) == []
    assert refusal_gaps(file) == []
    is_always = file.existence == ALWAYS
    if getattr(file.statement, "limitCount", None) or file.has_own_rows or is_always:
        with live.connection.transaction(force_rollback=True):
            live.connection.execute(PARALLEL)
            top, *_ = live.plan(file)
        if not (file.has_own_rows or is_always):
            (append,) = [part for part in top["Plans"] if part["Parent Relationship"] == "Outer"]
        else:
            append = top
        assert file.has_own_rows or is_always or top["Node Type"] == "Limit"
        assert append["Node Type"] == ("Append" if file.existence or file.has_own_rows else append["Node Type"])
        assert not append["Parallel Aware"]


PARALLEL = """
    set local parallel_setup_cost = 0;
    set local parallel_tuple_cost = 0;
    set local min_parallel_table_scan_size = 0;
    set local min_parallel_index_scan_size = 0;
"""
"""Makes the server read branches in parallel, and so in any order, wherever it can."""


@every_file
def test_an_existence_row_stands_where_the_header_says(live, stem):
    """An existence row replaces the records or follows a page that is not full, as the header says."""
    check_existence(live, file_of(stem))


class Filler(NamedTuple):
    """How the package fills records from rows: the columns of the rows, and the fields that they do not have."""

    record: type
    columns: tuple[str, ...]
    from_arguments: tuple[str, ...]
    from_messages: tuple[str, ...]

    def source(self, **options):
        """Return the source of the function that fills the records."""
        return decode.filler_source(self.record, self.columns, self.from_arguments, self.from_messages, **options)


def fillers():
    """Return each Filler of the package, with the function that the package has made of it."""
    found = {}
    for query in [query for _, _, query in bindings() if query.record in decode.FILLED]:
        given = query.from_arguments + query.from_messages
        columns = [name for name in query.record.model_fields if name not in given] + ["_"] * query.has_refusal
        filler = Filler(query.record, (*columns,), query.from_arguments, query.from_messages)
        found.setdefault(filler, []).append(inspect.getclosurevars(query._decode).nonlocals["fill"])
    conversation = (*Conversation.model_fields,)
    nothing = "_" * (len(conversation) - 1)
    message = [name for name in Message.model_fields if name not in JOINED_GIVEN]
    found |= {
        Filler(Conversation, (*conversation, *"_" * len(message)), (), ()): [decode._joined_conversations],
        Filler(Message, ("conversation_id", *nothing, *message), ("user_id",), ()): [decode._joined_messages],
        Filler(Message, ("_", *nothing, *message), JOINED_GIVEN, ()): [decode._messages_of_one],
    }
    return found


FILLERS = pytest.mark.parametrize("filler", fillers(), ids=lambda filler: f"{filler.record.__name__}{filler[2:]}")


def check_filled(filler, fill):
    """Raise unless filling a record from a row, arguments and a message gives the same record as validation."""
    record, columns, from_arguments, from_messages = filler
    [full] = stored(record)
    optional = {name for name, _, may_be_null in fields_of(record) if may_be_null}
    for row in [full, *(full | {name: None} for name in optional), full | dict.fromkeys(optional)]:
        values = tuple("no field" if name == "_" else row[name] for name in columns)
        message = tuple(row[name] if name in from_messages else "no field" for name in decode.MESSAGE_FIELDS)
        [filled] = fill([values], [message], *(row[name] for name in from_arguments))
        validated = record(**row)
        assert type(filled) is record
        assert [*vars(filled).items()] == [*vars(validated).items()]
        assert [type(value) for value in vars(filled).values()] == [type(value) for value in vars(validated).values()]


def test_the_filled_records():
    """Only conversations and messages are filled without validation."""
    assert {*decode.FILLED} == {Conversation, Message}


@FILLERS
def test_rows_are_filled_in_the_order_of_the_fields(filler):
    """Filling a record without validation gives the same fields as validation, for each combination of columns."""
    made = decode.filler(filler.record, filler.source())
    assert {function.__code__ for function in fillers()[filler]} == {made.__code__}
    for copies_dict in (False, True):  # as before Python 3.13, and from then on
        check_filled(filler, decode.filler(filler.record, filler.source(copies_dict=copies_dict)))


def check_unfilled(record, from_arguments, from_messages, decoded):
    """Raise unless rows from a handle that may have codecs are validated."""
    [full] = stored(record)
    args = [full[name] for name in from_arguments]
    message = tuple(full.get(name) if name in from_messages else "no field" for name in decode.MESSAGE_FIELDS)
    row = {name: value for name, value in full.items() if name not in from_arguments + from_messages}
    assert decoded([row], args, [message]) == [record(**full)]
    for name in row:
        with pytest.raises(ConfigurationError, match=rf"\({name}\)"):
            decoded([row | {name: {"of": "a codec"}} if name != "metadata" else row | {name: [1]}], args, [message])


UNFILLED = pytest.mark.parametrize(
    ("record", "from_arguments", "from_messages"),
    sorted(
        {(each.record, each.from_arguments, each.from_messages) for each in fillers()},
        key=lambda each: (each[0].__name__, each[1:]),
    ),
)


@UNFILLED
@pytest.mark.parametrize("has_refusal", [False, True])
def test_rows_of_an_unknown_handle_are_validated(record, from_arguments, from_messages, has_refusal):
    """Rows that may come through a codec are validated, without the refusal."""
    decoded = decode.decoder(
        record, from_arguments=from_arguments, from_messages=from_messages, has_refusal=has_refusal
    )
    refusal = {"refusal": None} if has_refusal else {}
    check_unfilled(
        record, from_arguments, from_messages, lambda rows, *rest: decoded([row | refusal for row in rows], *rest)
    )


def test_joined_rows_of_an_unknown_handle_are_validated():
    """Rows of a conversation and a message that may come through a codec are validated."""
    [conversation], [message] = stored(Conversation), stored(Message)
    check_unfilled(Conversation, (), (), lambda rows, *_: decode.conversations_of([joined(rows[0], message)]))

    def message_of(rows, args, _):
        identifier = {"id": rows[0]["conversation_id"]} if len(args) == 1 else {}
        return decode.messages_of([joined(conversation | identifier, rows[0])], *args)

    check_unfilled(Message, JOINED_GIVEN[:1], (), message_of)
    check_unfilled(Message, JOINED_GIVEN, (), message_of)


# 6. Arguments reach the statement in order.


async def check_call(function, stem, given, real=None):
    """Return a call's arguments; raise unless it sends one statement with them in the header's order."""
    db = Recorder(rows_of(stem, given), real)
    answer = await call(function, db, given)
    bound = inspect.signature(getattr(chatdb, function)).bind(db, **given)
    bound.apply_defaults()
    args = tuple(expected(function, parameter.name, bound.arguments) for parameter in file_of(stem).parameters)
    assert db.sent == [(file_of(stem).sql, args)]
    assert db.timeout == given.get("timeout")
    check_answer(stem, given, answer)
    return args


def check_answer(stem, given, answer):
    """Raise unless each message has the values that the caller sent, in the order in which they were sent."""
    from_messages = query_of(stem).from_messages
    if from_messages:
        answers = answer if isinstance(answer, list) else [answer]
        for sent, message in zip(given.get("messages", [given]), answers, strict=True):
            assert message.user_id == given["user_id"]
            for name in from_messages:
                value = sent.get(name)
                assert getattr(message, name) == (json.dumps(value) if isinstance(value, dict) else value)
        assert [each.seq for each in answers] == sorted(each.seq for each in answers)


async def check_import(real=None, *, has_row_security=False):
    """Raise unless an import passes its statements and its COPY every value in the right position."""
    db = Transfer(TRANSFERRED, real, has_row_security=has_row_security)
    with pytest.MonkeyPatch.context() as patch:  # the recorder's clock is earlier than the import's times
        patch.setattr(importer, "CLOCKS_DIFFER", timedelta(days=365))
        await importer.import_conversations(db, user_id="ann", items=IMPORT)
    sent = [(file_of(name_of(query)), args) for query, args in db.sent]
    named = [dict(zip([parameter.name for parameter in file.parameters], args, strict=True)) for file, args in sent]
    is_sent = [(file.name, args) for (file, _), args in zip(sent, named, strict=True)]
    assert is_sent == (INSERTED if has_row_security else IMPORTED)
    assert db.copied == (() if has_row_security else COPIED)
    assert db.users == ["ann", ""]
    for file, args in sent:
        check_null_arguments(file, [args])


def check_null_arguments(file, calls):
    """Raise unless exactly the parameters that the header calls nullable are null, or contain null, in some call."""
    for parameter, *values in zip(file.parameters, *calls, strict=True):
        is_null = any(value is None or (isinstance(value, list) and None in value) for value in values)
        assert is_null == parameter.nullable, f"{file.name}: {parameter.name}"


async def test_arguments_reach_their_parameters(tx):
    """Every call sends one statement, with its arguments in the header's order, and the server accepts them."""
    calls = defaultdict(list)
    for function, stem, given in CALLS:
        calls[stem].append(await check_call(function, stem, given, tx))
    for stem, found in calls.items():
        check_null_arguments(file_of(stem), found)


async def test_an_imports_arguments_reach_their_parameters(tx):
    """An import sends each value to the parameter or COPY column of its name."""
    await check_import(tx)


async def test_a_walled_imports_arguments_reach_their_parameters():
    """With row-level security, an import sends the messages through a statement, in the header's order."""
    await check_import(has_row_security=True)


async def test_an_exports_arguments_reach_their_parameters(tx):
    """An export names the user in its transaction and in both statements, and each page in the second one."""
    [row] = stored(chatdb.Conversation)
    db = Transfer(TRANSFERRED | {"export_user": [row]}, tx)
    [found] = [item async for item in exporter.export_conversations(db, user_id="ann")]
    assert found.id == row["id"]
    assert db.users == ["ann"]
    found = {name_of(query): args for query, args in db.sent}
    assert found == {
        "export_user": ("ann", -(2**63), 100),
        "export_user_messages": ("ann", row["id"], 0, row["id"], row["last_seq"], 500, 8 * 1024 * 1024),
    }


async def test_a_polls_arguments_reach_their_parameters(tx):
    """A poll sends the user, the id and the revision of each watched conversation, and marks the one that changed."""
    db = Recorder([{"ordinality": 2, "revision": 9, "last_seq": 5}], tx)
    watcher = chatdb.Watcher(SimpleNamespace(acquire=None))
    watches = [watching._Watch("ann", 6, 0), watching._Watch("bob", 7, 0)]
    watches[0].revision = 8
    await watcher._look(db, watches)
    assert db.sent == [(file_of("poll_conversations").sql, (["ann", "bob"], ["6", "7"], ["8", None]))]
    assert [(each.revision, each.changed.is_set()) for each in watches] == [(8, False), (9, True)]
    check_null_arguments(file_of("poll_conversations"), [db.sent[0][1]])


async def test_a_counts_argument_reaches_its_parameter(tx):
    """`chatdb delete-user` counts one user's rows."""
    db = Transfer(TRANSFERRED, tx)
    counted = await exporter.count_user(db, user_id="ann")
    assert (counted.conversations, counted.messages) == (1, 2)
    assert {name_of(query): args for query, args in db.sent} == {"count_user": ("ann",)}


def test_every_function_is_called():
    """The calls above cover every public function with a database, every argument and every file."""
    functions = {name for name in chatdb.__all__ if inspect.isfunction(getattr(chatdb, name))}
    functions -= {"transaction", "stream_message", "export_user"}
    with_db = {name for name in functions if "db" in inspect.signature(getattr(chatdb, name)).parameters}
    assert {function for function, _, _ in CALLS} == with_db
    given = defaultdict(set)
    for function, _, arguments in CALLS:
        given[function] |= arguments.keys()
    for function in with_db:
        assert given[function] == inspect.signature(getattr(chatdb, function)).parameters.keys() - {"db"}, function
    assert {stem for _, stem, _ in CALLS} | TRANSFERRED.keys() | OF_A_CLASS.keys() == TEXTS.keys()


@pytest.mark.parametrize(("function", "stem", "given"), [item for item in CALLS if file_of(item[1]).existence])
async def test_an_existence_row_is_no_record(function, stem, given):
    """A function returns no record for an existence row, or raises its own error."""
    existence = existence_of(stem)
    with suppress(MessageNotFoundError):
        assert not await call(function, Recorder([existence]), given)
    if file_of(stem).relation == "then":
        rows = [row for row in rows_of(stem, given) if next(iter(row.values())) is not None]
        answer = await call(function, Recorder([*rows, existence]), given)
        assert answer
        assert answer == await call(function, Recorder(rows_of(stem, given)), given)


REFUSALS = {
    "stale": StaleError,
    "conflict": ConflictError,
    "missing": MessageNotFoundError,
    "again": UnavailableError,
    "suppressed": ConfigurationError,
    "finished": ConflictError,
    "offset": ConflictError,
    "length": InvalidInputError,
    "streaming": ConflictError,
    "index": ConfigurationError,
    "words": InvalidInputError,
    "protected": ConfigurationError,
}
"""The error of each refusal."""


def check_refusals(files, source):
    """Raise unless the headers have exactly the words that the package knows."""
    known = set(re.findall(r'case "(\w+)"', source)) | {"suppressed"}
    assert {word for file in files for word in file.refusals} == known == REFUSALS.keys()


def test_the_refusals_are_known():
    """The headers have exactly the refusals for which the package has an error."""
    check_refusals([file_of(stem) for stem in TEXTS], inspect.getsource(_refusal))


@pytest.mark.parametrize(("function", "stem", "given"), [item for item in CALLS if file_of(item[1]).refusals])
async def test_a_refusal_is_an_error(function, stem, given):
    """Each refusal of a statement is an error of its own, for every call that sends it."""
    *_, row = rows_of(stem, given)
    for word in file_of(stem).refusals:
        length = {"length": row["length"]} if word == "offset" else {}
        db = Refusing([dict.fromkeys(row) | length | {"refusal": word}])
        with pytest.raises(REFUSALS[word]) as found:
            await call(function, db, given)
        assert type(found.value) in {REFUSALS[word], RunAgainError}
        assert {query for query, _ in db.sent} == {file_of(stem).sql}
        assert len(db.sent) == (1 if word != "again" else 2 + _ATTEMPTS)


# 7. The roles and limits match the CHECK constraints.


def check_limits(live, limits=validate, role=Role, state=State):
    """Raise unless the CHECKs have exactly the package's limits, roles and states."""
    name = f"char_length {{0}} >= 1 AND char_length {{0}} <= {limits.MAX_NAME}"
    metadata = "jsonb_typeof metadata = 'object' AND octet_length metadata <= {}"
    checks = {key: definition for key, (_, definition) in live.constraints.items() if key.startswith("ck_")}
    roles = re.findall(r"'(\w+)'", checks.pop("ck_messages_role"))
    assert set(roles) == set(typing.get_args(role)) == limits.ROLES
    assert all(word in CONSTRAINTS["ck_messages_role"][1] for word in roles)
    states = re.findall(r"'(\w+)'", checks.pop("ck_messages_state"))
    assert set(states) == set(typing.get_args(state))
    assert all(word in CONSTRAINTS["ck_messages_state"][1] for word in states)
    assert checks == {
        "ck_conversations_user_id": name.format("user_id"),
        "ck_conversations_key": name.format("key"),
        "ck_conversations_title": f"char_length title <= {limits.MAX_TITLE}",
        "ck_conversations_metadata": metadata.format(limits.MAX_CONVERSATION_METADATA),
        "ck_conversations_last_seq": "last_seq >= 0",
        "ck_messages_seq": "seq >= 1",
        "ck_messages_key": name.format("key"),
        "ck_messages_content": f"octet_length content <= {limits.MAX_CONTENT}",
        "ck_messages_payload": f"octet_length payload <= {limits.MAX_PAYLOAD}",
        "ck_messages_metadata": metadata.format(limits.MAX_METADATA),
        "ck_messages_token_count": "token_count >= 0",
        "ck_messages_parent_seq": "parent_seq >= 0 AND parent_seq < seq",
    }


def test_the_limits_are_the_checks(live):
    """The roles and limits in Python match the CHECK constraints."""
    check_limits(live)


# 8. The generic plan uses the indexes under `served by`.


def check_comments(live, files):
    """Raise unless every table and index has a comment, and each file named there uses the index."""
    assert all(live.comments.values()), live.comments
    for index in live.indexes:
        for word in set(re.findall(r"\w+", live.comments[index])) - EARLIER_NAMES:
            is_file = word in files or ("_" in word and word.split("_")[0] in VERBS)
            assert not is_file or (word in files and index in files[word].indexes), f"{index} names {word}"


EARLIER_NAMES = {"export_conversations"}
"""Names in comments that a released migration has set, of statements that have another name by now."""

VERBS = {stem.partition("_")[0] for stem in TEXTS}
"""The first words of the files' names, by which a comment's words are taken for files."""


@every_file
def test_the_plan_has_the_indexes(planned, stem):
    """The generic plan uses the indexes under `served by`, scans no table and sorts no messages."""
    check_plan(planned, file_of(stem))


ADDRESSING = [
    stem
    for stem in TEXTS
    if {"conversation_id", "conversation_key"} <= {each.name for each in file_of(stem).parameters}
]


@pytest.mark.parametrize("stem", ADDRESSING)
def test_an_id_looks_up_no_key(planned, stem):
    """The generic plan never executes the subqueries for keys if the caller gives an id and a seq."""
    check_addressing(planned, file_of(stem))


def test_tables_and_indexes_say_what_they_serve(live):
    """Every table and index has a comment, and each file that an index's comment names also names the index."""
    check_comments(live, {stem: file_of(stem) for stem in TEXTS})


# 9. Every constraint has an error, and check_schema needs the whole schema.


def check_errors(live, constraints=CONSTRAINTS, conflicts=CONFLICTS, behind=STALE_COUNTERS):
    """Raise unless each constraint and unique index maps to one error, and a CHECK to its column's parameter."""
    unique = {name for name, (_, is_unique) in live.indexes.items() if is_unique}
    assert sorted([*constraints, *conflicts, *behind, *OTHERS_MAPPED]) == sorted(live.constraints.keys() | unique)
    for name, (parameter, _) in constraints.items():
        assert parameter in live.constraints[name][0]
        assert name.split("_", 2)[2] == parameter


def check_needed(live, needed=EXPECTED_SCHEMA):
    """Raise unless check_schema needs exactly what the migrations create."""
    found = defaultdict(dict)
    for table, name, definition in live.rows(file_of("check_schema").sql):
        if table != "_chatdb_migration":  # only the operator commands need it
            found[table][name] = definition
    assert needed == found
    columns = [name for (schema, _), names in live.columns.items() if schema == "chatdb" for name in names]
    assert sorted(name for parts in found.values() for name in parts) == sorted(
        [*columns, *(live.indexes.keys() | live.constraints.keys())]
    )


def test_the_constraints_are_mapped(live):
    """Every constraint and unique index has an error, and every error's constraint exists."""
    check_errors(live)


def test_the_foreign_keys_are_mapped():
    """A foreign key violation, which only a race with a deletion causes, means a missing conversation or message."""
    assert isinstance(map_driver_error(asyncpg.ForeignKeyViolationError("")), ConversationNotFoundError)
    of_a_part = asyncpg.ForeignKeyViolationError("")
    of_a_part.schema_name, of_a_part.constraint_name = "chatdb", "fk_message_parts_message"
    assert isinstance(map_driver_error(of_a_part), MessageNotFoundError)


def test_the_schema_check_needs_the_schema(live):
    """check_schema needs exactly the columns, constraints and indexes that the migrations create."""
    check_needed(live)


# 10. No statement reaches another user's rows. Style rules.


def check_isolation(live, file):
    """Raise unless every table reference has `user_id = $1` and every inserted row has `$1` as its user."""
    is_on_users_data = any(getattr(node, "schemaname", None) == "chatdb" for node in file.nodes)
    assert not is_on_users_data or file.parameters[0].name == ("user_ids" if file.name in OF_A_CLASS else "user_id")
    assert isolation_gaps(file) == KNOWN_GAPS.get(file.name, [])


KNOWN_GAPS = {
    "move_user": [
        "c gets another user_id",
        "t is read or written without user_id = $1",
        "messages gets another user_id",
        "message_parts gets another user_id",
    ]
}
"""What the check reports in the one statement that is on two users' data."""


def check_style(live, file):
    """Raise unless the statement names its columns, returns rows and is in lower case."""
    assert isinstance(file.statement, pglast.ast.SelectStmt) or outputs(file.statement), "a write without returning"
    assert not any(isinstance(node, pglast.ast.A_Star) for node in file.nodes), "a star"
    tokens = [token for token in scan(file.sql) if token.name not in ("SQL_COMMENT", "C_COMMENT", "SCONST")]
    words = [file.sql[token.start : token.end + 1] for token in tokens]
    assert words == [word.lower() for word in words]


@every_file
def test_the_statement_stays_with_the_user(stem):
    """A statement filters each table on the user, or inserts that user's rows."""
    check_isolation(None, file_of(stem))


@every_file
def test_the_file_follows_the_house_rules(stem):
    """A file's header has its name, and its one statement is in lower case and names its columns."""
    assert file_of(stem).name == stem
    check_style(None, file_of(stem))


# The mutations. Each check must find those made for it.

CONTENT = "drop constraint ck_messages_content, add constraint ck_messages_content check"
CASCADE = (
    "drop constraint fk_messages_conversation, add constraint fk_messages_conversation "
    "foreign key (user_id, conversation_id) references chatdb.conversations (user_id, id)"
)
ROLE = "drop constraint ck_messages_role, add constraint ck_messages_role check (role in"


@pytest.mark.parametrize(
    ("check", "stem", "change"),
    [
        (check_prepares, "get_history", "rename column content to body"),
        (check_parameters, "append_message", "alter token_count type int8"),
        (check_columns, "get_message", "alter token_count type int2"),
        (check_nullability, "get_message", "alter content drop not null"),
        (check_nullability, "append_message", "alter created_at drop not null"),
        (check_nullability, "list_messages", "alter key set not null"),
        (check_plan, "get_history", "drop constraint pk_messages cascade"),
        (
            check_plan,
            "append_message_conditional",
            "add constraint uq_messages_new unique (user_id, conversation_id, key)",
        ),
        (check_comments, None, "add unique (id)"),
        (check_limits, None, f"{CONTENT} (octet_length(content) <= 8388608)"),
        (check_limits, None, f"{CONTENT} (octet_length(content) < 4194304)"),
        (check_limits, None, f"{CONTENT} (char_length(content) <= 4194304)"),
        (check_limits, None, f"{ROLE} ('user', 'assistant', 'system', 'developer', 'tool', 'critic'))"),
        (check_limits, None, "drop constraint ck_messages_token_count"),
        (check_errors, None, "drop constraint ck_messages_seq"),
        (check_errors, None, "drop constraint fk_messages_conversation"),
        (check_errors, None, "add constraint ck_messages_new check (seq > -1)"),
        (check_errors, None, "add constraint uq_messages_id unique (id)"),
        (check_needed, None, "drop constraint pk_messages cascade"),
        (check_needed, None, "drop column metadata"),
        (check_needed, None, "add extra text"),
        (check_needed, None, "alter column role drop not null"),
        (check_needed, None, "alter column id drop identity"),
        (check_needed, None, "alter column token_count set default 0"),
        (check_needed, None, "alter column key type text"),
        (check_needed, None, "alter column token_count type bigint"),
        (check_needed, None, "drop constraint ck_messages_seq"),
        (check_needed, None, f"{CONTENT} (octet_length(content) < 4194304)"),
        (check_needed, None, f"{CASCADE} on delete restrict"),
        (check_needed, None, f"{CASCADE} on delete cascade not valid"),
        (check_needed, None, "disable trigger all"),
        (check_needed, None, "add constraint uq_messages_id unique (id)"),
    ],
)
def test_a_changed_table_is_found(live, check, stem, change):
    """Every change to the messages table is found."""
    arguments = [file_of(stem)] if stem else [{}] if check is check_comments else []
    with live.connection.transaction(force_rollback=True):
        live.connection.execute(f"alter table chatdb.messages {change}")
        with pytest.raises(AssertionError):
            check(Live(live.connection), *arguments)


HERE = ", or an existence row: the conversation has none there"
THEN = ", then an existence row: if the page is not full"
PAGE = "the caller needs it\nlimit $5 + case when $2::int8 is null then 1 else 0 end"
OTHERS = "the caller needs it"
NONE = f"select {', '.join(['null'] * 9)} from chatdb.conversations where user_id = $1 and id = $2 union all"
FIND = "import_conversations_find"
BY_ID = """where user_id = $1
  and id = (select coalesce((select $2::int8), (
      select id from chatdb.conversations
      where user_id = $1 and key = $3
  )))
"""
GIVEN = " without user_id and conversation_id"
ONE, MANY = "append_message_conditional", "append_messages_conditional"


@pytest.mark.parametrize(
    ("check", "stem", "old", "new"),
    [
        (check_prepares, "get_history", "where user_id", "where owner_id"),
        (
            check_parameters,
            "get_message",
            "$4 seq int8 null\n-- $5 key text null",
            "$5 key text null\n-- $4 seq int8 null",
        ),
        (check_parameters, "append_message", "-- $6 payload text", "-- $6 metadata text"),
        (check_parameters, "append_message", "$6::text::json, $7", "$7::text::json, $6"),
        (check_parameters, "update_conversation", "then $5 else", "then $7 else"),
        (check_parameters, "update_conversation", "$10::bool then", "$11::bool then"),
        (check_parameters, "update_message", "|| $12::text::jsonb", "|| $9::text::jsonb"),
        (check_parameters, "append_messages", "$5::text[], $6", "$6::text[], $5"),
        (check_parameters, "get_message", "seq int8", "seq int4"),
        (check_parameters, "get_message", "-- $4 seq int8 null\n", ""),
        (check_parameters, ONE, "and key = $3", "and key = $9"),
        (check_parameters, ONE, "m.key = $9", "m.key = $3"),
        (check_parameters, ONE, "id = $11", "id = $12"),
        (check_parameters, ONE, "last_seq + edits = $12", "last_seq + edits = $11"),
        (check_parameters, ONE, "last_seq + edits = $12", "edits + last_seq = $12"),
        (check_parameters, MANY, "where $11::bool", "where $10::bool"),
        (
            check_parameters,
            "list_conversations_after",
            "coalesce($2::timestamptz, 'infinity') as updated_at",
            "now() as x",
        ),
        (check_existence, "list_messages", "limit $5 +", "limit 5 +"),
        (check_columns, "list_messages", "payload::text as payload", "payload::text as body"),
        (check_columns, "list_messages", GIVEN, ""),
        (check_columns, "list_messages", GIVEN, " without conversation_id and user_id"),
        (check_columns, "list_messages", GIVEN, " without user_id"),
        (check_columns, "list_messages", "id, seq, parent_seq, role", "id, user_id, seq, parent_seq, role"),
        (check_columns, "append_message", "user_id, role, content", "user_id, content, role"),
        (check_columns, "append_message", "payload, token_count and key", "payload and key"),
        (check_columns, "get_conversation", "key, title", "title, key"),
        (check_columns, "get_conversation", " last_seq,", ""),
        (check_columns, "get_conversation", "metadata::text as metadata", "metadata"),
        (check_columns, "get_conversation", "one Conversation", "one Message"),
        (check_columns, "get_conversation", "one Conversation\n", "one Conversation\n-- refuses with stale\n"),
        (check_columns, ONE, "-- refuses with conflict, stale, missing, again, suppressed\n", ""),
        (check_columns, "load_conversation", f", then many Message{GIVEN}", ""),
        (check_existence, "load_conversation", f", then many Message{GIVEN}", " and Message"),
        (check_columns, "load_conversation", GIVEN, ""),
        (
            check_columns,
            "load_conversation",
            "last_seq, head_seq, revision, created_at",
            "last_seq, revision, head_seq, created_at",
        ),
        (check_columns, "list_previews", "m.id as message_id, m.seq as", "m.seq as message_seq, m.id as"),
        (check_columns, "list_previews", " and Message", ""),
        (check_columns, "list_previews", " and Message", ", then many Message"),
        (check_given, "list_messages", " without user_id and", " without seq and"),
        (check_given, "list_messages", GIVEN, " without conversation_id and user_id"),
        (
            check_given,
            "list_messages",
            "conversation_id = (select coalesce((select $2::int8)",
            "conversation_id >= (select coalesce((select $2::int8)",
        ),
        (
            check_given,
            "list_messages",
            "conversation_id = (select coalesce((select $2::int8)",
            "conversation_id = (select coalesce((select $4::int8)",
        ),
        (check_given, "list_messages", "where user_id = $1\n      --", "where (user_id = $1 or true)\n      --"),
        (
            check_given,
            "load_conversation",
            "and conversation_id = r.id and seq <= r.top and seq >= r.bottom",
            "and conversation_id >= r.id and seq <= r.top and seq >= r.bottom",
        ),
        (check_given, "append_message", "$4, $5, $6", "$5, $4, $6"),
        (check_given, "append_message", "last_seq, $4, $5", "last_seq, lower($4), $5"),
        (check_given, ONE, "where role = $4 and content = $5", "where role = $4"),
        (check_given, ONE, "payload::text is not distinct from $6", "payload::text is not distinct from $7"),
        (check_given, ONE, "from earlier\n    where role = $4 and", "from earlier\n    where role <> $4 and"),
        (check_given, MANY, "b.role = m.role and ", ""),
        (check_given, MANY, "b.role = m.role and ", "m.role = m.role and "),
        (check_given, MANY, "where m.seq > (select", "where m.seq >= (select"),
        (check_given, MANY, "where m.seq > (select last_seq from conversation)", "where true"),
        (check_given, MANY, "c.last_seq + b.place, b.role", "c.last_seq - b.place, b.role"),
        (
            check_given,
            MANY,
            "select role, content, payload, metadata::jsonb",
            "select content as role, content, payload, metadata::jsonb",
        ),
        (check_given, "append_messages", "c.previous_seq + m.ordinality", "c.previous_seq - m.ordinality"),
        (check_given, "append_messages", "(role, content,", "(content, role,"),
        (check_given, "upsert_message", "set role = excluded.role, content", "set content"),
        (check_given, "upsert_message", "role = excluded.role, content", "role = m.role, content"),
        (check_given, "upsert_message", "m.role = $4 and ", ""),
        (check_given, "upsert_message", " and m.token_count is not distinct from $8", ""),
        (check_given, "replace_messages_after", " and m.content = b.content", ""),
        (check_given, "replace_messages_after", "and m.content = b.content", "or m.content = b.content"),
        (check_nullability, "get_conversation", "last_seq,", "nullif(last_seq, 0) as last_seq,"),
        (check_nullability, "get_conversation", "last_seq + edits as", "nullif(last_seq, 0) + edits as"),
        (check_nullability, FIND, "inner join chatdb.conversations", "left join chatdb.conversations"),
        (check_nullability, FIND, "left join lateral", "inner join lateral"),
        (check_nullability, "list_previews", "m.seq as message_seq", "nullif(m.seq, 0) as message_seq"),
        (check_nullability, "list_previews", "c.last_seq,", "nullif(c.last_seq, 0) as last_seq,"),
        (
            check_nullability,
            "load_conversation",
            "m.id, m.seq, m.parent_seq, m.role",
            "m.id, nullif(m.seq, 0), m.parent_seq, m.role",
        ),
        (check_existence, "update_message", "created_at, null\nfrom target", "created_at, 'stale'\nfrom target"),
        (check_existence, "get_conversation", "and id = (select coalesce", "and id >= (select coalesce"),
        (check_existence, "get_conversation", "one Conversation", f"one Conversation{HERE}"),
        (check_existence, "list_messages", THEN, HERE),
        (check_existence, "list_messages", THEN, ""),
        (check_existence, "list_messages", "many Message", "one Message"),
        (check_existence, "list_messages", PAGE, OTHERS),
        (check_existence, "list_messages", PAGE, f"{OTHERS}\nlimit 1"),
        (check_existence, "list_messages", PAGE, f"{OTHERS}\nlimit $4"),
        (check_existence, "list_messages", PAGE, f"{OTHERS}\nlimit $5 + 1"),
        (check_existence, "list_messages", "then 1 else 0", "then 2 else 0"),
        (check_existence, "list_messages", "limit $5 + case", "order by seq nulls last\nlimit $5 + case"),
        (check_existence, "list_messages", "limit $5 + case", "offset 1\nlimit $5 + case"),
        (check_existence, "list_messages", "    limit $5\n)", ")"),
        (check_existence, "list_messages", "union all", "union"),
        (check_existence, "list_messages", "union all", "except all"),
        (check_existence, "list_messages", "\n(\n", f"\n{NONE}\n(\n"),
        (check_existence, "list_messages", f"\n{BY_ID}", "\n"),
        (check_existence, "list_messages", "null, id, null", "null, last_seq, null"),
        (check_existence, "list_messages", "null, id, null", "null, null, id"),
        (check_existence, "list_messages_after_key", " and m.key = $4", ""),
        (check_existence, "list_messages_after_key", "select m.key from", "select m.role from"),
        (check_existence, "get_message", ", or an existence row: if there is no such message", THEN),
        (check_existence, "get_message", "branch is read\nlimit 1", "branch is read"),
        (check_existence, "get_message", "branch is read\nlimit 1", "branch is read\nlimit 2"),
        (check_existence, "list_conversations_after", "from place\n--", "from chatdb.conversations\n--"),
        (check_existence, "list_conversations_after", "    where $4::text is null\n", ""),
        (check_existence, "list_conversations_after", "where $4::text is null", "where $4::text is not null"),
        (check_existence, "list_conversations_after", "user_id = $1 and key = $4", "user_id = $1 and title = $4"),
        (check_existence, "load_conversation", "    limit 1 -- noqa: AM09\n", ""),
        (check_existence, "load_conversation", "    limit $4 -- noqa: AM09\n", ""),
        (check_existence, "load_conversation", ")\nunion all\n(", ")\nunion\n("),
        (
            check_existence,
            "load_conversation",
            "id = (select coalesce((select $2::int8), (",
            "id >= (select coalesce((select $2::int8), (",
        ),
        (check_existence, "update_message", "where not exists (select from target)", "where true"),
        (
            check_existence,
            "update_message",
            "where not exists (select from target)",
            "where exists (select from target)",
        ),
        (check_existence, "update_message", "(select from target)", "(select from message)"),
        (check_existence, "update_message", "(select from target)", "(select from target where seq = 1)"),
        (check_existence, ONE, "where not exists (select from same)", "where true"),
        (check_existence, ONE, "where not exists (select from same)", "where not exists (select from message)"),
        (check_existence, ONE, " and not exists (select from created)", ""),
        (check_existence, ONE, "'missing'\n        else 'stale'", "'missing'"),
        (check_existence, MANY, "same) <> pg_catalog.card", "same) = pg_catalog.card"),
        (check_existence, MANY, "same) = pg_catalog.card", "same) >= pg_catalog.card"),
        (
            check_existence,
            MANY,
            "or (not $10::bool and (select pg_catalog.count(*) from same) <>",
            "or ((select pg_catalog.count(*) from same) <>",
        ),
        (check_existence, MANY, ", or an existence row: if nothing is new", ""),
        (check_existence, "replace_messages_after", "where not exists (select from message)\nunion", "union"),
        (check_existence, "replace_messages_after", "where not exists (select from conversation)\n  and (", "where ("),
        (check_existence, "replace_messages_after", ", or an existence row: if the batch is empty", ""),
        (check_existence, "pop_message", ", or an existence row: if the conversation has no messages", ""),
        (check_existence, "pop_message", "then 'again'\n", "then 'again' else 'stale'\n"),
        (check_existence, "create_conversation_messages", "where not $5::bool", "where true"),
        (check_existence, "create_conversation_messages", "where not exists (select from stored)", "where true"),
        (check_existence, "delete_conversation", "from seen\nwhere not exists (select from conversation)", "from seen"),
        (
            check_existence,
            "delete_conversation",
            "null as refusal\nfrom conversation",
            "'stale' as refusal\nfrom conversation",
        ),
        (check_existence, "delete_conversation", " as refusal", " as reason"),
        (check_existence, "delete_message", "with stale, missing, again", "with stale, again"),
        (check_existence, "delete_message", "with stale, missing, again", "with stale, missing, again, conflict"),
        (check_existence, "delete_message", "-- refuses with stale, missing, again\n", ""),
        (check_existence, "delete_message", "else 'missing'", "else 'gone'"),
        (check_existence, "delete_message", "        else 'missing'\n", ""),
        (check_existence, "delete_message", "one Deleted", f"one Deleted{HERE}"),
        (check_plan, "get_history", "by pk_messages", "by pk_conversations"),
        (check_plan, "delete_conversation", "by pk_conversations, pk_messages", "by pk_messages"),
        (check_plan, "get_conversation", ", uq_conversations_user_id_key\n", "\n"),
        (check_plan, "export_user_messages", "    where user_id = $1\n", "    where user_id || '' = $1\n"),
        (check_plan, "get_history", "order by seq desc", "order by created_at desc"),
        (check_plan, "list_conversations", "order by active_on desc, ", "order by "),
        (check_plan, "list_conversations_after", "      and archived_at is null\n", ""),
        (check_plan, "list_conversations_created", "order by created_at desc, ", "order by "),
        (check_plan, "list_pinned", "order by pinned_at desc, ", "order by "),
        (check_plan, "load_conversation", "order by seq desc", "order by created_at desc"),
        (check_plan, "list_previews", "order by seq desc", "order by created_at desc"),
        (check_addressing, "get_conversation", "(select $2::int8)", "(select $2::int8 where false)"),
        (check_addressing, "get_conversation", "(select coalesce((select $2::int8), (", "(select least($2, ("),
        (check_addressing, "append_message", "(select coalesce((select $2::int8), (", "(select greatest($2, ("),
        (
            check_addressing,
            "get_message",
            "and seq = (select coalesce((select $4::int8), (",
            "and seq = (select least($4, (",
        ),
        (
            check_addressing,
            "list_messages",
            "and conversation_id = (select coalesce((select $2::int8), (",
            "and conversation_id = (select least($2, (",
        ),
        (check_style, "get_conversation", "id, user_id, key, title", "*, title"),
        (check_style, "update_conversation", "returning\n        id", "returning\n        *, id"),
        (check_style, "import_conversations_extend", "\nreturning c.id", ""),
        (check_style, "get_conversation", "select", "SELECT"),
        (check_style, "get_conversation", "where", "; select 1 where"),
        (check_isolation, "get_conversation", "chatdb.conversations", "conversations"),
        (check_isolation, "get_conversation", "chatdb.conversations", "public.conversations"),
        (check_isolation, "get_conversation", "where user_id", ", chatdb.messages as m where conversations.user_id"),
        (check_isolation, "get_conversation", "last_seq", "(select max(seq) from chatdb.messages) as last_seq"),
        (check_isolation, "get_conversation", "and id", "or id"),
        (check_isolation, "get_conversation", "$1 user_id", "$1 owner"),
        (check_isolation, "get_conversation", "where user_id = $1 and key", "where key"),
        (check_isolation, FIND, "user_id = $1 and conversation_id = f.id", "conversation_id = f.id"),
        (check_isolation, ONE, "on conflict (user_id, conversation_id, ", "on conflict (conversation_id, "),
        (check_isolation, ONE, "set key = excluded.key", "set user_id = $9"),
        (check_isolation, ONE, "returning user_id, id, 0::int8", "returning $3 as user_id, id, 0::int8"),
        (
            check_isolation,
            ONE,
            "select user_id, id, last_seq, appended_at",
            "select $3 as user_id, id, last_seq, appended_at",
        ),
        (check_isolation, ONE, "m.user_id = $1 and m.conversation_id =", "m.conversation_id ="),
        (
            check_isolation,
            MANY,
            "select user_id, id, last_seq, appended_at, null, true",
            "select $3, id, last_seq, appended_at, null, true",
        ),
        (check_isolation, "list_conversations_after", "where user_id = $1 and key = $4", "where key = $4"),
        (check_isolation, "list_previews", "user_id = $1 and conversation_id = c.id", "conversation_id = c.id"),
        (check_isolation, "append_message", "conversation as (", "conversation (id, user_id) as ("),
        (check_isolation, "append_message", "select user_id, id, last_seq, $4", "select $4, id, last_seq, $4"),
        (check_isolation, "create_conversation", "(user_id, title", "(id, title"),
        (
            check_isolation,
            "get_conversation",
            "title,",
            "query_to_xml('table chatdb.messages', true, true, '') as title,",
        ),
        (check_isolation, "get_conversation", "title,", "public.count(title) as title,"),
        (check_isolation, "get_conversation", "and id", "or not user_id = $1 and id"),
        (check_isolation, "delete_conversation", "using conversation as c", "using chatdb.conversations as c"),
        (check_isolation, ONE, "from stored, message", "from stored, chatdb.messages as message"),
        (check_isolation, ONE, "same as (", "same as (with message as (select * from stored) "),
        (check_isolation, "update_conversation", "set title", "set user_id = $5, title"),
        (check_isolation, "get_branch_top", "user_id = $1 and conversation_id = r.id and seq <=", "seq <="),
        (check_isolation, "fork_conversation", "select $1, c.id, l.seq", "select l.role, c.id, l.seq"),
        (check_parameters, "fork_conversation", "select $1, $6, c.title", "select $1, $5, c.title"),
        (check_parameters, "get_branch_top", "coalesce($4::int8, case", "coalesce($5::int8, case"),
        (check_parameters, "get_context", "total > $4", "total > $5"),
        (check_parameters, ONE, "coalesce($15::int8, case", "coalesce($12::int8, case"),
        (check_columns, "list_versions", "as seqs\nfrom", "as others\nfrom"),
        (check_columns, "list_versions", "array_agg(seq order by seq)", "max(seq)"),
        (check_given, "get_branch_top", "select r.id, r.parent_seq as top", "select r.top as id, r.parent_seq as top"),
        (check_given, "get_branch_top", "conversation_id = r.id and seq <= r.top and", "seq <= r.top and"),
        (
            check_given,
            "get_context",
            "select c.id, c.top, coalesce(b.seq, 0) as bottom",
            "select c.top as id, c.top, coalesce(b.seq, 0) as bottom",
        ),
        (check_nullability, "get_conversation", "then head_seq else last_seq end", "then last_seq else head_seq end"),
        (check_nullability, "load_conversation", "when head_last_seq = last_seq", "when head_last_seq <= last_seq"),
        (check_nullability, "list_versions", "    group by parent_seq\n", ""),
        (check_nullability, "get_branch", "m.id, m.seq, m.parent_seq", "m.id, nullif(m.seq, 0) as seq, m.parent_seq"),
        (check_existence, "get_branch", THEN, ""),
        (check_existence, "get_branch_top", "select '' from conversation", "select '' from run"),
        (check_existence, "get_context", ", then an existence row", ""),
        (check_existence, "get_context", "null\nfrom conversation", "null\nfrom conversation\nwhere top > 0"),
        (check_existence, "get_context", "null\nfrom conversation", "null\nfrom conversation\nlimit $5"),
        (check_existence, "list_versions", "select null, null\nfrom conversation", "select null, null\nfrom page"),
        (check_existence, "switch_branch", "from seen\nwhere not exists (select from changed)", "from seen"),
        (check_existence, "fork_conversation", "'suppressed'", "'again'"),
        (check_plan, "get_branch", "order by seq desc\n        limit 1", "order by parent_seq desc\n        limit 1"),
        (check_plan, "switch_branch", "order by seq desc", "order by created_at desc"),
        (check_prepares, "extend_message", "set length =", "set size ="),
        (
            check_parameters,
            "start_message",
            "select user_id, id, last_seq + 1, $4",
            "select user_id, id, last_seq + 1, $6",
        ),
        (check_parameters, "start_message", "coalesce($7::int8, case", "coalesce($2::int8, case"),
        (check_parameters, "extend_message", "last_start = $6,", "last_start = $4,"),
        (check_parameters, "extend_message", "seq, $6, $7\n", "seq, $4, $7\n"),
        (check_parameters, "extend_message", "and k.key = $5", "and k.key = $3"),
        (
            check_parameters,
            "finish_message",
            "case when $10::bool then 'aborted'",
            "case when $9::int4 = 1 then 'aborted'",
        ),
        (check_parameters, "finish_message", "content = coalesce($6,", "content = coalesce($3,"),
        (
            check_parameters,
            "finish_message",
            "coalesce($7::text::json, m.payload)",
            "coalesce($8::text::json, m.payload)",
        ),
        (check_parameters, "list_streaming", "- $2::interval", "- interval '1 hour'"),
        (check_parameters, "poll_conversations", "($1::text[], $2", "($2::text[], $1"),
        (check_columns, "read_message", "as text", "as content"),
        (check_columns, "get_message", "key, state, created_at\n    from", "state, key, created_at\n    from"),
        (
            check_columns,
            "finish_message",
            "key, state, created_at, null as refusal",
            "key, created_at, null as refusal",
        ),
        (check_nullability, "get_message", "else content\n        end as", "else nullif(content, '')\n        end as"),
        (check_nullability, "get_message", "when state = 'streaming'", "when state = 'aborted'"),
        (check_nullability, "get_message", "and p.seq = messages.seq", "and p.seq = messages.seq and p.start >= 0"),
        (check_nullability, "extend_message", "and start = -1\n", "and start >= -1\n"),
        (check_nullability, "read_message", "        ''\n    ) as text", "        m.state\n    ) as text"),
        (check_nullability, "read_message", "m.state\nfrom message", "coalesce(m.state, '') as state\nfrom message"),
        (check_nullability, "list_streaming", "and s.start = -1", "and s.start >= -1"),
        (check_nullability, "poll_conversations", "left join", "inner join"),
        (check_existence, "start_message", "from stored\nwhere not exists (select from found)", "from stored"),
        (check_existence, "start_message", "then 'suppressed'", "then 'again'"),
        (check_existence, "extend_message", "where not exists (select from stream)", "where true"),
        (check_existence, "extend_message", "else 'again'", "else null"),
        (check_existence, "extend_message", "finished, offset, length", "finished, length"),
        (check_existence, "extend_message", "and p.start = -1\nwhere not", "and p.start >= -1\nwhere not"),
        (check_existence, "read_message", " and not exists (select from message)", ""),
        (check_existence, "read_message", ", or an existence row: if there is no such message", ""),
        (check_existence, "finish_message", "where not exists (select from message)\n  and not", "where not"),
        (check_existence, "finish_message", "from target\nwhere state is distinct from", "from target\nwhere state = "),
        (
            check_existence,
            "finish_message",
            "select from target\n      where state is distinct from",
            "select from target\n      where content is distinct from",
        ),
        (check_existence, "update_message", "      and not exists (select from growing)\n", ""),
        (check_plan, "get_message", ", pk_message_parts\n", "\n"),
        (check_plan, "extend_message", ",\n-- pk_message_parts", ""),
        (check_plan, "poll_conversations", "c.id = w.conversation_id", "c.id + 0 = w.conversation_id"),
        (check_addressing, "extend_message", "(select coalesce((select $4::int8), (", "(select least($4, ("),
        (check_addressing, "finish_message", "(select coalesce((select $2::int8), (", "(select least($2, ("),
        (check_addressing, "read_message", "select coalesce((select $2::int8), (", "select least($2, ("),
        (check_isolation, "start_message", "select m.user_id, m.conversation_id, m.seq, -1", "select $4, 1, m.seq, -1"),
        (
            check_isolation,
            "extend_message",
            "select $1, conversation_id, seq, $6",
            "select $7, conversation_id, seq, $6",
        ),
        (check_isolation, "extend_message", "on conflict (user_id, conv", "on conflict (conv"),
        (check_isolation, "poll_conversations", "c.user_id = w.user_id", "c.user_id = any ($1)"),
        (check_isolation, "poll_conversations", " and c.id = w.conversation_id", ""),
        (check_isolation, "poll_conversations", "($1::text[], $2", "(array[$1[1]], $2"),
        (check_isolation, "poll_conversations", "(user_id, conversation_id, rev", "(conversation_id, user_id, rev"),
    ],
)
def test_a_changed_file_is_found(live, check, stem, old, new):
    """Every change to a file is found."""
    assert old in TEXTS[stem]
    file = parse(TEXTS[stem].replace(old, new, 1))
    with pytest.raises(AssertionError), live.connection.transaction(force_rollback=True):
        check(live, file)


@pytest.mark.parametrize(
    ("old", "new"), [("-- One", "One"), ("-- returns", "-- gives"), ("seq int8 null", "seq"), ("row: if", "row if")]
)
def test_a_header_out_of_form_is_found(old, new):
    """A header with wrong syntax is found."""
    with pytest.raises(AssertionError):
        parse(TEXTS["get_message"].replace(old, new, 1))


@pytest.mark.chaos
def test_a_statement_without_its_user_is_found():
    """Every loosened user filter and every row inserted for another user is found, anywhere in a file."""
    stems = [stem for stem in TEXTS if stem != "check_schema"]
    mutants = {stem: list(without_user(TEXTS[stem])) for stem in stems}
    assert all(mutants.values())
    for stem in stems:
        for mutant in mutants[stem]:
            with pytest.raises(AssertionError):
                check_isolation(None, parse(mutant))
    print(f"figure: {sum(map(len, mutants.values()))} loosened users in {len(stems)} statements, all found by parsing")


@pytest.mark.parametrize(
    ("stem", "old", "new"),
    [
        ("get_message", "returns one", "returns many"),
        ("list_messages", "returns many", "returns one"),
        ("get_conversation", "one Conversation", f"one Conversation{HERE}"),
        ("load_conversation", ", then many Message", " and Message"),
        ("list_previews", THEN, ""),
        ("append_messages", "returns many", "returns one"),
        ("append_message", "returns one", "returns many"),
        ("list_conversations_created", THEN, ""),
    ],
)
def test_rows_read_in_another_way_are_found(stem, old, new):
    """A header with the wrong number of rows, or with an existence row that the function does not handle, is found."""
    file = parse(TEXTS[stem].replace(old, new, 1))
    with pytest.raises(AssertionError):
        check_verbs(file, next(module for module, _, query in bindings() if query.name == stem))


def test_a_file_without_its_query_is_found():
    """A file without a Query, and a Query without a file, duplicated, misnamed or without a function, is found."""
    (module, name, query), *others = bindings()
    for texts, bound in [
        (TEXTS | {"get_nothing": TEXTS["get_message"]}, bindings()),
        ({stem: text for stem, text in TEXTS.items() if stem != query.name}, bindings()),
        (TEXTS, [*bindings(), (module, name, query)]),
        (TEXTS, [(module, "_other", query), *others]),
        (TEXTS, [(SimpleNamespace(), name, query), *others]),
    ]:
        with pytest.raises(AssertionError):
            check_bindings(texts, bound)


@pytest.mark.parametrize(
    ("check", "change"),
    [
        (check_columns, {"seq": str}),
        (check_columns, {"payload": int | None}),
        (check_columns, {"extra": int}),
        (check_nullability, {"seq": int | None}),
        (check_nullability, {"key": str}),
    ],
)
def test_a_changed_record_is_found(live, check, change):
    """A record with a changed type, changed nullability or an extra field is found."""
    hints = typing.get_type_hints(Message) | change
    record = create_model("Message", **{name: (hints[name], ...) for name in {**Message.model_fields, **change}})
    with pytest.raises(AssertionError):
        check(live, file_of("get_message"), record)


@pytest.mark.parametrize("text", ["Serves get_message_by_key.", "Serves get_message and list_pinned.", ""])
def test_a_changed_comment_is_found(live, text):
    """A comment that names a file which is gone or does not use the index, and a missing comment, are found."""
    with live.connection.transaction(force_rollback=True):
        live.connection.execute(f"comment on index chatdb.pk_messages is '{text}'")
        with pytest.raises(AssertionError):
            check_comments(Live(live.connection), {stem: file_of(stem) for stem in TEXTS})


@pytest.mark.parametrize(
    "source", ['case "stale":', 'case "stale": case "conflict": case "missing": case "again": case "other":']
)
def test_a_changed_refusal_is_found(source):
    """A refusal that only the headers or only the package knows is found."""
    with pytest.raises(AssertionError):
        check_refusals([file_of(stem) for stem in TEXTS], source)


@FILLERS
@pytest.mark.parametrize("copies_dict", [False, True])
def test_a_changed_filling_is_found(filler, copies_dict):
    """Swapped columns, fields, values or conditions and an undecoded value are found."""
    record, columns, from_arguments, _from_messages = filler
    mutants = [decode.filler(record, source) for source in misfilled(filler.source(copies_dict=copies_dict))]
    assert len(mutants) >= 2 * (len(record.model_fields) - 1)
    names = [*from_arguments, *columns]
    mutants.append(
        lambda rows, _, *args: [record.model_construct(**dict(zip(names, [*args, *row], strict=True))) for row in rows]
    )
    for mutant in mutants:
        with pytest.raises((AssertionError, TypeError, ValueError, KeyError)):  # a mutant may also crash
            check_filled(filler, mutant)


@UNFILLED
def test_an_unvalidated_row_is_found(record, from_arguments, from_messages):
    """A decoder that takes any value is found."""
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_unfilled(
            record,
            from_arguments,
            from_messages,
            lambda rows, *_: [record.model_construct(**stored(record)[0] | row) for row in rows],
        )


def test_a_changed_map_or_limit_is_found(live):
    """An added, missing or changed role, limit, error or schema part is found."""
    for check, changes in [
        (check_limits, [{"role": Literal[Role, "critic"]}, {"state": Literal[State, "done"]}]),
        (check_limits, [{"limits": SimpleNamespace(**vars(validate) | {"MAX_TITLE": 999})}]),
        (check_errors, [{"constraints": part} for part in less(CONSTRAINTS)]),
        (check_errors, [{"constraints": CONSTRAINTS | {"ck_messages_key": ("role", "")}}]),
        (check_errors, [{"conflicts": part} for part in less(CONFLICTS)]),
        (check_errors, [{"behind": part} for part in less(STALE_COUNTERS)]),
        (check_errors, [{"conflicts": CONFLICTS | {"ck_messages_key": ""}}]),
        (
            check_needed,
            [
                {"needed": EXPECTED_SCHEMA | {table: part}}
                for table in EXPECTED_SCHEMA
                for part in less(EXPECTED_SCHEMA[table])
            ],
        ),
        (check_needed, [{"needed": EXPECTED_SCHEMA | {"messages": EXPECTED_SCHEMA["messages"] | {"seq": "integer"}}}]),
    ]:
        for change in changes:
            with pytest.raises(AssertionError):
                check(live, **change)


@pytest.mark.parametrize("module", [chatdb.branches, chatdb.conversations, chatdb.messages, chatdb.streaming, importer])
async def test_swapped_arguments_are_found(monkeypatch, module):
    """Every swap of two adjacent arguments is found."""
    mutants = list(swaps(module))
    assert mutants
    for name, mutant in mutants:
        # a mutant may also crash
        found = (AssertionError, AttributeError, ChatDBError, LookupError, TypeError, ValueError)
        with monkeypatch.context() as patch, pytest.raises(found):  # noqa: PT012 - any call may raise
            patch.setattr(module, name, mutant)
            for function, stem, given in CALLS:
                if module_of(function) is module:
                    await check_call(function, stem, given)
            if module is importer:
                await check_import()
                await check_import(has_row_security=True)
