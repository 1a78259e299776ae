"""What is compiled for which architecture, and the cache of objects; nvcc itself runs in scripts/check."""

import re
from pathlib import Path

import pytest

from node.errors import ConfigError
from node.kernels import build_cuda


@pytest.fixture
def compilations(monkeypatch, tmp_path):
    """A compiler that writes the object it is asked for, and the commands it was given."""
    commands = []

    def compile_one(command):
        commands.append(command)
        Path(command[command.index("-o") + 1]).write_bytes(b"object")

    monkeypatch.setattr(build_cuda, "_run", compile_one)
    monkeypatch.setattr(build_cuda, "_build_dir", lambda: tmp_path / "build")
    return commands


@pytest.fixture
def sources(tmp_path):
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "other.cuh").write_text("int other;")
    (tmp_path / "cuda" / "shared.h").write_text("int shared;")
    (tmp_path / "cuda" / "between.cuh").write_text('#include <vector>\n#include "cuda/shared.h"\n#include "between.cuh"\n')
    (tmp_path / "cuda" / "a.cu").write_text('  #  include "between.cuh"\n#include "of_the_toolkit.h"\nint a;')
    return tmp_path


def test_object_is_compiled_once_until_its_source_a_header_of_it_or_the_flags_change(compilations, sources):
    source = sources / "cuda" / "a.cu"
    first = build_cuda._object("nvcc", sources, source, ("-x",))
    (sources / "cuda" / "other.cuh").write_text("int changed;")
    assert build_cuda._object("nvcc", sources, source, ("-x",)) == first
    assert len(compilations) == 1
    source.write_text(source.read_text() + "int b;")
    build_cuda._object("nvcc", sources, source, ("-x",))
    (sources / "cuda" / "shared.h").write_text("int changed;")
    build_cuda._object("nvcc", sources, source, ("-x",))
    build_cuda._object("nvcc", sources, source, ("-y",))
    assert len(compilations) == 4


def test_every_header_of_a_kernel_is_found():
    root = build_cuda.source_dir()
    found = {path for source in build_cuda.cuda_sources(root) for path in build_cuda._with_headers(root, source)}
    assert found == {path for path in (root / "cuda").iterdir() if path.suffix in {".cu", ".h", ".cuh"}}


def test_library_follows_every_source_and_its_headers(compilations, sources):
    first = build_cuda._library(sources)
    assert build_cuda._library(sources) == first
    (sources / "cuda" / "shared.h").write_text("int changed;")
    assert build_cuda._library(sources) != first


def test_gencode_of_a_hopper_file_names_hopper_alone():
    assert build_cuda._gencode(Path("gemm_sm90.cu"), build_cuda.ARCHITECTURES) == ("-gencode", "arch=compute_90a,code=[sm_90a]")
    assert build_cuda._gencode(Path("norm.cu"), ("80",)) == ("-gencode", "arch=compute_80,code=[sm_80]")


def test_no_source_asks_for_more_of_a_gpu_than_its_pass_to_ptx_says():
    """One pass for 8.0 serves 8.9 as long as sources tell them from 9.0 alone."""
    root = build_cuda.source_dir()
    text = "".join(path.read_text() for path in (root / "cuda").iterdir())
    assert set(re.findall(r"__CUDA_ARCH__ *[<>=]+ *(\d+)", text)) == {"900"}


def test_architectures_can_be_named_by_the_environment(monkeypatch):
    assert build_cuda.architectures() == build_cuda.ARCHITECTURES
    monkeypatch.setenv(build_cuda.CHOSEN_ARCHITECTURES, "80,90a")
    assert build_cuda.architectures() == ("80", "90a")


def test_check_compiles_every_kernel_and_the_binding(compilations, monkeypatch):
    monkeypatch.setattr(build_cuda, "nvcc", lambda: "nvcc")
    build_cuda.check()
    compiled = {Path(command[command.index("-c") + 1]).name for command in compilations}
    assert compiled == {path.name for path in build_cuda.cuda_sources(build_cuda.source_dir())} | {build_cuda.BINDING}
    norm = next(command for command in compilations if command[-3].endswith("/norm.cu"))
    assert [part for part in norm if "code=" in part] == ["arch=compute_80,code=[sm_80,sm_89]", "arch=compute_90a,code=[sm_90a]"]


def test_build_without_nvcc_names_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr(build_cuda, "nvcc", lambda: None)
    assert build_cuda.main(["check"]) == 1
    assert "install the CUDA toolkit" in capsys.readouterr().err


def test_build_with_a_torch_for_the_cpu_says_so(monkeypatch, compilations):
    monkeypatch.setattr(build_cuda, "has_cuda_torch", lambda: False)
    with pytest.raises(ConfigError, match="built without CUDA"):
        build_cuda.build_cuda()
    assert not compilations


def test_old_files_are_forgotten_beyond_the_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(build_cuda, "_build_dir", lambda: tmp_path)
    paths = [tmp_path / f"{index}.o" for index in range(5)]
    for path in paths:
        path.write_bytes(b"")
    build_cuda._forget_old("*.o", paths[:1], 2)
    assert paths[0].is_file()
    assert sum(path.is_file() for path in paths) == 3
