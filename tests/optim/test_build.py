"""`make_optimizer`: what a Trainer makes of the same arguments, for training loops of one's own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.training_args import OptimizerNames

import hf_galore
from hf_galore import GaLoreConfig
from hf_galore.optim.build import KINDS, make_optimizer
from hf_galore.optim.optimizer import GaLoreOptimizer
from tests.support.helpers import (
    LAYERWISE,
    NAMES,
    OPTIM_ARGS,
    PLAIN,
    assert_identical,
    hooks_on,
    logged,
    make_trainer,
    optimizer_of,
    snapshot,
    tiny_llama,
)

TARGETS = ["attn", "mlp"]


def model() -> Any:
    """With biases, which are not decayed, and a tied head."""
    return tiny_llama(attention_bias=True, tie_word_embeddings=True)


class Recording(Trainer):
    """Keeps what each micro-batch computes its loss from."""

    calls: list[tuple[dict[str, Tensor], Any]]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls = [*getattr(self, "calls", []), (dict(inputs), kwargs.get("num_items_in_batch"))]
        return super().compute_loss(model, inputs, *args, **kwargs)


def adam_values(optim: str) -> dict[str, Any]:
    return {} if "adafactor" in optim else {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}


def made(net: nn.Module, optim: str, **overrides: Any) -> GaLoreOptimizer:
    """With the values of `trained`."""
    adam = {} if "adafactor" in optim else {"betas": (0.8, 0.95), "eps": 1e-6}
    values: dict[str, Any] = {"optim_args": OPTIM_ARGS, "lr": 1e-2, "weight_decay": 0.1, **adam, **overrides}
    return make_optimizer(net, TARGETS, optim=optim, **values)


def trained(net: nn.Module, output_dir: Path, optim: str, **overrides: Any) -> Recording:
    values: dict[str, Any] = {"weight_decay": 0.1, "lr_scheduler_type": "constant", **adam_values(optim), **overrides}
    trainer = make_trainer(net, output_dir, optim, Recording, optim_target_modules=TARGETS, **values)
    trainer.train()
    assert isinstance(trainer, Recording)
    return trainer


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("optim", NAMES)
def test_a_loop_of_ones_own_ends_where_the_trainer_ends(optim: str, clip: float, tmp_path: Path) -> None:
    net, own = model(), model()
    trainer = trained(net, tmp_path, optim, max_grad_norm=clip)
    optimizer = made(own, optim, hold_gradients=clip > 0)
    own.train()
    norms = []
    for inputs, items in trainer.calls:
        own(**inputs, num_items_in_batch=items).loss.backward()
        if clip:
            norm = optimizer.clip_grad_norm_(clip)
            assert norm is not None
            norms.append(norm.item())
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    assert len(trainer.calls) == 8
    assert_identical(snapshot(own), snapshot(net))
    assert_identical(optimizer.state_dict()["state"], optimizer_of(trainer).state_dict()["state"])
    if clip:
        assert norms == logged(trainer, "grad_norm")
        assert max(norms) > clip  # it has clipped
    assert hooks_on(own) == 0


@pytest.mark.parametrize("optim", NAMES)
def test_groups_names_and_hooks_are_the_trainers(optim: str, tmp_path: Path) -> None:
    """With a layer frozen, and all options of the optimizer as a whole that are not defaults."""
    optim_args = f"{OPTIM_ARGS}, projected_backward=true" + (", embedding_bits=8" if "8bit" in optim else "")
    ends = []
    for by_trainer in (True, False):
        net = model()
        net.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
        if by_trainer:
            values: dict[str, Any] = {"weight_decay": 0.1, "optim_args": optim_args, **adam_values(optim)}
            optimizer: Any = make_trainer(net, tmp_path, optim, **values).create_optimizer()
        else:
            optimizer = made(net, optim, optim_args=optim_args)
        hooks = optimizer.hooks
        ends.append(
            (
                type(optimizer).__name__,
                optimizer.state_dict()["param_groups"],
                (hooks.layerwise, hooks.projected_backward, hooks.hold_gradients),
                hooks_on(net),
            )
        )
    assert_identical(ends[1], ends[0])
    decays = {group["weight_decay"] for group in ends[0][1]}
    assert decays == {0.0, 0.1}


@pytest.mark.parametrize("optim", NAMES)
def test_hooks_go_with_close(optim: str) -> None:
    net = model()
    optimizer = made(net, optim)
    assert (hooks_on(net) > 0) == (optim in LAYERWISE)
    optimizer.close()
    assert hooks_on(net) == 0


def test_the_defaults_are_plain_adamw_on_all_linear_layers_but_the_head() -> None:
    net = tiny_llama()
    optimizer = make_optimizer(net, optim_args={"rank": 8})
    assert type(optimizer).__name__ == "GaLoreAdamW"
    assert optimizer.hooks is None
    projected = [name for group in optimizer.param_groups if "rank" in group for name in group["param_names"]]
    assert sorted(projected) == sorted(name for name, _ in net.named_parameters() if "attn" in name or "mlp" in name)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


# ---- options


WAYS: dict[str, Any] = {
    "string": "rank=8, scale=0.5, stagger=false, projected_backward=true",
    "mapping": {"rank": 8, "scale": 0.5, "stagger": False, "projected_backward": True},
    "config": GaLoreConfig(rank=8, scale=0.5, stagger=False, projected_backward=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_options_are_taken_in_three_ways(way: str) -> None:
    optimizer = make_optimizer(model(), TARGETS, optim_args=WAYS[way])
    (found,) = {GaLoreConfig.from_group(group) for group in optimizer.param_groups if "rank" in group}
    assert found == GaLoreConfig(rank=8, scale=0.5, stagger=False)
    assert optimizer.hooks is not None
    assert optimizer.hooks.projected_backward


def test_a_member_of_transformers_names_is_a_name() -> None:
    optimizer: Any = make_optimizer(model(), TARGETS, optim=OptimizerNames("galore_adamw_8bit"), optim_args=OPTIM_ARGS)
    assert type(optimizer) is KINDS["galore_adamw_8bit"].cls


@pytest.mark.parametrize("optim", ["galore_adafactor", "galore_adafactor_layerwise"])
def test_hyperparameters_go_to_the_class(optim: str) -> None:
    optimizer = make_optimizer(model(), TARGETS, optim=optim, optim_args=OPTIM_ARGS, clip_threshold=2.0, beta1=0.9)
    assert {(group["clip_threshold"], group["beta1"]) for group in optimizer.param_groups} == {(2.0, 0.9)}
    with pytest.raises(TypeError, match="make_optimizer has no keyword 'betas'"):
        make_optimizer(model(), TARGETS, optim=optim, optim_args=OPTIM_ARGS, betas=(0.9, 0.99))


# ---- groups of one's own, and two models


def two_models() -> tuple[nn.ModuleList, nn.Module, nn.Module]:
    """A U-Net and its text encoder, as far as an optimizer can tell."""
    first, second = tiny_llama(seed=1), tiny_llama(seed=2)
    return nn.ModuleList([first, second]), first, second


def trained_on_its_own(net: Any, optimizer: GaLoreOptimizer, steps: int = 4) -> None:
    for number in range(steps):
        tokens = (torch.arange(32).reshape(2, 16) + number) % 100
        net(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("optim", NAMES)
def test_two_models_in_one_optimizer_train_as_in_two_each_at_its_rate(optim: str) -> None:
    both, *nets = two_models()
    rates = (1e-2, 1e-3)
    # Not staggered: turns are among all targets of an optimizer.
    groups = [{"params": net.parameters(), "lr": lr} for net, lr in zip(nets, rates, strict=True)]
    optim_args = f"{OPTIM_ARGS}, stagger=false"
    optimizer = make_optimizer(both, optim=optim, optim_args=optim_args, params=groups, weight_decay=0.1)
    del both
    assert {group["lr"] for group in optimizer.param_groups} == set(rates)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
    for net in nets:
        trained_on_its_own(net, optimizer)
    for seed, found, lr in zip((1, 2), nets, rates, strict=True):
        alone = tiny_llama(seed=seed)
        own = make_optimizer(
            alone, optim=optim, optim_args=optim_args, params=alone.parameters(), lr=lr, weight_decay=0.1
        )
        trained_on_its_own(alone, own)
        assert_identical(snapshot(found), snapshot(alone))


def test_hooks_come_back_onto_models_that_only_the_optimizer_has_as_one() -> None:
    """Losses in an nn.Sequential, as sentence-transformers makes it, for a Trainer that trains a second time."""
    both, first, _ = two_models()
    optimizer = make_optimizer(both, optim="galore_adamw_layerwise", optim_args=OPTIM_ARGS)
    del both
    on = hooks_on(first)
    optimizer.close()
    assert hooks_on(first) == 0
    assert optimizer.hooks is not None
    optimizer.hooks.attach()
    assert hooks_on(first) == on > 0


def test_groups_of_ones_own_have_what_is_trained() -> None:
    net = tiny_llama()
    net.lm_head.requires_grad_(False)
    optimizer = make_optimizer(net, TARGETS, optim_args=OPTIM_ARGS, params=net.named_parameters())
    found = {name for group in optimizer.param_groups for name in group["param_names"]}
    assert found == {name for name, param in net.named_parameters() if param.requires_grad}
    assert len(optimizer.targets()) == 14


def test_groups_that_miss_something_or_have_too_much_are_refused() -> None:
    net = tiny_llama()
    layers = list(net.model.layers.parameters())
    with pytest.raises(ValueError, match=r"^model\.embed_tokens\.weight and 2 other\(s\) can be trained, but is in no"):
        make_optimizer(net, TARGETS, optim_args=OPTIM_ARGS, params=layers)
    with pytest.raises(ValueError, match=r"a parameter of shape \(3, 2\) that is none of LlamaForCausalLM.*ModuleList"):
        make_optimizer(net, optim_args=OPTIM_ARGS, params=[*net.parameters(), nn.Parameter(torch.zeros(3, 2))])
    with pytest.raises(TypeError, match=r"params has to be parameters, or groups .* but has str"):
        make_optimizer(net, optim_args=OPTIM_ARGS, params={"params": layers})
    with pytest.raises(ValueError, match="A parameter group sets 'rnak', which GaLore does not know"):
        make_optimizer(net, optim_args=OPTIM_ARGS, params=[{"params": net.parameters(), "rnak": 3}])
    assert hooks_on(net) == 0


# ---- refusals

MISTAKES: list[dict[str, Any]] = [
    {"optim_args": "rank"},
    {"optim_args": "rank=8;scale=1"},
    {"optim_args": "rank=0"},
    {"optim_args": "rank=256"},
    {"optim_args": "rnak=8"},
    {"optim_args": "rank=8, proj_type=foo"},
    {"optim_args": "rank=8, embedding_bits=8"},
    {"optim_target_modules": ["atn", "mlp"]},
    {"optim_target_modules": []},
    {"optim_target_modules": "(unclosed"},
    {"optim_target_modules": "attn"},
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_mistakes_are_answered_as_under_the_trainer(mistake: dict[str, Any], tmp_path: Path) -> None:
    values = {"optim_args": OPTIM_ARGS, "optim_target_modules": TARGETS, **mistake}
    net = model()
    with pytest.raises(ValueError, match=r".") as expected:
        make_trainer(net, tmp_path, "galore_adamw_layerwise", **values).create_optimizer()
    targets = values.pop("optim_target_modules")
    with pytest.raises(ValueError, match=r".") as found:
        make_optimizer(net, targets, optim="galore_adamw_layerwise", **values)
    assert str(found.value) == str(expected.value)
    assert hooks_on(net) == 0


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"rnak": 8}, "Did you mean 'rank'"),
        ({"rank": "eight"}, "rank has to be an integer"),
        ({"rank": True}, "rank has to be an integer"),
        ({"rank": 8, "scale": -1}, "scale has to be a finite number above 0"),
        ({"rank": 8, "stagger": 1}, "stagger has to be true or false"),
        ({"rank": None}, "rank has to be an integer of at least 1, but was given None"),
        ({"rnak": None}, "Did you mean 'rank'"),
    ],
    ids=str,
)
def test_mistakes_in_a_mapping_are_named(mapping: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_optimizer(model(), TARGETS, optim_args=mapping)


@pytest.mark.parametrize(("name", "hint"), [("galore_adam", " Did you mean 'galore_adamw'?"), ("sgd", "")])
def test_an_unknown_name_is_answered_with_those_there_are(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=r"optim has to be one of galore_adamw, .*, but is ") as error:
        make_optimizer(model(), TARGETS, optim=name, optim_args=OPTIM_ARGS)
    assert str(error.value).endswith(f"but is {name!r}.{hint}")


def test_an_unknown_keyword_is_an_error() -> None:
    with pytest.raises(TypeError, match="make_optimizer has no keyword 'learning_rate'"):
        make_optimizer(model(), TARGETS, optim_args=OPTIM_ARGS, learning_rate=1e-3)


def test_what_galore_cannot_train_is_refused_before_any_state_is_made() -> None:
    net = nn.ModuleDict({"tokens": nn.Embedding(64, 64, sparse=True), "attn": nn.Linear(64, 64)})
    with pytest.raises(ValueError, match="tokens is an embedding with sparse=True"):
        make_optimizer(net, TARGETS, optim_args="rank=8")


# ---- what is said


@pytest.mark.parametrize("optim", PLAIN)
def test_one_line_says_what_is_projected_as_under_the_trainer(
    optim: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "hf_galore"):
        make_trainer(model(), tmp_path, optim).create_optimizer()
        (expected,) = (record.getMessage() for record in caplog.records)
        caplog.clear()
        made(model(), optim)
        (found,) = (record.getMessage() for record in caplog.records)
    assert found == expected
    assert found.startswith("GaLore projects 14 matrices")


def test_the_package_has_it() -> None:
    assert hf_galore.make_optimizer is make_optimizer


def test_it_needs_no_registration() -> None:
    """Nor leaves one."""
    hf_galore.unregister()
    try:
        before = dict(vars(Trainer))
        net = model()
        optimizer = made(net, "galore_adamw_8bit_layerwise")
        tokens = torch.arange(32).reshape(2, 16)
        start = snapshot(net)
        net(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        assert all(not torch.equal(param, start[name]) for name, param in net.named_parameters())
        assert dict(vars(Trainer)) == before
    finally:
        hf_galore.register()


@pytest.mark.parametrize(
    ("keyword", "words"),
    [
        ("rank", r"optim_args=\{'rank': \.\.\.\}"),
        ("stochastic_rounding", r"optim_args=\{'stochastic_rounding'"),
        ("projected_backward", r"optim_args=\{'projected_backward'"),
        ("rule", r"optim_args=\{'rule'"),
        ("layerwise", "an optim that ends in _layerwise"),
        ("optm", "Did you mean 'optim'?"),
        ("module", "It has target_modules, optim, optim_args, lr,"),
    ],
)
def test_a_keyword_that_belongs_elsewhere_is_sent_there(keyword: str, words: str) -> None:
    """Before anything else: of a small model the default rank would be complained of first."""
    with pytest.raises(TypeError, match=rf"make_optimizer has no keyword '{keyword}'\. .*{words}"):
        make_optimizer(tiny_llama(), **cast("dict[str, Any]", {keyword: 1}))


def test_arguments_of_other_types_are_named() -> None:
    with pytest.raises(TypeError, match="takes the model itself, but was given a generator"):
        make_optimizer(tiny_llama().parameters())
    with pytest.raises(ValueError, match="lr has to be a number, but is '1e-3'"):
        make_optimizer(tiny_llama(), optim_args={"rank": 16}, lr="1e-3")  # type: ignore[arg-type, unused-ignore]
    with pytest.raises(ValueError, match=r"betas have to be two numbers .*, but are 0\.9"):
        make_optimizer(tiny_llama(), optim_args={"rank": 16}, betas=0.9)
