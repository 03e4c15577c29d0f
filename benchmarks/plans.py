"""The plans that the hot statements must have."""

from __future__ import annotations

from typing import Any

from chatdb import branches, conversations, messages, streaming, watching
from chatdb._core.query import Query

_SCANS = {"Index Scan", "Index Only Scan", "Limit", "Append", "Result", "CTE Scan", "Subquery Scan"}
_WRITES = _SCANS | {"ModifyTable", "Nested Loop"}
_LOCKS = _WRITES | {"LockRows"}
_BATCH = _LOCKS | {"Function Scan"}
# of a batch, which is at most 10,000 rows, with rows that an index found; never of a table
_JOINS = {"Aggregate", "Hash", "Hash Join", "Merge Join", "Sort", "WindowAgg"}
_LIST = _SCANS | {"Incremental Sort"}
_RUNS = {"Nested Loop", "Recursive Union", "WorkTable Scan"}
_SUBTREE = _LOCKS | _RUNS | _JOINS | {"Materialize"}  # of the branches of one conversation
_BRANCHES = "ix_messages_user_id_conversation_id_seq_branches"
_PARTS = "pk_message_parts"
PLANS: list[tuple[Query[Any], str, set[str]]] = [
    (messages._get_history, "pk_messages", _SCANS),
    (messages._list_messages, "pk_messages", _SCANS),
    (messages._get_message, "pk_messages", _SCANS),
    (messages._append_message, "pk_conversations", _WRITES),
    (messages._append_messages, "pk_conversations", _BATCH),
    (messages._append_messages_two, "pk_conversations", _WRITES),
    (messages._append_message_conditional, "pk_conversations", _LOCKS),
    (messages._append_messages_conditional, "pk_conversations", _BATCH | _JOINS),
    (messages._upsert_message, "uq_messages_user_id_conversation_id_key", _LOCKS),
    (messages._replace_messages_after, "pk_messages", _BATCH | _JOINS | _RUNS),
    (messages._pop_message, "pk_messages", _LOCKS),
    (messages._update_message, "pk_messages", _LOCKS),
    (conversations._get_conversation, "pk_conversations", _SCANS),
    (conversations._load_conversation, _BRANCHES, _SCANS | _RUNS),
    (conversations._create_conversation_messages, "uq_conversations_user_id_key", _BATCH),
    (conversations._update_conversation, "pk_conversations", _WRITES),
    (conversations._list_conversations, "ix_conversations_user_id_active_on_listed", _LIST),
    (conversations._list_conversations_archived, "ix_conversations_user_id_active_on_archived", _LIST),
    (conversations._list_conversations_all, "ix_conversations_user_id_active_on", _LIST),
    (conversations._list_conversations_created, "ix_conversations_user_id_created_at_id", _SCANS),
    (conversations._list_conversations_created_ascending, "ix_conversations_user_id_created_at_id", _SCANS),
    (conversations._list_previews, "ix_conversations_user_id_active_on_listed", _LIST | {"Nested Loop"}),
    (conversations._list_previews_archived, "ix_conversations_user_id_active_on_archived", _LIST | {"Nested Loop"}),
    (conversations._list_previews_all, "ix_conversations_user_id_active_on", _LIST | {"Nested Loop"}),
    (conversations._list_previews_created, "ix_conversations_user_id_created_at_id", _SCANS | {"Nested Loop"}),
    (
        conversations._list_previews_created_ascending,
        "ix_conversations_user_id_created_at_id",
        _SCANS | {"Nested Loop"},
    ),
    (conversations._list_pinned, "ix_conversations_user_id_pinned_at", _LIST),
    (branches._get_branch, _BRANCHES, _SCANS | _RUNS),
    (branches._get_branch_top, _BRANCHES, _SCANS | _RUNS),
    (branches._list_versions, _BRANCHES, _SCANS | _RUNS | _JOINS | {"Function Scan", "Unique"}),
    (branches._get_context, _BRANCHES, _SCANS | _RUNS | _JOINS),
    (branches._switch_branch, _BRANCHES, _SUBTREE),
    (branches._delete_branch, _BRANCHES, _SUBTREE),
    (branches._fork_conversation, _BRANCHES, _LOCKS | _RUNS | _JOINS),
    (streaming._start_message, "pk_messages", _LOCKS),
    (streaming._extend_message, _PARTS, _LOCKS),
    (streaming._read_message, _PARTS, _SCANS | {"Aggregate"}),
    (streaming._finish_message, _PARTS, _LOCKS | {"Aggregate"}),
    (streaming._list_streaming, _PARTS, _SCANS | {"Nested Loop"}),
    (watching._poll_conversations, "pk_conversations", {"Function Scan", "Index Scan", "Nested Loop"}),
]
"""Each statement that a service calls often, with the index its plan must use and the node types it may contain."""


def nodes(plan: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Return the node types and the indexes of a plan, without the text so far of a message that is streamed."""
    kinds, indexes = {plan["Node Type"]}, {plan["Index Name"]} if "Index Name" in plan else set()
    for each in plan.get("Plans", []):
        more, others = nodes(each)
        if each["Parent Relationship"] == "SubPlan" and more == {"Aggregate", "Index Scan"} and others == {_PARTS}:
            continue  # the index has the parts in order, so that they need no sort
        kinds, indexes = kinds | more, indexes | others
    return kinds, indexes
