"""The language-model head: megatron-core's GPT model, run over packs, ending in log-probs of answer tokens."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.families.architecture import HeadArchitecture
from pivot_megatron.model.attention import answer_segments
from pivot_megatron.model.freeze import reaching
from pivot_megatron.model.rotary import Rotation
from pivot_megatron.model.specs import head_block
from pivot_megatron.model.vocabulary import TargetLogprobs, WordEmbeddings
from pivot_megatron.runtime.fp8 import token_multiple


class LanguageModel(GPTModel):
    """GPTModel whose forward takes merged embeddings and a pack, and never builds logits outside answers."""

    def __init__(
        self,
        config: TransformerConfig,
        arch: HeadArchitecture,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=head_block(arch, get_num_layers_to_build(config, vp_stage), post_process),
            vocab_size=arch.padded_vocabulary,
            max_sequence_length=arch.max_positions,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=arch.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=int(arch.rope_theta),
            scatter_embedding_sequence_parallel=False,
            vp_stage=vp_stage,
        )
        self.arch = arch
        self._multiple = config.tensor_model_parallel_size * token_multiple(config.fp8_recipe if config.fp8 else None)
        # The modules that GPTModel has built, with our forward: parameters, marks and checkpoint keys stay as they are.
        if pre_process:
            self.embedding.word_embeddings.__class__ = WordEmbeddings
        if post_process:
            self.output_layer.__class__ = TargetLogprobs

    def embed(self, tokens: Tensor) -> Tensor:
        """`[T]` token ids to `[T, 1, hidden]`, whole on every tensor-parallel rank."""
        out: Tensor = self.embedding(input_ids=tokens[None], position_ids=None)
        return out

    def forward(self, embeddings: Tensor | None, batch: PackedBatch) -> Tensor:  # type: ignore[override]
        """Hidden states for the next stage, or on the last one log-probs `[N]` of `batch.targets`, float32.

        `embeddings`: `[T(/tp), 1, hidden]` on the first stage, None elsewhere.
        """
        hidden = self.hidden_states(embeddings, batch)
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        # Called as a module, so that a parameter gather that overlaps is waited for.
        logprobs: Tensor = self.output_layer(
            hidden[: batch.predictors.numel(), 0], batch.targets, self.arch.vocabulary, weight=tied
        )
        return logprobs

    def hidden_states(self, embeddings: Tensor | None, batch: PackedBatch) -> Tensor:
        """Of all tokens `[T(/tp), 1, hidden]`; on the last stage of `batch.predictors`, in order, and what fills them up."""
        # The plain rotary table, read at each token's own position, for branches go on from their prefix. It is applied in the
        # core attention: megatron-core's own rotation keeps four tensors a layer, and counts positions along the pack.
        angles = self.rotary_pos_emb(batch.max_position + 1, packed_seq=True)[batch.positions]
        out: Tensor = self.decoder(
            hidden_states=embeddings if embeddings is None else reaching(embeddings, self.decoder),
            attention_mask=None,
            packed_seq_params=answer_segments(batch, Rotation.at(angles, self.config.params_dtype), self._multiple),
        )
        return out
