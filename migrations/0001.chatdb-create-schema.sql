-- The schema in which everything of chatdb lives: a host's tables of the same names in public are not touched.

set local lock_timeout = '2s';
set local statement_timeout = '1min';

create schema if not exists chatdb;

-- By the default search_path, "$user", public, a role of the name chatdb would from now on have its unqualified
-- names in this schema: the host's own migrations, and yoyo, which would not find its tables in public any more.
do $$
begin
    if exists (
        select from pg_catalog.pg_roles as r
        where r.rolname operator(pg_catalog.=) 'chatdb'
          and not exists (
              select from pg_catalog.pg_db_role_setting as s
              inner join pg_catalog.pg_database as d
                  on d.oid operator(pg_catalog.=) s.setdatabase
                  or s.setdatabase operator(pg_catalog.=) 0::pg_catalog.oid
              where s.setrole operator(pg_catalog.=) r.oid
                and d.datname operator(pg_catalog.=) pg_catalog.current_database()
                and s.setconfig::pg_catalog.text operator(pg_catalog.~~) '%search_path=%'
          )
    ) then
        execute pg_catalog.format(
            'alter role chatdb in database %I set search_path = public', pg_catalog.current_database()
        );
    end if;
exception when insufficient_privilege then
    raise notice 'the role chatdb keeps its search_path: as a superuser, set it to public in this database';
end $$;
