"""Requests that schemathesis generates from the service's OpenAPI get only documented answers."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import integers
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.service import Service, exchange, token

ENDLESS = "/api/conversations/{id}/events"
CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
EXAMPLES = 12
"""Requests per operation."""


async def test_generated_requests(service: Service) -> None:
    """On every route but the endless one, generated requests get no 5xx, and only documented ones."""
    bearer = {"Authorization": f"Bearer {token(f'user-{uuid4()}')}"}
    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    operations = [each.ok() for each in schema.exclude(path=ENDLESS).get_all_operations()]
    assert len(operations) >= 16
    statuses: dict[str, set[int]] = {}
    async with service.client(bearer["Authorization"].removeprefix("Bearer ")) as client:
        for operation in operations:
            conversation = await exchange(client)  # the operation before may have deleted it
            run(operation, conversation, bearer, statuses)
    assert {status for found in statuses.values() for status in found} >= {200, 201, 202, 404, 422}
    assert [label for label, found in statuses.items() if min(found) >= 400] == []


def run(operation: Any, conversation: int, headers: dict[str, str], statuses: dict[str, set[int]]) -> None:
    """Send generated requests of one operation, most of them to a conversation and a message that exist."""
    found = statuses.setdefault(operation.label, set())

    @seed(21)
    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE), missing=integers(0, 3))
    def send(case: Any, missing: int) -> None:
        known = {"id": conversation, "seq": 1, "parent_seq": 1} if missing else {}
        for place in (case.path_parameters, case.body):
            if isinstance(place, dict):
                place.update({name: value for name, value in known.items() if name in place})
        response = case.call_and_validate(headers=headers, checks=CHECKS, timeout=20)
        found.add(response.status_code)

    send()
