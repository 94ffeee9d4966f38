"""Machines by name and from files, and the models that plans know."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pivot_megatron.config.schema import Fp8, Precision
from pivot_megatron.errors import UserError
from pivot_megatron.plan import hardware
from pivot_megatron.plan.hardware import gpu, gpu_names, known_architecture, published_configs
from pivot_megatron.plan.machine import Roofline, read_machine, require_rates, write_machine
from tests.plans import alike

CONSTANTS = yaml.safe_load((Path(hardware.__file__).parent / "hardware.yaml").read_text())


def test_every_gpu_has_its_source_and_sensible_rates() -> None:
    assert set(gpu_names()) == {"a100", "h100", "h200", "b200"} == set(CONSTANTS["gpus"])
    for name in gpu_names():
        sheet = CONSTANTS["gpus"][name]
        assert "data sheet (20" in sheet["source"]
        assert {"gibibytes", "network_gigabytes_a_second"} <= sheet["besides"].keys() < sheet.keys()
        assert all(told(text) for text in sheet["besides"].values())
        machine = gpu(name)
        assert CONSTANTS["gpus"][name]["source"] in machine.source
        rates = machine.rates_of(8)
        assert rates.gemm["bf16"].flops < rates.peak["bf16"] and rates.attention["bf16"].backward < rates.peak["bf16"]
        assert (
            machine.network is not None
            and machine.network.send.bandwidth < machine.node.send.bandwidth < rates.elementwise
        )
        assert machine.memory < CONSTANTS["gpus"][name]["gibibytes"] * 2**30


def told(text: str) -> bool:
    """Whether it says where a figure is from, or that it is assumed and why."""
    kind, _, why = text.partition(": ")
    return kind in ("assumed", "source") and len(why.split()) > 2


def test_every_assumption_has_its_reason() -> None:
    assert CONSTANTS["reasons"].keys() == {*CONSTANTS["assumptions"], "lengths", "rings"}
    assert [name for name, text in CONSTANTS["reasons"].items() if not told(text)] == []


def test_a_kernel_takes_the_longer_of_its_products_and_its_traffic() -> None:
    line = Roofline(flops=100.0, bandwidth=10.0, seconds=1.0)
    assert line.time(200, 10) == 3.0 and line.time(200, 50) == 6.0


def test_links_by_where_ranks_stand() -> None:
    machine = gpu("h100")
    node, network = machine.node, machine.network
    # (devices, apart, world): tensor ranks, then replicas eight apart, then a pipeline over two nodes.
    assert machine.pairs(8, 1, 64) is node and machine.pairs(16, 1, 64) is network
    assert machine.pairs(2, 4, 64) is node and machine.pairs(2, 8, 64) is network
    assert machine.pairs(4, 4, 16) is network  # two neighbours of the four are on one node, and two on two
    assert machine.pairs(3, 1, 6) is node and machine.pairs(3, 1, 12) is network  # ranks 6 to 8 are on two
    assert machine.links(8, 1, 64) is node


@pytest.mark.parametrize(
    ("devices", "apart", "ports"),
    [(64, 1, 8), (32, 2, 4), (16, 4, 2), (8, 8, 1), (4, 16, 1), (12, 1, 4), (3, 1, 1), (32, 3, 2)],
)
def test_a_group_over_nodes_has_a_network_port_for_each_member_on_a_node(devices: int, apart: int, ports: int) -> None:
    """The bandwidth of a rank's collectives; up to the node's own, which is nine of eight ports here and then three."""
    machine = gpu("h100")
    assert machine.network is not None
    one, send = machine.network.gather.bandwidth, machine.network.send
    assert machine.node.gather.bandwidth == pytest.approx(9 * one)
    slow = replace(machine, node=alike(machine.node.gather.changed(15e-6, 3)))
    for kind in ("gather", "scatter", "reduce"):
        found = machine.links(devices, apart, 192).of(kind)  # type: ignore[arg-type]
        assert found.bandwidth == pytest.approx(ports * one)
        capped = slow.links(devices, apart, 192).of(kind)  # type: ignore[arg-type]
        assert capped.bandwidth == pytest.approx(min(3, ports) * one)
    assert machine.links(devices, apart, 192).send is send


def test_the_more_nodes_the_longer_a_collective_takes_to_begin() -> None:
    """A ring has a step from each node to the next, a tree as many as its height; each is what two nodes take over one."""
    machine = gpu("h100")
    step = 30e-6 - 15e-6
    for nodes, height in ((2, 1), (3, 2), (4, 2), (64, 6)):
        links = machine.links(8 * nodes, 1, 8 * nodes)
        assert links.gather.seconds == links.scatter.seconds == pytest.approx(15e-6 + (nodes - 1) * step)
        assert links.reduce.seconds == pytest.approx(15e-6 + height * step)
        assert links.send.seconds == pytest.approx(30e-6)


def test_a_network_that_was_not_measured_is_not_made_up() -> None:
    machine = replace(gpu("h100"), network=None)
    assert machine.links(2, 1, 8) is machine.node
    with pytest.raises(
        UserError, match=r"expected devices of one node, up to 8, found 16: the network between nodes was not"
    ):
        machine.links(2, 8, 16)


def test_rates_that_a_machine_lacks_are_named() -> None:
    with pytest.raises(UserError, match="has no rate of products in fp8, it has bf16, fp32"):
        require_rates(gpu("a100"), Precision(fp8=Fp8("tensorwise")))


def test_rates_by_how_many_compute_side_by_side() -> None:
    machine = gpu("h100")
    slow = replace(machine.rates[1], launch=1.0)
    shared = replace(machine, rates={1: machine.rates[1], 4: slow})
    assert [shared.rates_of(n).launch == 1.0 for n in (1, 3, 4, 64)] == [False, False, True, True]


def test_a_file_holds_a_machine_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "machine.yaml"
    write_machine(gpu("b200"), path)
    assert read_machine(path) == gpu("b200")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: tree.pop("node"), r"machine\.yaml: node: Field required"),
        (lambda tree: tree.update(cores=2), r"machine\.yaml: cores: Unexpected keyword argument"),
        (lambda tree: tree.update(memory="much"), r"machine\.yaml: memory: .*number"),
    ],
)
def test_wrong_machine_files_are_refused_by_key(tmp_path: Path, change: Any, said: str) -> None:
    path = tmp_path / "machine.yaml"
    write_machine(gpu("h100"), path)
    tree = yaml.safe_load(path.read_text())
    change(tree)
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=said) as refusal:
        read_machine(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", [None, "{", "7"])
def test_files_that_are_no_machine_are_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "machine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"machine\.yaml: .*`pivot bench calibrate`") as refusal:
        read_machine(path)
    assert "\n" not in str(refusal.value)


def test_every_published_size_is_an_architecture() -> None:
    encoders, heads = (published_configs(kind) for kind in ("encoders", "heads"))
    for encoder in encoders:
        found = known_architecture(encoder, "qwen2.5-0.5b").encoder
        name = encoder.replace("2", "").replace("vit-mae", "mae")
        assert name.startswith(found.family.rstrip("2")) and found.tokens in (196, 256, 576, 729, 1369)
    assert {"dinov2", "clip", "vit", "mae", "moco"} < {
        known_architecture(e, "qwen3-8b").encoder.family for e in encoders
    }
    for head in heads:
        assert known_architecture("siglip2-base-patch16-384", head).head.layers == heads[head]["num_hidden_layers"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: gpu("h1000"), "--gpu: expected one of a100, h100, h200, b200, found h1000"),
        (lambda: known_architecture("vit", "qwen2.5-7b"), "--encoder: expected one of siglip2-base.*, found vit"),
        (
            lambda: known_architecture("siglip2-base-patch16-384", "gpt"),
            "--head: expected one of qwen2.5-0.5b.*found gpt",
        ),
    ],
)
def test_unknown_names_are_refused(call: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        call()
