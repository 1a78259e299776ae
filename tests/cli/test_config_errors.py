"""Mistakes in configuration and on the command line: one line that names the setting and the remedy, and a stable exit code."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

COMMAND = str(Path(sys.executable).parent / "openlora-node")
CONFIGURATION, PERMISSION, TEMPORARY, CANNOT_CREATE, UNAVAILABLE, NO_INPUT, BAD_DATA = 78, 77, 75, 73, 69, 66, 65
KEYS = "tester 0123456789abcdef0123456789abcdef\n"
# No chain: a mistake must not need one to be found.
QUICK = {"OPENLORA_CHAIN__PROFILE": "none", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def run(tmp_path: Path, data_dir: Path) -> Run:
    """`openlora-node start` with a configuration text and options; it must end by itself."""

    def call(toml: str = "", *options: str, command: str = "start", **extra: str) -> subprocess.CompletedProcess[str]:
        config = tmp_path / "node.toml"
        config.write_text(toml)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("OPENLORA_")}
        arguments = [COMMAND, command, "--config", str(config), "--data-dir", str(data_dir), *options]
        env = {**inherited, **QUICK, **extra}
        return subprocess.run(arguments, capture_output=True, text=True, timeout=200, check=False, env=env, cwd=tmp_path)

    return call


def _refused(done: subprocess.CompletedProcess[str], status: int, *parts: str) -> None:
    """It ended with that status, and said everything in one line without a traceback."""
    assert done.returncode == status, done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert "serves at" not in done.stdout


SETTINGS = {
    "unknown key": ("[server]\nprot = 9000\n", ["unknown setting server.prot", "did you mean server.port?"]),
    "unknown section": ("[sevrer]\nport = 9000\n", ["unknown setting sevrer", "did you mean server?"]),
    "port too large": ("[server]\nport = 70000\n", ["server.port", "65535", "70000"]),
    "port negative": ("[server]\nport = -1\n", ["server.port", "-1"]),
    "port a word": ('[server]\nport = "http"\n', ["server.port", "'http'"]),
    "size with an unknown unit": ('[engine]\nkv_cache_bytes = "10GBB"\n', ["engine.kv_cache_bytes", "10GBB", "GiB"]),
    "size negative": ("[engine]\nkv_cache_bytes = -5\n", ["engine.kv_cache_bytes", "-5"]),
    "size negative with a unit": ('[adapters]\nmemory_bytes = "-1MiB"\n', ["adapters.memory_bytes", "-1MiB"]),
    "size a fraction": ('[server]\nmax_body_bytes = "1.5MiB"\n', ["server.max_body_bytes", "1.5MiB"]),
    "shares do not add up": ("[split]\nnode_ppm = 1\n", ["split", "1,000,000"]),
    "unknown word": ('[model]\ndtype = "int4"\n', ["model.dtype", "bfloat16"]),
    "not TOML": ("[server\n", ["is not valid TOML"]),
    "address too short": ('[chain]\nescrow_address = "0x12"\n', ["chain.escrow_address", "0x12"]),
    "chain without endpoint": ('[chain]\nprofile = "custom"\n', ["chain.rpc_url", "chain.chain_id"]),
    "ledger is no URL": ('[ledger]\nurl = "somewhere"\n', ["ledger.url", "sqlite:///"]),
    "other hosts without keys": ('[server]\nhost = "0.0.0.0"\n', ["server.host 0.0.0.0", "server.api_keys_file", "--insecure"]),
    "keys file missing": ('[server]\napi_keys_file = "/nonexistent/keys"\n', ["/nonexistent/keys"]),
}


@pytest.mark.parametrize("mistake", SETTINGS)
def test_mistake_in_the_file_ends_with_78_and_names_the_setting(run: Run, data_dir: Path, mistake: str) -> None:
    toml, parts = SETTINGS[mistake]
    extra = {"OPENLORA_CHAIN__PROFILE": "custom"} if mistake == "chain without endpoint" else {}
    _refused(run(toml, **extra), CONFIGURATION, "error [", *parts)
    if not toml.startswith(("[ledger]", "[chain]")):
        assert not data_dir.exists(), "nothing is made before the settings are known to be right"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--port", "70000"), ["server.port", "65535"]),
        (("--host", "0.0.0.0"), ["server.host 0.0.0.0", "--insecure"]),
        (("--config", "/nonexistent.toml"), ["/nonexistent.toml", "does not exist"]),
    ],
)
def test_mistake_on_the_command_line_ends_with_78(run: Run, options: tuple[str, ...], parts: list[str]) -> None:
    _refused(run("", *options), CONFIGURATION, *parts)


def test_mistyped_variable_ends_with_78_and_names_the_nearest(run: Run) -> None:
    _refused(run("", OPENLORA_SERVER__PROT="9000"), CONFIGURATION, "OPENLORA_SERVER__PROT", "OPENLORA_SERVER__PORT")


def test_variable_beats_the_file_and_is_checked_like_it(run: Run) -> None:
    _refused(run("[server]\nport = 9000\n", OPENLORA_SERVER__PORT="70000"), CONFIGURATION, "server.port", "70000")


def test_keys_file_that_others_can_read_ends_with_77_and_its_remedy(run: Run, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    keys.chmod(0o644)
    done = run(f'[server]\nhost = "0.0.0.0"\napi_keys_file = "{keys}"\n')
    _refused(done, PERMISSION, "secret_permissions", "0644", f"{keys}")
    assert KEYS.split()[1] not in done.stderr + done.stdout


@pytest.mark.parametrize("name", ["password", "operator.json"])
def test_key_that_others_can_read_ends_with_77(run: Run, data_dir: Path, name: str) -> None:
    stops_after_the_keys = '[ledger]\nurl = "somewhere"\n'
    _refused(run(stops_after_the_keys), CONFIGURATION, "ledger_url")
    (data_dir / "keys" / name).chmod(0o644)
    _refused(run(stops_after_the_keys), PERMISSION, "keystore_permissions", name)


def test_port_in_use_ends_with_69_and_says_which(run: Run, tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        model = _tiny_model(tmp_path / "tiny")
        done = run(f'[server]\nport = {port}\n[model]\npath = "{model}"\n')
    _refused(done, UNAVAILABLE, "port_in_use", str(port), "--port")


def test_base_model_that_is_missing_ends_with_66(run: Run, tmp_path: Path) -> None:
    _refused(run("", "--model", str(tmp_path / "nowhere")), NO_INPUT, "model_not_found_on_disk", str(tmp_path / "nowhere"))


def test_base_model_of_another_architecture_ends_with_65_and_names_it(run: Run, tmp_path: Path) -> None:
    model = _tiny_model(tmp_path / "tiny", model_type="mamba")
    _refused(run("", "--model", str(model)), BAD_DATA, "model_unsupported", "mamba", "llama")


def test_base_model_cut_short_ends_with_65_and_names_file_and_bytes(run: Run, tmp_path: Path) -> None:
    shard = _tiny_model(tmp_path / "tiny") / "model.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - 100)
    _refused(run("", "--model", str(shard.parent)), BAD_DATA, "model_corrupt", str(shard), f"{size - 100}", f"{size}")


def test_offline_and_not_in_the_cache_ends_with_66(run: Run, tmp_path: Path) -> None:
    done = run("", "--model", "nobody/no-such-model", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    _refused(done, NO_INPUT, "nobody/no-such-model", "not cached", "HF_HUB_OFFLINE")


def test_ledger_path_that_is_a_directory_ends_with_73(run: Run, data_dir: Path) -> None:
    (data_dir / "ledger.sqlite").mkdir(parents=True)
    _refused(run(), CANNOT_CREATE, "ledger_path", str(data_dir / "ledger.sqlite"), "directory")
    assert (data_dir / "ledger.sqlite").is_dir(), "never deleted"


def test_ledger_of_a_newer_node_ends_with_78_and_is_left_alone(run: Run, data_dir: Path) -> None:
    data_dir.mkdir()
    with sqlite3.connect(data_dir / "ledger.sqlite") as database:
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        database.execute("INSERT INTO alembic_version VALUES ('r9999_future')")
    database.close()
    _refused(run(), CONFIGURATION, "ledger_schema_newer", "r9999_future")
    with sqlite3.connect(data_dir / "ledger.sqlite") as database:
        assert database.execute("SELECT version_num FROM alembic_version").fetchall() == [("r9999_future",)]


def test_ledger_that_is_no_database_ends_with_65_and_is_left_alone(run: Run, data_dir: Path) -> None:
    data_dir.mkdir()
    (data_dir / "ledger.sqlite").write_bytes(b"not a database" * 1000)
    _refused(run(), BAD_DATA, "ledger_corrupt", "ledger.sqlite")
    assert (data_dir / "ledger.sqlite").read_bytes() == b"not a database" * 1000


def test_receipt_file_that_is_missing_ends_with_66() -> None:
    done = subprocess.run(
        [COMMAND, "receipts", "verify", "/nonexistent.json"], capture_output=True, text=True, timeout=100, check=False
    )
    _refused(done, NO_INPUT, "/nonexistent.json")


def test_doctor_reports_what_start_would_refuse(run: Run, tmp_path: Path) -> None:
    done = run('[model]\npath = "/nonexistent"\n', "--json", command="doctor")
    assert done.returncode == 2
    findings = {item["subject"]: item for item in json.loads(done.stdout)}
    assert (findings["model"]["state"], findings["model"]["remedy"]) == ("fail", "set model.path")
    assert findings["python"]["state"] == "ok"


def _tiny_model(directory: Path, model_type: str = "llama") -> Path:
    """A small complete checkpoint in HF's layout, written by hand: zeros in every tensor and a byte-level tokenizer."""
    directory.mkdir()
    hidden, inter, vocab, heads = 16, 24, 258, 2
    config = {
        "model_type": model_type,
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "eos_token_id": 257,
    }
    (directory / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0."
    shapes = {"model.embed_tokens.weight": [vocab, hidden], "model.norm.weight": [hidden]}
    shapes |= {layer + f"self_attn.{name}_proj.weight": [hidden, hidden] for name in "qkvo"}
    shapes |= {layer + f"mlp.{name}_proj.weight": [inter, hidden] for name in ("gate", "up")}
    shapes |= {layer + "mlp.down_proj.weight": [hidden, inter]}
    shapes |= {layer + f"{name}_layernorm.weight": [hidden] for name in ("input", "post_attention")}
    _write_zeros(directory / "model.safetensors", shapes)
    _write_tokenizer(directory / "tokenizer.json")
    return directory


def _write_zeros(file: Path, shapes: dict[str, list[int]]) -> None:
    header, end = {}, 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def _write_tokenizer(file: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(file))
