"""Compares the catalog with what this release needs and names the statement that fixes each difference."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from chatdb._core.driver_errors import LINK
from chatdb.admin.locality import CLEAN_UP, Leftovers, Scatter
from chatdb.admin.search_index import SEARCH_INDEX, SearchIndex
from chatdb.records import SchemaPart
from chatdb.schema import EXPECTED_SCHEMA, Difference, differences, kind_of

OK, NOTE, MISSING, DIFFERENT = "ok", "note", "missing", "different"

_COLUMN = re.compile(r"(?P<type>.*?)(?P<not_null> not null)?(?: (?P<value>(?:default|generated) .*))?")

_CASCADES = {
    "fk_messages_conversation": "deleting a conversation deletes its messages",
    "fk_message_parts_message": "deleting a message deletes the parts of its text",
}


class Finding(NamedTuple):
    """The result of one check. `state` is ok, note, missing or different; `hint` says what to do, if anything."""

    what: str
    state: str
    detail: str
    hint: str = ""


def check_schema_objects(
    parts: Sequence[SchemaPart], *, served: Mapping[str, Sequence[str]], unapplied: bool
) -> Iterator[Finding]:
    """
    Yield a finding for each table, key, group of CHECKs and index, and for each part that differs.

    `served` maps each index to its statements. While migrations are `unapplied`, they are the fix for missing parts.
    """
    wrong = {(difference.table, difference.name): difference for difference in differences(parts)}
    relations = {part.relation for part in parts}
    for table, needed in EXPECTED_SCHEMA.items():
        if table not in relations:
            hint = "chatdb migrate" if unapplied else "restore it from a backup, or create it empty: chatdb migrate"
            yield Finding(f"table {table}", MISSING, "does not exist", hint)
            continue
        correct = [name for name in needed if (table, name) not in wrong]
        columns = sum(kind_of(name) == "column" for name in correct)
        checks = [name for name in correct if kind_of(name) == "check"]
        yield Finding(f"table {table}", OK, f"{columns} columns match this release")
        if checks:
            yield Finding(f"checks of {table}", OK, ", ".join(checks))
        for name in needed:
            kind = kind_of(name)
            if (table, name) in wrong:
                yield _difference(wrong[table, name], unapplied=unapplied)
            elif kind == "foreign key":
                yield Finding(f"cascade {name}", OK, _CASCADES[name])
            elif kind in {"primary key", "index"}:
                yield Finding(f"{kind} {name}", OK, f"valid; serves {', '.join(served[name])}")
    for part in parts:  # an invalid index, even one of the host's, slows every write and serves no statement
        expected = (*EXPECTED_SCHEMA.get(part.relation, ()), SEARCH_INDEX)
        if part.definition.endswith(" INVALID") and part.name not in expected:
            detail = "is invalid: a failed build left it behind"
            yield Finding(f"index {part.name}", NOTE, detail, "chatdb migrate")
    yield _link(parts)


def check_search_index(index: SearchIndex) -> Iterator[Finding]:
    """Yield the findings on the optional index for mode "words" of `search_messages`, if it exists."""
    what = f"index {SEARCH_INDEX}"
    if index.is_building:
        yield Finding(what, NOTE, "is being built")
    elif index.exists and not index.is_valid:
        detail = "is invalid, because a build ended early: it slows every append and serves no statement"
        yield Finding(what, DIFFERENT, detail, "chatdb search-index create (or drop)")
    elif index.exists and not index.is_current:
        detail = f"is {index.definition}, so mode words does not use it"
        yield Finding(what, DIFFERENT, detail, "chatdb search-index drop, then chatdb search-index create")
    elif index.exists:
        yield Finding(what, OK, "valid; serves mode words of search_messages")
        if index.has_row_security:
            detail = "row-level security keeps PostgreSQL from using it: mode words reads all messages of the user"
            yield Finding("search", NOTE, detail)


def check_locality(scatter: Scatter | None, leftovers: Leftovers) -> Iterator[Finding]:
    """Yield the findings on how scattered messages are, unless unknown, and on what a killed pg_repack left."""
    if leftovers.is_running:
        yield Finding("repack", NOTE, "pg_repack is running")
    elif leftovers.objects:
        detail = f"a pg_repack that was killed left {', '.join(leftovers.objects)}, and every write pays for it"
        yield Finding("repack", DIFFERENT, detail, f"as a superuser: {CLEAN_UP}")
    if scatter is None or not scatter.conversations:
        return
    if scatter.is_scattered and scatter.exceeds_buffers:
        detail = f"{scatter}: reads that are not cached take longer"
        yield Finding("locality", NOTE, detail, "chatdb repack, while few users write")
    else:
        yield Finding("locality", OK, str(scatter))


def _difference(difference: Difference, *, unapplied: bool) -> Finding:
    table, name, current = difference
    kind = kind_of(name)
    what = f"column {table}.{name}" if kind == "column" else f"{kind} {name}"
    if current is None:
        hint = "chatdb migrate" if unapplied else _add(difference)
        return Finding(what, MISSING, f"missing from {table}: {difference.needed}", hint)
    detail = f"is {current}, not {difference.needed}"
    if kind == "column":
        return Finding(what, DIFFERENT, detail, _alter(difference, current))
    rest = current.removeprefix(difference.needed).strip()
    if rest == "INVALID":
        hint = f"reindex index concurrently chatdb.{name}"
        return Finding(what, DIFFERENT, "is invalid, so no statement uses it", hint)
    if rest == "NOT VALID":
        hint = f"alter table chatdb.{table} validate constraint {name}"
        return Finding(what, DIFFERENT, "is not validated: older rows may violate it", hint)
    if rest == "DISABLED":
        hint = "; ".join(f"alter table chatdb.{name} enable trigger all" for name in EXPECTED_SCHEMA)
        return Finding(what, DIFFERENT, "has no effect, because its triggers are disabled", hint)
    if kind == "index":
        return Finding(what, DIFFERENT, detail, f"drop index concurrently chatdb.{name}; {_add(difference)}")
    return Finding(what, DIFFERENT, detail, f"alter table chatdb.{table} drop constraint {name}; {_add(difference)}")


def _add(difference: Difference) -> str:
    table, name, _ = difference
    match kind_of(name):
        case "column":
            return f"alter table chatdb.{table} add column {name} {difference.needed}"
        case "index":
            return difference.needed.replace(" INDEX ", " INDEX CONCURRENTLY ", 1)
        case "primary key":
            return f"alter table chatdb.{table} add constraint {name} {difference.needed}"
        case _:  # in two steps, because the long one then does not block writers
            return (
                f"alter table chatdb.{table} add constraint {name} {difference.needed} NOT VALID; "
                f"alter table chatdb.{table} validate constraint {name}"
            )


def _alter(difference: Difference, current: str) -> str:
    is_now, needed = _parsed(current), _parsed(difference.needed)
    column = f"alter column {difference.name}"
    actions: list[str] = []
    if is_now["type"] != needed["type"]:
        kind = needed["type"].partition(" collate ")[0]
        actions.append(f"{column} type {needed['type']} using {difference.name}::{kind}")
    if is_now["not_null"] != needed["not_null"]:
        actions.append(f"{column} {'set' if needed['not_null'] else 'drop'} not null")
    if is_now["value"] != needed["value"]:
        value = needed["value"]
        if value.startswith("generated always"):
            actions += [f"drop column {difference.name}", f"add column {difference.name} {difference.needed}"]
        elif value.startswith("generated"):
            actions.append(f"{column} add {value}")
        else:
            actions.append(f"{column} set {value}" if value else f"{column} drop default")
    return f"alter table chatdb.{difference.table} {', '.join(actions)}"


def _parsed(definition: str) -> dict[str, str]:
    match = _COLUMN.fullmatch(definition)
    return match.groupdict("") if match else {}


def _link(parts: Sequence[SchemaPart]) -> Finding:
    link = next((part.definition for part in parts if (part.relation, part.name) == ("conversations", LINK)), None)
    if link is None:
        return Finding("users", NOTE, "not linked to the host's users (optional): chatdb link-users")
    users = link.partition(" REFERENCES ")[2]
    if users.endswith(" ON DELETE CASCADE"):
        detail = f"linked to {users.removesuffix(' ON DELETE CASCADE')}: deleting a user deletes their conversations"
        return Finding("users", OK, detail)
    if users.endswith(" ON DELETE CASCADE NOT VALID"):
        hint = "run chatdb link-users with the same --table and --column"
        return Finding("users", DIFFERENT, f"the link is not validated: {users}", hint)
    return Finding("users", DIFFERENT, f"unexpected link: {users}", "chatdb link-users --unlink, then link again")
