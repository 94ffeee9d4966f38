"""Encoder, projector and language model as one megatron-core module, cut into pipeline stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from pivot_megatron.config.schema import AnyRes, Layout, Precision, Recompute
from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.data.views import View
from pivot_megatron.families.architecture import EncoderArchitecture, HeadArchitecture
from pivot_megatron.model.encoder import VisionEncoder
from pivot_megatron.model.llm import LanguageModel
from pivot_megatron.model.projector import Projector
from pivot_megatron.model.specs import encoder_config, head_config
from pivot_megatron.runtime.device import current_platform
from pivot_megatron.runtime.distributed import is_first_stage, is_last_stage


@dataclass(frozen=True)
class Architecture:
    """`feature_layer` indexes hidden_states from the end: -1 is the last layer's output. `anyres`: images are seen as tiles."""

    encoder: EncoderArchitecture
    head: HeadArchitecture
    feature_layer: int
    anyres: AnyRes | None = None

    @property
    def encoder_layers(self) -> int:
        """Encoder layers that are built: those up to the feature layer."""
        return self.encoder.layers + 1 + self.feature_layer

    @property
    def final_norm(self) -> bool:
        """Whether features are the encoder's final norm's output."""
        return self.encoder.final_norm and self.feature_layer == -1


class VisionLanguageModel(MegatronModule):
    """One chunk of a pipeline: encoder and projector stand in the first, log-probs come out of the last.

    Parameters are named `encoder.*`, `projector.*`, `llm.*`.
    """

    def __init__(
        self, arch: Architecture, layout: Layout, precision: Precision, recompute: Recompute, chunk: int = 0
    ) -> None:
        """`chunk`: which of this stage's `layout.virtual_pipeline`."""
        config = head_config(arch.head, layout, precision, recompute.llm)
        super().__init__(config=config)
        self.arch = arch
        self.pre_process = is_first_stage() and chunk == 0
        self.post_process = is_last_stage() and chunk == layout.virtual_pipeline - 1
        # What megatron-core's schedules and gradient finalisation ask of a model.
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = arch.head.tied_embeddings
        self.vp_stage = chunk if layout.chunks else None
        if self.pre_process:
            vision = encoder_config(arch.encoder, arch.encoder_layers, layout, precision, recompute.encoder)
            self.encoder = VisionEncoder(vision, arch.encoder, arch.final_norm)
            self.projector = Projector(arch.encoder, arch.head, layout, precision, tiles=arch.anyres is not None)
        self.llm = LanguageModel(config, arch.head, self.pre_process, self.post_process, self.vp_stage)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        weight: Tensor | None = self.llm.shared_embedding_or_output_weight()
        return weight

    def set_is_first_microbatch(self) -> None:
        """Layers in FP8 cast their weights in the next forward pass, and go on with the casts until this is called again."""
        for module in self.modules():
            if hasattr(module, "is_first_microbatch") and module.config.fp8:
                module.is_first_microbatch = True  # type: ignore[assignment]

    def set_input_tensor(self, input_tensor: Tensor | Sequence[Tensor | None] | None) -> None:
        self.llm.set_input_tensor(input_tensor)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Hidden states for the next stage `[T(/tp), 1, H]`, or log-probs of answer tokens `[N]` on the last."""
        out: Tensor = self.llm(self.merged_embeddings(batch) if self.pre_process else None, batch)
        return out

    def merged_embeddings(self, batch: PackedBatch) -> Tensor:
        """Word embeddings with projected image features in their places, `[T(/tp), 1, H]`."""
        merged = self.llm.embed(batch.tokens)
        features = self.image_features(batch.pixels, batch.views).to(merged.dtype)
        if batch.image_positions.numel():
            merged = merged.index_copy(0, batch.image_positions, features.index_select(0, batch.image_rows))
        else:
            # Every rank runs the encoder and its collectives, and its gradients are zeros, not missing.
            merged = merged + 0.0 * features.sum()
        if self.config.sequence_parallel:
            merged = scatter_to_sequence_parallel_region(merged)
        return merged

    def image_features(self, pixels: Tensor, views: tuple[View, ...]) -> Tensor:
        """The tokens of all images, `[P, 1, H]`, whole on every rank; one blank image's where there is none."""
        encoder = self.arch.encoder
        if not views:
            size, edge = encoder.image_size, encoder.patch_size
            blank, grid = ((1, 3 * edge**2), (1, 1)) if encoder.native else ((1, 3, size, size), (encoder.grid,) * 2)
            pixels, views = torch.zeros(blank, device=pixels.device), (View.of_patches(*grid),)
        grids = [grid for view in views for grid in view.grids]
        features = self.projector(self.encoder(pixels, grids))
        if self.config.sequence_parallel:
            features = gather_from_sequence_parallel_region(features, tensor_parallel_output_grad=False)
        patches = features[:, 0]
        if encoder.class_token:  # one resolution, then
            patches = patches[: len(grids) * encoder.places].view(len(grids), encoder.places, -1)[:, 1:].flatten(0, 1)
        patches = patches[: sum(rows * columns for rows, columns in grids)]
        return self.projector.tokens(patches, views)[:, None]


class Stage(torch.nn.ModuleList):
    """What one pipeline rank holds: a chunk of the model, or several that a virtual pipeline visits in turn."""

    def __init__(self, chunks: Sequence[VisionLanguageModel]) -> None:
        super().__init__(chunks)
        self.arch = chunks[0].arch

    def __iter__(self) -> Iterator[VisionLanguageModel]:
        return super().__iter__()  # type: ignore[return-value]

    @property
    def whole(self) -> VisionLanguageModel:
        """The model, where one process holds all of it."""
        (model,) = self
        return model


def build_model(arch: Architecture, layout: Layout, precision: Precision, recompute: Recompute) -> Stage:
    """This rank's stage on its device, weights not yet set."""
    chunks = [VisionLanguageModel(arch, layout, precision, recompute, n) for n in range(layout.virtual_pipeline)]
    return Stage(chunks).to(current_platform().device)
