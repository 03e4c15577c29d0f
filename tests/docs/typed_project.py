"""
Writes a project that uses chatdb the documented ways, for type checkers to read: `python typed_project.py FOLDER`.

With `--pages FOLDER`, it writes the pages of the tutorial, the how-to and the reference instead. Otherwise it is
the files in `typed/`, the Python blocks of the documents, and the pages that use only chatdb. Nothing but chatdb and
the checkers is installed beside it, so that a type which depends on asyncpg-stubs is found.
"""

import re
import shutil
import sys
from pathlib import Path

PAGES = ("tutorial", "howto", "reference")
"""The folders of pages that are checked as a whole, in `nox -s types`: they use more packages than chatdb."""
HERE = Path(__file__).resolve().parent
DOCUMENTS = ("README.md", "docs/explanation/security.md", "docs/operations/replicas.md")
ALONE = {
    *(f"howto_{name}" for name in ("concurrent_writes", "context", "conversations", "late_answers", "messages")),
    *(f"howto_{name}" for name in ("move_user", "retries", "search", "streaming_worker", "transactions", "watch")),
    *(f"reference_{name}" for name in ("branches", "conversations", "errors", "messages", "streaming", "users")),
}
"""The pages that use only chatdb, and nothing that is Any."""
WRAPPER = '''"""A part of a document, in a function that has what it uses."""
# pyright: reportUnusedVariable=false
import chatdb


async def part(db: chatdb.Pool, chat: chatdb.Conversation, user: str, number: int, text: str) -> None:
'''
SETTINGS = """\
[tool.mypy]
strict = true
disallow_any_expr = true

[tool.pyright]
typeCheckingMode = "strict"
"""


def blocks() -> dict[str, str]:
    """Return the Python blocks of the documents, each as a module by its name."""
    modules: dict[str, str] = {}
    for document in DOCUMENTS:
        path = HERE.parent.parent / document
        found = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        for number, block in enumerate(found, 1):
            if "async def " not in block:
                block = WRAPPER + re.sub(r"^(?=.)", "    ", block, flags=re.MULTILINE)
            if "fastapi" in block or "json.loads(" in block:
                block = "# mypy: disallow-any-expr=False\n" + block  # app.state and what JSON holds are Any
            modules[f"{path.stem.lower()}_{number}"] = block
    return modules


def pages() -> dict[str, str]:
    """Return the Python blocks of each page as one module, and the files that the pages tell to write."""
    modules: dict[str, str] = {}
    for path in sorted(path for name in PAGES for path in (HERE.parent.parent / "docs" / name).glob("*.md")):
        if path.stem in {"testing", "celery", "django", "scripts", "starlette", "structlog"}:
            continue  # tests of pytest without annotations, as most are; and frameworks, which nox -s example runs
        found = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        lines = ["# pyright: reportUnusedVariable=false"]
        lines += ["import asyncio"] if "asyncio." in "".join(found) else []
        lines += ["import chatdb", "async def page(db: chatdb.Pool) -> None:"]
        head = len(lines)
        for block in found:
            file = re.match(r"# (?:add to )?(\w+)\.py\n", block)
            if file:
                modules[file[1]] = modules.get(file[1], "") + block
            else:
                lines += [f"    {line}" for line in block.splitlines()]
        if len(lines) > head:
            modules[f"{path.parent.name}_{re.sub(r'[^a-z]', '_', path.stem)}"] = "\n".join(lines) + "\n"
    return modules


def write(folder: Path) -> None:
    """Write the project into a folder."""
    shutil.copytree(HERE / "typed", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    alone = {name: text for name, text in pages().items() if name in ALONE}
    for name, text in (blocks() | alone).items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    (folder / "pyproject.toml").write_text(SETTINGS, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--pages":
        for name, text in pages().items():
            (Path(sys.argv[2]) / f"{name}.py").write_text(text, encoding="utf-8")
    else:
        write(Path(sys.argv[1]))
