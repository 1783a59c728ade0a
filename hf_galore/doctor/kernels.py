"""Whether the kernels that the optimizers use are right on this machine: those of bitsandbytes, and our own."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from ..log import logger
from .findings import Finding

# Of each: as it is called, and as people say.
_NAMES = {
    "quantize_4bit": "to 4 bits",
    "dequantize_4bit": "from 4 bits",
    "quantize_blockwise": "to 8 bits",
    "dequantize_blockwise": "from 8 bits",
    "quantize_8bit": "to 8 bits",
    "dequantize_8bit": "from 8 bits",
    "optimizer_update_8bit_blockwise": "8-bit Adam",
    "optimizer_update_32bit": "Adam",
}


def kernels(device: str) -> Iterator[Finding]:
    """Put known numbers through every kernel and compare with plain torch; see `integrations.bitsandbytes_checks`.

    Args:
        device: `cpu`, or `cuda` for the first card.
    """
    try:
        import bitsandbytes
        import torch

        from ..integrations import bitsandbytes_checks as checks
        from ..kernels import serves, triton_version
    except Exception as error:  # a library that cannot be loaded may raise anything
        yield Finding(
            "bitsandbytes",
            "problem",
            f"cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}",
            "Bases in 4 bits and the 8-bit optimizers need it.",
            "pip install --force-reinstall --no-deps bitsandbytes",
        )
        return
    used = torch.zeros(1, device=device)
    dtypes = (torch.float32, torch.bfloat16)
    with _silent() as said:
        wrong = [
            f"{_NAMES.get(name, name)} ({str(dtype).removeprefix('torch.')})"
            for name in checks.CHECKS
            for dtype in dtypes
            if not checks.is_right(name, used, dtype)
        ]
    yield _verdict(f"bitsandbytes {bitsandbytes.__version__}", len(checks.CHECKS), wrong, said, device)
    if device == "cpu":
        return
    if not serves(used):
        yield Finding(
            "kernels, own", "note", "not used: they need Triton and an NVIDIA card of capability 7.0 or later."
        )
        return
    with _silent() as said:
        wrong = [
            f"{name} ({str(dtype).removeprefix('torch.')})"
            for name in checks.OWN_CHECKS
            for dtype in dtypes
            if not checks.own_is_right(name, used, dtype)
        ]
    found = _verdict(f"hf_galore, Triton {triton_version()}", len(checks.OWN_CHECKS), wrong, said, device)
    yield Finding("kernels, own", found.status, found.text, found.advice)


def _verdict(whose: str, count: int, wrong: list[str], said: list[str], device: str) -> Finding:
    where = "the CPU" if device == "cpu" else "the card"
    if not wrong:
        return Finding(
            "kernels", "ok", f"{whose}: all {count} checked on {where}, in float32 and bfloat16; they are right"
        )
    reason = "" if not said else f" The first says: {said[0]}"
    return Finding(
        "kernels",
        "note",
        f"{whose}: on {where} not right, or failing: {', '.join(wrong)}.{reason}",
        "Training goes on with the next best, which is right, but slower.",
    )


@contextlib.contextmanager
def _silent() -> Iterator[list[str]]:
    """Collect what the package's logger would say, instead of saying it."""
    said: list[str] = []

    class _Collector(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            said.append(record.getMessage())
            return False

    collector = _Collector()
    logger.addFilter(collector)
    try:
        yield said
    finally:
        logger.removeFilter(collector)
