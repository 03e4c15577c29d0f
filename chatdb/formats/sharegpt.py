"""ShareGPT's JSON: objects with a list of messages, as the data sets of shared conversations have it."""

from __future__ import annotations

from typing import Any

from chatdb._core.validate import check_metadata
from chatdb.formats.items import (
    REPLACED,
    Changed,
    Item,
    SourceConversation,
    SourceMessage,
    UnfitError,
    as_list,
    as_object,
    body,
    fingerprint,
    name_of,
    role,
)

_USUAL = frozenset({"human", "gpt", "system"})


def conversation(source: dict[str, Any]) -> list[Item]:
    """
    Return a conversation and its messages, with `{"from": word}` as metadata where the source's word says more.

    Ids repeat, also with different contents, so the key holds a hash of the roles and texts too: the same conversation
    has the same key in every import, whatever came before it.

    Raises UnfitError when there is a message that cannot be taken, or none.
    """
    listed = as_list(source["conversations"] if "conversations" in source else source.get("items"))
    if listed is None:
        raise UnfitError("it has no list of messages")
    if not listed:
        raise UnfitError("no messages")
    said: list[tuple[str, str]] = []
    messages: list[Item] = []
    replaced = 0
    for seq, entry in enumerate(listed, 1):
        fields = as_object(entry) or {}
        word, text = fields.get("from", fields.get("role")), fields.get("value", fields.get("content"))
        known = role(word)
        if not isinstance(text, str):
            raise UnfitError("it has a message without a text")
        content, payload = body(text)
        replaced += content != text
        metadata = None if word in _USUAL else check_metadata("metadata", {"from": word})
        messages.append(SourceMessage(seq, known, content, payload, metadata, None, None, None))
        said.append((str(word), text))
    key = f"sharegpt:{name_of(source.get('id'))}:{fingerprint(said)}"
    messages.insert(0, SourceConversation(key, None, None, len(said), None, None))
    if replaced:
        messages.append(Changed(REPLACED, messages=replaced))
    return messages
