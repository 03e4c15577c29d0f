"""Names that could be taken from a schema that others write to: none is left in a statement of chatdb's."""

from __future__ import annotations

import ast as python
from pathlib import Path
from typing import Any

import pglast
import psycopg
import pytest
from pglast import ast, parse_sql

import chatdb
from chatdb._query import data_folder
from chatdb.inspection import inspect
from chatdb.link import link_users
from tests._sqlfiles import _walk
from tests.conftest import execute

PACKAGE = Path(chatdb.__file__).parent
MODULES = ("adopt", "direct", "inspection", "link", "ownership", "sources/tables", "transfer")
VERBS = ("select ", "with ", "insert ", "update ", "delete ")


def unqualified(sql: str) -> list[str]:
    """Return the functions that a text of SQL calls without their schema."""
    return [
        node.funcname[0].sval
        for statement in parse_sql(sql)
        for node in _walk(statement.stmt)
        if isinstance(node, ast.FuncCall)
        and len(node.funcname) == 1
        # PostgreSQL itself takes pg_catalog's for several arguments, and only without the schema
        and not (node.funcname[0].sval == "unnest" and len(node.args) > 1)
    ]


def strings(module: Path) -> list[str]:
    """Return the SQL in a module's texts, with a name or a parameter for what is filled in."""
    found: list[str] = []
    tree = python.parse(module.read_text(encoding="utf-8"))
    inner = {id(part) for node in python.walk(tree) if isinstance(node, python.JoinedStr) for part in node.values}
    for node in python.walk(tree):
        if isinstance(node, python.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, python.Constant) else "x" for part in node.values)
        elif isinstance(node, python.Constant) and isinstance(node.value, str) and id(node) not in inner:
            text = node.value
        else:
            continue
        if text.strip().startswith(VERBS):
            for marked, plain in (("{table}", "x"), ("%%", "%"), ("%s", "null"), ("{}", "x")):
                text = text.replace(marked, plain)
            for name in ("sessions", "role", "privileges", "tables", "texts", "column", "oid"):
                text = text.replace(f"%({name})s", "null")
            found.append(text)
    return found


@pytest.mark.parametrize("path", sorted(data_folder("sql").rglob("*.sql")), ids=lambda path: path.stem)
def test_every_function_in_a_file_has_its_schema(path: Path) -> None:
    """A function without its schema could be one of `public` whose types fit better."""
    text = path.read_text(encoding="utf-8")
    assert unqualified(text) == []
    mutated = text.replace("pg_catalog.count(", "count(")
    assert bool(unqualified(mutated)) == (mutated != text)


@pytest.mark.parametrize("module", MODULES)
def test_every_function_in_a_module_has_its_schema(module: str) -> None:
    """So it is with the statements in the modules."""
    checked = 0
    for text in strings(PACKAGE / f"{module}.py"):
        try:
            assert unqualified(text) == [], text
        except pglast.parser.ParseError:
            continue
        checked += 1
    assert checked


PLANTED = """
do $do$
declare
    f record;
begin
    create sequence public.planted;
    grant all on sequence public.planted to public;
    for f in
        select p.proname, t.typname, p.prorettype::regtype as returns
        from pg_catalog.pg_proc as p, pg_catalog.pg_type as t
        where p.pronamespace = 'pg_catalog'::regnamespace and p.pronargs = 1 and p.prokind = 'f'
          and p.proname in ('quote_ident', 'cardinality', 'pg_get_expr', 'char_length', 'octet_length', 'to_regclass')
          and t.typname in ('name', 'varchar', '_text', '_int8', 'oid', 'regclass', 'json')
    loop
        execute format(
            'create or replace function public.%I(%s) returns %s language plpgsql as '
            '$$ begin perform nextval(''public.planted''); return null; end $$',
            f.proname, f.typname, f.returns
        );
    end loop;
end $do$
"""


def calls(dsn: str) -> Any:
    """Return whether a planted function was called."""
    with psycopg.connect(dsn) as connection:
        (row,) = connection.execute("select is_called from public.planted").fetchall()
        return row[0]


@pytest.mark.owner
async def test_no_planted_function_is_called(dsn: str) -> None:
    """Functions in `public` that fit the types better are called by no operator's command and no public function."""
    execute(dsn, PLANTED, "create table public.users (id text primary key)", "insert into public.users values ('u')")
    async with chatdb.create_pool(dsn) as db:
        await chatdb.check_schema(db)
        made = await chatdb.create_conversation(db, user_id="u")
        new = [chatdb.NewMessage(role="user", content=text, key=text) for text in "ab"]
        await chatdb.append_messages(db, user_id="u", conversation_id=made.id, messages=new)
        keyless = [chatdb.NewMessage(role="user", content="c")]
        await chatdb.append_messages(db, user_id="u", conversation_id=made.id, messages=keyless)
    link_users(dsn, table="public.users")
    assert inspect(dsn)
    assert not calls(dsn)
    execute(dsn, "select quote_ident('users'::name)")
    assert calls(dsn), "the plant works"


def test_the_first_word_names_the_function() -> None:
    """OpenTelemetry's asyncpg instrumentation names a span by the first word, once a leading comment is cut off."""
    from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor

    from chatdb.messages import _get_history

    name = AsyncPGInstrumentor._leading_comment_remover.sub("", _get_history.sql).split()[0]
    assert name == "--chatdb.get_history"
