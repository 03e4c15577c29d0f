"""The pages of docs/howto/ for frameworks, each in its framework."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

import chatdb
from tests.support.pages import python_blocks, without_delays
from tests.support.pools import kill_sessions
from tests.support.service import free_port

ALICE: dict[str, Any] = {"user_id": "alice", "conversation_key": "trip"}


@pytest.fixture
def load_page(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield a function that imports the block of a page as a module; its pool is that of the test's own database."""
    monkeypatch.setenv("DATABASE_URL", dsn)
    made: list[str] = []

    def load(page: str) -> ModuleType:
        [code] = python_blocks(f"howto/{page}.md")
        name = code.splitlines()[0].removeprefix("# ").removesuffix(".py")
        module = ModuleType(name)
        sys.modules[name] = module
        made.append(name)
        exec(compile(code, f"{name}.py", "exec"), module.__dict__)
        return module

    yield load
    for name in made:
        del sys.modules[name]


async def test_starlette(load_page: Any) -> None:
    """The token decides who the user is; without one, and for another user, nothing is served."""
    app = load_page("starlette").app
    async with app.router.lifespan_context(app) as state:

        async def with_state(scope: Any, receive: Any, send: Any) -> None:
            await app(scope | {"state": dict(state)}, receive, send)

        transport = httpx.ASGITransport(app=with_state)
        async with httpx.AsyncClient(transport=transport, base_url="http://service/chats/trip") as client:
            alice, bob = ({"Authorization": f"Bearer token-of-{name}"} for name in ("alice", "bob"))
            for headers in ({}, {"Authorization": "Bearer alice"}, {"Authorization": "Basic token-of-alice"}):
                refused = await client.get("/messages", headers=headers)
                assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            sent = await client.post("/messages", headers=alice, json={"content": "hello", "user_id": "bob"})
            assert (sent.status_code, sent.json()["seq"]) == (201, 1)
            assert (await client.get("/messages", headers=alice)).json() == [sent.json()]
            missing = await client.get("/messages", headers=bob)
            assert (missing.status_code, missing.json()) == (404, {"detail": chatdb.ConversationNotFoundError.public})
            wrong = await client.post("/messages", headers=alice, json={"content": "\0"})
            assert wrong.status_code == 422
            await state["db"].close()
            assert (await client.get("/messages", headers=alice)).status_code == 503


def test_a_script(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script stores and prints a message, and leaves nothing behind."""
    monkeypatch.setenv("DATABASE_URL", dsn)
    [code] = python_blocks("howto/scripts.md")
    command = [sys.executable, "-W", "error", "-X", "dev", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, without_delays(done.stderr)) == ("1 Hi\n", [])


async def test_celery(load_page: Any, dsn: str) -> None:
    """A real worker runs the tasks, twice the same one once, after a lost connection too, and another user's apart."""
    from celery.contrib.testing.worker import start_worker

    tasks = load_page("celery")

    def run() -> list[int]:
        with start_worker(tasks.app, pool="solo", perform_ping_check=False, loglevel="WARNING"):
            results = [
                tasks.store_answer.delay(user, "trip", content, key).get(timeout=30)
                for user, content, key in (
                    ("alice", "hello", "1"),
                    ("alice", "hello", "1"),
                    ("alice", "again", "2"),
                    ("bob", "hello", "1"),
                )
            ]
            kill_sessions(dsn)
            results.append(tasks.store_answer.delay("alice", "trip", "third", "3").get(timeout=30))
        with pytest.raises(chatdb.ConflictError):
            tasks.call(chatdb.append_message, **ALICE, role="user", content="other", key="1")
        return results

    assert await asyncio.to_thread(run) == [1, 1, 2, 1, 3]
    await asyncio.to_thread(tasks.stack.close)
    async with chatdb.create_pool(dsn) as db:
        assert [message.content for message in await chatdb.get_history(db, **ALICE)] == ["hello", "again", "third"]


def test_a_process_that_used_the_pool_ends(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker process closes its pool and its portal when it ends."""
    monkeypatch.setenv("DATABASE_URL", dsn)
    [code] = python_blocks("howto/celery.md")
    program = f"{code}\nprint(call(chatdb.list_conversations, user_id='alice'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


SETTINGS = """
from django.conf import settings
settings.configure(ROOT_URLCONF="views", ALLOWED_HOSTS=["*"], SECRET_KEY="test", DEBUG=False)
import django
django.setup()
from django.core.asgi import get_asgi_application
application = get_asgi_application()
"""


async def test_django(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ASGI server serves the views: many first requests open one pool, and each user sees only their own."""
    [code] = python_blocks("howto/django.md")
    (tmp_path / "views.py").write_text(code, encoding="utf-8")
    (tmp_path / "project.py").write_text(SETTINGS, encoding="utf-8")
    monkeypatch.setenv("DATABASE_URL", dsn)
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "project:application", "--port", str(port), "--log-level", "warning"]
    server = await asyncio.create_subprocess_exec(*command, cwd=tmp_path)
    try:
        base = f"http://127.0.0.1:{port}/chats/trip/messages"
        transport = httpx.AsyncHTTPTransport(retries=10)
        async with httpx.AsyncClient(headers={"X-User": "alice"}, transport=transport, timeout=30) as client:
            firsts = await asyncio.gather(*(client.post(base, json={"content": "hello"}) for _ in range(8)))
            assert [first.status_code for first in firsts] == [201] * 8
            assert sorted(first.json()["seq"] for first in firsts) == [*range(1, 9)]
            assert len((await client.get(base)).json()) == 8
            assert (await client.get(base, headers={"X-User": "bob"})).status_code == 404
            assert (await client.post(base, json={"content": "\0"})).status_code == 422
    finally:
        server.terminate()
        assert await server.wait() in {0, -15}


async def test_a_notebook(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells run one after another in IPython, which awaits at the top level."""
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.setenv("DATABASE_URL", dsn)
    cells = python_blocks("howto/notebooks.md")
    assert len(cells) == 3
    shell = InteractiveShell.instance()
    results = [await shell.run_cell_async(cell, transformed_cell=shell.transform_cell(cell)) for cell in cells]
    for result in results:
        result.raise_error()
    assert results[1].result == [(1, "Hello")]
    InteractiveShell.clear_instance()


async def test_structlog(load_page: Any, dsn: str) -> None:
    """Calls and chatdb's own warnings are JSON lines with the request's fields, without anything of the user."""
    import structlog

    logs = load_page("structlog")
    written, root = io.StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(written), root.level
    logs.configure(handler)
    try:
        async with chatdb.create_pool(max_size=1) as db:
            logs.log_calls(db)
            with structlog.contextvars.bound_contextvars(request_id="r1"):
                await chatdb.append_message(db, **ALICE, role="user", content="hello", key="1", create=True)
                with pytest.raises(chatdb.ConflictError):
                    await chatdb.append_message(db, **ALICE, role="user", content="other", key="1")
                kill_sessions(dsn)
                await chatdb.get_history(db, **ALICE)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        structlog.reset_defaults()
    assert not re.search("alice|trip|hello", written.getvalue())
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    assert {line["request_id"] for line in lines} == {"r1"}
    told = [(line["logger"], line["level"], line.get("operation"), line.get("error")) for line in lines]
    assert told == [
        ("service.chatdb", "info", "append_message", None),
        ("service.chatdb", "warning", "append_message", "ConflictError"),
        ("chatdb", "warning", None, None),
        ("service.chatdb", "info", "get_history", None),
    ]
    assert lines[-1]["retries"] == 1
    assert "retrying get_history_by_key" in lines[-2]["event"]
