"""Reads conversation trees in ChatGPT's export, conversations.json, with all branches."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from heapq import heappop, heappush
from typing import Any, NamedTuple, TypeAlias

from chatdb._core.validate import MAX_TITLE
from chatdb.formats import items

_Object: TypeAlias = dict[str, Any]

_TEXTS = ("text", "result", "content", "user_profile", "user_instructions", "model_set_context")
"""The fields that hold the text of a content without parts: code, output, web pages, reasoning, instructions."""

_NEVER = datetime.min.replace(tzinfo=UTC)


class _Tree(NamedTuple):
    """The nodes of a conversation."""

    nodes: dict[str, _Object]
    parents: dict[str, str | None]
    """The parent of each node, or None for a root; parents come first."""
    messages: dict[str, _Object]
    """The messages of the nodes that have one, parents first."""
    line: dict[str, None]
    """The nodes with a message from a root to the head, oldest first. The last one is the head."""


class _Turn(NamedTuple):
    """A message that can be stored; its `seq` and `parent_seq` are not known yet."""

    follows: str | None
    """The node of the message that it follows."""
    sent_at: datetime
    """Its time for the order: never before that of a message above it."""
    message: items.SourceMessage
    text: str


def conversation(source: _Object) -> list[items.Item]:
    """
    Return a conversation, the messages of all its branches, and what was changed or skipped.

    Messages come in order of time, each after the one that it follows. So a later export of a conversation begins with
    the messages of the earlier one. The head is the message that the user last saw. A message with more than text keeps
    its original in `payload`. A message without a time gets the time of the message that it follows, or of the
    conversation. A message on another branch than the head's that chatdb cannot store is skipped; those after it follow
    the message before it.

    Raises UnsupportedItemError if there are no messages, or if the line of the head has a message that chatdb cannot
    store.
    """
    mapping = items.as_object(source.get("mapping"))
    if mapping is None:
        raise items.UnsupportedItemError("no message tree")
    tree = _tree({name: node for name, value in mapping.items() if (node := items.as_object(value))}, source)
    if not tree.line:
        raise items.UnsupportedItemError("no messages")
    turns, skipped = _turns(tree)
    seqs = _seqs(tree, turns)

    updated_at = _time(source.get("update_time"))
    times = (_time(tree.messages[name].get("create_time")) for name in seqs)
    created_at = _time(source.get("create_time")) or next((time for time in times if time), updated_at)
    messages: list[items.SourceMessage] = []
    keys: set[str | None] = set()
    for name, seq in seqs.items():
        follows, _, message, _ = turns[name]
        parent_seq = 0 if follows is None else seqs[follows]
        key = None if message.key in keys else message.key
        keys.add(key)
        messages.append(
            message._replace(
                seq=seq,
                key=key,
                created_at=message.created_at or created_at,
                parent_seq=None if parent_seq == seq - 1 else parent_seq,
            )
        )

    said = [(turns[name].message.role, turns[name].text) for name in tree.line]
    name = items.name_of(source.get("conversation_id")) or items.name_of(source.get("id"))
    key = f"chatgpt:{name}" if name else f"chatgpt::{items.fingerprint(said)}"
    title, is_cut = _title(source.get("title"))
    last_at = updated_at or messages[-1].created_at
    head_seq = seqs[next(reversed(tree.line))]
    stream: list[items.Item] = [
        items.SourceConversation(
            key,
            title,
            None,
            len(messages),
            created_at,
            last_at,
            *_archived_and_pinned(source, last_at),
            None if head_seq == len(messages) else head_seq,
        ),
        *messages,
    ]
    if is_cut:
        stream.append(items.Changed("title truncated to 1,000 characters", conversations=1))
    replaced = sum(turn.message.content != turn.text for turn in turns.values())
    if replaced:
        stream.append(items.Changed(items.REPLACED, messages=replaced))
    return [*stream, *skipped]


def _tree(nodes: dict[str, _Object], source: _Object) -> _Tree:
    """Return the tree; its head is at or above the current node or, if that is unknown, the newest leaf."""
    current = source.get("current_node")
    parents = _parents(nodes, current)
    messages = {name: one for name in parents if (one := items.as_object(nodes[name].get("message"))) is not None}
    nearest: dict[str | None, str | None] = {None: None}
    for name, parent in parents.items():
        nearest[name] = name if name in messages else nearest[parent]
    head = nearest.get(current) if isinstance(current, str) else None
    if head is None:
        inner = {*parents.values()}
        leaves = [name for name in nodes if name not in inner and nearest[name] is not None]
        head = nearest[max(reversed(leaves), key=lambda name: _written(nodes[name]), default=None)]
    line: list[str] = []
    while head is not None:
        line.append(head)
        head = nearest[parents[head]]
    return _Tree(nodes, parents, messages, dict.fromkeys(reversed(line)))


def _parents(nodes: dict[str, _Object], current: object) -> dict[str, str | None]:
    """Return the parent of each node, parents first. A cycle is cut where the walk up from the current node ends."""
    parents: dict[str, str | None] = {}
    for start in (current, *nodes):
        path: dict[str, None] = {}
        name: object = start
        while isinstance(name, str) and name in nodes and name not in parents and name not in path:
            path[name] = None
            name = nodes[name].get("parent")
        parent = name if isinstance(name, str) and name in parents else None
        for child in reversed(path):
            parents[child] = parent
            parent = child
    return parents


def _turns(tree: _Tree) -> tuple[dict[str, _Turn], list[items.Skipped]]:
    """Return the messages that can be stored, parents first, and those that were skipped."""
    turns: dict[str, _Turn] = {}
    skipped: list[items.Skipped] = []
    times = _times(tree)
    stored: dict[str | None, str | None] = {None: None}
    """For each node, the node of the stored message at or above it."""
    for name, parent in tree.parents.items():
        stored[name] = follows = stored[parent]
        message = tree.messages.get(name)
        if message is None:
            continue
        before = None if follows is None else turns[follows]
        try:
            turns[name] = _turn(message, times.get(name, _NEVER), follows, before)
        except items.UnsupportedItemError as error:
            if name in tree.line:
                raise
            skipped.append(items.Skipped(str(error), messages=1))
        else:
            stored[name] = name
    return turns, skipped


def _times(tree: _Tree) -> dict[str, datetime]:
    """
    Return the time of each node: that of its message or, if it has none, the earliest time below it.

    ChatGPT's hidden messages have no time. With that of a new answer below it, such a message comes after everything
    that an earlier export had.
    """
    times: dict[str, datetime] = {}
    for name, parent in reversed(tree.parents.items()):
        time = _time(tree.messages.get(name, {}).get("create_time")) or times.get(name)
        if time is not None:
            times[name] = time
            if parent is not None:
                times[parent] = min(times.get(parent, time), time)
    return times


def _turn(message: _Object, sent_at: datetime, follows: str | None, before: _Turn | None) -> _Turn:
    author = items.as_object(message.get("author")) or {}
    role = items.role(author.get("role"))
    text, is_all = _text(items.as_object(message.get("content")) or {})
    content, payload = items.body(text, None if is_all else message)
    model = items.short((items.as_object(message.get("metadata")) or {}).get("model_slug"))
    metadata = items.metadata_of(model=model, name=items.short(author.get("name")))
    key = items.short(message.get("id"))
    created_at = _time(message.get("create_time")) or (before and before.message.created_at)
    stored = items.SourceMessage(0, role, content, payload, metadata, None, key, created_at)
    return _Turn(follows, max(sent_at, before.sent_at) if before else sent_at, stored, text)


def _seqs(tree: _Tree, turns: dict[str, _Turn]) -> dict[str, int]:
    """Return the seq of each message, in order: by time, those of the same time in the order of the file."""
    ordinality = {name: index for index, name in enumerate(tree.nodes)}
    children: defaultdict[str | None, list[str]] = defaultdict(list)
    for name, turn in turns.items():
        children[turn.follows].append(name)
    seqs: dict[str, int] = {}
    queue: list[tuple[datetime, int, str]] = []
    following = children[None]
    while following or queue:
        for name in following:
            heappush(queue, (turns[name].sent_at, ordinality[name], name))
        _, _, first = heappop(queue)
        seqs[first] = len(seqs) + 1
        following = children[first]
    return seqs


def _archived_and_pinned(source: _Object, last_at: datetime | None) -> tuple[datetime | None, datetime | None]:
    """Return the times of archiving and pinning, or of the last change if the export has only a flag."""
    flagged_at = last_at or items.UNKNOWN_TIME
    archived_at = flagged_at if source.get("is_archived") is True else None
    pinned_at = _time(source.get("pinned_time")) or (flagged_at if source.get("is_starred") is True else None)
    return archived_at, pinned_at


def _written(node: _Object) -> datetime:
    return _time((items.as_object(node.get("message")) or {}).get("create_time")) or _NEVER


def _time(seconds: object) -> datetime | None:
    """Return the time for a Unix timestamp in seconds, or None if it is out of range."""
    if not isinstance(seconds, int | float) or seconds <= 0:
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):  # milliseconds, NaN or infinity
        return None


def _text(content: _Object) -> tuple[str, bool]:
    """Return the readable text of a content, and whether the content has nothing else."""
    parts = items.as_list(content.get("parts"))
    if parts is not None:
        texts = [part if isinstance(part, str) else (items.as_object(part) or {}).get("text") for part in parts]
        is_all = content.get("content_type") == "text" and all(isinstance(part, str) for part in parts)
        return "\n".join(text for text in texts if isinstance(text, str)), is_all
    texts = [content.get(name) for name in _TEXTS]
    thoughts = items.as_list(content.get("thoughts")) or ()
    texts += [(items.as_object(thought) or {}).get("content") for thought in thoughts]
    return "\n".join(text for text in texts if text and isinstance(text, str)), False


def _title(value: object) -> tuple[str | None, bool]:
    if not isinstance(value, str):
        return None, False
    return items.replace_unstorable(value[:MAX_TITLE]), len(value) > MAX_TITLE
