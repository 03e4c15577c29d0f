"""A real PgBouncer for tests: the machine's, else Debian's package unpacked into a folder, without being installed."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

import pytest

from chatdb.dsn import connect_arguments

PACKAGES = ("pgbouncer", "libevent-2.1-7", "libc-ares2")
CACHE = Path(os.environ.get("CHATDB_TEST_CACHE", Path(__file__).parent.parent / ".cache"))


@cache
def program() -> tuple[str, dict[str, str]]:
    """Return the program and what its environment needs; skips the test where there is none to be had."""
    found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found:
        return found, {}
    folder = CACHE / "pgbouncer"
    if not folder.exists():
        _fetch(folder)
    libraries = ":".join(map(str, folder.glob("usr/lib/*-linux-gnu")))
    return str(folder / "usr" / "sbin" / "pgbouncer"), {"LD_LIBRARY_PATH": libraries}


def _fetch(folder: Path) -> None:
    """Unpack Debian's packages into a folder, which has its name when all is there: others may be at it, too."""
    if shutil.which("apt-get") is None:
        pytest.skip("no pgbouncer on this machine, and no apt-get to fetch it with")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        new = Path(name) / "new"
        new.mkdir()
        for package in PACKAGES:
            fetch = ["apt-get", "-q", "download", package]
            done = subprocess.run(fetch, cwd=name, capture_output=True, text=True)
            if done.returncode and package == "pgbouncer":  # the lists of a new machine are empty
                subprocess.run(["apt-get", "-q", "update"], capture_output=True)
                done = subprocess.run(fetch, cwd=name, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no pgbouncer on this machine, and apt-get does not fetch it: {done.stderr[-200:]}")
        for archive in Path(name).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(archive), str(new)], check=True)
        with contextlib.suppress(OSError):  # another was first
            new.rename(folder)


@contextlib.contextmanager
def pgbouncer(server: str, folder: Path, *, mode: str = "transaction", **settings: object) -> Iterator[str]:
    """Run a PgBouncer in front of a server, with its files in a folder, and give the DSN of the same database on it."""
    executable, environment = program()
    arguments = connect_arguments(server)
    user, password = arguments.get("user", "postgres"), arguments.get("password", "")
    upstream = f"host={arguments['host'][0]} port={arguments.get('port', 5432)} user={user}"
    upstream += f" password={password}" if password else ""
    with socket.socket() as free:  # PgBouncer's socket needs a number too
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "pool_mode": mode,
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "any",
        "logfile": folder / "pgbouncer.log",
        "max_client_conn": 2_000,
        "default_pool_size": 20,
    } | settings
    file = folder / "pgbouncer.ini"
    lines = [f"{name} = {value}" for name, value in options.items()]
    file.write_text("\n".join(["[databases]", f"* = {upstream}", "[pgbouncer]", *lines, ""]))
    command = [executable, str(file)]
    if os.geteuid() == 0:  # it refuses root, and must reach root's sockets
        nobody = pwd.getpwnam("nobody")
        command = ["unshare", "--user", f"--map-user={nobody.pw_uid}", f"--map-group={nobody.pw_gid}", *command]
    with subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.DEVNULL) as process:
        try:
            _wait_for(port, process, folder)
            parts = urlsplit(server)
            yield urlunsplit(parts._replace(netloc=f"{quote(user)}@127.0.0.1:{port}", query="sslmode=disable"))
        finally:
            process.kill()


def _wait_for(port: int, process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    log = folder / "pgbouncer.log"
    sys.exit(f"pgbouncer does not start: {log.read_text()[-500:] if log.exists() else 'no log'}")
