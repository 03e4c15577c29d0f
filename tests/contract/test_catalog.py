"""
Everything that knows the tables agrees with the catalog of a migrated database.

Each check is a plain function that raises AssertionError. The tests at the end add a column, an index, a constraint or
a table, and fail unless exactly the checks that need it find it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

import psycopg
import pytest

from chatdb._core.query import data_folder
from chatdb.admin.adopt import adoption
from chatdb.admin.check.findings import MISSING, check_schema_objects
from chatdb.admin.row_security import TABLES
from chatdb.formats.items import SourceConversation, SourceMessage
from chatdb.records import Conversation, Message, SchemaPart
from chatdb.schema import CHECK_SCHEMA_SQL, EXPECTED_SCHEMA, differences
from chatdb.testing.databases import Databases
from chatdb.transfer import importer, jsonlines
from tests.docs import schema_page
from tests.support.catalog import Live
from tests.support.paths import ROOT
from tests.support.recorder import stored
from tests.support.sqlfiles import TEXTS, file_of

DERIVED = {"conversations": {"active_on", "edits", "head_last_seq", "head_is_newest"}, "messages": set[str]()}
"""The columns that no record has: the day of updated_at, a part of the revision, and what says if head_seq counts."""

PARTS = {"conversation_id", "seq", "start", "length", "bytes", "last_start", "last_start_bytes", "flushed_at"}
PARTS |= {"user_id", "content"}
"""The columns of message_parts, a table that no record has, and no export: a message is read with its text so far."""

OMITTED = {"id", "conversation_id", "user_id"}
"""The columns that identify rows of this database."""

ADOPTED = {
    "conversations": {"id", "user_id", "last_seq", "created_at", "updated_at"},
    "messages": {"id", "conversation_id", "user_id", "seq", "role", "content", "created_at"},
}
"""The columns that `chatdb adopt` fills. Nothing in an older system's tables corresponds to the others."""

RECORDS = {"conversations": Conversation, "messages": Message}
SOURCES = {"conversations": SourceConversation, "messages": SourceMessage}
GRANT = re.compile(r"^grant (?P<privileges>[\w, ]+) on (?P<tables>chatdb\.\w+(?:, chatdb\.\w+)*) to", re.M)


@pytest.fixture(scope="module")
def live(databases: Databases, template: str) -> Iterator[Live]:
    """Yield a migrated database."""
    with (
        databases.new(template) as dsn,
        psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as connection,
    ):
        yield Live(connection)


def columns_of(live: Live) -> dict[str, set[str]]:
    """Return the columns of each of chatdb's tables."""
    return {table: {*columns} for (schema, table), columns in live.columns.items() if schema == "chatdb"}


def tables_of_records(live: Live) -> dict[str, set[str]]:
    """Return the columns of each table that has a record; raise if another one is not known."""
    tables = columns_of(live)
    assert tables.pop("message_parts") == PARTS
    assert tables.keys() == RECORDS.keys()
    return tables


def inserted(name: str) -> set[str]:
    """Return the columns that the only INSERT of a file writes."""
    [columns] = re.findall(r"insert into chatdb\.\w+ \(([^)]*)\)", _text(name))
    return {column.strip() for column in columns.split(",")}


def _text(name: str) -> str:
    """Return the text of the file with this name, which may lack the number of a step."""
    [path] = [path for path in data_folder("sql").rglob("*.sql") if re.sub(r"^\d+_", "", path.stem) == name]
    return path.read_text(encoding="utf-8")


def check_expected_schema(live: Live) -> None:
    """Raise unless `check_schema` needs each column, constraint and index."""
    tables = columns_of(live)
    names = {name for columns in tables.values() for name in columns} | live.constraints.keys() | live.indexes.keys()
    assert EXPECTED_SCHEMA.keys() == tables.keys()
    assert {name for parts in EXPECTED_SCHEMA.values() for name in parts} == names
    for table, columns in tables.items():
        assert columns <= EXPECTED_SCHEMA[table].keys()
        assert {index for index, (of, _) in live.indexes.items() if of == table} <= EXPECTED_SCHEMA[table].keys()


def check_records(live: Live) -> None:
    """Raise unless the records have each column."""
    for table, columns in tables_of_records(live).items():
        fields = {*RECORDS[table].model_fields} - {"revision"}
        assert fields == columns - DERIVED[table]


def check_export(live: Live) -> None:
    """Raise unless an exported line has each column that identifies no row of this database."""
    tables = tables_of_records(live)
    [conversation], [message] = (stored(record) for record in RECORDS.values())
    lines = {
        "conversations": jsonlines.conversation_line(Conversation(**conversation)),
        "messages": jsonlines.message_line(Message(**message)),
    }
    for table, line in lines.items():
        assert tables.keys() == lines.keys()
        missing = tables[table] - DERIVED[table] - json.loads(line).keys()
        assert missing <= OMITTED


def check_import(live: Live) -> None:
    """Raise unless an import takes each exported column from a line and writes it."""
    tables = tables_of_records(live)
    assert tables.keys() == SOURCES.keys()
    taken = {"conversations": jsonlines._CONVERSATION, "messages": jsonlines._MESSAGE}
    statements = {"conversations": "import_conversations", "messages": "import_conversations_messages"}
    for table, columns in tables.items():
        needed = columns - DERIVED[table] - OMITTED
        assert {*SOURCES[table]._fields} - {"has_ids", "is_archived", "is_pinned", "beginnings"} == needed
        assert {*taken[table]} == needed
        assert inserted(statements[table]) - DERIVED[table] - {"conversation_id", "user_id"} == needed
    assert {*importer._COLUMNS} == tables["messages"] - {"id"}


def check_protect(live: Live) -> None:
    """Raise unless `chatdb protect` protects each table."""
    assert {*TABLES} == columns_of(live).keys()


def check_grants(live: Live) -> None:
    """Raise unless the documented grants are on all tables."""
    tables = {f"chatdb.{table}" for table in columns_of(live)}
    found = [*GRANT.finditer((ROOT / "docs" / "explanation" / "security.md").read_text(encoding="utf-8"))]
    assert "select, insert, update, delete" in [grant["privileges"] for grant in found]
    for grant in found:
        assert {*grant["tables"].split(", ")} == tables


def check_adopt(live: Live) -> None:
    """Raise unless `chatdb adopt` fills each column that needs a value, from views that have it."""
    tables = tables_of_records(live)
    optional = live.rows(
        """
        select c.relname, a.attname
        from pg_class as c join pg_attribute as a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
        where c.relnamespace = 'chatdb'::regnamespace and c.relkind = 'r'
            and (not a.attnotnull or a.atthasdef or a.attidentity <> '')
        """
    )
    assert ADOPTED.keys() == tables.keys() == adoption._TABLES.keys()
    for table, columns in tables.items():
        filled = inserted(f"add_{table}")
        assert filled == ADOPTED[table]
        assert columns - filled <= {column for of, column in optional if of == table}
        assert columns - filled == NOT_ADOPTED[table]
        view = {*re.findall(r"(?:as|^ {4}) ?(\w+)(?:,|\n)", _text(f"view_{table}"), re.M)}
        stub = {*re.findall(r"^ {4}(\w+)", _text(f"stub_{table}"), re.M)}
        assert view == stub == adoption._TABLES[table].keys() == filled - {"seq", "last_seq"}


NOT_ADOPTED = {
    "conversations": {
        "key",
        "title",
        "metadata",
        "active_on",
        "edits",
        "archived_at",
        "pinned_at",
        "head_seq",
        "head_last_seq",
        "head_is_newest",
    },
    "messages": {"payload", "metadata", "token_count", "key", "parent_seq", "state"},
}
"""The columns that keep their default in adopted rows."""


def check_page(live: Live) -> None:
    """Raise unless the schema page has each table, column, constraint and index."""
    with live.connection.transaction(force_rollback=True):
        live.connection.execute("set local search_path = ''")
        page = schema_page.page(live.connection)
    assert (ROOT / "docs" / "reference" / "schema.md").read_text(encoding="utf-8") == page
    for name in [*columns_of(live), *live.indexes, *live.constraints]:
        assert name in page


def check_served(live: Live) -> None:
    """Raise unless each index serves a statement, and is named in the header of its file; one is an operator's."""
    assert live.indexes.keys() | {"ix_messages_search"} == {index for stem in TEXTS for index in file_of(stem).indexes}


CHECKS: dict[Callable[[Live], None], set[str]] = {
    check_expected_schema: {"column", "index", "constraint", "table"},
    check_records: {"column", "table"},
    check_export: {"column", "table"},
    check_import: {"column", "table"},
    check_protect: {"table"},
    check_grants: {"table"},
    check_adopt: {"column", "table"},
    check_page: {"column", "index", "constraint", "table"},
    check_served: {"index"},
}
"""The checks, each with the kinds of objects that it must find if they are new."""

every_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)


@every_check
def test_the_catalog_is_known(live: Live, check: Callable[[Live], None]) -> None:
    """What knows the tables knows each column, index, constraint and table."""
    check(live)


def parts_of(live: Live) -> list[SchemaPart]:
    """Return what `chatdb check` reads from the catalog."""
    return [SchemaPart(relation=row[0], name=row[1], definition=row[2]) for row in live.rows(CHECK_SCHEMA_SQL)]


def test_the_check_restores_what_is_missing(live: Live) -> None:
    """`chatdb check` finds each dropped column, constraint and index, and its statements restore all of them."""
    served = {index: ["a statement"] for index in live.indexes}
    drops = {
        **{(table, name): f"column {name}" for table, names in columns_of(live).items() for name in names},
        **{(_table(name), name): f"constraint {name}" for name in live.constraints},
        **{(table, name): "" for name, (table, _) in live.indexes.items() if name not in live.constraints},
    }
    assert {*drops} == {(table, name) for table, names in EXPECTED_SCHEMA.items() for name in names}
    for (table, name), what in drops.items():
        with live.connection.transaction(force_rollback=True):
            drop = f"alter table chatdb.{table} drop {what} cascade" if what else f"drop index chatdb.{name}"
            live.connection.execute(drop)
            found = list(check_schema_objects(parts_of(live), served=served, unapplied=False))
            missing = [each for each in found if each.state == MISSING]
            assert any(name in each.what.replace(".", " ").split() for each in missing), name
            for each in missing:
                live.connection.execute(each.hint.replace(" CONCURRENTLY", "").encode())
            assert differences(parts_of(live)) == []


def _table(constraint: str) -> str:
    return next(table for table in EXPECTED_SCHEMA if constraint in EXPECTED_SCHEMA[table])


@pytest.mark.parametrize(
    ("kind", "statement"),
    [
        ("column", "alter table chatdb.conversations add starred_at timestamptz"),
        ("column", "alter table chatdb.messages add language text"),
        ("column", "alter table chatdb.message_parts add language text"),
        ("column", "alter table chatdb.messages add rating bigint not null default 0"),
        ("index", "create index ix_messages_role on chatdb.messages (user_id, role)"),
        ("index", "create unique index uq_conversations_title on chatdb.conversations (user_id, title)"),
        ("constraint", "alter table chatdb.conversations add constraint ck_conversations_edits check (edits >= 0)"),
        ("index", "create index ix_message_parts_flushed_at on chatdb.message_parts (flushed_at)"),
        ("constraint", "alter table chatdb.message_parts add constraint ck_message_parts_start check (start >= -1)"),
        ("table", "create table chatdb.parts (user_id text, text text)"),
    ],
)
@every_check
def test_a_new_object_is_found(live: Live, check: Callable[[Live], None], kind: str, statement: str) -> None:
    """A new column, index, constraint or table is found by each check that needs it, and by no other."""
    with live.connection.transaction(force_rollback=True):
        live.connection.execute(statement.encode())
        if kind in CHECKS[check]:
            with pytest.raises((AssertionError, KeyError)):
                check(Live(live.connection))
        else:
            check(Live(live.connection))


@pytest.mark.parametrize(
    ("check", "statement"),
    [
        (check_expected_schema, "drop index chatdb.ix_conversations_user_id_pinned_at"),
        (check_served, "drop index chatdb.ix_conversations_user_id_created_at_id"),
        (check_records, "alter table chatdb.conversations drop column pinned_at"),
        (check_export, "alter table chatdb.messages rename column token_count to tokens"),
        (check_import, "alter table chatdb.conversations drop column archived_at"),
        (check_adopt, "alter table chatdb.conversations drop column edits"),
        (check_adopt, "alter table chatdb.messages alter payload set not null"),
        (check_page, "comment on column chatdb.conversations.edits is 'another text'"),
        (check_export, "alter table chatdb.messages rename column state to status"),
        (check_adopt, "alter table chatdb.messages drop column state"),
        (check_records, "alter table chatdb.message_parts drop column bytes"),
        (check_expected_schema, "drop table chatdb.message_parts"),
        (check_protect, "drop table chatdb.message_parts"),
        (check_grants, "drop table chatdb.message_parts"),
        (check_protect, "drop table chatdb.messages cascade"),
        (check_grants, "drop table chatdb.messages cascade"),
    ],
)
def test_a_missing_object_is_found(live: Live, check: Callable[[Live], None], statement: str) -> None:
    """What knows more than the catalog has is found."""
    with live.connection.transaction(force_rollback=True):
        live.connection.execute(statement.encode())
        with pytest.raises(AssertionError):
            check(Live(live.connection))
