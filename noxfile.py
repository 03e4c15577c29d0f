"""What the project runs: `nox -l` lists it."""

from __future__ import annotations

from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["tests", "lint", "types"]

PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
PROJECT = nox.project.load_toml("pyproject.toml")


def install(session: nox.Session, group: str) -> None:
    """Install the checkout, editable and with every extra, and a dependency group."""
    listed = nox.project.dependency_groups(PROJECT, group)
    session.install("-e", ".[demo]", *listed)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the whole suite on the Python that runs nox."""
    install(session, "test")
    session.run("pytest", *session.posargs)


@nox.session(python=PYTHONS)
def pythons(session: nox.Session) -> None:
    """Run the whole suite on each Python that the machine has."""
    install(session, "test")
    session.run("pytest", *session.posargs)


@nox.session
def uvloop(session: nox.Session) -> None:
    """Run the whole suite on uvloop."""
    install(session, "test")
    session.run("pytest", "--uvloop", *session.posargs)


@nox.session
def container(session: nox.Session) -> None:
    """Run the whole suite on a PostgreSQL that testcontainers starts; CHATDB_TEST_IMAGE names its image."""
    install(session, "test")
    session.run("pytest", "--server", "container", *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it alone into a clean environment, and use it from another folder."""
    session.install("build>=1.2,<2")
    dist = Path(session.create_tmp()) / "dist"
    session.run("python", "-m", "build", "--outdir", str(dist), silent=True)
    newest = max(dist.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    session.run("python", "-m", "pip", "uninstall", "-q", "-y", "build")
    session.install(f"{newest}[cli,embedded,migrate]")
    check = Path("tests/use_installed.py").resolve()
    with session.chdir(session.create_tmp()):
        session.run("python", "-I", str(check))


@nox.session
def lint(session: nox.Session) -> None:
    """Check the form of Python, SQL and migrations."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("sqlfluff", "lint", "--processes", "2", "sql", "migrations")
    session.run("squawk", *map(str, sorted(Path("migrations").glob("*.sql"))))


@nox.session
def types(session: nox.Session) -> None:
    """Check the types by mypy and pyright, and those that users see."""
    install(session, "lint")
    session.run("mypy")
    session.run("mypy", "--strict", "tests/typing_example.py")
    session.run("pyright")
    session.run("pyright", "tests/typing_example.py")


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmarks; fails if the history misses its target."""
    install(session, "test")
    session.run("pytest", "benchmarks", "--benchmark-columns=min,median,max,rounds", *session.posargs)
