"""
Read a snapshot of other frameworks' tables of conversations, lazily and in bounded memory.

Each framework's module describes its tables as a `Source`. Blocks, so run it in a thread. Needs psycopg, from the extra
`migrate`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from chatdb._core.sqlstate import Kind, classify
from chatdb._core.validate import MAX_PAYLOAD, utf8_length
from chatdb.errors import ChatDBError, CommandTimeoutError, ConfigurationError, InvalidInputError, UnavailableError
from chatdb.formats.items import Item, Skipped
from chatdb.transfer.tables import chainlit, google_adk, langchain, openai_agents
from chatdb.transfer.tables.conversations import conversation_items
from chatdb.transfer.tables.source import Row, Source

if TYPE_CHECKING:
    from typing import LiteralString

    import psycopg
    from psycopg import sql

_SOURCES: Final[Sequence[Source]] = (openai_agents.SOURCE, langchain.SOURCE, google_adk.SOURCE, chainlit.SOURCE)

FORMATS: Final = tuple(source.name for source in _SOURCES)

MISSING = "psycopg, which reads other frameworks' tables, is not installed: run pip install 'chatdb[migrate]'"

_PAGE = 1_000
_BYTES = 4 * 1024 * 1024
"""Maximum bytes of text per fetch, unless one message is larger."""

_UNREADABLE: Final = datetime(1, 1, 1)  # noqa: DTZ001 - compared by identity
"""Marks a time that Python cannot represent."""

_LOOKED_FOR: Final = "; ".join(source.looked_for for source in _SOURCES)

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


def read(
    dsn: str,
    format: str = "auto",  # noqa: A002 - the option's name
    *,
    table: str | None = None,
    sessions: Sequence[str] = (),
    user: str | None = None,
) -> Generator[Item, None, None]:
    """
    Yield each session as a conversation, then its messages in the framework's order, with the original as payload.

    `table` is the langchain table, NAME or SCHEMA.NAME, spelled as in the database. `sessions` limits the import to
    these session IDs. If the tables name the user of each session, only those of `user` are read. A message that cannot
    be imported leaves a gap in `seq`.

    Raises InvalidInputError if no table or several match, ConfigurationError if psycopg is missing or the DSN is
    invalid, UnavailableError if the server cannot be reached. No error quotes the DSN or a text.
    """
    sources = [source for source in _SOURCES if format in ("auto", source.name)]
    if not sources:
        raise InvalidInputError("format", f"must be one of auto, {', '.join(FORMATS)} for a database")
    if table is not None:
        sources = [source for source in sources if source.find]
        if not sources:
            named = ", ".join(source.name for source in _SOURCES if source.find)
            raise InvalidInputError("table", f"applies only to {named}: {format} has fixed table names")
    for parameter, value in (("table", table), *(("session", session) for session in sessions)):
        if value is not None:
            utf8_length(parameter, value)
    try:
        import psycopg
    except ImportError:
        raise ConfigurationError(MISSING) from None
    from chatdb.admin.connection import open_connection

    with _mapped_errors(), open_connection(dsn, client_encoding="utf8", prepare_threshold=None) as connection:
        _mark_unreadable_times(connection)
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        names = [table] if table is not None else [name for source in sources for name in source.tables]
        found = _find_tables(connection, names)
        if table is None:
            source, tables = _choose_source(connection, sources, found)
        elif table in found:
            source, tables = sources[0], {"table": found[table]}
        else:
            problem = f"the database has no table {table!r} with the expected columns; looked for {_LOOKED_FOR}"
            raise InvalidInputError("table", f"was not found: {problem}")
        yield from _Reader(connection, source, tables).read(sessions, user)


def _mark_unreadable_times(connection: psycopg.Connection) -> None:
    """Load a time that Python cannot represent as a marker, so that the error can name its row."""
    from psycopg import DataError
    from psycopg.types.datetime import TimestampLoader

    class Loader(TimestampLoader):
        def load(self, data: Any) -> datetime:  # noqa: ANN401 - a bytes-like object
            try:
                return super().load(data)
            except DataError:
                return _UNREADABLE

    connection.adapters.register_loader("timestamp", Loader)


def _find_tables(connection: psycopg.Connection, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the schema and name of each of these tables that exists, and pin the search_path."""
    oids = {name: connection.execute(_OID, [_quoted(name)]).fetchone() for name in names}
    connection.execute(_PIN)
    return {name: tuple(row) for name in names if (row := connection.execute(_NAME, oids[name]).fetchone())}


def _quoted(name: str) -> str:
    """Quote NAME or SCHEMA.NAME for SQL."""
    return ".".join(f'"{part}"' for part in name.replace('"', '""').rsplit(".", 1))


def _choose_source(
    connection: psycopg.Connection, sources: Sequence[Source], found: Mapping[str, tuple[str, ...]]
) -> tuple[Source, dict[str, tuple[str, ...]]]:
    """Return the only source whose tables exist, and the schema and name of each table."""
    candidates: dict[str, tuple[Source, dict[str, tuple[str, ...]]]] = {}
    for source in sources:
        if source.find:
            candidates |= {".".join(row): (source, {"table": row}) for row in connection.execute(source.find)}
        elif found.keys() >= {*source.tables}:
            candidates[source.label] = source, {name: found[name] for name in source.tables}
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    if not candidates:
        raise InvalidInputError("table", f"the database has no supported tables; looked for {_LOOKED_FOR}")
    raise InvalidInputError(
        "table", f"several tables match: use --table or --format to choose among {', '.join(candidates)}"
    )


class _Reader:
    """Reads the tables of a source."""

    def __init__(self, connection: psycopg.Connection, source: Source, tables: Mapping[str, tuple[str, ...]]) -> None:
        from psycopg import sql

        self._connection = connection
        self._source = source
        # psycopg would read a % in a name as a parameter
        self._tables = {
            name: sql.Identifier(*(part.replace("%", "%%") for part in parts)) for name, parts in tables.items()
        }

    def read(self, sessions: Sequence[str], user: str | None) -> Iterator[Item]:
        source = self._source
        wanted = {source.check_session(session) for session in sessions}
        if source.names_user and user is None:
            raise InvalidInputError("user", f"is needed: {source.name}'s tables name the user of each session")
        if source.before is not None:
            yield from source.before(self._execute, user, bool(wanted))
        rows = self._messages({"sessions": sorted(wanted) or None, "user": user})
        for session, messages in groupby(rows, lambda pair: pair[0].session):
            wanted.discard(source.session_id(session))
            yield from conversation_items(source, messages)
        if wanted:
            yield Skipped("no session with this ID", conversations=len(wanted))

    def _messages(self, arguments: Mapping[str, Any]) -> Iterator[tuple[Row, str | None]]:
        """Yield each message and its text, or None if the text is too large."""
        with self._connection.cursor("chatdb") as cursor:
            cursor.execute(self._composed(self._source.rows), arguments)
            while page := [Row(*row) for row in cursor.fetchmany(_PAGE)]:
                start = size = 0
                for index, row in enumerate(page):
                    _check_times(row)
                    if index > start and size + _size(row) > _BYTES:
                        yield from self._with_texts(page[start:index])
                        start, size = index, 0
                    size += _size(row)
                yield from self._with_texts(page[start:])

    def _with_texts(self, rows: list[Row]) -> Iterator[tuple[Row, str | None]]:
        ids = [row.id for row in rows if _size(row)]
        texts: dict[Any, str] = {}
        if ids:
            texts = dict(self._connection.execute(self._composed(self._source.texts), [ids]).fetchall())
        for row in rows:
            yield row, texts.pop(row.id, None)

    def _execute(self, statement: LiteralString, arguments: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
        yield from self._connection.execute(self._composed(statement), arguments)

    def _composed(self, statement: LiteralString) -> sql.Composed:
        from psycopg import sql

        return sql.SQL(statement).format(**self._tables)


def _check_times(row: Row) -> None:
    if any(time is _UNREADABLE for time in (row.began_at, row.ended_at, row.written_at)):
        what = "a session without messages" if row.id is None else f"the message {row.id} or its session"
        raise InvalidInputError("table", f"{what} has a time that is infinite or outside the years 1 to 9999")


def _size(row: Row) -> int:
    return row.size if row.size is not None and row.size <= MAX_PAYLOAD else 0


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
