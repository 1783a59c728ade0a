"""All contact with the internals of other libraries: transformers, TRL, accelerate, PEFT and bitsandbytes.

`tests/integrations` has a file for each of these; its first tests fail, and say what moved, when a new version of the
library is another than the one that was written for.
"""
