"""Imports of `megatron.core` need the platform prepared first."""

import pivot_megatron.runtime  # noqa: F401
