"""
Adopts the conversations and messages of an older system, which are in the schema `public`, into chatdb's own tables.

The originals are read and never changed. What was adopted, and what does not fit and is quarantined, is recorded in the
schema `chatdb_adopt`, so the older system can go on writing, and the next run continues one that was killed.
"""

from chatdb.admin.adopt.adoption import BATCH_SIZE, adopt
from chatdb.admin.adopt.report import AdoptReport, Counts

__all__ = ["BATCH_SIZE", "AdoptReport", "Counts", "adopt"]
