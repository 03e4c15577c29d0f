"""
Functions for messages that grow while they are streamed. Each function runs the SQL file of the same name in `sql/`.

The text is stored in parts, one for each flush, and merged into the message at the end.

Decision: docs/decisions/0016-streams-are-parts.md
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Self

from chatdb._core.query import Database, Query
from chatdb._core.validate import (
    check_bool,
    check_content,
    check_conversation,
    check_interval,
    check_key,
    check_message,
    check_metadata,
    check_payload,
    check_role,
    check_seconds,
    check_seq,
    check_str,
    check_token_count,
    check_user_id,
)
from chatdb.errors import ConflictError, InvalidInputError, NotFoundError
from chatdb.pool import run_until_settled
from chatdb.records import Message, MessageLength, MessageTail, Role

_start_message = Query("start_message", Message, has_refusal=True, hint="conversation_id")
_extend_message = Query("extend_message", MessageLength, has_refusal=True, idempotent=True)
_read_message = Query("read_message", MessageTail, idempotent=True)
_finish_message = Query("finish_message", Message, has_refusal=True, idempotent=True, hint="conversation_id")
_list_streaming = Query("list_streaming", Message, idempotent=True)

_log = logging.getLogger("chatdb")

MAX_UNFLUSHED: Final = 64 * 1024
"""Code points that a MessageStream gathers before it flushes early."""

_ABORT_TIMEOUT: Final = 5.0
"""Seconds that a failed or cancelled block waits until its message is marked as aborted."""


async def start_message(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    role: Role = "assistant",
    key: str | None = None,
    metadata: Mapping[str, object] | None = None,
    parent_seq: int | None = None,
) -> Message:
    """
    Append a message whose text follows, and return the stored record: its state is `streaming`.

    `key` makes the call safe to repeat: the message with this key is returned, whatever its state. `parent_seq` and the
    limits are those of `append_message`. `extend_message` adds text and `finish_message` completes the message; reads
    show the text so far, `get_context` leaves the message out.

    Raises ConversationNotFoundError, ConflictError if the key is stored with another role, MessageNotFoundError if no
    message has `parent_seq`, or InvalidInputError. SQL: `start_message.sql`.
    """
    return await run_until_settled(
        _start_message.fetch_one,
        db,
        check_user_id(user_id),
        *check_conversation(conversation_id, conversation_key),
        check_role("role", role),
        check_metadata("metadata", metadata),
        check_key("key", key),
        None if parent_seq is None else check_seq("parent_seq", parent_seq),
        idempotent=key is not None,
    )


async def extend_message(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    seq: int | None = None,
    key: str | None = None,
    offset: int,
    text: str,
) -> int:
    """
    Add text to a message that is streamed, and return its length.

    `offset` is the length so far, in code points as Python's `len` counts them. It may also be the start of the last
    part, which is then replaced: so the call is safe to repeat. Once the call has returned, the text survives a crash.
    The conversation's revision does not change.

    Raises ConversationNotFoundError, MessageNotFoundError, ConflictError if the message is not streaming or `offset` is
    another one, or InvalidInputError, also if the text would pass 4 MiB. SQL: `extend_message.sql`, which runs again if
    another extension of the message commits first.
    """
    extended = await run_until_settled(
        _extend_message.fetch_one,
        db,
        check_user_id(user_id),
        *check_conversation(conversation_id, conversation_key),
        *check_message(seq, key),
        check_seq("offset", offset),
        check_content("text", text),
    )
    return extended.length


async def read_message(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    seq: int | None = None,
    key: str | None = None,
    offset: int = 0,
) -> MessageTail:
    """
    Return the text of a message from `offset` on, its length and its state.

    `offset` counts code points. Pass the `offset` of the result to the next call to continue there; beyond the end, the
    text is empty. Only the parts from there on are read.

    Raises ConversationNotFoundError, MessageNotFoundError or InvalidInputError. SQL: `read_message.sql`.
    """
    return await _read_message.fetch_message(
        db,
        check_user_id(user_id),
        *check_conversation(conversation_id, conversation_key),
        *check_message(seq, key),
        check_seq("offset", offset),
    )


async def finish_message(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    seq: int | None = None,
    key: str | None = None,
    content: str | None = None,
    payload: object = None,
    metadata: Mapping[str, object] | None = None,
    token_count: int | None = None,
    aborted: bool = False,
) -> Message:
    """
    Complete a message that is streamed, and return the stored record.

    Without `content`, its text is what `extend_message` has stored. None keeps `payload`, `metadata` and `token_count`.
    With `aborted=True`, its state is `aborted` instead of None. A message that is not streaming is returned unchanged,
    so the call is safe to repeat. The conversation's revision rises.

    Raises ConversationNotFoundError, MessageNotFoundError or InvalidInputError. SQL: `finish_message.sql`, which runs
    again if another process extends the message at the same time.
    """
    return await run_until_settled(
        _finish_message.fetch_one,
        db,
        check_user_id(user_id),
        *check_conversation(conversation_id, conversation_key),
        *check_message(seq, key),
        None if content is None else check_content("content", content),
        check_payload("payload", payload),
        check_metadata("metadata", metadata),
        check_token_count("token_count", token_count),
        check_bool("aborted", aborted),
    )


async def list_streaming(db: Database, *, user_id: str, older_than: timedelta) -> list[Message]:
    """
    Return a user's messages that are streaming but were not extended for `older_than`: what a crash has left.

    They have the text so far, and come in the order of conversations and of `seq`. Complete them with `finish_message`;
    `chatdb abort-streams` does so for all users.

    Raises InvalidInputError. SQL: `list_streaming.sql`.
    """
    return await _list_streaming.fetch_all(db, check_user_id(user_id), check_interval("older_than", older_than))


class MessageStream:
    """
    A message that is streamed; `stream_message` returns it.

    In the block, `message` is the record as it was started; after it, the record as it was stored. `offset` is the
    length of the text that is stored for certain, in code points.
    """

    message: Message
    offset: int

    def __init__(self, db: Database, flush_every: float, start: Mapping[str, Any]) -> None:
        self._db = db
        self._flush_every = check_seconds("flush_every", flush_every, least=0.01, most=3600)
        self._start = start
        self._unflushed: list[str] = []
        self._size = 0
        self._unacknowledged = ""
        self._half = ""
        self._lock = asyncio.Lock()
        self._timer: asyncio.Task[None] | None = None
        self._final: dict[str, Any] = {}
        self._is_open = False

    async def __aenter__(self) -> Self:
        self.message = await start_message(self._db, **self._start)
        if self.message.state != "streaming":
            raise ConflictError("the message with this key is already finished: use a new key for a new message")
        self.offset = len(self.message.content)
        self._is_open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_open = False
        try:
            if error is None:
                await self._end(aborted=False)
                return
        except BaseException:
            await self._abort()
            raise
        await self._abort()

    async def write(self, text: str) -> None:
        """
        Add text. It is stored with the next flush: after `flush_every` seconds, or at once if much has gathered.

        The first half of a surrogate pair waits for the other one.

        Raises what `extend_message` raises, also for an earlier flush; then the text waits for the next flush.
        """
        if not self._is_open:
            raise ConflictError("the stream is not open: write in the block of stream_message")
        text = self._half + check_str("text", text)
        self._half = ""
        if text and "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        check_content("text", text)
        if text:
            self._unflushed.append(text)
            self._size += len(text)
        if self._timer is not None and self._timer.done():
            timer, self._timer = self._timer, None
            timer.result()
        if self._size >= MAX_UNFLUSHED:
            await self.flush()
        elif self._timer is None and self._unflushed:
            self._timer = asyncio.create_task(self._flush_later())

    async def flush(self) -> None:
        """Store the text that has gathered. Raises what `extend_message` raises."""
        async with self._lock:
            # a flush that failed may still reach the server: more text at its offset could be replaced by it
            if self._unacknowledged:
                await self._extend()
            self._unacknowledged = "".join(self._unflushed)
            self._unflushed.clear()
            if self._unacknowledged:
                await self._extend()

    def finish(
        self,
        *,
        content: str | None = None,
        payload: object = None,
        metadata: Mapping[str, object] | None = None,
        token_count: int | None = None,
    ) -> None:
        """Set what `finish_message` stores at the end of the block. Raises InvalidInputError."""
        if content is not None:
            check_content("content", content)
        check_payload("payload", payload)
        check_metadata("metadata", metadata)
        check_token_count("token_count", token_count)
        self._final = {"content": content, "payload": payload, "metadata": metadata, "token_count": token_count}

    def _address(self) -> dict[str, Any]:
        message = self.message
        return {"user_id": message.user_id, "conversation_id": message.conversation_id, "seq": message.seq}

    async def _extend(self) -> None:
        text = self._unacknowledged
        self.offset = await extend_message(self._db, **self._address(), offset=self.offset, text=text)
        self._unacknowledged = ""
        self._size -= len(text)

    async def _flush_later(self) -> None:
        while self._unflushed:  # also what is written during a flush
            await asyncio.sleep(self._flush_every)
            await self.flush()

    async def _end(self, *, aborted: bool) -> None:
        if self._timer is not None:
            async with self._lock:  # after a flush that is under way
                self._timer.cancel()
            await asyncio.wait([self._timer])
            if not self._timer.cancelled():
                self._timer.exception()  # the flush below meets the same error, or makes up for it
        try:
            await self.flush()
        except InvalidInputError:  # longer than 4 MiB: without what was not stored
            if not aborted:
                raise
        if self._half and not aborted:
            raise InvalidInputError("text", "ends with the first half of a surrogate pair")
        final = {} if aborted else self._final
        self.message = await finish_message(self._db, **self._address(), aborted=aborted, **final)

    async def _abort(self) -> None:
        """Mark the message as aborted, in bounded time and without raising: the block's own error matters."""
        ending = asyncio.create_task(self._end(aborted=True))
        timeout = asyncio.get_running_loop().call_later(_ABORT_TIMEOUT, ending.cancel)
        await _wait_regardless(ending)
        timeout.cancel()
        if self._timer is not None and not self._timer.done():
            self._timer.cancel()
            await _wait_regardless(self._timer)
        error = None if ending.cancelled() else ending.exception()
        if isinstance(error, ConflictError | NotFoundError):  # another caller has finished or deleted it
            return
        if ending.cancelled() or error is not None:
            reason = type(error).__name__ if error else "no answer in time"
            _log.warning("a stream could not be marked as aborted; list_streaming finds it: %s", reason)


async def _wait_regardless(task: asyncio.Task[None]) -> None:
    """Wait until a task is done, even if the caller is cancelled, as anyio does again and again."""
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # otherwise asyncio logs it


def stream_message(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    role: Role = "assistant",
    key: str | None = None,
    metadata: Mapping[str, object] | None = None,
    parent_seq: int | None = None,
    flush_every: float = 1.0,
) -> MessageStream:
    """
    Stream a message: an async context manager that starts it, stores what the block writes, and finishes it.

        async with chatdb.stream_message(db, user_id=user, conversation_id=id) as stream:
            async for token in model:
                await stream.write(token)

    Text is stored every `flush_every` seconds (0.01 to 3,600). If the block raises or is cancelled, the message is
    marked as aborted, with all that was written. After a crash, the same `key` continues the message: `stream.offset`
    is the length that was stored. A message that is already finished raises ConflictError. Pass a pool as `db`: flushes
    run beside the block.

    Raises what `start_message`, `extend_message` and `finish_message` raise.
    """
    start: dict[str, Any] = {
        "user_id": user_id,
        "conversation_id": conversation_id,
        "conversation_key": conversation_key,
        "role": role,
        "key": key,
        "metadata": metadata,
        "parent_seq": parent_seq,
    }
    return MessageStream(db, flush_every, start)
