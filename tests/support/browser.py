"""Drives the page of examples/fastapi in Chromium, by the roles and names of its controls."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Literal
from urllib.parse import urlsplit

from axe_playwright_python.async_playwright import Axe
from playwright.async_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Locator,
    Page,
    Request,
    expect,
)

from tests.support.chromium import PATIENCE

RECORDER = """
window.shown = [];
const chats = new WeakMap();
new MutationObserver(() => {
    for (const article of document.querySelectorAll('article[data-seq]')) {
        if (!chats.has(article)) chats.set(article, location.hash.split('/')[2]);
        const chat = chats.get(article), seq = Number(article.dataset.seq);
        const text = article.querySelector('.text')?.textContent ?? '';
        const last = window.shown.findLast((each) => each.chat === chat && each.seq === seq);
        if (last?.text !== text) window.shown.push({chat, seq, text});
    }
}).observe(document, {subtree: true, childList: true, characterData: true});
"""
"""Keeps every text that a message showed, even for a moment."""
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
Size = Literal["desktop", "phone"]
Theme = Literal["light", "dark"]


class Visitor:
    """A person with a browser of their own: a token, and any number of tabs."""

    def __init__(self, context: BrowserContext, url: str, allowed: str | None) -> None:
        self.context = context
        self.url = url
        self.allowed = allowed
        self.problems: list[str] = []
        context.on("request", self._check_request)
        context.on("console", self._check_console)
        context.on("weberror", lambda error: self.problems.append(f"page error: {error.error}"))

    def _check_request(self, request: Request) -> None:
        """Note a request to another host. A download's `blob:` and a picture's `data:` have none."""
        parts = urlsplit(request.url)
        if parts.netloc and parts.netloc != urlsplit(self.url).netloc:
            self.problems.append(f"foreign request: {request.url}")

    def _check_console(self, message: ConsoleMessage) -> None:
        """Note an error or warning, unless the test allows it: Chromium logs each failed request as an error."""
        if message.type not in ("error", "warning") or (self.allowed and re.search(self.allowed, message.text)):
            return
        self.problems.append(f"console {message.type}: {message.text} ({message.location.get('url')})")

    async def tab(self, path: str = "/") -> Tab:
        """Open a tab."""
        page = await self.context.new_page()
        page.set_default_timeout(PATIENCE)
        await page.add_init_script(RECORDER)
        tab = Tab(self, page)
        await page.goto(self.url + path)
        await expect(tab.box).to_be_visible()
        return tab


@asynccontextmanager
async def visitor(
    browser: Browser, url: str, *, size: Size = "desktop", theme: Theme = "light", allowed: str | None = None
) -> AsyncGenerator[Visitor]:
    """Yield a new visitor. `allowed` is a pattern of the console's errors that belong to the test."""
    width, height = SIZES[size]
    context = await browser.new_context(
        viewport={"width": width, "height": height},
        has_touch=size == "phone",
        is_mobile=size == "phone",
        color_scheme=theme,
        reduced_motion="reduce",
        locale="en-GB",
        timezone_id="UTC",
        accept_downloads=True,
    )
    guest = Visitor(context, url, allowed)
    try:
        yield guest
    finally:
        await context.close()
    assert guest.problems == []


class Tab:
    """A tab with the page. The names of its controls are here, and nowhere in the tests."""

    def __init__(self, visitor: Visitor, page: Page) -> None:
        self.visitor = visitor
        self.page = page
        self.box = page.get_by_role("textbox", name="Message", exact=True)
        self.articles = page.get_by_role("log").get_by_role("article")
        self.who = page.get_by_role("navigation", name="Chats", exact=True)
        self.streaming = page.locator('article[aria-busy="true"]')
        self.chat_list = page.get_by_role("list", name="Chats", exact=True)

    @property
    def path(self) -> str:
        """Return the address of the open chat."""
        return self.page.url.removeprefix(self.visitor.url)

    def button(self, name: str, within: Locator | None = None) -> Locator:
        """Return a button by its name."""
        return (within or self.page).get_by_role("button", name=name, exact=True)

    def chat_link(self, title: str | re.Pattern[str]) -> Locator:
        """Return a chat in the list by its title."""
        return self.chat_list.get_by_role("link", name=title, exact=True)

    async def send(self, text: str) -> None:
        """Write a message and send it."""
        await self.box.fill(text)
        await self.button("Send").click()

    async def chat(self, text: str) -> None:
        """Send a message, and wait until the answer is finished."""
        count = await self.articles.count()
        await self.send(text)
        await expect(self.articles).to_have_count(count + 2)
        await self.finished()

    async def finished(self) -> None:
        """Wait until no answer is streaming."""
        await expect(self.streaming).to_have_count(0)

    async def option(self, title: str, name: str) -> None:
        """Choose an option of a chat in the list."""
        await self.button(f"Options for {title}").click()
        await self.button(name).click()

    async def sign_in(self, name: str) -> None:
        """Sign in with a name."""
        await self.button("Account").click()
        dialog = self.page.get_by_role("dialog", name="Account")
        await dialog.get_by_role("textbox", name="Name").fill(name)
        await self.button("Sign in", dialog).click()
        await expect(self.who).to_contain_text(name)

    async def focus(self, role: Literal["button", "link", "searchbox", "textbox"], name: str) -> None:
        """Press Tab until the control has the focus, as somebody without a mouse does."""
        wanted = self.page.get_by_role(role, name=name, exact=True)
        for _ in range(80):
            focused = self.page.locator(":focus")
            if await wanted.and_(focused).count():
                return
            await self.page.keyboard.press("Tab")
        raise AssertionError(f"Tab does not reach the {role} {name!r}")

    async def check_tab_order(self) -> None:
        """Press Tab through the page: every control that is shown gets the focus."""
        controls = "[...document.querySelectorAll('a[href], button:enabled, input, textarea, summary')]"
        shown = f"{controls}.filter((control) => control.checkVisibility())"
        count: int = await self.page.evaluate(f"window.reached = new Set(), {shown}.length")
        for _ in range(count + 5):
            await self.page.keyboard.press("Tab")
            await self.page.evaluate("window.reached.add(document.activeElement), null")
        missed = f"{shown}.filter((control) => !window.reached.has(control)).map((control) => control.outerHTML)"
        assert (count > 10, await self.page.evaluate(missed)) == (True, [])

    async def background(self) -> list[int]:
        """Return the color behind everything, as red, green, and blue."""
        color: str = await self.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return [int(part) for part in re.findall(r"\d+", color)[:3]]

    async def texts(self) -> list[str]:
        """Return the texts of the messages as a reader sees them."""
        return await self.articles.locator(".text").all_text_contents()

    async def api(self, path: str, method: str = "GET", **options: Any) -> Any:
        """Call the service as this visitor, and return its JSON."""
        stored = await self.page.wait_for_function("localStorage.getItem('token')")  # the page may still be loading
        token = await stored.json_value()
        response = await self.visitor.context.request.fetch(
            self.visitor.url + path, method=method, headers={"Authorization": f"Bearer {token}"}, **options
        )
        assert response.ok, (response.status, path)
        return await response.json()

    @property
    def chat_id(self) -> str:
        """Return the id of the open chat."""
        found = re.search(r"#/c/(\d+)", self.page.url)
        assert found, self.page.url
        return found[1]

    async def stored(self) -> list[dict[str, Any]]:
        """Return the messages of the open chat as the database has them."""
        messages: list[dict[str, Any]] = (await self.api(f"/api/conversations/{self.chat_id}"))["messages"]
        return messages

    async def check_stored(self) -> None:
        """
        Compare the messages on the page with those in the database: the same, in order, and each once.

        What a message showed before, while it streamed, must be the beginning of its text.
        """
        stored = {message["seq"]: message["content"] for message in await self.stored()}
        await expect(self.articles).to_have_count(len(stored))  # the page may still be loading
        assert await self.texts() == list(stored.values())
        shown = await self.page.evaluate("chat => window.shown.filter((each) => each.chat === chat)", self.chat_id)
        wrong = [each for each in shown if not stored.get(each["seq"], each["text"]).startswith(each["text"])]
        assert wrong == []

    async def check_accessible(self, view: str) -> None:
        """Run axe-core: the view has no violation."""
        if not await self.page.evaluate("'axe' in window"):
            await self.page.evaluate(Axe().axe_script)
        results: dict[str, Any] = await self.page.evaluate("axe.run({resultTypes: ['violations']})")
        found = [
            f"{rule['id']}: {node['html']}: {node['failureSummary']}"
            for rule in results["violations"]
            for node in rule["nodes"]
        ]
        assert found == [], view

    async def check_width(self) -> None:
        """
        Check that nothing makes the page scroll sideways, and that nothing is cut off at the right.

        The page's own `innerWidth` does not tell: a phone zooms out to show a page that is too wide.
        """
        assert self.page.viewport_size is not None
        screen = self.page.viewport_size["width"]
        wide = await self.page.evaluate(
            "screen => [...document.querySelectorAll('html, main *, dialog[open] *')].filter((each) =>"
            " each.checkVisibility() && Math.max(each.getBoundingClientRect().right, each === document.documentElement"
            " ? each.scrollWidth : 0) > screen + 1).map((each) => each.outerHTML.slice(0, 200))",
            screen,
        )
        assert wide == []
