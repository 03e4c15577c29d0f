"""Checks the plan of a statement."""

from __future__ import annotations

WHOLE = {("Seq Scan", "conversations"), ("Seq Scan", "messages")}
SORTS = {"get_history": {"Sort", "Incremental Sort"}, "list_messages": {"Sort", "Incremental Sort"}}
SORTS |= {"list_conversations": {"Sort"}, "list_conversations_before": {"Sort"}}


def check_plan(live, file):
    """Raise unless the plan uses the header's indexes, except for the existence row, and scans no whole table."""
    plan = live.plan(file)
    used = {node["Index Name"] for node in plan if "Index Name" in node}
    used |= {index for node in plan for index in node.get("Conflict Arbiter Indexes", ())}
    untold = {"pk_conversations"} - file.indexes if file.existence else set()
    assert (used & live.indexes.keys()) - untold == file.indexes
    assert not WHOLE & {(node["Node Type"], node.get("Relation Name")) for node in plan}
    assert not {node["Node Type"] for node in plan} & SORTS.get(file.name, set())
