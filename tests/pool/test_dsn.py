"""DSNs as cloud providers and tools write them: what the driver receives, what is refused, no password in errors."""

from __future__ import annotations

import os
import pwd
import ssl
import traceback

import psycopg
import pytest

import chatdb
from chatdb import ConfigurationError
from chatdb._core.dsn import connect_arguments, libpq_dsn

pytestmark = pytest.mark.server_independent

CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBgjCCASmgAwIBAgIUN/2xTWTiua2Okt2VF3lFqDJ3G4gwCgYIKoZIzj0EAwIw
FjEUMBIGA1UEAwwLY2hhdGRiIHRlc3QwIBcNMjYxMTIyMDcxNTQ0WhgPMjEyNjEw
MjkwNzE1NDRaMBYxFDASBgNVBAMMC2NoYXRkYiB0ZXN0MFkwEwYHKoZIzj0CAQYI
KoZIzj0DAQcDQgAE1Bq6U2fSwEXI7W7TsfEvtUUi2O3P2JOggvw9KUaLr4Pk8RgP
x/HBYSXGXCj4mQ6wQHLsMlJlsuhftWt4nvWmfKNTMFEwHQYDVR0OBBYEFAzmvlmP
Enlv0/p6boFBDn9scj+cMB8GA1UdIwQYMBaAFAzmvlmPEnlv0/p6boFBDn9scj+c
MA8GA1UdEwEB/wQFMAMBAf8wCgYIKoZIzj0EAwIDRwAwRAIgBWYO/8q2Hmm4X/Rz
NfnCdvql8AvJ9XYEeUi1gREkW3oCIC4S1z9/HDiPknhBJRMFyd5mJaC22GPWK/U1
M9HArQUf
-----END CERTIFICATE-----
"""  # a root that has signed no certificate
NEON = "ep-cool-darkness-123456-pooler.us-east-2.aws.neon.tech"
SUPABASE = "aws-0-eu-central-1.pooler.supabase.com"
RDS = "mydb.abcdefgh.eu-west-1.rds.amazonaws.com"

ALICE = {"user": "alice", "password": "pw", "database": "chat"}


def on(*hosts, port=5432, **others):
    """Return alice's arguments for the hosts."""
    return ALICE | {"host": list(hosts), "port": port} | others


DEFAULTS = {
    "host": ["/run/none", "/tmp/none", "localhost"],
    "port": 5432,
    "user": pwd.getpwuid(os.geteuid()).pw_name,
    "database": pwd.getpwuid(os.geteuid()).pw_name,
    "passfile": "/dev/null/none",
    "target_session_attrs": "any",
    "direct_tls": False,
    "krbsrvname": "postgres",
    "gsslib": "gssapi",
}
"""Arguments for what a DSN omits, so that asyncpg does not read the environment."""


def tls(arguments):
    """Return the kind of TLS that the arguments ask for."""
    context = arguments.get("ssl")
    if not isinstance(context, ssl.SSLContext):
        return "by itself" if context == "prefer" else context
    if context.verify_mode is not ssl.CERT_REQUIRED:
        return "unverified"
    return "verified" if context.check_hostname else "verified but for the name"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch, one_authority):
    for name in [name for name in os.environ if name.startswith("PG") or name == "DATABASE_URL"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setattr("chatdb._core.dsn._SOCKET_FOLDERS", ("/run/none", "/tmp/none"))


DSNS = {
    # cloud providers
    f"postgresql://alice:pw@{NEON}/chat?sslmode=require&channel_binding=require": (on(NEON), "verified"),
    f"postgres://alice:pw@{NEON}/chat?sslmode=require": (on(NEON), "verified"),
    f"postgresql://postgres.abcdef:pw@{SUPABASE}:6543/postgres": (
        {"host": [SUPABASE], "port": 6543, "user": "postgres.abcdef", "password": "pw", "database": "postgres"},
        "verified",
    ),
    f"postgresql://alice:pw@{RDS}:5432/chat?sslmode=verify-full&sslrootcert={{root}}": (on(RDS), "verified"),
    f"postgresql://alice:pw@{RDS}:5432/chat?sslmode=verify-ca&sslrootcert={{root}}": (
        on(RDS),
        "verified but for the name",
    ),
    "postgres://alice:pw@db-1.db.ondigitalocean.com:25060/chat?sslmode=require": (
        on("db-1.db.ondigitalocean.com", port=25060),
        "verified",
    ),
    "postgresql://alice%40srv:pw@srv.postgres.database.azure.com/chat?sslmode=require&sslrootcert=system": (
        on("srv.postgres.database.azure.com", user="alice@srv"),
        "verified",
    ),
    "postgresql://alice:pw@node.cockroachlabs.cloud:26257/chat?sslmode=verify-full&options=--cluster%3Dx-1": (
        on("node.cockroachlabs.cloud", port=26257, server_settings={"options": "--cluster=x-1"}),
        "verified",
    ),
    "postgresql+psycopg://alice:pw@db.example.com/chat": (on("db.example.com"), "verified"),
    "postgresql+asyncpg://alice:pw@db.example.com/chat?ssl=require": (on("db.example.com"), "verified"),
    "postgresql://alice:pw@localhost/chat?ssl=true": (on("localhost"), "unverified"),
    # TLS
    "postgresql://alice:pw@db.example.com/chat?sslmode=disable": (on("db.example.com"), "disable"),
    "postgresql://alice:pw@db.example.com/chat?sslmode=allow": (on("db.example.com"), "verified"),
    "postgresql://alice:pw@db.example.com/chat?sslmode=prefer": (on("db.example.com"), "verified"),
    "postgresql://alice:pw@10.0.0.7/chat": (on("10.0.0.7"), "verified"),
    "postgresql://alice:pw@[2001:db8::7]/chat": (on("2001:db8::7"), "verified"),
    "postgresql://alice:pw@db.example.com/chat?sslnegotiation=direct": (
        on("db.example.com", direct_tls=True),
        "verified",
    ),
    # local hosts
    "postgresql://alice:pw@localhost/chat": (on("localhost"), "by itself"),
    "postgresql://alice:pw@127.0.0.1:5433/chat": (on("127.0.0.1", port=5433), "by itself"),
    "postgresql://alice:pw@[::1]:5433/chat?sslmode=prefer": (on("::1", port=5433), "by itself"),
    "postgresql://alice:pw@localhost/chat?sslmode=require": (on("localhost"), "unverified"),
    "postgresql://alice:pw@localhost/chat?sslmode=verify-full": (on("localhost"), "verified"),
    "postgresql://alice:pw@localhost/chat?sslrootcert={root}": (on("localhost"), "verified"),
    "postgresql://alice:pw@%2Frun%2Fpostgresql/chat": (on("/run/postgresql"), "by itself"),
    "postgresql://alice:pw@/chat?host=/run/postgresql&port=5433": (on("/run/postgresql", port=5433), "by itself"),
    "postgresql://alice:pw@/chat?host=%2Frun%2Fpostgresql": (
        ALICE | {"host": ["/run/postgresql"]},
        "by itself",
    ),
    "postgresql:///chat": ({"database": "chat"}, "by itself"),
    "postgresql://": ({}, "by itself"),
    # several hosts
    "postgresql://alice:pw@one.example.com,two.example.com:5433/chat?target_session_attrs=read-write": (
        on("one.example.com", "two.example.com", port=[5432, 5433], target_session_attrs="read-write"),
        "verified",
    ),
    "postgresql://alice:pw@one.example.com:5433,two.example.com:5433/chat": (
        on("one.example.com", "two.example.com", port=5433),
        "verified",
    ),
    "postgresql://alice:pw@/chat?host=one.example.com,two.example.com&port=5433": (
        on("one.example.com", "two.example.com", port=5433),
        "verified",
    ),
    "postgresql://alice:pw@localhost,two.example.com/chat": (on("localhost", "two.example.com"), "verified"),
    "postgresql://alice:pw@[::1]:5433,localhost:5434/chat": (on("::1", "localhost", port=[5433, 5434]), "by itself"),
    # special characters
    "postgresql://alice:%23%40%3A%2F%3F%25%5B%5D%20%2B@localhost/chat": (
        on("localhost", password="#@:/?%[] +"),
        "by itself",
    ),
    "postgresql://alice:a+b@localhost/chat": (on("localhost", password="a+b"), "by itself"),
    "postgresql://alice:p:w@localhost/chat": (on("localhost", password="p:w"), "by itself"),
    "postgresql://alice:p@w@localhost/chat": (on("localhost", password="p@w"), "by itself"),
    "postgresql://localhost/chat?user=alice&password=p%23w%26": (on("localhost", password="p#w&"), "by itself"),
    "postgresql://localhost/chat?user=alice&password=a+b": (on("localhost", password="a+b"), "by itself"),
    "postgresql://%C3%A4:%F0%9F%91%8B@localhost/%C3%BC": (
        on("localhost", user="ä", password="👋", database="ü"),
        "by itself",
    ),
    "postgresql://alice@localhost/chat": (
        {"host": ["localhost"], "port": 5432, "user": "alice", "database": "chat"},
        "by itself",
    ),
    # options
    "postgresql://alice:pw@localhost/chat?application_name=my%20app&connect_timeout=5": (
        on("localhost", timeout=5.0, server_settings={"application_name": "my app"}),
        "by itself",
    ),
    "postgresql://alice:pw@localhost/chat?connect_timeout=0": (on("localhost"), "by itself"),  # libpq: no timeout
    "postgresql://alice:pw@localhost/chat?keepalives=1&keepalives_idle=30&keepalives_interval=10&keepalives_count=3"
    "&tcp_user_timeout=5&client_encoding=utf8&gssencmode=disable&fallback_application_name=x&sslcompression=0": (
        on("localhost"),
        "by itself",
    ),
    "postgresql://localhost/?dbname=chat&user=alice&password=pw": (on("localhost"), "by itself"),
}
"""DSNs, each with the expected arguments for asyncpg and kind of TLS."""


@pytest.fixture
def root(tmp_path):
    """Return the path of a root certificate."""
    path = tmp_path / "root.pem"
    path.write_text(CERTIFICATE)
    return path


@pytest.mark.parametrize("dsn", DSNS)
def test_read(dsn, root):
    """A DSN is read as libpq reads it, and a remote host requires verified TLS unless sslmode is disable."""
    expected, kind = DSNS[dsn]

    arguments = connect_arguments(dsn.format(root=root))

    assert tls(arguments) == kind
    assert {name: value for name, value in arguments.items() if name != "ssl"} == DEFAULTS | expected


def test_the_root_certificate_is_the_only_one(root):
    """With a root certificate in the DSN, no other authority is trusted."""
    context = connect_arguments(f"postgresql://alice@db.example.com/chat?sslrootcert={root}")["ssl"]

    assert [dict(entry[0] for entry in found["subject"]) for found in context.get_ca_certs()] == [
        {"commonName": "chatdb test"}
    ]


def test_a_host_from_the_environment(monkeypatch):
    """A remote host from PGHOST also requires verified TLS."""
    monkeypatch.setenv("PGHOST", "db.example.com")
    assert tls(connect_arguments("postgresql:///chat")) == "verified"

    monkeypatch.setenv("PGHOST", "/run/postgresql")
    assert tls(connect_arguments("postgresql:///chat")) == "by itself"


PASSWORD = "xyzzy"
REFUSED = {
    # scheme
    f"mysql://alice:{PASSWORD}@localhost/chat": r"must start with postgresql://",
    f"postgresql+psycopg2://alice:{PASSWORD}@localhost/chat": r"must start with postgresql://",
    f"host=localhost user=alice password={PASSWORD}": r"must start with postgresql://",
    f"postgresql:alice:{PASSWORD}@localhost": r"must start with postgresql://",
    PASSWORD: r"must start with postgresql://",
    # unencoded characters
    f"postgresql://alice:#{PASSWORD}@localhost/chat": r"%23",
    f"postgresql://alice:{PASSWORD}#@localhost/chat": r"%23",
    f"postgresql://alice:12#{PASSWORD}@localhost/chat": r"%23",
    f"postgresql://alice:/{PASSWORD}@localhost/chat": r"encod",
    f"postgresql://alice:{PASSWORD}/@localhost/chat": r"encod",
    f"postgresql://alice:?{PASSWORD}@localhost/chat": r"encod",
    f"postgresql://alice:{PASSWORD}?x@localhost/chat": r"encod",
    f"postgresql://alice:{PASSWORD}?x=1@localhost/chat": r"encod",
    f"postgresql://alice:12?{PASSWORD}=@localhost/chat": r"encod",
    f"postgresql://alice:12/?{PASSWORD}=@localhost/chat": r"encod",
    f"postgresql://alice:[{PASSWORD}@localhost/chat": r"encod",
    f"postgresql://alice:{PASSWORD}]@localhost/chat": r"encod",
    f"postgresql://alice:{PASSWORD}\udcff@localhost/chat": r"not valid UTF-8",
    f"postgresql://alice:{PASSWORD}@localhost/ch\udcfft": r"not valid UTF-8",
    # ports
    f"postgresql://alice:{PASSWORD}@localhost:port/chat": r"port",
    f"postgresql://alice:{PASSWORD}@localhost:0/chat": r"port",
    f"postgresql://alice:{PASSWORD}@localhost:65536/chat": r"port",
    f"postgresql://alice:{PASSWORD}@localhost:-1/chat": r"port",
    f"postgresql://alice:{PASSWORD}@[::1]:x/chat": r"port",
    f"postgresql://alice:{PASSWORD}@localhost/chat?port={PASSWORD}": r"port",
    f"postgresql://alice:{PASSWORD}@one,two,three/chat?port=1,2": r"one port for all hosts or one port for each",
    f"postgresql://alice:{PASSWORD}@localhost:5_432/chat": r"port",
    f"postgresql://alice:{PASSWORD}@/chat?host=one:5432&host=two:5433": r"has host more than once: .*one:5432,two:5433",
    f"postgresql://alice:{PASSWORD}@/chat?host=one:5432": r"host contains a port",
    f"postgresql://alice:{PASSWORD}@/chat?host=@abstract": r"abstract socket",
    # options
    f"postgresql://alice:{PASSWORD}@localhost/chat?sslmode=on": r"sslmode must be one of .*verify-full",
    f"postgresql://alice:{PASSWORD}@localhost/chat?sslmode=": r"sslmode",
    f"postgresql://alice:{PASSWORD}@localhost/chat?sslmode=Require": r"sslmode",
    f"postgresql://alice:{PASSWORD}@localhost/chat?pgbouncer=true&pool_timeout=5": r"options: pgbouncer, pool_timeout$",
    f"postgresql://alice:{PASSWORD}@localhost/chat?statement_timeout=5000": r"statement_timeout",
    f"postgresql://alice:{PASSWORD}@localhost/chat?SSLMODE=require": r"SSLMODE",
    f"postgresql://alice:{PASSWORD}@localhost/chat?passwort={PASSWORD}": r"passwort",
    f"postgresql://alice:{PASSWORD}@localhost/chat?connect_timeout=soon": r"connect_timeout",
    f"postgresql://alice:{PASSWORD}@localhost/chat?sslmode": r"",
    f"postgresql://alice:{PASSWORD}@localhost/chat?ssl=on": r"ssl must be",
    f"postgresql://alice:{PASSWORD}@{'x' * 64}.example/chat": r"host is not a valid host name",
    f"postgresql://alice:{PASSWORD}@one..example/chat": r"host is not a valid host name",
    f"postgresql://alice:{PASSWORD}@localhost/chat?sslnegotiation=direct": r"direct_tls",
    f"postgresql://alice:{PASSWORD}@localhost/chat?sslnegotiation=maybe": r"sslnegotiation must be one of",
    f"postgresql://alice:{PASSWORD}@localhost/chat?target_session_attrs=master": r"target_session_attrs must be one of",
    f"postgresql://alice:{PASSWORD}@localhost/chat?connect_timeout=nan": r"connect_timeout",
    f"postgresql://alice:{PASSWORD}@localhost/ch%00at": r"NUL",
    f"postgresql://alice:{PASSWORD}@localhost/chat?hostaddr=127.0.0.1": r"hostaddr",
    # files
    f"postgresql://alice:{PASSWORD}@db.example.com/chat?sslrootcert=/missing/root.pem": r"sslrootcert",
    f"postgresql://alice:{PASSWORD}@db.example.com/chat?sslcert=/missing/client.pem": r"sslcert",
    f"postgresql://alice:{PASSWORD}@localhost/chat?sslmode=verify-full&sslrootcert=/missing/root.pem": r"sslrootcert",
    f"postgresql://alice:{PASSWORD}@db.example.com/chat?sslrootcert={{no_certificate}}": r"sslrootcert",
    f"postgresql://alice:{PASSWORD}@db.example.com/chat?sslcert={{root}}&sslpassword={PASSWORD}": r"sslcert",
}
"""Refused DSNs, each with the expected error text."""


@pytest.mark.parametrize("dsn", REFUSED)
def test_refused(dsn, root, tmp_path):
    """An error names what chatdb does not support, and contains no part of a password."""
    no_certificate = tmp_path / "no.pem"
    no_certificate.write_text("no certificate")

    with pytest.raises(ConfigurationError, match=REFUSED[dsn] or None) as raised:
        connect_arguments(dsn.replace("{root}", str(root)).replace("{no_certificate}", str(no_certificate)))

    for told in (str(raised.value), repr(raised.value), "".join(traceback.format_exception(raised.value))):
        assert PASSWORD not in told


@pytest.mark.parametrize("dsn", REFUSED)
def test_a_pool_refuses_at_once(dsn, root):
    """`create_pool` refuses a bad DSN immediately."""
    with pytest.raises(ConfigurationError):
        chatdb.create_pool(dsn.replace("{root}", str(root)))


@pytest.mark.parametrize("dsn", [None, ""])
def test_no_dsn(monkeypatch, dsn):
    """Without a DSN and DATABASE_URL, the error says what to set."""
    with pytest.raises(ConfigurationError, match="DATABASE_URL"):
        chatdb.create_pool(dsn)
    monkeypatch.setenv("DATABASE_URL", "")
    with pytest.raises(ConfigurationError, match="DATABASE_URL"):
        chatdb.create_pool(dsn)


async def test_dsn_from_the_environment(monkeypatch, dsn):
    """Without a DSN, the pool uses DATABASE_URL."""
    monkeypatch.setenv("DATABASE_URL", dsn)

    async with chatdb.create_pool() as db:
        assert await chatdb.list_conversations(db, user_id="alice") == []


async def test_a_given_dsn_comes_first(monkeypatch, dsn):
    """With a DSN, DATABASE_URL is ignored."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://localhost/?no=such")

    async with chatdb.create_pool(dsn) as db:
        assert await chatdb.list_conversations(db, user_id="alice") == []


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
async def test_every_scheme_connects(dsn, scheme):
    """Each scheme connects, and the DSN's settings and options reach the server."""
    dsn = f"{scheme}://{dsn.partition('://')[2]}"
    options = "application_name=my%20app&options=-c%20geqo%3Doff&channel_binding=prefer&connect_timeout=30"

    async with chatdb.create_pool(f"{dsn}{'&' if '?' in dsn else '?'}{options}") as db:
        assert await db.fetchval("select current_setting('application_name')") == "my app"
        assert await db.fetchval("select current_setting('geqo')") == "off"


LIBPQ = {
    "postgresql://alice:pw@db.example.com/chat": {"sslmode": "verify-full", "sslrootcert": "system"},
    f"postgresql://alice:pw@{NEON}/chat?sslmode=require&channel_binding=require": {
        "sslmode": "verify-full",
        "sslrootcert": "system",
        "channel_binding": "require",
    },
    "postgresql://alice:pw@db.example.com/chat?sslrootcert={root}": {"sslmode": "verify-full", "sslrootcert": "{root}"},
    "postgresql://alice:pw@db.example.com/chat?sslmode=disable": {"sslmode": "disable"},
    "postgresql://alice:pw@localhost/chat": {"host": "localhost"},
    "postgresql+psycopg://alice:%23+%40@localhost/chat": {"password": "#+@"},
    "postgresql://alice:pw@/chat?host=/run/postgresql&port=5433": {"host": "/run/postgresql", "port": "5433"},
    "postgresql://alice:pw@%2Frun%2Fpostgresql/chat": {"host": "/run/postgresql"},
    "postgresql://localhost/chat?user=alice&password=a+b%20c": {"password": "a+b c"},
    "postgresql://alice:pw@localhost/chat?options=-c%20geqo%3Doff": {"options": "-c geqo=off"},
    "postgresql:///chat": {"dbname": "chat"},
    "postgresql:///chat?host=/run/postgresql": {"host": "/run/postgresql", "dbname": "chat"},
}
"""DSNs, each with parameters that libpq must read from the converted DSN."""


@pytest.mark.parametrize("dsn", LIBPQ)
@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_for_libpq(dsn, scheme, root):
    """The DSN for libpq's drivers is equivalent, and requires TLS where chatdb does."""
    given = libpq_dsn(dsn.format(root=root), scheme=scheme)

    found = psycopg.conninfo.conninfo_to_dict(given)

    expected = {name: value.format(root=root) for name, value in LIBPQ[dsn].items()}
    assert {name: found.get(name) for name in expected} == expected


def test_a_part_of_a_password_that_looks_like_an_option():
    """If a password contains an unencoded ? or &, no part of it is quoted as an unknown option."""
    with pytest.raises(ConfigurationError, match="percent-encode") as caught:
        connect_arguments("postgresql://alice@localhost/chat?password=p&s3cr3t-rest=1")
    assert "s3cr3t" not in str(caught.value)


def test_libpq_gets_the_whole_password():
    """Although libpq ends a password at its first @ or :, its drivers get the same password as asyncpg."""
    for dsn in ("postgresql://ann:a@b:c@localhost/chat", "postgresql://ann:a%40b%3Ac@localhost/chat"):
        assert connect_arguments(dsn)["password"] == "a@b:c"
        assert psycopg.conninfo.conninfo_to_dict(libpq_dsn(dsn, scheme="postgresql"))["password"] == "a@b:c"
