"""How the service starts: on the embedded server with the command of the docs, and on a database without tables."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from tests.support.paths import ROOT
from tests.support.service import EXAMPLE, free_port

PAGE = EXAMPLE / "README.md"


def environment(**variables: str) -> dict[str, str]:
    """Return the environment with these variables, and without the settings of the service."""
    kept = {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "SECRET_KEY")}
    return kept | variables


def test_the_command() -> None:
    """The command of the docs, after the installation, ends at `Open http://…`, and a guest chats."""
    commands = re.findall(r"^python3 -m venv .* && \.venv/bin/python (examples/fastapi)$", PAGE.read_text(), re.M)
    assert commands == ["examples/fastapi"]
    port = free_port()
    run = [sys.executable, commands[0], "--port", str(port)]
    with tempfile.TemporaryDirectory(prefix="chatdb-test-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o711)
        home = environment(CHATDB_HOME=f"{folder}/chatdb")
        with subprocess.Popen(run, cwd=ROOT, env=home, stdout=subprocess.PIPE, text=True) as service:
            assert service.stdout is not None
            try:
                line = service.stdout.readline()
                assert line == f"Open http://127.0.0.1:{port}\n"
                url = line.split()[1]
                guest = httpx.post(f"{url}/api/guests").json()
                headers = {"Authorization": f"Bearer {guest['token']}"}
                created = httpx.post(f"{url}/api/conversations", json={"title": "x"}, headers=headers).json()
                path = f"{url}/api/conversations/{created['id']}"
                assert httpx.post(f"{path}/messages", json={"content": "hello"}, headers=headers).status_code == 202
                end = time.monotonic() + 20
                while httpx.get(path, headers=headers).json()["messages"][1]["state"] is not None:
                    assert time.monotonic() < end
                    time.sleep(0.1)
            finally:
                service.send_signal(signal.SIGINT)
                assert service.wait(15) in (0, -signal.SIGINT, 130)


def test_missing_tables(empty_dsn: str) -> None:
    """On a database without chatdb's tables, the service says which command creates them, and ends."""
    run = [sys.executable, str(EXAMPLE), "--port", str(free_port())]
    done = subprocess.run(
        run, env=environment(DATABASE_URL=empty_dsn), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "chatdb migrate" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_unreachable_database() -> None:
    """Without a database, the service says so in one sentence without the password, and ends."""
    run = [sys.executable, str(EXAMPLE), "--port", str(free_port())]
    dsn = "postgresql://x:s3cr3t@127.0.0.1:1/x"
    done = subprocess.run(
        run, env=environment(DATABASE_URL=dsn), capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "s3cr3t" not in done.stderr
    assert len(done.stderr.splitlines()) <= 3
