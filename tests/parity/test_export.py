"""An encoder's folder to a checkpoint and back: every family, other resolutions, what its library needs to load it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Dinov2Model, PreTrainedModel, ViTMAEModel, ViTModel

from pivot_megatron.cli import main
from pivot_megatron.convert import hf
from pivot_megatron.convert.commands import export_checkpoint, import_checkpoint
from pivot_megatron.convert.store import describe
from pivot_megatron.convert.verify import verify_checkpoint
from tests.parity.encoders import MAKERS, Library, make
from tests.parity.images import make_images
from tests.parity.imported import imported, same_parameters
from tests.parity.reference import relative_difference


@pytest.fixture(scope="module", params=list(MAKERS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(request.param, tmp_path_factory.mktemp("encoder") / request.param)


def test_every_family_goes_back_to_its_own_library(family: Path, folders: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = imported(tmp_path, family, folders[1])
    arch = describe(checkpoint).architecture()
    images = make_images(arch.encoder, 2, seed=3)
    with torch.no_grad():
        features = Library(arch, family).features(images)
    export_checkpoint(checkpoint, "encoder", tmp_path / "drop", "drop", None)
    export_checkpoint(checkpoint, "encoder", tmp_path / "whole", "original", family)
    assert verify_checkpoint(checkpoint, family, None).passed
    if arch.encoder.family == "moco":  # timm's names and numbers, whole either way
        stored = load_file(family / "model.safetensors")
        for name in ("drop", "whole"):
            found = load_file(tmp_path / name / "model.safetensors")
            assert found.keys() == stored.keys()
            assert all(torch.equal(found[n], t) for n, t in stored.items())
        return
    shorter = replace(arch.encoder, layers=arch.encoder_layers)
    dropped = Library(replace(arch, encoder=shorter, feature_layer=-1), tmp_path / "drop")
    whole = Library(arch, tmp_path / "whole")
    facts = [json.loads((tmp_path / name / "pivot_export.json").read_text()) for name in ("drop", "whole")]
    assert facts[1]["lacks"] == [] and all(name.startswith("pooler.") for name in facts[0]["lacks"])
    with torch.no_grad():
        assert torch.equal(dropped.features(images), features)
        assert torch.equal(whole.features(images), features)
    before = Library(arch, family).model.state_dict()
    assert all(torch.equal(whole.model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("vit", ViTModel), ("mae", ViTMAEModel), ("dinov2", Dinov2Model), ("dinov2-giant-padded", Dinov2Model)],
)
def test_the_names_in_transformers_memory_are_read_too(
    name: str, theirs: type[PreTrainedModel], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """A folder has the hub's names, unless it was saved under those that the module has in transformers 5."""
    hub, memory = make(name, tmp_path / "hub"), tmp_path / "memory"
    theirs.from_pretrained(hub).save_pretrained(memory, save_original_format=False)
    shutil.copyfile(hub / hf.PROCESSOR, memory / hf.PROCESSOR)
    stored, renamed = (set(load_file(folder / "model.safetensors")) for folder in (hub, memory))
    assert any("attention.attention.query" in n for n in stored) and any("attention.q_proj" in n for n in renamed)
    assert same_parameters(imported(tmp_path / "a", hub, folders[1]), imported(tmp_path / "b", memory, folders[1]))


@pytest.mark.parametrize("name", ["siglip", "clip", "dinov2"])
def test_another_resolution_is_what_transformers_interpolates(
    name: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = make(name, tmp_path / "encoder")
    checkpoint = imported(tmp_path, folder, folders[1], image_size=48)
    arch = describe(checkpoint).architecture()
    assert (arch.encoder.image_size, arch.encoder.tokens) == (48, 36)
    images = make_images(arch.encoder, 1, seed=4)
    export_checkpoint(checkpoint, "encoder", tmp_path / "export", "drop", None)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["image_size"] == 48
    assert json.loads((tmp_path / "export" / "preprocessor_config.json").read_text())["size"] == {
        "height": 48,
        "width": 48,
    }
    shorter = replace(arch.encoder, layers=arch.encoder_layers)
    with torch.no_grad():
        wanted = Library(arch, folder).features(images)  # positions interpolated at each call
        found = Library(replace(arch, encoder=shorter, feature_layer=-1), tmp_path / "export").features(images)
    assert relative_difference(found, wanted) <= 1e-6
    assert verify_checkpoint(checkpoint, folder, None).passed


def test_another_resolution_is_in_every_familys_export(
    family: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """An export says its own resolution, so that it is read again without being told."""
    if json.loads((family / "config.json").read_text()).get("model_type") == "siglip2_vision_model":
        pytest.skip("has no resolution of its own")
    checkpoint = imported(tmp_path, family, folders[1], image_size=48)
    for name, original in (("drop", None), ("original", family)):
        export_checkpoint(checkpoint, "encoder", tmp_path / name, name, original)  # type: ignore[arg-type]
        feature_layer = -1 if name == "drop" else None
        import_checkpoint(tmp_path / name, folders[1], tmp_path / f"{name}-again", feature_layer, 5)
        assert same_parameters(checkpoint, tmp_path / f"{name}-again")
        assert describe(tmp_path / f"{name}-again").architecture().encoder.image_size == 48
    assert verify_checkpoint(checkpoint, family, None).passed


def test_a_pooler_is_put_back_or_said_to_be_lacking(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stands past a ViT's features, and transformers' class draws one where a folder has none."""
    vit = make("vit", tmp_path / "vit")
    pooler = ["pooler.dense.bias", "pooler.dense.weight"]
    checkpoint = imported(tmp_path, vit, folders[1])
    for out, options, lacks in (
        ("whole", ["--last-layer", "original", "--original", str(vit)], []),
        ("drop", [], pooler),
    ):
        command = ["convert", "export", str(checkpoint), "--part", "encoder", "--out", str(tmp_path / out)]
        assert main([*command, *options]) == 0
        assert ("the library draws them at random" in capsys.readouterr().err) == bool(lacks)
        assert sorted(json.loads((tmp_path / out / "pivot_export.json").read_text())["lacks"]) == lacks
        model, told = ViTModel.from_pretrained(tmp_path / out, output_loading_info=True)
        assert sorted(told["missing_keys"]) == lacks and not told["unexpected_keys"]
        if not lacks:
            stored = load_file(vit / hf.WEIGHTS)
            assert all(torch.equal(model.state_dict()[name], stored[name]) for name in pooler)


def test_a_folder_in_several_files(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = imported(tmp_path, *folders)
    export_checkpoint(checkpoint, "encoder", tmp_path / "one", "drop", None)
    monkeypatch.setattr(hf.write_folder, "__defaults__", ((), 100_000))
    export_checkpoint(checkpoint, "encoder", tmp_path / "several", "drop", None)
    index = json.loads((tmp_path / "several" / hf.INDEX).read_text())
    files = sorted((tmp_path / "several").glob("*.safetensors"))
    assert len(files) > 2
    assert {p.name for p in files} == set(index["weight_map"].values())
    assert all(sum(t.nbytes for t in load_file(p).values()) <= 100_000 for p in files)
    one, several = hf.HfTensors(tmp_path / "one"), hf.HfTensors(tmp_path / "several")
    assert sorted(one.names()) == sorted(several.names())
    assert all(torch.equal(one.read(n), several.read(n)) for n in one.names())
    assert index["metadata"]["total_size"] == sum(one.read(n).nbytes for n in one.names())


def test_timm_loads_an_export_of_moco(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Where timm is at hand, which needs torchvision: everywhere else the same numbers are compared in transformers' ViT."""
    timm = pytest.importorskip("timm")
    encoder = make("moco", tmp_path / "encoder")
    checkpoint = imported(tmp_path, encoder, folders[1])
    export_checkpoint(checkpoint, "encoder", tmp_path / "export", "drop", None)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    model = timm.models.VisionTransformer(**{"img_size": 32, "patch_size": 8, **config["model_args"]}).eval()
    model.load_state_dict(load_file(tmp_path / "export" / "model.safetensors"))
    arch = describe(checkpoint).architecture()
    images = make_images(arch.encoder, 2, seed=3)
    with torch.no_grad():
        found = model.forward_features(torch.cat(images.pixels))[:, 1:].flatten(0, 1)
        assert relative_difference(found, Library(arch, encoder).features(images)) <= 1e-5
