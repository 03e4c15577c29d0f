"""Turns the nodes of a foreign conversation, a tree or a list, into a flat list of messages in order of time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from heapq import heappop, heappush
from typing import Any, Final, NamedTuple, TypeVar

from chatdb._core.validate import MAX_TITLE, check_conversation_metadata
from chatdb.formats import items

RING: Final = "messages follow each other in a circle: cut where it begins"
LONG_DETAIL: Final = "details of the conversation of over 20,000 characters left out"
_SHORT_TEXT: Final = 4_096
_MAX_DETAIL: Final = 20_000
"""Maximum characters of a string in a conversation's metadata."""

_NEVER: Final = datetime.min.replace(tzinfo=UTC)
_Message = TypeVar("_Message")


class Piece(NamedTuple):
    """A message to store. A foreign message with reasoning or tool calls has several."""

    role: str
    text: str
    metadata: str | None = None
    original: object = None
    """The foreign item, which becomes the payload, or its JSON; None if role and text are all of it."""
    is_answer: bool = True
    """Whether it is what somebody said, not reasoning or a tool's. The first one has the key of the node."""
    state: str | None = None


class Encoded(NamedTuple):
    """What `items.original` returned for a foreign item: a small one takes less memory as JSON."""

    payload: str | None
    problem: str | None


class Node(NamedTuple):
    """A foreign message: what it follows, its time, its id, and the messages to store for it."""

    parent: object
    """The name of the node that it follows; anything else begins a line."""
    sent_at: datetime | None
    key: str | None
    pieces: tuple[Piece, ...]


class Nodes:
    """The nodes of a conversation by name, in the order of the file, and what of it cannot be stored."""

    def __init__(self) -> None:
        self.by_name: dict[str, Node] = {}
        self.skipped: list[items.Skipped] = []
        self.last: str | None = None
        """The name of the newest one."""

    def name_for(self, key: str | None, place: int) -> str:
        """Return the name of a message: its id, or its place if it has none or another one has the same."""
        return key if key and key not in self.by_name else f"#{place}"

    def add(
        self,
        name: str,
        message: _Message,
        pieces_of: Callable[[_Message], tuple[Piece, ...]],
        *,
        parent: object,
        sent_at: object,
        key: str | None,
    ) -> None:
        """Add a message, of which nothing is stored if `pieces_of` raises UnsupportedItemError."""
        try:
            pieces = pieces_of(message)
        except items.UnsupportedItemError as error:
            self.skipped.append(skipped(error, name))
            pieces = ()
        self.by_name[name] = Node(parent, items.time_of(sent_at), key, tuple(map(_packed, pieces)))
        self.last = name


def _packed(piece: Piece) -> Piece:
    """
    Return the message with the JSON of its foreign item, unless the text is long.

    Objects take many times the memory of short texts; a long text is shared with the object, and not with its JSON.
    """
    if piece.original is None or len(piece.text) > _SHORT_TEXT:
        return piece
    encoded = Encoded(*items.original(piece.original))
    return Piece(piece.role, piece.text, piece.metadata, encoded, piece.is_answer, piece.state)


_STREAMED: Final = Node(None, None, None, ())


class Conversation(NamedTuple):
    """A foreign conversation. Its nodes are in the order of the file, by name."""

    key: str
    """The prefix of its key, such as `chatgpt:`."""
    name: str
    """Its id for the key, or '' to identify it by its messages."""
    nodes: dict[str, Node]
    """The memory of each is freed when its messages are read."""
    current: object = None
    """The name of the node that the user last saw; None to take the newest."""
    title: object = None
    metadata: Mapping[str, object] = {}
    """What the metadata keeps of it; anything but strings and true is left out."""
    created_at: datetime | None = None
    updated_at: datetime | None = None
    archived: datetime | bool | None = None
    """The time if it is known, or whether, or None if the export does not say."""
    pinned: datetime | bool | None = None
    skipped: tuple[items.Skipped, ...] = ()
    beginnings: tuple[str, ...] = ()
    """With a name that ends with a hash of the messages, as in `SourceConversation`."""


def chain(pieces: Iterable[tuple[Piece, ...]], sent_at: Iterable[datetime | None] = ()) -> dict[str, Node]:
    """Return the nodes of a list of messages without ids, each with its pieces."""
    times = iter(sent_at)
    return {str(place): Node(str(place - 1), next(times, None), None, each) for place, each in enumerate(pieces, 1)}


def skipped(error: items.UnsupportedItemError, message: object) -> items.Skipped:
    """Return the report of a message that cannot be stored; `message` is its id or its place in the conversation."""
    return items.Skipped(str(error), messages=1, place=f"message {str(message)[:80]}")


def stream(source: Conversation) -> Iterator[items.Item]:
    """
    Return the conversation, its messages of all branches, and what was changed or skipped.

    Messages come in order of time, each after the one that it follows. So a later export of a conversation begins with
    the messages of the earlier one. The head is the message that the user last saw: the nearest at or above the current
    node or, if that is unknown, the newest leaf. A message without a time gets that of the message that it follows, or
    of the conversation.

    Raises UnsupportedItemError if there are no messages.
    """
    nodes = source.nodes
    order = _as_chain(nodes, source.current)
    if order is not None:
        return _stream(source, order) if order else _nothing(source)
    parents, is_ring = _parents(nodes, source.current)
    line = _line(nodes, parents, source.current)
    return _stream(source, _in_order(nodes, parents), line, is_ring=is_ring) if line else _nothing(source)


def _nothing(source: Conversation) -> Iterator[items.Item]:
    if not source.skipped:
        raise items.UnsupportedItemError("no messages")
    return iter([*source.skipped, items.Skipped("no messages that can be stored", conversations=1)])


def _stream(
    source: Conversation, order: dict[str, str | None], line: list[str] | None = None, *, is_ring: bool = False
) -> Iterator[items.Item]:
    """Yield the conversation. Without a line, the nodes have no branches, and little memory goes to each of them."""
    nodes = source.nodes
    first_at = next((time for name in order if (time := nodes[name].sent_at)), None)
    created_at = source.created_at or first_at or source.updated_at
    last: dict[str | None, int] = {None: 0}
    """The seq of each node's last message."""
    sent: dict[str | None, datetime | None] = {None: created_at}
    seq, at = 0, created_at
    for name, follows in order.items():
        seq += len(nodes[name].pieces)
        at = nodes[name].sent_at or (sent[follows] if line else at)
        if line:
            last[name], sent[name] = seq, at
    updated_at = source.updated_at or at
    head_seq = last[line[-1]] if line else seq
    key, beginnings = source.key + source.name, source.beginnings
    if not source.name:
        said = [(piece.role, piece.text) for name in line or order for piece in nodes[name].pieces]
        whole, beginnings = items.fingerprints(said, len(said))
        key = f"{source.key}:{whole}"
    title = items.replace_unstorable(source.title[:MAX_TITLE]) if isinstance(source.title, str) else None
    yield items.SourceConversation(
        key,
        title,
        _metadata(source, title),
        seq,
        created_at,
        updated_at,
        _flagged_at(source.archived, updated_at),
        _flagged_at(source.pinned, updated_at),
        None if head_seq == seq else head_seq,
        all(nodes[name].key for name in order),
        None if source.archived is None else bool(source.archived),
        None if source.pinned is None else bool(source.pinned),
        beginnings,
    )
    changes: defaultdict[str, int] = defaultdict(int)
    keys: set[str] = set()
    seq, at = 0, created_at
    for name, follows in order.items():
        node, nodes[name] = nodes[name], _STREAMED
        main = next((place for place, piece in enumerate(node.pieces) if piece.is_answer), 0)
        parent_seq = last[follows] if line else seq
        at = sent[name] if line else node.sent_at or at
        for place, piece in enumerate(node.pieces):
            seq += 1
            own = node.key and (node.key if place == main else items.short(f"{node.key}#{place}"))
            if own in keys:
                own = None
            elif own:
                keys.add(own)
            text = items.replace_unstorable(piece.text)
            content = items.cut(text)
            item = piece.original if piece.original is not None or content is piece.text else {"content": piece.text}
            if isinstance(item, Encoded):
                payload, problem = item
            else:
                payload, problem = (None, None) if item is None else items.original(item)
            if content is not piece.text or problem is not None:
                for reason in (
                    items.REPLACED if text != piece.text else None,
                    items.CUT if len(content) != len(text) else None,
                    problem,
                ):
                    if reason is not None:
                        changes[reason] += 1
            follows_previous = parent_seq == seq - 1
            yield items.SourceMessage(
                seq, piece.role, content, payload, piece.metadata, None, own, at,
                None if follows_previous else parent_seq, piece.state,
            )  # fmt: skip
            parent_seq = seq
    if isinstance(source.title, str) and len(source.title) > MAX_TITLE:
        yield items.Changed("title truncated to 1,000 characters", conversations=1)
    if any(isinstance(value, str) and len(value) > _MAX_DETAIL for value in source.metadata.values()):
        yield items.Changed(LONG_DETAIL, conversations=1)
    if is_ring:
        yield items.Changed(RING, conversations=1)
    for reason, count in changes.items():
        yield items.Changed(reason, messages=count)
    yield from source.skipped


def _metadata(source: Conversation, title: str | None) -> str | None:
    """Return a conversation's metadata; with what was imported, a later import sees whether it was changed here."""
    metadata: dict[str, Any] = {
        name: items.replace_unstorable(value) if isinstance(value, str) else value
        for name, value in source.metadata.items()
        if value is True or (isinstance(value, str) and 0 < len(value) <= _MAX_DETAIL)
    }
    if title:
        metadata["imported_title"] = title
    if source.archived:
        metadata["imported_archived"] = True
    if source.pinned:
        metadata["imported_pinned"] = True
    return check_conversation_metadata("metadata", metadata or None)


def _flagged_at(flag: datetime | bool | None, last_at: datetime | None) -> datetime | None:
    if isinstance(flag, datetime):
        return flag
    return (last_at or items.UNKNOWN_TIME) if flag else None


def _as_chain(nodes: Mapping[str, Node], current: object) -> dict[str, str | None] | None:
    """Return the order if the nodes are one line without branches, as most are, and in order of time; else None."""
    order: dict[str, str | None] = {}
    before: str | None = None
    previous: str | None = None
    latest = _NEVER
    for name, node in nodes.items():
        is_next = (
            node.parent == before if before is not None else not (isinstance(node.parent, str) and node.parent in nodes)
        )
        if not is_next or (node.sent_at is not None and node.sent_at < latest):
            return None
        latest = node.sent_at or latest
        if node.pieces:
            order[name] = previous
            previous = name
        before = name
    return order if current is None or current == before else None


def _parents(nodes: Mapping[str, Node], current: object) -> tuple[dict[str, str | None], bool]:
    """
    Return the parent of each node, parents first, and whether there was a cycle.

    A cycle is cut where the walk up from the current node ends.
    """
    parents: dict[str, str | None] = {}
    is_ring = False
    for start in (current, *nodes):
        path: dict[str, None] = {}
        name: object = start
        while isinstance(name, str) and name in nodes and name not in parents and name not in path:
            path[name] = None
            name = nodes[name].parent
        is_ring = is_ring or (isinstance(name, str) and name in path)
        parent = name if isinstance(name, str) and name in parents else None
        for child in reversed(path):
            parents[child] = parent
            parent = child
    return parents, is_ring


def _line(nodes: Mapping[str, Node], parents: dict[str, str | None], current: object) -> list[str]:
    """Return the nodes with messages from a root to the head, oldest first."""
    nearest: dict[str | None, str | None] = {None: None}
    for name, parent in parents.items():
        nearest[name] = name if nodes[name].pieces else nearest[parent]
    head = nearest.get(current) if isinstance(current, str) else None
    if head is None:
        inner = {*parents.values()}
        leaves = [name for name in nodes if name not in inner and nearest[name] is not None]
        head = nearest[max(reversed(leaves), key=lambda name: nodes[name].sent_at or _NEVER, default=None)]
    line: list[str] = []
    while head is not None:
        line.append(head)
        head = nearest[parents[head]]
    return line[::-1]


def _in_order(nodes: Mapping[str, Node], parents: dict[str, str | None]) -> dict[str, str | None]:
    """Return the nodes with messages in order of time, and which of them each follows."""
    times = _times(nodes, parents)
    follows: dict[str, str | None] = {}
    stored: dict[str | None, str | None] = {None: None}
    sent: dict[str | None, datetime] = {None: _NEVER}
    children: defaultdict[str | None, list[str]] = defaultdict(list)
    for name, parent in parents.items():
        before = stored[parent]
        if not nodes[name].pieces:
            stored[name] = before
            continue
        stored[name], follows[name] = name, before
        sent[name] = max(times.get(name, _NEVER), sent[before])
        children[before].append(name)
    ordinality = {name: index for index, name in enumerate(nodes)}
    order: dict[str, str | None] = {}
    queue: list[tuple[datetime, int, str]] = []
    following = children[None]
    while following or queue:
        for name in following:
            heappush(queue, (sent[name], ordinality[name], name))
        _, _, first = heappop(queue)
        order[first] = follows[first]
        following = children[first]
    return order


def _times(nodes: Mapping[str, Node], parents: dict[str, str | None]) -> dict[str, datetime]:
    """
    Return the time of each node: its own or, if it has none, the earliest time below it.

    ChatGPT's hidden messages have no time. With that of a new answer below it, such a message comes after everything
    that an earlier export had.
    """
    times: dict[str, datetime] = {}
    for name, parent in reversed(parents.items()):
        time = nodes[name].sent_at or times.get(name)
        if time is not None:
            times[name] = time
            if parent is not None:
                times[parent] = min(times.get(parent, time), time)
    return times
