"""
A store for ChatKit's server: threads, their items and attachments in chatdb's tables.

Docs: docs/adapters/chatkit.md
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, TypeAdapter, ValidationError

from chatdb.adapters._settled import settled
from chatdb.conversations import (
    create_conversation,
    delete_conversation,
    get_conversation,
    list_conversations,
    update_conversation,
    upsert_conversation,
)
from chatdb.errors import ConfigurationError, ConversationNotFoundError, InvalidInputError, UnavailableError
from chatdb.errors import NotFoundError as MissingError
from chatdb.formats.chatkit import FRAMEWORK, id_of, items_of, message_of, place_of, title_of
from chatdb.formats.items import json_text, name_of
from chatdb.messages import append_message, delete_message, get_history, get_message, list_messages, upsert_message
from chatdb.pool import transaction
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

_PREFIX: Final = f"{FRAMEWORK}:"

_MAX_PAGE: Final = 9_999
"""One less than chatdb's limit, because a page reads one more to tell whether another page follows."""


class ChatDBStore(Store[TContext]):
    """
    Stores threads as conversations, thread items as messages, and attachments as messages of one more conversation.

    `user_id` is a user or a function that returns the user for a request's context. The conversation's key is `prefix`
    and the thread's id; the message's key is the item's id. The item's JSON is the payload, what a person would read is
    the content, and the thread's JSON is the text `thread` in the conversation's metadata, which `save_thread`
    replaces. Messages that ChatKit did not store are read as text. A user's attachments are in an archived conversation
    of this user, so exports and deletions of the user include them.

    Each method takes one round trip, three behind row-level security, with three exceptions: a user's first attachment
    takes six, a new thread takes two with a prefix of your own, and `load_threads` reads on if conversations of others
    lie between the user's threads. If the caller is cancelled, the store waits for a write that it has sent, then
    raises the cancellation.

    A missing thread, item or attachment, or one of another user, is ChatKit's NotFoundError, except that its items are
    an empty page and deleting it does nothing. Other errors are chatdb's.
    """

    def __init__(self, db: Database, *, user_id: str | Callable[[TContext], str], prefix: str = _PREFIX) -> None:
        self._db = db
        self._user_id = user_id
        self._prefix = prefix
        self._attachments_key = f"{prefix}:attachments"

    async def load_thread(self, thread_id: str, context: TContext) -> ThreadMetadata:
        """Return a thread without its items."""
        with _not_found(f"Thread {thread_id} not found"):
            found = await get_conversation(self._db, **self._address(thread_id, context))
        return self._thread(found, thread_id)

    async def save_thread(self, thread: ThreadMetadata, context: TContext) -> None:
        """Store a thread, or replace it, without its items; with a prefix of your own, others' metadata stays."""
        fields = _fields("thread", thread, exclude={"items"} if isinstance(thread, Thread) else None)
        metadata = {"framework": FRAMEWORK, "thread": json_text("thread", fields, allow_nan=True)}
        user, key, title = self._user(context), self._key(thread.id), title_of(thread.title)
        await settled(self._save_thread(user, key, title, metadata))

    async def _save_thread(self, user: str, key: str, title: str | None, metadata: dict[str, str]) -> None:
        if self._prefix != _PREFIX:
            changes: dict[str, Any] = {"conversation_key": key, "title": title, "metadata_patch": metadata}
            with suppress(ConversationNotFoundError):
                try:
                    await update_conversation(self._db, user_id=user, **changes)
                except UnavailableError as error:  # if it was sent, repeating it changes nothing
                    if error.sent is False:
                        raise
                    await update_conversation(self._db, user_id=user, **changes)
                return
        await upsert_conversation(self._db, user_id=user, key=key, title=title, metadata=metadata)

    async def load_threads(self, limit: int, after: str | None, order: str, context: TContext) -> Page[ThreadMetadata]:
        """Return a page of the user's threads by their creation, without archived ones."""
        size = _page_size(limit)
        rows = size + 1
        options: dict[str, Any] = {"user_id": self._user(context), "order_by": "created_at"}
        options |= {"descending": _is_descending(order), "after_key": self._key(after) if after else None}
        threads: list[ThreadMetadata] = []
        while True:
            with _not_found(f"Thread {after} not found"):
                found = await list_conversations(self._db, limit=rows, **options)
            threads += (self._thread(each) for each in found if self._is_thread(each))
            if len(threads) > size or len(found) < rows:
                has_more = len(threads) > size
                del threads[size:]
                return Page(data=threads, has_more=has_more, after=threads[-1].id if has_more else None)
            options |= {"after": found[-1], "after_key": None}
            rows = max(rows, 500)

    async def delete_thread(self, thread_id: str, context: TContext) -> None:
        """Delete a thread and its items, but no attachments."""
        with suppress(ConversationNotFoundError):
            await settled(delete_conversation(self._db, **self._address(thread_id, context)))

    async def load_thread_items(
        self, thread_id: str, after: str | None, limit: int, order: str, context: TContext
    ) -> Page[ThreadItem]:
        """Return a page of a thread's items in the order of their addition, or an empty page if it is missing."""
        descending, size = _is_descending(order), _page_size(limit)
        address: Any = self._address(thread_id, context)
        word = "before" if descending else "after"
        place: Any = {f"{word}_{name}": value for name, value in (place_of(after) if after else {}).items()}
        read = get_history if descending else list_messages
        try:
            found: list[Message] = await read(self._db, **address, **place, limit=size + 1)
        except ConversationNotFoundError:
            return Page(data=[], has_more=False)
        except MissingError:
            raise NotFoundError(f"Item {after} not found in thread {thread_id}") from None
        if descending:
            found.reverse()
        page = [item for message in found[:size] if (item := _item(message, thread_id)) is not None]
        has_more = len(found) > size
        return Page(data=page, has_more=has_more, after=id_of(found[size - 1]) if has_more else None)

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
            found = await get_message(self._db, **self._address(thread_id, context), **place_of(item_id))
        item = _item(found, thread_id)
        if item is None:
            raise NotFoundError(problem)
        return item

    async def delete_thread_item(self, thread_id: str, item_id: str, context: TContext) -> None:
        """Delete an item."""
        with suppress(MissingError):
            await settled(delete_message(self._db, **self._address(thread_id, context), **place_of(item_id)))

    async def save_attachment(self, attachment: Attachment, context: TContext) -> None:
        """Store or replace an attachment's description, without its bytes."""
        user, message = self._user(context), _message("attachment", attachment)

        async def save() -> None:
            address: Any = {"user_id": user, "conversation_key": self._attachments_key}
            try:
                await upsert_message(self._db, **address, **message)
            except ConversationNotFoundError:
                async with transaction(self._db, user_id=user) as db:
                    named: Any = {"title": "Attachments", "metadata": {"framework": FRAMEWORK}}
                    await create_conversation(db, user_id=user, key=self._attachments_key, **named)
                    await update_conversation(db, **address, archived=True)
                    await upsert_message(db, **address, **message)

        await settled(save())

    async def load_attachment(self, attachment_id: str, context: TContext) -> Attachment:
        """Return an attachment's description."""
        with _not_found(f"Attachment {attachment_id} not found"):
            found = await get_message(self._db, **self._attachment(attachment_id, context))
        return _ATTACHMENT.validate_python(json.loads(found.payload or "null"))

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

    def _thread(self, conversation: Conversation, thread_id: str | None = None) -> ThreadMetadata:
        """Return the thread of a conversation. It may be a copy of another one, or renamed, or not ChatKit's."""
        name = (conversation.key or "").removeprefix(self._prefix)
        text = (conversation.metadata or {}).get("thread")
        thread = ThreadMetadata(id=name, title=conversation.title, created_at=conversation.created_at)
        if isinstance(text, str):
            with suppress(ValueError):  # such as pydantic's ValidationError
                thread = ThreadMetadata.model_validate(json.loads(text))
        if thread_id is not None or name_of(thread.id) != name:
            thread.id = name if thread_id is None else thread_id
        if title_of(thread.title) != conversation.title:
            thread.title = conversation.title
        return thread


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


def _item(message: Message, thread_id: str) -> ThreadItem | None:
    """Return the item of a message, or one with its text if this release of ChatKit cannot read it, or None."""
    for fields in items_of(message, thread_id):
        with suppress(ValidationError):
            return _ITEM.validate_python(fields)
    return None


def _page_size(limit: int) -> int:
    if type(limit) is not int or limit < 1:
        raise InvalidInputError("limit", "must be at least 1")
    return min(limit, _MAX_PAGE)


def _is_descending(order: str) -> bool:
    if order not in {"asc", "desc"}:
        raise InvalidInputError("order", "must be asc or desc")
    return order == "desc"
