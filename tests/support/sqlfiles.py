"""Parses SQL files for the drift checks: the header with a grammar, the statement with PostgreSQL's own parser."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from pglast import ast, parse_sql
from pglast.enums import A_Expr_Kind, BoolExprType, JoinType, NullTestType, SetOperation, SubLinkType
from pglast.parser import scan

from chatdb._core.query import statement_files

HEADER = re.compile(
    r"-- (?P<name>\w+)\n"
    r"(?P<prose>(?:-- \S.*\n)+)"
    r"--\n"
    r"(?:(?P<parameters>(?:-- \$.*\n)+)--\n)?"
    r"-- returns (?P<number>one|many) (?P<record>\w+)(?:(?P<joint> and |, then many )(?P<second>\w+))?"
    r"(?: without (?P<given>\w+(?:(?:, | and )\w+)*))?"
    r"(?:, (?P<relation>or|then) an existence row(?:: (?P<existence>\S.*))?)?\n"
    r"(?:-- refuses with (?P<refusals>\w+(?:, \w+)*)\n)?"
    r"(?:-- served by (?P<indexes>\w+(?:,(?: |\n-- )\w+)*)\n)?"
    r"\n"
    r"(?P<body>[^\n][\s\S]*\S)\n"
)
PARAMETER = re.compile(
    r"-- \$(?P<number>\d+) (?P<name>\w+) (?P<type>\w+(?:\[\])?)(?P<null> null)?(?: {4}(?P<remark>\S.*))?"
)
ALWAYS = "always"
"""The existence row of a header that names no condition for it."""
NEVER_NULL = {"count", "row_number", "concat_ws"}  # concat_ws with a separator that is not null
STRICT = {"char_length", "substr"}
"""Functions that return null only for a null."""
HARMLESS = {
    *("array_agg", "cardinality", "char_length", "chr", "clock_timestamp", "coalesce", "concat", "convert_to"),
    *(
        "concat_ws",
        "count",
        "current_setting",
        "encode",
        "format_type",
        "getdatabaseencoding",
        "jsonb_build_object",
        "jsonb_extract_path_text",
        "left",
    ),
    *(
        "lower",
        "max",
        "min",
        "numnode",
        "octet_length",
        "pg_column_compression",
        "pg_column_size",
        "pg_get_constraintdef",
        "pg_get_expr",
    ),
    *("pg_get_indexdef", "quote_ident", "repeat", "replace", "row_number"),
    *("row_security_active", "sha256", "statement_timestamp", "string_agg", "strpos", "substr", "sum", "timezone"),
    *("to_regclass", "to_tsvector", "translate", "unnest", "websearch_to_tsquery"),
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
    second: str | None
    """The record of a joined row's last columns or, if `has_own_rows`, of the rows after the first one."""
    has_own_rows: bool
    given: tuple[str, ...]
    """The fields of the last record that the rows omit."""
    relation: str | None
    existence: str | None
    refusals: tuple[str, ...]
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
        second=header["second"],
        has_own_rows=(header["joint"] or "").startswith(","),
        given=tuple(re.split(", | and ", header["given"])) if header["given"] else (),
        relation=header["relation"],
        existence=header["existence"] or (ALWAYS if header["relation"] else None),
        refusals=tuple((header["refusals"] or "").split(", ")) if header["refusals"] else (),
        indexes=frozenset(re.findall(r"\w+", header["indexes"] or "")),
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


def records(file: SqlFile) -> list[Any]:
    """Return the branches of a statement that return records."""
    return [query for query in branches(file.statement) if not is_blank(file, query)]


def columns_of(file: SqlFile, query: Any) -> list[Any]:
    """Return the values of a branch's result columns, without the refusal."""
    return [output.val for output in outputs(query)][: -1 if file.refusals else None]


def is_blank(file: SqlFile, query: Any) -> bool:
    """Return whether a branch returns no record: its id is null, its counts are 0, or it refuses with a length."""
    values = [uncast(value) for value in columns_of(file, query)]
    if file.has_own_rows:
        return False
    if file.record == "MessageLength" and None not in refusals_of(file, query):
        return True
    return _is_null(values[0]) or all(isinstance(value, ast.A_Const) and not value.isnull for value in values)


def _is_null(value: Any) -> bool:
    return isinstance(value, ast.A_Const) and bool(value.isnull)


def refusals_of(file: SqlFile, query: Any) -> set[str | None]:
    """Return the words that a branch can have in its last column, with None if it can be null."""
    if not file.refusals:
        return {None}
    return _words(outputs(query)[-1].val)


def _words(value: Any) -> set[str | None]:
    match value:
        case None | ast.A_Const(isnull=True):
            return {None}
        case ast.A_Const(val=ast.String() as text):
            return {text.sval}
        case ast.CaseExpr():
            return {word for part in (*[each.result for each in value.args], value.defresult) for word in _words(part)}
        case _:
            raise AssertionError("a refusal that is no word")


def refusal_gaps(file: SqlFile) -> list[str]:
    """Return where a statement's refusals differ from the header."""
    if not file.refusals:
        named = [output for query in branches(file.statement) for output in outputs(query) if output.name == "refusal"]
        return ["a refusal that the header does not tell of"] if named else []
    gaps: list[str] = []
    words: set[str | None] = set()
    for number, query in enumerate(branches(file.statement)):
        if number == 0 and outputs(query)[-1].name != "refusal":
            gaps.append("the last column is not the refusal")
        found = refusals_of(file, query)
        if is_blank(file, query):
            words |= found
        elif found != {None}:
            gaps.append("a record with a refusal")
    if words - {None} != {*file.refusals}:
        gaps.append(f"refuses with {words - {None}}")
    return gaps


def existence_gaps(file: SqlFile) -> list[str]:
    """
    Return what could add an existence row or a refusal against the header, or omit it.

    In a statement that only reads, an existence row comes last, under a limit that the records alone can reach. The
    records then have the same limit, which also keeps the server from reading both branches in parallel. A statement
    that writes is never run in parallel: there, a row without a record excludes the records and all other such rows.
    """
    queries = branches(file.statement)
    blanks = [query for query in queries if is_blank(file, query)]
    has_existence = any(None in refusals_of(file, query) for query in blanks)
    if has_existence != bool(file.existence):
        return ["an existence row that the header does not tell of, or tells of in vain"]
    top = file.statement
    if file.has_own_rows:
        is_plain = top.op == SetOperation.SETOP_UNION and top.all and len(queries) == 2
        is_plain = is_plain and not (top.sortClause or top.limitCount or top.limitOffset)
        is_plain = is_plain and _is_one(queries[0].limitCount) and isinstance(queries[1].limitCount, ast.ParamRef)
        return [] if is_plain and _is_unique(file, queries[0]) else ["not one record and, after it, many others"]
    if file.number == "one" and not _writes(file) and not _is_unique(file, queries[0]):
        return ["several records"]
    if not blanks:
        return []
    if top.op != SetOperation.SETOP_UNION or not top.all or top.sortClause or top.limitOffset:
        return ["not a UNION ALL in the order of its branches"]
    if queries[-len(blanks) :] != blanks or len(blanks) == len(queries):
        return ["a record after a row that is none"]
    gaps = [gap for query in blanks for gap in _blank_gaps(file, query)]
    if file.existence == ALWAYS:
        return gaps + _always_gaps(file, top, blanks)
    if not _writes(file) and (top.limitCount or file.number == "many"):
        return gaps + _limit_gaps(file, top, *queries)
    if top.limitCount or file.relation == "then":
        return [*gaps, "a limit, or an existence row that stands beside records"]
    pairs = [(blank, other) for blank in blanks for other in queries if other is not blank]
    gaps += ["a row that may stand beside another" for pair in pairs if not _excludes(file, *pair)]
    return gaps


def _writes(file: SqlFile) -> bool:
    return any(isinstance(node, ast.InsertStmt | ast.UpdateStmt | ast.DeleteStmt) for node in file.nodes)


def _blank_gaps(file: SqlFile, query: Any) -> list[str]:
    """Return what makes a row without a record more than one row, or more than its nulls."""
    gaps = [] if _is_single(file, query) else ["several rows that are no records"]
    first, *others = map(uncast, columns_of(file, query))
    values = [value for value in others if not _is_null(value)]
    if _is_null(first) and values:  # see HistoryQuery
        by = {"before_key", "after_key", "top_seq"} & {parameter.name for parameter in file.parameters}
        places = [others.index(value) for value in values]
        match values:
            case [ast.ColumnRef() as identifier] if not by and places == [0]:
                is_known = names(identifier)[-1] == "id"
            case [ast.ColumnRef() as identifier, ast.SubLink(subselect=ast.SelectStmt() as sub)] if places == [0, 7]:
                keys = [_text_of(output.val) for output in outputs(sub)]
                is_known = keys == ["" if by == {"top_seq"} else "key"] and bool(by) and _is_single(file, sub)
                is_known = is_known and names(identifier)[-1] == "id"
            case _:
                is_known = False
        gaps += [] if is_known else ["an existence row with other values"]
    return gaps


def _text_of(value: Any) -> str | None:
    """Return the name of a column, or a constant text."""
    match value:
        case ast.ColumnRef():
            return names(value)[-1]
        case ast.A_Const(val=ast.String() as text):
            return str(text.sval)
        case _:
            return None


def _always_gaps(file: SqlFile, top: Any, blanks: list[Any]) -> list[str]:
    """Return what lets an existence row be missing, or come before a record."""
    is_plain = not top.limitCount and len(blanks) == 1 and not _writes(file)
    (blank,) = blanks[:1]
    sources = Level(blank).sources
    is_of_cte = len(sources) == 1 and isinstance(sources[0].node, ast.RangeVar) and not is_table(sources[0].node)
    if not (is_plain and is_of_cte and blank.whereClause is None and not blank.limitCount):
        return ["an existence row that may be missing"]
    conversation, *others = Level(file.ctes[sources[0].node.relname]).sources
    columns = [names(part.lexpr)[-1] for part in conversation.conditions if _is_operator(part, "=")]
    is_all = len(columns) == len(conversation.conditions) and sorted(columns) == ["id", "user_id"] and not others
    return [] if is_all else ["an existence row that depends on more than the conversation"]


UNIQUE = {
    "conversations": [{"id"}, {"key"}],
    "messages": [{"conversation_id", "seq"}, {"conversation_id", "key"}],
    "message_parts": [{"conversation_id", "seq", "start"}],
}
"""The columns that, with the user, identify a row of each table."""


def _is_single(file: SqlFile, query: Any) -> bool:
    """Return whether a query returns at most one row."""
    if isinstance(query, ast.SelectStmt) and query.op != SetOperation.SETOP_NONE:
        parts = branches(query)
        pairs = [(one, other) for number, one in enumerate(parts) for other in parts[:number]]
        return all(_is_single(file, part) for part in parts) and all(_excludes(file, *pair) for pair in pairs)
    if isinstance(query, ast.InsertStmt):
        return _is_single(file, query.selectStmt)
    return (isinstance(query, ast.SelectStmt) and _is_one(query.limitCount)) or _is_unique(file, query)


def _is_unique(file: SqlFile, query: Any) -> bool:
    """Return whether the conditions of a query select at most one row."""
    return all(_is_single_source(file, source) for source in Level(query).sources)


def _is_one(count: Any) -> bool:
    return isinstance(count, ast.A_Const) and count.val.ival == 1


def _is_single_source(file: SqlFile, source: Source) -> bool:
    if isinstance(source.node, ast.RangeSubselect):
        return _is_single(file, source.node.subquery)
    if not isinstance(source.node, ast.RangeVar):
        return False
    if not is_table(source.node):
        query = file.ctes[source.node.relname]
        read = {node.relname for node in _walk(query) if isinstance(node, ast.RangeVar)}
        return source.node.relname not in read and _is_single(file, query)
    equal = {
        names(part.lexpr)[-1]
        for part in source.conditions
        if _is_operator(part, "=") and isinstance(part.lexpr, ast.ColumnRef)
        if len(names(part.lexpr)) == 1 or names(part.lexpr)[0] == source.alias
    }
    return "user_id" in equal and any(columns <= equal for columns in UNIQUE[source.node.relname])


def _is_operator(node: Any, *operators: str) -> bool:
    return isinstance(node, ast.A_Expr) and node.kind == A_Expr_Kind.AEXPR_OP and names(node)[0] in operators


def _limit_gaps(file: SqlFile, top: Any, *queries: Any) -> list[str]:
    """Return what lets an existence row replace a record, or come before one."""
    if len(queries) != 2:
        return ["not one UNION ALL of the records and, at the end, the existence row"]
    rows, existence = queries
    is_guarded = existence.whereClause is not None or not any(map(is_table, existence.fromClause or ()))
    count = top.limitCount
    if _is_operator(count, "+") and isinstance(count.rexpr, ast.CaseExpr):
        # one more row for a caller who needs the id: an existence row, because the records have a limit of their own
        case = count.rexpr
        results = [case.args[0].result.val.ival, case.defresult.val.ival]
        is_by_key = isinstance(case.args[0].expr, ast.NullTest) and len(case.args) == 1 and results == [1, 0]
        count = count.lexpr if is_by_key and "user_id" in file.given else None
    # the statement's own limit also bounds records that are read in order without a sort
    is_bounded = count is top.limitCount and not rows.sortClause
    limit = rows.limitCount or (count if is_bounded else None)
    if existence.limitCount or not is_guarded or count is None or count != limit:
        return ["a limit that is not that of the records"]
    is_parameter = isinstance(count, ast.ParamRef)
    if (file.number, file.relation) not in [("one", "or")] * _is_one(count) + [("many", "then")] * is_parameter:
        return ["a limit that the header does not tell of"]
    return []


def _excludes(file: SqlFile, one: Any, other: Any) -> bool:
    """Return whether two branches never return rows together: a row of one implies that the other has none."""
    for present, absent in ((one, other), (other, one)):
        sources = [source.node for source in Level(present).sources]
        full = {node.relname for node in sources if isinstance(node, ast.RangeVar)}
        if all(_Facts(file, case, full, sources).is_empty(absent) for case in _cases(present.whereClause)):
            return True
    return False


def _cases(condition: Any) -> list[list[Any]]:
    """Return the lists of conditions of which one holds if the condition holds."""
    cases: list[list[Any]] = [[]]
    for part in _conjuncts(condition):
        is_or = isinstance(part, ast.BoolExpr) and part.boolop == BoolExprType.OR_EXPR
        choices = [case for argument in part.args for case in _cases(argument)] if is_or else [[part]]
        cases = [[*case, *choice] for case in cases for choice in choices]
    return cases


class _Facts:
    """What is known about the CTEs and parameters of a statement where some conditions hold."""

    def __init__(self, file: SqlFile, conditions: list[Any], full: set[str], sources: list[Any]) -> None:
        self.file = file
        self.rows = (sources[0].relname, [*conditions]) if len(sources) == 1 and full else ("", [])
        """The only relation of a branch, and the conditions for which it has a row."""
        # a CTE that has rows: so its own conditions hold
        having = [node.relname for part in conditions if _is_exists(part) for node in part.subselect.fromClause]
        having = [name for name in having if name in file.ctes]
        conditions = [*conditions, *(part for name in having for part in _conjuncts(file.ctes[name].whereClause))]
        self.conditions = conditions
        self.seen: list[str] = []
        self.full = {*full, *having}
        self.empty = {name for part in conditions if (name := _without(part))}
        self.arrays = {
            part.lexpr.args[0].arg.number
            for part in conditions
            if _is_operator(part, "=") and isinstance(part.lexpr, ast.FuncCall) and part.rexpr.val.ival == 0
        }

    def is_empty(self, query: Any) -> bool:
        """Return whether a query returns no rows."""
        if query is None:
            return False
        if isinstance(query, ast.InsertStmt):
            return self.is_empty(query.selectStmt)
        if isinstance(query, ast.SelectStmt) and query.op != SetOperation.SETOP_NONE:
            return all(map(self.is_empty, branches(query)))
        if any(map(self._is_false, _conjuncts(getattr(query, "whereClause", None)))):
            return True
        return any(not source.outer and self._has_no_rows(source.node) for source in Level(query).sources)

    def _has_no_rows(self, node: Any) -> bool:
        match node:
            case ast.RangeSubselect():
                return self.is_empty(node.subquery)
            case ast.RangeFunction():
                arguments = [uncast(argument) for argument in node.functions[0][0].args]
                return any(isinstance(one, ast.ParamRef) and one.number in self.arrays for one in arguments)
            case _ if is_table(node):
                return False
            case _ if node.relname in self.seen:  # a recursive CTE, which has rows only if its first part has
                return True
            case _:
                self.seen.append(node.relname)
                is_empty = node.relname in self.empty or self.is_empty(self.file.ctes[node.relname])
                self.seen.remove(node.relname)
                return is_empty

    def _is_false(self, condition: Any) -> bool:
        match condition:
            case ast.BoolExpr(boolop=BoolExprType.OR_EXPR):
                return all(map(self._is_false, condition.args))
            case ast.SubLink() if _is_exists(condition):
                return self.is_empty(condition.subselect)
            case ast.BoolExpr(boolop=BoolExprType.NOT_EXPR) if _without(condition) in self.full:
                return True
            case ast.BoolExpr(boolop=BoolExprType.NOT_EXPR, args=[ast.SubLink() as sub]) if _is_exists(sub):
                relation, known = self.rows
                needed = _conjuncts(sub.subselect.whereClause)
                (source,) = sub.subselect.fromClause
                return source.relname == relation and all(part in known for part in needed)
            case ast.BoolExpr(boolop=BoolExprType.NOT_EXPR):
                return condition.args[0] in self.conditions
            case ast.NullTest(nulltesttype=NullTestType.IS_NULL):
                return any(_is_operator(part, "=") and part.rexpr == uncast(condition.arg) for part in self.conditions)
            case ast.A_Expr(rexpr=ast.SubLink(subselect=ast.SelectStmt(targetList=[output]) as sub)) if (
                _is_operator(condition, "=") and isinstance(output.val, ast.ColumnRef) and self.is_empty(sub)
            ):
                return True  # null
            case _:
                return any(_is_opposite(part, condition) for part in self.conditions)


def _is_exists(condition: Any) -> bool:
    return isinstance(condition, ast.SubLink) and condition.subLinkType == SubLinkType.EXISTS_SUBLINK


def _without(condition: Any) -> str | None:
    """Return the CTE that a condition `not exists (select from ...)` requires to be empty."""
    match condition:
        case ast.BoolExpr(
            boolop=BoolExprType.NOT_EXPR, args=[ast.SubLink(subLinkType=SubLinkType.EXISTS_SUBLINK) as sub]
        ) if not sub.subselect.whereClause and len(sub.subselect.fromClause) == 1:
            name: str = sub.subselect.fromClause[0].relname
            return name
    return None


def _is_opposite(one: Any, other: Any) -> bool:
    """Return whether two conditions cannot both hold."""
    if isinstance(one, ast.BoolExpr) and one.boolop == BoolExprType.NOT_EXPR:
        return bool(one.args[0] == other)
    is_pair = _is_operator(one, "=", "<>") and _is_operator(other, "=", "<>")
    return is_pair and names(one) != names(other) and [one.lexpr, one.rexpr] == [other.lexpr, other.rexpr]


def ungiven(file: SqlFile) -> list[str]:
    """Return the fields omitted from the rows that the statement neither stores from nor compares with arguments."""
    gaps: list[str] = []
    for query in records(file)[-1:] if file.has_own_rows else records(file):
        gaps += [name for name in file.given if not _is_given(file, query, name)]
    return gaps


def _is_given(file: SqlFile, query: Any, name: str, *, is_new: bool = False, outer: list[Source] | None = None) -> bool:
    """
    Return whether a field of a query's rows has the value of the parameter of its name.

    `is_new` tells that the rows have just been inserted, so that ON CONFLICT did not apply. `outer` has the sources
    beside a lateral subquery.
    """
    if isinstance(query, ast.SelectStmt) and query.op != SetOperation.SETOP_NONE:
        return all(_is_given(file, branch, name, is_new=is_new) for branch in branches(query))
    if isinstance(query, ast.InsertStmt):
        return _is_stored(file, query, name, is_new=is_new)
    level = Level(query)
    [source] = [level.source_of(uncast(output.val)) for output in outputs(query) if _name(output) == "id"]
    if name == "user_id" and is_table(source.node):
        return _is_guarded(source, level)
    level.sources += outer or []
    for condition in source.conditions:
        parts = condition.args if _is_or(condition) else [condition]
        fresh = [part for part in parts if _is_fresh(part)]
        if all(_compares(file, part, level, name) for part in parts if part not in fresh) and (
            not fresh or _is_sources(file, source, level, name, is_new=True)
        ):
            return True
    return not is_table(source.node) and _is_sources(file, source, level, name, is_new=is_new)


def _is_or(condition: Any) -> bool:
    return isinstance(condition, ast.BoolExpr) and condition.boolop == BoolExprType.OR_EXPR


def _is_fresh(condition: Any) -> bool:
    """Return whether a condition selects messages after the last one that was stored before."""
    match condition:
        case ast.A_Expr(lexpr=ast.ColumnRef() as column, rexpr=ast.SubLink() as sub) if _is_operator(condition, ">"):
            return [names(column)[-1], *map(_name, outputs(sub.subselect))] == ["seq", "last_seq"]
    return False


def _is_sources(file: SqlFile, source: Source, level: Level, name: str, *, is_new: bool) -> bool:
    query = getattr(source.node, "subquery", None) or file.ctes[source.node.relname]
    outer = [other for other in level.sources if other is not source] if getattr(source.node, "lateral", False) else []
    return _is_given(file, query, name, is_new=is_new, outer=outer)


def _is_stored(file: SqlFile, query: ast.InsertStmt, name: str, *, is_new: bool) -> bool:
    columns = [column.name for column in query.cols]
    conflict = query.onConflictClause
    if name not in columns:  # null in the row, and without a parameter null in the message
        return not any(parameter.name in {name, f"{name}s"} for parameter in file.parameters)
    if name == "user_id":
        return not _insertion_gaps(query, file)
    if conflict and conflict.targetList and not is_new:
        replaced = [target for target in conflict.targetList if target.name == name]
        is_equal = name in [part.name for part in conflict.infer.indexElems]
        if not is_equal and (not replaced or names(replaced[0].val) != ["excluded", name]):
            return False
    first, *second = branches(query.selectStmt)
    for branch, parameter in [(first, name), *((each, f"second_{name}") for each in second)]:
        values = dict(zip(columns, [output.val for output in branch.targetList], strict=True))
        if not _is_argument(file, values[name], Level(branch), parameter):
            return False
        if file.number == "many" and not _is_in_order(values["seq"], later=len(second) * (branch is first)):
            return False
    return True


def _is_in_order(seq: Any, *, later: int) -> bool:
    """Return whether the seqs of a batch have the order of its arrays, or of the branches, of which some come later."""
    match seq:
        case ast.A_Expr(lexpr=ast.ColumnRef() as counter, rexpr=ast.A_Const(val=ast.Integer(ival=count))):
            return _is_operator(seq, "-") and names(counter)[-1] == "last_seq" and count == later > 0
        case ast.A_Expr(rexpr=ast.ColumnRef() as place):
            return _is_operator(seq, "+") and names(place)[-1] in {"ordinality", "place"}
    return isinstance(seq, ast.ColumnRef) and names(seq)[-1] == "last_seq" and not later


def _is_argument(file: SqlFile, value: Any, level: Level, name: str, *, seen: tuple[str, ...] | None = None) -> bool:
    """
    Return whether a value is the parameter with a field's name, or an element of the array with its plural.

    With `seen`, the recursive CTEs that led here, it may also be the column of a table that is equal to the parameter.
    """
    bare = _bare(value)
    if isinstance(bare, ast.ParamRef):
        return file.parameters[bare.number - 1].name in {name, f"{name}s"}
    if not isinstance(bare, ast.ColumnRef):
        return False
    *qualifier, column = names(bare)
    for source in level.sources:
        if qualifier and source.alias != qualifier[-1]:
            continue
        if isinstance(source.node, ast.RangeFunction):
            places = [part.sval for part in source.node.alias.colnames]
            arguments = source.node.functions[0][0].args
            place = places.index(column) if column in places else len(arguments)
            return place < len(arguments) and _is_argument(file, arguments[place], level, name)
        if is_table(source.node):
            if seen is not None and any(_is_parameter(file, part, column, name) for part in source.conditions):
                return True
            continue
        relation = f"{getattr(source.node, 'relname', '')}.{column}"
        if seen is not None and relation in seen:
            return True
        query = getattr(source.node, "subquery", None) or file.ctes.get(getattr(source.node, "relname", None))
        if isinstance(query, ast.SelectStmt):
            inner = [(one, out) for one in named_branches(query) for out in outputs(one) if _name(out) == column]
            if inner:
                path = None if seen is None else (*seen, relation)
                return all(_is_argument(file, output.val, Level(one), name, seen=path) for one, output in inner)
    return False


def _is_parameter(file: SqlFile, condition: Any, column: str, name: str) -> bool:
    """Return whether a condition sets a column equal to the parameter of this name."""
    if not _is_operator(condition, "=") or not isinstance(condition.lexpr, ast.ColumnRef):
        return False
    value = _bare(condition.rexpr)
    is_sent = isinstance(value, ast.ParamRef) and file.parameters[value.number - 1].name == name
    return is_sent and names(condition.lexpr)[-1] == column


def _compares(file: SqlFile, condition: Any, level: Level, name: str) -> bool:
    """Return whether a condition holds only if the column of this name is equal to its parameter."""
    match condition:
        case ast.SubLink(subLinkType=SubLinkType.EXISTS_SUBLINK):
            inner = Level(condition.subselect)
            inner.sources += level.sources
            return any(_compares(file, part, inner, name) for part in _conjuncts(condition.subselect.whereClause))
        case ast.BoolExpr(boolop=BoolExprType.AND_EXPR):
            return any(_compares(file, part, level, name) for part in condition.args)
        case ast.A_Expr(kind=A_Expr_Kind.AEXPR_NOT_DISTINCT) | ast.A_Expr(kind=A_Expr_Kind.AEXPR_OP):
            if names(condition) != ["="]:
                return False
            pairs = [(condition.lexpr, condition.rexpr), (condition.rexpr, condition.lexpr)]
            return any(
                isinstance(uncast(one), ast.ColumnRef)
                and names(uncast(one))[-1] == name
                and not _is_argument(file, one, level, name)
                and _is_argument(file, other, level, name, seen=())
                for one, other in pairs
            )
    return False


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
    """One SELECT, UPDATE or DELETE without its subqueries; `inner` takes every outer join for an inner one."""

    def __init__(self, query: Any, *, inner: bool = False) -> None:
        self.inner = inner
        self.is_grouped = bool(getattr(query, "groupClause", None))
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
        is_left = item.jointype == JoinType.JOIN_LEFT and not self.inner
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
                gaps += _insertion_gaps(query, file)
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
    if _is_of_pairs(source, level):
        return True
    for condition in source.conditions:
        if isinstance(condition, ast.A_Expr) and condition.kind == A_Expr_Kind.AEXPR_OP and names(condition) == ["="]:
            for one, other in ((condition.lexpr, condition.rexpr), (condition.rexpr, condition.lexpr)):
                if isinstance(one, ast.ColumnRef) and names(one) in own and _is_user(other):
                    return True
    return False


def _is_of_pairs(source: Source, level: Level) -> bool:
    """Return whether the user and the id of each row are a pair of the arrays that the caller gives as $1 and $2."""
    arrays = [other for other in level.sources if isinstance(other.node, ast.RangeFunction)]
    if len(arrays) != 1 or source.node.relname != "conversations":
        return False
    [array] = arrays
    arguments = [uncast(argument) for argument in array.node.functions[0][0].args]
    if [each.number for each in arguments[:2] if isinstance(each, ast.ParamRef)] != [1, 2]:
        return False
    pairs = zip(("user_id", "id"), [column.sval for column in array.node.alias.colnames], strict=False)
    needed = [[[source.alias, column], [array.alias, value]] for column, value in pairs]
    found = [
        [names(part.lexpr), names(part.rexpr)]
        for part in source.conditions
        if _is_operator(part, "=") and isinstance(part.lexpr, ast.ColumnRef) and isinstance(part.rexpr, ast.ColumnRef)
    ]
    return all(pair in found for pair in needed)


def _is_user(node: Any) -> bool:
    return isinstance(node, ast.ParamRef) and node.number == 1


def _insertion_gaps(query: ast.InsertStmt, file: SqlFile) -> list[str]:
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
        if not all(_is_user(value) or _is_users(value, branch, file) for value in values):
            gaps.append(f"{query.relation.relname} gets a row whose user_id is not known to be $1")
    return gaps


def _is_users(value: Any, branch: Any, file: SqlFile) -> bool:
    """Return whether a value is the user_id of guarded rows, through any number of CTEs and subqueries."""
    if not isinstance(value, ast.ColumnRef):
        return False
    level = Level(branch)
    source = level.source_of(value)
    if is_table(source.node):  # INSERT: see _insertion_gaps
        is_safe = isinstance(branch, ast.InsertStmt) or _is_guarded(source, level)
        return names(value)[-1] == "user_id" and is_safe
    query = getattr(source.node, "subquery", None) or file.ctes.get(getattr(source.node, "relname", None))
    if query is None:
        return False
    return all(
        any(_name(output) == names(value)[-1] and _is_users(output.val, inner, file) for output in outputs(inner))
        for inner in named_branches(query)
    )


def named_branches(query: Any) -> list[Any]:
    """Return the branches of a UNION, each with the column names of the first."""
    first, *others = branches(query)
    for other in others:
        for output, pattern in zip(outputs(other), outputs(first), strict=True):
            if _name(output) != _name(pattern):
                output.name = _name(pattern)
    return [first, *others]


def _name(output: ast.ResTarget) -> str | None:
    """Return the name of a result column."""
    value = uncast(output.val)
    return output.name or (names(value)[-1] if isinstance(value, ast.ColumnRef) else None)


def nullable(file: SqlFile, columns: Columns) -> list[bool]:
    """
    Return for each result column whether it may be null, rows without a record and the refusal aside.

    For the columns of a second record: whether it may be null where that record is there.
    """
    rows = records(file)
    first = [output for output in outputs(rows[0]) if not (output.name or "").startswith("message_")]
    size = len(columns_of(file, rows[0]))
    own = range(len(first) if file.second else size)
    found: list[bool] = []
    for place in range(size):
        parts = [rows[place not in own]] if file.has_own_rows else rows
        found.append(
            any(
                _may_be_null(columns_of(file, query)[place], Level(query, inner=place not in own), file, columns)
                for query in parts
            )
        )
    return found


def _may_be_null(value: Any, level: Level, file: SqlFile, columns: Columns, seen: tuple[str, ...] = ()) -> bool:
    match value:
        case ast.A_Const():
            return bool(value.isnull)
        case ast.TypeCast():
            return _may_be_null(value.arg, level, file, columns, seen)
        case ast.CaseExpr() if _is_text_so_far(value):
            return _may_be_null(value.defresult, level, file, columns, seen)
        case ast.CaseExpr():
            return not _is_head(value)
        case ast.CoalesceExpr():
            return all(_may_be_null(argument, level, file, columns, seen) for argument in value.args)
        case ast.A_Expr(kind=A_Expr_Kind.AEXPR_OP):
            return any(_may_be_null(side, level, file, columns, seen) for side in (value.lexpr, value.rexpr))
        case ast.MinMaxExpr():
            return all(_may_be_null(argument, level, file, columns, seen) for argument in value.args)
        case ast.FuncCall():
            name = value.funcname[-1].sval
            if name in STRICT:
                return any(_may_be_null(argument, level, file, columns, seen) for argument in value.args)
            return name not in NEVER_NULL and not (name == "array_agg" and level.is_grouped)
        case ast.SubLink():  # a count alone always returns one row
            (output,) = outputs(value.subselect)
            is_count = isinstance(output.val, ast.FuncCall) and output.val.funcname[-1].sval == "count"
            return not (is_count or _is_of_streaming(value, level, file))
        case ast.ColumnRef():
            return _column_may_be_null(value, level, file, columns, seen)
        case _:
            return True


def _is_head(case: ast.CaseExpr) -> bool:
    """Return whether an expression is the head: every write that sets head_last_seq also sets head_seq."""
    match case:
        case ast.CaseExpr(
            args=[ast.CaseWhen(expr=ast.A_Expr(lexpr=ast.ColumnRef() as of, rexpr=ast.ColumnRef() as last) as test)]
        ) if isinstance(case.args[0].result, ast.ColumnRef) and isinstance(case.defresult, ast.ColumnRef):
            found = [names(column) for column in (of, last, case.args[0].result, case.defresult)]
            is_one = len({tuple(name[:-1]) for name in found}) == 1 and _is_operator(test, "=")
            return is_one and [name[-1] for name in found] == ["head_last_seq", "last_seq", "head_seq", "last_seq"]
    return False


def _is_text_so_far(case: ast.CaseExpr) -> bool:
    """Return whether an expression is the text of a message, and its parts while it is streaming."""
    match case:
        case ast.CaseExpr(
            args=[ast.CaseWhen(expr=ast.A_Expr() as test, result=ast.SubLink() as parts)],
            defresult=ast.ColumnRef() as content,
        ) if _is_operator(test, "=") and isinstance(test.lexpr, ast.ColumnRef):
            is_state = names(test.lexpr)[-1] == "state" and test.rexpr.val.sval == "streaming"
            return is_state and names(content)[-1] == "content" and _is_all_parts(parts)
    return False


def _is_all_parts(sub: ast.SubLink) -> bool:
    """Return whether a subquery is the text of all parts of one message; the part with start -1 is always there."""
    level = Level(sub.subselect)
    value = _bare(outputs(sub.subselect)[0].val)
    is_text = isinstance(value, ast.FuncCall) and value.funcname[-1].sval == "string_agg"
    [source, *others] = level.sources
    is_parts = is_text and not others and is_table(source.node) and source.node.relname == "message_parts"
    is_one = all(_is_operator(part, "=") and isinstance(part.lexpr, ast.ColumnRef) for part in source.conditions)
    columns = ["conversation_id", "seq", "user_id"]
    return is_parts and is_one and sorted(names(part.lexpr)[-1] for part in source.conditions) == columns


def _is_of_streaming(sub: ast.SubLink, level: Level, file: SqlFile) -> bool:
    """Return whether a subquery is the text of the parts of a row of the streams."""
    is_stream = any(_is_stream(source) for source in level.sources)
    return is_stream and _is_all_parts(sub) and file.name == "list_streaming"


def _is_stream(source: Source) -> bool:
    """Return whether a source is the part that stands for a stream, which has all columns."""
    is_parts = is_table(source.node) and source.node.relname == "message_parts"
    equal = [part for part in source.conditions if _is_operator(part, "=") and isinstance(part.lexpr, ast.ColumnRef)]
    starts = [part.rexpr for part in equal if names(part.lexpr)[-1] == "start"]
    return is_parts and any(isinstance(each, ast.A_Const) and each.val.ival == -1 for each in starts)


def _column_may_be_null(
    column: ast.ColumnRef, level: Level, file: SqlFile, columns: Columns, seen: tuple[str, ...]
) -> bool:
    source, name = level.source_of(column), names(column)[-1]
    if source.outer:
        return True
    if isinstance(source.node, ast.RangeFunction):
        return not (source.node.ordinality and name == source.node.alias.colnames[-1].sval)
    if _is_stream(source):
        return False
    if isinstance(source.node, ast.RangeVar) and source.node.schemaname:
        return not columns[source.node.schemaname, source.node.relname][name][1]
    is_subquery = isinstance(source.node, ast.RangeSubselect)
    relation = f"{'' if is_subquery else source.node.relname}.{name}"
    if relation in seen and not is_subquery:  # a recursive CTE: null only if its first part is
        return False
    query = source.node.subquery if is_subquery else file.ctes[source.node.relname]
    return any(
        _may_be_null(output.val, Level(branch), file, columns, (*seen, relation))
        for branch in named_branches(query)
        for output in outputs(branch)
        if _name(output) == name
    )


def meetings(file: SqlFile) -> dict[int, set[str]]:
    """
    Return for each parameter the columns to which it is compared, stored or aliased.

    `last_seq + edits` is the column revision. A flag meets a condition, or the table whose new row it allows.
    """
    met: dict[int, set[str]] = defaultdict(set)

    def meet(value: Any, column: str) -> None:
        if isinstance(_bare(value), ast.ParamRef):
            met[_bare(value).number].add(column)

    for node in file.nodes:
        match node:
            case ast.A_Expr(kind=A_Expr_Kind.AEXPR_NULLIF):
                pass  # replaces a value, and names none
            case ast.A_Expr():
                left, right = (
                    [*side.args] if isinstance(side, ast.RowExpr) else [side] for side in (node.lexpr, node.rexpr)
                )
                for one, other in zip(left, right, strict=False):
                    for column, value in ((one, other), (other, one)):
                        if found := _column(column):
                            meet(value, found)
            case ast.InsertStmt():
                for branch in branches(node.selectStmt):
                    for row in branch.valuesLists or ([output.val for output in branch.targetList],):
                        for column, value in zip(node.cols, row, strict=True):
                            meet(value, column.name)
                    for part in _conjuncts(branch.whereClause):
                        meet(part, f"new {node.relation.relname}")
            case ast.UpdateStmt():
                for target in node.targetList:
                    choices = target.val.args if isinstance(target.val, ast.CaseExpr) else ()
                    for value in (target.val, *(part for choice in choices for part in (choice.expr, choice.result))):
                        meet(value, target.name)
            case ast.RangeFunction():
                for function in node.functions:
                    for column, value in zip(node.alias.colnames, function[0].args, strict=False):
                        meet(value, column.sval)
            case ast.ResTarget(name=str() as name):
                meet(node.val, name)
            case ast.SelectStmt():
                meet(node.limitCount, "row_limit")
                if isinstance(node.whereClause, ast.TypeCast):
                    meet(node.whereClause, "condition")
            case ast.BoolExpr():
                for part in node.args:
                    meet(part, "condition")
    return met


def tables_of_keys(file: SqlFile) -> dict[int, set[str]]:
    """Return for each parameter the tables with whose `key` it is compared, or in which it is stored as the key."""
    tables: dict[int, set[str]] = defaultdict(set)
    for node in file.nodes:
        if isinstance(node, ast.InsertStmt):
            for branch in branches(node.selectStmt):
                for row in branch.valuesLists or ([output.val for output in branch.targetList],):
                    for column, value in zip(node.cols, row, strict=True):
                        if column.name == "key" and isinstance(value, ast.ParamRef):
                            tables[value.number].add(node.relation.relname)
        elif isinstance(node, ast.SelectStmt | ast.UpdateStmt | ast.DeleteStmt):
            for source in Level(node).sources:
                own = [[source.alias, "key"], ["key"]]
                for part in source.conditions:
                    is_key = _is_operator(part, "=") and isinstance(part.lexpr, ast.ColumnRef)
                    if is_key and names(part.lexpr) in own and isinstance(part.rexpr, ast.ParamRef):
                        tables[part.rexpr.number].add(source.node.relname)
    return tables


def _bare(value: Any) -> Any:
    """Return a value without casts, default, the SELECT around it, its parser or lower, and the limit's extra row."""
    match uncast(value):
        case ast.CoalesceExpr(args=[first, *_]) | ast.A_Expr(kind=A_Expr_Kind.AEXPR_NULLIF, lexpr=first):
            return _bare(first)
        case ast.SubLink(subselect=ast.SelectStmt(targetList=[ast.ResTarget(val=first)], fromClause=None)):
            return _bare(first)
        case ast.A_Expr(lexpr=first, rexpr=ast.CaseExpr()):
            return _bare(first)
        case ast.A_Expr(lexpr=ast.FuncCall(), name=[ast.String(sval="-")], rexpr=interval):
            return _bare(interval)
        case ast.FuncCall(funcname=[_, ast.String(sval="websearch_to_tsquery")], args=[_, text]):
            return _bare(text)
        case ast.FuncCall(funcname=[_, ast.String(sval="lower")], args=[text]):
            return _bare(text)
        case bare:
            return bare


def _column(value: Any) -> str | None:
    """Return the column that an expression changes or tests."""
    match _bare(value):
        case ast.ColumnRef() as column:
            return names(column)[-1]
        case ast.A_Expr(lexpr=ast.ColumnRef() as one, rexpr=ast.ColumnRef() as other):
            return "revision" if [names(one)[-1], names(other)[-1]] == ["last_seq", "edits"] else None
        case ast.A_Expr(lexpr=one, name=[ast.String(sval="||" | "-")]):
            return _column(one)
        case ast.NullTest(arg=ast.ColumnRef() as column):
            return names(column)[-1]
        case _:
            return None
