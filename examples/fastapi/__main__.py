"""Runs the service: `python examples/fastapi`."""

import argparse
import asyncio
import os
import secrets
import signal
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import uvicorn

import chatdb


async def check_database() -> None:
    """Fail with one sentence, before any worker starts, if the database cannot be used."""
    async with chatdb.create_pool() as db:
        await chatdb.check_schema(db)


def announce(url: str) -> None:
    """Print where to look as soon as the service is ready."""
    while True:
        with suppress(OSError):
            urllib.request.urlopen(f"{url}/ready", timeout=5).close()
            print(f"Open {url}", flush=True)
            return
        time.sleep(0.2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="examples/fastapi", description="A chat service on chatdb.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    os.environ.setdefault("SECRET_KEY", secrets.token_urlsafe(32))  # without it, tokens end with the service
    if os.environ.get("DATABASE_URL"):
        try:
            asyncio.run(check_database())
        except chatdb.ChatDBError as error:
            sys.exit(str(error))
    signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(0))  # the exit code of a single worker
    threading.Thread(target=announce, args=(f"http://{options.host}:{options.port}",), daemon=True).start()
    uvicorn.run(
        "service:app",
        **vars(options),
        app_dir=str(Path(__file__).parent),
        access_log=False,  # it would show what people search for
        log_level="warning",
        timeout_graceful_shutdown=2,  # seconds until responses that nobody reads are cancelled
    )
