"""The Prometheus recipe and the dashboard, against what real exporters serve; and a collector that is away."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.parser import text_string_to_metric_families

import chatdb
from chatdb.telemetry import instrument
from tests.support.pages import python_blocks
from tests.support.paths import ROOT
from tests.support.pools import kill_sessions
from tests.support.service import free_port

DASHBOARD = json.loads((ROOT / "examples" / "telemetry" / "dashboard.json").read_text(encoding="utf-8"))
KEYWORDS = {"by", "histogram_quantile", "le", "rate", "sum", "label_values"}
ALICE: dict[str, Any] = {"user_id": "alice", "conversation_key": "thread"}


def expressions() -> list[str]:
    """Return the queries of the dashboard."""
    targets = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return targets + [each["query"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query"]


async def use(pool: chatdb.Pool, dsn: str) -> None:
    """Make calls that fill every metric: rows, an error, a retry and a wait."""
    await chatdb.create_conversation(pool, user_id="alice", key="thread")
    await chatdb.append_message(pool, **ALICE, role="user", content="hello", key="1")
    with pytest.raises(chatdb.ConflictError):
        await chatdb.append_message(pool, **ALICE, role="user", content="other", key="1")
    kill_sessions(dsn)
    await chatdb.get_history(pool, **ALICE)
    await asyncio.sleep(0)


def by_recipe(pool: chatdb.Pool, registry: CollectorRegistry) -> Callable[[], object]:
    """Measure a pool as docs/operations/telemetry.md says."""
    [block] = (block for block in python_blocks("operations/telemetry.md") if "class PoolMetrics" in block)
    scope: dict[str, Any] = {"chatdb": chatdb}
    exec(block, scope)
    scope["PoolMetrics"](pool, "main", registry)
    return lambda: None


def by_opentelemetry(pool: chatdb.Pool, registry: CollectorRegistry) -> Callable[[], object]:
    """Measure a pool with OpenTelemetry's exporter."""
    meters = MeterProvider([PrometheusMetricReader(registry=registry)])
    instrument(pool, name="main", meter_provider=meters)
    return meters.shutdown


@pytest.mark.parametrize("measure", [by_recipe, by_opentelemetry])
async def test_the_dashboard(dsn: str, measure: Callable[..., Callable[[], object]]) -> None:
    """Each metric of the dashboard, with each label, is in what the exporter serves over HTTP."""
    registry = CollectorRegistry()
    async with chatdb.create_pool(dsn) as pool:
        close = measure(pool, registry)
        await use(pool, dsn)
        server, thread = start_http_server(0, "127.0.0.1", registry)
        try:
            async with httpx.AsyncClient() as client:
                served = await client.get(f"http://127.0.0.1:{server.server_port}/metrics")
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
            close()
    assert not re.search("alice|thread|hello", served.text)
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(served.text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    assert len(expressions()) > 8
    for expression in expressions():
        words = set(re.findall(r"\b[a-z_]+\b", re.sub(r'"[^"]*"|\[[^\]]*\]|\d\.\d+', "", expression))) - KEYWORDS
        metrics = {word for word in words if word in labels}
        known = set().union(*(labels[metric] for metric in metrics))
        assert metrics, expression
        assert words - metrics <= known, (expression, words - metrics - known)
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= set(re.findall(r"\w+", target["expr"]))


async def test_a_collector_that_is_away(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    """If nobody listens on the collector's port, calls succeed as fast as before, and only the SDK logs it."""
    away = f"http://127.0.0.1:{free_port()}"
    tracers = TracerProvider()
    tracers.add_span_processor(
        BatchSpanProcessor(OTLPSpanExporter(f"{away}/v1/traces", timeout=1), schedule_delay_millis=50)
    )
    reader = PeriodicExportingMetricReader(
        OTLPMetricExporter(f"{away}/v1/metrics", timeout=1), export_interval_millis=50
    )
    meters = MeterProvider([reader])
    async with chatdb.create_pool(dsn) as pool, chatdb.create_pool(dsn) as plain:
        instrument(pool, tracer_provider=tracers, meter_provider=meters)
        await chatdb.create_conversation(pool, user_id="alice", key="thread")
        worst = {}
        with caplog.at_level(logging.WARNING):
            for db in (pool, plain):
                end, times = time.monotonic() + 1.5, []
                while time.monotonic() < end:
                    begin = time.perf_counter()
                    assert await chatdb.get_history(db, **ALICE) == []
                    times.append(time.perf_counter() - begin)
                    await asyncio.sleep(0.001)
                worst[db] = sorted(times)[len(times) * 9 // 10]
        assert worst[pool] < max(4 * worst[plain], 0.05)
    tracers.shutdown()
    meters.shutdown()
    failed = [record for record in caplog.records if record.name.startswith("opentelemetry")]
    assert failed, "the exporter did not try"
    said = [record.msg for record in caplog.records if record.name == "chatdb"]
    assert [each for each in said if "a listener of calls took" not in each] == []  # on a busy machine
