"""The refresh, side by side: seconds and captured energy of each method, and whole runs with refreshes beside AdamW's.

    python -m tests.benchmarks.refresh                   # the first two tables: 5 minutes on 2 cores
    python -m tests.benchmarks.refresh --only factorise --sizes 1024 2048
    python -m tests.benchmarks.refresh --only steps      # 200 steps of each optimizer
    python -m tests.benchmarks.refresh --only orthonormal --device cuda

`factorise`: one refresh of a square matrix beside `torch.linalg.svd`, on a steep spectrum (σ = 1/i) and a flat one
(σ = 1/√i), warm from the basis of a gradient that has drifted. `energy`: the captured energy as a share of what the
exact SVD captures, over all projected matrices of a Llama that AdamW trains on the text of `tests.benchmarks.quality`,
early and late, each basis warm from the one that the same method found at the check before; and whether columns are
orthonormal. `steps`: 200 training steps, refreshes and all, beside AdamW's, and the slowest step after the first, which
makes all bases. `orthonormal`: columns made orthonormal by Householder QR and by Cholesky QR, in milliseconds, with a
defect of 1 where ‖PᵀP − I‖ is 1e-5.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from typing import cast

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from hf_galore import GaLoreAdamW
from hf_galore.config import REFRESH_METHODS, RefreshMethod
from hf_galore.lowrank.orthonormal import by_products, by_reflections, defect
from hf_galore.lowrank.projection import Bases, project, side_of
from hf_galore.lowrank.refresh import new_bases
from tests.benchmarks.quality import CACHE, LENGTH, VOCABULARY, tokenized
from tests.benchmarks.step import llama, targets

TABLES = ("factorise", "energy", "steps", "orthonormal")


def seconds_of(function: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def spectrum_matrix(size: int, power: float) -> tuple[Tensor, Tensor]:
    """A matrix with singular values i^power, and one that has drifted from it by a tenth of its norm."""
    left, right = (torch.linalg.qr(torch.randn(size, size))[0] for _ in range(2))
    matrix = left * torch.arange(1, size + 1).pow(power) @ right.mT
    noise = torch.randn_like(matrix)
    return matrix, matrix + noise * (0.1 * matrix.norm() / noise.norm())


def factorise(sizes: Iterable[int], rounds: int, console: Console) -> None:
    table = Table("matrix", "spectrum", "rank", "method", title="One refresh")
    for header in ("seconds", "× faster than SVD", "energy / exact"):
        table.add_column(header, justify="right")
    for size in sizes:
        for name, power in (("steep", -1.0), ("flat", -0.5)):
            old, gradient = spectrum_matrix(size, power)
            start = time.perf_counter()
            values = torch.linalg.svd(gradient, full_matrices=False)[1]
            svd_seconds = time.perf_counter() - start
            table.add_row(f"{size} × {size}", name, "", "torch.linalg.svd", f"{svd_seconds:.2f}", "1", "1")
            for rank in (size // 32, size // 8, size // 4):
                methods: tuple[RefreshMethod, ...] = ("randomized", "subspace")
                for method in methods:
                    before = new_bases(old, "left", rank, method, None)
                    found: list[Bases] = []

                    def refresh(
                        method: RefreshMethod = method,
                        rank: int = rank,
                        before: Bases = before,
                        gradient: Tensor = gradient,
                        found: list[Bases] = found,
                    ) -> None:
                        found.append(new_bases(gradient, "left", rank, method, before))

                    seconds = seconds_of(refresh, rounds)
                    share = project(gradient, found[-1]).square().sum() / values[:rank].square().sum()
                    table.add_row(
                        "", "", str(rank), method, f"{seconds:.3f}", f"{svd_seconds / seconds:.0f}", f"{share:.4f}"
                    )
    console.print(table)


def batch(tokens: int, step: int) -> Tensor:
    """A different part of the text for each step."""
    rows = tokenized(CACHE)[0]
    chosen = torch.randint(len(rows), (max(1, tokens // LENGTH),), generator=torch.Generator().manual_seed(step))
    return rows[chosen]


def energy(args: argparse.Namespace, console: Console) -> None:
    model = llama(args.hidden, args.layers, VOCABULARY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ranks = (args.hidden // 8, args.hidden // 4)
    methods: tuple[RefreshMethod, ...] = ("randomized", "subspace")
    old: dict[tuple[RefreshMethod, int, int], Bases] = {}
    table = Table("step", "rank", "method", title="Captured energy as a share of the exact SVD's")
    for header in ("mean", "worst", "‖PᵀP − I‖ max"):
        table.add_column(header, justify="right")
    checks = (1, 10, args.late)
    for step in track(range(1, args.late + 1), "Training", console=console, transient=True):
        ids = batch(args.tokens, step)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        if step in checks:
            shares: dict[tuple[RefreshMethod, int], list[float]] = {}
            errors: dict[tuple[RefreshMethod, int], float] = {}
            for index, weight in enumerate(targets(model)):
                gradient = cast("Tensor", weight.grad)
                squares = torch.linalg.svdvals(gradient).square()
                for rank in ranks:
                    for method in methods:
                        key = (method, rank, index)
                        side = side_of(gradient.shape, "std")
                        bases = old[key] = new_bases(gradient, side, rank, method, old.get(key))
                        basis = cast("Tensor", bases.left if bases.left is not None else bases.right)
                        share = project(gradient, bases).square().sum() / squares[:rank].sum()
                        error = (basis.mT @ basis - torch.eye(rank)).abs().max().item()
                        shares.setdefault((method, rank), []).append(share.item())
                        errors[method, rank] = max(errors.get((method, rank), 0.0), error)
            for (method, rank), found in sorted(shares.items()):
                table.add_row(
                    str(step),
                    str(rank),
                    method,
                    f"{statistics.fmean(found):.4f}",
                    f"{min(found):.4f}",
                    f"{errors[method, rank]:.0e}",
                )
        optimizer.step()
    console.print(table)


def steps(args: argparse.Namespace, console: Console) -> None:
    template = llama(args.hidden, args.layers, VOCABULARY)

    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    def galore(rank: int, layerwise: bool) -> Callable[[nn.Module], torch.optim.Optimizer]:
        def build(model: nn.Module) -> torch.optim.Optimizer:
            options: dict[Tensor, dict[str, int]] = {
                weight: {"rank": rank, "update_proj_gap": args.gap} for weight in targets(model)
            }
            return GaLoreAdamW(
                model.parameters(), lr=1e-4, weight_decay=0.0, param_options=options, module=model, layerwise=layerwise
            )

        return build

    rows: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {"AdamW (fused)": adamw}
    for rank in (args.hidden // 8, args.hidden // 4):
        rows[f"GaLoreAdamW, layerwise, r = {rank}"] = galore(rank, layerwise=True)
    times: dict[str, list[float]] = {name: [] for name in rows}
    runs = {name: (model := copy.deepcopy(template), build(model)) for name, build in rows.items()}
    for step in track(range(args.steps), "Steps", console=console, transient=True):
        for name, (model, optimizer) in runs.items():
            ids = batch(args.tokens, step)
            start = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            times[name].append(time.perf_counter() - start)
    table = Table("optimizer", title=f"{args.steps} steps, a refresh of each matrix every {args.gap}")
    for header in ("total s", "× AdamW", "first step", "median", "slowest later / median"):
        table.add_column(header, justify="right")
    baseline = sum(times["AdamW (fused)"])
    for name, found in times.items():
        middle = statistics.median(found)
        table.add_row(
            name,
            f"{sum(found):.0f}",
            f"{sum(found) / baseline:.2f}",
            f"{found[0]:.2f}",
            f"{middle:.2f}",
            f"{max(found[1:]) / middle:.2f}",
        )
    console.print(table)


def orthonormal(args: argparse.Namespace, console: Console) -> None:
    device = torch.device(args.device)

    def milliseconds(function: Callable[[Tensor], Tensor], matrix: Tensor) -> float:
        def whole() -> None:
            function(matrix.clone())
            if device.type == "cuda":
                torch.cuda.synchronize()

        whole()
        return 1000 * seconds_of(whole, args.rounds)

    table = Table("matrix", title=f"Orthonormal columns on {device}")
    for header in ("QR", "Cholesky QR twice", "QR / twice", "three times", "QR / three", "defect of it", "its own ms"):
        table.add_column(header, justify="right")
    for shape in ((4096, 1024), (11008, 1024), (4096, 512), (4096, 128), (1024, 256), (256, 64)):
        matrix = torch.randn(shape, device=device)
        matrix /= matrix.abs().max()
        qr = milliseconds(by_reflections, matrix)
        twice, thrice = (milliseconds(lambda m, runs=runs: by_products(m, runs), matrix) for runs in (2, 3))  # type: ignore[misc]
        basis = by_products(matrix.clone(), 3)
        table.add_row(
            f"{shape[0]} × {shape[1]}",
            f"{qr:.2f}",
            f"{twice:.2f}",
            f"{qr / twice:.2f}",
            f"{thrice:.2f}",
            f"{qr / thrice:.2f}",
            f"{defect(basis).item():.2f}",
            f"{milliseconds(defect, basis):.2f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=["factorise", "energy"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096], help="of the square matrices")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size h of the model")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a step")
    parser.add_argument("--late", type=int, default=40, help="the last step at which `energy` looks")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--gap", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="of `orthonormal`")
    args = parser.parse_args()
    console = Console(width=110)
    console.print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}; methods: "
        f"{', '.join(REFRESH_METHODS)}"
    )
    if "factorise" in args.only:
        factorise(args.sizes, args.rounds, console)
    if "energy" in args.only:
        energy(args, console)
    if "steps" in args.only:
        steps(args, console)
    if "orthonormal" in args.only:
        orthonormal(args, console)


if __name__ == "__main__":
    main()
