"""The report of `chatdb adopt`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Counts(NamedTuple):
    """Numbers of conversations and messages."""

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
    The result of an adoption.

    In a dry run, `adopted` and `aside` count what would be adopted and quarantined.
    """

    dry_run: bool = False
    missing: list[str] = field(default_factory=list[str])
    """Original tables that do not exist."""
    originals: Counts = NONE
    """Rows in the original tables after the run."""
    adopted: Counts = NONE
    """Rows that this run adopted."""
    adopted_before: Counts = NONE
    """Rows that earlier runs adopted."""
    aside: dict[str, Counts] = field(default_factory=dict[str, Counts])
    """Quarantined rows by reason, including those of earlier runs."""
    late: int = 0
    """Messages that follow newer ones in `seq` order."""
    renumbered: int = 0
    """Messages that got a new `seq` because older ones were inserted before them."""
    gone: Counts = NONE
    """Adopted rows that have since been deleted upstream."""
    deleted: Counts = NONE
    """Rows of `gone` deleted from chatdb on request."""
    deleted_in_chatdb: Counts = NONE
    """Adopted rows that are no longer in chatdb."""
    changed_users: int = 0
    """Conversations whose user changed upstream after they were adopted."""
    extra_columns: dict[str, int] = field(default_factory=dict[str, int])
    """Columns that are not copied, with the number of values in them."""
    remaining: Counts = NONE
    """Rows written since the run began; the next run adopts them."""
    writers: int = 0
    """Open transactions that have written to the original tables."""
    seconds: float = 0.0

    @property
    def is_complete(self) -> bool:
        """Whether all original rows are adopted or quarantined and no open transaction can add one."""
        return not self.dry_run and not any(self.remaining) and not self.writers

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        numbers = {name: value._asdict() if isinstance(value, Counts) else value for name, value in vars(self).items()}
        reasons = [{"reason": reason, **counts._asdict()} for reason, counts in self.aside.items()]
        return numbers | {"aside": reasons, "seconds": round(self.seconds, 3), "complete": self.is_complete}

    def described(self) -> str:
        """Return the report as text."""
        adopts, keeps = ("would adopt", "would quarantine") if self.dry_run else ("adopted", "quarantined")
        speed = f" ({self.adopted.messages / self.seconds:,.0f} messages/s)" if self.adopted.messages else ""
        took = "" if self.dry_run else f" in {self.seconds:.1f} s{speed}"
        said = [
            *((True, f"{table} does not exist") for table in self.missing),
            (True, f"{adopts} {self.adopted}{took}"),
            (any(self.adopted_before), f"adopted by earlier runs: {self.adopted_before}"),
            *((True, f"{keeps} {counts}: {reason}") for reason, counts in self.aside.items()),
            (self.renumbered, f"renumbered {self.renumbered:,} messages: older ones were inserted before them"),
            (self.late, f"late: {self.late:,} messages are older than messages with a lower seq"),
            (any(self.gone), f"deleted from the original tables since they were adopted: {self.gone}"),
            (any(self.deleted), f"of these, deleted from chatdb: {self.deleted}"),
            (any(self.deleted_in_chatdb), f"deleted in chatdb since they were adopted: {self.deleted_in_chatdb}"),
            (
                self.changed_users,
                f"assigned to another user since they were adopted: {self.changed_users:,} conversations",
            ),
            *(
                (True, f"not copied: the column {name}, which has a value in {rows:,} rows")
                for name, rows in self.extra_columns.items()
            ),
            (any(self.remaining), f"written since this run began: {self.remaining}; run this again"),
            (self.writers, f"{self.writers:,} open transactions have written to the original tables; run this again"),
            (self.is_complete, f"nothing is left: all {self.originals} are adopted or quarantined"),
        ]
        return "\n".join(line for is_true, line in said if is_true)
