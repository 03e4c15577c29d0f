"""SQLSTATEs by their condition names in the PostgreSQL manual (appendix A), and the kind of failure each means."""

from enum import Enum
from typing import Final

PROTOCOL_VIOLATION: Final = "08P01"
SEQUENCE_GENERATOR_LIMIT_EXCEEDED: Final = "2200H"
CHARACTER_NOT_IN_REPERTOIRE: Final = "22021"
UNTRANSLATABLE_CHARACTER: Final = "22P05"
NOT_NULL_VIOLATION: Final = "23502"
FOREIGN_KEY_VIOLATION: Final = "23503"
READ_ONLY_SQL_TRANSACTION: Final = "25006"
INVALID_SQL_STATEMENT_NAME: Final = "26000"
INVALID_AUTHORIZATION_SPECIFICATION: Final = "28000"
INVALID_PASSWORD: Final = "28P01"  # noqa: S105 - no password
INVALID_CATALOG_NAME: Final = "3D000"
INVALID_SCHEMA_NAME: Final = "3F000"
SERIALIZATION_FAILURE: Final = "40001"
DEADLOCK_DETECTED: Final = "40P01"
INSUFFICIENT_PRIVILEGE: Final = "42501"
SYNTAX_ERROR: Final = "42601"
INVALID_NAME: Final = "42602"
UNDEFINED_COLUMN: Final = "42703"
DATATYPE_MISMATCH: Final = "42804"
WRONG_OBJECT_TYPE: Final = "42809"
CANNOT_COERCE: Final = "42846"
UNDEFINED_FUNCTION: Final = "42883"
UNDEFINED_TABLE: Final = "42P01"
DUPLICATE_PREPARED_STATEMENT: Final = "42P05"
INVALID_COLUMN_REFERENCE: Final = "42P10"
TOO_MANY_CONNECTIONS: Final = "53300"
OBJECT_NOT_IN_PREREQUISITE_STATE: Final = "55000"
LOCK_NOT_AVAILABLE: Final = "55P03"
QUERY_CANCELED: Final = "57014"
CANNOT_CONNECT_NOW: Final = "57P03"


class Kind(Enum):
    """The kinds of failure. Each value lists SQLSTATEs or SQLSTATE classes (the first two characters)."""

    CLIENT = ("",)  # no SQLSTATE: raised by the driver, not the server
    CONNECTION = "08", "57"
    RESOURCES = "53", "58"
    INTERNAL = ("XX",)
    INVALID_STATE = "25", "40", "55"  # of a transaction or an object
    READ_ONLY = (READ_ONLY_SQL_TRANSACTION,)
    SERIALIZATION = (SERIALIZATION_FAILURE,)
    DEADLOCK = (DEADLOCK_DETECTED,)
    LOCK_TIMEOUT = (LOCK_NOT_AVAILABLE,)
    CANCELED = (QUERY_CANCELED,)
    AUTHENTICATION = "28", "3D"
    PRIVILEGE = (INSUFFICIENT_PRIVILEGE,)
    PREPARED_STATEMENT = INVALID_SQL_STATEMENT_NAME, DUPLICATE_PREPARED_STATEMENT
    SCHEMA = UNDEFINED_TABLE, UNDEFINED_COLUMN, UNDEFINED_FUNCTION, INVALID_SCHEMA_NAME
    STATEMENT = SYNTAX_ERROR, INVALID_NAME, DATATYPE_MISMATCH, WRONG_OBJECT_TYPE, CANNOT_COERCE
    CONSTRAINT = ("23",)
    VALUE = "22", "54"
    OTHER = ("other",)  # not an SQLSTATE; Enum in Python 3.11.2 rejects an empty tuple


_KINDS: Final = {state: kind for kind in Kind for state in kind.value}


def classify(error: BaseException | None) -> Kind:
    """Return the kind of a driver error, by its SQLSTATE or else by the SQLSTATE's class."""
    state = getattr(error, "sqlstate", None) or ""
    return _KINDS.get(state) or _KINDS.get(state[:2], Kind.OTHER)
