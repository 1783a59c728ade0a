"""Checkpoints: what is in them, that they continue the run bit for bit, and which ones are refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer

from hf_galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from tests.support.helpers import (
    EXACT_ARGS,
    GAP,
    LAYERWISE,
    NAMES,
    PLAIN,
    RANK,
    VOCABULARY,
    assert_identical,
    copied,
    logged,
    make_trainer,
    optimizer_of,
    snapshot,
    tiny_llama,
    train,
)

STEPS = 7
SAVED: dict[str, Any] = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 1,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
}
# With a gap of 3, bases are refreshed in steps 1, 4 and 7.
ON_BOUNDARY, OFF_BOUNDARY = GAP, GAP + 2


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Trainer]]:
    """The folder and the trainer of a whole run under a name, with a checkpoint after every step; run once each."""
    runs: dict[str, tuple[Path, Trainer]] = {}

    def run(name: str) -> tuple[Path, Trainer]:
        if name not in runs:
            folder = tmp_path_factory.mktemp(name)
            runs[name] = folder, train(tiny_llama(), folder, name, **SAVED)
        return runs[name]

    return run


Uninterrupted = Callable[[str], tuple[Path, Trainer]]


def checkpoint(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}"


def saved_optimizer(folder: Path, step: int) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(checkpoint(folder, step) / "optimizer.pt", weights_only=True)
    return loaded


# ---- resuming


@pytest.mark.parametrize("step", [ON_BOUNDARY, OFF_BOUNDARY], ids=["on a refresh boundary", "off a refresh boundary"])
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_uninterrupted_one(
    name: str, step: int, uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    """Without hf_galore: plain names fail with `UnpicklingError`; layerwise ones silently restart the moments."""
    folder, whole = uninterrupted(name)
    model = tiny_llama(1)  # other weights: all that the resumed run knows is the checkpoint
    trainer = make_trainer(model, tmp_path, name, **SAVED)
    trainer.train(resume_from_checkpoint=str(checkpoint(folder, step)))

    assert logged(trainer, "loss") == logged(whole, "loss")
    assert logged(trainer, "grad_norm") == logged(whole, "grad_norm")
    assert logged(trainer, "learning_rate") == logged(whole, "learning_rate")
    found, expected = (load_file(checkpoint(path, STEPS) / "model.safetensors") for path in (tmp_path, folder))
    assert_identical(dict(sorted(found.items())), dict(sorted(expected.items())))
    assert_identical(saved_optimizer(tmp_path, STEPS), saved_optimizer(folder, STEPS))
    # And the run did not stand still between the checkpoint and its end.
    early, late = saved_optimizer(folder, step)["state"], saved_optimizer(folder, STEPS)["state"]
    assert all(late[key]["step"] == STEPS and early[key]["step"] == step for key in late)


@pytest.mark.parametrize(("saved", "resumed"), list(zip(PLAIN, LAYERWISE, strict=True)))
def test_plain_and_layerwise_continue_each_others_checkpoints(
    saved: str, resumed: str, uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    """One real optimizer either way: a run that turns out too large goes on layerwise."""
    folder, _ = uninterrupted(saved)
    trainer = make_trainer(tiny_llama(1), tmp_path, resumed, **SAVED, optim_args=EXACT_ARGS)
    trainer.train(resume_from_checkpoint=str(checkpoint(folder, OFF_BOUNDARY)))
    assert_identical(saved_optimizer(tmp_path, STEPS)["state"], saved_optimizer(folder, STEPS)["state"])


# Each of these for plain and for layerwise, and all of both for every name between the two.
ROTATED = "refresh=subspace, moments=rotate, proj_bits=8"
RESET = "refresh=randomized, moments=reset, proj_bits=4"
RESUMED_OPTIONS = {
    "galore_adamw": RESET,
    "galore_adamw_8bit": ROTATED,
    "galore_adafactor": ROTATED,
    "galore_adamw_layerwise": ROTATED,
    "galore_adamw_8bit_layerwise": RESET,
    "galore_adafactor_layerwise": RESET,
}


def resumed_and_whole(
    name: str, folder: Path, make_model: Callable[[int], Any], step: int, **settings: Any
) -> tuple[tuple[Trainer, Path], tuple[Trainer, Path]]:
    """A run that is resumed after `step` steps by a model with other weights, and the same one uninterrupted."""
    settings = {**SAVED, "save_steps": step, **settings}  # and the last step is saved too
    whole = train(make_model(0), folder / "whole", name, **settings)
    resumed = make_trainer(make_model(1), folder / "resumed", name, **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint(folder / "whole", step)))
    return (resumed, folder / "resumed"), (whole, folder / "whole")


def assert_same_end(found: tuple[Trainer, Path], expected: tuple[Trainer, Path], steps: int) -> None:
    """Losses, weights and optimizer state of two runs are the same, bit for bit."""
    for key in ("loss", "grad_norm", "galore/refreshes"):
        assert logged(found[0], key) == logged(expected[0], key)
        assert len(logged(found[0], key)) == steps
    theirs, ours = (load_file(checkpoint(folder, steps) / "model.safetensors") for _, folder in (expected, found))
    assert_identical(dict(sorted(ours.items())), dict(sorted(theirs.items())))
    assert_identical(saved_optimizer(found[1], steps), saved_optimizer(expected[1], steps))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumes_within_a_gap_with_every_option(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The subspaces of so short a run are hardly stable, and lazy gaps would all be short ones.
    monkeypatch.setattr("hf_galore.lowrank.schedule.STABLE_OVERLAP", 0.1)
    step = OFF_BOUNDARY
    optim_args = f"rank={RANK}, update_proj_gap=2, scale=0.5, stagger=true, lazy_refresh=true, {RESUMED_OPTIONS[name]}"
    found, expected = resumed_and_whole(name, tmp_path, tiny_llama, step, optim_args=optim_args)
    assert_same_end(found, expected, STEPS)
    early, late = (
        [state for state in saved_optimizer(expected[1], at)["state"].values() if "refreshes" in state]
        for at in (step, STEPS)
    )
    assert len(early) == len(late) == 14
    # The checkpoint was amid longer gaps than the first, and refreshes came after it.
    assert any(state["gap_factor"] > 1 for state in early)
    assert len({state["refreshed_at"].item() for state in early}) > 1
    assert any(after["refreshes"] > before["refreshes"] for before, after in zip(early, late, strict=True))


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_layerwise"])
def test_a_run_with_stochastic_rounding_resumes_within_a_gap(name: str, tmp_path: Path) -> None:
    def model(seed: int) -> torch.nn.Module:
        small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        net: torch.nn.Module = tiny_llama(seed, **small).to(torch.bfloat16)
        return net

    optim_args = "rank=4, update_proj_gap=2, lazy_refresh=true, moments=rotate, stochastic_rounding=true"
    found, expected = resumed_and_whole(name, tmp_path, model, 3, optim_args=optim_args, max_steps=4)
    assert_same_end(found, expected, 4)
    assert {param.dtype for param in found[0].model.parameters()} == {torch.bfloat16}
    assert all(group["stochastic_rounding"] for group in optimizer_of(found[0]).param_groups)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("galore_adamw", "residual=fira, moments=rotate"),
        ("galore_adamw_8bit_layerwise", "residual=fira, lazy_refresh=true"),
        ("galore_adafactor_layerwise", "residual=sign, residual_scale=0.1"),
        ("galore_adamw_8bit", "scaling=channel"),
        ("galore_adamw_layerwise", "scaling=tensor"),
        ("galore_adamw_layerwise", "rule=muon, residual=normuon, residual_bits=8, moments=rotate"),
    ],
)
def test_a_run_that_needs_gradients_resumes_within_a_gap(name: str, options: str, tmp_path: Path) -> None:
    """With the norm that limits what is added, the random projections of the first process, a residual's momentum."""
    width = 64 if "residual_bits" in options else 16  # from where that is in 8 bits

    def model(seed: int) -> torch.nn.Module:
        net: torch.nn.Module = tiny_llama(seed, hidden_size=width, intermediate_size=24, num_hidden_layers=1)
        return net

    optim_args = f"rank=4, update_proj_gap=4, {options}"
    found, expected = resumed_and_whole(name, tmp_path, model, 3, optim_args=optim_args, max_steps=7)
    assert_same_end(found, expected, 7)
    early, late = (saved_optimizer(expected[1], at)["state"] for at in (3, 7))
    assert any(after["refreshes"] > early[key]["refreshes"] for key, after in late.items() if "refreshes" in after)
    limited = [state["limited_norm"] for state in early.values() if "limited_norm" in state]
    assert len(limited) == (7 if "fira" in options or "scaling" in options else 0)
    in_8_bits = [state for state in early.values() if "residual_momentum_absmax" in state]
    assert len(in_8_bits) == (4 if "residual_bits" in options else 0)
    assert all(norm > 0 for norm in limited)


# ---- what is saved


@pytest.mark.parametrize("name", NAMES)
def test_state_is_tensors_of_every_parameter(name: str, uninterrupted: Uninterrupted) -> None:
    """Without hf_galore: `GaLoreProjector` objects, or, layerwise, no state at all. Loads with `weights_only=True`."""
    folder, _ = uninterrupted(name)
    saved = saved_optimizer(folder, STEPS)
    assert len(saved["state"]) == len(list(tiny_llama().parameters()))
    for state in saved["state"].values():
        assert {type(value) for value in state.values()} == {Tensor}
        assert len(state) >= 2
    plain_values = (int, float, str, bool, tuple, list, type(None))
    assert all(isinstance(value, plain_values) for group in saved["param_groups"] for value in group.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_smaller_than_adamws(name: str, uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    """Without hf_galore: layerwise wrote 1,337 bytes, which hold no state."""
    folder, _ = uninterrupted(name)
    train(tiny_llama(), tmp_path, "adamw_torch", **{**SAVED, "max_steps": 1})
    adamw = (checkpoint(tmp_path, 1) / "optimizer.pt").stat().st_size
    assert (checkpoint(folder, STEPS) / "optimizer.pt").stat().st_size < adamw
    # Not because something is missing: each target has its basis of min(m, n) × r and its moments.
    state = saved_optimizer(folder, STEPS)["state"]
    bases = [value for entry in state.values() for key, value in entry.items() if key.startswith("basis")]
    assert [tuple(basis.shape) for basis in bases] == [(64, RANK)] * 14


@pytest.mark.parametrize("name", NAMES)
def test_state_has_its_keys_and_shapes_before_the_first_step(name: str, tmp_path: Path) -> None:
    def form(optimizer: torch.optim.Optimizer) -> Any:
        state = optimizer.state_dict()["state"]
        return {i: {k: (v.shape, v.dtype, v.device) for k, v in entry.items()} for i, entry in state.items()}

    trainer = make_trainer(tiny_llama(), tmp_path, name, max_steps=GAP + 1)
    trainer.create_optimizer()
    before = form(optimizer_of(trainer))
    trainer.train()
    assert form(optimizer_of(trainer)) == before
    assert len(before) == 21


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_survives_copying_and_pickling(name: str, uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    _, whole = uninterrupted(name)
    original = optimizer_of(whole).state_dict()
    for twin in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert_identical(twin, original)
        trainer = make_trainer(tiny_llama(), tmp_path, name)
        trainer.create_optimizer()
        optimizer_of(trainer).load_state_dict(twin)
        assert_identical(optimizer_of(trainer).state_dict(), original)


# ---- without a Trainer

Class = type[GaLoreAdamW] | type[GaLoreAdafactor]
CLASSES: tuple[Class, ...] = (GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor)


def small_optimizer(cls: Class, dtype: torch.dtype, seed: int = 0, **options: Any) -> torch.optim.Optimizer:
    """Two targets and two full-rank parameters, at most 96 elements each."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))

    return cls(
        [
            {"params": [weight(8, 12), weight(12, 8)], "rank": 2, "update_proj_gap": 2},
            {"params": [weight(8), weight(4, 4)]},
        ],
        lr=0.01,
        **options,
    )


def take_steps(optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_moments_keep_all_their_bits_through_loading(cls: Class, dtype: torch.dtype) -> None:
    """`torch.optim.Optimizer` casts them to the weight's dtype when it loads: bfloat16 moments."""
    optimizer = small_optimizer(cls, dtype)
    take_steps(optimizer, 3)
    loaded = small_optimizer(cls, dtype, seed=1)
    loaded.load_state_dict(copied(optimizer.state_dict()))
    assert_identical(loaded.state_dict(), optimizer.state_dict())
    moments = [v for state in loaded.state.values() for key, v in state.items() if key.startswith("exp_avg")]
    assert {moment.dtype for moment in moments} == {torch.float32}
    # There were bits to lose.
    assert not all(torch.equal(moment, moment.bfloat16().float()) for moment in moments)


@pytest.mark.parametrize("cls", CLASSES)
def test_stochastic_rounding_goes_on_with_the_random_numbers_of_the_first_process(cls: Class) -> None:
    """They come from torch's initial seed, which a second process may have set to anything."""

    def weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
        return [param.data for group in optimizer.param_groups for param in group["params"]]

    optimizer = small_optimizer(cls, torch.bfloat16, stochastic_rounding=True)
    take_steps(optimizer, 3)
    torch.manual_seed(1)
    loaded, unloaded = (small_optimizer(cls, torch.bfloat16, stochastic_rounding=True) for _ in range(2))
    for other in (loaded, unloaded):
        for param, value in zip(weights(other), weights(optimizer), strict=True):
            param.copy_(value)
        saved = copied(optimizer.state_dict())
        if other is unloaded:
            for group in saved["param_groups"]:
                group["rounding_seed"] = torch.initial_seed()
        other.load_state_dict(saved)
    for each in (optimizer, loaded, unloaded):
        take_steps(each, 3, seed=1)  # across a refresh: the gap is 2
    assert_identical(weights(loaded), weights(optimizer))
    assert_identical(loaded.state_dict(), optimizer.state_dict())
    # With numbers of its own it would have ended elsewhere.
    assert not all(map(torch.equal, weights(unloaded), weights(optimizer)))


@pytest.mark.parametrize("cls", CLASSES)
def test_loading_shares_no_tensor_with_what_was_loaded(cls: Class) -> None:
    optimizer, loaded = small_optimizer(cls, torch.float32), small_optimizer(cls, torch.float32, seed=1)
    take_steps(optimizer, 3)
    saved = optimizer.state_dict()
    expected = copied(saved)
    loaded.load_state_dict(saved)
    take_steps(loaded, 3, seed=1)
    assert_identical(optimizer.state_dict(), expected)


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_copied_optimizer_steps_as_the_original_does(
    cls: Class, twin: Callable[[torch.optim.Optimizer], torch.optim.Optimizer]
) -> None:
    """As every optimizer of torch does: both restore one without calling its constructor."""
    optimizer = small_optimizer(cls, torch.float32)
    take_steps(optimizer, 3)
    other = twin(optimizer)
    take_steps(optimizer, 2, seed=1)
    take_steps(other, 2, seed=1)
    assert_identical(other.state_dict(), optimizer.state_dict())
    weights = [[param.data for group in o.param_groups for param in group["params"]] for o in (other, optimizer)]
    assert_identical(weights[0], weights[1])


# ---- checkpoints of other runs

# What the checkpoint was written with, what it is loaded into, and what the error has to name.
OTHER_RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "rank": (
        {"optim_args": "rank=16, update_proj_gap=3"},
        {"optim_args": "rank=8, update_proj_gap=3"},
        ["with rank=16, this", "with rank=8. A"],
    ),
    "gap": ({"optim_args": "rank=16"}, {"optim_args": "rank=16, update_proj_gap=5"}, ["_gap=200", "_gap=5"]),
    "scale": ({"optim_args": "rank=16, scale=1"}, {"optim_args": "rank=16, scale=2"}, ["scale=1.0", "scale=2.0"]),
    "proj_type": (
        {"optim_args": "rank=16, proj_type=left"},
        {"optim_args": "rank=16, proj_type=full"},
        ["proj_type=left", "proj_type=full"],
    ),
    "refresh": (
        {"optim_args": "rank=16, refresh=randomized"},
        {"optim_args": "rank=16, refresh=svd"},
        ["refresh=randomized", "refresh=svd"],
    ),
    "stagger": (
        {"optim_args": "rank=16, stagger=false"},
        {"optim_args": "rank=16"},
        ["with stagger=false, this", "with stagger=true. A"],
    ),
    "lazy_refresh": (
        {"optim_args": "rank=16, lazy_refresh=true"},
        {"optim_args": "rank=16"},
        ["lazy_refresh=true", "lazy_refresh=false"],
    ),
    "moments": (
        {"optim_args": "rank=16, moments=rotate"},
        {"optim_args": "rank=16, moments=reset"},
        ["moments=rotate", "moments=reset"],
    ),
    "proj_bits": (
        {"optim_args": "rank=16, proj_bits=4"},
        {"optim_args": "rank=16, proj_bits=8"},
        ["proj_bits=4", "proj_bits=8"],
    ),
    "gradient_bits": (
        {"optim": "galore_adamw_layerwise", "optim_args": "rank=16, gradient_bits=8"},
        {"optim": "galore_adamw_layerwise", "optim_args": "rank=16"},
        ["gradient_bits=8", "gradient_bits=16"],
    ),
    "residual": (
        {"optim_args": "rank=16, residual=fira"},
        {"optim_args": "rank=16"},
        ["residual=fira", "residual=none"],
    ),
    "scaling": (
        {"optim_args": "rank=16, scaling=channel"},
        {"optim_args": "rank=16, scaling=tensor"},
        ["scaling=channel", "scaling=tensor"],
    ),
    "fewer targets": ({}, {"optim_target_modules": ["mlp"]}, ["optim_target_modules", "{saved}", "{own}"]),
    "other targets of the same shapes": (
        {"optim_target_modules": ["gate_proj"]},
        {"optim_target_modules": ["up_proj"]},
        ["gate_proj", "up_proj"],
    ),
    "AdamW into Adafactor": (
        {},
        {"optim": "galore_adafactor"},
        ["GaLoreAdafactor", "exp_avg_sq_row: saved None", "exp_avg: saved ((", "needed None"],
    ),
    "Adafactor into AdamW": (
        {"optim": "galore_adafactor"},
        {},
        ["GaLoreAdamW", "exp_avg_sq_row: saved ((", "exp_avg: saved None", "needed None"],
    ),
    # The 8-bit optimizer keeps its embeddings in a group of their own.
    "AdamW into 8-bit": ({}, {"optim": "galore_adamw_8bit"}, ["the optim", "{saved}", "{own}"]),
    "8-bit into AdamW": ({"optim": "galore_adamw_8bit"}, {}, ["the optim", "{saved}", "{own}"]),
    "torch's AdamW into AdamW": ({"optim": "adamw_torch"}, {}, ["the optim", "{saved}", "{own}"]),
}


@pytest.mark.parametrize(("written", "loaded", "words"), OTHER_RUNS.values(), ids=list(OTHER_RUNS))
def test_a_checkpoint_of_another_run_is_refused_and_changes_nothing(
    written: dict[str, Any], loaded: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    """The error names what both runs have; `{saved}` and `{own}` stand for the sizes of their groups."""

    def trained(overrides: dict[str, Any]) -> torch.optim.Optimizer:
        settings: dict[str, Any] = {"optim": "galore_adamw", "max_steps": 2, **overrides}
        return optimizer_of(train(tiny_llama(), tmp_path, settings.pop("optim"), **settings))

    def sizes(state_dict: dict[str, Any]) -> list[int]:
        return [len(group["params"]) for group in state_dict["param_groups"]]

    saved, optimizer = trained(written).state_dict(), trained(loaded)
    before = copied(optimizer.state_dict())
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the words are checked below)
        optimizer.load_state_dict(saved)
    expected = [word.format(saved=sizes(saved), own=sizes(before)) for word in words]
    assert [word for word in expected if word not in str(error.value)] == []
    assert_identical(optimizer.state_dict(), before)


@pytest.mark.parametrize("saved_rounds", [True, False])
def test_a_checkpoint_of_a_run_with_other_rounding_is_refused(saved_rounds: bool) -> None:
    def optimizer(rounds: bool) -> GaLoreAdamW:
        weight = torch.nn.Parameter(torch.ones(8, 12, dtype=torch.bfloat16))
        return GaLoreAdamW([{"params": [weight], "rank": 2}], stochastic_rounding=rounds)

    saved, loaded = optimizer(saved_rounds), optimizer(not saved_rounds)
    with pytest.raises(ValueError, match=r"was written with .* was made with") as error:
        loaded.load_state_dict(saved.state_dict())
    there, here = str(error.value).split("this optimizer was made with")
    assert f"with stochastic_rounding={str(saved_rounds).lower()}," in there
    assert f" stochastic_rounding={str(not saved_rounds).lower()}. A" in here


def test_equal_options_may_be_spelt_differently() -> None:
    weights = [torch.nn.Parameter(torch.ones(12, 8)) for _ in range(2)]
    written, loaded = (
        GaLoreAdamW([{"params": [weight], "rank": 2, "scale": scale}])
        for weight, scale in zip(weights, (1, 1.0), strict=True)
    )
    take_steps(written, 1)
    loaded.load_state_dict(copied(written.state_dict()))
    assert_identical(loaded.state_dict()["state"], written.state_dict()["state"])


def test_moments_in_other_precision_are_refused() -> None:
    """The same groups and shapes, but 8-bit moments where 32-bit ones are needed."""
    weights = [torch.nn.Parameter(torch.ones(128, 64)) for _ in range(2)]
    optimizers = [cls([weight]) for cls, weight in zip((GaLoreAdamW8bit, GaLoreAdamW), weights, strict=True)]
    for optimizer in optimizers:
        take_steps(optimizer, 1)
    for saved, loaded in (optimizers, optimizers[::-1]):
        before = copied(loaded.state_dict())
        with pytest.raises(ValueError, match=rf"does not fit {type(loaded).__name__} .*torch\.uint8") as error:
            loaded.load_state_dict(saved.state_dict())
        assert "torch.float32" in str(error.value)
        assert_identical(loaded.state_dict(), before)


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_8bit_layerwise"])
def test_resuming_with_other_arguments_ends_before_training(
    name: str, uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    folder, _ = uninterrupted(name)
    model = tiny_llama(1)
    trainer = make_trainer(model, tmp_path, name, **{**SAVED, "optim_args": "rank=8"})
    with pytest.raises(ValueError, match=rf"rank={RANK}.*rank=8"):
        trainer.train(resume_from_checkpoint=str(checkpoint(folder, GAP)))
    # The checkpoint's weights were loaded before its optimizer; not one step was taken from them.
    expected = load_file(checkpoint(folder, GAP) / "model.safetensors")
    assert all(torch.equal(param, expected[key]) for key, param in snapshot(model).items())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    """The same groups and counts, but a larger vocabulary: the shapes differ."""
    small, large = (
        train(tiny_llama(vocab_size=size), tmp_path, "galore_adamw", max_steps=1)
        for size in (VOCABULARY, VOCABULARY + 8)
    )
    with pytest.raises(ValueError, match=rf"parameter 0 of shape \({VOCABULARY + 8}, 64\)"):
        optimizer_of(large).load_state_dict(optimizer_of(small).state_dict())
