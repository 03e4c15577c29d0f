"""Checks the plan of a statement."""

from __future__ import annotations

WHOLE = {("Seq Scan", "conversations"), ("Seq Scan", "messages")}
INCREMENTAL = {"list_conversations", "list_conversations_all", "list_conversations_archived", "list_pinned"}
INCREMENTAL |= {"list_previews", "list_previews_all", "list_previews_archived"}
"""The files that sort the conversations of a day or of a time, which the index has next to each other."""
OTHERS = {"append_messages_conditional", "delete_user", "import_conversations", "import_conversations_find"}
"""The files that sort a batch, or the conversations that they lock."""


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
