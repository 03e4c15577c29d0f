"""Says of each part of the catalog whether it is as this release needs it, and by which statement it is mended."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from chatdb._core.driver_errors import LINK
from chatdb.records import SchemaPart
from chatdb.schema import NEEDED, Difference, differences, kind_of

OK, NOTE, MISSING, DIFFERENT = "ok", "note", "missing", "different"

_COLUMN = re.compile(r"(?P<type>.*?)(?P<not_null> not null)?(?: (?P<value>(?:default|generated) .*))?")


class Finding(NamedTuple):
    """A thing that was looked at: `state` is ok, note, missing or different; `remedy` is for the last two."""

    what: str
    state: str
    detail: str
    remedy: str


def catalog(parts: Sequence[SchemaPart], *, served: Mapping[str, Sequence[str]], unapplied: bool) -> list[Finding]:
    """
    Return a finding for each table, key, group of CHECKs and index, and for each part that is not as it should be.

    `served` has the statements that each index serves. What is missing while migrations are `unapplied` is theirs.
    """
    wrong = {(each.table, each.name): each for each in differences(parts)}
    there = {part.relation for part in parts}
    found: list[Finding] = []
    for table, needed in NEEDED.items():
        if table not in there:
            found.append(Finding(f"table {table}", MISSING, "is not there", _remake(unapplied=unapplied)))
            continue
        well = [name for name in needed if (table, name) not in wrong]
        columns = sum(kind_of(name) == "column" for name in well)
        checks = [name for name in well if kind_of(name) == "check"]
        found.append(Finding(f"table {table}", OK, f"{columns} columns are as they should be", ""))
        found.append(Finding(f"checks of {table}", OK, ", ".join(checks), ""))
        for name in needed:
            kind = kind_of(name)
            if (table, name) in wrong:
                found.append(_mend(wrong[table, name], unapplied=unapplied))
            elif kind == "foreign key":
                found.append(Finding(f"cascade {name}", OK, "a deleted conversation takes its messages along", ""))
            elif kind in {"primary key", "index"}:
                found.append(Finding(f"{kind} {name}", OK, f"valid; serves {', '.join(served[name])}", ""))
    return [*found, *_leftovers(parts), *_link(parts)]


def _mend(difference: Difference, *, unapplied: bool) -> Finding:
    table, name, found = difference
    kind = kind_of(name)
    what = f"column {table}.{name}" if kind == "column" else f"{kind} {name}"
    if found is None:
        remedy = "chatdb migrate" if unapplied else _add(difference)
        return Finding(what, MISSING, f"{table} lacks it: {difference.needed}", remedy)
    detail = f"is {found}, not {difference.needed}"
    if kind == "column":
        return Finding(what, DIFFERENT, detail, _alter(difference, found))
    rest = found.removeprefix(difference.needed).strip()
    if rest == "INVALID":
        return Finding(what, DIFFERENT, "is invalid, so that no statement uses it", _reindex(name))
    if rest == "NOT VALID":
        remedy = f"alter table chatdb.{table} validate constraint {name}"
        return Finding(what, DIFFERENT, "is not validated: older rows may break it", remedy)
    if rest == "DISABLED":
        remedy = "; ".join(f"alter table chatdb.{each} enable trigger all" for each in NEEDED)
        return Finding(what, DIFFERENT, "does nothing, because its triggers are disabled", remedy)
    if kind == "index":
        return Finding(what, DIFFERENT, detail, f"drop index concurrently chatdb.{name}; {_add(difference)}")
    remedy = f"alter table chatdb.{table} drop constraint {name}; {_add(difference)}"
    return Finding(what, DIFFERENT, detail, remedy)


def _add(difference: Difference) -> str:
    table, name, _ = difference
    match kind_of(name):
        case "column":
            return f"alter table chatdb.{table} add column {name} {difference.needed}"
        case "index":
            return difference.needed.replace(" INDEX ", " INDEX CONCURRENTLY ", 1)
        case "primary key":
            return f"alter table chatdb.{table} add constraint {name} {difference.needed}"
        case _:  # in two steps, the longer of which lets writers work
            return (
                f"alter table chatdb.{table} add constraint {name} {difference.needed} NOT VALID; "
                f"alter table chatdb.{table} validate constraint {name}"
            )


def _alter(difference: Difference, found: str) -> str:
    is_, needed = _parsed(found), _parsed(difference.needed)
    column = f"alter column {difference.name}"
    actions: list[str] = []
    if is_["type"] != needed["type"]:
        kind = needed["type"].partition(" collate ")[0]
        actions.append(f"{column} type {needed['type']} using {difference.name}::{kind}")
    if is_["not_null"] != needed["not_null"]:
        actions.append(f"{column} {'set' if needed['not_null'] else 'drop'} not null")
    if is_["value"] != needed["value"]:
        value = needed["value"]
        if value.startswith("generated always"):
            actions += [f"drop column {difference.name}", f"add column {difference.name} {difference.needed}"]
        elif value.startswith("generated"):
            actions.append(f"{column} add {value}")
        else:
            actions.append(f"{column} set {value}" if value else f"{column} drop default")
    return f"alter table chatdb.{difference.table} {', '.join(actions)}"


def _parsed(definition: str) -> dict[str, str]:
    found = _COLUMN.fullmatch(definition)
    return found.groupdict("") if found else {}


def _reindex(name: str) -> str:
    return f"reindex index concurrently chatdb.{name}"


def _remake(*, unapplied: bool) -> str:
    if unapplied:
        return "chatdb migrate"
    return "restore it from a backup; or, to have it empty, chatdb migrate"


def _leftovers(parts: Sequence[SchemaPart]) -> list[Finding]:
    """Return a note for each invalid index that is not chatdb's own: it costs every write and serves nothing."""
    return [
        Finding(f"index {part.name}", NOTE, "is invalid: left over by a build that failed", "chatdb migrate")
        for part in parts
        if part.definition.endswith(" INVALID") and part.name not in NEEDED.get(part.relation, ())
    ]


def _link(parts: Sequence[SchemaPart]) -> list[Finding]:
    link = next((part.definition for part in parts if (part.relation, part.name) == ("conversations", LINK)), None)
    if link is None:
        return [Finding("users", NOTE, "not linked to a table of the host's, which is optional: chatdb link-users", "")]
    users = link.partition(" REFERENCES ")[2]
    if users.endswith(" ON DELETE CASCADE"):
        detail = f"linked to {users.removesuffix(' ON DELETE CASCADE')}, whose deletion takes the conversations along"
        return [Finding("users", OK, detail, "")]
    if users.endswith(" ON DELETE CASCADE NOT VALID"):
        remedy = "chatdb link-users, with the same --table and --column"
        return [Finding("users", DIFFERENT, f"the link is not validated: {users}", remedy)]
    return [Finding("users", DIFFERENT, f"the link is another: {users}", "chatdb link-users --unlink, and link anew")]
