"""Reads ShareGPT JSON, the format of many data sets: one object with a list of messages per conversation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, Final

from chatdb._core.validate import check_metadata
from chatdb.formats import blocks, items, messages, trees

_USUAL = frozenset({"human", "gpt", "system"})
_PLAIN: Final = {"from", "value"}
_FILE: Final = re.compile("<(?:image|video|audio)>")
_KINDS: Final = {
    **dict.fromkeys(("function_call", items.TOOL_CALL), items.TOOL_CALL),
    **dict.fromkeys(("observation", "tool_response", items.TOOL_RESULT), items.TOOL_RESULT),
    **dict.fromkeys(("thinking", items.REASONING), items.REASONING),
}


def conversation(source: dict[str, Any]) -> Iterator[items.Item]:
    """
    Return a conversation and its messages; an unusual role name is kept in the metadata as `{"from": name}`.

    Different conversations can share an id, so the key also contains a hash of the roles and texts. A conversation gets
    the same key in every import. A message with other fields is kept as payload.

    Raises UnsupportedItemError if the conversation has no messages.
    """
    listed = items.as_list(source["conversations"] if "conversations" in source else source.get("items"))
    if listed is None:
        raise items.UnsupportedItemError("no list of messages")
    if (plain := _plain(source, listed)) is not None:
        return plain
    said: list[tuple[str, str]] = []
    found: list[tuple[trees.Piece, ...]] = []
    times: list[Any] = []
    skipped: list[items.Skipped] = []
    if isinstance(system := source.get("system"), str) and system:
        found.append((trees.Piece("system", system),))
        said.append(("system", system))
        times.append(None)
    for place, entry in enumerate(listed, 1):
        fields = items.as_object(entry) or {}
        try:
            if items.as_list(fields.get("tool_calls")):
                pieces, word = messages.pieces_of(fields), str(fields.get("from"))
            else:
                piece, word = _piece(fields)
                pieces = (piece,)
        except items.UnsupportedItemError as error:
            skipped.append(trees.skipped(error, place))
            continue
        found.append(pieces)
        said += [(word, piece.text) for piece in pieces]
        times.append(fields.get("timestamp"))
    if not found and not skipped:
        raise items.UnsupportedItemError("no messages")
    if found and (files := _files_of(source)):
        found = _with_files(found, files)
        said.insert(0, ("files", "\n".join(text for _, text in files)))
    kept = {"model": source.get("model"), "tools": blocks.as_text(source.get("tools"))}
    nodes = trees.chain(found, map(items.time_of, times))
    whole, beginnings = items.fingerprints(said, len(said))
    return trees.stream(
        trees.Conversation(
            "sharegpt:",
            f"{items.name_of(source.get('id'))}:{whole}",
            nodes,
            str(len(nodes)),
            source.get("title"),
            kept,
            items.time_of(source.get("created_at")),
            skipped=tuple(skipped),
            beginnings=beginnings[len(said) - sum(map(len, found)) :],
        )
    )


def _files_of(source: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the mark in the texts, and the line, of each image, video and audio of a conversation."""
    return [
        (f"<{kind}>", items.attached(_file_name(one), kind))
        for kind in ("image", "video", "audio")
        for one in items.as_list(source.get(f"{kind}s")) or ()
    ]


def _file_name(value: object) -> str | None:
    fields = items.as_object(value)
    return items.short(fields.get("path") or fields.get("url")) if fields else items.short(value)


def _with_files(found: list[tuple[trees.Piece, ...]], files: list[tuple[str, str]]) -> list[tuple[trees.Piece, ...]]:
    """Return the messages with the lines of the files where their marks are, and the others at the first question."""

    def named(match: re.Match[str]) -> str:
        file = next((file for file in files if file[0] == match[0]), None)
        if file is None:
            return match[0]
        files.remove(file)
        return file[1]

    files = [*files]
    named_in = [[_retold(piece, _FILE.sub(named, piece.text)) for piece in pieces] for pieces in found]
    if files:
        first = next((pieces for pieces in named_in if pieces[0].role == "user"), named_in[0])
        first[0] = _retold(first[0], items.lines(first[0].text, *(text for _, text in files)))
    return [tuple(pieces) for pieces in named_in]


def _retold(piece: trees.Piece, text: str) -> trees.Piece:
    """Return a message with another text, and with its own as payload."""
    if text == piece.text:
        return piece
    return piece._replace(text=text, original=piece.original or {"value": piece.text})


def _plain(source: dict[str, Any], listed: list[Any]) -> Iterator[items.Item] | None:
    """Return a conversation that has only roles and texts, as the millions of a data set have; None for any other."""
    if not source.keys() <= {"id", "conversations", "items"} or not listed:
        return None
    prefix = f"sharegpt:{items.name_of(source.get('id'))}:"
    conversation = items.plain_conversation(prefix, _said(listed), len(listed))
    return None if conversation is None else _plain_items(conversation, listed)


def _plain_items(conversation: items.SourceConversation, listed: list[Any]) -> Iterator[items.Item]:
    yield conversation
    for seq, value in enumerate(items.taken(listed), 1):
        fields = items.as_object(value) or {}
        role, metadata = _known(fields["from"]) or ("", None)
        yield items.SourceMessage(seq, role, fields["value"], None, metadata, None, None, None)


def _said(listed: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Yield the role's word and the text of each message."""
    for value in listed:
        fields = items.as_object(value) or {}
        word, text = fields.get("from"), fields.get("value")
        if len(fields) > len(_PLAIN) or not isinstance(word, str) or _known(word) is None:
            raise items.NotPlainError
        if not isinstance(text, str) or items.readable(text) is not text:
            raise items.NotPlainError
        yield word, text


@lru_cache
def _known(word: str) -> tuple[str, str | None] | None:
    """Return the role and the metadata for a role's word, or None if it is unknown."""
    try:
        piece, _ = _piece({"from": word, "value": ""})
    except items.UnsupportedItemError:
        return None
    return piece.role, piece.metadata


def _piece(fields: dict[str, Any]) -> tuple[trees.Piece, str]:
    """Return the message for an entry, and its role in the file's words."""
    word, text = fields.get("from", fields.get("role")), fields.get("value", fields.get("content"))
    known = items.role(word)
    if not isinstance(text, str):
        raise items.UnsupportedItemError("message without text")
    kind = _KINDS.get(str(word).strip().lower())
    metadata: str | None = None
    if word not in _USUAL:
        metadata = check_metadata("metadata", {"from": word} | ({"type": kind} if kind else {}))
    original = None if fields.keys() <= _PLAIN else fields
    return trees.Piece(known, text, metadata, original, kind is None), str(word)
