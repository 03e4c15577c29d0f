"""
Search, guided by coverage, for a DSN or file on which a parser fails with anything but its own error.

Run by `nox -s fuzz`; its corpus stays in `.cache/fuzz`, and the next run continues from it.
"""

from __future__ import annotations

import io
import json
import ssl
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import atheris

from tests.support.seeds import DSNS, FILES, SECRET, WORDS

with atheris.instrument_imports(include=["chatdb", "urllib", "json"]):
    from chatdb import ConfigurationError, InvalidInputError
    from chatdb._core.dsn import connect_arguments, libpq_dsn
    from chatdb.transfer import files

ssl.create_default_context = cache(ssl.create_default_context)  # reading the system's certificates takes 10 ms
SEEDS = {"dsn": DSNS, "file": FILES}


def dsn(data: bytes) -> None:
    """Parse a DSN for asyncpg and for psycopg."""
    text = data.decode("utf-8", "surrogateescape")
    for read in (connect_arguments, lambda text: libpq_dsn(text, scheme="postgresql")):
        try:
            read(text)
        except ConfigurationError as error:
            if SECRET in str(error):
                raise AssertionError(str(error)) from None


def file(data: bytes) -> None:
    """Read a file in its detected format and in each format."""
    stream = io.BytesIO(data)
    for kind in ("auto", *files.FORMATS):
        stream.seek(0)
        with suppress(InvalidInputError):
            for _ in files.read(stream, files.detect(stream) if kind == "auto" else kind):
                pass


if __name__ == "__main__":
    name, *options = sys.argv[1:]
    corpus = Path(".cache", "fuzz", name)
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS[name]):
        (corpus / f"seed-{number}").write_text(seed, encoding="utf-8")
    words = corpus.with_suffix(".dict")
    words.write_text("".join(f"{json.dumps(word)}\n" for word in WORDS[name]), encoding="utf-8")
    options += [f"-artifact_prefix={corpus}-", f"-dict={words}", str(corpus)]
    atheris.Setup([sys.argv[0], *options], {"dsn": dsn, "file": file}[name])
    atheris.Fuzz()
