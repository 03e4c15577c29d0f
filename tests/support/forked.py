"""
Processes that a fork server starts, which has imported the libraries once.

A start of the command line takes 0.7 s of CPU time otherwise, most of it for imports.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from multiprocessing.reduction import DupFd
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

processes = multiprocessing.get_context("forkserver")
# without chatdb.cli, which looks at the terminal and at the environment while it is imported
processes.set_forkserver_preload(["chatdb", "psycopg", "rich.progress", "rich.table", "typer", "yoyo", __name__])


def run(program: Path, *arguments: str, env: dict[str, str], cwd: Path | None = None) -> tuple[int, str, str]:
    """Run a Python program in a process, and return its exit status, standard output and standard error."""
    with TemporaryFile() as output, TemporaryFile() as errors:
        status = run_on(output.fileno(), errors.fileno(), program, *arguments, env=env, cwd=cwd)
        output.seek(0)
        errors.seek(0)
        return status, output.read().decode(), errors.read().decode()


def run_on(
    output: int, errors: int | None, program: Path, *arguments: str, env: dict[str, str], cwd: Path | None = None
) -> int:
    """
    Run a Python program in a process, and return its exit status.

    `output` and `errors` are the file descriptors of its standard output and error, None for this process's.
    """
    files = (DupFd(output), DupFd(2 if errors is None else errors))
    process = processes.Process(target=_become, args=(program, arguments, env, cwd or Path.cwd(), *files))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _become(
    program: Path, arguments: tuple[str, ...], env: dict[str, str], cwd: Path, output: Any, errors: Any
) -> None:
    for number, duplicate in ((1, output), (2, errors)):
        os.dup2(duplicate.detach(), number)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", closefd=False)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [str(program), *arguments]
    runpy.run_path(str(program), run_name="__main__")
