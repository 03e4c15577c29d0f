"""
Reads a DSN and libpq's environment once, into one value that asyncpg, psycopg and yoyo share.

On their own, the drivers differ. asyncpg ignores the service file that PGSERVICE names, and PGPORT if the DSN has a
host. It sends unknown options to the server as settings, so Neon's standard DSN (`channel_binding=require`) fails.
Without `sslmode`, it connects in plain text if the server has no TLS.
"""

from __future__ import annotations

import getpass
import ipaddress
import logging
import math
import os
import re
import ssl
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, cast
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from chatdb.errors import ConfigurationError

SCHEMES: Final = frozenset({"postgresql", "postgres", "postgresql+psycopg", "postgresql+asyncpg"})
ATTRIBUTES: Final = frozenset({"any", "primary", "standby", "read-write", "read-only", "prefer-standby"})
SSLMODES: Final = frozenset({"disable", "allow", "prefer", "require", "verify-ca", "verify-full"})

# libpq options that asyncpg does not support or does not need
_IGNORED: Final = frozenset({
    "channel_binding",  # asyncpg has no SCRAM-SHA-256-PLUS; the certificate is verified instead
    "client_encoding",  # always UTF-8
    "fallback_application_name", "gssencmode", "keepalives", "keepalives_count", "keepalives_idle",
    "keepalives_interval", "sslcompression", "tcp_user_timeout",
})  # fmt: skip
_SAME_NAME: Final = (
    "host", "krbsrvname", "options", "passfile", "password", "port", "sslcert", "sslkey", "sslmode", "sslnegotiation",
    "sslrootcert", "user",
)  # fmt: skip
_VARIABLES: Final = {f"PG{option.upper()}": option for option in _SAME_NAME} | {
    "PGAPPNAME": "application_name",
    "PGCONNECT_TIMEOUT": "connect_timeout",
    "PGDATABASE": "dbname",
    "PGTARGETSESSIONATTRS": "target_session_attrs",
}
_SETTINGS: Final = {"PGDATESTYLE": "datestyle", "PGGEQO": "geqo", "PGTZ": "timezone"}
"""Settings that libpq sends with every connection, whatever the DSN says."""

_REFUSED: Final = {
    "PGHOSTADDR": (),
    "PGLOADBALANCEHOSTS": ("disable",),
    "PGREQUIREAUTH": (),
    "PGREQUIREPEER": (),
    "PGSSLCRL": (),
    "PGSSLCRLDIR": (),
    "PGSSLMAXPROTOCOLVERSION": (),
    "PGSSLMINPROTOCOLVERSION": ("TLSv1", "TLSv1.1", "TLSv1.2"),  # both drivers require 1.2 by default
}
"""Variables that libpq supports and asyncpg does not, with the values that have no effect."""

_SOCKET_FOLDERS: tuple[str, ...] = ("/run/postgresql", "/var/run/postgresql", "/tmp")  # noqa: S108 - where servers listen
_UNENCODED: Final = (
    "the DSN cannot be parsed: percent-encode special characters in the user and password (# is %23, & is %26, / "
    "is %2F, ? is %3F)"
)
_PLAIN: Final = re.compile("[A-Za-z_]+")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")

_log = logging.getLogger("chatdb")


class SecretDsn(Protocol):
    """An object that holds a DSN as a secret, such as pydantic's `SecretStr`."""

    def get_secret_value(self) -> Any:  # noqa: ANN401 - a str or an object that holds one
        """Return the DSN."""
        ...


class RenderedDsn(Protocol):
    """SQLAlchemy's `URL`, whose `str` hides the password."""

    def render_as_string(self, hide_password: bool = ...) -> str:
        """Return the DSN, with its password unless `hide_password` is true."""
        ...


class UrlDsn(Protocol):
    """A pydantic URL, such as `PostgresDsn`."""

    def unicode_string(self) -> str:
        """Return the DSN."""
        ...


AnyDsn = str | SecretDsn | RenderedDsn | UrlDsn
"""A DSN, or an object from a settings class that holds one."""


@dataclass(frozen=True, slots=True)
class ConnectionInfo:
    """
    All connection parameters from the DSN and the environment, so that no driver reads them again.

    `hosts` and `ports` correspond item by item. A host that starts with / is a Unix socket directory.
    """

    hosts: tuple[str, ...]
    ports: tuple[int, ...]
    user: str
    password: Any = field(repr=False)
    """A str, None, or a callable that asyncpg calls for the password."""
    database: str
    timeout: float | None
    target_session_attrs: str
    server_settings: Mapping[str, str] = field(repr=False)
    direct_tls: bool
    tls: ssl.SSLContext | str | bool = field(repr=False)
    """An SSLContext, `disable`, `allow` or `prefer`."""
    krbsrvname: str
    gsslib: str
    libpq_extras: Mapping[str, str] = field(repr=False)
    """Options for libpq only: TLS, service, timeout, and options that asyncpg does not have."""

    def asyncpg(self, application: str | None = None) -> dict[str, Any]:
        """
        Return the arguments for `asyncpg.connect`, so that it reads nothing from the environment.

        `application` is the `application_name` of the session unless the DSN or the environment sets one.
        """
        name = {} if application is None else {"application_name": application}
        arguments = {
            "host": list(self.hosts),
            "port": self.ports[0] if len(set(self.ports)) == 1 else list(self.ports),
            "user": self.user,
            "password": self.password,
            "passfile": f"{os.devnull}/none",  # already read
            "database": self.database,
            "timeout": self.timeout,
            "target_session_attrs": self.target_session_attrs,
            "direct_tls": self.direct_tls,
            "ssl": self.tls,
            "server_settings": name | dict(self.server_settings) or None,
            "krbsrvname": self.krbsrvname,
            "gsslib": self.gsslib,
        }
        return {name: value for name, value in arguments.items() if value is not None}

    def libpq(self) -> dict[str, str]:
        """Return libpq options for psycopg, so that it reads nothing from the environment."""
        options = {
            "host": ",".join(self.hosts),
            "port": ",".join(map(str, self.ports)),
            "user": self.user,
            "password": self.password if isinstance(self.password, str) else None,
            "dbname": self.database,
            "target_session_attrs": self.target_session_attrs,
            "application_name": self.server_settings.get("application_name"),
            "options": self.server_settings.get("options", ""),
            "krbsrvname": self.krbsrvname,
        }
        return {name: value for name, value in options.items() if value is not None} | dict(self.libpq_extras)

    def url(self, scheme: str = "postgresql") -> str:
        """Return the libpq options as a URL for yoyo and psql."""
        # put everything into the query string: yoyo ignores a second host, and libpq ends a password at its first @
        return f"{scheme}:///?{urlencode(self.libpq(), quote_via=quote, safe='')}"


def connect_arguments(dsn: AnyDsn | ConnectionInfo) -> dict[str, Any]:
    """Return the arguments for `asyncpg.connect`; see `read_dsn`."""
    return read_dsn(dsn).asyncpg()


def libpq_dsn(dsn: AnyDsn | ConnectionInfo, *, scheme: str) -> str:
    """Return a URL for libpq's drivers with the same TLS requirements as `connect_arguments`; see `read_dsn`."""
    return read_dsn(dsn).url(scheme)


def server_of(arguments: Mapping[str, Any]) -> str:
    """Return the hosts and ports in arguments for `asyncpg.connect`, formatted for messages."""
    hosts, ports = arguments["host"], arguments["port"]
    if hosts[0] in _SOCKET_FOLDERS and {"localhost", *_SOCKET_FOLDERS}.issuperset(hosts):
        return "the local socket"
    numbers = [ports] * len(hosts) if isinstance(ports, int) else ports
    shown = [f"[{host}]" if ":" in host else host for host in hosts]
    return ", ".join(
        host if host.startswith("/") else f"{host}:{port}" for host, port in zip(shown, numbers, strict=True)
    )


def database_of(dsn: AnyDsn | ConnectionInfo) -> str:
    """Return the database, hosts and ports for messages: `chat at db.example:5432`."""
    info = read_dsn(dsn)
    return f"{info.database} at {server_of(info.asyncpg())}"


def dsn_to_str(dsn: object, name: str = "dsn") -> str:
    """Return a DSN as a str, from a str or an object that holds one. Errors call it by `name`."""
    held = dsn
    for _ in range(3):
        if issubclass(type(held), str):
            return str.__str__(cast("str", held))
        try:
            if hasattr(held, "get_secret_value"):
                held = cast("SecretDsn", held).get_secret_value()
            elif hasattr(held, "render_as_string"):
                held = cast("RenderedDsn", held).render_as_string(hide_password=False)
            elif hasattr(held, "unicode_string"):
                held = str(held)
            else:
                break
        except Exception:  # noqa: BLE001 - its message may quote the DSN
            break
    raise ConfigurationError(
        f"{name} must be a str or an object that holds one (PostgresDsn, SecretStr, SQLAlchemy's URL), not "
        f"{type(held).__name__}"
    )


def read_dsn(
    dsn: AnyDsn | ConnectionInfo, given: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None
) -> ConnectionInfo:
    """
    Read a DSN and fill in missing values from the service file, password file and environment, as libpq does.

    `given` holds checked asyncpg arguments, which take precedence over everything else. Connections to remote hosts use
    verified TLS unless `sslmode=disable` is set.

    Raises ConfigurationError, which never quotes the DSN, because the DSN may contain a password.
    """
    if isinstance(dsn, ConnectionInfo):
        if not given:
            return dsn
        raise ConfigurationError(f"{', '.join(sorted(given))} cannot be combined with a ConnectionInfo")
    environment = os.environ if environment is None else environment
    for name, harmless in _REFUSED.items():
        if environment.get(name) and environment[name] not in harmless:
            raise ConfigurationError(f"asyncpg does not support the environment variable {name}: unset it")
    given = dict(given or {})
    said = _of_text(dsn_to_str(dsn))
    by_variables = {option: environment[name] for name, option in _VARIABLES.items() if environment.get(name)}
    service = given.pop("service", None) or said.pop("service", None) or environment.get("PGSERVICE")
    file = given.pop("servicefile", None) or environment.get("PGSERVICEFILE")
    by_service = _of_service(service, file, environment) if service else {}
    options = _Options(said, by_service, by_variables)

    hosts, ports = _addresses(given, options)
    user = options.take("user", _text, given.get("user")) or _default_user()
    database = options.take("dbname", _text, given.get("database")) or user
    password = options.take("password", _text)
    password = given.get("password", password)
    passfile = options.take("passfile", str, given.get("passfile"))
    if password is None or (type(password) is str and not password):  # otherwise a password or a callable
        password = _password(passfile, environment, hosts, ports, database, user)
    tls, libpq_extras = _tls(options, given.get("ssl"), local=all(map(_is_local, hosts)))
    if service and environment.get("PGSERVICE"):
        libpq_extras["service"] = service  # otherwise libpq looks up PGSERVICE and fails if it does not exist
    if passfile:
        libpq_extras["passfile"] = passfile
    settings = {
        option: environment[name]
        for name, option in _SETTINGS.items()
        if environment.get(name) and environment[name].lower() != "default"
    }
    named = {name: options.take(name, _text) for name in ("application_name", "options")}
    settings |= {name: value for name, value in named.items() if value is not None}
    timeout = options.take("connect_timeout", _seconds)
    if timeout is not None:
        libpq_extras["connect_timeout"] = f"{math.ceil(timeout)}"
    service_name = options.take("krbsrvname", _text, given.get("krbsrvname"))
    attributes = options.take("target_session_attrs", _one_of(ATTRIBUTES), given.get("target_session_attrs"))
    negotiation = options.take("sslnegotiation", _one_of({"postgres", "direct"}))
    if negotiation:
        libpq_extras["sslnegotiation"] = negotiation
    is_direct = given.get("direct_tls", negotiation == "direct")
    if is_direct and tls in ("disable", "allow", "prefer"):
        raise ConfigurationError(
            "direct_tls (sslnegotiation=direct) requires sslmode=require, verify-ca or verify-full"
        )
    gsslib = "gssapi" if os.name != "nt" or environment.get("PGGSSLIB") == "gssapi" else "sspi"
    info = ConnectionInfo(
        hosts=hosts,
        ports=ports,
        user=user,
        password=password,
        database=database,
        timeout=given.get("timeout", timeout) or None,  # 0 in libpq means no limit
        target_session_attrs=attributes or "any",
        server_settings=settings | given.get("server_settings", {}),
        direct_tls=is_direct,
        tls=tls,
        krbsrvname=service_name or "postgres",
        gsslib=given.get("gsslib") or gsslib,
        libpq_extras=libpq_extras | options.ignored,
    )
    options.refuse_rest(after_password="password=" in dsn_to_str(dsn).partition("?")[2])
    return info


class _Options:
    """The options of a DSN, a service and the environment. `take` removes one; `refuse_rest` rejects those left."""

    def __init__(self, *sources: dict[str, str]) -> None:
        self._sources = sources
        merged = {name: value for source in reversed(sources) for name, value in source.items()}
        self.ignored = {name: value for name, value in merged.items() if name in _IGNORED}

    def take(self, name: str, read: Callable[[str], Any], given: object = None) -> Any:  # noqa: ANN401
        """Remove an option from all sources and return `given` or its value."""
        values = [source.pop(name, None) for source in self._sources]
        for value, where in zip(values, ("DSN", "service", "environment"), strict=True):
            if value is None:
                continue
            try:
                found = read(value)
            except ValueError as error:
                problem = str(error) if isinstance(error, _WrongError) else "has an invalid value"
            else:
                return given or found
            raise ConfigurationError(f"the {where}'s {'option ' if where == 'DSN' else ''}{name} {problem}")
        return given

    def has(self, name: str) -> bool:
        """Return whether the DSN or the service sets an option; the environment does not count."""
        return any(name in source for source in self._sources[:-1])

    def refuse_rest(self, *, after_password: bool) -> None:
        """Raise ConfigurationError, which names the options only if they do not follow a password in a query string."""
        for source, where in zip(self._sources, ("DSN", "service"), strict=False):
            left = {name: value for name, value in source.items() if name not in _IGNORED}
            is_astray = any("@" in value for value in left.values()) or not all(map(_PLAIN.fullmatch, left))
            if left and (is_astray or after_password):
                raise ConfigurationError(_UNENCODED)  # part of a password can look like an option
            if left:
                raise ConfigurationError(f"the {where} has unknown options: {', '.join(sorted(left))}")


class _WrongError(ValueError):
    """An invalid option value, which the message does not quote."""


def _one_of(choices: Iterable[str]) -> Callable[[str], str]:
    def read(value: str) -> str:
        if value not in choices:
            raise _WrongError(f"must be one of {', '.join(sorted(choices))}")
        return value

    return read


def _text(value: str) -> str:
    if "\0" in value:
        raise _WrongError("contains a NUL character")
    if _SURROGATE.search(value):
        raise _WrongError("is not valid UTF-8")
    return value


def _seconds(value: str) -> float:
    seconds = float(value)
    if not math.isfinite(seconds):
        raise ValueError
    return max(seconds, 0.0)


def _of_text(dsn: str) -> dict[str, str]:
    scheme, separator, _ = dsn.partition("://")
    if not separator or scheme not in SCHEMES:
        raise ConfigurationError(
            "the DSN must start with postgresql://, postgres://, postgresql+psycopg:// or postgresql+asyncpg://"
        )
    if _SURROGATE.search(dsn):  # Python decodes invalid bytes in an environment variable to surrogates
        raise ConfigurationError("the DSN is not valid UTF-8: percent-encode all non-ASCII characters as UTF-8")
    try:
        parts = urlsplit(dsn)
        written = parts.query.replace("+", "%2B")  # unlike in a web form, + is a plus sign
        query = parse_qsl(written, keep_blank_values=True, strict_parsing=True) if written else []
    except ValueError:
        query, parts = [], urlsplit("")
    # an @ after the host belongs to a password with an unencoded / or ?
    astray = "@" in parts.path or ("@" in parts.query and not parts.path and "@" not in parts.netloc)
    if not parts.scheme or parts.fragment or astray:
        raise ConfigurationError(_UNENCODED)
    login, _, address = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    host, port = _host_and_port(address)
    database = parts.path.removeprefix("/")
    named = {"user": user, "password": password, "host": host, "dbname": database}
    options = {name: unquote(value) for name, value in named.items() if value} | ({"port": port} if port else {})
    return options | _once(query)


def _once(query: list[tuple[str, str]]) -> dict[str, str]:
    """Return the options in a DSN's query string. host and port must not repeat; for others, the last value wins."""
    named = dict(query)
    twice = [name for name in ("host", "port") if sum(name == other for other, _ in query) > 1]
    if twice:
        raise ConfigurationError(
            f"the DSN has {', '.join(twice)} more than once: write several hosts as postgresql://one:5432,two:5433/ "
            "or host=one,two&port=5432,5433"
        )
    mode = named.pop("ssl", None)  # libpq accepts it for JDBC URLs, SQLAlchemy for asyncpg
    if mode is not None:
        if mode != "true" and mode not in SSLMODES:
            raise ConfigurationError("the DSN's option ssl must be true or a value of sslmode")
        named.setdefault("sslmode", "require" if mode == "true" else mode)
    if any(":" in host and not _address(host) for host in named.get("host", "").split(",") if host[:1] != "/"):
        raise ConfigurationError("the DSN's option host contains a port: write host=one,two&port=5432,5433")
    return named


def _host_and_port(address: str) -> tuple[str, str]:
    """Return the hosts and ports in a DSN's address, comma-separated, as libpq parses them."""
    hosts: list[str] = []
    ports: list[str] = []
    for part in address.split(","):
        name, bracket, rest = part.partition("]")
        if bracket:  # [::1]:5432
            host, port = name.removeprefix("["), rest.removeprefix(":")
        else:
            host, _, port = part.partition(":")
        hosts.append(host)
        ports.append(port)
    return ",".join(hosts), ",".join(ports)


def _of_service(name: str, file: str | None, environment: Mapping[str, str]) -> dict[str, str]:
    """Return a service's options from `file` or, if it is None, from the user's or the system's service file."""
    home = _home(environment)
    files = [Path(file)] if file else [home / ".pg_service.conf"] if home else []
    if environment.get("PGSYSCONFDIR"):
        files.append(Path(environment["PGSYSCONFDIR"], "pg_service.conf"))
    for path in files:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):  # missing, unreadable or not UTF-8
            continue
        options: dict[str, str] | None = None
        for line in map(str.strip, lines):
            if line.startswith("["):
                if options is not None:
                    break
                options = {} if line == f"[{name}]" else None
            elif options is not None and line and not line.startswith("#"):
                option, separator, value = line.partition("=")
                if not separator or option == "service":
                    raise ConfigurationError("the service file has a line that is not option=value")
                options.setdefault(option, value)
        if options is not None:
            return options
    raise ConfigurationError(
        "no service file defines the service named in the DSN or PGSERVICE: check PGSERVICEFILE and ~/.pg_service.conf"
    )


def _home(environment: Mapping[str, str]) -> Path | None:
    if environment.get("HOME"):
        return Path(environment["HOME"])
    try:
        return Path.home()
    except (RuntimeError, KeyError):  # a container's user ID may have no name
        return None


def _addresses(given: Mapping[str, Any], options: _Options) -> tuple[tuple[str, ...], tuple[int, ...]]:
    hosts: list[str] = options.take("host", lambda value: _text(value).split(",")) or [""]
    ports: list[int] = options.take("port", lambda value: [_port(port) for port in value.split(",")]) or [5432]
    if given.get("host"):
        hosts = [given["host"]] if isinstance(given["host"], str) else list(given["host"])
    if given.get("port"):
        ports = [given["port"]] if isinstance(given["port"], int) else list(given["port"])
    if len(ports) == 1:
        ports *= len(hosts)
    if len(ports) != len(hosts):
        raise ConfigurationError("the DSN must have one port for all hosts or one port for each host")
    if any(host.startswith("@") for host in hosts):
        raise ConfigurationError("the DSN's host is an abstract socket, which asyncpg does not support")
    if not all(map(_is_name, hosts)):
        raise ConfigurationError("the DSN's host is not a valid host name: a part of it is empty or too long")
    pairs = [
        (host, port)
        for named, port in zip(hosts, ports, strict=True)
        for host in ([named] if named else _default_hosts(port))
    ]
    return tuple(host for host, _ in pairs), tuple(port for _, port in pairs)


def _default_hosts(port: int) -> list[str]:
    """Return the hosts to try if the DSN names none: an existing socket, otherwise all default locations."""
    if os.name == "nt":
        return ["localhost"]
    there = [folder for folder in _SOCKET_FOLDERS if os.access(f"{folder}/.s.PGSQL.{port}", os.F_OK)]
    return there[:1] or [*_SOCKET_FOLDERS, "localhost"]


def _port(value: str) -> int:
    value = value.strip() or "5432"
    port = int(value) if re.fullmatch("[0-9]{1,9}", value) else 0
    if not 0 < port < 65536:
        raise _WrongError("must be a number from 1 to 65535; percent-encode any special characters in the password")
    return port


def _default_user() -> str:
    """Return the operating system's user name, as libpq does; asyncpg would read LOGNAME and USER first."""
    if os.name == "nt":
        return getpass.getuser()
    import pwd  # not available on Windows

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's user ID may have no name
        pass
    raise ConfigurationError(
        f"the DSN names no user, and the process's user id {os.geteuid()} has no name: write "
        "postgresql://USER@HOST/DATABASE or set PGUSER"
    )


def _password(
    passfile: str | None,
    environment: Mapping[str, str],
    hosts: tuple[str, ...],
    ports: tuple[int, ...],
    database: str,
    user: str,
) -> str | None:
    home = _home(environment)
    file = Path(passfile) if passfile else home / ".pgpass" if home else None
    entries = _entries(file) if file else []
    passwords: set[str] = set()
    for host, port in zip(hosts, ports, strict=True):
        wanted = ("localhost" if host in _SOCKET_FOLDERS else host, str(port), database, user)
        for *fields, password in entries:
            if all(given == "*" or _unescaped(given) == value for given, value in zip(fields, wanted, strict=True)):
                passwords.add(_unescaped(password))
                break
    if len(passwords) > 1:
        raise ConfigurationError(
            "the password file has different passwords for the DSN's hosts, but asyncpg sends the same one to all: "
            "give the user one password on all hosts"
        )
    return passwords.pop() if passwords else None


def _entries(file: Path) -> list[list[str]]:
    """Return a password file's lines as host, port, database, user and password, still escaped."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            return []
        if os.name != "nt" and status.st_mode & 0o077:
            _log.warning("ignoring the password file because other users can read it: run chmod 600 on it")
            return []
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return []
    lines = (_FIELD.findall(line)[:5] for line in text.splitlines() if not line.startswith("#"))
    return [fields for fields in lines if len(fields) == 5]


_FIELD: Final = re.compile(r"((?:\\.|[^:\\]|\\$)*)(?::|$)")
"""A field of a password file; a backslash escapes a colon."""


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_name(host: str) -> bool:
    """Return whether Python can look up a host without a UnicodeError."""
    if host.isascii():
        labels = host.removesuffix(".").split(".")
        return not host or host.startswith("/") or all(0 < len(label) < 64 for label in labels)
    try:
        host.encode("idna")
    except (UnicodeError, LookupError):
        return host.startswith("/")
    return True


def _is_local(host: str) -> bool:
    address = _address(host)
    return host.startswith("/") or host == "localhost" or (address is not None and address.is_loopback)


def _tls(
    options: _Options, given: ssl.SSLContext | str | bool | None, *, local: bool
) -> tuple[ssl.SSLContext | str | bool, dict[str, str]]:
    is_demanded = options.has("sslrootcert")
    mode = options.take("sslmode", _one_of(SSLMODES))
    files = {name: options.take(name, str) for name in ("sslrootcert", "sslcert", "sslkey", "sslpassword")}
    files = {name: value for name, value in files.items() if value}
    if isinstance(given, str):
        mode = given
    elif isinstance(given, ssl.SSLContext) or given:
        return given, {"sslmode": "verify-full", "sslrootcert": "system"}
    if mode == "disable" or given is False:
        return "disable", {"sslmode": "disable"}
    if local and mode in {None, "allow", "prefer"} and not is_demanded:
        return mode or "prefer", {"sslmode": mode or "prefer"} | files
    root = files.get("sslrootcert")
    try:
        context = ssl.create_default_context(cafile=None if root in {None, "system"} else root)
        if "sslcert" in files:
            context.load_cert_chain(files["sslcert"], files.get("sslkey"), files.get("sslpassword"))
    except (OSError, ValueError):  # includes ssl.SSLError
        problem = "the file in the DSN's sslrootcert, sslcert or sslkey cannot be read or is invalid"
    else:
        context.check_hostname = mode != "verify-ca"
        if local and mode == "require" and not root:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            return context, files | {"sslmode": "require"}
        if mode != "verify-ca":
            return context, {"sslrootcert": "system"} | files | {"sslmode": "verify-full"}
        if root in {None, "system"}:
            root = ssl.get_default_verify_paths().cafile  # libpq accepts "system" only with verify-full
        if root:
            return context, files | {"sslmode": mode, "sslrootcert": root}
        problem = "the DSN's sslmode=verify-ca requires sslrootcert: set it to the CA's certificate file"
    raise ConfigurationError(problem)
