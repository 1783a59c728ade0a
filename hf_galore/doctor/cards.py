"""torch's build, the driver, and the cards: whether this torch can use them, and what they cannot do."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .findings import Finding

_GIB = 2**30
_DRIVER_FILE = Path("/proc/driver/nvidia/version")

# Of the indexes of torch's builds the newest that a driver serves, by the CUDA release that nvidia-smi shows: a build
# runs with any driver of its own major release.
_INDEXES = ((13, "cu130"), (12, "cu126"))
_ON_INDEX = "https://download.pytorch.org/whl"
_GET_STARTED = "https://pytorch.org/get-started/locally"

# What this process's own context takes of a card, which a training's would take too: hf_galore.plan.needs has it.
_CONTEXT = 529 * 2**20

_HALF = 0.5  # of a card's memory: with less of it free, somebody else is at work there


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """A card as torch sees it."""

    name: str
    capability: tuple[int, int]
    total: int
    """Bytes."""
    free: int
    """Bytes."""


@dataclasses.dataclass(frozen=True)
class TorchFacts:
    """What torch is, and what it sees."""

    release: str
    cuda: str | None
    """The release of CUDA that it was built for."""
    hip: str | None
    """The release of ROCm that it was built for."""
    driver: str | None
    """The NVIDIA driver of this machine, whether torch sees it or not: its version, or `unknown`."""
    driver_cuda: str | None
    """The newest release of CUDA that the driver serves."""
    cards: tuple[CardFacts, ...]
    error: str | None
    """What torch says where it cannot use the cards."""
    architectures: tuple[str, ...]
    """What it has kernels for: `sm_80`, `compute_90`, ..."""
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES, if it is set."""
    platform: str = sys.platform


def build(facts: TorchFacts, *, hosted: str | None) -> Iterator[Finding]:
    """Whether torch's build serves the cards of the machine.

    Args:
        facts: what it is and sees.
        hosted: Colab or Kaggle, if this is one.
    """
    kind = f"for CUDA {facts.cuda}" if facts.cuda else f"for ROCm {facts.hip}" if facts.hip else "for CPUs alone"
    if facts.hip is not None:
        yield Finding(
            "torch's build", "note", f"{kind}: nothing here has been tried on AMD's cards; Triton kernels are not used."
        )
    elif facts.driver is None:
        advice = "In Colab: Runtime > Change runtime type > T4 GPU." if hosted == "Colab" else None
        advice = "On Kaggle: Settings > Accelerator." if hosted == "Kaggle" else advice
        yield Finding(
            "card",
            "note",
            f"no NVIDIA card; torch is built {kind}. Small models train on the CPU, and a plan needs no card.",
            advice,
        )
    elif facts.cuda is None:
        yield Finding(
            "torch's build",
            "problem",
            f"{facts.release} is built for CPUs alone, on a machine with an NVIDIA card (driver {facts.driver}).",
            f"Install the same release for CUDA ({_GET_STARTED} has the lines for other drivers):",
            reinstall_line(facts),
        )
    elif facts.visible is not None and facts.visible.strip() in ("", "-1"):
        yield Finding(
            "card",
            "note",
            f"CUDA_VISIBLE_DEVICES={facts.visible!r} hides the cards of this machine.",
            "Unset it to train on one.",
        )
    elif not facts.cards:
        yield Finding(
            "card",
            "problem",
            f"torch {facts.release}, built {kind}, sees none, though driver {facts.driver} is there"
            + (f" (for CUDA up to {facts.driver_cuda})" if facts.driver_cuda else "")
            + (f": {facts.error}" if facts.error else "."),
            "Install a newer driver, or torch for an older CUDA:",
            reinstall_line(facts),
        )
    else:
        yield Finding("torch's build", "ok", f"{kind}; driver {facts.driver}")


def reinstall_line(facts: TorchFacts) -> str:
    """The pip line that brings torch of the same release for the card's driver."""
    release = re.sub(r"\+.*", "", facts.release)
    major = int(facts.driver_cuda.partition(".")[0]) if facts.driver_cuda else 12
    index = next((name for least, name in _INDEXES if major >= least), _INDEXES[-1][1])
    # By its local version: to pip 2.13.0+cpu is a 2.13.0, and it would leave that.
    return f'pip install "torch=={release}+{index}" --index-url {_ON_INDEX}/{index}'


def serves(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a torch with kernels for these architectures runs on a card of that compute capability.

    Kernels run on cards of the same major and the same or a later minor version; PTX, on all later cards.
    """
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", architecture)
        if match is None:
            continue
        own = int(match[2]), int(match[3])
        if own <= capability and (match[1] == "compute" or own[0] == capability[0]):
            return True
    return False


def cards(facts: TorchFacts) -> Iterator[Finding]:
    """Each card: its memory, what is free of it, bfloat16, and whether torch has kernels for it."""
    for number, card in enumerate(facts.cards):
        topic = f"card {number}" if len(facts.cards) > 1 else "card"
        major, minor = card.capability
        free, total = card.free / _GIB, card.total / _GIB
        memory = f"{card.name}: {free:.1f} GiB free of {total:.1f}"
        if facts.hip is None and facts.architectures and not serves(facts.architectures, card.capability):
            yield Finding(
                topic,
                "problem",
                f"{card.name} has compute capability {major}.{minor}, and torch {facts.release} has kernels for "
                f"{', '.join(facts.architectures)}.",
                f"Another release or build of torch has kernels for it ({_GET_STARTED}); or use another card.",
            )
            continue
        if card.free < _HALF * card.total:
            yield Finding(
                topic,
                "note",
                f"{memory}: other programs, or a notebook that has not ended, hold {total - free:.1f} GiB.",
                "nvidia-smi shows whose it is.",
            )
        else:
            yield Finding(topic, "ok", memory)
        if facts.hip is None:
            yield bf16(topic, card)


def bf16(topic: str, card: CardFacts) -> Finding:
    """Whether a card computes in bfloat16."""
    where = "bfloat16" if topic == "card" else f"bfloat16 ({topic})"
    major, minor = card.capability
    if major >= 8:
        return Finding(where, "ok", f"computed by the card (capability {major}.{minor})")
    return Finding(
        where,
        "note",
        f"not computed by this card (capability {major}.{minor}; 8.0 and later do): torch imitates it.",
        "Train with weights in float32 (dtype: float32, bf16: false), in twice the memory. fp16: true computes in "
        "float16, with an optimizer that is not layerwise: those refuse the scaling of the loss that it needs.",
    )


# ---- what there is


def torch_facts(visible: str | None) -> TorchFacts:
    """Look at torch and at the cards.

    Args:
        visible: CUDA_VISIBLE_DEVICES, if it is set.

    Raises:
        Exception: torch cannot be imported, for whatever reason.
    """
    import torch

    driver, driver_cuda = nvidia_driver()
    found: list[CardFacts] = []
    error = None
    if torch.version.cuda is not None or torch.version.hip is not None:
        try:
            torch.cuda.init()
            for number in range(torch.cuda.device_count()):
                free, total = torch.cuda.mem_get_info(number)
                free = min(total, free + _CONTEXT)
                name, capability = torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number)
                found.append(CardFacts(name, capability, total, free))
        except Exception as problem:  # a driver may fail in any way
            error = " ".join(str(problem).split()).rstrip(".") + "."
    return TorchFacts(
        release=torch.__version__,
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        driver=driver,
        driver_cuda=driver_cuda,
        cards=tuple(found),
        error=error,
        architectures=tuple(torch.cuda.get_arch_list()),
        visible=visible,
    )


def nvidia_driver() -> tuple[str | None, str | None]:
    """The NVIDIA driver's version and the newest CUDA that it serves; `None` for what is not there or not known."""
    said = _nvidia_smi()
    if said is not None:
        version, cuda = re.search(r"Driver Version: *([\d.]+)", said), re.search(r"CUDA Version: *([\d.]+)", said)
        return version[1] if version else "unknown", cuda[1] if cuda else None
    try:
        text = _DRIVER_FILE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None, None
    match = re.search(r"\b(\d{3,}\.\d[\d.]*)", text)
    return match[1] if match else "unknown", None


def _nvidia_smi() -> str | None:
    """What nvidia-smi prints; `None` where it is not there, or finds no card."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
