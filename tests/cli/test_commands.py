"""Choice of the database, confirmation prompts, and command-line conventions."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from chatdb import append_message, create_conversation, create_pool, list_conversations
from chatdb._core.dsn import database_of
from tests.support.chaos import figure, sized
from tests.support.command import PROGRAM, both, chatdb, chatdb_process, environment, on_a_terminal

pytestmark = [pytest.mark.owner, pytest.mark.server_independent]

NASTY = "a[/red]\x1b]0;t\x07\x7f\x9b31m\u202e\u200e\u2066b"
"""A name with broken markup and controls that set a terminal's title and reverse the text direction."""

OBEYED = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0), 0x202E, 0x200E, 0x2066) if chr(code) not in "\n\t\r"]
"""Characters that must not reach a terminal; the terminal itself adds carriage returns."""


async def filled(dsn: str, user: str, title: str = "t", content: str = "hi") -> int:
    """Store a conversation with one message and return its ID."""
    async with create_pool(dsn) as db:
        made = await create_conversation(db, user_id=user, title=title)
        await append_message(db, user_id=user, conversation_id=made.id, role="user", content=content)
        return made.id


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"DATABASE_URL": ""}, "the setting DATABASE_URL is empty"),
        ({"DATABASE_URL": "  "}, "the setting DATABASE_URL is empty"),
        ({"DATABASE_URL": "postgresql://h/d\nX=1"}, "check for an unclosed quote"),
        ({"DATABASE_URL": "postgresql://u:geheim@${HOST}/d"}, "does not expand"),
        ({"CHATDB_MIGRATE_URL": "postgresql://u:geheim@h/d"}, "CHATDB_MIGRATE_URL is set but DATABASE_URL"),
        ({"PGHOST": "db.example"}, "PGHOST is set but DATABASE_URL is not"),
        ({"PGDATABASE": "chat"}, "PGDATABASE is set"),
        ({"PGHOST": "db.example", "PGDATABASE": "chat"}, "PGHOST, PGDATABASE are set"),
        ({"PGSERVICE": "chat"}, "PGSERVICE is set"),
        ({"CHATDB_HOME": ""}, "CHATDB_HOME is empty"),
        ({"CHATDB_HOME": " "}, "CHATDB_HOME is empty"),
    ],
)
def test_a_partial_setting(settings: dict[str, str], words: str, tmp_path: Path) -> None:
    """An empty, invalid or incomplete setting is an error and starts no server."""
    env = {"CHATDB_HOME": str(tmp_path / "home")} | settings
    said = chatdb("list", "--user", "alice", env=env, cwd=tmp_path, code=1)
    assert words in said
    assert "geheim" not in said
    if "CHATDB_MIGRATE_URL" not in settings:
        assert words in chatdb("check", env=env, cwd=tmp_path, code=1)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    "line", ["DATABASE_URL=", "DATABASE_URL", "DATABASE_URL='  '", "DATABASE_URL='postgresql://h/d"]
)
def test_a_broken_line(line: str, tmp_path: Path) -> None:
    """An invalid line in .env is an error and starts no server."""
    (tmp_path / ".env").write_text(f"{line}\nOTHER=1\n")
    said = chatdb("list", "--user", "alice", env={"CHATDB_HOME": str(tmp_path / "home")}, cwd=tmp_path, code=1)
    assert "DATABASE_URL" in said or "line 1" in said
    assert not (tmp_path / "home").exists()


def test_an_operators_setting(dsn: str, tmp_path: Path) -> None:
    """An empty CHATDB_MIGRATE_URL is an error only for the commands that use it."""
    env = {"DATABASE_URL": dsn, "CHATDB_MIGRATE_URL": ""}
    assert "CHATDB_MIGRATE_URL is empty" in chatdb("migrate", env=env, cwd=tmp_path, code=1)
    chatdb("list", "--user", "alice", env=env, cwd=tmp_path)


def test_the_options_choose(dsn: str, tmp_path: Path) -> None:
    """--database and --embedded override all settings and exclude each other."""
    home = {"CHATDB_HOME": str(tmp_path / "home")}
    wrong = {"DATABASE_URL": "postgresql://h:1/wrong", "CHATDB_MIGRATE_URL": "postgresql://h:1/wrong"} | home
    for arguments in (["list", "--user", "alice", "--database", dsn], ["--database", dsn, "list", "--user", "alice"]):
        _, said = both(*arguments, env=wrong, cwd=tmp_path)
        assert said == f"database: {database_of(dsn)}\n"
    _, said = both("check", "--json", "--database", dsn, env=wrong, cwd=tmp_path)
    assert said == f"database: {database_of(dsn)}\n"
    assert not (tmp_path / "home").exists()
    _, said = both("list", "--user", "alice", "--embedded", env=wrong, cwd=tmp_path)
    assert said == f"database: embedded PostgreSQL, data in {tmp_path}/home\n"
    _, said = both("list", "--user", "a", "--embedded", "--database", dsn, env={}, cwd=tmp_path, code=2)
    assert "not both" in said
    _, said = both("--database", dsn, "list", "--user", "a", "--database", "x", env={}, cwd=tmp_path, code=2)
    assert "two different databases" in said
    assert "--database is empty" in both("list", "--user", "a", "--database", "", env={}, cwd=tmp_path, code=1)[1]


@pytest.mark.parametrize(
    ("dsn", "name"),
    [
        ("postgresql://u:geheim@db.example/chat", "chat at db.example:5432"),
        ("postgresql://u:geheim@db.example:6000/chat?sslmode=disable", "chat at db.example:6000"),
        ("postgresql://u:geheim@a:1,b:2/chat", "chat at a:1, b:2"),
        ("postgresql://u:geheim@[::1]:1/chat", "chat at [::1]:1"),
        ("postgresql://u:geheim@/chat?host=/run/postgresql", "chat at the local socket"),
        ("postgresql://u:geheim@db.example", "u at db.example:5432"),
        ("postgresql://u:geheim@/chat", "chat at the local socket"),
    ],
)
def test_the_name_of_a_database(dsn: str, name: str) -> None:
    """The display name has host, port and database, but no user or password."""
    assert database_of(dsn) == name


def test_the_demonstration_is_on_the_embedded_server(dsn: str, tmp_path: Path) -> None:
    """The demo ignores DATABASE_URL and says so; the printed command deletes its data."""
    file = tmp_path / "talk.json"
    file.write_text(json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "hi"}]}]))
    env = {"DATABASE_URL": dsn, "CHATDB_HOME": str(tmp_path / "home")}
    shown, said = both("demo", "--file", file, env=env, cwd=tmp_path)
    assert "demo ignores DATABASE_URL" in said
    assert "embedded PostgreSQL" in said
    assert shown.endswith("To delete this data, run: chatdb delete-user chatdb-demo --embedded\n")

    async def stored() -> int:
        async with create_pool(dsn) as db:
            return len(await list_conversations(db, user_id="chatdb-demo"))

    assert asyncio.run(stored()) == 0
    removed = both("delete-user", "chatdb-demo", "--embedded", "--yes", "--json", env=env, cwd=tmp_path)[0]
    assert json.loads(removed)["deleted"]["conversations"] > 50


def test_delete_user(dsn: str, tmp_path: Path) -> None:
    """delete-user prints the counts and the database, asks, and deletes only that user's conversations."""
    for user in ("alice", "alice", "bob"):
        asyncio.run(filled(dsn, user))
    env = {"DATABASE_URL": dsn}
    numbers = "2 conversations, 2 messages"
    assert chatdb("delete-user", "alice", "--dry-run", env=env) == f"would delete {numbers}\n"
    said = chatdb("delete-user", "alice", env=env, code=1)
    assert f"Delete {numbers} of alice from {database_of(dsn)}? Pass --yes to confirm" in said
    assert "nothing was changed" in answered(b"n\n", "delete-user", "alice", env=env)
    assert json.loads(chatdb("delete-user", "alice", "--dry-run", "--json", env=env)) == {
        "would_delete": {"conversations": 2, "messages": 2}
    }
    assert f"deleted {numbers}" in answered(b"y\n", "delete-user", "alice", env=env)
    assert chatdb("delete-user", "alice", "--yes", env=env) == "deleted 0 conversations, 0 messages\n"
    assert len(json.loads(chatdb("list", "--user", "bob", "--json", env=env))) == 1
    assert "user_id" in chatdb("delete-user", "", env=env, code=1)


def answered(answer: bytes, *arguments: str, env: dict[str, str], code: int | None = None) -> str:
    """Run `chatdb` on a terminal, answer its question, and return all of its output."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [PROGRAM, *arguments],
        env=environment(env),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    said = b""
    while b"[y/N]: " not in said and (more := os.read(process.stdout.fileno(), 1024)):
        said += more
    os.write(ours, answer) if answer else process.send_signal(signal.SIGINT)
    said += process.stdout.read()
    process.stdout.close()
    status = process.wait()
    os.close(ours)
    os.close(theirs)
    assert code is None or status == code
    return said.decode()


def test_an_interrupt_at_a_question(dsn: str) -> None:
    """Ctrl-C at a question changes nothing and exits like any interrupt."""
    asyncio.run(filled(dsn, "alice"))
    for arguments in (["delete-user", "alice"], ["rollback"]):
        said = answered(b"", *arguments, env={"DATABASE_URL": dsn}, code=130)
        assert database_of(dsn) in said.splitlines()[-1]
        assert said.endswith("chatdb: interrupted\n")
    assert len(json.loads(chatdb("list", "--user", "alice", "--json", env={"DATABASE_URL": dsn}))) == 1


def test_habits(dsn: str, tmp_path: Path) -> None:
    """-h means --help, `python -m chatdb` works, shell completion works, and - is standard input."""
    env = {"DATABASE_URL": dsn}
    for arguments in ([PROGRAM, "-h"], [PROGRAM, "list", "-h"], [sys.executable, "-m", "chatdb", "--help"]):
        done = subprocess.run(arguments, env=environment(env), cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert "Usage: " in done.stdout
    asked = {"_CHATDB_COMPLETE": "complete_bash", "COMP_WORDS": "chatdb li", "COMP_CWORD": "1"}
    done = subprocess.run([PROGRAM], env=environment(env | asked), cwd=tmp_path, capture_output=True, text=True)
    assert {"list", "link-users"} <= {*done.stdout.split()}
    assert "--install-completion" in chatdb_process("--help", env=env)
    talk = json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "hi"}]}])
    command = [PROGRAM, "import", "-", "--user", "alice", "--json"]
    done = subprocess.run(command, env=environment(env), cwd=tmp_path, capture_output=True, text=True, input=talk)
    assert json.loads(done.stdout)["messages"] == 1, done.stderr


@pytest.mark.parametrize("package", ["host", "chatdb_host"])
@pytest.mark.parametrize("option", [["-m", ""], ["-m"]], ids=["apart", "together"])
def test_a_program_that_imports_chatdb_keeps_its_signals(tmp_path: Path, package: str, option: list[str]) -> None:
    """Importing chatdb in another program does not change its signal handlers."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("import chatdb\n")
    (tmp_path / package / "worker.py").write_text(
        "import signal\nprint(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
    )
    done = subprocess.run(
        [sys.executable, *option[:-1], f"{option[-1]}{package}.worker"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "True\n", done.stderr


def test_a_script_with_the_arguments_of_chatdb_keeps_its_signals(tmp_path: Path) -> None:
    """A script that imports chatdb and has arguments like those of `python -m chatdb` keeps its signal handlers."""
    script = tmp_path / "host.py"
    script.write_text("import signal, chatdb\nprint(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n")
    done = subprocess.run(
        [sys.executable, script, "-m", "chatdb"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n", done.stderr


def test_an_export_of_nobody(dsn: str, tmp_path: Path) -> None:
    """An empty export creates a file, but never replaces one with content."""
    asyncio.run(filled(dsn, "alice"))
    env, path = {"DATABASE_URL": dsn}, tmp_path / "out.jsonl"
    chatdb("export", "--user", "alise", "--output", path, env=env)
    chatdb("export", "--user", "alice", "--output", path, env=env)
    good = path.read_text()
    assert "is unchanged" in chatdb("export", "--user", "alise", "--output", path, env=env, code=1)
    assert path.read_text() == good
    assert [*tmp_path.iterdir()] == [path]


def test_a_user_without_a_name_and_a_home(tmp_path: Path) -> None:
    """Under an arbitrary user ID, as in OpenShift, the error says which setting to add."""
    alone = ["unshare", "--user", "--map-user=54321"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("namespaces are forbidden")
    env = {name: value for name, value in environment({}).items() if name not in {"HOME", "USER", "LOGNAME"}}
    done = subprocess.run(
        [*alone, PROGRAM, "list", "--user", "alice"], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith(
        "chatdb: this process's user has no home folder: set CHATDB_HOME to a folder for the data"
    )


def test_names_on_a_terminal(dsn: str, tmp_path: Path) -> None:
    """Controls in titles, texts and names break no command and reach no terminal."""
    made = asyncio.run(filled(dsn, "alice", title=NASTY.replace("\x07", ""), content=NASTY))
    env = {"DATABASE_URL": dsn}
    file = tmp_path / f"{NASTY}.json"  # NASTY has a slash: a folder and a file
    file.parent.mkdir()
    file.write_text(json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "hi"}]}]))
    archive = tmp_path / "talk.zip"
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr(f"{NASTY}/conversations.json", file.read_text())
    shown = {
        "show": on_a_terminal("show", str(made), "--user", "alice", env=env),
        "list": on_a_terminal("list", "--user", "alice", env=env),
    }
    for text in shown.values():
        assert "[/red]" in text
    for arguments, code in (
        (["show", str(made), "--user", "alice", "--json"], 0),
        (["list", "--user", "alice", "--json"], 0),
        (["export", "--user", "alice"], 0),
        (["check", "--role", NASTY], 1),
        (["check", "--role", NASTY, "--json"], 1),
        (["import", str(file), "--user", "bob"], 0),
        (["import", str(archive), "--user", "carol", "--format", "sharegpt"], 0),
        (["import", f"{file}x", "--user", "bob"], 1),
        (["link-users", "--table", NASTY], 1),
        (["export", "--user", "nobody", "--output", str(file)], 1),
    ):
        shown[" ".join(arguments[:2])] = on_a_terminal(*arguments, env=env, code=code, errors=True)
    for name, text in shown.items():
        styles = ("\x1b[1m", "\x1b[2m", "\x1b[0m")
        for sequence in [*styles, *(f"\x1b[{style}m" for style in ("1;36", "31", "32", "36", "1;31", "1;32", "33"))]:
            text = text.replace(sequence, "")
        for moved in ("\x1b[?25l", "\x1b[?25h", "\x1b[2K", "\x1b[1A", "\r"):  # from a progress bar
            text = text.replace(moved, "")
        assert "Traceback" not in text, (name, text)
        found = [character for character in OBEYED if character in text]
        assert found in ([], ["\x1b"]), (name, text)
        assert "\x1b]" not in text, name
    line = next(line for line in shown["list --user"].splitlines() if line.startswith("["))
    assert json.loads(line)[0]["title"] == NASTY.replace("\x07", ""), "the escaped JSON has the same value"


def interrupted(command: list[str | Path], moment: float, env: dict[str, str], cwd: Path) -> tuple[int, str, str]:
    """Start a command, interrupt it after `moment` seconds, and return its status and output."""
    process = subprocess.Popen(
        command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    process.send_signal(signal.SIGINT)  # does nothing if it has ended
    shown, said = process.communicate(timeout=60)
    return process.returncode, shown, said


@pytest.mark.chaos
def test_an_early_interrupt(dsn: str, tmp_path: Path) -> None:
    """Ctrl-C in the first second, imports included, exits with status 130 and prints one line."""
    interrupt_at([step * 0.12 for step in range(1, 9)], "chatdb list", dsn, tmp_path)


@pytest.mark.chaos
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("way", ["chatdb list", "python -m chatdb list", "chatdb check", "chatdb import", "embedded"])
def test_each_early_interrupt(request: pytest.FixtureRequest, way: str, dsn: str, tmp_path: Path) -> None:
    """The same every 20 ms of the first three seconds; in the sample, every 140 ms of the first one."""
    steps = range(0, sized(request, 151, 50), sized(request, 1, 7))
    interrupt_at([step * 0.02 for step in steps], way, dsn, tmp_path)


_OURS = re.compile(
    r'/chatdb/(?!__init__)\w+\.py|(?:/chatdb/__init__|_chatdb_entry)\.py", line \d+, in '
    r"(?!<module>\n *(?:from \w+ )?import )"
)
"""A line of chatdb's in a traceback, except the imports before chatdb handles an interrupt."""


def interrupt_at(moments: list[float], way: str, dsn: str, tmp_path: Path) -> None:
    """Interrupt a command at each moment and check how it ends."""
    file = tmp_path / "talk.json"
    file.write_text(json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "hi"}] * 100}]))
    program = [sys.executable, "-m", "chatdb"] if "python" in way else [PROGRAM]
    arguments = {
        "chatdb check": ["check", "--json"],
        "chatdb import": ["import", file, "--user", "alice"],
    }.get(way, ["list", "--user", "alice", "--json"])
    env = environment({"CHATDB_HOME": str(tmp_path / "home")} | ({} if way == "embedded" else {"DATABASE_URL": dsn}))
    startup = min(_seconds_of_startup() for _ in range(5))
    outcomes: Counter[str] = Counter()
    for moment in moments:
        status, shown, said = interrupted([*program, *arguments], moment, env, tmp_path)
        own = [line for line in said.splitlines() if not line.startswith("database: ")]
        if status == 130 and own == ["chatdb: interrupted"]:
            outcomes["130"] += 1
        elif status == 0 and not own and shown:
            outcomes["was done"] += 1
        elif (
            moment < startup * 5
            and status in {-signal.SIGINT, 0, 1}  # 0 if Python dropped the interrupt as it looked at its first argument
            and not _OURS.search(said)
        ):
            # Python is starting, or reading pip's entry point script or what it imports first
            outcomes["before the program began"] += 1
        else:
            pytest.fail(f"{way} at {moment:.3f} s: {status} {said}")
    figure(f"{way}: {len(moments)} interrupts: {dict(outcomes)}; Python's start {startup:.3f} s")
    assert outcomes["130"]


def _seconds_of_startup() -> float:
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return time.monotonic() - start
