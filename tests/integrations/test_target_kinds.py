"""Targets besides linear layers: experts, routers, convolutions, recurrence, attention; what is said of the rest."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_galore import GaLoreConfig
from hf_galore.integrations.target_modules import Targets, find_targets
from hf_galore.integrations.target_summary import summarize, warning_of_unreached
from hf_galore.integrations.weights import weights_of
from hf_galore.optim.build import optimizer_cls_and_kwargs
from tests.support.helpers import tiny_llama

RANK = 4
CONFIG = GaLoreConfig(rank=RANK)


def find(model: nn.Module, target_modules: Any = "all-linear", rank: int = RANK) -> Targets:
    return find_targets(model, target_modules, GaLoreConfig(rank=rank))


def line_of(model: nn.Module, target_modules: Any = "all-linear", config: GaLoreConfig = CONFIG) -> str:
    return summarize(model, find_targets(model, target_modules, config), config)


# ---- mixtures of experts

# Of hidden size 64, 4 heads and 8 experts.
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
DEEPSEEK = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DBRX = {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 128}
EXPERTS_OF_DBRX = {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2}

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
STACKS = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}

# For each, its config, and of its last layer the stacks and what else is projected.
MIXTURES: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "mixtral": ({"num_local_experts": 8}, STACKS, ATTENTION | {"mlp.gate.weight"}),
    "qwen3_moe": (
        {"num_experts": 8, "moe_intermediate_size": 32, "head_dim": 16},
        STACKS,
        ATTENTION | {"mlp.gate.weight"},
    ),
    "deepseek_v3": (
        {**DEEPSEEK, **LATENT, "first_k_dense_replace": 1, "num_key_value_heads": 4},
        STACKS,
        {f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
        | {"mlp.gate.weight", *(f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down"))},
    ),
    "gpt_oss": ({"num_local_experts": 8, "head_dim": 16}, STACKS, ATTENTION | {"mlp.router.weight"}),
    "llama4_text": (
        {"num_local_experts": 8, "intermediate_size_mlp": 64, "head_dim": 16, "interleave_moe_layer_step": 1},
        {"feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"},
        ATTENTION
        | {"feed_forward.router", *(f"feed_forward.shared_expert.{name}_proj" for name in ("gate", "up", "down"))},
    ),
    "granitemoe": (
        {"num_local_experts": 8},
        {"block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"},
        ATTENTION | {"block_sparse_moe.router.weight"},
    ),
    "dbrx": (
        {**DBRX, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}, "ffn_config": EXPERTS_OF_DBRX},
        {f"ffn.experts.mlp.{name}" for name in ("w1", "v1", "w2")},
        {"norm_attn_norm.attn.Wqkv", "norm_attn_norm.attn.out_proj", "ffn.router.layer"},
    ),
    "jetmoe": (
        {"num_local_experts": 8, "kv_channels": 16},
        {f"{part}.{name}_linear.weight" for part in ("mlp", "self_attention.experts") for name in ("input", "output")},
        {"mlp.router.layer", "self_attention.experts.router.layer", "self_attention.kv_proj"},
    ),
    "olmoe": ({"num_experts": 8}, STACKS, ATTENTION | {"mlp.gate.weight"}),
}


def mixture(kind: str, device: str = "meta") -> Any:
    own = MIXTURES[kind][0]
    settings = own if kind == "dbrx" else {**SIZES, **own}
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))


@pytest.mark.parametrize("kind", MIXTURES)
def test_all_linear_projects_the_experts_of(kind: str) -> None:
    """Before: 56 to 88 % of the parameters of such a model trained full-rank, and nothing said so."""
    model, (_, stacks, matrices) = mixture(kind), MIXTURES[kind]
    targets = find(model)
    last = re.compile(r".*\.1\.(.*)")
    shapes = {
        found[1]: shape
        for name, shape in zip(targets.projected, targets.matrices(), strict=True)
        if (found := last.fullmatch(name))
    }
    assert {name for name, shape in shapes.items() if len(shape) == 3} == stacks
    assert {name for name, shape in shapes.items() if len(shape) == 2} == matrices
    assert {shape[0] for shape in shapes.values() if len(shape) == 3} == {8}
    assert (targets.too_small, targets.computed) == ({}, ())
    # All that has two dimensions, but embeddings, the head, and biases, of which gpt-oss has some for each expert.
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    others = {name for name, param in model.named_parameters() if param.ndim > 1 and id(param) not in tables}
    whole = {name if name in others else f"{name}.weight" for name in targets.projected}
    assert whole == {name for name in others if not name.endswith("bias")}


def test_experts_one_below_the_other_are_viewed_as_a_stack() -> None:
    targets = find(mixture("dbrx"))
    assert set(targets.views.values()) == {8}
    assert {
        name for name, shape in zip(targets.projected, targets.matrices(), strict=True) if shape == (8, 32, 64)
    } == {f"transformer.blocks.{layer}.ffn.experts.mlp.{name}" for layer in (0, 1) for name in ("w1", "v1", "w2")}


def test_the_view_comes_to_the_optimizer() -> None:
    model = nn.Sequential(nn.Conv1d(16, 32, 3), nn.Conv2d(8, 16, 3), nn.Linear(16, 16))
    _, kwargs = optimizer_cls_and_kwargs(
        model, "all-linear", optim="galore_adamw", config=CONFIG, hold_gradients=False, say=False
    )
    options = {name: kwargs["param_options"][module.weight] for name, module in model.named_children()}
    assert options == {
        "0": {**CONFIG.group_options(), "view_as": "flat"},
        "1": options["2"],
        "2": CONFIG.group_options(),
    }


class Stacked(nn.Module):
    """Parameters of a model's own, of the shape of experts."""

    def __init__(self, own: str = "gate_up_proj", **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)
        self.register_parameter(own, nn.Parameter(torch.empty(6, 16, 24)))


class MyExperts(Stacked):
    pass


class GroupedLinear(Stacked):
    pass


class MoEGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 16))


class AggregateLayer(MoEGate):
    pass


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ({"a": MyExperts()}, {"a.gate_up_proj"}),
        ({"experts": Stacked()}, {"experts.gate_up_proj"}),
        ({"a": Stacked(num_experts=6)}, {"a.gate_up_proj"}),
        ({"a": Stacked(num_local_experts=6)}, {"a.gate_up_proj"}),
        ({"a": Stacked(num_experts=4)}, set()),
        ({"a": Stacked()}, set()),
        ({"a": MyExperts("gate_up_proj_bias")}, set()),
        ({"a": GroupedLinear("weight")}, {"a.weight"}),
        ({"a": Stacked("q", n_head=16, d_head=24)}, {"a.q"}),
        ({"a": Stacked("seg_embed", n_head=16, d_head=24)}, set()),
        ({"gate": MoEGate()}, {"gate.weight"}),
        ({"a": AggregateLayer()}, set()),
    ],
    ids=lambda value: repr(sorted(value) if isinstance(value, set) else value),
)
def test_what_a_models_own_parameters_are(modules: dict[str, nn.Module], expected: set[str]) -> None:
    model = nn.ModuleDict({**modules, "linear": nn.Linear(16, 16)})
    assert set(find(model).projected) == expected | {"linear"}


# ---- layers of torch


class Mixed(nn.Module):
    """One of each kind, and embeddings, a table of positions and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, 32)
        self.position_embeddings = nn.Parameter(torch.empty(1, 24, 32))
        self.mixing = nn.Parameter(torch.empty(24, 20))
        self.scale = nn.Parameter(torch.empty(1, 1, 32))
        self.lstm = nn.LSTM(32, 16, 2, bidirectional=True, proj_size=12)
        self.cell = nn.GRUCell(24, 16)
        self.attn = nn.MultiheadAttention(32, 4, add_bias_kv=True)
        self.cross = nn.MultiheadAttention(32, 4, kdim=24, vdim=20)
        self.both = nn.Bilinear(16, 24, 8)
        self.conv = nn.Sequential(
            nn.Conv1d(16, 32, 3),
            nn.Conv1d(32, 32, 5, groups=32),
            nn.Conv1d(32, 64, 5, groups=32),
            nn.Conv2d(1, 32, 8),
            nn.Conv2d(16, 32, 3, groups=2),
            nn.ConvTranspose2d(16, 32, 3),
            nn.ConvTranspose1d(16, 16, 3, groups=16),
            nn.Conv3d(8, 16, 3),
        )
        self.norm = nn.LayerNorm([8, 32])


SHAPES = {
    "lstm.weight_ih_l0": (64, 32),
    "lstm.weight_hh_l0": (64, 12),
    "lstm.weight_hr_l0": (12, 16),
    "lstm.weight_ih_l0_reverse": (64, 32),
    "lstm.weight_hh_l0_reverse": (64, 12),
    "lstm.weight_hr_l0_reverse": (12, 16),
    "lstm.weight_ih_l1": (64, 24),
    "lstm.weight_hh_l1": (64, 12),
    "lstm.weight_hr_l1": (12, 16),
    "lstm.weight_ih_l1_reverse": (64, 24),
    "lstm.weight_hh_l1_reverse": (64, 12),
    "lstm.weight_hr_l1_reverse": (12, 16),
    "cell.weight_ih": (48, 24),
    "cell.weight_hh": (48, 16),
    "attn.in_proj_weight": (96, 32),
    "attn.out_proj": (32, 32),
    "cross.q_proj_weight": (32, 32),
    "cross.k_proj_weight": (32, 24),
    "cross.v_proj_weight": (32, 20),
    "cross.out_proj": (32, 32),
    "both": (8, 16, 24),
    "conv.0": (32, 48),
    "conv.3": (32, 64),
    "conv.4": (32, 72),
    "conv.5": (16, 288),
    "conv.7": (16, 216),
}
DEPTHWISE = ("conv.1", "conv.2", "conv.6")


def test_all_linear_of_one_of_each_kind() -> None:
    """Before: only `out_proj`, silently."""
    model = Mixed()
    targets = find(model)
    assert dict(zip(targets.projected, targets.matrices(), strict=True)) == SHAPES
    assert targets.depthwise == DEPTHWISE
    assert targets.views == {"conv.0": "flat"}
    parameters = dict(model.named_parameters())
    for name, weight in targets.projected.items():
        assert weight is parameters.get(name, parameters.get(f"{name}.weight"))


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (["lstm"], {name for name in SHAPES if name.startswith("lstm")}),
        (["weight_hh"], {name for name in SHAPES if "weight_hh" in name}),
        (["in_proj_weight"], {"attn.in_proj_weight"}),
        (["attn", "both"], {"attn.in_proj_weight", "attn.out_proj", "both"}),
        (r"conv\.\d", {"conv.0", "conv.3", "conv.4", "conv.5", "conv.7"}),
        (["position_embeddings"], {"position_embeddings"}),
        (["tokens", "mixing"], {"tokens", "mixing"}),
        (["position_embeddings", "cell"], {"position_embeddings", "cell.weight_ih", "cell.weight_hh"}),
        (["o"], {name for name in SHAPES if "o" in name}),  # neither `tokens` nor `position_embeddings`
    ],
    ids=lambda value: repr(sorted(value) if isinstance(value, set) else value),
)
def test_entries_reach_all_kinds(entries: Any, expected: set[str]) -> None:
    assert set(find(Mixed(), entries).projected) == expected


def test_a_parameter_of_the_model_itself_has_a_name() -> None:
    model = Mixed()
    assert find(model, ["mixing"]).projected["mixing"] is model.mixing


@pytest.mark.parametrize(
    ("entry", "hint"),
    [
        ("weight_ih_lo", "'weight_ih_l0'"),
        ("in_proj_wieght", "'in_proj_weight'"),
        ("position_embedings", "Did you mean 'position_embeddings'"),
        ("convs", "Did you mean 'conv'"),
        ("mixng", "Did you mean 'mixing'?"),
        ("conv.1", "only depthwise convolutions, of one filter for each channel (conv.1), which train full-rank"),
        ("norm", "only modules of other kinds (LayerNorm), which cannot be projected"),
        ("attn.in_proj_bias", "only norms, biases and other vectors (attn.in_proj_bias), which cannot be projected"),
    ],
)
def test_an_entry_that_selects_nothing_says_why(entry: str, hint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{entry!r} matches no trainable matrix of Mixed.")) as error:
        find(Mixed(), ["lstm", entry])
    assert hint in str(error.value)


def test_a_typo_in_the_name_of_experts() -> None:
    with pytest.raises(ValueError, match="Did you mean 'experts'"):
        find(mixture("mixtral"), ["expets"])
    with pytest.raises(ValueError, match="'gate_up_proj'"):
        find(mixture("mixtral"), ["gate_up_porj"])


def test_frozen_and_too_large_a_rank() -> None:
    model = Mixed()
    model.lstm.requires_grad_(False)
    with pytest.raises(ValueError, match="It matches frozen ones"):
        find(model, ["lstm"])
    assert not any(name.startswith("lstm") for name in find(model).projected)
    with pytest.raises(ValueError, match=r"rank 16 is not below .* 1 target\(s\) \(at most 16\)"):
        find(model, ["both"], rank=16)  # 8 × 16 × 24, of which no side is the number of matrices
    assert set(find(model, ["both"], rank=15).projected) == {"both"}
    with pytest.raises(ValueError, match=r"at most 16"):
        find(model, ["conv.5"], rank=16)


def test_a_weight_that_experts_share_appears_once() -> None:
    model = nn.ModuleDict({"a": MyExperts(), "b": MyExperts(), "c": nn.Conv2d(8, 16, 3), "d": nn.Conv2d(8, 16, 3)})
    model["b"].gate_up_proj, model["d"].weight = model["a"].gate_up_proj, model["c"].weight
    assert set(find(model).projected) == {"a.gate_up_proj", "c"}
    assert set(find(model, ["b", "d"]).projected) == {"b.gate_up_proj", "d"}


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "by hooks": lambda layer: nn.utils.spectral_norm(layer),
}


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=list(COMPUTED))
def test_a_convolution_whose_weight_is_computed(compute: Any) -> None:
    """As wav2vec2's convolution of positions."""
    model = nn.ModuleDict({"conv": compute(nn.Conv1d(16, 32, 3)), "linear": nn.Linear(16, 16)})
    targets = find(model)
    assert (set(targets.projected), targets.computed) == ({"linear"}, ("conv",))
    assert "computed from other parameters (weight_norm, spectral_norm, orthogonal, pruning): conv." in line_of(model)
    with pytest.raises(ValueError, match="only layers whose weight is computed"):
        find(model, ["conv"])


def test_a_recurrent_weight_that_is_computed_is_no_target() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.LSTM(16, 16), "weight_hh_l0")
    assert set(find(model).projected) == {"weight_ih_l0"}
    assert {weight.kind for weight in weights_of(model) if "parametrizations" in weight.name} == {
        "computed weights",
        "norms and biases",
    }


def test_integers_are_no_targets() -> None:
    """As quantised experts are."""
    model = nn.ModuleDict({"experts": MyExperts(), "linear": nn.Linear(16, 16)})
    model["experts"].gate_up_proj = nn.Parameter(torch.zeros(6, 16, 24, dtype=torch.uint8), requires_grad=False)
    assert set(find(model).projected) == {"linear"}


# ---- sharded by FSDP2


def sharded(*params: Tensor) -> None:
    """Make these look like DTensors."""
    for param in params:
        param.device_mesh = None  # type: ignore[attr-defined]


def test_stacks_and_convolutions_that_are_sharded_are_not_projected() -> None:
    model = nn.ModuleDict({"experts": MyExperts(), "conv": nn.Conv2d(8, 16, 3), "linear": nn.Linear(16, 16)})
    sharded(*model.parameters())
    targets = find(model)
    assert set(targets.projected) == {"linear"}
    assert targets.sharded == ("experts.gate_up_proj", "conv")
    assert line_of(model).endswith("; stacks and convolutions that are sharded by FSDP2: experts.gate_up_proj, conv.")
    with pytest.raises(ValueError, match=r"only stacks and convolutions that are sharded by FSDP2 \(conv\)"):
        find(model, ["conv"])
    found = warning_of_unreached(model, "all-linear", targets, CONFIG)
    assert found is not None
    assert "because FSDP2 has sharded what is no single matrix, such as experts.gate_up_proj (6 × 16 × 24)" in found


def test_experts_in_rows_that_are_sharded_are_not_projected() -> None:
    model = mixture("dbrx")
    sharded(*model.parameters())
    assert {name.rpartition(".")[2] for name in find(model).projected} == {"Wqkv", "out_proj", "layer"}


# ---- what is said


def test_the_line_of_a_mixture() -> None:
    model = mixture("mixtral")
    total = sum(param.numel() for param in model.parameters())
    table = 100 * 128 * 64 / total
    assert line_of(model) == (
        f"GaLore projects 10 matrices and 4 stacks of 8 (173.1K parameters, {100 * 173056 / total:.1f} %) at rank 4; "
        f"full-rank: embeddings {table:.1f} %, output head {table:.1f} %, norms and biases {100 * 320 / total:.1f} %."
    )
    with_rank = line_of(model, config=GaLoreConfig(rank=16))
    assert with_rank.endswith(
        "routers 0.5 %, norms and biases 0.2 %; no side above the rank: model.layers.*.mlp.gate.weight (2)."
    )


def test_the_line_of_one_of_each_kind() -> None:
    """Everything is in it, with its share, most first; and what is projected and what is not is all."""
    model = Mixed()
    line = line_of(model, ["both", "conv"])
    total = sum(param.numel() for param in model.parameters())
    assert line.startswith("GaLore projects 5 matrices and 1 stack of 8 (")
    assert line.endswith("; depthwise, with a filter for each channel and no matrix: conv.* (3).")
    found = {
        kind: float(share) for kind, share in re.findall(r"([a-z][a-z ()]*) ([\d.]+) %", line.partition("rank: ")[2])
    }
    assert list(found.values()) == sorted(found.values(), reverse=True)
    numbers = {
        "recurrent": sum(param.numel() for name, param in model.lstm.named_parameters() if "weight" in name)
        + model.cell.weight_ih.numel()
        + model.cell.weight_hh.numel(),
        "attention": 96 * 32 + 32 * (32 + 24 + 20),
        "linear layers": 2 * 32 * 32,
        "embeddings": 40 * 32 + 24 * 32,
        "other matrices": 24 * 20,
        "convolutions (depthwise)": 32 * 5 + 64 * 5 + 16 * 3,
    }
    numbers["norms and biases"] = (
        total
        - sum(numbers.values())
        - sum(weight.numel() for weight in find(model, ["both", "conv"]).projected.values())
    )
    assert found == {kind: round(100 * count / total, 1) for kind, count in numbers.items()}


def test_a_line_where_nothing_is_left() -> None:
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    assert line_of(model) == "GaLore projects 1 matrix (256 parameters, 100.0 %) at rank 4; nothing trains full-rank."


def test_small_shares_are_not_none() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(512, 512, bias=False), "norm": nn.LayerNorm(4)})
    line = line_of(model)
    assert line.endswith("full-rank: norms and biases under 0.01 %.")
    assert "(262.1K parameters, over 99.9 %)" in line


# By what is named, what the warning says; `None` for none.
UNREACHED: list[tuple[Any, list[str] | None]] = [
    ("all-linear", None),
    (["attn", "mlp"], None),
    (
        ["attn"],
        [
            "78.2 % of the trainable parameters",
            "no entry of optim_target_modules reaches",
            "experts, such as model.layers.0.mlp.experts.gate_up_proj (8 × 96 × 64)",
            "add 'experts', or give 'all-linear'",
        ],
    ),
    (["attn", "gate"], ["25.9 %", "model.layers.0.mlp.experts.down_proj (8 × 64 × 48)", "add 'down_proj'"]),
    (["experts"], None),  # the rest is below a fifth
    (["attn", "experts"], None),
]


@pytest.mark.parametrize(("target_modules", "words"), UNREACHED, ids=[repr(case[0]) for case in UNREACHED])
def test_a_warning_of_what_no_entry_reaches(target_modules: Any, words: list[str] | None) -> None:
    model = mixture("mixtral")
    found = warning_of_unreached(model, target_modules, find(model, target_modules), CONFIG)
    if words is None:
        assert found is None
    else:
        assert found is not None
        assert [word for word in words if word not in found] == []


def test_embeddings_and_the_head_alone_are_nothing_to_warn_of() -> None:
    model = tiny_llama(vocab_size=2048)
    assert warning_of_unreached(model, "all-linear", find(model), CONFIG) is None


def test_frozen_parameters_are_nothing_to_warn_of() -> None:
    model = mixture("mixtral").requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.requires_grad_(True)
    targets = find(model, ["attn"])
    assert warning_of_unreached(model, ["attn"], targets, CONFIG) is None
    assert summarize(model, targets, CONFIG).endswith("100.0 %) at rank 4; nothing trains full-rank.")


def test_a_large_matrix_of_unknown_use_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """And the entry that it names does reach it."""
    model = nn.ModuleDict({"linear": nn.Linear(16, 16), "a": Stacked("filters")})
    with caplog.at_level(logging.WARNING, "hf_galore"):
        optimizer_cls_and_kwargs(model, "all-linear", optim="galore_adamw", config=CONFIG, hold_gradients=False)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "most of all other matrices, such as a.filters (6 × 16 × 24)" in line
    assert line.endswith("To project these give ['all-linear', 'filters'].")
    targets = find(model, ["all-linear", "filters"])
    assert set(targets.projected) == {"linear", "a.filters"}
    assert warning_of_unreached(model, ["all-linear", "filters"], targets, CONFIG) is None


class Bare(nn.Module):
    """Matrices that a model has made itself, some in a list, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bag = nn.Linear(16, 16), nn.EmbeddingBag(30, 16)
        self.blocks = nn.ParameterList(nn.Parameter(torch.zeros(16, 24)) for _ in range(3))
        self.Up, self.pos = nn.Parameter(torch.zeros(16, 24)), nn.Parameter(torch.zeros(1, 9, 16))
        self.large, self.flat = nn.Parameter(torch.zeros(30, 16)), nn.Parameter(torch.zeros(4, 600))
        self.lstm = nn.LSTM(16, 16)


def test_bare_matrices() -> None:
    """Tables are embeddings; the entry for an element of a list reaches all; what is too flat is not asked for."""
    model = Bare()
    targets = find(model)
    assert ("pos", "embeddings") in [(weight.name, weight.kind) for weight in weights_of(model)]
    assert ("bag", "embeddings") in [(weight.name, weight.kind) for weight in weights_of(model)]
    warning = warning_of_unreached(model, "all-linear", targets, CONFIG)
    assert warning is not None
    share = 100 * (4 * 16 * 24 + 30 * 16) / sum(param.numel() for param in model.parameters())  # not `flat`
    assert warning.startswith(f"{share:.1f} % of the trainable parameters")
    assert warning.endswith("such as blocks.0 (16 × 24). To project these give ['all-linear', 'blocks'].")
    assert set(find(model, ["all-linear", "blocks"]).projected) == {
        *targets.projected,
        *(f"blocks.{i}" for i in range(3)),
    }
    assert set(find(model, ["all-linear", "pos", "bag"]).projected) == {*targets.projected, "pos", "bag"}
    assert line_of(model, ["pos"]).startswith("GaLore projects 1 matrix (144 parameters, ")


@pytest.mark.parametrize(
    ("target_modules", "words"),
    [
        (["up"], ["Did you mean 'Up'?"]),
        (["zzz"], ["Names in it: linear, lstm, weight_", "Other matrices, by their own names: Up, large, "]),
        ("lstm", ["the weights in them have names of their own, such as 'lstm.weight_ih_l0'"]),
        (["linear.bias"], ["It matches only norms, biases and other vectors (linear.bias)"]),
    ],
    ids=repr,
)
def test_names_that_are_no_layers_are_suggested_too(target_modules: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match="matches no trainable matrix of Bare") as error:
        find(Bare(), target_modules)
    assert [word for word in words if word not in str(error.value)] == []


def test_all_linear_of_bare_matrices_names_them() -> None:
    with pytest.raises(ValueError, match=r"no trainable linear layer .* Other matrices, by their own names: filters"):
        find(Stacked("filters"))
