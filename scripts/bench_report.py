"""What the benchmarks of the engine share: medians of pairs, facts of the machine, rows for the screen and for a file."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

UNSAID = ("peak_bytes", "passes")  # of a row's brief form


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and the order statistics that cover the true median with at least 95 %; the extremes when values are few."""
    ordered, n = sorted(values), len(values)
    low, tail = 0, 2.0**-n
    while low + 1 < n // 2 and tail + math.comb(n, low + 1) * 2.0**-n <= 0.025:
        low += 1
        tail += math.comb(n, low) * 2.0**-n
    return statistics.median(ordered), ordered[low], ordered[n - 1 - low]


def ratio_of(pairs: Sequence[tuple[float, float]], name: str) -> dict[str, float]:
    """Median of first / second over the pairs, with its interval, as fields of a row."""
    median, low, high = median_interval([first / second for first, second in pairs])
    return {f"{name}_ratio": median, f"{name}_low": low, f"{name}_high": high}


def gpu_facts() -> dict[str, Any]:
    """Name, driver and clocks of the GPU."""
    import torch

    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return {}
    query = "name,driver_version,clocks.sm,clocks.mem,power.draw"
    done = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True)
    return dict(zip(query.split(","), [part.strip() for part in done.stdout.splitlines()[0].split(",")], strict=False))


def stolen_s() -> float:
    """Seconds of all cores so far that the hypervisor gave to other machines (proc_stat(5)); 0 where it does not tell."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split() if Path("/proc/stat").exists() else []
    return int(fields[8]) / os.sysconf("SC_CLK_TCK") if len(fields) > 8 else 0.0


def commit() -> str:
    """Of these sources; the environment's COMMIT where they are a copy without their history."""
    done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    return os.environ.get("COMMIT") or done.stdout.strip()


def brief(row: dict[str, Any]) -> str:
    """A row on one short line: numbers with four digits, no lists."""
    parts = [str(row["row"])]
    for name, value in row.items():
        if name in ("row", *UNSAID) or value is None or isinstance(value, list | dict | tuple):
            continue
        parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return "  ".join(parts)


def report(rows: Iterable[dict[str, Any]], out: Path | None, *, is_brief: bool = False) -> None:
    """Print rows as they come, and append them to a file as JSON lines."""
    for row in rows:
        rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
        print(brief(rounded) if is_brief else json.dumps(rounded), flush=True)
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rounded) + "\n")
