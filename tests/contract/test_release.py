"""The release checks find what is wrong, the version has one source, and pre-commit runs what nox runs."""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import chatdb
from tests.support.paths import ROOT
from tests.support.release import archive_problems, sdist_problems, source_problems, version_problems, wheel_problems

pytestmark = pytest.mark.server_independent

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CHANGELOG = "# Changelog\n\n## 1.2.0 ({released})\n\n### Added\n\n## 1.1.0 (2026-01-31)\n"


def test_the_version_has_one_source() -> None:
    """`chatdb.__version__` and `chatdb --version` report the version of pyproject.toml, which no module repeats."""
    version = PROJECT["project"]["version"]
    assert chatdb.__version__ == version
    done = subprocess.run([sys.executable, "-m", "chatdb", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"chatdb {version}\n"
    for path in (ROOT / "chatdb").rglob("*.py"):
        assert version not in path.read_text(encoding="utf-8"), path


def test_the_version_costs_nothing_at_import() -> None:
    """Importing chatdb does not read the metadata of its distribution."""
    program = "import chatdb; print('__version__' in vars(chatdb))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_this_checkout_is_consistent() -> None:
    """The version and the changelog of this checkout agree."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert version_problems(PROJECT["project"]["version"], changelog, []) == []


@pytest.mark.parametrize(("released", "tags"), [("unreleased", []), ("2026-03-01", []), ("2026-03-01", ["v1.2.0"])])
def test_agreement(released: str, tags: list[str]) -> None:
    """Without a tag the changelog may have a date or not, with one it has."""
    assert version_problems("1.2.0", CHANGELOG.format(released=released), tags) == []


@pytest.mark.parametrize(
    ("version", "changelog", "tags", "problem"),
    [
        ("1.2.0", CHANGELOG.format(released="unreleased"), ["v1.2.0"], "says unreleased, but HEAD has a tag"),
        ("1.2.0", CHANGELOG.format(released="2026-03-01"), ["v1.1.0"], "the tag v1.1.0 is on HEAD, but the version"),
        ("1.2.0", CHANGELOG.format(released="2026-03-01"), ["v1.2.0", "v1.2"], "the tag v1.2 is on HEAD"),
        ("1.3.0", CHANGELOG.format(released="unreleased"), [], "the newest heading names 1.2.0"),
        ("1.2.0", CHANGELOG.format(released="1 March 2026"), [], "neither 'unreleased' nor a date"),
        ("1.2.0", CHANGELOG.format(released="20260301"), [], "neither 'unreleased' nor a date"),
        ("1.2.0", CHANGELOG.format(released="2026-02-30"), [], "neither 'unreleased' nor a date"),
        ("1.2.0", "# Changelog\n\n## [Unreleased]\n", [], "the newest heading is '## [Unreleased]'"),
        ("1.2.0", "# Changelog\n", [], "the newest heading is ''"),
        ("1.2.0", CHANGELOG.format(released="2026-03-01") + "## 1.0.0 (unreleased)\n", [], "only the newest heading"),
    ],
)
def test_disagreement(version: str, changelog: str, tags: list[str], problem: str) -> None:
    """Each disagreement is the only problem, and is named."""
    (found,) = version_problems(version, changelog, tags)
    assert problem in found


def git(root: Path, *arguments: str) -> None:
    """Run git without the user's settings."""
    settings = ("-c", "user.name=test", "-c", "user.email=", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false")
    subprocess.run(["git", *settings, *arguments], cwd=root, check=True, capture_output=True)


def test_the_tag_and_the_tree(tmp_path: Path) -> None:
    """Without a tag an uncommitted change is named, with a tag it is refused; a tag on another commit is ignored."""
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG.format(released="2026-03-01"))
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "First")
    git(tmp_path, "tag", "v1.1.0")
    git(tmp_path, "commit", "-qm", "Second", "--allow-empty")
    problems, (note,) = source_problems(tmp_path)
    assert problems == []
    assert "HEAD has no tag" in note
    (tmp_path / "notes.txt").write_text("")
    problems, notes = source_problems(tmp_path)
    assert problems == []
    assert notes[1:] == ["uncommitted: ?? notes.txt"]
    git(tmp_path, "tag", "-a", "v1.2.0", "-m", "1.2.0")
    git(tmp_path, "tag", "nightly")
    assert source_problems(tmp_path) == (["uncommitted, and HEAD has the tag v1.2.0: ?? notes.txt"], [])
    (tmp_path / "notes.txt").unlink()
    assert source_problems(tmp_path) == ([], [])
    (tmp_path / "pyproject.toml").write_text('[project]\ndynamic = ["version"]\n')
    assert source_problems(tmp_path) == (["pyproject.toml has no project.version"], [])


TRACKED = [
    *(".ci/run", "CHANGELOG.md", "LICENSE", "README.md", "_chatdb_entry.py", "chatdb/__init__.py", "chatdb/py.typed"),
    *("migrations/0001.sql", "migrations/SHA256SUMS", "pyproject.toml", "tests/conftest.py"),
    *("sql/append_message.sql", "sql/adopt/100_find_columns.sql", "sql/transfer/count_user.sql"),
]
SDIST = {*TRACKED, "PKG-INFO"} - {".ci/run"}
WHEEL = {
    "_chatdb_entry.py": b"",
    "chatdb/__init__.py": b"",
    "chatdb/py.typed": b"",
    "chatdb/migrations/0001.sql": b"select",
    "chatdb/migrations/SHA256SUMS": hashlib.sha256(b"select").hexdigest().encode() + b"  0001.sql\n",
    "chatdb/sql/append_message.sql": b"",
    "chatdb/sql/adopt/100_find_columns.sql": b"",
    "chatdb/sql/transfer/count_user.sql": b"",
    "chatdb-1.2.0.dist-info/METADATA": b"Name: chatdb\nVersion: 1.2.0\n",
    "chatdb-1.2.0.dist-info/RECORD": b"",
    "chatdb-1.2.0.dist-info/WHEEL": b"",
    "chatdb-1.2.0.dist-info/entry_points.txt": b"[console_scripts]\nchatdb = _chatdb_entry:main\n",
    "chatdb-1.2.0.dist-info/licenses/LICENSE": b"",
}


def test_no_git(tmp_path: Path) -> None:
    """Outside a git checkout the check ends with a sentence."""
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.0"\n')
    with pytest.raises(SystemExit, match="not a git checkout"):
        source_problems(tmp_path)


def test_good_archives() -> None:
    """Archives that hold what git tracks are in order."""
    assert sdist_problems(SDIST, TRACKED) == []
    assert wheel_problems(WHEEL, "1.2.0", TRACKED) == []


@pytest.mark.parametrize("name", sorted(SDIST))
def test_a_file_is_missing_in_the_sdist(name: str) -> None:
    """Each tracked file is in the sdist."""
    assert sdist_problems(SDIST - {name}, TRACKED) == [f"sdist: {name} is missing"]


@pytest.mark.parametrize("name", [".ci/run", "notes.txt", ".env", "tests/__pycache__/a.pyc"])
def test_a_stray_file_in_the_sdist(name: str) -> None:
    """Nothing else is in the sdist."""
    assert sdist_problems(SDIST | {name}, TRACKED) == [f"sdist: {name} does not belong there"]


@pytest.mark.parametrize("name", ["chatdb/.env", "chatdb/server.key", "chatdb/id_ed25519"])
def test_a_secret_that_is_tracked(name: str) -> None:
    """A file that looks private is refused even if it is tracked."""
    assert sdist_problems(SDIST | {name}, [*TRACKED, name]) == [f"sdist: {name} does not belong there"]
    assert wheel_problems(WHEEL | {name: b""}, "1.2.0", [*TRACKED, name]) == [f"wheel: {name} does not belong there"]


@pytest.mark.parametrize("name", sorted(WHEEL))
def test_a_file_is_missing_in_the_wheel(name: str) -> None:
    """Each file of the wheel is required."""
    left = {other: content for other, content in WHEEL.items() if other != name}
    assert f"wheel: {name} is missing" in wheel_problems(left, "1.2.0", TRACKED)


def test_files_that_are_required_whether_tracked_or_not() -> None:
    """A file that was deleted from git by mistake is missing all the same."""
    assert "sdist: LICENSE is missing" in sdist_problems(SDIST - {"LICENSE"}, [])
    for name in (
        "_chatdb_entry.py",
        "chatdb/py.typed",
        "chatdb/migrations/SHA256SUMS",
        "chatdb/sql/append_message.sql",
    ):
        assert f"wheel: {name} is missing" in wheel_problems({}, "1.2.0", [])


@pytest.mark.parametrize("name", ["tests/conftest.py", "chatdb/tests/conftest.py", ".ci/run", "noxfile.py"])
def test_a_stray_file_in_the_wheel(name: str) -> None:
    """Nothing but the package is in the wheel."""
    assert wheel_problems(WHEEL | {name: b""}, "1.2.0", TRACKED) == [f"wheel: {name} does not belong there"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("chatdb-1.2.0.dist-info/METADATA", b"Version: 1.1.0\n", "METADATA has version 1.1.0, not 1.2.0"),
        ("chatdb-1.2.0.dist-info/entry_points.txt", b"", "does not define the command chatdb"),
        ("chatdb/migrations/0001.sql", b"edited", "chatdb/migrations/0001.sql differs from SHA256SUMS"),
    ],
)
def test_a_wrong_file_in_the_wheel(name: str, content: bytes, problem: str) -> None:
    """The metadata, the entry point and the checksums of the migrations are checked."""
    (found,) = wheel_problems(WHEEL | {name: content}, "1.2.0", TRACKED)
    assert problem in found


def test_the_folder_of_archives(tmp_path: Path) -> None:
    """The folder holds one sdist and one wheel of this version, and nothing of an earlier build."""
    assert "has nothing, not chatdb-1.2.0.tar.gz" in archive_problems(tmp_path, "1.2.0", TRACKED)[0]
    (tmp_path / "chatdb-1.1.0.tar.gz").write_bytes(b"")
    assert "has chatdb-1.1.0.tar.gz, not" in archive_problems(tmp_path, "1.2.0", TRACKED)[0]


def test_the_session_never_uploads() -> None:
    """`nox -s release` runs the checks, and no command that uploads."""
    source = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    (session,) = (
        node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "release"
    )
    words = {node.value for node in ast.walk(session) if isinstance(node, ast.Constant)}
    assert {"source", "archives", "installed", "twine", "check", "--strict"} <= words
    assert "upload" not in words


def test_pre_commit_runs_the_linters() -> None:
    """The hooks are the commands of `nox -s lint` and `nox -s types`, with the tools of the group `lint`."""
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    (value,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["LINTERS"]
    )
    linters = [" ".join(command) for command in ast.literal_eval(value)]
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (repository,) = config["repos"]
    assert repository["repo"] == "local"
    hooks = repository["hooks"]
    assert [hook["entry"] for hook in hooks] == [*linters, "nox -s types"]
    assert hooks[-1]["stages"] == ["pre-push"]
    tools = {each for each in PROJECT["dependency-groups"]["lint"] if isinstance(each, str)}
    for hook in hooks[:-1]:
        assert {*hook["additional_dependencies"]} < tools
        assert hook["pass_filenames"] is False
