"""
The phases of `chatdb adopt`, in the order they run. Each step is a file in `sql/adopt`, numbered in this order.

Steps report named numbers, which the runner passes to later steps and to the report.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Step(NamedTuple):
    """A file of `sql/adopt` and how to run it."""

    file: str
    returns: Literal["counts", "reasons"] | None = None
    """What the step returns: one row of numbers, or a row of counts for each reason."""
    rowcount: str = ""
    """The name that reports the number of changed rows."""
    arguments: tuple[str, ...] = ()
    """The numbers to pass to the statement."""
    when: str = ""
    """Skip the step if this number is 0."""
    unless: str = ""
    """Skip the step if this number is not 0."""
    dry_run: bool | None = None
    """True: only in a dry run. False: never in one."""
    analyze: str = ""
    """The temporary table, or some of its columns, to analyze afterwards."""


FIND_COLUMNS = "100_find_columns"

SET_UP = (
    Step("110_view_conversations", when="has_conversations"),
    Step("111_stub_conversations", unless="has_conversations"),
    Step("120_view_messages", when="has_messages"),
    Step("121_stub_messages", unless="has_messages"),
    Step("130_create_work"),
)

START = (
    Step("200_create_state"),
    Step("210_advance_sequences", dry_run=False),
    Step("220_count_adopted", returns="counts"),
    Step("230_find_pending", arguments=("batch_size",), analyze="pending"),
    Step("240_count_pending", returns="counts"),
)

BATCH = (
    Step("300_take_batch", analyze="batch_conversations"),
    Step("310_lock_conversations", dry_run=False),
    Step("320_take_messages", analyze="batch_messages (id, conversation_id, reason)"),  # analyzing content takes long
    Step("330_count_batch", returns="counts"),
    Step("340_fill_times", when="without_time"),
    Step("350_mark_renumbered", rowcount="renumbered_conversations"),
    Step("360_find_moves", when="renumbered_conversations", analyze="batch_moves"),
    Step("370_number_moved", when="renumbered_conversations"),
    Step("380_number_messages", analyze="batch_seqs"),
    Step("390_count_seqs", returns="counts"),
    Step("400_move_messages", when="renumbered", dry_run=False),
    Step("430_add_conversations", dry_run=False),
    Step("440_extend_conversations", dry_run=False),
    Step("450_add_messages", dry_run=False),
    Step("460_record_conversations", dry_run=False),
    Step("470_record_messages", dry_run=False),
    Step("480_quarantine_batch", dry_run=False),
    Step("490_release_batch", dry_run=False),
    Step("500_count_batch_quarantine", returns="reasons", dry_run=True),
    Step("510_empty_batch", dry_run=True),
)

ORPHANS = (
    Step("520_take_orphans", when="orphans"),
    Step("480_quarantine_batch", when="orphans", dry_run=False),
    Step("500_count_batch_quarantine", returns="reasons", when="orphans", dry_run=True),
)

FINISH = (Step("210_advance_sequences", dry_run=False),)

# runs before VERIFY takes its snapshot; otherwise both might miss a transaction that ends in between
COUNT_WRITERS = (Step("600_count_writers", returns="counts", dry_run=False),)

VERIFY = (
    Step("610_count_quarantine", returns="reasons", dry_run=False),
    Step("620_verify_conversations", returns="counts"),
    Step("630_verify_messages", returns="counts"),
    Step("640_verify_chatdb", returns="counts"),
)

FIND_DELETED_UPSTREAM = (
    Step("700_find_deleted_conversations", rowcount="deleted_upstream_conversations", when="has_conversations"),
    Step("701_find_deleted_messages", rowcount="deleted_upstream_messages", when="has_messages"),
)

DELETE = (
    Step("710_lock_deleted_upstream"),
    Step("720_exclude_extended"),
    Step("730_delete_from_chatdb"),
    Step("740_forget_messages", rowcount="deleted_messages"),
    Step("741_forget_conversations", rowcount="deleted_conversations"),
)
