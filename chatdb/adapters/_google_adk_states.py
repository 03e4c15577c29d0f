"""The states that an app's sessions share in ADK: `app:` of all users, and `user:` of one user."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pydantic_core import to_jsonable_python

from chatdb.conversations import get_conversation, upsert_conversation
from chatdb.errors import (
    AcquireTimeoutError,
    CommandTimeoutError,
    ConversationNotFoundError,
    InvalidInputError,
    PoolClosedError,
    UnavailableError,
)
from chatdb.formats import google_adk as formats
from chatdb.pool import transaction

if TYPE_CHECKING:
    from chatdb import Connection, Database

ResultT = TypeVar("ResultT")


class SharedStates:
    """
    Keeps each shared state of an app in the metadata of an archived conversation without messages.

    Its user is that of the sessions or, for `app:`, the `app_owner`.
    """

    def __init__(self, db: Database, prefix: str, app_owner: str, names: Collection[str]) -> None:
        if isinstance(names, str) or not {formats.APP, formats.USER}.issuperset(names):
            raise InvalidInputError("shared_states", "must be a tuple of app: and user:, or of one of these, or ()")
        self._db, self._prefix, self._app_owner, self._names = db, prefix, app_owner, sorted(names)
        # a connection does not tell whether its transactions must name the user
        self._is_protected: bool = getattr(db, "row_level_security", not hasattr(db, "acquire"))

    def split(self, delta: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """
        Return changes of a session's own state as `""`, and those of each shared state by its prefix, as JSON values.

        Raises InvalidInputError for a value that is not JSON, or a key of a shared state that is not used.
        """
        values: dict[str, Any] = to_jsonable_python(delta, fallback=str, bytes_mode="base64")
        formats.state_patch(values)
        parts = formats.split_state(values)
        for name in parts.keys() - {"", *self._names}:
            raise InvalidInputError("state", f"has a {name} key, but shared_states does not name {name}")
        return parts

    async def read_all(self, app: str, user: str, known: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """
        Return the shared states, each key with its prefix; `known` has those that need not be read.

        On a pool, they are read at the same time.
        """
        unread = [name for name in self._names if name not in known]
        if hasattr(self._db, "acquire"):
            states = await asyncio.gather(*(self.read(app, user, name) for name in unread))
        else:
            states = [await self.read(app, user, name) for name in unread]
        by_name = {**known, **dict(zip(unread, states, strict=True))}
        return {name + key: value for name in self._names for key, value in by_name[name].items()}

    async def read(self, app: str, user: str, name: str) -> dict[str, Any]:
        """Return a shared state."""
        try:
            owner, key = self._address(app, user, name)
            async with self.as_user(self._db, owner, (name,)) as db:
                stored = await get_conversation(db, user_id=owner, conversation_key=key)
        except ConversationNotFoundError:
            return {}
        return formats.state_of(stored.metadata)

    async def run(
        self, user: str, parts: Mapping[str, Any], change: Callable[[Database], Awaitable[ResultT]]
    ) -> ResultT:
        """
        Run a change of a session, in a transaction if it also has `parts` of shared states to write.

        On chatdb's pool, a transaction that was lost runs again, so the change must be safe to repeat.
        """
        if not parts:
            return await change(self._db)

        async def run_once() -> ResultT:
            async with transaction(self._db, user_id=None if self.names_users(parts) else user) as connection:
                return await change(connection)

        try:
            return await run_once()
        except UnavailableError as error:
            is_lost = not isinstance(error, AcquireTimeoutError | CommandTimeoutError | PoolClosedError)
            if not is_lost or not getattr(self._db, "retries", 0):
                raise
        return await run_once()

    async def write(
        self, db: Database, app: str, user: str, parts: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """Merge changes into the shared states in the transaction of `run`, and return these."""
        written: dict[str, dict[str, Any]] = {}
        for name in sorted(parts, reverse=True):  # always in this order, or two transactions could wait for each other
            owner, key = self._address(app, user, name)
            address: dict[str, Any] = {"user_id": owner, "key": key}
            change: dict[str, Any] = {"metadata_patch": formats.state_patch(parts[name]), "archived": True}
            async with self.as_user(db, owner, parts) as connection:
                stored = await upsert_conversation(connection, **address, **change)
            written[name] = formats.state_of(stored.metadata)
        return written

    def names_users(self, parts: Iterable[str]) -> bool:
        """Return whether a transaction that changes these states must name several users for row-level security."""
        return self._is_protected and formats.APP in parts

    @asynccontextmanager
    async def as_user(self, db: Database, user: str, parts: Iterable[str]) -> AsyncGenerator[Database]:
        """Yield `db` or, in a transaction that changes these states of several users, a savepoint of this user."""
        is_inside = not hasattr(db, "acquire") and cast("Connection", db).is_in_transaction()
        if is_inside and self.names_users(parts):
            async with transaction(db, user_id=user) as connection:
                yield connection
        else:
            yield db

    def _address(self, app: str, user: str, name: str) -> tuple[str, str]:
        """Return the user and the key of a shared state's conversation."""
        return self._app_owner if name == formats.APP else user, self._prefix + formats.session_name(app, "")
