"""
Watch conversations: every message once, in order, and soon.

Hints say that a conversation was written to, and may be lost. A poll of the revisions of all watched conversations
finds everything else.

Decision: docs/decisions/0017-hints-and-a-poll.md
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections import defaultdict
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, cast

import asyncpg

from chatdb._core.driver_errors import mapped_driver_errors
from chatdb._core.dsn import AnyDsn, dsn_to_str, read_dsn
from chatdb._core.hints import CHANNEL
from chatdb._core.query import Database, Query
from chatdb._core.validate import as_text_array, check_conversation, check_seconds, check_seq, check_user_id
from chatdb.conversations import get_conversation
from chatdb.errors import (
    ChatDBError,
    ConfigurationError,
    InvalidInputError,
    MessageNotFoundError,
    PoolClosedError,
    UnavailableError,
)
from chatdb.messages import get_message, list_messages
from chatdb.pool import transaction
from chatdb.records import Message, WatchedRevision

if TYPE_CHECKING:
    from chatdb._core.handles import Connection

_poll_conversations = Query("poll_conversations", WatchedRevision, idempotent=True)

_log = logging.getLogger("chatdb")

_PAGE: Final = 100
_RECONNECT: Final = (0.1, 5.0)
"""The first and the longest delay before the listening connection is opened again, in seconds."""

_CONNECT_TIMEOUT: Final = 10.0
"""Seconds until an attempt to listen fails."""

_CHECK_EVERY: Final = 30.0
"""Seconds between two checks of the listening connection, and until one fails: a network can drop it silently."""

_ID: Final = re.compile("-?[0-9]{1,19}")


class _Watch:
    """A conversation that a caller watches."""

    def __init__(self, user_id: str, conversation_id: int, after: int) -> None:
        self.user_id = user_id
        self.conversation_id = conversation_id
        self.after = after
        self.streaming: list[int] = []
        self.revision: int | None = None
        self.changed = asyncio.Event()
        self.error: ChatDBError | None = None


class Watcher:
    """
    Watches conversations for new messages: an async context manager for one pool, which serves thousands of callers.

        async with chatdb.Watcher(pool, listen_dsn=dsn) as watcher:
            async for message in watcher.watch(user_id=user, conversation_id=id, after_seq=seq):
                ...

    Every `poll` seconds (0.05 to 3,600), one statement looks for changes in all watched conversations; behind row-level
    security, one for each user. With `listen_dsn`, one further connection hears hints of pools that are opened with
    `notify=True`, so that messages arrive sooner. It needs a direct connection or a pooler in session mode: PgBouncer
    in transaction mode does not pass notifications on.

    Opening raises ConfigurationError if the DSN is not usable. If the server cannot be reached, the watcher polls and
    connects later.
    """

    def __init__(self, pool: Database, listen_dsn: AnyDsn | None = None, poll: float = 2.0) -> None:
        if not hasattr(pool, "acquire"):
            raise InvalidInputError("pool", "must be a pool: a connection serves one statement at a time")
        self._pool = pool
        self._listen_to = None if listen_dsn is None else read_dsn(dsn_to_str(listen_dsn)).asyncpg("chatdb watcher")
        self._poll = check_seconds("poll", poll, least=0.05, most=3600)
        self._watches: defaultdict[int, set[_Watch]] = defaultdict(set)
        self._poll_now = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._listener: Connection | None = None
        self._is_open = False

    async def __aenter__(self) -> Self:
        if self._is_open:
            raise ConfigurationError("the watcher is already open")
        self._poll_now = asyncio.Event()  # an event belongs to the first loop in which somebody waits for it
        if self._listen_to is not None:
            with contextlib.suppress(_Unreachable):
                await self._connect()
        self._is_open = True
        self._tasks.append(asyncio.create_task(self._poll_forever()))
        if self._listen_to is not None:
            self._tasks.append(asyncio.create_task(self._listen_forever()))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_open = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self._disconnect()
        self._fail(PoolClosedError("the watcher is closed", sent=False))

    async def watch(
        self,
        *,
        user_id: str,
        conversation_id: int | None = None,
        conversation_key: str | None = None,
        after_seq: int = 0,
    ) -> AsyncGenerator[Message, None]:
        """
        Iterate over the messages after a position, oldest first, those that are stored and then those that come.

        A message that is streamed comes at its start, with the text so far, and again when it is finished. A caller
        that reads slowly costs no memory: at most 100 messages are held. To continue later, pass the `seq` of the last
        message, or one less than that of the first message whose end has not come.

        If the server cannot be reached after the first page, the caller waits until it can. Raises
        ConversationNotFoundError, also when the conversation is deleted, InvalidInputError, PoolClosedError when the
        pool or the watcher is closed, and UnavailableError if the first page cannot be read.
        """
        user = check_user_id(user_id)
        identifier, _ = check_conversation(conversation_id, conversation_key)
        after = check_seq("after_seq", after_seq)
        if not self._is_open:
            raise PoolClosedError("the watcher is not open: use it in async with", sent=False)
        if identifier is None:
            conversation = await get_conversation(self._pool, user_id=user, conversation_key=conversation_key)
            identifier = conversation.id
        watch = _Watch(user, identifier, after)
        self._watches[identifier].add(watch)
        try:
            page = await self._page(watch)
            while True:
                for message in page:
                    watch.after = message.seq
                    if message.state == "streaming":
                        watch.streaming.append(message.seq)
                    yield message
                is_last = len(page) < _PAGE
                page = []
                try:
                    if is_last:
                        for seq in [*watch.streaming]:
                            finished = await self._message(watch, seq)
                            if finished is None or finished.state != "streaming":
                                watch.streaming.remove(seq)
                                if finished is not None:
                                    yield finished
                        await watch.changed.wait()
                    page = await self._page(watch)
                except PoolClosedError:
                    raise
                except UnavailableError as error:
                    _log.warning("a watcher could not read: %s", type(error).__name__)
                    watch.revision = None  # the next poll that succeeds wakes it
                    await watch.changed.wait()
        finally:
            self._watches[identifier].discard(watch)
            if not self._watches[identifier]:
                del self._watches[identifier]

    async def _page(self, watch: _Watch) -> list[Message]:
        watch.changed.clear()
        if watch.error is not None:
            raise watch.error
        return await list_messages(
            self._pool, user_id=watch.user_id, conversation_id=watch.conversation_id, after_seq=watch.after, limit=_PAGE
        )

    async def _message(self, watch: _Watch, seq: int) -> Message | None:
        try:
            return await get_message(self._pool, user_id=watch.user_id, conversation_id=watch.conversation_id, seq=seq)
        except MessageNotFoundError:
            return None

    def _fail(self, error: ChatDBError) -> None:
        """Raise an error in all callers."""
        for watches in self._watches.values():
            for watch in watches:
                watch.error = error
                watch.changed.set()

    async def _poll_forever(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll):
                    await self._poll_now.wait()
            self._poll_now.clear()
            try:
                await self._poll_once()
            except (ConfigurationError, PoolClosedError) as error:
                self._fail(error)
                if isinstance(error, PoolClosedError):
                    return
            except Exception as error:  # noqa: BLE001 - the callers would wait forever if this task ended
                _log.warning("a watcher could not poll: %s", type(error).__name__)

    async def _poll_once(self) -> None:
        watches = [watch for same in self._watches.values() for watch in same]
        if not getattr(self._pool, "row_level_security", False):
            await self._look(self._pool, watches)
            return
        by_user: defaultdict[str, list[_Watch]] = defaultdict(list)
        for watch in watches:
            by_user[watch.user_id].append(watch)
        for user, theirs in by_user.items():
            async with transaction(self._pool, user_id=user) as connection:
                await self._look(connection, theirs)

    async def _look(self, db: Database, watches: list[_Watch]) -> None:
        if not watches:
            return
        changed = await _poll_conversations.fetch_all(
            db,
            [watch.user_id for watch in watches],
            as_text_array(watch.conversation_id for watch in watches),
            as_text_array(watch.revision for watch in watches),
        )
        for each in changed:
            watch = watches[each.ordinality - 1]
            watch.revision = each.revision
            # otherwise a hint came first, or something else was changed
            if each.last_seq is None or each.last_seq > watch.after or watch.streaming:
                watch.changed.set()

    async def _connect(self) -> None:
        try:
            with mapped_driver_errors():
                async with asyncio.timeout(_CONNECT_TIMEOUT):
                    connection = await asyncpg.connect(**cast("dict[str, Any]", self._listen_to))
                    self._listener = cast("Connection", connection)
                    await self._listener.add_listener(CHANNEL, self._hear)
        except ChatDBError as error:
            self._disconnect()
            if isinstance(error, ConfigurationError):
                raise
            _log.warning("a watcher cannot listen and polls meanwhile: %s", type(error).__name__)
            raise _Unreachable from error
        except BaseException:
            self._disconnect()
            raise

    def _disconnect(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.terminate()

    async def _listen_forever(self) -> None:
        delay, longest = _RECONNECT
        while True:
            if self._listener is not None:
                delay = _RECONNECT[0]
                self._poll_now.set()  # for hints that came before the connection
                await _lost(self._listener)
                self._disconnect()
            await asyncio.sleep(delay)
            delay = min(2 * delay, longest)
            try:
                await self._connect()
            except Exception as error:  # noqa: BLE001 - the watcher would never listen again if this task ended
                _log.debug("a watcher tries to listen again: %s", type(error).__name__)

    def _hear(self, _connection: object, _process: int, _channel: str, payload: object) -> None:
        for word in str(payload).split():
            if _ID.fullmatch(word):  # other programs may use the channel
                for watch in self._watches.get(int(word), ()):
                    watch.changed.set()


class _Unreachable(Exception):  # noqa: N818 - not an error for callers
    """The server cannot be reached now."""


async def _lost(connection: Connection) -> None:
    """Wait until the connection is closed or does not answer."""
    closed = asyncio.Event()
    connection.add_termination_listener(lambda _connection: closed.set())
    while not connection.is_closed():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CHECK_EVERY):
                await closed.wait()
                return
        try:
            await connection.fetchval("select 1", timeout=_CHECK_EVERY)
        except Exception:  # noqa: BLE001 - whatever it is, a new connection helps
            return
