"""Who is compared with whom: either trainer, at a micro-batch of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from pivot_megatron.bench.peer_job import Setting
from pivot_megatron.bench.shapes import Shape
from pivot_megatron.errors import UserError

Side = Literal["pivot", "trl"]
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True)
class Contender:
    """`name` is what `--settings` calls it: the side, and the pairs in one forward pass."""

    side: Side
    setting: Setting

    @property
    def name(self) -> str:
        return f"{self.side}:{self.setting.micro_batch}"


def setting_for(shape: Shape, steps: int, cores: int, gpus: int, flash_attention: bool) -> Setting:
    """What both sides are given on a machine: bf16 on a GPU, with flash-attn for TRL too where it is installed, fp32 without."""
    return Setting(
        steps,
        shape.pairs_a_step,
        precision="bf16" if gpus else "fp32",
        threads=cores,
        trl_attention="flash_attention_2" if gpus and flash_attention else "sdpa",
    )


def contenders(named: Sequence[str], setting: Setting) -> dict[str, Contender]:
    """By name, in the order they run in. None named: either side with one pair in a forward pass, and with all of a step's.

    Raises UserError for a name that is none, and where a side has no contender.
    """
    whole = setting.pairs_a_step
    names = named or [f"{side}:{pairs}" for pairs in sorted({1, whole}) for side in SIDES]
    made = [_contender(name, setting) for name in names]
    if missing := [side for side in SIDES if all(one.side != side for one in made)]:
        raise UserError(
            f"bench peers: --settings: expected one of each side at least, found none of {missing[0]}; add {missing[0]}:{whole}"
        )
    return {one.name: one for one in made}


def _contender(name: str, setting: Setting) -> Contender:
    side, _, pairs = name.partition(":")
    whole = setting.pairs_a_step
    if side not in SIDES or not pairs.isdecimal() or not int(pairs) or whole % int(pairs):
        raise UserError(
            f"bench peers: --settings: expected {' or '.join(f'{side}:PAIRS' for side in SIDES)} with PAIRS a divisor of the "
            f"{whole} pairs of a step, found {name}"
        )
    return Contender(side, replace(setting, micro_batch=int(pairs)))  # type: ignore[arg-type]
