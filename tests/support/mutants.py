"""Mutations that the drift checks must detect."""

from __future__ import annotations

import ast
import inspect
import re


def without_user(text):
    """Yield variants of a statement with one condition on the user loosened or one inserted user replaced."""
    for found in re.finditer(r"((?:\w+\.)?user_id) = \$1", text):
        column = found[1]
        for condition in ("true", f"{column} = $2", f"{column} >= $1", f"{column} = {column}", f"({found[0]} or true)"):
            yield f"{text[: found.start()]}{condition}{text[found.end() :]}"
    if "insert into chatdb." in text:
        for found in re.finditer(r"\b((?:select|returning|values \()\s*)((?:\w+\.)?user_id|\$1)(?=,)", text):
            for user in ("'ann'", "$2", "lower($1)"):
                yield f"{text[: found.start()]}{found[1]}{user}{text[found.end() :]}"


def less(parts):
    """Yield copies of a dict, each without one key."""
    for name in parts:
        yield {key: value for key, value in parts.items() if key != name}


def misfilled(source):
    """Yield variants of a filler's source with two adjacent columns or fields swapped."""

    def lists(tree):
        kinds = {"elts": ast.Tuple, "keys": ast.Dict, "values": ast.Dict}
        found = [(node, name) for node in ast.walk(tree) for name, kind in kinds.items() if isinstance(node, kind)]
        return [items for node, name in found if len(items := getattr(node, name)) > 2]

    for number, items in enumerate(lists(ast.parse(source))):
        for place in range(len(items) - 1):
            tree = ast.parse(source)
            items = lists(tree)[number]
            items[place : place + 2] = reversed(items[place : place + 2])
            yield ast.unparse(tree)


def neighbours(tree):
    """Yield each list of arguments that is sent, with each index that has a successor."""
    for node in ast.walk(ast.Module(tree.body[0].body, [])):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "").startswith(("fetch_", "iterate")):
            yield from ((node.args, place) for place in range(1, len(node.args) - 1))
        elif isinstance(node, ast.Tuple) and len(node.elts) > 2:
            yield from ((node.elts, place) for place in range(len(node.elts) - 1))


def swaps(module):
    """Yield variants of each function of a module with two adjacent arguments swapped."""
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if (
            function.__module__ == module.__name__
            and {"db", "connection"} & inspect.signature(function).parameters.keys()
        ):
            source = inspect.getsource(function)
            for number, _ in enumerate(neighbours(ast.parse(source))):
                tree = ast.parse(source)
                items, place = list(neighbours(tree))[number]
                items[place : place + 2] = reversed(items[place : place + 2])
                found = {}
                exec(compile(tree, module.__file__, "exec"), vars(module), found)
                yield name, found[name]
