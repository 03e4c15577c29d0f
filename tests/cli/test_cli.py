"""Behavior and output of the commands."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from chatdb import (
    append_message,
    create_conversation,
    create_pool,
    delete_message,
    switch_branch,
    update_conversation,
)
from chatdb._core.dsn import database_of
from chatdb.cli import data
from chatdb.cli.data import Format
from chatdb.transfer import tables
from chatdb.transfer.files import FORMATS
from tests.support.command import PROGRAM, chatdb, chatdb_process, environment, on_a_terminal
from tests.support.databases import execute

pytestmark = pytest.mark.server_independent

SHAREGPT = [
    {
        "id": "a",
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": "gpt", "value": "Hello! 👋 :smile: [bold]\x1b[31m"},
        ],
    },
    {"id": "b", "conversations": []},
]


@pytest.fixture
def env(dsn: str) -> dict[str, str]:
    """Return the environment of a service with a migrated database."""
    return {"DATABASE_URL": dsn}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a ShareGPT file."""
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(SHAREGPT), encoding="utf-8")
    return path


def test_import_list_show_export(env: dict[str, str], file: Path, tmp_path: Path) -> None:
    """An imported file is listed, shown, exported, and imported again unchanged."""
    said = chatdb_process("import", file, "--user", "alice", env=env)
    assert "imported 1 conversations, 2 messages" in said
    assert "skipped 1 conversations, 0 messages: no messages" in said
    (listed,) = json.loads(chatdb("list", "--user", "alice", "--json", env=env))
    assert listed["last_seq"] == 2
    assert chatdb("list", "--user", "alice", env=env).splitlines()[1].startswith(f"{listed['id']}\t")
    shown = chatdb("show", str(listed["id"]), "--user", "alice", env=env)
    assert "#1 user" in shown
    assert "Hello! 👋 :smile: [bold]\N{REPLACEMENT CHARACTER}[31m" in shown, "a pager is a terminal behind a pipe"
    last = chatdb("show", str(listed["id"]), "--user", "alice", "--last", "1", "--json", env=env)
    assert [json.loads(line)["type"] for line in last.splitlines()] == ["conversation", "message"]

    lines = chatdb("export", "--user", "alice", env=env)
    out = tmp_path / "alice.jsonl"
    chatdb("export", "--user", "alice", "--output", out, env=env)
    assert out.read_text(encoding="utf-8") == lines
    assert list(tmp_path.iterdir()) == [file, out] or set(tmp_path.iterdir()) == {file, out}
    report = json.loads(chatdb("import", out, "--user", "bob", "--json", env=env))
    assert (report["conversations"], report["messages"], report["skipped"]) == (1, 2, [])
    report = json.loads(chatdb("import", out, "--user", "bob", "--json", env=env))
    assert (report["stored_conversations"], report["messages"]) == (1, 0)


async def branched(dsn: str) -> str:
    """Store a conversation with an edited question and three answers, and return its ID."""
    async with create_pool(dsn) as db:
        made = await create_conversation(db, user_id="alice", title="t")
        at = {"user_id": "alice", "conversation_id": made.id}
        for text, parent in [("q", None), ("a", None), ("b", 1), ("c", None), ("q2", 0), ("d", None), ("e", 1)]:
            await append_message(db, **at, role="user", content=text, parent_seq=parent)
        await switch_branch(db, **at, seq=3)
        return str(made.id)


async def without(dsn: str, conversation: int, *seqs: int) -> None:
    """Delete messages of a conversation."""
    async with create_pool(dsn) as db:
        for seq in seqs:
            await delete_message(db, user_id="alice", conversation_id=conversation, seq=seq)


def shown(conversation: str, *options: str, env: dict[str, str]) -> list[str]:
    """Return what `chatdb show` prints of each message, in one line and without the times."""
    lines = chatdb("show", conversation, "--user", "alice", *options, env=env).splitlines()
    assert lines[:2] == [f"conversation {conversation}: t", ""]
    titles = [" ".join(line.split()[:2] + line.split()[4:]) for line in lines[2::3]]
    return [f"{title}: {text}" for title, text in zip(titles, lines[3::3], strict=True)]


def test_show_branches(env: dict[str, str]) -> None:
    """The log says what a message follows; --branch and --versions show the current line."""
    made = asyncio.run(branched(env["DATABASE_URL"]))
    log = ["#1 user: q", "#2 user: a", "#3 user after #1: b", "#4 user: c"]
    log += ["#5 user first message: q2", "#6 user: d", "#7 user after #1: e"]
    assert shown(made, env=env) == log
    for last in (5, 3, 1):
        assert shown(made, "--last", str(last), env=env) == log[-last:]
    assert shown(made, "--branch", env=env) == ["#1 user: q", "#3 user: b", "#4 user: c"]
    assert shown(made, "--branch", "--last", "2", env=env) == ["#3 user: b", "#4 user: c"]
    asyncio.run(without(env["DATABASE_URL"], int(made), 4, 6))
    assert shown(made, env=env) == [log[0], log[1], log[2], log[4], log[6]]
    asyncio.run(without(env["DATABASE_URL"], int(made), 2))
    assert shown(made, env=env)[:2] == ["#1 user: q", "#3 user: b"], "it follows the one before it"
    assert shown(made, "--versions", env=env) == ["#1 user 1 of 2: #1, #5: q", "#3 user 1 of 2: #3, #7: b"]


def test_show_versions(env: dict[str, str]) -> None:
    """Each message of the current line that has versions says which one it is, and lists all."""
    made = asyncio.run(branched(env["DATABASE_URL"]))
    versions = ["#1 user 1 of 2: #1, #5: q", "#3 user 2 of 3: #2, #3, #7: b", "#4 user: c"]
    assert shown(made, "--versions", env=env) == versions
    assert shown(made, "--versions", "--branch", "--last", "2", env=env) == versions[1:]


def test_show_branches_as_json(env: dict[str, str]) -> None:
    """The lines are those of an export, for the messages that are shown; --versions adds the versions."""
    made = asyncio.run(branched(env["DATABASE_URL"]))
    _, head, *messages, _ = chatdb("export", "--user", "alice", env=env).splitlines()
    line = [messages[seq - 1] for seq in (1, 3, 4)]
    assert chatdb("show", made, "--user", "alice", "--json", env=env).splitlines() == [head, *messages]
    assert chatdb("show", made, "--user", "alice", "--branch", "--json", env=env).splitlines() == [head, *line]
    wanted = [json.loads(each) for each in line]
    wanted[0]["versions"], wanted[1]["versions"] = [1, 5], [2, 3, 7]
    found = chatdb("show", made, "--user", "alice", "--versions", "--json", env=env).splitlines()
    assert [json.loads(each) for each in found] == [json.loads(head), *wanted]


@pytest.mark.parametrize("page", [1, 2, 3, 5])
def test_show_a_line_of_several_pages(env: dict[str, str], monkeypatch: pytest.MonkeyPatch, page: int) -> None:
    """The pages come oldest first, whatever their length."""
    made = asyncio.run(branched(env["DATABASE_URL"]))
    whole = shown(made, "--versions", env=env)
    monkeypatch.setattr(data, "_PAGE", page)
    assert shown(made, "--versions", env=env) == whole
    assert shown(made, "--branch", env=env) == ["#1 user: q", "#3 user: b", "#4 user: c"]


def test_show_a_line_without_messages(env: dict[str, str]) -> None:
    """A conversation without messages has a line without messages."""

    async def store() -> int:
        async with create_pool(env["DATABASE_URL"]) as db:
            made = await create_conversation(db, user_id="alice", title="t")
            return made.id

    made = asyncio.run(store())
    for options in ((), ("--branch",), ("--versions", "--last", "1")):
        assert chatdb("show", str(made), "--user", "alice", *options, env=env) == f"conversation {made}: t\n"


def test_list_shows_and_selects_archived_conversations(env: dict[str, str]) -> None:
    """`chatdb list` leaves out archived conversations, unless --archived or --all selects them, and shows states."""

    async def store() -> None:
        async with create_pool(env["DATABASE_URL"]) as db:
            for title, flags in (("a", {}), ("b", {"archived": True}), ("c", {"archived": True, "pinned": True})):
                made = await create_conversation(db, user_id="alice", title=title)
                await update_conversation(db, user_id="alice", conversation_id=made.id, **flags)
            made = await create_conversation(db, user_id="alice", title="d")
            await update_conversation(db, user_id="alice", conversation_id=made.id, pinned=True)

    def listed(*options: str) -> list[tuple[str, ...]]:
        lines = chatdb("list", "--user", "alice", *options, env=env).splitlines()
        assert lines[0].split("\t") == ["id", "last activity (UTC)", "last seq", "state", "title or key"]
        return [tuple(line.split("\t")[3:]) for line in lines[1:]]

    asyncio.run(store())
    assert listed() == [("pinned", "d"), ("", "a")]
    assert listed("--archived") == [("pinned, archived", "c"), ("archived", "b")]
    assert listed("--all") == [("pinned", "d"), ("pinned, archived", "c"), ("archived", "b"), ("", "a")]
    lines = json.loads(chatdb("list", "--user", "alice", "--archived", "--json", env=env))
    assert [(line["title"], line["archived_at"] is None, line["pinned_at"] is None) for line in lines] == [
        ("c", False, False),
        ("b", False, True),
    ]
    said = chatdb_process("list", "--user", "alice", "--archived", "--all", env=env, code=2)
    assert "pass --archived or --all, not both" in said


def test_a_terminal_shows_texts_as_they_are(env: dict[str, str]) -> None:
    """Markup and cursor controls in a title or text are printed, not interpreted."""
    title, text = "[red]x[/red] [/y] :a:", "[bold]text[/z]\x1b[31m"

    async def store() -> int:
        async with create_pool(env["DATABASE_URL"]) as db:
            made = await create_conversation(db, user_id="alice", title=title)
            await append_message(db, user_id="alice", conversation_id=made.id, role="user", content=text)
            return made.id

    made = asyncio.run(store())
    assert title in on_a_terminal("list", "--user", "alice", env=env)
    shown = on_a_terminal("show", str(made), "--user", "alice", env=env)
    assert title in shown
    assert "[bold]text[/z]\N{REPLACEMENT CHARACTER}[31m" in shown


def test_migrate(empty_dsn: str) -> None:
    """`chatdb migrate` creates the tables and prints what it applied."""
    assert "0001.chatdb-create-schema" in chatdb("migrate", env={"DATABASE_URL": empty_dsn})
    assert chatdb("migrate", env={"DATABASE_URL": empty_dsn}) == "nothing to apply\n"
    assert json.loads(chatdb("migrate", "--json", env={"DATABASE_URL": empty_dsn})) == {"applied": []}


def test_dotenv(dsn: str, tmp_path: Path) -> None:
    """The working directory's .env can set chatdb's own settings; the environment takes precedence."""
    (tmp_path / ".env").write_text(f"DATABASE_URL={dsn}\nLD_PRELOAD=/nowhere.so\nPGHOST=${{HOME}}\n")
    done = subprocess.run(
        [PROGRAM, "list", "--user", "alice", "--json"],
        env=environment({}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0)
    assert done.stderr.splitlines() == [f"read {tmp_path}/.env: using DATABASE_URL", f"database: {database_of(dsn)}"]
    said = chatdb("list", "--user", "alice", env={"DATABASE_URL": "nonsense"}, cwd=tmp_path, code=1)
    assert "postgresql://" in said


def test_a_dotenv_above_is_not_read(tmp_path: Path) -> None:
    """A .env in a parent folder is ignored, because it may belong to anyone."""
    (tmp_path / ".env").write_text("DATABASE_URL=nonsense\n")
    below = tmp_path / "below"
    below.mkdir()
    env = {"CHATDB_HOME": str(tmp_path / "home")}
    assert chatdb("list", "--user", "alice", "--json", env=env, cwd=below) == "[]\n"


def test_env_file(dsn: str, tmp_path: Path) -> None:
    """--env-file replaces .env, and the file must exist."""
    (tmp_path / ".env").write_text("DATABASE_URL=nonsense\n")
    (tmp_path / "prod.env").write_text(f"export DATABASE_URL='{dsn}'\n")
    arguments = ("list", "--user", "alice", "--json")
    assert chatdb("--env-file", "prod.env", *arguments, env={}, cwd=tmp_path) == "[]\n"
    assert "does not exist" in chatdb("--env-file", "missing.env", *arguments, env={}, cwd=tmp_path, code=1)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("DATABASE_URL=\n", "has no value for DATABASE_URL"),
        ("A=1\nDATABASE_URL='postgresql://u:geheim@h/d\n", "has a syntax error on line 2"),
        ("DATABASE_URL=\udcff", "not UTF-8"),
    ],
)
def test_a_broken_dotenv(text: str, problem: str, tmp_path: Path) -> None:
    """An invalid .env is an error that quotes none of its values."""
    (tmp_path / ".env").write_text(text, errors="surrogateescape")
    said = chatdb("list", "--user", "alice", env={}, cwd=tmp_path, code=1)
    assert problem in said
    assert "geheim" not in said


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
@pytest.mark.parametrize("spoil", ["file", "folder", "fifo", "directory", "owner", "link"])
def test_a_dotenv_that_another_user_can_write(spoil: str, tmp_path: Path) -> None:
    """A .env that another user owns, can write or can replace is refused; so is a FIFO."""
    if spoil in {"owner", "link"} and os.geteuid() != 0:
        pytest.skip("only root can change a file's owner")
    folder, path = tmp_path / "here", tmp_path / "here" / ".env"
    folder.mkdir(mode=0o700)
    if spoil == "fifo":
        os.mkfifo(path)
    elif spoil == "directory":
        path.mkdir()
    elif spoil == "link":
        (tmp_path / "target").write_text("DATABASE_URL=nonsense\n")
        path.symlink_to(tmp_path / "target")
        os.chown(path, 12345, 12345, follow_symlinks=False)
    else:
        path.write_text("DATABASE_URL=nonsense\n")
    if spoil == "owner":
        os.chown(path, 12345, 12345)
    elif spoil in {"file", "folder"}:
        (path if spoil == "file" else folder).chmod(0o777)
    said = chatdb("list", "--user", "alice", env={}, cwd=folder, code=1)
    assert str(path) in said
    assert "not a regular file" in said or "is not safe to use" in said or "cannot be read" in said


def test_no_variable_of_libpq_reaches_the_embedded_server(tmp_path: Path) -> None:
    """With --embedded, libpq's variables have no effect; without it, they are an error."""
    env = {"CHATDB_HOME": str(tmp_path / "home"), "PGHOSTADDR": "203.0.113.1", "PGSERVICE": "x", "PGTZ": "x"}
    assert "PGHOSTADDR, PGSERVICE are set" in chatdb("migrate", env=env, cwd=tmp_path, code=1)
    assert "applied" in chatdb("migrate", "--embedded", env=env, cwd=tmp_path)
    assert chatdb("--embedded", "list", "--user", "alice", "--json", env=env, cwd=tmp_path) == "[]\n"


def test_embedded_by_default(tmp_path: Path, file: Path) -> None:
    """Without DATABASE_URL, a command uses the embedded server and stops it at the end."""
    env = {"CHATDB_HOME": str(tmp_path / "home")}
    chatdb("import", file, "--user", "alice", env=env, cwd=tmp_path)
    assert len(json.loads(chatdb("list", "--user", "alice", "--json", env=env, cwd=tmp_path))) == 1
    assert chatdb("migrate", env=env, cwd=tmp_path) == "nothing to apply\n"
    assert not (tmp_path / "home" / "data" / "postmaster.pid").exists()


def test_demo(env: dict[str, str], file: Path) -> None:
    """The demo runs the five operations and meets the target, also the second time."""
    for _ in range(2):
        said = chatdb("demo", "--file", file, "--database", env["DATABASE_URL"], env={})
        for number in range(1, 6):
            assert f"\n{number}. " in said
        assert "ConversationNotFoundError" in said
        assert "target met" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["show", "1", "--user", "alice"], "no such conversation"),
        (["show", "1", "--user", "alice", "--versions"], "no such conversation"),
        (["list", "--user", ""], "user_id: must be 1 to 255 characters long"),
        (["list", "--user", "a" * 256], "user_id: must be 1 to 255 characters long"),
        (["import", "missing.json", "--user", "alice"], "No such file or directory: missing.json"),
        (["export", "--user", "alice", "--output", "missing/folder.jsonl"], "No such file or directory"),
    ],
)
def test_refused(env: dict[str, str], tmp_path: Path, arguments: list[str], sentence: str) -> None:
    """A refused command prints one sentence and exits with status 1."""
    said = chatdb(*arguments, env=env, cwd=tmp_path, code=1)
    *before, last = said.splitlines()
    assert sentence in last
    assert before in ([], [f"database: {database_of(env['DATABASE_URL'])}"])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "empty"),
        (b"[1]", "a list of text or numbers"),
        (b'[{"id": "a", "conversations": [}]', "invalid JSON"),
        (b'{"some": "thing"}', "chatdb formats"),
        (b'[{"conversations": [{"from": "human", "value": "\xff"}]}]', "not UTF-8"),
    ],
)
def test_broken_files(env: dict[str, str], tmp_path: Path, content: bytes, sentence: str) -> None:
    """An invalid file is refused and nothing is stored."""
    path = tmp_path / "file.json"
    path.write_bytes(content)
    assert sentence in chatdb("import", path, "--user", "alice", env=env, code=1)
    assert chatdb("list", "--user", "alice", "--json", env=env) == "[]\n"


def test_one_of_several_files_is_broken(env: dict[str, str], file: Path, tmp_path: Path) -> None:
    """It is skipped and named with its fault, the others are imported, and the status is 3, except for an empty one."""
    broken, empty = tmp_path / "broken.json", tmp_path / "empty.json"
    broken.write_text('[{"id": "x",\n"conversations": oops}]')
    empty.write_text("[]")
    chatdb("import", file, empty, "--user", "alice", env=env)
    sources = [broken, file, empty]
    done = subprocess.run(
        [PROGRAM, "import", *sources, "--user", "alice"],
        env=environment(env),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "skipped 1 file: is invalid JSON in line 2 at character 30\n  in broken.json\n" in done.stdout
    assert "skipped 1 file: has no conversations\n  in empty.json\n" in done.stdout
    assert "already stored: 1 conversations" in done.stdout
    said = chatdb("import", file, empty, "--user", "alice", "--json", env=env)
    assert {each["reason"]: (each["files"], each["places"]) for each in json.loads(said)["skipped"]} == {
        "no messages": (0, ['sharegpt.json, conversation 2 "b"']),
        "has no conversations": (1, ["empty.json"]),
    }


def test_import_of_tables(env: dict[str, str], empty_dsn: str) -> None:
    """The source can be a DSN; --format, --table and --session select what to import."""
    execute(
        empty_dsn,
        "create table messages (id serial, session_id uuid, message jsonb, created_at timestamptz default now())",
        *(
            f"insert into messages (session_id, message) select '{uuid.UUID(int=number)}', "
            """'{"type": "human", "data": {"content": "hi"}}' from generate_series(1, 2)"""
            for number in range(3)
        ),
    )
    first, second, third = (str(uuid.UUID(int=number)) for number in range(3))
    some = ("--session", first, "--session", third, "--user", "alice", "--json")
    report = json.loads(chatdb("import", empty_dsn, "--table", "public.messages", *some, env=env))
    assert (report["conversations"], report["messages"]) == (2, 4)
    said = chatdb("import", empty_dsn.replace("postgresql:", "postgres:"), "--user", "alice", env=env)
    assert "imported 1 conversations, 2 messages" in said
    assert "already stored: 2 conversations, 4 messages" in said
    listed = json.loads(chatdb("list", "--user", "alice", "--json", env=env))
    assert {each["key"] for each in listed} == {first, second, third}
    said = chatdb("import", empty_dsn, "--format", "openai-agents", "--user", "alice", env=env, code=1)
    assert "looked for agent_sessions and agent_messages" in said


@pytest.mark.parametrize(
    "source",
    [
        "postgresql://alice:secret@127.0.0.1:1/x",
        "postgresql+psycopg://alice:secret@127.0.0.1:1/x",
        "postgresql+asyncpg://alice:secret@127.0.0.1:1/x",
        "mysql://alice:secret@127.0.0.1/x",
        "postgresql://alice:secret@127.0.0.1:1/x?nonsense=secret",
    ],
)
def test_a_source_that_does_not_fit(env: dict[str, str], source: str) -> None:
    """An unusable DSN is reported in one sentence that does not quote it."""
    said = chatdb("import", source, "--user", "alice", env=env, code=1)
    assert len(said.splitlines()) == 2
    assert "secret" not in said
    assert "alice" not in said


@pytest.mark.parametrize("options", [["--table", "t"], ["--session", "s"], ["--format", "langchain"]])
def test_options_of_tables_with_a_file(env: dict[str, str], file: Path, options: list[str]) -> None:
    """Options for tables are refused with a file, and a file format with a DSN."""
    assert "applies only to a database" in chatdb("import", file, "--user", "alice", *options, env=env, code=1)
    said = chatdb("import", env["DATABASE_URL"], "--format", "chatgpt", "--user", "alice", env=env, code=1)
    assert "must be one of auto, openai-agents, langchain" in said


def test_a_database_without_the_tables(empty_dsn: str, file: Path) -> None:
    """Missing or outdated tables are an error that says what to run."""
    env = {"DATABASE_URL": empty_dsn}
    for arguments in (["list"], ["import", str(file)], ["export"]):
        assert "run chatdb migrate" in chatdb(*arguments, "--user", "alice", env=env, code=1)
    assert "run chatdb migrate" in chatdb("demo", "--file", file, "--database", empty_dsn, env=env, code=1)
    chatdb("migrate", env=env)
    execute(empty_dsn, "alter table chatdb.messages drop column token_count")
    assert "run chatdb migrate" in chatdb("import", file, "--user", "alice", env=env, code=1)
    assert json.loads(chatdb("list", "--user", "alice", "--json", env=env)) == []


def test_a_server_that_is_not_there() -> None:
    """An unreachable server is reported in one sentence without the password."""
    said = chatdb_process("list", "--user", "a", env={"DATABASE_URL": "postgresql://a:secret@127.0.0.1:1/x"}, code=1)
    assert "cannot be reached" in said
    assert "secret" not in said


def test_nothing_taken(env: dict[str, str], file: Path) -> None:
    """An import that skips everything exits with status 1."""
    chatdb("import", file, "--user", "alice", "--format", "chatgpt", env=env, code=1)
    chatdb("import", file, "--user", "alice", env=env)
    chatdb("import", file, "--user", "alice", env=env)


def test_export_to_what_is_no_file(env: dict[str, str], tmp_path: Path) -> None:
    """Export writes to a device and through a symbolic link; it refuses a folder and leaves no files in it."""
    link, target, folder = tmp_path / "link", tmp_path / "target", tmp_path / "folder"
    link.symlink_to(target)
    folder.mkdir()
    chatdb("export", "--user", "alice", "--output", "/dev/null", env=env)
    assert Path("/dev/null").is_char_device()
    chatdb("export", "--user", "alice", "--output", link, env=env)
    assert link.is_symlink()
    assert target.read_bytes().count(b"\n") == 2
    assert "folder" in chatdb("export", "--user", "alice", "--output", folder, env=env, code=1)
    assert set(tmp_path.iterdir()) == {link, target, folder}
    assert chatdb("export", "--user", "alice", "--output", "-", env=env).count("\n") == 2


def test_an_output_that_has_few_characters(env: dict[str, str], file: Path) -> None:
    """A character that the output's encoding lacks is escaped."""
    chatdb("import", file, "--user", "alice", env=env)
    made = json.loads(chatdb("list", "--user", "alice", "--json", env=env))[0]["id"]
    command = [PROGRAM, "show", str(made), "--user", "alice"]
    done = subprocess.run(command, env=environment(env | {"PYTHONIOENCODING": "ascii"}), capture_output=True, text=True)
    assert "\\U0001f44b" in done.stdout


def test_wrong_usage(env: dict[str, str]) -> None:
    """Wrong usage exits with status 2."""
    assert "--user" in chatdb_process("list", env=env, code=2)


def test_a_reader_that_has_had_enough(env: dict[str, str], file: Path) -> None:
    """`chatdb export | head` ends without a traceback."""
    chatdb("import", file, "--user", "alice", env=env)
    done = subprocess.run(
        f"{PROGRAM} export --user alice | head -c 1", shell=True, env=os.environ | env, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr


@pytest.mark.chaos
def test_interrupted(tmp_path: Path) -> None:
    """An interrupted command stores nothing, stops its embedded server and exits with status 130."""
    big = tmp_path / "big.json"
    one = {"conversations": [{"from": "human", "value": "x" * 500}] * 10}
    big.write_text(json.dumps([one | {"id": str(n)} for n in range(6_000)]))
    env = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    env |= {"CHATDB_HOME": str(tmp_path / "home")}
    command = [PROGRAM, "import", big, "--user", "alice"]
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            command, env=env, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        assert "embedded" in process.stderr.readline()
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert "Traceback" not in said
        assert process.returncode == 130
        assert not (tmp_path / "home" / "data" / "postmaster.pid").exists()
    assert chatdb("list", "--user", "alice", "--json", env={"CHATDB_HOME": str(tmp_path / "home")}) == "[]\n"


def test_version_and_formats() -> None:
    """--version prints the version; each --format has a reader."""
    assert chatdb("--version", env={}).startswith("chatdb 0.")
    assert [str(each) for each in Format] == ["auto", *FORMATS, *tables.FORMATS]
