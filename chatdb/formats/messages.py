"""Reads lists of messages with role and content: data sets, OpenAI's fine-tuning files, UI messages of the AI SDK."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, TypeAlias

from chatdb.formats import blocks, items, trees

_Object: TypeAlias = dict[str, Any]

LISTS = ("messages", "conversations", "conversation", "items", "conversation_a", "dialogue", "chat", "turns")
_TIMES = ("created_at", "createdAt", "timestamp", "create_time")
_SPEAKERS: Final = frozenset(("user", "assistant", "system", "developer"))
_RANDOM: Final = 8
_IDS = ("conversation_hash", "conversation_id", "id", "chat_id", "uuid", "_id")


def conversation(source: _Object) -> Iterator[items.Item]:
    """
    Return a conversation and its messages. Its key has its id and a hash of the first message, or of all without an id.

    A call of a tool is a message of its own. Raises UnsupportedItemError if there are no messages.
    """
    listed = next((found for name in LISTS if (found := items.as_list(source.get(name))) is not None), None)
    if listed is None:
        raise items.UnsupportedItemError("no list of messages")
    if len(source) == 1 and listed and (plain := _plain(listed)) is not None:
        return plain
    nodes: dict[str, trees.Node] = {}
    skipped: list[items.Skipped] = []
    identifier = next((name for key in _IDS if (name := items.name_of(source.get(key)))), "") or _first_id(listed)
    system = source.get("system", source.get("system_prompt"))
    if isinstance(system, str) and system:
        nodes["0"] = trees.Node(None, None, "0" if identifier else None, (trees.Piece("system", system),))
    for place, value in enumerate(listed, 1):
        message = items.as_object(value) or {}
        try:
            pieces = pieces_of(message, has_id=bool(identifier))
        except items.UnsupportedItemError as error:
            skipped.append(trees.skipped(error, place))
            continue
        sent_at = items.time_of(next((message[name] for name in _TIMES if message.get(name)), None))
        key = items.short(message.get("id")) or (str(place) if identifier else None)
        nodes[str(place)] = trees.Node(next(reversed(nodes), None), sent_at, key, pieces)
    # different conversations of a data set can share an id
    said = [(piece.role, piece.text) for node in nodes.values() for piece in node.pieces]
    said = said[:1] if identifier else said
    whole, beginnings = items.fingerprints(said, len(said))
    return trees.stream(
        trees.Conversation(
            "messages:",
            f"{identifier}:{whole}",
            nodes,
            next(reversed(nodes), None),
            source.get("title"),
            {name: source.get(name) for name in ("model", "language", "source")}
            | {name: blocks.as_text(source.get(name)) for name in ("tools", "functions")},
            items.time_of(next((source[name] for name in _TIMES if source.get(name)), None)),
            skipped=tuple(skipped),
            beginnings=beginnings,
        )
    )


def _plain(listed: list[Any]) -> Iterator[items.Item] | None:
    """Return a conversation that has only roles and texts, as the millions of a data set have; None for any other."""
    conversation = items.plain_conversation("messages::", _said(listed), len(listed))
    return None if conversation is None else _plain_items(conversation, listed)


def _plain_items(conversation: items.SourceConversation, listed: list[Any]) -> Iterator[items.Item]:
    yield conversation
    for seq, value in enumerate(items.taken(listed), 1):
        fields = items.as_object(value) or {}
        yield items.SourceMessage(seq, fields["role"], fields["content"], None, None, None, None, None)


def _said(listed: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Yield the role and the text of each message."""
    for value in listed:
        fields = items.as_object(value) or {}
        role, text = fields.get("role"), fields.get("content")
        if len(fields) > 2 or not isinstance(role, str) or role not in _SPEAKERS:
            raise items.NotPlainError
        if not isinstance(text, str) or not text or items.readable(text) is not text:
            raise items.NotPlainError
        yield role, text


def _first_id(listed: list[Any]) -> str:
    """Return the first message's id if it is long enough to be a random one, which identifies the conversation."""
    name = items.name_of((items.as_object(listed[0]) or {}).get("id")) if listed else ""
    return f"first:{name}" if len(name) >= _RANDOM else ""


def pieces_of(message: _Object, *, has_id: bool = True) -> tuple[trees.Piece, ...]:
    """
    Return the messages for one of a list, with the message itself as payload.

    Without an id, which a later export needs the payload for, not if role and text are all of it.
    """
    role = items.role(message.get("role", message.get("from")))
    found: list[tuple[blocks.Part, object]] = []
    for name in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(text := message.get(name), str) and text and not found:
            found.append((blocks.Part(text, items.REASONING), {name: text}))
    content = next((message[name] for name in ("content", "value", "text") if message.get(name) is not None), None)
    listed = items.as_list(message.get("parts")) or items.as_list(content)
    if listed is not None:
        found += blocks.parts(listed)
    elif isinstance(content, str):
        found.append((blocks.Part(content), None))
    elif content is not None:
        found.append((blocks.Part(blocks.as_text(content)), None))
    audio = items.as_object(message.get("audio")) or {}
    found += [
        (blocks.Part(text), None)
        for text in (message.get("refusal"), audio.get("transcript"))
        if isinstance(text, str) and text
    ]
    calls = [items.as_object(one) or {} for one in items.as_list(message.get("tool_calls")) or ()]
    calls += [call for name in ("function_call",) if (call := items.as_object(message.get(name)))]
    for call in calls:
        function = items.as_object(call.get("function")) or call
        arguments = function.get("arguments", function.get("args"))
        found.append((blocks.Part(blocks.as_text(arguments), items.TOOL_CALL, items.short(function.get("name"))), call))
    files = [items.as_object(one) or {} for one in items.as_list(message.get("experimental_attachments")) or ()]
    attachments = [items.attached(one.get("name"), one.get("contentType")) for one in files]
    attachments += [items.attached(items.short(one), "image") for one in items.as_list(message.get("images")) or ()]
    if role == "tool":
        found = [(part._replace(kind=items.TOOL_RESULT), block) for part, block in found]
    elif (
        role == "assistant" and not calls and message.get("role", message.get("from")) in {items.REASONING, "thinking"}
    ):
        found = [(part._replace(kind=items.REASONING), block) for part, block in found]
    is_plain = not has_id and message.keys() <= {"role", "content"} and isinstance(content, str)
    return blocks.pieces(
        role,
        found,
        None if is_plain else message,
        model=message.get("model"),
        name=message.get("name"),
        attachments="\n".join(attachments),
    )
