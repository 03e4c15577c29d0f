"""The fixtures of the benchmarks, and the judgement at the end: `pytest benchmarks` fails if a gate falls."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from benchmarks import sabotage
from benchmarks.figures import RESULTS, Figures
from benchmarks.gates import GATES
from benchmarks.report import write
from benchmarks.server import LARGE_BUFFERS, BenchServer, folder
from benchmarks.workload import SIZES, Size

ORDER = ("test_load", "test_counts", "test_operations", "test_bulk", "test_target", "test_growth")
"""The suites in their order: those that restart the server come last."""

SUITES = {
    "counts": "test_counts",
    "ratios": "test_operations",
    "bulk": "test_bulk",
    "target": "test_target",
    "growth": "test_growth",
}
"""Where the figures of each group of gates come from."""

FIGURES = pytest.StashKey[Figures]()

SERVER = pytest.StashKey[BenchServer]()

MINUTES_A_MILLION = 0.5
"""How long the load of a million messages takes, as far as it can be said."""

"""Where a run leaves its figures and its report."""

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Add what the nox sessions choose by, and pytest-benchmark, which only these need."""
    pluginmanager.import_plugin("pytest_benchmark.plugin")
    group = parser.getgroup("chatdb")
    group.addoption("--quick", action="store_true", help="100 k messages: counts, plans and the 100 ms target only")
    group.addoption("--size", choices=SIZES, default="1m", help="the database of the side-by-side suites (1m)")
    group.addoption("--largest", choices=("1m", "10m"), default="10m", help="the end of the growth curve (10m)")
    group.addoption("--report", type=Path, help="the folder of the report (.benchmarks/report)")
    group.addoption("--sabotage", choices=sabotage.ALL, help="break something, to see a gate fall")


def pytest_configure(config: pytest.Config) -> None:
    """Begin a run."""
    config.addinivalue_line("markers", "full: not in a quick run")
    config.addinivalue_line("filterwarnings", "default::pytest_benchmark.logger.PytestBenchmarkWarning")
    config.stash[FIGURES] = Figures(quick=config.getoption("--quick"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the suites in order, and leave out what a quick run has no time for."""
    quick = config.getoption("--quick")
    left_out = [item for item in items if quick and item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = sorted((item for item in items if item not in left_out), key=lambda item: ORDER.index(_suite(item)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Note which gates this run judges: those of the suites that run."""
    config = session.config
    suites = {_suite(item) for item in session.items}
    judged = {gate.name for gate in GATES if SUITES[gate.group] in suites}
    if config.getoption("--quick"):
        judged &= {gate.name for gate in GATES if gate.quick}
    elif config.getoption("--size") != "1m":
        judged -= {gate.name for gate in GATES if gate.group == "ratios"}
    if config.getoption("--largest") != "10m":
        judged -= {gate.name for gate in GATES if gate.group == "growth" or gate.name.startswith("large")}
    config.stash[FIGURES].expected = judged


def _sizes(session: pytest.Session) -> list[Size]:
    """Return the databases that the collected suites read."""
    config = session.config
    if config.stash[FIGURES].quick:
        return [SIZES["100k"]]
    suites = {_suite(item) for item in session.items}
    largest = SIZES[config.getoption("--largest")]
    chosen = {config.getoption("--size")}
    if suites & {"test_target", "test_growth"}:
        chosen.add(largest.name)
    if "test_growth" in suites:
        chosen.update(size.name for size in SIZES.values() if size.messages <= largest.messages)
    return [size for size in SIZES.values() if size.name in chosen]


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Start the server and load what is missing, before the first test and its time limit begin."""
    if session.config.option.collectonly or not session.items:
        return
    server = session.config.stash[SERVER] = BenchServer()
    server.start()
    missing = [size for size in _sizes(session) if not server.is_loaded(size)]
    if not missing:
        return
    millions = sum(size.messages for size in missing) / 1_000_000
    needed, free = sum(size.gigabytes for size in missing), shutil.disk_usage(folder()).free / 1e9
    names, minutes = " and ".join(size.name for size in missing), max(millions * MINUTES_A_MILLION, 1)
    print(
        f"\nloading {names} messages, once, into {folder()}: about {minutes:.0f} minutes and {needed:.1f} of "
        f"{free:.0f} GB free; interrupted, it goes on where it was"
    )
    if needed > free:
        pytest.exit(f"the disk of {folder()} has {free:.1f} GB free: set CHATDB_BENCH_HOME to another", returncode=4)
    for size in missing:
        server.load(size)


def _suite(item: pytest.Item) -> str:
    return item.path.stem


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Keep the figures, write the report, and fail if a gate fell."""
    config = session.config
    figures = config.stash[FIGURES]
    if SERVER in config.stash:
        config.stash[SERVER].stop()
    if config.getoption("collectonly") or not session.testscollected:
        return
    RESULTS.mkdir(exist_ok=True)
    sabotaged = config.getoption("--sabotage")
    figures.save(RESULTS / (f"sabotage-{sabotaged}.json" if sabotaged else "run.json"))
    if not sabotaged:
        write(figures.run, config.getoption("--report") or RESULTS / "report")
    if exitstatus == 0 and any(figures.judge(gate)[1] is False for gate in GATES):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say of each gate what came of it, those that fell last."""
    figures = config.stash[FIGURES]
    judged = [(gate, *figures.judge(gate)) for gate in GATES]
    terminalreporter.section("gates")
    for gate, value, passed in judged:
        if passed:
            terminalreporter.write_line(f"passed  {gate.judged(value)}")
    for gate, value, passed in judged:
        if passed is False:
            told = f"{gate.title}: not measured" if value is None else gate.judged(value)
            terminalreporter.write_line(f"FELL    {told}", red=True)
    if not config.getoption("--sabotage"):
        report = config.getoption("--report") or RESULTS / "report"
        terminalreporter.write_line(f"figures: {RESULTS / 'run.json'}, report: {report / 'benchmarks.html'}")


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Figures:
    """Give what collects the run's figures."""
    return pytestconfig.stash[FIGURES]


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config, figures: Figures) -> BenchServer:
    """Give the benchmarks' own server."""
    server = pytestconfig.stash[SERVER]
    with server.connect() as connection:
        figures.run["versions"]["PostgreSQL"] = connection.info.parameter_status("server_version")
        names = ("shared_buffers", "fsync", "synchronous_commit", "max_wal_size", "random_page_cost", "jit")
        figures.run["settings"] = {name: connection.execute(f"show {name}").fetchone()[0] for name in names}
        figures.run["settings"]["shared_buffers for 10 M and the growth"] = LARGE_BUFFERS["shared_buffers"]
    return server


@pytest.fixture(scope="session")
def size(pytestconfig: pytest.Config, figures: Figures) -> Size:
    """Give the size of the side-by-side suites."""
    size = SIZES["100k" if figures.quick else pytestconfig.getoption("--size")]
    figures.run["sizes"].append(size.name)
    return size


@pytest.fixture(scope="session")
def copy(server: BenchServer, size: Size, pytestconfig: pytest.Config) -> Iterator[str]:
    """Give the DSN of a copy of the data, which the run may change."""
    name = "bench_run"
    with server.copied(size, name) as dsn, sabotage.applied(pytestconfig.getoption("--sabotage"), server, name):
        yield dsn


@pytest.fixture(scope="module", params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    """Give the name of an event loop."""
    return request.param


@pytest.fixture(scope="module")
def runner(loop: str) -> Iterator[asyncio.Runner]:
    """Give one event loop for all calls of a suite: making one is not what is measured."""
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        yield runner


@pytest.fixture(scope="module")
def plain() -> Iterator[asyncio.Runner]:
    """Give asyncio's own loop, where the other one would say nothing new."""
    with asyncio.Runner() as runner:
        yield runner
