"""
Mutation testing of the core: `nox -s mutation`, or `python -m tests.support.mutation --sample 60 --seed 1`.

It makes one change at a time to one module, runs the tests of that module in a copy of the checkout, and lists the
changes that no test detects. Two processes work in parallel, each with its own copy and server.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from chatdb.embedded.server import EmbeddedServer
from chatdb.testing.servers import turn_off_durability
from tests.support.databases import in_memory
from tests.support.paths import ROOT

API = ("tests/api/test_public_api.py", "tests/api/test_messages.py", "tests/api/test_conversations.py")
DRIFT = ("tests/contract/test_drift.py",)
INPUT = ("tests/api/test_arguments.py", "tests/api/test_input.py")
ERRORS = ("tests/api/test_errors.py", "tests/api/test_causes.py")
POOL = ("tests/pool/test_pool.py", "tests/pool/test_idle_connections.py", "tests/pool/test_handles.py")
WRITES = (
    "tests/api/test_batches.py",
    "tests/api/test_compare_and_set.py",
    "tests/api/test_replace_and_pop.py",
    "tests/api/test_upserts.py",
)
TESTS = {
    "chatdb/__init__.py": (*API, "tests/cli/test_commands.py"),
    "chatdb/__main__.py": ("tests/cli/test_commands.py",),
    "chatdb/branches.py": ("tests/api/test_branches.py", "tests/api/test_context.py", *API, *INPUT, *DRIFT),
    "chatdb/conversations.py": (*API, *INPUT, *DRIFT, *ERRORS, "tests/api/test_lists.py", *WRITES),
    "chatdb/errors.py": (*ERRORS, *API, *DRIFT, "tests/security/test_secrets.py", "tests/pool/test_pooler.py"),
    "chatdb/messages.py": (*API, *INPUT, *DRIFT, *ERRORS, *WRITES),
    "chatdb/pool.py": (
        *POOL,
        *API,
        "tests/pool/test_calls.py",
        "tests/pool/test_retry.py",
        "tests/pool/test_replicas.py",
    ),
    "chatdb/records.py": ("tests/api/test_records.py", *API, *DRIFT, "tests/api/test_tokens.py"),
    "chatdb/replicas.py": ("tests/pool/test_replicas.py", *API),
    "chatdb/schema.py": (*API, *ERRORS, *DRIFT, "tests/admin/test_check.py"),
    "chatdb/search.py": ("tests/api/test_search.py", *API, *INPUT, *DRIFT),
    "chatdb/streaming.py": ("tests/api/test_streaming.py", "tests/api/test_stream_message.py", *API, *INPUT, *DRIFT),
    "chatdb/users.py": ("tests/api/test_users.py", *API, *INPUT, *DRIFT),
    "chatdb/watching.py": ("tests/api/test_watching.py", *API),
    "chatdb/_core/asyncpg_private.py": (*POOL, "tests/pool/test_asyncpg_private.py", *API, *ERRORS),
    "chatdb/_core/calls.py": ("tests/pool/test_calls.py", "tests/pool/test_telemetry.py", *API),
    "chatdb/_core/decode.py": (*API, "tests/api/test_records.py", *DRIFT, "tests/pool/test_handles.py"),
    "chatdb/_core/driver_errors.py": (
        *ERRORS,
        "tests/contract/test_sqlstates.py",
        "tests/contract/test_distributed.py",
        *POOL,
    ),
    "chatdb/_core/dsn.py": ("tests/pool/test_dsn.py", "tests/pool/test_one_dsn.py", "tests/pool/test_tls.py"),
    "chatdb/_core/hints.py": ("tests/api/test_watching.py", *API),
    "chatdb/_core/options.py": ("tests/pool/test_dsn.py", *INPUT, *POOL),
    "chatdb/_core/query.py": (
        *API,
        *INPUT,
        *DRIFT,
        *ERRORS,
        "tests/security/test_secrets.py",
        "tests/pool/test_pool.py",
        "tests/pool/test_calls.py",
        "tests/pool/test_retry.py",
    ),
    "chatdb/_core/retry.py": ("tests/pool/test_retry.py", *POOL),
    "chatdb/_core/sqlstate.py": ("tests/contract/test_sqlstates.py", *ERRORS, *API),
    "chatdb/_core/validate.py": (*INPUT, *API, *DRIFT, "tests/api/test_attacks.py"),
}
"""The tests of each module in the order of their run."""

SWAPPED: dict[type[ast.AST], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "//",
}


class Mutation(NamedTuple):
    """A change of a module: replaces the bytes between two offsets."""

    path: str
    line: int
    start: int
    end: int
    before: str
    after: str

    def of(self, source: bytes) -> bytes:
        """Return the changed source."""
        return source[: self.start] + self.after.encode() + source[self.end :]

    def __str__(self) -> str:
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        return f"{self.path}:{self.line}: {before[:90]}  ->  {after[:90] or '(nothing)'}"


def mutations(path: str, source: str) -> Iterator[Mutation]:
    """Yield every mutation of a module, except in code that only type checkers or readers see."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    encoded = source.encode()

    def place(node: ast.AST) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def text(node: ast.AST) -> str:
        start, end = place(node)
        return encoded[start:end].decode()

    for node in _executed(ast.parse(source)):
        for changed, after in _changes(node, text):
            start, end = place(changed)
            yield Mutation(path, changed.lineno, start, end, text(changed), after)


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the descendants of a node, except annotations, docstrings, decorators and TYPE_CHECKING blocks."""
    for name, field in ast.iter_fields(node):
        if name in {"annotation", "returns", "decorator_list", "type_params"}:
            continue
        for child in field if isinstance(field, list) else [field]:
            if not isinstance(child, ast.AST) or _is_only_read(child):
                continue
            yield child
            yield from _executed(child)


def _is_only_read(node: ast.AST) -> bool:
    match node:
        case ast.Expr(value=ast.Constant()) | ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.Assert():
            return True
        case ast.FunctionDef(name="__repr__" | "__str__"):
            return True
        case ast.Call(func=ast.Name(id="TypeVar" | "cast")):
            return True
    return False


def _changes(node: ast.AST, text: Callable[[ast.AST], str]) -> Iterator[tuple[ast.AST, str]]:
    """Yield replacements for a node or its condition."""
    match node:
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) if not _is_swapped(test):
            yield test, f"(not ({text(test)}))"
        case ast.Compare(left=left, ops=[operator], comparators=[right]) if type(operator) in SWAPPED:
            yield node, f"{_wrapped(text(left))} {SWAPPED[type(operator)]} {_wrapped(text(right))}"
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in SWAPPED and _is_number(node):
            yield node, f"{_wrapped(text(left))} {SWAPPED[type(operator)]} {_wrapped(text(right))}"
        case ast.BoolOp(op=operator, values=values):
            other = " or " if isinstance(operator, ast.And) else " and "
            yield node, f"({other.join(_wrapped(text(value)) for value in values)})"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield node, _wrapped(text(operand))
        case ast.Constant(value=bool(value)):
            yield node, str(not value)
        case ast.Constant(value=int(value)):
            yield node, str(value + 1)
        case ast.Raise() | ast.AugAssign() | ast.Expr(value=ast.Call() | ast.Await()) | ast.Delete():
            yield node, "pass"
        case ast.Return(value=ast.expr() as value) if text(value) != "None":
            yield node, "return None"
        case ast.Continue():
            yield node, "break"
        case ast.Break():
            yield node, "continue"
        case ast.Call(func=func, args=args, keywords=[*others, ast.keyword(arg=str())]) if not any(
            isinstance(each, ast.GeneratorExp) for each in args
        ):
            yield node, f"{text(func)}({', '.join(text(each) for each in (*args, *others))})"


def _is_swapped(test: ast.expr) -> bool:
    """Return whether another mutation of the comparison already negates the condition."""
    return isinstance(test, ast.Compare) and isinstance(
        test.ops[0], (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
    )


def _wrapped(part: str) -> str:
    return part if re.fullmatch(r"[\w.]+|[\w.]+\([^()]*\)", part) else f"({part})"


def _is_number(node: ast.BinOp) -> bool:
    """Return whether an operation does not obviously build a text or a collection."""
    return not any(
        isinstance(each, (ast.JoinedStr, ast.List, ast.Tuple, ast.Dict)) or _is_text(each) for each in ast.walk(node)
    )


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def core() -> dict[str, list[Mutation]]:
    """Return all mutations of each module of the core."""
    paths = sorted([*(ROOT / "chatdb").glob("*.py"), *(ROOT / "chatdb" / "_core").glob("*.py")])
    names = [str(path.relative_to(ROOT)) for path in paths]
    found = {name: list(mutations(name, (ROOT / name).read_text(encoding="utf-8"))) for name in names}
    return {name: changes for name, changes in found.items() if changes}


def sample(found: dict[str, list[Mutation]], most: int, seed: int) -> list[Mutation]:
    """Choose mutations at random, the same number from each module where possible."""
    chance = random.Random(seed)
    shuffled = [chance.sample(changes, len(changes)) for changes in found.values()]
    rounds = (mutation for each in itertools.zip_longest(*shuffled) for mutation in each if mutation)
    return list(itertools.islice(rounds, most))


class Checkout:
    """A copy of the checkout and a server, for one mutation at a time."""

    def __init__(self, folder: Path, server: EmbeddedServer) -> None:
        self._folder, self._server = folder, server
        listed = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
        for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0"):
            if name and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        if (ROOT / ".cache").is_dir():
            (folder / ".cache").symlink_to(ROOT / ".cache")

    def failure(self, tests: tuple[str, ...], limit: float) -> str | None:
        """Run tests until one fails. Return its name or the reason, or None if all pass."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--server", "dsn"]
        settings = {
            "CHATDB_TEST_DSN": self._server.dsn,
            "PYTHONPATH": str(self._folder),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        process = subprocess.Popen(
            [*command, *tests],
            cwd=self._folder,
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return f"no end in {limit:g} s"
        if process.returncode == 0:
            return None
        failed = re.findall(r"^(?:FAILED|ERROR) ([^\s\[]+)", said, re.MULTILINE)
        return failed[0] if failed else f"pytest ended with {process.returncode}: {said[-200:]}"

    def killer(self, mutation: Mutation, limit: float) -> str | None:
        """Return the test that detects a mutation, or None."""
        path = self._folder / mutation.path
        source = path.read_bytes()
        path.write_bytes(mutation.of(source))
        try:
            return self.failure(TESTS[mutation.path], limit)
        finally:
            path.write_bytes(source)


def main() -> int:
    """Try a sample of the mutations, and list the survivors."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--sample", type=int, default=60, help="how many mutations are tried; 0 for all")
    parser.add_argument("--seed", type=int, default=random.randrange(10_000))
    parser.add_argument("--modules", nargs="*", help="only these, such as chatdb/messages.py")
    parser.add_argument("--limit", type=float, default=240, help="seconds for the tests of a mutation")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    found = {name: changes for name, changes in core().items() if not options.modules or name in options.modules}
    every = [mutation for changes in found.values() for mutation in changes]
    tried = sample(found, options.sample or len(every), options.seed)
    print(f"{len(tried)} of {len(every)} mutations of {len(found)} modules, --seed {options.seed}", flush=True)
    waiting: queue.SimpleQueue[Mutation] = queue.SimpleQueue()
    for mutation in tried:
        waiting.put(mutation)
    survivors: dict[str, list[Mutation]] = defaultdict(list)
    begun = time.monotonic()

    def work() -> None:
        place = tempfile.TemporaryDirectory(prefix="chatdb-mutation-", dir=in_memory(), ignore_cleanup_errors=True)
        with place as name:
            folder = Path(name)
            folder.chmod(0o711)  # without user namespaces, a server started by root runs as nobody
            with EmbeddedServer(folder / "server") as server:
                turn_off_durability(server.dsn)
                (folder / "checkout").mkdir()
                checkout = Checkout(folder / "checkout", server)
                while True:
                    try:
                        mutation = waiting.get_nowait()
                    except queue.Empty:
                        return
                    killer = checkout.killer(mutation, options.limit)
                    if killer is None:
                        survivors[mutation.path].append(mutation)
                    print(f"{mutation}\n    {f'killed by {killer}' if killer else 'SURVIVED'}", flush=True)

    workers = [threading.Thread(target=work) for _ in range(options.processes)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:
        while not waiting.empty():
            waiting.get()
        for worker in workers:
            worker.join()
    print(f"\nafter {time.monotonic() - begun:.0f} s:")
    for name in sorted({mutation.path for mutation in tried}):
        count = sum(mutation.path == name for mutation in tried)
        print(f"{name}: {count - len(survivors[name])} killed, {len(survivors[name])} survived")
        for mutation in sorted(survivors[name]):
            print(f"  {mutation}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
