"""The command line, run in this process, or as its users run it in one of its own."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout, suppress
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from unittest import mock

import pytest

from chatdb.cli import app as cli

PROGRAM = Path(sys.executable).with_name("chatdb")
SETTINGS = ("DATABASE_URL", "CHATDB_MIGRATE_URL", "CHATDB_HOME")


def environment(env: dict[str, str]) -> dict[str, str]:
    """Return the tests' environment without chatdb's settings, and with these."""
    return {name: value for name, value in os.environ.items() if name not in SETTINGS} | env


def chatdb(*arguments: str | Path, env: dict[str, str], code: int = 0, cwd: Path | None = None) -> str:
    """Run what `chatdb` runs; return what it says: its standard output, or where it fails its standard error."""
    output, errors = (TextIOWrapper(BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with (
            mock.patch.dict(os.environ, environment(env), clear=True),
            mock.patch.object(sys, "argv", ["chatdb", *map(str, arguments)]),
            chdir(cwd or Path.cwd()),
            mock.patch.object(sys, "stdin", StringIO()),  # a terminal would be asked
            redirect_stdout(output),
            redirect_stderr(errors),
            pytest.raises(SystemExit) as ended,
        ):
            cli.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    said, failed = (stream.buffer.getvalue().decode() for stream in (output, errors))
    assert (ended.value.code or 0) == code, failed
    return failed if code else said


def chatdb_process(*arguments: str | Path, env: dict[str, str], code: int = 0, cwd: Path | None = None) -> str:
    """Run `chatdb` as a process, for what depends on one; as `chatdb` does."""
    command = [PROGRAM, *arguments]
    done = subprocess.run(
        command, env=environment(env), cwd=cwd, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if code else done.stdout


def on_a_terminal(*arguments: str, env: dict[str, str], code: int = 0, errors: bool = False) -> str:
    """Run `chatdb` with a terminal as its output, with `errors` for those too, and return what it shows there."""
    ours, theirs = pty.openpty()
    stderr = theirs if errors else None
    terminal = os.environ | {"COLUMNS": "200"} | env
    with subprocess.Popen([PROGRAM, *arguments], env=terminal, stdout=theirs, stderr=stderr) as process:
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # the end of a terminal
            while more := os.read(ours, 1024):
                shown += more
    os.close(ours)
    assert process.returncode == code, shown
    return shown.decode()
