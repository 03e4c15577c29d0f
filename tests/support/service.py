"""Runs examples/fastapi as a process with two workers, calls it over HTTP, and checks each of its answers."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import httpx
import jwt
import psycopg
import pytest

from tests.support.paths import ROOT

EXAMPLE = ROOT / "examples" / "fastapi"
KEY = "a key for the tests, of at least 64 bytes, which is what PyJWT wants for HS512"
"""The SECRET_KEY of the tests."""
SECRET = "XYZZY"
"""A word that every text of the tests contains, and no error or log record."""
PASSWORD = "s3cr3t"
STORY = f"write a long story about {SECRET}"
"""A prompt that the toy model answers with about 200 words."""
TALKATIVE = ("Traceback", "asyncpg", "pydantic", "postgresql://", "site-packages", 'File "', "select ")
"""Texts that belong into no answer."""


def free_port() -> int:
    """Return a port that no process uses."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def token(user: str, *, key: str = KEY, algorithm: str = "HS256", lifetime: float = 600, **claims: object) -> str:
    """Return a signed token; claims that are None are left out."""
    now = int(time.time())
    payload = {"sub": user, "iat": now + min(0, int(lifetime)), "exp": now + int(lifetime)} | claims
    return jwt.encode({name: value for name, value in payload.items() if value is not None}, key, algorithm=algorithm)


@dataclass
class Event:
    """A server-sent event."""

    id: str
    name: str
    data: Any


@dataclass
class Line:
    """What a page shows: the texts of a conversation, built from events. Rejects text that comes twice or never."""

    texts: dict[int, str] = field(default_factory=dict)
    states: dict[int, str | None] = field(default_factory=dict)
    deltas: int = 0

    def take(self, event: Event) -> None:
        """Apply an event."""
        if event.name == "delta":
            seq = event.data["seq"]
            assert self.states[seq] == "streaming"
            assert event.data["offset"] == len(self.texts[seq]), (event, self.texts[seq])
            assert event.data["text"]
            self.texts[seq] += event.data["text"]
            self.deltas += 1
        elif event.name == "message":
            seq, text = event.data["seq"], event.data["content"]
            if seq in self.states:
                assert self.states[seq] == "streaming", f"message {seq} came again after its end"
                assert text.startswith(self.texts[seq])
                assert not self.texts[seq] or event.data["state"] != "streaming", f"the text of {seq} came again"
            self.texts[seq], self.states[seq] = text, event.data["state"]

    def copy(self) -> Line:
        """Return an independent copy."""
        return Line(dict(self.texts), dict(self.states), self.deltas)


class Service:
    """The example on a database, as a process with two workers. Start it with `start` or in a `with` block."""

    def __init__(self, dsn: str, folder: Path, **environment: str) -> None:
        self.dsn = dsn
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"service-{self.port}.log"
        parts = urlsplit(dsn)
        with_password = parts.netloc.replace("@", f":{PASSWORD}@") if ":" not in parts.netloc else parts.netloc
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "COVERAGE", "PYTEST"))
        }
        self.environment |= {
            "DATABASE_URL": parts._replace(netloc=with_password).geturl(),
            "SECRET_KEY": KEY,
            "TOY_DELAY": "0.01",
            **environment,
        }
        self.secrets = [SECRET, PASSWORD, "eyJ"]
        self.places = parse_qs(parts.query).get("host", [])
        self.documented: dict[str, Any] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self._read = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the processes, and wait until both workers are ready."""
        command = [sys.executable, str(EXAMPLE), "--port", str(self.port), "--workers", "2"]
        printed = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, cwd=ROOT)
        end = time.monotonic() + 180
        try:
            while f"Open {self.url}".encode() not in self.log.read_bytes()[printed:]:
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < end, self.log.read_text()
                time.sleep(0.05)
            for worker in self.workers():
                with self.only(worker):
                    while (answer := httpx.get(f"{self.url}/ready")).status_code != 200:
                        assert time.monotonic() < end, answer.text
                        time.sleep(0.05)
        except BaseException:
            self.stop(signal.SIGKILL)
            raise
        self.documented = httpx.get(f"{self.url}/openapi.json").json()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int | None:
        """Send a signal to the process, and return the exit code. SIGKILL goes to the workers too."""
        if self.process is None:
            return None
        workers = children(self.process.pid) if number == signal.SIGKILL else []
        for pid in (self.process.pid, *workers):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        try:
            code = self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self.process = None
        return code

    def restart(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop the service and start it again on the same port and database."""
        self.stop(number)
        self.start()

    def workers(self) -> list[int]:
        """Return the process ids of the workers."""
        assert self.process is not None
        return [
            pid
            for pid in children(self.process.pid)
            if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    @contextmanager
    def only(self, worker: int) -> Iterator[None]:
        """Let only this worker accept connections."""
        others = [pid for pid in self.workers() if pid != worker]
        for pid in others:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in others:
                os.kill(pid, signal.SIGCONT)

    @asynccontextmanager
    async def client(self, bearer: str | None = None, worker: int | None = None) -> AsyncGenerator[httpx.AsyncClient]:
        """Yield a client whose answers are checked. `worker` is the index of the worker that takes its connections."""
        headers = {} if bearer is None else {"Authorization": f"Bearer {bearer}"}
        limits = httpx.Limits(max_connections=None if worker is None else 1, keepalive_expiry=600)
        async with httpx.AsyncClient(
            base_url=self.url, headers=headers, event_hooks={"response": [self.check]}, timeout=30, limits=limits
        ) as client:
            if worker is not None:
                with self.only(self.workers()[worker]):
                    await client.get("/health")
            yield client

    async def check(self, response: httpx.Response) -> None:
        """Check what every answer promises: a documented status and type, problems without private texts."""
        told = f"{response.request.method} {response.request.url.path} {response.status_code}"
        status, kind = str(response.status_code), response.headers.get("content-type", "").partition(";")[0]
        if response.request.url.path.startswith("/api/"):
            assert response.headers["cache-control"] == "no-store", told
        answers = self.answers(response.request.method, response.request.url.path)
        if answers is not None:
            assert status in answers, f"{told} is not documented"
            types = answers[status].get("content", {})
            assert kind in types if types else not kind, f"{told}: {kind} is not documented"
        if response.status_code < 400:
            return
        body = (await response.aread()).decode()
        assert kind == "application/problem+json", f"{told} {kind}"
        problem = json.loads(body)
        assert problem["status"] == response.status_code
        assert {type(problem[name]) for name in ("type", "title", "detail")} == {str}, told
        assert set(problem) <= {"type", "title", "status", "detail", "parameter"}, told
        assert [word for word in (*self.secrets, *self.places, *TALKATIVE) if word in body] == [], f"{told}: {body}"
        if response.status_code == 401:
            assert response.headers["www-authenticate"].startswith("Bearer"), told
        if response.status_code == 503:
            assert response.headers["retry-after"] == "1", told

    def answers(self, method: str, path: str) -> dict[str, Any] | None:
        """Return the documented answers of an operation, or None if the path has no such operation."""
        for template, operations in self.documented.get("paths", {}).items():
            pattern = re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(template))
            if re.fullmatch(pattern, path) and method.lower() in operations:
                answers: dict[str, Any] = operations[method.lower()]["responses"]
                return answers
        return None

    def news(self) -> str:
        """Return what was logged since the last call."""
        with self.log.open("rb") as log:
            log.seek(self._read)
            text = log.read()
        self._read += len(text)
        return text.decode()

    def check_log(self, allowed: str = "") -> None:
        """Fail if the log has private values, or errors that the test does not expect."""
        text = self.news()
        assert [word for word in self.secrets if word in text] == [], text
        errors = [line for line in text.splitlines() if re.search(r"Traceback|ERROR|CRITICAL|never awaited", line)]
        assert [line for line in errors if not (allowed and re.search(allowed, line))] == [], text


def children(pid: int) -> list[int]:
    """Return the process ids of the children of a process."""
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


async def new_conversation(client: httpx.AsyncClient, title: str | None = SECRET) -> dict[str, Any]:
    """Create a conversation, and return it."""
    answer = await client.post("/api/conversations", json={"title": title})
    assert answer.status_code == 201, answer.text
    created: dict[str, Any] = answer.json()
    return created


async def ask(
    client: httpx.AsyncClient, conversation: int, content: str = f"hello {SECRET}", **more: Any
) -> dict[str, Any]:
    """Send a message, and return it and the answer that was started."""
    headers = more.pop("headers", None)
    path = f"/api/conversations/{conversation}/messages"
    answer = await client.post(path, json={"content": content, **more}, headers=headers)
    assert answer.status_code == 202, answer.text
    stored: dict[str, Any] = answer.json()
    return stored


async def load(client: httpx.AsyncClient, conversation: int) -> dict[str, Any]:
    """Return a conversation with its current line."""
    answer = await client.get(f"/api/conversations/{conversation}")
    assert answer.status_code == 200, answer.text
    loaded: dict[str, Any] = answer.json()
    return loaded


async def settled(client: httpx.AsyncClient, conversation: int, seconds: float = 30) -> list[dict[str, Any]]:
    """Wait until no message of the current line is streaming, and return the line."""
    async with asyncio.timeout(seconds):
        while True:
            messages: list[dict[str, Any]] = (await load(client, conversation))["messages"]
            if all(message["state"] != "streaming" for message in messages):
                return messages
            await asyncio.sleep(0.05)


async def exchange(client: httpx.AsyncClient, content: str = f"hello {SECRET}") -> int:
    """Create a conversation with a question and its finished answer, and return its id."""
    conversation: int = (await new_conversation(client))["id"]
    await ask(client, conversation, content)
    await settled(client, conversation)
    return conversation


async def events(
    client: httpx.AsyncClient, conversation: int, after: str | None = None, *, in_header: bool = False
) -> AsyncGenerator[Event]:
    """Yield the events of a conversation. Lines end as the standard says, not as Python's splitlines does."""
    headers = {"Last-Event-ID": after} if after is not None and in_header else {}
    params = {"after": after} if after is not None and not in_header else {}
    path = f"/api/conversations/{conversation}/events"
    async with client.stream("GET", path, params=params, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].partition(";")[0] == "text/event-stream"
        rest = ""
        last = ""
        async for chunk in response.aiter_text():
            *blocks, rest = (rest + chunk).split("\n\n")
            for block in blocks:
                assert "\r" not in block
                lines = [line.partition(": ") for line in block.split("\n") if not line.startswith(":")]
                fields = {name: value for name, _, value in lines}
                assert set(fields) <= {"id", "event", "data", "retry"}, block
                last = fields.get("id", last)
                if "event" in fields:
                    assert "id" in fields or fields["event"] == "end", block
                    yield Event(last, fields["event"], json.loads(fields.get("data") or "null"))


async def until_finished(
    client: httpx.AsyncClient, conversation: int, seq: int, after: str | None, line: Line | None = None
) -> tuple[Line, Sequence[Event]]:
    """Follow a conversation until this message is finished. Return what a page shows then, and all events."""
    line = line or Line()
    seen: list[Event] = []
    stream = events(client, conversation, after)
    async with asyncio.timeout(30):
        try:
            async for event in stream:
                seen.append(event)
                line.take(event)
                if line.states.get(seq, "streaming") != "streaming":
                    return line, seen
        finally:
            await stream.aclose()
    pytest.fail(f"the stream ended: {seen[-3:]}")


def stored(dsn: str, conversation: int) -> list[tuple[int, str, str | None]]:
    """Return seq, text and state of all messages of a conversation, read without chatdb."""
    statement = """
        select seq, content || coalesce((
            select string_agg(part.content, '' order by part.start) from chatdb.message_parts part
            where part.conversation_id = message.conversation_id and part.seq = message.seq and part.start >= 0
        ), ''), state
        from chatdb.messages message where conversation_id = %s order by seq
    """
    with psycopg.connect(dsn) as connection:
        return connection.execute(statement, (conversation,)).fetchall()
