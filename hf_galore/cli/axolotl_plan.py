"""`axolotl galore-plan`: whether what axolotl is asked for fits a card; a command of axolotl, by its entry point."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import click
from axolotl.cli.config_options import AXOLOTL_CONFIG_CLI_OPTIONS
from axolotl.cli.utils import add_options_from_config_options, filter_none_kwargs

from ..integrations.axolotl_logging import quiet_axolotl

PROG = "axolotl galore-plan"
SUMMARY = "Plan the memory of a configuration, without a GPU, weights or data."


@click.command("galore-plan", short_help=SUMMARY)
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=str))
@click.option("--vram", help="The card: its name (4090), label (24GB) or memory (23.5GiB); by default this machine's.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="A JSON file to write.")
@add_options_from_config_options(AXOLOTL_CONFIG_CLI_OPTIONS)  # type: ignore[untyped-decorator, unused-ignore]
@filter_none_kwargs  # type: ignore[untyped-decorator, unused-ignore]
def command(config: str, vram: str | None = None, json_file: Path | None = None, **overrides: Any) -> None:
    """Find out how much memory a configuration takes, and whether that fits a card.

    axolotl's own trainer takes three steps, with tensors that have no numbers: no GPU, no weights and no data are
    needed. All options but --vram and --json are those of `axolotl train`, and override what CONFIG says. The exit
    status is 0 if it fits or no card is known, 1 if it does not fit, 2 if something that was given is wrong.
    """
    sys.exit(_run(config, vram, json_file, overrides))


def _run(config: str, vram: str | None, json_file: Path | None, overrides: dict[str, Any]) -> int:
    with quiet_axolotl():  # imports too have libraries say things
        from pydantic import ValidationError

        from ..errors import UserError
        from ..recipes.axolotl_planning import plan_axolotl
        from ..recipes.errors import reporting_complaints
        from ..recipes.writable import check_file
        from . import plan
        from .main import USER_ERROR

    try:
        if json_file is not None:
            check_file("--json", json_file)
        size = None if vram is None else plan.card_size(vram)
        # Whatever a library prints has no place in a pipe.
        with contextlib.redirect_stdout(sys.stderr), plan.shown_progress() as progress, reporting_complaints():
            found = plan_axolotl(config, overrides=overrides, vram=size, progress=progress)
    except ValidationError as refused:
        for error in refused.errors():
            where = ".".join(map(str, error["loc"]))
            said = error["msg"].removeprefix("Value error, ")
            print(f"{PROG}: {f'{where}: ' if where else ''}{said}", file=sys.stderr)
        return USER_ERROR
    except UserError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return USER_ERROR
    plan.show(found, config)
    if json_file is not None:  # axolotl itself has printed its name on stdout
        json_file.write_text(json.dumps(found.as_dict(), indent=2) + "\n", "utf-8")
    return plan.DOES_NOT_FIT if found.fits is False else plan.FITS
