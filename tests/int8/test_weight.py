"""An int8 weight does what torch does to parameters, as a float weight of its values does, or refuses it by name."""

from __future__ import annotations

import contextlib
import copy
import io
import operator
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hf_galore.int8 import Int8Weight, products
from hf_galore.optim import GaLoreAdamW, GaLoreOptimizer
from tests.support.int8 import as_int8, weight_of

M, N = 24, 70
OUTER = [torch.bfloat16, torch.float32, torch.float64]
# Of a product's largest element, by its dtype: sums in another order.
CLOSE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5, torch.float64: 1e-13}


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of a weight, and the last of them smaller."""
    monkeypatch.setattr(products, "TILE_ELEMENTS", 300)


def layer(dtype: torch.dtype = torch.float32, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    made = nn.Linear(N, M, bias=bias)
    made.weight = nn.Parameter(Int8Weight.from_float(made.weight.detach()))
    return made.to(dtype)


def twin(made: nn.Linear) -> nn.Linear:
    """A layer of floats with the same values."""
    weight = weight_of(made)
    found = nn.Linear(N, M, bias=made.bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        found.weight.copy_(weight.dequantized())
        if made.bias is not None:
            found.bias.copy_(made.bias)
    return found


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    limit = CLOSE[dtype or expected.dtype] * expected.double().abs().max()
    assert (found.double() - expected.double()).abs().max() <= limit


def assert_same_weight(found: Tensor, expected: Tensor) -> None:
    assert isinstance(found, Int8Weight)
    assert isinstance(expected, Int8Weight)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.exponents, expected.exponents)
    assert found.dtype == expected.dtype


def values(rows: int = M, columns: int = N, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- in a layer


@pytest.mark.parametrize("dtype", OUTER, ids=str)
@pytest.mark.parametrize("shape", [(5,), (1, 3), (2, 3), (), (0,)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_forward_and_backward(bias: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = layer(dtype, bias=bias)
    found: list[Any] = []
    expected: list[Any] = []
    for module, results in ((made, found), (twin(made), expected)):
        x = values(1, N)[0].expand(*shape, N).clone().to(dtype).requires_grad_()
        out = module(x)
        (out * torch.linspace(-1, 1, M).to(dtype)).sum().backward()
        results += [out.detach(), x.grad, *(param.grad for param in module.parameters())]
    assert len(found) == len(expected) == (4 if bias else 3)
    for one, other in zip(found, expected, strict=True):
        if other.numel():
            assert_near(one, other, dtype)


def test_what_a_layer_gives_may_be_changed_in_place() -> None:
    """As models do with a residual, or an activation; under a projected backward too."""
    made = layer(torch.float64)
    for hooked in (False, True):
        results = []
        for module in (made, twin(made)):
            group = {"params": [module.weight], "rank": 4}
            optimizer = GaLoreAdamW([group], lr=0.0, module=module, layerwise=True) if hooked else None
            x = values(6, N, torch.float64).view(2, 3, N).requires_grad_()
            out = module(x)
            out += 1
            out.view(-1, M)[1].mul_(2)
            out.square().sum().backward()
            assert x.grad is not None
            results.append([out.detach(), x.grad])
            if optimizer is not None:
                optimizer.close()
        for one, other in zip(*results, strict=True):
            assert_near(one, other)


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)], ids=str)
def test_layers_without_elements(sizes: tuple[int, int]) -> None:
    made = nn.Linear(*sizes)
    made.weight = nn.Parameter(Int8Weight.from_float(made.weight.detach()))
    x = torch.ones(2, 3, sizes[0], requires_grad=True)
    out = made(x)
    out.sum().backward()
    assert out.shape == (2, 3, sizes[1])
    assert x.grad is not None
    assert torch.equal(out, made.bias.expand(2, 3, sizes[1]))
    assert not x.grad.any()


@pytest.mark.parametrize("frozen", ["weight", "bias", "input", "all"])
def test_what_needs_no_gradient_has_none(frozen: str) -> None:
    made = layer(torch.float64)
    results = []
    for module in (made, twin(made)):
        module.weight.requires_grad_(frozen not in ("weight", "all"))
        module.bias.requires_grad_(frozen not in ("bias", "all"))
        x = values(3, N, torch.float64).requires_grad_(frozen != "input")
        module(x).square().sum().backward()
        results.append([x.grad, module.weight.grad, module.bias.grad])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_near(one, other)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_without_gradients(grad: Any) -> None:
    made = layer(torch.float64)
    with grad():
        assert_near(made(values(3, N, torch.float64)).detach(), twin(made)(values(3, N, torch.float64)).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """Of a float32 layer, and of what has that dtype; gradients are of the parameters' own dtypes."""
    for outer in {torch.float32, dtype}.intersection(OUTER):
        made = layer(outer)
        results = []
        for module in (made, twin(made)):
            x = values(3, N, outer).requires_grad_()
            with torch.autocast("cpu", dtype):
                out = module(x)
            out.sum().backward()
            results.append([out.detach(), x.grad, module.weight.grad, module.bias.grad])
        for one, other in zip(*results, strict=True):
            assert_near(one, other, dtype)


def test_another_dtype_is_refused_as_by_a_float_layer() -> None:
    with pytest.raises(RuntimeError, match=r"torch.bfloat16, whose weight is kept in 8 bits, got an input of torch.fl"):
        layer(torch.bfloat16)(values(3, N))


def test_an_input_in_8_bits_is_refused() -> None:
    with pytest.raises(TypeError, match="what a linear layer multiplies with"):
        functional.linear(weight_of(layer()), torch.zeros(3, N))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing(use_reentrant: bool) -> None:
    made = layer(torch.float64)
    results = []
    for module in (made, twin(made)):
        x = values(3, N, torch.float64).requires_grad_()
        out: Any = checkpoint(lambda x, m=module: torch.tanh(m(x)), x, use_reentrant=use_reentrant)
        out.square().sum().backward()
        results.append([x.grad, module.weight.grad, module.bias.grad])
    for one, other in zip(*results, strict=True):
        assert_near(one, other)


def test_gradients_that_are_differentiated() -> None:
    """create_graph=True: of the input's gradient, that of all three; and of the weight's."""
    made = layer(torch.float64)
    results = []
    for module in (made, twin(made)):
        x = values(3, N, torch.float64).requires_grad_()
        of_x, of_weight = torch.autograd.grad(torch.tanh(module(x)).sum(), [x, module.weight], create_graph=True)
        (of_x.pow(2).sum() + of_weight.pow(3).sum()).backward()
        third = torch.autograd.grad(torch.tanh(module(x)).sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(third.pow(2).sum(), x, create_graph=True)[0]
        results.append(
            [x.grad, module.weight.grad, module.bias.grad, *torch.autograd.grad(second.sum(), [x, module.weight])]
        )
    for one, other in zip(*results, strict=True):
        assert_near(one, other)


def test_gradients_that_are_differentiated_under_an_optimizer() -> None:
    """With the projected backward on the layer, which such a pass goes around."""
    made = layer(torch.float64)
    results = []
    for module in (made, twin(made)):
        optimizer = GaLoreAdamW([{"params": [module.weight], "rank": 4}], lr=1e-2, module=module, layerwise=True)
        x = values(3, N, torch.float64).requires_grad_()
        (of_x,) = torch.autograd.grad(torch.tanh(module(x)).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(of_x.pow(2).sum(), [x, module.weight]))
        optimizer.close()
    for one, other in zip(*results, strict=True):
        assert_near(one, other)


def test_autograd_grad_and_hooks() -> None:
    made = layer(torch.float64)
    x = values(3, N, torch.float64)
    expected: Any = torch.autograd.grad(twin(made)(x).sum(), twin(made).weight, allow_unused=True)
    (found,) = torch.autograd.grad(made(x).sum(), made.weight)
    assert type(found) is Tensor
    assert expected == (None,)  # of another twin; the next line is the comparison
    other = twin(made)
    assert_near(found, torch.autograd.grad(other(x).sum(), other.weight)[0])
    seen: list[Tensor] = []
    made.weight.register_hook(lambda gradient: gradient * 2)
    made.weight.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad))
    made(x).sum().backward()
    assert_near(seen[0], 2 * found)


def test_functional_calls() -> None:
    """With its own parameters, with others, and differentiated by torch.func where that is possible."""
    made = layer(torch.float64)
    x = values(3, N, torch.float64)
    other = twin(made)
    assert_near(torch.func.functional_call(made, dict(made.named_parameters()), x), other(x))
    assert_near(torch.func.functional_call(made, dict(other.named_parameters()), x), other(x))
    found = torch.func.grad(lambda x: made(x).square().sum())(x)
    assert_near(found, torch.func.grad(lambda x: other(x).square().sum())(x))
    with pytest.raises(RuntimeError, match=r"an int8 weight has none. `weight.dequantized\(\)` has its values"):
        torch.func.grad(lambda p: torch.func.functional_call(made, p, x).sum())(dict(made.named_parameters()))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(made)(x)


def test_compiled() -> None:
    """What torch.compile traces reads the weight anew each time."""
    made = layer(torch.float64)
    weight = weight_of(made)
    x = values(3, N, torch.float64)
    for backend in ("eager", "aot_eager"):
        compiled: Any = torch.compile(made, backend=backend)
        for _ in range(2):
            made.weight.grad = None
            other = twin(made)
            assert_near(compiled(x), other(x))
            compiled(x).square().sum().backward()
            other(x).square().sum().backward()
            assert weight.grad is not None
            assert other.weight.grad is not None
            assert_near(weight.grad, other.weight.grad)
            with torch.no_grad():
                weight.copy_(values(dtype=torch.float64, seed=7) * weight.grad.abs().max())
        torch.compiler.reset()


# ---- saved, copied and moved


def test_state_dicts_both_ways() -> None:
    made, other = layer(torch.bfloat16), layer(torch.bfloat16, seed=1)
    floats = nn.Linear(N, M, dtype=torch.bfloat16)
    floats.load_state_dict(made.state_dict())
    assert type(floats.weight) is nn.Parameter
    assert torch.equal(floats.weight, weight_of(made).dequantized())
    other.load_state_dict(floats.state_dict())  # an ordinary bfloat16 checkpoint is exact
    assert_same_weight(weight_of(other), made.weight)
    third = layer(torch.bfloat16, seed=2)
    third.load_state_dict(made.state_dict())
    assert_same_weight(weight_of(third), made.weight)
    assert weight_of(third).codes.data_ptr() != weight_of(made).codes.data_ptr()
    rounded = layer(torch.float32)
    rounded.load_state_dict({"weight": values(), "bias": torch.zeros(M)})
    assert_same_weight(weight_of(rounded), Int8Weight.from_float(values()))
    floats.load_state_dict(made.state_dict(), assign=True)
    assert_same_weight(weight_of(floats), made.weight)
    with pytest.raises(RuntimeError, match="size mismatch"):
        made.load_state_dict({"weight": torch.zeros(M, N + 1), "bias": torch.zeros(M)})


@pytest.mark.parametrize("weights_only", [True, False])
def test_saved_by_torch(weights_only: bool) -> None:
    made = layer(torch.bfloat16)
    for saved in (made.state_dict(), made) if not weights_only else (made.state_dict(),):
        file = io.BytesIO()
        torch.save(saved, file)
        assert file.tell() < 1.5 * M * N + 4096
        file.seek(0)
        found = torch.load(file, weights_only=weights_only)
        found = found if isinstance(found, dict) else dict(found.named_parameters())
        assert_same_weight(found["weight"], made.weight)
        assert found["weight"].requires_grad == (saved is made)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda made: pickle.loads(pickle.dumps(made)),
    "multiprocessing": lambda made: pickle.loads(ForkingPickler.dumps(made)),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_a_layer(way: str) -> None:
    made = layer(torch.bfloat16)
    made(values(2, N, torch.bfloat16)).sum().backward()
    other = COPIES[way](made)
    weight = weight_of(other)
    assert weight is not made.weight
    assert_same_weight(weight, made.weight)
    assert weight.requires_grad
    assert [name for name, _ in other.named_parameters()] == ["weight", "bias"]
    before = weight.dequantized()
    with torch.no_grad():
        made.weight.zero_()
    # Processes share the memory of tensors that they hand on.
    assert torch.equal(weight.dequantized(), before) == (way != "multiprocessing")


@pytest.mark.parametrize("dtype", OUTER, ids=str)
def test_cast(dtype: torch.dtype) -> None:
    """The parameter stays the one that it is, as a float one does, and what is hooked on it; it is in 8 bits."""
    made = layer(torch.float32)
    weight = weight_of(made)
    before = weight.dequantized()
    calls: list[int] = []
    weight.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    made(values(2, N)).sum().backward()
    made.to(dtype)
    assert made.weight is weight
    assert weight.dtype == weight.dequantized().dtype == dtype
    assert weight.codes.dtype == torch.int8
    assert weight.grad is not None
    assert weight.grad.dtype == dtype
    assert torch.equal(weight.dequantized().float(), before)
    made(values(2, N, dtype)).sum().backward()
    assert len(calls) == 2


def test_float_and_double_and_back() -> None:
    made = layer(torch.bfloat16)
    before = copy.deepcopy(made.weight)
    assert made.float().weight.dtype == torch.float32
    assert made.double().weight.dtype == torch.float64
    assert_same_weight(made.bfloat16().weight, before)
    assert made.requires_grad_(False).weight.requires_grad is False
    assert made.requires_grad_(True).weight.requires_grad is True


CASTS: dict[str, Callable[[nn.Module], Any]] = {
    "half": nn.Module.half,
    "to": lambda made: made.to(torch.float16),
    "float8": lambda made: made.to(torch.float8_e4m3fn),
    "complex": lambda made: made.to(torch.complex64),
    "elsewhere": lambda made: made.to("meta", torch.float16),
    "a weight": lambda made: Int8Weight.from_float(values(dtype=torch.float16)),
    "an empty one": lambda made: Int8Weight.empty((M, N), torch.float16),
}


@pytest.mark.parametrize("name", CASTS)
def test_dtypes_that_have_not_all_its_values_are_refused(name: str) -> None:
    """As loading refuses them: what is large would be infinite, and what is small zero, in what is saved."""
    made = layer(torch.bfloat16)
    before = copy.deepcopy(made.weight)
    weight = made.weight
    with pytest.raises(TypeError, match=r"of torch.bfloat16, torch.float32, torch.float64 to others, and torch.\w+ "):
        CASTS[name](made)
    made.to(torch.bfloat16)
    assert made.weight is weight
    assert_same_weight(weight, before)
    assert torch.equal(weight_of(made).dequantized(torch.float16), weight_of(made).dequantized().half())
    assert weight.detach().int().dtype == torch.int32  # to which no model is cast


def test_meta_and_back() -> None:
    made = layer(torch.bfloat16)
    state = copy.deepcopy(made.state_dict())
    made.to("meta")
    assert weight_of(made).is_meta
    assert weight_of(made).codes.is_meta
    made.to_empty(device="cpu")
    assert weight_of(made).codes.device.type == "cpu"
    made.load_state_dict(state)
    assert_same_weight(weight_of(made), state["weight"])
    with torch.device("meta"):
        absent = Int8Weight.empty((M, N))
    assert absent.is_meta
    assert absent.shape == (M, N)


def test_data() -> None:
    """Reading gives the same codes; another int8 weight may take their place, floats may not without a word."""
    made = layer(torch.bfloat16)
    with torch.no_grad():
        made.weight.data.zero_()
    assert (weight_of(made).dequantized() == 0).all()
    other = Int8Weight.from_float(values())
    made.weight.data = other
    assert_same_weight(made.weight, other)
    assert made.weight.requires_grad
    with pytest.raises(TypeError, match=r"given a Tensor of torch.bfloat16. `weight.copy_\(values\)` sets"):
        made.weight.data = values(dtype=torch.bfloat16)
    assert_same_weight(made.weight, other)


def test_shared_memory() -> None:
    """torch looked for a storage, and ended the process."""
    made = layer()
    made.share_memory()
    assert weight_of(made).codes.is_shared()
    assert weight_of(made).exponents.is_shared()


# ---- set as a whole


def test_copy() -> None:
    made = layer(torch.bfloat16)
    with torch.no_grad():
        for given in (values(), values(dtype=torch.bfloat16), values(dtype=torch.float64)):
            made.weight.copy_(given)
            assert_same_weight(made.weight.detach(), Int8Weight.from_float(given, torch.bfloat16))
        made.weight.copy_(torch.tensor(2.5))
        assert (weight_of(made).dequantized() == 2.5).all()
        floats = torch.empty(M, N)
        made.weight.copy_(values())
        floats.copy_(made.weight)
        assert torch.equal(floats, weight_of(made).dequantized(torch.float32))
    with pytest.raises(RuntimeError, match="leaf Variable"):
        made.weight.copy_(values())
    with torch.no_grad(), pytest.raises(RuntimeError, match="expand"):
        made.weight.copy_(values(M, N - 1))


def test_a_change_is_noticed_by_autograd() -> None:
    made = layer(torch.float64)
    out = made(values(2, N, torch.float64).requires_grad_()).sum()
    with torch.no_grad():
        made.weight.copy_(values())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


INITS: dict[str, tuple[Callable[[Tensor], Any], float | None]] = {
    "zeros_": (nn.init.zeros_, 0.0),
    "ones_": (nn.init.ones_, 0.0),
    "constant_": (lambda w: nn.init.constant_(w, 0.3), 0.0),
    "normal_": (lambda w: nn.init.normal_(w, std=0.02), 0.02),
    "uniform_": (lambda w: nn.init.uniform_(w, -0.1, 0.1), 0.1 / 3**0.5),
    "xavier_normal_": (nn.init.xavier_normal_, (2 / (M + N)) ** 0.5),
    "kaiming_uniform_": (nn.init.kaiming_uniform_, (2 / N) ** 0.5),
    "trunc_normal_": (lambda w: nn.init.trunc_normal_(w, std=0.02), 0.02),
}


@pytest.mark.parametrize("name", INITS)
def test_initialised(name: str) -> None:
    made = layer(torch.bfloat16)
    torch.manual_seed(0)
    function, deviation = INITS[name]
    function(made.weight)
    found = weight_of(made).dequantized(torch.float32)
    assert made.weight.requires_grad
    if deviation == 0.0:
        assert found.std() == 0
        assert abs(found[0, 0].item() - {"zeros_": 0.0, "ones_": 1.0, "constant_": 0.3}[name]) < 0.3 / 128
    else:
        assert deviation is not None
        assert abs(found.std().item() / deviation - 1) < 0.1
        assert len(found.unique()) > 100
        # Each tile by itself, none a copy of another.
        assert not torch.equal(found[:2], found[2:4])


def test_initialised_as_layers_are() -> None:
    made = layer(torch.bfloat16)
    with torch.no_grad():
        made.weight.zero_()
    made.reset_parameters()
    bound = N**-0.5
    assert 0.9 * bound < weight_of(made).dequantized().abs().max() < 1.01 * bound


# ---- read


READS: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda w: w.sum(),
    "norm": torch.linalg.vector_norm,
    "max": lambda w: w.abs().max(),
    "add": lambda w: w + 1,
    "product": lambda w: w * w,
    "rows": lambda w: w[torch.tensor([3, 1])],
    "equal": lambda w: torch.tensor(torch.equal(w, w)),
    "cat": lambda w: torch.cat([w, w]),
    "isfinite": lambda w: w.isfinite().all(),
    "foreach norm": lambda w: torch._foreach_norm([w])[0],
    "item": lambda w: torch.tensor(w.mean().item()),
    "flat": lambda w: w.reshape(-1)[5:9] + 0,
    "flatten": lambda w: w.flatten().sum(),
    "embedding": lambda w: functional.embedding(torch.tensor([1, 2]), w),
    "vector": lambda w: w @ torch.ones(N, dtype=w.dtype),
}


@pytest.mark.parametrize("name", READS)
def test_read_like_its_values(name: str) -> None:
    weight = weight_of(layer(torch.float64))
    found, expected = READS[name](weight.detach()), READS[name](weight.dequantized())
    assert type(found) is Tensor
    assert torch.equal(found, expected)


def test_what_is_like_it_has_floats() -> None:
    """Whatever optimizers make like a weight; `empty_like` has codes, for `to_empty`."""
    weight = as_int8(layer(torch.bfloat16).weight.detach())
    for made in (torch.zeros_like(weight), torch.ones_like(weight), torch.rand_like(weight), weight.new_zeros(M, N)):
        assert type(made) is Tensor
        assert made.shape == (M, N)
        assert made.dtype == torch.bfloat16
        assert made.is_contiguous()
    assert torch.zeros_like(weight, dtype=torch.float32).dtype == torch.float32
    assert isinstance(torch.empty_like(weight), Int8Weight)
    assert as_int8(weight.detach()).codes.data_ptr() == weight.codes.data_ptr()
    assert as_int8(weight.clone()).codes.data_ptr() != weight.codes.data_ptr()
    assert weight.contiguous().dtype == torch.bfloat16


def test_clipping_and_norms_of_gradients() -> None:
    made = layer(torch.float64)
    other = twin(made)
    for module in (made, other):
        module(values(3, N, torch.float64)).square().sum().backward()
    norms = [nn.utils.clip_grad_norm_(module.parameters(), 0.1) for module in (made, other)]
    assert_near(norms[0], norms[1])
    for one, two in zip(made.parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        assert_near(one.grad, two.grad)
    nn.utils.clip_grad_value_(made.parameters(), 1e-3)
    made.zero_grad()
    assert all(param.grad is None for param in made.parameters())


# ---- refused


VIEWS: dict[str, Callable[[Tensor], Any]] = {
    "row": lambda w: w[0],
    "rows": lambda w: w[:2],
    "transposed": lambda w: w.T,
    "matrix transposed": lambda w: w.mT,
    "reshaped": lambda w: w.view(N, M),
    "with a dimension": lambda w: w[None],
    "iterated": list,
    "permuted": lambda w: w.permute(1, 0),
    "diagonal": lambda w: w.diagonal(),
    "expanded": lambda w: w.expand(2, M, N),
    "multiplied, transposed": lambda w: torch.zeros(3, N) @ w.T,
    "multiplied by a matrix": lambda w: w @ torch.zeros(2, N, 3),
    "compared by its bits": lambda w: w.view(torch.int32),
    "narrowed": lambda w: w.narrow(0, 0, 2),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"would give a view, and an int8 weight has none. `weight.dequantized\(\)`"):
        VIEWS[name](layer().weight)


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda w: w.mul_(2),
    "add_": lambda w: w.add_(torch.ones(M, N)),
    "clamp_": lambda w: w.clamp_(0, 1),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    "foreach copy": lambda w: torch._foreach_copy_([w], [torch.ones(M, N)]),
    "masked_fill_": lambda w: w.masked_fill_(torch.ones(M, N, dtype=torch.bool), 0.0),
    "index_copy_": lambda w: w.index_copy_(0, torch.tensor([0]), torch.ones(1, N)),
    "resize_": lambda w: w.resize_(3),
    "set_": lambda w: w.set_(torch.zeros(1)),  # type: ignore[call-overload]
    "bernoulli_": lambda w: w.bernoulli_(),
    "lerp_": lambda w: w.lerp_(torch.ones(M, N), 0.5),
    # Of which Python would make `w = w - 1` where a TypeError is raised, so that the weight stays as it is.
    "+=": lambda w: operator.iadd(w, 1),
    "-=": lambda w: operator.isub(w, torch.ones(M, N)),
    "*=": lambda w: operator.imul(w, 0.5),
    "/=": lambda w: operator.itruediv(w, 2),
    "//=": lambda w: operator.ifloordiv(w, 2),
    "%=": lambda w: operator.imod(w, 2),
    "**=": lambda w: operator.ipow(w, 2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_in_place_are_refused(name: str) -> None:
    """Averages of weights (EMA) and other optimizers make them."""
    weight = layer().weight
    before = copy.deepcopy(weight)
    expected = r"would change an int8 weight in place.*hf_galore's optimizers|cannot resize variables that require grad"
    for given in (weight, weight.detach(), weight.data):
        with torch.no_grad(), pytest.raises(RuntimeError, match=expected):
            CHANGES[name](given)
    assert_same_weight(weight, before)


def test_writing_to_it_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"cannot write to an int8 weight: `weight.copy_\(values\)`"):
        torch.add(torch.ones(M, N), 1, out=layer().weight.detach())
    with pytest.raises(RuntimeError, match="has none"):
        layer().weight.detach()[0] = 1.0


FLAT: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda flat: flat.mul_(2),
    "copy_": lambda flat: flat.copy_(torch.zeros(M * N)),
    "element": lambda flat: flat.__setitem__(0, 1.0),
    "+=": lambda flat: operator.iadd(flat, 1),
    "*=": lambda flat: operator.imul(flat, 2),
    "-=": lambda flat: operator.isub(flat, 2),
    "/=": lambda flat: operator.itruediv(flat, 2),
    "**=": lambda flat: operator.ipow(flat, 2),
    "foreach": lambda flat: torch._foreach_zero_([flat]),
    "out": lambda flat: torch.mul(torch.ones(M * N), 2, out=flat),
    "slice": lambda flat: flat[2:5].zero_(),
    "slice of a slice": lambda flat: operator.iadd(flat[2:9][1:4], 1),
    "parts": lambda flat: flat.chunk(2)[1].fill_(1),
    "shape": lambda flat: flat.view(M, N).zero_(),
    "strides": lambda flat: flat.as_strided((3,), (1,)).zero_(),
    "detached": lambda flat: flat.detach().zero_(),
    "data": lambda flat: flat.data.zero_(),
}


@pytest.mark.parametrize("name", FLAT)
def test_changes_of_the_values_in_a_row_are_refused(name: str) -> None:
    """They are a copy, and so is a part of them: the weight would stay as it is, without a word."""
    for flat in (layer().weight.data.view(-1), layer().weight.detach().flatten()):
        with pytest.raises(RuntimeError, match="would change a copy of an int8 weight's values"):
            FLAT[name](flat)


def test_what_is_made_of_the_values_in_a_row_can_be_changed() -> None:
    """And what only reads them gives what tensors give."""
    flat, values = layer().weight.data.view(-1), weight_of(layer()).dequantized().view(-1)
    for made in (flat + 1, flat.clone(), flat[torch.tensor([1, 2])], flat.double(), torch.cat([flat, flat])):
        assert type(made) is Tensor
        made.zero_()
    assert torch.equal(flat[3:9], values[3:9])
    assert flat.shape == values.shape
    assert flat.max(0).values == values.max()


def test_an_array_of_the_values_cannot_be_written() -> None:
    """One of a tensor shares its memory."""
    for array in (layer().weight.detach().numpy(), layer().weight.detach().view(-1).numpy()):
        assert array.sum() == pytest.approx(weight_of(layer()).dequantized().sum().item(), rel=1e-4)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1.0
    assert layer().weight.detach().numpy().shape == (M, N)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "AdamW, one by one": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=False),
    "AdamW, fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_optimizers_are_refused(name: str) -> None:
    """At their first step, before a weight moves."""
    made = layer()
    before = copy.deepcopy(made.weight)
    optimizer = OPTIMIZERS[name](made.parameters())
    made(values(3, N)).sum().backward()
    expected = 'hf_galore\'s optimizers train such weights, rounding at random .*optim="galore_adamw_8bit_layerwise"'
    with pytest.raises(RuntimeError, match=expected):
        optimizer.step()
    assert_same_weight(made.weight, before)


def test_bitsandbytes_is_refused() -> None:
    """Its kernels would write where no element is."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made = nn.Linear(256, 64, bias=False)
    made.weight = nn.Parameter(Int8Weight.from_float(made.weight.detach()))
    optimizer = bitsandbytes.optim.AdamW8bit(made.parameters(), lr=1e-2)
    made(torch.ones(2, 256)).sum().backward()
    with pytest.raises(RuntimeError, match="hf_galore's optimizers"):
        optimizer.step()


def test_files_of_safetensors_are_refused(tmp_path: Path) -> None:
    """It looks for a storage, and would say of a pointer that it is invalid."""
    made = layer()
    for save in (lambda file: save_model(made, file), lambda file: save_file(made.state_dict(), file)):
        with pytest.raises(TypeError, match=r"no storage of its own.*save_pretrained, any state dict by torch.save"):
            save(tmp_path / "model.safetensors")


def test_refusals_say_what_to_do_instead() -> None:
    """Of the two ways to multiply only one trains the weight."""
    weight = weight_of(layer())
    with pytest.raises(RuntimeError, match=r"gets no gradient; `torch.nn.functional.linear` .* modules_to_not_convert"):
        torch.zeros(3, N) @ weight.T
    assert not weight.dequantized().requires_grad
    average = weight.dequantized(torch.float32)
    with pytest.raises(RuntimeError, match=r"An average of weights begins with `weight.dequantized\(torch.float32\)`"):
        weight.detach().float().lerp_(average, 0.1)
    average.lerp_(weight.detach().float(), 0.1)
    torch.testing.assert_close(average, weight.dequantized(torch.float32))


def test_parametrizations_are_refused() -> None:
    from torch.nn.utils import parametrizations

    with pytest.raises(RuntimeError, match="int8 weight"):
        parametrizations.weight_norm(layer())
    with pytest.raises(RuntimeError, match="int8 weight"):
        parametrizations.spectral_norm(layer())


# ---- under hf_galore's optimizers


def test_decay_is_not_said_to_be_lost(caplog: pytest.LogCaptureFixture) -> None:
    """It arrives on average. Looking for it took a view of the weight, which there is none of."""
    made = layer(torch.bfloat16)
    GaLoreAdamW([{"params": [made.weight], "rank": 4}], lr=1e-6, weight_decay=1e-3).close()
    assert "decay" not in caplog.text
    GaLoreAdamW([made.bias], lr=1e-6, weight_decay=1e-3).close()
    assert "Weight decay does nothing to 1 weight" in caplog.text


@pytest.mark.parametrize("dtype", OUTER, ids=str)
def test_stochastic_rounding_may_be_asked_for(dtype: torch.dtype) -> None:
    """Which such weights have in any case."""
    made = layer(dtype)
    GaLoreAdamW([{"params": [made.weight], "rank": 4}], lr=1e-2, stochastic_rounding=True).close()
    with contextlib.suppress(ValueError):
        GaLoreAdamW([made.bias], lr=1e-2, stochastic_rounding=True)
        assert dtype == torch.bfloat16


def test_two_of_the_same_codes_are_refused() -> None:
    made = layer()
    other = nn.Parameter(Int8Weight(*weight_of(made).blocks, torch.float32))
    with pytest.raises(ValueError, match="two parameters in the same memory"):
        GaLoreAdamW([{"params": [made.weight, other], "rank": 4}], lr=1e-2)


def test_moved_and_cast_under_an_optimizer() -> None:
    made = layer(torch.float32)
    optimizer: GaLoreOptimizer = GaLoreAdamW(
        [{"params": [made.weight], "rank": 4}], lr=1e-2, module=made, layerwise=True
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        made.to(dtype)
        before = weight_of(made).dequantized()
        made(values(3, N, dtype)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(weight_of(made).dequantized(), before)


def test_a_view_of_it_is_not_projected() -> None:
    group = {"params": [layer().weight], "rank": 4, "view_as": 2}
    with pytest.raises(ValueError, match=r"is kept in 8 bits.*view_as makes \(2, 12, 70\).*Leave view_as out"):
        GaLoreAdamW([group], lr=1e-2)


@pytest.mark.parametrize("bias", [None, 0.5])
def test_in_layers_whose_weight_is_transposed(bias: float | None) -> None:
    """GPT-2's, under a projected backward: of a square weight another product would be as good to torch."""
    from transformers.pytorch_utils import Conv1D

    results = []
    for int8 in (True, False):
        torch.manual_seed(0)
        made: Any = Conv1D(64, 64).double()
        with torch.no_grad():
            made.weight.copy_(Int8Weight.from_float(made.weight).dequantized())
            made.bias.fill_(bias or 0.0)
        if int8:
            made.weight = nn.Parameter(Int8Weight.from_float(made.weight.detach()))
        optimizer = GaLoreAdamW([{"params": [made.weight], "rank": 4}], lr=1e-2, module=made, projected_backward=True)
        x = values(3, 64, torch.float64).requires_grad_()
        out = made(x)
        out.pow(3).sum().backward()
        results.append([out.detach(), x.grad, made.bias.grad, optimizer.grad_norm()])
        optimizer.close()
    for one, other in zip(*results, strict=True):
        assert_near(one, other)
