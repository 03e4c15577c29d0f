"""
Stores the history of Microsoft Agent Framework's sessions: ChatDBHistoryProvider.

A session is a conversation, and each of its messages one message: `content` is its text, `payload` the JSON of
`Message.to_dict`. Messages that other programs stored are read as text.

Docs: docs/adapters/agent-framework.md
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

from chatdb.adapters._pages import load_newest
from chatdb.adapters._settled import settled
from chatdb.adapters._unreadable import texts_hidden
from chatdb.errors import ConfigurationError, ConversationNotFoundError, InvalidInputError
from chatdb.formats.agent_framework import FRAMEWORK, KEY_PREFIX, item_of, key_after, new_message
from chatdb.formats.items import conversation_of
from chatdb.messages import append_messages
from chatdb.records import NewMessage

try:
    from agent_framework import HistoryProvider, Message
except ImportError:
    raise ConfigurationError("the extra is not installed: run pip install 'chatdb[agent-framework]'") from None

if TYPE_CHECKING:
    from chatdb import Database

__all__ = ["ChatDBHistoryProvider"]

_LAST_KEY: Final = "last_key"
"""Where the session's state has the key of the last message that was loaded or stored."""


class ChatDBHistoryProvider(HistoryProvider):
    """
    A HistoryProvider on PostgreSQL. It takes one round trip to load the history, and one to store a run.

    The key of a message is a hash of its contents and of the key before it, and a message whose key is stored is not
    stored again. So a replayed transcript adds only what is new, and what is said again is stored again. A batch in
    which a user's message follows an assistant's one is treated as a whole transcript; any other continues the history
    that was loaded or stored before.

    Raises InvalidInputError, before anything is written, for a message that JSON cannot hold.
    """

    DEFAULT_SOURCE_ID: ClassVar[str] = "chatdb"

    def __init__(
        self,
        db: Database,
        *,
        user_id: str,
        source_id: str = DEFAULT_SOURCE_ID,
        limit: int | None = None,
        prefix: str = KEY_PREFIX,
        load_messages: bool = True,
        store_inputs: bool = True,
        store_context_messages: bool = False,
        store_context_from: set[str] | None = None,
        store_outputs: bool = True,
    ) -> None:
        """
        Use the conversations of `user_id` whose keys are `prefix` + session_id.

        `limit` loads only the newest messages. The other options are those of HistoryProvider.
        """
        super().__init__(
            source_id,
            load_messages=load_messages,
            store_inputs=store_inputs,
            store_context_messages=store_context_messages,
            store_context_from=store_context_from,
            store_outputs=store_outputs,
        )
        if limit is not None and limit < 0:
            raise InvalidInputError("limit", "must not be negative")
        self._db, self._user, self._prefix, self._limit = db, user_id, prefix, limit

    async def get_messages(
        self,
        session_id: str | None,
        *,
        state: dict[str, Any] | None = None,
        **kwargs: Any,  # noqa: ANN401, ARG002 - as the base class declares it
    ) -> list[Message]:
        """Return the stored messages, oldest first: one round trip for 10,000."""
        limit = None if self._limit is None else max(1, self._limit)
        try:
            key, _ = self._conversation(session_id)
            _, stored = await load_newest(
                self._db, user_id=self._user, key=key, item_of=lambda message: message, limit=limit
            )
        except ConversationNotFoundError:
            stored = []
        if state is not None:
            state[_LAST_KEY] = (stored[-1].key or f"seq:{stored[-1].seq}") if stored else ""
        if self._limit == 0:
            return []
        with texts_hidden("Agent Framework", "a stored message"):
            return [Message.from_dict(item) for message in stored if (item := item_of(message)) is not None]

    async def save_messages(
        self,
        session_id: str | None,
        messages: Sequence[Message],
        *,
        state: dict[str, Any] | None = None,
        **kwargs: Any,  # noqa: ANN401, ARG002 - as the base class declares it
    ) -> None:
        """Append the messages that are not stored yet, all or none, in one round trip."""
        roles = [message.role for message in messages]
        is_transcript = "assistant" in roles and "user" in roles[roles.index("assistant") :]
        last_key: str = "" if state is None or is_transcript else state.get(_LAST_KEY, "")
        batch: list[NewMessage] = []
        for message in messages:
            item = _dumped(message)
            last_key = key_after(last_key, item)
            batch.append(new_message(item, last_key))
        if not batch:
            return
        key, patch = self._conversation(session_id)
        where: dict[str, Any] = {"user_id": self._user, "conversation_key": key, "conversation_metadata_patch": patch}
        await settled(append_messages(self._db, **where, messages=batch, on_existing="skip", create=True))
        if state is not None:
            state[_LAST_KEY] = last_key

    def _conversation(self, session_id: str | None) -> tuple[str, dict[str, str] | None]:
        return conversation_of(FRAMEWORK, "default" if session_id is None else session_id, self._prefix)


def _dumped(message: Message) -> dict[str, Any]:
    try:
        item: dict[str, Any] = json.loads(json.dumps(message.to_dict()))
    except (TypeError, ValueError, RecursionError):
        raise InvalidInputError("messages", "must have only values that JSON can hold") from None
    return item
