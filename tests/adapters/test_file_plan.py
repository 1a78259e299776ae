import json

import pytest

from attribution import identity
from node.adapters.binding import LinearTable
from node.adapters.file_plan import FilePlans
from node.adapters.formats.opening import open_adapter
from node.adapters.verify import AdapterVerifier
from node.errors import AdapterInvalidError
from node.kernels.layout import PageLayout

LIMITS = {"max_rank": 64, "max_bytes": 1 << 20}


class Plans:
    def __init__(self, linears):
        self.table = LinearTable(linears)
        self.layout = PageLayout([(name, shape.in_features, shape.out_features) for name, shape in self.table.shapes.items()], 4)
        self.plans = FilePlans(self.layout, self.table, **LIMITS)

    def roots(self, directory):
        """Roots of the tensors in file order, by the slow way."""
        from attribution.treehash import tree_hash

        with open_adapter(directory, self.table.shapes, **LIMITS) as opened:
            return [tree_hash(opened.file.read_bytes(name)) for name in opened.file.entries]

    def verified_id(self, directory):
        return AdapterVerifier(self.table, "b" * 64, **LIMITS).verify(directory).adapter_id


@pytest.fixture
def plans(linears):
    return Plans(linears)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"lora_alpha": 0.5},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 3, "down_proj": 1.25}},
        {"layers_pattern": ["a", "\x00"]},
        {"layers_pattern": ['\x00"]', "\\u0000"]},
    ],
)
def test_content_hash_equals_the_one_of_the_api_process(plans, writer, config):
    directory = writer.write("a", **config)
    plan = plans.plans.read(directory)
    assert plan.adapter_id(plans.roots(directory)) == plans.verified_id(directory)


def test_hash_frame_depends_on_every_root(plans, writer):
    directory = writer.write("a")
    plan, roots = plans.plans.read(directory), plans.roots(directory)
    found = {plan.adapter_id([*roots[:index], "0" * 64, *roots[index + 1 :]]) for index in range(len(roots))}
    assert len(found | {plan.adapter_id(roots)}) == len(roots) + 1


def test_adapters_of_one_shape_share_a_plan(plans, writer):
    first = plans.plans.read(writer.write("a", writer.tensors(seed=0)))
    assert plans.plans.read(writer.write("b", writer.tensors(seed=1))) is first


def test_another_configuration_is_another_plan(plans, writer):
    first = plans.plans.read(writer.write("a"))
    other = plans.plans.read(writer.write("b", lora_alpha=8))
    assert other.scales.tolist() != first.scales.tolist()


CHANGES = [{"lora_alpha": 3}, {"lora_alpha": 0.25, "use_rslora": True}, {"lora_alpha": 5, "peft_version": "9"}]


@pytest.mark.parametrize("change", CHANGES)
def test_plan_of_a_shape_with_another_alpha_equals_one_read_alone(plans, writer, linears, change):
    plans.plans.read(writer.write("a", use_rslora=change.get("use_rslora", False)))
    directory = writer.write("b", **change)
    shared, alone = plans.plans.read(directory), Plans(linears).plans.read(directory)
    assert shared.tensors is plans.plans.read(directory).tensors
    assert (shared.binding, shared.hash_parts, shared.head_bytes) == (alone.binding, alone.hash_parts, alone.head_bytes)
    assert shared.scales.tolist() == alone.scales.tolist()
    assert shared.adapter_id(plans.roots(directory)) == plans.verified_id(directory)


def test_shape_is_shared_by_adapters_that_differ_in_alpha(plans, writer):
    first = plans.plans.read(writer.write("a"))
    assert plans.plans.read(writer.write("b", lora_alpha=3)).tensors is first.tensors


@pytest.mark.parametrize("change", [{"lora_alpha": -1}, {"lora_alpha": "x"}, {"r": 3}, {"target_modules": ["q_proj"]}])
def test_shape_that_is_known_hides_no_bad_configuration(plans, writer, change):
    plans.plans.read(writer.write("a"))
    with pytest.raises(AdapterInvalidError):
        plans.plans.read(writer.write("b", **change))


@pytest.mark.parametrize("text", ['{"r": 4, "r": 4}', "[1]", "{", '{"lora_alpha": NaN}'])
def test_shape_that_is_known_hides_no_bad_json(plans, writer, text):
    plans.plans.read(writer.write("a"))
    directory = writer.write("b")
    (directory / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterInvalidError):
        plans.plans.read(directory)


def test_patterns_of_alphas_are_read_anew(plans, writer, linears):
    plans.plans.read(writer.write("a", alpha_pattern={"q_proj": 3}))
    directory = writer.write("b", alpha_pattern={"q_proj": 3}, lora_alpha=5)
    assert plans.plans.read(directory).scales.tolist() == Plans(linears).plans.read(directory).scales.tolist()


def test_another_dtype_or_rank_is_another_plan(plans, writer):
    ranks = [plans.plans.read(writer.write(f"r{rank}", writer.tensors(rank=rank), r=rank)).rank for rank in (2, 5)]
    assert ranks == [2, 5]
    narrow = plans.plans.read(writer.write("narrow", writer.tensors(dtype="F16")))
    assert set(narrow.tensors["dtype"].tolist()) == {1}


def test_remembered_plan_does_not_hide_a_file_that_turned_bad(plans, writer):
    directory = writer.write("a")
    plans.plans.read(directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    with pytest.raises(AdapterInvalidError):
        plans.plans.read(directory)


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 64])
def test_file_without_a_header_is_refused_as_everywhere(plans, writer, content):
    directory = writer.write("a")
    (directory / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(AdapterInvalidError):
        plans.plans.read(directory)


def test_ranks_and_scales_are_in_the_order_of_the_tables(plans, writer):
    plan = plans.plans.read(writer.write("a", alpha_pattern={"down_proj": 6}))
    names = {span.index: name for name, span in plans.layout.spans.items()}
    found = {names[index]: scale for index, scale in zip(plan.module_indices.tolist(), plan.scales.tolist(), strict=True)}
    assert {name: scale for name, scale in found.items() if "down_proj" in name} == {
        f"model.layers.{layer}.mlp.down_proj": 3.0 for layer in range(2)
    }
    assert found["model.layers.0.self_attn.q_proj"] == 2.0


def test_placements_cover_each_matrix_once(plans, writer):
    plan = plans.plans.read(writer.write("a"))
    offsets = sorted(plan.placements["page_offset"].tolist())
    expected = sorted(offset for span in plans.layout.spans.values() for offset in (span.a_offset, span.b_offset))
    assert offsets == expected
    assert identity.ADAPTER_SCHEMA.encode() in plan.hash_parts[0]


def test_extent_ends_with_the_last_module_an_adapter_touches(plans, writer):
    names = [name for name in writer.tensors() if "down_proj" not in name]
    tensors = {name: tensor for name, tensor in writer.tensors().items() if name in names}
    plan = plans.plans.read(writer.write("a", tensors, target_modules=["q_proj", "v_proj"]))
    last = plans.layout.spans["model.layers.1.self_attn.v_proj"]
    assert plan.extent == last.b_offset + 4 * last.out_features < plans.layout.page_elements
    assert plans.plans.read(writer.write("b")).extent == plans.layout.page_elements
