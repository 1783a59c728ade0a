"""Kernels of our own for NVIDIA's cards, in Triton: Adam in one launch, blockwise 4 and 8 bits, weights in MXINT8.

They run on the current stream (bitsandbytes' optimizer and quantisation run on the legacy default stream), can be
captured in CUDA graphs, round a weight once and leave alone what is skipped. `serves` says where they are to be used;
`hf_galore.integrations.bitsandbytes` chooses, and checks each on its first use.
"""

from __future__ import annotations

from .adam import adam_8bit_, adam_8bit_direction, adam_32bit_, adam_32bit_direction
from .blockwise import dequantize_4bit, dequantize_8bit, quantize_4bit, quantize_8bit
from .int8 import add_int8_, read_int8
from .where import DTYPES, could_be_installed, serves, triton_version

__all__ = [
    "DTYPES",
    "adam_8bit_",
    "adam_8bit_direction",
    "adam_32bit_",
    "adam_32bit_direction",
    "add_int8_",
    "could_be_installed",
    "dequantize_4bit",
    "dequantize_8bit",
    "quantize_4bit",
    "quantize_8bit",
    "read_int8",
    "serves",
    "triton_version",
]
