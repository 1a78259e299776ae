"""Build the C++ kernels, and the CUDA kernels where nvcc and a CUDA torch are: `python -m node.kernels.build`.

One compiler, no build system: every instruction set is its own object file with its own `-m` flags, linked into one library
that uses torch's stable ABI and so serves every supported torch. The result is cached under a hash of the sources and flags.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

from node.errors import ConfigError

FLAGS = (
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-pthread",
)
ISA_FLAGS = {
    "cpu/isa_avx2.cc": ("-mavx2", "-mfma", "-mf16c"),
    "cpu/isa_avx512.cc": ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    "cpu/isa_avx512bf16.cc": ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
}
SOURCES = (
    *ISA_FLAGS,
    "cpu/cpuid.cc",
    "cpu/thread_pool.cc",
    "adapters/crew.cc",
    "adapters/reader.cc",
    "adapters/sha256.cc",
    "host/tile_block.cc",
    "binding_cpu.cc",
)
COMPILE_TIMEOUT_S = 600


def source_dir() -> Path:
    """Where the kernel sources lie: `csrc/` of the repository, or the copy inside an installed package.

    Raises:
        ConfigError: Neither is there.
    """
    repository = Path(__file__).resolve().parents[2] / "csrc"
    installed = Path(str(resources.files("node"))) / "_data" / "csrc"
    for place in (repository, installed):
        if (place / "binding_cpu.cc").is_file():
            return place
    raise ConfigError(f"the kernel sources are neither in {repository} nor in {installed}; reinstall openlora-node")


def _include_dirs() -> list[str]:
    import torch

    return [str(Path(torch.__file__).parent / "include")]


def _library_dir() -> Path:
    import torch

    return Path(torch.__file__).parent / "lib"


def _digest(sources: Path) -> str:
    """Hash of every source and flag; the torch version is left out because the stable ABI does not depend on it."""
    state = hashlib.sha256(repr((FLAGS, ISA_FLAGS, SOURCES)).encode())
    for path in sorted((*sources.rglob("*.cc"), *sources.rglob("*.h"))):
        if "cuda" in path.relative_to(sources).as_posix():  # the other library's: see build_cuda
            continue
        state.update(str(path.relative_to(sources)).encode() + b"\0" + path.read_bytes())
    return state.hexdigest()[:16]


def _cached(sources: Path) -> Path:
    return Path(__file__).resolve().parent / "_build" / f"libopenlora_cpu-{_digest(sources)}.so"


def library_path() -> Path | None:
    """The built library of exactly these sources, or None."""
    try:
        path = _cached(source_dir())
    except ConfigError:
        return None
    return path if path.is_file() else None


def compiler() -> str | None:
    """The first of $CXX, g++, c++ and clang++ that is there; None without any."""
    named = os.environ.get("CXX")
    return next((name for name in (named, "g++", "c++", "clang++") if name and shutil.which(name)), None)


def _require_compiler() -> str:
    found = compiler()
    if found is None:
        raise ConfigError(
            "no C++ compiler found (tried $CXX, g++, c++, clang++); install one (Debian: apt install g++), or set engine.kernels "
            "to reference, which needs none and is several times slower"
        )
    return found


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)  # noqa: S603 - our own sources
    if done.returncode != 0:
        raise ConfigError(f"the C++ compiler failed with status {done.returncode}:\n{done.stderr[-4000:]}")


def _compile(compiler: str, sources: Path, name: str, target: Path) -> Path:
    include = [f"-I{path}" for path in (str(sources), *_include_dirs())]
    _run([compiler, *FLAGS, *ISA_FLAGS.get(name, ()), *include, "-c", str(sources / name), "-o", str(target)])
    print(f"  compiled {name}", flush=True)  # noqa: T201 - the progress of a command
    return target


def build() -> Path:
    """Compile what is not cached and return the library's path.

    Raises:
        ConfigError: No sources, no compiler, or the compiler failed.
    """
    sources = source_dir()
    path = _cached(sources)
    if path.is_file():
        return path
    chosen = _require_compiler()
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"building the C++ kernels with {chosen} ({len(SOURCES)} files)", flush=True)  # noqa: T201
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            targets = [Path(scratch) / f"{i}.o" for i in range(len(SOURCES))]
            objects = list(threads.map(lambda pair: _compile(chosen, sources, *pair), zip(SOURCES, targets, strict=True)))
        linked = Path(scratch) / "library.so"
        libraries = [f"-L{_library_dir()}", "-ltorch_cpu", "-pthread"]
        _run([chosen, "-shared", "-o", str(linked), *map(str, objects), *libraries])
        linked.replace(path)
    return path


def main() -> int:
    try:
        path = build()
    except ConfigError as error:
        print(f"error: {error.message}", file=sys.stderr)  # noqa: T201
        return 1
    print(f"kernels ready: {path}")  # noqa: T201
    return _build_cuda()


def _build_cuda() -> int:
    """The CUDA library, where it can be built; a machine without nvcc needs none."""
    from node.kernels import build_cuda  # it imports this module

    if build_cuda.nvcc() is None or not build_cuda.has_cuda_torch():
        return 0
    try:
        path = build_cuda.build_cuda()
    except ConfigError as error:
        print(f"error: {error.message}", file=sys.stderr)  # noqa: T201
        return 1
    print(f"CUDA kernels ready: {path}")  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
