"""Build the CUDA kernels, where nvcc and a CUDA torch are. `python -m node.kernels.build` calls this after the C++ kernels.

Every source is compiled for every architecture it supports in one call of nvcc, sources in parallel; objects are cached under a
hash of their own source, the headers that it includes and the flags, so that a change of one kernel compiles what has it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from node.errors import ConfigError
from node.kernels.build import _include_dirs, _library_dir, _run, source_dir

FLAGS = ("-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden")
TORCH_FLAGS = ("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA")
ARCHITECTURES = ("80", "89", "90a")
VIRTUAL = {"89": "80"}  # no source asks for more than 8.0 below 9.0, so one pass to PTX serves both: a sixth less time
CHOSEN_ARCHITECTURES = "CUDAARCHS"  # CMake's name; "90a", "80;90a": a faster build for one machine
HOPPER_SUFFIX = "_sm90.cu"  # wgmma and bulk tensor copies: compiled for 90a alone
BINDING = "binding_cuda.cc"
INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)
CACHED_OBJECTS = 64  # older ones are removed
CACHED_LIBRARIES = 16


def nvcc() -> str | None:
    """The CUDA compiler on the PATH or under $CUDA_HOME; None without."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None)


def has_cuda_torch() -> bool:
    """Whether the installed torch is built for CUDA; says nothing of a GPU."""
    import torch

    return torch.version.cuda is not None


def architectures() -> tuple[str, ...]:
    """What the kernels are compiled for: all supported ones, or those that the environment names."""
    named = os.environ.get(CHOSEN_ARCHITECTURES)
    return tuple(named.replace(",", ";").split(";")) if named else ARCHITECTURES


def cuda_sources(sources: Path) -> list[Path]:
    """Every kernel file."""
    return sorted((sources / "cuda").glob("*.cu"))


def cuda_library_path() -> Path | None:
    """The built library of exactly these sources, or None."""
    try:
        path = _library(source_dir())
    except ConfigError:
        return None
    return path if path.is_file() else None


def build_cuda() -> Path:
    """Compile what is not cached, link, and return the library's path.

    Raises:
        ConfigError: No sources, no nvcc, a torch without CUDA, or the compiler failed.
    """
    sources = source_dir()
    path = _library(sources)
    if path.is_file():
        return path
    if not has_cuda_torch():
        raise ConfigError("the installed torch is built without CUDA; install a CUDA build of it to build the CUDA kernels")
    objects = [*compile_kernels(), _object(_require_nvcc(), sources, sources / BINDING, _torch_flags())]
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        linked = Path(scratch) / "library.so"
        libraries = [f"-L{_library_dir()}", "-ltorch_cpu", "-ltorch_cuda"]
        _run([_require_nvcc(), "-shared", "-cudart=static", "-o", str(linked), *map(str, objects), *libraries])
        linked.replace(path)
    _forget_old("libopenlora_cuda-*.so", [path], CACHED_LIBRARIES)
    return path


def check() -> None:
    """Compile everything to machine code of every supported architecture, whatever the environment names, and link nothing. The
    binding is compiled against the headers of whatever torch is installed.

    Raises:
        ConfigError: No sources, no nvcc, or the compiler failed.
    """
    sources = source_dir()
    _compile_all(sources, lambda name: _gencode(name, ARCHITECTURES))
    _object(_require_nvcc(), sources, sources / BINDING, _torch_flags())


def compile_kernels() -> list[Path]:
    """Compile every kernel file for its architectures; needs nvcc alone, no torch.

    Raises:
        ConfigError: No sources, no nvcc, or the compiler failed.
    """
    return _compile_all(source_dir(), lambda name: _gencode(name, architectures()))


def _compile_all(sources: Path, flags: Callable[[Path], tuple[str, ...]]) -> list[Path]:
    chosen, names = _require_nvcc(), cuda_sources(sources)
    print(f"building the CUDA kernels with {chosen} ({len(names)} files)", flush=True)  # noqa: T201
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        objects = list(threads.map(lambda name: _object(chosen, sources, name, flags(name)), names))
    _forget_old("*.o", objects, CACHED_OBJECTS)
    return objects


def _gencode(source: Path, named: tuple[str, ...]) -> tuple[str, ...]:
    """nvcc's flags for one file: machine code of every named architecture."""
    codes: dict[str, list[str]] = {}
    for name in ("90a",) if source.name.endswith(HOPPER_SUFFIX) else named:
        codes.setdefault(VIRTUAL.get(name, name), []).append(f"sm_{name}")
    return tuple(part for arch, code in codes.items() for part in ("-gencode", f"arch=compute_{arch},code=[{','.join(code)}]"))


def _torch_flags() -> tuple[str, ...]:
    return (*TORCH_FLAGS, *(f"-I{path}" for path in _include_dirs()))


def _with_headers(sources: Path, source: Path) -> list[Path]:
    """A file and all of `csrc/` that it includes, directly or not."""
    found, open_ends = {source}, [source]
    while open_ends:
        path = open_ends.pop()
        for name in INCLUDE.findall(path.read_bytes()):
            near = [folder / name.decode() for folder in (path.parent, sources)]
            header = next((place for place in near if place.is_file()), None)  # none: the toolkit's or torch's
            if header is not None and header not in found:
                found.add(header)
                open_ends.append(header)
    return sorted(found)


def _digest(paths: Iterable[Path], flags: tuple[str, ...]) -> str:
    state = hashlib.sha256(repr((FLAGS, flags)).encode())
    for path in paths:
        state.update(path.name.encode() + b"\0" + path.read_bytes())
    return state.hexdigest()[:16]


def _object(chosen: str, sources: Path, source: Path, flags: tuple[str, ...]) -> Path:
    """Compile one file, or take the object that these bytes gave before."""
    target = _build_dir() / f"{source.stem}-{_digest(_with_headers(sources, source), flags)}.o"
    if target.is_file():
        target.touch()
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        fresh = Path(scratch) / "fresh.o"
        _run([chosen, *FLAGS, *flags, f"-I{sources}", "-c", str(source), "-o", str(fresh)])
        fresh.replace(target)
    print(f"  compiled {source.name}", flush=True)  # noqa: T201 - the progress of a command
    return target


def _library(sources: Path) -> Path:
    paths = [path for path in (*cuda_sources(sources), sources / BINDING) if path.is_file()]
    every = sorted({part for path in paths for part in _with_headers(sources, path)})
    return _build_dir() / f"libopenlora_cuda-{_digest(every, (*TORCH_FLAGS, *architectures()))}.so"


def _build_dir() -> Path:
    return Path(__file__).resolve().parent / "_build"


def _forget_old(pattern: str, used: list[Path], most: int) -> None:
    old = sorted((path for path in _build_dir().glob(pattern) if path not in used), key=lambda path: path.stat().st_mtime)
    for path in old[: max(0, len(old) - most)]:
        path.unlink(missing_ok=True)


def _require_nvcc() -> str:
    found = nvcc()
    if found is None:
        raise ConfigError(
            "no CUDA compiler found (nvcc on the PATH or in $CUDA_HOME/bin); install the CUDA toolkit, 12.8 or newer"
        )
    return found


def main(arguments: list[str]) -> int:
    """`check` compiles and links nothing; without an argument the library is built."""
    try:
        if arguments == ["check"]:
            check()
        else:
            print(f"CUDA kernels ready: {build_cuda()}")  # noqa: T201
    except ConfigError as error:
        print(f"error: {error.message}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
