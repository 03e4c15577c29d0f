"""Mutations that the drift checks must detect."""

from __future__ import annotations

import ast
import inspect
import re


def without_user(text):
    """
    Yield variants of a statement with one condition on the user loosened or one inserted user replaced.

    Each condition is replaced by `true` and by one of four others, in turn.
    """
    for number, found in enumerate(re.finditer(r"((?:\w+\.)?user_id) = \$1", text)):
        column = found[1]
        others = (f"{column} = $2", f"{column} >= $1", f"{column} = {column}", f"({found[0]} or true)")
        for condition in ("true", others[number % 4]):
            yield f"{text[: found.start()]}{condition}{text[found.end() :]}"
    for found in re.finditer(r"c\.(user_id|id) = w\.(user_id|conversation_id)", text):
        for other in (f"c.{found[1]} >= w.{found[2]}", f"c.{found[1]} = c.{found[1]}", f"({found[0]} or true)"):
            yield f"{text[: found.start()]}{other}{text[found.end() :]}"
    if "insert into chatdb." in text:
        for found in re.finditer(r"\b((?:select|returning|values \()\s*)((?:\w+\.)?user_id|\$1)(?=,)", text):
            for user in ("'ann'", "$2", "lower($1)"):
                yield f"{text[: found.start()]}{found[1]}{user}{text[found.end() :]}"


def less(parts):
    """Yield copies of a dict, each without one key."""
    for name in parts:
        yield {key: value for key, value in parts.items() if key != name}


def misfilled(source):
    """Yield variants of a filler's source with two adjacent columns, fields, values or conditions swapped."""

    def places(tree):
        """Return rows of places that hold a name or value: each an object, and its attribute or index."""
        located = [node for node in ast.walk(tree) if hasattr(node, "lineno")]
        nodes = sorted(located, key=lambda node: (node.lineno, node.col_offset))
        lists = [node.elts for node in nodes if isinstance(node, ast.Tuple)]
        lists += [each for node in nodes if isinstance(node, ast.Dict) for each in (node.keys, node.values)]
        rows = [[(items, index) for index in range(len(items))] for items in lists]
        filled = [
            node
            for node in nodes
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Attribute)
            and not node.targets[0].attr.startswith("__")
        ]
        rows.append([(node.targets[0], "attr") for node in filled])
        rows.append([(node, "value") for node in filled])
        conditions = [(node, "test") for node in nodes if isinstance(node, ast.If | ast.IfExp)]
        return [*(row for row in rows if len(row) > 2), conditions]

    def swap(one, other):
        (first, here), (second, there) = one, other
        if isinstance(here, int):
            first[here], second[there] = second[there], first[here]
        else:
            value = getattr(first, here)
            setattr(first, here, getattr(second, there))
            setattr(second, there, value)

    for number, row in enumerate(places(ast.parse(source))):
        for place in range(len(row) - 1):
            tree = ast.parse(source)
            swap(*places(tree)[number][place : place + 2])
            if (mutant := ast.unparse(tree)) != ast.unparse(ast.parse(source)):  # two ignored columns are one name
                yield mutant


FIRST_ARGUMENT = {"run_until_settled": 2, "_page": 1, "_check_options": 0}
"""Functions that pass arguments on, with the place of the first one."""


def neighbours(tree):
    """Yield each list of arguments that is sent, with each index that has a successor."""
    for node in ast.walk(ast.Module(tree.body[0].body, [])):
        if isinstance(node, ast.Call):
            is_verb = getattr(node.func, "attr", "").startswith(("fetch_", "iterate"))
            first = 1 if is_verb else FIRST_ARGUMENT.get(getattr(node.func, "id", ""), len(node.args))
            yield from ((node.args, place) for place in range(first, len(node.args) - 1))
        elif isinstance(node, ast.Tuple) and any(
            len(node.elts) > 2 or isinstance(each, ast.Starred) for each in node.elts
        ):
            yield from ((node.elts, place) for place in range(len(node.elts) - 1) if _differ(*node.elts[place:][:2]))


def _differ(one, other):
    return ast.dump(one) != ast.dump(other)


def swaps(module):
    """Yield variants of each function of a module with two adjacent arguments swapped."""
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if (
            function.__module__ == module.__name__
            and {"db", "connection", "expected", "order_by"} & inspect.signature(function).parameters.keys()
        ):
            source = inspect.getsource(function)
            for number, _ in enumerate(neighbours(ast.parse(source))):
                tree = ast.parse(source)
                items, place = list(neighbours(tree))[number]
                items[place : place + 2] = reversed(items[place : place + 2])
                found = {}
                exec(compile(tree, module.__file__, "exec"), vars(module), found)
                yield name, found[name]
