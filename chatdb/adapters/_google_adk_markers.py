"""
Markers of ADK's sessions: what an append expects of the stored session.

A marker is the text that ADK keeps in a session as the revision of its storage. Here it is the conversation's id, its
revision, and its newest `seq`.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from google.adk.errors import StaleSessionError

from chatdb.conversations import get_conversation, load_conversation
from chatdb.errors import ConflictError, StaleError
from chatdb.formats import google_adk as formats
from chatdb.messages import append_message
from chatdb.records import Conversation

if TYPE_CHECKING:
    from google.adk.sessions import Session

    from chatdb import Database


def marker_of(conversation: Conversation) -> str:
    """Return the marker of a session that was read."""
    return f"{conversation.id} {conversation.revision} {conversation.last_seq}"


async def find_marker(db: Database, session: Session, address: dict[str, Any]) -> str:
    """
    Return the marker for a session that did not come from the service.

    Raises StaleSessionError if its newest event is not the stored one.
    """
    stored, newest = await load_conversation(db, **address, limit=1)
    newest_id = (formats.event_of(newest[0]) or {}).get("id") if newest else None
    known_id = session.events[-1].id if session.events else None
    if newest_id != known_id and formats.updated_at(stored, newest) > session.last_update_time:
        raise _stale()
    return marker_of(stored)


async def append_expecting(db: Database, marker: str, address: dict[str, Any], fields: dict[str, Any]) -> str | None:
    """
    Append a message to the session with this marker, and return its next one, or None if the message was stored before.

    Another message with the same key gives `fields` a new key, which a repetition must use again. Raises
    StaleSessionError if somebody else has appended.
    """
    identifier, revision, last_seq = map(int, marker.split())
    while True:
        try:
            expected = Conversation.model_construct(id=identifier, revision=revision)
            stored = await append_message(db, expected=expected, **address, **fields)
        except StaleError:
            current = await get_conversation(db, **address)
            if (current.id, current.last_seq) != (identifier, last_seq):
                raise _stale() from None
            revision = current.revision  # an edit, such as a new title
        except ConflictError:  # another event with the same id, which ADK allows
            fields["key"] = f"{fields['key']}:{secrets.token_hex(8)}"
        else:
            return f"{identifier} {revision + 1} {stored.seq}" if stored.seq > last_seq else None


def _stale() -> StaleSessionError:
    return StaleSessionError("The session has been modified in storage since it was read: get it again.")
