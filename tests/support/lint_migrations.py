"""Run squawk on the migrations: those with `-- transactional: false` outside a transaction, the others inside one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Return 1 if squawk finds anything."""
    files = sorted(Path("migrations").glob("*.sql"))
    outside = [path for path in files if "-- transactional: false" in path.read_text(encoding="utf-8")]
    inside = [path for path in files if path not in outside]
    groups = (("--no-assume-in-transaction", outside), ("--assume-in-transaction", inside))
    return max(subprocess.call(["squawk", option, *map(str, paths)]) for option, paths in groups if paths)


if __name__ == "__main__":
    sys.exit(main())
