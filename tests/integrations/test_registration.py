"""What `import hf_galore` changes in transformers, what it leaves alone, and what the Trainer's arguments become."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames, ParallelMode

import hf_galore
from hf_galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.integrations.trainer import KINDS, PATCHED, is_registered, moved_internals, registered
from tests.support.helpers import (
    GAP,
    LAYERWISE,
    NAMES,
    RANK,
    SCALE,
    arguments,
    assert_identical,
    hooks_on,
    logged,
    make_trainer,
    optimizer_of,
    snapshot,
    tiny_llama,
    train,
)

CLASSES = {
    "galore_adamw": GaLoreAdamW,
    "galore_adamw_8bit": GaLoreAdamW8bit,
    "galore_adafactor": GaLoreAdafactor,
    "galore_adamw_layerwise": GaLoreAdamW,
    "galore_adamw_8bit_layerwise": GaLoreAdamW8bit,
    "galore_adafactor_layerwise": GaLoreAdafactor,
}


@pytest.fixture
def unregistered() -> Iterator[None]:
    """transformers as it comes; registered again afterwards."""
    hf_galore.unregister()
    yield
    hf_galore.register()


def methods() -> dict[str, Any]:
    """What stands in `Trainer` under each name, decorators included."""
    return {name: inspect.getattr_static(Trainer, name) for name in PATCHED}


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


# ---- registering and unregistering


def test_the_names_are_those_that_transformers_has() -> None:
    assert set(CLASSES) == set(KINDS) == {name.value for name in OptimizerNames if "galore" in name.value}


def test_transformers_has_what_registration_needs(unregistered: None) -> None:
    """Fails first, and by name, when a new transformers moves something."""
    assert moved_internals() == []


ATTRIBUTES = ("args", "model", "optimizer", "optimizer_cls_and_kwargs", "is_fsdp_enabled", "is_deepspeed_enabled")
ARGUMENTS = (
    *("optim", "optim_args", "optim_target_modules", "learning_rate", "weight_decay", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "fp16", "n_gpu", "process_index", "parallel_mode"),
    *("auto_find_batch_size", "fsdp", "fsdp_config", "deepspeed"),
)


def test_trainers_and_their_arguments_have_what_we_read(tmp_path: Path) -> None:
    """Some are read with a default, where their absence would be taken for a no."""
    trainer = make_trainer(tiny_llama(), tmp_path, "galore_adamw")
    assert [f"Trainer.{name} is gone" for name in ATTRIBUTES if not hasattr(trainer, name)] == []
    assert [f"TrainingArguments.{name} is gone" for name in ARGUMENTS if not hasattr(trainer.args, name)] == []
    assert hasattr(trainer.accelerator, "unscale_gradients"), "Accelerator.unscale_gradients is gone"
    assert hasattr(trainer.accelerator.state, "dynamo_plugin"), "Accelerator.state.dynamo_plugin is gone"
    assert hasattr(trainer.accelerator, "parallelism_config"), "Accelerator.parallelism_config is gone"
    assert {"DISTRIBUTED"} <= set(ParallelMode.__members__), "ParallelMode.DISTRIBUTED is gone"


@pytest.mark.parametrize("name", ["create_optimizer", "_inner_training_loop", "_prepare_for_training", "log"])
def test_a_training_comes_by_what_is_replaced(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that is there, and called no more, would be replaced in vain."""
    calls: list[str] = []
    method = getattr(Trainer, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return method(*args, **kwargs)

    monkeypatch.setattr(Trainer, name, counting)
    train(tiny_llama(), tmp_path, "adamw_torch", optim_target_modules=None, optim_args=None, max_steps=1)
    assert calls, f"Trainer.train() does not call {name} any more"


@pytest.mark.parametrize(("name", "clip"), [("_clip_grad_norm", 1.0), ("_get_grad_norm", 0.0), ("_get_grad_norm", 1.0)])
def test_a_step_comes_by_what_is_replaced(
    name: str, clip: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    method = getattr(Trainer, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return method(*args, **kwargs)

    monkeypatch.setattr(Trainer, name, counting)
    plain: dict[str, Any] = {"optim_target_modules": None, "optim_args": None, "max_steps": 2}
    train(tiny_llama(), tmp_path, "adamw_torch", max_grad_norm=clip, **plain)
    assert calls == [name] * 2, f"a step of Trainer does not call {name} once any more"


def test_registering_again_changes_nothing() -> None:
    before = methods()
    hf_galore.register()
    hf_galore.register()
    assert all(methods()[name] is method for name, method in before.items())


def test_importing_twice_registers_once_and_unregistering_restores_the_very_objects() -> None:
    printed = run_python(
        """
        import importlib, sys
        from transformers.trainer import Trainer

        def holds(methods):
            return list(vars(Trainer)) == list(methods) and all(vars(Trainer)[n] is methods[n] for n in methods)

        original = dict(vars(Trainer))
        import hf_galore
        registered = dict(vars(Trainer))
        replaced = sorted(name for name in registered if registered[name] is not original.get(name))
        assert replaced == sorted(hf_galore.integrations.trainer.PATCHED), replaced

        import hf_galore
        importlib.reload(hf_galore)
        hf_galore.register()
        assert holds(registered)
        for _ in range(2):  # once is enough, however often it was registered, and twice does no harm
            hf_galore.unregister()
            assert holds(original)

        for name in [name for name in sys.modules if name.split(".")[0] == "hf_galore"]:
            del sys.modules[name]
        import hf_galore  # the modules anew
        assert not holds(original)
        hf_galore.unregister()
        assert holds(original)
        print("restored")
        """
    )
    assert printed == "restored"


@pytest.mark.parametrize("name", PATCHED)
def test_what_is_replaced_is_seen_through(name: str) -> None:
    """By those who go by a method's name, signature or source."""
    found = getattr(Trainer, name)
    source = inspect.getsource(found)
    hf_galore.unregister()
    try:
        own = getattr(Trainer, name)
        assert found is not own
        assert (found.__name__, inspect.signature(found)) == (own.__name__, inspect.signature(own))
        assert source == inspect.getsource(own)
    finally:
        hf_galore.register()


def test_a_training_loop_that_another_library_made_of_the_trainers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As unsloth does when it loads a model: of the source it makes its own function, and puts that in its place."""
    ends = []
    for rewritten in (False, True):
        if rewritten:
            source = textwrap.dedent(inspect.getsource(Trainer._inner_training_loop))
            names = dict(vars(sys.modules[Trainer.__module__]))
            exec(source.replace("def _inner_training_loop", "def _rewritten", 1), names)
            monkeypatch.setattr(Trainer, "_inner_training_loop", names["_rewritten"])
        model = tiny_llama()
        trainer = train(model, tmp_path, "galore_adamw_layerwise", gradient_accumulation_steps=2, max_steps=3)
        assert hooks_on(model) == 0
        ends.append((snapshot(model), logged(trainer, "loss")))
    assert_identical(ends[1], ends[0])


def test_unregistered_trainers_are_transformers_own(unregistered: None, tmp_path: Path) -> None:
    args = arguments(tmp_path, "galore_adamw")
    cls, _ = Trainer.get_optimizer_cls_and_kwargs(args, tiny_llama())
    assert cls.__module__.startswith("galore_torch")


def test_registered_within_only(unregistered: None, tmp_path: Path) -> None:
    def made_by() -> str:
        return str(
            Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, "galore_adamw"), tiny_llama())[0].__module__
        )

    before = methods()

    def within() -> None:
        with registered():
            assert made_by().startswith("hf_galore")
            with registered():
                pass
            assert is_registered()
            raise KeyError

    with pytest.raises(KeyError):
        within()
    assert methods() == before
    assert not is_registered()
    hf_galore.register()
    with registered():
        pass
    assert is_registered()


def test_a_method_that_is_gone_is_named(unregistered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Trainer, "_get_grad_norm")
    before = {name: inspect.getattr_static(Trainer, name, None) for name in PATCHED}
    assert moved_internals() == ["Trainer._get_grad_norm(self, model, grad_norm=None) is gone"]
    with pytest.raises(ImportError, match=r"cannot register with transformers .*Trainer\._get_grad_norm.* is gone"):
        hf_galore.register()
    assert {name: inspect.getattr_static(Trainer, name, None) for name in PATCHED} == before


def test_a_signature_that_changed_is_named(unregistered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def create_optimizer(self: Any, model: Any = None, *, extra: int = 0) -> None: ...

    monkeypatch.setattr(Trainer, "create_optimizer", create_optimizer)
    expected = "Trainer.create_optimizer(self, model=None) is now create_optimizer(self, model=None, *, extra=0)"
    assert moved_internals() == [expected]
    with pytest.raises(ImportError, match="create_optimizer"):
        hf_galore.register()
    assert inspect.getattr_static(Trainer, "create_optimizer") is create_optimizer


# ---- the other optimizers


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames if name.value not in KINDS])
def test_other_names_are_untouched(name: str, tmp_path: Path) -> None:
    def outcome() -> Any:
        try:
            return Trainer.get_optimizer_cls_and_kwargs(
                TrainingArguments(output_dir=str(tmp_path), optim=name, optim_args=None, use_cpu=True)
            )
        except (ImportError, ValueError, RuntimeError) as error:  # optimizers that are not installed
            return type(error), str(error)

    registered = outcome()
    hf_galore.unregister()
    try:
        assert outcome() == registered
    finally:
        hf_galore.register()


def test_adamw_torch_is_torchs(tmp_path: Path) -> None:
    trainer = make_trainer(tiny_llama(), tmp_path, "adamw_torch", optim_target_modules=None, optim_args=None)
    assert type(trainer.create_optimizer()) is torch.optim.AdamW


def test_an_optimizer_of_ones_own_stays(tmp_path: Path) -> None:
    model = tiny_llama()
    mine = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model=model, args=arguments(tmp_path, "galore_adamw"), optimizers=(mine, None))
    assert trainer.create_optimizer() is mine


# ---- names, classes, groups


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("member", [False, True], ids=["string", "enum member"])
def test_a_name_gives_its_class(name: str, member: bool, tmp_path: Path) -> None:
    optim = OptimizerNames(name) if member else name
    model = tiny_llama()
    trainer = make_trainer(model, tmp_path, optim)
    assert type(trainer.create_optimizer()) is CLASSES[name]
    assert (hooks_on(model) > 0) == (name in LAYERWISE)


class DecaysNormsOnly(Trainer):
    """A trainer with a split of its own."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters() if "norm" in name or "q_proj" in name]


def groups_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict[str, Any]]:
    names = {id(param): name for name, param in model.named_parameters()}
    entries = [(names[id(param)], group) for group in optimizer.param_groups for param in group["params"]]
    assert len(dict(entries)) == len(entries), "a parameter is in two groups"
    return dict(entries)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cls", [Trainer, DecaysNormsOnly])
def test_groups_hold_the_arguments_and_the_trainers_split(name: str, cls: type[Trainer], tmp_path: Path) -> None:
    """Without hf_galore: betas, epsilon and weight decay are ignored; the 8-bit one decays everything by 0.01."""
    adam: dict[str, Any] = {} if "adafactor" in name else {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-5}
    model = tiny_llama(attention_bias=True)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    trainer = make_trainer(model, tmp_path, name, cls, learning_rate=3e-3, weight_decay=0.1, **adam)
    groups = groups_by_name(trainer.create_optimizer(), model)

    assert set(groups) == {key for key, param in model.named_parameters() if param.requires_grad}
    decayed = set(trainer.get_decay_parameter_names(model))
    for key, group in groups.items():
        assert group["lr"] == 3e-3, key
        assert group["weight_decay"] == (0.1 if key in decayed else 0.0), key
        if adam:
            assert group["betas"] == (0.8, 0.95), key
            assert group["eps"] == 1e-5, key
        target = ("mlp" in key or "attn" in key) and key.endswith("weight")
        found = {option: group.get(option) for option in ("rank", "update_proj_gap", "scale", "proj_type")}
        expected = dict.fromkeys(found)
        if target:
            expected = {"rank": RANK, "update_proj_gap": GAP, "scale": SCALE, "proj_type": "std"}
        assert found == expected, key


def test_the_trainers_own_split_decays_neither_norms_nor_biases(tmp_path: Path) -> None:
    model = tiny_llama(attention_bias=True)
    trainer = make_trainer(model, tmp_path, "galore_adamw_8bit", weight_decay=0.1)
    groups = groups_by_name(trainer.create_optimizer(), model)
    undecayed = {key for key, group in groups.items() if group["weight_decay"] == 0}
    assert undecayed == {key for key in groups if "norm" in key or key.endswith("bias")}


def test_a_frozen_model_has_nothing_to_project(tmp_path: Path) -> None:
    trainer = make_trainer(tiny_llama().requires_grad_(False), tmp_path, "galore_adamw")
    with pytest.raises(ValueError, match="'attn' matches no trainable matrix"):
        trainer.create_optimizer()


# ---- refusals


@pytest.mark.parametrize("name", NAMES)
def test_target_modules_are_required(name: str, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_llama(), tmp_path, name, optim_target_modules=None)
    with pytest.raises(ValueError, match=rf"optim='{name}' needs optim_target_modules"):
        trainer.create_optimizer()


MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"optim_args": "rank"}, ValueError, "key=value"),
    ({"optim_args": "rank=8;scale=1"}, ValueError, "rank .*separated by commas"),
    ({"optim_args": "rank=abc"}, ValueError, "rank has to be an integer"),
    ({"optim_args": "rank=0"}, ValueError, "rank has to be an integer of at least 1"),
    ({"optim_args": "rank=-1"}, ValueError, "rank has to be an integer of at least 1"),
    ({"optim_args": "rank=256"}, ValueError, "rank 256 .*nothing would be projected"),
    ({"optim_args": "rnak=8"}, ValueError, "Did you mean 'rank'"),
    ({"optim_args": "rank=8, scale=0"}, ValueError, "scale has to be a finite number above 0"),
    ({"optim_args": "rank=8, scale=-1"}, ValueError, "scale has to be a finite number above 0"),
    ({"optim_args": "rank=8, scale=nan"}, ValueError, "scale has to be a finite number above 0"),
    ({"optim_args": "rank=8, update_proj_gap=0"}, ValueError, "update_proj_gap has to be an integer of at least 1"),
    ({"optim_args": "rank=8, update_proj_gap=-3"}, ValueError, "update_proj_gap has to be an integer of at least 1"),
    ({"optim_args": "rank=8, proj_type=foo"}, ValueError, "proj_type has to be one of std, reverse_std"),
    ({"optim_args": {"rnak": 8}}, ValueError, "Did you mean 'rank'"),
    ({"optim_args": ["rank=8"]}, TypeError, "optim_args has to be a string such as .*, or a mapping"),
    ({"optim_target_modules": ["atn", "mlp"]}, ValueError, "'atn' matches no trainable matrix"),
    ({"optim_target_modules": ["zzz"]}, ValueError, "'zzz' matches no trainable matrix"),
    ({"optim_target_modules": []}, ValueError, "name at least one module"),
    ({"optim_target_modules": "(unclosed"}, ValueError, "not a valid regular expression"),
]


@pytest.mark.parametrize(
    ("overrides", "kind", "words"), MISTAKES, ids=[str(next(iter(case[0].values()))) for case in MISTAKES]
)
def test_mistakes_end_before_training_with_the_reason(
    overrides: dict[str, Any], kind: type[Exception], words: str, tmp_path: Path
) -> None:
    """Without hf_galore: bare errors of `int()` and `re`, errors in later steps, and silently wrong training."""
    model = tiny_llama()
    before = snapshot(model)
    trainer = make_trainer(model, tmp_path, "galore_adamw", **overrides)
    with pytest.raises(kind, match=words):
        trainer.train()
    assert_identical(snapshot(model), before)


@pytest.mark.parametrize("optim_args", ["rank=8,", " rank = 8 , scale=1 ,", {"rank": 8, "scale": 1}])
def test_stray_commas_spaces_and_mappings_reach_the_trainer(optim_args: Any, tmp_path: Path) -> None:
    """Without hf_galore: `"rank=8,"` gave `not enough values to unpack`, and a mapping `no attribute 'replace'`."""
    optimizer = make_trainer(tiny_llama(), tmp_path, "galore_adamw", optim_args=optim_args).create_optimizer()
    assert {group["rank"] for group in optimizer.param_groups if "rank" in group} == {8}


@pytest.mark.parametrize("target_modules", [("attn", "mlp"), ["all-linear"], "all-linear"], ids=repr)
def test_target_modules_reach_the_trainer(target_modules: Any, tmp_path: Path) -> None:
    """Without hf_galore: TypeError for a tuple, `No target modules found` for `["all-linear"]`."""
    model = tiny_llama()
    trainer = train(model, tmp_path, "galore_adamw", optim_target_modules=target_modules, max_steps=1)
    projected = {name for name, group in groups_by_name(optimizer_of(trainer), model).items() if "rank" in group}
    assert projected == {name for name, _ in model.named_parameters() if "attn" in name or "mlp" in name}


@pytest.mark.parametrize("name", ["galore_adafactor", "galore_adafactor_layerwise"])
@pytest.mark.parametrize("key", ["adam_beta1", "adam_beta2", "adam_epsilon"])
def test_adafactor_takes_no_arguments_of_adam(name: str, key: str, tmp_path: Path) -> None:
    overrides: dict[str, Any] = {key: 0.5}
    trainer = make_trainer(tiny_llama(), tmp_path, name, **overrides)
    with pytest.raises(ValueError, match=rf"optim='{name}' has no use for {key}=0\.5"):
        trainer.create_optimizer()


@pytest.mark.parametrize("name", LAYERWISE)
def test_layerwise_refuses_fp16_loss_scaling(name: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, name)
    args.fp16 = True  # the constructor would refuse it on a CPU
    with pytest.raises(ValueError, match=rf"optim='{name}' does not work with fp16.*bf16=True"):
        Trainer.get_optimizer_cls_and_kwargs(args, tiny_llama())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_engines_that_shard_matrices_are_refused(
    name: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_llama(), tmp_path, name)
    monkeypatch.setattr(trainer, f"is_{engine}_enabled", True)
    with pytest.raises(ValueError, match=rf"optim='{name}' does not work under {engine.upper()}"):
        trainer.create_optimizer()
    # Other optimizers are none of its business.
    trainer.args.optim = OptimizerNames.ADAMW_TORCH
    assert type(trainer.create_optimizer()) is torch.optim.AdamW


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["fsdp", "fsdp_config", "deepspeed"])
def test_engines_in_the_arguments_are_refused_where_they_are_not_had(name: str, key: str, tmp_path: Path) -> None:
    """On CPUs accelerate leaves FSDP out without a word; before, it trained under DDP."""
    args = arguments(tmp_path, name)
    setattr(args, key, {"version": 2} if key == "fsdp_config" else True)
    engine = key.removesuffix("_config").upper()
    words = rf"optim='{name}' does not work under {engine}.* in the training arguments: {key}\. Leave that out"
    with pytest.raises(ValueError, match=words):
        Trainer.get_optimizer_cls_and_kwargs(args, tiny_llama())


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engines_in_the_environment_are_refused_with_several_processes(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(tmp_path, "galore_adamw")
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    Trainer.get_optimizer_cls_and_kwargs(args, tiny_llama())  # one process has nothing to shard
    monkeypatch.setattr(TrainingArguments, "parallel_mode", ParallelMode.DISTRIBUTED)
    with pytest.raises(ValueError, match=rf"does not work under {engine}.*by accelerate \(ACCELERATE_USE_{engine}\)"):
        Trainer.get_optimizer_cls_and_kwargs(args, tiny_llama())
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "false")
    Trainer.get_optimizer_cls_and_kwargs(args, tiny_llama())


def test_the_model_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the model"):
        Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, "galore_adamw"))


def test_a_trainable_weight_has_state_and_a_frozen_one_has_none(tmp_path: Path) -> None:
    model = tiny_llama()
    frozen: Tensor = model.model.embed_tokens.weight.requires_grad_(False)
    optimizer = make_trainer(model, tmp_path, "galore_adamw").create_optimizer()
    assert frozen not in optimizer.state
    assert all(param in optimizer.state for param in model.parameters() if param.requires_grad)
