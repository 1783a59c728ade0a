"""Numbers as a reader of tables and pictures meets them."""

from __future__ import annotations

import math
from collections.abc import Sequence

UNKNOWN = "–"


def digits(value: float, count: int = 3) -> str:
    """`value` to `count` digits, without an exponent unless it is needed."""
    if not math.isfinite(value):
        return str(value).replace("nan", "NaN")
    if value and not 1e-4 <= abs(value) < 1e9:
        return f"{value:.{count - 1}e}"
    places = 0 if not value else max(0, count - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def short_count(value: float) -> str:
    """`950`, `12.3k`, `1.20M`, `3.40B`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{digits(value / size)}{letter}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """`41.5 s`, `12 min 03 s`, `3 h 20 min`."""
    if not math.isfinite(seconds) or seconds < 100:
        return f"{digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def per_cent(difference: float) -> str:
    """`+12.5 %` for 0.125, with a true minus sign."""
    text = f"{100 * difference:+,.1f}".replace("-", "−")
    return f"{text[1:] if text[1:] == '0.0' else text} %"


def metric_name(key: str) -> str:
    """`held-out mean token accuracy` for `eval_mean_token_accuracy`."""
    return f"held-out {key.removeprefix('eval_').replace('_', ' ')}"


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def shortened(name: str, longest: int) -> str:
    """`name` with its middle left out where it is long: runs differ at either end."""
    if len(name) <= longest:
        return name
    half = (longest - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
