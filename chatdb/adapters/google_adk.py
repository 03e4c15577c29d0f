"""
A session service for Google's Agent Development Kit (ADK), in chatdb's tables.

The states that sessions share are in `_google_adk_states.py`, and what an append expects of the stored session in
`_google_adk_markers.py`. What the records look like in the tables is in `chatdb/formats/google_adk.py`.

Docs: docs/adapters/google-adk.md. Decision: docs/decisions/0019-adk-reads-the-shared-states.md
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from chatdb.adapters._google_adk_states import SharedStates
from chatdb.adapters._pages import list_all_previews, load_newest
from chatdb.adapters._settled import settled
from chatdb.adapters._unreadable import texts_hidden
from chatdb.conversations import create_conversation, delete_conversation
from chatdb.errors import ConfigurationError, ConversationNotFoundError, InvalidInputError
from chatdb.formats import google_adk as formats
from chatdb.formats.items import name_of
from chatdb.records import Conversation, Message

try:
    from google.adk.errors.already_exists_error import AlreadyExistsError
    from google.adk.errors.session_not_found_error import SessionNotFoundError
    from google.adk.events import Event
    from google.adk.platform import uuid as platform_uuid
    from google.adk.sessions import BaseSessionService, Session
    from google.adk.sessions.base_session_service import GetSessionConfig, ListSessionsResponse

    from chatdb.adapters._google_adk_markers import append_expecting, find_marker, marker_of
except ImportError:
    raise ConfigurationError("the extra is not installed: run pip install 'chatdb[google-adk]'") from None

if TYPE_CHECKING:
    from chatdb import Database


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
        session_id = (session_id or "").strip() or platform_uuid.new_uuid()
        address = self._address(app_name, user_id, session_id)
        parts = self._states.split(state or {})
        # by it, a repeated statement recognizes the conversation that the first one created
        created_by = secrets.token_hex(8)
        metadata = formats.session_metadata(app_name, session_id, parts.pop("")) | {"created_by": created_by}

        async def create(db: Database) -> tuple[Conversation, dict[str, dict[str, Any]]]:
            key = address["conversation_key"]
            async with self._states.as_user(db, user_id, parts) as own:
                stored = await create_conversation(own, user_id=user_id, key=key, metadata=metadata)
            if (stored.metadata or {}).get("created_by") != created_by:
                raise AlreadyExistsError(f"Session with id {session_id} already exists.")
            return stored, await self._states.write(db, app_name, user_id, parts)

        conversation, written = await settled(self._states.run(user_id, parts, create))
        shared = await self._states.read_all(app_name, user_id, written)
        return _session(app_name, session_id, conversation, [], shared)

    async def get_session(
        self, *, app_name: str, user_id: str, session_id: str, config: GetSessionConfig | None = None
    ) -> Session | None:
        """Return a session with its newest events, or None if the user has no such session."""
        session_id = session_id.strip()
        key = self._address(app_name, user_id, session_id)["conversation_key"]
        limit, after = (config.num_recent_events, config.after_timestamp) if config else (None, None)
        at_least_one = None if limit is None else max(1, limit)  # for the time of the last update
        if not session_id:
            return None
        try:
            conversation, messages = await load_newest(
                self._db, user_id=user_id, key=key, item_of=lambda message: message, limit=at_least_one
            )
        except ConversationNotFoundError:
            return None
        shared = await self._states.read_all(app_name, user_id, {})
        session = _session(app_name, session_id, conversation, messages, shared)
        older = [index for index, event in enumerate(session.events) if after and event.timestamp < after]
        session.events = [] if limit == 0 else session.events[older[-1] + 1 if older else 0 :]
        return session

    async def list_sessions(self, *, app_name: str, user_id: str | None = None) -> ListSessionsResponse:
        """
        Return a user's sessions of an app without their events, oldest update first.

        Reads all conversations of the user, 10,000 in a round trip. Raises InvalidInputError without a user, because
        chatdb reads nothing across users.
        """
        if user_id is None:
            raise InvalidInputError("user_id", "must be given: chatdb does not list sessions across users")
        shared_key = self._address(app_name, user_id)["conversation_key"]
        previews = await list_all_previews(self._db, user_id=user_id)
        user_states = (
            formats.state_of(conversation.metadata) for conversation, _ in previews if conversation.key == shared_key
        )
        shared = await self._states.read_all(app_name, user_id, {formats.USER: next(user_states, dict[str, Any]())})
        sessions: list[Session] = []
        for conversation, newest in previews:
            session_id = formats.session_id_of(conversation.key, conversation.metadata, self._prefix, app_name)
            if session_id is not None:
                session = _session(app_name, session_id, conversation, [newest] if newest else [], shared)
                session.events = []
                sessions.append(session)
        return ListSessionsResponse(
            sessions=sorted(sessions, key=lambda session: (session.last_update_time, session.id))
        )

    async def delete_session(self, *, app_name: str, user_id: str, session_id: str) -> None:
        """Delete a session and its events, if the user has it. The shared states stay."""
        address = self._address(app_name, user_id, session_id.strip())
        if session_id.strip():
            with suppress(ConversationNotFoundError):
                await settled(delete_conversation(self._db, **address))

    async def get_user_state(self, *, app_name: str, user_id: str) -> dict[str, Any]:
        """Return the state that a user's sessions of an app share, without the prefix `user:`."""
        self._address(app_name, user_id)
        return await self._states.read(app_name, user_id, formats.USER)

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
        app, user = session.app_name, session.user_id
        address = self._address(app, user, session.id)
        lock = self._locks.setdefault((user, address["conversation_key"]), asyncio.Lock())
        self._apply_temp_state(session, event)
        event = self._trim_temp_delta_state(event)
        message = formats.message_of(event.model_dump(mode="json", exclude_none=True), name_of(event.id))
        parts = self._states.split(event.actions.state_delta)
        fields = dict(message) | {"conversation_metadata_patch": formats.state_patch(parts.pop("")) or None}

        async def append() -> None:
            async with lock:  # the tasks that share a session take turns
                known = session._storage_update_marker  # pyright: ignore[reportPrivateUsage]
                before = known or await find_marker(self._db, session, address)

                async def store(db: Database) -> str | None:
                    async with self._states.as_user(db, user, parts) as own:
                        after = await append_expecting(own, before, address, fields)
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

    def _address(self, app: str, user: str, session_id: str = "") -> dict[str, Any]:
        """Return the user and the key of a session's conversation or, without an id, of the `user:` state's."""
        if user == self._app_owner:
            raise InvalidInputError("user_id", "is reserved for the app: state; choose another app_owner")
        return {"user_id": user, "conversation_key": self._prefix + formats.session_name(app, session_id)}


def _session(
    app: str, session_id: str, conversation: Conversation, messages: list[Message], shared: Mapping[str, Any]
) -> Session:
    with texts_hidden("ADK", "a stored session"):
        session = Session.model_validate(formats.session_of(app, session_id, conversation, messages, shared))
    session._storage_update_marker = marker_of(conversation)  # pyright: ignore[reportPrivateUsage]
    return session
