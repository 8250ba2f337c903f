"""Runs on two Ray workers that lose a worker or their driver, or wait too long.

Dropout, NF4 and ZeRO-2 are on. Starts of Ray Train take long, so one run is wounded several times,
and others share a cluster of two CPUs. tests/unit/test_launch.py tests without Ray what follows
from which loss.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from typing import Any

import numpy as np
import pytest
import yaml
from poison import find_poison, poisoned_base
from ranks import Job, Ranks
from ray_head import Head
from ray_processes import Command, Ended, run, worker_pids
from reported import comparable
from safetensors.numpy import load_file, save_file
from support import (
    BASE,
    DEMO,
    ENVIRONMENT,
    Listener,
    last_step,
    read_metrics,
    run_config,
    settings,
    wait_until,
)

from orpo_ray import api
from orpo_ray.config import load_config
from orpo_ray.errors import ConfigError
from orpo_ray.runs.console import SILENT

pytestmark = [pytest.mark.slow, pytest.mark.ray]

STEPS, CHECKPOINT_EVERY, EVAL_EVERY = 24, 4, 6
SCALE = {"workers": 2, "gpus_per_worker": 0, "deepspeed": {"stage": 2}, "max_failures": 2}
WEIGHTS = "adapter/adapter_model.safetensors"


def write_config(storage: Path, name: str, **sections: Any) -> Path:
    """The YAML of a run on two workers."""
    tree = settings(storage, name, scale=SCALE, **sections)
    path = storage / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A cluster that has no CPU to spare for a run of two workers."""
    head = Head(cpus=2)
    yield head
    head.end()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the base, which tests may change and restore."""
    return Path(shutil.copytree(BASE, tmp_path_factory.mktemp("own") / "base"))


@pytest.fixture(scope="module")
def pairs(base: Path) -> Path:
    """A copy of the training pairs, which tests may change and restore."""
    return Path(shutil.copy(DEMO / "train.jsonl", base.parent))


def long_run(storage: Path, name: str, base: Path, pairs: Path) -> Path:
    """A run that is long enough to be interrupted several times."""
    training = {
        "max_steps": STEPS,
        "checkpoint_every": CHECKPOINT_EVERY,
        "keep": 2,
        "eval_every": EVAL_EVERY,
    }
    data = {"train": [{"source": str(pairs), "limit": 36}]}
    return write_config(
        storage,
        name,
        model={"base": str(base)},
        adapter={"dropout": 0.05},
        data=data,
        training=training,
    )


def steps_of(run_dir: Path) -> list[int]:
    """Steps of the training metrics, in the order of the file."""
    return [line["step"] for line in read_metrics(run_dir) if "train/loss" in line]


def complaint(ended: Ended, code: int) -> str:
    """The one line with which a command failed."""
    complaints = [line for line in ended.said if line.startswith("orpo-ray: ")]
    assert (ended.code, complaints) == (code, ended.said[-1:]), ended.said
    assert not any("Traceback" in line for line in ended.said)
    return complaints[0]


# --- a run that is wounded again and again --------------------------------------------------------


class Wounded:
    """One run and its commands, one after another; a link is what one command left behind."""

    def __init__(self, config: Path, run_dir: Path, kept: Path) -> None:
        self.config, self.run_dir = config, run_dir
        self.kept = kept
        """A copy of the storage after the first wounds, to resume with other settings."""
        self.links: dict[str, Ended] = {}
        self.saved: dict[str, int] = {}
        """The step of the newest checkpoint at the wound."""
        self.actors: list[str] = []
        """Ray's, while the first workers train."""
        self._pids: list[int] = []

    def new_workers(self, command: Command) -> list[int]:
        """Pids of the next workers, once they are recorded."""
        command.wait_until(lambda: worker_pids(self.run_dir) not in ([], self._pids), "new workers")
        self._pids = worker_pids(self.run_dir)
        return self._pids

    @contextmanager
    def in_the_middle(self, command: Command, link: str) -> Iterator[list[int]]:
        """Pids of new workers, whose run is held during the block.

        They have just saved the run's first checkpoint, or trained a step that is in no checkpoint.
        """
        if not self.checkpoints():
            pids = self.new_workers(command)
            command.wait_until(lambda: last_step(self.run_dir) > 0, "the first step")
            command.wait_until(command.hold, "a run to hold")
            command.wait_until(self.checkpoints, "the first checkpoint")
        else:
            command.wait_until(command.hold, "a run to hold")
            pids = self.new_workers(command)
            command.wait_until(
                lambda: last_step(self.run_dir) > self.checkpoints()[-1], "a step of their own"
            )
        self.saved[link] = self.checkpoints()[-1]
        yield pids
        command.release()

    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints in the folder."""
        return sorted(int(path.name[5:]) for path in (self.run_dir / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def wounded(
    prepared_storage: Path, base: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Wounded:
    config = long_run(prepared_storage, "ray-wounded", base, pairs)
    chain = Wounded(config, prepared_storage / "ray-wounded", tmp_path_factory.mktemp("kept"))

    killed = Command(chain.config)
    with chain.in_the_middle(killed, "worker") as pids:
        chain.actors = killed.processes.actors()
        os.kill(pids[1], SIGKILL)
    with chain.in_the_middle(killed, "controller"):
        os.kill(killed.processes.pid_of_actor("TrainController"), SIGKILL)
    with chain.in_the_middle(killed, "driver"):
        killed.send(SIGKILL)
    wait_until(lambda: not killed.processes.actors(), "the end of a dead driver's workers")

    shutil.copytree(chain.run_dir, chain.kept / chain.run_dir.name)
    (chain.kept / "artifacts").symlink_to(prepared_storage / "artifacts")

    # As a person does at a terminal.
    command = Command(chain.config)
    with chain.in_the_middle(command, "SIGINT to all"):
        command.send(SIGINT, to_group=True)
        command.wait_until(lambda: "SIGINT: stopping" in command.said(), "the driver's word")
    chain.links["SIGINT to all"] = command.end()

    chain.links["end"] = run(chain.config, "--json")
    # Idle helpers of Ray try for a minute to report the raylet's death to a dead driver.
    chain.links["driver"] = killed.end()
    return chain


@pytest.fixture(scope="module")
def unbroken(wounded: Wounded, prepared_storage: Path, base: Path, pairs: Path) -> Path:
    """The folder of the same run undisturbed, in two processes of torch.distributed without Ray."""
    config = long_run(prepared_storage, "ray-unbroken", base, pairs)
    plain = load_config(config)
    # The pairs were prepared for the wounded run.
    artifact = api.prepare(plain, SILENT)
    ranks = Ranks()
    (raised,) = ranks.run([Job(str(config), str(artifact.path), workers=2)])
    ranks.close()
    assert raised == ["", ""]
    return plain.run_dir


def resumed_at(ended: Ended) -> list[int]:
    """The steps at which a command resumed."""
    return [int(line.split()[3]) for line in ended.said if line.startswith("resuming at step ")]


def stopped_at(ended: Ended) -> int:
    """The step after which a stopped command ended with its checkpoint."""
    line = complaint(ended, 4)
    step = int(line.removeprefix("orpo-ray: stopped at step ").split()[0])
    stopped = f"orpo-ray: stopped at step {step} of {STEPS} with a checkpoint"
    assert line == f"{stopped}; the same command resumes"
    return step


def test_a_killed_worker_is_replaced(wounded: Wounded) -> None:
    ended = wounded.links["driver"]
    said = [line for line in ended.said if line.startswith("lost worker")]
    assert said == ["lost worker 1; resuming from the last checkpoint (1 retries left)"]
    assert resumed_at(ended)[0] == wounded.saved["worker"]


def test_a_killed_controller_leaves_room_for_the_next_workers(wounded: Wounded) -> None:
    ended = wounded.links["driver"]
    _, retry = (line for line in ended.said if "retries left" in line)
    assert (
        retry.startswith("a server or Ray Train's controller was lost")
        and "0 retries left" in retry
    )
    assert resumed_at(ended)[1:] == [wounded.saved["controller"]]


def test_a_killed_driver_takes_its_workers_with_it(wounded: Wounded) -> None:
    assert wounded.links["driver"].code == -SIGKILL
    assert resumed_at(wounded.links["SIGINT to all"]) == [wounded.saved["driver"]]


def test_a_signal_ends_the_run_with_a_checkpoint(wounded: Wounded) -> None:
    ended = wounded.links["SIGINT to all"]
    assert (
        "SIGINT: stopping, with a checkpoint if training has begun (a second signal stops at once)"
        in ended.said
    )
    step = stopped_at(ended)
    assert wounded.saved["SIGINT to all"] < step < STEPS
    assert resumed_at(wounded.links["end"]) == [step]


def test_ray_runs_no_actor_that_a_run_has_no_work_for(wounded: Wounded) -> None:
    helpers = ["Mailbox", "SynchronizationActor", "TrainController"]
    assert wounded.actors == sorted([*helpers, "RayTrainWorker", "RayTrainWorker"])


def test_a_killed_worker_is_no_reason_to_show_what_ray_says(wounded: Wounded) -> None:
    log = (wounded.run_dir / "run.log").read_text(encoding="utf-8")
    ours = ("step ", "orpo-ray: ", "adapter: ")
    said = [
        line for ended in wounded.links.values() for line in ended.said if not line.startswith(ours)
    ]
    assert [line for line in said if f"orpo_ray INFO {line}" not in log] == []


@pytest.mark.parametrize("link", ["driver", "SIGINT to all", "end"])
def test_no_process_outlives_a_command_however_it_ended(wounded: Wounded, link: str) -> None:
    assert wounded.links[link].left == {}


def test_two_workers_train_and_tell_who_they_were(wounded: Wounded) -> None:
    ended = wounded.links["end"]
    assert ended.code == 0, ended.said
    result = json.loads(ended.out)
    assert result == json.loads((wounded.run_dir / "result.json").read_text(encoding="utf-8"))
    assert len(set(result["workers"])) == 2
    assert result["strategy"] == "deepspeed-zero-2"
    assert result["steps"] == STEPS
    evaluated = [line["step"] for line in read_metrics(wounded.run_dir) if "eval/accuracy" in line]
    assert evaluated == list(range(0, STEPS + 1, EVAL_EVERY))


def test_the_terminal_shows_progress_and_nothing_that_libraries_say(wounded: Wounded) -> None:
    ended = wounded.links["end"]
    log = (wounded.run_dir / "run.log").read_text(encoding="utf-8")
    progress = [line for line in ended.said if line.startswith(("step ", "  held out: "))]
    steps = [line for line in progress if line.startswith("step ")]
    assert steps[-1].startswith(f"step {STEPS}/{STEPS}") and len(steps) >= 3
    foreign = [
        line for line in ended.said if line not in progress and f"orpo_ray INFO {line}" not in log
    ]
    assert foreign == []


def test_ray_leaves_nothing_of_its_own_in_the_run(wounded: Wounded) -> None:
    assert {path.name for path in wounded.run_dir.iterdir()} == {
        *(
            ".lock",
            ".workers.lock",
            "config.json",
            "run.json",
            "run.log",
            "metrics.jsonl",
            "samples.jsonl",
            "result.json",
        ),
        *("adapter", "checkpoints", "evaluations", "tensorboard", "report.html"),
    }


def test_what_was_wounded_ends_with_the_bytes_of_what_was_not(
    wounded: Wounded, unbroken: Path
) -> None:
    assert steps_of(wounded.run_dir) == list(range(1, STEPS + 1)), "each step once"
    assert comparable(wounded.run_dir) == comparable(unbroken)
    for file in (WEIGHTS, f"checkpoints/step-{STEPS:06d}/state.safetensors", "samples.jsonl"):
        assert (wounded.run_dir / file).read_bytes() == (unbroken / file).read_bytes(), file


@pytest.mark.long
def test_a_loss_that_no_retry_is_left_for_ends_the_run(
    prepared_storage: Path, base: Path, pairs: Path
) -> None:
    config = long_run(prepared_storage, "ray-lost", base, pairs)
    chain = Wounded(config, prepared_storage / "ray-lost", prepared_storage)
    command = Command(config, "scale.max_failures=0")
    with chain.in_the_middle(command, "worker") as pids:
        os.kill(pids[0], SIGKILL)
    ended = command.end()
    line = complaint(ended, 1)
    assert (
        "lost worker 0; no retry is left (scale.max_failures); the same command resumes the run"
        in line
    )
    assert line.endswith(f"(full log: {chain.run_dir / 'run.log'})")
    assert ended.left == {}


@pytest.mark.long
def test_another_program_may_ask_the_command_to_stop(
    prepared_storage: Path, base: Path, pairs: Path
) -> None:
    config = long_run(prepared_storage, "ray-asked", base, pairs)
    chain = Wounded(config, prepared_storage / "ray-asked", prepared_storage)
    command = Command(config)
    with chain.in_the_middle(command, "SIGTERM"):
        command.send(SIGTERM)
        command.wait_until(lambda: "SIGTERM: stopping" in command.said(), "the driver's word")
    ended = command.end()
    assert (
        "SIGTERM: stopping, with a checkpoint if training has begun (a second signal stops at once)"
        in ended.said
    )
    assert chain.checkpoints()[-1] == stopped_at(ended)
    assert ended.left == {}


# --- resuming with other settings -----------------------------------------------------------------


@pytest.fixture
def begun(wounded: Wounded, tmp_path: Path) -> Path:
    """The storage of a run that was begun on two workers and can be resumed."""
    return Path(shutil.copytree(wounded.kept, tmp_path / "kept", symlinks=True))


ONE_WORKER = ("scale.workers=1", "scale.deepspeed=none")


def go_on(wounded: Wounded, storage: Path, *overrides: str) -> tuple[dict[str, Any], list[str]]:
    """Resume in this process with changed settings; the result and what was announced."""
    said: list[str] = []
    config = load_config(wounded.config, [f"storage={storage}", *ONE_WORKER, *overrides])
    return api.train(config, Listener(said)).to_json(), said


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.learning_rate=2e-3", "training.learning_rate: 0.002 here"),
        ("objective.lambda=0.7", "objective.lambda: 0.7 here"),
        ("objective.kind=sft", "objective.kind: 'sft' here"),
        ("data.train.0.limit=30", "data.train.0.limit: 30 here"),
        ("model.quantization=none", "model.quantization: 'none' here"),
    ],
)
def test_a_changed_setting_is_refused_by_name(
    wounded: Wounded, begun: Path, override: str, told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        go_on(wounded, begun, override)
    assert told in str(caught.value)


@pytest.fixture
def restored(base: Path, pairs: Path) -> Iterator[None]:
    """Puts base and pairs back."""
    files = [*base.iterdir(), pairs]
    contents = {path: path.read_bytes() for path in files}
    yield
    for path, content in contents.items():
        path.write_bytes(content)


def change_pairs(base: Path, pairs: Path) -> None:
    lines = pairs.read_text(encoding="utf-8").splitlines(keepends=True)
    pairs.write_text("".join([lines[40], *lines[1:]]), encoding="utf-8")


def change_weights(base: Path, pairs: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    save_file(
        {**tensors, name: tensors[name] + 1}, base / "model.safetensors", metadata={"format": "pt"}
    )


def change_tokenizer(base: Path, pairs: Path) -> None:
    content = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"].pop()
    (base / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.usefixtures("ray_session", "restored")
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_pairs, "data: not what"),
        (change_weights, "model.base: not what"),
        (change_tokenizer, "tokenizer: not"),
    ],
)
def test_changed_files_behind_unchanged_settings_are_refused_by_name(
    wounded: Wounded, begun: Path, base: Path, pairs: Path, change: Any, told: str
) -> None:
    change(base, pairs)
    with pytest.raises(ConfigError) as caught:
        go_on(wounded, begun)
    assert str(caught.value).startswith(told)
    assert "run ray-wounded began with" in str(caught.value)


def test_a_run_of_two_workers_goes_on_in_one_process_with_other_packs(
    wounded: Wounded, begun: Path, unbroken: Path
) -> None:
    result, said = go_on(wounded, begun, "training.tokens_per_microbatch=1024")
    (step,) = (int(line.split()[3]) for line in said if line.startswith("resuming at step "))
    assert step == wounded.saved["driver"]
    assert (result["steps"], result["strategy"], result["workers"]) == (
        STEPS,
        "single-process",
        [os.getpid()],
    )
    run_dir = begun / "ray-wounded"
    assert steps_of(run_dir) == list(range(1, STEPS + 1))
    ours, theirs = comparable(run_dir), comparable(unbroken)
    assert [line for line in ours if line["step"] <= step] == [
        line for line in theirs if line["step"] <= step
    ]
    # Dropout draws other numbers from there on: the same in distribution.
    assert ours[-1]["eval/nll"] == pytest.approx(theirs[-1]["eval/nll"], abs=0.2)


# --- what would only happen again -----------------------------------------------------------------


@pytest.mark.long
def test_a_loss_that_is_no_number_ends_the_run_at_once(
    head: Head, prepared_storage: Path, tmp_path: Path
) -> None:
    plain = run_config(prepared_storage)
    artifact = api.prepare(plain, SILENT)
    poison = find_poison(plain, artifact)
    poisoned = poisoned_base(tmp_path / "base", poison.token)
    config = write_config(prepared_storage, "ray-poisoned", model={"base": str(poisoned)})
    ended = run(config, environment=head.environment)
    line = complaint(ended, 1)
    assert line.startswith(f"orpo-ray: the loss of step {poison.step} is not finite")
    assert artifact.train[poison.pair].pair_id in line
    assert not any("retries left" in line for line in ended.said)
    assert steps_of(prepared_storage / "ray-poisoned") == list(range(1, poison.step))
    page = (prepared_storage / "ray-poisoned" / "report.html").read_text(encoding="utf-8")
    assert f"the loss of step {poison.step} is not finite" in page


@pytest.mark.long
def test_a_users_mistake_that_workers_find_ends_the_run_at_once(
    head: Head, prepared_storage: Path
) -> None:
    config = write_config(prepared_storage, "ray-mistaken", adapter={"targets": ["nope_proj"]})
    ended = run(config, environment=head.environment)
    line = complaint(ended, 2)
    assert line.startswith("orpo-ray: adapter.targets: ") and "nope_proj" in line
    assert not any("retries left" in line for line in ended.said)


def test_a_stop_while_workers_start_ends_the_command_and_frees_the_cluster(
    head: Head, prepared_storage: Path
) -> None:
    command = Command(write_config(prepared_storage, "ray-hasty"), environment=head.environment)
    command.wait_until(lambda: "starting 2 workers" in command.said(), "the workers' start")
    command.send(SIGINT)
    line = complaint(command.end(), 4)
    assert (
        line == "orpo-ray: stopped; the same command resumes the run from its last checkpoint, "
        "if there is one"
    )
    assert not (prepared_storage / "ray-hasty" / "metrics.jsonl").exists()
    assert head.free_cpus() == 2


@pytest.mark.long
def test_a_controller_killed_while_workers_start_leaves_room_for_the_next(
    head: Head, prepared_storage: Path
) -> None:
    """The workers have sent no news yet, and the cluster has no CPU besides theirs."""
    training = {"max_steps": 4, "eval_every": 4, "checkpoint_every": 4}
    config = write_config(prepared_storage, "ray-orphans", training=training)
    command = Command(config, environment=head.environment)
    command.wait_until(
        lambda: "RayTrainWorker" in head.processes.actors(), "the first worker's process"
    )
    assert last_step(prepared_storage / "ray-orphans") < 0
    os.kill(head.processes.pid_of_actor("TrainController"), SIGKILL)
    ended = command.end()
    assert ended.code == 0, ended.said
    assert len([line for line in ended.said if "retries left" in line]) == 1
    assert head.free_cpus() == 2


ASKED = {
    "scale.workers=64": "64 workers with 1 CPU each were asked for, but there is room for 2",
    "scale.gpus_per_worker=1": "2 workers with 1 CPU and 1 GPU each were asked for, but there is "
    "room for 0",
}
ASK = """
import sys
from orpo_ray.cli.main import run
codes = [run(["train", sys.argv[1], override]) for override in sys.argv[2:]]
print(codes, sorted({"torch", "transformers"} & sys.modules.keys()))
"""


def test_more_than_the_cluster_has_is_refused_before_anything_is_loaded(
    head: Head, prepared_storage: Path
) -> None:
    config = write_config(prepared_storage, "ray-greedy")
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(config), *ASKED],
        env={**ENVIRONMENT, **head.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "[3, 3] []\n", done.stderr
    complaints = [line for line in done.stderr.splitlines() if line.startswith("orpo-ray: ")]
    for complaint_of_one, asked in zip(complaints, ASKED.values(), strict=True):
        assert re.search(rf"{asked} \(\S+: 2 CPU, 0 GPU\); lower scale", complaint_of_one)
    assert not (prepared_storage / "ray-greedy").exists()


# --- reference log-probs by actors, on a cluster that is joined -----------------------------------


@dataclass(frozen=True)
class Dpo:
    """A DPO run whose driver is killed, and which one worker finishes."""

    run_dir: Path
    references: Path
    killed: Ended
    free_cpus: float
    finished: Ended


@pytest.fixture(scope="module")
def dpo(head: Head, prepared_storage: Path, tmp_path_factory: pytest.TempPathFactory) -> Dpo:
    storage = tmp_path_factory.mktemp("dpo")
    (storage / "artifacts").symlink_to(prepared_storage / "artifacts")
    training = {"max_steps": 40, "checkpoint_every": 2, "eval_every": 40}
    config = write_config(storage, "ray-dpo", objective={"kind": "dpo"}, training=training)
    command = Command(config, environment=head.environment)
    command.wait_until(lambda: last_step(storage / "ray-dpo") >= 3, "step 3")
    command.send(SIGKILL)
    killed = command.end()
    free = head.free_cpus()
    one_worker = ("scale.workers=1", "scale.ray=true", "scale.deepspeed=none")
    finished = run(config, *one_worker, "--verbose", environment=head.environment)
    assert finished.code == 0, finished.said
    return Dpo(storage / "ray-dpo", storage / "references", killed, free, finished)


@pytest.mark.long
def test_actors_compute_the_references_that_one_process_would(
    dpo: Dpo, prepared_storage: Path
) -> None:
    said = dpo.killed.said
    assert any(
        line.startswith("reference log-probs: computing them once for 36 pairs, by 2 actors")
        for line in said
    )
    (cached,) = dpo.references.iterdir()
    by_actors = load_file(cached)["log_probs"]
    tree = settings(
        dpo.run_dir.parent / "alone",
        "alone",
        objective={"kind": "dpo"},
        training={"max_steps": 1, "warmup": 0, "eval_every": 1},
    )
    (dpo.run_dir.parent / "alone").mkdir()
    (dpo.run_dir.parent / "alone" / "artifacts").symlink_to(prepared_storage / "artifacts")
    path = dpo.run_dir.parent / "alone.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    api.train(load_config(path), SILENT)
    (alone,) = (dpo.run_dir.parent / "alone" / "references").iterdir()
    assert alone.name == cached.name, "the same inputs, whoever computes"
    assert by_actors.shape == (36, 2)
    np.testing.assert_allclose(by_actors, load_file(alone)["log_probs"], rtol=1e-6)


@pytest.mark.long
def test_the_first_step_is_where_policy_and_reference_are_one(dpo: Dpo) -> None:
    first = next(line for line in read_metrics(dpo.run_dir) if "train/loss" in line)
    assert first["step"] == 1
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.long
def test_the_next_command_reuses_the_references(dpo: Dpo) -> None:
    said = dpo.finished.said
    assert any("reference log-probs: reused from" in line for line in said)
    assert not any("reference log-probs: computing" in line for line in said)


@pytest.mark.long
def test_a_killed_driver_leaves_no_cpu_reserved_on_a_cluster_that_it_joined(dpo: Dpo) -> None:
    assert dpo.killed.code == -SIGKILL
    assert dpo.killed.left == {}
    assert dpo.free_cpus == 2


@pytest.mark.long
def test_ray_train_brings_a_single_worker_to_the_end(dpo: Dpo) -> None:
    result = json.loads((dpo.run_dir / "result.json").read_text(encoding="utf-8"))
    assert (result["status"], result["steps"], len(result["workers"])) == ("finished", 40, 1)
    assert steps_of(dpo.run_dir) == list(range(1, 41))
    (step,) = resumed_at(dpo.finished)
    assert step >= 2


@pytest.mark.long
def test_verbose_shows_what_ray_has_to_say(dpo: Dpo) -> None:
    assert any(
        "pid=" in line or "ray" in line.lower().split("reused")[0] for line in dpo.finished.said
    )
    shown = set(dpo.finished.said) - set(dpo.killed.said)
    assert any(
        "Ray" in line or "(TrainController" in line or "(RayTrainWorker" in line for line in shown
    )


# --- real pairs -----------------------------------------------------------------------------------


@pytest.mark.long
def test_real_pairs_on_two_workers(head: Head, shared_data: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "minimind_chatml_6400")
    shape = LlamaConfig(
        vocab_size=6400,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    names = ("hh_harmless_train.jsonl.gz", "llamafactory_dpo_en_demo.json")
    tree = {
        "name": "real",
        "storage": str(tmp_path),
        "model": {"base": str(tmp_path / "base"), "quantization": "none"},
        "adapter": {"kind": "none"},
        "data": {
            "train": [{"source": str(shared_data / name)} for name in names],
            "eval_fraction": 0.05,
            "max_length": 512,
            "max_prompt_length": 384,
            "max_bad_fraction": 0.2,
        },
        "training": {
            "learning_rate": 3.0e-3,
            "max_steps": 6,
            "pairs_per_step": 16,
            "eval_every": 6,
            "checkpoint_every": 6,
        },
        "scale": SCALE,
    }
    path = tmp_path / "real.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    ended = run(path, environment=head.environment)
    assert ended.code == 0, ended.said[-1:]
    metrics = read_metrics(tmp_path / "real")
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    losses = [line["train/loss"] for line in metrics if "train/loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0]
    (artifact,) = (tmp_path / "artifacts").glob("*/artifact.json")
    sources = {
        source["source"]: source
        for source in json.loads(artifact.read_text(encoding="utf-8"))["sources"]
    }
    assert all(sources[key]["kept"] > 50 for key in sources) and len(sources) == 2
