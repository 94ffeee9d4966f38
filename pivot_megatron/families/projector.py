"""The two-layer GELU projector (LLaVA's `mlp2x_gelu`), under the names of Hugging Face's LLaVA."""

from __future__ import annotations

from pivot_megatron.families.table import Copy, Row

HF_PREFIX = "multi_modal_projector."


def table(newline: bool) -> tuple[Row, ...]:
    """`newline`: with the embedding that ends a row of patches, where images are seen as tiles."""
    linears = (
        Row("encoder.linear_fc1.weight", ("multi_modal_projector.linear_1.weight",), Copy(0)),
        Row("encoder.linear_fc1.bias", ("multi_modal_projector.linear_1.bias",), Copy(0)),
        Row("encoder.linear_fc2.weight", ("multi_modal_projector.linear_2.weight",), Copy(1)),
        Row("encoder.linear_fc2.bias", ("multi_modal_projector.linear_2.bias",), Copy()),
    )
    return (*linears, Row("image_newline", ("image_newline",), Copy())) if newline else linears
