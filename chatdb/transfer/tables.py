"""
Reads the tables in which other frameworks keep their conversations: lazily, in bounded memory, as they are at one time.

    openai-agents   SQLAlchemySession: agent_sessions and agent_messages
    langchain       langchain-postgres' PostgresChatMessageHistory: one table, whose name its user chose

Blocks, so it is for a thread. psycopg comes with the extra `migrate`.
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

MISSING = "psycopg, which reads other tables, is not installed: pip install 'chatdb[migrate]'"

_PAGE = 1_000
_BYTES = 4 * 1024 * 1024
"""How much text is fetched at once, unless one message has more."""

_UNREADABLE: Final = datetime(1, 1, 1)  # noqa: DTZ001 - known by its identity
"""Stands for a time that Python has not."""

_COLUMNS = "id, session_id uuid, message jsonb, created_at"
_LOOKED_FOR = f"agent_sessions and agent_messages on the search_path, and tables with the columns {_COLUMNS}"

# The texts are fetched by their ids, so that what the server sorts is narrow, and what it sends is bounded. A time
# without a zone is that of the connection's TimeZone, as CURRENT_TIMESTAMP wrote it.
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

# Only the names of tables are looked up on the role's search_path. Then it is one on which no operator of `public` can
# be found that fits a varchar better than the server's own, and runs as who imports.
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
    """A message without its text, or a session that has none."""

    session: str
    began_at: datetime | None
    ended_at: datetime | None
    messages: int
    id: Any
    written_at: datetime | None
    size: int | None


class _Tables(NamedTuple):
    """How a framework's tables are read."""

    rows: sql.Composed
    texts: sql.Composed
    convert: Callable[[dict[str, Any]], items.ParsedMessage]


def read(
    dsn: str,
    format: str = "auto",  # noqa: A002 - as the command line's option is called
    *,
    table: str | None = None,
    sessions: Sequence[str] = (),
) -> Generator[items.Item, None, None]:
    """
    Yield each session as a conversation, and its messages in the framework's order, with its own item as the payload.

    `table` is that of langchain, as it is spelled in the database, after a point where it has a schema. `sessions` are
    the ids of those to be read; without any, all are. A message that cannot be taken leaves its place empty.

    Raises InvalidInputError when there are no such tables or several, ConfigurationError when psycopg is missing or the
    DSN does not fit, UnavailableError when the server cannot be reached. None quotes the DSN or a text.
    """
    if format not in ("auto", *FORMATS):
        raise InvalidInputError("format", f"must be one of auto, {', '.join(FORMATS)} for a database")
    if table is not None and format == "openai-agents":
        raise InvalidInputError("table", "is for langchain's table: those of openai-agents have fixed names")
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
    """Have a time that Python has not, such as infinity, become a mark, so that its row can be named."""
    from psycopg import DataError
    from psycopg.types.datetime import TimestampLoader

    class Loader(TimestampLoader):
        def load(self, data: Any) -> datetime:  # noqa: ANN401 - bytes of a kind
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
        problem = f"is not there: the database has no table {table!r}, or not of the form; looked for {_LOOKED_FOR}"
        raise InvalidInputError("table", problem)
    tables = _tables(names_found)
    wanted = {session if len(names_found) > 1 else _uuid(session) for session in sessions}
    for session, messages in groupby(_messages(source, tables, sorted(wanted) or None), lambda pair: pair[0].session):
        wanted.discard(session)
        yield from _conversation(messages, tables.convert)
    if wanted:
        yield items.Skipped("there is no session of this id", conversations=len(wanted))


def _quoted(name: str) -> str:
    """Return a name, after a point where it has a schema, as it is in SQL."""
    return ".".join(f'"{part}"' for part in name.replace('"', '""').rsplit(".", 1))


def _choose_tables(source: psycopg.Connection, chosen: str, openai: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the schema and the name of langchain's table, or those of openai-agents' two."""
    candidates: dict[str, list[tuple[str, ...]]] = {}
    if chosen != "langchain" and len(openai) == len(_OPENAI_TABLES):
        candidates["agent_messages"] = openai
    if chosen != "openai-agents":
        candidates |= {".".join(name): [name] for name in source.execute(_LANGCHAIN_TABLES)}
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    if not candidates:
        raise InvalidInputError("table", f"the database has none that can be read; looked for were {_LOOKED_FOR}")
    raise InvalidInputError("table", f"there are several: choose by --table or --format among {', '.join(candidates)}")


def _tables(qualified_names: Sequence[tuple[str, ...]]) -> _Tables:
    from psycopg import sql

    # of a name with %, which psycopg would take for parameters
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
        problem = "must be a UUID, as all of langchain's are"
    raise InvalidInputError("session", problem)


def _messages(
    source: psycopg.Connection, tables: _Tables, sessions: list[str] | None
) -> Iterator[tuple[_Row, str | None]]:
    """Yield each message and its text, or None if that is too long to be fetched."""
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
    """Return the bytes of the text that is to be fetched."""
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
            yield items.Skipped("its session has no id" if row.messages else "no messages", 1, row.messages)
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
        yield items.Skipped("none of its messages can be taken", conversations=1)


def _message(
    seq: int, row: _Row, text: str | None, convert: Callable[[dict[str, Any]], items.ParsedMessage]
) -> tuple[items.SourceMessage, bool]:
    """Return a message, whose key is the number of its row, and whether characters of its text were replaced."""
    if (row.size or 0) > MAX_PAYLOAD:
        raise items.UnsupportedItemError("it has over 16 MiB as JSON")
    try:
        payload = check_payload("payload", JsonText(text or ""))
    except InvalidInputError:
        payload = None
    if payload is None:
        raise items.UnsupportedItemError(
            "it is no JSON, or has NaN, numbers of over 4,300 digits or nesting deeper than 200 levels"
        )
    item = items.as_object(json.loads(payload))
    if item is None:
        raise items.UnsupportedItemError("it is no JSON object")
    author, said, kind, name = convert(item)
    content = items.replace_unstorable(said)
    if len(content.encode()) > MAX_CONTENT:
        raise items.UnsupportedItemError("it has a text of over 4 MiB")
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
    except UnicodeDecodeError:  # of a database without an encoding; it quotes the text
        problem = "has a text that is not UTF-8"
    else:
        return
    raise InvalidInputError("table", problem)


def _map_error(error: psycopg.Error, is_value: bool) -> ChatDBError:
    match classify(error):
        case Kind.SCHEMA | Kind.STATEMENT:
            return InvalidInputError("table", f"is not there, or not of the framework's form; looked for {_LOOKED_FOR}")
        case Kind.PRIVILEGE:
            return ConfigurationError("the role may not read the tables: grant it select on them")
        case Kind.CANCELED:
            return CommandTimeoutError("the server of the tables cancelled the reading, by its time limit", sent=True)
        case Kind.CONNECTION | Kind.RESOURCES:
            return UnavailableError("the server of the tables went away, or takes no connections: try again", sent=None)
        case Kind.CLIENT if not is_value:
            return UnavailableError("the server of the tables went away, or no longer answers: try again", sent=None)
        case Kind.CLIENT:
            return InvalidInputError("table", "has a value that cannot be read")
        case _:
            return ChatDBError(f"the tables cannot be read (SQLSTATE {error.sqlstate})")
