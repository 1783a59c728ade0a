"""The gradient of an embedding by rows: the same training as with the whole matrix, which is not there."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

import hf_galore.backward.served
from hf_galore import GaLoreAdamW
from hf_galore.backward.embedding import ProjectedEmbedding, patch_embedding, why_not_by_rows
from hf_galore.backward.gradient import LowRankGradient
from hf_galore.lowrank.rows import EmbeddingGradient
from hf_galore.optim.optimizer import GaLoreOptimizer
from hf_galore.plan.tracking import StorageTracker
from tests.support import planning
from tests.support.helpers import (
    OPTIM_ARGS,
    VOCABULARY,
    Counting,
    arguments,
    assert_identical,
    assert_same_but_for_rounding,
    logged,
    perturbed,
    snapshot,
    tiny_llama,
    train,
)
from tests.support.releases import FUSED_HEAD

ALL = ["attn", "mlp", "embed_tokens", "lm_head"]
# Seven refreshes in 20 steps.
WINDOWS: dict[str, Any] = {"gradient_accumulation_steps": 4, "max_grad_norm": 0.5, "max_steps": 20}
WAYS: dict[str, dict[str, Any]] = {
    "at once": {"max_grad_norm": 0.0, "max_steps": 20},
    "clipped": {"max_grad_norm": 0.5, "max_steps": 20},
    "accumulated and clipped": WINDOWS,
}


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a gradient has been taken as a matrix, and by rows."""
    found = {"whole": 0, "rows": 0}

    def counting(name: str) -> Callable[[EmbeddingGradient], Any]:
        original = getattr(EmbeddingGradient, name)

        def counted(self: EmbeddingGradient) -> Any:
            found[name] += 1
            return original(self)

        return counted

    for name in found:
        monkeypatch.setattr(EmbeddingGradient, name, counting(name))
    return found


def as_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let embeddings give whole gradients, as torch does."""
    monkeypatch.setattr(hf_galore.backward.served, "why_not_by_rows", lambda module: "it is not meant to be")


# ---- the same training


@pytest.mark.arithmetic
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("way", WAYS)
def test_a_target_trains_as_with_whole_gradients(
    tied: bool, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: dict[str, int]
) -> None:
    """But for rounding: rows are multiplied by a basis in another number, and the head's R is added to theirs."""
    options = {**WAYS[way], "optim_target_modules": ALL}

    def run(model: nn.Module) -> Trainer:
        return train(model, tmp_path, "galore_adamw_layerwise", **options)

    found = run(tiny_llama(tie_word_embeddings=tied))
    # Of a tied weight the rows are added to the head's gradient, where a basis is due.
    assert count["whole"] == 0 if tied else 0 < count["whole"] < count["rows"]
    assert count["rows"] > 0
    as_matrices(monkeypatch)
    before = dict(count)
    expected = run(tiny_llama(tie_word_embeddings=tied))
    nearby = run(perturbed(tiny_llama(tie_word_embeddings=tied)))
    assert count == before
    ends = [snapshot(run.model) for run in (found, expected, nearby)]
    start = snapshot(tiny_llama(tie_word_embeddings=tied))
    assert_same_but_for_rounding(ends[0], ends[1], ends[2], start)
    embedding = {name: weight for name, weight in ends[1].items() if "embed_tokens" in name}
    assert len(embedding) == 1
    assert_same_but_for_rounding(ends[0], embedding, ends[2], start)
    assert logged(found, "grad_norm") == pytest.approx(logged(expected, "grad_norm"), rel=1e-3)


@pytest.mark.skipif(not FUSED_HEAD, reason="a head that is not projected is TRL's, since 1.16")
@pytest.mark.arithmetic
@pytest.mark.parametrize("way", WAYS)
def test_a_full_rank_weight_trains_as_with_whole_gradients(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: dict[str, int]
) -> None:
    """Rows that are added to the head's gradient are what a matrix of them is that autograd adds, to the bit.

    But in windows of several micro-batches, where both are added to what is held one after the other.
    """

    def tied() -> nn.Module:
        model: nn.Module = planning.llama(tie_word_embeddings=True)
        return model

    def run(model: nn.Module) -> Trainer:
        trainer = planning.sft(tmp_path, "galore_adamw_layerwise", lambda: model, **WAYS[way])()
        trainer.train()
        return trainer

    found = run(tied())
    by_rows = {"whole": 0, "rows": 20 * found.args.gradient_accumulation_steps}
    assert count == by_rows
    as_matrices(monkeypatch)
    expected = run(tied())
    ends = [snapshot(each.model) for each in (found, expected)]
    if "accumulated" in way:
        nearby = run(perturbed(tied()))
        assert_same_but_for_rounding(ends[0], ends[1], snapshot(nearby.model), snapshot(tied()))
    else:
        assert_identical(ends[0], ends[1])
        assert logged(found, "grad_norm") == logged(expected, "grad_norm")
    assert count == by_rows


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("bits", ["", ", gradient_bits=8"])
def test_layerwise_is_plain(tied: bool, bits: str, tmp_path: Path) -> None:
    options = {**WINDOWS, "max_steps": 8, "optim_target_modules": ALL}
    optim_args = f"{OPTIM_ARGS}, projected_backward=true{bits}"
    models = [tiny_llama(tie_word_embeddings=tied) for _ in range(2)]
    runs = [
        train(model, tmp_path, optim, optim_args=optim_args, **options)
        for model, optim in zip(models, ("galore_adamw", "galore_adamw_layerwise"), strict=True)
    ]
    assert_identical(snapshot(runs[1].model), snapshot(runs[0].model))
    assert logged(runs[1], "grad_norm") == logged(runs[0], "grad_norm")


@pytest.mark.parametrize("name", ["galore_adamw_layerwise", "galore_adamw_8bit_layerwise"])
def test_a_run_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    options = {**WINDOWS, "max_steps": 8, "save_strategy": "steps", "save_steps": 4, "optim_target_modules": ALL}
    straight = train(tiny_llama(tie_word_embeddings=True), tmp_path, name, **options)
    resumed = Trainer(
        model=tiny_llama(seed=1, tie_word_embeddings=True),
        args=arguments(tmp_path, name, **options),
        train_dataset=Counting(),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 8
    assert_identical(snapshot(resumed.model), snapshot(straight.model))


# ---- memory


ROWS = 1000  # of the vocabulary; nothing else in the model, its activations and its moments is as large as that


def most_in_steps(trainer: Trainer) -> list[int]:
    """The most matrices of the vocabulary's size that were alive in each step."""
    found: list[int] = []
    step = trainer.training_step

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        with StorageTracker(torch.device("cpu")) as tracker:
            loss: Tensor = step(*args, **kwargs)
        alive, peak = 0, 0
        for _, nbytes in tracker.events():
            alive += (nbytes > 0) - (nbytes < 0) if abs(nbytes) >= ROWS * 64 * 4 else 0
            peak = max(peak, alive)
        found.append(peak)
        return loss

    trainer.training_step = watched
    trainer.train()
    return found


def of_large_vocabulary(folder: Path, *, tied: bool) -> Trainer:
    """Seven steps, of which the first, the fourth and the last refresh all bases."""
    return Trainer(
        model=tiny_llama(vocab_size=ROWS, tie_word_embeddings=tied),
        args=arguments(
            folder,
            "galore_adamw_layerwise",
            optim_target_modules=ALL,
            optim_args=f"{OPTIM_ARGS}, stagger=false",
            per_device_train_batch_size=1,
            max_grad_norm=0.0,
            max_steps=7,
        ),
        train_dataset=Counting(),
    )


def test_a_tied_weight_has_one_gradient_where_it_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weight itself: two matrices of its size in a refresh, and one between them."""
    assert most_in_steps(of_large_vocabulary(tmp_path, tied=True)) == [2, 1, 1, 2, 1, 1, 2]
    as_matrices(monkeypatch)
    assert most_in_steps(of_large_vocabulary(tmp_path, tied=True)) == [3, 2, 2, 3, 2, 2, 3]


def test_an_untied_embedding_has_a_gradient_where_it_needs_it(tmp_path: Path, count: dict[str, int]) -> None:
    of_large_vocabulary(tmp_path, tied=False).train()
    assert count == {"whole": 3, "rows": 4}


# ---- what else may be done with an embedding


class Words(nn.Module):
    """An embedding that is used twice, and a head that may be the same matrix."""

    def __init__(self, *, tied: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(VOCABULARY, 32, **options)
        self.inner = nn.Linear(32, 32)
        self.head = nn.Linear(32, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.words(tokens.flip(0))
        out: Tensor = self.head(torch.tanh(self.inner(x)))
        return out


TOKENS = torch.tensor([[3, 5, 5, 0], [7, 3, 9, 0], [3, 3, 3, 0]])


def loss_of(net: nn.Module) -> Tensor:
    out: Tensor = net(TOKENS).square().sum()
    return out


def optimizer_for(net: Words, *names: str, **options: Any) -> GaLoreOptimizer:
    """One that projects the weights of these names, and holds gradients."""
    group = {"rank": 4, "update_proj_gap": 100, "proj_bits": 16}
    targets = {net.get_submodule(name).weight: group for name in names}
    values = {"layerwise": True, "hold_gradients": True, "projected_backward": True, **options}
    return GaLoreAdamW(net.parameters(), lr=1e-2, module=net, param_options=targets, **values)  # type: ignore[arg-type]


def reference(**options: Any) -> Tensor:
    net = Words(**options)
    loss_of(net).backward()
    assert net.words.weight.grad is not None
    return net.words.weight.grad


def test_the_second_use_is_added_to_the_first(count: dict[str, int]) -> None:
    net = Words()
    optimizer = optimizer_for(net)
    loss_of(net).backward()
    assert count == {"whole": 1, "rows": 1}
    assert net.words.weight.grad is not None
    assert type(net.words.weight.grad) is Tensor
    torch.testing.assert_close(net.words.weight.grad, reference(), rtol=1e-6, atol=1e-6)
    optimizer.close()


def test_gradients_add_up_over_passes(count: dict[str, int]) -> None:
    net = Words()
    optimizer = optimizer_for(net)
    for _ in range(3):
        loss_of(net).backward()
    assert count == {"whole": 3, "rows": 3}
    torch.testing.assert_close(net.words.weight.grad, 3 * reference(), rtol=1e-5, atol=1e-5)
    optimizer.close()


def test_between_refreshes_there_is_only_a_low_rank_gradient(count: dict[str, int]) -> None:
    net = Words()
    optimizer = optimizer_for(net, "words")
    loss_of(net).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = dict(count)
    loss_of(net).backward()
    assert count == {"whole": before["whole"], "rows": before["rows"] + 2}
    gradient = net.words.weight.grad
    assert isinstance(gradient, LowRankGradient)
    other = copy.deepcopy(net)
    loss_of(other).backward()
    assert other.words.weight.grad is not None
    torch.testing.assert_close(gradient.low_rank, gradient.basis.project(other.words.weight.grad))
    optimizer.close()


def test_a_hook_on_the_weight_sees_all_of_the_gradient() -> None:
    net, seen = Words(), []
    optimizer = optimizer_for(net)
    net.words.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    loss_of(net).backward()
    torch.testing.assert_close(seen[-1], reference(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(net.words.weight.grad, reference(), rtol=1e-6, atol=1e-6)
    optimizer.close()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("names", [(), ("words", "inner")], ids=["full-rank", "targets"])
def test_gradients_that_are_asked_for_are_whole(tied: bool, names: tuple[str, ...]) -> None:
    net = Words(tied=tied)
    optimizer = optimizer_for(net, *names)
    (found,) = torch.autograd.grad(loss_of(net), [net.words.weight])
    torch.testing.assert_close(found, reference(tied=tied), rtol=1e-6, atol=1e-6)
    assert net.words.weight.grad is None
    (found,) = torch.autograd.grad(loss_of(net), [net.words.weight], create_graph=True)
    (twice,) = torch.autograd.grad(found.square().sum(), [net.inner.weight])
    plain = Words(tied=tied)
    (expected,) = torch.autograd.grad(loss_of(plain), [plain.words.weight], create_graph=True)
    (reference_twice,) = torch.autograd.grad(expected.square().sum(), [plain.inner.weight])
    torch.testing.assert_close(twice, reference_twice, rtol=1e-4, atol=1e-4)
    optimizer.close()


def test_a_gradient_for_others_leaves_the_embedding_alone(count: dict[str, int]) -> None:
    net = Words()
    optimizer = optimizer_for(net)
    loss_of(net).backward(inputs=[net.head.weight])
    assert net.words.weight.grad is None
    assert count == {"whole": 0, "rows": 0}
    optimizer.close()


def test_rows_of_a_pass_that_failed_are_not_used() -> None:
    """The first use to come back gives a whole gradient, the other's rows wait: and then the pass ends."""
    net = Words()
    optimizer = optimizer_for(net)
    fail = True

    def interrupt(gradient: Tensor) -> None:
        if fail:
            raise KeyboardInterrupt

    x = net.words(TOKENS)
    first = torch.zeros(1, requires_grad=True) * 1  # comes last in the backward pass
    first.register_hook(interrupt)
    for attempt in (0, 1):
        if attempt:
            fail = False
            x, first = net.words(TOKENS), torch.zeros(1, requires_grad=True) * 1
        loss = (net.head(net.inner(x + net.words(TOKENS.flip(0)))) + first.sum()).square().sum()
        if attempt:
            loss.backward()
        else:
            with pytest.raises(KeyboardInterrupt):
                loss.backward()
            optimizer.zero_grad()
    plain = Words()
    plain.head(plain.inner(plain.words(TOKENS) + plain.words(TOKENS.flip(0)))).square().sum().backward()
    torch.testing.assert_close(net.words.weight.grad, plain.words.weight.grad, rtol=1e-6, atol=1e-6)
    optimizer.close()


def test_a_gradient_that_is_not_finite_is_skipped() -> None:
    """Of the head's there is only a low-rank one, which is lost: the embedding's rows cannot mend it."""
    net = Words(tied=True)
    optimizer = optimizer_for(net, "words", "inner")
    before = snapshot(net)
    (loss_of(net) * torch.inf).backward()
    optimizer.step()
    assert_identical(snapshot(net), before)
    optimizer.close()


# ---- which embeddings


class Scaled(nn.Embedding):
    """As Gemma's."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Embedding(8, 4, max_norm=1.0), "it has max_norm"),
        (lambda: nn.Embedding(8, 4, scale_grad_by_freq=True), "it has scale_grad_by_freq"),
        (lambda: nn.Embedding(8, 4, sparse=True), "it has sparse"),
        (lambda: Scaled(8, 4), "its class Scaled has a forward of its own"),
    ],
)
def test_others_are_left_alone(make: Callable[[], nn.Embedding], reason: str) -> None:
    module = make()
    assert why_not_by_rows(module) == reason
    with pytest.raises(ValueError, match="cannot serve this module"):
        patch_embedding(module, lambda: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"max_norm": 0.1}, {"scale_grad_by_freq": True}], ids=str)
def test_an_option_that_is_set_later_is_honoured(options: dict[str, Any]) -> None:
    net = Words()
    optimizer = optimizer_for(net)
    plain = Words(**options)
    for key, value in options.items():
        setattr(net.words, key, value)
    for each in (net, plain):
        loss_of(each).backward()
    torch.testing.assert_close(net.words.weight.grad, plain.words.weight.grad, rtol=1e-6, atol=1e-6)
    optimizer.close()


@pytest.mark.parametrize("names", [(), ("words",)], ids=["full-rank", "target"])
def test_padding_has_no_gradient(names: tuple[str, ...]) -> None:
    net = Words(padding_idx=0)
    optimizer = optimizer_for(net, *names)
    for _ in range(3):
        loss_of(net).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not net.words.weight[0].any()
    assert net.words.weight[3].ne(Words(padding_idx=0).words.weight[3]).all()
    optimizer.close()


def test_one_that_cannot_be_served_is_named_if_it_is_a_target(caplog: pytest.LogCaptureFixture) -> None:
    said = []
    for names in ((), ("words",)):
        net = Words()
        net.words = Scaled(VOCABULARY, 32)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="hf_galore"):
            optimizer = optimizer_for(net, "inner", "head", *names)
        said.append([record.getMessage() for record in caplog.records if "cannot serve" in record.getMessage()])
        optimizer.close()
    assert said[0] == []
    assert len(said[1]) == 1
    assert "words (its class Scaled has a forward of its own)" in said[1][0]


def test_the_class_comes_back() -> None:
    net = Words()
    optimizer = optimizer_for(net)
    assert isinstance(net.words, ProjectedEmbedding)
    assert isinstance(net.words, nn.Embedding)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(other.words) is nn.Embedding
        assert torch.equal(other(TOKENS), net(TOKENS))
    optimizer.close()
    assert type(net.words) is nn.Embedding
    assert "_galore_sink" not in net.words.__dict__
