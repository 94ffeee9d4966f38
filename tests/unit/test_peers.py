"""What `pivot bench peers` computes from runs: operation counts, ratios and their spread, agreement."""

from __future__ import annotations

import math
import os
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from pivot_megatron.bench.agreement import largest_differences, rounding
from pivot_megatron.bench.flops import PairLengths, pivot_work, step, trl_work
from pivot_megatron.bench.peer_job import Setting, pair_lengths, write_pairs_in_order
from pivot_megatron.bench.shapes import shape_by_name
from pivot_megatron.bench.watched import run_watched
from pivot_megatron.bench.world import World, make_world
from pivot_megatron.convert.store import describe
from pivot_megatron.errors import RunError
from pivot_megatron.model.composition import Architecture
from pivot_megatron.model.flops import Flops, Work, backward, forward

SHAPE = shape_by_name("tiny")
PAIRS = [PairLengths(30, 5, 9, 14), PairLengths(28, 7, 4, 11)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("peers"), SHAPE, seed=5)


@pytest.fixture(scope="module")
def arch(world: World) -> Architecture:
    return describe(world.checkpoint).architecture()


def counted(world: World, rows: int, length: int, train: bool) -> int:
    """What torch counts in transformers' own model, over rows of one image each and `length` tokens."""
    model = LlavaForConditionalGeneration.from_pretrained(world.llava, attn_implementation="eager")
    image_token = model.config.image_token_id
    ids = torch.full((rows, length), 7)
    ids[:, 3 : 3 + SHAPE.image_tokens] = image_token
    pixels = torch.rand(rows, 3, SHAPE.image_size, SHAPE.image_size)
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, pixel_values=pixels).logits
        if train:
            logits.square().mean().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("rows", [1, 3])
def test_forward_is_what_torch_counts(world: World, arch: Architecture, rows: int) -> None:
    work = Work(images=rows, tokens=rows * 20, scores=rows * 20**2, scored=rows * 20, last=rows * 20)
    assert forward(arch, work).total == counted(world, rows, 20, train=False)


def test_backward_is_what_torch_counts(world: World, arch: Architecture) -> None:
    forwards = forward(arch, Work(images=2, tokens=40, scores=2 * 20**2, scored=40, last=40))
    assert (forwards + backward(forwards)).total == counted(world, 2, 20, train=True)


def test_work_of_either_layout() -> None:
    ours = pivot_work(PAIRS)  # 44 and 39 tokens, filled to a multiple of 16
    scores = 35**2 + 9 * 39 + 35**2 + 4 * 32 + 13**2
    assert ours == Work(images=2, tokens=96, scores=scores, scored=25, last=25)
    assert trl_work(PAIRS, on_gpu=True) == Work(images=4, tokens=4 * 39, scores=4 * 39**2, scored=25, last=4 * 39)
    assert trl_work(PAIRS, on_gpu=False).scored == 4 * 38


def test_a_step_is_four_forwards_five_of_the_logits_and_three_of_the_patches(arch: Architecture) -> None:
    once = forward(arch, pivot_work(PAIRS))
    whole = step(arch, pivot_work(PAIRS))
    assert whole.layers == 4 * once.layers
    assert whole.logits == 5 * once.logits
    assert whole.patches == 3 * once.patches
    assert whole.total == pytest.approx(4 * once.total + once.logits - once.patches)
    assert whole.scaled(0.5).total == pytest.approx(whole.total / 2)
    assert (once + Flops(logits=1.0)).logits == once.logits + 1


def line(**changes: float) -> dict[str, float]:
    names = ("loss", "chosen_logps", "rejected_logps", "grad_norm", "chosen_rewards", "rejected_rewards")
    values = {"loss": 0.69, "chosen_logps": -300.0, "rejected_logps": -320.0, "grad_norm": 2.0}
    return dict.fromkeys(names, 0.0) | {"reward_margin": 0.0} | values | changes


def test_differences_are_relative_and_the_largest_of_all_steps() -> None:
    wanted = [line(), line(grad_norm=4.0)]
    found = [line(grad_norm=2.02), line(grad_norm=4.4)]
    worst = largest_differences(found, wanted, beta=0.1)
    assert worst["grad_norm"] == pytest.approx(0.1)
    assert worst["loss"] == worst["reward_margin"] == 0.0


def test_a_reward_may_differ_by_rounding_alone() -> None:
    room = rounding(line(), beta=0.1)
    assert 0 < room < 1e-4
    assert largest_differences([line(reward_margin=room)], [line()], 0.1)["reward_margin"] == 0.0
    assert largest_differences([line(reward_margin=2 * room)], [line()], 0.1)["reward_margin"] == math.inf
    wanted = line(reward_margin=1.0)
    apart = largest_differences([line(reward_margin=1.0 + 1e-3)], [wanted], 0.1)["reward_margin"]
    assert apart == pytest.approx(1e-3, rel=0.1)


def test_a_value_that_is_not_finite_is_no_agreement() -> None:
    assert largest_differences([line(loss=math.nan)], [line()], 0.1)["loss"] == math.inf
    with pytest.raises(ValueError, match="2 steps against 1"):
        largest_differences([line(), line()], [line()], 0.1)


def test_pairs_stand_in_our_order_with_the_template_written_out(world: World, tmp_path: Path) -> None:
    setting = Setting(steps=3, pairs_a_step=2)
    lines = write_pairs_in_order(world, setting, tmp_path).read_text().splitlines()
    assert len(lines) == 6
    assert lines[0].count("<image>") == 1
    lengths = pair_lengths(world, setting)
    assert [len(pairs) for pairs in lengths] == [2, 2, 2]
    low, high = SHAPE.words
    for pair in chain.from_iterable(lengths):
        assert pair.prefix > SHAPE.image_tokens
        assert low + 1 <= pair.chosen <= 3 * high  # a word is a token or a few, and the end mark is one
        assert pair.scored == pair.chosen + pair.rejected


def child(metrics: Path, body: str) -> list[str]:
    """A process that writes a line a step with `step()`."""
    code = f"import sys, time\ndef step():\n with open({str(metrics)!r}, 'a') as f: f.write('1\\n')\n{body}"
    return [sys.executable, "-c", code]


def test_memory_counts_up_to_the_last_step_alone(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    body = "a = bytearray(b'x' * (60 << 20)); time.sleep(0.5)\nstep(); time.sleep(0.5)\n"
    body += "b = bytearray(b'x' * (200 << 20)); time.sleep(0.5)"
    found = run_watched(child(metrics, body), metrics, 1, tmp_path / "log", os.environ, rate=lambda: 1.0)
    assert 60 << 20 < found.peak_bytes < 200 << 20


def test_a_step_is_timed_without_the_looks_at_the_machine(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    rates = iter([5.0, 4.0, 3.0, 9.0])

    def rate() -> float:
        time.sleep(0.6)  # the child stands still meanwhile, or it would be through
        return next(rates)

    # A busy loop by the processor's clock, which stands still with the process.
    body = "def busy(s):\n end = time.process_time() + s\n while time.process_time() < end: pass\n"
    body += "busy(0.3); step(); busy(0.3); step(); busy(0.3); step()"
    began = time.monotonic()
    found = run_watched(child(metrics, body), metrics, 3, tmp_path / "log", os.environ, rate)
    took = time.monotonic() - began
    assert [part.rate for part in found.slices] == [4.0, 3.0, 3.0]
    assert all(part.seconds > 0.25 for part in found.slices)
    assert sum(part.seconds for part in found.slices) < took - 4 * 0.6


def test_a_run_that_ends_early_is_no_run(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    with pytest.raises(RunError, match="made 1 of 2 steps"):
        run_watched(child(metrics, "step(); time.sleep(0.3)"), metrics, 2, tmp_path / "log", os.environ, lambda: 1.0)


def test_a_failed_run_says_what_it_said(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    with pytest.raises(RunError, match="no such thing"):
        run_watched(command, tmp_path / "metrics.jsonl", 1, tmp_path / "log", os.environ, lambda: 1.0)
