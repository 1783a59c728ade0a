"""The projected backward of layers that are linear by another class: GPT-2's `Conv1D`, and plain subclasses."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from hf_galore import GaLoreAdamW
from hf_galore.backward.gradient import LowRankGradient
from hf_galore.backward.linear import ProjectedLinear, patch_linear, why_not_patchable
from hf_galore.integrations.fully_shard import was
from hf_galore.lowrank.projection import project
from hf_galore.optim.optimizer import GaLoreOptimizer
from hf_galore.plan.parameters import parameters_of
from tests.backward.test_dispatched import low_rank_products
from tests.backward.test_layerwise import (
    INPUTS,
    NARROW,
    RANK,
    WIDE,
    CalledTwice,
    Checkpointed,
    CheckpointedReentrant,
    FunctionalUse,
    Net,
    Shapes,
    SharedWeight,
    assert_same_weights,
    batches,
    loss_of,
    make,
    ordinary_step,
    run,
)
from tests.support.helpers import OPTIM_ARGS, VOCABULARY, assert_same_path, logged, snapshot, target_of, train

PROJECTED = ["plain, projected backward", "layerwise, projected backward", "layerwise, projected backward, held"]


class Named(nn.Linear):
    """A subclass with a constructor, an attribute and a pickle of its own, and no `forward`."""

    def __init__(self, name: str, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.name = name
        self.made = 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "made": self.made + 1}


class NamedConv1D(Conv1D):
    """One of `Conv1D` that is copied and pickled by a function of its own."""

    made = 1

    def __reduce__(self) -> Any:
        return _again, (self.nf, self.nx), self.__dict__


def _again(outputs: int, inputs: int) -> NamedConv1D:
    layer = NamedConv1D(outputs, inputs)
    layer.made = 2
    return layer


class Registered(Named):
    """One whose `forward` is `nn.Linear`'s by name."""

    forward = nn.Linear.forward


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(WIDE, NARROW),
    "a subclass": lambda: Named("x", WIDE, NARROW),
    "by name": lambda: Registered("x", WIDE, NARROW),
    "Conv1D": lambda: Conv1D(NARROW, WIDE),
    "a subclass of Conv1D": lambda: NamedConv1D(NARROW, WIDE),
}


class ConvNet(Net):
    """GPT-2's kind of layers, one of them with a frozen bias."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down = Conv1D(WIDE, INPUTS), Conv1D(NARROW, WIDE)
        self.up, self.square = NamedConv1D(WIDE, NARROW), Conv1D(WIDE, WIDE)
        for layer in (self.enter, self.down, self.up, self.square):
            nn.init.normal_(layer.weight, std=0.3)
        self.up.bias.requires_grad_(False)


class ConvCalledTwice(ConvNet, CalledTwice):
    pass


class ConvShared(ConvNet, SharedWeight):
    """A weight that a `Conv1D` and an `nn.Linear` share, which use it transposed to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.twin.weight = self.square.weight


class ConvFunctional(ConvNet, FunctionalUse):
    def forward(self, x: Tensor) -> Tensor:
        x = ConvNet.forward(self, x)
        return x @ self.down.weight @ self.down.weight.mT


class ConvCheckpointed(ConvNet, Checkpointed):
    pass


class ConvCheckpointedReentrant(ConvNet, CheckpointedReentrant):
    pass


class SubclassNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.square = Named("up", NARROW, WIDE), Registered("square", WIDE, WIDE)


class Attention(Net):
    """`nn.MultiheadAttention` uses its layer's weight without calling it; this one calls it too."""

    calls = False

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDE, 2, bias=False, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.enter(x)).unsqueeze(0)
        mixed, _ = self.attention(x, x, x, need_weights=False)
        if self.calls:
            mixed = mixed + self.attention.out_proj(x)
        return self.square(mixed + self.block(x)).squeeze(0)  # type: ignore[no-any-return]


class AttentionCalled(Attention):
    calls = True


CONVS = [ConvNet, ConvCalledTwice, ConvShared, ConvFunctional, ConvCheckpointed, ConvCheckpointedReentrant]
KINDS = [*CONVS, SubclassNet, Attention, AttentionCalled]


# ---- the same numbers


@pytest.mark.parametrize("cast", ["float32", "float64", "bfloat16", "autocast"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_patched_layer_computes_the_same_bits_and_the_projected_gradient(layer: str, cast: str) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if cast == "autocast" else getattr(torch, cast)
    net = LAYERS[layer]().to(dtype)
    optimizer = make(net, "plain, projected backward", group={"update_proj_gap": 100})
    x = torch.randn(3, 5, WIDE, dtype=dtype, requires_grad=True)
    for _ in range(2):  # the first refreshes
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None
        plain, theirs = copy.deepcopy(net), x.detach().clone().requires_grad_()
        outputs = []
        for module, inputs in ((net, x), (plain, theirs)):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
                outputs.append(module(inputs))
            outputs[-1].square().sum().backward()
    assert isinstance(net, ProjectedLinear)
    assert not isinstance(plain, ProjectedLinear)
    assert outputs[0].dtype == outputs[1].dtype
    assert torch.equal(*outputs)
    assert x.grad is not None
    assert theirs.grad is not None
    assert torch.equal(x.grad, theirs.grad)
    assert torch.equal(net.bias.grad, plain.bias.grad)  # type: ignore[arg-type]
    found = net.weight.grad
    assert isinstance(found, LowRankGradient)
    target = target_of(optimizer, net.weight)  # type: ignore[arg-type]
    bases = target.with_probes(target.bases())
    whole: Tensor = plain.weight.grad  # type: ignore[assignment]
    expected = project(whole.float(), type(bases)(*(basis if basis is None else basis.float() for basis in bases)))
    error = (found.low_rank.float() - expected).norm() / expected.norm()
    assert error < {"float32": 1e-6, "float64": 1e-6}.get(cast, 2e-2)
    assert expected.norm() > 1


@pytest.mark.parametrize("way", PROJECTED)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_using_a_layer(kind: type[Net], way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    products = low_rank_products(monkeypatch)
    assert_same_weights(run(kind, way), run(kind, "plain"))
    assert any(isinstance(product, LowRankGradient) for product in products)


@pytest.mark.parametrize("proj_type", ["reverse_std", "left", "right", "full"])
def test_every_side(proj_type: str) -> None:
    group = {"proj_type": proj_type}
    plain, projected = (run(ConvNet, way, group=group) for way in ("plain", "layerwise, projected backward"))
    assert_same_weights(projected, plain)


def test_nothing_of_a_targets_shape_is_made() -> None:
    for kind in (ConvNet, SubclassNet):
        torch.manual_seed(0)
        net = kind()
        optimizer = make(net, "layerwise, projected backward", group={"stagger": False})
        first, second = batches(2)
        ordinary_step(net, optimizer, first)
        with Shapes() as shapes:
            ordinary_step(net, optimizer, second)
        assert {tuple(sorted(param.shape)) for param in net.parameters() if param.ndim == 2} & shapes.made == set()


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)], ids=["more inputs", "more outputs"])
def test_a_refresh_from_the_factors(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, outputs = shape
    torch.manual_seed(0)
    layer = Conv1D(outputs, inputs)
    plain = copy.deepcopy(layer)
    products = low_rank_products(monkeypatch)
    options = {layer.weight: {"rank": RANK, "proj_bits": 16}}
    optimizer = GaLoreAdamW(layer.parameters(), param_options=options, module=layer, projected_backward=True)
    x = torch.randn(10, inputs) @ torch.diag(0.8 ** torch.arange(inputs))
    for module in (layer, plain):
        module(x).pow(3).sum().backward()
    optimizer.step()
    assert isinstance(products[0], LowRankGradient)
    assert plain.weight.grad is not None
    target = target_of(optimizer, layer.weight)
    low_rank = project(plain.weight.grad, target.bases())
    singular = torch.linalg.svdvals(plain.weight.grad)
    assert low_rank.norm() / singular[:RANK].norm() > 0.97
    assert singular[:RANK].norm() / singular.norm() < 0.99
    torch.testing.assert_close(products[0].low_rank, project(plain.weight.grad, target.with_probes(target.bases())))


@pytest.mark.parametrize("kind", [ConvNet, SubclassNet])
def test_gradients_that_are_returned_or_differentiated(kind: type[Net]) -> None:
    torch.manual_seed(0)
    plain = kind()
    net = copy.deepcopy(plain)
    make(net, "plain, projected backward")
    batch = batches(1)[0]
    found, expected = (
        torch.autograd.grad(loss_of(model, batch), [model.square.weight, model.up.weight]) for model in (net, plain)
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert type(mine) is Tensor
        assert torch.equal(mine, theirs)
    penalties = []
    for model in (net, plain):
        weights = [param for param in model.parameters() if param.requires_grad]
        grads = torch.autograd.grad(loss_of(model, batch), weights, create_graph=True)
        penalty = torch.stack([grad.square().sum() for grad in grads]).sum()
        penalties.append(torch.autograd.grad(penalty, weights))
    for mine, theirs in zip(*penalties, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_functions_that_are_transformed() -> None:
    layer = Conv1D(NARROW, WIDE)
    plain = copy.deepcopy(layer)
    optimizer = make(layer, "plain, projected backward")
    x = torch.randn(5, WIDE)
    found, expected = (
        torch.func.vmap(torch.func.grad(lambda row, m=module: m(row[None]).square().sum()))(x)
        for module in (layer, plain)
    )
    assert torch.equal(found, expected)
    optimizer.close()


def test_inputs_that_the_layer_would_not_take() -> None:
    layer = Conv1D(NARROW, WIDE)
    optimizer = make(layer, "plain, projected backward")
    for wrong in (torch.randn(2, WIDE).double(), torch.randn(4, WIDE, 3).mT):
        for module in (layer, copy.deepcopy(layer)):
            with pytest.raises(RuntimeError):
                module(wrong)
    assert layer(torch.randn(0, WIDE)).shape == (0, NARROW)
    optimizer.close()


def test_torch_compile() -> None:
    torch.manual_seed(0)
    net = ConvNet()
    optimizer = make(net, "layerwise, projected backward")
    compiled = torch.compile(net, backend="eager")
    for batch in batches(9):
        ordinary_step(compiled, optimizer, batch)  # type: ignore[arg-type]
    assert_same_weights(net, run(ConvNet, "plain"))


def test_a_dispatched_model() -> None:
    torch.manual_seed(0)
    net = ConvNet()
    dispatch_model(net, device_map={"": "cpu"}, force_hooks=True)
    before = {name: dict(module.__dict__) for name, module in net.named_modules()}
    optimizer = make(net, "layerwise, projected backward")
    assert isinstance(net.square, ProjectedLinear)
    for batch in batches(9):
        ordinary_step(net, optimizer, batch)
    optimizer.close()
    assert_same_weights(net, run(ConvNet, "layerwise, projected backward"), tolerance=0)
    for name, module in net.named_modules():
        assert module.__dict__.get("forward") is before[name].get("forward")
        assert module.__dict__.get("_old_forward") == before[name].get("_old_forward")


# ---- the layer's class


@pytest.mark.parametrize("layer", LAYERS)
def test_a_patched_layer_is_of_its_class_and_copies_are_plain(layer: str) -> None:
    torch.manual_seed(0)
    net, cls = LAYERS[layer](), type(LAYERS[layer]())
    other = LAYERS[layer]()
    optimizers = [make(module, "layerwise, projected backward") for module in (net, other)]
    assert isinstance(net, cls)
    assert type(net) is not cls
    assert type(net) is type(other)
    assert type(net).__name__ == f"Projected{cls.__name__}"
    assert issubclass(type(net), ProjectedLinear)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(net), copy.copy(net), torch.load(buffer, weights_only=False)):
        assert type(copied) is cls
        assert "_galore_sink" not in copied.__dict__
        assert torch.equal(copied.weight, net.weight)  # type: ignore[arg-type]
        assert getattr(copied, "name", "x") == "x"
        assert getattr(copied, "made", 2) == 2  # by its own __getstate__, once, or by its own __reduce__
    for optimizer in optimizers:
        optimizer.close()
    assert type(net) is type(other) is cls
    assert "_galore_sink" not in net.__dict__


class FSDPModule:
    """What FSDP2's is called, and asked for."""

    def _get_fsdp_state(self) -> None:
        return None


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_that_is_a_unit_of_fsdp2_stays_one(layer: str) -> None:
    net, cls = LAYERS[layer](), type(LAYERS[layer]())
    unit = type(f"FSDP{cls.__name__}", (FSDPModule, cls), {"__deepcopy__": lambda self, memo: None})
    net.__class__ = unit
    assert was(type(net)) is cls
    optimizer = make(net, "plain, projected backward")
    assert isinstance(net, FSDPModule)
    assert issubclass(was(type(net)), (ProjectedLinear, cls))
    assert isinstance(net, ProjectedLinear)
    assert type(net).__name__ == unit.__name__
    optimizer.close()
    assert type(net) is unit


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class DoubledConv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)  # type: ignore[no-any-return]


class Copying:
    def __deepcopy__(self, memo: Any) -> Any:
        return self


class Copied(Copying, nn.Linear):
    """One that is copied in a way of its own, by a class that is no layer."""


class Listing(nn.Linear):
    found: list[type] = []  # noqa: RUF012

    def __init_subclass__(cls) -> None:
        cls.found.append(cls)


class Listed(Listing):
    pass


class Slotted(nn.Linear):
    __slots__ = ("extra",)


def parametrized() -> nn.Module:
    layer = nn.Linear(WIDE, NARROW)
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Tanh())
    return layer


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "forward": (lambda: Doubled(WIDE, NARROW), "its class Doubled has a forward of its own"),
    "Conv1D's": (lambda: DoubledConv1D(NARROW, WIDE), "its class DoubledConv1D has a forward of its own"),
    "copies": (lambda: Copied(WIDE, NARROW), "its class Copied has __deepcopy__ of its own"),
    "subclasses": (lambda: Listed(WIDE, NARROW), "its class Listed has __init_subclass__ of its own"),
    "slots": (lambda: Slotted(WIDE, NARROW), "its class Slotted has __slots__ of its own"),
    "parametrized": (parametrized, "its class ParametrizedLinear has __deepcopy__ of its own"),
    "bilinear": (lambda: nn.Bilinear(2, 2, 2), "it is of class Bilinear, and neither an nn.Linear nor a Conv1D"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_class_that_is_not_plain_is_not_served(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    products = low_rank_products(monkeypatch)
    build, reason = REFUSED[what]
    layer = build()
    before = type(layer)
    assert why_not_patchable(layer) == reason
    with pytest.raises(ValueError, match="cannot serve this module"):
        patch_linear(layer, lambda: None)  # type: ignore[arg-type]
    if what != "bilinear":
        optimizer = make(layer, "plain, projected backward")
        assert type(layer) is before
        layer(torch.randn(5, WIDE)).sum().backward()
        optimizer.close()
    assert products == []
    assert Listing.found == [Listed]


def test_plans_know_which_gradients_are_built() -> None:
    class Both(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.doubled = Conv1D(WIDE, WIDE), Doubled(WIDE, WIDE)

    net = Both()
    for attached in (True, False):
        optimizer: GaLoreOptimizer = make(net, "layerwise, projected backward")
        if not attached:
            optimizer.close()
        found = {p.name: p.projection.without_gradient for p in parameters_of(net, optimizer) if p.projection}
        layers = ("enter", "down", "up", "square", "conv")
        assert found == {
            **{f"{name}.weight": True for name in layers},
            "attention.out_proj.weight": False,
            "doubled.weight": False,
        }


# ---- GPT-2


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=64,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


def test_gpt2_trains_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = snapshot(gpt2())
    products = low_rank_products(monkeypatch)
    ends, losses = [], []
    for name, more in (("galore_adamw", ""), ("galore_adamw", "True"), ("galore_adamw_layerwise", "True")):
        args = f"{OPTIM_ARGS}, projected_backward={more}" if more else OPTIM_ARGS
        model, before = gpt2(), len(products)
        # Of wide matrices, whose gradients' smaller singular values are rounding, no basis is the same by both ways.
        trainer = train(model, tmp_path, name, optim_args=args, learning_rate=1e-3)
        ends.append(snapshot(model))
        losses.append(logged(trainer, "loss"))
        served = [product for product in products[before:] if isinstance(product, LowRankGradient)]
        assert len(served) >= (8 * 5 if more else 0)
        assert {type(module) for module in model.modules()} & {Conv1D} == {Conv1D}
    assert losses[0][-1] < losses[0][0]
    for end, loss in zip(ends[1:], losses[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-4)
        assert_same_path(end, ends[0], start, tolerance=0.02)
