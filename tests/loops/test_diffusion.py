"""docs/examples/diffusion_loop.py: image and video models, by loops as those of diffusers' examples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hf_galore import make_optimizer
from tests.support.examples import all_apart, example, forget_accelerate
from tests.support.helpers import (
    assert_identical,
    assert_same_but_for_rounding,
    assert_same_path,
    hooks_on,
    perturbed,
    snapshot,
)

pytest.importorskip("diffusers")
program = example("diffusion_loop")

# Bases unquantised: a code that rounding tips over is a difference of its own size.
ARGS = "rank=8, update_proj_gap=3, scale=1, proj_bits=16"
KINDS = tuple(program.KINDS)
NAMES = ("galore_adamw", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise")


@pytest.fixture(autouse=True)
def _first_accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget_accelerate()
    yield
    forget_accelerate()


def made(kind: str) -> Any:
    return program.KINDS[kind][0]()


def ended(kind: str, folder: Path, name: str = "run", model: Any = None, **options: Any) -> dict[str, Any]:
    """The weights that the example ends with, and their moving average."""
    model = made(kind) if model is None else model
    ema = program.train(
        model,
        program.tiny_rows(kind),
        program.KINDS[kind][1],
        folder / name,
        **{"optim_args": ARGS, "steps": 6, **options},
    )
    assert hooks_on(model) == 0
    forget_accelerate()
    names = [name for name, _ in model.named_parameters()]
    return {"weights": snapshot(model), "average": dict(zip(names, copy.deepcopy(ema.shadow_params), strict=True))}


def moved(found: dict[str, Tensor], start: dict[str, Tensor]) -> set[str]:
    return {name for name, weight in found.items() if not torch.equal(weight, start[name])}


def of(names: set[str], *ends: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Parts of ends."""
    return [{name: end[name] for name in end if name in names} for end in ends]


@pytest.mark.parametrize(
    ("kind", "max_norm"),
    [("transformer", None), ("transformer", 0.5), ("video", None), ("video", 0.5), ("unet", 0.5)],
)
def test_layerwise_ends_where_plain_does(kind: str, max_norm: float | None, tmp_path: Path) -> None:
    """Under gradient checkpointing; every weight that is of use has moved, and so has its average."""
    options: dict[str, Any] = {
        "max_norm": max_norm,
        "accumulate": 1,
        "optim_args": f"{ARGS}, projected_backward=true",
    }
    found = ended(kind, tmp_path, "found", optim="galore_adamw_layerwise", **options)
    expected = ended(kind, tmp_path, "expected", optim="galore_adamw", **options)
    nearby = ended(kind, tmp_path, "nearby", perturbed(made(kind)), optim="galore_adamw", **options)
    start = snapshot(made(kind))
    useful = moved(expected["weights"], start)
    # The last block of SD3's transformer computes queries of the text that nothing uses: the others of them decay.
    unused = {"transformer_blocks.1.attn.add_q_proj.bias"}
    assert set(start) - useful == (unused if kind == "transformer" else set())
    for part in ("weights", "average"):
        ends = of(useful, found[part], expected[part], nearby[part], start)
        assert_same_but_for_rounding(ends[0], ends[1], ends[2], ends[3])


@pytest.mark.parametrize(
    ("optim", "kind"),
    [
        ("galore_adamw", "transformer"),
        ("galore_adamw_layerwise", "video"),
        *(("galore_adamw_8bit_layerwise", kind) for kind in KINDS),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(optim: str, kind: str, tmp_path: Path) -> None:
    """Weights, average and random numbers; with accumulation, clipping, checkpointing, and bases in 4 bits."""
    options = {"optim": optim, "optim_args": "rank=8, update_proj_gap=3, scale=1"}
    expected = ended(kind, tmp_path, "whole", **options)
    stopped = ended(kind, tmp_path, "parts", stop_at=4, **options)
    assert moved(stopped["weights"], expected["weights"])
    assert_identical(ended(kind, tmp_path, "parts", **options, seed=3), expected)


@pytest.mark.parametrize("kind", ["transformer", "video"])
def test_bfloat16_autocast(kind: str, tmp_path: Path) -> None:
    """Layerwise is no further from plain than autocast is from float32; the weights stay float32."""
    options: dict[str, Any] = {"accumulate": 1, "max_norm": None, "batch_size": 4}
    exact, plain, found = (
        ended(kind, tmp_path, f"{optim}{precision}", optim=optim, precision=precision, **options)["weights"]
        for optim, precision in (("galore_adamw", "no"), ("galore_adamw", "bf16"), ("galore_adamw_layerwise", "bf16"))
    )
    start = snapshot(made(kind))
    assert {weight.dtype for weight in found.values()} == {torch.float32}
    assert all_apart(found, plain, start) < all_apart(plain, exact, start) < 0.1


# ---- what is projected


def test_linear_layers_and_convolutions_are_projected() -> None:
    """Among them those of attention, and those that take timesteps. (Before: all convolutions trained full-rank.)"""
    unet = program.tiny_unet()
    optimizer = make_optimizer(unet, optim_args=ARGS)
    projected = {optimizer.name_of(target.param) for target in optimizer.targets()}
    layers = {f"{name}.weight" for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    assert projected == layers - {"conv_out.weight"}  # of 4 channels, below the rank
    assert {"time_embedding.linear_1.weight", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"} < layers
    assert sum(unet.get_parameter(name).ndim == 4 for name in projected) > 10
    named = make_optimizer(unet, ["attn", "conv"], optim_args=ARGS)
    of_conv1 = unet.get_parameter("mid_block.resnets.0.conv1.weight")
    assert of_conv1 in {target.param for target in named.targets()}
    assert unet.get_parameter("time_embedding.linear_1.weight") not in {target.param for target in named.targets()}
    with pytest.raises(ValueError, match=r"'norm' matches no trainable matrix .*GroupNorm"):
        make_optimizer(unet, ["attn", "norm"], optim_args=ARGS)


@pytest.mark.parametrize(
    ("optim", "kind"),
    [("galore_adamw_layerwise", "unet"), *(("galore_adamw_8bit_layerwise", kind) for kind in KINDS[:2])],
)
def test_only_attention(kind: str, optim: str, tmp_path: Path) -> None:
    """The rest is frozen, and its gradients are never computed."""
    model = made(kind).requires_grad_(False)
    for name, module in model.named_modules():
        if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")):
            module.requires_grad_(True)
    start = snapshot(model)
    end = ended(kind, tmp_path, model=model, optim=optim, target_modules=["to_q", "to_k", "to_v", "to_out"])
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert moved(end["weights"], start) == trained
    assert len(trained) >= 8


# ---- how such models are built and kept


def steps(
    model: Any,
    optimizer: torch.optim.Optimizer,
    kind: str,
    count: int = 4,
    after: Callable[[Any], None] = lambda model: None,
    dress: Callable[[dict[str, Any]], dict[str, Any]] = lambda batch: batch,
) -> None:
    """A loop that seeds its noise."""
    rows = torch.utils.data.DataLoader(program.tiny_rows(kind), batch_size=4)
    for number, batch in zip(range(count), rows, strict=False):
        torch.manual_seed(number)
        program.KINDS[kind][1](model, dress(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        after(model)


def optimizer_of(model: Any, optim: str, **options: Any) -> Any:
    return make_optimizer(model, optim=optim, lr=1e-3, **{"optim_args": ARGS, **options})


@pytest.mark.parametrize("optim", NAMES)
def test_layers_that_begin_as_zeros(optim: str) -> None:
    """Modulations of zero and an output of zero: gradients reach a layer one step after another, as AdamW has them."""

    def zeroed() -> Any:
        model = program.tiny_transformer()
        for name, param in model.named_parameters():
            if name.startswith("proj_out") or ("norm" in name and ".linear." in name):
                nn.init.zeros_(param)
        return model

    model, control = zeroed(), zeroed()
    start = snapshot(model)
    optimizer, adamw = optimizer_of(model, optim), torch.optim.AdamW(control.parameters(), 1e-3, weight_decay=0)
    for count in (1, 1, 3):
        steps(model, optimizer, "transformer", count)
        steps(control, adamw, "transformer", count)
        assert moved(snapshot(model), start) == moved(snapshot(control), start)
    # Two in the last block have no use: see above.
    unused = {optimizer.name_of(target.param) for target in optimizer.targets() if not target.state["refreshes"]}
    assert unused == {"transformer_blocks.1.attn.add_q_proj.weight"}


def test_channels_last() -> None:
    """Convolutions keep their memory format, and train as in the usual one."""
    optim = "galore_adamw_layerwise"

    usual, near, other = program.tiny_unet(), perturbed(program.tiny_unet()), program.tiny_unet()
    start = snapshot(usual)
    other.to(memory_format=torch.channels_last)
    for model in (usual, near, other):
        steps(model, optimizer_of(model, optim), "unet")
    assert other.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not other.conv_in.weight.is_contiguous()
    assert_same_but_for_rounding(snapshot(other), snapshot(usual), snapshot(near), start)


@pytest.mark.parametrize("optim", NAMES)
def test_an_averaged_copy_of_the_model_is_a_plain_one(optim: str) -> None:
    """torch's AveragedModel copies the model with its hooks, and is used and saved between steps."""
    model, alone = program.tiny_video(), program.tiny_video()
    optimizer = optimizer_of(model, optim)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    ends = []

    def average(model: Any) -> None:
        averaged.update_parameters(model)
        ends.append(snapshot(model))
        program.flow_matching_loss(averaged, next(iter(torch.utils.data.DataLoader(program.tiny_rows("video")))))

    steps(model, optimizer, "video", after=average)
    steps(alone, optimizer_of(alone, optim), "video")
    assert_identical(snapshot(model), snapshot(alone))
    expected = ends[0]
    for end in ends[1:]:
        expected = {name: 0.5 * weight + 0.5 * end[name] for name, weight in expected.items()}
    assert_same_path(snapshot(averaged.module), expected, snapshot(program.tiny_video()), 1e-5)
    optimizer.close()
    del optimizer
    assert type(averaged.module.proj_out) is nn.Linear


@pytest.mark.parametrize("optim", NAMES)
def test_a_saved_model_is_a_plain_one(optim: str, tmp_path: Path) -> None:
    """While the hooks are on it."""
    model = program.tiny_transformer()
    optimizer = optimizer_of(model, optim)
    steps(model, optimizer, "transformer", 2)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_identical(snapshot(loaded), snapshot(model))
    assert hooks_on(loaded) == 0


@pytest.mark.parametrize("optim", NAMES)
def test_a_unet_and_its_text_encoder(optim: str) -> None:
    """Two models and two rates, whose schedule moves both; each layerwise too."""
    from diffusers.optimization import get_scheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = CLIPTextConfig(**sizes, num_attention_heads=2, projection_dim=32, max_position_embeddings=16)
    unet, encoder = program.tiny_unet(), CLIPTextModel(config).train()
    start = {"unet": snapshot(unet), "encoder": snapshot(encoder)}
    optimizer = program.optimizer_for_two(unet, encoder, optim, ARGS)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=8)

    def told(batch: dict[str, Any]) -> dict[str, Any]:
        tokens = torch.arange(len(batch["latents"]) * 5).reshape(-1, 5) % 64
        return {**batch, "condition": {"encoder_hidden_states": encoder(tokens).last_hidden_state}}

    steps(unet, optimizer, "unet", dress=told, after=lambda model: schedule.step())
    assert {round(group["lr"], 9) for group in optimizer.param_groups} == {5e-4, 5e-5}
    assert moved(snapshot(unet), start["unet"]) == set(start["unet"])
    trained = moved(snapshot(encoder), start["encoder"])
    assert set(start["encoder"]) - trained <= {"text_model.encoder.layers.1.self_attn.k_proj.bias"}
    # A step of Adam is of about the rate's size.
    far = [
        max((weight - start[part][name]).abs().max().item() for name, weight in snapshot(model).items())
        for part, model in (("unet", unet), ("encoder", encoder))
    ]
    assert 5 < far[0] / far[1] < 20
    optimizer.close()
    assert hooks_on(unet) == hooks_on(encoder) == 0


@pytest.mark.parametrize("projected_backward", [True, False])
def test_blocks_that_are_swapped_out_while_others_run(projected_backward: bool) -> None:
    """The data of a block's weights move before its forward pass and after its backward pass."""
    model, alone = program.tiny_transformer(), program.tiny_transformer()
    options = {"optim_args": f"{ARGS}, projected_backward={projected_backward}".lower()}

    def swap(module: nn.Module, *args: Any) -> None:
        for param in module.parameters():
            param.data = param.data.clone()

    for block in model.transformer_blocks:
        block.register_forward_pre_hook(swap)
        block.register_full_backward_hook(swap)
    for each in (model, alone):
        optimizer = optimizer_of(each, "galore_adamw_layerwise", **options)
        steps(each, optimizer, "transformer")
        optimizer.close()
    assert_identical(snapshot(model), snapshot(alone))
