import pytest
import torch

from node.errors import ConfigError
from node.kernels.layout import PageLayout
from node.models.device_memory import UnitShape, allocate_memory
from node.models.spec import model_spec

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
BLOCK = 4


@pytest.fixture
def spec():
    return model_spec(CONFIG, None)


@pytest.fixture
def layout(spec):
    return PageLayout(spec.linears, 16)


def allocate(spec, layout, kv_units, page_units):
    unit_bytes = UnitShape.of(spec, layout, BLOCK).unit_elements * 4
    return allocate_memory(
        spec,
        layout,
        BLOCK,
        torch.float32,
        torch.device("cpu"),
        kv_bytes=kv_units * unit_bytes + 1,
        adapter_bytes=page_units * unit_bytes + unit_bytes - 1,
    )


def test_unit_holds_a_page_and_whole_blocks(spec, layout):
    shape = UnitShape.of(spec, layout, BLOCK)
    assert shape.block_elements == 2 * 3 * BLOCK * 2 * 8
    assert shape.unit_elements - shape.block_elements < layout.page_elements <= shape.unit_elements


def test_layers_and_blocks_cover_a_unit_once_and_no_other(spec, layout):
    memory = allocate(spec, layout, 2, 3)
    assert memory.array.shape[0] == 5
    cache = memory.kv_cache(spec, BLOCK)
    assert cache.block_count == 5 * memory.shape.unit_blocks
    unit = slice(memory.shape.unit_blocks, 2 * memory.shape.unit_blocks)
    for tensors in (cache.keys, cache.values):
        assert tensors[0].shape[1:] == (2, BLOCK, 8)
        for tensor in tensors:
            tensor[unit] += 1
    assert torch.all(memory.array[1] == 1)
    assert not memory.array[[0, 2, 3, 4]].any()


def test_heads_of_a_token_lie_side_by_side(spec, layout):
    keys = allocate(spec, layout, 1, 1).kv_cache(spec, BLOCK).keys[1]
    assert keys.stride(3) == 1
    assert keys.stride(1) == 8
    assert keys.stride(2) == 16
    assert keys.stride(0) == UnitShape.of(spec, layout, BLOCK).block_elements


@pytest.mark.parametrize(("kv_units", "page_units"), [(0, 1), (1, -1)])
def test_side_without_a_unit_is_a_configuration_error(spec, layout, kv_units, page_units):
    with pytest.raises(ConfigError, match="unit"):
        allocate(spec, layout, kv_units, page_units)
