"""Errors for stored items that the installed release of a framework cannot read."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from chatdb.errors import ChatDBError


@contextmanager
def texts_hidden(package: str, stored: str) -> Generator[None]:
    """Raise ChatDBError instead of the package's own error, which may quote the texts of what is `stored`."""
    try:
        yield
    except ChatDBError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ChatDBError(
            f"the installed release of {package} cannot read {stored} ({type(error).__name__}): install the one that "
            "wrote it"
        ) from None
