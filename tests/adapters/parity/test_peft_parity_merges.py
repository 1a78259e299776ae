"""Derived adapters against PEFT's `add_weighted_adapter`, float32: factor by factor, and through the engine."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft.utils.merge_utils as peft_merging
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from attribution.identity import normal_name
from attribution.record import Merge
from node.adapters.merges.build import build
from node.adapters.merges.masks import keep_mask
from node.adapters.merges.recipe import MergeRecipe, MergeSource
from node.errors import AdapterChangedError, AdapterInvalidError

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STRATEGIES = {
    "linear_factors": Merge("linear_factors"),
    "ties-total": Merge("ties", "0.5", "total"),
    "ties-frequency": Merge("ties", "0.3", "frequency"),
    "ties-all": Merge("ties", "1", "total"),
    "dare_linear": Merge("dare_linear", "0.6"),
    "dare_ties": Merge("dare_ties", "0.45", "total"),
}
WEIGHTS = ("0.7", "0.25", "-0.4")


def recipe_of(base: Any, merge: Merge, directories: list[Path], weights: tuple[str, ...]) -> MergeRecipe:
    sources = [
        MergeSource(base.verify(directory).adapter_id, directory, weight)
        for directory, weight in zip(directories, weights, strict=True)
    ]
    return MergeRecipe(merge, tuple(sources))


def derive(base: Any, recipe: MergeRecipe, target: Path) -> Path:
    target.mkdir()
    build(recipe, target, base.table, max_rank=256, max_bytes=1 << 30)
    return target


def with_peft(base: Any, recipe: MergeRecipe, monkeypatch: pytest.MonkeyPatch) -> Any:
    """PEFT's model with the merged adapter active, drawing DARE's masks from the rule of this project."""
    model: Any = None
    masks: dict[bytes, torch.Tensor] = {}
    for index, source in enumerate(recipe.sources):
        if model is None:
            model = PeftModel.from_pretrained(copy.deepcopy(base.model), str(source.directory), adapter_name="0").eval()
        else:
            model.load_adapter(str(source.directory), adapter_name=str(index))
        for name, tensor in load_file(source.directory / "adapter_model.safetensors").items():
            mask = keep_mask(source.adapter_id, normal_name(name), tuple(tensor.shape), recipe.density)
            masks[tensor.float().numpy().tobytes()] = torch.from_numpy(mask.astype("float32"))
    original = peft_merging.random_pruning

    def drawing_ours(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
        mask = masks[tensor.numpy().tobytes()]
        with monkeypatch.context() as patched:
            patched.setattr(peft_merging.torch, "bernoulli", lambda _: mask)
            return original(tensor, density, rescale)

    monkeypatch.setattr(peft_merging, "random_pruning", drawing_ours)
    strategy = recipe.merge.strategy.removesuffix("_factors")
    options = {"density": float(recipe.density)} if recipe.merge.density else {}
    if recipe.merge.majority_sign_method:
        options["majority_sign_method"] = recipe.merge.majority_sign_method
    model.add_weighted_adapter(
        [str(index) for index in range(len(recipe.sources))],
        [float(source.weight) for source in recipe.sources],
        "merged",
        combination_type=strategy,
        **options,
    )
    model.set_adapter("merged")
    return model


def factors(model: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, module in model.named_modules():
        if "merged" in getattr(module, "lora_A", {}):
            found[f"{name}.lora_A.weight"] = module.lora_A["merged"].weight.detach()
            found[f"{name}.lora_B.weight"] = module.lora_B["merged"].weight.detach()
    return found


@pytest.mark.parametrize("rank", [1, 8, 256])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_has_pefts_factors_and_answers(base, same, tmp_path, monkeypatch, strategy, rank):
    llama = base()
    directories = [
        llama.adapter(f"{strategy}-{rank}-{seed}", seed=seed, r=rank, lora_alpha=seed + 1, target_modules=targets)
        for seed, targets in ((1, ALL_LINEAR), (2, ALL_LINEAR), (3, ["q_proj", "down_proj"]))
    ]
    recipe = recipe_of(llama, STRATEGIES[strategy], directories, WEIGHTS)

    derived = derive(llama, recipe, tmp_path / "derived")

    model = with_peft(llama, recipe, monkeypatch)
    expected = factors(model)
    ours = load_file(derived / "adapter_model.safetensors")
    assert set(ours) == set(expected)
    for name, tensor in ours.items():
        assert torch.allclose(tensor, expected[name], rtol=1e-5, atol=1e-7), name
    with torch.no_grad():
        reference = model(torch.tensor([[3, 17, 5, 44, 9]])).logits[0]
    assert same(llama.ours(derived, ids=[3, 17, 5, 44, 9]), reference) < 1e-5


def test_rslora_sources_have_pefts_factors_and_scale_one(base, tmp_path, monkeypatch):
    """PEFT leaves use_rslora on the result, whose scale is then sqrt(rank) instead of 1."""
    llama = base()
    directories = [
        llama.adapter(f"rslora{seed}", seed=seed, r=9, lora_alpha=6, target_modules=["q_proj"], use_rslora=True)
        for seed in (1, 2)
    ]
    recipe = recipe_of(llama, Merge("ties", "0.5", "total"), directories, ("0.5", "0.5"))

    derived = derive(llama, recipe, tmp_path / "derived")

    expected = factors(with_peft(llama, recipe, monkeypatch))
    for name, tensor in load_file(derived / "adapter_model.safetensors").items():
        assert torch.allclose(tensor, expected[name], rtol=1e-5, atol=1e-7), name
    config = json.loads((derived / "adapter_config.json").read_text())
    assert (config["lora_alpha"] / config["r"], config.get("use_rslora")) == (1, None)


def test_linear_is_what_peft_calls_cat(base, same):
    """The exact sum of changes: no adapter is made, ranks may differ."""
    llama = base()
    directories = [llama.adapter(f"cat{rank}", seed=rank, r=rank, lora_alpha=5, target_modules=ALL_LINEAR) for rank in (2, 5, 11)]
    model = PeftModel.from_pretrained(copy.deepcopy(llama.model), str(directories[0]), adapter_name="0").eval()
    for index in (1, 2):
        model.load_adapter(str(directories[index]), adapter_name=str(index))
    model.add_weighted_adapter(["0", "1", "2"], [0.7, 0.25, -0.4], "merged", combination_type="cat")
    model.set_adapter("merged")
    with torch.no_grad():
        reference = model(torch.tensor([[3, 17, 5, 44, 9]])).logits[0]

    terms = [llama.term(directory, float(weight)) for directory, weight in zip(directories, WEIGHTS, strict=True)]

    assert same(llama.ours(*terms, ids=[3, 17, 5, 44, 9]), reference) < 1e-5


def test_linear_factors_mixes_the_adapters_and_linear_does_not(base, same, tmp_path):
    llama = base()
    directories = [llama.adapter(f"cross{seed}", seed=seed, r=4, target_modules=["q_proj"]) for seed in (1, 2)]
    recipe = recipe_of(llama, Merge("linear_factors"), directories, ("1", "1"))

    crossed = llama.ours(derive(llama, recipe, tmp_path / "derived"))

    assert same(crossed, llama.ours(*directories)) > 1e-3


def test_mixed_ranks_are_padded_with_zeros_after_pruning(base, tmp_path, monkeypatch):
    """PEFT refuses; the rule is what PEFT computes for adapters whose files were pruned and padded before."""
    llama = base()
    small = llama.adapter("mixed-small", seed=1, r=2, target_modules=["v_proj"])
    large = llama.adapter("mixed-large", seed=2, r=5, target_modules=["v_proj"])
    recipe = recipe_of(llama, Merge("ties", "0.5", "total"), [small, large], ("1", "0.5"))

    derived = load_file(derive(llama, recipe, tmp_path / "derived") / "adapter_model.safetensors")

    for name, tensor in derived.items():
        side = "A" if ".lora_A." in name else "B"
        scales = (8 / 2, 0.5 * 8 / 5)
        tensors = []
        for directory in (small, large):
            pruned = peft_merging.prune(load_file(directory / "adapter_model.safetensors")[name], 0.5, "magnitude")
            whole = torch.zeros(tensor.shape)
            whole[: pruned.shape[0], : pruned.shape[1]] = pruned
            tensors.append(whole)
        assert tensor.shape[0 if side == "A" else 1] == 5
        expected = peft_merging.ties(tensors, torch.tensor([scale**0.5 for scale in scales]), 1.0, "total")
        assert torch.allclose(tensor, expected, rtol=1e-5, atol=1e-7)


def test_a_recipe_has_one_result_and_every_part_of_it_counts(base, tmp_path):
    llama = base()
    directories = [llama.adapter(f"once{seed}", seed=seed, r=4, target_modules=["q_proj", "o_proj"]) for seed in (1, 2)]
    merge = Merge("dare_ties", "0.5", "total")
    first = recipe_of(llama, merge, directories, ("0.5", "0.5"))
    results = {llama.verify(derive(llama, first, tmp_path / f"again{turn}")).adapter_id for turn in range(2)}
    others = {
        "weight": recipe_of(llama, merge, directories, ("0.5", "0.25")),
        "order": recipe_of(llama, merge, directories[::-1], ("0.5", "0.5")),
        "density": recipe_of(llama, Merge("dare_ties", "0.75", "total"), directories, ("0.5", "0.5")),
        "method": recipe_of(llama, Merge("dare_ties", "0.5", "frequency"), directories, ("0.5", "0.5")),
        "strategy": recipe_of(llama, Merge("dare_linear", "0.5"), directories, ("0.5", "0.5")),
    }

    assert len(results) == 1
    assert len({first.recipe_hash(), *(other.recipe_hash() for other in others.values())}) == 6
    made = {llama.verify(derive(llama, other, tmp_path / name)).adapter_id for name, other in others.items() if name != "order"}
    assert len(made | results) == 5


def test_adapters_that_only_a_sum_can_hold_are_refused_by_name(base, tmp_path):
    llama = base()
    plain = llama.adapter("sum-plain", r=4, target_modules=["q_proj"])
    for name, config in (("dora", {"use_dora": True}), ("bias", {"lora_bias": True})):
        other = llama.adapter(f"sum-only-{name}", r=4, target_modules=["q_proj"], **config)

        with pytest.raises(AdapterInvalidError, match="only a linear merge") as caught:
            derive(llama, recipe_of(llama, Merge("linear_factors"), [plain, other], ("1", "1")), tmp_path / name)

        assert caught.value.error_code == "adapter_feature_unsupported"


def test_a_source_that_changed_after_its_hash_is_refused(base, tmp_path):
    llama = base()
    directories = [llama.adapter(f"changed{seed}", seed=seed, r=4, target_modules=["q_proj"]) for seed in (1, 2)]
    recipe = recipe_of(llama, Merge("linear_factors"), directories, ("1", "1"))
    llama.adapter("changed1", seed=77, r=4, target_modules=["q_proj"])

    with pytest.raises(AdapterChangedError):
        derive(llama, recipe, tmp_path / "derived")


def test_a_result_beyond_the_limit_is_refused_before_it_is_computed(base, tmp_path):
    llama = base()
    directories = [
        llama.adapter("wide", seed=1, r=1, target_modules=ALL_LINEAR),
        llama.adapter("deep", seed=2, r=64, target_modules=["q_proj"]),
    ]
    recipe = recipe_of(llama, Merge("linear_factors"), directories, ("1", "1"))
    (tmp_path / "derived").mkdir()

    with pytest.raises(AdapterInvalidError, match="the limit is") as caught:
        build(recipe, tmp_path / "derived", llama.table, max_rank=256, max_bytes=100_000)

    assert caught.value.error_code == "adapter_too_large"
