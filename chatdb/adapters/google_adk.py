"""
A session service for Google's Agent Development Kit (ADK), in chatdb's tables.

Docs: docs/adapters/google-adk.md
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakValueDictionary

from chatdb.adapters._google_adk_states import SharedStates
from chatdb.adapters._newest import load_newest
from chatdb.adapters._settled import settled
from chatdb.conversations import (
    create_conversation,
    delete_conversation,
    get_conversation,
    list_previews,
    load_conversation,
)
from chatdb.errors import (
    ConfigurationError,
    ConflictError,
    ConversationNotFoundError,
    InvalidInputError,
    StaleError,
)
from chatdb.formats import google_adk as formats
from chatdb.formats.items import name_of
from chatdb.messages import append_message
from chatdb.records import Conversation, Message

try:
    from google.adk.errors import StaleSessionError
    from google.adk.errors.already_exists_error import AlreadyExistsError
    from google.adk.errors.session_not_found_error import SessionNotFoundError
    from google.adk.events import Event
    from google.adk.platform import uuid as platform_uuid
    from google.adk.sessions import BaseSessionService, Session
    from google.adk.sessions.base_session_service import GetSessionConfig, ListSessionsResponse
except ImportError:
    raise ConfigurationError("the extra is not installed: run pip install 'chatdb[google-adk]'") from None

if TYPE_CHECKING:
    from chatdb import Database

_PAGE: Final = 10_000


class ChatDBSessionService(BaseSessionService):
    """
    Keeps each session as a conversation of its user, and each event as a message.

    The conversation's key is `prefix`, the app's name and the session's id. A message's payload is the event as ADK
    dumps it to JSON. Its key is the event's id, so an event that is appended again is stored once. The session's state
    is in the conversation's metadata. The `user:` state of an app is the metadata of an archived conversation of that
    user, and the `app:` state that of one of the user `app_owner`, who can be none of the service's users.

    Each method is one round trip, and one more for each of the two shared states that it reads. A change of a shared
    state is one transaction with the event or the new session. `shared_states` names those that the app uses: a session
    has only these, and a key of another one is an InvalidInputError. With `()`, each method is one round trip.

    A cancelled change is waited for. Errors that ADK does not define are chatdb's own.
    """

    def __init__(
        self,
        db: Database,
        *,
        prefix: str = formats.KEY_PREFIX,
        app_owner: str = formats.APP_OWNER,
        shared_states: Collection[str] = (formats.APP, formats.USER),
    ) -> None:
        self._db, self._prefix, self._app_owner = db, prefix, app_owner
        self._states = SharedStates(db, prefix, app_owner, shared_states)
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    async def create_session(
        self, *, app_name: str, user_id: str, state: dict[str, Any] | None = None, session_id: str | None = None
    ) -> Session:
        """
        Create a session; without `session_id`, its id is a random UUID.

        Raises AlreadyExistsError if the user has this session, or InvalidInputError.
        """
        name = (session_id or "").strip() or platform_uuid.new_uuid()
        user, key = self._address(app_name, user_id, name)
        parts = self._states.split(state or {})
        # by it, a repeated statement recognizes the conversation that the first one created
        created_by = secrets.token_hex(8)
        metadata = formats.session_metadata(app_name, name, parts.pop("")) | {"created_by": created_by}

        async def create(db: Database) -> tuple[Conversation, dict[str, dict[str, Any]]]:
            stored = await create_conversation(db, user_id=user, key=key, metadata=metadata)
            if (stored.metadata or {}).get("created_by") != created_by:
                raise AlreadyExistsError(f"Session with id {name} already exists.")
            return stored, await self._states.write(db, app_name, user, parts)

        conversation, written = await settled(self._states.run(user, parts, create))
        return _session(app_name, name, conversation, [], await self._states.read_all(app_name, user, written))

    async def get_session(
        self, *, app_name: str, user_id: str, session_id: str, config: GetSessionConfig | None = None
    ) -> Session | None:
        """Return a session with its newest events, or None if the user has no such session."""
        name = session_id.strip()
        user, key = self._address(app_name, user_id, name)
        most, after = (config.num_recent_events, config.after_timestamp) if config else (None, None)
        if not name:
            return None
        try:
            conversation, messages = await load_newest(
                self._db, user_id=user, key=key, most=None if most is None else max(1, most)
            )
        except ConversationNotFoundError:
            return None
        session = _session(app_name, name, conversation, messages, await self._states.read_all(app_name, user, {}))
        earlier = [place for place, event in enumerate(session.events, 1) if after and event.timestamp < after]
        session.events = [] if most == 0 else session.events[max(earlier, default=0) :]
        return session

    async def list_sessions(self, *, app_name: str, user_id: str | None = None) -> ListSessionsResponse:
        """
        Return a user's sessions of an app without their events, oldest update first.

        Reads all conversations of the user, 10,000 in a round trip. Raises InvalidInputError without a user, because
        chatdb reads nothing across users.
        """
        if user_id is None:
            raise InvalidInputError("user_id", "must be given: chatdb does not list sessions across users")
        user, shared_key = self._address(app_name, user_id)
        pairs = page = await list_previews(self._db, user_id=user, limit=_PAGE, archived=None)
        while len(page) == _PAGE:
            page = await list_previews(self._db, user_id=user, limit=_PAGE, archived=None, after=page[-1][0])
            pairs = pairs + page
        own = (formats.state_of(each.metadata) for each, _ in pairs if each.key == shared_key)
        states = await self._states.read_all(app_name, user, {formats.USER: next(own, dict[str, Any]())})
        sessions: list[Session] = []
        for each, newest in pairs:
            name = formats.session_id_of(each.key, each.metadata, self._prefix, app_name)
            if name is not None:
                sessions.append(_session(app_name, name, each, [newest] if newest else [], states))
                sessions[-1].events = []
        return ListSessionsResponse(sessions=sorted(sessions, key=lambda each: (each.last_update_time, each.id)))

    async def delete_session(self, *, app_name: str, user_id: str, session_id: str) -> None:
        """Delete a session and its events, if the user has it. The shared states stay."""
        name = session_id.strip()
        user, key = self._address(app_name, user_id, name)
        if name:
            try:
                await settled(delete_conversation(self._db, user_id=user, conversation_key=key))
            except ConversationNotFoundError:
                return

    async def get_user_state(self, *, app_name: str, user_id: str) -> dict[str, Any]:
        """Return the state that a user's sessions of an app share, without the prefix `user:`."""
        user, _ = self._address(app_name, user_id)
        return await self._states.read(app_name, user, formats.USER)

    async def append_event(self, session: Session, event: Event) -> Event:
        """
        Append an event and its changes of the state, unless it is partial.

        The event and its changes of all states are stored together, or nothing is. An event that is stored already
        changes nothing.

        Raises SessionNotFoundError, StaleSessionError if somebody else has appended to the session since it was read,
        or InvalidInputError.
        """
        if event.partial:
            return event
        app, (user, key) = session.app_name, self._address(session.app_name, session.user_id, session.id)
        lock = self._locks.setdefault((user, key), asyncio.Lock())
        self._apply_temp_state(session, event)
        event = self._trim_temp_delta_state(event)
        message = formats.message_of(event.model_dump(mode="json", exclude_none=True), name_of(event.id))
        parts = self._states.split(event.actions.state_delta)
        patch = formats.state_patch(parts.pop("")) or None
        fields: dict[str, Any] = {"user_id": user, "conversation_key": key, "conversation_metadata_patch": patch}
        fields |= dict(message)

        async def append() -> None:
            async with lock:  # the tasks that share a session take turns
                known = session._storage_update_marker  # pyright: ignore[reportPrivateUsage]
                before = known or await _find_marker(self._db, session, user, key)

                async def store(db: Database) -> str | None:
                    after = await _append(db, before, fields)
                    if after is not None:  # an event that was stored before has changed the shared states with it
                        await self._states.write(db, app, user, parts)
                    return after

                marker = await self._states.run(user, parts, store)
                if marker is None:
                    return
                session._storage_update_marker = marker  # pyright: ignore[reportPrivateUsage]
                session.last_update_time = event.timestamp
                self._commit_event_to_session(session, event)

        try:
            await settled(append())
        except ConversationNotFoundError:
            raise SessionNotFoundError(f"Session {session.id} not found.") from None
        return event

    def _address(self, app: str, user: str, session_id: str = "") -> tuple[str, str]:
        """Return the user and the key of a session's conversation or, without an id, of a shared state's."""
        if user == self._app_owner:
            raise InvalidInputError("user_id", "is reserved for the app: state; choose another app_owner")
        return user, self._prefix + formats.session_name(app, session_id)


def _session(
    app: str, name: str, conversation: Conversation, messages: list[Message], shared: Mapping[str, Any]
) -> Session:
    session = Session.model_validate(formats.session_of(app, name, conversation, messages, shared))
    session._storage_update_marker = _marker(conversation)  # pyright: ignore[reportPrivateUsage]
    return session


async def _append(db: Database, marker: str, fields: dict[str, Any]) -> str | None:
    """
    Append a message to the session with this marker, and return its next one, or None if the message was stored before.

    Another message with the same key gives `fields` a new key, which a repetition must use again.
    """
    address = {name: fields[name] for name in ("user_id", "conversation_key")}
    identifier, revision, last_seq = map(int, marker.split())
    while True:
        try:
            expected = Conversation.model_construct(id=identifier, revision=revision)
            stored = await append_message(db, expected=expected, **fields)
        except StaleError:
            current = await get_conversation(db, **address)
            if (current.id, current.last_seq) != (identifier, last_seq):
                raise _stale() from None
            revision = current.revision  # an edit, such as a new title
        except ConflictError:  # another event with the same id, which ADK allows
            fields["key"] = f"{fields['key']}:{secrets.token_hex(8)}"
        else:
            return f"{identifier} {revision + 1} {stored.seq}" if stored.seq > last_seq else None


async def _find_marker(db: Database, session: Session, user: str, key: str) -> str:
    """Return the marker for a session that did not come from this service, if it has the newest event."""
    stored, newest = await load_conversation(db, user_id=user, conversation_key=key, limit=1)
    newest_id = (formats.event_of(newest[0]) or {}).get("id") if newest else None
    known_id = session.events[-1].id if session.events else None
    if newest_id != known_id and formats.updated_at(stored, newest) > session.last_update_time:
        raise _stale()
    return _marker(stored)


def _marker(conversation: Conversation) -> str:
    """Return what ADK calls the marker of a storage's revision: what an append expects, and the newest `seq`."""
    return f"{conversation.id} {conversation.revision} {conversation.last_seq}"


def _stale() -> StaleSessionError:
    return StaleSessionError("The session has been modified in storage since it was read: get it again.")
