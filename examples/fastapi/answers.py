"""Answers: the agent writes them in the background, and every tab follows them by server-sent events."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

from agents import Runner, TResponseInputItem
from fastapi.sse import ServerSentEvent
from openai.types.responses import ResponseTextDeltaEvent

import chatdb
from agent import AGENT

LOST_AFTER = timedelta(seconds=30)  # the process that wrote an answer is gone if the text has not grown for so long
TASKS = set[asyncio.Task[None]]()  # the answers that this process writes

Json = dict[str, Any]
Place = dict[str, Any]  # arguments of chatdb's functions: db, user_id and conversation_id


def message_json(message: chatdb.Message) -> Json:
    """Return a message with the tools that it used."""
    return {**message.public(), "tools": (message.metadata or {}).get("tools", [])}


def event_id(after: int, offset: int = 0) -> str:
    """Return the id from which events continue: all up to `after` is sent, and `offset` characters of the next one."""
    return f"{after}.{offset}" if offset else f"{after}"


async def start(chat: Place, question_seq: int, key: str) -> chatdb.Message:
    """Start to answer a question, unless a request with this key has done so before, in whichever process."""
    metadata = {"run": secrets.token_hex(8)}
    answer = await chatdb.start_message(**chat, key=key, parent_seq=question_seq, metadata=metadata)
    if answer.metadata == metadata:
        task = asyncio.create_task(write(chat, question_seq, answer))
        TASKS.add(task)
        task.add_done_callback(TASKS.discard)
    return answer


async def write(chat: Place, question_seq: int, answer: chatdb.Message) -> None:
    """Run the agent, and store what it says while it speaks."""
    try:
        async with chatdb.stream_message(**chat, key=answer.key, flush_every=0.1) as stream:
            # get_context would read the line that the user has selected meanwhile
            line = await chatdb.get_branch(**chat, top_seq=question_seq, limit=100)
            await run_agent(line, stream)
            async with asyncio.timeout(30):
                while True:  # until a database that restarts is back
                    with suppress(chatdb.UnavailableError):
                        return await stream.flush()
                    await asyncio.sleep(0.5)
    except (chatdb.ConflictError, chatdb.NotFoundError):
        pass  # stopped or deleted by a request, perhaps in another process
    except Exception as error:  # whatever the model raises: the text so far is stored
        logging.getLogger("uvicorn.error").error("an answer failed: %s", type(error).__name__)


async def run_agent(line: list[chatdb.Message], stream: chatdb.MessageStream) -> None:
    """Write the words of the agent, and its calls of tools at the end."""
    items: list[TResponseInputItem] = [
        {"role": "assistant" if message.role == "assistant" else "user", "content": message.content}
        for message in line
        if message.content and message.state != "streaming"
    ]
    tools: dict[str, Json] = {}
    async for event in Runner.run_streamed(AGENT, items).stream_events():
        if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent):
            with suppress(chatdb.UnavailableError):  # the text waits for the next flush
                await stream.write(event.data.delta)
        elif event.type == "run_item_stream_event":
            raw: Any = event.item.raw_item
            if event.item.type == "tool_call_item":
                tools[raw.call_id] = {"name": raw.name, "arguments": raw.arguments}
            elif event.item.type == "tool_call_output_item":
                tools[raw["call_id"]]["output"] = str(event.item.output)
    if tools:
        stream.finish(metadata={**(stream.message.metadata or {}), "tools": [*tools.values()]})


async def finish_all() -> None:
    """Give the answers five seconds to finish, then store the others as aborted, with their text."""
    if TASKS:
        _, late = await asyncio.wait(TASKS, timeout=5)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)


async def abort_lost(chat: Place) -> None:
    """Complete the answers that a crash has left, as aborted."""
    for lost in await chatdb.list_streaming(chat["db"], user_id=chat["user_id"], older_than=LOST_AFTER):
        place: Place = {**chat, "conversation_id": lost.conversation_id}
        await chatdb.finish_message(**place, seq=lost.seq, aborted=True)


async def follow(watcher: chatdb.Watcher, chat: Place, start: str) -> AsyncIterator[ServerSentEvent]:
    """Yield the messages after an event id, and the text of those that are streaming as it grows."""
    newest, offset = (int(number) for number in f"{start}.0".split(".")[:2])
    sent = {newest + 1: offset} if offset else {}  # characters, by the seq of the messages that are streaming

    def event(name: str, data: Json) -> ServerSentEvent:
        first = min(sent, default=newest + 1)
        return ServerSentEvent(event=name, data=data, id=event_id(first - 1, sent.get(first, 0)))

    def delta(seq: int, text: str) -> ServerSentEvent:
        begin = sent[seq]
        sent[seq] += len(text)
        return event("delta", {"seq": seq, "offset": begin, "text": text})

    yield ServerSentEvent(retry=1000)
    messages = watcher.watch(user_id=chat["user_id"], conversation_id=chat["conversation_id"], after_seq=newest)
    coming = asyncio.ensure_future(anext(messages))
    grown_at = time.monotonic()
    try:
        while True:
            await asyncio.wait([coming], timeout=0.1 if sent else None)
            if not coming.done():
                with suppress(chatdb.UnavailableError):
                    for seq in [*sent]:
                        tail = await chatdb.read_message(**chat, seq=seq, offset=sent[seq])
                        if tail.text:
                            yield delta(seq, tail.text)
                            grown_at = time.monotonic()
                    if time.monotonic() - grown_at > LOST_AFTER.seconds:
                        await abort_lost(chat)
                continue
            message = coming.result()
            coming = asyncio.ensure_future(anext(messages))
            newest = max(newest, message.seq)
            is_known = message.seq in sent
            if is_known and len(message.content) > sent[message.seq]:
                yield delta(message.seq, message.content[sent[message.seq] :])
            if message.state != "streaming":
                sent.pop(message.seq, None)
            elif not is_known:
                sent[message.seq] = len(message.content)
            if message.state != "streaming" or not is_known:
                yield event("message", message_json(message))
    except (chatdb.NotFoundError, chatdb.PoolClosedError):
        yield ServerSentEvent(event="end", data={})
    except chatdb.UnavailableError:
        return  # the client connects again
    finally:
        coming.cancel()
