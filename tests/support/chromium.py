"""Runs Chromium without a network."""

from __future__ import annotations

import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from playwright.async_api import Browser, async_playwright, expect

PATIENCE = 30_000
"""Maximum wait for a condition, in milliseconds, on a busy machine."""
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no request leaves the machine
)


def chromium() -> str:
    """Return Chromium's path. A missing browser fails the tests: a skip would hide it."""
    for name in ("chromium", "chromium-browser"):
        if found := shutil.which(name):
            return found
    raise AssertionError("these tests need Chromium: run apt-get install chromium")


@asynccontextmanager
async def launch() -> AsyncGenerator[Browser]:
    """Run a browser that several visitors share."""
    expect.set_options(timeout=PATIENCE)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        yield browser
        await browser.close()
