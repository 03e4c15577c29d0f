"""
Finds objects in the schema `chatdb` that belong to other roles, and what a host has added to chatdb's tables.

The owner of a table or of a trigger's function decides what code runs when another role writes to the table.
"""

from __future__ import annotations

from typing import NamedTuple

from chatdb.admin.connection import fetch_value, psycopg
from chatdb.schema import EXPECTED_SCHEMA


class ForeignObject(NamedTuple):
    """An object, named as in SQL, and its owner."""

    what: str
    owner: str

    def __str__(self) -> str:
        return f"{self.what} belongs to the role {self.owner}"


# pg_has_role is always true for a superuser, so only other roles consult it
_FOREIGN = """
with trusted as (
    select r.oid
    from pg_catalog.pg_roles as r
    where r.rolsuper
       or r.rolname operator(pg_catalog.=) current_user
       or r.oid operator(pg_catalog.=) (
           select d.datdba from pg_catalog.pg_database as d
           where d.datname operator(pg_catalog.=) pg_catalog.current_database()
       )
       or (
           pg_catalog.pg_has_role(r.oid, 'member')
           and not (select s.rolsuper from pg_catalog.pg_roles as s where s.rolname operator(pg_catalog.=) current_user)
       )
),

objects (kind, name, owner, schema_owner) as (
    select
        case c.relkind when 'S' then 'sequence' when 'v' then 'view' when 'm' then 'materialized view' else 'table' end,
        c.relname::pg_catalog.text, c.relowner, n.nspowner
    from pg_catalog.pg_class as c
    inner join pg_catalog.pg_namespace as n on n.oid operator(pg_catalog.=) c.relnamespace
    where n.nspname operator(pg_catalog.=) 'chatdb' and c.relkind operator(pg_catalog.<>) all ('{i,I,t,c}')
    union all
    select 'function', p.proname::pg_catalog.text, p.proowner, n.nspowner
    from pg_catalog.pg_proc as p
    inner join pg_catalog.pg_namespace as n on n.oid operator(pg_catalog.=) p.pronamespace
    where n.nspname operator(pg_catalog.=) 'chatdb'
    union all
    select 'type', t.typname::pg_catalog.text, t.typowner, n.nspowner
    from pg_catalog.pg_type as t
    inner join pg_catalog.pg_namespace as n on n.oid operator(pg_catalog.=) t.typnamespace
    where n.nspname operator(pg_catalog.=) 'chatdb' and t.typtype operator(pg_catalog.=) any ('{d,e,r,b}')
      and t.typelem operator(pg_catalog.=) 0
)

select pg_catalog.concat(f.kind, ' ', f.name), r.rolname::pg_catalog.text
from (
    select 'schema' as kind, 'chatdb' as name, nspowner as owner
    from pg_catalog.pg_namespace
    where nspname operator(pg_catalog.=) 'chatdb'
    union all
    select kind, pg_catalog.concat('chatdb.', pg_catalog.quote_ident(name)), owner
    from objects
    where owner operator(pg_catalog.<>) schema_owner
) as f
inner join pg_catalog.pg_roles as r on r.oid operator(pg_catalog.=) f.owner
where f.owner operator(pg_catalog.<>) all (select oid from trusted)
order by f.kind, f.name
"""

_ADDED = """
with tables as (
    select c.oid, pg_catalog.concat('chatdb.', pg_catalog.quote_ident(c.relname::pg_catalog.text)) as name, c.relname
    from pg_catalog.pg_class as c
    inner join pg_catalog.pg_namespace as n on n.oid operator(pg_catalog.=) c.relnamespace
    where n.nspname operator(pg_catalog.=) 'chatdb'
      and c.relname operator(pg_catalog.=) any (%(tables)s::pg_catalog.name[])
)

select
    pg_catalog.concat('trigger ', t.tgname, ' on ', c.name),
    pg_catalog.concat(
        'calls ', pg_catalog.quote_ident(n.nspname::pg_catalog.text), '.',
        pg_catalog.quote_ident(p.proname::pg_catalog.text), '(), a function of the role ', r.rolname
    )
from tables as c
inner join pg_catalog.pg_trigger as t on t.tgrelid operator(pg_catalog.=) c.oid and not t.tgisinternal
inner join pg_catalog.pg_proc as p on p.oid operator(pg_catalog.=) t.tgfoid
inner join pg_catalog.pg_namespace as n on n.oid operator(pg_catalog.=) p.pronamespace
inner join pg_catalog.pg_roles as r on r.oid operator(pg_catalog.=) p.proowner
union all
select pg_catalog.concat('rule ', w.rulename, ' on ', c.name), 'rewrites statements on the table'
from tables as c
inner join pg_catalog.pg_rewrite as w on w.ev_class operator(pg_catalog.=) c.oid
union all
select pg_catalog.concat('policy ', p.polname, ' on ', c.name), 'also decides which rows are visible'
from tables as c
inner join pg_catalog.pg_policy as p on p.polrelid operator(pg_catalog.=) c.oid
where p.polname operator(pg_catalog.<>) pg_catalog.concat('rls_', c.relname)::pg_catalog.name
union all
select
    pg_catalog.concat(
        'table ', pg_catalog.quote_ident(n.nspname::pg_catalog.text), '.',
        pg_catalog.quote_ident(h.relname::pg_catalog.text)
    ),
    pg_catalog.concat(
        'inherits from ', c.name, ', so queries on that table also return its rows; it belongs to the role ', r.rolname
    )
from tables as c
inner join pg_catalog.pg_inherits as i on i.inhparent operator(pg_catalog.=) c.oid
inner join pg_catalog.pg_class as h on h.oid operator(pg_catalog.=) i.inhrelid
inner join pg_catalog.pg_namespace as n on n.oid operator(pg_catalog.=) h.relnamespace
inner join pg_catalog.pg_roles as r on r.oid operator(pg_catalog.=) h.relowner
union all
select pg_catalog.concat('event trigger ', e.evtname), 'runs on every DDL statement in the database'
from pg_catalog.pg_event_trigger as e
where e.evtenabled operator(pg_catalog.<>) 'D'
"""

_WRITABLE = """
select n.nspname::pg_catalog.text
from pg_catalog.pg_namespace as n
where n.nspname operator(pg_catalog.=) 'public'
  and exists (
      select from pg_catalog.aclexplode(coalesce(n.nspacl, pg_catalog.acldefault('n', n.nspowner))) as a
      where a.privilege_type operator(pg_catalog.=) 'CREATE'
        and a.grantee operator(pg_catalog.=) 0
  )
"""


def foreign_objects(connection: psycopg.Connection) -> list[ForeignObject]:
    """
    Return what an untrusted role owns: the schema `chatdb`, or tables, views, sequences, functions and types in it.

    Superusers, the database's owner, the current role and the roles that it is a member of are trusted. For objects in
    the schema, so is the schema's owner.
    """
    return [ForeignObject(*row) for row in connection.execute(_FOREIGN).fetchall()]


def host_objects(connection: psycopg.Connection) -> list[tuple[str, str]]:
    """Return the host's triggers, rules, policies and child tables on chatdb's tables, and event triggers."""
    return [(what, detail) for what, detail in connection.execute(_ADDED, {"tables": [*EXPECTED_SCHEMA]})]


def public_is_writable(connection: psycopg.Connection) -> bool:
    """Return whether every role may create objects in `public`, which most search_paths contain."""
    return connection.execute(_WRITABLE).fetchone() is not None


def may_create_schemas(connection: psycopg.Connection) -> bool:
    """Return whether the current role may create schemas in this database."""
    statement = "select pg_catalog.has_database_privilege(pg_catalog.current_database(), 'create')"
    return fetch_value(connection, statement) is True
