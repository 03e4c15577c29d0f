"""Reads ShareGPT JSON, the format of many data sets: one object with a list of messages per conversation."""

from __future__ import annotations

from typing import Any

from chatdb._core.validate import check_metadata
from chatdb.formats import items

_USUAL = frozenset({"human", "gpt", "system"})


def conversation(source: dict[str, Any]) -> list[items.Item]:
    """
    Return a conversation and its messages; an unusual role name is kept in the metadata as `{"from": name}`.

    Different conversations can share an id, so the key also contains a hash of the roles and texts. A conversation gets
    the same key in every import.

    Raises UnsupportedItemError if the conversation has no messages, or one that chatdb cannot store.
    """
    listed = items.as_list(source["conversations"] if "conversations" in source else source.get("items"))
    if listed is None:
        raise items.UnsupportedItemError("no list of messages")
    if not listed:
        raise items.UnsupportedItemError("no messages")
    said: list[tuple[str, str]] = []
    messages: list[items.Item] = []
    replaced = 0
    for seq, entry in enumerate(listed, 1):
        fields = items.as_object(entry) or {}
        word, text = fields.get("from", fields.get("role")), fields.get("value", fields.get("content"))
        known = items.role(word)
        if not isinstance(text, str):
            raise items.UnsupportedItemError("message without text")
        content, payload = items.body(text)
        replaced += content != text
        metadata = None if word in _USUAL else check_metadata("metadata", {"from": word})
        messages.append(items.SourceMessage(seq, known, content, payload, metadata, None, None, None))
        said.append((str(word), text))
    key = f"sharegpt:{items.name_of(source.get('id'))}:{items.fingerprint(said)}"
    messages.insert(0, items.SourceConversation(key, None, None, len(said), None, None))
    if replaced:
        messages.append(items.Changed(items.REPLACED, messages=replaced))
    return messages
