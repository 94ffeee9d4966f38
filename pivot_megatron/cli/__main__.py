"""`python -m pivot_megatron.cli VERB`."""

from pivot_megatron.cli import entry

entry()
