"""The rows that vision transformers have in common, for a family's own names."""

from __future__ import annotations

from dataclasses import dataclass

from pivot_megatron.families.architecture import FFN_MULTIPLE, EncoderArchitecture
from pivot_megatron.families.table import Copy, FuseGatedMLP, FuseQKV, Padding, Row, Squeeze, Transform


@dataclass(frozen=True)
class Names:
    """A family's tensors without `.weight` and `.bias`. Those from `norm1` on stand in each layer, after `layer`.

    `position` and `class_token` are whole names. `extra_dims`: leading dimensions of size one that those two have.
    `gate_and_up` and `scales` stand only where an architecture has them.
    """

    patch: str
    position: str
    layer: str
    norm1: str
    qkv: tuple[str, str, str]
    out: str
    norm2: str
    fc1: str
    fc2: str
    class_token: str = ""
    extra_dims: tuple[int, int] = (0, 0)  # of position, of class_token
    pre_norm: str = ""
    final_norm: str = ""
    gate_and_up: tuple[str, str] = ("", "")
    scales: tuple[str, str] = ("", "")


def vision_table(arch: EncoderArchitecture, names: Names) -> tuple[Row, ...]:
    ours, width = "decoder.layers.{layer}.", Padding.to_multiple(arch.ffn, FFN_MULTIPLE)
    rows = [Row("position_embedding.weight", (names.position,), _squeezed(names.extra_dims[0]))]
    if arch.class_token:
        rows.append(Row("class_token", (names.class_token,), _squeezed(names.extra_dims[1])))
    if arch.layer_scale:
        rows += [
            Row(f"{ours}{residual}.scale", (names.layer + scale,), Copy())
            for residual, scale in zip(("self_attn_bda", "mlp_bda"), names.scales, strict=True)
        ]
    rows.append(Row("patch_embedding.weight", (names.patch + ".weight",), Copy()))
    if arch.patch_bias:
        rows.append(Row("patch_embedding.bias", (names.patch + ".bias",), Copy()))
    for kind in ("weight", "bias"):
        norms = {
            ours + "input_layernorm": names.layer + names.norm1,
            ours + "pre_mlp_layernorm": names.layer + names.norm2,
        }
        if arch.pre_norm:
            norms["pre_norm"] = names.pre_norm
        if arch.final_norm:
            norms["final_norm"] = names.final_norm
        rows += [Row(f"{norm}.{kind}", (f"{theirs}.{kind}",), Copy()) for norm, theirs in norms.items()]
        if kind == "weight" or arch.qkv_bias:
            rows.append(
                Row(
                    f"{ours}self_attention.linear_qkv.{kind}",
                    tuple(_of_kind(names.layer + part, kind) for part in names.qkv),
                    FuseQKV(arch.heads, 1, arch.head_dim),
                )
            )
        rows.append(
            Row(
                f"{ours}self_attention.linear_proj.{kind}",
                (f"{names.layer}{names.out}.{kind}",),
                Copy(1) if kind == "weight" else Copy(),
            )
        )
        if arch.gated:
            parts = tuple(_of_kind(names.layer + part, kind) for part in names.gate_and_up)
            rows.append(Row(f"{ours}mlp.linear_fc1.{kind}", parts, FuseGatedMLP(width)))
        else:
            rows.append(Row(f"{ours}mlp.linear_fc1.{kind}", (f"{names.layer}{names.fc1}.{kind}",), Copy(0, width)))
        rows.append(
            Row(
                f"{ours}mlp.linear_fc2.{kind}",
                (f"{names.layer}{names.fc2}.{kind}",),
                Copy(1, width) if kind == "weight" else Copy(),
            )
        )
    return tuple(rows)


def _squeezed(dims: int) -> Transform:
    return Squeeze(dims) if dims else Copy()


def _of_kind(name: str, kind: str) -> str:
    """`attn.qkv[0/3]` to `attn.qkv.weight[0/3]`."""
    stem, mark, chunk = name.partition("[")
    return f"{stem}.{kind}{mark}{chunk}"
