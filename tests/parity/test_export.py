"""Hugging Face folders to a checkpoint and back, without a model in between: every family, assembled models, wrong input."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Dinov2Model, LlavaForConditionalGeneration, PreTrainedModel, ViTMAEModel, ViTModel

from pivot_megatron.cli import main
from pivot_megatron.config.schema import Component, Encoder, Layout, Model
from pivot_megatron.convert import hf
from pivot_megatron.convert.commands import export_checkpoint, import_assembled, import_checkpoint
from pivot_megatron.convert.load import hf_source, shard_of
from pivot_megatron.convert.plan import COMPONENTS, component_rows, parameter_shape
from pivot_megatron.convert.start import describe_start
from pivot_megatron.convert.store import describe
from pivot_megatron.convert.stream import CheckpointParameters
from pivot_megatron.convert.verify import verify_checkpoint
from pivot_megatron.data.build import load_tokenizer
from pivot_megatron.data.chat import qwen_1_5
from pivot_megatron.data.images import decode_rgb
from pivot_megatron.data.sample import Pair
from pivot_megatron.data.tokens import SampleTokenizer
from pivot_megatron.data.views import pixels_of
from pivot_megatron.errors import UserError
from pivot_megatron.recipe.answers import ExportedModel
from tests import matrix
from tests.harness import Workers
from tests.parity import checkpoint_jobs, jobs
from tests.parity.encoders import MAKERS, Library, make
from tests.parity.images import make_images
from tests.parity.reference import make_checkpoints, relative_difference
from tests.unit.test_views import noise

LAYOUTS = (matrix.SINGLE, matrix.TP2, matrix.PP2, matrix.TP2_PP2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module", params=list(MAKERS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(request.param, tmp_path_factory.mktemp("encoder") / request.param)


def imported(folder: Path, encoder: Path, head: Path, image_size: int | None = None) -> Path:
    import_checkpoint(encoder, head, folder / "checkpoint", None, 5, image_size)
    return folder / "checkpoint"


def same_parameters(one: Path, other: Path) -> bool:
    arch = describe(one).architecture()
    a, b = (CheckpointParameters(path / "tensors") for path in (one, other))
    names = [f"{part}.{row.megatron}" for part in COMPONENTS for row in component_rows(arch, part)]
    return all(torch.equal(a.read(name), b.read(name)) for name in names)


@matrix.layouts(*LAYOUTS)
def test_what_any_layout_saves_is_read_whole(
    layout: Layout, world: int, workers: Workers, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    workers.run(checkpoint_jobs.save_checkpoint, layout, world, *folders, tmp_path / "saved")
    description = describe_start(Model(encoder=Encoder(hf=folders[0]), llm=Component(hf=folders[1])))
    arch = description.architecture()
    parameters = CheckpointParameters(tmp_path / "saved" / "tensors")
    for component, folder in zip(("encoder", "llm"), folders, strict=True):
        source = hf_source(arch, component, folder)
        for row in component_rows(arch, component):
            name = f"{component}.{row.megatron}"
            found = parameters.read(name)
            assert found.shape == parameter_shape(arch, name)
            assert torch.equal(found, shard_of(row, source, 0, 1)), name


@pytest.mark.parametrize("name", ["siglip", "dinov2-giant-padded"])
def test_what_four_ranks_saved_comes_back_from_its_files(
    name: str, workers: Workers, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """More ranks than the head has key-value groups, and an MLP that is padded."""
    encoder, (_, layout, world) = make(name, tmp_path / "encoder"), matrix.TP4
    workers.run(checkpoint_jobs.save_checkpoint, layout, world, encoder, folders[1], tmp_path / "saved")
    export_checkpoint(tmp_path / "saved", "encoder", tmp_path / "export", "original", encoder)
    stored, found = (load_file(f / hf.WEIGHTS) for f in (encoder, tmp_path / "export"))
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[n], tensor) for n, tensor in stored.items())
    found = verify_checkpoint(tmp_path / "saved", encoder, folders[1])
    assert found.passed, found.table()


def test_an_import_loads_at_any_layout_and_verifies(
    workers: Workers, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    checkpoint = imported(tmp_path, *folders)
    wanted = workers.run(jobs.round_trip, Layout(), 1, *folders)[0]
    for _, layout, world in (matrix.TP2, matrix.PP2):
        for found in workers.run(checkpoint_jobs.loaded_checkpoint, layout, world, checkpoint):
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert verify_checkpoint(checkpoint, *folders).passed


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


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_an_assembled_model_and_back(name: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = imported(tmp_path, make(name, tmp_path / "encoder"), folders[1])
    export_checkpoint(checkpoint, "mllm", tmp_path / "llava", "drop", None)
    import_assembled(tmp_path / "llava", tmp_path / "again", None)
    assert same_parameters(checkpoint, tmp_path / "again")
    assert_verified(tmp_path / "again", tmp_path / "llava")
    # As transformers itself saves it: other names, another place for the image processor.
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").save_pretrained(tmp_path / "saved")
    for file in (tmp_path / "llava").iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copyfile(file, tmp_path / "saved" / file.name)
    import_assembled(tmp_path / "saved", tmp_path / "third", None)
    assert same_parameters(checkpoint, tmp_path / "third")


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_greedy_answers_are_transformers_own(
    name: str, folders: tuple[Path, Path], workers: Workers, tmp_path: Path
) -> None:
    checkpoint = imported(tmp_path, make(name, tmp_path / "encoder"), folders[1])
    export_checkpoint(checkpoint, "mllm", tmp_path / "llava", "drop", None)
    description = describe(checkpoint)
    views, pair = description.image_views(), Pair("k", noise(50, 40), "what colour is it", "red", "blue", {})
    sample = SampleTokenizer(load_tokenizer(description.llm), qwen_1_5, views.fixed, 2048, 2, "drop")(pair)
    exported = ExportedModel(tmp_path / "llava")
    prompt = exported.prompt(pair.question)
    inputs = exported.processor(images=decode_rgb(noise(50, 40)), text=prompt, return_tensors="pt")
    pixels = pixels_of(views, noise(50, 40), "pil")
    with torch.no_grad():
        whole = exported.model.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=None)[0]
    wanted = whole[inputs["input_ids"].shape[1] :].tolist()
    for _, layout, world in (matrix.SINGLE, matrix.TP2):
        assert workers.run(checkpoint_jobs.greedy, layout, world, checkpoint, sample, [pixels], 12) == [wanted] * world


def assert_verified(checkpoint: Path, mllm: Path) -> None:
    """Every tensor and layer, and that another projector is seen, in its tensor and in what comes after it."""
    found = verify_checkpoint(checkpoint, None, None, mllm=mllm)
    assert found.passed, found.table()
    said = {check.what for check in found.checks}
    assert "tensor multi_modal_projector.linear_1.weight" in said and {"head layer 0", "head log-probs"} <= said
    shutil.copytree(mllm, mllm.with_name("changed"))
    path = mllm.with_name("changed") / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("multi_modal_projector.linear_1.bias"))
    tensors[name] += 0.1
    save_file(tensors, path, metadata={"format": "pt"})
    failed = {c.what for c in verify_checkpoint(checkpoint, None, None, mllm=path.parent).checks if not c.passed}
    assert {"tensor multi_modal_projector.linear_1.bias", "head layer 0"} <= failed


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_verify_takes_a_checkpoints_own_exports(name: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Of as many layers as the checkpoint has; and the folder that it began from, of more."""
    encoder = make(name, tmp_path / "encoder")
    checkpoint = imported(tmp_path, encoder, folders[1])
    for part, out in (("encoder", "drop"), ("mllm", "llava")):
        export_checkpoint(checkpoint, part, tmp_path / out, "drop", None)  # type: ignore[arg-type]
    layers = [f"encoder layer {n}" for n in range(3)]
    for folder in (encoder, tmp_path / "drop"):
        found = verify_checkpoint(checkpoint, folder, None)
        assert found.passed, found.table()
        assert [check.what for check in found.checks if not check.what.startswith("tensor ")] == layers
    assert_verified(checkpoint, tmp_path / "llava")


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_verify_of_an_assembled_model_at_another_resolution(
    name: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """Positions are interpolated there as transformers is called, here once."""
    checkpoint = imported(tmp_path, make(name, tmp_path / "encoder"), folders[1])
    export_checkpoint(checkpoint, "mllm", tmp_path / "llava", "drop", None)
    import_assembled(tmp_path / "llava", tmp_path / "larger", None, image_size=48)
    assert describe(tmp_path / "larger").architecture().encoder.image_size == 48
    assert_verified(tmp_path / "larger", tmp_path / "llava")
    export_checkpoint(tmp_path / "larger", "mllm", tmp_path / "larger-llava", "drop", None)
    found = verify_checkpoint(tmp_path / "larger", None, None, mllm=tmp_path / "larger-llava")
    assert found.passed, found.table()


def test_verify_of_an_assembled_model_at_other_features(folders: tuple[Path, Path], tmp_path: Path) -> None:
    export_checkpoint(imported(tmp_path, *folders), "mllm", tmp_path / "llava", "drop", None)
    import_assembled(tmp_path / "llava", tmp_path / "earlier", -2)
    found = verify_checkpoint(tmp_path / "earlier", None, None, mllm=tmp_path / "llava")
    assert found.passed, found.table()


def in_dtype(folder: Path, dtype: torch.dtype, factor: float = 1.0) -> Path:
    """A folder's tensors, times `factor`, in another dtype. Its config.json stays."""
    path = folder / "model.safetensors"
    tensors = {name: (tensor.float() * factor).to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_verify_tells_rounded_weights_from_those_that_moved(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint coarser than its folder did not train; one that is finer, and rounds to it, did."""
    coarse, moved = (Path(shutil.copytree(folders[1], tmp_path / name)) for name in ("coarse", "moved"))
    in_dtype(coarse, torch.bfloat16)
    shutil.copyfile(coarse / hf.WEIGHTS, moved / hf.WEIGHTS)
    in_dtype(moved, torch.float32, factor=1 + 2e-5)
    assert main(["convert", "verify", str(imported(tmp_path / "a", folders[0], moved)), "--llm", str(coarse)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "0 tensors equal, bit for bit"
    assert sum("moved by less than bfloat16 shows" in line for line in said) == len(load_file(coarse / hf.WEIGHTS))
    command = ["convert", "verify", str(imported(tmp_path / "b", folders[0], coarse)), "--llm", str(folders[1])]
    assert main([*command, "--tolerance", "0.1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "0 tensors equal, bit for bit"
    assert said[1].endswith("tensors equal once rounded to bfloat16, which the checkpoint holds them in")


def tensor_dtypes(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / hf.WEIGHTS).values()}


def test_an_export_rounds_nothing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Whatever config.json says of its dtype: it may be as wrong as many are."""
    encoder, head = (Path(shutil.copytree(f, tmp_path / f.name)) for f in folders)
    for folder in (encoder, head):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    checkpoint = imported(tmp_path, encoder, head)
    for name, part, last, original in (
        ("drop", "encoder", "drop", None),
        ("whole", "encoder", "original", encoder),
        ("mllm", "mllm", "drop", None),
    ):
        export_checkpoint(checkpoint, part, tmp_path / name, last, original)  # type: ignore[arg-type]
        assert tensor_dtypes(tmp_path / name) == {torch.float32}
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert [c["dtype"] for c in (config, *(config.get(f"{x}_config", config) for x in ("vision", "text")))] == [
            "float32"
        ] * 3
    stored = load_file(encoder / hf.WEIGHTS)
    found = load_file(tmp_path / "whole" / hf.WEIGHTS)
    assert found.keys() == stored.keys() and all(torch.equal(found[name], stored[name]) for name in stored)
    assert verify_checkpoint(checkpoint, tmp_path / "drop", None, mllm=tmp_path / "mllm").passed


def test_what_trained_finer_than_the_original_stays_so(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """float32 weights of a run from a bfloat16 folder, and what of it did not train."""
    coarse, trained = (Path(shutil.copytree(folders[0], tmp_path / name)) for name in ("coarse", "trained"))
    in_dtype(coarse, torch.bfloat16)
    shutil.copyfile(coarse / hf.WEIGHTS, trained / hf.WEIGHTS)
    in_dtype(trained, torch.float32)
    changed_name = FC1
    tensors = load_file(trained / hf.WEIGHTS)
    tensors[changed_name] *= 1 + 2e-5
    save_file(tensors, trained / hf.WEIGHTS, metadata={"format": "pt"})
    checkpoint = imported(tmp_path, trained, folders[1])
    export_checkpoint(checkpoint, "encoder", tmp_path / "whole", "original", coarse)
    stored, found = load_file(coarse / hf.WEIGHTS), load_file(tmp_path / "whole" / hf.WEIGHTS)
    assert torch.equal(found.pop(changed_name), tensors[changed_name])
    assert all(t.dtype == torch.bfloat16 and torch.equal(t, stored[name]) for name, t in found.items())
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dtype"] == "float32"
    assert verify_checkpoint(checkpoint, tmp_path / "whole", None).passed


def test_parts_of_several_dtypes_are_put_together_in_the_finest(folders: tuple[Path, Path], tmp_path: Path) -> None:
    def coarse_queries(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: t.bfloat16() for name, t in tensors.items() if "q_proj" in name}

    encoder = changed(folders[0], tmp_path / "encoder", coarse_queries)
    checkpoint = imported(tmp_path, encoder, folders[1])
    assert verify_checkpoint(checkpoint, encoder, None).passed
    export_checkpoint(checkpoint, "encoder", tmp_path / "whole", "original", encoder)
    stored, found = load_file(encoder / hf.WEIGHTS), load_file(tmp_path / "whole" / hf.WEIGHTS)
    assert all(t.dtype == stored[name].dtype and torch.equal(t, stored[name]) for name, t in found.items())


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


def test_features_past_a_final_norm_are_no_llava(folders: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = imported(tmp_path, make("dinov2", tmp_path / "encoder"), folders[1])
    with pytest.raises(UserError, match="past the final norm"):
        export_checkpoint(checkpoint, "mllm", tmp_path / "llava", "drop", None)
    assert not (tmp_path / "llava").exists()


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


def changed(folder: Path, out: Path, change: Any) -> Path:
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


FC1 = "vision_model.encoder.layers.0.mlp.fc1.weight"
WRONG = {
    "missing": (lambda t: t.pop(FC1), f"expected a tensor {FC1}"),
    "shape": (lambda t: t.update({FC1: t[FC1][:-1].clone()}), f"{FC1}: expected shape"),
    "extra": (
        lambda t: t.update({"vision_model.encoder.layers.9.mlp.fc1.bias": torch.zeros(3)}),
        "layers.9.mlp.fc1.bias",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors_are_named(case: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    change, said = WRONG[case]
    encoder, out = changed(folders[0], tmp_path / "encoder", change), tmp_path / "out"
    with pytest.raises(UserError, match=said):
        import_checkpoint(encoder, folders[1], out, None, 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder"]


def test_a_file_cut_off_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    shutil.copytree(folders[0], encoder)
    whole = (encoder / "model.safetensors").read_bytes()
    (encoder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors: not a whole safetensors file"):
        import_checkpoint(encoder, folders[1], tmp_path / "out", None, 5)


def test_a_pickle_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    shutil.copytree(folders[0], encoder)
    (encoder / "model.safetensors").rename(encoder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
        import_checkpoint(encoder, folders[1], tmp_path / "out", None, 5)


def test_a_full_disk_leaves_nothing(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = imported(tmp_path, *folders)

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: IoError(Os { code: 28, message: No space left on device })")

    monkeypatch.setattr(hf, "save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        export_checkpoint(checkpoint, "encoder", tmp_path / "out", "drop", None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]


TAMPERED = {
    "swapped": lambda t: swap(t, "self_attn.q_proj.weight", "self_attn.k_proj.weight"),
    "transposed": lambda t: t.update({key(t, "out_proj.weight"): t[key(t, "out_proj.weight")].t().contiguous()}),
    "shifted": lambda t: swap(t, "layers.0.layer_norm1.weight", "layers.1.layer_norm1.weight"),
    "no bias": lambda t: t[key(t, "mlp.fc1.bias")].zero_(),
}


def key(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in tensors if part in name)


def swap(tensors: dict[str, torch.Tensor], one: str, other: str) -> None:
    a, b = key(tensors, one), key(tensors, other)
    tensors[a], tensors[b] = tensors[b], tensors[a]


@pytest.mark.parametrize("case", TAMPERED)
def test_verify_sees_what_was_tampered_with(case: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = imported(tmp_path, changed(folders[0], tmp_path / "encoder", TAMPERED[case]), folders[1])
    found = verify_checkpoint(checkpoint, folders[0], None)
    assert not found.passed
    wrong = [check.what for check in found.checks if not check.passed]
    assert any(what.startswith("tensor ") for what in wrong)
    assert any(what.startswith("encoder layer") for what in wrong)
    assert main(["convert", "verify", str(checkpoint), "--encoder", str(folders[0])]) == 1
    assert main(["convert", "verify", str(checkpoint), "--llm", str(folders[1])]) == 0


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
