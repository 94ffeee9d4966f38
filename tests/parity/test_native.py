"""SigLIP2 NaFlex from an image file to features, against transformers' processor and its padded, masked batches."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Siglip2VisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from pivot_megatron.config.schema import Component, Encoder, Layout, Model
from pivot_megatron.convert.commands import export_checkpoint, import_checkpoint
from pivot_megatron.convert.start import describe_start
from pivot_megatron.data.views import pixels_of
from pivot_megatron.errors import UserError
from tests.checkpoints import list_again
from tests.harness import Workers
from tests.parity import jobs
from tests.parity.encoders import make
from tests.parity.images import Images
from tests.parity.reference import make_checkpoints, relative_difference
from tests.unit.test_views import noise

SIZES = [(64, 40), (30, 90), (20, 20)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("native")
    return make("siglip2", folder / "encoder"), make_checkpoints(folder / "other")[1]


def test_features_of_files_are_transformers_own(workers: Workers, folders: tuple[Path, Path]) -> None:
    files = [noise(*size) for size in SIZES]
    views = describe_start(Model(encoder=Encoder(hf=folders[0]), llm=Component(hf=folders[1]))).image_views()
    images = Images([pixels_of(views, file, "pil") for file in files], tuple(views.view(*size) for size in SIZES))
    processor = Siglip2ImageProcessorPil.from_pretrained(folders[0])
    batch = processor(images=[Image.open(io.BytesIO(file)) for file in files], return_tensors="pt")
    mask = batch["pixel_attention_mask"].bool()
    assert not mask.all()
    model = Siglip2VisionModel.from_pretrained(folders[0], attn_implementation="eager")
    with torch.no_grad():
        wanted = model(**batch, output_hidden_states=True).hidden_states[-2][mask]
    found = workers.run(jobs.encoder_pass, Layout(), 1, *folders, images, None)[0]["features"]
    assert relative_difference(found, wanted) <= 1e-5


def test_an_export_takes_the_runs_resolution_with_it(folders: tuple[Path, Path], tmp_path: Path) -> None:
    import_checkpoint(*folders, tmp_path / "checkpoint", None, 5)
    export_checkpoint(tmp_path / "checkpoint", "encoder", tmp_path / "same", "drop", None)
    assert Siglip2ImageProcessorPil.from_pretrained(tmp_path / "same").max_num_patches == 24
    start = Model(encoder=Encoder(hf=folders[0], max_patches=60), llm=Component(hf=folders[1]))
    description = describe_start(start)
    assert description.image_views().view(64, 64).tokens == 49
    facts = tmp_path / "checkpoint" / "model.json"
    facts.write_text(facts.read_text().replace('"max_patches": null', '"max_patches": 60'))
    list_again(tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", "encoder", tmp_path / "more", "drop", None)
    assert Siglip2ImageProcessorPil.from_pretrained(tmp_path / "more").max_num_patches == 60


def test_what_means_nothing_to_it_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    def described(encoder: Path, **keys: int):
        return describe_start(Model(encoder=Encoder(hf=encoder, **keys), llm=Component(hf=folders[1])))

    with pytest.raises(UserError, match="max_patches sets its resolution"):
        replace(described(folders[0]), image_size=64).image_views()
    with pytest.raises(UserError, match=r"model\.encoder\.max_patches"):
        described(make("siglip", tmp_path / "siglip"), max_patches=40).image_views()
    import_checkpoint(*folders, tmp_path / "checkpoint", None, 5)
    with pytest.raises(UserError, match="no assembled model that keeps aspect ratios"):
        export_checkpoint(tmp_path / "checkpoint", "mllm", tmp_path / "mllm", "drop", None)
