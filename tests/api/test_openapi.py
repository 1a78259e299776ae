"""The OpenAPI document against the router, and schemathesis against the running API."""

from __future__ import annotations

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from node.api.application import build_application
from node.api.generation import Limits
from node.api.openapi.document import build_document

load_all_checks()
CHECKS = (content_type_conformance, response_schema_conformance, status_code_conformance)
UNDESCRIBED = {"/openapi.json", "/api-doc/openapi.json", "/docs", "/live", "/ready"}  # the description, and probes without bodies


@pytest.fixture
async def document(client):
    answer = await client.get("/openapi.json")
    assert answer.status == 200
    return await answer.json()


@pytest.fixture
def described(live_url):
    return schemathesis.openapi.from_url(f"{live_url}/openapi.json")


async def test_document_describes_every_public_route_and_no_other(bench, document):
    routes = set()
    for route in build_application(bench.services).router.routes():
        if route.resource is not None and route.method != "HEAD" and route.resource.canonical not in UNDESCRIBED:
            routes.add((route.method.lower(), route.resource.canonical))

    described = {(method, path) for path, methods in document["paths"].items() for method in methods}
    assert described == routes


async def test_document_is_openapi_and_its_schemas_are_schemas(document):
    assert document["openapi"].startswith("3.1")
    for found in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(found)
    names = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(names) == len(set(names))


async def test_lorax_finds_the_document_where_it_had_it(client, document):
    assert await (await client.get("/api-doc/openapi.json")).json() == document


async def test_page_shows_every_route_without_scripts_or_foreign_addresses(client, document):
    answer = await client.get("/docs")
    page = await answer.text()

    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert "<script" not in page
    assert "http://" not in page
    assert "https://" not in page
    for path in document["paths"]:
        assert f"<code>{path}</code>" in page


PATHS = sorted(build_document(Limits(1000, 128, (2,), 8, 8, 20, 16, 8), "0")["paths"])


@pytest.mark.parametrize("path", PATHS)
def test_answers_are_as_the_document_says(described, path):
    """Schemathesis draws requests that the document allows; the answer's status, type and body must be described too."""
    for method in described[path]:
        operation = described[path][method]

        @given(case=operation.as_strategy())
        @settings(
            max_examples=12,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            derandomize=True,
            database=None,
        )
        def holds(case):
            case.call_and_validate(checks=CHECKS, timeout=30)

        holds()
