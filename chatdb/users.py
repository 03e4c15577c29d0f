"""Functions on all that a user has."""

from __future__ import annotations

from chatdb._core.query import Database, Query
from chatdb._core.validate import check_timeout, check_user_id
from chatdb.records import Deleted

_delete_user = Query("delete_user", Deleted)


async def delete_user(db: Database, *, user_id: str, timeout: float | None = None) -> Deleted:
    """
    Delete every conversation of a user with all messages, and return how many rows went, 0 for an unknown user.

    One statement, all or nothing. `timeout` in seconds replaces the pool's command timeout for a user with very many
    messages.

    Raises CommandTimeoutError when it takes longer.
    """
    return await _delete_user.fetch_one(db, check_user_id(user_id), timeout=check_timeout(timeout))
