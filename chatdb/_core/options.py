"""Types of the pool's options, and the checks that run before an option reaches the driver."""

from __future__ import annotations

import os
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final, Literal, TypedDict, cast

import asyncpg

from chatdb._core.dsn import ATTRIBUTES, SSLMODES, AnyDsn, dsn_to_str
from chatdb._core.handles import Connection
from chatdb._core.validate import MAX_INT, number_of, type_name
from chatdb.errors import ConfigurationError

MIN_LIFETIME: Final = 0.05
"""Minimum of `max_inactive_connection_lifetime`, in seconds: the pool checks eight times within it."""

_MOST_CONNECTIONS: Final = 262_143
"""Upper limit of the server's `max_connections`."""

Hook = Callable[[Connection], Awaitable[None]]
"""A coroutine function that the pool calls with a connection."""


class DriverOptions(TypedDict, total=False):
    """Options of `create_pool` that chatdb passes on to asyncpg, which documents them."""

    init_size: int | None
    max_queries: int
    connect: Callable[..., Awaitable[object]] | None
    setup: Hook | None
    init: Hook | None
    reset: Hook | None
    record_class: type[asyncpg.Record]
    host: str | Sequence[str] | None
    port: int | Sequence[int] | None
    user: str | None
    password: str | Callable[[], str | Awaitable[str]] | None
    passfile: str | os.PathLike[str] | None
    service: str | None
    servicefile: str | os.PathLike[str] | None
    database: str | None
    timeout: float
    statement_cache_size: int
    max_cached_statement_lifetime: float
    max_cacheable_statement_size: int
    ssl: ssl.SSLContext | Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"] | bool | None
    direct_tls: bool | None
    server_settings: Mapping[str, str] | None
    target_session_attrs: Literal["any", "primary", "standby", "read-write", "read-only", "prefer-standby"] | None
    krbsrvname: str | None
    gsslib: Literal["gssapi", "sspi"] | None


class PoolOptions(DriverOptions, total=False):
    """Options of `Pool`: those that `create_pool` documents, and the driver's."""

    replicas: Sequence[AnyDsn]
    min_size: int
    max_size: int
    acquire_timeout: float
    command_timeout: float
    retries: int
    row_level_security: bool
    notify: bool
    max_inactive_connection_lifetime: float


CONNECTION_OPTIONS: Final = frozenset({
    "host", "port", "user", "password", "passfile", "service", "servicefile", "database", "timeout", "ssl",
    "direct_tls", "server_settings", "target_session_attrs", "krbsrvname", "gsslib",
})  # fmt: skip
"""Options that override the same setting of the DSN."""

_NOT_SUPPORTED: Final = {
    "connection_class": "the pool uses its own",
    "loop": "a pool uses the event loop that opens it",
}


def check_options(options: Mapping[str, object]) -> dict[str, Any]:
    """
    Return the checked options as built-in types, without those whose None means "not given".

    Raises ConfigurationError, which names the option.
    """
    for name in options:
        if name in _NOT_SUPPORTED:
            raise ConfigurationError(f"{name} is not supported: {_NOT_SUPPORTED[name]}")
        if name not in _CHECKS:
            near = get_close_matches(name, _CHECKS, 1)
            raise ConfigurationError(f"create_pool has no option {name}{f': did you mean {near[0]}?' if near else ''}")
    checked_options = {
        name: _CHECKS[name](name, value) for name, value in options.items() if not (value is None and name in _OPTIONAL)
    }
    least, most = checked_options.get("min_size", 0), checked_options.get("max_size", 10)
    if least > most:
        raise ConfigurationError(f"min_size must be at most max_size ({most:,}), not {least:,}")
    if not least <= checked_options.get("init_size", least) <= most:
        raise ConfigurationError(f"init_size must be between min_size and max_size, {least:,} to {most:,}")
    return checked_options


_Check = Callable[[str, object], Any]


def _shown(value: object) -> str:
    """Return a number as text, and only the type of any other value, which may be a secret."""
    if type(value) is float or (type(value) is int and abs(value) < 10**20):
        return repr(value)
    return type_name(type(value))


def _fit(fits: Callable[[Any], bool], wanted: str, *, read: Callable[[object], object] = lambda value: value) -> _Check:
    """Return a check that reads a value and accepts it if it fits."""

    def check(name: str, value: object) -> object:
        found = read(value)
        if fits(found):
            return found
        raise ConfigurationError(f"{name} must be {wanted}, not {_shown(value)}")

    return check


def _integer(least: int, most: int = MAX_INT) -> _Check:
    wanted = f"an int from {least:,} to {most:,}"
    return _fit(lambda number: type(number) is int and least <= number <= most, wanted, read=number_of)


_seconds: Final = _fit(lambda number: number > 0, f"a positive number of seconds, at most {MAX_INT:,}", read=number_of)


def _text(name: str, value: object, *, least: int = 1) -> str:
    if issubclass(type(value), str):
        text = str.__str__(cast("str", value))
        if len(text) >= least and "\0" not in text and text.encode(errors="ignore").decode() == text:
            return text
        raise ConfigurationError(f"{name} must be a {'non-empty ' * least}str without NUL or lone surrogates")
    raise ConfigurationError(f"{name} must be a str, not {_shown(value)}")


def _path(name: str, value: object) -> str:
    if hasattr(type(value), "__fspath__"):
        try:
            value = os.fspath(cast("os.PathLike[str]", value))
        except Exception as error:
            raise ConfigurationError(f"{name} must be a path, but reading it raised {type(error).__name__}") from error
    return _text(name, value)


def _one_of(choices: frozenset[str], *, before: str = "") -> _Check:
    def check(name: str, value: object) -> str:
        if issubclass(type(value), str) and str.__str__(cast("str", value)) in choices:
            return str.__str__(cast("str", value))
        raise ConfigurationError(f"{name} must be {before}one of {', '.join(sorted(choices))}")

    return check


def _one_or_more(check: _Check) -> _Check:
    def check_each(name: str, value: object) -> list[Any]:
        if type(value) is list or type(value) is tuple:
            values = [*cast("Sequence[object]", value)]
            if not values:
                raise ConfigurationError(f"{name} must not be empty")
            return [check(f"{name}[{index}]", item) for index, item in enumerate(values)]
        return [check(name, value)]

    return check_each


def _password(name: str, value: object) -> object:
    return value if callable(value) else _text(name, value, least=0)


def _tls(name: str, value: object) -> object:
    if type(value) is bool or issubclass(type(value), ssl.SSLContext):
        return value
    return _one_of(SSLMODES, before="an SSLContext, True, False, or ")(name, value)


def _dsns(name: str, value: object) -> list[str]:
    if type(value) is not list and type(value) is not tuple:
        raise ConfigurationError(f"{name} must be a list of DSNs, not {_shown(value)}")
    return [dsn_to_str(each, f"{name}[{index}]") for index, each in enumerate(cast("Sequence[object]", value))]


def _settings(name: str, value: object) -> dict[str, str]:
    if not issubclass(type(value), dict):
        raise ConfigurationError(f"{name} must be a dict of str, not {_shown(value)}")
    items = cast("list[tuple[object, object]]", [*dict.items(cast("dict[object, object]", value))])
    keys = [_text(f"a key of {name}", key) for key, _ in items]
    return {key: _text(f"{name}.{key}", item, least=0) for key, (_, item) in zip(keys, items, strict=True)}


_CHECKS: Final[dict[str, _Check]] = {
    **dict.fromkeys(("min_size", "init_size"), _integer(0, _MOST_CONNECTIONS)),
    "replicas": _dsns,
    "max_size": _integer(1, _MOST_CONNECTIONS),
    "max_queries": _integer(1),
    "port": _one_or_more(_integer(1, 65_535)),
    **dict.fromkeys(("retries", "statement_cache_size", "max_cacheable_statement_size"), _integer(0)),
    **dict.fromkeys(("acquire_timeout", "command_timeout", "timeout"), _seconds),
    "max_inactive_connection_lifetime": _fit(
        lambda number: number == 0 or number >= MIN_LIFETIME,
        f"0 for no limit, or a number of seconds from {MIN_LIFETIME} to {MAX_INT:,}",
        read=number_of,
    ),
    "max_cached_statement_lifetime": _fit(
        lambda number: number >= 0, f"0 for no limit, or a number of seconds up to {MAX_INT:,}", read=number_of
    ),
    **dict.fromkeys(
        ("row_level_security", "notify", "direct_tls"), _fit(lambda value: type(value) is bool, "True or False")
    ),
    **dict.fromkeys(("connect", "setup", "init", "reset"), _fit(callable, "a coroutine function")),
    "record_class": _fit(
        lambda value: isinstance(value, type) and issubclass(value, asyncpg.Record), "a subclass of asyncpg.Record"
    ),
    "host": _one_or_more(_text),
    **dict.fromkeys(("user", "service", "database", "krbsrvname"), _text),
    "password": _password,
    **dict.fromkeys(("passfile", "servicefile"), _path),
    "ssl": _tls,
    "server_settings": _settings,
    "target_session_attrs": _one_of(ATTRIBUTES),
    "gsslib": _one_of(frozenset({"gssapi", "sspi"})),
}

_OPTIONAL: Final = CONNECTION_OPTIONS - {"timeout"} | {"init_size", "connect", "setup", "init", "reset"}
"""Options whose None means "not given", as in asyncpg."""
