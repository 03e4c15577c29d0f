"""`chatdb repack` and the sample of `chatdb check` where pg_repack is missing; test_pg_repack.py runs it."""

from __future__ import annotations

import json
import os
from typing import Any

import psycopg
import pytest

import chatdb
from chatdb.admin.check.findings import Finding, check_locality
from chatdb.admin.check.inspection import inspect
from chatdb.admin.connection import REPACK_LOCK
from chatdb.admin.locality import (
    CLEAN_UP,
    CLUSTER,
    Leftovers,
    Method,
    Scatter,
    choose_method,
    plan_repack,
    read_scatter,
    repack_messages,
)
from chatdb.admin.migrate import apply_migrations, rollback_migrations
from chatdb.admin.row_security import protect_tables
from tests.support.command import chatdb as run_chatdb
from tests.support.databases import as_role, execute
from tests.support.embedded import standby
from tests.support.repacking import fill
from tests.support.roles import Roles

pytestmark = pytest.mark.owner

NOTHING_LEFT = Leftovers((), is_running=False)


def scatter(dsn: str) -> Scatter:
    """Return the sample."""
    with psycopg.connect(dsn) as connection:
        return read_scatter(connection)


def found(dsn: str, what: str = "locality") -> list[Finding]:
    """Return what `chatdb check` says about the locality."""
    return [each for each in inspect(dsn) if each.what == what]


def test_without_pg_repack(dsn: str) -> None:
    """The command changes nothing, prints why and what to run instead, and that statement does what it says."""
    fill(dsn, 20)
    env = {"CHATDB_MIGRATE_URL": dsn}
    before = scatter(dsn)
    assert 5 < before.conversations <= 16
    assert before.messages == 100 * before.conversations
    assert before.per_history > 60
    said = run_chatdb("repack", "--dry-run", env=env)
    assert said.startswith("nothing was changed: the database lacks the extension pg_repack: install it on the server")
    assert CLUSTER in said
    assert "locks chatdb.messages against readers and writers until it ends" in said
    result = json.loads(run_chatdb("repack", "--dry-run", "--json", env=env))
    assert (result["would_repack"], result["method"], result["messages"]) == (False, "CLUSTER", 2000)
    run_chatdb("repack", "--yes", env=env, code=1)
    with pytest.raises(chatdb.ConfigurationError, match="lacks the extension pg_repack"):
        repack_messages(dsn)
    assert scatter(dsn).per_history > 60
    [finding] = found(dsn)
    assert finding.state == "ok"  # the table fits into shared_buffers
    assert finding.detail.startswith("a history of 100 messages is on ")
    execute(dsn, *CLUSTER.split("; "))
    after = scatter(dsn)
    assert after.packed is not None
    assert after.per_history < after.packed + 2
    assert not after.is_scattered


@pytest.mark.parametrize(
    ("server", "extension", "program", "method", "reason"),
    [
        (150020, "1.4.8", "/usr/bin/pg_repack", Method.PG_REPACK, ""),
        (190000, "1.5.3", "/usr/bin/pg_repack", Method.PG_REPACK, ""),
        (190000, None, "/usr/bin/pg_repack", Method.REPACK, ""),
        (190000, "1.5.3", None, Method.REPACK, ""),
        (180006, None, "/usr/bin/pg_repack", Method.CLUSTER, "the database lacks the extension pg_repack"),
        (150020, "1.4.8", None, Method.CLUSTER, "this machine lacks the program of that name"),
    ],
)
def test_the_method(server: int, extension: str | None, program: str | None, method: Method, reason: str) -> None:
    """pg_repack is used if the database and this machine have it, then what the server has."""
    chosen, why = choose_method(server=server, extension=extension, program=program)
    assert chosen is method
    assert reason in why
    assert bool(why) == bool(reason)


def test_what_check_says() -> None:
    """A note advises a rewrite only if the table exceeds shared_buffers and histories are on over three times more."""
    scattered = Scatter(12, 1200, 1180, 10.0, exceeds_buffers=True)
    [note] = check_locality(scattered, NOTHING_LEFT)
    assert (note.state, note.hint) == ("note", "chatdb repack, while few users write")
    assert note.detail.startswith("a history of 100 messages is on 98 blocks, and could be on about 11 (means of 12 ")
    for other in (
        scattered._replace(exceeds_buffers=False),
        scattered._replace(blocks=390),
        scattered._replace(messages_per_block=None),
    ):
        assert [each.state for each in check_locality(other, NOTHING_LEFT)] == ["ok"]
    assert [*check_locality(Scatter(0, 0, 0, 10.0, exceeds_buffers=True), NOTHING_LEFT)] == []
    assert [*check_locality(None, NOTHING_LEFT)] == []
    [running] = check_locality(None, Leftovers(("trigger repack_trigger",), is_running=True))
    assert running.state == "note"


def test_leftovers(dsn: str) -> None:
    """What a killed pg_repack leaves is a problem for check, and repack refuses; another table's is not counted."""
    execute(
        dsn,
        "create schema repack",
        "create table repack.log_1 (id int8)",
        "create function repack.f() returns trigger language plpgsql as 'begin return null; end'",
    )
    assert found(dsn, "repack") == []
    execute(
        dsn,
        "do $$ begin execute 'create table repack.log_' || 'chatdb.messages'::regclass::oid || ' (id int8)'; end $$",
        "create trigger repack_trigger after insert on chatdb.messages for each row execute function repack.f()",
    )
    [finding] = found(dsn, "repack")
    assert finding.state == "different"
    assert "left table repack.log_" in finding.detail
    assert "trigger repack_trigger on chatdb.messages, and every write pays for it" in finding.detail
    assert CLEAN_UP in finding.hint
    with pytest.raises(chatdb.ConfigurationError, match="a pg_repack that was killed left table"):
        plan_repack(dsn)


def test_other_servers_and_roles(dsn: str, empty_dsn: str, roles: Roles) -> None:
    """A role that does not own the table, a database without tables and a standby each get a sentence."""
    execute(dsn, f"grant usage on schema chatdb to {roles.app}")
    with pytest.raises(chatdb.ConfigurationError, match=r"does not own the table .* run this as a superuser"):
        plan_repack(as_role(dsn, roles.app))
    assert found(as_role(dsn, roles.app)) == []
    with pytest.raises(chatdb.SchemaError, match="chatdb migrate"):
        plan_repack(empty_dsn)
    with standby() as there, pytest.raises(chatdb.ConfigurationError, match="is a standby, which is read-only"):
        plan_repack(there)


def test_row_level_security(dsn: str) -> None:
    """A role that does not see all rows gets no sample from check, and cannot rewrite the table."""
    fill(dsn, 2)
    name = f"owner_of_tables_{os.getpid()}"
    execute(dsn, f"create role {name} login password '{name}'", f"grant usage, create on schema chatdb to {name}")
    try:
        for table in ("conversations", "messages", "message_parts"):
            execute(dsn, f"alter table chatdb.{table} owner to {name}")
        assert len(found(as_role(dsn, name))) == 1
        protect_tables(dsn)
        assert found(as_role(dsn, name)) == []
        with pytest.raises(chatdb.ConfigurationError, match="row-level security hides rows from this role"):
            plan_repack(as_role(dsn, name))
    finally:
        execute(dsn, f"reassign owned by {name} to current_user", f"drop owned by {name}", f"drop role {name}")


def test_beside_other_commands(dsn: str) -> None:
    """Repack runs once at a time; migrate waits for it only if it has something to apply."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("select pg_advisory_lock(%s)", [REPACK_LOCK])
        waits: Any = pytest.raises(
            chatdb.UnavailableError, match=r"another operator command is still running .* after 0 s"
        )
        with waits:
            repack_messages(dsn, wait=0)
        assert apply_migrations(dsn, wait=0) == []
        with waits:
            rollback_migrations(dsn, wait=0)
        execute(dsn, "drop index chatdb.ix_messages_user_id_conversation_id_seq_branches")
        with waits:
            apply_migrations(dsn, wait=0)
    assert len(apply_migrations(dsn)) == 1
