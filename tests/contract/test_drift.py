"""
The SQL files, the schema, the records and the functions agree.

Each check is a plain function that raises AssertionError. Most tests run a check on the real files; those at the end
run it on mutations and fail if it misses one.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections import defaultdict
from contextlib import suppress
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Literal

import asyncpg
import pglast
import psycopg
import pytest
from pglast.parser import scan
from pydantic import create_model

import chatdb
from chatdb import (
    ConfigurationError,
    ConflictError,
    ConversationNotFoundError,
    MessageNotFoundError,
)
from chatdb._core import decode, validate
from chatdb._core.driver_errors import CONFLICTS, CONSTRAINTS, STALE_COUNTERS, map_driver_error
from chatdb.records import Conversation, Message, Role
from chatdb.schema import EXPECTED_SCHEMA
from chatdb.transfer import exporter, importer
from tests.support.catalog import DATA, Live
from tests.support.databases import new_database
from tests.support.mutants import less, misfilled, swaps, without_user
from tests.support.package import bindings, fields_of, query_of, record_of
from tests.support.plans import check_plan
from tests.support.recorder import (
    CALLS,
    COPIED,
    IMPORT,
    IMPORTED,
    INSERTED,
    TRANSFERRED,
    Recorder,
    Transfer,
    call,
    expected,
    module_of,
    name_of,
    stored,
)
from tests.support.sqlfiles import (
    TEXTS,
    branches,
    existence_gaps,
    file_of,
    is_existence,
    isolation_gaps,
    meetings,
    nullable,
    outputs,
    parse,
    ungiven,
)

FOREIGN_KEY = "fk_messages_conversation"

every_file = pytest.mark.parametrize("stem", TEXTS)


@pytest.fixture(scope="module")
def live(server, template):
    """Yield a database with enough rows for realistic plans."""
    with (
        new_database(server, f"{template}_drift", template) as dsn,
        psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as connection,
    ):
        connection.execute(DATA)
        yield Live(connection)


# 1. Every file has one Query, every Query has a file.


def check_bindings(texts, bound):
    """Raise unless each file has one Query, next to a function of its name."""
    assert sorted(query.name for _, _, query in bound) == sorted(texts)
    for module, variable, query in bound:
        functions = [name for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != "_"]
        assert variable == f"_{query.name}"
        assert any(query.name == name or query.name.startswith(f"{name}_") for name in functions), query.name
        assert query.sql == parse(texts[query.name]).sql, f"{query.name} is not sent as name line and body"


def test_files_and_queries_are_pairs():
    """One Query per file sends the statement without its header, next to a function of its name."""
    check_bindings(TEXTS, bindings())


VERBS = {"one": {"fetch_one"}, "many": {"fetch_all", "fetch_page", "iterate"}}
VERBS_OF_EXISTENCE = {"one": {"fetch_optional"}, "many": {"fetch_page"}}


def check_verbs(file, module):
    """Raise unless the module reads the rows as the header's `returns` says."""
    verbs = set(re.findall(rf"\b_{file.name}\.(\w+)\(", inspect.getsource(module)))
    assert verbs
    assert verbs <= (VERBS_OF_EXISTENCE if file.existence else VERBS)[file.number]


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
            names = {column, f"{column}s", f"set_{column}", f"before_{column}", f"after_{column}"}
            assert name in names or (name, column) == ("conversation_id", "id"), f"${number} {name} meets {column}"


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
    record = record or record_of(file.name)
    python = {"int8": int, "int4": int, "text": str, "timestamptz": datetime}
    _, columns = live.described(file.sql)
    assert file.record == record.__name__
    assert file.given == query_of(file.name).fields_from_args
    fields = fields_of(record, without=file.given)
    assert [(name, python.get(kind)) for name, kind, _ in columns] == [field[:2] for field in fields]


def check_nullability(live, file, record=None):
    """Raise unless exactly the nullable columns are Optional and the header declares any existence row."""
    found = nullable(file, live.columns)
    fields = fields_of(record or record_of(file.name), without=file.given)
    assert found == [optional for _, _, optional in fields]
    assert any(map(is_existence, branches(file.statement))) == bool(file.existence)
    for (name, _, not_null), may_be_null in zip(live.described(file.sql)[1], found, strict=True):
        is_known = not_null is not None and "left join" not in file.sql
        assert not is_known or not_null != may_be_null, f"the server knows better of {name}"


def check_given(live, file):
    """Raise unless the omitted columns are the first parameters and the statement compares both."""
    assert [parameter.name for parameter in file.parameters][: len(file.given)] == [*file.given]
    types, _ = live.described(file.sql)
    kinds = {name: kind for name, kind, _ in fields_of(record_of(file.name))}
    for name, kind in zip(file.given, types, strict=False):
        assert {"text": str, "int8": int}[kind] == kinds[name]
    assert ungiven(file) == []


@every_file
def test_what_the_rows_do_without_is_given(live, stem):
    """The statement filters each omitted field by the argument that supplies it."""
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
    """Raise unless an existence row comes alone or last, as the header says, under any plan."""
    assert existence_gaps(file) == []
    if file.existence and file.statement.limitCount:
        with live.connection.transaction(force_rollback=True):
            live.connection.execute(PARALLEL)
            plan = live.plan(file)
        assert [node["Node Type"] for node in plan[:2]] == ["Limit", "Append"]
        assert [node["Relation Name"] for node in plan if "Relation Name" in node] == ["messages", "conversations"]


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


def check_filled(record, given, fields_of_rows):
    """Raise unless filling a record from a row gives the same fields as validation."""
    [full] = stored(record)
    optional = {name for name, _, may_be_null in fields_of(record) if may_be_null}
    for row in [full, *(full | {name: None} for name in optional), full | dict.fromkeys(optional)]:
        values = tuple(value for name, value in row.items() if name not in given)
        [filled] = fields_of_rows([values], *(row[name] for name in given))
        validated = vars(record(**row))
        assert [*filled.items()] == [*validated.items()]
        assert [type(value) for value in filled.values()] == [type(value) for value in validated.values()]


FILLED = pytest.mark.parametrize(
    ("record", "given"),
    sorted(
        {(query.record, query.fields_from_args) for _, _, query in bindings() if query.record in decode.FILLED},
        key=lambda pair: (pair[0].__name__, pair[1]),
    ),
)


def test_the_filled_records():
    """Only conversations and messages are filled without validation."""
    assert {*decode.FILLED} == {Conversation, Message}


@FILLED
def test_rows_are_filled_in_the_order_of_the_fields(record, given):
    """Filling a record without validation gives the same fields as validation."""
    check_filled(record, given, decode.filler(decode.filler_source(record, given)))


def check_unfilled(record, given, decoded):
    """Raise unless rows from a handle that may have codecs are validated."""
    [row] = stored(record)
    args = [row.pop(name) for name in given]
    assert decoded([row], args) == [record(**row, **dict(zip(given, args, strict=True)))]
    for name in row:
        with pytest.raises(ConfigurationError, match=rf"\({name}\)"):
            decoded([row | {name: {"of": "a codec"}} if name != "metadata" else row | {name: [1]}], args)


@FILLED
def test_rows_of_an_unknown_handle_are_validated(record, given):
    """Rows that may come through a codec are validated."""
    check_unfilled(record, given, decode.decoder(record, given))


# 6. Arguments reach the statement in order.


async def check_call(function, stem, given, real=None):
    """Return a call's arguments; raise unless it sends one statement with them in the header's order."""
    rows = stored(record_of(stem), without=query_of(stem).fields_from_args) * (len(given.get("messages", ())) or 1)
    db = Recorder(rows, real)
    await call(function, db, given)
    bound = inspect.signature(getattr(chatdb, function)).bind(db, **given)
    bound.apply_defaults()
    args = tuple(expected(parameter.name, bound.arguments) for parameter in file_of(stem).parameters)
    assert db.sent == [(file_of(stem).sql, args)]
    assert db.timeout == given.get("timeout")
    return args


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
    """An export passes the user to both statements."""
    db = Transfer(TRANSFERRED, tx)
    assert [item async for item in exporter.export_conversations(db, user_id="ann")] == []
    assert db.users == ["ann"]
    found = {name_of(query): args for query, args in db.sent}
    assert found == {"export_conversations": ("ann",), "export_conversations_messages": ("ann",)}


async def test_a_counts_argument_reaches_its_parameter(tx):
    """`chatdb delete-user` counts one user's rows."""
    db = Transfer(TRANSFERRED, tx)
    counted = await exporter.count_user(db, user_id="ann")
    assert (counted.conversations, counted.messages) == (1, 2)
    assert {name_of(query): args for query, args in db.sent} == {"count_user": ("ann",)}


def test_every_function_is_called():
    """The calls above cover every public function with a database and every file."""
    functions = {name for name in chatdb.__all__ if inspect.isfunction(getattr(chatdb, name))} - {"transaction"}
    with_db = {name for name in functions if "db" in inspect.signature(getattr(chatdb, name)).parameters}
    assert {function for function, _, _ in CALLS} == with_db
    assert {stem for _, stem, _ in CALLS} | TRANSFERRED.keys() == TEXTS.keys()


@pytest.mark.parametrize(("function", "stem", "given"), [item for item in CALLS if file_of(item[1]).existence])
async def test_an_existence_row_is_no_record(function, stem, given):
    """A function returns no record for an existence row, or raises its own error."""
    record, without = record_of(stem), query_of(stem).fields_from_args
    existence = dict.fromkeys(record.model_fields)
    with suppress(ConflictError, MessageNotFoundError, ConfigurationError):
        assert await call(function, Recorder([existence]), given) == []
    if file_of(stem).relation == "then":
        rows = stored(record, without=without)
        known = {name: given[name] for name in without}
        assert await call(function, Recorder([*rows, existence]), given) == [record(**known, **row) for row in rows]


# 7. The roles and limits match the CHECK constraints.


def check_limits(live, limits=validate, role=Role):
    """Raise unless the CHECKs have exactly the package's limits and roles."""
    name = f"char_length {{0}} >= 1 AND char_length {{0}} <= {limits.MAX_NAME}"
    metadata = "jsonb_typeof metadata = 'object' AND octet_length metadata <= {}"
    checks = {key: definition for key, (_, definition) in live.constraints.items() if key.startswith("ck_")}
    roles = re.findall(r"'(\w+)'", checks.pop("ck_messages_role"))
    assert set(roles) == set(typing.get_args(role)) == limits.ROLES
    assert all(word in CONSTRAINTS["ck_messages_role"][1] for word in roles)
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
    }


def test_the_limits_are_the_checks(live):
    """The roles and limits in Python match the CHECK constraints."""
    check_limits(live)


# 8. The generic plan uses the indexes under `served by`.


def check_comments(live, files):
    """Raise unless every table and index has a comment, and each file named there uses the index."""
    assert all(live.comments.values()), live.comments
    for index in live.indexes:
        for word in re.findall(r"\w+", live.comments[index]):
            assert word not in files or index in files[word].indexes, f"{index} names {word}"


@every_file
def test_the_plan_has_the_indexes(live, stem):
    """The generic plan uses the indexes under `served by`, scans no table and sorts no messages."""
    check_plan(live, file_of(stem))


def test_tables_and_indexes_say_what_they_serve(live):
    """Every table and index has a comment, and each file that an index's comment names also names the index."""
    check_comments(live, {stem: file_of(stem) for stem in TEXTS})


# 9. Every constraint has an error, and check_schema needs the whole schema.


def check_errors(live, constraints=CONSTRAINTS, conflicts=CONFLICTS, behind=STALE_COUNTERS):
    """Raise unless each constraint and unique index maps to one error, and a CHECK to its column's parameter."""
    unique = {name for name, (_, is_unique) in live.indexes.items() if is_unique}
    assert sorted([*constraints, *conflicts, *behind, FOREIGN_KEY]) == sorted(live.constraints.keys() | unique)
    for name, (parameter, _) in constraints.items():
        assert live.constraints[name][0] == [parameter]


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


def test_the_foreign_key_is_mapped():
    """A foreign key violation, which only a race with a deletion causes, means a missing conversation."""
    assert isinstance(map_driver_error(asyncpg.ForeignKeyViolationError("")), ConversationNotFoundError)


def test_the_schema_check_needs_the_schema(live):
    """check_schema needs exactly the columns, constraints and indexes that the migrations create."""
    check_needed(live)


# 10. No statement reaches another user's rows. Style rules.


def check_isolation(live, file):
    """Raise unless every table reference has `user_id = $1` and every inserted row has `$1` as its user."""
    is_on_users_data = any(getattr(node, "schemaname", None) == "chatdb" for node in file.nodes)
    assert not is_on_users_data or file.parameters[0].name == "user_id"
    assert isolation_gaps(file) == []


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
        (check_nullability, "append_message", "alter content drop not null"),
        (check_nullability, "list_messages", "alter key set not null"),
        (check_plan, "get_history", "drop constraint pk_messages"),
        (check_plan, "append_message_keyed", "add constraint uq_messages_new unique (user_id, conversation_id, key)"),
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
        (check_needed, None, "drop constraint pk_messages"),
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
PAGE = "costs nothing there\nlimit $4"
NONE = f"select {', '.join(['null'] * 9)} from chatdb.conversations where user_id = $1 and id = $2 union all"
FIND = "import_conversations_find"


@pytest.mark.parametrize(
    ("check", "stem", "old", "new"),
    [
        (check_prepares, "get_history", "where user_id", "where owner_id"),
        (check_parameters, "get_message", "$2 conversation_id int8\n-- $3 seq", "$3 seq int8\n-- $2 conversation_id"),
        (check_parameters, "append_message", "-- $5 payload text", "-- $5 metadata text"),
        (check_parameters, "append_message", "$5::text::json, $6", "$6::text::json, $5"),
        (check_parameters, "update_conversation", "then $4 else", "then $6 else"),
        (check_parameters, "append_messages", "$5::text[], $6", "$6::text[], $5"),
        (check_parameters, "get_message", "seq int8", "seq int4"),
        (check_parameters, "get_message", "-- $3 seq int8\n", ""),
        (check_columns, "get_history", "payload::text as payload", "payload::text as body"),
        (check_columns, "get_history", " without user_id and conversation_id", ""),
        (
            check_columns,
            "list_messages",
            " without user_id and conversation_id",
            " without conversation_id and user_id",
        ),
        (check_columns, "list_messages", " without user_id and conversation_id", " without user_id"),
        (check_columns, "list_messages", "id, seq, role", "id, user_id, seq, role"),
        (check_given, "get_history", " without user_id and", " without seq and"),
        (check_given, "get_history", " without user_id and conversation_id", " without conversation_id and user_id"),
        (check_given, "get_history", "conversation_id = $2 and seq", "conversation_id >= $2 and seq"),
        (check_given, "get_history", "conversation_id = $2 and seq", "conversation_id = $3 and seq"),
        (check_given, "list_messages", "conversation_id = $2 and seq", "seq"),
        (check_given, "list_messages", "conversation_id = $2 and seq", "(conversation_id = $2 or true) and seq"),
        (check_columns, "get_conversation", "key, title", "title, key"),
        (check_columns, "get_conversation", " last_seq,", ""),
        (check_columns, "get_conversation", "metadata::text as metadata", "metadata"),
        (check_columns, "get_conversation", "one Conversation", "one Message"),
        (check_nullability, "get_conversation", "last_seq,", "nullif(last_seq, 0) as last_seq,"),
        (check_nullability, FIND, "inner join chatdb.conversations", "left join chatdb.conversations"),
        (check_nullability, FIND, "left join lateral", "inner join lateral"),
        (check_nullability, "get_history", THEN, ""),
        (
            check_nullability,
            "append_message_keyed",
            ", or an existence row: the key is stored with another body",
            "",
        ),
        (check_nullability, "get_conversation", "one Conversation", f"one Conversation{HERE}"),
        (check_existence, "get_history", THEN, HERE),
        (check_existence, "get_history", THEN, ""),
        (check_existence, "get_history", "many Message", "one Message"),
        (check_existence, "get_history", PAGE, "costs nothing there"),
        (check_existence, "get_history", PAGE, "costs nothing there\nlimit 1"),
        (check_existence, "get_history", PAGE, "costs nothing there\nlimit $3"),
        (check_existence, "get_history", PAGE, "costs nothing there\norder by seq desc nulls last\nlimit $4"),
        (check_existence, "get_history", PAGE, "costs nothing there\noffset 1\nlimit $4"),
        (check_existence, "list_messages", "    limit $4\n)", ")"),
        (check_existence, "list_messages", "union all", "union"),
        (check_existence, "list_messages", "union all", "except all"),
        (check_existence, "list_messages", "\n(\n", f"\n{NONE}\n(\n"),
        (check_existence, "list_messages", "\nwhere user_id = $1 and id = $2", ""),
        (check_existence, "get_message", ", or an existence row: if there is no such message", THEN),
        (check_existence, "get_message", "    limit 1 -- noqa: AM09\n", ""),
        (check_existence, "get_message", "branch runs\nlimit 1", "branch runs"),
        (check_existence, "get_message", "branch runs\nlimit 1", "branch runs\nlimit 2"),
        (check_existence, "get_message_by_key", "    limit 1 -- noqa: AM09\n", ""),
        (check_existence, "update_message", " and not exists (select from message)", ""),
        (check_existence, "update_message", "and not exists (select from message)", "and exists (select from message)"),
        (check_existence, "update_message", "(select from message)", "(select from message where seq = 1)"),
        (check_existence, "update_message", "from message\nunion", "from message\nwhere seq = 1\nunion"),
        (check_existence, "append_message_keyed", "where not exists (select from same)", "where true"),
        (check_existence, "append_message_keyed", "(select from same)", "(select from message)"),
        (check_existence, "append_messages_keyed", "<>", "="),
        (check_existence, "append_messages_keyed", "same) = pg_catalog.card", "same) >= pg_catalog.card"),
        (check_plan, "get_history", "by pk_messages", "by pk_conversations"),
        (check_plan, "delete_conversation", "by pk_conversations, pk_messages", "by pk_messages"),
        (check_plan, "get_conversation_by_key", "-- served by uq_conversations_user_id_key\n", ""),
        (check_plan, "export_conversations_messages", "where user_id = $1", "where user_id || '' = $1"),
        (check_plan, "get_history", "order by seq desc", "order by created_at desc"),
        (check_plan, "list_conversations", "order by active_on desc, ", "order by "),
        (check_style, "get_conversation", "id, user_id, key, title", "*, title"),
        (check_style, "update_conversation", "returning id", "returning *, id"),
        (check_style, "create_conversation", "returning id, user_id, key", "-- "),
        (check_style, "get_conversation", "select", "SELECT"),
        (check_style, "get_conversation", "where", "; select 1 where"),
        (check_isolation, "get_conversation", "chatdb.conversations", "conversations"),
        (check_isolation, "get_conversation", "chatdb.conversations", "public.conversations"),
        (check_isolation, "get_conversation", "where user_id", ", chatdb.messages as m where conversations.user_id"),
        (check_isolation, "get_conversation", "last_seq", "(select max(seq) from chatdb.messages) as last_seq"),
        (check_isolation, "get_conversation", "and id", "or id"),
        (check_isolation, "get_conversation", "$1 user_id", "$1 owner"),
        (check_isolation, FIND, "user_id = $1 and conversation_id = f.id", "conversation_id = f.id"),
        (check_isolation, "append_message_keyed", "on conflict (user_id, ", "on conflict ("),
        (check_isolation, "append_message_keyed", "set key = excluded.key", "set user_id = $8"),
        (check_isolation, "append_message", "conversation as (", "conversation (id, user_id) as ("),
        (check_isolation, "append_message", "select user_id, id, last_seq, $3", "select $3, id, last_seq, $3"),
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
        (
            check_isolation,
            "append_message_keyed",
            "from conversation, message",
            "from conversation, chatdb.messages as message",
        ),
        (
            check_isolation,
            "append_message_keyed",
            "same as (",
            "same as (with message as (select * from conversation) ",
        ),
        (check_isolation, "update_conversation", "set title", "set user_id = $4, title"),
    ],
)
def test_a_changed_file_is_found(live, check, stem, old, new):
    """Every change to a file is found."""
    assert old in TEXTS[stem]
    file = parse(TEXTS[stem].replace(old, new, 1))
    with pytest.raises(AssertionError), live.connection.transaction(force_rollback=True):
        check(live, file)


@pytest.mark.parametrize(("old", "new"), [("-- Returns", "Returns"), ("-- returns", "-- gives"), ("seq int8", "seq")])
def test_a_header_out_of_form_is_found(old, new):
    """A header with wrong syntax is found."""
    with pytest.raises(AssertionError):
        parse(TEXTS["get_message"].replace(old, new, 1))


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
    ],
)
def test_rows_read_in_another_way_are_found(stem, old, new):
    """A header with the wrong number of rows, or with an existence row that the function does not handle, is found."""
    file = parse(TEXTS[stem].replace(old, new, 1))
    with pytest.raises(AssertionError):
        check_verbs(file, module_of(stem))


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


@FILLED
def test_a_changed_filling_is_found(record, given):
    """Swapped columns or fields, an undecoded value and an unvalidated row are found."""
    mutants = list(map(decode.filler, misfilled(decode.filler_source(record, given))))
    fields = len(record.model_fields)
    assert len(mutants) == 3 * (fields - 1) - len(given)
    columns = [name for name in record.model_fields if name not in given]
    mutants.append(lambda rows, *args: [dict(zip([*given, *columns], [*args, *row], strict=True)) for row in rows])
    for mutant in mutants:
        with pytest.raises((AssertionError, TypeError, ValueError)):  # a mutant may also crash
            check_filled(record, given, mutant)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_unfilled(record, given, lambda rows, args: [record.model_construct(**row) for row in rows])


def test_a_changed_map_or_limit_is_found(live):
    """An added, missing or changed role, limit, error or schema part is found."""
    for check, changes in [
        (check_limits, [{"role": Literal[Role, "critic"]}]),
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


@pytest.mark.parametrize("module", [chatdb.conversations, chatdb.messages, importer])
async def test_swapped_arguments_are_found(monkeypatch, module):
    """Every swap of two adjacent arguments is found."""
    mutants = list(swaps(module))
    assert mutants
    for name, mutant in mutants:
        # a mutant may also crash
        found = (AssertionError, AttributeError, ConfigurationError)
        with monkeypatch.context() as patch, pytest.raises(found):  # noqa: PT012 - any call may raise
            patch.setattr(module, name, mutant)
            for function, stem, given in CALLS:
                if module_of(function) is module:
                    await check_call(function, stem, given)
            if module is importer:
                await check_import()
                await check_import(has_row_security=True)
