"""
Adopts the conversations and messages of an older system, from the schema `public`, into chatdb's own tables.

The original tables are never changed. The schema `chatdb_adopt` records what was adopted, and what does not fit and is
quarantined. So the older system can keep writing, and the next run continues a killed one.
"""

from chatdb.admin.adopt.adoption import BATCH_SIZE, adopt
from chatdb.admin.adopt.report import AdoptReport, Counts

__all__ = ["BATCH_SIZE", "AdoptReport", "Counts", "adopt"]
