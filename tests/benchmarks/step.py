"""One training step, side by side: AdamW, 8-bit AdamW, the published GaLore, and this one in all its modes.

    python -m tests.benchmarks.step
    python -m tests.benchmarks.step --hidden 256 --tokens 512 --rounds 3     # a few minutes
    python -m tests.benchmarks.step --checkpointing off --only residual scaling rule    # the options, beside AdamW

Every optimizer trains its own copy of one Llama on one batch in float32. In each round each takes one step (forward,
backward, update; no refresh), so that the machine's moods hit all alike; printed are the median seconds, and the
median over the rounds of the ratio to AdamW's step of the same round. Beside it stands the floor: the ratio of the
multiply-adds that the step cannot do without. The peak is that of live tensors in a step, parameters and state
included. The bases are made by the first step, which is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import galore_torch
import torch
from bitsandbytes.optim.adamw import AdamW8bit
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import LlamaConfig, LlamaForCausalLM

from hf_galore import GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.option import OF_WHOLE_MATRICES

BASELINE = "AdamW (fused)"
NEVER = 10**9


@dataclasses.dataclass
class Contender:
    """One row of the table."""

    name: str
    rank: int | None
    build: Callable[[nn.Module], torch.optim.Optimizer]
    gradient: Callable[[int, int, int], int]  # multiply-adds for one target's weight, given T, m, n
    model: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak: int = 0


def is_target(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and ("attn" in name or "mlp" in name)


def targets(model: nn.Module) -> list[nn.Parameter]:
    return [cast("nn.Parameter", module.weight) for name, module in model.named_modules() if is_target(name, module)]


def groups(model: nn.Module, rank: int, **options: Any) -> list[dict[str, Any]]:
    projected = targets(model)
    chosen = set(map(id, projected))
    rest = [param for param in model.parameters() if id(param) not in chosen]
    return [
        {"params": rest},
        {"params": projected, "rank": rank, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std", **options},
    ]


def contenders(ranks: list[int], lr: float = 1e-4) -> Iterator[Contender]:
    def gradient(t: int, m: int, n: int) -> int:
        return t * m * n

    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)

    def adamw_8bit(model: nn.Module) -> torch.optim.Optimizer:
        return cast("torch.optim.Optimizer", AdamW8bit(model.parameters(), lr=lr, weight_decay=0.0))

    yield Contender(BASELINE, None, adamw, gradient)
    yield Contender("bitsandbytes AdamW8bit", None, adamw_8bit, gradient)
    for rank in ranks:
        yield published(rank, lr)
        for layerwise in (False, True):
            for projected_backward in (False, True):
                yield ours(GaLoreAdamW, rank, lr, layerwise, projected_backward)
        yield ours(GaLoreAdamW8bit, rank, lr, layerwise=True, projected_backward=True)
        for layerwise in (False, True):
            yield ours(GaLoreAdamW, rank, lr, layerwise, layerwise, rule="muon")
            yield ours(GaLoreAdamW, rank, lr, layerwise, False, rule="muon", residual="muon")
            yield ours(GaLoreAdamW, rank, lr, layerwise, False, rule="muon", residual="normuon", residual_bits=8)
            yield ours(GaLoreAdamW, rank, lr, layerwise, False, residual="fira")
            yield ours(GaLoreAdamW, rank, lr, layerwise, False, scaling="channel")
    for layerwise in (False, True):
        yield ours(GaLoreAdamW, 1, lr, layerwise, False, scaling="tensor")


def published(rank: int, lr: float) -> Contender:
    def build(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = galore_torch.GaLoreAdamW(groups(model, rank), lr=lr, no_deprecation_warning=True)
        return cast("torch.optim.Optimizer", optimizer)

    return Contender("galore_torch AdamW", rank, build, gradient_then_projection(rank))


def ours(
    cls: type[GaLoreAdamW], rank: int, lr: float, layerwise: bool, projected_backward: bool, **options: Any
) -> Contender:
    def build(model: nn.Module) -> torch.optim.Optimizer:
        return cls(
            groups(model, rank, **options),
            lr=lr,
            weight_decay=0.0,
            module=model,
            layerwise=layerwise,
            projected_backward=projected_backward,
        )

    def operations(t: int, m: int, n: int) -> int:
        # R from δ and X, or the gradient and its projection; and the way back, which is G itself with scaling.
        low_rank = t * rank * (m + n) if projected_backward else t * m * n + rank * m * n
        residual = options.get("residual")
        ways_back = 0 if "scaling" in options else 1 if residual is None else 2
        of_whole = residual in OF_WHOLE_MATRICES
        alike = of_muon(min(m, n) if of_whole else rank, max(m, n)) if options.get("rule") == "muon" else 0
        return low_rank + ways_back * rank * m * n + alike

    name = cls.__name__ + "".join(f", {key}={value}" for key, value in options.items())
    name += ", layerwise" if layerwise else ""
    return Contender(f"{name}, projected backward" if projected_backward else name, rank, build, operations)


def of_muon(rank: int, longer: int) -> int:
    """The multiply-adds of orthogonalising R: its Gram matrix, five steps on that, and one product with R."""
    return 2 * rank**2 * longer + 17 * rank**3


def gradient_then_projection(rank: int) -> Callable[[int, int, int], int]:
    def operations(t: int, m: int, n: int) -> int:
        return t * m * n + 2 * rank * m * n  # the gradient, its projection, the way back

    return operations


class LiveBytes(TorchDispatchMode):
    """The bytes of the storages that are alive, and their peak."""

    def __init__(self, *already: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in already:
            self._see(tensor)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._see(value)
        return out


@contextlib.contextmanager
def any_bases() -> Iterator[None]:
    """Random orthonormal bases instead of SVDs, which take minutes: which they are makes no difference to a step."""

    def svd(matrix: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        m, n = matrix.shape
        size = min(m, n)
        left, right = (torch.linalg.qr(torch.randn(side, size))[0] for side in (m, n))
        return left, torch.ones(size), right.mT

    original, torch.linalg.svd = torch.linalg.svd, svd
    try:
        yield
    finally:
        torch.linalg.svd = original


def step(contender: Contender, ids: Tensor) -> None:
    assert contender.model is not None
    assert contender.optimizer is not None
    contender.model(input_ids=ids, labels=ids).loss.backward()
    contender.optimizer.step()
    contender.optimizer.zero_grad()


def measure_peak(contender: Contender, ids: Tensor) -> int:
    assert contender.model is not None
    assert contender.optimizer is not None
    state = [value for value in tree_iter(list(contender.optimizer.state.values())) if isinstance(value, Tensor)]
    projectors = [entry.get("projector") for entry in contender.optimizer.state.values()]
    state += [projector.ortho_matrix for projector in projectors if projector is not None]
    with LiveBytes(*contender.model.parameters(), *state) as live:
        step(contender, ids)
    peak: int = live.peak
    return peak


def multiply_adds(model: nn.Module, tokens: int, checkpointing: bool, contender: Contender) -> int:
    """Of the matrix products of the linear layers in one step, attention's own left out: it is the same for all."""
    total = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        m, n = module.out_features, module.in_features
        passes = 3 if checkpointing and is_target(name, module) else 2  # forward, recomputed forward, δW
        total += passes * tokens * m * n
        total += contender.gradient(tokens, m, n) if is_target(name, module) else tokens * m * n
    return total


def llama(hidden: int, layers: int, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=int(hidden * 2.6875),
        num_hidden_layers=layers,
        num_attention_heads=16,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def run(args: argparse.Namespace, checkpointing: bool, console: Console) -> None:
    template = llama(args.hidden, args.layers, vocabulary=2048)
    if checkpointing:
        template.gradient_checkpointing_enable()
    template.train()
    ids = torch.randint(0, template.config.vocab_size, (args.tokens // 256 or 1, min(args.tokens, 256)))
    rows = [
        row
        for row in contenders(args.ranks or [args.hidden // 8, args.hidden // 4])
        if any(text in row.name for text in args.only)
    ]
    if rows[0].name != BASELINE:
        rows.insert(0, next(contenders([1])))
    for row in track(rows, "First steps", console=console, transient=True):
        row.model = copy.deepcopy(template)
        row.optimizer = row.build(row.model)
        with any_bases():
            step(row, ids)
        row.peak = measure_peak(row, ids)
    for _ in track(range(args.rounds), "Rounds", console=console, transient=True):
        for row in rows:
            start = time.perf_counter()
            step(row, ids)
            row.seconds.append(time.perf_counter() - start)

    baseline = rows[0]
    table = Table("optimizer", title=f"Gradient checkpointing {'on' if checkpointing else 'off'}")
    for header in ("rank", "s / step", "× AdamW", "floor", "peak MiB"):
        table.add_column(header, justify="right")
    operations = {id(row): multiply_adds(template, ids.numel(), checkpointing, row) for row in rows}
    for row in rows:
        ratio = statistics.median(a / b for a, b in zip(row.seconds, baseline.seconds, strict=True))
        table.add_row(
            row.name,
            "" if row.rank is None else str(row.rank),
            f"{statistics.median(row.seconds):.2f}",
            f"{ratio:.2f}",
            f"{operations[id(row)] / operations[id(baseline)]:.2f}",
            f"{row.peak / 2**20:,.0f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size h")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a step")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: h/8 and h/4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name holds one of these, and AdamW")
    parser.add_argument("--checkpointing", choices=["off", "on", "both"], default="both")
    args = parser.parse_args()
    console = Console(width=110)
    console.print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}; hidden {args.hidden}, "
        f"{args.layers} layers, {args.tokens} tokens, float32, {args.rounds} rounds"
    )
    for checkpointing in {"off": [False], "on": [True], "both": [False, True]}[args.checkpointing]:
        run(args, checkpointing, console)


if __name__ == "__main__":
    main()
