"""Answers of the servers that tests fetch adapters from."""

from __future__ import annotations

import contextlib


def reply(handler, status, body, headers=None):
    handler.send_response(status)
    for key, value in ({"Content-Length": str(len(body)), "Connection": "close"} | (headers or {})).items():
        handler.send_header(key, value)
    handler.end_headers()
    with contextlib.suppress(OSError):  # the client may have had enough
        handler.wfile.write(body)
    handler.close_connection = True
