"""
Spans and metrics of chatdb's calls for OpenTelemetry, by the semantic conventions for database clients.

Docs: docs/operations/telemetry.md
"""

from __future__ import annotations

from asyncio import get_running_loop
from collections.abc import Callable, Iterable
from time import time_ns
from typing import Final
from weakref import WeakKeyDictionary

from chatdb._core.calls import Guard
from chatdb.errors import ConfigurationError, InvalidInputError
from chatdb.pool import Pool
from chatdb.records import Call
from chatdb.replicas import ReplicaState

try:
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation, get_meter
    from opentelemetry.trace import SpanKind, Status, StatusCode, TracerProvider, get_tracer
except ImportError as error:
    raise ConfigurationError("OpenTelemetry is not installed: pip install 'chatdb[telemetry]'") from error

__all__ = ["instrument"]

_Attributes = dict[str, str | int]

_SCHEMA: Final = "https://opentelemetry.io/schemas/1.37.0"
"""The version of the semantic conventions."""

_SECONDS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)
"""Bounds of the durations' buckets, as the conventions say."""

_ROWS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
"""Bounds of the buckets for numbers of rows."""

_PORT: Final = 5432
"""The port that the conventions omit."""


def instrument(
    pool: Pool,
    *,
    name: str | None = None,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> None:
    """
    Report each call on a pool, and on the connections that it lends, as a span and in metrics.

    `name` is the pool's name in the metrics of its connections, by default `host:port/database`; give one if a process
    has several pools for a database. The providers default to the global ones.

    Raises InvalidInputError if `pool` is not chatdb's, and ConfigurationError if it is instrumented already.
    """
    if not isinstance(pool, Pool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidInputError("pool", "must be a pool of create_pool or open_embedded")
    if any(pool in each.pools for each in _all_metrics()):
        raise ConfigurationError("the pool is instrumented already: call instrument once for each pool")
    metrics = _metrics_of(meter_provider)
    server = _server_of(pool)
    metrics.pools[pool] = {"db.client.connection.pool.name": name or _name_of(pool)}
    pool.add_call_listener(_listener(metrics, server, metrics.pools[pool], tracer_provider))


def _listener(
    metrics: _Metrics, server: _Attributes, named: _Attributes, tracer_provider: TracerProvider | None
) -> Callable[[Call], None]:
    tracer = get_tracer("chatdb", tracer_provider=tracer_provider, schema_url=_SCHEMA)
    known: dict[str, tuple[str, _Attributes, _Attributes]] = {}
    guard = Guard()

    def listen(call: Call) -> None:
        # Recording takes as long as a tenth of a history, so it waits until the loop has nothing to resume.
        get_running_loop().call_soon(guard.call, record, call, time_ns())

    def record(call: Call, end: int) -> None:
        if call.statement not in known:
            measured: _Attributes = {**server, "db.operation.name": call.operation}
            known[call.statement] = (
                f"chatdb.{call.operation}",
                measured,
                {**measured, "db.query.summary": call.statement},
            )
        span_name, measured, spanned = known[call.statement]
        spanned = {**spanned, "db.response.returned_rows": call.rows}
        if call.error is not None:
            failed: _Attributes = {"error.type": call.error}
            if call.sqlstate is not None:
                failed["db.response.status_code"] = call.sqlstate
            measured, spanned = measured | failed, spanned | failed
        begin = end - int(call.duration * 1e9)
        span = tracer.start_span(span_name, kind=SpanKind.CLIENT, attributes=spanned, start_time=begin)
        if span.is_recording():
            if call.retries:
                span.set_attribute("chatdb.retries", call.retries)
            if call.wait:
                span.set_attribute("chatdb.wait", call.wait)
            if call.error is not None:
                span.set_status(Status(StatusCode.ERROR))
            span.end(end)
        metrics.duration.record(call.duration, measured)
        metrics.rows.record(call.rows, measured)
        if call.wait:
            metrics.wait.record(call.wait, named)
        if call.retries:
            metrics.retries.add(call.retries, measured)

    return listen


class _Metrics:
    """
    The metrics of one meter provider, and the pools that they measure.

    A provider takes only one callback for a metric, so the callbacks report all pools.
    """

    def __init__(self, provider: MeterProvider | None) -> None:
        self.pools: WeakKeyDictionary[Pool, _Attributes] = WeakKeyDictionary()
        meter = get_meter("chatdb", meter_provider=provider, schema_url=_SCHEMA)
        self.duration = meter.create_histogram(
            "db.client.operation.duration",
            "s",
            "Duration of database client operations.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self.rows = meter.create_histogram(
            "db.client.response.returned_rows",
            "{row}",
            "The actual number of records returned by the database operation.",
            explicit_bucket_boundaries_advisory=_ROWS,
        )
        self.wait = meter.create_histogram(
            "db.client.connection.wait_time",
            "s",
            "The time it took to obtain an open connection from the pool, if none was idle.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self.retries = meter.create_counter("chatdb.retries", "{retry}", "How often statements were sent again.")
        meter.create_observable_up_down_counter(
            "db.client.connection.count",
            [self._count],
            "{connection}",
            "The number of connections that are currently in state described by the state attribute.",
        )
        meter.create_observable_up_down_counter(
            "db.client.connection.max",
            [self._observing(Pool.get_max_size)],
            "{connection}",
            "The maximum number of open connections allowed.",
        )
        meter.create_observable_up_down_counter(
            "db.client.connection.pending_requests",
            [self._observing(Pool.get_waiting_count)],
            "{request}",
            "The number of current pending requests for an open connection.",
        )
        meter.create_observable_gauge(
            "chatdb.replica.lag", [self._lags], "s", "How far a replica is behind the primary, if that is known."
        )
        meter.create_observable_gauge(
            "chatdb.replica.in_use", [self._in_use], "1", "Whether a replica answers calls: 1 or 0."
        )
        meter.create_observable_counter(
            "chatdb.replica.calls", [self._replica_calls], "{call}", "The number of calls that were sent to a replica."
        )

    def _open_pools(self) -> list[tuple[Pool, _Attributes]]:
        return [(pool, named) for pool, named in list(self.pools.items()) if not pool.is_closing()]

    def _count(self, _options: CallbackOptions) -> Iterable[Observation]:
        for pool, named in self._open_pools():
            idle = pool.get_idle_size()
            yield Observation(idle, {**named, "db.client.connection.state": "idle"})
            yield Observation(pool.get_size() - idle, {**named, "db.client.connection.state": "used"})

    def _replicas(self) -> Iterable[tuple[ReplicaState, _Attributes]]:
        for pool, named in self._open_pools():
            for state in pool.replica_states():
                yield state, {**named, "chatdb.replica.server": state.server}

    def _lags(self, _options: CallbackOptions) -> Iterable[Observation]:
        return [Observation(state.lag, named) for state, named in self._replicas() if state.lag is not None]

    def _in_use(self, _options: CallbackOptions) -> Iterable[Observation]:
        for state, named in self._replicas():
            yield Observation(int(state.in_use), {**named, "chatdb.replica.role": state.role or "unknown"})

    def _replica_calls(self, _options: CallbackOptions) -> Iterable[Observation]:
        for state, named in self._replicas():
            yield Observation(state.answered, {**named, "chatdb.replica.outcome": "answered"})
            yield Observation(state.passed_on, {**named, "chatdb.replica.outcome": "passed on"})

    def _observing(self, measure: Callable[[Pool], int]) -> Callable[[CallbackOptions], Iterable[Observation]]:
        return lambda _options: [Observation(measure(pool), named) for pool, named in self._open_pools()]


_by_provider: Final[WeakKeyDictionary[MeterProvider, _Metrics]] = WeakKeyDictionary()
_of_the_global_provider: Final[list[_Metrics]] = []


def _all_metrics() -> list[_Metrics]:
    return [*_of_the_global_provider, *_by_provider.values()]


def _metrics_of(provider: MeterProvider | None) -> _Metrics:
    if provider is None:
        if not _of_the_global_provider:
            _of_the_global_provider.append(_Metrics(None))
        return _of_the_global_provider[0]
    if provider not in _by_provider:
        _by_provider[provider] = _Metrics(provider)
    return _by_provider[provider]


def _server_of(pool: Pool) -> _Attributes:
    attributes: _Attributes = {"db.system.name": "postgresql", "db.namespace": pool.database}
    if len(pool.hosts) == 1:
        [(host, port)] = pool.hosts
        attributes["server.address"] = host
        if port != _PORT:
            attributes["server.port"] = port
    return attributes


def _name_of(pool: Pool) -> str:
    return f"{','.join(f'{host}:{port}' for host, port in pool.hosts)}/{pool.database}"
