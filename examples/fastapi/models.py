"""What requests and answers contain."""

from datetime import datetime
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue

import chatdb

Json = dict[str, JsonValue]
Title = Annotated[str | None, Field(max_length=1000)]


class Body(BaseModel):
    """A request, without unknown fields."""

    model_config = ConfigDict(extra="forbid")


class SignIn(Body):
    """A name instead of a password."""

    name: str = Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f]+$")


class NewConversation(Body):
    """A conversation to create."""

    title: Title = None


class ConversationPatch(Body):
    """Fields to change; those that are left out stay."""

    title: Title = None
    archived: bool = False
    pinned: bool = False


class NewQuestion(Body):
    """A user's message, after the head or after another message: 0 for another first one."""

    content: str = Field(min_length=1, max_length=100_000)
    parent_seq: int | None = Field(default=None, ge=0)


class NewAnswer(Body):
    """Another answer to a user's message."""

    parent_seq: int = Field(ge=1)


class Head(Body):
    """The version to show."""

    seq: int = Field(ge=1)


class Token(BaseModel):
    """A bearer token, and what a guest took along."""

    token: str
    user: str
    moved: chatdb.Moved | None = None


class Me(BaseModel):
    """The user of the request."""

    user: str
    guest: bool


class Conversation(BaseModel):
    """A conversation."""

    id: int
    title: str | None
    archived: bool
    pinned: bool
    created_at: datetime
    updated_at: datetime
    etag: str
    preview: Json | None = None

    @classmethod
    def of(cls, stored: chatdb.Conversation, newest: chatdb.Message | None = None) -> Self:
        """Return a stored conversation with the beginning of its newest message."""
        return cls(
            id=stored.id,
            title=stored.title,
            archived=stored.archived_at is not None,
            pinned=stored.pinned_at is not None,
            created_at=stored.created_at,
            updated_at=stored.updated_at,
            etag=f'"{stored.etag}"',
            preview=newest and {"role": newest.role, "text": newest.content[:200]},
        )


class ConversationPage(BaseModel):
    """A page of conversations, and the cursor of the next page."""

    items: list[Conversation]
    next: str | None = None


class MessagePage(BaseModel):
    """Messages of the current line, the versions of those that have several, and the cursor of the page before."""

    messages: list[Json]
    versions: dict[int, list[int]]
    before: str | None


class Loaded(MessagePage):
    """A conversation with its newest messages, and the event id from which to follow it."""

    conversation: Conversation
    events: str


class OneMessage(BaseModel):
    """A message."""

    message: Json


class OneAnswer(BaseModel):
    """An answer that is being written."""

    answer: Json


class Asked(OneMessage, OneAnswer):
    """A message of the user, and the answer that is being written."""


class MatchPage(BaseModel):
    """Messages that a search found, newest first, and the cursor of the next page."""

    items: list[chatdb.Match]
    next: str | None


def message_json(message: chatdb.Message) -> Json:
    """Return a message with the tools that it used."""
    return {**message.public(), "tools": (message.metadata or {}).get("tools", [])}
