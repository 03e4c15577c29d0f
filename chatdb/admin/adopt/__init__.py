"""
Adopts the conversations and messages of an older system, from the schema `public`, into chatdb's own tables.

The original tables are never changed. The schema `chatdb_adopt` records the rows that were adopted, and those that do
not fit and are quarantined. The older system can therefore keep writing, and each run continues where the last one
stopped, even if that one was killed.
"""

from chatdb.admin.adopt.adoption import BATCH_SIZE, adopt
from chatdb.admin.adopt.report import AdoptReport, Counts

__all__ = ["BATCH_SIZE", "AdoptReport", "Counts", "adopt"]
