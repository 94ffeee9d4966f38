"""PIVOT-Megatron: evolve vision encoders by preference training through a language-model head."""

__version__ = "0.1.0"
