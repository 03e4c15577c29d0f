"""Finds names in chatdb's SQL that objects in other schemas could shadow, with PostgreSQL's own parser."""

from __future__ import annotations

import ast as python
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pglast
from pglast import ast, parse_sql
from pglast.enums import A_Expr_Kind, SubLinkType

import chatdb
from chatdb._core.query import data_folder
from chatdb.admin import row_security as protect
from tests.support.sqlfiles import _walk

PACKAGE = Path(chatdb.__file__).parent
FILES = sorted([*data_folder("sql").rglob("*.sql"), *data_folder("migrations").glob("*.sql")])
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "findings.py")
"""All modules except the one whose SQL is only displayed."""

SCHEMAS = {"pg_catalog", "chatdb", "chatdb_adopt", "pg_temp", "information_schema"}
TYPES = {
    *("bool", "boolean", "date", "int4", "int8", "json", "jsonb", "name", "oid", "text", "timestamp", "timestamptz"),
    *("uuid", "regclass", "regcollation", "regnamespace"),
}
"""Types used without pg_catalog. PostgreSQL finds them there first unless the search_path lists pg_catalog later."""
READS_ORIGINALS = {"110_view_conversations", "120_view_messages"}
"""The files that read the older system's tables in `public`."""

_VERBS = (
    *(
        "alter",
        "analyze",
        "begin",
        "comment on",
        "commit",
        "create",
        "deallocate",
        "delete from",
        r"do(?= \$)",
        "drop",
        "execute",
    ),
    *("explain", "grant", "insert into", "lock table", "prepare", "reset", "revoke", "select"),
    *("set", "show", "truncate", "update", "with"),
)
_STATEMENT = re.compile(rf"\s*(?:--[^\n]*\n\s*)*(?:{'|'.join(_VERBS)})(?:\s+\S|;)")
_EXPRESSION = re.compile(r"[^:]*(?:\b(?:pg_catalog|information_schema)\.\S|\bcurrent_setting\()")


PLACEHOLDER = _F = "filled_in"
"""Placeholder for a name that a module inserts, quoted by the server or psycopg."""
_RECORD = (
    "insert into chatdb._chatdb_migration (migration_id, sha256, chatdb_version, applied_at_utc) values (null, null, "
    "null, pg_catalog.now() at time zone 'UTC') on conflict (migration_id)"
)


def _in_outline(create: str) -> str:
    """Return a CREATE FUNCTION with placeholders for its name and body."""
    return re.sub(r"\$rls\$[\s\S]*\$rls\$", f"$rls${_F}$rls$", create.replace(protect._FUNCTION, _F, 1))


COMPLETED = {
    f"set {_F} search_path to pg_catalog, pg_temp": "set local search_path to pg_catalog, pg_temp",
    f"lock table {_F} in {_F} mode": f"lock table {_F} in share row exclusive mode",
    _in_outline(protect._CREATE): protect._CREATE,
    f"prepare {_F} as {_F}": f"prepare {_F} as select",
    "drop index concurrently if exists": f"drop index concurrently if exists {_F}",
    f"{_RECORD} {_F}": f"{_RECORD} do update set sha256 = excluded.sha256",
}
"""Texts into which a module inserts more than a name, parameter or number, with a complete statement for each."""
PROSE = {
    "analyze chatdb.conversations, chatdb.messages; on an SSD also set random_page_cost = 1.1",
    "create database ... encoding 'UTF8' template template0, and move the tables there",
    "drop the policy, or run chatdb protect --off",
    "set CHATDB_MIGRATE_URL to a direct connection (on Neon, the host without -pooler)",
}
"""Sentences that begin like SQL."""


class UnparsedError(AssertionError):
    """A text looks like SQL, but PostgreSQL's parser rejects it."""


def parsed(sql: str) -> list[Any]:
    """Return the syntax nodes of SQL, including those of PL/pgSQL blocks."""
    nodes: list[Any] = []
    try:
        for statement in parse_sql(sql):
            found = list(_walk(statement.stmt))
            nodes += found
            for node in found:
                if isinstance(node, ast.DoStmt | ast.CreateFunctionStmt):
                    nodes += [part for query in _queries(pglast.parse_plpgsql(_source(node))) for part in parsed(query)]
    except pglast.parser.ParseError as error:
        raise UnparsedError(f"{error}: {sql}") from error
    return nodes


def _source(block: Any) -> str:
    if isinstance(block, ast.DoStmt):
        (body,) = [part.arg.sval for part in block.args if part.defname == "as"]
        return f"do $chatdb${body}$chatdb$"
    (body,) = [part.arg[0].sval for part in block.options if part.defname == "as"]
    return _function(body)


def _function(body: str) -> str:
    return f"create function chatdb.f() returns pg_catalog.text language plpgsql as $chatdb${body}$chatdb$"


def _queries(tree: Any) -> Iterator[str]:
    """Yield the statements and expressions of a PL/pgSQL block."""
    if isinstance(tree, list):
        for part in tree:
            yield from _queries(part)
    elif isinstance(tree, dict):
        for name, part in tree.items():
            if name == "PLpgSQL_expr":
                query = part["query"]
                yield query if _STATEMENT.match(query.lower()) else f"select {query}"
            else:
                yield from _queries(part)


def gaps(sql: str, *, schemas: frozenset[str] = frozenset()) -> list[str]:
    """
    Return the functions, types, collations, search configurations, tables and qualified operators of other schemas.

    Unqualified operators are not included, because they depend on the types of their operands. In `test_names` the
    server resolves them.
    """
    nodes = parsed(sql)
    ctes = {node.ctename for node in nodes if isinstance(node, ast.CommonTableExpr)}
    made = {node.relation.relname for node in nodes if isinstance(node, ast.CreateStmt)}
    made |= {node.alias.aliasname for node in nodes if isinstance(node, ast.RangeVar) and node.alias}
    made |= {node.view.relname for node in nodes if isinstance(node, ast.ViewStmt)}
    allowed = SCHEMAS | schemas
    found: list[str] = []
    for node in nodes:
        match node:
            case ast.FuncCall():
                *schema, name = _parts(node.funcname)
                # with several arguments PostgreSQL always uses pg_catalog's unnest, and accepts no schema
                if schema not in (["pg_catalog"], ["chatdb"]) and not (name == "unnest" and len(node.args or ()) > 1):
                    found.append(f"function {'.'.join([*schema, name])}")
            case ast.TypeName(names=[*_]):
                *schema, name = _parts(node.names)
                if schema != ["pg_catalog"] and (schema or name not in TYPES):
                    found.append(f"type {'.'.join([*schema, name])}")
            case ast.TypeCast(arg=ast.A_Const(val=ast.String(sval=name)), typeName=kind) if _parts(kind.names)[
                -1
            ] == "regconfig" and not name.startswith("pg_catalog."):
                found.append(f"text search configuration {name}")
            case ast.CollateClause():
                if _parts(node.collname) not in (["C"], ["pg_catalog", "C"]):
                    found.append(f"collation {'.'.join(_parts(node.collname))}")
            case ast.RangeVar(schemaname=None):
                if node.relname not in ctes | made | {PLACEHOLDER}:
                    found.append(f"table {node.relname}")
            case ast.RangeVar():
                if node.schemaname not in allowed | {PLACEHOLDER}:
                    found.append(f"table {node.schemaname}.{node.relname}")
            case _:
                found += [f"operator {'.'.join(parts)}" for parts in _operators(node) if parts[:-1] not in _PINNED]
    return found


_PINNED = ([], ["pg_catalog"])


def _parts(name: Any) -> list[str]:
    return [part.sval for part in name or () if isinstance(part, ast.String)]


def _operators(node: Any) -> list[list[str]]:
    """Return the names of a node's operators, including those of IN, BETWEEN and IS DISTINCT FROM."""
    match node:
        case ast.A_Expr(kind=A_Expr_Kind.AEXPR_BETWEEN | A_Expr_Kind.AEXPR_NOT_BETWEEN):
            return [["<="], [">="]]
        case ast.A_Expr(kind=A_Expr_Kind.AEXPR_LIKE | A_Expr_Kind.AEXPR_ILIKE | A_Expr_Kind.AEXPR_OP):
            return [_parts(node.name)]
        case ast.A_Expr():
            return [_parts(node.name) or ["="]]
        case ast.SubLink(subLinkType=SubLinkType.ANY_SUBLINK | SubLinkType.ALL_SUBLINK):
            return [_parts(node.operName) or ["="]]
        case ast.JoinExpr(usingClause=[*_]) | ast.CaseExpr(arg=ast.Node()):
            return [["="]]
    return []


def unqualified(sql: str) -> list[str]:
    """Return the unqualified operators, once per occurrence."""
    return [parts[0] for node in parsed(sql) for parts in _operators(node) if len(parts) == 1]


def strings(module: Path) -> list[str]:
    """
    Return the SQL in a module's string constants, with placeholders for inserted parts.

    A text that begins with an inserted part, such as the verb of a REINDEX, is not included.
    """
    found: list[str] = []
    for text in map(_filled, _texts(python.parse(module.read_text(encoding="utf-8")))):
        if _STATEMENT.match(text):
            found.append(COMPLETED.get(text.strip(), text))
        elif text.lstrip().startswith(("declare\n", "begin\n")):
            found.append(_function(text))
        elif _EXPRESSION.match(text):
            found.append(f"select {text}")
    return [text for text in found if text not in PROSE]


def _texts(tree: python.Module) -> Iterator[str]:
    inner = {id(part) for node in python.walk(tree) if isinstance(node, python.JoinedStr) for part in node.values}
    inner |= {
        id(node.body[0].value)  # docstrings
        for node in python.walk(tree)
        if isinstance(node, python.Module | python.ClassDef | python.FunctionDef | python.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], python.Expr)
    }
    for node in python.walk(tree):
        if isinstance(node, python.JoinedStr):
            yield "".join(
                part.value if isinstance(part, python.Constant) and isinstance(part.value, str) else PLACEHOLDER
                for part in node.values
            )
        elif isinstance(node, python.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.value


def _filled(text: str) -> str:
    text = re.sub(r"%(?:\(\w+\))?s", "null", text.replace("%%", "\0")).replace("\0", "%")
    return re.sub(r"\{\w*\}", PLACEHOLDER, text)


def called(sql: str) -> set[str]:
    """Return the names of the functions in SQL."""
    return {_parts(node.funcname)[-1] for node in parsed(sql) if isinstance(node, ast.FuncCall)}


def operators(sql: str) -> set[str]:
    """Return the names of the operators in SQL."""
    return {parts[-1] for node in parsed(sql) for parts in _operators(node)}
