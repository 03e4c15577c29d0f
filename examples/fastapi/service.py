"""A chat service on chatdb: REST for conversations and messages, and server-sent events for the answers."""

import asyncio
import hashlib
import json
import os
import signal
import uuid
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path as FilePath
from types import FrameType
from typing import Annotated

from fastapi import APIRouter, Body, Depends, FastAPI, Header, Path, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field
from starlette.middleware.base import RequestResponseEndpoint

import chatdb
from answers import Json, Place, abort_lost, event_id, finish_all, follow, message_json, start
from auth import GUEST, OptionalUser, User, sign
from problems import ERRORS, on_error, problem, problems

STATIC = FilePath(__file__).parent / "static"
MAX_BODY = 1_000_000
CSP = "default-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
HEADERS = {"Content-Security-Policy": CSP, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncGenerator[Json, None]:
    """Open the pool and the watcher; at the end, let the answers finish before the pool closes."""
    dsn = os.environ.get("DATABASE_URL")
    pool = chatdb.create_pool(dsn, notify=True) if dsn else chatdb.open_embedded()
    async with pool as db, AsyncExitStack() as streams:
        await chatdb.check_schema(db)
        watcher = await streams.enter_async_context(chatdb.Watcher(db, listen_dsn=dsn, poll=0.5))
        end_at_signal(streams)
        yield {"db": db, "watcher": watcher}
        await finish_all()


def end_at_signal(streams: AsyncExitStack) -> None:
    """Close the watcher, and so end the event streams, at SIGTERM: the server waits for them first."""
    loop, server = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        asyncio.run_coroutine_threadsafe(streams.aclose(), loop)
        if callable(server):
            server(number, frame)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


app = FastAPI(title="Chat", lifespan=lifespan, docs_url=None, redoc_url=None)
api = APIRouter(prefix="/api", responses=problems(401, 422, 503), max_body_size=MAX_BODY)
BODY = problems(400, 413, 415)
app.mount("/static", StaticFiles(directory=STATIC))
for kind in ERRORS:
    app.add_exception_handler(kind, on_error)


@app.middleware("http")
async def guard(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Refuse bodies that are large or no JSON, let browsers load nothing from elsewhere, and store no answers."""
    length = int(request.headers.get("content-length", 0))
    is_json = request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"
    if length > MAX_BODY:
        response = problem(413, "The body is too large.")
    elif (length or "transfer-encoding" in request.headers) and not is_json:
        response = problem(415, "The body must have the content type application/json.")
    else:
        response = await call_next(request)
    if request.url.path.startswith("/api/"):
        response.headers["Cache-Control"] = "no-store"
    response.headers.update(HEADERS)
    return response


def get_mine(request: Request, user: User) -> Place:
    """Return the first arguments of chatdb's functions."""
    return {"db": request.state.db, "user_id": user}


def get_chat(mine: Annotated[Place, Depends(get_mine)], conversation_id: Annotated[int, Path(alias="id")]) -> Place:
    """Return the address of a conversation. To others than its user, it does not exist."""
    return mine | {"conversation_id": conversation_id}


def get_expected(if_match: Annotated[str | None, Header(pattern=r'^(\*|"[A-Za-z0-9_-]+")$')] = None) -> str | None:
    """Return the etag that a write expects."""
    return None if if_match in {None, "*"} else str(if_match).strip('"')


def get_key(idempotency_key: Annotated[str | None, Header(max_length=255, pattern="^[ -~]+$")] = None) -> str | None:
    """Return a key for what a request creates, which is never that of an answer."""
    return idempotency_key and f"request-{hashlib.sha256(idempotency_key.encode()).hexdigest()}"


Mine = Annotated[Place, Depends(get_mine)]
Chat = Annotated[Place, Depends(get_chat)]
Expected = Annotated[str | None, Depends(get_expected)]
Key = Annotated[str | None, Depends(get_key)]
Limit = Annotated[int, Query(ge=1, le=100)]
Cursor = Annotated[str | None, Query(max_length=100)]
EventId = Annotated[str, Field(pattern=r"^[0-9]{1,18}(\.[0-9]{1,9})?$")]
Seq = Annotated[int, Body(embed=True, ge=1)]
Title = Annotated[str | None, Field(max_length=1000)]
NewTitle = Annotated[Title, Body(embed=True)]
Name = Annotated[str, Body(embed=True, min_length=1, max_length=100, pattern=r"^[^\x00-\x1f]+$")]
Content = Annotated[str, Body(min_length=1, max_length=100_000)]
Text = Annotated[str, Query(min_length=1, max_length=1000)]


def conversation_json(stored: chatdb.Conversation, response: Response | None = None) -> Json:
    """Return a conversation, whose etag is also a header of the response."""
    more = {"archived": stored.archived_at is not None, "pinned": stored.pinned_at is not None}
    if response is not None:
        response.headers["ETag"] = f'"{stored.etag}"'
    return stored.model_dump(include={"id", "title", "created_at", "updated_at"}) | more | {"etag": f'"{stored.etag}"'}


async def page_json(chat: Place, messages: list[chatdb.Message], limit: int, before: int | None = None) -> Json:
    """Return messages of the current line with their versions, and the cursor of the page before."""
    return {
        "messages": [message_json(message) for message in messages],
        "versions": await chatdb.list_versions(**chat, limit=limit, before_seq=before),
        "before": str(messages[0].seq) if len(messages) == limit else None,
    }


async def load(chat: Place, limit: int, response: Response) -> Json:
    """Return a conversation, its newest messages, and the event id from which to follow it."""
    await abort_lost(chat)
    stored, messages = await chatdb.load_conversation(**chat, limit=limit)
    page = await page_json(chat, messages, limit)
    growing = next((message for message in messages if message.state == "streaming"), None)
    events = event_id(growing.seq - 1, len(growing.content)) if growing else event_id(stored.last_seq)
    return {"conversation": conversation_json(stored, response), **page, "events": events}


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """Return the page."""
    return FileResponse(STATIC / "index.html")


@app.get("/health")
async def health() -> Json:
    """Tell that the process lives."""
    return {"status": "ok"}


@app.get("/ready", responses=problems(503))
async def ready(request: Request) -> Json:
    """Tell that the database can be used."""
    await chatdb.check_schema(request.state.db)
    return {"status": "ok"}


@api.post("/guests", status_code=201)
async def create_guest() -> Json:
    """Begin without an account."""
    user = f"{GUEST}{uuid.uuid4()}"
    return {"token": sign(user), "user": user}


@api.post("/sign-in", responses=BODY)
async def sign_in(request: Request, guest: OptionalUser, name: Name) -> Json:
    """Sign in WITHOUT A PASSWORD, as only a demo may do, and take the guest's conversations along."""
    user = f"user-{name}"
    signed_in: Json = {"token": sign(user), "user": user}
    if guest is not None and guest.startswith(GUEST):
        signed_in["moved"] = await chatdb.move_user(request.state.db, user_id=guest, to_user_id=user)
    return signed_in


@api.get("/me")
async def get_me(user: User) -> Json:
    """Return the user of the token."""
    return {"user": user, "guest": user.startswith(GUEST)}


@api.get("/me/export", response_class=StreamingResponse, responses={200: {"content": {"application/x-ndjson": {}}}})
async def export_me(mine: Mine) -> StreamingResponse:
    """Return all data of the user as JSON lines."""
    lines = (
        json.dumps(record.public() if isinstance(record, chatdb.Message) else record.model_dump(mode="json")) + "\n"
        async for record in chatdb.export_user(**mine)
    )
    attachment = {"Content-Disposition": "attachment; filename=chatdb-export.jsonl"}
    return StreamingResponse(lines, headers=attachment, media_type="application/x-ndjson")


@api.delete("/me")
async def delete_me(mine: Mine) -> chatdb.Deleted:
    """Delete all data of the user."""
    return await chatdb.delete_user(**mine)


@api.get("/conversations")
async def list_conversations(
    mine: Mine, limit: Limit = 20, after: Cursor = None, archived: bool = False, pinned: bool = False
) -> Json:
    """Return a page of conversations, latest activity first, or all that are pinned."""
    if pinned:
        found = await chatdb.list_pinned(**mine, limit=1000)
        return {"items": [conversation_json(stored) | {"preview": None} for stored in found], "next": None}
    pairs = await chatdb.list_previews(**mine, limit=limit, after=after, archived=archived)
    items = [
        conversation_json(stored) | {"preview": newest and {"role": newest.role, "text": newest.content[:200]}}
        for stored, newest in pairs
    ]
    return {"items": items, "next": pairs[-1][0].cursor if len(pairs) == limit else None}


@api.post("/conversations", status_code=201, responses=BODY)
async def create_conversation(mine: Mine, key: Key, response: Response, title: NewTitle = None) -> Json:
    """Create a conversation, or return the one that this Idempotency-Key has created."""
    request = {"title": title} if key else None
    created = await chatdb.create_conversation(**mine, title=title, key=key, metadata=request)
    if created.metadata != request:
        raise chatdb.ConflictError("the Idempotency-Key was used with another title")
    response.headers["Location"] = f"/api/conversations/{created.id}"
    return conversation_json(created, response)


@api.get("/conversations/{id}", response_model=Json, responses=problems(404) | {304: {"description": "Not changed"}})
async def get_conversation(
    chat: Chat, response: Response, limit: Limit = 100, if_none_match: Annotated[str, Header()] = ""
) -> Json | Response:
    """Return a conversation with the newest messages of its current line."""
    loaded = await load(chat, limit, response)
    is_growing = any(message["state"] == "streaming" for message in loaded["messages"])  # with the same etag
    if response.headers["ETag"] in if_none_match and not is_growing:
        return Response(status_code=304, headers=response.headers)
    return loaded


class Changes(BaseModel):
    """What to change in a conversation. Fields that are left out stay."""

    title: Title = None
    archived: bool = False
    pinned: bool = False


@api.patch("/conversations/{id}", responses=BODY | problems(404, 412))
async def update_conversation(chat: Chat, changes: Changes, expected: Expected, response: Response) -> Json:
    """Rename, archive or pin a conversation."""
    values = changes.model_dump(exclude_unset=True)
    return conversation_json(await chatdb.update_conversation(**chat, **values, expected=expected), response)


@api.delete("/conversations/{id}", responses=problems(404, 412))
async def delete_conversation(chat: Chat, expected: Expected) -> chatdb.Deleted:
    """Delete a conversation with all its messages."""
    return await chatdb.delete_conversation(**chat, expected=expected)


@api.put("/conversations/{id}/head", responses=BODY | problems(404, 412))
async def switch_branch(chat: Chat, seq: Seq, expected: Expected, response: Response) -> Json:
    """Show another version of a message, with what follows it."""
    await chatdb.switch_branch(**chat, seq=seq, expected=expected)
    return await load(chat, 100, response)


@api.get("/conversations/{id}/messages", responses=problems(404))
async def list_messages(chat: Chat, before: Annotated[int, Query(ge=1)], limit: Limit = 100) -> Json:
    """Return an earlier page of the current line."""
    messages = await chatdb.get_branch(**chat, before_seq=before, limit=limit)
    return await page_json(chat, messages, limit, before)


@api.post("/conversations/{id}/messages", status_code=202, responses=BODY | problems(404))
async def ask(chat: Chat, key: Key, content: Content, parent_seq: Annotated[int | None, Body(ge=0)] = None) -> Json:
    """Store a user's message, after the head or parent_seq (an edit), and begin to answer it."""
    metadata = None if parent_seq is None else {"parent_seq": parent_seq}  # compared if the key is repeated
    question = await chatdb.append_message(
        **chat, role="user", content=content, parent_seq=parent_seq, metadata=metadata, key=key
    )
    answer = await start(chat, question.seq, f"answer-{question.seq}")
    return {"message": message_json(question), "answer": message_json(answer)}


@api.post("/conversations/{id}/answers", status_code=202, responses=BODY | problems(404))
async def regenerate(chat: Chat, key: Key, parent_seq: Seq) -> Json:
    """Begin to write another answer to a user's message."""
    if (await chatdb.get_message(**chat, seq=parent_seq)).role != "user":
        raise chatdb.InvalidInputError("parent_seq", "must be a message of the user")
    return {"answer": message_json(await start(chat, parent_seq, f"answer-{parent_seq}-{key or uuid.uuid4()}"))}


@api.post("/conversations/{id}/messages/{seq}/stop", responses=problems(404))
async def stop(chat: Chat, seq: int) -> Json:
    """Stop an answer, whichever process writes it: that one notices with the next text."""
    return {"message": message_json(await chatdb.finish_message(**chat, seq=seq, aborted=True))}


async def get_start(
    chat: Chat, after: EventId | None = None, last_event_id: Annotated[EventId | None, Header()] = None
) -> str:
    """Return the event id from which to continue, by default after the newest finished message."""
    stored, messages = await chatdb.load_conversation(**chat)  # before the answer begins, so that errors have a status
    seqs = [message.seq for message in messages if message.state == "streaming"]
    return last_event_id or after or event_id(min(seqs, default=stored.last_seq + 1) - 1)


Start = Annotated[str, Depends(get_start)]


@api.get("/conversations/{id}/events", response_class=EventSourceResponse, responses=problems(404))
async def events(request: Request, chat: Chat, start_at: Start) -> AsyncIterable[ServerSentEvent]:
    """Follow a conversation: its messages, and the text of those that are being written."""
    async for event in follow(request.state.watcher, chat, start_at):
        yield event


@api.get("/search")
async def search(mine: Mine, q: Text, limit: Limit = 20, after: Cursor = None) -> Json:
    """Find messages that contain a text."""
    found = await chatdb.search_messages(**mine, query=q, limit=limit, after=after)
    return {"items": found, "next": found[-1].cursor if len(found) == limit else None}


app.include_router(api)
