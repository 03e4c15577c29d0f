"""The Query objects and record fields of the package, for the drift checks."""

from __future__ import annotations

import importlib
import re
import typing
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Literal

import chatdb
from chatdb._core.query import Query


@cache
def bindings():
    """Return every Query of the package, with module and variable name."""
    package = Path(chatdb.__file__).parent
    paths = [path for path in package.rglob("*.py") if re.search(r"^\w+ = \w*Query\(", path.read_text("utf-8"), re.M)]
    names = [".".join(path.relative_to(package.parent).with_suffix("").parts) for path in paths]
    variables = [(module, *item) for module in map(importlib.import_module, names) for item in vars(module).items()]
    return [(module, name, value) for module, name, value in variables if isinstance(value, Query)]


def query_of(stem):
    """Return the Query of a file."""
    return next(query for _, _, query in bindings() if query.name == stem)


def record_of(stem):
    """Return the record of a file."""
    return query_of(stem).record


def given_of(stem):
    """Return the fields that a file's rows omit because the caller has them."""
    query = query_of(stem)
    return query.from_arguments + query.from_messages


def fields_of(record, without=()):
    """Return a record's fields, with the driver's type and whether None is allowed."""
    names = [name for name in record.model_fields if name not in without]
    hints = {name: hint for name, hint in typing.get_type_hints(record).items() if name in names}
    fields = []
    for name, hint in hints.items():
        optional = NoneType in typing.get_args(hint)
        (kind,) = {*(typing.get_args(hint) if optional else [hint])} - {NoneType}
        is_text = typing.get_origin(kind) in (Literal, dict) or (isinstance(kind, type) and issubclass(kind, str))
        fields.append((name, str if is_text else kind, optional))
    return fields
