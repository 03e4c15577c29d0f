"""Migrations whose process or server is killed before and after each statement."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from chatdb.admin.migrate import apply_migrations
from chatdb.embedded.server import EmbeddedServer
from chatdb.testing.databases import Databases
from chatdb.testing.servers import turn_off_durability
from tests.support.chaos import kill_server
from tests.support.databases import execute
from tests.support.embedded import temporary_server
from tests.support.forked import processes
from tests.support.migrating import NAMES, by_yoyo, down, over, up
from tests.support.migrations import objects
from tests.support.paths import ROOT
from tests.support.proxy import Proxy, Statement

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]


def state(dsn: str) -> list[object]:
    """
    Return everything that a migration changes: the schema and the recorded migrations.

    The rollback of a migration that validates a constraint leaves it valid.
    """
    with psycopg.connect(dsn) as connection:
        remembered = connection.execute(
            "select migration_id, sha256 from chatdb._chatdb_migration order by 1"
        ).fetchall()
        found = [tuple(str(part).replace(" NOT VALID", "") for part in each) for each in objects(dsn)]
        return [found, remembered]


@contextmanager
def prepared(databases: Databases, applied: int, dump: Path | None = None) -> Iterator[str]:
    """Yield the DSN of a new database, loaded with a dump or with the first `applied` migrations."""
    with databases.new() as dsn:
        if dump:
            execute(dsn, dump.read_text(encoding="utf-8"))
        if applied:
            apply_migrations(dsn, to=NAMES[applied - 1])
        yield dsn


def writes(statement: Statement) -> bool:
    """Return whether a statement may change what the next run finds."""
    return not statement.sql.lower().startswith(("select", "savepoint"))


@pytest.fixture(scope="module")
def own_server() -> Iterator[EmbeddedServer]:
    """Yield a server that may be killed."""
    with temporary_server() as server:
        turn_off_durability(server.dsn)
        yield server


@pytest.fixture(scope="module")
def own_databases(own_server: EmbeddedServer) -> Iterator[Databases]:
    """Yield what creates databases on that server."""
    with Databases(own_server.dsn) as databases:
        yield databases


WORK = (
    [(up, place) for place in range(len(NAMES))]
    + [(down, place) for place in range(len(NAMES))]
    + [(by_yoyo, 0), (over, 0)]
)


@pytest.mark.parametrize(("work", "place"), WORK, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("victim", ["process", "server"])
def test_killed(request: pytest.FixtureRequest, victim: str, work: Callable[[str, int], None], place: int) -> None:
    """After a kill before or after any writing statement, the next run has the result of an uninterrupted one."""
    quick = request.config.getoption("--quick")
    if quick and work in {up, down} and place % 3 != (len(NAMES) - 1) % 3:
        pytest.skip("the sample has the newest migration and every third one before it")
    own = request.getfixturevalue("own_server") if victim == "server" else None
    databases: Databases = request.getfixturevalue("own_databases" if own else "databases")
    step = (21 if work in {by_yoyo, over} else 7) if quick else 1
    before, after = {up: (place, place + 1), down: (place + 1, place), by_yoyo: (0, len(NAMES)), over: (0, len(NAMES))}[
        work
    ]
    again = partial(up, place=len(NAMES) - 1) if work is by_yoyo else partial(work, place=place)
    with prepared(databases, after) as dsn:
        expected = state(dsn) if after else None
    points = 0
    dump = ROOT / "tests" / "support" / "data" / "07b569c-chatdb-migrate.sql" if work is over else None
    with prepared(databases, before, dump) as template:
        for answered in (bool(place % 2),) if quick else (False, True):
            for number in count(step // 2, step):
                with databases.new(urlsplit(template).path[1:]) as dsn:
                    process, struck = _run_until(dsn, work, place, number, answered=answered, own=own)
                    if not struck:
                        assert process.exitcode == 0
                        break
                    points += 1
                    if own:
                        own.stop()
                        own.start()
                    again(dsn)
                    assert expected is None or state(dsn) == expected, (number, answered)
                    assert after or objects(dsn) == []
    print(
        f"figure: {work.__name__} {place}: the {victim} was killed at {points} points, each time with the same result"
    )
    assert points >= max(1, 20 // step // 2)


def _run_until(
    dsn: str, work: Callable[[str, int], None], place: int, number: int, *, answered: bool, own: EmbeddedServer | None
) -> tuple[ForkServerProcess, bool]:
    """Run `work` in a process and kill it or the server at statement `number`; return whether that was reached."""
    struck = threading.Event()
    places = count()

    def watch(statement: Statement) -> bool:
        if writes(statement) and statement.answered == answered and next(places) == number:
            struck.set()
            if own:
                kill_server(own.path / "data")
            elif process.pid:
                os.kill(process.pid, signal.SIGKILL)
        return struck.is_set()

    with Proxy(dsn, watch=watch) as proxy:
        process = processes.Process(target=work, args=(proxy.dsn, place))
        process.start()
        process.join()
    return process, struck.is_set()
