"""
A store for ChatKit's server: threads, their items and attachments in chatdb's tables.

Each of the 13 methods of ChatKit's Store is one call of chatdb, with the errors and pages that ChatKit expects. What
the records look like in the tables is in `chatdb/formats/chatkit.py`.

Docs: docs/adapters/chatkit.md
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, TypeAdapter, ValidationError

from chatdb.adapters._settled import settled
from chatdb.adapters._unreadable import texts_hidden
from chatdb.conversations import delete_conversation, get_conversation, list_conversations, upsert_conversation
from chatdb.errors import ConfigurationError, ConversationNotFoundError, InvalidInputError
from chatdb.errors import NotFoundError as MissingError
from chatdb.formats.chatkit import (
    FRAMEWORK,
    KEY_PREFIX,
    address_of,
    id_of,
    items_of,
    message_of,
    thread_metadata,
    threads_of,
    title_of,
)
from chatdb.formats.items import name_of
from chatdb.messages import append_message, delete_message, get_history, get_message, list_messages, upsert_message
from chatdb.records import Conversation, Message

try:
    from chatkit.store import NotFoundError, Store, TContext
    from chatkit.types import Attachment, Page, Thread, ThreadItem, ThreadMetadata
except ImportError:
    raise ConfigurationError("the extra is not installed: run pip install 'chatdb[chatkit]'") from None

if TYPE_CHECKING:
    from chatdb import Database

_ITEM: Final[TypeAdapter[ThreadItem]] = TypeAdapter(ThreadItem)
_ATTACHMENT: Final[TypeAdapter[Attachment]] = TypeAdapter(Attachment)

_MAX_PAGE: Final = 9_999
"""One less than chatdb's limit, because a page reads one more to tell whether another page follows."""


class ChatDBStore(Store[TContext]):
    """
    Stores threads as conversations, thread items as messages, and attachments as messages of one more conversation.

    `user_id` is a user or a function that returns the user for a request's context. The conversation's key is `prefix`
    and the thread's id; the message's key is the item's id. The item's JSON is the payload, what a person would read is
    the content, and the thread's JSON is the text `thread` in the conversation's metadata. Messages that ChatKit did
    not store are read as text. A user's attachments are in an archived conversation of this user, so exports and
    deletions of the user include them.

    Each method takes one round trip, three behind row-level security, with two exceptions: a user's first attachment
    takes three calls, and `load_threads` reads on if conversations of others lie between the user's threads. If the
    caller is cancelled, the store waits for a write that it has sent, then raises the cancellation.

    A missing thread, item or attachment, or one of another user, is ChatKit's NotFoundError, except that its items are
    an empty page and deleting it does nothing. Other errors are chatdb's.
    """

    def __init__(self, db: Database, *, user_id: str | Callable[[TContext], str], prefix: str = KEY_PREFIX) -> None:
        self._db = db
        self._user_id = user_id
        self._prefix = prefix
        self._attachments_key = f"{prefix}:attachments"

    async def load_thread(self, thread_id: str, context: TContext) -> ThreadMetadata:
        """Return a thread without its items."""
        with _not_found(f"Thread {thread_id} not found"):
            conversation = await get_conversation(self._db, **self._address(thread_id, context))
        return _thread(conversation, self._prefix, thread_id)

    async def save_thread(self, thread: ThreadMetadata, context: TContext) -> None:
        """Store a thread, or replace it, without its items. Other programs' values in the metadata stay."""
        patch = thread_metadata(_fields("thread", thread, exclude={"items"} if isinstance(thread, Thread) else None))
        user, key, title = self._user(context), self._key(thread.id), title_of(thread.title)
        await settled(upsert_conversation(self._db, user_id=user, key=key, title=title, metadata_patch=patch))

    async def load_threads(self, limit: int, after: str | None, order: str, context: TContext) -> Page[ThreadMetadata]:
        """Return a page of the user's threads by their creation, without archived ones."""
        size, is_descending = _page_of(limit, order)
        rows = size + 1
        options: dict[str, Any] = {"user_id": self._user(context), "order_by": "created_at"}
        options |= {"descending": is_descending, "after_key": self._key(after) if after else None}
        threads: list[ThreadMetadata] = []
        while True:
            with _not_found(f"Thread {after} not found"):
                page = await list_conversations(self._db, limit=rows, **options)
            threads += (_thread(conversation, self._prefix) for conversation in page if self._is_thread(conversation))
            if len(threads) > size or len(page) < rows:
                has_more = len(threads) > size
                del threads[size:]
                return Page(data=threads, has_more=has_more, after=threads[-1].id if has_more else None)
            options |= {"after": page[-1], "after_key": None}
            rows = max(rows, 500)

    async def delete_thread(self, thread_id: str, context: TContext) -> None:
        """Delete a thread and its items, but no attachments."""
        with suppress(ConversationNotFoundError):
            await settled(delete_conversation(self._db, **self._address(thread_id, context)))

    async def load_thread_items(
        self, thread_id: str, after: str | None, limit: int, order: str, context: TContext
    ) -> Page[ThreadItem]:
        """Return a page of a thread's items in the order of their addition, or an empty page if it is missing."""
        size, is_descending = _page_of(limit, order)
        read, start = (get_history, "before_") if is_descending else (list_messages, "after_")
        options: dict[str, Any] = self._address(thread_id, context) | {"limit": size + 1}
        options |= {start + name: value for name, value in (address_of(after) if after else {}).items()}
        try:
            messages: list[Message] = await read(self._db, **options)
        except ConversationNotFoundError:
            return Page(data=[], has_more=False)
        except MissingError:
            raise NotFoundError(f"Item {after} not found in thread {thread_id}") from None
        if is_descending:
            messages.reverse()
        items = [item for message in messages[:size] if (item := _item(message, thread_id)) is not None]
        has_more = len(messages) > size
        return Page(data=items, has_more=has_more, after=id_of(messages[size - 1]) if has_more else None)

    async def add_thread_item(self, thread_id: str, item: ThreadItem, context: TContext) -> None:
        """Append an item; the same again changes nothing. Raises ConflictError if another item has this id."""
        address, message = self._address(thread_id, context), _message("item", item)
        with _not_found(f"Thread {thread_id} not found"):
            await settled(append_message(self._db, **address, **message))

    async def save_item(self, thread_id: str, item: ThreadItem, context: TContext) -> None:
        """Replace an item in its place, or append it."""
        address, message = self._address(thread_id, context), _message("item", item)
        with _not_found(f"Thread {thread_id} not found"):
            await settled(upsert_message(self._db, **address, **message))

    async def load_item(self, thread_id: str, item_id: str, context: TContext) -> ThreadItem:
        """Return an item."""
        problem = f"Item {item_id} not found in thread {thread_id}"
        with _not_found(problem):
            message = await get_message(self._db, **self._address(thread_id, context), **address_of(item_id))
        item = _item(message, thread_id)
        if item is None:
            raise NotFoundError(problem)
        return item

    async def delete_thread_item(self, thread_id: str, item_id: str, context: TContext) -> None:
        """Delete an item."""
        with suppress(MissingError):
            await settled(delete_message(self._db, **self._address(thread_id, context), **address_of(item_id)))

    async def save_attachment(self, attachment: Attachment, context: TContext) -> None:
        """Store or replace an attachment's description, without its bytes."""
        user, message = self._user(context), _message("attachment", attachment)

        async def save() -> None:
            address: Any = {"user_id": user, "conversation_key": self._attachments_key}
            try:
                await upsert_message(self._db, **address, **message)
            except ConversationNotFoundError:
                named: Any = {"title": "Attachments", "metadata_patch": {"framework": FRAMEWORK}, "archived": True}
                await upsert_conversation(self._db, user_id=user, key=self._attachments_key, **named)
                await upsert_message(self._db, **address, **message)

        await settled(save())

    async def load_attachment(self, attachment_id: str, context: TContext) -> Attachment:
        """Return an attachment's description."""
        with _not_found(f"Attachment {attachment_id} not found"):
            message = await get_message(self._db, **self._attachment(attachment_id, context))
        with texts_hidden("ChatKit", "a stored attachment"):
            return _ATTACHMENT.validate_python(json.loads(message.payload or "null"))

    async def delete_attachment(self, attachment_id: str, context: TContext) -> None:
        """Delete an attachment's description."""
        with suppress(MissingError):
            await settled(delete_message(self._db, **self._attachment(attachment_id, context)))

    def _user(self, context: TContext) -> str:
        return self._user_id if isinstance(self._user_id, str) else self._user_id(context)

    def _key(self, thread_id: str) -> str:
        key = self._prefix + name_of(thread_id)
        if key == self._attachments_key:
            raise InvalidInputError("thread_id", "is reserved for the user's attachments")
        return key

    def _address(self, thread_id: str, context: TContext) -> dict[str, Any]:
        return {"user_id": self._user(context), "conversation_key": self._key(thread_id)}

    def _attachment(self, attachment_id: str, context: TContext) -> dict[str, Any]:
        key = name_of(attachment_id)
        return {"user_id": self._user(context), "conversation_key": self._attachments_key, "key": key}

    def _is_thread(self, conversation: Conversation) -> bool:
        key = conversation.key or ""
        return conversation.key is not None and key.startswith(self._prefix) and key != self._attachments_key


@contextmanager
def _not_found(problem: str) -> Generator[None, None, None]:
    """Raise ChatKit's error in place of chatdb's."""
    try:
        yield
    except MissingError:
        raise NotFoundError(problem) from None


def _fields(parameter: str, value: BaseModel, exclude: set[str] | None = None) -> dict[str, Any]:
    """Return a record of ChatKit as a JSON object."""
    try:
        return value.model_dump(mode="json", exclude=exclude)
    except (ValueError, TypeError, RecursionError):  # pydantic's error would quote the value
        raise InvalidInputError(parameter, "has a value that JSON cannot hold") from None


def _message(parameter: str, record: ThreadItem | Attachment) -> Any:  # noqa: ANN401 - the arguments of append_message
    return message_of(parameter, _fields(parameter, record))


def _thread(conversation: Conversation, prefix: str, thread_id: str | None = None) -> ThreadMetadata:
    """Return the thread of a conversation, or one with its title if this release of ChatKit cannot read it."""
    *stored, plain = threads_of(conversation, prefix, thread_id)
    for fields in stored:
        with suppress(ValidationError):
            return ThreadMetadata.model_validate(fields)
    return ThreadMetadata.model_validate(plain)


def _item(message: Message, thread_id: str) -> ThreadItem | None:
    """Return the item of a message, or one with its text if this release of ChatKit cannot read it, or None."""
    for fields in items_of(message, thread_id):
        with suppress(ValidationError):
            return _ITEM.validate_python(fields)
    return None


def _page_of(limit: int, order: str) -> tuple[int, bool]:
    """Return the size of a page, and whether it starts with the newest."""
    if type(limit) is not int or limit < 1:
        raise InvalidInputError("limit", "must be at least 1")
    if order not in {"asc", "desc"}:
        raise InvalidInputError("order", "must be asc or desc")
    return min(limit, _MAX_PAGE), order == "desc"
