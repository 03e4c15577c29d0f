"""
Ask the search of a built site what users ask: `python -m tests.docs.search SITE`, which `nox -s docs` runs.

The search is a script, so this types each question in Chromium and reads the first results.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Generator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from playwright.async_api import Page, expect

from tests.support.chromium import launch

FIRST = 4
ANSWERS = {
    "How do I stop a stream?": ("docs/howto/streaming/#stop-a-stream",),
    "What happens when the pool is full?": ("docs/howto/pool/#what-happens-when-the-pool-is-full",),
    "How do I keep my own tables in the same migration?": ("docs/howto/alembic/", "docs/howto/alembic/#migrate-both"),
    "How do I test without Docker?": ("docs/howto/testing/",),
    "Can I use it with Django?": ("docs/howto/django/",),
    "How do I delete a user's data?": ("docs/howto/retention/", "docs/operations/erasure/"),
    "What does StaleError mean?": ("docs/reference/errors/#staleerror", "docs/howto/concurrent-writes/"),
    "How do I store images?": ("docs/howto/tool-calls/", "docs/howto/tool-calls/#images-and-files"),
    "How does it run behind PgBouncer?": ("docs/howto/hosts/#pgbouncer", "docs/howto/hosts/"),
    "How do I move from ChatGPT's export?": ("docs/howto/import/",),
    "What happens if the server crashes?": (
        "docs/howto/questions/#is-a-message-lost-if-the-process-or-the-server-crashes",
    ),
    "Can several tabs see the answer?": ("docs/howto/watch/",),
    "How do I write tests?": ("docs/howto/testing/",),
    "How do I rename a conversation?": ("docs/howto/conversations/#rename-pin-archive-or-tag",),
    "How do I use get_history?": ("docs/reference/messages/#get_history",),
}
"""Questions, and the pages or sections of which one must be among the first results."""


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextlib.contextmanager
def served(folder: Path) -> Generator[str]:
    """Serve a folder on a free port, and yield its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


async def results(page: Page, question: str) -> list[str]:
    """Return the locations of the first results for a question."""
    options = page.get_by_role("option")
    await page.get_by_role("combobox").fill("")
    await expect(options).to_have_count(0)  # those of the last question are gone
    await page.get_by_role("combobox").fill(question)
    with contextlib.suppress(AssertionError):  # there are no results
        await expect(options.first).to_be_attached(timeout=10_000)
    found = [str(await option.get_attribute("href")) for option in (await options.all())[:FIRST]]
    parts = [urlsplit(each) for each in found]
    return [part.path.removeprefix("/") + (f"#{part.fragment}" if part.fragment else "") for part in parts]


async def ask(site: Path, questions: dict[str, tuple[str, ...]]) -> list[str]:
    """Return the questions that the first results do not answer, with these results."""
    problems: list[str] = []
    with served(site) as url:
        async with launch() as browser:
            page = await browser.new_page()
            await page.goto(url)
            await page.get_by_role("button", name="Search").first.click()
            for question, answers in questions.items():
                found = await results(page, question)
                if not {*found} & {*answers}:
                    problems.append("\n  ".join([question, *found]))
    return problems


def main() -> None:
    """Ask each question, and fail if the first results do not answer it."""
    problems = asyncio.run(ask(Path(sys.argv[1]), ANSWERS))
    if problems:
        sys.exit("the search does not answer:\n" + "\n".join(problems))
    print(f"the search answers {len(ANSWERS)} questions")


if __name__ == "__main__":
    main()
