"""
Reads a DSN as libpq users write it, into arguments for asyncpg.

asyncpg sends every option that it does not know to the server as a setting, so that Neon's own string
(`channel_binding=require`) fails; and without `sslmode` it connects in plain text where the server has no TLS.
"""

from __future__ import annotations

import getpass
import ipaddress
import os
import re
import ssl
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from chatdb.errors import ConfigurationError

SCHEMES: Final = frozenset({"postgresql", "postgres", "postgresql+psycopg"})

# what libpq knows and asyncpg cannot do or needs no word for
_IGNORED: Final = frozenset({
    "channel_binding",  # asyncpg has no SCRAM-SHA-256-PLUS; the verified certificate is what binds
    "client_encoding",  # always UTF-8
    "fallback_application_name",
    "gssencmode",
    "keepalives",
    "keepalives_count",
    "keepalives_idle",
    "keepalives_interval",
    "sslcompression",
    "tcp_user_timeout",
})  # fmt: skip
_UNENCODED: Final = (
    "the DSN cannot be read: write special characters of the user and password in percent-encoding (# is %23, "
    "/ is %2F, ? is %3F)"
)
_PLAIN: Final = re.compile("[A-Za-z_]+")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_SSLMODES: Final = frozenset({"disable", "allow", "prefer", "require", "verify-ca", "verify-full"})


def connect_arguments(dsn: str) -> dict[str, Any]:
    """
    Return the arguments of `asyncpg.connect` for a DSN.

    Hosts that are not local are reached by TLS with a verified certificate, unless the DSN says `sslmode=disable`.

    Raises ConfigurationError, which never quotes the DSN: it holds a password.
    """
    scheme, separator, _ = dsn.partition("://")
    if not separator or scheme not in SCHEMES:
        raise ConfigurationError("the DSN must start with postgresql://, postgres:// or postgresql+psycopg://")
    if _SURROGATE.search(dsn):  # what Python makes of an environment variable's other bytes
        raise ConfigurationError("the DSN is not UTF-8: write what is outside ASCII as the percent-encoding of UTF-8")
    try:
        parts = urlsplit(dsn)
        query = _query_of(parts)
    except ValueError:
        query, parts = [], urlsplit("")
    # an @ behind the host's place is that of a password with an unencoded / or ?
    astray = "@" in parts.path or ("@" in parts.query and not parts.path and "@" not in parts.netloc)
    if not parts.scheme or parts.fragment or astray:
        raise ConfigurationError(_UNENCODED)
    login, _, address = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    hosts, ports = _hosts(address)
    found = _Options(query)
    hosts = found.take("host", _comma, hosts) or _comma(os.environ.get("PGHOST", ""))
    ports = found.take("port", lambda value: [_port(port) for port in value.split(",")], ports)
    arguments: dict[str, Any] = {
        "host": hosts or None,
        "port": _ports(hosts, ports),
        "user": found.take("user", str, unquote(user) or None) or _default_user(),
        "password": found.take("password", str, unquote(password) or None),
        "database": found.take("dbname", str, unquote(parts.path.removeprefix("/")) or None),
        "passfile": found.take("passfile", str),
        "timeout": found.take("connect_timeout", float) or None,  # 0 is libpq's for none
        "target_session_attrs": found.take("target_session_attrs", str),
        "direct_tls": found.take("sslnegotiation", lambda value: value == "direct"),
        "ssl": _tls(found, local=all(map(_is_local, hosts))),
        "server_settings": found.settings(),
    }
    found.refuse_rest()
    return {name: value for name, value in arguments.items() if value not in (None, {})}


def libpq_dsn(dsn: str, *, scheme: str) -> str:
    """Return the DSN for libpq's drivers, with the same demand of TLS as `connect_arguments` makes."""
    arguments = connect_arguments(dsn)
    parts = urlsplit(dsn)
    options = dict(_query_of(parts))
    if isinstance(arguments.get("ssl"), ssl.SSLContext) and arguments["ssl"].check_hostname:
        options = {"sslrootcert": "system"} | options | {"sslmode": "verify-full"}
    elif options.get("sslmode") == "verify-ca" and options.get("sslrootcert", "system") == "system":
        found = ssl.get_default_verify_paths().cafile  # libpq takes "system" with verify-full only
        if not found:
            raise ConfigurationError("the DSN's sslmode=verify-ca needs an sslrootcert: name the authority's file")
        options["sslrootcert"] = found
    # libpq ends the password at its first @, would look for a host of the rest's name, and tell it in its errors
    login, at, address = parts.netloc.rpartition("@")
    encoded = ":".join(quote(unquote(part), safe="") for part in login.split(":", 1))
    # not urlunsplit, which leaves out the // before an empty host
    return f"{scheme}://{encoded}{at}{address}{parts.path}?{urlencode(options, quote_via=quote)}".rstrip("?")


def server_of(arguments: dict[str, Any]) -> str:
    """Return the hosts and ports among the arguments of `asyncpg.connect`, as a person reads them."""
    hosts: list[str] = arguments.get("host") or _comma(os.environ.get("PGHOST", ""))
    port: int | list[int] = arguments.get("port") or int(os.environ.get("PGPORT") or 5432)
    ports = port if isinstance(port, list) else [port] * len(hosts)
    named = [host if host.startswith("/") else f"{host}:{at}" for host, at in zip(hosts, ports, strict=False)]
    return ", ".join(named) or "the local socket"


def database_of(dsn: str) -> str:
    """Return which database a DSN names, as a person reads it: `chat at db.example:5432`."""
    arguments = connect_arguments(dsn)
    name = arguments.get("database") or os.environ.get("PGDATABASE")
    name = name or arguments.get("user") or os.environ.get("PGUSER") or getpass.getuser()
    return f"{name} at {server_of(arguments)}"


class _Options:
    """The options of a DSN, each taken once; what nobody took is refused."""

    def __init__(self, query: list[tuple[str, str]]) -> None:
        self._left = {name: value for name, value in query if name not in _IGNORED}

    def take(self, name: str, read: Callable[[str], Any], default: Any = None) -> Any:  # noqa: ANN401
        value = self._left.pop(name, None)
        if value is None:
            return default
        try:
            return read(value)
        except ValueError:
            problem = f"the DSN's option {name} has a value that cannot be read"
        raise ConfigurationError(problem)

    def settings(self) -> dict[str, str]:
        named = {name: self.take(name, str) for name in ("application_name", "options")}
        return {name: value for name, value in named.items() if value is not None}

    def refuse_rest(self) -> None:
        if any("@" in value for value in self._left.values()) or not all(map(_PLAIN.fullmatch, self._left)):
            raise ConfigurationError(_UNENCODED)  # it may be a part of the password that looks like an option
        if self._left:
            raise ConfigurationError(f"the DSN has options that chatdb does not know: {', '.join(sorted(self._left))}")


def _default_user() -> str | None:
    """Return None where the driver finds a user by itself: in PGUSER, or by the process's user."""
    if os.environ.get("PGUSER"):
        return None
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a container's number without a name
        pass
    else:
        return None
    raise ConfigurationError(
        f"the DSN names no user, and this process's user, {os.getuid()}, has no name: write "
        "postgresql://USER@HOST/DATABASE, or set PGUSER"
    )


def _query_of(parts: SplitResult) -> list[tuple[str, str]]:
    """Return the options of a DSN, in which unlike in a web address + is +."""
    query = parts.query.replace("+", "%2B")
    return parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []


def _comma(value: str) -> list[str]:
    return value.split(",") if value else []


def _port(value: str) -> int:
    port = int(value) if value else 5432
    if not 0 < port < 65536:
        raise ValueError
    return port


def _hosts(address: str) -> tuple[list[str], list[int]]:
    hosts: list[str] = []
    ports: list[int] = []
    for part in address.split(",") if address else []:
        name, bracket, rest = part.partition("]")
        if bracket:  # [::1]:5432
            host, port = name.removeprefix("["), rest.removeprefix(":")
        else:
            host, _, port = part.partition(":")
        hosts.append(unquote(host) or "localhost")
        try:
            ports.append(_port(port))
        except ValueError:
            problem = (
                "the DSN's port must be a number of 1 to 65535: is a special character of the password not encoded?"
            )
        else:
            continue
        raise ConfigurationError(problem)
    return hosts, ports


def _ports(hosts: list[str], ports: list[int]) -> int | list[int] | None:
    if len(ports) <= 1 or len(set(ports)) == 1:
        return ports[0] if ports else None
    if len(ports) != len(hosts):
        raise ConfigurationError("the DSN must have one port for all hosts, or one for each")
    return ports


def _is_local(host: str) -> bool:
    if host.startswith(("/", "@")) or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _tls(found: _Options, *, local: bool) -> ssl.SSLContext | str | None:
    mode = found.take("sslmode", str)
    root, certificate = found.take("sslrootcert", str), found.take("sslcert", str)
    key, passphrase = found.take("sslkey", str), found.take("sslpassword", str)
    if mode is not None and mode not in _SSLMODES:
        raise ConfigurationError(f"the DSN's sslmode must be one of {', '.join(sorted(_SSLMODES))}")
    if mode == "disable":
        return "disable"
    if local and mode in {None, "allow", "prefer"} and not root:
        return None
    try:
        context = ssl.create_default_context(cafile=None if root in {None, "system"} else root)
        if certificate:
            context.load_cert_chain(certificate, key, passphrase)
    except (OSError, ssl.SSLError):
        problem = "the DSN's sslrootcert, sslcert or sslkey names a file that cannot be read as such"
    else:
        context.check_hostname = mode != "verify-ca"
        if local and mode == "require" and not root:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context
    raise ConfigurationError(problem)
