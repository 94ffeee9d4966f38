"""Whether a run's model can be cut, computed and trained as its config says: what is to be known before any process starts."""

from __future__ import annotations

from pivot_megatron.config.schema import RunConfig
from pivot_megatron.convert.plan import rows_by_parameter
from pivot_megatron.convert.start import describe_start
from pivot_megatron.errors import UserError
from pivot_megatron.model.fit import misfits
from pivot_megatron.model.freeze import mismatches
from pivot_megatron.runtime.fp8 import require_fp8
from pivot_megatron.train.keeping import require_metric


def infeasible(config: RunConfig) -> list[str]:
    """Each reason as `dotted.path: what is wrong, what to do`. Raises UserError where a folder of the model is not one."""
    fp8 = config.precision.fp8
    arch = describe_start(config.model).architecture()
    found = misfits(arch, config.layout, config.precision)
    found += mismatches(list(rows_by_parameter(arch)), config.parameters)
    try:
        require_metric(config)
    except UserError as error:
        found.append(str(error))
    if fp8 is not None:
        try:
            require_fp8(fp8)
        except UserError as error:
            found.append(str(error))
    return found
