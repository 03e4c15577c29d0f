"""Maps asyncpg's errors to chatdb's own, and tells in chatdb's words what to do about them."""

import os
import re
import socket
import ssl
from collections.abc import Generator
from contextlib import contextmanager

import asyncpg

from chatdb._core import sqlstate
from chatdb._core.sqlstate import Kind, classify
from chatdb.errors import (
    ChatDBError,
    CommandTimeoutError,
    ConfigurationError,
    ConflictError,
    ConversationNotFoundError,
    InvalidInputError,
    PoolClosedError,
    SchemaError,
    UnavailableError,
)

CONSTRAINTS: dict[str, tuple[str, str]] = {
    "ck_conversations_user_id": ("user_id", "must have 1 to 255 characters"),
    "ck_conversations_key": ("key", "must have 1 to 255 characters"),
    "ck_conversations_title": ("title", "must have at most 1,000 characters"),
    "ck_conversations_metadata": ("metadata", "must be a dict of at most 1 MiB as JSON"),
    "ck_messages_seq": ("seq", "must be 1 or more"),
    "ck_messages_role": ("role", "must be user, assistant, system, developer or tool"),
    "ck_messages_key": ("key", "must have 1 to 255 characters"),
    "ck_messages_content": ("content", "must have at most 4 MiB as UTF-8"),
    "ck_messages_payload": ("payload", "must have at most 16 MiB as JSON"),
    "ck_messages_metadata": ("metadata", "must be a dict of at most 64 KiB as JSON"),
    "ck_messages_token_count": ("token_count", "must be 0 or more"),
}
"""The CHECK constraints, each with the parameter and the sentence of its InvalidInputError."""

CONFLICTS: dict[str, str] = {
    "ck_conversations_last_seq": "some of these keys are stored and some are new: send only the new ones, or all again",
    "uq_conversations_user_id_key": "the user has another conversation of this key",
    "uq_messages_user_id_conversation_id_key": "the conversation has another message of this key",
}
"""The constraints that a caller can run into, each with the sentence of its ConflictError."""

STALE_COUNTERS: dict[str, str] = {
    "pk_conversations": (
        "the sequence of chatdb.conversations.id is behind the rows, as after a restore: as the owner run "
        "select setval('chatdb.conversations_id_seq', (select max(id) from chatdb.conversations))"
    ),
    "pk_messages": (
        "a conversation's last_seq is behind its messages, as after a restore: as the owner run update "
        "chatdb.conversations as c set last_seq = m.seq from (select user_id, conversation_id, max(seq) as seq from "
        "chatdb.messages group by 1, 2) as m where m.user_id = c.user_id and m.conversation_id = c.id "
        "and m.seq > c.last_seq"
    ),
}
"""The constraints that only counters that are behind run into, each with the sentence of its ConfigurationError."""

LINK = "fk_conversations_user"
"""The foreign key to the host's users, which `chatdb link-users` makes."""

_EXHAUSTED = (
    f"a sequence of chatdb's tables has no numbers left (SQLSTATE {sqlstate.SEQUENCE_GENERATOR_LIMIT_EXCEEDED}): as "
    "the owner run alter sequence chatdb.conversations_id_seq no maxvalue, and the same for chatdb.messages_id_seq"
)

_SCHEMA_HINT = (
    "the database lacks chatdb's tables or has older ones than this release needs: run yoyo apply, or chatdb migrate"
)
RLS_USER_ID = "rls_user_id"
"""
What row-level security's function, of the same name in the schema chatdb, gives as the constraint of its error, which
it raises where no user is named.
"""

ROW_SUPPRESSED = (
    "a trigger or rule on chatdb.{}, which is not chatdb's, left a row out, and that is not stored: see chatdb check"
)
NO_USER = (
    "row-level security is on (chatdb protect), and no user is named to the database: open the pool with "
    "create_pool(row_level_security=True), or call inside transaction(db, user_id=...)"
)

# the server's functions, for its words may be those of another language
_RLS_FUNCTIONS = frozenset({"ExecWithCheckOptions", "check_enable_rls"})
_GONE = re.compile("connection is closed|released back to the pool")
_CLOSED = re.compile("pool is (clos|not initialized|being initialized)")
_POOLER_HINT = (
    "the session does not have the prepared statement: DISCARD ALL or DEALLOCATE dropped it, or a transaction pooler "
    "without support for prepared statements stands in front of the database; then pass statement_cache_size=0 to "
    "create_pool, or have it track them (PgBouncer from 1.21: max_prepared_statements)"
)
_READ_ONLY_HINT = (
    "the server takes no writes: it is a standby (connect to the primary), or default_transaction_read_only is on, as "
    "some hosts set it when the disk is full"
)
_STALE_HINT = (
    "a column's type was changed after the transaction had prepared this statement, and the transaction is undone: run "
    "it again"
)
_ATTRIBUTES_HINT = "no host of the DSN meets target_session_attrs={}: check the DSN, and which server is the primary"
_SETTINGS_HINT = (
    "a pooler stands in front of the database and does not take this setting with a connection: instead of by the "
    "DSN's options or server_settings, make it for the role, by ALTER ROLE ... SET"
)
_REFUSED_HINT = "the server{at} refused the connection (SQLSTATE {state}): {reason}"
_REASONS = {
    sqlstate.INVALID_PASSWORD: "the user or the password is wrong, check the DSN",
    sqlstate.INVALID_AUTHORIZATION_SPECIFICATION: "the user does not exist, or may not log in from here (pg_hba.conf)",
    sqlstate.INVALID_CATALOG_NAME: "there is no database of this name, create it or check the DSN",
}
_REASON = "the user, the password or the database is not known there, check the DSN"
_FULL_HINT = "the server takes no connections at the moment: try again"
_REFUSED = re.compile("auth[a-z]* failed|password|no such (user|database)|login rejected|database .*(exist|disabled)")
_FULL = re.compile("connections|connection slots|too many clients")
_FUNCTION = re.compile(r"PL/[^\n]*?([A-Za-z_][\w.$]*\([^()\n]*\))")
_ATTRIBUTE = re.compile("(?<=')[a-z-]+(?=')")
_ENCODING = re.compile(
    r"\b(?:SQL_ASCII|LATIN\d+|WIN\d+|EUC_\w+|ISO_8859_\d+|KOI8[RU]|MULE_INTERNAL|BIG5|GBK|GB18030|JOHAB|SJIS|UHC)\b"
)
_NOT_NULL = frozenset({"user_id", "conversation_id", "seq", "role", "content", "created_at"})
# what the server undid for a reason that passes, whoever's function was running: connections, resources, locks, limits
_TRANSIENT = frozenset(
    {Kind.CONNECTION, Kind.RESOURCES, Kind.INTERNAL, Kind.INVALID_STATE, Kind.READ_ONLY, Kind.CANCELED}
    | {Kind.SERIALIZATION, Kind.DEADLOCK, Kind.LOCK_TIMEOUT}
)
_NAMES = re.compile('"[^"]*"|(?<=database: ).*')
"""What of a pooler's words is a user's or a database's name."""


def map_driver_error(error: Exception, server: str = "") -> ChatDBError | None:
    """
    Return chatdb's own error for a driver's, or None for misuse, which is to be seen as it is.

    `server` is what it was connected to, as a person reads it, where that is known.
    """
    at = f" at {server}" if server else ""
    if isinstance(error, asyncpg.PostgresError):
        code = _function_of(error)
        # what the server adds quotes the row ("Failing row contains (1, my secret message)"), and a traceback shows it
        vars(error).update(detail=None, context=None)
        return _of_server(error, code, at)
    if isinstance(error, asyncpg.TargetServerAttributeNotMatched):
        wanted = _ATTRIBUTE.search(str(error))
        return UnavailableError(_ATTRIBUTES_HINT.format(wanted[0] if wanted else "..."), sent=False)
    if isinstance(error, asyncpg.DataError):
        return InvalidInputError("argument", "the driver cannot send a value of this type or range")
    if isinstance(error, asyncpg.ClientConfigurationError | ssl.SSLCertVerificationError):
        return ConfigurationError(
            f"the connection cannot be made as configured ({type(error).__name__}): check the DSN"
        )
    if isinstance(error, TimeoutError):
        return CommandTimeoutError(
            "the server did not answer within the command timeout, and may still have carried the statement out",
            sent=True,
        )
    if isinstance(error, ConnectionError) and "rejected SSL upgrade" in str(error):
        return ConfigurationError(
            "the server offers no TLS: for a network that you trust, add sslmode=disable to the DSN"
        )
    if isinstance(error, OSError):
        refused = isinstance(error, ConnectionRefusedError | FileNotFoundError | socket.gaierror)
        return UnavailableError(
            f"the database server{at} cannot be reached ({_reason(error)}): check that it runs and that the DSN names "
            "its host and port",
            sent=False if refused else None,
        )
    if isinstance(error, asyncpg.InternalClientError):  # raised over the loss of a connection, which is its context
        return _lost(error)
    if isinstance(error, asyncpg.InterfaceError) and _CLOSED.search(str(error)):
        return PoolClosedError("the pool is closed, or not open yet", sent=False)
    if isinstance(error, asyncpg.InterfaceError) and _GONE.search(str(error)):
        return UnavailableError("the connection was lost, or given back to the pool, before this statement", sent=False)
    return None


@contextmanager
def mapped_driver_errors() -> Generator[None, None, None]:
    """Raise chatdb's own errors for the driver's."""
    try:
        yield
    except Exception as error:
        found = as_chatdb_error(error)
        if found is None:
            raise
        raise found from found.__cause__


def as_chatdb_error(error: Exception) -> ChatDBError | None:
    """Return the error if it is chatdb's own, else as `map_driver_error`, with the driver's as its cause."""
    if isinstance(error, ChatDBError):
        return error
    found = map_driver_error(error)
    if found is not None and not isinstance(error, asyncpg.DataError):  # whose complaint quotes the argument
        found.__cause__ = error
    return found


def _reason(error: OSError) -> str:
    """Return what went wrong, in the operating system's words: "Connection refused", "Name or service not known"."""
    if isinstance(error, socket.gaierror):
        return error.strerror or "the host's name cannot be resolved"
    return os.strerror(error.errno) if error.errno else type(error).__name__


def _function_of(error: asyncpg.PostgresError) -> str | None:
    """
    Return the procedural function that an error came from, as the server's context names it in any language.

    It is the outermost one: what stands before it may quote a statement with a text of the caller's.
    """
    context = getattr(error, "context", None)
    found = _FUNCTION.findall(context) if isinstance(context, str) else None
    return found[-1] if found else None


def _lost(error: Exception) -> UnavailableError:
    return UnavailableError(
        f"the connection to the database was lost ({type(error).__name__}): a read or a keyed write can be repeated",
        sent=None,
    )


def _of_server(error: asyncpg.PostgresError, code: str | None, at: str) -> ChatDBError | None:
    state, kind = error.sqlstate or "", classify(error)
    if error.constraint_name == RLS_USER_ID:
        return ConfigurationError(NO_USER)
    if code and kind not in _TRANSIENT:
        return _refused(f"function {code}", state)
    if found := _of_constraint(error):
        return found
    match kind, state:
        case _, sqlstate.CANNOT_CONNECT_NOW | sqlstate.TOO_MANY_CONNECTIONS | sqlstate.OBJECT_NOT_IN_PREREQUISITE_STATE:
            return UnavailableError(_FULL_HINT, sent=False)
        case _, sqlstate.SEQUENCE_GENERATOR_LIMIT_EXCEEDED:
            return ConfigurationError(_EXHAUSTED)
        case _, sqlstate.UNTRANSLATABLE_CHARACTER | sqlstate.CHARACTER_NOT_IN_REPERTOIRE if (
            encoding := _ENCODING.search(str(error))
        ):
            return ConfigurationError(
                f"the database's encoding, {encoding[0]}, cannot hold a character of a text: chatdb needs a database "
                "with encoding UTF8 (see chatdb check)"
            )
        case Kind.VALUE | Kind.CONSTRAINT, _:
            return InvalidInputError("argument", f"the server refused a value (SQLSTATE {state})")
        case (Kind.SCHEMA, _) | (_, sqlstate.INVALID_COLUMN_REFERENCE):
            return SchemaError(_SCHEMA_HINT)
        case Kind.PRIVILEGE, _ if error.server_source_function in _RLS_FUNCTIONS:
            return ConfigurationError(
                "row-level security is on (chatdb protect), and the row is not that of the transaction's user: write "
                "inside transaction(db, user_id=...) of the same user"
            )
        case Kind.PRIVILEGE, _:
            return ConfigurationError("the database role lacks a privilege on chatdb's tables: grant it to the role")
        case Kind.AUTHENTICATION, _:
            return ConfigurationError(_REFUSED_HINT.format(at=at, state=state, reason=_REASONS.get(state, _REASON)))
        case _, sqlstate.PROTOCOL_VIOLATION if error.server_source_function is None:
            return _of_pooler(error, at)
        case (Kind.PREPARED_STATEMENT, _) | (_, sqlstate.PROTOCOL_VIOLATION):
            return ConfigurationError(_POOLER_HINT)
        case Kind.CONNECTION, _:
            return _lost(error)
        case Kind.CANCELED, _:
            return CommandTimeoutError(
                "the server cancelled the statement, by its statement_timeout or a request", sent=True
            )
        case Kind.READ_ONLY, _:
            return UnavailableError(_READ_ONLY_HINT, sent=True)
        case Kind.SERIALIZATION | Kind.DEADLOCK | Kind.LOCK_TIMEOUT, _:
            return UnavailableError(f"the server rolled the statement back (SQLSTATE {state}): try again", sent=True)
        case Kind.RESOURCES | Kind.INTERNAL, _:
            return UnavailableError(
                f"the server failed, and undid the statement (SQLSTATE {state}): see its log", sent=True
            )
        case _ if isinstance(error, asyncpg.InvalidCachedStatementError):
            return UnavailableError(_STALE_HINT, sent=True)
        case _:  # such as a statement in a transaction that has failed: misuse
            return None


def _of_constraint(error: asyncpg.PostgresError) -> ChatDBError | None:
    """Return the error of a constraint, chatdb's own or the host's."""
    name, column = error.constraint_name, error.column_name
    if error.schema_name in {None, "chatdb"}:
        if name in CONSTRAINTS:
            return InvalidInputError(*CONSTRAINTS[name])
        if name in CONFLICTS:
            return ConflictError(CONFLICTS[name])
        if name in STALE_COUNTERS:
            return ConfigurationError(STALE_COUNTERS[name])
        is_reference = error.sqlstate == sqlstate.FOREIGN_KEY_VIOLATION
        if is_reference and name in {None, "fk_messages_conversation"}:  # Citus names no constraint
            return ConversationNotFoundError("the user has no such conversation: it was deleted meanwhile")
        if is_reference and name == LINK:
            return InvalidInputError("user_id", "is none of the host's users, to whom the database links conversations")
        if error.sqlstate == sqlstate.NOT_NULL_VIOLATION and column in _NOT_NULL:
            return InvalidInputError(str(column), "must be given")
    if not error.table_name or classify(error) is not Kind.CONSTRAINT:
        return None
    part = f"constraint {name}" if name else f"NOT NULL of the column {column}"
    return _refused(f"{part} of the table {error.schema_name}.{error.table_name}", error.sqlstate)


def _refused(what: str, state: str) -> ConfigurationError:
    return ConfigurationError(
        f"the database's own {what}, which is not chatdb's, refused the statement (SQLSTATE {state}), and nothing of "
        "it is stored: the server's log has more"
    )


def _of_pooler(error: asyncpg.PostgresError, at: str) -> ChatDBError:
    """Tell by PgBouncer's words, always English, what its own errors are about: they have one SQLSTATE for all."""
    words = _NAMES.sub("", str(error))
    if "prepared statement" in words:
        return ConfigurationError(_POOLER_HINT)
    if "startup parameter" in words:
        return ConfigurationError(_SETTINGS_HINT)
    if "SSL required" in words:
        return ConfigurationError("a pooler stands in front of the database and takes TLS only: see the DSN's sslmode")
    if _REFUSED.search(words):
        return ConfigurationError(_REFUSED_HINT.format(at=at, state=sqlstate.PROTOCOL_VIOLATION, reason=_REASON))
    if _FULL.search(words):
        return UnavailableError(_FULL_HINT, sent=False)
    return _lost(error)
