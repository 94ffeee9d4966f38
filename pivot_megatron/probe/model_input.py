"""From a question to what a checkpoint's model is given, by its own image processor, tokenizer and chat template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pivot_megatron.checkpoints.folder import resolve_checkpoint
from pivot_megatron.convert.store import describe
from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.data.build import PACK_MULTIPLE, load_tokenizer
from pivot_megatron.data.chat import Template, from_tokenizer, qwen_1_5
from pivot_megatron.data.packing import pack
from pivot_megatron.data.sample import BadSample
from pivot_megatron.data.tokens import SampleTokenizer, Tokenized, Tokenizer
from pivot_megatron.data.views import ImageViews, pixels_of
from pivot_megatron.errors import UserError
from pivot_megatron.model.composition import Architecture
from pivot_megatron.probe.patch_grid import PatchGrid
from pivot_megatron.probe.questions import Question


@dataclass(frozen=True)
class ModelInput:
    arch: Architecture
    views: ImageViews
    tokenizer: Tokenizer
    template: Template

    @classmethod
    def of(cls, path: Path) -> ModelInput:
        """Of a checkpoint, or of a run's newest. Raises UserError where there is none, and for one that sees images as tiles:
        a token of those is no single place of the image."""
        description = describe(resolve_checkpoint(path))
        arch = description.architecture()
        if arch.anyres is not None:
            raise UserError(
                f"{path}: expected a model that sees an image as one grid of patches, found tiles (model.anyres), which Grad-CAM "
                "has no map for"
            )
        tokenizer = load_tokenizer(description.llm)
        # As exports have it: `plain`, of captions, would leave the question out.
        template = from_tokenizer(tokenizer) if description.template == "tokenizer" else qwen_1_5
        return cls(arch, description.image_views(), tokenizer, template)

    def grid(self, question: Question) -> PatchGrid:
        return PatchGrid.on(self.views, self.arch.encoder.patch_size, *question.size)

    def tokens(self, question: Question, branches: int) -> Tokenized:
        """Raises UserError for what is longer than the language model's positions."""
        view = self.views.view(*question.size)
        try:
            tokenize = SampleTokenizer(
                self.tokenizer, self.template, view, self.arch.head.max_positions, branches, too_long="drop"
            )
            return tokenize(question.pair)
        except BadSample as error:
            raise UserError(f"{question.name}: {error.detail}") from None

    def batch(self, question: Question, branches: int) -> PackedBatch:
        """On the host: both answers, or with one branch the chosen one alone."""
        pixels = pixels_of(self.views, question.image, "pil")
        return pack([self.tokens(question, branches)], [pixels], branches, PACK_MULTIPLE)
