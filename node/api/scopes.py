"""Which right opens which route. A route that is not named here is closed to every key: forgetting one must not open it."""

from __future__ import annotations

from node.tenancy.api_key import Scope

OPEN_PATHS = frozenset({"/health", "/ping", "/startup", "/live", "/ready"})  # load balancers' probes: they say nothing of anybody

_INFERENCE = frozenset({Scope.INFERENCE})
_READ = frozenset({Scope.ADAPTERS_READ, Scope.ADAPTERS_WRITE, Scope.INFERENCE})
_WRITE = frozenset({Scope.ADAPTERS_WRITE})
_METRICS = frozenset({Scope.METRICS})
_CLOSED = frozenset({Scope.ADMIN})

_BY_ROUTE = {
    ("POST", "/"): _INFERENCE,
    ("GET", "/"): _READ,
    ("POST", "/invocations"): _INFERENCE,
    ("POST", "/generate"): _INFERENCE,
    ("POST", "/generate_stream"): _INFERENCE,
    ("POST", "/tokenize"): _INFERENCE,
    ("POST", "/embed"): _INFERENCE,
    ("POST", "/classify"): _INFERENCE,
    ("POST", "/classify_batch"): _INFERENCE,
    ("POST", "/v1/chat/completions"): _INFERENCE,
    ("POST", "/v1/completions"): _INFERENCE,
    ("POST", "/v1/embeddings"): _INFERENCE,
    ("GET", "/v1/models"): _READ,
    ("GET", "/v1/models/{id}"): _READ,
    ("GET", "/v1/receipts/{id}"): _INFERENCE,
    ("GET", "/info"): _READ,
    ("GET", "/openapi.json"): _READ,
    ("GET", "/api-doc/openapi.json"): _READ,
    ("GET", "/docs"): _READ,
    ("GET", "/metrics"): _METRICS,
    ("POST", "/v1/load_lora_adapter"): _WRITE,
    ("POST", "/v1/unload_lora_adapter"): _WRITE,
    ("POST", "/load_lora_adapter"): _WRITE,
    ("POST", "/unload_lora_adapter"): _WRITE,
}


def scopes_of(method: str, route: str) -> frozenset[Scope]:
    """The scopes of which a key needs one.

    Args:
        route: The pattern of the matched route, such as "/v1/models/{id}".
    """
    return _BY_ROUTE.get(("GET" if method == "HEAD" else method, route), _CLOSED)
