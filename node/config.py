"""Every setting of the node, its unit, range and default. `config/node.toml` explains each key; a test keeps the two equal.

Order, strongest first: command line, `OPENLORA_` variables (`OPENLORA_SERVER__PORT=9000`), the TOML file, these defaults.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import stat
import tempfile
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from node.errors import ConfigError

LEDGER_NAME = "ledger.sqlite"  # in the data directory, where ledger.url names no other place
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})

_PASSWORD_IN_URL = re.compile(r"[a-z0-9+.-]+://[^/@\s]*:[^/@\s]+@", re.IGNORECASE)
_SIZE_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def parse_size(value: Any) -> Any:
    """Accept 1048576 or "1MiB"; leave anything else to pydantic, whose error names the field."""
    if not isinstance(value, str):
        return value
    if value.strip().isdigit():  # an environment variable is always text
        return int(value)
    for unit in ("KiB", "MiB", "GiB", "B"):
        number = value.removesuffix(unit).strip()
        if value.endswith(unit) and number.isdigit():
            return int(number) * _SIZE_UNITS[unit]
    raise ValueError(f'{value!r} is not a size; write whole bytes or a number with B, KiB, MiB or GiB, such as "512MiB"')


Bytes = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]
Ppm = Annotated[int, Field(ge=0, le=1_000_000)]


def _spell_address(value: str) -> str:
    """EIP-55 spelling, so that one account has one spelling in records, trees and comparisons."""
    # Imported late: it takes longer than everything else here, and the engine's process knows no accounts.
    from eth_utils.address import is_checksum_formatted_address, to_checksum_address

    spelled = str(to_checksum_address(value))
    if is_checksum_formatted_address(value) and value != spelled:
        raise ValueError(f"the checksum of {value} is wrong; check for a typing error, or write it in lower case")
    return spelled


Address = Annotated[str, Field(pattern=r"^0x[0-9a-fA-F]{40}$"), AfterValidator(_spell_address)]


# As browsers spell it: a scheme, a host in lower case, a port that is not the scheme's own.
Origin = Annotated[str, Field(pattern=r"^(\*|https?://[a-z0-9.\[\]:-]{1,255})$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerSettings(_Section):
    """Where the node listens and what it refuses at the door."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080  # 0: any free port, printed at start
    api_keys_file: Path | None = None  # one "name key" pair a line; mode 0600
    insecure: bool = False  # serve other hosts than loopback without API keys
    cors_origins: tuple[Origin, ...] = ()  # web pages that may read answers: "https://app.example", or "*" for all
    admin_port: Annotated[int, Field(ge=0, le=65535)] | None = None  # the operator's commands over HTTP, on 127.0.0.1 alone
    max_body_bytes: Bytes = 4 << 20
    max_concurrent_requests: Annotated[int, Field(ge=1)] = 256
    max_choices: Annotated[int, Field(ge=1, le=128)] = 8
    max_stop_sequences: Annotated[int, Field(ge=1)] = 8
    max_logprobs: Annotated[int, Field(ge=0, le=100)] = 20
    default_max_tokens: Annotated[int, Field(ge=1)] = 256
    body_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    write_timeout_s: Annotated[float, Field(gt=0)] = 30.0  # how long a stream's reader may take nothing
    keep_alive_s: Annotated[float, Field(gt=0)] = 15.0  # a stream with nothing to send sends a comment this often
    idle_timeout_s: Annotated[float, Field(gt=0)] = 120.0  # of a connection without a request
    max_connections_per_address: Annotated[int, Field(ge=1)] = 512
    idempotency_s: Annotated[float, Field(gt=0)] = 3600.0  # how long an answer to an Idempotency-Key is kept
    idempotency_bytes: Bytes = 32 << 20  # of all answers kept for their keys
    drain_timeout_s: Annotated[float, Field(ge=0)] = 30.0
    grammar_timeout_s: Annotated[float, Field(gt=0)] = 1.0  # to compile a schema, pattern or grammar
    grammar_memory_bytes: Bytes = 1 << 30  # address space of the process that compiles them


class ModelSettings(_Section):
    """The base model."""

    path: str = "smollm2-135m-instruct"  # the packaged model, a directory, a .gguf file or a hub id
    revision: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: an NVIDIA GPU (sm_80 or newer) where there is one
    max_model_len: Annotated[int, Field(ge=16)] | None = None  # None: what the model was trained for, at most 8192


class EngineSettings(_Section):
    """The engine process. What is None depends on the device: `node.engine.sizing` derives it, here and nowhere else."""

    threads: Annotated[int, Field(ge=0)] = 0  # 0: one for each core
    kernels: Literal["auto", "cpp", "reference"] = "auto"
    attention: Literal["auto", "native", "fa3", "fa2", "varlen", "triton"] = "auto"  # on a GPU
    deterministic: bool = False
    kv_cache_bytes: Bytes | None = None
    kv_block_size: Annotated[int, Field(ge=4, le=256)] | None = None
    movable_border: bool = False  # on a GPU, between KV blocks and adapter pages
    max_sequences: Annotated[int, Field(ge=1)] | None = None  # running together
    max_batch_tokens: Annotated[int, Field(ge=16)] | None = None  # rows in one step: the prefill chunk that others wait for
    queue_limit: Annotated[int, Field(ge=1)] = 1024  # sequences waiting
    prefix_cache: bool = True
    start_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    stall_timeout_s: Annotated[float, Field(gt=0)] = 60.0


class StoreSettings(_Section):
    """A place outside the hub that clients may name adapters in, with the operator's own endpoint and credentials."""

    url: str  # "s3://bucket/prefix", "gs://bucket", "az://container", "https://host/path"
    options: dict[str, str] = {}  # obstore's names: region, endpoint, allow_http, ...; credentials come from the environment
    allow_private: bool = False  # a web server whose address is not on the public internet, or without TLS
    tenants: tuple[str, ...] = ()  # for whom the adapters below it exist; nobody named: for everybody


class AdapterSettings(_Section):
    """Where adapters come from and how much memory they may take."""

    directory: Path | None = None  # every sub-directory with an adapter_config.json is served; None: the demo adapters
    roots: tuple[Path, ...] = ()  # further directories that `adapter_source: local` may name
    allow_hub: bool = True
    default_source: Literal["hub", "s3", "gcs", "azure", "http", "pbase"] = "hub"  # of names no local directory has
    stores: tuple[StoreSettings, ...] = ()
    pbase_url: str | None = None  # an endpoint that answers as Predibase's does; None: source pbase is not offered
    pbase_store: str | None = None  # the store its adapter paths lie in, below one of `stores`
    cache_dir: Path | None = None  # None: <data_dir>/adapters
    cache_bytes: Bytes = 20 << 30
    fetch_workers: Annotated[int, Field(ge=1, le=256)] = 16
    fetch_queue_limit: Annotated[int, Field(ge=1)] = 64
    memory_bytes: Bytes | None = None  # None: see node.engine.sizing
    host_memory_bytes: Bytes | None = None  # page-locked, before a GPU's; None: see node.adapters.memory
    page_rank: Annotated[int, Field(ge=1, le=64)] | None = None  # None: see node.engine.sizing
    max_rank: Annotated[int, Field(ge=1, le=256)] = 256
    max_adapter_bytes: Bytes = 2 << 30
    max_terms: Annotated[int, Field(ge=1, le=64)] = 8  # adapters in one request
    merge_memory_bytes: Bytes = 4 << 30  # of the process that makes a derived adapter
    merge_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    fetch_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    negative_cache_s: Annotated[float, Field(ge=0)] = 60.0
    private_recheck_s: Annotated[float, Field(ge=0)] = 0.0  # 0: a private adapter's source is asked on every request


Limit = Annotated[int, Field(ge=1)] | None


class TenantSettings(_Section):
    """What a tenant may use that has no limit of its own. None: no limit."""

    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None
    max_concurrent: Limit = None
    tokens_per_day: Limit = None
    tokens_per_month: Limit = None
    wei_per_day: Limit = None
    wei_per_month: Limit = None


class PricingSettings(_Section):
    """What a request costs, in wei of the payment token."""

    input_token_wei: Annotated[int, Field(ge=0)] = 1_000_000_000
    output_token_wei: Annotated[int, Field(ge=0)] = 3_000_000_000
    require_payment: bool = False  # refuse requests without a voucher (402)


class SplitSettings(_Section):
    """How a fee is shared, in parts per million. A request without an adapter pays the node alone."""

    node_ppm: Ppm = 500_000
    trainer_ppm: Ppm = 200_000
    data_ppm: Ppm = 300_000

    @model_validator(mode="after")
    def _sums_to_one(self) -> SplitSettings:
        total = self.node_ppm + self.trainer_ppm + self.data_ppm
        if total != 1_000_000:
            raise ValueError(f"node_ppm + trainer_ppm + data_ppm is {total}; the shares must add up to 1,000,000")
        return self


class LedgerSettings(_Section):
    """The local ledger."""

    url: str | None = None  # None: SQLite in <data_dir>/ledger.sqlite
    group_commit_ms: Annotated[float, Field(ge=0, le=1000)] = 2.0


class ChainSettings(_Section):
    """The EVM chain that rewards are settled on."""

    profile: Literal["embedded", "anvil", "openledger-testnet", "openledger", "custom", "none"] = "embedded"
    rpc_url: str | None = None
    chain_id: int | None = None
    escrow_address: Address | None = None
    rewards_address: Address | None = None
    registry_address: Address | None = None
    token_address: Address | None = None
    challenge_delay_s: Annotated[int, Field(ge=1)] = 5  # deployment argument of the embedded profile
    epoch_s: Annotated[float, Field(ge=0)] = 0.0  # 0: only `openlora-node epochs close` closes an epoch
    confirmations: Annotated[int, Field(ge=0)] = 1
    rpc_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    reserve_address: Address | None = None  # shares of adapters without a manifest; None: the operator's payout address


class TelemetrySettings(_Section):
    """Logs and metrics."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "console"] = "auto"


def default_data_dir() -> Path:
    """$XDG_DATA_HOME/openlora, else ~/.local/share/openlora."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "openlora"


class Settings(BaseSettings):
    """All sections together. Build it with `load_settings`, which turns every mistake into a ConfigError."""

    model_config = SettingsConfigDict(
        env_prefix="OPENLORA_", env_nested_delimiter="__", extra="forbid", frozen=True, nested_model_default_partial_update=True
    )

    data_dir: Path = Field(default_factory=default_data_dir)
    server: ServerSettings = ServerSettings()
    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    adapters: AdapterSettings = AdapterSettings()
    tenants: TenantSettings = TenantSettings()
    pricing: PricingSettings = PricingSettings()
    split: SplitSettings = SplitSettings()
    ledger: LedgerSettings = LedgerSettings()
    chain: ChainSettings = ChainSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment over what `load_settings` read from the file; the command line is applied last, by `load_settings`."""
        return env_settings, init_settings


def load_settings(config_file: Path | None = None, overrides: dict[str, Any] | None = None) -> Settings:
    """Read the settings.

    Args:
        config_file: A TOML file, or None for defaults and environment only.
        overrides: Values from the command line, by dotted key ("server.port"), strongest of all.

    Raises:
        ConfigError: Unknown key (the nearest known one is named), wrong type, out of range, unreadable file.
    """
    values = _read_toml(config_file) if config_file is not None else {}
    _refuse_unknown(values, Settings, str(config_file))
    _refuse_unknown_environment()
    try:
        settings = Settings(**values)
        for key, value in (overrides or {}).items():
            settings = _with_override(settings, key, value)
    except ValidationError as error:
        raise ConfigError(_describe(error)) from error
    return settings


def _with_override(settings: Settings, key: str, value: Any) -> Settings:
    """Return `settings` with one dotted key replaced and its section validated again."""
    head, _, tail = key.partition(".")
    if not tail:
        return settings.model_copy(update={head: Path(value) if head == "data_dir" else value})
    section = getattr(settings, head)
    try:
        changed = type(section)(**{**section.model_dump(), tail: value})
    except ValidationError as error:
        raise ConfigError(_describe(error, f"{head}.")) from error
    return settings.model_copy(update={head: changed})


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        text, mode = path.read_text(encoding="utf-8"), path.stat().st_mode
        values = tomllib.loads(text)
    except FileNotFoundError as error:
        raise ConfigError(f"the configuration file {path} does not exist; name another with --config") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {path} cannot be read as UTF-8 text; check type and permissions") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the configuration file {path} is not valid TOML: {error}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO) and (key := _key_with_password(values)):
        raise ConfigError(
            f"{key} in {path} holds a password, and the file has mode {stat.S_IMODE(mode):04o}; run chmod 600 on it",
            code="secret_permissions",
        )
    return values


def _key_with_password(values: dict[str, Any], prefix: str = "") -> str | None:
    """The first key whose value is a URL with a password, such as a database's or a chain endpoint's."""
    for name, value in values.items():
        if isinstance(value, dict) and (found := _key_with_password(value, f"{prefix}{name}.")):
            return found
        if isinstance(value, str) and _PASSWORD_IN_URL.match(value):
            return prefix + name
    return None


def _refuse_unknown(values: dict[str, Any], model: type[BaseModel], where: str, prefix: str = "") -> None:
    """Name the nearest known key for every key that does not exist."""
    for key, value in values.items():
        field = model.model_fields.get(key)
        if field is None:
            raise ConfigError(_unknown(prefix + key, [prefix + name for name in model.model_fields], where))
        if isinstance(value, dict) and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            _refuse_unknown(value, field.annotation, where, f"{prefix}{key}.")


def _refuse_unknown_environment() -> None:
    """A mistyped OPENLORA_ variable is as wrong as a mistyped key: it would silently do nothing."""
    known = {f"OPENLORA_{name}".upper() for name in _known_keys(Settings, separator="__")}
    for name in os.environ:
        if name.startswith("OPENLORA_") and name not in known:
            raise ConfigError(_unknown(name, sorted(known), "the environment"))


def _known_keys(model: type[BaseModel], separator: str = ".", prefix: str = "") -> list[str]:
    """Every key, sections included, joined by `separator`."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys.extend(_known_keys(field.annotation, separator, f"{prefix}{name}{separator}"))
    return keys


def _unknown(key: str, known: list[str], where: str) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"unknown setting {key} in {where}{hint}"


def _describe(error: ValidationError, prefix: str = "") -> str:
    """One line a mistake: field path, the value given, what is allowed. `prefix` names the section that was validated alone."""
    lines = []
    for item in error.errors():
        path = (prefix + ".".join(str(part) for part in item["loc"])).removesuffix(".") or "settings"
        given = item.get("input")
        shown = f" (given: {given!r})" if not isinstance(given, dict) else ""
        lines.append(f"{path}: {item['msg'].removeprefix('Value error, ')}{shown}")
    return "; ".join(lines)


_SOCKET_PATH_MAX = 80  # an AF_UNIX path holds 107 bytes; socket names take up to 27


def runtime_dir(settings: Settings) -> Path:
    """Where the node's sockets live, mode 0700 by whoever creates it: in the data directory when that path is short enough."""
    inside = settings.data_dir / "run"
    if len(os.fsencode(inside.absolute())) <= _SOCKET_PATH_MAX:
        return inside
    digest = hashlib.sha256(os.fsencode(settings.data_dir.absolute())).hexdigest()[:16]
    return Path(os.environ.get("XDG_RUNTIME_DIR", tempfile.gettempdir())) / f"openlora-{os.getuid()}-{digest}"


def admin_socket(settings: Settings) -> Path:
    """The Unix socket on which a running node answers the operator's own commands."""
    return runtime_dir(settings) / "admin.sock"
