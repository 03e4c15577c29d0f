"""Runs the command line, in this process or in a new one."""

from __future__ import annotations

import os
import pty
import signal
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout, suppress
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from threading import Thread
from unittest import mock

import pytest

from chatdb.cli import app as cli
from tests.support.forked import run, run_on

PROGRAM = Path(sys.executable).with_name("chatdb")
SETTINGS = ("DATABASE_URL", "CHATDB_MIGRATE_URL", "CHATDB_HOME")


def environment(env: dict[str, str]) -> dict[str, str]:
    """Return the environment with these variables and without chatdb's other settings."""
    return {name: value for name, value in os.environ.items() if name not in SETTINGS} | env


def chatdb(*arguments: str | Path, env: dict[str, str], code: int = 0, cwd: Path | None = None) -> str:
    """Run `chatdb` in this process, and return its standard output, or its standard error if it fails."""
    output, errors = (TextIOWrapper(BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with (
            mock.patch.dict(os.environ, environment(env), clear=True),
            mock.patch.object(sys, "argv", ["chatdb", *map(str, arguments)]),
            chdir(cwd or Path.cwd()),
            mock.patch.object(sys, "stdin", StringIO()),  # chatdb asks questions on a terminal
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
    """Run `chatdb` as a process. Return the same as `chatdb()`."""
    said, failed = both(*arguments, env=env, code=code, cwd=cwd)
    return failed if code else said


def both(*arguments: str | Path, env: dict[str, str], code: int = 0, cwd: Path | None = None) -> tuple[str, str]:
    """Run `chatdb` as a process, and return its standard output and standard error."""
    status, said, failed = run(PROGRAM, *map(str, arguments), env=environment(env), cwd=cwd)
    assert status == code, failed
    assert "Traceback" not in failed
    return said, failed


def on_a_terminal(*arguments: str, env: dict[str, str], code: int = 0, errors: bool = False) -> str:
    """Run `chatdb` with its output, and with `errors` its errors, on a terminal. Return what the terminal shows."""
    ours, theirs = pty.openpty()
    shown = bytearray()

    def read() -> None:
        with suppress(OSError):  # Linux reports the end of a terminal as an error
            while more := os.read(ours, 1024):
                shown.extend(more)

    reader = Thread(target=read)
    reader.start()
    terminal = os.environ | {"COLUMNS": "200"} | env
    status = run_on(theirs, theirs if errors else None, PROGRAM, *arguments, env=terminal)
    os.close(theirs)
    reader.join()
    os.close(ours)
    assert status == code, shown
    return shown.decode()
