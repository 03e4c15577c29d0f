"""Objects that an unprivileged role can plant in a writable `public`, and a count of their calls."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

KINDS = (
    *("text", "varchar", "bpchar", '"char"', "name", "int2", "int4", "int8", "numeric", "oid", "regclass", "regtype"),
    *("regnamespace", "regrole", "json", "jsonb", "bool", "timestamptz", "timestamp", "date", "interval", "uuid"),
    *("text[]", "varchar[]", "name[]", "int4[]", "int8[]", "oid[]", "timestamptz[]", '"char"[]', "int2vector"),
)
"""Types in pg_catalog of chatdb's columns and arguments, of the catalog and of a host's tables."""
DOMAINS = ("sql_identifier", "character_data", "cardinal_number", "yes_or_no")
ANY = ("anyelement", "anyarray")
NAMED = ("text", "int8", "int4", "json", "jsonb", "bool", "timestamptz", "timestamp", "date", "oid", "name", "uuid")
"""Types that have a namesake in `public`."""
MAKERS = ("+", "-", "*", "/", "%", "||", "<<", ">>", "|", "&", "#", "->", "->>")
"""Operators that do not return a boolean."""

# A sequence counts calls even if the transaction rolls back. In a read-only transaction a call is an error.
_BODY = "begin perform pg_catalog.nextval('public.planted'::pg_catalog.regclass); return null; end"
_PLANT = """
do $do$
declare
    body text := %(body)s;
    l text;
    r text;
    f text;
    o text;
begin
    create sequence public.planted;
    grant all on sequence public.planted to public;
    create type public.planted_kind as (number int4);
    foreach l in array %(kinds)s::text[] loop
        foreach r in array %(kinds)s::text[] loop
            continue when (l like 'pg_catalog.any%%') <> (r like 'pg_catalog.any%%');
            execute format('create function public.planted_compares(%%s, %%s) returns bool language plpgsql as %%L',
                l, r, body);
            execute format('create function public.planted_makes(%%s, %%s) returns %%s language plpgsql as %%L',
                l, r, l, body);
            foreach o in array %(operators)s::text[] loop
                execute format('create operator public.%%s (leftarg = %%s, rightarg = %%s, function = public.%%s)',
                    o, l, r, case when o = any (%(makers)s::text[]) then 'planted_makes' else 'planted_compares' end);
            end loop;
        end loop;
        execute format('create function public.planted_minus(%%s) returns %%s language plpgsql as %%L', l, l, body);
        execute format('create operator public.- (rightarg = %%s, function = public.planted_minus)', l);
        continue when l like 'pg_catalog.any%%';
        execute format('create function public.planted_cast(%%s) returns public.planted_kind language plpgsql as %%L',
            l, body);
        continue when l like 'information_schema.%%';
        execute format('create cast (%%s as public.planted_kind) with function public.planted_cast(%%s) as implicit',
            l, l);
    end loop;
    execute format('create function public.planted_compares(public.planted_kind, public.planted_kind) '
        'returns bool language plpgsql as %%L', body);
    foreach o in array array['=', '<>', '<', '<=', '>', '>='] loop
        execute format('create operator public.%%s (leftarg = public.planted_kind, '
            'rightarg = public.planted_kind, function = public.planted_compares)', o);
    end loop;
    foreach f in array %(functions)s::text[] loop
        execute format('create function public.%%I() returns text language plpgsql as %%L', f, body);
        foreach l in array %(kinds)s::text[] loop
            execute format('create function public.%%I(%%s) returns text language plpgsql as %%L', f, l, body);
        end loop;
        foreach l in array %(few)s::text[] loop
            foreach r in array %(few)s::text[] loop
                execute format('create function public.%%I(%%s, %%s) returns text language plpgsql as %%L',
                    f, l, r, body);
            end loop;
        end loop;
    end loop;
    foreach l in array %(named)s::text[] loop
        execute format('create function public.planted_check(pg_catalog.%%s) returns bool language plpgsql as %%L',
            l, body);
        execute format('create domain public.%%s as pg_catalog.%%s check (public.planted_check(value))', l, l);
    end loop;
end $do$
"""


@contextmanager
def planter(server: str) -> Iterator[str]:
    """Yield a role with no privileges except those of PUBLIC."""
    name = f"chatdb_test_{os.getpid()}_planter"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"create role {name}".encode())
        yield name
        connection.execute(f"drop role {name}".encode())


def plant(dsn: str, role: str, *, functions: set[str], operators: set[str]) -> None:
    """
    Plant overloads in `public`, as a role that can create objects there because PUBLIC can.

    They overload each operator for any two types, and each function for any one or two types. Others are namesakes of
    types, and a type with an implicit cast from any other.
    """
    kinds = [f"pg_catalog.{name}" for name in (*KINDS, *ANY)] + [f"information_schema.{name}" for name in DOMAINS]
    few = [f"pg_catalog.{name}" for name in ("text", "varchar", "name", "int4", "int8", "oid", "jsonb", "bool")]
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("grant create on schema public to public")
        connection.execute("set check_function_bodies = off")
        connection.execute(f"set role {role}".encode())
        cursor = psycopg.ClientCursor(connection)
        cursor.execute(
            _PLANT,
            {
                "body": _BODY,
                "makers": [*MAKERS],
                "kinds": kinds,
                "few": few,
                "named": [*NAMED],
                "functions": sorted(functions),
                "operators": sorted(operators),
            },
        )


def planted_calls(dsn: str) -> tuple[int, list[str]]:
    """Return the number of calls of planted objects, and their names, as counted so far."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("set search_path to pg_catalog")
        (calls,) = connection.execute("select case when is_called then last_value else 0 end from public.planted")
        names = connection.execute(
            """
            select f.funcid::pg_catalog.regprocedure::pg_catalog.text || ' ' || f.calls::pg_catalog.text
            from pg_catalog.pg_stat_user_functions as f
            where f.schemaname operator(pg_catalog.=) 'public'
            order by 1
            """
        )
        return int(calls[0]), [name for (name,) in names]
