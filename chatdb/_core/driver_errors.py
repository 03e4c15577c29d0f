"""Maps asyncpg's errors to chatdb's own, with messages that say what to do."""

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
    MessageNotFoundError,
    PoolClosedError,
    SchemaError,
    UnavailableError,
)

CONSTRAINTS: dict[str, tuple[str, str]] = {
    "ck_conversations_user_id": ("user_id", "must be 1 to 255 characters long"),
    "ck_conversations_key": ("key", "must be 1 to 255 characters long"),
    "ck_conversations_title": ("title", "must be at most 1,000 characters long"),
    "ck_conversations_metadata": ("metadata", "must be a dict of at most 1 MiB as JSON"),
    "ck_messages_seq": ("seq", "must be at least 1"),
    "ck_messages_role": ("role", "must be user, assistant, system, developer or tool"),
    "ck_messages_key": ("key", "must be 1 to 255 characters long"),
    "ck_messages_content": ("content", "must be at most 4 MiB in UTF-8"),
    "ck_messages_payload": ("payload", "must be at most 16 MiB as JSON"),
    "ck_messages_metadata": ("metadata", "must be a dict of at most 64 KiB as JSON"),
    "ck_messages_token_count": ("token_count", "must be at least 0"),
    "ck_messages_state": ("state", "must be streaming or aborted"),
    "ck_messages_parent_seq": ("parent_seq", "must be at least 0 and less than seq"),
}
"""The parameter and the reason of the InvalidInputError for each CHECK constraint."""

CONFLICTS: dict[str, str] = {
    "ck_conversations_last_seq": "only some keys of the batch are already stored: send only the new messages",
    "uq_conversations_user_id_key": "the user already has another conversation with this key",
    "uq_messages_user_id_conversation_id_key": "the conversation already has another message with this key",
}
"""The ConflictError message for each constraint that a caller can violate."""

STALE_COUNTERS: dict[str, str] = {
    "pk_conversations": (
        "the sequence of chatdb.conversations.id is behind the table, probably after a restore: as the owner, run "
        "select setval('chatdb.conversations_id_seq', (select max(id) from chatdb.conversations))"
    ),
    "pk_messages": (
        "a conversation's last_seq is behind its messages, probably after a restore: as the owner, run update "
        "chatdb.conversations as c set last_seq = m.seq from (select user_id, conversation_id, max(seq) as seq from "
        "chatdb.messages group by 1, 2) as m where m.user_id = c.user_id and m.conversation_id = c.id "
        "and m.seq > c.last_seq"
    ),
}
"""The ConfigurationError message for each constraint that only an outdated counter can violate."""

LINK = "fk_conversations_user"
"""The foreign key to the host's users table, created by `chatdb link-users`."""

_REFERENCES = frozenset({"fk_messages_conversation", "fk_message_parts_message", LINK})
_KNOWN = _REFERENCES | CONSTRAINTS.keys() | CONFLICTS.keys() | STALE_COUNTERS.keys()
_QUOTED = re.compile(r'(?<=")\w+(?=")')
_SHARD = re.compile(r"_\d{6,}$")
_COLUMN = re.compile(r'column "(\w+)" of relation')

_EXHAUSTED = (
    f"an id sequence of chatdb has reached its maximum (SQLSTATE {sqlstate.SEQUENCE_GENERATOR_LIMIT_EXCEEDED}): as the "
    "owner, run alter sequence chatdb.conversations_id_seq no maxvalue, and the same for chatdb.messages_id_seq"
)

_SCHEMA_HINT = "chatdb's tables are missing or older than this release needs: run chatdb migrate or yoyo apply"
RLS_USER_ID = "rls_user_id"
"""The constraint name in the error that row-level security's function, chatdb.rls_user_id(), raises without a user."""

ROW_SUPPRESSED = "the row was not stored because a custom trigger or rule on chatdb.{} suppressed it: see chatdb check"
NO_USER = (
    "row-level security is on (chatdb protect), but no user is set: open the pool with "
    "create_pool(row_level_security=True), or make the call inside transaction(db, user_id=...)"
)

# C functions of the server, because it may translate its messages
_RLS_FUNCTIONS = frozenset({"ExecWithCheckOptions", "check_enable_rls"})
_GONE = re.compile("connection is closed|released back to the pool")
_CLOSED = re.compile("pool is (clos|not initialized|being initialized)")
_POOLER_HINT = (
    "the session does not have the prepared statement, because DISCARD ALL or DEALLOCATE dropped it or a transaction "
    "pooler does not track prepared statements: behind a pooler, pass statement_cache_size=0 to create_pool or set "
    "max_prepared_statements in PgBouncer (1.21 or later)"
)
_READ_ONLY_HINT = (
    "the server is read-only: connect to the primary if this is a standby, or check default_transaction_read_only, "
    "which some providers turn on when the disk is full"
)
_STALE_HINT = (
    "a column's type changed after this statement was prepared, and the transaction was rolled back: run the "
    "transaction again"
)
_ATTRIBUTES_HINT = "no host in the DSN satisfies target_session_attrs={}: check the DSN and which server is the primary"
_SETTINGS_HINT = (
    "the pooler does not accept this startup parameter: remove it from the DSN or server_settings, and set it on the "
    "role with ALTER ROLE ... SET"
)
_REFUSED_HINT = "the server{at} refused the connection (SQLSTATE {state}): {reason}"
_REASONS = {
    sqlstate.INVALID_PASSWORD: "the user name or password is incorrect; check the DSN",
    sqlstate.INVALID_AUTHORIZATION_SPECIFICATION: "the user does not exist or may not log in; check pg_hba.conf",
    sqlstate.INVALID_CATALOG_NAME: "the database does not exist; create it or check the DSN",
}
_REASON = "the user name, password or database name is incorrect; check the DSN"
_FULL_HINT = "the server is not accepting connections at the moment: try again later"
_REFUSED = re.compile("auth[a-z]* failed|password|no such (user|database)|login rejected|database .*(exist|disabled)")
_FULL = re.compile("connections|connection slots|too many clients")
_FUNCTION = re.compile(r"PL/[^\n]*?([A-Za-z_][\w.$]*\([^()\n]*\))")
_OWN_FUNCTION = re.compile(r"chatdb\.\w+_v\d+\(")
_ATTRIBUTE = re.compile("(?<=')[a-z-]+(?=')")
_ENCODING = re.compile(
    r"\b(?:SQL_ASCII|LATIN\d+|WIN\d+|EUC_\w+|ISO_8859_\d+|KOI8[RU]|MULE_INTERNAL|BIG5|GBK|GB18030|JOHAB|SJIS|UHC)\b"
)
_NOT_NULL = frozenset({"user_id", "conversation_id", "seq", "role", "content", "created_at"})
# transient failures, which a host's function does not cause
_TRANSIENT = frozenset(
    {Kind.CONNECTION, Kind.RESOURCES, Kind.INTERNAL, Kind.INVALID_STATE, Kind.READ_ONLY, Kind.CANCELED}
    | {Kind.SERIALIZATION, Kind.DEADLOCK, Kind.LOCK_TIMEOUT}
)
_NAMES = re.compile('"[^"]*"|(?<=database: ).*')
"""The user and database names in a pooler's message."""


def map_driver_error(error: Exception, server: str = "") -> ChatDBError | None:
    """
    Return chatdb's error for a driver error, or None for a programming error, which propagates unchanged.

    `server` describes the hosts and ports in the message, if known.
    """
    at = f" at {server}" if server else ""
    if isinstance(error, asyncpg.PostgresError):
        code = _function_of(error)
        # a traceback shows the detail, which quotes the row: "Failing row contains (1, my secret message)"
        vars(error).update(detail=None, context=None)
        return _of_server(error, code, at)
    if isinstance(error, asyncpg.TargetServerAttributeNotMatched):
        wanted = _ATTRIBUTE.search(str(error))
        return UnavailableError(_ATTRIBUTES_HINT.format(wanted[0] if wanted else "..."), sent=False)
    if isinstance(error, asyncpg.DataError):
        return InvalidInputError("argument", "has a type or a value that the driver cannot send")
    if isinstance(error, asyncpg.ClientConfigurationError | ssl.SSLCertVerificationError):
        return ConfigurationError(f"could not connect with these settings ({type(error).__name__}): check the DSN")
    if isinstance(error, TimeoutError):
        return CommandTimeoutError(
            "the server did not answer within the command timeout and may have executed the statement: a read or a "
            "keyed write is safe to repeat",
            sent=True,
        )
    if isinstance(error, ConnectionError) and "rejected SSL upgrade" in str(error):
        return ConfigurationError(
            "the server does not support TLS: on a network that you trust, add sslmode=disable to the DSN"
        )
    if isinstance(error, OSError):
        refused = isinstance(error, ConnectionRefusedError | FileNotFoundError | socket.gaierror)
        return UnavailableError(
            f"the database server{at} cannot be reached ({_reason(error)}): check that it is running and that "
            "the DSN has the right host and port",
            sent=False if refused else None,
        )
    if isinstance(error, asyncpg.InternalClientError):  # a lost connection is its context
        return _lost(error)
    if isinstance(error, asyncpg.InterfaceError) and _CLOSED.search(str(error)):
        return PoolClosedError("the pool is closed or not open yet", sent=False)
    if isinstance(error, asyncpg.InterfaceError) and _GONE.search(str(error)):
        return UnavailableError(
            "the connection was lost or returned to the pool before this statement: acquire another", sent=False
        )
    return None


@contextmanager
def mapped_driver_errors() -> Generator[None, None, None]:
    """Raise chatdb's errors in place of the driver's."""
    try:
        yield
    except Exception as error:
        found = as_chatdb_error(error)
        if found is None:
            raise
        raise found from found.__cause__


def as_chatdb_error(error: Exception) -> ChatDBError | None:
    """Return chatdb's own errors unchanged. Map others with `map_driver_error` and set their cause."""
    if isinstance(error, ChatDBError):
        return error
    found = map_driver_error(error)
    if found is not None and not isinstance(error, asyncpg.DataError):  # it quotes the argument
        found.__cause__ = error
    return found


def _reason(error: OSError) -> str:
    """Return the operating system's message, such as "Connection refused" or "Name or service not known"."""
    if isinstance(error, socket.gaierror):
        return error.strerror or "the host name cannot be resolved"
    return os.strerror(error.errno) if error.errno else type(error).__name__


def _function_of(error: asyncpg.PostgresError) -> str | None:
    """
    Return the outermost procedural function in the error's context that is not chatdb's, in any language of the server.

    The lines before it may quote a statement with the caller's values.
    """
    context = getattr(error, "context", None)
    names: list[str] = _FUNCTION.findall(context) if isinstance(context, str) else []
    found = [name for name in names if not _OWN_FUNCTION.match(name)]
    return found[-1] if found else None


def _lost(error: Exception) -> UnavailableError:
    return UnavailableError(
        f"the connection to the database was lost ({type(error).__name__}): a read or a keyed write is safe to repeat",
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
        case _, sqlstate.CANNOT_CONNECT_NOW | sqlstate.TOO_MANY_CONNECTIONS:
            return UnavailableError(_FULL_HINT, sent=False)
        case _, sqlstate.OBJECT_NOT_IN_PREREQUISITE_STATE if at:  # while connecting
            return UnavailableError(_FULL_HINT, sent=False)
        case _, sqlstate.OBJECT_NOT_IN_PREREQUISITE_STATE:
            return ConfigurationError(f"the server refused the statement (SQLSTATE {state}): check the server log")
        case _, sqlstate.SEQUENCE_GENERATOR_LIMIT_EXCEEDED:
            return ConfigurationError(_EXHAUSTED)
        case _, sqlstate.UNTRANSLATABLE_CHARACTER | sqlstate.CHARACTER_NOT_IN_REPERTOIRE if (
            encoding := _ENCODING.search(str(error))
        ):
            return ConfigurationError(
                f"the database's encoding, {encoding[0]}, cannot store a character in the text: chatdb needs a "
                "database with encoding UTF8 (see chatdb check)"
            )
        case Kind.VALUE | Kind.CONSTRAINT, _:
            return InvalidInputError("argument", f"the server rejected a value (SQLSTATE {state})")
        case (Kind.SCHEMA, _) | (_, sqlstate.INVALID_COLUMN_REFERENCE):
            return SchemaError(_SCHEMA_HINT)
        case Kind.PRIVILEGE, _ if error.server_source_function in _RLS_FUNCTIONS:
            return ConfigurationError(
                "row-level security (chatdb protect) rejected a row that does not belong to the transaction's user: "
                "write it inside transaction(db, user_id=...) for its own user"
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
                "the server cancelled the statement because of statement_timeout or a cancel request: try again, or "
                "raise statement_timeout",
                sent=True,
            )
        case Kind.READ_ONLY, _:
            return UnavailableError(_READ_ONLY_HINT, sent=True)
        case Kind.SERIALIZATION | Kind.DEADLOCK | Kind.LOCK_TIMEOUT, _:
            return UnavailableError(f"the server rolled back the statement (SQLSTATE {state}): try again", sent=True)
        case Kind.RESOURCES | Kind.INTERNAL, _:
            return UnavailableError(
                f"the server failed and rolled back the statement (SQLSTATE {state}): check the server log", sent=True
            )
        case _ if isinstance(error, asyncpg.InvalidCachedStatementError):
            return UnavailableError(_STALE_HINT, sent=True)
        case _:  # a programming error, such as a statement in a failed transaction
            return None


def constraint_of(error: asyncpg.PostgresError) -> str | None:
    """
    Return the name of the violated constraint.

    Citus sends it only in the message, where it can end in the number of a shard: "pk_messages_102008". If it copies
    rows to a node, as an INSERT of selected rows does, the SQLSTATE is that of an internal error.
    """
    if error.constraint_name or not _is_violation(error):
        return error.constraint_name
    names = [_SHARD.sub("", name) for name in _QUOTED.findall(str(error))]
    known = next((name for name in names if name in _KNOWN), None)
    # of the host's, whose name comes last
    return known or (names[-1] if names and not _COLUMN.search(str(error)) else None)


def _is_violation(error: asyncpg.PostgresError) -> bool:
    is_copy = classify(error) is Kind.INTERNAL and " constraint " in str(error)
    return is_copy or classify(error) is Kind.CONSTRAINT


def _column_of(error: asyncpg.PostgresError) -> str | None:
    if error.column_name or error.sqlstate != sqlstate.NOT_NULL_VIOLATION:
        return error.column_name
    found = _COLUMN.search(str(error))
    return found[1] if found else None


def _of_constraint(error: asyncpg.PostgresError) -> ChatDBError | None:
    name, column = constraint_of(error), _column_of(error)
    if error.schema_name in {None, "chatdb"}:
        if name in CONSTRAINTS:
            return InvalidInputError(*CONSTRAINTS[name])
        if name in CONFLICTS:
            return ConflictError(CONFLICTS[name])
        if name in STALE_COUNTERS:
            return ConfigurationError(STALE_COUNTERS[name])
        is_reference = error.sqlstate == sqlstate.FOREIGN_KEY_VIOLATION
        if (is_reference and name is None) or name == "fk_messages_conversation":
            return ConversationNotFoundError("the user has no such conversation: it was deleted during the call")
        if name == "fk_message_parts_message":
            return MessageNotFoundError("the message was deleted during the call")
        if name == LINK:
            return InvalidInputError("user_id", "is not in the users table that chatdb link-users references")
        if error.sqlstate == sqlstate.NOT_NULL_VIOLATION and column in _NOT_NULL:
            return InvalidInputError(str(column), "is required")
    if not _is_violation(error) or not (error.table_name or name or column):
        return None
    part = f"constraint {name}" if name else f"NOT NULL constraint for column {column}"
    table = f" on table {error.schema_name}.{error.table_name}" if error.table_name else ""
    return _refused(part + table, error.sqlstate)


def _refused(what: str, state: str) -> ConfigurationError:
    return ConfigurationError(
        f"the database's own {what}, which is not part of chatdb, rejected the statement (SQLSTATE {state}), so "
        "nothing was stored: check the server log"
    )


def _of_pooler(error: asyncpg.PostgresError, at: str) -> ChatDBError:
    """Map PgBouncer's errors by their text, which is always English: they all share one SQLSTATE."""
    words = _NAMES.sub("", str(error))
    if "prepared statement" in words:
        return ConfigurationError(_POOLER_HINT)
    if "startup parameter" in words:
        return ConfigurationError(_SETTINGS_HINT)
    if "SSL required" in words:
        return ConfigurationError("the pooler accepts only TLS connections: check sslmode in the DSN")
    if _REFUSED.search(words):
        return ConfigurationError(_REFUSED_HINT.format(at=at, state=sqlstate.PROTOCOL_VIOLATION, reason=_REASON))
    if _FULL.search(words):
        return UnavailableError(_FULL_HINT, sent=False)
    return _lost(error)
