"""What `chatdb adopt` reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Counts(NamedTuple):
    """How many conversations and messages."""

    conversations: int
    messages: int

    def plus(self, more: Counts) -> Counts:
        """Return the sum."""
        return Counts(self.conversations + more.conversations, self.messages + more.messages)

    def __str__(self) -> str:
        return f"{self.conversations:,} conversations, {self.messages:,} messages"


NONE = Counts(0, 0)


@dataclass
class AdoptReport:
    """
    What became of the originals, in numbers of conversations and messages.

    In a dry run `adopted` and `aside` are what would be adopted and quarantined.
    """

    dry_run: bool = False
    missing: list[str] = field(default_factory=list[str])
    """The original tables that do not exist."""
    originals: Counts = NONE
    """What the older system has, after the run."""
    adopted: Counts = NONE
    """What this run has adopted."""
    adopted_before: Counts = NONE
    aside: dict[str, Counts] = field(default_factory=dict[str, Counts])
    """What is quarantined, by reason, with that of earlier runs."""
    late: int = 0
    """Messages that come after others although they are older."""
    renumbered: int = 0
    """Messages that got another seq, because others came between them."""
    gone: Counts = NONE
    """What was adopted and has been deleted upstream since."""
    deleted: Counts = NONE
    """What of that was deleted from chatdb, on request."""
    deleted_in_chatdb: Counts = NONE
    """What was adopted and is no longer in chatdb."""
    changed_users: int = 0
    """Conversations that have another user than when they were adopted."""
    extra_columns: dict[str, int] = field(default_factory=dict[str, int])
    """Columns that are not copied, with how many rows have a value there."""
    remaining: Counts = NONE
    """What was written since: the next run adopts it."""
    writers: int = 0
    """Open transactions that have written to the originals: what they wrote is not visible yet."""
    seconds: float = 0.0

    @property
    def is_complete(self) -> bool:
        """Whether every original is adopted or quarantined, and no transaction is about to add one."""
        return not self.dry_run and not any(self.remaining) and not self.writers

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers and reasons as a JSON object."""
        numbers = {name: value._asdict() if isinstance(value, Counts) else value for name, value in vars(self).items()}
        reasons = [{"reason": reason, **counts._asdict()} for reason, counts in self.aside.items()]
        return numbers | {"aside": reasons, "seconds": round(self.seconds, 3), "complete": self.is_complete}

    def described(self) -> str:
        """Return the numbers and reasons as lines of text."""
        adopts, keeps = ("would adopt", "would keep aside") if self.dry_run else ("adopted", "kept aside")
        speed = f" ({self.adopted.messages / self.seconds:,.0f} messages/s)" if self.adopted.messages else ""
        took = "" if self.dry_run else f" in {self.seconds:.1f} s{speed}"
        said = [
            *((True, f"{table} is not there") for table in self.missing),
            (True, f"{adopts} {self.adopted}{took}"),
            (any(self.adopted_before), f"adopted before: {self.adopted_before}"),
            *((True, f"{keeps} {counts}: {reason}") for reason, counts in self.aside.items()),
            (self.renumbered, f"renumbered {self.renumbered:,} messages, because others came between them"),
            (self.late, f"late: {self.late:,} messages stand behind others, before which they belong by their time"),
            (any(self.gone), f"gone from the originals since they were adopted: {self.gone}"),
            (any(self.deleted), f"deleted of these: {self.deleted}"),
            (any(self.deleted_in_chatdb), f"deleted in chatdb since they were adopted: {self.deleted_in_chatdb}"),
            (
                self.changed_users,
                f"adopted under another user than they have now: {self.changed_users:,} conversations",
            ),
            *(
                (True, f"not brought over: the column {name}, which has a value in {rows:,} rows")
                for name, rows in self.extra_columns.items()
            ),
            (any(self.remaining), f"written since: {self.remaining}; run this again"),
            (self.writers, f"{self.writers:,} transactions that write to the originals have not ended; run this again"),
            (self.is_complete, f"nothing is left: the originals' {self.originals} are all adopted or kept aside"),
        ]
        return "\n".join(line for is_true, line in said if is_true)
