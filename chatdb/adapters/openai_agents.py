"""A session of openai-agents, whose items are the messages of a conversation."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, cast

from chatdb.adapters._pages import append_all, load_newest
from chatdb.adapters._settled import settled
from chatdb.conversations import delete_conversation
from chatdb.errors import ConfigurationError, ConversationNotFoundError, InvalidInputError
from chatdb.formats.items import conversation_of
from chatdb.formats.openai import FRAMEWORK, KEY_PREFIX, item_of, message_of
from chatdb.messages import pop_message

if TYPE_CHECKING:
    from chatdb import Database

try:
    from agents import RunContextWrapper, SessionSettings, TResponseInputItem
except ImportError:
    raise ConfigurationError("openai-agents is not installed: run pip install 'chatdb[openai-agents]'") from None

_MAX_PREFIX: Final = 55
"""The rest of a key's 255 characters is for the session's id, which is hashed if it has more than 200."""


class ChatDBSession:
    """
    A session of openai-agents that stores a user's items as the messages of one of the user's conversations.

    Each item is a message: `payload` is the item, unchanged, and `content` its text. The key of the conversation is
    `prefix` and the session's id; an id of more than 200 characters is hashed, and kept in the conversation's metadata.
    The first item makes the conversation, and `clear_session` deletes it.

    `db` is a pool or a connection. `user_id` is the user, or a function that returns the user for the context of the
    run, such as `lambda context: context.user_id`. Each method is one round trip, and raises chatdb's errors.
    """

    session_id: str
    session_settings: SessionSettings | None = None

    def __init__(
        self,
        session_id: str,
        *,
        db: Database,
        user_id: str | Callable[[Any], str],
        prefix: str = KEY_PREFIX,
        session_settings: SessionSettings | dict[str, Any] | None = None,
    ) -> None:
        self.session_id = session_id
        if not isinstance(session_settings, SessionSettings):
            session_settings = SessionSettings().resolve(session_settings)
        self.session_settings = session_settings
        if len(prefix) > _MAX_PREFIX:
            raise InvalidInputError("prefix", f"must have at most {_MAX_PREFIX} characters")
        self._db, self._user_id = db, user_id
        self._key, self._metadata = conversation_of(FRAMEWORK, session_id, prefix)
        if self._key == prefix:
            raise InvalidInputError("session_id", "must be a str of at least one character")

    def _user(self, wrapper: RunContextWrapper[Any] | None) -> str:
        if not callable(self._user_id):
            return self._user_id
        if wrapper is None:
            problem = "is required, because user_id is a function: pass RunContextWrapper(context)"
            raise InvalidInputError("wrapper", problem)
        return self._user_id(wrapper.context)

    async def get_items(
        self, limit: int | None = None, *, wrapper: RunContextWrapper[Any] | None = None
    ) -> list[TResponseInputItem]:
        """
        Return the newest items, oldest first: `limit`, or that of the settings, or all if it is None or negative.

        The items are those of the current line. A message that another framework or chatdb's own functions have stored
        is an item with its role and text; tool results among these are left out. One round trip for each 10,000 items.
        """
        user = self._user(wrapper)
        if limit is None:
            limit = SessionSettings().resolve(self.session_settings).limit
        if limit == 0:
            return []
        if limit is not None and limit < 0:
            limit = None
        try:
            _, items = await load_newest(self._db, user_id=user, key=self._key, item_of=item_of, limit=limit)
        except ConversationNotFoundError:
            return []
        return cast("list[TResponseInputItem]", items)

    async def add_items(
        self, items: list[TResponseInputItem], *, wrapper: RunContextWrapper[Any] | None = None
    ) -> None:
        """
        Append items, all or none, and create the conversation if it does not exist.

        Each item gets a random key, with which chatdb repeats a lost call without storing an item twice. More than
        10,000 items or 48 MiB are one transaction of several round trips, which is not repeated.

        Raises InvalidInputError, before anything is stored, for an item that is not a dict of JSON values, has NaN or
        infinity, or is larger than 16 MiB.
        """
        user, batch_key = self._user(wrapper), secrets.token_hex(8)
        messages = [
            message_of(item, f"{batch_key}-{index}", parameter=f"items[{index}]") for index, item in enumerate(items)
        ]
        options: dict[str, Any] = {"create": True, "conversation_metadata_patch": self._metadata}
        await settled(append_all(self._db, messages, user_id=user, conversation_key=self._key, **options))

    async def pop_item(self, *, wrapper: RunContextWrapper[Any] | None = None) -> TResponseInputItem | None:
        """
        Delete the newest item and return it, or None if there is none.

        Messages of others that `get_items` leaves out are deleted on the way. chatdb does not repeat a lost call: it
        raises UnavailableError, because the item may be gone.
        """
        user = self._user(wrapper)

        async def pop() -> TResponseInputItem | None:
            with suppress(ConversationNotFoundError):
                while message := await pop_message(self._db, user_id=user, conversation_key=self._key):
                    if (item := item_of(message)) is not None:
                        return cast("TResponseInputItem", item)
            return None

        return await settled(pop())

    async def clear_session(self, *, wrapper: RunContextWrapper[Any] | None = None) -> None:
        """Delete the conversation with all its messages, of every branch, its title and its metadata."""
        user = self._user(wrapper)
        with suppress(ConversationNotFoundError):
            await settled(delete_conversation(self._db, user_id=user, conversation_key=self._key))
