"""The low-rank gradient in `.grad`: what is linear acts on it as on the gradient, and all else is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_galore.backward.gradient import BasisVersion, LowRankGradient, UncommittedRefresh, UsedGradient
from hf_galore.lowrank.projection import norm_of

SHAPE, RANK = (12, 8), 3


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


BASIS = torch.linalg.qr(random(0, SHAPE[0], RANK))[0]


def project(gradient: Tensor) -> Tensor:
    low_rank: Tensor = BASIS.mT @ gradient
    return low_rank


def foreach(name: str, *operands: Any, which: int = 0, **options: Any) -> Callable[[Any, Any], Any]:
    """An operation on both in place, and one of them."""

    def call(g: Any, h: Any) -> Any:
        getattr(torch, f"_foreach_{name}")([g, h], *operands, **options)
        return (g, h)[which]

    return call


VERSION = BasisVersion("layer.weight", project)
PARAM = nn.Parameter(random(1, *SHAPE))
G, OTHER = random(2, *SHAPE), random(3, *SHAPE)


def low(gradient: Tensor = G, *, whole: bool = False, version: BasisVersion = VERSION) -> LowRankGradient:
    return LowRankGradient(PARAM, project(gradient), version, norm=norm_of(gradient) if whole else None)


# Each takes a gradient G and another one H, either of which may be low-rank.
LINEAR: dict[str, Callable[[Any, Any], Any]] = {
    "clone": lambda g, h: g.clone(),
    "detach": lambda g, h: g.detach(),
    "data": lambda g, h: g.data,
    "neg": lambda g, h: -g,
    "mul": lambda g, h: 0.5 * g,
    "mul by a tensor": lambda g, h: g * torch.tensor(0.5),
    "div": lambda g, h: g / 3,
    "mul_": lambda g, h: g.mul_(-2),
    "div_": lambda g, h: g.div_(torch.tensor(4.0)),
    "add": lambda g, h: g + h,
    "add with alpha": lambda g, h: torch.add(g, h, alpha=-0.3),
    "sub": lambda g, h: g - h,
    "add_": lambda g, h: g.add_(h, alpha=0.7),
    "sub_": lambda g, h: g.sub_(h),
    "+=": lambda g, h: g.__iadd__(h),
    "copy_": lambda g, h: g.copy_(h),
    "zero_": lambda g, h: g.zero_(),
    "zero_ and add_": lambda g, h: g.zero_().add_(g * 0).mul_(2),
    "zeros_like": lambda g, h: torch.zeros_like(g),
    "_foreach_mul_": foreach("mul_", 0.1),
    "_foreach_mul_ with a list": foreach("mul_", [0.1, 3.0], which=1),
    "_foreach_mul_ with a tensor": foreach("mul_", torch.tensor(0.3)),
    "_foreach_div_": foreach("div_", 2.0, which=1),
    "_foreach_add_": foreach("add_", [OTHER, G], alpha=2.0),
    "_foreach_zero_": foreach("zero_", which=1),
}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("other", ["low-rank", "gradient"])
def test_what_is_linear_acts_as_on_the_gradient(name: str, whole: bool, other: str) -> None:
    operation = LINEAR[name]
    expected = operation(G.clone(), OTHER.clone())
    found = operation(low(whole=whole), low(OTHER, whole=whole) if other == "low-rank" else OTHER.clone())
    if isinstance(found, LowRankGradient):
        torch.testing.assert_close(found.low_rank, project(expected))
        if found.norm_of_whole is not None:  # and not left over from another
            torch.testing.assert_close(found.norm_of_whole, norm_of(expected))
        found = found.frobenius_norm()
        assert found.isfinite()
    else:
        assert other == "gradient"  # of which nothing became low-rank
        torch.testing.assert_close(found, expected)


@given(st.lists(st.sampled_from(["mul_", "add_", "zero_", "clone", "+"]), max_size=8), st.booleans())
def test_any_sequence_of_them(names: list[str], whole: bool) -> None:
    found: Any = low(whole=whole)
    expected = G.clone()
    for number, name in enumerate(names):
        more = random(number + 10, *SHAPE)
        if name == "mul_":
            found.mul_(0.5)
            expected.mul_(0.5)
        elif name == "add_":
            # What comes on top of a zero waits for the basis to be made from it.
            found.add_(low(more))
            expected.add_(more)
        elif name == "zero_":
            found.zero_()
            expected.zero_()
        elif name == "clone":
            found = found.clone()
        else:
            found = found + low(more)
            expected = expected + more
    torch.testing.assert_close(found.low_rank, project(expected), atol=1e-5, rtol=1e-5)


def test_a_gradient_on_top_of_zero_is_kept_whole() -> None:
    """The basis is to be made from it: there was nothing to make one from before."""
    gradient = low().zero_()
    gradient.add_(G)
    gradient.add_(OTHER)
    gradient.mul_(2)
    assert isinstance(gradient, LowRankGradient)
    assert gradient.addend is not None
    torch.testing.assert_close(gradient.addend, 2 * (G + OTHER))


def test_a_sum_with_a_refresh_that_is_not_yet_used_is_the_whole_gradient() -> None:
    fresh = BasisVersion("layer.weight", project)

    def uncommitted(gradient: Tensor) -> LowRankGradient:
        return LowRankGradient(PARAM, project(gradient), fresh, uncommitted=UncommittedRefresh(None, lambda: gradient))

    for total in (uncommitted(G) + OTHER, uncommitted(G) + uncommitted(OTHER)):
        assert type(total) is Tensor
        torch.testing.assert_close(total, G + OTHER)


NORMS: dict[str, Callable[[Any], Any]] = {
    "norm": lambda g: g.norm(),
    "norm(2)": lambda g: g.detach().norm(2.0),
    "torch.norm": torch.norm,
    "vector_norm": torch.linalg.vector_norm,
    "in float32": lambda g: g.float().norm(),
    "in float64": lambda g: torch.linalg.vector_norm(g, dtype=torch.float64).float(),
    "foreach": lambda g: torch._foreach_norm([g, G])[0],
    "clip_grad_norm_": lambda g: torch.nn.utils.get_total_norm([g]),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_of_the_gradient_where_it_is_known(name: str) -> None:
    torch.testing.assert_close(NORMS[name](low(whole=True)), norm_of(G))
    torch.testing.assert_close(NORMS[name](low()), norm_of(project(G)))
    used = UsedGradient(PARAM, "layer.weight")
    used.start(norm_of(G))
    if name not in ("in float32",):
        torch.testing.assert_close(NORMS[name](used), norm_of(G))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_whether_it_is_finite(bad: float) -> None:
    gradient = low()
    assert torch.isfinite(gradient).all()
    assert not gradient.isnan().any()
    gradient.low_rank[0, 0] = bad
    assert not torch.isfinite(gradient).all()
    assert gradient.isnan().any() == (bad != bad)
    assert torch.isinf(gradient).any() == (bad == bad)


REFUSED: dict[str, Callable[[Any], Any]] = {
    "flatten": lambda g: g.flatten(),
    "clone and view": lambda g: g.clone().view(-1),
    "sum": lambda g: g.sum(),
    "mean": lambda g: g.mean(),
    "abs": lambda g: g.abs(),
    "max": lambda g: g.max(),
    "square": lambda g: g**2,
    "norm(1)": lambda g: g.norm(1),
    "norm(inf)": lambda g: g.norm(float("inf")),
    "norm of rows": lambda g: g.norm(dim=1),
    "a mask": lambda g: g * torch.ones(SHAPE),
    "a mask in place": lambda g: g.mul_(torch.ones(SHAPE)),
    "a product of two": lambda g: g * g,
    "a row": lambda g: g[0],
    "setting a row": lambda g: g.__setitem__(0, 0.0),
    "cat": lambda g: torch.cat([g, g]),
    "stack": lambda g: torch.stack([g, g]),
    "matmul": lambda g: g @ torch.ones(SHAPE[1]),
    "transposed": lambda g: g.mT,
    "clamp_": lambda g: g.clamp_(-1, 1),
    "sign": lambda g: g.sign(),
    "adding a number": lambda g: g.add_(1.0),
    "numpy": lambda g: g.numpy(),
    "tolist": lambda g: g.tolist(),
    "save": lambda g: pickle.dumps(g),
    "a weight minus it": lambda g: PARAM.detach() - 0.1 * g,
    "a weight plus it": lambda g: PARAM.detach() + g,
    "into another": lambda g: torch.zeros(SHAPE).copy_(g),
    "onto another": lambda g: torch.zeros(SHAPE).add_(g),
    "clip_grad_value_": lambda g: torch.nn.utils.clip_grad_value_([_with_grad(g)], 1.0),
    "parameters_to_vector": lambda g: torch.nn.utils.parameters_to_vector([g]),
}


def _with_grad(gradient: Tensor) -> nn.Parameter:
    param = nn.Parameter(PARAM.detach().clone())
    param.grad = gradient
    return param


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", ["low-rank", "used"])
def test_what_needs_the_gradient_itself_is_refused(name: str, kind: str) -> None:
    gradient: Any = low() if kind == "low-rank" else UsedGradient(PARAM, "layer.weight")
    before = low().low_rank
    with pytest.raises((RuntimeError, TypeError)) as caught:
        REFUSED[name](gradient)
    if name not in ("numpy", "tolist", "save"):  # which torch or we refuse before they come to the gradient
        assert "layer.weight.grad" in str(caught.value)
        assert ("projected_backward=False" if kind == "low-rank" else "hold_gradients=True") in str(caught.value)
    if kind == "low-rank":
        assert torch.equal(gradient.low_rank, before)


def test_it_says_what_is_in_memory() -> None:
    gradient = low()
    assert gradient.shape == PARAM.shape
    assert (gradient.numel(), gradient.nelement()) == (RANK * SHAPE[1],) * 2
    assert gradient.nbytes == 4 * RANK * SHAPE[1]
    assert repr(gradient) == "LowRankGradient(shape=(12, 8), dtype=torch.float32, holding (3, 8))"
    used = UsedGradient(PARAM, "layer.weight")
    assert (used.numel(), used.nbytes) == (0, 0)
    assert "holding nothing" in repr(used)


def test_a_copy_has_its_own_numbers() -> None:
    gradient = low()
    other = copy.deepcopy(gradient)
    other.mul_(2)
    torch.testing.assert_close(gradient.low_rank, project(G))
    torch.testing.assert_close(other.low_rank, 2 * project(G))


def test_a_used_gradient_takes_another_once_it_was_zeroed() -> None:
    """`zero_grad(set_to_none=False)` leaves it there, and autograd adds the next one."""
    used = UsedGradient(PARAM, "layer.weight")
    with pytest.raises(RuntimeError, match=r"second gradient arrived for layer\.weight"):
        used.add_(G)
    used.zero_()
    used.add_(G)
    used.add_(OTHER)
    assert used.addend is not None
    torch.testing.assert_close(used.addend, G + OTHER)


def test_gradients_of_different_bases_do_not_add_up() -> None:
    other = low(OTHER, version=BasisVersion("layer.weight", project))
    with pytest.raises(RuntimeError, match=r"layer\.weight are of different bases.*zero_grad"):
        low() + other
    with pytest.raises(RuntimeError, match="different bases"):
        low().add_(other)


ALIASES: dict[str, Callable[[Any], Any]] = {"detach": lambda g: g.detach(), "data": lambda g: g.data}


@pytest.mark.parametrize("name", ALIASES)
@pytest.mark.parametrize("whole", [True, False])
def test_an_alias_is_the_gradient(name: str, whole: bool) -> None:
    gradient = low(whole=whole)
    ALIASES[name](gradient).mul_(0.5)
    torch.testing.assert_close(gradient.low_rank, project(G) / 2)
    torch.testing.assert_close(gradient.norm(), norm_of(G if whole else project(G)) / 2)
    ALIASES[name](gradient).zero_()
    assert gradient.is_zero
    assert gradient.norm() == 0


@pytest.mark.parametrize("value", ["low-rank", "gradient", "zeros", "a part of itself"])
def test_setting_data_sets_the_gradient(value: str) -> None:
    gradient = low(whole=True)
    expected = {"low-rank": OTHER, "gradient": OTHER, "zeros": torch.zeros(SHAPE), "a part of itself": G / 4}[value]
    gradient.data = low(OTHER) if value == "low-rank" else gradient.data / 4 if "part" in value else expected
    torch.testing.assert_close(gradient.low_rank, project(expected))
    torch.testing.assert_close(gradient.norm(), norm_of(project(expected) if "part" not in value else expected))


BUFFERS: dict[str, Callable[[Any], Any]] = {
    "zeros_like and add_": lambda g: torch.zeros_like(g).add_(g),
    "zeros_like and +": lambda g: torch.zeros_like(g) + g,
    "+ zeros_like": lambda g: g + torch.zeros_like(g),
    "clone": lambda g: g.clone(),
    "copy_": lambda g: torch.zeros_like(g).copy_(g),
    "deepcopy": copy.deepcopy,
    "times 1": lambda g: g * 1,
}


@pytest.mark.parametrize("name", BUFFERS)
def test_a_buffer_of_ones_own_is_not_the_gradient(name: str) -> None:
    """A running mean of gradients scaled the gradient itself."""
    gradient = low(whole=True)
    buffer = BUFFERS[name](gradient)
    torch.testing.assert_close(buffer.low_rank, project(G))
    buffer.mul_(0.1)
    torch.testing.assert_close(gradient.low_rank, project(G))
    torch.testing.assert_close(gradient.norm(), norm_of(G))
    buffer.zero_()
    assert not gradient.is_zero


def test_what_is_added_to_zero_is_copied() -> None:
    gradient, mine = low().zero_(), G.clone()
    gradient.add_(mine)
    mine.zero_()
    assert isinstance(gradient, LowRankGradient)
    assert gradient.addend is not None
    assert torch.equal(gradient.addend, G)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_multiple_of_a_refresh_that_is_not_yet_used(in_place: bool) -> None:
    """A hook of somebody else scales gradients before ours is called."""
    refresh = UncommittedRefresh("made", lambda: G)
    gradient = LowRankGradient(PARAM, project(G), VERSION, uncommitted=refresh)
    found: Any = gradient.mul_(0.5) if in_place else gradient * 0.5
    assert found.uncommitted.made == "made"
    torch.testing.assert_close(found.low_rank, project(G) / 2)
    torch.testing.assert_close(found + OTHER, G / 2 + OTHER)
