"""Runs the service: `python examples/fastapi`."""

import argparse
import asyncio
import os
import secrets
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import uvicorn

import chatdb


async def check_database() -> None:
    """Raise a ChatDBError with a sentence for the operator, before any worker starts."""
    async with chatdb.create_pool() as db:
        await chatdb.check_schema(db)


def announce(url: str) -> None:
    """Print where to look as soon as a worker is ready."""
    while True:
        try:
            urllib.request.urlopen(f"{url}/ready", timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
        else:
            print(f"Open {url}", flush=True)
            return


def main() -> None:
    """Read the options and run the workers until SIGTERM or Ctrl+C."""
    parser = argparse.ArgumentParser(prog="examples/fastapi", description="A chat service on chatdb.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    os.environ.setdefault("SECRET_KEY", secrets.token_urlsafe(32))  # the workers sign with the same one
    if os.environ.get("DATABASE_URL"):
        try:
            asyncio.run(check_database())
        except chatdb.ChatDBError as error:
            sys.exit(f"{error}")
    signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(0))  # a single worker ends with the signal
    threading.Thread(target=announce, args=(f"http://{options.host}:{options.port}",), daemon=True).start()
    uvicorn.run(
        "service:app",
        host=options.host,
        port=options.port,
        workers=options.workers,
        app_dir=str(Path(__file__).parent),
        access_log=False,  # it would contain what people search for
        log_level="warning",
        timeout_graceful_shutdown=2,  # then responses that nobody reads are cancelled
    )


if __name__ == "__main__":
    main()
