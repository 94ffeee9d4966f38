"""What `pivot bench peers` makes of its runs: who is compared with whom, what each is given, and what it comes to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from pivot_megatron.bench import peer_runs, report
from pivot_megatron.bench.contenders import contenders, setting_for
from pivot_megatron.bench.flops import PairLengths, pivot_work, step, trl_work
from pivot_megatron.bench.peer_job import Setting, pivot_config, trl_job
from pivot_megatron.bench.peer_runs import PeerRun, child_environment, run_trl
from pivot_megatron.bench.peer_summary import Measured, agreement, results, versus
from pivot_megatron.bench.peers import ON_A_GPU, Comparison, Wanted, compare, flops_by_contender
from pivot_megatron.bench.shapes import shape_by_name
from pivot_megatron.bench.spread import Spread
from pivot_megatron.bench.watched import Slice, Watched
from pivot_megatron.bench.world import World, make_world
from pivot_megatron.cli import main
from pivot_megatron.convert.store import describe
from pivot_megatron.errors import UserError
from pivot_megatron.model.composition import Architecture
from pivot_megatron.plan.hardware import published_configs
from tests.unit.test_peers import line

SHAPE = shape_by_name("tiny")
PAIRS = [PairLengths(30, 5, 9, 14), PairLengths(28, 7, 4, 11)]
SETTING = Setting(steps=2, pairs_a_step=2)
LENGTHS = [PAIRS, PAIRS]
TWO = contenders(["pivot:1", "trl:1"], SETTING)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("peers"), SHAPE, seed=5)


@pytest.fixture(scope="module")
def arch(world: World) -> Architecture:
    return describe(world.checkpoint).architecture()


def test_a_micro_batch_is_padded_to_its_own_longest_row(arch: Architecture) -> None:
    found = contenders(["pivot:2", "trl:1", "trl:2"], SETTING)
    flops = flops_by_contender(arch, [PAIRS], found.values(), epochs=3, on_gpu=False)
    assert flops.keys() == {"pivot:2", "trl:1", "trl:2", f"trl:1{ON_A_GPU}", f"trl:2{ON_A_GPU}"}
    assert flops["pivot:2"] == step(arch, pivot_work(PAIRS), 3)
    assert flops["trl:2"] == step(arch, trl_work(PAIRS, on_gpu=False))
    alone = [step(arch, trl_work([pair], on_gpu=False)) for pair in PAIRS]
    assert flops["trl:1"].total == pytest.approx(alone[0].total + alone[1].total)
    assert flops["trl:1"].total < flops["trl:2"].total
    there = flops_by_contender(arch, [PAIRS], found.values(), epochs=3, on_gpu=True)
    assert there == {name: flops[f"{name}{ON_A_GPU}" if name.startswith("trl") else name] for name in found}


def run(
    seconds: Sequence[float],
    peak: int = 10,
    rates: Sequence[float] = (),
    reference: float = 0.0,
    lines: Sequence[dict[str, float]] = (),
) -> PeerRun:
    """The first of `rates` is of the start."""
    start, *others = rates or [1.0] * (len(seconds) + 1)
    steps = tuple(Slice(*step) for step in zip(seconds, others, strict=True))
    return PeerRun(lines, Watched(Slice(9.0, start), steps, peak), peak, 2, "sdpa", reference)


def round_of(ours: PeerRun, theirs: PeerRun) -> dict[str, PeerRun]:
    return {"pivot:1": ours, "trl:1": theirs}


def test_ratios_are_of_the_runs_of_one_round() -> None:
    rounds = [
        round_of(run([ours, ours]), run([theirs, theirs], peak))
        for ours, theirs, peak in ((1.0, 2.0, 10), (2.0, 8.0, 20), (1.0, 3.0, 40))
    ]
    measured = Measured(rounds, LENGTHS, 1, floor=0.8)
    found = results(measured)
    assert all(one.quiet for one in found.values())
    assert found["pivot:1"].pairs_a_second == Spread(1.0, 2.0, 2.0)
    assert found["trl:1"].tokens_a_second.high == pytest.approx((74 + 67) / 2)
    whole, alike = versus(measured, TWO, found)
    assert (whole.title, alike.title) == ("each at its best", "1 pair a pass")
    assert whole.speed == alike.speed
    assert whole.speed.value == Spread(2.0, 3.0, 4.0)
    assert whole.memory.value == Spread(0.25, 0.5, 1.0)


def test_each_side_stands_at_its_own_best_for_speed_and_for_memory() -> None:
    four = contenders([], SETTING)
    assert list(four) == ["pivot:1", "trl:1", "pivot:2", "trl:2"]
    one = {"pivot:1": run([2.0], 3), "trl:1": run([9.0], 6), "pivot:2": run([1.0], 4), "trl:2": run([10.0], 16)}
    measured = Measured([one], LENGTHS[:1], 1, floor=0.8)
    best, *alike = versus(measured, four, results(measured))
    assert (best.speed.ours, best.speed.theirs, best.speed.value.median) == ("pivot:2", "trl:1", 9.0)
    assert (best.memory.ours, best.memory.theirs, best.memory.value.median) == ("pivot:1", "trl:1", 0.5)
    assert [one.title for one in alike] == ["1 pair a pass", "2 pairs a pass"]
    assert [one.speed.value.median for one in alike] == [4.5, 10.0]
    assert [one.memory.value.median for one in alike] == [0.5, 0.25]


def test_what_was_timed_on_a_busy_machine_is_left_out() -> None:
    rounds = [
        round_of(run([2.0, 9.0], rates=[1.0, 0.9, 0.7]), run([50.0, 10.0], rates=[0.1, 0.7, 0.8])),
        round_of(run([4.0, 9.0], rates=[1.0, 0.8, 0.1]), run([50.0, 60.0], rates=[1.0, 0.7, 0.7])),
    ]
    measured = Measured(rounds, LENGTHS, 1, floor=0.8)
    found = results(measured)
    assert {name: (one.quiet, one.steps) for name, one in found.items()} == {
        "pivot:1": (True, (2, 4)),
        "trl:1": (True, (1, 4)),
    }
    assert found["pivot:1"].pairs_a_second == Spread(0.5, 0.75, 1.0)
    ratio = versus(measured, TWO, found)[0].speed
    assert (ratio.quiet, ratio.value) == (True, Spread(5.0, 5.0, 5.0))


def test_a_machine_that_was_never_quiet_is_told_of() -> None:
    rounds = [round_of(run([2.0], rates=[1.0, 0.9]), run([8.0], rates=[1.0, 0.7]))]
    measured = Measured(rounds, LENGTHS[:1], 1, floor=0.8)
    found = results(measured)
    assert (found["pivot:1"].quiet, found["trl:1"].quiet) == (True, False)
    assert found["trl:1"].steps == (0, 1)
    ratio = versus(measured, TWO, found)[0].speed
    assert (ratio.quiet, ratio.value) == (False, Spread(4.0, 4.0, 4.0))


def test_the_reference_pass_is_shared_by_epochs_and_taken_from_quiet_starts() -> None:
    rounds = [
        round_of(run([1.0], reference=2.0), run([6.0], rates=[0.1, 1.0])),
        round_of(run([1.0], rates=[0.1, 1.0], reference=99.0), run([6.0])),
    ]
    measured = Measured(rounds, LENGTHS[:1], 4, floor=0.8)
    found = results(measured)
    assert found["pivot:1"].reference_seconds == 2.0
    assert found["trl:1"].quiet  # the start of a run that has no pass of its own says nothing of it
    assert versus(measured, TWO, found)[0].speed.value == Spread(3.0, 3.0, 3.0)  # 1 s, 2 pairs of 2 s / 4


def test_agreement_is_of_any_of_ours_with_any_of_theirs() -> None:
    four = contenders([], SETTING)
    one = {name: run([1.0], lines=[line()]) for name in four}
    one["trl:2"] = run([1.0], lines=[line(loss=0.7)])
    assert agreement(Measured([one], LENGTHS[:1], 1, 0.8), four)["loss"] == pytest.approx(0.01 / 0.7)


@pytest.mark.parametrize(
    ("named", "told"),
    [
        (
            ["pivot:1", "torch:1"],
            "expected pivot:PAIRS or trl:PAIRS with PAIRS a divisor of the 2 pairs of a step, found torch:1",
        ),
        (["pivot:1", "trl:3"], "found trl:3"),
        (["pivot:1", "trl"], "found trl"),
        (["pivot:0", "trl:1"], "found pivot:0"),
        (["pivot:1", "pivot:2"], "expected one of each side at least, found none of trl; add trl:2"),
    ],
)
def test_settings_that_are_none(named: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        contenders(named, SETTING)


@pytest.mark.parametrize("pairs", [1, 2])
def test_both_sides_take_so_many_pairs_a_pass(world: World, tmp_path: Path, pairs: int) -> None:
    setting = Setting(steps=2, pairs_a_step=2, micro_batch=pairs, threads=3)
    tree = pivot_config(world, setting, tmp_path)
    assert tree["batch"]["micro_images"] == pairs
    assert tree["batch"]["micro_tokens"] == pairs * tree["data"]["sequence_length"]
    assert tree["layout"] == {"cpu_threads": 3}
    assert trl_job(world, setting, tmp_path)["micro_batch"] == pairs


def test_what_both_sides_are_given_on_a_gpu(world: World, tmp_path: Path) -> None:
    shape = shape_by_name("so400m_0.5b")
    setting = setting_for(shape, 4, cores=16, gpus=2, flash_attention=False)
    assert (setting.precision, setting.trl_attention, setting.threads) == ("bf16", "sdpa", 16)
    assert setting_for(shape, 4, cores=16, gpus=2, flash_attention=True).trl_attention == "flash_attention_2"
    assert pivot_config(world, setting, tmp_path)["precision"] == {"compute": "bf16"}
    assert trl_job(world, setting, tmp_path)["precision"] == "bf16"
    assert list(contenders([], setting)) == ["pivot:1", "trl:1", "pivot:8", "trl:8"]
    here = setting_for(shape, 4, cores=2, gpus=0, flash_attention=True)
    assert (here.precision, here.trl_attention) == ("fp32", "sdpa")


@pytest.mark.parametrize("head", ["0.5b", "1.5b"])
def test_shapes_for_a_gpu_have_the_published_widths(head: str) -> None:
    shape = shape_by_name(f"so400m_{head}")
    encoder = published_configs("encoders")["siglip2-so400m-patch16-384"]
    llm = published_configs("heads")[f"qwen2.5-{head}"]
    names = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    found = (shape.encoder_hidden, shape.encoder_layers, shape.encoder_heads, shape.encoder_ffn)
    assert (shape.image_size, shape.patch_size, *found) == tuple(encoder[name] for name in names)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    found = (shape.head_hidden, shape.head_layers, shape.head_heads, shape.head_kv_heads, shape.head_ffn)
    assert (*found, shape.vocabulary) == tuple(llm[name] for name in (*names, "vocab_size"))


def test_both_sides_have_the_same_threads_and_one_gpu_whatever_is_inherited() -> None:
    inherited = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "7", "CUDA_VISIBLE_DEVICES": "3,1", "HOME": "/here"}
    found = child_environment(inherited, threads=4, gpus=2, more={})
    assert (found["OMP_NUM_THREADS"], found["MKL_NUM_THREADS"], found["HOME"]) == ("4", "4", "/here")
    assert found["CUDA_VISIBLE_DEVICES"] == "3"
    assert child_environment({}, 4, 2, {})["CUDA_VISIBLE_DEVICES"] == "0"
    assert "CUDA_VISIBLE_DEVICES" not in child_environment({}, 4, 0, {})
    assert child_environment(inherited, 4, 0, {"MALLOC_ARENA_MAX": "1"})["MALLOC_ARENA_MAX"] == "1"


@pytest.mark.parametrize(("gpus", "peak"), [(0, 10), (1, 77)])
def test_peak_memory_is_the_gpus_where_there_is_one(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, peak: int
) -> None:
    out = tmp_path / "trl"

    def watched(
        command: Sequence[str], metrics: Path, steps: int, log: Path, environment: object, rate: object
    ) -> Watched:
        metrics.write_text('{"peak_bytes": 70}\n{"peak_bytes": 77}\n')
        (out / "environment.json").write_text('{"threads": 2, "attention": "sdpa"}')
        return run([1.0]).watched

    monkeypatch.setattr(peer_runs, "run_watched", watched)
    monkeypatch.setattr(peer_runs, "device_count", lambda: gpus)
    found = run_trl(Path("python"), world, SETTING, out)
    assert (found.peak_bytes, found.threads, found.attention) == (peak, 2, "sdpa")


def comparison(arch: Architecture, **changes: object) -> Comparison:
    """Of one round, in which ours took a second a step and TRL's four; peaks of 1 and 4 GiB."""
    found = contenders(["pivot:1", "trl:2"], SETTING)
    rounds = [{"pivot:1": run([1.0], 1 << 30, reference=0.25), "trl:2": run([4.0], 4 << 30, rates=[1.0, 0.5])}]
    measured = Measured(rounds, LENGTHS[:1], 1, floor=0.8)
    made = results(measured)
    flops = flops_by_contender(arch, LENGTHS[:1], found.values(), 1, on_gpu=False)
    wanted = Wanted(SHAPE, [], 1, 2, 1, {"MALLOC_ARENA_MAX": "1"}, Path("out"))
    return Comparison(wanted, found, 3e12, rounds, made, versus(measured, found, made), flops, 1.5e12, {"loss": 1e-6})


def test_the_page_says_what_was_run_and_what_came_of_it(arch: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = report.as_text(comparison(arch)).splitlines()
    assert lines[0].startswith("`tiny`: 2 pairs a step, timed steps a run: 1, rounds: 1, fp32")
    assert "- pivot: threads: 2; attention: sdpa" in lines
    assert "- trl: threads: 2; attention: sdpa; MALLOC_ARENA_MAX=1" in lines
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    cells = {
        name: row for name, *row in reversed(rows)
    }  # the operations by count, which stand last, have rows of the same names
    # 1 s a step and a quarter of a second a pair: 2 pairs in 1.5 s, in which 1.5 TFLOP are needed of the 3 TFLOP/s that there are
    assert cells["pivot:1"][0] == "1.33 [1.33, 1.33]"
    assert cells["pivot:1"][2:4] == ["1 [1, 1]", "33.3%"]
    assert cells["trl:2"][-1] == "0 of 1, busy"
    assert cells["each at its best"] == ["2.67x [2.67, 2.67] (pivot:1, trl:2, busy)", "25% [25%, 25%] (pivot:1, trl:2)"]
    assert any("resident memory" in line for line in lines)
    monkeypatch.setattr(report, "device_name", lambda: "NVIDIA H100")
    told = report.as_text(comparison(arch))
    assert "NVIDIA H100" in told and "a GPU's tensors" in told and "resident" not in told


def test_the_json_holds_every_run_and_what_each_side_computed_with(arch: Architecture) -> None:
    tree = json.loads(report.as_json(comparison(arch)))
    assert tree["sides"]["trl"] == {"threads": [2], "attention": ["sdpa"], "environment": {"MALLOC_ARENA_MAX": "1"}}
    assert tree["contenders"]["trl:2"]["setting"]["micro_batch"] == 2
    assert tree["rounds"][0]["pivot:1"]["watched"]["steps"] == [{"seconds": 1.0, "rate": 1.0}]
    assert tree["results"]["pivot:1"]["reference_seconds"] == 0.25
    assert (
        tree["flops"]["pivot:1"]["total"]
        == step(arch, pivot_work(PAIRS[:1])).total + step(arch, pivot_work(PAIRS[1:])).total
    )


@pytest.mark.parametrize("given", ["MALLOC_ARENA_MAX", "=1"])
def test_a_variable_has_a_name_and_a_value(tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str) -> None:
    assert main(["bench", "peers", "--shape", "tiny", "--out", str(tmp_path / "b"), f"--trl-environment={given}"]) == 2
    assert capsys.readouterr().err == f"pivot: --trl-environment: expected KEY=VALUE, found {given}\n"


def test_nothing_that_stands_in_the_folder_is_touched(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="already has files in it"):
        compare(Wanted(SHAPE, [], 1, 2, 1, {}, tmp_path), say=print)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(("rounds", "steps"), [(0, 4), (1, 1)])
def test_numbers_that_measure_nothing(tmp_path: Path, rounds: int, steps: int) -> None:
    with pytest.raises(UserError, match=f"found {rounds} and {steps}"):
        compare(Wanted(SHAPE, [], rounds, steps, 1, {}, tmp_path / "out"), say=print)


def test_an_unknown_shape_is_named() -> None:
    with pytest.raises(
        UserError, match=r"expected one of vocabulary, body, so400m_0\.5b, so400m_1\.5b, tiny, found big"
    ):
        shape_by_name("big")
