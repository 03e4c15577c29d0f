"""No name in chatdb's statements resolves to a schema that other roles can write to."""

from __future__ import annotations

import ast as python
import re
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import psycopg
import pytest
import sqlparse

import chatdb
from chatdb import watching
from chatdb._core import validate
from chatdb._core.dsn import connect_arguments
from chatdb._core.query import Query
from chatdb.admin.adopt import adopt, runner
from chatdb.admin.check.findings import DIFFERENT
from chatdb.admin.check.inspection import inspect
from chatdb.admin.locality import plan_repack
from chatdb.admin.migrate import (
    apply_migrations,
    last_migrations,
    migration_files,
    missing_migrations,
    rollback_migrations,
)
from chatdb.admin.row_security import protect_tables, protection_statements
from chatdb.admin.search_index import create_search_index, drop_search_index, estimate_search_index, search_index_status
from chatdb.admin.users_link import link_users, unlink_users
from chatdb.formats.items import SourceConversation, SourceMessage
from chatdb.testing.databases import Databases
from chatdb.transfer import tables
from chatdb.transfer.exporter import count_user, export_conversations
from chatdb.transfer.importer import (
    _import_conversations_messages,
    _import_conversations_parents,
    import_conversations,
)
from tests.support import recorder
from tests.support.databases import execute
from tests.support.names import (
    FILES,
    MODULES,
    PACKAGE,
    PLACEHOLDER,
    READS_ORIGINALS,
    UnparsedError,
    called,
    gaps,
    operators,
    strings,
)
from tests.support.planted import plant, planted_calls, planter
from tests.support.sqlfiles import TEXTS, file_of

DEFAULT, PG_CATALOG_LAST = '"$user", public', "public, pg_catalog"
ASYNCPGS = {"array_agg", "current_setting", "set_config"}
"""The functions asyncpg calls to look up a type. No chatdb statement may trigger this lookup."""

# --- the names in the sources --------------------------------------------------------------------------------------


def gaps_of(path: Path, text: str) -> list[str]:
    """Return the unqualified names in a text from this file."""
    return gaps(text, schemas=frozenset({"public"} if path.stem in READS_ORIGINALS else ()))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_name_in_a_file_has_its_schema(path: Path) -> None:
    """Every function and table has its schema; otherwise one in `public` with closer types could be called."""
    text = path.read_text(encoding="utf-8")
    assert gaps_of(path, text) == []
    for found in re.finditer(r"(?<!operator\()(?<!')\bpg_catalog\.(?=\w+(\())?", text):
        mutated = text[: found.start()] + text[found.end() :]
        is_known_type = re.match(r"(?:name|oid|regclass|text)\b(?!\()", text[found.end() :])
        assert is_known_type or gaps_of(path, mutated), mutated
    for found in re.finditer(r"operator\(pg_catalog\.", text):
        assert gaps_of(path, f"{text[: found.start()]}operator(public.{text[found.end() :]}")


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_name_in_a_module_has_its_schema(module: Path) -> None:
    """The same holds for the statements in the Python modules."""
    for text in strings(module):
        assert gaps(text) == [], text
        if "pg_catalog.now(" in text:
            assert gaps(text.replace("pg_catalog.now(", "now("))


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("select lower('A')", ["function lower"]),
        ("select public.lower('A')", ["function public.lower"]),
        ("select unnest('{1}'::int8[])", ["function unnest"]),
        ("select null::money", ["type money"]),
        ("select null::public.text", ["type public.text"]),
        ("select pg_catalog.count(*) from (values (null::public.text)) as v", ["type public.text"]),
        ("select 1 operator(public.=) 1", ["operator public.="]),
        ("select 1 where 1 operator(public.=) any (select 1)", ["operator public.="]),
        ("select 'a' collate public.\"C\"", ["collation public.C"]),
        ("select 'a' collate \"de\"", ["collation de"]),
        ("select from conversations", ["table conversations"]),
        ("select from public.conversations", ["table public.conversations"]),
        ("create table chatdb.t (a public.text default now())", ["type public.text", "function now"]),
        ("do $$ begin if now() > null then perform lower('A'); end if; end $$", ["function now", "function lower"]),
        ("select pg_catalog.now(), null::text, 1 = 1, extract(year from null::date) from pg_catalog.pg_class", []),
    ],
)
def test_what_the_lint_finds(statement: str, found: list[str]) -> None:
    """Each name outside pg_catalog and chatdb is found."""
    assert gaps(statement) == found


def test_a_text_that_is_no_sql_fails(tmp_path: Path) -> None:
    """A string that looks like SQL but does not parse raises an error."""
    module = tmp_path / "module.py"
    module.write_text('STATEMENT = f"select {name} frm chatdb.t"\nOTHER = "select lower(\'A\') from {}"\nQUEUE = "x"')
    first, second = strings(module)
    with pytest.raises(UnparsedError):
        gaps(first)
    assert gaps(second) == ["function lower"]


def test_the_connections_of_modules() -> None:
    """Only these modules open a psycopg connection with the role's own search_path."""
    makers: dict[str, set[str]] = {"_Connection.connect": set(), "open_connection": set(), "connected": set()}
    for path in MODULES:
        for node in python.walk(python.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, python.Call):
                maker = python.unparse(node.func)
                assert maker != "psycopg.connect", path
                if maker in makers:
                    makers[maker].add(str(path.relative_to(PACKAGE)))
    assert makers == {
        "_Connection.connect": {"admin/connection.py"},  # also, to query pg_stat_activity about a silent server
        # tables sets it for its transaction, testing prepares the session
        "open_connection": {"admin/connection.py", "testing/databases.py", "transfer/tables/__init__.py"},
        # to detect a pooler; to prepare the session; testing only reads and sets settings
        "connected": {
            "admin/connection.py",
            "admin/check/inspection.py",
            "admin/migrate.py",
            "admin/retention.py",
            "testing/servers.py",
        },
    }


# --- the names that the server resolves ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted_template(server: str, databases: Databases) -> Iterator[str]:
    """Yield the name of an empty database in which an unprivileged role planted objects in `public`."""
    texts = [path.read_text(encoding="utf-8") for path in FILES] + [text for path in MODULES for text in strings(path)]
    with planter(server) as role, databases.new() as dsn:
        plant(
            dsn,
            role,
            functions={found for text in texts for found in called(text)} | ASYNCPGS,
            operators={found for text in texts for found in operators(text)},
        )
        yield urlsplit(dsn).path[1:]


@pytest.fixture
def planted(server: str, databases: Databases, planted_template: str) -> Iterator[str]:
    """Yield the DSN of such a database for one test."""
    with databases.new(planted_template) as dsn:
        execute(server, f"alter database {urlsplit(dsn).path[1:]} set track_functions = 'pl'")
        yield dsn


def resolved_elsewhere(connection: psycopg.Connection, statement: str, parameters: str = "") -> list[str]:
    """
    Return the functions, operators, types and collations outside pg_catalog that a statement uses.

    The statement becomes the body of a SQL function, whose dependencies list them.
    """
    with connection.transaction(force_rollback=True):
        body = f"create function chatdb.probe({parameters}) returns void begin atomic\n{statement}\n; end"
        connection.execute(body.encode())
        connection.execute("set local search_path to pg_catalog")
        rows = connection.execute(
            """
            select distinct pg_catalog.pg_describe_object(d.refclassid, d.refobjid, 0)
            from pg_catalog.pg_depend as d
            where d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass
              and d.objid = 'chatdb.probe'::pg_catalog.regproc
              and d.refclassid in (
                  'pg_catalog.pg_proc'::pg_catalog.regclass, 'pg_catalog.pg_operator'::pg_catalog.regclass,
                  'pg_catalog.pg_type'::pg_catalog.regclass, 'pg_catalog.pg_cast'::pg_catalog.regclass,
                  'pg_catalog.pg_collation'::pg_catalog.regclass
              )
            order by 1
            """
        ).fetchall()
    return [name for (name,) in rows]


def probed(connection: psycopg.Connection, stem: str, text: str) -> list[str]:
    """Return the names that a file's text resolves outside pg_catalog, with the parameter types of its header."""
    _, _, body = text.partition("\n\n")
    return resolved_elsewhere(connection, body, ", ".join(parameter.type for parameter in file_of(stem).parameters))


@pytest.mark.chaos
@pytest.mark.owner
def test_the_server_resolves_no_planted_name(planted: str) -> None:
    """No statement that runs on a service's search_path uses a function, operator or type from `public`."""
    apply_migrations(planted)
    with psycopg.connect(planted, autocommit=True) as connection:
        for stem, text in TEXTS.items():
            assert probed(connection, stem, text) == [], stem
        for module in ("pool.py", "transfer/importer.py"):
            for text in strings(PACKAGE / module):
                for part in sqlparse.split(text):
                    if part.startswith("select"):
                        probe = part.rstrip("; ").replace(PLACEHOLDER, "null")
                        types = ["text", "text[]"][: len({*re.findall(r"\$\d", part)})]
                        assert resolved_elsewhere(connection, probe, ", ".join(types)) == [], part
        for stem, old, new in (
            ("check_schema", "a.attcollation not in (0, 100)", "a.attcollation <> 0"),
            ("check_schema", "quote_ident(f.relname::text)", "quote_ident(f.relname)"),
            ("append_messages", "pg_catalog.cardinality($4::text[])", "cardinality($4::varchar[])"),
            ("get_history", "seq < $3", "seq < $3::oid::int8 / 2.0"),
            ("list_conversations", "user_id = $1", "user_id = $1::varchar"),
            ("get_history", "user_id = $1", "user_id operator(public.=) $1"),
            ("delete_user", "user_id = $1", "user_id = any(array[$1]::varchar[])"),
        ):
            pinned = old.replace("quote_ident", "pg_catalog.quote_ident")
            mutated = TEXTS[stem].replace(pinned, new.replace("quote_ident", "pg_catalog.quote_ident"))
            mutated = mutated.replace("pg_catalog.quote_ident(f.relname)", "quote_ident(f.relname)")
            assert mutated != TEXTS[stem], old
            assert probed(connection, stem, mutated), new
        connection.execute("set search_path to pg_catalog")
        at_rest = connection.execute(
            """
            select pg_catalog.pg_describe_object(d.classid, d.objid, d.objsubid),
                pg_catalog.pg_describe_object(d.refclassid, d.refobjid, d.refobjsubid)
            from pg_catalog.pg_depend as d
            inner join pg_catalog.pg_proc as p on p.oid operator(pg_catalog.=) d.refobjid
            where p.pronamespace = 'public'::pg_catalog.regnamespace
              and d.classid not in (
                  'pg_catalog.pg_operator'::pg_catalog.regclass, 'pg_catalog.pg_cast'::pg_catalog.regclass,
                  'pg_catalog.pg_constraint'::pg_catalog.regclass
              )
            """
        ).fetchall()
        assert at_rest == []
    assert planted_calls(planted)[0] == 0


# --- the functions that run ---------------------------------------------------------------------------------------


def quietly(dsn: str, *statements: str) -> None:
    """Run a test's statements on a search_path without the planted objects."""
    execute(dsn, "set search_path to pg_catalog, pg_temp", *statements)


OLDER = (
    "create table public.conversations (id int primary key, user_id varchar, created_at timestamp, "
    "updated_at timestamp, note varchar)",
    "create table public.messages (id int primary key, conversation_id int, user_id varchar, role varchar, "
    "content varchar, created_at timestamp)",
    "insert into public.conversations select n, 'u', '2026-01-01', '2026-01-02', 'note' from generate_series(1, 4) n",
    "insert into public.messages select 10 + n, 1 + n / 4, 'u', 'user', 'hello', '2026-01-01' "
    "from generate_series(1, 9) n",
)
NEWER = (
    "insert into public.messages values (31, 1, 'u', 'user', 'early', '2025-01-01'), "
    "(32, 1, 'u', 'user', 'timeless', null), (33, 1, 'u', 'nobody', 'kept aside', '2026-01-01'), "
    "(34, 99, 'u', 'user', 'an orphan', '2026-01-01')",
    "insert into public.conversations values (5, '', '2026-01-01', '2026-01-02', null)",
    "delete from public.messages where id = 19",
    "delete from public.conversations where id = 4",
)
SAID = (
    """insert into public.agent_messages (session_id, message_data) values ('s', '{"role": "user", "content": "a"}')"""
)
FRAMEWORKS = (
    "create table public.agent_sessions (session_id varchar primary key, created_at timestamp default now(), "
    "updated_at timestamp default now())",
    "create table public.agent_messages (id serial primary key, session_id varchar, message_data text, "
    "created_at timestamp default now())",
    "create table public.history (id serial primary key, session_id uuid, message jsonb, created_at timestamptz)",
    "insert into public.agent_sessions values ('s')",
    SAID,
    "insert into public.history (session_id, message) values ('0190b1c0-0000-7000-8000-000000000001', "
    """'{"type": "human", "data": {"content": "a"}}')""",
)


def operators_work(dsn: str, ran: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call the functions behind the operator commands."""
    statement = runner._statement
    monkeypatch.setattr(runner, "_statement", lambda file: ran.add(f"adopt/{file}") or statement(file))
    assert missing_migrations(dsn)
    assert apply_migrations(dsn)
    assert apply_migrations(dsn) == []
    assert last_migrations(dsn)
    assert rollback_migrations(dsn, to="0002")
    quietly(dsn, *OLDER)
    apply_migrations(dsn)
    inspect(dsn)
    inspect(dsn, role="pg_read_all_data")
    adopt(dsn, dry_run=True)
    adopt(dsn)
    quietly(dsn, *NEWER)
    adopt(dsn)
    adopt(dsn, delete_gone=lambda _: True)
    for table in ("messages", "conversations"):
        quietly(dsn, f"alter table public.{table} rename to away")
        adopt(dsn, dry_run=True)
        quietly(dsn, f"alter table public.away rename to {table}")
    quietly(dsn, "drop table public.messages, public.conversations cascade")  # views of a session that just ends
    quietly(dsn, "create table public.users (id varchar primary key)")
    with suppress(chatdb.InvalidInputError):  # because the users do not exist
        link_users(dsn, table="users")
    quietly(dsn, "insert into public.users select distinct user_id from chatdb.conversations")
    link_users(dsn, table="users", dry_run=True)
    link_users(dsn, table="users")
    inspect(dsn)
    protect_tables(dsn)
    protection_statements(dsn)
    inspect(dsn)
    protect_tables(dsn, off=True)
    unlink_users(dsn)
    estimate_search_index(dsn)
    create_search_index(dsn)
    assert search_index_status(dsn).is_current
    inspect(dsn)
    drop_search_index(dsn)
    plan_repack(dsn)


async def services_work(dsn: str, ran: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call every function a service calls, on existing rows, then import and export."""
    rows = Query._rows

    async def _rows(query: Query[Any], *arguments: Any, **options: Any) -> Any:
        ran.add(query.name)
        return await rows(query, *arguments, **options)

    monkeypatch.setattr(Query, "_rows", _rows)
    connection = await asyncpg.connect(**connect_arguments(dsn))
    for function, _, given in recorder.CALLS:
        block = connection.transaction()
        await block.start()
        await connection.execute(
            "insert into chatdb.conversations (id, user_id, last_seq, key, metadata) "
            "values (6, 'ann', 12, 'c', '{}'), (7, 'ann', 0, 'k', '{}'); "
            "insert into chatdb.messages (user_id, conversation_id, seq, role, content, key, payload, created_at) "
            "select 'ann', 6, n, 'user', 'hello', case n when 9 then 'k' end, '[]', now() from generate_series(5, 12) n"
        )
        # a key stored with another body, and a search without its index
        with suppress(chatdb.ConflictError, chatdb.ConfigurationError):
            await recorder.call(function, connection, given)
        await block.rollback()
    await connection.close()
    async with chatdb.create_pool(dsn) as db:
        made = await chatdb.create_conversation(db, user_id="u", key="one")
        new = [chatdb.NewMessage(role="user", content=text, key=text) for text in "ab"]
        for _ in range(2):
            await chatdb.append_messages(db, user_id="u", conversation_id=made.id, messages=new)
        assert (await count_user(db, user_id="u")).conversations
        exported = [item async for item in export_conversations(db, user_id="u")]
        assert exported
        for count in (1, 1, 2):
            for arguments in ({"format": "openai-agents", "sessions": ["s"]}, {"format": "langchain"}):
                with closing(tables.read(dsn, **arguments)) as items:
                    await import_conversations(db, user_id="v", items=items)
            quietly(dsn, *[SAID] * count)
        row = (
            made.id,
            9,
            "user",
            "c",
            None,
            None,
            1,
            None,
            made.created_at,
            1,
            "aborted",
        )  # as with row-level security
        columns = [validate.as_text_array([value]) for value in row]
        for text in ("a", "b"):  # a later export
            message = SourceMessage(1, "user", text, None, None, None, "k", made.created_at, None, "aborted")
            head = SourceConversation("chatgpt:x", text, None, 1, made.created_at, made.created_at, has_ids=True)
            await import_conversations(db, user_id="v", items=[head, message._replace(content="a")])
            await import_conversations(db, user_id="v", items=[head, message._replace(content="ab")])
        listed = head._replace(key="messages::x", has_ids=False, beginnings=("y",))
        await import_conversations(db, user_id="v", items=[listed, message])
        await _import_conversations_messages.fetch_one(db, "u", *columns)
        await _import_conversations_parents.fetch_all(db, "u", columns[0], columns[1])
        await chatdb.Watcher(db)._look(db, [watching._Watch("u", made.id, 0)])


@pytest.mark.chaos
@pytest.mark.owner
@pytest.mark.parametrize("path", [DEFAULT, PG_CATALOG_LAST])
async def test_nothing_planted_is_called(planted: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    No command or service function run by a superuser calls an object that another role planted in `public`.

    If pg_catalog follows `public` on the search_path, this holds only for the commands, and `check` reports it.
    """
    ran: set[str] = set()
    quietly(planted, *FRAMEWORKS)
    name = urlsplit(planted).path[1:]
    execute(planted, f"alter database {name} set search_path = {path}")
    operators_work(planted, ran, monkeypatch)
    assert planted_calls(planted) == (0, [])
    assert {f"adopt/{path.stem}" for path in FILES if path.parent.name == "adopt"} - ran == set()
    (found, *_) = [each for each in inspect(planted) if each.what.startswith("search_path")] or [None]
    if path == PG_CATALOG_LAST:
        assert found is not None
        assert found.state == DIFFERENT
        with closing(tables.read(planted, format="openai-agents", sessions=["s"])) as items:
            assert list(items)
        assert planted_calls(planted) == (0, [])
    else:
        assert found is None
        await services_work(planted, ran, monkeypatch)
        assert set(TEXTS) - ran == set()
        assert planted_calls(planted) == (0, [])
    rollback_migrations(planted, to="0")
    assert planted_calls(planted) == (0, [])
    execute(planted, "select 'a'::varchar = 'b'::text")
    assert planted_calls(planted)[0] > 0, "the planted objects work"


@pytest.mark.chaos
@pytest.mark.owner
def test_the_migrations_alone_call_nothing_planted(planted: str) -> None:
    """The migrations, run as yoyo runs them, and writes to their tables call nothing planted."""
    for file in migration_files():
        for _ in range(2):
            execute(planted, *sqlparse.split(file.sql))
    execute(planted, "insert into chatdb.conversations (user_id, title, metadata) values ('u', 't', '{}')")
    for file in reversed(migration_files()):
        execute(planted, *sqlparse.split(file.rollback))
    assert planted_calls(planted) == (0, [])


def test_the_first_word_names_the_function() -> None:
    """OpenTelemetry's asyncpg instrumentation names each span after chatdb's function."""
    from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor

    from chatdb.messages import _get_history

    name = AsyncPGInstrumentor._leading_comment_remover.sub("", _get_history.sql).split()[0]
    assert name == "--chatdb.get_history"
