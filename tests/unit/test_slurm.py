"""The file that sbatch reads: stable, clean for shellcheck, run with stand-ins."""

import json
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from stand_ins import stand_in
from support import HANG_S, run_config, settings, wait_until

from orpo_ray.config import RunConfig, ScaleConfig, build
from orpo_ray.errors import ConfigError
from orpo_ray.jobs.nodes import Nodes, nodes_for
from orpo_ray.jobs.slurm import Request, sbatch_file

RENDERED = Path(__file__).with_name("rendered")
NODES = Nodes(count=2, gpus=4, cpus=32, memory_gib=256)
REQUEST = Request(NODES, "1-12:00:00", "gpu")
HEAD, ADDRESS = "node-7", "10.0.0.7"
JOB = "4711"

SRUN = """
options = [word for word in sys.argv[1:] if word.startswith("--")][:4]
json.dump({"options": options, "step": sys.argv[5:]}, open("srun.json", "w"))
os.execvp(sys.argv[5], sys.argv[5:])
"""
RAY = """
import signal, subprocess
prefixes = ("RAY_", "GLOO_", "NCCL_")
kept = {name: os.environ[name] for name in os.environ if name.startswith(prefixes)}
token = os.environ["RAY_AUTH_TOKEN_PATH"]
told = {"arguments": sys.argv[1:], "environment": kept}
told |= {"token": open(token).read(), "mode": os.stat(token).st_mode}
json.dump(told, open("ray.json.new", "w"))
os.rename("ray.json.new", "ray.json")
if os.environ["RAY_STARTS"] == "yes":
    subprocess.run(sys.argv[sys.argv.index("--") + 1 :])
sys.exit(int(os.environ["RAY_EXITS"]))
"""
ORPO_RAY = """
import signal, threading
asked = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: asked.set())
told = {"arguments": sys.argv[1:], "address": os.environ["RAY_ADDRESS"]}
json.dump(told, open("driver.json", "w"))
if os.environ["DRIVER_WAITS"] == "yes":
    asked.wait()
if os.environ["RESULT"]:
    open("result.json", "w").write(os.environ["RESULT"])
sys.exit(int(os.environ["DRIVER_EXITS"]))
"""
SCONTROL = f"""
if sys.argv[1:3] == ["show", "hostnames"]:
    print("{HEAD}\\nnode-8")
else:
    open("requeued", "a").write(" ".join(sys.argv[1:]))
"""


@dataclass
class Job:
    """A job in its own folder; only its first node is simulated."""

    folder: Path

    def start(self, **surroundings: str) -> "subprocess.Popen[str]":
        """Start the job as Slurm would; `surroundings` say what the stand-ins do."""
        told = {
            "RAY_STARTS": "yes",
            "RAY_EXITS": "0",
            "DRIVER_EXITS": "0",
            "DRIVER_WAITS": "no",
            "RESULT": "",
        }
        slurm = {"SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": "node-[7-8]"}
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(self.folder), **slurm, **told, **surroundings}
        return subprocess.Popen(
            ["bash", self.folder / "job.sbatch"],
            env=environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, **surroundings: str) -> tuple[int, str]:
        """The job's exit code and what it wrote."""
        job = self.start(**surroundings)
        out, err = job.communicate(timeout=HANG_S)
        return job.returncode, out + err

    def told(self, name: str) -> dict[str, Any]:
        """What a stand-in was called with."""
        found: dict[str, Any] = json.loads(
            (self.folder / f"{name}.json").read_text(encoding="utf-8")
        )
        return found


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A job whose run keeps its result in the job's own folder."""
    (tmp_path / "bin").mkdir()
    tools = {"srun": SRUN, "scontrol": SCONTROL, "ray": RAY, "orpo-ray": ORPO_RAY}
    tools["getent"] = f"print('127.0.1.1 STREAM {HEAD}\\n{ADDRESS} STREAM')"
    tools["ip"] = f"print('3: ib0    inet {ADDRESS}/24 brd 10.0.0.255 scope global ib0')"
    for name, code in tools.items():
        stand_in(tmp_path / "bin" / name, code)
    # Nodes do not share pytest's folder, so the job has one node.
    config = run_config(tmp_path.parent, name=tmp_path.name)
    request = Request(Nodes(count=1, gpus=4, cpus=32, memory_gib=256), "60")
    (text,) = sbatch_file(
        config, ["orpo-ray", "train", "my run.yaml", "seed=$HOME"], request, tmp_path
    ).values()
    (tmp_path / "job.sbatch").write_text(text, encoding="utf-8")
    return Job(tmp_path)


def render(config: RunConfig, request: Request = REQUEST) -> str:
    """The script of a run whose folder has a space in its name."""
    train = ["orpo-ray", "train", "/home/me/my runs/orpo.yaml", "objective.lambda=0.2"]
    (text,) = sbatch_file(config, train, request, Path("/home/me/my runs")).values()
    return text


def test_a_change_of_the_rendered_file_is_seen() -> None:
    config = run_config(Path("/shared/runs"), name="teams/a")
    assert list(sbatch_file(config, ["orpo-ray"], REQUEST, Path("/home/me"))) == ["teams-a.sbatch"]
    assert render(config) == (RENDERED / "teams-a.sbatch").read_text(encoding="utf-8")


def test_the_script_is_clean() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not on this machine")
    text = render(run_config(Path("/shared/runs")))
    done = subprocess.run(
        ["shellcheck", "-"], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_only_what_is_asked_for_is_in_the_request() -> None:
    text = render(run_config(Path("/shared/runs")), Request(Nodes(1, 0, 8, 64), "60"))
    assert "--gpus-per-node" not in text and "--partition" not in text


def test_ray_starts_on_every_node_with_a_token_of_the_job(job: Job) -> None:
    code, said = job.run(RESULT='{"status": "finished"}')
    assert code == 0, said
    assert job.told("srun")["options"] == [
        "--nodes=1",
        "--ntasks=1",
        "--cpus-per-task=32",
        "--wait=90",
    ]
    ray = job.told("ray")
    before = ray["arguments"][: ray["arguments"].index("--")]
    assert before[:5] == ["symmetric-run", "--address", f"{ADDRESS}:6379", "--min-nodes", "1"]
    assert {"--num-cpus=32", "--num-gpus=4", "--dashboard-agent-listen-port=52365"} <= set(before)
    assert len(ray["token"]) == 64 and ray["token"] not in " ".join(ray["arguments"]) + said
    assert ray["mode"] & 0o777 == 0o600
    assert ray["environment"] == {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": f"{job.folder}/.orpo-ray/slurm-{JOB}/token",
        "RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT": "300",
        "RAY_py_gcs_connect_timeout_s": "60",
        "RAY_STARTS": "yes",
        "RAY_EXITS": "0",
        "GLOO_SOCKET_IFNAME": "ib0",
        "NCCL_SOCKET_IFNAME": "ib0",
    }
    assert job.told("driver") == {
        "arguments": ["train", "my run.yaml", "seed=$HOME"],
        "address": f"{ADDRESS}:6379",
    }
    assert not (job.folder / ".orpo-ray" / f"slurm-{JOB}").exists()


FINISHED = '{"status": "finished"}'


@pytest.mark.parametrize(
    ("happens", "code"),
    {
        "finished, and so says Ray": ({"RESULT": FINISHED}, 0),
        "finished, though Ray says it failed": ({"RESULT": FINISHED, "RAY_EXITS": "1"}, 0),
        "failed, though Ray says all is well": ({"DRIVER_EXITS": "1"}, 1),
        "no result, though both say all is well": ({}, 1),
        "Ray did not start, and says all is well": ({"RAY_STARTS": "no"}, 1),
        "another status": ({"RESULT": '{"status": "stopped"}', "DRIVER_EXITS": "4"}, 4),
        "half a result": ({"RESULT": '{"status": "fini'}, 1),
        "refused; another run left a result": (
            {"RESULT": FINISHED, "DRIVER_EXITS": "2"},
            2,
        ),
        "resources that are not there": ({"DRIVER_EXITS": "3", "RAY_EXITS": "1"}, 3),
    }.values(),
)
def test_result_json_says_whether_the_job_has_done_its_work(
    job: Job, happens: dict[str, str], code: int
) -> None:
    found, said = job.run(**happens)
    assert found == code, said
    assert f"{job.folder}/result.json" in said
    assert not (job.folder / "requeued").exists()


@pytest.mark.parametrize(
    ("happens", "code"),
    [({}, 0), ({"RAY_EXITS": "1"}, 0), ({"DRIVER_EXITS": "3"}, 3), ({"RAY_STARTS": "no"}, 1)],
)
def test_where_the_storage_is_a_bucket_orpo_ray_itself_says_it(
    job: Job, happens: dict[str, str], code: int
) -> None:
    config = build(
        RunConfig, {**settings(job.folder), "storage": "s3://bucket/runs"}, {(): "tests"}
    )
    (text,) = sbatch_file(config, ["orpo-ray", "train", "run.yaml"], REQUEST, job.folder).values()
    (job.folder / "job.sbatch").write_text(text, encoding="utf-8")
    found, said = job.run(**happens)
    assert found == code, said


@pytest.mark.parametrize(
    ("happens", "code", "requeued"),
    {
        "a checkpoint is saved": ({"DRIVER_EXITS": "4"}, 4, True),
        "it ends just then": ({"RESULT": FINISHED}, 0, False),
        "it fails just then": ({"DRIVER_EXITS": "1"}, 1, False),
        "it has come back too often": (
            {"DRIVER_EXITS": "4", "SLURM_RESTART_COUNT": "100"},
            4,
            False,
        ),
    }.values(),
)
def test_a_job_near_its_time_limit_saves_a_checkpoint_and_comes_back(
    job: Job, happens: dict[str, str], code: int, requeued: bool
) -> None:
    running = job.start(DRIVER_WAITS="yes", **happens)
    pid = job.folder / ".orpo-ray" / f"slurm-{JOB}" / "pid"
    wait_until(lambda: pid.exists() and (job.folder / "driver.json").exists(), "the run has begun")
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=HANG_S)
    assert running.returncode == code, out + err
    assert (job.folder / "requeued").exists() == requeued
    assert not requeued or (job.folder / "requeued").read_text(encoding="utf-8") == f"requeue {JOB}"


def test_without_the_environment_the_job_says_so(job: Job) -> None:
    (job.folder / "bin" / "ray").unlink()
    bare = f"{job.folder / 'bin'}:/usr/bin:/bin"
    code, said = job.run(PATH=bare)
    assert code == 3 and said.startswith("ray is not on PATH; activate the environment")


@pytest.mark.parametrize("storage", ["runs", "/tmp/runs", "/var/tmp/me", "/dev/shm"])
def test_several_nodes_need_a_storage_that_they_share(storage: str) -> None:
    config = run_config(Path("/shared")).model_copy(update={"storage": storage})
    with pytest.raises(
        ConfigError, match=f"^storage: {storage} is not a folder that several nodes share"
    ):
        render(config)
    assert render(config, Request(Nodes(1, 4, 8, 64), "60"))


@pytest.mark.parametrize("storage", ["/shared/runs", "~/runs", "/tmpfs/runs"])
def test_a_storage_that_may_be_shared_is_taken_at_its_word(storage: str) -> None:
    assert render(run_config(Path("/shared")).model_copy(update={"storage": storage}))


@pytest.mark.parametrize(
    "time", ["90", "90:00", "24:00:00", "2-0", "2-12:30", "2-12:30:00", "10", "0:10:00", "0"]
)
def test_times_that_slurm_reads(time: str) -> None:
    assert f"#SBATCH --time={time}\n" in render(run_config(Path("/shared")), Request(NODES, time))


@pytest.mark.parametrize("time", ["", "1h", "1:2", "2d", "1\n#SBATCH --uid=0", "1-"])
def test_other_times_are_refused(time: str) -> None:
    with pytest.raises(ConfigError, match=r"^--time: .* is not a time that Slurm reads"):
        Request(NODES, time)


@pytest.mark.parametrize("time", ["5", "9:59", "0:05:00", "0-0:09", "00:09:59"])
def test_a_time_that_ends_before_its_checkpoint_is_refused(time: str) -> None:
    with pytest.raises(
        ConfigError, match=f"^--time: {time} is too short: .* give 10 minutes or more"
    ):
        Request(NODES, time)


def test_the_home_of_nobody_is_no_storage() -> None:
    config = run_config(Path("/shared")).model_copy(update={"storage": "~nosuchuser/runs"})
    with pytest.raises(
        ConfigError, match=r"^storage: ~nosuchuser/runs: no user of this server has that name"
    ):
        render(config)


def test_a_partition_is_a_name() -> None:
    with pytest.raises(ConfigError, match=r"^--partition: 'a b' is not the name of a partition"):
        Request(NODES, "60", "a b")


@pytest.mark.parametrize(
    ("scale", "asked", "gpus"),
    {
        "one each": ({"workers": 8}, (2, None, 8), 4),
        "uneven": ({"workers": 3}, (2, None, 8), 2),
        "more than needed": ({"workers": 2}, (1, 4, 8), 4),
        "on CPUs": ({"workers": 2, "gpus_per_worker": 0}, (1, None, 8), 0),
        "on CPUs, as the nodes have it": ({"workers": 2}, (1, 0, 8), 0),
        "a part of one": ({"workers": 1, "gpus_per_worker": 0.5}, (1, None, 8), 1),
        "whatever is there": ({}, (2, 8, 64), 8),
    }.values(),
)
def test_gpus_follow_from_the_workers(
    scale: dict[str, Any], asked: tuple[int, int | None, int], gpus: int
) -> None:
    count, given, cpus = asked
    assert nodes_for(ScaleConfig(**scale), count, given, cpus, 64) == Nodes(count, gpus, cpus, 64)


@pytest.mark.parametrize(
    ("scale", "asked", "says"),
    [
        ({}, (2, None, 8), "scale.workers: auto takes all GPUs"),
        (
            {"workers": 8},
            (2, 2, 8),
            "--gpus-per-node: 2 are too few for the 4 workers of a node, which take 4",
        ),
        (
            {"workers": 8, "gpus_per_worker": 1},
            (1, 0, 8),
            "--gpus-per-node: 0 are too few for the 8 workers",
        ),
        (
            {"workers": 8, "cpus_per_worker": 4},
            (2, None, 8),
            "--cpus-per-node: 8 are too few .* which take 16",
        ),
    ],
)
def test_nodes_that_hold_no_workers_are_refused(
    scale: dict[str, Any], asked: tuple[int, int | None, int], says: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{says}"):
        nodes_for(ScaleConfig(**scale), *asked, 64)
