"""Gradients at an image's tokens against transformers' LLaVA of equal weights, and a planted patch in four kinds of encoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import logsigmoid

from pivot_megatron.cli import main
from pivot_megatron.config.schema import Dpo, Sft
from pivot_megatron.convert.commands import export_checkpoint, import_checkpoint, trained_model
from pivot_megatron.convert.saving import save_weights
from pivot_megatron.convert.store import describe
from pivot_megatron.convert.tiny_checkpoints import make_head, make_tokenizer
from pivot_megatron.objective.build import build_objective
from pivot_megatron.probe.gradients import Place, overfit, patch_gradient, put_back, with_reference
from pivot_megatron.probe.model_input import ModelInput
from pivot_megatron.probe.questions import read_questions
from pivot_megatron.recipe.answers import ExportedModel
from tests.harness import Workers
from tests.parity.encoders import make
from tests.parity.reference import CORPUS, make_checkpoints, relative_difference

QUESTION, ANSWERS = "what colour is the circle", ("the circle is red", "two squares")
END = "<|im_end|>"
RATE = 1e-3


def write_question(folder: Path, pixels: np.ndarray, **more: object) -> Path:
    Image.fromarray(pixels).save(folder / "image.png")
    record = {"image": "image.png", "question": QUESTION, "chosen": ANSWERS[0], "rejected": ANSWERS[1], **more}
    (folder / "samples.jsonl").write_text(json.dumps(record) + "\n")
    return folder / "samples.jsonl"


def ours(checkpoint: Path, samples: Path, kind: str, at: Place, steps: int) -> tuple[Tensor, list[float], bool]:
    """A worker's job: gradient and losses, and whether every weight is put back."""
    given, (question,) = ModelInput.of(checkpoint), read_questions(samples)
    objective = build_objective(Dpo() if kind == "dpo" else Sft())
    with trained_model(checkpoint) as model:
        before = [parameter.clone() for parameter in model.parameters()]
        again = put_back(model)
        batch = given.batch(question, objective.branches)
        if objective.needs_reference:
            batch = with_reference(model, batch)
        losses = overfit(model, batch, objective, steps, RATE)
        gradient, loss = patch_gradient(model, batch, objective, at)
        again()
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        return gradient, [*losses, loss], same


class Llava:
    """transformers' own model and processor, a sequence an answer, and losses written out."""

    def __init__(self, folder: Path, image: Path, at: Place) -> None:
        exported = ExportedModel(folder)
        assert not exported.incomplete
        self.model, self.image = exported.model, Image.open(image)
        self.prompts = [exported.prompt(QUESTION)] * 2
        self.processor, self.tokenizer = exported.processor, exported.tokenizer
        self.tokens: list[Tensor] = []
        projector = self.model.model.multi_modal_projector
        if at == "input":
            projector.register_forward_pre_hook(lambda _m, inputs: self.tokens.append(inputs[0]))
        else:
            projector.register_forward_hook(lambda _m, _i, output: self.tokens.append(output))
        self.reference = [float(answer.detach().sum()) for answer in self.answers()]

    def answers(self) -> list[Tensor]:
        """Log-probs of each answer's tokens."""
        self.tokens.clear()
        found = []
        for prompt, answer in zip(self.prompts, ANSWERS):
            inputs = self.processor(images=self.image, text=prompt, return_tensors="pt")
            answered = torch.tensor([self.tokenizer.encode(answer + END, add_special_tokens=False)])
            ids = torch.cat([inputs["input_ids"], answered], dim=1)
            logits = self.model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[
                0, -answered.shape[1] - 1 : -1
            ]
            found.append(logits.log_softmax(-1).gather(1, answered[0][:, None])[:, 0])
        return found

    def loss(self, kind: str) -> Tensor:
        chosen, rejected = self.answers()
        if kind == "sft":
            return -chosen.mean()
        margin = (chosen.sum() - self.reference[0]) - (rejected.sum() - self.reference[1])
        return -logsigmoid(0.1 * margin)

    def gradient(self, kind: str, steps: int) -> tuple[Tensor, list[float]]:
        """After `steps` of AdamW; both answers see the same tokens, so theirs are added."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.0)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            losses.append(self.loss(kind))
            losses[-1].backward()
            optimizer.step()
        losses.append(self.loss(kind))
        found = torch.autograd.grad(losses[-1], self.tokens, allow_unused=True, materialize_grads=True)
        return torch.stack([one.reshape(-1, one.shape[-1]) for one in found]).sum(0), [float(one) for one in losses]


@pytest.mark.parametrize(
    ("family", "kind", "at", "steps"),
    [
        ("siglip", "dpo", "input", 0),
        ("siglip", "dpo", "output", 0),
        ("siglip", "sft", "input", 0),
        ("siglip", "dpo", "input", 4),
        ("clip", "dpo", "input", 0),  # a class token before the patches
        ("clip", "sft", "output", 2),
    ],
)
def test_gradients_are_llavas(family: str, kind: str, at: Place, steps: int, workers: Workers, tmp_path: Path) -> None:
    checkpoint, export = tmp_path / "checkpoint", tmp_path / "export"
    import_checkpoint(make(family, tmp_path / family), make_checkpoints(tmp_path / "head")[1], checkpoint, None, seed=5)
    export_checkpoint(checkpoint, "mllm", export, "drop", None)
    samples = write_question(tmp_path, np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    ((found, losses, same),) = workers.run(ours, None, 1, checkpoint, samples, kind, at, steps)
    expected, theirs = Llava(export, tmp_path / "image.png", at).gradient(kind, steps)
    assert found.shape == expected.shape and same
    assert losses == pytest.approx(theirs, abs=1e-5)
    assert relative_difference(found, expected) <= (1e-4 if steps else 1e-5)


def planted(checkpoint: Path, out: Path, reader: str) -> None:
    """A worker's job: in the model that is written to `out`, a patch tells nothing but how red it is. With the projector as its
    `reader`, patches that are not red stop at its activation; else all pass, and the first channel of each is its redness."""
    description = describe(checkpoint)
    with trained_model(checkpoint) as stage, torch.no_grad():
        model = stage.whole
        for layer in model.encoder.decoder.layers:
            for last in (layer.self_attention.linear_proj, layer.mlp.linear_fc2):
                last.weight.zero_()
                if last.bias is not None:
                    last.bias.zero_()
        for norm in (model.encoder.pre_norm, model.encoder.final_norm):
            if norm is not None:
                norm.weight.fill_(1.0)
                norm.bias.zero_()
        model.encoder.position_embedding.weight.zero_()
        if model.encoder.class_token is not None:
            model.encoder.class_token.zero_()
        patches = model.encoder.patch_embedding
        patches.weight.zero_()
        if patches.bias is not None:
            patches.bias.zero_()
        edge = description.architecture().encoder.patch_size
        if patches.weight.dim() == 4:
            patches.weight[0, 0] = 1 / edge**2
        else:  # a patch's pixels one after another, of three channels each
            patches.weight[0, 0::3] = 1 / edge**2
        one, two = model.projector.encoder.linear_fc1, model.projector.encoder.linear_fc2
        one.weight.zero_()
        if reader == "projector":
            one.weight[:, 0], one.bias[:] = 20.0, -10.0
        else:
            one.weight[:, 0], one.bias[:] = 1.0, 10.0  # far up where the activation is a line
            two.weight[0] = 1 / two.weight.shape[1]
            two.bias[0] = 0.0
            two.bias -= 10.0 * two.weight.sum(dim=1)
        save_weights(stage, out, description)


def reading_head(folder: Path) -> Path:
    """A head of one layer that attends to the token whose first channel is highest, wherever it stands: of words that is zero."""
    make_head(
        folder, make_tokenizer(CORPUS, 300), hidden_size=64, layers=1, heads=4, kv_heads=2, ffn=128, tied=False, seed=2
    )
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 0] = 0.0
    layer = "model.layers.0.self_attn."
    for name in ("q_proj", "k_proj"):
        tensors[f"{layer}{name}.weight"].zero_(), tensors[f"{layer}{name}.bias"].zero_()
    slowest = 16 // 2 - 1  # of a head's channels, the one that positions hardly turn
    tensors[f"{layer}q_proj.bias"][slowest::16] = 20.0
    tensors[f"{layer}k_proj.weight"][slowest::16, 0] = 20.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "reader", "at"),
    [
        ("siglip", "projector", "input"),
        ("siglip2", "projector", "input"),
        ("clip", "projector", "input"),
        ("dinov2", "projector", "input"),
        ("siglip", "head", "input"),
        ("siglip2", "head", "output"),
    ],
)
def test_a_planted_patch_is_found(family: str, reader: str, at: Place, workers: Workers, tmp_path: Path) -> None:
    """One patch of 4 x 4 (siglip2: of the image's own aspect ratio) is red and alone read; the map is 1 there, 0 elsewhere."""
    checkpoint, whole = tmp_path / "checkpoint", tmp_path / "planted"
    head = reading_head(tmp_path / "head") if reader == "head" else make_checkpoints(tmp_path / "head")[1]
    import_checkpoint(make(family, tmp_path / family), head, checkpoint, None, seed=5)
    workers.run(planted, None, 1, checkpoint, whole, reader)
    pixels = np.zeros((60, 90, 3), np.uint8)
    grid = ModelInput.of(whole).grid(read_questions(write_question(tmp_path, pixels))[0])
    row, column = 1, grid.columns - 2
    left, top = round(column * grid.width), round(row * grid.height)
    right, bottom = round((column + 1) * grid.width), round((row + 1) * grid.height)
    pixels[top:bottom, left:right, 0] = 255
    samples, out = write_question(tmp_path, pixels, box=[left, top, right, bottom]), tmp_path / "out"
    words = ["--samples", samples, "--out", out, "--steps", 3, "--at", at]
    assert main(["probe", "gradcam", *map(str, [whole, *words])]) == 0
    inner = np.zeros((grid.rows - 2, grid.columns - 2))
    inner[row - 1, column - 1] = 1.0
    found = np.load(out / "maps" / "0001-1.npy")
    np.testing.assert_allclose(found, np.pad(inner, 1, mode="edge"), atol=1e-6)
    record = json.loads((out / "gradcam.json").read_text())
    assert record["pointing"]["scores"][0]["mean"] == 1.0
    assert record["scores"][0]["mean"] == pytest.approx(1 / found.sum(), rel=0.1)  # the box is rounded to pixels
