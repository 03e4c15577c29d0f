"""Parses SQL files for the drift checks: the header with a grammar, the statement with PostgreSQL's own parser."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from pglast import ast, parse_sql
from pglast.enums import A_Expr_Kind, BoolExprType, JoinType, SetOperation, SubLinkType
from pglast.parser import scan

from chatdb._core.query import statement_files

HEADER = re.compile(
    r"-- (?P<name>\w+)\n"
    r"(?P<prose>(?:-- \S.*\n)+)"
    r"--\n"
    r"(?:(?P<parameters>(?:-- \$.*\n)+)--\n)?"
    r"-- returns (?P<number>one|many) (?P<record>\w+)(?: without (?P<given>\w+(?:(?:, | and )\w+)*))?"
    r"(?:, (?P<relation>or|then) an existence row: (?P<existence>\S.*))?\n"
    r"(?:-- served by (?P<indexes>\w+(?:, \w+)*)\n)?"
    r"\n"
    r"(?P<body>[^\n][\s\S]*\S)\n"
)
PARAMETER = re.compile(
    r"-- \$(?P<number>\d+) (?P<name>\w+) (?P<type>\w+(?:\[\])?)(?P<null> null)?(?: {4}(?P<remark>\S.*))?"
)
NEVER_NULL = {"count", "row_number", "concat_ws"}  # concat_ws with a separator that is not null
HARMLESS = {
    *("cardinality", "coalesce", "concat", "concat_ws", "count", "current_setting", "format_type"),
    *("pg_get_constraintdef", "pg_get_expr", "pg_get_indexdef", "quote_ident", "replace", "row_number"),
    *("row_security_active", "statement_timestamp", "timezone", "unnest"),
}
"""The functions allowed in statements. Others, such as query_to_xml, could read tables named in a text."""
TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in statement_files()}
Columns = dict[tuple[str, str], dict[str, tuple[str, bool]]]


@dataclass(frozen=True)
class Parameter:
    """A parameter in the header. An array is nullable if its elements are."""

    number: int
    name: str
    type: str
    nullable: bool


@dataclass(frozen=True)
class SqlFile:
    """The contents of a file's header, and the text sent to the server."""

    name: str
    parameters: tuple[Parameter, ...]
    number: str
    record: str
    given: tuple[str, ...]
    relation: str | None
    existence: str | None
    indexes: frozenset[str]
    sql: str

    @cached_property
    def statement(self) -> Any:
        """The syntax tree of the statement."""
        statements = parse_sql(self.sql)
        assert len(statements) == 1, f"{self.name} has {len(statements)} statements"
        return statements[0].stmt

    @cached_property
    def nodes(self) -> tuple[Any, ...]:
        """All nodes of the statement."""
        return tuple(_walk(self.statement))

    @cached_property
    def ctes(self) -> dict[str, Any]:
        """The queries of the WITH clause, by name."""
        found = [node for node in self.nodes if isinstance(node, ast.CommonTableExpr)]
        assert not any(node.aliascolnames for node in found), "a WITH clause that renames columns"
        assert len({node.ctename for node in found}) == len(found), "two WITH queries of one name"
        return {node.ctename: node.ctequery for node in found}


def named(name: str, body: str) -> str:
    """Return a statement with its name as a comment after the first word."""
    start = next(token.end + 1 for token in scan(body) if token.name != "SQL_COMMENT")
    return f"{body[:start]} /* chatdb.{name} */{body[start:]}"


def parse(text: str) -> SqlFile:
    """Parse a file. Raise AssertionError if the header does not follow the grammar."""
    header = HEADER.fullmatch(text)
    assert header, f"not a header: {text.partition(chr(10) * 2)[0]}"
    lines = [(line, PARAMETER.fullmatch(line)) for line in (header["parameters"] or "").splitlines()]
    assert all(found for _, found in lines), f"not a parameter: {[line for line, found in lines if not found]}"
    return SqlFile(
        name=header["name"],
        parameters=tuple(
            Parameter(
                number=int(found["number"]),
                name=found["name"],
                type=found["type"],
                nullable=bool(found["null"]) or (found["remark"] or "").startswith("null where "),
            )
            for _, found in lines
            if found
        ),
        number=header["number"],
        record=header["record"],
        given=tuple(re.split(", | and ", header["given"])) if header["given"] else (),
        relation=header["relation"],
        existence=header["existence"],
        indexes=frozenset((header["indexes"] or "").split(", ")) - {""},
        sql=f"--chatdb.{header['name']}\n{named(header['name'], header['body'])}",
    )


@cache
def file_of(stem: str) -> SqlFile:
    """Parse a file under `sql/`."""
    return parse(TEXTS[stem])


def _walk(node: Any) -> Iterator[Any]:
    if isinstance(node, tuple):
        for item in node:
            yield from _walk(item)
    elif isinstance(node, ast.Node):
        yield node
        for name in node:
            yield from _walk(getattr(node, name))


def branches(query: Any) -> list[Any]:
    """Return the branches of a UNION, or the query itself."""
    if isinstance(query, ast.SelectStmt) and query.op != SetOperation.SETOP_NONE:
        return branches(query.larg) + branches(query.rarg)
    return [query]


def outputs(query: Any) -> list[Any]:
    """Return the result columns of a statement."""
    if isinstance(query, ast.SelectStmt):
        return list(query.targetList or ())
    return list(query.returningClause.exprs if query.returningClause else ())


def is_existence(query: Any) -> bool:
    """Return whether a statement returns only nulls."""
    return all(isinstance(target.val, ast.A_Const) and target.val.isnull for target in outputs(query))


def existence_gaps(file: SqlFile) -> list[str]:
    """
    Return how the statement could add an existence row against its header, or omit one.

    Either a condition excludes it if there is any record, or it comes last, under a limit that the records alone can
    reach. The records then have the same limit, which also keeps the server from reading both branches in parallel.
    """
    kinds = [is_existence(query) for query in branches(file.statement)]
    if file.existence is None:
        return ["an existence row that the header does not tell of"] if any(kinds) else []
    top, [records, *rest] = file.statement, branches(file.statement)
    is_append = kinds == [False, True] and top.op == SetOperation.SETOP_UNION and top.all
    if not is_append or top.sortClause or top.limitOffset:
        return ["not one UNION ALL of the records and, at the end, the existence row"]
    [existence] = rest
    if top.limitCount is None:
        is_fit = file.relation == "or" and _excludes(existence, records) and existence.limitCount is None
        return [] if is_fit else ["an existence row that may stand beside records"]
    if existence.limitCount or existence.whereClause is None or top.limitCount != records.limitCount:
        return ["a limit that is not that of the records"]
    is_one = isinstance(top.limitCount, ast.A_Const) and top.limitCount.val.ival == 1
    is_parameter = isinstance(top.limitCount, ast.ParamRef)
    if (file.number, file.relation) not in [("one", "or")] * is_one + [("many", "then")] * is_parameter:
        return ["a limit that the header does not tell of"]
    return []


def _excludes(existence: Any, records: Any) -> bool:
    """Return whether a condition of the existence row implies that there are no records."""
    for condition in _conjuncts(existence.whereClause):
        match condition:
            case ast.BoolExpr(
                boolop=BoolExprType.NOT_EXPR, args=[ast.SubLink(subLinkType=SubLinkType.EXISTS_SUBLINK) as sub]
            ):
                if sub.subselect.fromClause == records.fromClause and not sub.subselect.whereClause:
                    return records.whereClause is None and len(records.fromClause) == 1
            case ast.A_Expr(kind=A_Expr_Kind.AEXPR_OP) if names(condition) == ["<>"]:
                opposite = [
                    [part.lexpr, part.rexpr] for part in _conjuncts(records.whereClause) if names(part) == ["="]
                ]
                if [condition.lexpr, condition.rexpr] in opposite:
                    return True
    return False


def ungiven(file: SqlFile) -> list[str]:
    """Return the columns that the header omits from the rows, but the statement does not compare with arguments."""
    numbers = {parameter.name: parameter.number for parameter in file.parameters}
    gaps: list[str] = []
    for query in branches(file.statement) if file.given else ():
        if not is_existence(query):
            assert len(Level(query).sources) == 1, "columns of several tables"
            equal = {
                (names(part.lexpr)[-1], part.rexpr.number)
                for part in _conjuncts(query.whereClause)
                if isinstance(part, ast.A_Expr) and part.kind == A_Expr_Kind.AEXPR_OP and names(part) == ["="]
                if isinstance(part.lexpr, ast.ColumnRef) and isinstance(part.rexpr, ast.ParamRef)
            }
            gaps += [name for name in file.given if (name, numbers.get(name)) not in equal]
    return gaps


def uncast(node: Any) -> Any:
    """Return a node without its casts."""
    return uncast(node.arg) if isinstance(node, ast.TypeCast) else node


def names(node: Any) -> list[str]:
    """Return the parts of a column's or an operator's name. `*` is no part."""
    parts = node.fields if isinstance(node, ast.ColumnRef) else node.name
    return [part.sval for part in parts if isinstance(part, ast.String)]


def _conjuncts(condition: Any) -> list[Any]:
    if isinstance(condition, ast.BoolExpr) and condition.boolop == BoolExprType.AND_EXPR:
        return [part for argument in condition.args for part in _conjuncts(argument)]
    return [condition]


@dataclass
class Source:
    """A table, CTE or function in a statement, with the conditions on its rows."""

    node: Any
    alias: str
    outer: bool
    conditions: list[Any] = field(default_factory=list)


class Level:
    """One SELECT, UPDATE or DELETE without its subqueries."""

    def __init__(self, query: Any) -> None:
        self.sources: list[Source] = []
        if isinstance(query, ast.UpdateStmt | ast.DeleteStmt | ast.InsertStmt):
            self._add(query.relation)
        for item in getattr(query, "fromClause", None) or getattr(query, "usingClause", None) or ():
            self._add(item)
        for source in self.sources:
            source.conditions += _conjuncts(getattr(query, "whereClause", None))

    def _add(self, item: Any, *, outer: bool = False) -> list[Source]:
        if not isinstance(item, ast.JoinExpr):
            is_renamed = isinstance(item, ast.RangeVar) and item.alias and item.alias.colnames
            assert not is_renamed, "an alias that renames columns"
            self.sources.append(Source(item, item.alias.aliasname if item.alias else item.relname, outer))
            return self.sources[-1:]
        assert item.jointype in (JoinType.JOIN_INNER, JoinType.JOIN_LEFT), "a join that the checks do not know"
        is_left = item.jointype == JoinType.JOIN_LEFT
        left, right = self._add(item.larg, outer=outer), self._add(item.rarg, outer=outer or is_left)
        for source in right if is_left else left + right:
            source.conditions += _conjuncts(item.quals)
        return left + right

    def source_of(self, column: ast.ColumnRef) -> Source:
        """Return the source of a column. An ambiguous column must be qualified."""
        *qualifier, _ = names(column)
        found = [source for source in self.sources if not qualifier or source.alias == qualifier[-1]]
        assert len(found) == 1, f"{'.'.join(names(column))} may come from {len(found)} sources"
        return found[0]


def is_table(node: Any) -> bool:
    """Return whether a node is a table with user data."""
    return isinstance(node, ast.RangeVar) and node.schemaname == "chatdb"


def isolation_gaps(file: SqlFile) -> list[str]:
    """
    Return where a statement could reach another user's rows.

    Every table with user data needs the condition `user_id = $1` on its own level. Every inserted row needs `$1` as its
    user, or the user of a row selected with that condition. Any other way to read a table is a gap.
    """
    gaps: list[str] = []
    seen: list[Any] = []
    for query in file.nodes:
        if isinstance(query, ast.InsertStmt):
            seen.append(query.relation)
            if is_table(query.relation):
                gaps += _insertion_gaps(query, file.ctes)
        elif isinstance(query, ast.SelectStmt | ast.UpdateStmt | ast.DeleteStmt):
            level = Level(query)
            seen += [source.node for source in level.sources]
            gaps += [
                f"{source.alias} is read or written without user_id = $1"
                for source in level.sources
                if is_table(source.node) and not _is_guarded(source, level)
            ]
            if isinstance(query, ast.UpdateStmt) and any(target.name == "user_id" for target in query.targetList):
                gaps.append(f"{level.sources[0].alias} gets another user_id")
    for node in file.nodes:
        if isinstance(node, ast.FuncCall) and not _is_harmless(node):
            gaps.append(f"{node.funcname[-1].sval} is a function that the check does not know")
        if isinstance(node, ast.RangeVar):
            if not any(node is other for other in seen):
                gaps.append(f"{node.relname} is used in a way that the check does not know")
            is_cte = node.schemaname is None and node.relname in file.ctes
            if not is_cte and node.schemaname not in ("chatdb", "pg_catalog"):
                gaps.append(f"{node.relname} is not named as a table of chatdb's or the catalog's")
    return gaps


def _is_harmless(function: ast.FuncCall) -> bool:
    """Return whether a function belongs to the server and reads no tables."""
    *schema, name = (part.sval for part in function.funcname)
    return name in HARMLESS and schema in ([], ["pg_catalog"])


def _is_guarded(source: Source, level: Level) -> bool:
    own = [[source.alias, "user_id"]] + [["user_id"]] * (len(level.sources) == 1)
    for condition in source.conditions:
        if isinstance(condition, ast.A_Expr) and condition.kind == A_Expr_Kind.AEXPR_OP and names(condition) == ["="]:
            for one, other in ((condition.lexpr, condition.rexpr), (condition.rexpr, condition.lexpr)):
                if isinstance(one, ast.ColumnRef) and names(one) in own and _is_user(other):
                    return True
    return False


def _is_user(node: Any) -> bool:
    return isinstance(node, ast.ParamRef) and node.number == 1


def _insertion_gaps(query: ast.InsertStmt, ctes: dict[str, Any]) -> list[str]:
    gaps: list[str] = []
    columns = [column.name for column in query.cols or ()]
    if "user_id" not in columns:
        return [f"{query.relation.relname} gets a row without a user_id"]
    place = columns.index("user_id")
    conflict = query.onConflictClause
    if conflict and conflict.targetList:
        if "user_id" not in [part.name for part in (conflict.infer and conflict.infer.indexElems) or ()]:
            gaps.append(f"{query.relation.relname} may have another user's row updated on conflict")
        if "user_id" in [target.name for target in conflict.targetList]:
            gaps.append(f"{query.relation.relname} gets another user_id on conflict")
    for branch in branches(query.selectStmt):
        values = [row[place] for row in branch.valuesLists or ()] or [branch.targetList[place].val]
        if not all(_is_user(value) or _is_users(value, branch, ctes) for value in values):
            gaps.append(f"{query.relation.relname} gets a row whose user_id is not known to be $1")
    return gaps


def _is_users(value: Any, branch: Any, ctes: dict[str, Any]) -> bool:
    """Return whether a value is the user_id of a CTE that selects it from a guarded table."""
    if not isinstance(value, ast.ColumnRef):
        return False
    cte = ctes.get(getattr(Level(branch).source_of(value).node, "relname", None))
    for inner in branches(cte) if cte else ():
        level = Level(inner)
        users = [
            out.val for out in outputs(inner) if _name(out) == names(value)[-1] and isinstance(out.val, ast.ColumnRef)
        ]
        sources = [level.source_of(user) for user in users if names(user)[-1] == "user_id"]
        if not any(is_table(source.node) and _is_guarded(source, level) for source in sources):
            return False
    return cte is not None


def _name(output: ast.ResTarget) -> str | None:
    """Return the name of a result column."""
    value = uncast(output.val)
    return output.name or (names(value)[-1] if isinstance(value, ast.ColumnRef) else None)


def nullable(file: SqlFile, columns: Columns) -> list[bool]:
    """Return for each result column whether it may be null, existence rows aside."""
    rows = [query for query in branches(file.statement) if not is_existence(query)]
    return [
        any(part)
        for part in zip(
            *([_may_be_null(o.val, Level(q), file, columns) for o in outputs(q)] for q in rows), strict=True
        )
    ]


def _may_be_null(value: Any, level: Level, file: SqlFile, columns: Columns) -> bool:
    match value:
        case ast.A_Const():
            return bool(value.isnull)
        case ast.TypeCast():
            return _may_be_null(value.arg, level, file, columns)
        case ast.A_Expr(kind=A_Expr_Kind.AEXPR_OP):
            return any(_may_be_null(side, level, file, columns) for side in (value.lexpr, value.rexpr))
        case ast.MinMaxExpr():
            return all(_may_be_null(argument, level, file, columns) for argument in value.args)
        case ast.FuncCall():
            return value.funcname[-1].sval not in NEVER_NULL
        case ast.SubLink():  # a count alone always returns one row
            (output,) = outputs(value.subselect)
            return not (isinstance(output.val, ast.FuncCall) and output.val.funcname[-1].sval == "count")
        case ast.ColumnRef():
            return _column_may_be_null(value, level, file, columns)
        case _:
            return True


def _column_may_be_null(column: ast.ColumnRef, level: Level, file: SqlFile, columns: Columns) -> bool:
    source, name = level.source_of(column), names(column)[-1]
    if source.outer:
        return True
    if isinstance(source.node, ast.RangeFunction):
        return not (source.node.ordinality and name == source.node.alias.colnames[-1].sval)
    if isinstance(source.node, ast.RangeVar) and source.node.schemaname:
        return not columns[source.node.schemaname, source.node.relname][name][1]
    query = source.node.subquery if isinstance(source.node, ast.RangeSubselect) else file.ctes[source.node.relname]
    return any(
        _may_be_null(output.val, Level(branch), file, columns)
        for branch in branches(query)
        for output in outputs(branch)
        if _name(output) == name
    )


def meetings(file: SqlFile) -> dict[int, set[str]]:
    """Return for each parameter the columns to which it is compared, stored or aliased."""
    met: dict[int, set[str]] = defaultdict(set)

    def meet(value: Any, column: str) -> None:
        if isinstance(uncast(value), ast.ParamRef):
            met[uncast(value).number].add(column)

    for node in file.nodes:
        match node:
            case ast.A_Expr():
                left, right = (
                    [*side.args] if isinstance(side, ast.RowExpr) else [side] for side in (node.lexpr, node.rexpr)
                )
                for one, other in zip(left, right, strict=False):
                    for column, value in ((one, other), (other, one)):
                        if isinstance(uncast(column), ast.ColumnRef):
                            meet(value, names(uncast(column))[-1])
            case ast.InsertStmt():
                for branch in branches(node.selectStmt):
                    for row in branch.valuesLists or ([output.val for output in branch.targetList],):
                        for column, value in zip(node.cols, row, strict=True):
                            meet(value, column.name)
            case ast.UpdateStmt():
                for target in node.targetList:
                    choices = target.val.args if isinstance(target.val, ast.CaseExpr) else ()
                    for value in (target.val, *(part for choice in choices for part in (choice.expr, choice.result))):
                        meet(value, target.name)
            case ast.RangeFunction():
                for function in node.functions:
                    for column, value in zip(node.alias.colnames, function[0].args, strict=False):
                        meet(value, column.sval)
            case ast.SelectStmt():
                meet(node.limitCount, "row_limit")
    return met
