"""Fixtures of the benchmarks. `pytest benchmarks` fails if a gate fails."""

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

ORDER = (
    "test_load",
    "test_counts",
    "test_search",
    "test_operations",
    "test_bulk",
    "test_formats",
    "test_locality",
    "test_target",
    "test_growth",
)
"""The suites in run order. Suites that restart the server are last."""

SUITES = {
    "counts": "test_counts",
    "ratios": "test_operations",
    "bulk": "test_bulk",
    "formats": "test_formats",
    "search": "test_search",
    "locality": "test_locality",
    "target": "test_target",
    "growth": "test_growth",
}
"""The suite that measures each group of gates."""

FIGURES = pytest.StashKey[Figures]()

SERVER = pytest.StashKey[BenchServer]()

MINUTES_A_MILLION = 0.5
"""Estimated minutes to load a million messages."""


LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Add the options of the nox sessions, and load pytest-benchmark."""
    pluginmanager.import_plugin("pytest_benchmark.plugin")
    group = parser.getgroup("chatdb")
    group.addoption(
        "--quick", action="store_true", help="run only counts, plans and the 100 ms target, on 100 k messages"
    )
    group.addoption(
        "--size", choices=SIZES, default="1m", help="database size for the side-by-side suites (default 1m)"
    )
    group.addoption(
        "--largest",
        choices=("1m", "10m"),
        default="10m",
        help="largest database size of the growth curve (default 10m)",
    )
    group.addoption("--report", type=Path, help="folder for the report (default .benchmarks/report)")
    group.addoption("--sabotage", choices=sabotage.ALL, help="break chatdb on purpose, to see a gate fail")


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark and start recording figures."""
    config.addinivalue_line("markers", "full: not in a quick run")
    config.addinivalue_line("filterwarnings", "default::pytest_benchmark.logger.PytestBenchmarkWarning")
    config.stash[FIGURES] = Figures(quick=config.getoption("--quick"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the suites, and deselect the slow tests in a quick run."""
    quick = config.getoption("--quick")
    left_out = [item for item in items if quick and item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = sorted((item for item in items if item not in left_out), key=lambda item: ORDER.index(_suite(item)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Select the gates whose suites run."""
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
    """Start the server and load missing data before the first test's time limit starts."""
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
        f"\nloading {names} messages, once, into {folder()}: takes about {minutes:.0f} minutes and {needed:.1f} of "
        f"{free:.0f} GB free; an interrupted load continues in the next run"
    )
    if needed > free:
        pytest.exit(
            f"{folder()} has only {free:.1f} GB of free disk space: set CHATDB_BENCH_HOME to another folder",
            returncode=4,
        )
    for size in missing:
        server.load(size)


def _suite(item: pytest.Item) -> str:
    return item.path.stem


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Save the figures, write the report, and fail the run if a gate failed."""
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
    """Print the result of each gate, failures last."""
    figures = config.stash[FIGURES]
    judged = [(gate, *figures.judge(gate)) for gate in GATES]
    terminalreporter.section("gates")
    for gate, value, passed in judged:
        if passed:
            terminalreporter.write_line(f"passed  {gate.judged(value)}")
    for gate, value, passed in judged:
        if passed is False:
            told = f"{gate.title}: not measured" if value is None else gate.judged(value)
            terminalreporter.write_line(f"FAILED  {told}", red=True)
    if not config.getoption("--sabotage"):
        report = config.getoption("--report") or RESULTS / "report"
        terminalreporter.write_line(f"figures: {RESULTS / 'run.json'}, report: {report / 'benchmarks.html'}")


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Figures:
    """Return the figures of this run."""
    return pytestconfig.stash[FIGURES]


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config, figures: Figures) -> BenchServer:
    """Return the benchmark server, and record its version and settings."""
    server = pytestconfig.stash[SERVER]
    with server.connect() as connection:
        figures.run["versions"]["PostgreSQL"] = connection.info.parameter_status("server_version")
        names = ("shared_buffers", "fsync", "synchronous_commit", "max_wal_size", "random_page_cost", "jit")
        figures.run["settings"] = {name: connection.execute(f"show {name}").fetchone()[0] for name in names}
        figures.run["settings"]["shared_buffers for 10 M and growth"] = LARGE_BUFFERS["shared_buffers"]
    return server


@pytest.fixture(scope="session")
def size(pytestconfig: pytest.Config, figures: Figures) -> Size:
    """Return the database size for the side-by-side suites."""
    size = SIZES["100k" if figures.quick else pytestconfig.getoption("--size")]
    figures.run["sizes"].append(size.name)
    return size


@pytest.fixture(scope="session")
def copy(server: BenchServer, size: Size, pytestconfig: pytest.Config) -> Iterator[str]:
    """Yield the DSN of a copy of the data, which the run may change."""
    name = "bench_run"
    with server.copied(size, name) as dsn, sabotage.applied(pytestconfig.getoption("--sabotage"), server, name):
        yield dsn


@pytest.fixture(scope="module", params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    """Return the name of an event loop."""
    return request.param


@pytest.fixture(scope="module")
def runner(loop: str) -> Iterator[asyncio.Runner]:
    """Yield one event loop for all calls of a suite, so its creation is not measured."""
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        yield runner


@pytest.fixture(scope="module")
def plain() -> Iterator[asyncio.Runner]:
    """Yield asyncio's own loop, for suites where uvloop would show nothing new."""
    with asyncio.Runner() as runner:
        yield runner
