"""The messages of a conversation as a tree, and the rules by which each function changes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from chatdb import ChatDBError, ConflictError, Conversation, Deleted, Message, MessageNotFoundError, StaleError


@dataclass(frozen=True)
class Node:
    """A message and the message that it follows, 0 if none."""

    seq: int
    parent: int
    role: str
    content: str
    key: str | None


class Tree:
    """
    A model of one conversation: its methods take the arguments of the functions of the same names.

    Each returns what `summary` makes of the function's result, or raises its error. `expected` is true if the caller's
    etag is still that of the conversation, and None if the caller passes none.
    """

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.head = 0
        self.last_seq = 0
        self.edits = 0

    @property
    def revision(self) -> int:
        """The conversation's revision."""
        return self.last_seq + self.edits

    def copy(self) -> Tree:
        """Return the same tree, which further calls do not change."""
        copied = Tree()
        copied.nodes = dict(self.nodes)
        copied.head, copied.last_seq, copied.edits = self.head, self.last_seq, self.edits
        return copied

    def state(self) -> tuple[int, int, int, list[Node]]:
        """Return everything about the tree that its conversation and its messages have to match."""
        return self.head, self.last_seq, self.revision, [self.nodes[seq] for seq in sorted(self.nodes)]

    # what readers see

    def line(self, top: int | None = None) -> list[int]:
        """Return the seqs from the first message to the head or another message."""
        seq, found = self.head if top is None else top, list[int]()
        while seq:
            found.append(seq)
            seq = self.nodes[seq].parent
        return found[::-1]

    def children(self, seq: int) -> list[int]:
        """Return the seqs of the messages that follow one, or of the first messages for 0."""
        return [node.seq for node in self.nodes.values() if node.parent == seq]

    def subtree(self, seq: int) -> set[int]:
        """Return a message and all that follows it."""
        return {seq}.union(*(self.subtree(child) for child in self.children(seq)))

    def get_branch(self, limit: int = 100, before_seq: int | None = None, top_seq: int | None = None) -> list[Any]:
        """Return the newest messages of a line before a seq."""
        if top_seq is not None and top_seq not in self.nodes:
            raise MessageNotFoundError
        line = [seq for seq in self.line(top_seq) if before_seq is None or seq < before_seq]
        return [self._summary(seq) for seq in line[-limit:]]

    def list_versions(self, limit: int = 100, before_seq: int | None = None) -> dict[int, list[int]]:
        """Return the messages of that page that follow the same message as others."""
        line = [seq for seq in self.line() if before_seq is None or seq < before_seq]
        versions = {seq: sorted(self.children(self.nodes[seq].parent)) for seq in line[-limit:]}
        return {seq: seqs for seq, seqs in versions.items() if len(seqs) > 1}

    def fork_conversation(self, seq: int | None = None, key: str | None = None) -> list[Any]:
        """Return the messages of the fork."""
        line = self.line(None if seq is None and key is None else self._find(seq, key))
        return [(place, *self._summary(old)[1:]) for place, old in enumerate(line, 1)]

    # what writers change

    def append_message(self, parent_seq: int | None = None, expected: bool | None = None, **message: Any) -> Any:
        """Append a message after the head or another message."""
        return self.append_messages([message], parent_seq=parent_seq, expected=expected)[0]

    def append_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        on_existing: str = "conflict",
        parent_seq: int | None = None,
        expected: bool | None = None,
    ) -> list[Any]:
        """Append messages, each after the one before it, or return the stored ones."""
        seqs = self._keys()
        known = [each for each in messages if each["key"] in seqs]
        new = [each for each in messages if each["key"] not in seqs]
        if on_existing == "conflict" and known:
            if new or not all(self._is_stored(each) for each in messages):
                raise ConflictError
            return [self._summary(seqs[each["key"]]) for each in messages]
        if messages and not new:
            return []
        self._check(expected)
        if parent_seq and parent_seq not in self.nodes:
            raise MessageNotFoundError
        return self._append(new, self.head if parent_seq is None else parent_seq)

    def upsert_message(self, expected: bool | None = None, **message: Any) -> Any:
        """Replace the message with the key in its place, or append it."""
        seq = self._keys().get(message["key"])
        if seq is not None and self._is_stored(message):
            return self._summary(seq)
        self._check(expected)
        if seq is None:
            return self._append([message], self.head)[0]
        self.nodes[seq] = replace(self.nodes[seq], role=message["role"], content=message["content"])
        self.edits += 1
        return self._summary(seq)

    def pop_message(self, expected: bool | None = None) -> Any:
        """Delete the head."""
        self._check(expected)
        if not self.head:
            return None
        popped = self._summary(self.head)
        self._delete(self.head)
        return popped

    def delete_message(self, seq: int | None = None, key: str | None = None, expected: bool | None = None) -> int:
        """Delete a message, whose children then follow its parent."""
        self._check(expected)
        self._delete(self._find(seq, key))
        return 1

    def delete_messages_after(
        self, after_seq: int | None = None, after_key: str | None = None, expected: bool | None = None
    ) -> int:
        """Delete the messages after a seq, on every branch."""
        self._check(expected)
        if after_key is not None:
            after_seq = self._find(None, after_key)
        assert after_seq is not None
        deleted = self._cut(after_seq)
        self.edits += deleted > 0
        return deleted

    def replace_messages_after(
        self, after_seq: int, messages: Sequence[Mapping[str, Any]], expected: bool
    ) -> list[Any]:
        """Delete the messages after a seq, and append others after what is left of the line."""
        seqs = self._keys()
        if not expected:
            if not messages or not all(self._is_stored(each) and seqs[each["key"]] > after_seq for each in messages):
                raise StaleError
            return [self._summary(seqs[each["key"]]) for each in messages]
        if any(seqs.get(each["key"], after_seq + 1) <= after_seq for each in messages):
            raise ConflictError
        self._cut(after_seq)
        self.edits += 1
        return self._append(messages, self.head)

    def switch_branch(
        self, seq: int | None = None, key: str | None = None, expected: bool | None = None
    ) -> tuple[int, int]:
        """Make the newest message that follows another the head."""
        self._check(expected)
        newest = max(self.subtree(self._find(seq, key)))
        self.edits += newest != self.head
        self.head = newest
        return self.head, self.revision

    def delete_branch(self, seq: int | None = None, key: str | None = None, expected: bool | None = None) -> int:
        """Delete a message and all that follows it."""
        self._check(expected)
        seq = self._find(seq, key)
        deleted = self.subtree(seq)
        if self.head in deleted:
            self.head = self.nodes[seq].parent
        for each in deleted:
            del self.nodes[each]
        self.edits += 1
        return len(deleted)

    def _check(self, expected: bool | None) -> None:
        if expected is False:
            raise StaleError

    def _find(self, seq: int | None, key: str | None) -> int:
        found = seq if key is None else self._keys().get(key)
        if found is None or found not in self.nodes:
            raise MessageNotFoundError
        return found

    def _keys(self) -> dict[str, int]:
        return {node.key: node.seq for node in self.nodes.values() if node.key is not None}

    def _is_stored(self, message: Mapping[str, Any]) -> bool:
        seq = self._keys().get(message["key"])
        node = None if seq is None else self.nodes[seq]
        return node is not None and (node.role, node.content) == (message["role"], message["content"])

    def _summary(self, seq: int) -> tuple[int, str, str, str | None]:
        node = self.nodes[seq]
        return node.seq, node.role, node.content, node.key

    def _append(self, messages: Sequence[Mapping[str, Any]], parent: int) -> list[Any]:
        first = self.last_seq + 1
        for message in messages:
            self.last_seq += 1
            self.nodes[self.last_seq] = Node(self.last_seq, parent, message["role"], message["content"], message["key"])
            self.head = parent = self.last_seq
        return [self._summary(seq) for seq in range(first, self.last_seq + 1)]

    def _delete(self, seq: int) -> None:
        parent = self.nodes[seq].parent
        for child in self.children(seq):
            self.nodes[child] = replace(self.nodes[child], parent=parent)
        if self.head == seq:
            self.head = parent
        del self.nodes[seq]
        self.edits += 1

    def _cut(self, after_seq: int) -> int:
        self.head = max((seq for seq in self.line() if seq <= after_seq), default=0)
        deleted = [seq for seq in self.nodes if seq > after_seq]
        for seq in deleted:
            del self.nodes[seq]
        return len(deleted)


def summary(result: object) -> Any:
    """Return what a Tree returns, of what a function of chatdb returns."""
    match result:
        case Message():
            return result.seq, result.role, result.content, result.key
        case Conversation():
            return result.head_seq, result.revision
        case Deleted():
            return result.messages
        case list():
            return [summary(each) for each in result]
    return result


def outcome(call: Callable[[], Any]) -> Any:
    """Return what a method of a Tree returns, or the type of its error."""
    try:
        return call()
    except ChatDBError as error:
        return type(error)


def stored_state(conversation: Conversation, log: Sequence[Message]) -> tuple[int, int, int, list[Node]]:
    """Return what `Tree.state` returns, of a conversation and all its messages, and check each parent."""
    nodes, newest = list[Node](), 0
    seqs = {message.seq for message in log}
    for message in log:
        parent = newest if message.parent_seq is None else message.parent_seq
        assert parent < message.seq
        assert parent == 0 or parent in seqs, f"the parent of {message.seq} is not stored"
        nodes.append(Node(message.seq, parent, message.role, message.content, message.key))
        newest = message.seq
    assert len(seqs) == len(log)
    return conversation.head_seq, conversation.last_seq, conversation.revision, nodes


def tree_of(conversation: Conversation, log: Sequence[Message]) -> Tree:
    """Return the tree that is stored."""
    tree = Tree()
    tree.head, tree.last_seq, _, nodes = stored_state(conversation, log)
    tree.edits = conversation.revision - conversation.last_seq
    tree.nodes = {node.seq: node for node in nodes}
    return tree
