"""A chat service on chatdb: REST for conversations and messages, and server-sent events for the answers."""

import asyncio
import hashlib
import json
import os
import re
import signal
import uuid
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Path as PathParameter, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import chatdb
from answers import Answers, Position, abort_lost, follow, position_of
from auth import GUEST, OptionalUser, User, sign
from models import (
    Asked,
    Conversation,
    ConversationPage,
    ConversationPatch,
    Head,
    Loaded,
    MatchPage,
    Me,
    MessagePage,
    NewAnswer,
    NewConversation,
    NewQuestion,
    OneAnswer,
    OneMessage,
    SignIn,
    Token,
    message_json,
)
from problems import install, problem, problems

STATIC = Path(__file__).parent / "static"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass
class Service:
    """What the requests share."""

    db: chatdb.Pool
    watcher: chatdb.Watcher
    answers: Answers


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, Service]]:
    """Open the pool, and let the answers finish before it closes."""
    dsn = os.environ.get("DATABASE_URL")
    pool = chatdb.create_pool(dsn, notify=True) if dsn else chatdb.open_embedded()
    async with pool as db, AsyncExitStack() as streams:
        await chatdb.check_schema(db)
        watcher = await streams.enter_async_context(chatdb.Watcher(db, listen_dsn=dsn, poll=0.5))
        close_at_shutdown(streams)
        answers = Answers(db)
        yield {"service": Service(db, watcher, answers)}
        await answers.close()


def close_at_shutdown(streams: AsyncExitStack) -> None:
    """Close the watcher, which ends the event streams, at the signal: the server first waits for open responses."""
    loop = asyncio.get_running_loop()
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    tasks: list[asyncio.Task[None]] = []

    def handle(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(lambda: tasks.append(loop.create_task(streams.aclose())))
        handler = previous[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    for number in previous:
        signal.signal(number, handle)


class AddHeaders:
    """Middleware that lets browsers load nothing from elsewhere and store no answers of the API."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                if scope["path"].startswith("/api/"):
                    headers["Cache-Control"] = "no-store"
            await send(message)

        await self.app(scope, receive, send_with_headers)


app = FastAPI(title="Chat", lifespan=lifespan, docs_url=None, redoc_url=None, max_body_size=1_000_000)
app.add_middleware(AddHeaders)
app.mount("/static", StaticFiles(directory=STATIC), name="static")
install(app)
api = APIRouter(prefix="/api", responses=problems(401, 422, 503))
BODY = (400, 413, 415)


def get_service(request: Request) -> Service:
    """Return what the lifespan has opened."""
    service: Service = request.state.service
    return service


def get_db(request: Request) -> chatdb.Pool:
    """Return the pool."""
    return get_service(request).db


def get_expected(if_match: Annotated[str | None, Header(pattern=r'^(\*|"[A-Za-z0-9_-]+")$')] = None) -> str | None:
    """Return the etag that a write expects."""
    return None if if_match is None or if_match == "*" else if_match.strip('"')


def get_key(
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255, pattern="^[ -~]+$")] = None,
) -> str | None:
    """Return the key of what a request creates: no client can choose the key of an answer."""
    return None if idempotency_key is None else "request-" + hashlib.sha256(idempotency_key.encode()).hexdigest()


Db = Annotated[chatdb.Pool, Depends(get_db)]
Shared = Annotated[Service, Depends(get_service)]
Expected = Annotated[str | None, Depends(get_expected)]
Key = Annotated[str | None, Depends(get_key)]
Id = Annotated[int, PathParameter(alias="id")]
Limit = Annotated[int, Query(ge=1, le=100)]
Cursor = Annotated[str | None, Query(min_length=1, max_length=100)]


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """Return the page."""
    return FileResponse(STATIC / "index.html")


@app.get("/health")
async def health() -> dict[str, str]:
    """Tell that the process lives."""
    return {"status": "ok"}


@app.get("/ready", responses=problems(503))
async def ready(db: Db) -> Response:
    """Tell whether the database and its schema can be used."""
    try:
        await chatdb.check_schema(db)
    except chatdb.ChatDBError as error:
        return problem(503, error.public, {"Retry-After": "1"})
    return Response(b'{"status":"ok"}', media_type="application/json")


@api.post("/guests", status_code=201)
async def create_guest() -> Token:
    """Begin without an account."""
    user = f"{GUEST}{uuid.uuid4()}"
    return Token(token=sign(user), user=user)


@api.post("/sign-in", responses=problems(*BODY))
async def sign_in(body: SignIn, db: Db, guest: OptionalUser) -> Token:
    """Sign in WITHOUT A PASSWORD, for this demo only, and take a guest's conversations along."""
    user = f"user-{body.name}"
    moved = None
    if guest is not None and guest.startswith(GUEST):
        moved = await chatdb.move_user(db, user_id=guest, to_user_id=user)
    return Token(token=sign(user), user=user, moved=moved)


@api.get("/me")
async def get_me(user: User) -> Me:
    """Return the user of the token."""
    return Me(user=user, guest=user.startswith(GUEST))


@api.get("/me/export")
async def export_me(user: User, db: Db) -> StreamingResponse:
    """Return all data of the user as JSON lines."""

    async def lines() -> AsyncIterator[str]:
        async for record in chatdb.export_user(db, user_id=user):
            if isinstance(record, chatdb.Message):
                yield json.dumps(record.public(), ensure_ascii=False) + "\n"
            else:
                yield record.model_dump_json(exclude={"user_id"}) + "\n"

    attachment = {"Content-Disposition": 'attachment; filename="chatdb-export.jsonl"'}
    return StreamingResponse(lines(), media_type="application/x-ndjson", headers=attachment)


@api.delete("/me")
async def delete_me(user: User, db: Db) -> chatdb.Deleted:
    """Delete all data of the user."""
    return await chatdb.delete_user(db, user_id=user)


@api.get("/conversations")
async def list_conversations(
    user: User, db: Db, limit: Limit = 20, after: Cursor = None, archived: bool = False, pinned: bool = False
) -> ConversationPage:
    """Return a page of conversations, latest activity first, or all pinned ones."""
    if pinned:
        found = await chatdb.list_pinned(db, user_id=user, limit=1000)
        return ConversationPage(items=[Conversation.of(each) for each in found])
    pairs = await chatdb.list_previews(db, user_id=user, limit=limit, after=after, archived=archived)
    items = [Conversation.of(*pair) for pair in pairs]
    return ConversationPage(items=items, next=pairs[-1][0].cursor if len(pairs) == limit else None)


@api.post("/conversations", status_code=201, responses=problems(*BODY))
async def create_conversation(
    body: NewConversation, user: User, db: Db, key: Key, response: Response
) -> Conversation:
    """Create a conversation, or return the one that this Idempotency-Key has created."""
    created = await chatdb.create_conversation(db, user_id=user, title=body.title, key=key)
    response.headers["Location"] = f"/api/conversations/{created.id}"
    return with_etag(response, Conversation.of(created))


def with_etag(response: Response, conversation: Conversation) -> Conversation:
    """Send the etag of a conversation as a header, too."""
    response.headers["ETag"] = conversation.etag
    return conversation


async def load(db: chatdb.Pool, user: str, conversation_id: int, limit: int, response: Response) -> Loaded:
    """Load what a page shows first."""
    await abort_lost(db, user)
    stored, messages = await chatdb.load_conversation(db, user_id=user, conversation_id=conversation_id, limit=limit)
    versions = await chatdb.list_versions(db, user_id=user, conversation_id=conversation_id, limit=limit)
    return Loaded(
        conversation=with_etag(response, Conversation.of(stored)),
        messages=[message_json(message) for message in messages],
        versions=versions,
        before=str(messages[0].seq) if len(messages) == limit else None,
        events=str(position_of(stored, messages)),
    )


@api.get(
    "/conversations/{id}", response_model=Loaded, responses=problems(404) | {304: {"description": "Not changed"}}
)
async def get_conversation(
    conversation_id: Id,
    user: User,
    db: Db,
    response: Response,
    limit: Limit = 100,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Loaded | Response:
    """Return a conversation and the newest messages of its current line."""
    loaded = await load(db, user, conversation_id, limit, response)
    is_growing = any(message["state"] == "streaming" for message in loaded.messages)
    if if_none_match and not is_growing and (if_none_match == "*" or loaded.conversation.etag in if_none_match):
        return Response(status_code=304, headers={"ETag": loaded.conversation.etag})
    return loaded


@api.patch("/conversations/{id}", responses=problems(*BODY, 404, 412))
async def update_conversation(
    conversation_id: Id, body: ConversationPatch, user: User, db: Db, expected: Expected, response: Response
) -> Conversation:
    """Rename, pin or archive a conversation."""
    updated = await chatdb.update_conversation(
        db, user_id=user, conversation_id=conversation_id, expected=expected, **body.model_dump(exclude_unset=True)
    )
    return with_etag(response, Conversation.of(updated))


@api.delete("/conversations/{id}", responses=problems(404, 412))
async def delete_conversation(conversation_id: Id, user: User, db: Db, expected: Expected) -> chatdb.Deleted:
    """Delete a conversation with its messages."""
    return await chatdb.delete_conversation(db, user_id=user, conversation_id=conversation_id, expected=expected)


@api.put("/conversations/{id}/head", responses=problems(*BODY, 404, 412))
async def switch_branch(
    conversation_id: Id, body: Head, user: User, db: Db, expected: Expected, response: Response, limit: Limit = 100
) -> Loaded:
    """Show another version of a message, with the newest messages that follow it."""
    await chatdb.switch_branch(db, user_id=user, conversation_id=conversation_id, seq=body.seq, expected=expected)
    return await load(db, user, conversation_id, limit, response)


@api.get("/conversations/{id}/messages", responses=problems(404))
async def list_messages(
    conversation_id: Id, user: User, db: Db, before: Annotated[int, Query(ge=1)], limit: Limit = 100
) -> MessagePage:
    """Return an earlier page of the line."""
    place = {"conversation_id": conversation_id, "before_seq": before, "limit": limit}
    messages = await chatdb.get_branch(db, user_id=user, **place)
    return MessagePage(
        messages=[message_json(message) for message in messages],
        versions=await chatdb.list_versions(db, user_id=user, **place),
        before=str(messages[0].seq) if len(messages) == limit else None,
    )


@api.post("/conversations/{id}/messages", status_code=202, responses=problems(*BODY, 404))
async def ask(conversation_id: Id, body: NewQuestion, user: User, shared: Shared, key: Key) -> Asked:
    """Store a user's message, and begin to answer it. The answer comes as events."""
    question = await chatdb.append_message(
        shared.db,
        user_id=user,
        conversation_id=conversation_id,
        role="user",
        content=body.content,
        parent_seq=body.parent_seq,
        # a repeated key is compared with the stored message, of which this is a part
        metadata=None if body.parent_seq is None else {"parent_seq": body.parent_seq},
        key=key,
    )
    answer = await shared.answers.start(question, f"answer-{question.seq}")
    return Asked(message=message_json(question), answer=message_json(answer))


@api.post("/conversations/{id}/answers", status_code=202, responses=problems(*BODY, 404))
async def regenerate(conversation_id: Id, body: NewAnswer, user: User, shared: Shared, key: Key) -> OneAnswer:
    """Begin to write another answer to a user's message."""
    question = await chatdb.get_message(
        shared.db, user_id=user, conversation_id=conversation_id, seq=body.parent_seq
    )
    if question.role != "user":
        raise HTTPException(422, "Only a message of the user can be answered.")
    answer = await shared.answers.start(question, f"answer-{question.seq}-{key or uuid.uuid4()}")
    return OneAnswer(answer=message_json(answer))


@api.post("/conversations/{id}/messages/{seq}/stop", responses=problems(404))
async def stop(conversation_id: Id, seq: int, user: User, db: Db) -> OneMessage:
    """Stop an answer, whichever process writes it: that finds out when it stores more."""
    stopped = await chatdb.finish_message(db, user_id=user, conversation_id=conversation_id, seq=seq, aborted=True)
    return OneMessage(message=message_json(stopped))


def get_after(
    after: Annotated[str | None, Query()] = None, last_event_id: Annotated[str | None, Header()] = None
) -> Position | None:
    """Return where a client continues."""
    text = last_event_id or after
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,18})(?:\.([0-9]{1,18}))?", text)
    if found is None:
        raise HTTPException(422, "This is not the id of an event.")
    return Position(int(found[1]), int(found[2] or 0))


async def get_start(
    conversation_id: Id, user: User, db: Db, after: Annotated[Position | None, Depends(get_after)]
) -> Position:
    """Check that the conversation exists, before the answer begins."""
    stored, messages = await chatdb.load_conversation(db, user_id=user, conversation_id=conversation_id)
    return after or position_of(stored, messages)


@api.get("/conversations/{id}/events", response_class=EventSourceResponse, responses=problems(404))
async def events(
    conversation_id: Id, user: User, shared: Shared, start: Annotated[Position, Depends(get_start)]
) -> AsyncIterable[ServerSentEvent]:
    """Follow a conversation: its messages, and the text of those that are being written."""
    async for event in follow(shared.db, shared.watcher, user, conversation_id, start):
        yield event


@api.get("/search")
async def search(
    q: Annotated[str, Query(min_length=1, max_length=1000)], user: User, db: Db, limit: Limit = 20, after: Cursor = None
) -> MatchPage:
    """Find messages that contain a text."""
    found = await chatdb.search_messages(db, user_id=user, query=q, limit=limit, after=after)
    return MatchPage(items=found, next=found[-1].cursor if len(found) == limit else None)


app.include_router(api)
