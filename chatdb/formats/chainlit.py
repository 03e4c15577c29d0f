"""Reads threads and steps as Chainlit's official data layer stores them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from chatdb.formats.items import ParsedMessage, name_of, short

FRAMEWORK: Final = "chainlit"
"""The mark of its messages and conversations in their metadata."""

KEY_PREFIX: Final = f"{FRAMEWORK}:"
"""What precedes a thread's id in the key of its conversation."""

_MESSAGES: Final = {"user_message": "user", "assistant_message": "assistant", "system_message": "system"}
"""Roles for the types of steps that are messages of the chat."""

_TOOLS: Final = {"tool", "retrieval", "rerank"}
"""Types of steps whose output is a result that the assistant asked for."""


def thread_key(thread_id: str) -> str:
    """Return the key of a thread's conversation."""
    return KEY_PREFIX + name_of(thread_id)


def thread_metadata(thread_id: str, thread: Mapping[str, Any]) -> dict[str, object]:
    """Return the metadata of a thread's conversation: its tags and metadata, and its id if the key has only a hash."""
    metadata: dict[str, object] = {"framework": FRAMEWORK}
    if name_of(thread_id) != thread_id:
        metadata["thread_id"] = thread_id
    return metadata | {name: thread[name] for name in ("tags", "metadata") if thread.get(name)}


def parse_step(step: Mapping[str, Any]) -> ParsedMessage:
    """
    Parse a step: a message has its author's role, and a tool, a retrieval or a rerank the role tool.

    Any other step, such as a run or an LLM's, is the assistant's, without a text: its output comes again in a message.
    The name is that of the step or of the message's author, unless that is the user.
    """
    kind, output = short(step.get("type")), step.get("output")
    said = output if isinstance(output, str) else ""
    name = step.get("name")
    if kind in _MESSAGES:
        return _MESSAGES[kind], said, None, None if kind == "user_message" else name
    if kind in _TOOLS:
        return "tool", said, kind, name
    return "assistant", "", kind, name
