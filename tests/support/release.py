"""
Check that a release is consistent. The nox session `release` runs this module, which uses only the standard library.

    python -m tests.support.release source             version, changelog, tag and working tree
    python -m tests.support.release archives DIST      contents of the sdist and the wheel in DIST
    python -I tests/support/release.py installed VERSION    the wheel, in an environment that has nothing else
"""

from __future__ import annotations

import email
import hashlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from datetime import date
from pathlib import Path, PurePosixPath

HEADING = re.compile(r"^## (?P<version>\S+) \((?P<released>[^)]*)\)$")
NOT_IN_SDIST = (".ci/", ".github/")
REQUIRED_IN_WHEEL = (
    "_chatdb_entry.py",
    "chatdb/__init__.py",
    "chatdb/py.typed",
    "chatdb/migrations/SHA256SUMS",
    "chatdb/sql/append_message.sql",
    "chatdb/sql/adopt/100_find_columns.sql",
    "chatdb/sql/transfer/count_user.sql",
)
REQUIRED_IN_SDIST = ("CHANGELOG.md", "LICENSE", "README.md", "migrations/SHA256SUMS", "pyproject.toml")
PRIVATE = re.compile(
    r"(^|/)(\.env[^/]*|\.git|\.venv|\.nox|\.cache|\.benchmarks|__pycache__|id_[a-z0-9]+|[^/]+\.(pem|key|pyc|log))(/|$)"
)
CORE = ("asyncpg", "pydantic")
EXTRAS = ("dotenv", "platformdirs", "psycopg", "psycopg2", "rich", "sqlparse", "typer", "yoyo")


def version_problems(version: str, changelog: str, tags: list[str]) -> list[str]:
    """
    Return the inconsistencies between the version, the changelog and the tags on HEAD.

    The newest heading names the version. With a tag on HEAD it also has a date; otherwise it may say `unreleased`.
    """
    problems = [f"the tag {tag} is on HEAD, but the version is {version}" for tag in tags if tag != f"v{version}"]
    newest = next((line for line in changelog.splitlines() if line.startswith("## ")), "")
    heading = HEADING.match(newest)
    if heading is None:
        return [*problems, f"CHANGELOG.md: the newest heading is {newest!r}, not '## {version} (unreleased or a date)'"]
    if heading["version"] != version:
        problems.append(f"CHANGELOG.md: the newest heading names {heading['version']}, but the version is {version}")
    if heading["released"] == "unreleased":
        if tags:
            problems.append("CHANGELOG.md: the newest heading says unreleased, but HEAD has a tag: write the date")
    elif not _is_date(heading["released"]):
        problems.append(f"CHANGELOG.md: {heading['released']!r} is neither 'unreleased' nor a date such as 2026-01-31")
    if changelog.count("(unreleased)") > newest.count("(unreleased)"):
        problems.append("CHANGELOG.md: only the newest heading may say unreleased")
    return problems


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def source_problems(root: Path) -> tuple[list[str], list[str]]:
    """Return the problems of a checkout, and notes on what is uncommitted or not checked."""
    version = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("version")
    if version is None:
        return ["pyproject.toml has no project.version"], []
    tags = [tag for tag in _git(root, "tag", "--points-at", "HEAD") if re.match(r"v\d", tag)]
    problems = version_problems(version, (root / "CHANGELOG.md").read_text(encoding="utf-8"), tags)
    changed = _git(root, "status", "--porcelain")
    notes: list[str] = []
    if not tags:
        notes.append(f"HEAD has no tag: v{version} and the date in the changelog are not checked")
        notes += [f"uncommitted: {line}" for line in changed]
    else:
        problems += [f"uncommitted, and HEAD has the tag {tags[0]}: {line}" for line in changed]
    return problems, notes


def _git(root: Path, *arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"release: this is not a git checkout, or git failed: {done.stderr.strip()}")
    return done.stdout.splitlines()


def archive_problems(dist: Path, version: str, tracked: list[str]) -> list[str]:
    """Return what is wrong with the archives in a folder: one sdist and one wheel, made from the tracked files."""
    sdist, wheel = f"chatdb-{version}.tar.gz", f"chatdb-{version}-py3-none-any.whl"
    found = sorted(path.name for path in dist.iterdir())
    if found != sorted([sdist, wheel]):
        return [f"the folder has {', '.join(found) or 'nothing'}, not {sdist} and {wheel}"]
    with tarfile.open(dist / sdist) as archive:
        names = [PurePosixPath(member.name).parts for member in archive if not member.isdir()]
    problems = sdist_problems({"/".join(parts[1:]) for parts in names}, tracked)
    with zipfile.ZipFile(dist / wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    return problems + wheel_problems(files, version, tracked)


def sdist_problems(names: set[str], tracked: list[str]) -> list[str]:
    """Return the files that an sdist lacks, and those that do not belong there."""
    expected = {name for name in tracked if not name.startswith(NOT_IN_SDIST)} | {"PKG-INFO"} | {*REQUIRED_IN_SDIST}
    return _differences("sdist", names, expected)


def wheel_problems(files: dict[str, bytes], version: str, tracked: list[str]) -> list[str]:
    """Return the files that a wheel lacks or should not have, and errors in its metadata and checksums."""
    info = f"chatdb-{version}.dist-info"
    expected = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")}
    expected |= {name for name in tracked if name.startswith("chatdb/")} | {*REQUIRED_IN_WHEEL}
    expected |= {f"chatdb/{name}" for name in tracked if name.startswith(("sql/", "migrations/"))}
    problems = _differences("wheel", set(files), expected)
    metadata = email.message_from_bytes(files.get(f"{info}/METADATA", b""))
    if metadata["Version"] != version:
        problems.append(f"wheel: METADATA has version {metadata['Version']}, not {version}")
    if b"chatdb = _chatdb_entry:main" not in files.get(f"{info}/entry_points.txt", b""):
        problems.append("wheel: entry_points.txt does not define the command chatdb")
    for line in files.get("chatdb/migrations/SHA256SUMS", b"").decode().splitlines():
        digest, name = line.split()
        if hashlib.sha256(files.get(f"chatdb/migrations/{name}", b"")).hexdigest() != digest:
            problems.append(f"wheel: chatdb/migrations/{name} differs from SHA256SUMS")
    return problems


def _differences(archive: str, names: set[str], expected: set[str]) -> list[str]:
    unwanted = {name for name in names if name not in expected or PRIVATE.search(name)}
    return [
        *(f"{archive}: {name} is missing" for name in sorted(expected - names)),
        *(f"{archive}: {name} does not belong there" for name in sorted(unwanted)),
    ]


def installed_problems(version: str) -> list[str]:
    """Return what is wrong with chatdb as installed in the environment of this Python, without any extra."""
    import chatdb

    problems: list[str] = []
    package = Path(chatdb.__file__).parent
    if not package.is_relative_to(sys.prefix):
        problems.append(f"chatdb comes from {package}, not from the environment")
    versions = {chatdb.__version__, importlib.metadata.version("chatdb")}
    if versions != {version}:
        problems.append(f"the installed version is {' and '.join(sorted(versions))}, not {version}")
    problems += [
        f"{name} does not exist" for name in chatdb.__all__ if name != "open_embedded" and name not in dir(chatdb)
    ]
    required = importlib.metadata.requires("chatdb") or []
    core = sorted(re.split(r"[^\w.-]", line)[0] for line in required if "extra ==" not in line)
    if core != sorted(CORE):
        problems.append(f"the core depends on {', '.join(core)}, not on {' and '.join(CORE)}")
    problems += [f"{name} is installed, although no extra is" for name in EXTRAS if importlib.util.find_spec(name)]
    if not (package / "py.typed").is_file() or not any((package / "sql").glob("*.sql")):
        problems.append("py.typed or the SQL files are not installed")
    return problems


def main(command: str, *arguments: str) -> None:
    """Run a check; print notes, and exit with a line for each problem."""
    root = Path(__file__).parents[2]
    notes: list[str] = []
    if command == "source":
        problems, notes = source_problems(root)
    elif command == "archives":
        version = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
        problems = archive_problems(Path(arguments[0]), version, _git(root, "ls-files"))
    else:
        problems = installed_problems(*arguments)
    for note in notes:
        print(f"release: {note}")
    if problems:
        sys.exit("\n".join(f"release: {problem}" for problem in problems))
    print(f"release: {command}: no problems")


if __name__ == "__main__":
    main(*sys.argv[1:])
