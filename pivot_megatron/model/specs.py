"""Layer specs and megatron-core configurations of the encoder, the projector and the head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn.functional import gelu, silu

from pivot_megatron.config.schema import Fp8, Layout, Precision
from pivot_megatron.families.architecture import EncoderArchitecture, HeadArchitecture
from pivot_megatron.families.table import CHECKPOINT_NORM_KEYS
from pivot_megatron.model.attention import SegmentAttention, heads_of
from pivot_megatron.model.compat import mlp_spec
from pivot_megatron.model.last_layer import LastLayer
from pivot_megatron.model.layer_scale import LayerScale
from pivot_megatron.model.swiglu import SwiGlu
from pivot_megatron.runtime.attention_trial import require_kernel
from pivot_megatron.runtime.fp8 import require_fp8
from pivot_megatron.runtime.layers import LayerModules, layer_modules


def gelu_tanh(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


# `swiglu` is the layer spec's own activation; what stands here says that it is gated with SiLU.
ACTIVATIONS = {"gelu_tanh": gelu_tanh, "gelu": gelu, "quick_gelu": quick_gelu, "swiglu": silu}


def mlp_submodules(modules: LayerModules, norm_before: bool) -> MLPSubmodules:
    first = modules.first_linear if norm_before else modules.column_linear
    # megatron-core builds the activation only where a config has use_te_activation_func: those of gated MLPs have.
    return MLPSubmodules(linear_fc1=first, linear_fc2=modules.row_linear, activation_func=SwiGlu)


def layer_spec(
    mask: AttnMaskType,
    layer: type[TransformerLayer] = TransformerLayer,
    qk_norm: bool = False,
    scale: ModuleSpec | None = None,
) -> ModuleSpec:
    """A pre-norm transformer layer with SegmentAttention. `mask` is stated, as megatron-core's default differs by model.
    `scale`: of each residual branch."""
    modules = layer_modules()
    norm = modules.norm if qk_norm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=modules.first_linear,
            core_attention=SegmentAttention,
            linear_proj=modules.row_linear,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=modules.separate_norm,
            self_attention=attention,
            self_attn_bda=scale or get_bias_dropout_add,
            pre_mlp_layernorm=modules.separate_norm,
            mlp=mlp_spec(mlp_submodules(modules, norm_before=True)),
            mlp_bda=scale or get_bias_dropout_add,
            sharded_state_dict_keys_map={} if modules.norm_linear else dict(CHECKPOINT_NORM_KEYS),
        ),
    )


def block_spec(layers: list[ModuleSpec]) -> TransformerBlockSubmodules:
    """The layers on this pipeline stage, and the class of a final norm."""
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=layer_modules().norm)


def head_block(arch: HeadArchitecture, layers: int, last_stage: bool) -> TransformerBlockSubmodules:
    specs = [layer_spec(AttnMaskType.causal, qk_norm=arch.qk_norm)] * layers
    last = layer_spec(AttnMaskType.causal, LastLayer, qk_norm=arch.qk_norm)
    return block_spec([*specs[:-1], last] if last_stage and layers else specs)


def encoder_block(arch: EncoderArchitecture, config: TransformerConfig) -> TransformerBlockSubmodules:
    facts = {"width": arch.hidden, "dtype": config.params_dtype, "sequence_parallel": config.sequence_parallel}
    scale = ModuleSpec(module=LayerScale, params=facts) if arch.layer_scale else None
    return block_spec([layer_spec(AttnMaskType.no_mask, scale=scale)] * config.num_layers)


def _leave_as_is(weight: Tensor) -> None:
    pass


def _common(layout: Layout, precision: Precision) -> dict[str, Any]:
    dtype = torch.bfloat16 if precision.compute == "bf16" else torch.float32
    return {
        "tensor_model_parallel_size": layout.tensor,
        "sequence_parallel": layout.sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": precision.compute == "bf16",
        "calculate_per_token_loss": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Every weight is set by convert.start. The init methods still run, for megatron-core marks tensor-parallel weights
        # in the same breath, and without the marks their gradients are left out of the norm.
        "init_method": _leave_as_is,
        "output_layer_init_method": _leave_as_is,
        "embedding_init_method": _leave_as_is,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }


def _fp8(fp8: Fp8 | None) -> dict[str, Any]:
    """Weights and activations in E4M3, gradients in E5M2 (`hybrid`), whatever the recipe."""
    if fp8 is None:
        return {"fp8": None}
    require_fp8(fp8)
    kept = {
        "first_last_layers_bf16": fp8.first_layers_bf16 + fp8.last_layers_bf16 > 0,
        "num_layers_at_start_in_bf16": fp8.first_layers_bf16,
        "num_layers_at_end_in_bf16": fp8.last_layers_bf16,
    }
    # Transformer Engine's own defaults; megatron-core's look back at a single micro-batch, and packs differ from one to the next.
    window = {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"} if fp8.recipe == "delayed" else {}
    return {"fp8": "hybrid", "fp8_recipe": fp8.recipe, **kept, **window}


def _recompute(mode: str) -> dict[str, Any]:
    modes: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    return modes[mode]


def encoder_config(
    arch: EncoderArchitecture, layers: int, layout: Layout, precision: Precision, recompute: str = "none"
) -> TransformerConfig:
    """`layers` are built, all on the first pipeline stage."""
    return TransformerConfig(
        num_layers=layers,
        hidden_size=arch.hidden,
        num_attention_heads=arch.heads,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.padded_ffn,
        gated_linear_unit=arch.gated,
        use_te_activation_func=arch.gated,
        add_bias_linear=True,
        add_qkv_bias=arch.qkv_bias,
        normalization="LayerNorm",
        layernorm_epsilon=arch.norm_epsilon,
        activation_func=ACTIVATIONS[arch.activation],
        **_recompute(recompute),
        **_common(layout, precision),
        **_fp8(precision.fp8_of("encoder")),
    )


def projector_config(
    encoder: EncoderArchitecture, head: HeadArchitecture, layout: Layout, precision: Precision
) -> TransformerConfig:
    """Two linears, encoder width to head width to head width, with the exact (erf) GELU between. Never in FP8: it is tiny."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=head.hidden,
        num_attention_heads=layout.tensor,  # a projector has none; the config wants a multiple of the size
        ffn_hidden_size=head.hidden,
        add_bias_linear=True,
        activation_func=gelu,
        **_common(layout, precision),
    )


def head_config(
    arch: HeadArchitecture, layout: Layout, precision: Precision, recompute: str = "none"
) -> TransformerConfig:
    """The config that megatron-core's schedules also read."""
    return TransformerConfig(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        num_attention_heads=arch.heads,
        num_query_groups=arch.groups,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.ffn,
        gated_linear_unit=True,
        use_te_activation_func=True,  # the layer spec's own activation, of whatever make
        activation_func=silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_epsilon,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.chunks,
        # Batched messages of the interleaved schedule are mispaired over two stages and wait for each other over four.
        overlap_p2p_comm=layout.virtual_pipeline > 1,
        batch_p2p_comm=layout.virtual_pipeline == 1,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers,
        num_layers_in_last_pipeline_stage=layout.last_stage_layers,
        variable_seq_lengths=layout.pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # dense models refuse variable lengths with the default dispatcher
        **_recompute(recompute),
        **_common(layout, precision),
        **_fp8(precision.fp8_of("llm")),
    )


def require_attention(
    encoder: EncoderArchitecture, head: HeadArchitecture, layout: Layout, precision: Precision
) -> None:
    """Raises UserError where this machine's attention kernel does not run with the heads of either."""
    plain = replace(precision, fp8=None)  # attention is never in FP8
    seeing = encoder_config(encoder, encoder.layers, layout, plain)
    for config, causal in ((seeing, False), (head_config(head, layout, plain), True)):
        require_kernel(heads_of(config, causal), config.params_dtype)
