"""`optim_target_modules`: which weights are projected, and what is said where none, or not all, can be."""

from __future__ import annotations

import functools
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import check_target_module_exists

from hf_galore import GaLoreConfig
from hf_galore.integrations.target_modules import Targets, find_targets
from hf_galore.integrations.weights import embedding_weights
from tests.support.helpers import (
    GAP,
    RANK,
    assert_same_but_for_rounding,
    assert_same_path,
    make_trainer,
    optimizer_of,
    perturbed,
    snapshot,
    tiny_llama,
    train,
)

LAYERS = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1)
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
]
ATTENTION = [name for name in LAYERS if "self_attn" in name]
MLP = [name for name in LAYERS if "mlp" in name]


def test_transformers_is_as_we_need_it() -> None:
    """Fails first, and by name, when a new transformers moves something."""
    conv = Conv1D(3, 5)  # of 5 inputs and 3 outputs
    assert tuple(conv.weight.shape) == (5, 3), f"Conv1D.weight is {tuple(conv.weight.shape)}, not inputs × outputs"
    model = tiny_llama()
    assert model.get_output_embeddings() is model.lm_head, "PreTrainedModel.get_output_embeddings() is not the head"
    # The rule that the Trainer's own optimizers match by, with which ours is compared below.
    assert check_target_module_exists(["attn"], "model.layers.0.self_attn.q_proj")


def test_peft_is_as_we_need_it() -> None:
    """By these names adapters are told, and the head is found inside of what PEFT wraps it in."""
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model: Any = get_peft_model(tiny_llama(), config)
    adapters = [name for name, param in model.named_parameters() if param.requires_grad and "q_proj" in name]
    assert adapters, "PEFT trains nothing of a layer with an adapter"
    for name in adapters:
        assert any(part.startswith("lora_") for part in name.split(".")), (
            f"PEFT calls an adapter {name}: no lora_ in it"
        )
    heads = [name for name, param in model.named_parameters() if param.requires_grad and "lm_head" in name]
    assert heads, "PEFT trains no copy of a head in modules_to_save"
    inside = dict(model.named_modules())
    head = model.get_base_model().get_output_embeddings()
    assert all(inside[name.rpartition(".")[0]] in set(head.modules()) for name in heads), (
        f"PEFT keeps the head that it trains ({heads}) outside of get_output_embeddings()"
    )


@functools.cache
def llama() -> LlamaForCausalLM:
    """Shared by the tests that leave it as it is."""
    return tiny_llama()


def find(target_modules: Any, model: nn.Module | None = None, rank: int = RANK) -> Targets:
    return find_targets(llama() if model is None else model, target_modules, GaLoreConfig(rank=rank))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=32, n_embd=64, n_layer=1, n_head=2))


# ---- what matches


SELECTED: list[tuple[Any, list[str]]] = [
    (["attn", "mlp"], LAYERS),
    (("attn", "mlp"), LAYERS),  # Without hf_galore: a tuple gave TypeError
    (["attn"], ATTENTION),
    (["mlp", "q_proj"], sorted([*MLP, "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"])),
    (["model.layers.0.mlp.up_proj"], ["model.layers.0.mlp.up_proj"]),
    ([r"model\.layers\.1\..*attn.*", "0.mlp"], [*ATTENTION[4:], *MLP[:3]]),
    (["lm_head"], ["lm_head"]),
    (r".*\.mlp\..*", MLP),
    (r"model\.layers\.0\.self_attn\.[qk]_proj", ATTENTION[:2]),
    ("lm_head", ["lm_head"]),
    ("all-linear", LAYERS),  # Without hf_galore: includes lm_head
    ("all_linear", LAYERS),
    (["all-linear"], LAYERS),  # Without hf_galore: `No target modules found`
]


@pytest.mark.parametrize(("target_modules", "expected"), SELECTED, ids=[repr(case[0]) for case in SELECTED])
def test_selects(target_modules: Any, expected: list[str]) -> None:
    targets = find(target_modules)
    assert sorted(targets.projected) == sorted(expected)
    assert targets.too_small == {}
    modules = dict(llama().named_modules())
    assert all(weight is modules[name].weight for name, weight in targets.projected.items())


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return bool(text)


pieces = st.sampled_from(
    [*LAYERS[:3], "model", "layers", "attn", "mlp", "proj", "lm_head", "norm", "0", "1", ".", ".*", "up|down", "[qkv]_"]
)
letters = st.text("adlmoprv_.01|()?+", min_size=1, max_size=6)
patterns = st.one_of(pieces, st.lists(pieces, min_size=1, max_size=4).map("".join), letters).filter(_is_pattern)


@settings(max_examples=300)
@given(st.one_of(patterns, st.lists(patterns, min_size=1, max_size=3)))
@example(["attn", ".*mlp.*up_proj"])
@example([".*o_proj", "model.layers.1.self_attn.o_proj"])
@example("model.layers.0.mlp.up_proj")
def test_matching_is_that_of_transformers(target_modules: str | list[str]) -> None:
    linear = [name for name, module in llama().named_modules() if isinstance(module, nn.Linear)]
    entries = [target_modules] if isinstance(target_modules, str) else [[entry] for entry in target_modules]
    # An entry that no linear layer matches may mean the embedding, which transformers leaves out: tested elsewhere.
    embeddings = [name for name, module in llama().named_modules() if isinstance(module, nn.Embedding)]
    only_embeddings = [
        entry
        for entry in entries
        if not any(check_target_module_exists(entry, name) for name in linear)
        and any(check_target_module_exists(entry, name) for name in embeddings)
    ]
    assume(not only_embeddings)
    if any(not any(check_target_module_exists(entry, name) for name in linear) for entry in entries):
        with pytest.raises(ValueError, match="matches no trainable matrix"):  # transformers passes over it
            find(target_modules, rank=1)
    else:
        expected = {name for name in linear if check_target_module_exists(target_modules, name)}
        assert set(find(target_modules, rank=1).projected) == expected


def test_an_entry_that_is_no_regular_expression_is_still_a_substring() -> None:
    model = nn.ModuleDict({"odd(name": nn.Linear(32, 32), "other": nn.Linear(32, 32)})
    assert list(find(["odd(name"], model).projected) == ["odd(name"]


def test_frozen_weights_are_left_alone() -> None:
    model = tiny_llama()
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        model.get_submodule(name).requires_grad_(False)
    expected = set(LAYERS) - {"model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"}
    assert set(find(["attn", "mlp"], model).projected) == expected
    assert set(find("all-linear", model).projected) == expected


def test_a_weight_of_several_modules_appears_once() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    for target_modules in (["attn", "mlp"], "all-linear", ["layers.1.mlp.up_proj", "layers.0.mlp.up_proj"]):
        names = [name for name in find(target_modules, model).projected if name.endswith("up_proj")]
        assert names == ["model.layers.0.mlp.up_proj"]
    # Through either of its modules, it is the same weight.
    (weight,) = find(["layers.1.mlp.up_proj"], model).projected.values()
    assert weight is model.model.layers[0].mlp.up_proj.weight


def test_tied_embeddings_are_projected_through_the_head(tmp_path: Path) -> None:
    """Without hf_galore: no target, silently plain AdamW: names are looked up in `named_parameters()`."""
    model = tiny_llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    trainer = make_trainer(model, tmp_path, "galore_adamw", optim_target_modules=["lm_head"])
    optimizer = trainer.create_optimizer()
    projected = [param for group in optimizer.param_groups if "rank" in group for param in group["params"]]
    assert [id(param) for param in projected] == [id(model.lm_head.weight)]
    assert optimizer.state[projected[0]]["exp_avg"].shape == (128, RANK)
    # "all-linear" leaves the head out under this name too.
    assert set(find("all-linear", model).projected) == set(LAYERS)


def test_conv1d_of_gpt2_is_projected(tmp_path: Path) -> None:
    """Without hf_galore: `No target modules found`, or, with "all-linear", silently no target."""
    model = gpt2()
    expected = {f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert set(find(["attn", "mlp"], model).projected) == expected
    assert set(find("all-linear", model).projected) == expected
    assert {name for name, module in model.named_modules() if isinstance(module, Conv1D)} == expected

    before = snapshot(model)
    trainer = train(model, tmp_path, "galore_adamw", max_steps=2 * GAP)
    after = snapshot(model)
    for name in expected:
        weight = model.get_parameter(f"{name}.weight")
        assert min(optimizer_of(trainer).state[weight]["exp_avg"].shape) == RANK
        assert not after[f"{name}.weight"].equal(before[f"{name}.weight"])


@pytest.mark.parametrize("entry", ["embed_tokens", "model.embed_tokens", r"model\.embed.*"])
def test_an_embedding_is_a_target_where_it_is_meant(entry: str) -> None:
    model = llama()
    weight = model.model.embed_tokens.weight
    assert find([entry], model).projected == {"model.embed_tokens": weight}
    both = find(["mlp", entry], model).projected
    assert next(iter(both)) == "model.embed_tokens"
    assert len(both) == 1 + 3 * model.config.num_hidden_layers
    if entry.startswith("model."):
        assert find(entry, model).projected == {"model.embed_tokens": weight}


@pytest.mark.parametrize("target_modules", [["model"], ["o"], r"model\..*", "all-linear"], ids=repr)
def test_an_embedding_among_linear_layers_is_not_meant(target_modules: Any) -> None:
    assert "model.embed_tokens" not in find(target_modules).projected


def test_a_frozen_embedding_says_so() -> None:
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    with pytest.raises(ValueError, match="It matches frozen ones"):
        find(["embed_tokens"], model)


@pytest.mark.arithmetic
@pytest.mark.parametrize("tie", [False, True])
def test_projected_embeddings_train_layerwise_as_they_do_plain(tie: bool, tmp_path: Path) -> None:
    def model() -> LlamaForCausalLM:
        return tiny_llama(tie_word_embeddings=tie)

    def end(model: LlamaForCausalLM, optim: str) -> dict[str, Tensor]:
        targets = ["attn", "mlp", "embed_tokens", *([] if tie else ["lm_head"])]
        # ε as in test_layerwise: Adam magnifies rounding where gradients are small.
        trainer = train(model, tmp_path, optim, optim_target_modules=targets, adam_epsilon=1e-3)
        optimizer: Any = optimizer_of(trainer)
        assert optimizer.memory().targets == (15 if tie else 16)
        assert "basis_right" in optimizer.state[model.model.embed_tokens.weight]
        return snapshot(model)

    found = end(model(), "galore_adamw_layerwise")
    expected, nearby = (end(each, "galore_adamw") for each in (model(), perturbed(model())))
    assert_same_but_for_rounding(found, expected, nearby, snapshot(model()))


def test_embedding_weights() -> None:
    assert [id(weight) for weight in embedding_weights(llama())] == [id(llama().model.embed_tokens.weight)]
    assert len(embedding_weights(gpt2())) == 2


# ---- what is refused

SUGGESTIONS = {
    "atn": ["'atn'", "self_attn"],
    "attn_": ["'attn_'", "self_attn"],
    "q_prj": ["'q_prj'", "Did you mean", "'q_proj'"],
    "up_porj": ["'up_porj'", "Did you mean", "'up_proj'"],
    "ml_p": ["'ml_p'", "Did you mean", "'mlp'"],
    "zzzz": ["'zzzz'", "Names in it", "mlp", "q_proj", "self_attn"],
}


@pytest.mark.parametrize(("entry", "words"), SUGGESTIONS.items(), ids=list(SUGGESTIONS))
@pytest.mark.parametrize("others", [[], ["mlp"]], ids=["alone", "beside one that matches"])
def test_an_entry_that_matches_nothing_is_named_with_near_names(
    entry: str, words: list[str], others: list[str]
) -> None:
    """Without hf_galore: `["atn","mlp"]` silently targeted half; no match at all gave `No target modules found`."""
    with pytest.raises(ValueError, match="matches no trainable matrix of LlamaForCausalLM") as error:
        find([entry, *others])
    assert [word for word in words if word not in str(error.value)] == []


REFUSED: list[tuple[Any, type[Exception], list[str]]] = [
    ("(unclosed", ValueError, ["'(unclosed'", "not a valid regular expression", "['attn', 'mlp']"]),
    ("[a-", ValueError, ["'[a-'", "not a valid regular expression"]),
    ("a{99999999999999999999}", ValueError, ["not a valid regular expression"]),
    ("attn", ValueError, ["'attn'", "whole name", "model.layers.0.self_attn.q_proj", "['attn']"]),
    ([], ValueError, ["[]", "at least one module", "all-linear"]),
    ((), ValueError, ["()", "at least one module"]),
    ([""], ValueError, ["['']", "match everything"]),
    (["mlp", ""], ValueError, ["['mlp', '']", "match everything"]),
    (["all-linear", "nothing"], ValueError, ["'nothing' matches no trainable matrix"]),
    ("attm", ValueError, ["'attm'", "whole name", "Names in it", "self_attn"]),
    (
        r"model\.layers\.0\.mlp",
        ValueError,
        ["names of their own, such as 'model.layers.0.mlp.gate_proj'", "'.*' behind"],
    ),
    (8, TypeError, ["8", "string or a list of strings"]),
    ([8], TypeError, ["[8]", "string or a list of strings"]),
    ({"mlp": True}, TypeError, ["{'mlp': True}", "string or a list of strings"]),
    ({"mlp"}, TypeError, ["{'mlp'}", "string or a list of strings"]),
]


@pytest.mark.parametrize(("target_modules", "kind", "words"), REFUSED, ids=[repr(case[0]) for case in REFUSED])
def test_refused_in_words(target_modules: Any, kind: type[Exception], words: list[str]) -> None:
    """Without hf_galore: a raw `re` error, `No target modules found`, a bare TypeError."""
    with pytest.raises(kind) as error:
        find(target_modules)
    assert type(error.value) is kind  # not a subclass such as UnicodeError
    message = str(error.value)
    assert [word for word in ["optim_target_modules", *words] if word not in message] == []


@pytest.mark.parametrize(
    ("target_modules", "kinds"),
    [(["norm"], "LlamaRMSNorm"), (["layers.0.mlp.act_fn"], "SiLUActivation"), (r"model\.norm", "LlamaRMSNorm")],
    ids=repr,
)
def test_a_match_of_other_modules_only_says_so(target_modules: Any, kinds: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"matches only modules of other kinds ({kinds})")):
        find(target_modules)


@pytest.mark.parametrize("target_modules", [["mlp", "q_proj"], r".*\.q_proj"], ids=repr)
def test_a_match_of_frozen_layers_only_says_so(target_modules: Any) -> None:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.q_proj.requires_grad_(False)
    with pytest.raises(ValueError, match=r"q_proj.* matches no trainable matrix .* It matches frozen ones"):
        find(target_modules, model)


def test_a_match_of_what_lora_has_frozen_says_how_adapters_are_trained() -> None:
    model: Any = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"'mlp' matches no .* what LoRA has frozen\. Train its adapters with optim="):
        find(["mlp"], model)


def test_all_linear_of_a_model_without_linear_layers() -> None:
    with pytest.raises(ValueError, match="'all-linear', but Sequential has no trainable linear layer"):
        find("all-linear", nn.Sequential(nn.Embedding(8, 8), nn.LayerNorm(8)))


# ---- rank and size


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("rank", [64, 256, 1000])
def test_a_rank_at_or_above_every_smaller_side_is_refused(rank: int, proj_type: Any) -> None:
    """Without hf_galore: rank ≥ both sides ran, and cost more memory than AdamW."""
    with pytest.raises(ValueError, match=rf"rank {rank} is not below the smaller side .*at most 64.*at most 63"):
        find_targets(llama(), ["attn", "mlp"], GaLoreConfig(rank=rank, proj_type=proj_type))


def test_a_rank_just_below_the_smaller_side_is_accepted() -> None:
    assert set(find(["attn", "mlp"], rank=63).projected) == set(LAYERS)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_matrices_that_are_too_small_train_full_rank_and_are_named(
    proj_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without hf_galore: `proj_type=reverse_std` with rank ≥ a side ended in a shape error."""
    model = tiny_llama(num_key_value_heads=1)  # k_proj and v_proj are 32 × 64
    before = snapshot(model)
    with caplog.at_level(logging.INFO, "hf_galore"):
        trainer = train(model, tmp_path, "galore_adamw", optim_args=f"rank=48, proj_type={proj_type}", max_steps=2)
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("hf_galore")]
    small = [name for name in LAYERS if "k_proj" in name or "v_proj" in name]
    assert line.endswith(
        "; no side above the rank: model.layers.*.self_attn.k_proj (2), model.layers.*.self_attn.v_proj (2)."
    )
    assert line.startswith("GaLore projects 10 matrices")

    optimizer = optimizer_of(trainer)
    for name, param in model.named_parameters():
        assert not param.detach().equal(before[name])
        projected = any(key.startswith("basis") for key in optimizer.state[param])
        assert projected == (name.removesuffix(".weight") in set(LAYERS) - set(small)), name


def test_small_matrices_are_named_once_for_all_layers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama(num_key_value_heads=1, num_hidden_layers=6)
    model.model.layers[1].self_attn.k_proj.requires_grad_(False)
    for layer in (0, 1, 2, 4, 5):
        model.model.layers[layer].self_attn.v_proj.requires_grad_(False)
    with caplog.at_level(logging.INFO, "hf_galore"):
        make_trainer(model, tmp_path, "galore_adamw", optim_args="rank=48").create_optimizer()
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("hf_galore")]
    assert line.endswith("rank: model.layers.*.self_attn.k_proj (5), model.layers.3.self_attn.v_proj.")


def _count(text: str) -> float:
    """The number that `20.48K` stands for."""
    return float(text.rstrip("KMB")) * {"K": 1e3, "M": 1e6, "B": 1e9}.get(text[-1], 1)


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_8bit_layerwise"])
def test_one_line_says_what_is_projected(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without hf_galore: a warning for each container that matches: 6 lines for 2 layers."""
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    with caplog.at_level(logging.INFO):
        train(model, tmp_path, name, max_steps=2)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("hf_galore") or "matched" in r.getMessage()]
    assert len(lines) == 1
    found = re.fullmatch(
        r"GaLore projects (\d+) matrices \(([\d.]+[KMB]?) parameters, ([\d.]+) %\) at rank (\d+); "
        r"full-rank: output head ([\d.]+) %, norms and biases ([\d.]+) %\.",
        lines[0],
    )
    assert found is not None, lines[0]
    projected = [model.get_parameter(f"{target}.weight").numel() for target in LAYERS]
    trainable = [param.numel() for param in model.parameters() if param.requires_grad]
    assert int(found[1]) == len(projected)
    assert int(found[4]) == RANK
    # Four digits are printed, and shares to a tenth.
    assert _count(found[2]) == pytest.approx(sum(projected), rel=5e-4)
    norms = sum(param.numel() for param in model.parameters() if param.ndim == 1)
    for text, numbers in ((found[3], sum(projected)), (found[5], model.lm_head.weight.numel()), (found[6], norms)):
        assert float(text) == pytest.approx(100 * numbers / sum(trainable), abs=0.051)


# ---- weights that are computed


def weight_norm_hook(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in use
        nn.utils.weight_norm(layer)


COMPUTED: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "weight_norm by hooks": weight_norm_hook,
    "spectral_norm by hooks": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


def with_computed(compute: Callable[[nn.Module], Any], *layers: int) -> LlamaForCausalLM:
    """A model whose `up_proj` of some layers has no weight of its own."""
    model = tiny_llama()
    for layer in layers:
        compute(model.model.layers[layer].mlp.up_proj)
    return model


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=list(COMPUTED))
def test_a_computed_weight_is_no_target(compute: Any) -> None:
    """Before: counted as projected, `KeyError: 139715730291472` or `max() arg is an empty sequence`."""
    model = with_computed(compute, 0)
    for target_modules in (["attn", "mlp"], "all-linear", r".*_proj"):
        targets = find(target_modules, model)
        assert sorted(targets.projected) == sorted(set(LAYERS) - {"model.layers.0.mlp.up_proj"})
        assert targets.computed == ("model.layers.0.mlp.up_proj",)


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=list(COMPUTED))
def test_an_entry_that_matches_computed_weights_only_is_an_error(compute: Any) -> None:
    for target_modules in (["up_proj"], ["attn", "up_proj"], r".*\.up_proj"):
        with pytest.raises(ValueError, match="only layers whose weight is computed") as error:
            find(target_modules, with_computed(compute, 0, 1))
        assert "model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj" in str(error.value)


def test_all_linear_of_a_model_of_computed_weights() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)))
    with pytest.raises(ValueError, match=r"has no trainable linear layer .* whose weight is computed .*\(0\)"):
        find("all-linear", model)


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_layerwise"])
@pytest.mark.parametrize("kind", ["weight_norm", "orthogonal", "weight_norm by hooks"])
def test_what_a_weight_is_computed_from_trains_as_with_adamw(
    name: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At a scale that moves nothing else far, so that the parameters of that layer go where AdamW takes them."""
    ends = []
    for optim in (name, "adamw_torch"):
        model = with_computed(COMPUTED[kind], 0)
        for key, param in model.named_parameters():
            param.requires_grad_("layers.0.mlp.up_proj" in key or "layers.1.mlp.down_proj" in key)
        start = snapshot(model)
        overrides: dict[str, Any] = {"max_steps": 4, "optim_args": f"rank={RANK}, scale=1e-30"}
        if optim == "adamw_torch":
            model.model.layers[1].mlp.down_proj.weight.requires_grad_(False)
            overrides.update(optim_target_modules=None, optim_args=None)
        with caplog.at_level(logging.INFO, "hf_galore"):
            train(model, tmp_path, optim, **{"optim_target_modules": ["mlp"], **overrides})
        ends.append({key: param for key, param in snapshot(model).items() if "layers.0.mlp.up_proj" in key})
    assert_same_path(ends[0], ends[1], start, 1e-4)
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("hf_galore")][:1]
    assert line.startswith("GaLore projects 1 matrix")
    assert "whose weight is computed" in line
    assert line.endswith(": model.layers.0.mlp.up_proj.")


def test_a_computed_embedding_is_no_target() -> None:
    model = tiny_llama()
    nn.utils.parametrizations.weight_norm(model.model.embed_tokens)
    assert embedding_weights(model) == []
    with pytest.raises(ValueError, match="matches no trainable matrix"):
        find(["embed_tokens"], model)


# ---- heads in wrappers, and adapters


def lora(model: nn.Module | None = None, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny_llama() if model is None else model, LoraConfig(**{"r": 8, **settings}))


def names_of(targets: Targets) -> set[str]:
    return {name.removeprefix("base_model.model.") for name in targets.projected}


def test_all_linear_leaves_out_a_head_that_peft_trains_whole() -> None:
    """Before: `lm_head.modules_to_save.default` was projected."""
    model = lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert isinstance(model.base_model.model.lm_head.modules_to_save["default"], nn.Linear)
    for layer in model.base_model.model.model.layers:
        layer.mlp.requires_grad_(True)
    adapters = {f"model.layers.{i}.self_attn.q_proj.lora_{ab}.default" for i in (0, 1) for ab in "AB"}
    assert names_of(find("all-linear", model, rank=4)) == adapters | set(MLP)
    model.base_model.model.lm_head.original_module.requires_grad_(True)
    assert names_of(find("all-linear", model, rank=4)) == adapters | set(MLP)
    assert names_of(find(["lm_head.modules_to_save"], model)) == {"lm_head.modules_to_save.default"}


def test_all_linear_leaves_out_the_adapters_of_a_head() -> None:
    model = lora(target_modules=["lm_head", "up_proj"])
    assert names_of(find("all-linear", model, rank=4)) == {
        f"model.layers.{i}.mlp.up_proj.lora_{ab}.default" for i in (0, 1) for ab in "AB"
    }


class WithValueHead(nn.Module):
    """A wrapper that does not say what its model's head is."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_model = tiny_llama()
        self.v_head = nn.Linear(64, 32)


class NoHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 32)

    def get_output_embeddings(self) -> nn.Module:
        raise NotImplementedError


def test_all_linear_knows_the_head_of_a_model_in_a_wrapper() -> None:
    """Before: projected."""
    expected = {f"pretrained_model.{name}" for name in LAYERS} | {"v_head"}
    assert set(find("all-linear", WithValueHead()).projected) == expected
    compiled: Any = torch.compile(tiny_llama())
    assert {name.removeprefix("_orig_mod.") for name in find("all-linear", compiled).projected} == set(LAYERS)
    assert set(find("all-linear", NoHead()).projected) == {"layer"}


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_as_targets_gain_nothing_and_it_says_so(
    dora: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = lora(target_modules=["q_proj"], use_dora=dora)
    with caplog.at_level(logging.WARNING, "hf_galore"):
        train(model, tmp_path, "galore_adamw", optim_target_modules="all-linear", optim_args="rank=4", max_steps=1)
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("hf_galore")]
    assert line.startswith("4 of the 4 matrices that GaLore projects are adapters of LoRA, such as base_model.model.")


def test_weights_beside_adapters_say_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = lora(target_modules=["q_proj"])
    model.base_model.model.model.layers[0].mlp.requires_grad_(True)
    with caplog.at_level(logging.WARNING, "hf_galore"):
        train(model, tmp_path, "galore_adamw", optim_target_modules=["mlp"], optim_args="rank=4", max_steps=1)
    assert [record for record in caplog.records if record.name.startswith("hf_galore")] == []


def test_adapters_below_the_rank_are_not_answered_with_a_smaller_rank() -> None:
    with pytest.raises(ValueError, match=r"rank 16 is not below .* adapters of LoRA.* optim='adamw_torch'"):
        find("all-linear", lora(target_modules=["q_proj"]))


def test_vectors_are_not_answered_with_a_rank_of_zero() -> None:
    with pytest.raises(ValueError, match=r"rank 1 .*at most 1.*Matrices of one row or column"):
        find(["0"], nn.Sequential(nn.Linear(64, 1)), rank=1)
