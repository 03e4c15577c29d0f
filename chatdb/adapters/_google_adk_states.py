"""The states that an app's sessions share in ADK: `app:` of all users, and `user:` of one user."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from pydantic_core import to_jsonable_python

from chatdb.conversations import create_conversation, get_conversation, update_conversation
from chatdb.errors import ConversationNotFoundError, InvalidInputError, UnavailableError
from chatdb.formats import google_adk as formats

if TYPE_CHECKING:
    from chatdb import Database


class SharedStates:
    """
    Keeps each shared state of an app in the metadata of an archived conversation without messages.

    Its user is that of the sessions or, for `app:`, the `app_owner`. Each state takes one round trip to read and one to
    change, and two more for its first key.
    """

    def __init__(self, db: Database, prefix: str, app_owner: str, names: Collection[str]) -> None:
        if isinstance(names, str) or not {formats.APP, formats.USER}.issuperset(names):
            raise InvalidInputError("shared_states", "must be a tuple of app: and user:, or of one of these, or ()")
        self._db, self._prefix, self._app_owner, self._names = db, prefix, app_owner, sorted(names)

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
        """Return the shared states, each key with its prefix; `known` has those that need not be read."""
        merged: dict[str, Any] = {}
        for name in self._names:
            state = known[name] if name in known else await self.read(app, user, name)
            merged |= {name + key: value for key, value in state.items()}
        return merged

    async def read(self, app: str, user: str, name: str) -> dict[str, Any]:
        """Return a shared state."""
        try:
            stored = await get_conversation(self._db, **self._address(app, user, name))
        except ConversationNotFoundError:
            return {}
        return formats.state_of(stored.metadata)

    async def write(self, app: str, user: str, name: str, delta: Mapping[str, Any]) -> dict[str, Any]:
        """Merge changes into a shared state, and return it."""
        address, patch = self._address(app, user, name), formats.state_patch(delta)
        try:
            stored = await update_conversation(self._db, **address, metadata_patch=patch, archived=True)
        except (ConversationNotFoundError, UnavailableError):  # repeating it changes nothing
            await create_conversation(self._db, user_id=address["user_id"], key=address["conversation_key"])
            stored = await update_conversation(self._db, **address, metadata_patch=patch, archived=True)
        return formats.state_of(stored.metadata)

    def _address(self, app: str, user: str, name: str) -> dict[str, Any]:
        key = self._prefix + formats.session_name(app, "")
        return {"user_id": self._app_owner if name == formats.APP else user, "conversation_key": key}
