"""What a parameter group, a keyword of an optimizer and a saved state may be, and what is said of everything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from galore_torch import GaLoreAdamW as PublishedGaLoreAdamW
from torch import nn

from hf_galore import GaLoreAdamW
from hf_galore.config import GROUP_OPTIONS
from hf_galore.optim.groups import check_fits, check_group_keys, check_options, check_plain_state

OPTIONS = ["param_options", "module", "layerwise", "projected_backward", "hold_gradients", "stochastic_rounding"]
KNOWN = [*OPTIONS, "lr", "betas", "eps", "weight_decay"]

# ---- keys of groups

MISSPELT = {
    "ranks": "rank",
    "rnak": "rank",
    "Rank": "rank",
    "galore_rank": "rank",
    "update_proj_gaps": "update_proj_gap",
    "update_gap": "update_proj_gap",
    "proj_gap": "update_proj_gap",
    "sacle": "scale",
    "proj_typ": "proj_type",
    "proj-type": "proj_type",
    "projection_type": "proj_type",
    "moment": "moments",
    "lazy_refersh": "lazy_refresh",
    "projbits": "proj_bits",
    "stochastic_roundng": "stochastic_rounding",
    "optim_bit": "optim_bits",
    "weight_dacay": "weight_decay",
}


@pytest.mark.parametrize(("key", "meant"), MISSPELT.items(), ids=list(MISSPELT))
def test_a_key_that_is_nearly_ours_is_named(key: str, meant: str) -> None:
    """Before: accepted, and trained full-rank or by the default."""
    with pytest.raises(ValueError, match=rf"sets '{key}', which GaLore does not know. Did you mean '{meant}'\?"):
        check_group_keys({"params": [], "lr": 1e-3, key: 8})


@pytest.mark.parametrize("key", ["layerwise", "projected_backward", "hold_gradients", "module", "embedding_bits"])
def test_an_option_that_is_not_a_groups_says_where_it_belongs(key: str) -> None:
    with pytest.raises(ValueError, match=f"sets '{key}', which has no effect there"):
        check_group_keys({"params": [], key: True})


FOREIGN = [
    "initial_lr",
    "max_lr",
    "min_lr",
    "max_momentum",
    "base_momentum",
    "momentum",
    "lr_scale",
    "lr_mult",
    "name",
    "param_names",
    "group_name",
    "swap",
    "weight_decay",
    "betas",
    "eps",
    "amsgrad",
    "maximize",
    "foreach",
    "capturable",
    "differentiable",
    "fused",
    "decay_mult",
    "wd_mult",
    "beta1",
    "clip_threshold",
    "decay_rate",
    "scale_parameter",
    "relative_step",
    "optim_bits",
    "is_paged",
    "correct_bias",
    "d",
    "k",
    "r",
    "use_muon",
    "ns_steps",
    "train_mode",
    "weight_sum",
    "dim",
    "stochastic_rounding",
    "rounding_seed",
]


@pytest.mark.parametrize("key", [*FOREIGN, *GROUP_OPTIONS])
def test_keys_of_others_and_our_own_stay(key: str) -> None:
    check_group_keys({"params": [], key: 1})


def test_groups_that_schedulers_have_written_to_stay() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=4)
    check_group_keys(optimizer.param_groups[0])
    ours = GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(64, 32))], "rank": 4}], stochastic_rounding=False)
    torch.optim.lr_scheduler.CosineAnnealingLR(ours, 3)
    check_group_keys(ours.param_groups[0])


# ---- keywords


def test_known_keywords_pass() -> None:
    check_options("GaLoreAdamW", OPTIONS, KNOWN)


@pytest.mark.parametrize(
    ("keyword", "words"),
    [
        ("rank", ["belongs into a parameter group", "'rank': 128", "param_options"]),
        ("update_proj_gap", ["belongs into a parameter group"]),
        ("layer_wise", ["Did you mean 'layerwise'?"]),
        ("moduel", ["Did you mean 'module'?"]),
        ("amsgrad", ["It has param_options, module, layerwise", "lr, betas"]),
        ("embedding_bits", ["optim_args", "'optim_bits': 32"]),
        ("ranks", ["Did you mean 'rank'?"]),
    ],
)
def test_an_unknown_keyword_is_named(keyword: str, words: list[str]) -> None:
    """Before: accepted, without effect."""
    with pytest.raises(TypeError, match=f"GaLoreAdamW has no keyword '{keyword}'") as error:
        check_options("GaLoreAdamW", ["layerwise", keyword], KNOWN)
    assert [word for word in words if word not in str(error.value)] == []


# ---- saved state


def trained(cls: Any) -> dict[str, Any]:
    """State after a step of a matrix and a vector."""
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(64, 32)), nn.Parameter(torch.randn(8))
    group = {"params": [matrix], "rank": 4, "update_proj_gap": 3, "scale": 1.0, "proj_type": "std"}
    optimizer = cls([{"params": [vector]}, group], lr=1e-3)
    (matrix.square().sum() + vector.sum()).backward()
    optimizer.step()
    state: dict[str, Any] = optimizer.state_dict()
    return state


def test_our_own_state_and_that_of_torch_are_plain() -> None:
    check_plain_state(trained(GaLoreAdamW))
    check_plain_state(GaLoreAdamW([nn.Parameter(torch.zeros(3))]).state_dict())
    check_plain_state({"state": {}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0]}]})


def test_state_of_galore_torch_says_so() -> None:
    """Before: AttributeError: 'int' object has no attribute 'shape'."""
    with pytest.raises(ValueError, match=r"written by the GaLore of galore_torch.* start from its weights"):
        check_plain_state(trained(PublishedGaLoreAdamW))


def test_state_of_a_layerwise_dummy_says_so() -> None:
    from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

    with pytest.raises(ValueError, match=r"written by a layerwise optimizer of transformers.* start from its weights"):
        check_plain_state(LayerWiseDummyOptimizer(optimizer_dict={}, lr=1e-3).state_dict())


def test_state_that_is_no_tensor_is_named() -> None:
    state = trained(GaLoreAdamW)
    state["state"][1]["step"] = 3
    with pytest.raises(ValueError, match=r"'step' of parameter 1 is of type int, where GaLore has tensors only"):
        check_plain_state(state)


@pytest.mark.parametrize("state", [{}, {"model": {}, "epoch": 3}], ids=repr)
def test_what_is_no_state_dict_says_so(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no state dict of an optimizer"):
        check_plain_state(state)


def test_a_parameter_that_has_changed_is_named() -> None:
    """Before: the error blamed the checkpoint's state."""
    current = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(128, 8)}
    check_fits("embed", (128, 64), current, current)
    check_fits("embed", (128, 64), {}, current)  # frozen then
    needed = {"step": torch.tensor(0.0), "exp_avg": torch.zeros(131, 8)}
    with pytest.raises(ValueError, match=r"embed has changed since the optimizer was made: its shape is \(131, 64\)"):
        check_fits("embed", (131, 64), current, needed)
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        check_fits("embed", (131, 64), current, {**current, "exp_avg_absmax": torch.zeros(2)})


# ---- what the optimizers make of them

CONSTRUCTIONS: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "rank as a keyword": ({}, {"rank": 4}, TypeError, "rank"),
    "a misspelt keyword": ({}, {"layer_wise": True}, TypeError, "'layerwise'"),
    "a keyword of torch's": ({}, {"amsgrad": True}, TypeError, "amsgrad"),
    "a misspelt key": ({"rank": 4, "update_proj_gaps": 5}, {}, ValueError, "update_proj_gap"),
    "a misspelt key without a rank": ({"proj_typ": "left"}, {}, ValueError, "proj_type"),
    "an option of the optimizer": ({"rank": 4, "layerwise": True}, {}, ValueError, "layerwise"),
}


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_nothing_is_accepted_and_ignored(name: str) -> None:
    """Each of them trained, as plain AdamW or by defaults."""
    group, keywords, error, words = CONSTRUCTIONS[name]
    weight = nn.Parameter(torch.zeros(12, 8))
    with pytest.raises(error, match=words):
        GaLoreAdamW([{"params": [weight], **group}], lr=1e-3, **keywords)
    optimizer = GaLoreAdamW([nn.Parameter(torch.zeros(3))], lr=1e-3)
    if group:
        with pytest.raises(error, match=words):
            optimizer.add_param_group({"params": [weight], **group})
        assert len(optimizer.param_groups) == 1
        with pytest.raises(error, match=words):
            GaLoreAdamW([weight], lr=1e-3, param_options={weight: group})


def test_an_embedding_that_has_grown_is_not_the_checkpoints_fault() -> None:
    net = nn.Embedding(10, 8)
    optimizer = GaLoreAdamW(net.parameters(), lr=1e-3)
    saved = optimizer.state_dict()
    net.weight.data = torch.zeros(12, 8)  # as resize_token_embeddings does it
    with pytest.raises(ValueError, match="has changed since the optimizer was made"):
        optimizer.load_state_dict(saved)
    net(torch.arange(3)).sum().backward()
    with pytest.raises(ValueError, match="has changed since the optimizer was made"):
        optimizer.step()


def test_state_of_the_published_optimizer_is_named() -> None:
    weight = nn.Parameter(torch.randn(12, 8))
    group = {"params": [weight], "rank": 4, "update_proj_gap": 5, "scale": 1.0, "proj_type": "std"}
    published = PublishedGaLoreAdamW([group], lr=1e-3)
    weight.grad = torch.randn(12, 8)
    published.step()
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 4}], lr=1e-3)
    with pytest.raises(ValueError, match=r"galore_torch.*from its weights|galore_torch.*weights"):
        optimizer.load_state_dict(published.state_dict())


SHARED = torch.zeros(24, 8)
REFUSED: dict[str, tuple[list[nn.Parameter], str]] = {
    "complex": ([nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))], "complex"),
    "partly on meta": ([nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4, 4, device="meta"))], "meta"),
    "one memory": ([nn.Parameter(SHARED), nn.Parameter(SHARED[6:18])], "memory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parameters_that_cannot_be_trained_are_refused_when_the_optimizer_is_made(name: str) -> None:
    params, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        GaLoreAdamW(params, lr=1e-3)


def test_a_sparse_embedding_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Embedding(10, 8, sparse=True), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"0.*sparse"):
        GaLoreAdamW(net.parameters(), lr=1e-3, module=net, layerwise=True)
