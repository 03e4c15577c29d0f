"""The roles of docs/explanation/security.md, created by the SQL on that page, with names for this test run."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.support.paths import ROOT

GUIDE = (ROOT / "docs" / "explanation" / "security.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Roles:
    """The names of the roles, and of a migrated database that belongs to the owner."""

    owner: str
    app: str
    reader: str
    database: str

    def blocks(self, database: str | None = None) -> list[list[str]]:
        """Return the statements of each SQL block: as a superuser, as a superuser in the database, as the owner."""
        names = {"chatdb_owner": self.owner, "chatdb_app": self.app, "chatdb_reader": self.reader}
        names["chat"] = database or self.database
        sql = re.findall(r"^```sql\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
        renamed = [re.sub(r"\bchat(db_(owner|app|reader))?\b", lambda found: names[found[0]], block) for block in sql]
        return [[statement.strip() for statement in block.split(";") if statement.strip()] for block in renamed]

    def on_database(self, database: str) -> list[str]:
        """Return the statements on the database itself, which a clone does not inherit."""
        return [statement for statement in self.blocks(database)[0] if " on database " in statement]
