"""TLS to a PgBouncer with certificate chains created here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
import trustme

import chatdb
from chatdb import ConfigurationError
from chatdb._core.dsn import libpq_dsn
from tests.support.pgbouncer import pgbouncer

pytestmark = pytest.mark.server_independent


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Return the root authority."""
    return trustme.CA()


@contextmanager
def tls(server: str, folder: Path, certificate: trustme.LeafCert) -> Iterator[tuple[int, str]]:
    """Run a PgBouncer that requires TLS, and yield its port and database."""
    key, chain = folder / "server.key", folder / "server.crt"
    certificate.private_key_pem.write_to_path(key)
    key.chmod(0o600)
    for number, part in enumerate(certificate.cert_chain_pems):
        part.write_to_path(chain, append=number > 0)
    settings = {"client_tls_sslmode": "require", "client_tls_key_file": key, "client_tls_cert_file": chain}
    with pgbouncer(server, folder, mode="session", **settings) as dsn:
        parts = urlsplit(dsn)
        yield parts.port or 0, parts.path.removeprefix("/")


async def is_encrypted(dsn: str) -> bool:
    """Return whether both a service's connection and the operator driver's are encrypted."""
    async with chatdb.create_pool(dsn, statement_cache_size=0) as db, db.acquire() as connection:
        assert await connection.fetchval("select 1") == 1
        ours = connection._con._transport.get_extra_info("ssl_object") is not None
    with psycopg.connect(libpq_dsn(dsn, scheme="postgresql"), prepare_threshold=None) as connection:
        assert connection.execute("select 1").fetchone() == (1,)
        return ours and connection.pgconn.ssl_in_use


async def refusal(dsn: str) -> str:
    """Return a service's error, after checking that the operator driver fails too."""
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(libpq_dsn(dsn, scheme="postgresql"))
    with pytest.raises(ConfigurationError) as caught:
        async with chatdb.create_pool(dsn):
            pass
    return str(caught.value)


async def test_a_chain_of_certificates(dsn: str, tmp_path: Path, authority: trustme.CA) -> None:
    """An intermediate authority's certificate is accepted if the root is known; verify-full also checks the host."""
    root = tmp_path / "root.crt"
    authority.cert_pem.write_to_path(root)
    below = authority.create_child_ca()
    with tls(dsn, tmp_path, below.issue_cert("localhost")) as (port, database):
        path = f"{port}/{database}"
        for mode in ("verify-full", "verify-ca", "require"):
            assert await is_encrypted(f"postgresql://postgres@localhost:{path}?sslmode={mode}&sslrootcert={root}")
        assert await is_encrypted(f"postgresql://postgres@127.0.0.1:{path}?sslmode=verify-ca&sslrootcert={root}")
        wrong_name = f"postgresql://postgres@127.0.0.1:{path}?sslmode=verify-full&sslrootcert={root}"
        assert "SSLCertVerificationError" in await refusal(wrong_name)
        unknown = f"postgresql://postgres@localhost:{path}?sslmode=verify-full"
        assert "SSLCertVerificationError" in await refusal(unknown)


async def test_a_certificate_of_its_own(dsn: str, tmp_path: Path, authority: trustme.CA) -> None:
    """A certificate from an unknown authority is refused, although its name matches."""
    root = tmp_path / "root.crt"
    authority.cert_pem.write_to_path(root)
    with tls(dsn, tmp_path, trustme.CA().issue_cert("localhost")) as (port, database):
        for mode in ("verify-full", "verify-ca"):
            of_another = f"postgresql://postgres@localhost:{port}/{database}?sslmode={mode}&sslrootcert={root}"
            assert "SSLCertVerificationError" in await refusal(of_another)


async def test_without_tls(dsn: str, tmp_path: Path, authority: trustme.CA) -> None:
    """A server that requires TLS refuses a DSN with sslmode=disable."""
    with tls(dsn, tmp_path, authority.issue_cert("localhost")) as (port, database):
        await refusal(f"postgresql://postgres@localhost:{port}/{database}?sslmode=disable")
