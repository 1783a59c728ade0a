"""Loops of one's own and other libraries: the examples of docs/loops.md, and what else their users do."""
