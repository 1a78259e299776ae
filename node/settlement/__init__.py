"""What was served becomes what is paid."""

import sys

_recursion_limit = sys.getrecursionlimit()

import py_ecc  # noqa: E402,F401

# py_ecc, which eth_account imports, raises the limit to 100,000; deeply nested JSON from anybody would then overflow the C stack.
sys.setrecursionlimit(_recursion_limit)
