"""Maps sessions, events and state of Google's Agent Development Kit (ADK) to conversations and messages, and back."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any, Final

from chatdb.formats.items import (
    ParsedMessage,
    as_list,
    as_object,
    has_text,
    json_text,
    name_of,
    new_message,
    own_item,
)
from chatdb.records import Conversation, Message, NewMessage

FRAMEWORK: Final = "google-adk"
"""The mark of its messages in their metadata, and the name of its extra."""

KEY_PREFIX: Final = f"{FRAMEWORK}:"
"""What precedes the name of a session in the key of its conversation, unless the adapter is told otherwise."""

APP_OWNER: Final = f"{FRAMEWORK}:app"
"""The user who owns the `app:` state, unless the adapter is told otherwise."""

APP, USER, _TEMPORARY = "app:", "user:", "temp:"
"""What precedes the keys of a state that an app's sessions share, that a user's share, and that is not stored."""

_STATE: Final = "state:"
"""Precedes a key of the state in a conversation's metadata, where its value is JSON text."""

_SESSION: Final = "session"
"""In the metadata, JSON text of the app's name and the session's id, if the key has only their hash."""


def app_name(app: str) -> str:
    """Return what the names of all sessions of an app start with."""
    return app.replace("%", "%25").replace(":", "%3A") + ":"


def session_name(app: str, session_id: str) -> str:
    """Return the key of a session's conversation, without a prefix; that of an empty id is for the shared state."""
    return name_of(app_name(app) + session_id)


def session_metadata(app: str, session_id: str, state: Mapping[str, Any]) -> dict[str, object]:
    """Return the metadata of a session's conversation."""
    metadata: dict[str, object] = {"framework": FRAMEWORK}
    if session_name(app, session_id) != app_name(app) + session_id:
        metadata[_SESSION] = json.dumps([app, session_id])
    return metadata | state_patch(state)


def session_id_of(key: str | None, metadata: Mapping[str, Any] | None, prefix: str, app: str) -> str | None:
    """Return the id of a conversation's session, or None if it is not a session of the app."""
    if key is None or not key.startswith(prefix):
        return None
    name, start = key.removeprefix(prefix), app_name(app)
    if name.startswith(start):
        return name.removeprefix(start) or None
    named = (metadata or {}).get(_SESSION)
    owner, session_id = json.loads(named) if isinstance(named, str) else ("", "")
    return session_id if owner == app and session_id and session_name(app, session_id) == name else None


def state_patch(state: Mapping[str, Any]) -> dict[str, object]:
    """
    Return state as a patch of a conversation's metadata.

    Raises InvalidInputError if a value is not JSON.
    """
    return {_STATE + json.dumps(key)[1:-1]: json_text("state", value) for key, value in state.items()}


def state_of(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the state in a conversation's metadata."""
    return {
        json.loads(f'"{name.removeprefix(_STATE)}"'): json.loads(value)
        for name, value in (metadata or {}).items()
        if name.startswith(_STATE)
    }


def split_state(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the session's own state as `""`, and each shared state by its prefix, without what is not stored."""
    parts: dict[str, dict[str, Any]] = {"": {}}
    for name, value in state.items():
        scope = next((scope for scope in (APP, USER, _TEMPORARY) if name.startswith(scope)), "")
        if scope != _TEMPORARY:
            parts.setdefault(scope, {})[name.removeprefix(scope)] = value
    return parts


def parse_event(event: Mapping[str, Any]) -> ParsedMessage:
    """
    Parse an event: a function's response has the role tool, what the author `user` says user, the rest assistant.

    The name is the author's, unless that is the user. Thoughts are text only if the event has no other.
    """
    content = as_object(event.get("content")) or {}
    parts = [part for value in as_list(content.get("parts")) or () if (part := as_object(value)) is not None]
    author = event.get("author")
    name = author if author != "user" else None
    responses = [response for part in parts if (response := as_object(part.get("function_response"))) is not None]
    if responses:
        return "tool", "\n".join(_said(response.get("response")) for response in responses), "function_response", name
    said = "".join(_texts(parts, thought=False)) or "".join(_texts(parts, thought=True)) or _transcription(event)
    kind = "function_call" if any(as_object(part.get("function_call")) is not None for part in parts) else None
    return "user" if author == "user" else "assistant", said, kind, name


def message_of(event: Mapping[str, Any], key: str) -> NewMessage:
    """
    Return the message for an event, as ADK dumps it to JSON, with the event itself as payload.

    Raises InvalidInputError if a value in it is not JSON.
    """
    payload = json_text("event", event)
    return new_message(FRAMEWORK, parse_event(event), payload, key)


def event_of(message: Message) -> dict[str, Any] | None:
    """
    Return the event of a message: its own payload, or the text of another framework's message.

    None for another framework's tool results and messages without text.
    """
    event = own_item(message, FRAMEWORK)
    if event is not None or not has_text(message):
        return event
    return {
        "id": f"chatdb-{message.id}",
        "author": message.role,
        "content": {"role": "model" if message.role == "assistant" else "user", "parts": [{"text": message.content}]},
        "timestamp": message.created_at.timestamp(),
    }


def session_of(
    app: str, session_id: str, conversation: Conversation, messages: list[Message], shared: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields of a session; `shared` has the shared states with their prefixes."""
    return {
        "app_name": app,
        "user_id": conversation.user_id,
        "id": session_id,
        "state": state_of(conversation.metadata) | copy.deepcopy(dict(shared)),
        "events": [event for message in messages if (event := event_of(message)) is not None],
        "last_update_time": updated_at(conversation, messages),
    }


def updated_at(conversation: Conversation, messages: list[Message]) -> float:
    """Return the time of the newest event, by the clock of its client, or of the session's creation."""
    if not messages:
        return conversation.created_at.timestamp()
    timestamp = (event_of(messages[-1]) or {}).get("timestamp")
    return float(timestamp) if timestamp is not None else messages[-1].created_at.timestamp()


def _texts(parts: list[dict[str, Any]], *, thought: bool) -> list[str]:
    return [
        text for part in parts if isinstance(text := part.get("text"), str) and bool(part.get("thought")) == thought
    ]


def _transcription(event: Mapping[str, Any]) -> str:
    """Return what was said in audio, or the error of an event without content."""
    for name in ("input_transcription", "output_transcription"):
        if isinstance(text := (as_object(event.get(name)) or {}).get("text"), str) and text:
            return text
    error = event.get("error_message")
    return error if isinstance(error, str) else ""


def _said(response: object) -> str:
    """Return what a function returned: the text of a response that is nothing else, or JSON."""
    fields = as_object(response) or {}
    only = next(iter(fields.values()), "") if len(fields) < 2 else None
    return only if isinstance(only, str) else json.dumps(fields, ensure_ascii=False)
