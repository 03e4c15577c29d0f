"""Checks the plan of a statement."""

from __future__ import annotations

WHOLE = {("Seq Scan", "conversations"), ("Seq Scan", "messages"), ("Seq Scan", "message_parts")}
INCREMENTAL = {
    "list_conversations",
    "list_conversations_after",
    "list_conversations_all",
    "list_conversations_archived",
    "list_pinned",
}
INCREMENTAL |= {"list_previews", "list_previews_all", "list_previews_archived"}
"""The files that sort the conversations of a day or of a time, which the index has next to each other."""
OTHERS = {"append_messages_conditional", "delete_user", "import_conversations", "import_conversations_find"}
OTHERS |= {"fork_conversation", "get_context", "list_versions", "move_user"}
OTHERS |= {
    "search_messages",
    "search_messages_conversation",
    "search_messages_words",
    "search_messages_words_conversation",
}
"""
The files that sort a batch, the conversations that they lock, the messages of a line that they number, or those that
they find.
"""


def check_plan(live, file):
    """Raise unless the plan uses the header's indexes, except for the existence row, and scans no whole table."""
    plan = live.plan(file)
    used = {node["Index Name"] for node in plan if "Index Name" in node}
    used |= {index for node in plan for index in node.get("Conflict Arbiter Indexes", ())}
    untold = {"pk_conversations"} - file.indexes if file.existence else set()
    assert (used & live.indexes.keys()) - untold == file.indexes, sorted(used)
    assert not WHOLE & {(node["Node Type"], node.get("Relation Name")) for node in plan}
    sorts = {node["Node Type"] for node in plan} & {"Sort", "Incremental Sort"}
    allowed = (
        {"Incremental Sort"}
        if file.name in INCREMENTAL
        else {"Sort", "Incremental Sort"}
        if file.name in OTHERS
        else set()
    )
    assert sorts <= allowed


KEYS = ("uq_conversations_user_id_key", "uq_messages_user_id_conversation_id_key")
ADDRESS = {"user_id": "user 7", "conversation_id": 107, "conversation_key": "key 1"}
"""A conversation of the test data with its key."""
PLACE = {"seq": 2, "key": "key 2", "before_seq": 3, "before_key": "key 3", "after_seq": 1, "after_key": "key 1"}
"""Messages of it, with their keys."""
OTHERS_OF_CALL = {
    "row_limit": 1,
    "role": "user",
    "content": "hello",
    "roles": ["user"],
    "contents": ["hello"],
    "payloads": [None],
    "metadatas": [None],
    "token_counts": [None],
    **dict.fromkeys(("create_missing", "skip_stored", "set_title", "set_metadata", "set_payload"), False),
    "set_content": True,
    "set_token_count": False,
    "keys": ["new"],
    "archived": True,
    "query": "hello",
    "words": ["hello"],
}
"""The other arguments: a page is full, so that no statement looks for the conversation itself."""


def check_addressing(live, file):
    """Raise unless the plan looks up a key only where the caller gives the key instead of an id or a seq."""
    parameters = {parameter.name: parameter for parameter in file.parameters}
    choices = [name for name in PLACE if name in parameters and parameters[name].nullable]
    is_by_place = len(choices) == 2
    given = ADDRESS | PLACE | OTHERS_OF_CALL
    for by_key in (False, True):
        values = dict(given)
        del values["conversation_id" if by_key else "conversation_key"]
        for name in choices if is_by_place else ():
            if name.endswith("key") != by_key:
                del values[name]
        plan = live.executed(file, values)
        lookups = [node for node in plan if node.get("Index Name") in KEYS and _is_lookup(node)]
        for table in ("conversations", "messages")[: 1 + is_by_place]:
            loops = [node["Actual Loops"] for node in lookups if node["Relation Name"] == table]
            assert loops
            assert any(loops) == by_key, f"{table}: {loops}"


def _is_lookup(node):
    """Return whether a node is a scalar subquery."""
    return node.get("Subplan Name", "").startswith(("InitPlan", "SubPlan"))
