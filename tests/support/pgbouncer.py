"""PgBouncers for tests: the installed one, or Debian's packages unpacked into a folder."""

from __future__ import annotations

import contextlib
import fcntl
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

from chatdb._core.dsn import connect_arguments
from tests.support.paths import ROOT

VERSIONS = ("1.18", "1.24")
"""Debian's last release that does not track prepared statements, and its first that does so by default."""
OPTIONS: dict[str, dict[str, int]] = {"1.18": {"statement_cache_size": 0}, "1.24": {}}
"""The create_pool options for each version."""
SUITES = {
    "1.18": ("bookworm", "libevent-2.1-7 libssl3 libc-ares2 libgcrypt20 libgpg-error0 liblz4-1 liblzma5"),
    "1.24": ("trixie", "libevent-2.1-7t64 libssl3t64 libcares2 zlib1g"),
}
"""The Debian release of each version, and the libraries that only this version needs."""
PACKAGES = "pgbouncer libc6 libgcc-s1 libaudit1 libcap-ng0 libcap2 libpam0g libsystemd0 libzstd1"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
CACHE = Path(os.environ.get("CHATDB_TEST_CACHE", ROOT / ".cache"))


@cache
def program(version: str) -> list[str]:
    """Return the command for this version of PgBouncer. Skip the test if none can be found or fetched."""
    found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found and f"PgBouncer {version}." in subprocess.run([found, "--version"], capture_output=True, text=True).stdout:
        return [found]
    folder = CACHE / f"pgbouncer-{version}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "pgbouncer.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process fetches it for all
        if not folder.exists():
            _fetch(version, folder)
    # its own C library, because the machine's may be too old
    libraries = [*folder.glob("lib/*-linux-gnu"), *folder.glob("usr/lib/*-linux-gnu")]
    loader = next(path for library in libraries for path in library.glob("ld-linux*.so.*"))
    return [str(loader), "--library-path", ":".join(map(str, libraries)), str(folder / "usr" / "sbin" / "pgbouncer")]


def _fetch(version: str, folder: Path) -> None:
    """Unpack Debian's packages, then rename the folder, so that it is always complete."""
    if shutil.which("apt-get") is None or not KEYRING.exists():
        pytest.skip(f"no PgBouncer {version} on this machine, and no apt-get with debian-archive-keyring to fetch it")
    suite, libraries = SUITES[version]
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        state, new = Path(name).resolve(), Path(name) / "new"
        for part in ("lists/partial", "archives/partial", "new"):
            (state / part).mkdir(parents=True)
        (state / "status").touch()
        (state / "sources.list").write_text(f"deb [signed-by={KEYRING}] http://deb.debian.org/debian {suite} main\n")
        options = {
            "Dir::Etc::sourcelist": state / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State": state,
            "Dir::State::status": state / "status",
            "Dir::Cache": state,
            "Acquire::Languages": "none",
            "APT::Sandbox::User": "root",  # the folder belongs to the caller
        }
        apt = ["apt-get", "-q", *(f"-o{option}={value}" for option, value in options.items())]
        for words in (["update", "--error-on=any"], ["download", *PACKAGES.split(), *libraries.split()]):
            done = subprocess.run([*apt, *words], cwd=name, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no PgBouncer {version} on this machine, and apt-get has none: {done.stderr[-200:]}")
        for archive in state.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(archive), str(new)], check=True)
        new.rename(folder)


@contextlib.contextmanager
def pgbouncer(
    server: str, folder: Path, version: str = "1.18", *, mode: str = "transaction", **settings: object
) -> Iterator[str]:
    """Run a PgBouncer in front of a server, and yield the DSN of the same database through it."""
    command = [*program(version), str(folder / "pgbouncer.ini")]
    arguments = connect_arguments(server)
    user, password = arguments.get("user", "postgres"), arguments.get("password", "")
    host = arguments["host"][0]
    if not host.startswith("/"):
        host = socket.gethostbyname(host)  # without asking the resolver of each PgBouncer
    upstream = f"host={host} port={arguments.get('port', 5432)} user={user}"
    upstream += f" password={password}" if password else ""
    with socket.socket() as free:  # PgBouncer needs a port even for a socket
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
    lines = [f"{name} = {value}" for name, value in options.items()]
    (folder / "pgbouncer.ini").write_text("\n".join(["[databases]", f"* = {upstream}", "[pgbouncer]", *lines, ""]))
    if os.geteuid() == 0:  # it refuses to run as root, but must reach root's sockets
        nobody = pwd.getpwnam("nobody")
        command = ["unshare", "--user", f"--map-user={nobody.pw_uid}", f"--map-group={nobody.pw_gid}", *command]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
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


if __name__ == "__main__":
    for each in VERSIONS:
        with contextlib.suppress(pytest.skip.Exception):  # the tests report it
            program(each)
