"""The planner's network against real runs: torch's DDP between servers, and our own trainer.

gloo sends over links whose rate is limited. What is predicted knows the compute time, which the
same processes measure in the steps between, without exchange.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml
from lan import SERVERS, STRANGER, Lan, address, namespace
from ranks import Job, Ranks
from safetensors.torch import load_file
from support import ENVIRONMENT, HANG_S, make_artifact, random_base, settings

from orpo_ray.config import RunConfig, build
from orpo_ray.planner.hardware import find_network
from orpo_ray.planner.network import Exchange, Weights, Workers, exchanges, step_cost

pytestmark = pytest.mark.cluster

MIB = 2**20
ROUNDS = 5
TOLERANCE = 0.15
"""What the issue of the planner asks for."""
RANKS = [*SERVERS, STRANGER]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run of `processes`, one a server, on a network of that nominal rate.

    `hidden` is the share of the exchange that runs beside the backward pass, at the least and at
    the most.
    """

    processes: int
    mbit: int
    mebibytes: int
    tokens: int
    seconds: float
    hidden: tuple[float, float]

    def __str__(self) -> str:
        kind = f"{self.seconds}s" if self.seconds else f"{self.tokens}-tokens"
        return f"{self.processes}-{self.mbit}mbit-{self.mebibytes}MiB-{kind}"


CASES = [
    Case(processes=2, mbit=200, mebibytes=16, tokens=4, seconds=0.0, hidden=(-0.15, 0.15)),
    Case(processes=3, mbit=1000, mebibytes=64, tokens=4, seconds=0.0, hidden=(-0.15, 0.15)),
    Case(processes=4, mbit=200, mebibytes=16, tokens=4, seconds=0.0, hidden=(-0.15, 0.15)),
    # The CPUs compute.
    Case(processes=2, mbit=200, mebibytes=64, tokens=1024, seconds=0.0, hidden=(0.1, 0.4)),
    # A device beside the CPU computes.
    Case(processes=2, mbit=500, mebibytes=64, tokens=4, seconds=1.5, hidden=(0.4, 0.8)),
    Case(processes=3, mbit=1000, mebibytes=64, tokens=4, seconds=1.5, hidden=(0.5, 0.9)),
    Case(processes=4, mbit=500, mebibytes=64, tokens=4, seconds=1.5, hidden=(0.2, 0.6)),
]


def measure(case: Case) -> list[dict[str, Any]]:
    """What each process printed."""
    program = Path(__file__).with_name("synced_steps.py")
    words = [case.mebibytes, case.tokens, case.seconds, ROUNDS]
    processes = []
    for rank in range(case.processes):
        place = {
            "RANK": str(rank),
            "WORLD_SIZE": str(case.processes),
            "MASTER_ADDR": address(RANKS[0]),
            "MASTER_PORT": "29555",
            "GLOO_SOCKET_IFNAME": "eth0",
        }
        command = [
            *("ip", "netns", "exec", namespace(RANKS[rank])),
            *(sys.executable, str(program), *map(str, words)),
        ]
        processes.append(
            subprocess.Popen(
                command, env={**ENVIRONMENT, **place}, stdout=subprocess.PIPE, text=True
            )
        )
    printed = [process.communicate(timeout=HANG_S)[0] for process in processes]
    assert not any(process.returncode for process in processes)
    return [json.loads(text.splitlines()[-1]) for text in printed]


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Medians of a step: what it computes, what its exchange takes, and both together."""

    computed: float
    exchanged: float
    predicted: float
    measured: float

    @property
    def off(self) -> float:
        """How far the prediction is from what was measured."""
        return self.predicted / self.measured - 1

    @property
    def hidden(self) -> float:
        """The share of the exchange that ran beside the backward pass."""
        return (self.computed + self.exchanged - self.measured) / self.exchanged

    def __str__(self) -> str:
        return (
            f"compute {self.computed:.3f} s, exchange {self.exchanged:.3f} s, predicted "
            f"{self.predicted:.3f} s, measured {self.measured:.3f} s: {self.off:+.1%}"
        )


def compare(case: Case, gradients: Exchange, ranks: list[dict[str, Any]]) -> Seconds:
    """A step with its exchange is predicted from the one before it, which has none."""
    network = find_network(f"{case.mbit / 1000}gbit")
    workers = Workers(servers=case.processes, per_server=1, inside=None, network=network)
    predicted, measured, computed, exchanged = [], [], [], []
    for steps in zip(*(rank["steps"] for rank in ranks), strict=True):
        forward, backward, _ = max((alone for alone, _ in steps), key=lambda step: sum(step[:2]))
        cost = step_cost([gradients], workers, 1, backward, workers.rate.middle)
        computed.append(forward + backward)
        exchanged.append(cost.total)
        predicted.append(forward + backward + cost.exposed)
        measured.append(max(sum(synced[:2]) for _, synced in steps))
    return Seconds(
        computed=median(computed),
        exchanged=median(exchanged),
        predicted=median(predicted),
        measured=median(measured),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_of_ddp_takes_what_is_predicted(lan: Lan, case: Case) -> None:
    with lan.slow(RANKS[: case.processes], case.mbit):
        ranks = measure(case)
    [gradients] = exchanges(None, Weights(trained=case.mebibytes * MIB // 4))
    assert ranks[0]["buckets"] == ", ".join(str(int(size)) for size in gradients.calls)
    sent = median(synced[2] for rank in ranks for _, synced in rank["steps"])
    assert sent == pytest.approx(gradients.sent(case.processes, 1), rel=0.01)
    seconds = compare(case, gradients, ranks)
    print(f"{case}: {seconds}")
    assert abs(seconds.off) < TOLERANCE, seconds
    least, most = case.hidden
    assert least < seconds.hidden < most, f"{seconds.hidden:.2f} is hidden; {seconds}"


# --- bytes by strategy ----------------------------------------------------------------------------

HIDDEN, LAYERS, STEPS = 512, 2, 5


@pytest.fixture(scope="module")
def ranks(lan: Lan) -> Iterator[Ranks]:
    """Processes in one of the servers, whose loopback carries nothing else."""
    inside = Ranks(["ip", "netns", "exec", namespace(STRANGER), "env", "GLOO_SOCKET_IFNAME=lo"])
    yield inside
    inside.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose matrices ZeRO-3 cuts: it leaves whole those of at most 100,000 numbers."""
    return random_base(
        tmp_path_factory.mktemp("base"),
        "llama",
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_key_value_heads=4,
    )


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_our_trainer_sends_what_is_predicted_with_each_strategy(
    ranks: Ranks, base: Path, tmp_path: Path, stage: int | None, workers: int
) -> None:
    config = settings(
        tmp_path,
        model={"base": str(base), "quantization": "none"},
        training={
            "max_steps": STEPS,
            "eval_every": STEPS,
            "checkpoint_every": STEPS,
            "tokens_per_microbatch": 128,
            "gradient_checkpointing": False,
        },
        scale={"workers": workers, "deepspeed": "none" if stage is None else {"stage": stage}},
    )
    config["adapter"] = {"kind": "none"}
    run = build(RunConfig, config, {(): "test"})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json", by_alias=True)), encoding="utf-8")
    plant = f"{Path(__file__).with_name('counting.py')}:note_bytes"
    artifact = make_artifact(tmp_path)
    [raised] = ranks.run([Job(str(path), str(artifact.path), workers, plant=plant)])
    assert raised == [""] * workers
    noted = json.loads((tmp_path / "run" / "sent-0.json").read_text(encoding="utf-8"))
    parts = exchanges(stage, Weights(trained=numbers_of(base), layers=LAYERS))
    # DDP makes its buckets anew after the first step.
    for (before, packs), (after, _) in pairwise(noted[1:]):
        assert packs > 1, "some packs are not the last one"
        sent = (after - before) / workers
        expected = sum(part.sent(workers, packs) for part in parts)
        if stage == 3:  # gloo scatters by reducing for all; NCCL does not
            expected += parts[1].sent(workers, packs)
        assert sent == pytest.approx(expected, rel=0.01)


def numbers_of(base: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(base / "model.safetensors").values())
