"""The document as a page to read: no script, nothing fetched from elsewhere."""

from __future__ import annotations

import json
from typing import Any

from jinja2 import Environment

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ info.title }} {{ info.version }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { margin-bottom: 0; }
details { border: 1px solid #d0d7de; border-radius: 6px; margin: .5rem 0; padding: .4rem .8rem; }
summary { cursor: pointer; }
code, pre { font: 14px/1.45 ui-monospace, monospace; }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; border-radius: 6px; }
.method { display: inline-block; width: 4.5rem; font-weight: 600; color: #0550ae; }
td { padding: .1rem .8rem .1rem 0; vertical-align: top; }
@media (prefers-color-scheme: dark) {
  body { background: #0d1117; color: #e6edf3; }
  details { border-color: #30363d; }
  pre { background: #161b22; }
  .method { color: #79c0ff; }
}
</style>
</head>
<body>
<h1>{{ info.title }} {{ info.version }}</h1>
<p>{{ info.summary }} The same for programs: <a href="/openapi.json">/openapi.json</a> (OpenAPI {{ openapi }}).</p>
<h2>Routes</h2>
{% for path, methods in paths.items() %}{% for method, operation in methods.items() %}
<details id="{{ operation.operationId }}">
<summary><span class="method">{{ method | upper }}</span> <code>{{ path }}</code> {{ operation.summary }}</summary>
{% if operation.requestBody %}<p>Takes <a href="#{{ operation | body }}">{{ operation | body }}</a>.</p>{% endif %}
<table>{% for status, answer in operation.responses.items() %}
<tr><td>{{ status }}</td><td>{{ answer.description }}
{% for kind, content in (answer.content or {}).items() %}<br><code>{{ kind }}</code>
{% if content.schema["$ref"] %}<a href="#{{ content.schema | name }}">{{ content.schema | name }}</a>{% endif %}{% endfor %}
</td></tr>{% endfor %}</table>
</details>
{% endfor %}{% endfor %}
<h2>Shapes</h2>
{% for name, schema in components.schemas.items() %}
<details id="{{ name }}">
<summary><code>{{ name }}</code> {{ schema.description }}</summary>
<pre>{{ schema | pretty }}</pre>
</details>
{% endfor %}
</body>
</html>
"""


def render_page(document: dict[str, Any]) -> str:
    """The page as HTML, everything in it escaped."""
    environment = Environment(autoescape=True)
    environment.filters["name"] = _name
    environment.filters["body"] = lambda operation: _name(operation["requestBody"]["content"]["application/json"]["schema"])
    environment.filters["pretty"] = lambda schema: json.dumps(schema, indent=2)
    return environment.from_string(_PAGE).render(document)


def _name(schema: dict[str, Any]) -> str:
    return str(schema.get("$ref", "")).rpartition("/")[2]
