"""What the commands on the data of all users share: their SQL files, and what they require of the server."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from chatdb._core.query import data_folder
from chatdb.errors import ConfigurationError

STANDBY: Final = "the server is a standby, which is read-only: connect to the primary"


@cache
def statement(name: str) -> str:
    """Return the statement of `sql/admin/<name>.sql`."""
    return (data_folder("sql") / "admin" / f"{name}.sql").read_text(encoding="utf-8")


def check_server(server: Mapping[str, Any], *, dry_run: bool) -> None:
    """
    Check the row of `check_operator.sql`.

    Raises ConfigurationError if row-level security hides rows from the role or, except for a dry run, if the server is
    a standby.
    """
    if server["has_row_security"]:
        raise ConfigurationError(
            "row-level security hides rows from this role: run this as a superuser or a role with BYPASSRLS"
        )
    if server["is_standby"] and not dry_run:
        raise ConfigurationError(STANDBY)
