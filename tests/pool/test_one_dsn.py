"""asyncpg, psycopg and psycopg2 connect to the same server with one DSN, as libpq does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import psycopg
import psycopg2
import pytest
import yoyo

from chatdb import ConfigurationError
from chatdb._core.dsn import connect_arguments, libpq_dsn, read_dsn
from chatdb.admin.connection import connected

ME = pwd.getpwuid(os.geteuid()).pw_name
STATUS = {
    "server_version": "18.0",
    "default_transaction_read_only": "off",
    "client_encoding": "UTF8",
    "DateStyle": "ISO, MDY",
    "standard_conforming_strings": "on",
}
CLEAR, GSS = 80877103, 80877104  # request codes for TLS and GSS encryption


class Seen(NamedTuple):
    """The server that a client reached, and what the client sent."""

    server: str
    user: str
    database: str
    password: str | None = None
    settings: frozenset[tuple[str, str]] = frozenset()


class Servers:
    """TCP, IPv6 and Unix servers that accept every client and record what it sends."""

    def __init__(self, folder: Path) -> None:
        self.seen: list[Seen] = []
        self.asks = False
        self.places: dict[str, Any] = {"home": str(folder)}
        self._loop = asyncio.new_event_loop()
        self._listeners: list[asyncio.Server] = []
        self._writers: list[asyncio.StreamWriter] = []
        for name in ("run", "other", "default"):
            (folder / name).mkdir()
            self.places[name] = str(folder / name)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.places["gone"] = free.getsockname()[1]
        self._loop.run_until_complete(self._listen(folder))
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    async def _listen(self, folder: Path) -> None:
        for name, host in (("one", "127.0.0.1"), ("two", "127.0.0.1"), ("standby", "127.0.0.1"), ("six", "::1")):
            listener = await asyncio.start_server(self._handler(name), host, 0)
            self.places[name] = listener.sockets[0].getsockname()[1]
            self._listeners.append(listener)
        for name, port in (("run", 5432), ("run", 7777), ("other", 5432), ("default", 5432), ("default", 7777)):
            path = folder / name / f".s.PGSQL.{port}"
            self._listeners.append(await asyncio.start_unix_server(self._handler(f"{name}:{port}"), path))

    def _handler(self, name: str) -> Any:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._writers.append(writer)
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await self._serve(name, reader, writer)
            writer.close()

        return handle

    async def _serve(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            body = await reader.readexactly(int.from_bytes(await reader.readexactly(4)) - 4)
            if int.from_bytes(body[:4]) not in (CLEAR, GSS):
                break
            writer.write(b"N")
        words = [word.decode() for word in body[4:].split(b"\0")]
        told = dict(zip(words[::2], words[1::2], strict=False))
        user, database = told.pop("user"), told.pop("database", "")
        told.pop("client_encoding", None), told.pop("", None)
        password = None
        if self.asks:
            writer.write(message(b"R", (3).to_bytes(4)))
            head = await reader.readexactly(5)
            password = (await reader.readexactly(int.from_bytes(head[1:]) - 4)).rstrip(b"\0").decode()
        self.seen.append(Seen(name, user, database or user, password, frozenset(told.items())))
        status = STATUS | {"in_hot_standby": "on" if name == "standby" else "off"}
        statuses = (message(b"S", f"{option}\0{value}\0".encode()) for option, value in status.items())
        writer.write(message(b"R", bytes(4)) + b"".join(statuses) + message(b"K", bytes(8)) + message(b"Z", b"I"))
        await writer.drain()
        await reader.read()

    def close(self) -> None:
        """Stop listening."""

        async def end() -> None:
            for listener in self._listeners:
                listener.close()
            await asyncio.sleep(0.05)  # for the latest connections
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            for writer in self._writers:
                writer.close()
            await asyncio.gather(*(writer.wait_closed() for writer in self._writers), return_exceptions=True)
            await asyncio.sleep(0.05)
            self._loop.call_soon(self._loop.stop)

        asyncio.run_coroutine_threadsafe(end(), self._loop)
        self._thread.join()
        self._loop.close()


def message(kind: bytes, body: bytes) -> bytes:
    """Return a protocol message."""
    return kind + (len(body) + 4).to_bytes(4) + body


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Yield the servers, in a folder whose path is short enough for Unix sockets."""
    folder = tmp_path_factory.mktemp("pg")
    made = Servers(folder)
    yield made
    made.close()


class Case(NamedTuple):
    """A DSN with its environment and files, and what the server should receive; braces mark ports and folders."""

    dsn: str
    seen: Seen
    environment: dict[str, str] = {}  # noqa: RUF012 - never changed
    service: str = ""
    passwords: str = ""
    as_libpq: bool = True
    """Whether libpq does the same with the original DSN."""


def at(server: str, user: str = "ann", database: str = "chat", password: str | None = None, **settings: str) -> Seen:
    """Return what a server should receive."""
    return Seen(server, user, database, password, frozenset(settings.items()))


BOTH = "127.0.0.1:{gone},127.0.0.1:{two}"
PROD = "[test]\nhost=127.0.0.1\nport={two}\n\n[prod]\n# ours\nhost=127.0.0.1\nport={one}\nuser=sue\ndbname=shop\n"
CASES = [
    # addresses
    Case("postgresql://ann@127.0.0.1:{one}/chat", at("one")),
    Case("postgres://ann@127.0.0.1:{one}/chat", at("one")),
    Case("postgresql+psycopg://ann@127.0.0.1:{one}/chat", at("one"), as_libpq=False),
    Case("postgresql+asyncpg://ann@127.0.0.1:{one}/chat", at("one"), as_libpq=False),
    Case("postgresql://ann@localhost:{one}/chat", at("one")),
    Case("postgresql://ann@[::1]:{six}/chat", at("six")),
    Case("postgresql://ann@/chat?host=::1&port={six}", at("six")),
    Case("postgresql://ann@/chat?host=127.0.0.1&port={one}", at("one")),
    Case("postgresql://ann@127.0.0.1:{two}/chat?port={one}", at("one")),
    Case("postgresql://ann@nowhere.invalid:1/chat?host=127.0.0.1&port={one}", at("one")),
    Case("postgresql://127.0.0.1:{one}/?dbname=chat&user=ann", at("one")),
    Case("postgresql://eve@127.0.0.1:{one}/other?dbname=chat&user=ann", at("one")),
    Case("postgresql://ann@127.0.0.1:{one}", at("one", database="ann")),
    Case("postgresql://ann@127.0.0.1:{one}/", at("one", database="ann")),
    Case("postgresql://ann@127.0.0.1:{one}/chat?dbname=", at("one", database="ann")),
    Case("postgresql://127.0.0.1:{one}/chat", at("one", ME)),
    Case("postgresql://127.0.0.1:{one}", at("one", ME, ME)),
    Case("postgresql://127.0.0.1:{one}/chat", at("one", ME), {"USER": "eve", "LOGNAME": "eve"}),
    Case("postgresql://%C3%A4@127.0.0.1:{one}/%C3%BC%20b", at("one", "ä", "ü b")),
    Case("postgresql://a%40b@127.0.0.1:{one}/chat", at("one", "a@b")),
    # sockets
    Case("postgresql://ann@/chat?host={run}", at("run:5432")),
    Case("postgresql://ann@/chat?host={run}&port=7777", at("run:7777")),
    Case("postgresql://ann@:7777/chat?host={run}", at("run:7777")),
    Case("postgresql:///chat?host={other}&user=ann", at("other:5432")),
    Case("postgresql://ann@/chat", at("default:5432"), as_libpq=False),
    Case("postgresql://ann@:7777/chat", at("default:7777"), as_libpq=False),
    Case("postgresql://ann@/chat?port=7777", at("default:7777"), as_libpq=False),
    Case("postgresql://ann@/chat", at("default:7777"), {"PGPORT": "7777"}, as_libpq=False),
    Case("postgresql://ann@/chat?host=", at("default:5432"), {"PGHOST": "{run}"}, as_libpq=False),
    # several hosts
    Case(f"postgresql://ann@{BOTH}/chat", at("two")),
    Case("postgresql://ann@/chat?host=127.0.0.1,127.0.0.1&port={gone},{two}", at("two")),
    Case("postgresql://ann@127.0.0.1:{one},127.0.0.1:{two}/chat", at("one")),
    Case("postgresql://ann@[::1]:{gone},[::1]:{six}/chat", at("six")),
    Case("postgresql://ann@[::1]:{one},127.0.0.1:{one}/chat", at("one")),
    Case("postgresql://ann@/chat?host={home},{run}", at("run:5432")),
    Case("postgresql://ann@/chat?host={run},127.0.0.1&port=7777", at("run:7777")),
    Case("postgresql://ann@/chat?host={home},127.0.0.1&port={one}", at("one")),
    Case("postgresql://ann@127.0.0.1:{standby},127.0.0.1:{two}/chat?target_session_attrs=read-write", at("two")),
    Case("postgresql://ann@127.0.0.1:{standby},127.0.0.1:{two}/chat?target_session_attrs=primary", at("two")),
    Case("postgresql://ann@127.0.0.1:{one},127.0.0.1:{standby}/chat?target_session_attrs=standby", at("standby")),
    Case(
        "postgresql://ann@127.0.0.1:{one},127.0.0.1:{standby}/chat?target_session_attrs=prefer-standby", at("standby")
    ),
    Case("postgresql://ann@127.0.0.1:{one},127.0.0.1:{standby}/chat?target_session_attrs=read-only", at("standby")),
    Case(
        "postgresql://ann@127.0.0.1:{standby},127.0.0.1:{two}/chat", at("two"), {"PGTARGETSESSIONATTRS": "read-write"}
    ),
    Case(
        "postgresql://ann@127.0.0.1:{standby},127.0.0.1:{two}/chat?target_session_attrs=any",
        at("standby"),
        {"PGTARGETSESSIONATTRS": "read-write"},
    ),
    # environment variables
    Case("postgresql:///chat", at("one"), {"PGHOST": "127.0.0.1", "PGPORT": "{one}", "PGUSER": "ann"}),
    Case("postgresql://", at("one"), {"PGHOST": "127.0.0.1", "PGPORT": "{one}", "PGUSER": "ann", "PGDATABASE": "chat"}),
    Case("postgresql://ann@127.0.0.1/chat", at("one"), {"PGPORT": "{one}"}),
    Case("postgresql://ann@127.0.0.1:{one}/chat", at("one"), {"PGPORT": "{two}", "PGHOST": "{run}"}),
    Case("postgresql://ann@127.0.0.1:{one}/chat", at("one"), {"PGUSER": "eve", "PGDATABASE": "other"}),
    Case("postgresql://127.0.0.1:{one}", at("one", "eve", "eve"), {"PGUSER": "eve"}),
    Case("postgresql://127.0.0.1:{one}", at("one", ME, "other"), {"PGDATABASE": "other"}),
    Case("postgresql://ann@/chat", at("run:5432"), {"PGHOST": "{run}"}),
    Case("postgresql://ann@/chat", at("six"), {"PGHOST": "::1", "PGPORT": "{six}"}),
    Case("postgresql://ann@/chat", at("two"), {"PGHOST": "127.0.0.1,127.0.0.1", "PGPORT": "{gone},{two}"}),
    Case("postgresql://ann@/chat?host={run}", at("run:7777"), {"PGPORT": "7777", "PGHOST": "127.0.0.1"}),
    Case("postgresql://ann@127.0.0.1:{one}/chat", at("one", application_name="mine"), {"PGAPPNAME": "mine"}),
    Case(
        "postgresql://ann@127.0.0.1:{one}/chat?application_name=yours",
        at("one", application_name="yours"),
        {"PGAPPNAME": "mine"},
    ),
    Case("postgresql://ann@127.0.0.1:{one}/chat", at("one", options="-c geqo=off"), {"PGOPTIONS": "-c geqo=off"}),
    Case(
        "postgresql://ann@127.0.0.1:{one}/chat?options=-c%20jit%3Doff",
        at("one", options="-c jit=off"),
        {"PGOPTIONS": "-c geqo=off"},
    ),
    Case(
        "postgresql://ann@127.0.0.1:{one}/chat",
        at("one", timezone="UTC", datestyle="ISO", geqo="off"),
        {"PGTZ": "UTC", "PGDATESTYLE": "ISO", "PGGEQO": "off"},
    ),
    Case("postgresql://ann@127.0.0.1:{one}/chat", at("one"), {"PGTZ": "default"}),
    Case("postgresql://ann@127.0.0.1:{one}/chat", at("one"), {"PGSSLMODE": "disable", "PGCONNECT_TIMEOUT": "9"}),
    Case("postgresql://ann@127.0.0.1:{one}/chat", at("one"), {"PGSSLMODE": "allow", "PGSSLNEGOTIATION": "postgres"}),
    Case("postgresql://ann@127.0.0.1:{one}/chat", at("one"), {"PGCLIENTENCODING": "UTF8", "PGGSSENCMODE": "disable"}),
    # services
    Case("postgresql:///?service=prod", at("one", "sue", "shop"), service=PROD),
    Case("postgresql://", at("one", "sue", "shop"), {"PGSERVICE": "prod"}, PROD),
    Case("postgresql:///chat", at("one", "sue"), {"PGSERVICE": "prod"}, PROD),
    Case("postgresql://ann@/chat", at("one"), {"PGSERVICE": "prod"}, PROD),
    Case("postgresql://ann@/chat?service=test", at("two"), {"PGSERVICE": "prod"}, PROD),
    Case("postgresql://ann@/chat?service=test", at("two"), {"PGSERVICE": "none"}, PROD),
    Case("postgresql://ann@127.0.0.1:{two}/chat", at("two"), {"PGSERVICE": "prod"}, PROD),
    Case("postgresql://ann@/chat?host={run}&port=5432", at("run:5432"), {"PGSERVICE": "prod"}, PROD),
    Case("postgresql:///", at("one", "sue", "shop"), {"PGSERVICE": "prod", "PGHOST": "{run}", "PGUSER": "eve"}, PROD),
    Case("postgresql:///?service=prod", at("one", "sue", "sue"), service=PROD.replace("dbname=shop\n", "")),
    Case(
        "postgresql:///?service=prod",
        at("one", "sue", "shop", application_name="svc", options="-c geqo=off"),
        {"PGAPPNAME": "mine"},
        PROD + "application_name=svc\noptions=-c geqo=off\nsslmode=disable\nconnect_timeout=9\n",
    ),
    Case("postgresql:///?service=prod", at("one", "sue", "shop", "deep"), service=PROD + "password=deep\n"),
    # passwords
    Case("postgresql://ann:deep@127.0.0.1:{one}/chat", at("one", password="deep")),
    Case("postgresql://ann:d%40%2Fp%3A%23%25@127.0.0.1:{one}/chat", at("one", password="d@/p:#%")),
    Case("postgresql://ann:a+b@127.0.0.1:{one}/chat", at("one", password="a+b")),
    Case("postgresql://ann@127.0.0.1:{one}/chat?password=deep", at("one", password="deep")),
    Case("postgresql://ann@127.0.0.1:{one}/chat", at("one", password="deep"), {"PGPASSWORD": "deep"}),
    Case("postgresql://ann:deep@127.0.0.1:{one}/chat", at("one", password="deep"), {"PGPASSWORD": "other"}),
    Case(
        "postgresql://ann@127.0.0.1:{one}/chat", at("one", password="deep"), passwords="127.0.0.1:{one}:chat:ann:deep"
    ),
    Case("postgresql://ann@127.0.0.1:{one}/chat", at("one", password="deep"), passwords="*:*:*:*:deep"),
    Case(
        "postgresql://ann@127.0.0.1:{one}/chat",
        at("one", password="deep"),
        passwords="# mine\n\n127.0.0.1:{two}:*:*:no\n*:*:other:*:no\n*:*:*:eve:no\n*:*:chat:ann:deep\n*:*:*:*:late",
    ),
    Case(
        "postgresql://a%3Ab@127.0.0.1:{one}/chat", at("one", "a:b", password="d:e\\p"), passwords=r"*:*:*:a\:b:d\:e\\p"
    ),
    Case("postgresql://ann@127.0.0.1:{one}/chat", at("one", password="deep"), passwords="*:*:*:*:deep:rest"),
    Case("postgresql://ann@localhost:{one}/chat", at("one", password="deep"), passwords="localhost:*:*:*:deep"),
    Case("postgresql://ann@[::1]:{six}/chat", at("six", password="deep"), passwords=r"\:\:1:{six}:*:*:deep"),
    Case("postgresql://ann@/chat?host={run}", at("run:5432", password="deep"), passwords="{run}:5432:*:*:deep"),
    Case(
        "postgresql://ann@/chat", at("default:5432", password="deep"), passwords="localhost:*:*:*:deep", as_libpq=False
    ),
    Case(f"postgresql://ann@{BOTH}/chat", at("two", password="deep"), passwords="127.0.0.1:*:*:*:deep"),
    Case("postgresql://ann:deep@127.0.0.1:{one}/chat", at("one", password="deep"), passwords="*:*:*:*:no"),
    Case(
        "postgresql://ann@127.0.0.1:{one}/chat?passfile={home}/mine",
        at("one", password="deep"),
        {"PGPASSFILE": "{home}/none"},
        passwords="*:*:*:*:deep",
    ),
    Case("postgresql://ann@127.0.0.1:{one}/chat", at("one"), {"PGPASSFILE": "{home}/none"}, passwords="*:*:*:*:no"),
]
"""DSNs, variables, services and passwords, each with what a server should receive."""


def fill(text: str, servers: Servers) -> str:
    """Fill the servers' ports and folders into a text."""
    for name, place in servers.places.items():
        text = text.replace(f"{{{name}}}", str(place))
    return text


@pytest.fixture
def surroundings(servers: Servers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a function that sets up only a case's environment and files and returns its DSN."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("chatdb._core.dsn._SOCKET_FOLDERS", (servers.places["default"],))

    def make(case: Case) -> str:
        servers.asks = case.seen.password is not None
        for name, value in case.environment.items():
            monkeypatch.setenv(name, fill(value, servers))
        if case.service:
            (tmp_path / ".pg_service.conf").write_text(fill(case.service, servers))
        for file in (tmp_path / ".pgpass", Path(servers.places["home"], "mine")):
            file.unlink(missing_ok=True)
            if case.passwords:
                file.touch(0o600)
                file.write_text(fill(case.passwords, servers) + "\n")
        return fill(case.dsn, servers)

    return make


def by_asyncpg(dsn: str) -> None:
    """Connect as the pool does."""

    async def connect() -> None:
        connection = await asyncpg.connect(**connect_arguments(dsn), statement_cache_size=0)
        connection.terminate()

    asyncio.run(connect())


def by_psycopg(dsn: str) -> None:
    """Connect as `chatdb migrate` does."""
    with contextlib.closing(psycopg.connect(libpq_dsn(dsn, scheme="postgresql"), autocommit=True)):
        pass


def by_psycopg2(dsn: str) -> None:
    """Connect as yoyo's own backend does."""
    with contextlib.closing(psycopg2.connect(libpq_dsn(dsn, scheme="postgresql"))):
        pass


def by_libpq(dsn: str) -> None:
    """Connect with the original DSN."""
    with contextlib.closing(psycopg.connect(dsn, autocommit=True)):
        pass


WAYS = {"asyncpg": by_asyncpg, "psycopg": by_psycopg, "psycopg2": by_psycopg2, "libpq": by_libpq}


@pytest.mark.parametrize("case", CASES, ids=[f"{each.dsn} {' '.join(each.environment)}".strip() for each in CASES])
def test_where_each_driver_goes(case: Case, servers: Servers, surroundings: Any) -> None:
    """Each driver connects to the same server and database, with the same user and password."""
    dsn = surroundings(case)
    went = {}
    for name, connect in WAYS.items():
        if name == "libpq" and not case.as_libpq:
            continue
        servers.seen.clear()
        connect(dsn)
        went[name] = servers.seen[-1]
    assert went == dict.fromkeys(went, case.seen)


def test_the_table_is_long_enough() -> None:
    """The table has at least 60 combinations that libpq itself reads in the same way."""
    assert len(CASES) >= 60
    assert sum(case.as_libpq for case in CASES) >= 60


def test_yoyo_reads_the_same(servers: Servers, surroundings: Any) -> None:
    """With several hosts or a service, yoyo reads the same parameters from the URL."""
    for case in (Case(f"postgresql://ann@{BOTH}/chat", at("two")), Case("postgresql:///?service=prod", at("one"))):
        dsn = surroundings(case._replace(service=PROD))
        found = yoyo.connections.parse_uri(libpq_dsn(dsn, scheme="postgresql"))
        assert found.args == {name: value for name, value in read_dsn(dsn).libpq().items() if value}


REFUSED = [
    ({"PGHOSTADDR": "127.0.0.1"}, "does not support the environment variable PGHOSTADDR"),
    ({"PGREQUIREAUTH": "scram-sha-256"}, "PGREQUIREAUTH"),
    ({"PGREQUIREPEER": "postgres"}, "PGREQUIREPEER"),
    ({"PGSSLCRL": "/none"}, "PGSSLCRL"),
    ({"PGSSLMINPROTOCOLVERSION": "TLSv1.3"}, "PGSSLMINPROTOCOLVERSION"),
    ({"PGLOADBALANCEHOSTS": "random"}, "PGLOADBALANCEHOSTS"),
    ({"PGSERVICE": "none"}, "no service file defines the service"),
    ({"PGPORT": "x"}, "the environment's port must be a number"),
    ({"PGSSLMODE": "on"}, "the environment's sslmode must be one of"),
    ({"PGCONNECT_TIMEOUT": "soon"}, "the environment's connect_timeout"),
    ({"PGTARGETSESSIONATTRS": "master"}, "the environment's target_session_attrs must be one of"),
    ({"PGSSLROOTCERT": "/none", "PGSSLMODE": "verify-full"}, "sslrootcert"),
]


@pytest.mark.parametrize(("environment", "said"), REFUSED, ids=[" ".join(each) for each, _ in REFUSED])
def test_what_one_driver_cannot_do_is_refused_for_all(environment: Any, said: str, surroundings: Any) -> None:
    """A variable that only libpq supports, or an invalid value, is refused by name."""
    dsn = surroundings(Case("postgresql://ann@127.0.0.1/chat", at("one"), environment))
    for read in (connect_arguments, lambda dsn: libpq_dsn(dsn, scheme="postgresql")):
        with pytest.raises(ConfigurationError, match=said):
            read(dsn)
    with pytest.raises(ConfigurationError, match=said), connected(dsn):
        pass


def test_different_passwords_for_the_hosts(surroundings: Any) -> None:
    """Different passwords per host are refused: asyncpg would send the first password to every host."""
    dsn = surroundings(
        Case("postgresql://ann@one.example,two.example/chat", at("one"), passwords="one.example:*:*:*:a\n*:*:*:*:b")
    )
    with pytest.raises(ConfigurationError, match="different passwords"):
        read_dsn(dsn)


def test_a_password_file_that_others_can_read(surroundings: Any, tmp_path: Path, caplog: Any) -> None:
    """A password file that others can read is ignored, as in libpq, with a warning."""
    dsn = surroundings(Case("postgresql://ann@127.0.0.1/chat", at("one"), passwords="*:*:*:*:deep"))
    (tmp_path / ".pgpass").chmod(0o644)
    assert read_dsn(dsn).password is None
    assert "chmod 600" in caplog.text


@pytest.mark.parametrize("line", ["host", "service=other", "hots=127.0.0.1", "sslmode=on"])
def test_a_service_that_cannot_be_read(line: str, surroundings: Any) -> None:
    """An unknown or invalid line in a service file is refused."""
    dsn = surroundings(Case("postgresql:///?service=prod", at("one"), service=PROD + line))
    with pytest.raises(ConfigurationError, match="service"):
        read_dsn(dsn)


def test_a_service_file_of_the_system(surroundings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the user's service file lacks the service, the one in PGSYSCONFDIR applies."""
    dsn = surroundings(Case("postgresql:///?service=prod", at("one"), service="[other]\nhost=x\n"))
    (tmp_path / "pg_service.conf").write_text("[prod]\nhost=db\nuser=sue\n")
    monkeypatch.setenv("PGSYSCONFDIR", str(tmp_path))
    assert (read_dsn(dsn).hosts, read_dsn(dsn).user) == (("db",), "sue")


def test_a_remote_host_by_a_variable_or_a_service(surroundings: Any, one_authority: None) -> None:
    """A remote host from a variable or a service requires verified TLS unless sslmode is disable."""
    for environment, service, mode in (
        ({"PGHOST": "db.example.com"}, "", "verify-full"),
        ({"PGHOST": "db.example.com", "PGSSLMODE": "prefer"}, "", "verify-full"),
        ({"PGHOST": "db.example.com", "PGSSLMODE": "disable"}, "", "disable"),
        ({"PGHOST": "127.0.0.1"}, "", "prefer"),
        ({"PGHOST": ""}, "[prod]\nhost=db.example.com\n", "verify-full"),
        ({"PGHOST": ""}, "[prod]\nhost=db.example.com\nsslmode=disable\n", "disable"),
    ):
        dsn = surroundings(Case("postgresql:///chat", at("one"), {"PGSSLMODE": ""} | environment, service))
        assert read_dsn(dsn + "?service=prod" * bool(service)).libpq()["sslmode"] == mode


def test_no_limit_of_time(surroundings: Any) -> None:
    """A connect_timeout of 0 means no limit and overrides the variable, also for libpq."""
    case = Case("postgresql://ann@127.0.0.1/chat?connect_timeout=0", at("one"), {"PGCONNECT_TIMEOUT": "5"})
    found = read_dsn(surroundings(case))
    assert (found.timeout, found.libpq()["connect_timeout"]) == (None, "0")
    found = read_dsn("postgresql://ann@127.0.0.1/chat")
    assert (found.timeout, found.libpq()["connect_timeout"]) == (5.0, "5")


def test_the_value_has_no_password_in_its_repr() -> None:
    """The repr contains neither the password nor the options, which may contain one."""
    found = read_dsn("postgresql://ann:deep@127.0.0.1/chat?options=-c%20x.y%3Ddeep")
    assert "deep" not in f"{found} {found!r}"
    assert read_dsn(found) is found
    with pytest.raises(AttributeError):
        found.user = "eve"  # type: ignore[misc]
