"""The page of examples/fastapi in a real browser: chats, reloads, tabs, outages, phones, keyboards, screen readers."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, get_args

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Route, expect

import chatdb
from tests.support.browser import Size, Tab, Theme, Visitor, visitor
from tests.support.chromium import launch
from tests.support.service import Service

pytestmark = pytest.mark.asyncio(loop_scope="session")

Visit = Callable[..., Awaitable[Visitor]]
STORY = "Write a long story"
"""A prompt that the toy model answers with about 200 words."""
FAILED = "Failed to load resource"
"""What Chromium logs about each request that fails."""
MARKUP = '<script>window.hacked = 1</script><img src="x" onerror="window.hacked = 1"><b>bold</b> & &amp;'

TALKS = {
    "Packing list for Iceland": "Layers, a raincoat, and a swimsuit for the hot springs.",
    "Explain list comprehensions": "A list comprehension builds a list from a loop in one expression.",
    "Birthday toast for Ana": "Thirty years ago, the town got louder.",
    "Refund policy in plain words": "You have 30 days. Send it back, and we pay you back.",
    "Trip to Lisbon with two children under five, in the rain": "Start with the aquarium.",
    "Is my sourdough starter dead?": "If it still bubbles a day after feeding, it lives.",
    "Donaudampfschifffahrtsgesellschaftskapitän": "It is one word, with 42 letters.",
    "SQL: the newest row per group": "Use distinct on, with an index in the same order.",
}
"""Chats for the list: each title, and the answer to it."""


@pytest.fixture(scope="session")
def streaming_service(start_service: Callable[..., Service]) -> Service:
    """Return a service that needs seven seconds for a long story: two more than a stopped service waits."""
    return start_service(TOY_DELAY="0.03")


@pytest.fixture
def chats(streaming_service: Service) -> Iterator[Service]:
    """Yield the service. Fail a test after which its log has private texts or errors."""
    yield streaming_service
    streaming_service.check_log()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    """Yield the browser that all tests of a process share."""
    async with launch() as started:
        yield started


@pytest_asyncio.fixture(loop_scope="session")
async def visit(browser: Browser, chats: Service) -> AsyncIterator[Visit]:
    """Yield a function that returns a new visitor, whose requests and console are checked in the end."""
    async with AsyncExitStack() as stack:

        async def come(**options: Any) -> Visitor:
            return await stack.enter_async_context(visitor(browser, chats.url, **options))

        yield come


@pytest_asyncio.fixture(loop_scope="session")
async def tab(visit: Visit) -> Tab:
    """Return the tab of a new guest on a desktop."""
    return await (await visit()).tab()


async def has_words(tab: Tab, count: int) -> str:
    """Wait until the streaming answer has this many words, and return its text."""
    await expect(tab.streaming.locator(".text")).to_have_text(re.compile(rf"(\S+\s+){{{count}}}"))
    return await tab.articles.last.locator(".text").inner_text()


async def seed(chats: Service, tab: Tab, talks: dict[str, list[str]]) -> None:
    """Store chats of the tab's user, each with the texts of its messages, the newest last."""
    user = (await tab.api("/api/me"))["user"]
    async with chatdb.create_pool(chats.dsn) as db:
        for title, lines in talks.items():
            messages: list[dict[str, object]] = [
                {"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(lines)
            ]
            await chatdb.create_conversation(db, user_id=user, title=title, messages=messages)


async def test_a_guests_first_chat(tab: Tab) -> None:
    """A guest asks, the answer grows word by word, and the chat gets a title and an address."""
    await expect(tab.page.get_by_role("heading", name="How can I help?")).to_be_visible()
    await expect(tab.who).to_contain_text("Guest")
    await tab.send("What can you do?")
    await expect(tab.articles).to_have_count(2)
    await tab.finished()
    await expect(tab.page.get_by_role("heading", level=1)).to_have_text("What can you do?")
    await expect(tab.chat_link("What can you do?")).to_have_attribute("aria-current", "page")
    await tab.check_stored()
    steps = await tab.page.evaluate("window.shown.filter((each) => each.seq === 2).length")
    assert steps > 3
    await tab.chat("And what else?")
    assert len(await tab.stored()) == 4
    await tab.check_stored()


async def test_a_question_while_the_page_is_loading(visit: Visit) -> None:
    """A question that is sent before the page knows its user waits for it."""
    guest = await visit()

    async def late(route: Route) -> None:
        await asyncio.sleep(1)
        await route.continue_()

    await guest.context.route("**/api/guests", late)
    tab = await guest.tab()
    await tab.chat("hello")
    await tab.check_stored()


async def test_the_suggestions(tab: Tab) -> None:
    """A suggestion of the empty page is sent as it is."""
    await tab.button("What can you do?").click()
    await expect(tab.articles).to_have_count(2)
    await tab.finished()
    assert (await tab.texts())[0] == "What can you do?"


async def test_a_reload_in_mid_stream(tab: Tab) -> None:
    """After a reload, the answer continues where it was, and nothing is shown twice."""
    await tab.send(STORY)
    before = await has_words(tab, 20)
    await tab.page.reload()
    during = await has_words(tab, 25)
    assert during.startswith(before)
    await tab.finished()
    await tab.check_stored()
    assert len((await tab.texts())[1].split()) > 100


async def test_a_second_tab(tab: Tab) -> None:
    """A second tab shows the question and the answer while it streams, and can ask in turn."""
    await tab.chat("hello")
    other = await tab.visitor.tab(tab.path)
    await expect(other.articles).to_have_count(2)
    await tab.send(STORY)
    await has_words(other, 10)
    await tab.finished()
    await other.finished()
    await other.chat("and from here")
    await expect(tab.articles).to_have_count(6)
    await tab.finished()
    await tab.check_stored()
    await other.check_stored()


async def test_a_second_user(tab: Tab, visit: Visit) -> None:
    """Another guest sees no chat of the first, and learns only that the address does not exist."""
    await tab.chat("hello")
    other = await (await visit(allowed=FAILED)).tab()
    await expect(other.chat_list.get_by_role("link")).to_have_count(0)
    for path in (tab.path, "/#/c/987654321"):
        await other.page.goto(other.visitor.url + path)
        await expect(other.page.get_by_role("alert")).to_contain_text("does not exist")
        await expect(other.articles).to_have_count(0)
        await other.button("Dismiss").click()


async def test_stop(tab: Tab) -> None:
    """A stopped answer keeps its text and says so, also after a reload, and the chat goes on."""
    await tab.send(STORY)
    await has_words(tab, 10)
    await tab.button("Stop").click()
    await expect(tab.articles.last.get_by_text("Stopped", exact=True)).to_be_visible()
    await tab.finished()
    stopped = (await tab.texts())[1]
    assert len(stopped.split()) < 150
    await tab.page.reload()
    await expect(tab.articles.last.get_by_text("Stopped", exact=True)).to_be_visible()
    await tab.check_stored()
    await tab.chat("hello again")
    assert (await tab.texts())[1] == stopped


async def test_versions(tab: Tab) -> None:
    """An edited question and a regenerated answer are second versions, and the first ones come back."""
    await tab.chat("first question")
    await tab.chat("a follow-up")
    first = await tab.texts()
    question = tab.articles.first
    await question.hover()
    await tab.button("Edit", question).click()
    editor = tab.page.get_by_role("textbox", name="Edit message")
    await expect(editor).to_have_value("first question")
    await editor.fill("better question")
    await tab.button("Send edit").click()
    await expect(tab.articles).to_have_count(2)
    await expect(question.get_by_text("2 of 2", exact=True)).to_be_visible()
    await tab.finished()
    second = await tab.texts()
    assert second[0] == "better question"
    await tab.button("Previous version", question).click()
    await expect(question.get_by_text("1 of 2", exact=True)).to_be_visible()
    await expect(tab.articles).to_have_count(4)
    assert await tab.texts() == first
    await tab.button("Next version", question).click()
    await expect(tab.articles).to_have_count(2)
    answer = tab.articles.last
    await answer.hover()
    await tab.button("Regenerate", answer).click()
    await expect(answer.get_by_text("2 of 2", exact=True)).to_be_visible()
    await tab.finished()
    await tab.page.reload()
    await expect(tab.articles.last.get_by_text("2 of 2", exact=True)).to_be_visible()
    await tab.check_stored()


async def test_a_tool(tab: Tab) -> None:
    """The answer shows which tool it used, with arguments and output, also after a reload."""
    await tab.chat("roll a die")
    for _ in range(2):
        details = tab.articles.last.get_by_role("group")
        await details.get_by_text("Used roll_dice").click()
        await expect(details).to_contain_text("sides")
        await tab.page.reload()
    await tab.check_stored()


async def test_search(tab: Tab) -> None:
    """Search finds a word in another chat, and opens that chat at the message."""
    await tab.chat("the word is pomegranate")
    await tab.button("New chat").click()
    await tab.chat("something else")
    await tab.page.get_by_role("searchbox").fill("pomegranate")
    results = tab.page.get_by_role("list", name="Search results")
    await expect(results).to_contain_text("the word is pomegranate")
    await results.get_by_role("link", name="the word is pomegranate").last.click()
    await expect(tab.page).to_have_url(re.compile(r"#/c/\d+/m/\d+$"))
    await expect(tab.articles.first).to_contain_text("pomegranate")
    await expect(tab.articles.first).to_be_in_viewport()
    await tab.page.get_by_role("searchbox").fill("zzzz")
    await expect(results.get_by_role("link")).to_have_count(0)
    await tab.button("Clear search").click()
    await expect(tab.chat_list.get_by_role("link")).to_have_count(2)


async def test_organize(tab: Tab) -> None:
    """A chat is renamed, pinned, archived, brought back, and deleted after a question."""
    await tab.chat("hello")
    await tab.option("hello", "Rename")
    dialog = tab.page.get_by_role("dialog", name="Rename chat")
    await dialog.get_by_role("textbox", name="Title").fill("Greetings")
    await tab.button("Save", dialog).click()
    await expect(dialog).to_be_hidden()
    await expect(tab.page.get_by_role("heading", level=1)).to_have_text("Greetings")
    await tab.option("Greetings", "Pin")
    pinned = tab.page.get_by_role("list", name="Pinned chats")
    await expect(pinned.get_by_role("link", name="Greetings")).to_be_visible()
    await tab.option("Greetings", "Unpin")
    await expect(pinned.get_by_role("link")).to_have_count(0)
    await tab.option("Greetings", "Archive")
    await expect(tab.chat_list.get_by_role("link")).to_have_count(0)
    await tab.button("Archived chats").click()
    archived = tab.page.get_by_role("list", name="Archived chats")
    await expect(archived.get_by_role("link", name="Greetings")).to_be_visible()
    await tab.option("Greetings", "Unarchive")
    await expect(archived.get_by_role("link")).to_have_count(0)
    await tab.button("Archived chats").click()
    await tab.option("Greetings", "Delete")
    question = tab.page.get_by_role("dialog", name="Delete this chat?")
    await tab.button("Cancel", question).click()
    await expect(tab.chat_link("Greetings")).to_be_visible()
    await tab.option("Greetings", "Delete")
    await tab.button("Delete chat", question).click()
    await expect(tab.chat_list.get_by_role("link")).to_have_count(0)
    await expect(tab.page.get_by_role("heading", name="How can I help?")).to_be_visible()
    assert (await tab.api("/api/conversations"))["items"] == []


async def test_a_guest_signs_in(tab: Tab, visit: Visit) -> None:
    """The guest's chats become the user's, on every device; after signing out, nothing of them is on the page."""
    name = f"Zoe {id(tab)}"
    await tab.chat("hello")
    await tab.sign_in(name)
    await expect(tab.chat_link("hello")).to_be_visible()
    await tab.check_stored()
    other = await (await visit()).tab()
    await other.sign_in(name)
    await expect(other.chat_link("hello")).to_be_visible()
    await other.box.fill("a draft")
    await other.page.get_by_role("searchbox").fill("hello")
    await expect(other.page.get_by_role("list", name="Search results")).to_contain_text("hello")
    await other.button("Account").click()
    await other.button("Sign out").click()
    await expect(other.page.get_by_text("Signed out.")).to_be_visible()
    await expect(other.who).to_contain_text("Guest")
    await expect(other.chat_list.get_by_role("link")).to_have_count(0)
    await expect(other.page.get_by_text("hello")).to_have_count(0)
    for field in (other.box, other.page.get_by_role("searchbox")):
        await expect(field).to_have_value("")


async def test_export_and_delete_the_account(tab: Tab, tmp_path: Path) -> None:
    """The export has every message. Deleting the account tells how much it deletes, and leaves nothing."""
    await tab.chat("hello pomegranate")
    await tab.sign_in(f"Zoe {id(tab)}")
    await tab.button("Account").click()
    async with tab.page.expect_download() as download:
        await tab.button("Export my data").click()
    file = await download.value
    assert file.suggested_filename == "chatdb-export.jsonl"
    await file.save_as(tmp_path / "export.jsonl")
    text = (tmp_path / "export.jsonl").read_text(encoding="utf-8")
    assert all(isinstance(json.loads(line), dict) for line in text.splitlines())
    assert all(json.dumps(each)[1:-1] in text for each in await tab.texts())
    await tab.button("Delete my account").click()
    question = tab.page.get_by_role("dialog", name="Delete your account?")
    await tab.button("Delete account", question).click()
    await expect(tab.page.get_by_text("with 1 chat and 2 messages")).to_be_visible()
    await expect(tab.who).to_contain_text("Guest")
    await expect(tab.chat_list.get_by_role("link")).to_have_count(0)
    assert (await tab.api("/api/conversations"))["items"] == []
    await tab.sign_in(f"Zoe {id(tab)}")
    await expect(tab.chat_list.get_by_role("link")).to_have_count(0)


async def test_a_token_that_ended(visit: Visit) -> None:
    """With a token that the service refuses, the visitor is told so, and goes on as a new guest."""
    tab = await (await visit(allowed=FAILED)).tab()
    await tab.chat("hello")
    await tab.page.evaluate("localStorage.setItem('token', 'expired')")
    await tab.page.reload()
    await expect(tab.page.get_by_role("alert")).not_to_be_empty()
    await expect(tab.chat_list.get_by_role("link")).to_have_count(0)
    await tab.page.goto(f"{tab.visitor.url}/#/")
    await tab.chat("hello again")
    await tab.check_stored()


async def test_markup(tab: Tab) -> None:
    """Markup in a prompt is shown as text in the message, the title, the menus, and the search, and runs nowhere."""
    await tab.chat(MARKUP)
    assert (await tab.texts())[0] == MARKUP
    await tab.check_stored()
    await tab.page.get_by_role("searchbox").fill("window.hacked")
    await expect(tab.page.get_by_role("list", name="Search results")).to_contain_text("window.hacked")
    await tab.button("Clear search").click()
    await tab.button("Chat options").click()
    await tab.button("Rename").click()
    await tab.button("Save").click()
    await tab.page.reload()
    await expect(tab.articles).to_have_count(2)
    assert await tab.page.evaluate("window.hacked") is None
    assert await tab.page.locator(":is(ul, h1, [role=log]) :is(img, b, script)").count() == 0


async def test_the_network_goes_away(visit: Visit) -> None:
    """Without a network the page says so; when the network is back, the answer continues, complete and once."""
    guest = await visit(allowed=FAILED)
    tab = await guest.tab()
    await tab.send(STORY)
    await has_words(tab, 10)
    await guest.context.set_offline(True)
    await expect(tab.page.get_by_text("Connection lost. Reconnecting…")).to_be_visible()
    await guest.context.set_offline(False)
    await expect(tab.page.get_by_text("Connection lost. Reconnecting…")).to_be_hidden()
    await tab.finished()
    await tab.check_stored()
    assert (await tab.stored())[1]["state"] is None
    await guest.context.set_offline(True)
    await tab.send("is anybody there?")
    await expect(tab.button("Try again")).to_be_visible()
    await guest.context.set_offline(False)
    await tab.button("Try again").click()
    await expect(tab.articles).to_have_count(4)
    await tab.finished()
    await tab.check_stored()


async def test_the_server_restarts(visit: Visit, chats: Service) -> None:
    """After a restart in mid-stream, the page connects by itself, and shows what was stored."""
    tab = await (await visit(allowed=f"{FAILED}|ERR_INCOMPLETE|ERR_CONNECTION")).tab()
    await tab.send(STORY)
    before = await has_words(tab, 10)
    await asyncio.to_thread(chats.restart)
    await expect(tab.articles.last.get_by_text("Stopped", exact=True)).to_be_visible()
    await tab.finished()
    await tab.check_stored()
    assert (await tab.texts())[1].startswith(before)
    await tab.chat("hello again")
    await tab.check_stored()


async def test_earlier_messages_and_more_chats(tab: Tab, chats: Service) -> None:
    """A long chat loads its earlier messages, and a long list its older chats, each once and in order."""
    lines = [f"message {number}" for number in range(1, 251)]
    await seed(chats, tab, {f"Chat {number}": [] for number in range(1, 51)} | {"Long": lines})
    await tab.page.reload()
    await tab.chat_link("Long").click()
    await expect(tab.articles.last).to_have_text(re.compile("message 250"))
    for count in (200, 250):
        await tab.button("Earlier messages").click()
        await expect(tab.articles).to_have_count(count)
    assert await tab.texts() == lines
    links = tab.chat_list.get_by_role("link")
    for count in (40, 51):
        await tab.button("More chats").click()
        await expect(links).to_have_count(count)
    assert await links.all_inner_texts() == ["Long", *(f"Chat {number}" for number in range(50, 0, -1))]


async def test_a_phone(visit: Visit, chats: Service) -> None:
    """On a phone the list is a drawer, and nothing scrolls sideways, even with a word of 300 letters."""
    tab = await (await visit(size="phone")).tab()
    await tab.check_width()
    await expect(tab.button("New chat")).to_be_hidden()
    await tab.chat("x" * 300)
    await tab.chat("hello")
    await tab.check_width()
    await expect(tab.articles.last).to_be_in_viewport()
    await tab.button("Open chat list").click()
    await tab.check_width()
    await tab.button("New chat").click()
    await expect(tab.button("New chat")).to_be_hidden()
    await tab.chat("a second chat")
    await tab.button("Open chat list").click()
    await tab.chat_link(re.compile("^x+")).click()
    await expect(tab.articles).to_have_count(4)
    await expect(tab.chat_link("a second chat")).to_be_hidden()
    await tab.check_stored()


async def test_the_keyboard_alone(tab: Tab) -> None:
    """Without a mouse: a chat, a new line, a stop, versions, options, a dialog, and the search."""
    keys = tab.page.keyboard
    await tab.focus("textbox", "Message")
    await keys.type("first line")
    await keys.press("Shift+Enter")
    await keys.type("second line")
    await keys.press("Enter")
    await expect(tab.articles).to_have_count(2)
    await tab.finished()
    assert (await tab.texts())[0] == "first line\nsecond line"
    await expect(tab.box).to_be_focused()
    await keys.type(STORY)
    await keys.press("Enter")
    await has_words(tab, 5)
    await keys.press("Escape")
    await expect(tab.articles.last.get_by_text("Stopped", exact=True)).to_be_visible()
    await tab.focus("button", "Regenerate")
    await keys.press("Enter")
    await expect(tab.page.get_by_text("2 of 2", exact=True)).to_be_visible()
    await tab.finished()
    await tab.focus("button", "Chat options")
    await keys.press("Enter")
    await tab.focus("button", "Rename")
    await keys.press("Enter")
    await expect(tab.page.get_by_role("textbox", name="Title")).to_be_focused()
    for _ in range(6):
        await keys.press("Tab")
        assert await tab.page.evaluate("document.activeElement.closest('dialog') !== null || !document.hasFocus()")
    await keys.press("Escape")
    await expect(tab.page.get_by_role("dialog")).to_be_hidden()
    await expect(tab.button("Chat options")).to_be_focused()
    await tab.focus("searchbox", "Search messages")
    await keys.type("second line")
    await expect(tab.page.get_by_role("list", name="Search results").get_by_role("link")).not_to_have_count(0)
    await tab.focus("link", "first line")
    await keys.press("Enter")
    await expect(tab.page).to_have_url(re.compile(r"/m/\d+$"))
    await keys.press("Escape")
    await tab.check_tab_order()


async def test_the_themes(visit: Visit) -> None:
    """The page follows the system's theme until the visitor chooses one, which a reload keeps."""
    tab = await (await visit(theme="light")).tab()
    light = await tab.background()
    await tab.page.emulate_media(color_scheme="dark")
    dark = await tab.background()
    assert (sum(light) > 600, sum(dark) < 150) == (True, True)
    await tab.page.emulate_media(color_scheme="light")
    await tab.button("Dark theme").click()
    await expect(tab.button("Dark theme")).to_have_attribute("aria-pressed", "true")
    await tab.page.reload()
    await expect(tab.button("Dark theme")).to_have_attribute("aria-pressed", "true")
    assert await tab.background() == dark


@pytest.mark.parametrize("theme", get_args(Theme))
@pytest.mark.parametrize("size", get_args(Size))
async def test_the_views(visit: Visit, chats: Service, screenshots: Path | None, size: Size, theme: Theme) -> None:
    """Each view fits its screen and has no violation of axe-core's rules. --screenshots keeps the pictures."""
    tab = await (await visit(size=size, theme=theme, allowed=FAILED)).tab()

    async def view(name: str) -> None:
        await tab.check_width()
        await tab.check_accessible(f"{name}, {size}, {theme}")
        if screenshots:
            path = screenshots / f"{name}-{size}-{theme}.png"
            await tab.page.screenshot(path=path, animations="disabled", caret="hide")

    async def open_list() -> None:
        if size == "phone":
            await tab.button("Open chat list").click()

    await view("new")
    await seed(chats, tab, {title: [title, answer] for title, answer in TALKS.items()})
    await tab.page.reload()
    await tab.chat("What can you do?")
    await tab.chat("roll a die with 20 sides")
    await tab.articles.last.get_by_text("Used roll_dice").click()
    await tab.button("Regenerate", tab.articles.last).click()
    await expect(tab.page.get_by_text("2 of 2", exact=True)).to_be_visible()
    await tab.finished()
    await tab.articles.last.get_by_text("Used roll_dice").click()
    await view("chat")
    await tab.button("Chat options").click()
    await view("options")
    await tab.button("Rename").click()
    await expect(tab.page.get_by_role("dialog", name="Rename chat")).to_be_visible()
    await view("rename")
    await tab.page.keyboard.press("Escape")
    await tab.button("Edit", tab.articles.first).click()
    await view("edit")
    await tab.button("Cancel").click()
    await tab.send(STORY)
    await has_words(tab, 60)
    await view("stream")
    await tab.button("Stop").click()
    await expect(tab.page.get_by_text("Stopped", exact=True)).to_be_visible()
    await view("stopped")
    await open_list()
    await tab.option("Packing list for Iceland", "Pin")
    await expect(tab.page.get_by_role("list", name="Pinned chats")).to_be_visible()
    await view("list")
    await tab.page.get_by_role("searchbox").fill("die")
    await expect(tab.page.get_by_role("list", name="Search results").get_by_role("link")).not_to_have_count(0)
    await view("search")
    await tab.button("Clear search").click()
    await tab.button("Archived chats").click()
    await view("archived")
    await tab.button("Account").click()
    await view("account")
    await tab.button("Delete my account").click()
    await expect(tab.page.get_by_role("dialog", name="Delete your account?")).to_be_visible()
    await view("delete")
    await tab.button("Cancel").click()
    await tab.page.keyboard.press("Escape")
    await expect(tab.page.get_by_role("dialog")).to_be_hidden()
    await tab.page.goto(f"{chats.url}/#/c/987654321")
    await expect(tab.page.get_by_role("alert")).to_contain_text("does not exist")
    await view("missing")
    await tab.chat("x" * 300 + " " + MARKUP)
    await view("long-words")
