"""What doctor says of machines this one is not: the facts are injected."""

import dataclasses

import pytest

from node.cli.doctor_gpu import GpuFacts, gpu_facts, gpu_findings
from node.config import Settings
from node.kernels.attention.registry import AttentionFacts

ALL = AttentionFacts(capability=(9, 0), has_native=True, has_fa3=True, has_fa2=False, has_varlen=False, has_triton=True)
H100 = GpuFacts(
    driver="580.1",
    torch_cuda="13.0",
    name="NVIDIA H100 80GB HBM3",
    memory_bytes=85 << 30,
    capability=(9, 0),
    has_kernels=True,
    has_nvcc=True,
    attention=ALL,
)


def settings(device="auto", **engine):
    return Settings(model={"device": device}, engine=engine)


def found(facts, configured=None):
    return {finding.subject: finding for finding in gpu_findings(configured or settings(), facts)}


def changed(facts=H100, **values):
    return dataclasses.replace(facts, **values)


def test_complete_gpu_is_ok_and_named():
    findings = found(H100)
    assert [finding.state for finding in findings.values()] == ["ok", "ok", "ok"]
    assert findings["gpu"].detail == "NVIDIA H100 80GB HBM3, 85 GiB, capability 9.0, driver 580.1, CUDA 13.0"
    assert findings["attention"].detail.startswith("native+fa3 (the fastest")


def test_hopper_without_fa3_says_what_would_be_faster():
    attention = dataclasses.replace(ALL, has_fa3=False)
    finding = found(changed(attention=attention))["attention"]
    assert finding.state == "warn"
    assert finding.detail.startswith("native+triton (fa3: flash-attn 3 is not installed")
    assert "flash-attn 3" in finding.remedy


def test_deterministic_takes_the_own_kernels_without_a_warning():
    finding = found(H100, settings(deterministic=True))["attention"]
    assert (finding.state, finding.detail.split()[0]) == ("ok", "triton")


def test_backend_that_cannot_run_fails_with_the_setting_that_does():
    finding = found(changed(attention=dataclasses.replace(ALL, has_fa3=False)), settings(attention="fa3"))["attention"]
    assert (finding.state, finding.remedy) == ("fail", 'engine.attention = "auto"')


def test_attention_of_a_missing_model_does_not_blame_the_setting(tmp_path):
    finding = found(H100, Settings(model={"path": str(tmp_path / "nowhere")}))["attention"]
    assert (finding.state, finding.remedy) == ("warn", "set model.path")


@pytest.mark.parametrize(("has_nvcc", "remedy"), [(True, "python -m node.kernels.build"), (False, "install the CUDA toolkit")])
def test_kernels_that_are_not_built_warn_and_say_how_to_build_them(has_nvcc, remedy):
    findings = found(changed(has_kernels=False, has_nvcc=has_nvcc))
    assert list(findings) == ["gpu", "cuda kernels"]  # plain torch runs, with an attention of its own
    assert findings["cuda kernels"].state == "warn"
    assert findings["cuda kernels"].remedy.startswith(remedy)


def test_kernels_that_are_not_built_fail_where_the_settings_insist():
    assert found(changed(has_kernels=False), settings(kernels="cpp"))["cuda kernels"].state == "fail"


def test_reference_by_setting_warns_that_built_kernels_rest():
    finding = found(H100, settings(kernels="reference"))["cuda kernels"]
    assert (finding.state, finding.remedy) == ("warn", 'engine.kernels = "auto"')


def test_machine_without_a_gpu_is_ok_on_auto_and_fails_on_cuda():
    assert [finding.state for finding in found(GpuFacts()).values()] == ["ok"]
    assert [finding.state for finding in found(GpuFacts(), settings("cuda")).values()] == ["fail"]


def test_cpu_by_setting_looks_no_further():
    assert [finding.detail for finding in found(H100, settings("cpu")).values()] == ["not used: model.device is cpu"]


@pytest.mark.parametrize(("torch_cuda", "expected"), [(None, "built without CUDA"), ("13.0", "sees no GPU")])
def test_gpu_that_torch_cannot_use_warns(torch_cuda, expected):
    finding = found(GpuFacts(driver="580.1", torch_cuda=torch_cuda))["gpu"]
    assert finding.state == "warn"
    assert expected in finding.detail
    assert finding.remedy


def test_old_gpu_is_not_used():
    findings = found(changed(name="Tesla T4", capability=(7, 5)))
    assert list(findings) == ["gpu"]
    assert findings["gpu"].state == "warn"


def test_facts_of_this_machine_can_be_read():
    assert found(gpu_facts())["gpu"].detail
