"""Objects of other roles in the schema `chatdb`, and objects that a host adds to its tables."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from chatdb import ConfigurationError
from chatdb.admin.check.inspection import inspect
from chatdb.admin.connection import connected, fetch_value
from chatdb.admin.migrate import apply_migrations, rollback_migrations
from chatdb.admin.ownership import foreign_objects, host_objects
from tests.support.databases import execute
from tests.support.migrations import NAMES

pytestmark = pytest.mark.owner


@pytest.fixture
def mallory(server: str) -> Iterator[str]:
    """Yield an unrelated role; drop it after the databases in which it owns objects."""
    name = "chatdb_test_mallory"
    execute(server, f"create role {name}")
    yield name
    execute(server, f"drop role {name}")


def foreign(dsn: str) -> list[str]:
    """Return a sentence for each object of another role."""
    with connected(dsn) as connection:
        return [str(each) for each in foreign_objects(connection)]


def value(dsn: str, statement: str) -> object:
    """Return the single value that a statement selects."""
    with connected(dsn) as connection:
        return fetch_value(connection, statement)


def findings(dsn: str) -> dict[str, str]:
    """Return the state and detail of each finding of `chatdb check`."""
    return {each.what: f"{each.state}: {each.detail}" for each in inspect(dsn)}


def test_nothing_is_foreign_in_a_migrated_database(mallory: str, empty_dsn: str) -> None:
    """Before and after one role's migrations, nothing belongs to another role and nothing is added."""
    assert foreign(empty_dsn) == []
    apply_migrations(empty_dsn)
    with connected(empty_dsn) as connection:
        assert (foreign_objects(connection), host_objects(connection)) == ([], [])


def test_a_foreign_schema_and_table_are_named(mallory: str, empty_dsn: str) -> None:
    """Another role's schema is named, and so are its table, function and type in the owner's schema."""
    execute(empty_dsn, f"create schema chatdb authorization {mallory}")
    assert foreign(empty_dsn) == [f"schema chatdb belongs to the role {mallory}"]
    execute(empty_dsn, "alter schema chatdb owner to current_user")
    apply_migrations(empty_dsn)
    execute(
        empty_dsn,
        f"alter table chatdb.messages owner to {mallory}",
        "create function chatdb.f() returns int language sql as 'select 1'",
        f"alter function chatdb.f() owner to {mallory}",
        f"create domain chatdb.d as int; alter domain chatdb.d owner to {mallory}",
    )
    assert foreign(empty_dsn) == [
        f"{what} belongs to the role {mallory}"
        for what in ("function chatdb.f", "sequence chatdb.messages_id_seq", "table chatdb.messages", "type chatdb.d")
    ]
    found = findings(empty_dsn)
    assert found["owner of table chatdb.messages"].startswith(f"different: the role {mallory}")
    with psycopg.connect(empty_dsn, autocommit=True) as connection:
        connection.execute(f"drop owned by {mallory} cascade".encode())


def test_what_is_foreign_is_refused(mallory: str, empty_dsn: str) -> None:
    """Migration and rollback refuse to run if another role owns the schema, or a table or function in it."""
    execute(empty_dsn, f"create schema chatdb authorization {mallory}")
    with pytest.raises(ConfigurationError, match=f"schema chatdb belongs to the role {mallory}"):
        apply_migrations(empty_dsn)
    assert value(empty_dsn, "select count(*) from pg_class where relnamespace = 'chatdb'::regnamespace") == 0
    execute(empty_dsn, "alter schema chatdb owner to current_user")
    apply_migrations(empty_dsn, to="0002")
    execute(
        empty_dsn,
        "create function chatdb.f() returns int language sql as 'select 1'",
        f"alter function chatdb.f() owner to {mallory}",
    )
    for work in (apply_migrations, rollback_migrations):
        with pytest.raises(ConfigurationError, match=f"function chatdb.f belongs to the role {mallory}"):
            work(empty_dsn)
    assert value(empty_dsn, "select to_regclass('chatdb.messages') is null")
    assert value(empty_dsn, "select to_regclass('chatdb.conversations') is not null")
    execute(empty_dsn, "drop function chatdb.f()")
    assert apply_migrations(empty_dsn) == NAMES[2:]


def test_additions_to_the_tables_are_named(mallory: str, dsn: str) -> None:
    """A trigger with its function, a rule, a policy and a child table are notes; chatdb's own policies are not."""
    execute(
        dsn,
        "create function public.audit() returns trigger language plpgsql as 'begin return new; end'",
        "create trigger audit before insert on chatdb.messages for each row execute function public.audit()",
        "create rule quiet as on delete to chatdb.conversations where false do instead nothing",
        "create policy theirs on chatdb.messages as restrictive using (true)",
        "create policy rls_messages on chatdb.messages using (true)",
        "create table public.child () inherits (chatdb.messages)",
    )
    with connected(dsn) as connection:
        found = [what for what, _ in host_objects(connection)]
    assert found == [
        "trigger audit on chatdb.messages",
        "rule quiet on chatdb.conversations",
        "policy theirs on chatdb.messages",
        "table public.child",
    ]
    said = findings(dsn)
    assert said["trigger audit on chatdb.messages"].startswith("note: calls public.audit(), a function of the role ")
    assert set(found) <= said.keys()
    execute(dsn, "drop table public.child")


def test_a_public_that_all_may_write_to_is_noted(dsn: str) -> None:
    """CREATE on `public` for every role is a note until it is revoked."""
    execute(dsn, "grant create on schema public to public")
    assert findings(dsn)["schema public"].startswith("note: ")
    execute(dsn, "revoke create on schema public from public")
    assert "schema public" not in findings(dsn)
