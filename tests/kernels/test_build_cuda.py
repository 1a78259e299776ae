"""What is compiled for which architecture, and the cache of objects; nvcc itself runs in scripts/check."""

from pathlib import Path

import pytest

from node.errors import ConfigError
from node.kernels import build_cuda

ALL = {"80": "sm_80", "90a": "sm_90a"}


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
    (tmp_path / "cuda" / "shared.h").write_text("int shared;")
    (tmp_path / "cuda" / "a.cu").write_text("int a;")
    return tmp_path


def test_object_is_compiled_once_until_its_source_a_header_or_the_flags_change(compilations, sources):
    source = sources / "cuda" / "a.cu"
    first = build_cuda._object("nvcc", sources, source, ("-x",))
    assert build_cuda._object("nvcc", sources, source, ("-x",)) == first
    assert len(compilations) == 1
    source.write_text("int b;")
    build_cuda._object("nvcc", sources, source, ("-x",))
    (sources / "cuda" / "shared.h").write_text("int other;")
    build_cuda._object("nvcc", sources, source, ("-x",))
    build_cuda._object("nvcc", sources, source, ("-y",))
    assert len(compilations) == 4


def test_gencode_of_a_hopper_file_names_hopper_alone():
    assert build_cuda._gencode(Path("gemm_sm90.cu"), ALL) == ("-gencode", "arch=compute_90a,code=sm_90a")
    assert "arch=compute_80,code=sm_80" in build_cuda._gencode(Path("norm.cu"), ALL)


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
    assert [part for part in norm if "code=" in part] == [f"arch=compute_{a},code=sm_{a}" for a in ("80", "89", "90a")]


def test_build_without_nvcc_names_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr(build_cuda, "nvcc", lambda: None)
    assert build_cuda.main(["check"]) == 1
    assert "install the CUDA toolkit" in capsys.readouterr().err


def test_build_with_a_torch_for_the_cpu_says_so(monkeypatch, compilations):
    monkeypatch.setattr(build_cuda, "has_cuda_torch", lambda: False)
    with pytest.raises(ConfigError, match="built without CUDA"):
        build_cuda.build_cuda()
    assert not compilations


def test_old_objects_are_forgotten_beyond_the_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(build_cuda, "_build_dir", lambda: tmp_path)
    monkeypatch.setattr(build_cuda, "CACHED_OBJECTS", 2)
    paths = [tmp_path / f"{index}.o" for index in range(5)]
    for path in paths:
        path.write_bytes(b"")
    build_cuda._forget_old_objects(paths[:1])
    assert paths[0].is_file()
    assert sum(path.is_file() for path in paths) == 3
