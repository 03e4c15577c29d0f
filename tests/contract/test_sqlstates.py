"""One module names the SQLSTATEs and sorts them into kinds, from which each caller derives its errors."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import asyncpg
import psycopg
import pytest

from chatdb import (
    ChatDBError,
    CommandTimeoutError,
    ConfigurationError,
    InvalidInputError,
    SchemaError,
    UnavailableError,
)
from chatdb._core import sqlstate
from chatdb._core.driver_errors import map_driver_error
from chatdb._core.sqlstate import Kind, classify
from chatdb.admin.connection import map_psycopg_error
from chatdb.transfer.tables import _map_error
from tests.support.names import MODULES, PACKAGE

KNOWN = {error.sqlstate for error in vars(asyncpg.exceptions).values() if getattr(error, "sqlstate", None)}
NAMED = {name: value for name, value in vars(sqlstate).items() if name.isupper() and isinstance(value, str)}


def literals(module: Path) -> set[str]:
    """Return the SQLSTATEs in a module's strings."""
    nodes = ast.walk(ast.parse(module.read_text(encoding="utf-8")))
    strings = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return {word for string in strings for word in re.findall(r"\b[0-9A-Z]{5}\b", string)} & KNOWN


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_module_spells_an_sqlstate(module: Path) -> None:
    """Other modules use an SQLSTATE by its name."""
    assert literals(module) == (set(NAMED.values()) if module.stem == "sqlstate" else set())


def test_the_names_are_postgresqls() -> None:
    """Each name is PostgreSQL's condition name, which psycopg's classes spell in camel case."""
    names = {name: psycopg.errors.lookup(value).__name__ for name, value in NAMED.items()}
    assert names == {name: name.title().replace("_", "") for name in NAMED}


def test_no_sqlstate_is_of_two_kinds() -> None:
    """Each SQLSTATE has one kind."""
    states = [state for kind in Kind for state in kind.value]
    assert len(states) == len(set(states))


@pytest.mark.parametrize(
    ("state", "kind", "of_core", "of_operators", "of_tables"),
    [
        ("08006", Kind.CONNECTION, UnavailableError, UnavailableError, UnavailableError),
        ("57P01", Kind.CONNECTION, UnavailableError, UnavailableError, UnavailableError),
        ("57P03", Kind.CONNECTION, UnavailableError, UnavailableError, UnavailableError),
        ("53300", Kind.RESOURCES, UnavailableError, ChatDBError, UnavailableError),
        ("58030", Kind.RESOURCES, UnavailableError, ChatDBError, UnavailableError),
        ("XX000", Kind.INTERNAL, UnavailableError, ChatDBError, ChatDBError),
        ("55000", Kind.INVALID_STATE, ConfigurationError, ChatDBError, ChatDBError),
        ("25P02", Kind.INVALID_STATE, None, ChatDBError, ChatDBError),
        ("25006", Kind.READ_ONLY, UnavailableError, ConfigurationError, ChatDBError),
        ("40001", Kind.SERIALIZATION, UnavailableError, ChatDBError, ChatDBError),
        ("40P01", Kind.DEADLOCK, UnavailableError, UnavailableError, ChatDBError),
        ("55P03", Kind.LOCK_TIMEOUT, UnavailableError, UnavailableError, ChatDBError),
        ("57014", Kind.CANCELED, CommandTimeoutError, UnavailableError, CommandTimeoutError),
        ("28P01", Kind.AUTHENTICATION, ConfigurationError, ChatDBError, ChatDBError),
        ("42501", Kind.PRIVILEGE, ConfigurationError, ConfigurationError, ConfigurationError),
        ("26000", Kind.PREPARED_STATEMENT, ConfigurationError, ChatDBError, ChatDBError),
        ("42P01", Kind.SCHEMA, SchemaError, ChatDBError, InvalidInputError),
        ("42P10", Kind.OTHER, SchemaError, ChatDBError, ChatDBError),
        ("42804", Kind.STATEMENT, None, ChatDBError, InvalidInputError),
        ("22003", Kind.VALUE, InvalidInputError, ChatDBError, ChatDBError),
        ("23505", Kind.CONSTRAINT, InvalidInputError, ChatDBError, ChatDBError),
        ("P0001", Kind.OTHER, None, ChatDBError, ChatDBError),
    ],
)
def test_what_each_caller_makes_of_it(
    state: str,
    kind: Kind,
    of_core: type[ChatDBError] | None,
    of_operators: type[ChatDBError],
    of_tables: type[ChatDBError],
) -> None:
    """The functions, the operator commands and the table reader each map a kind to their own error."""
    error = asyncpg.PostgresError.new({"S": "ERROR", "C": state, "M": "words"})
    other = psycopg.errors.lookup(state)("words")
    assert (classify(error), classify(other)) == (kind, kind)
    mapped = map_driver_error(error)
    assert (None if mapped is None else type(mapped)) is of_core
    assert type(map_psycopg_error(other)) is of_operators
    assert type(_map_error(other, False)) is of_tables


@pytest.mark.parametrize(
    ("error", "of_operators", "of_tables"),
    [
        (psycopg.OperationalError("words"), UnavailableError, UnavailableError),
        (psycopg.DataError("words"), ChatDBError, InvalidInputError),
    ],
)
def test_an_error_of_the_client(error: psycopg.Error, of_operators: type, of_tables: type) -> None:
    """An error without an SQLSTATE is the driver's: a lost connection, or a value it cannot read."""
    assert classify(error) is Kind.CLIENT
    assert type(map_psycopg_error(error)) is of_operators
    assert type(_map_error(error, isinstance(error, psycopg.DataError))) is of_tables
