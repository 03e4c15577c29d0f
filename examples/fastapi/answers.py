"""Answers: the agent writes them in the background, and every tab follows them by server-sent events."""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator
from contextlib import suppress
from datetime import timedelta
from typing import Any

from agents import Runner, ToolCallItem, ToolCallOutputItem, TResponseInputItem
from fastapi.sse import ServerSentEvent
from openai.types.responses import ResponseFunctionToolCall, ResponseTextDeltaEvent

import chatdb
from agent import AGENT
from models import Json, message_json

HISTORY = 100  # messages that the model sees
LOST_AFTER = timedelta(seconds=30)  # the process that wrote an answer is gone if it has not grown for so long
log = logging.getLogger("uvicorn.error")


async def abort_lost(db: chatdb.Pool, user_id: str) -> None:
    """Complete the answers that a crash has left."""
    for message in await chatdb.list_streaming(db, user_id=user_id, older_than=LOST_AFTER):
        await chatdb.finish_message(
            db, user_id=user_id, conversation_id=message.conversation_id, seq=message.seq, aborted=True
        )


class Answers:
    """The answers that this process writes."""

    def __init__(self, db: chatdb.Pool) -> None:
        self._db = db
        self._tasks = set[asyncio.Task[None]]()

    async def start(self, question: chatdb.Message, key: str) -> chatdb.Message:
        """Start the answer with this key, or return it if any process has started it before."""
        run = secrets.token_hex(8)
        answer = await chatdb.start_message(
            self._db,
            user_id=question.user_id,
            conversation_id=question.conversation_id,
            key=key,
            parent_seq=question.seq,
            metadata={"run": run},
        )
        if answer.metadata == {"run": run}:
            task = asyncio.create_task(self._write(question, answer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return answer

    async def close(self) -> None:
        """Give the answers five seconds to finish, then store what they have."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=5)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _write(self, question: chatdb.Message, answer: chatdb.Message) -> None:
        try:
            await self._stream(question, answer)
        except (chatdb.ConflictError, chatdb.NotFoundError):
            pass  # stopped or deleted by a request, perhaps in another process
        except Exception as error:  # noqa: BLE001 - a model can raise anything; the answer is stored as aborted
            log.error("an answer failed: %s", type(error).__name__)

    async def _stream(self, question: chatdb.Message, answer: chatdb.Message) -> None:
        place: dict[str, Any] = {"user_id": question.user_id, "conversation_id": question.conversation_id}
        async with chatdb.stream_message(self._db, **place, key=answer.key, flush_every=0.1) as stream:
            line = await chatdb.get_branch(self._db, **place, top_seq=question.seq, limit=HISTORY)
            items: list[TResponseInputItem] = [
                {"role": "assistant" if message.role == "assistant" else "user", "content": message.content}
                for message in line
                if message.content and message.state != "streaming"
            ]
            tools: list[dict[str, object]] = []
            async for event in Runner.run_streamed(AGENT, items).stream_events():
                if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent):
                    with suppress(chatdb.UnavailableError):  # the text waits for the next flush
                        await stream.write(event.data.delta)
                elif event.type == "run_item_stream_event" and isinstance(event.item, ToolCallItem):
                    call = event.item.raw_item
                    if isinstance(call, ResponseFunctionToolCall):
                        tools.append({"name": call.name, "arguments": call.arguments, "output": ""})
                elif event.type == "run_item_stream_event" and isinstance(event.item, ToolCallOutputItem):
                    tools[-1]["output"] = str(event.item.output)
            if tools:
                stream.finish(metadata={**(answer.metadata or {}), "tools": tools})
            async with asyncio.timeout(30):  # a database that restarts
                while True:
                    try:
                        await stream.flush()
                        break
                    except chatdb.UnavailableError:
                        await asyncio.sleep(0.5)


class Position:
    """How much of a conversation a client has: all up to `after`, and `offset` code points of the next message."""

    def __init__(self, after: int, offset: int = 0) -> None:
        self.after = after
        self.offset = offset

    def __str__(self) -> str:
        return f"{self.after}.{self.offset}" if self.offset else f"{self.after}"


def position_of(conversation: chatdb.Conversation, messages: list[chatdb.Message]) -> Position:
    """Return the position of a client that has loaded a conversation."""
    for message in messages:
        if message.state == "streaming":
            return Position(message.seq - 1, len(message.content))
    return Position(conversation.last_seq)


async def follow(
    db: chatdb.Pool, watcher: chatdb.Watcher, user_id: str, conversation_id: int, start: Position
) -> AsyncGenerator[ServerSentEvent, None]:
    """Yield messages as they come, and the text of those that are streaming as it grows."""
    place: dict[str, Any] = {"user_id": user_id, "conversation_id": conversation_id}
    newest = start.after
    sent = {start.after + 1: start.offset} if start.offset else {}  # code points, by seq

    def event(name: str, data: Json) -> ServerSentEvent:
        first = min(sent, default=newest + 1)
        return ServerSentEvent(event=name, data=data, id=str(Position(first - 1, sent.get(first, 0))))

    async def grown(seq: int) -> AsyncGenerator[ServerSentEvent, None]:
        with suppress(chatdb.UnavailableError, chatdb.NotFoundError):  # the watcher tells
            tail = await chatdb.read_message(db, **place, seq=seq, offset=sent[seq])
            if tail.text:
                start, sent[seq] = sent[seq], tail.offset
                yield event("delta", {"seq": seq, "offset": start, "text": tail.text})

    yield ServerSentEvent(retry=1000)
    messages = watcher.watch(**place, after_seq=start.after)
    coming = asyncio.ensure_future(anext(messages))
    try:
        while True:
            await asyncio.wait([coming], timeout=0.1 if sent else None)
            for seq in [*sent]:
                async for delta in grown(seq):
                    yield delta
            if coming.done():
                message = coming.result()
                coming = asyncio.ensure_future(anext(messages))
                newest = max(newest, message.seq)
                if message.state != "streaming":
                    sent.pop(message.seq, None)
                elif message.seq in sent:  # the client has its beginning
                    continue
                else:
                    sent[message.seq] = len(message.content)
                yield event("message", message_json(message))
    except (chatdb.NotFoundError, chatdb.PoolClosedError):
        yield ServerSentEvent(event="end", data={})
    except chatdb.UnavailableError:
        pass  # the client connects again
    finally:
        coming.cancel()
