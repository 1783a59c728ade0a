"""The style of a comparison's page: what is shown and hidden is chosen by it, without a script."""

from __future__ import annotations

from . import colors
from .progress import AXES
from .svg import run_mark

CHOSEN_AXIS = "chosen"
"""The class of what is shown by a browser that cannot be told what the reader chose."""


def _palette(of: tuple[str, ...]) -> str:
    return " ".join(f"--run-{place}: {color};" for place, color in enumerate(of))


STYLE = f"""
:root {{ color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #ffffff; --line: #d1d9e0;
  --best: #d9f2e6; --broken: #b3261e; {_palette(colors.ON_WHITE)} }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --line: #3d444d; --best: #12402c; --broken: #ff8f85;
    {_palette(colors.ON_BLACK)} }}
}}
* {{ box-sizing: border-box; }}
body {{ background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 1440px; padding: 1.5rem; }}
h1 {{ font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.2rem; margin: 2rem 0 0.5rem; overflow-wrap: anywhere; }}
p.about {{ color: var(--soft); margin: 0.25rem 0 0; }}
p.same {{ color: var(--soft); font-size: 0.9rem; overflow-wrap: anywhere; }}
p.same b {{ color: var(--ink); font-weight: 500; }}
div.wide {{ overflow-x: auto; }}
table {{ border-collapse: separate; border-spacing: 0; font-size: 0.9rem; font-variant-numeric: tabular-nums; }}
th, td {{ border-bottom: 1px solid var(--line); padding: 0.35rem 0.8rem; text-align: right; vertical-align: top; }}
thead th {{ border-bottom-width: 2px; overflow-wrap: break-word; vertical-align: bottom; }}
td, thead th {{ max-width: 24rem; min-width: 6rem; }}
td {{ overflow-wrap: anywhere; }}
table.words td {{ min-width: 7.5rem; }}
table.numbers td {{ white-space: nowrap; }}
tbody th, thead th:first-child {{ background: var(--paper); border-right: 1px solid var(--line); font-weight: 500;
  left: 0; max-width: min(20rem, 40vw); min-width: min(13rem, 38vw); overflow-wrap: anywhere; position: sticky;
  text-align: left; z-index: 1; }}
td.best {{ background: var(--best); font-weight: 600; }}
td.broken {{ color: var(--broken); }}
svg.swatch {{ display: inline-block; height: 0.6rem; margin-right: 0.4rem; width: 1.8rem; }}
div.keys {{ font-size: 0.9rem; }}
fieldset {{ border: 1px solid var(--line); border-radius: 6px; margin: 0 0 1rem; min-width: 0;
  padding: 0.3rem 0.8rem; }}
fieldset.axes label {{ margin-right: 1rem; }}
fieldset.runs {{ max-height: 16rem; overflow-y: auto; }}
fieldset.runs label {{ align-items: baseline; display: flex; overflow-wrap: anywhere; }}
fieldset.runs svg {{ flex: none; }}
fieldset.runs span {{ min-width: 0; }}
small {{ color: var(--soft); white-space: nowrap; }}
figcaption small {{ font-weight: 400; white-space: normal; }}
small.broken {{ color: var(--broken); }}
legend {{ color: var(--soft); padding: 0 0.3rem; }}
input {{ margin: 0 0.4rem 0 0; }}
div.pictures {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }}
figure {{ border: 1px solid var(--line); border-radius: 6px; margin: 0; min-width: 0; padding: 0.5rem; }}
figcaption {{ font-size: 0.95rem; font-weight: 500; margin: 0 0.3rem 0.4rem; overflow-wrap: anywhere; }}
figure svg {{ display: block; height: auto; width: 100%; }}
figure svg * {{ stroke-linecap: butt; stroke-linejoin: round; }}
div.axis {{ display: none; }}
div.axis.{CHOSEN_AXIS} {{ display: block; }}
@supports selector(:has(a)) {{
  body:has(fieldset.axes) div.axis {{ display: none; }}
  {" ".join(f"body:has(#over-{axis}:checked) div.axis.{axis} {{ display: block; }}" for axis in AXES)}
}}
@media (min-width: 60rem) {{
  div.drawn {{ align-items: start; display: grid; gap: 1rem; grid-template-columns: minmax(0, 1fr) 17rem; }}
  div.keys {{ order: 1; position: sticky; top: 1rem; }}
  fieldset.runs {{ max-height: calc(100vh - 8rem); }}
}}
details {{ margin-top: 2rem; }}
summary {{ cursor: pointer; font-size: 1.2rem; font-weight: 600; }}
li {{ margin: 0.2rem 0; overflow-wrap: anywhere; }}
"""


def rules_for_runs(count: int) -> str:
    """Rules that hide a run, in tables and pictures, whose box is not checked."""
    return "".join(
        f"body:has(#show-{place}:not(:checked)) .{run_mark(place)} {{ display: none; }}\n" for place in range(count)
    )
