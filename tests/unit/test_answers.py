import io
from pathlib import Path

import pytest
from PIL import Image

from pivot_megatron.config.load import load_config
from pivot_megatron.config.shipped import shipped_config
from pivot_megatron.data_prep.synthetic import write_pairs
from pivot_megatron.errors import UserError
from pivot_megatron.recipe.demo_folder import RUNS, Demo
from pivot_megatron.recipe.demo_runs import run_config
from pivot_megatron.recipe.demo_scale import DemoScale
from pivot_megatron.recipe.held_out import (
    HeldOut,
    answer_scores,
    blind_answers,
    is_right,
    preference_scores,
    read_held_out,
)
from pivot_megatron.recipe.phases import Phases


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def pair(task: str, label: str) -> HeldOut:
    return HeldOut(task, png(), f"Which {task}?", f"It is {label}.", "It is not.", label)


@pytest.mark.parametrize(
    ("answer", "label", "right"),
    [
        ("It is red.", "red", True),
        ("Red", "red", True),
        ("The bar has faded: reddish.", "red", False),
        ("It is on the left.", "left", True),
        ("It is 12.", "2", False),
        ("It is a star.", "A", False),
        ("It says A.", "A", True),
        ("It says cat.", "CAT", False),
        ("top left", "left", True),
        ("", "red", False),
    ],
)
def test_an_answer_is_right_if_it_holds_the_label_as_a_word(answer: str, label: str, right: bool) -> None:
    assert is_right(answer, label) is right


def test_scores_are_by_task_in_order() -> None:
    pairs = [pair("scene", "red"), pair("chart", "4"), pair("scene", "blue")]
    scores = answer_scores("m", pairs, ["It is red.", "It is 4.", "It is red."])
    assert [(s.model, s.task, s.correct, s.total) for s in scores] == [("m", "scene", 1, 2), ("m", "chart", 1, 1)]
    ranked = preference_scores("m", pairs, [(-1.0, -3.0), (-2.0, -2.0), (-5.0, -4.0)])
    assert [(s.task, s.correct, s.total, s.mean_margin) for s in ranked] == [("scene", 1, 2, 0.5), ("chart", 0, 1, 0.0)]


def test_blind_answers_are_the_most_frequent_labels() -> None:
    known = [("How many?", "two"), ("How many?", "two"), ("How many?", "three"), ("What color?", "red")]
    assert blind_answers(known, ["How many?", "What color?", "Where?"]) == ["two", "red", "two"]
    assert blind_answers([], ["Where?"]) == [""]


def test_held_out_pairs_lose_the_image_mark(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", 9, seed=5, image_size=48, progress=False)
    found = read_held_out(tmp_path / "pairs")
    assert [one.task for one in found] == ["text", "chart", "scene"] * 3
    assert not any("<image>" in one.question for one in found)
    assert all(is_right(one.chosen, one.label) and not is_right(one.rejected, one.label) for one in found)
    write_pairs(tmp_path / "text", 3, seed=5, image_size=48, progress=False, text_only=1.0)
    with pytest.raises(UserError, match="expected pairs with image, task and label"):
        read_held_out(tmp_path / "text")


def test_a_phase_is_done_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def work() -> dict[str, tuple[int, ...]]:
        calls.append(1)
        return {"found": (1, 2)}

    first = Phases(tmp_path, 1)
    assert first.run("look", work) == {"found": [1, 2]}
    again = Phases(tmp_path, 1)
    assert again.run("look", work) == {"found": [1, 2]}
    assert len(calls) == 1 and again.seconds == first.seconds


def test_work_that_is_only_timed_is_done_again_and_its_time_is_the_firsts(tmp_path: Path) -> None:
    found: list[object] = []

    def work() -> object:
        found.append(object())
        return found[-1]

    first, again = Phases(tmp_path, 1), Phases(tmp_path, 1)
    assert first.timed("look", work) is found[0] and again.timed("look", work) is found[1]
    assert len(found) == 2 and again.seconds == first.seconds


def test_a_phase_that_broke_off_is_done_again_and_its_time_counted(tmp_path: Path) -> None:
    def fails() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Phases(tmp_path, 1).run("look", fails)
    (tmp_path / "look.unfinished").write_text("100.0")
    phases = Phases(tmp_path, 1)
    phases.run("look", lambda: None)
    assert phases.seconds["look"] >= 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["look.json"]


def test_shipped_configs_are_found_and_valid() -> None:
    for name in ("1a_align", "1b_pretrain", "2_dpo", "2_sft"):
        load_config(shipped_config(f"demo/{name}.yaml"))
    with pytest.raises(UserError, match=r"configs/demo/none\.yaml: expected it in"):
        shipped_config("demo/none.yaml")


@pytest.mark.parametrize("folder", ["demo", "true", "a: b, [c]"])
def test_runs_take_their_paths_from_the_demos_folder(folder: str) -> None:
    demo = Demo(Path(folder), 2, DemoScale.smallest())
    configs = {name: run_config(demo, name) for name in RUNS}
    assert [config.out for config in configs.values()] == [Path(folder) / "runs" / name for name in RUNS]
    assert configs["dpo"].model.encoder.checkpoint == configs["pretrain"].out
    assert configs["dpo"].seed == configs["sft"].seed and configs["dpo"].data == configs["sft"].data
    assert all(config.batch.steps == 2 for config in configs.values())


def test_the_control_differs_from_dpo_in_its_objective_alone() -> None:
    demo = Demo(Path("demo"), 2, DemoScale.full())
    dpo, sft = run_config(demo, "dpo"), run_config(demo, "sft")
    assert (dpo.batch, dpo.data, dpo.model, dpo.seed, dpo.layout) == (
        sft.batch,
        sft.data,
        sft.model,
        sft.seed,
        sft.layout,
    )
    assert (dpo.objective.kind, sft.objective.kind) == ("dpo", "sft")
