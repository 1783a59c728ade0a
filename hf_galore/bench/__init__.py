"""`hf-galore bench`: what a card makes of a recipe, beside other optimizers, each run in a process of its own.

`jobs.py` says what there is to measure. `worker.py` does one of it, with `recipe.py` and `machine.py`, in a process
that `processes.py` starts; `session.py` has them done one after the other. `report.py` is what comes of it,
`markdown.py` its rows for docs/cards.md, `others.py` figures of other people.
"""
