-- The schema in which everything of chatdb lives: a host's tables of the same names in public are not touched.

set local lock_timeout = '2s';
set local statement_timeout = '1min';

create schema if not exists chatdb;
