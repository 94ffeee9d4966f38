"""What a comparison's page and JSON have of its runs themselves: their curves, their answers and their settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pivot_megatron.recipe.answers_page import shown_examples
from pivot_megatron.recipe.comparison import START, Member
from pivot_megatron.recipe.held_out import HeldOut, is_right
from pivot_megatron.recipe.run_facts import curves, settings_section
from pivot_megatron.report.page import Charts, Fold, Section
from pivot_megatron.report.panels import Curve, Panel, colours, run_panels

_SHOWN = ("loss", "reward_margin", "reward_accuracy")


def training_sections(every: Sequence[Member]) -> list[Section]:
    """Of each count, a panel a metric and variant, in which its seeds share the variant's colour. Reads the runs' folders."""
    slots = colours([START, *(member.variant for member in every)])
    counts = list(dict.fromkeys(member.count for member in every))
    return [_training([one for one in every if one.count == count], slots) for count in counts]


def _training(members: Sequence[Member], slots: Mapping[str, int]) -> Section:
    """Of one count."""
    shown: list[Panel] = []
    folded: list[Panel] = []
    names = dict.fromkeys(member.variant for member in members)
    found = {
        name: curves({f"seed {one.seed}": one.config.out for one in members if one.variant == name}) for name in names
    }
    for metric in dict.fromkeys(key for seeds in found.values() for metrics in seeds.values() for key in metrics):
        for name, seeds in found.items():
            lines: dict[str, Curve] = {seed: metrics[metric] for seed, metrics in seeds.items() if metric in metrics}
            title = f"{name}: {metric}"
            panels = run_panels({title: lines}, {title: slots[name]}, [list(lines)])
            (shown if metric in _SHOWN else folded).extend(panels)
    count = members[0].count
    title = "Training" if count is None else f"Training on {count:,} samples"
    lead = (
        "Over the optimizer step, a line a seed; beside a seed its first and its last value. Losses of different objectives are "
        "no measure of one another."
    )
    return Section(title, [Charts(shown), Fold("Other metrics", [Charts(folded)])], lead)


def runs_section(every: Sequence[Member]) -> Section:
    variants = dict.fromkeys(member.variant for member in every)
    return settings_section({name: [one.config for one in every if one.variant == name] for name in variants})


def examples_told(pairs: Sequence[HeldOut], texts: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """The page's examples for JSON. `texts`: answers to `pairs`, by model."""
    return [
        {
            "task": pairs[n].task,
            "question": pairs[n].question,
            "chosen": pairs[n].chosen,
            "answers": {
                name: {"text": answers[n], "right": is_right(answers[n], pairs[n].label)}
                for name, answers in texts.items()
            },
        }
        for n in shown_examples(pairs)
    ]
