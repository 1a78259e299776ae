"""The process that judges grammars: `python -m node.api.grammar_worker TOKENIZER VOCAB_SIZE END_IDS MEMORY_BYTES`.

A client's grammar is compiled here first, under a memory limit and a clock that ends the process, so that neither the API process
nor the engine ever meets one that hangs, fills the memory or crashes its compiler. One JSON line in, one out.
"""

from __future__ import annotations

import resource
import sys
import threading
from pathlib import Path
from typing import IO

import msgspec

from node.engine.grammar import Vocabulary
from node.errors import GrammarError

_STACK_BYTES = 2 << 20


class Verdict(msgspec.Struct, frozen=True):
    """What became of one grammar; both None when it can be used."""

    code: str | None = None
    message: str | None = None


def judge(vocabulary: Vocabulary, text: str) -> Verdict:
    """Compile a grammar and throw it away."""
    try:
        vocabulary.compile(text)
    except GrammarError as error:
        return Verdict(error.error_code, error.message)
    except (RuntimeError, ValueError, MemoryError):
        return Verdict("schema_too_complex", "the grammar is too complex: it could not be compiled; simplify it")
    return Verdict()


def serve(vocabulary: Vocabulary, requests: IO[bytes], answers: IO[bytes]) -> None:
    """Judge until the input ends."""
    for line in requests:
        answers.write(msgspec.json.encode(judge(vocabulary, msgspec.json.decode(line, type=str))) + b"\n")
        answers.flush()


def main(arguments: list[str]) -> int:
    """Open the vocabulary, say so with an empty verdict, serve."""
    path, vocab_size, end_ids, memory_bytes = arguments
    limit = int(memory_bytes)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    vocabulary = Vocabulary(Path(path), int(vocab_size), [int(part) for part in end_ids.split(",") if part])
    sys.stdout.buffer.write(msgspec.json.encode(Verdict()) + b"\n")
    sys.stdout.buffer.flush()
    # The compiler recurses. On a quarter of the stack that the engine's threads have, what passes here cannot overflow it there.
    threading.stack_size(_STACK_BYTES)
    worker = threading.Thread(target=serve, args=(vocabulary, sys.stdin.buffer, sys.stdout.buffer))
    worker.start()
    worker.join()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
