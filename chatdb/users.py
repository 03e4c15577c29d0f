"""Functions for all data of one user."""

from __future__ import annotations

from chatdb._core.query import Database, Query
from chatdb._core.validate import check_timeout, check_user_id
from chatdb.records import Deleted

_delete_user = Query("delete_user", Deleted)


async def delete_user(db: Database, *, user_id: str, timeout: float | None = None) -> Deleted:
    """
    Delete all conversations and messages of a user and return the number of deleted rows.

    The counts are 0 for an unknown user. One statement deletes everything or nothing. `timeout`, in seconds, replaces
    the pool's command timeout; raise it for a user with very many messages.

    Raises CommandTimeoutError if the deletion takes longer. SQL: `delete_user.sql`.
    """
    return await _delete_user.fetch_one(db, check_user_id(user_id), timeout=check_timeout(timeout))
