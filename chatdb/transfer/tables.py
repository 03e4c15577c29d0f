"""
Read a snapshot of other frameworks' tables of conversations, lazily and in bounded memory.

    openai-agents   SQLAlchemySession: agent_sessions and agent_messages
    langchain       langchain-postgres' PostgresChatMessageHistory: one table of any name

Blocks, so run it in a thread. Needs psycopg, from the extra `migrate`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import UUID

from chatdb._core.sqlstate import Kind, classify
from chatdb._core.validate import MAX_CONTENT, MAX_PAYLOAD, check_payload, utf8_length
from chatdb.errors import ChatDBError, CommandTimeoutError, ConfigurationError, InvalidInputError, UnavailableError
from chatdb.formats import items, langchain, openai
from chatdb.records import JsonText

if TYPE_CHECKING:
    import psycopg
    from psycopg import sql

FORMATS: Final = ("openai-agents", "langchain")
_OPENAI_TABLES: Final = ("agent_sessions", "agent_messages")

MISSING = "psycopg, which reads other frameworks' tables, is not installed: run pip install 'chatdb[migrate]'"

_PAGE = 1_000
_BYTES = 4 * 1024 * 1024
"""Maximum bytes of text per fetch, unless one message is larger."""

_UNREADABLE: Final = datetime(1, 1, 1)  # noqa: DTZ001 - compared by identity
"""Marks a time that Python cannot represent."""

_COLUMNS = "id, session_id uuid, message jsonb, created_at"
_LOOKED_FOR = f"agent_sessions and agent_messages on the search_path, and tables with the columns {_COLUMNS}"

# Texts are fetched by ID, so that the server sorts narrow rows and sends a bounded amount. A time without a zone is in
# the connection's TimeZone, as CURRENT_TIMESTAMP wrote it.
_OPENAI_ROWS: Final = """
with sessions as (
    select
        session_id,
        created_at::timestamptz at time zone 'UTC' as began_at,
        updated_at::timestamptz at time zone 'UTC' as ended_at
    from {agent_sessions}
    where %(sessions)s::text[] is null or session_id = any(%(sessions)s::text[])
),

messages as materialized (
    select
        session_id, id, created_at,
        created_at::timestamptz at time zone 'UTC' as written_at,
        pg_catalog.octet_length(message_data::text) as size
    from {agent_messages}
    where %(sessions)s::text[] is null or session_id = any(%(sessions)s::text[])
)

select
    session_id,
    coalesce(s.began_at, pg_catalog.min(m.written_at) over whole) as began_at,
    coalesce(s.ended_at, pg_catalog.max(m.written_at) over whole) as ended_at,
    pg_catalog.count(m.id) over whole,
    m.id, m.written_at, m.size
from sessions as s
full join messages as m using (session_id)
window whole as (partition by session_id)
order by began_at, session_id, m.created_at, m.id
"""
_OPENAI_TEXTS: Final = "select id, message_data::text from {agent_messages} where id = any(%s)"

_LANGCHAIN_ROWS: Final = """
with messages as materialized (
    select
        session_id, id,
        created_at::timestamptz at time zone 'UTC' as written_at,
        pg_catalog.octet_length(message::text) as size
    from {table}
    where %(sessions)s::uuid[] is null or session_id = any(%(sessions)s::uuid[])
)

select
    session_id::text,
    pg_catalog.min(written_at) over whole as began_at,
    pg_catalog.max(written_at) over whole as ended_at,
    pg_catalog.count(*) over whole,
    id, written_at, size
from messages
window whole as (partition by session_id)
order by began_at, session_id, id
"""
_LANGCHAIN_TEXTS: Final = "select id, message::text from {table} where id = any(%s)"

# Look up only the table names on the role's search_path, then pin it: an operator in `public` that fits varchar better
# than the built-in one would run with the importing role's privileges.
_OID: Final = "select pg_catalog.to_regclass(%s::pg_catalog.text)::pg_catalog.oid"
_PIN: Final = "set local search_path to pg_catalog, pg_temp"

_NAME: Final = """
select n.nspname::text, c.relname::text
from pg_catalog.pg_class as c
inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
where c.oid = %s::oid
"""
_LANGCHAIN_TABLES: Final = """
select table_schema::text, table_name::text
from information_schema.columns
where (column_name = 'session_id' and data_type = 'uuid') or (column_name = 'message' and data_type = 'jsonb')
   or column_name in ('id', 'created_at')
group by table_schema, table_name
having pg_catalog.count(*) = 4
order by table_schema, table_name
"""


class _Row(NamedTuple):
    """A message without its text, or a session without messages."""

    session: str
    began_at: datetime | None
    ended_at: datetime | None
    messages: int
    id: Any
    written_at: datetime | None
    size: int | None


class _Tables(NamedTuple):
    """Statements and message converter for a framework's tables."""

    rows: sql.Composed
    texts: sql.Composed
    convert: Callable[[dict[str, Any]], items.ParsedMessage]


def read(
    dsn: str,
    format: str = "auto",  # noqa: A002 - the option's name
    *,
    table: str | None = None,
    sessions: Sequence[str] = (),
) -> Generator[items.Item, None, None]:
    """
    Yield each session as a conversation, then its messages in the framework's order, with the original as payload.

    `table` is the langchain table, NAME or SCHEMA.NAME, spelled as in the database. `sessions` limits the import to
    these session IDs. A message that cannot be imported leaves a gap in `seq`.

    Raises InvalidInputError if no table or several match, ConfigurationError if psycopg is missing or the DSN is
    invalid, UnavailableError if the server cannot be reached. No error quotes the DSN or a text.
    """
    if format not in ("auto", *FORMATS):
        raise InvalidInputError("format", f"must be one of auto, {', '.join(FORMATS)} for a database")
    if table is not None and format == "openai-agents":
        raise InvalidInputError("table", "applies only to langchain: openai-agents has fixed table names")
    for parameter, value in (("table", table), *(("session", session) for session in sessions)):
        if value is not None:
            utf8_length(parameter, value)
    try:
        import psycopg
    except ImportError:
        raise ConfigurationError(MISSING) from None
    from chatdb.admin.connection import open_connection

    with _mapped_errors(), open_connection(dsn, client_encoding="utf8", prepare_threshold=None) as source:
        _mark_unreadable_times(source)
        source.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        source.read_only = True
        yield from _read(source, format, table, sessions)


def _mark_unreadable_times(source: psycopg.Connection) -> None:
    """Load a time that Python cannot represent as a marker, so that the error can name its row."""
    from psycopg import DataError
    from psycopg.types.datetime import TimestampLoader

    class Loader(TimestampLoader):
        def load(self, data: Any) -> datetime:  # noqa: ANN401 - a bytes-like object
            try:
                return super().load(data)
            except DataError:
                return _UNREADABLE

    source.adapters.register_loader("timestamp", Loader)


def _read(source: psycopg.Connection, chosen: str, table: str | None, sessions: Sequence[str]) -> Iterator[items.Item]:
    names = _OPENAI_TABLES if table is None else (table,)
    oids = [source.execute(_OID, [_quoted(name)]).fetchone() for name in names]
    source.execute(_PIN)
    names_found = [tuple(name) for row in oids if row and (name := source.execute(_NAME, row).fetchone())]
    if table is None:
        names_found = _choose_tables(source, chosen, names_found)
    elif not names_found:
        problem = (
            f"was not found: the database has no table {table!r} with the expected columns; looked for {_LOOKED_FOR}"
        )
        raise InvalidInputError("table", problem)
    tables = _tables(names_found)
    wanted = {session if len(names_found) > 1 else _uuid(session) for session in sessions}
    for session, messages in groupby(_messages(source, tables, sorted(wanted) or None), lambda pair: pair[0].session):
        wanted.discard(session)
        yield from _conversation(messages, tables.convert)
    if wanted:
        yield items.Skipped("no session with this ID", conversations=len(wanted))


def _quoted(name: str) -> str:
    """Quote NAME or SCHEMA.NAME for SQL."""
    return ".".join(f'"{part}"' for part in name.replace('"', '""').rsplit(".", 1))


def _choose_tables(source: psycopg.Connection, chosen: str, openai: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the schema and name of each table to read."""
    candidates: dict[str, list[tuple[str, ...]]] = {}
    if chosen != "langchain" and len(openai) == len(_OPENAI_TABLES):
        candidates["agent_messages"] = openai
    if chosen != "openai-agents":
        candidates |= {".".join(name): [name] for name in source.execute(_LANGCHAIN_TABLES)}
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    if not candidates:
        raise InvalidInputError("table", f"the database has no supported tables; looked for {_LOOKED_FOR}")
    raise InvalidInputError(
        "table", f"several tables match: use --table or --format to choose among {', '.join(candidates)}"
    )


def _tables(qualified_names: Sequence[tuple[str, ...]]) -> _Tables:
    from psycopg import sql

    # psycopg would read a % in a name as a parameter
    tables = [sql.Identifier(*(part.replace("%", "%%") for part in name)) for name in qualified_names]
    names, rows, texts, convert = (
        (_OPENAI_TABLES, _OPENAI_ROWS, _OPENAI_TEXTS, openai.parse_message)
        if len(tables) > 1
        else (("table",), _LANGCHAIN_ROWS, _LANGCHAIN_TEXTS, langchain.parse_message)
    )
    named = dict(zip(names, tables, strict=True))
    return _Tables(sql.SQL(rows).format(**named), sql.SQL(texts).format(**named), convert)


def _uuid(session: str) -> str:
    try:
        return str(UUID(session))
    except ValueError:
        problem = "must be a UUID, as all langchain session IDs are"
    raise InvalidInputError("session", problem)


def _messages(
    source: psycopg.Connection, tables: _Tables, sessions: list[str] | None
) -> Iterator[tuple[_Row, str | None]]:
    """Yield each message and its text, or None if the text is too large."""
    with source.cursor("chatdb") as cursor:
        cursor.execute(tables.rows, {"sessions": sessions})
        while page := [_Row(*row) for row in cursor.fetchmany(_PAGE)]:
            start = size = 0
            for index, row in enumerate(page):
                _check_times(row)
                if index > start and size + _size(row) > _BYTES:
                    yield from _with_texts(source, tables, page[start:index])
                    start, size = index, 0
                size += _size(row)
            yield from _with_texts(source, tables, page[start:])


def _check_times(row: _Row) -> None:
    if any(time is _UNREADABLE for time in (row.began_at, row.ended_at, row.written_at)):
        what = "a session without messages" if row.id is None else f"the message {row.id} or its session"
        raise InvalidInputError("table", f"{what} has a time that is infinite or outside the years 1 to 9999")


def _size(row: _Row) -> int:
    return row.size if row.size is not None and row.size <= MAX_PAYLOAD else 0


def _with_texts(source: psycopg.Connection, tables: _Tables, rows: list[_Row]) -> Iterator[tuple[_Row, str | None]]:
    ids = [row.id for row in rows if _size(row)]
    texts: dict[Any, str] = dict(source.execute(tables.texts, [ids]).fetchall()) if ids else {}
    for row in rows:
        yield row, texts.pop(row.id, None)


def _conversation(
    messages: Iterator[tuple[_Row, str | None]], convert: Callable[[dict[str, Any]], items.ParsedMessage]
) -> Iterator[items.Item]:
    begun = False
    for seq, (row, text) in enumerate(messages, 1):
        key = items.name_of(row.session)
        if row.messages == 0 or not key:
            yield items.Skipped("session without an ID" if row.messages else "no messages", 1, row.messages)
            return
        try:
            message, is_replaced = _message(seq, row, text, convert)
        except items.UnsupportedItemError as error:
            yield items.Skipped(str(error), messages=1, seq=seq if begun else 0)
            continue
        if not begun:
            yield items.SourceConversation(key, None, None, row.messages, _utc(row.began_at), _utc(row.ended_at))
            begun = True
        yield message
        if is_replaced:
            yield items.Changed(items.REPLACED, messages=1)
    if not begun:
        yield items.Skipped("no messages that can be imported", conversations=1)


def _message(
    seq: int, row: _Row, text: str | None, convert: Callable[[dict[str, Any]], items.ParsedMessage]
) -> tuple[items.SourceMessage, bool]:
    """Return a message, with its row ID as key, and whether characters of its text were replaced."""
    if (row.size or 0) > MAX_PAYLOAD:
        raise items.UnsupportedItemError("larger than 16 MiB as JSON")
    try:
        payload = check_payload("payload", JsonText(text or ""))
    except InvalidInputError:
        payload = None
    if payload is None:
        raise items.UnsupportedItemError(
            "invalid JSON, or JSON with NaN, numbers of over 4,300 digits or nesting deeper than 200 levels"
        )
    item = items.as_object(json.loads(payload))
    if item is None:
        raise items.UnsupportedItemError("not a JSON object")
    author, said, kind, name = convert(item)
    content = items.replace_unstorable(said)
    if len(content.encode()) > MAX_CONTENT:
        raise items.UnsupportedItemError("text longer than 4 MiB")
    metadata = items.metadata_of(type=items.short(kind), name=items.short(name))
    message = items.SourceMessage(seq, author, content, payload, metadata, None, str(row.id), _utc(row.written_at))
    return message, content != said


def _utc(time: datetime | None) -> datetime | None:
    return None if time is None else time.replace(tzinfo=UTC)


@contextmanager
def _mapped_errors() -> Generator[None, None, None]:
    import psycopg

    try:
        yield
    except psycopg.Error as error:
        raise _map_error(error, isinstance(error, psycopg.DataError)) from error
    except UnicodeDecodeError:  # from a SQL_ASCII database; the error would quote the text
        problem = "contains text that is not UTF-8"
    else:
        return
    raise InvalidInputError("table", problem)


def _map_error(error: psycopg.Error, is_value: bool) -> ChatDBError:
    match classify(error):
        case Kind.SCHEMA | Kind.STATEMENT:
            return InvalidInputError("table", f"was not found, or lacks the expected columns; looked for {_LOOKED_FOR}")
        case Kind.PRIVILEGE:
            return ConfigurationError("the role cannot read the tables: grant it SELECT on them")
        case Kind.CANCELED:
            return CommandTimeoutError("the source server cancelled the query because of a time limit", sent=True)
        case Kind.CONNECTION | Kind.RESOURCES:
            return UnavailableError("the source server is down or accepts no connections: try again", sent=None)
        case Kind.CLIENT if not is_value:
            return UnavailableError("the source server is down or no longer answers: try again", sent=None)
        case Kind.CLIENT:
            return InvalidInputError("table", "has a value that cannot be read")
        case _:
            return ChatDBError(f"could not read the tables (SQLSTATE {error.sqlstate})")
