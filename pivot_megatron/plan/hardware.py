"""GPUs by name, from their data sheets and from what is assumed of all of them: `hardware.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from pivot_megatron.errors import UserError
from pivot_megatron.families.registry import encoder_architecture, head_architecture
from pivot_megatron.model.composition import Architecture
from pivot_megatron.plan.machine import Attention, Link, Links, Machine, Rates, Roofline

GIB = 2.0**30
_FOLDER = Path(__file__).parent


@cache
def _constants(name: str) -> Any:
    return yaml.safe_load((_FOLDER / name).read_text())


def gpu_names() -> tuple[str, ...]:
    return tuple(_constants("hardware.yaml")["gpus"])


def gpu(name: str) -> Machine:
    """Raises UserError for one that `hardware.yaml` does not have."""
    sheets, assumed = _constants("hardware.yaml")["gpus"], _constants("hardware.yaml")["assumptions"]
    if name not in sheets:
        raise UserError(f"--gpu: expected one of {', '.join(sheets)}, found {name}; --machine takes a file of your own")
    sheet, pauses = sheets[name], {k: v * 1e-6 for k, v in assumed["microseconds"].items()}
    bandwidth = sheet["memory_gigabytes_a_second"] * 1e9 * assumed["memory_share"]
    peak = {dtype: rate * 1e12 for dtype, rate in sheet["teraflops"].items()}

    def attention(of: float) -> Attention:
        shares: Mapping[str, float] = assumed["attention_share"]
        return Attention(of * shares["forward"], of * shares["backward"], 0.0)

    def links(kind: str) -> Links:
        one = Link.of(pauses[kind], sheet[f"{kind}_gigabytes_a_second"] * 1e9 * assumed["link_share"])
        return Links(one, one, one, one)

    return Machine(
        name=sheet["name"],
        source=f"{sheet['source']}; assumptions of hardware.yaml",
        devices_a_node=assumed["gpus_a_node"],
        memory=sheet["gibibytes"] * GIB * assumed["usable_share"],
        process=assumed["process_gibibytes"] * GIB,
        rates={
            1: Rates(
                peak=peak,
                gemm={
                    dtype: Roofline(rate * assumed["gemm_share"][dtype], bandwidth, pauses["kernel"])
                    for dtype, rate in peak.items()
                },
                attention={dtype: attention(peak[dtype]) for dtype in ("bf16", "fp32")},
                elementwise=bandwidth,
                update=bandwidth,
                launch=pauses["kernel"],
            )
        },
        node=links("link"),
        network=links("network"),
        logits_tile=assumed["logits_tile_mebibytes"] * 2.0**20,
        transformer_engine=True,
        reduction_copy=0.0,
        fp8_transposes=sheet.get("fp8_transposes", True),
        images_a_second=assumed["loader"]["cores_a_gpu"] * assumed["loader"]["images_a_second_a_core"],
    )


def assumed_lengths(kind: str) -> Mapping[str, int]:
    """Tokens of a `pair`, `conversation` or `caption`, an image's not counted."""
    found: Mapping[str, int] = _constants("hardware.yaml")["lengths"][kind]
    return found


def usable_share() -> float:
    """Of a GPU's memory, what is taken to be fillable."""
    return float(_constants("hardware.yaml")["assumptions"]["usable_share"])


def published_configs(kind: str) -> dict[str, dict[str, Any]]:
    """`config.json` of `encoders` or `heads`, by name."""
    return {name: dict(config) for name, config in _constants("models.yaml")[kind].items()}


def known_architecture(encoder: str, head: str) -> Architecture:
    """Raises UserError for a name that `models.yaml` does not have."""
    configs = {}
    for kind, name, option in (("encoders", encoder, "--encoder"), ("heads", head, "--head")):
        known = published_configs(kind)
        if name not in known:
            raise UserError(f"{option}: expected one of {', '.join(known)}, found {name}")
        configs[kind] = known[name]
    vision = encoder_architecture(configs["encoders"], encoder)
    return Architecture(vision, head_architecture(configs["heads"], head), vision.feature_layer)
