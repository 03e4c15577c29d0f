"""CONTRIBUTING.md names files, names and sessions that exist, and its matrix agrees with noxfile.py and .ci/run."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.support.paths import ROOT

pytestmark = [pytest.mark.docs, pytest.mark.server_independent]

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
NOXFILE = (ROOT / "noxfile.py").read_text(encoding="utf-8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
SESSIONS = set(re.findall(r"^@nox\.session.*\n(?:@.*\n)*def (\w+)\(", NOXFILE, re.MULTILINE))
COMMANDS = [line for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S) for line in block.splitlines()]
IN_CI = {
    "least_privilege": "--role app",
    "pooler": "--pooler",
    "postgres": '"postgres(14)"',
    "chaos": "-m chaos -rP --quick",
}
"""The sessions that .ci/run runs in another way than by their names."""


def test_the_files_exist() -> None:
    """Each path on the page exists, or a pattern of it matches."""
    named = re.findall(
        r"`((?:\.ci|chatdb|sql|migrations|tests|benchmarks|docs)/[\w./*-]*|[\w.]+\.(?:md|toml|py))`", PAGE
    )
    assert len(named) > 50
    assert [name for name in named if not (any(ROOT.glob(name)) if "*" in name else (ROOT / name).exists())] == []


def test_the_names_exist() -> None:
    """Each name that the page places in a file is there."""
    text = " ".join(PAGE.split())
    placed = re.findall(r"((?:`\w+(?:\(\))?`(?:, | (?:and|or) | ))+)in `([\w./-]+)`", text)
    found = {(name, path) for names, path in placed for name in re.findall(r"\w+", re.sub(r"\b(and|or)\b", "", names))}
    assert len(found) > 20
    missing = [
        (name, path) for name, path in found if not re.search(rf"\b{name}\b", (ROOT / path).read_text(encoding="utf-8"))
    ]
    assert missing == []


def test_the_commands() -> None:
    """Each command of nox names a session, and nothing else is run but what the other tests check."""
    others = []
    for command in COMMANDS:
        named = re.search(r"\bnox (?:-R )?-s (\w+)", command)
        if named:
            assert named[1] in SESSIONS, command
        elif not re.search(r"pip install -q (nox|pre-commit)\b", command):
            others.append(command)
    assert others == [".venv/bin/pre-commit install", "cd migrations && sha256sum *.sql > SHA256SUMS"]


def test_the_checksums_command(tmp_path) -> None:
    """The command for the checksums writes the file as it is."""
    shutil.copytree(ROOT / "migrations", tmp_path / "migrations")
    (tmp_path / "migrations" / "SHA256SUMS").unlink()
    (command,) = (line for line in COMMANDS if "sha256sum" in line)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    for path in (ROOT / "migrations").iterdir():
        assert (tmp_path / "migrations" / path.name).read_bytes() == path.read_bytes()


def test_the_matrix() -> None:
    """Each session has a row, which says whether .ci/run runs it."""
    rows = re.findall(r"^\| [\w ]+ \|.*\| `nox -s (\w+)` \|[^|]*\| ([^|]*) \|$", PAGE, re.MULTILINE)
    assert sorted(session for session, _ in rows) == sorted(SESSIONS - {"schema_page"})
    commands = [line for line in CI.splitlines() if "nox" in line and not line.lstrip().startswith("#")]
    by_name = {name for line in commands for name in re.findall(r"\w+", line.partition(" -s ")[2].partition(" -- ")[0])}
    for session, in_ci in rows:
        runs = session in by_name or any(IN_CI.get(session, "\0") in line for line in commands)
        assert runs == (in_ci != "no") or session == "pythons", session


def test_the_lines() -> None:
    """No line has more than 120 characters."""
    assert [line for line in PAGE.splitlines() if len(line) > 120] == []
