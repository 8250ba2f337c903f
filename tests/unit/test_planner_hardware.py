"""The table of GPUs and links is whole, each figure has a source, and names are found."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import orpo_ray.planner
from orpo_ray.errors import ConfigError
from orpo_ray.planner.hardware import (
    find_gpus,
    find_network,
    find_server_link,
    load_gpus,
)

TABLE: dict[str, Any] = yaml.safe_load(
    (Path(orpo_ray.planner.__file__).parent / "hardware.yaml").read_text(encoding="utf-8")
)
FIGURES = {"memory_gib", "half_tflops", "float_tflops", "bandwidth_gbs", "bf16", "fp4", "link"}
SEEN = {"read", "quoted", "computed", "estimated", "unread"}
# The list of the issue.
ASKED = [
    "rtx3050",
    "rtx3060",
    "rtx3090",
    "rtx4060ti",
    "rtx4070",
    "rtx4090",
    "rtx5080",
    "rtx5090",
    "t4",
    "l4",
    "a10",
    "a10g",
    "l40s",
    "a100-40",
    "a100-80",
    "h100-pcie",
    "h100-sxm",
    "h200",
    "b200",
]


def figures() -> list[tuple[str, dict[str, Any]]]:
    found = [
        (f"{group}.{name}.{key}", figure)
        for group in ("gpus", "server_links", "networks")
        for name, entry in TABLE[group].items()
        for key, figure in entry.items()
        if key not in ("title", "also")
    ]
    assert len(found) > 180
    return found


def test_the_table_has_the_gpus_that_were_asked_for():
    assert set(ASKED) <= set(load_gpus())


@pytest.mark.parametrize("name", TABLE["gpus"])
def test_a_gpu_has_every_figure(name):
    assert set(TABLE["gpus"][name]) - {"also"} == FIGURES | {"title"}


@pytest.mark.parametrize(("where", "figure"), figures(), ids=lambda item: str(item)[:60])
def test_a_figure_has_a_source(where, figure):
    assert set(figure) <= {"value", "source", "note"}
    assert figure["source"] in TABLE["sources"], where


@pytest.mark.parametrize("name", TABLE["sources"])
def test_a_source_says_how_it_was_seen_and_is_used(name):
    source = TABLE["sources"][name]
    assert source["title"] and source["seen"] in SEEN
    assert source.get("url", "https://").startswith("https://")
    assert name in {figure["source"] for _, figure in figures()}


@pytest.mark.parametrize("gpu", load_gpus().values(), ids=lambda gpu: gpu.name)
def test_figures_are_of_the_right_size(gpu):
    """A figure in another unit, or with sparsity, leaves these ranges."""
    assert 7 * 2**30 < gpu.memory < 190 * 2**30
    assert 2e11 < gpu.bandwidth < 1e13
    assert 8e12 < gpu.float_flops < 1.2e14
    assert 1.9 < gpu.half_flops / gpu.float_flops < 31
    assert 40 < gpu.half_flops / gpu.bandwidth < 450
    link = find_server_link(gpu.link)
    assert 1e10 < link.rate < 1e12 and 1e-6 < link.latency < 1e-4
    assert gpu.bf16 or gpu.name == "t4"
    assert not gpu.fp4 or gpu.link in ("pcie5", "nvlink5")


@pytest.mark.parametrize(
    "name", [name for name, gpu in load_gpus().items() if "GeForce" in gpu.title]
)
def test_a_geforce_computes_at_half_rate_with_sums_in_float32(name):
    """The ratio that `geforce-half-rate` states, also where a white paper gives the figure."""
    gpu = load_gpus()[name]
    assert gpu.half_flops / gpu.float_flops == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize(
    ("name", "cores", "gigahertz"),
    [
        (name, *figure["note"].replace(" cores", "").replace(" GHz", "").split(", "))
        for name, entry in TABLE["gpus"].items()
        for figure in [entry["float_tflops"]]
        if figure["source"] == "cores-x-clock"
    ],
)
def test_a_computed_peak_is_cores_times_clock(name, cores, gigahertz):
    peak = 2 * int(cores) * float(gigahertz) * 1e9
    assert load_gpus()[name].float_flops == pytest.approx(peak, rel=0.002)


@pytest.mark.parametrize(
    ("lanes", "transfers", "name"),
    [(16, 8, "pcie3"), (8, 16, "pcie4-x8"), (16, 16, "pcie4"), (16, 32, "pcie5")],
)
def test_a_bus_has_the_rate_of_its_lanes(lanes, transfers, name):
    rate = lanes * transfers * 1e9 / 8 * 128 / 130
    assert find_server_link(name).rate == pytest.approx(rate, rel=0.001)


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("l4", ["l4"]),
        ("rtx3050, L4,t4", ["rtx3050", "l4", "t4"]),
        ("RTX 4090,rtx-4090", ["rtx4090"]),
        ("h100", ["h100-pcie", "h100-sxm"]),
        ("a100", ["a100-40", "a100-40-pcie", "a100-80", "a100-80-pcie"]),
        ("a100-80", ["a100-80"]),
        ("A6000Ada-48,A5000-24,H100-80", ["rtx6000ada", "rtxa5000", "h100-sxm"]),
        ("rtx4060", ["rtx4060"]),
    ],
)
def test_names_are_found(written, found):
    assert [gpu.name for gpu in find_gpus(written)] == found


def test_all_means_every_gpu():
    assert find_gpus("all") == list(load_gpus().values())


def test_a_name_means_one_gpu():
    names = list(TABLE["gpus"])
    names += [other for entry in TABLE["gpus"].values() for other in entry.get("also", ())]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("rtx4900", "no GPU 'rtx4900'; did you mean rtx4090? The planner knows rtx3050, rtx3060"),
        ("v100", "no GPU 'v100'; the planner knows rtx3050, rtx3060"),
        ("l4,", "no GPU ''; the planner knows rtx3050"),
    ],
)
def test_an_unknown_gpu_is_told_of_the_known_ones(written, says):
    with pytest.raises(ConfigError) as caught:
        find_gpus(written)
    assert str(caught.value).startswith(f"--gpu: {says}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("1gbit", 1.25e8),
        ("2.5gbit", 3.125e8),
        ("100Gbit", 1.25e10),
        ("infiniband-hdr", 2.5e10),
        ("infiniband-ndr", 5e10),
    ],
)
def test_a_network_is_found_by_its_rate_or_its_name(name, rate):
    link = find_network(name)
    assert (link.name, link.rate) == (name.lower(), rate)
    assert 1e-6 < link.latency < 1e-4


@pytest.mark.parametrize("name", ["0gbit", "fast", "1gb", "ethernet", "-1gbit"])
def test_an_unknown_network_is_refused(name):
    with pytest.raises(ConfigError, match=f"--network: no network '{name}'; write its rate"):
        find_network(name)
