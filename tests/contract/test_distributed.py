"""The statements for Citus: which ones need a function, and that these do what the others do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from random import Random
from typing import Any

import asyncpg
import pglast
import pytest
from pglast import ast, parse_sql
from pglast.enums import JoinType
from pydantic import BaseModel

import chatdb
from chatdb import NEW
from chatdb._core.asyncpg_private import FUNCTIONS
from chatdb._core.driver_errors import CONFLICTS, CONSTRAINTS, STALE_COUNTERS, map_driver_error
from chatdb._core.dsn import connect_arguments
from chatdb._core.query import data_folder
from chatdb.conversations import _create_conversation_keyed
from chatdb.messages import _append_message
from tests.support.databases import execute
from tests.support.distributed import MIGRATION, install_functions
from tests.support.sqlfiles import TEXTS, _walk, file_of

DISTRIBUTED = {path.stem: path.read_text(encoding="utf-8") for path in data_folder("sql").glob("distributed/*.sql")}
BULK = {"import_conversations", "import_conversations_messages"}
"""Imports in batches: on Citus an INSERT ... SELECT of five commands for some hundred rows."""
MUTABLE = {"statement_timestamp", "clock_timestamp", "transaction_timestamp", "now", "random", "nextval"}
BODIES = {
    body.partition("function chatdb.")[2].partition("(")[0]: body
    for body in re.findall(r"execute \$function\$(.*?)\$function\$;", MIGRATION.read_text(encoding="utf-8"), re.DOTALL)
}


def splits(statement: Any) -> set[str]:
    """Return why Citus would not send the statement to one node as it is, or would refuse it."""
    found: set[str] = set()
    inserts = [node for node in _walk(statement) if isinstance(node, ast.InsertStmt)]
    if any(node is not statement for node in inserts):
        found.add("an INSERT in a WITH query")
    if isinstance(statement, ast.InsertStmt):
        if statement.withClause:
            found.add("an INSERT under a WITH query")
        if statement.selectStmt and not statement.selectStmt.valuesLists:
            found.add("an INSERT of selected rows")
    for node in _walk(statement):
        if isinstance(node, ast.UpdateStmt):
            targets = node.targetList
        elif isinstance(node, ast.OnConflictClause):
            targets = node.targetList or ()
        else:
            targets = ()
            if isinstance(node, ast.JoinExpr) and node.jointype == JoinType.JOIN_LEFT and _is_tables(node):
                found.add("a table on the inner side of an outer join with no table")
        for target in targets:
            if target.name == "user_id":
                found.add("an update of the user")
            cases = [each for each in _walk(target) if isinstance(each, ast.CaseExpr | ast.CoalesceExpr)]
            if any(_calls(each) & MUTABLE for each in cases):
                found.add("a function of the time in an update's CASE")
    return found


def _calls(node: Any) -> set[str]:
    """Return the functions that an expression calls, without those in its subqueries."""
    if isinstance(node, ast.SubLink):
        return set()
    names = {node.funcname[-1].sval} if isinstance(node, ast.FuncCall) else set[str]()
    parts = node if isinstance(node, tuple) else [getattr(node, name) for name in node]
    return names.union(*(_calls(part) for part in parts if isinstance(part, tuple | ast.Node)))


def _is_tables(join: ast.JoinExpr) -> bool:
    """Return whether a join keeps each row of a function and adds those of a table."""
    return isinstance(join.larg, ast.RangeFunction) and getattr(join.rarg, "schemaname", None) == "chatdb"


@pytest.mark.parametrize("stem", sorted(TEXTS))
def test_what_citus_would_split_has_a_file(stem: str) -> None:
    """Each statement that Citus splits has a file in sql/distributed/, and no other statement has one."""
    reasons = splits(file_of(stem).statement)
    assert bool(reasons) == (stem in DISTRIBUTED or stem in BULK), reasons


@pytest.mark.parametrize("stem", sorted(DISTRIBUTED))
def test_the_file_itself_is_not_split(stem: str) -> None:
    """The files in sql/distributed/ keep the rules, and call at most one function, with the user first."""
    statement = parse_sql(DISTRIBUTED[stem])[0].stmt
    assert splits(statement) == set()
    called = re.findall(r"\bfrom chatdb\.(\w+)\(\s*\$1::text,", DISTRIBUTED[stem])
    assert len(called) == (stem != "poll_conversations")
    assert {*called} <= {*BODIES}


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("with c as (select 1) insert into t values (1)", "under a WITH"),
        ("with c as (insert into t values (1) returning a) select a from c", "in a WITH"),
        ("insert into t select a from unnest($1) as a", "of selected rows"),
        ("update t set user_id = $2 where user_id = $1", "update of the user"),
        ("update t set a = case when $1 then now() end", "function of the time"),
        ("update t set a = coalesce(a, pg_catalog.statement_timestamp())", "function of the time"),
        ("insert into t values (1) on conflict (a) do update set a = coalesce(t.a, now())", "function of the time"),
        ("select 1 from unnest($1) as u (a) left join chatdb.t on t.a = u.a", "outer join"),
    ],
)
def test_the_rules_can_fail(sql: str, reason: str) -> None:
    """Each broken rule is found."""
    assert any(reason in each for each in splits(parse_sql(sql)[0].stmt))


def test_the_rules_let_pass() -> None:
    """What Citus sends to one node has no reason."""
    for sql in (
        "insert into t (a) values ($1) on conflict (a) do update set b = excluded.b",
        "with c as (update t set a = greatest(a, now()) returning a) select a from c",
        "with clock as (select now() as now) update t set a = coalesce(a, (select now from clock))",
        "with c as (delete from t where a = $1 returning a) select a from c left join u on u.a = c.a",
    ):
        assert splits(parse_sql(sql)[0].stmt) == set(), sql


def _queries(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "PLpgSQL_expr" in node:
            yield node["PLpgSQL_expr"]["query"]
        for value in node.values():
            yield from _queries(value)
    elif isinstance(node, list):
        for value in node:
            yield from _queries(value)


@pytest.mark.parametrize("name", sorted(BODIES))
def test_the_functions(name: str) -> None:
    """
    Each function resolves names in pg_catalog only, and each of its statements reaches the rows of one user.

    On the user's node, the statements keep the same rules; move_user_v1 runs on the coordinator.
    """
    assert "set search_path to pg_catalog, pg_temp" in BODIES[name]
    assert re.search(rf"function chatdb\.{name}\(\s*p_user_id text,", BODIES[name])
    tree = json.loads(json.dumps(pglast.parse_plpgsql(BODIES[name])))
    statements = [
        sql for sql in _queries(tree) if "chatdb." in sql and re.match(r"\s*(?:select|with|insert|up|del)", sql, re.I)
    ]
    assert statements
    for sql in statements:
        assert re.search(r"\buser_id = p_(?:to_)?user_id\b|values \(\s*p_user_id,|select\s+p_to_user_id,", sql), sql
        [parsed] = parse_sql(re.sub(r"\bp_user_id\b", "$1", sql))
        if name != "move_user_v1":
            assert splits(parsed.stmt) == set(), sql


def test_the_names() -> None:
    """The migration makes the functions that the files call, and its rollback drops them."""
    assert set(BODIES) == FUNCTIONS
    rollback = MIGRATION.with_name(f"{MIGRATION.stem}.rollback.sql").read_text(encoding="utf-8")
    assert {*re.findall(r"drop function if exists chatdb\.(\w+);", rollback)} == FUNCTIONS


@pytest.mark.owner
async def test_the_same_parameters_and_columns(dsn: str) -> None:
    """A file in sql/distributed/ has the parameters and result columns of the statement that it replaces."""
    install_functions(dsn)
    connection = await asyncpg.connect(**connect_arguments(dsn))

    async def shape(text: str) -> tuple[list[str], list[tuple[str, str]]]:
        prepared = await connection.prepare(text.partition("\n\n")[2])
        columns = [(column.name, column.type.name) for column in prepared.get_attributes()]
        return [parameter.name for parameter in prepared.get_parameters()], columns

    for stem, text in DISTRIBUTED.items():
        assert await shape(text) == await shape(TEXTS[stem]), stem
    await connection.close()


_MARK = "null::text;\n            get diagnostics v_rows"
MARKED = BODIES["append_messages_v1"].replace(
    "m.state,\n                m.created_at, " + _MARK, "'aborted',\n                m.created_at, " + _MARK
)
"""The function, which returns another state than it stores."""


@pytest.mark.owner
async def test_the_pool_finds_the_functions(dsn: str) -> None:
    """A pool, its connections and its transactions use the functions if the database has all of them."""
    async with chatdb.create_pool(dsn) as db:
        assert db.functions == set()
        await chatdb.create_conversation(db, user_id="ann", key="k")
    install_functions(dsn)
    # the function shows itself by a value that the statement would not return
    execute(dsn, MARKED)
    async with chatdb.create_pool(dsn) as db:
        assert db.functions == FUNCTIONS
        new = {"user_id": "ann", "conversation_key": "k", "role": "user", "content": ""}
        first = await chatdb.append_message(db, **new)
        async with chatdb.transaction(db) as connection:
            second = await chatdb.append_message(connection, **new)
        async with db.acquire() as connection:
            third = await chatdb.append_message(connection, **new)
        assert [each.state for each in (first, second, third)] == ["aborted"] * 3
        # rolled back under a running service
        execute(dsn, "drop function chatdb.append_messages_v1")
        with pytest.raises(chatdb.SchemaError, match="run chatdb migrate"):
            async with chatdb.transaction(db) as connection:
                await chatdb.append_message(connection, **new)
        last = await chatdb.append_message(db, **new)
        assert (last.seq, last.state) == (4, None)
        assert db.functions == FUNCTIONS - {"append_messages_v1"}
    async with chatdb.create_pool(dsn) as db:
        assert db.functions == set()


@pytest.mark.owner
@pytest.mark.parametrize("state", ["0A000", "42601"])
async def test_the_pool_looks_again(dsn: str, state: str) -> None:
    """
    A pool that was opened before the functions existed finds them when a statement cannot be planned, in one call.

    A trigger refuses, as Citus does, messages that do not come from the function.
    """
    async with chatdb.create_pool(dsn) as db:
        at = {"user_id": "ann", "conversation_key": "k"}
        await chatdb.create_conversation(db, user_id="ann", key="k")
        execute(
            dsn,
            f"""
            create function public.refuse() returns trigger language plpgsql as $$
            declare v_context text;
            begin
                get diagnostics v_context = pg_context;
                if v_context not like '%append_messages_v1%' then
                    raise exception 'cannot be planned' using errcode = '{state}';
                end if;
                return new;
            end $$
            """,
            "create trigger refuse before insert on chatdb.messages for each row execute function public.refuse()",
        )
        with pytest.raises(chatdb.ChatDBError):
            await chatdb.append_message(db, **at, role="user", content="")
        assert db.functions == set()
        install_functions(dsn)
        message = await chatdb.append_message(db, **at, role="user", content="", key="m")
        assert message.seq == 1
        assert db.functions == FUNCTIONS
        async with chatdb.transaction(db) as connection:
            assert (await chatdb.append_message(connection, **at, role="user", content="")).seq == 2


@pytest.mark.owner
async def test_a_connection_that_does_not_know_the_functions(dsn: str) -> None:
    """
    On a bare connection, a statement that cannot be planned raises what to do instead.

    A rule makes PostgreSQL refuse, as Citus does, an INSERT in a WITH query.
    """
    execute(dsn, "create rule refuse as on insert to chatdb.messages where new.seq < 0 do instead nothing")
    connection = await asyncpg.connect(**connect_arguments(dsn))
    at = {"user_id": "ann", "conversation_key": "k"}
    await chatdb.create_conversation(connection, user_id="ann", key="k")
    with pytest.raises(chatdb.ConfigurationError, match=r"0A000.*chatdb\.create_pool") as caught:
        await chatdb.append_message(connection, **at, role="user", content="")
    assert isinstance(caught.value.__cause__, asyncpg.FeatureNotSupportedError)
    await connection.close()


def random_call(random: Random, turn: int) -> tuple[str, dict[str, Any]]:
    """Return a call of a function, often one that is refused."""
    key, other = (random.choice([None, "a", "b", "c", f"new {turn}"]) for _ in range(2))
    message = {"role": random.choice(["user", "tool"]), "content": random.choice(["", "x"])}
    batch = [message | {"key": key or "d"}, message | {"key": f"{other} 2"}, message][: random.randint(0, 3)]
    if random.random() < 0.5:
        batch = [{name: value for name, value in each.items() if name != "key"} for each in batch]
    place = random.choice([{"conversation_key": "k"}, {"conversation_key": "k"}, {"conversation_key": f"k {turn % 5}"}])
    parent = random.choice([None, None, 0, 1, random.randint(0, turn), 10_000])
    expected = random.choice([None, None, None, "read", NEW])
    patch = random.choice([None, {"a": turn % 3}, {"a": None}])
    options: dict[str, Any] = {"parent_seq": parent, "expected": expected}
    if random.random() < 0.4:
        options |= {"create": True, "conversation_metadata_patch": patch}
    name = random.choice(ALIKE)
    match name:
        case "append_message":
            return name, place | message | {"key": key} | options
        case "append_messages":
            skip = {"on_existing": "skip"} if random.random() < 0.3 and batch else {}
            return name, place | {"messages": batch} | options | skip
        case "create_conversation":
            return name, {"key": random.choice(["k", f"k {turn % 5}", None]), "messages": batch or None}
        case "upsert_message":
            return name, place | message | {"key": key or "a", "expected": expected if expected != NEW else None}
        case "start_message":
            return name, place | {"key": key, "parent_seq": parent, "role": message["role"]}
        case "extend_message":
            at = {"key": key} if key else {"seq": random.randint(1, turn + 1)}
            return name, place | at | {"offset": random.choice([0, 0, 2, 7]), "text": "xy"}
        case "fork_conversation":
            at = random.choice([{}, {"seq": random.randint(1, turn + 1)}, {"key": "a"}])
            return name, place | at | {"new_key": random.choice([None, "k", f"k {turn % 5}"])}
        case "switch_branch" | "delete_message" | "finish_message":
            return name, place | {"seq": random.randint(1, turn + 1)}
        case _:
            return name, place | {"after_seq": random.randint(0, turn), "messages": batch, "expected": "read"}


ALIKE = (
    *("append_message", "append_message", "append_messages", "create_conversation", "upsert_message"),
    *("start_message", "extend_message", "fork_conversation", "replace_messages_after"),
    *("switch_branch", "switch_branch", "delete_message", "finish_message"),
)
"""The functions, by how often they are called. The last ones have no statement for Citus, but lead to more states."""


async def answer_of(db: Any, name: str, arguments: dict[str, Any]) -> object:
    """Return what a call returns, without ids and times, or its error."""
    if arguments.get("expected") == "read":
        try:
            at = {"user_id": "ann", "conversation_key": arguments["conversation_key"]}
            arguments = arguments | {"expected": await chatdb.get_conversation(db, **at)}
        except chatdb.NotFoundError:
            arguments = arguments | {"expected": None if name != "replace_messages_after" else NEW}
    try:
        return told(await getattr(chatdb, name)(db, user_id="ann", **arguments))
    except chatdb.ChatDBError as error:
        return type(error), str(error)


def told(answer: Any) -> object:
    """Return a record or records as plain values, without ids and times."""
    if isinstance(answer, list):
        return [told(each) for each in answer]
    if not isinstance(answer, BaseModel):
        return answer
    values = answer.model_dump()
    return {name: value for name, value in values.items() if not name.endswith("_at") and not name.endswith("id")}


@pytest.mark.owner
@pytest.mark.not_on_citus("the plain statements, with which it compares, do not work there")
@pytest.mark.parametrize("seed", range(6))
async def test_the_functions_do_what_the_statements_do(dsn: str, databases: Any, template: str, seed: int) -> None:
    """Random calls give the same answers and errors with the functions as without, and leave the same rows."""
    random = Random(seed)
    with databases.new(template) as plain:
        install_functions(dsn)
        async with chatdb.create_pool(dsn, max_size=1) as ours, chatdb.create_pool(plain, max_size=1) as theirs:
            assert (ours.functions, theirs.functions) == (FUNCTIONS, set())
            refused = 0
            for turn in range(250):
                name, arguments = random_call(random, turn // 5)
                answers = [await answer_of(db, name, arguments) for db in (ours, theirs)]
                assert answers[0] == answers[1], (turn, name, arguments)
                refused += isinstance(answers[0], tuple)
            assert 10 < refused < 240
            stored = [[told(record) async for record in chatdb.export_user(db, user_id="ann")] for db in (ours, theirs)]
            assert stored[0] == stored[1]


def test_the_pool_chooses_the_statement() -> None:
    """A query knows its function, and so which statement it sends."""
    assert _append_message.function == "append_messages_v1"
    assert _create_conversation_keyed.function == "create_conversation_v1"


def violation(state: str, message: str) -> asyncpg.PostgresError:
    """Return the error that asyncpg raises for a constraint on Citus, which sends no field but the message."""
    error: asyncpg.PostgresError = asyncpg.PostgresError.new({"S": "ERROR", "C": state, "M": message})
    assert error.constraint_name is None
    return error


@pytest.mark.parametrize("name", sorted(CONSTRAINTS | CONFLICTS | STALE_COUNTERS))
@pytest.mark.parametrize("shard", ["", "_102008"])
@pytest.mark.parametrize("is_copy", [False, True])
def test_a_constraint_in_the_message(name: str, shard: str, is_copy: bool) -> None:
    """An error of Citus maps to the same error as one with the constraint's name, whichever shard it comes from."""
    said, state = f'duplicate key value violates unique constraint "{name}{shard}"', "23505"
    if name.startswith("ck_"):
        said, state = f'new row for relation "messages_102066" violates check constraint "{name}{shard}"', "23514"
    found = map_driver_error(violation("XX000" if is_copy else state, said))
    if name in CONSTRAINTS:
        assert isinstance(found, chatdb.InvalidInputError)
        assert found.parameter == CONSTRAINTS[name][0]
    else:
        kind = chatdb.ConflictError if name in CONFLICTS else chatdb.ConfigurationError
        assert (type(found), str(found)) == (kind, (CONFLICTS | STALE_COUNTERS)[name])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fk_messages_conversation_102066", chatdb.ConversationNotFoundError),
        ("fk_message_parts_message_102074", chatdb.MessageNotFoundError),
        ("fk_conversations_user_102058", chatdb.InvalidInputError),
        ("fk_of_the_host_102058", chatdb.ConfigurationError),
    ],
)
def test_a_reference_in_the_message(name: str, kind: type[Exception]) -> None:
    """The same holds for foreign keys; a constraint that is not chatdb's is not taken for one of chatdb's."""
    said = f'insert or update on table "messages_102066" violates foreign key constraint "{name}"'
    for state in ("23503", "XX000"):
        found = map_driver_error(violation(state, said))
        assert type(found) is kind
        assert ("users table" in str(found)) == name.startswith("fk_conversations_user")
        assert ("constraint fk_of_the_host, which is not part of chatdb" in str(found)) == ("host" in name)


@pytest.mark.parametrize(
    ("state", "said", "expected"),
    [
        ("23514", 'new row for relation "messages_102014" violates check constraint "mine_102014"', "constraint mine,"),
        ("23514", 'new row for relation "messages_102014" violates check constraint "of_2024"', "constraint of_2024,"),
        ("23505", 'duplicate key value violates unique constraint "mine_102014"', "constraint mine,"),
        (
            "23502",
            'null value in column "note" of relation "messages_102014" violates not-null constraint',
            "NOT NULL constraint for column note,",
        ),
    ],
)
def test_a_constraint_of_the_host(state: str, said: str, expected: str) -> None:
    """A constraint that is not chatdb's is named, without the shard."""
    found = map_driver_error(violation(state, said))
    assert type(found) is chatdb.ConfigurationError
    assert f"own {expected} which is not part of chatdb" in str(found)


def test_a_missing_value() -> None:
    """A required column is named as the parameter."""
    said = 'null value in column "content" of relation "messages_102014" violates not-null constraint'
    found = map_driver_error(violation("23502", said))
    assert isinstance(found, chatdb.InvalidInputError)
    assert found.parameter == "content"


def test_a_damaged_index_is_not_a_constraint() -> None:
    """An internal error that names an index of chatdb's stays one."""
    found = map_driver_error(violation("XX000", 'failed to re-find tuple within index "pk_messages"'))
    assert type(found) is chatdb.UnavailableError


def test_a_function_of_chatdb_is_not_the_hosts() -> None:
    """An error inside one of chatdb's functions is not blamed on a function of the host."""
    own = "PL/pgSQL function chatdb.append_messages_v1(text,bigint,text) line 128 at SQL statement"
    hosts = "PL/pgSQL function public.audit() line 3 at RAISE"
    for context, is_the_hosts in ((own, False), (f"{hosts}\nSQL statement ...\n{own}", True)):
        fields = {"S": "ERROR", "C": "23514", "M": 'violates check constraint "ck_messages_role"', "W": context}
        found = map_driver_error(asyncpg.PostgresError.new(fields))
        assert ("public.audit()" in str(found)) == is_the_hosts
        assert isinstance(found, chatdb.ConfigurationError if is_the_hosts else chatdb.InvalidInputError)
