"""What a model card says of GaLore: the optimizer, its arguments, and the plan of the memory."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard
from transformers import TrainingArguments

from ..config import GaLoreConfig
from ..integrations.trainer import KINDS, optim_name
from ..plan.needs import OUTSIDE_BYTES
from ..plan.planner import GIB, MemoryPlan, in_gib
from ..version import __version__

TAG = "galore"
_BEFORE = "### Framework versions"  # a heading in the cards of TRL and of transformers


def add_galore(path: Path, args: TrainingArguments, plan: MemoryPlan | None, *, int8: bool = False) -> None:
    """Add a section and a tag to the model card in a file; a card of another optimizer stays as it is.

    Args:
        path: the card that the Trainer has just written.
        args: those of the training.
        plan: of its memory, if one was made.
        int8: whether the weights were kept in 8 bits.
    """
    optim = optim_name(args)
    if optim not in KINDS:
        return
    card = ModelCard.load(path)
    tags = list(card.data.tags or [])
    card.data.tags = [*tags, *({TAG} - set(tags))]
    head, found, tail = card.text.partition(_BEFORE)
    card.text = f"{head.rstrip()}\n\n{_section(optim, args, plan, int8)}\n\n{found}{tail}"
    card.save(path)


def _section(optim: str, args: TrainingArguments, plan: MemoryPlan | None, int8: bool) -> str:
    config = GaLoreConfig.from_optim_args(args.optim_args)
    scale = config.scale if isinstance(config.scale, str) else f"{config.scale:g}"
    lines = [
        "### GaLore",
        "",
        f"All weights were trained by `{optim}` of hf_galore {__version__}, which keeps its moments in a low-rank "
        "projection of the gradient ([GaLore](https://huggingface.co/papers/2403.03507)):",
        "",
        "| option | value |",
        "|---|---|",
        f"| `optim_target_modules` | `{_in_a_cell(args.optim_target_modules)}` |",
        f"| `optim_args` | `{_in_a_cell(args.optim_args or 'the defaults')}` |",
        f"| rank, gap, scale | {config.rank}, {config.update_proj_gap}, {scale} |",
        f"| `learning_rate` | {args.learning_rate:g} |",
        *(["| `weight_bits` | 8: while they were trained, the weights of linear layers were MXINT8 |"] if int8 else []),
    ]
    if plan is not None:
        parts = ", ".join(f"{kind} {in_gib(size)}" for kind, size in plan.breakdown.items() if size >= GIB / 1000)
        lines += [
            "",
            f"The memory that these settings take, by `hf-galore plan`: a peak of {in_gib(plan.peak_bytes)} in the "
            f"phase {plan.phase} ({parts}), for which a card needs {in_gib(plan.needed_bytes)}: "
            f"torch's allocator takes {in_gib(plan.reserved_bytes)}, by a model of it, and CUDA and its libraries "
            f"{in_gib(OUTSIDE_BYTES)} more.",
        ]
    return "\n".join(lines)


def _in_a_cell(value: object) -> str:
    return str(value).replace("|", "\\|")
