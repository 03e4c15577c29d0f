"""A session of openai-agents, whose items are the messages of a conversation."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, cast

from chatdb.adapters._settled import settled
from chatdb.branches import get_branch
from chatdb.conversations import delete_conversation
from chatdb.errors import ConfigurationError, ConversationNotFoundError, InvalidInputError, NotFoundError
from chatdb.formats.openai import KEY_PREFIX, conversation_of, item_of, message_of
from chatdb.messages import append_messages, pop_message
from chatdb.pool import transaction

if TYPE_CHECKING:
    from chatdb import Database, NewMessage

try:
    from agents import RunContextWrapper, SessionSettings, TResponseInputItem
except ImportError:
    raise ConfigurationError("openai-agents is not installed: run pip install 'chatdb[openai-agents]'") from None

_PAGE: Final = 10_000
_LEAST: Final = 100
"""Messages of a further page, which is read if some of a page were left out."""
_BATCH_BYTES: Final = 48 * 1024 * 1024
"""Below the 64 MiB of a batch, because keys and metadata count as well."""
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
        self._db, self._user_id, self._prefix = db, user_id, prefix
        self._key()

    def _key(self) -> str:
        key, _ = conversation_of(self.session_id, self._prefix)
        if key == self._prefix:
            raise InvalidInputError("session_id", "must be a str of at least one character")
        return key

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
        if limit is None:
            limit = SessionSettings().resolve(self.session_settings).limit
        wanted = sys.maxsize if limit is None or limit < 0 else limit
        user = self._user(wrapper)
        place: dict[str, Any] = {"conversation_key": self._key()}
        items: list[TResponseInputItem] = []
        size = min(wanted, _PAGE)
        while wanted:
            try:
                page = await get_branch(self._db, user_id=user, limit=size, **place)
            except NotFoundError:
                if "conversation_key" in place:
                    break
                return await self.get_items(wanted, wrapper=wrapper)  # cleared between two pages: begin again
            found = [item for message in page if (item := item_of(message)) is not None]
            items[:0] = cast("list[TResponseInputItem]", found)
            if len(items) >= wanted or len(page) < size:
                break
            size = min(max(wanted - len(items), _LEAST), _PAGE)
            # by id, because another conversation may have the key by now
            seq = page[0].seq
            place = {"conversation_id": page[0].conversation_id, "before_seq": seq, "top_seq": seq}
        return items[-wanted:]

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
        user, key, batch_key = self._user(wrapper), self._key(), secrets.token_hex(8)
        batches: list[list[NewMessage]] = []
        size = 0
        for index, item in enumerate(items):
            message = message_of(item, f"{batch_key}-{index}", parameter=f"items[{index}]")
            own_size = len(message.content.encode()) + len(str(message.payload))
            if not batches or len(batches[-1]) == _PAGE or size + own_size > _BATCH_BYTES:
                batches.append([])
                size = 0
            batches[-1].append(message)
            size += own_size
        if batches:
            await settled(self._append(self._db, user, key, batches))

    async def _append(self, db: Database, user: str, key: str, batches: list[list[NewMessage]]) -> None:
        if len(batches) > 1:
            async with transaction(db, user_id=user) as connection:
                for batch in batches:
                    await self._append(connection, user, key, [batch])
            return
        await append_messages(
            db,
            user_id=user,
            conversation_key=key,
            messages=batches[0],
            create=True,
            conversation_metadata_patch=conversation_of(self.session_id)[1],
        )

    async def pop_item(self, *, wrapper: RunContextWrapper[Any] | None = None) -> TResponseInputItem | None:
        """
        Delete the newest item and return it, or None if there is none.

        Messages of others that `get_items` leaves out are deleted on the way. chatdb does not repeat a lost call: it
        raises UnavailableError, because the item may be gone.
        """
        return await settled(self._pop(self._user(wrapper), self._key()))

    async def _pop(self, user: str, key: str) -> TResponseInputItem | None:
        with suppress(ConversationNotFoundError):
            while message := await pop_message(self._db, user_id=user, conversation_key=key):
                if (item := item_of(message)) is not None:
                    return cast("TResponseInputItem", item)
        return None

    async def clear_session(self, *, wrapper: RunContextWrapper[Any] | None = None) -> None:
        """Delete the conversation with all its messages, of every branch, its title and its metadata."""
        await settled(self._clear(self._user(wrapper), self._key()))

    async def _clear(self, user: str, key: str) -> None:
        with suppress(ConversationNotFoundError):
            await delete_conversation(self._db, user_id=user, conversation_key=key)
