"""What `orpo-ray doctor` finds in servers as one meets them, from their facts alone."""

from dataclasses import replace
from typing import Any

import pytest

from orpo_ray.config import ModelConfig, RunConfig, build
from orpo_ray.doctor.checkup import conclude, judge_server
from orpo_ray.doctor.facts import (
    FACTS,
    Asked,
    Attention,
    Base,
    Cards,
    Device,
    Disk,
    Facts,
    Hub,
    Nf4,
    RayState,
    RoundTrip,
    Server,
    Settings,
    Software,
    System,
    Torch,
)
from orpo_ray.doctor.findings import Finding, Level
from orpo_ray.doctor.rules.gpus import has_kernels, is_too_old

STOPS, WARNING, NOTE, OK = Level.STOPS, Level.WARNING, Level.NOTE, Level.OK

RTX_4090 = Device(
    name="NVIDIA GeForce RTX 4090", capability=(8, 9), memory_bytes=24 * 2**30, bfloat16=True
)
RTX_5090 = replace(RTX_4090, name="NVIDIA GeForce RTX 5090", capability=(12, 0))
T4 = replace(RTX_4090, name="Tesla T4", capability=(7, 5), bfloat16=False)
H100 = replace(RTX_4090, name="NVIDIA H100 80GB HBM3", capability=(9, 0))
KERNELS = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")

CARDS = Cards(on_bus=2, driver="580.95.05", names=(RTX_4090.name,) * 2)
TORCH = Torch(cuda="13.0", devices=(RTX_4090, RTX_4090), kernels=KERNELS, peers=False)
SYSTEM = System(
    shared_memory_bytes=16 * 2**30,
    open_files=65536,
    open_files_hard=1048576,
    in_container=False,
    interfaces={"lo": ["127.0.0.1"], "eno1": ["10.0.0.1"], "docker0": ["172.17.0.1"]},
    has_infiniband=False,
    variables={"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"},
)
DISK = Disk(
    what="storage",
    path="/data",
    device=1,
    free_bytes=10**12,
    write_bytes_per_s=9e8,
    read_bytes_per_s=2e9,
)
SOFTWARE = Software(
    python="3.11.7",
    packages={"orpo-ray": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "ray": "2.60.0"},
    supported={"python": "<3.14,>=3.11", "torch": ">=2.11", "ray": "<2.64,>=2.60"},
)
WELL = Facts(
    software=SOFTWARE,
    cards=CARDS,
    torch=TORCH,
    attention=Attention(path="flash varlen", is_flash=True, device="cuda", dtype="bfloat16"),
    nf4=Nf4(
        device="cuda",
        dtype="bfloat16",
        forward=2e-3,
        backward=2e-3,
        bound=0.03,
        rounding=0.16,
        rounding_bound=0.2,
    ),
    system=SYSTEM,
    disks=(DISK, replace(DISK, what="hub cache"), replace(DISK, what="Ray's files")),
    storage=RoundTrip(place="/data/runs", seconds=0.01),
    hub=Hub(endpoint="https://huggingface.co", offline=False, seconds=0.1),
    base=Base(name="some/base", template="the base's own", has_own_template=True, end="</s>"),
    ray=RayState(version="2.60.0", folder="/tmp/ray"),
)
BASE = ModelConfig(base="some/base")


def run_with(**sections: Any) -> RunConfig:
    tree = {"name": "run", "data": {"train": "pairs.jsonl"}, "model": {"base": "x"}, **sections}
    return build(RunConfig, tree, {(): "tests"})


def found(
    asked: Asked | None = None, well: Facts = WELL, **changes: Any
) -> list[tuple[str, str, str]]:
    """Level, text and fix of all that is not well on a server with these facts."""
    findings = judge_server(asked or Asked(), replace(well, **changes))
    return [(each.level, each.what, each.fix) for each in findings if each.level is not OK]


def the_one(asked: Asked | None = None, **changes: Any) -> tuple[str, str, str]:
    (only,) = found(asked, **changes)
    return only


def test_a_server_without_a_fault_has_one_line_for_each_thing_that_was_looked_at() -> None:
    findings = judge_server(Asked(model=BASE), WELL)
    assert {finding.level for finding in findings} == {OK}
    assert {finding.subject for finding in findings} == {
        *("software", "GPU", "number format", "flash attention", "NF4", "P2P", "network"),
        *("/dev/shm", "open files", "Ray", "disk", "storage", "hub", "base"),
    }
    texts = [finding.what for finding in findings]
    assert "Python 3.11.7, orpo-ray 0.1.0, torch 2.13.0, transformers 5.23.0, ray 2.60.0" in texts
    assert "2 x NVIDIA GeForce RTX 4090 (24 GB), driver 580.95.05, CUDA 13.0" in texts


def test_a_complaint_without_a_fix_cannot_be_made() -> None:
    with pytest.raises(AssertionError, match="it is broken"):
        Finding(subject="GPU", level=WARNING, what="it is broken")


# --- software -------------------------------------------------------------------------------------


def test_versions_that_are_not_supported_or_missing_stop_a_run() -> None:
    packages = {**SOFTWARE.packages, "ray": "2.55.1"}
    del packages["torch"]
    wrong = replace(SOFTWARE, python="3.14.0", packages=packages)
    assert found(software=wrong) == [
        (
            STOPS,
            "python 3.14.0; orpo-ray supports <3.14,>=3.11",
            "make the virtual environment anew with Python <3.14,>=3.11",
        ),
        (STOPS, "torch is missing; orpo-ray supports >=2.11", "pip install 'torch>=2.11'"),
        (STOPS, "ray 2.55.1; orpo-ray supports <2.64,>=2.60", "pip install 'ray<2.64,>=2.60'"),
    ]


def test_a_build_for_cpus_or_before_a_release_counts_as_that_release() -> None:
    packages = {**SOFTWARE.packages, "torch": "2.13.0+cpu", "ray": "2.61.0rc1"}
    assert not found(software=replace(SOFTWARE, packages=packages))


def test_code_that_is_not_installed_cannot_say_what_it_supports() -> None:
    level, what, _ = the_one(software=Software(python="3.12.1", packages={}, supported={}))
    assert level == NOTE and "not installed here as a package" in what


# --- GPUs -----------------------------------------------------------------------------------------

NO_GPU = Torch(cuda="13.0")


def test_a_driver_that_is_too_old_is_named_with_the_one_to_install() -> None:
    level, what, fix = the_one(cards=replace(CARDS, driver="470.256.02"), torch=NO_GPU)
    assert level == STOPS
    assert what == "2 NVIDIA GPUs, but driver 470.256.02 is too old for this torch (CUDA 13.0)"
    assert fix.startswith("install driver 580 or newer")


@pytest.mark.parametrize(
    ("driver", "cuda", "old"),
    [
        ("570.124.06", "13.0", True),
        ("580.65.06", "13.0", False),
        ("525.60.13", "12.8", False),
        ("520.61.05", "12.1", True),
        ("", "13.0", False),
        ("580.65.06", "", False),
    ],
)
def test_each_cuda_has_its_oldest_driver(driver: str, cuda: str, old: bool) -> None:
    assert is_too_old(driver, cuda) is old


def test_cards_without_a_driver_and_a_torch_for_cpus_stop_a_run() -> None:
    no_driver = the_one(cards=Cards(on_bus=1), torch=NO_GPU)
    assert no_driver[:2] == (
        STOPS,
        "1 NVIDIA GPU, but the driver does not work: there is no nvidia-smi",
    )
    assert "--gpus all" in no_driver[2]
    broken = Cards(on_bus=1, problem="couldn't communicate with the NVIDIA driver")
    assert "couldn't communicate" in the_one(cards=broken, torch=NO_GPU)[1]
    level, what, fix = the_one(torch=Torch())
    assert (level, what) == (STOPS, "2 NVIDIA GPUs, but this torch is built for CPUs only")
    assert "pip install" in fix


def test_cards_that_torch_does_not_find_stop_a_run() -> None:
    level, what, fix = the_one(torch=Torch(cuda="13.0", complaint="CUDA unknown error"))
    assert level == STOPS and what.endswith("but torch finds none: CUDA unknown error")
    assert "CUDA_VISIBLE_DEVICES" in fix


def test_a_machine_without_a_card_trains_on_its_cpu_unless_the_config_wants_a_gpu() -> None:
    plain = {"cards": Cards(on_bus=0), "torch": Torch()}
    assert not found(**plain)
    level, what, fix = the_one(Asked(runs=(run_with(scale={"gpus_per_worker": 1}),)), **plain)
    assert (level, what) == (STOPS, "none, but scale.gpus_per_worker is 1")
    assert "scale.gpus_per_worker=0" in fix


def test_a_gpu_that_is_too_new_or_too_old_for_torchs_kernels_stops_a_run() -> None:
    old_torch = Torch(cuda="12.6", devices=(RTX_5090,), kernels=("sm_80", "sm_86", "sm_90"))
    level, what, fix = the_one(torch=old_torch)
    assert level == STOPS
    assert "NVIDIA GeForce RTX 5090 has compute capability 12.0, and this torch has no" in what
    assert fix.endswith("/whl/cu128")
    volta = replace(T4, name="Tesla V100", capability=(7, 0), bfloat16=True)
    assert the_one(torch=replace(TORCH, devices=(volta,), peers=None))[2].endswith("/whl/cu126")


@pytest.mark.parametrize(
    ("capability", "kernels", "runs"),
    [
        ((8, 9), ("sm_80",), True),
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_80",), False),
        ((9, 0), ("compute_80",), True),
        ((12, 0), ("sm_90a", "compute_90a"), False),
        ((10, 3), ("sm_100f",), True),
        ((8, 9), (), True),
    ],
)
def test_which_kernels_run_where(
    capability: tuple[int, int], kernels: tuple[str, ...], runs: bool
) -> None:
    assert has_kernels(capability, kernels) is runs


def test_a_gpu_that_does_not_add_stops_a_run() -> None:
    broken = replace(RTX_4090, problem="CUDA error: uncorrectable ECC error encountered")
    level, what, fix = the_one(torch=replace(TORCH, devices=(RTX_4090, broken)))
    assert level == STOPS and what.startswith("GPU 1 (NVIDIA GeForce RTX 4090) does not compute")
    assert "nvidia-smi -q -i 1" in fix


def test_a_t4_takes_float16() -> None:
    alone = replace(TORCH, devices=(T4,), peers=None)
    level, what, _ = the_one(torch=alone)
    assert level == NOTE
    assert what.startswith("Tesla T4 (compute capability 7.5) does not compute bfloat16")
    named = Asked(model=ModelConfig(base="x", dtype="bfloat16"))
    assert not found(named, torch=alone), "what a run names is for the checks of the run"


def test_rows_without_flash_attention_are_a_note_on_a_gpu_and_nothing_on_a_cpu() -> None:
    slow = Attention(path="SDPA per run of tokens", is_flash=False, device="cuda", dtype="float16")
    assert the_one(attention=slow)[0] == NOTE
    assert not found(attention=replace(slow, device="cpu", dtype="float32"))


def test_wrong_numbers_of_four_bits_stop_a_run_that_uses_them() -> None:
    assert WELL.nf4 is not None
    wrong = replace(WELL.nf4, backward=0.9)
    level, what, fix = the_one(nf4=wrong)
    assert level == STOPS and "9.0e-01 backward (at most 3.0e-02)" in what
    assert "model.quantization=none" in fix
    plain = Asked(model=ModelConfig(base="x", quantization="none"))
    assert the_one(plain, nf4=wrong)[0] == WARNING
    mixed = (run_with(model={"base": "x", "quantization": "none"}), run_with())
    assert the_one(replace(plain, runs=mixed), nf4=wrong)[0] == STOPS, "a stage uses them"
    assert the_one(replace(plain, runs=mixed[:1]), nf4=wrong)[0] == WARNING
    assert the_one(nf4=replace(WELL.nf4, rounding=0.5))[0] == STOPS


# --- settings -------------------------------------------------------------------------------------

NO_WANDB = "training.trackers: wandb is not installed; pip install wandb"
NO_FLASH = "model.attention: flash_attention_2 needs a GPU; use auto"


def test_what_the_checks_of_a_run_refuse_stops_a_run() -> None:
    refused = Settings(has_gpu=True, missing=(NO_WANDB,), unfit=(NO_FLASH,))
    assert found(settings=refused) == [
        (STOPS, "training.trackers: wandb is not installed", "pip install wandb"),
        (STOPS, "model.attention: flash_attention_2 needs a GPU", "use auto"),
    ]
    assert not found(settings=Settings(has_gpu=False))


def test_a_server_without_a_gpu_takes_no_worker_if_others_have_some() -> None:
    bare = replace(
        WELL,
        cards=Cards(on_bus=0),
        torch=NO_GPU,
        settings=Settings(has_gpu=False, missing=(NO_WANDB,), unfit=(NO_FLASH,)),
    )
    asked = Asked(runs=(run_with(scale={"gpus_per_worker": 1}),))
    worker = replace(HEAD, name="10.0.0.2")
    head = replace(HEAD, facts=bare)
    assert conclude(asked, [head, worker])["stops"] == 1, "its driver reports to wandb"
    assert conclude(asked, [head, replace(worker, facts=bare)])["stops"] == 6


# --- links ----------------------------------------------------------------------------------------

SILENT = replace(SYSTEM, variables={})


def test_two_rtx_4090_are_told_to_do_without_p2p() -> None:
    level, what, fix = the_one(system=SILENT)
    assert level == WARNING
    assert what.startswith("2 GPUs such as NVIDIA GeForce RTX 4090 have no P2P over PCIe")
    assert fix == "export NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1 where Ray or the run is started"
    fast = replace(SILENT, has_infiniband=True)
    assert "NCCL_IB_DISABLE" not in the_one(system=fast)[2]


def test_two_rtx_5090_whose_driver_claims_p2p_are_told_too() -> None:
    claims = replace(TORCH, devices=(RTX_5090, RTX_5090), peers=True)
    level, what, _ = the_one(torch=claims, system=SILENT)
    assert level == WARNING and "torch says that they have it" in what


def test_two_rtx_4090_with_a_driver_that_accelerate_refuses_stop_a_run() -> None:
    old = replace(CARDS, driver="535.183.01")
    cuda = replace(TORCH, cuda="12.6", peers=True)
    level, what, fix = the_one(cards=old, torch=cuda, system=SILENT)
    assert level == STOPS and "driver 535.183.01 says that they have" in what
    assert fix.startswith("export NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1 where")
    assert not found(cards=old, torch=cuda), "both variables are set"


def test_other_gpus_and_a_single_one_need_no_variable() -> None:
    assert not found(torch=replace(TORCH, devices=(H100, H100), peers=True), system=SILENT)
    assert not found(torch=replace(TORCH, devices=(RTX_4090,), peers=None), system=SILENT)


def test_an_interface_that_is_not_there_stops_a_run() -> None:
    typo = replace(SYSTEM, variables={**SYSTEM.variables, "NCCL_SOCKET_IFNAME": "eth0"})
    level, what, fix = the_one(system=typo)
    assert level == STOPS and "NCCL_SOCKET_IFNAME=eth0, but this server has no such" in what
    assert fix.startswith("unset NCCL_SOCKET_IFNAME")
    for named in ("eno1", "eno", "=eno1", "^docker0,lo"):
        variables = {**SYSTEM.variables, "NCCL_SOCKET_IFNAME": named}
        assert not found(system=replace(SYSTEM, variables=variables)), named


def test_a_server_whose_address_no_interface_has_guesses_one() -> None:
    assert not found(system=replace(SYSTEM, address="10.0.0.1"))
    level, what, fix = the_one(system=replace(SYSTEM, address="203.0.113.9"))
    assert level == WARNING and what.endswith("so gloo and NCCL guess among eno1")
    assert fix.startswith("export NCCL_SOCKET_IFNAME=eno1 GLOO_SOCKET_IFNAME=eno1")


# --- limits ---------------------------------------------------------------------------------------


def test_the_shared_memory_of_docker_is_too_small() -> None:
    small = replace(SYSTEM, shared_memory_bytes=64 * 2**20, in_container=True)
    level, what, fix = the_one(system=small)
    assert level == WARNING and what.startswith("64 MB; Ray keeps its objects on disk")
    assert "--shm-size=8g" in fix
    assert "remount" in the_one(system=replace(small, in_container=False))[2]


def test_a_limit_of_1024_files_is_named_where_nothing_may_raise_it() -> None:
    low = replace(SYSTEM, open_files=1024, open_files_hard=1024)
    level, what, fix = the_one(system=low)
    assert level == WARNING and what.startswith("at most 1024; Ray wants 8192")
    assert "limits.conf" in fix
    assert "--ulimit" in the_one(system=replace(low, in_container=True))[2]
    may_rise = replace(low, open_files_hard=65536)
    assert not found(system=may_rise), "a driver raises it"
    assert "ulimit -n 8192 before ray start" in the_one(system=replace(may_rise, under_ray=True))[2]
    assert not found(system=replace(low, open_files=-1, open_files_hard=-1)), "no limit"


# --- places ---------------------------------------------------------------------------------------


def test_a_full_disk_stops_a_run_and_a_small_cache_is_named() -> None:
    level, what, fix = the_one(disks=(replace(DISK, free_bytes=5 * 10**8),))
    assert (level, what) == (STOPS, "/data (storage) has 0.5 GB free")
    assert "storage=FOLDER" in fix
    small = replace(DISK, what="hub cache", free_bytes=5 * 10**9)
    assert the_one(disks=(small,))[::2][0] == WARNING
    assert "HF_HOME" in the_one(disks=(small,))[2]


def test_a_slow_disk_is_named_with_its_speed() -> None:
    level, what, _ = the_one(disks=(replace(DISK, write_bytes_per_s=2e7),))
    assert level == WARNING
    assert what == "/data (storage) is slow: 20 MB/s written, 2000 MB/s read"
    untimed = replace(DISK, write_bytes_per_s=None, read_bytes_per_s=None)
    assert not found(disks=(untimed,))


def test_a_disk_that_cannot_be_written_stops_a_run() -> None:
    level, what, fix = the_one(disks=(replace(DISK, what="Ray's files", problem="Read-only"),))
    assert level == STOPS and what.endswith("cannot be written: Read-only")
    assert "RAY_TMPDIR" in fix


@pytest.mark.parametrize(
    ("error", "helps"),
    [
        ("EACCES", "chown it to the user of the run, or choose another folder"),
        ("EROFS", "mount it for writing (mount -o remount,rw), or choose another folder"),
        ("ENOSPC", "make room for bytes (df -h) or files (df -i), or choose another folder"),
        ("EDQUOT", "make room in the quota of the user (quota -s), or choose another folder"),
        ("ESTALE", "look at dmesg, and mount it anew, or choose another folder"),
        ("ENOTDIR", "choose another folder"),
        ("ENOENT", "choose another folder"),
        ("", "choose another folder"),
    ],
)
def test_each_reason_why_a_folder_cannot_be_written_has_its_own_repair(
    error: str, helps: str
) -> None:
    rays = replace(DISK, what="Ray's files", problem="no", error=error)
    assert the_one(disks=(rays,))[2] == f"{helps} (export RAY_TMPDIR=FOLDER)"
    kept = RoundTrip(place="/data/runs", problem="/data: no", error=error)
    assert the_one(storage=kept)[2] == f"{helps} (set storage=FOLDER)"


def test_a_storage_that_cannot_be_written_is_one_finding() -> None:
    kept = RoundTrip(place="/data/runs", problem="/data: no", error="EROFS")
    full = replace(DISK, problem="no", error="EROFS", free_bytes=0)
    assert the_one(storage=kept, disks=(full,))[1] == "/data/runs does not work: /data: no"


def test_a_storage_that_refuses_or_is_not_shared_stops_a_run() -> None:
    denied = RoundTrip(place="/data/runs", problem="/data: Permission denied")
    assert the_one(storage=denied)[:2] == (
        STOPS,
        "/data/runs does not work: /data: Permission denied",
    )
    bucket = RoundTrip(place="s3://runs/here", problem="storage: there is no bucket runs")
    assert the_one(storage=bucket)[2].endswith("aws s3 ls s3://runs/here")
    apart = RoundTrip(place="/data/runs", seconds=0.01, sees_marker=False)
    level, what, fix = the_one(storage=apart)
    assert (level, what) == (STOPS, "/data/runs is not the same here as on the first server")
    assert "s3://" in fix
    assert not found(storage=replace(apart, sees_marker=True))
    assert the_one(storage=RoundTrip(place="s3://a/b", seconds=12.0))[0] == WARNING


def test_without_the_hub_a_base_that_is_not_in_the_cache_stops_a_run() -> None:
    offline = Hub(endpoint="https://huggingface.co", offline=True)
    away = replace(offline, offline=False, problem="Name or service not known")
    assert not found(hub=offline)
    assert the_one(hub=away)[0] == NOTE
    for hub in (offline, away):
        assert not found(Asked(model=BASE), hub=replace(hub, has_base=True))
        level, what, fix = the_one(Asked(model=BASE), hub=replace(hub, has_base=False))
        assert level == STOPS and what.endswith("the base is not in the cache")
        assert fix.startswith("hf download some/base")


def test_an_endpoint_of_the_hub_that_is_no_url_is_named_with_its_variable() -> None:
    wrong = Hub(endpoint="foo", offline=False, problem="it is no URL")
    fix = "export HF_ENDPOINT=https://HOST, or unset it"
    assert the_one(hub=wrong) == (WARNING, "HF_ENDPOINT=foo is no URL", fix)
    missed = the_one(Asked(model=BASE), hub=replace(wrong, has_base=False))
    assert missed == (STOPS, "HF_ENDPOINT=foo is no URL; the base is not in the cache", fix)
    assert the_one(Asked(model=BASE), hub=replace(wrong, has_base=True))[0] == STOPS
    assert the_one(hub=replace(wrong, endpoint="http://hub:port"))[0] == STOPS
    assert not found(hub=replace(wrong, offline=True)), "nothing asks it"


def test_a_base_without_a_template_gets_the_plain_one_and_one_without_an_end_stops_a_run() -> None:
    said = ("some/base has no chat template: the plain one is used",)
    bare = Base(name="some/base", template="plain", end="</s>", said=said)
    level, what, fix = the_one(base=bare)
    assert level == WARNING and what.startswith("some/base has no chat template: the plain one")
    assert what.endswith("answers end with </s>") and "model.chat_template=" in fix
    told = "model.chat_template: llama3 writes <|eot_id|>; the tokenizer has no such token"
    other = Base(name="some/base", template="llama3", end="</s>", said=(told,))
    assert the_one(base=other)[:2] == (WARNING, told)
    endless = Base(name="some/base", problem="model.base: the tokenizer names no end token")
    assert the_one(base=endless)[0] == STOPS
    assert not found(base=Base(name="x.gguf", skipped="a run converts this GGUF file first"))


# --- Ray ------------------------------------------------------------------------------------------

RAY = RayState(version="2.60.0", folder="/tmp/ray", dashboard="http://127.0.0.1:8265")


@pytest.mark.parametrize(
    ("ray", "level", "what", "fix"),
    [
        (
            replace(RAY, auth_mode="token"),
            STOPS,
            "RAY_AUTH_MODE=token, but there is no token",
            "RAY_AUTH_TOKEN_PATH",
        ),
        (
            replace(RAY, token="/s/token", token_problem="others may read it"),
            WARNING,
            "the token file /s/token: others may read it",
            "chmod 600 /s/token",
        ),
        (
            replace(RAY, token="/s/token", token_problem="it is empty"),
            STOPS,
            "the token file /s/token: it is empty",
            "copy the cluster's token to /s/token",
        ),
        (
            replace(RAY, answer="open"),
            WARNING,
            "answers without a token",
            "RAY_AUTH_MODE=token",
        ),
        (
            replace(RAY, answer="asks for a token"),
            WARNING,
            "asks for a token, and there is none here",
            "~/.ray/orpo-ray.token",
        ),
        (
            replace(RAY, answer="other"),
            WARNING,
            "not as Ray's dashboard does",
            "--address",
        ),
        (
            replace(RAY, dashboard="garbage", answer="no URL"),
            WARNING,
            "RAY_API_SERVER_ADDRESS=garbage is no URL",
            "export RAY_API_SERVER_ADDRESS=http://HOST:8265, or unset it",
        ),
        (
            replace(RAY, folder="/scratch/" + "long/" * 10 + "ray"),
            STOPS,
            "is too long for its sockets",
            "export RAY_TMPDIR=/tmp",
        ),
    ],
)
def test_what_is_wrong_with_ray(ray: RayState, level: str, what: str, fix: str) -> None:
    how_bad, told, repair = the_one(ray=ray)
    assert how_bad == level and what in told and fix in repair


def test_a_ray_that_runs_already_has_a_folder_that_is_short_enough() -> None:
    long = replace(RAY, folder="/scratch/" + "long/" * 12)
    assert the_one(ray=long)[0] == STOPS and not found(ray=replace(long, is_running=True))


# --- probes without an answer ---------------------------------------------------------------------


def test_a_probe_that_hangs_is_as_bad_as_what_it_looks_at() -> None:
    why = "no answer within 30 s"
    failures = {"storage": why, "hub": why, "nf4": why}
    levels = [level for level, _, _ in found(storage=None, hub=None, nf4=None, failures=failures)]
    assert levels == [STOPS, STOPS, WARNING]
    plain = Asked(model=ModelConfig(base="x", quantization="none"))
    assert the_one(plain, nf4=None, failures={"nf4": why})[0] == WARNING


def test_a_bucket_that_hangs_is_no_disk() -> None:
    why = {"storage": "no answer within 30 s"}
    here, there = (
        the_one(Asked(storage=place), storage=None, failures=why)[2]
        for place in ("/data/runs", "s3://bucket/runs")
    )
    assert "df -h" in here and "df -h" not in there
    assert there.startswith("check AWS_ENDPOINT_URL") and there.endswith(
        "aws s3 ls s3://bucket/runs"
    )


@pytest.mark.parametrize(
    ("why", "fix"),
    [
        ("10.0.0.2: a command failed: ... No module named orpo_ray.doctor", "pip install orpo-ray"),
        ("10.0.0.2: cannot be reached as root: No route to host", "switch it on"),
        ("server 10.0.0.2 was lost while it was asked", "journalctl"),
    ],
)
def test_a_server_that_does_not_answer_is_told_why(why: str, fix: str) -> None:
    ((level, what, repair),) = found(well=Facts(), failures={"server": why})
    assert (level, what) == (STOPS, why) and fix in repair


# --- several servers ------------------------------------------------------------------------------

HEAD = Server(name="10.0.0.1", facts=WELL, clock_offset=0.2, clock_uncertainty=0.1)
WORKER = replace(HEAD, name="10.0.0.2")


def together(*servers: Server, storage: str = "/data/runs") -> list[tuple[str, str, str]]:
    result = conclude(Asked(storage=storage), servers)
    return [
        (each["level"], each["what"], each["fix"])
        for each in result["findings"]
        if each["level"] != OK
    ]


def test_servers_that_agree_are_well() -> None:
    assert not together(HEAD, WORKER)
    result = conclude(Asked(), [HEAD, WORKER])
    assert result["stops"] == 0
    assert [server["name"] for server in result["servers"]] == ["10.0.0.1", "10.0.0.2"]
    assert {each["subject"] for each in result["findings"]} == {"versions", "clock", "GPUs"}


def test_versions_that_differ_stop_a_run_if_they_change_its_numbers() -> None:
    packages = {**SOFTWARE.packages, "torch": "2.12.0", "rich": "15.0.0"}
    other = replace(WORKER, facts=replace(WELL, software=replace(SOFTWARE, packages=packages)))
    assert together(HEAD, other) == [
        (
            STOPS,
            "torch differs: 2.13.0 on 10.0.0.1; 2.12.0 on 10.0.0.2",
            "install the same torch on every server, with the same constraints.txt",
        ),
        (
            WARNING,
            "rich differs: none on 10.0.0.1; 15.0.0 on 10.0.0.2",
            "install the same rich on every server, with the same constraints.txt",
        ),
    ]


def test_a_clock_that_is_40_seconds_off_is_named_and_one_that_a_bucket_refuses_stops_a_run() -> (
    None
):
    late = replace(WORKER, clock_offset=-39.8)
    ((level, what, fix),) = together(HEAD, late)
    assert level == WARNING
    assert what == "10.0.0.1 is ahead of 10.0.0.2 by 40.0 s (known to 0.2 s)"
    assert fix.startswith("timedatectl set-ntp true")
    hours = replace(WORKER, clock_offset=-3600.0)
    assert together(HEAD, hours)[0][0] == WARNING
    assert together(HEAD, hours, storage="s3://runs/here")[0][0] == STOPS
    slow_answer = replace(late, clock_uncertainty=39.0)
    assert not together(HEAD, slow_answer), "it may as well be the network"


def test_gpus_of_several_kinds_are_named() -> None:
    other = replace(WORKER, facts=replace(WELL, torch=replace(TORCH, devices=(T4, T4))))
    ((level, what, _),) = together(HEAD, other)
    assert level == WARNING and what.endswith(
        "NVIDIA GeForce RTX 4090, NVIDIA GeForce RTX 4090 on 10.0.0.1; Tesla T4, Tesla T4 on "
        "10.0.0.2; all wait for the slowest"
    )


def test_what_stops_is_counted_over_all_servers() -> None:
    denied = replace(WELL, storage=RoundTrip(place="/data", problem="Permission denied"))
    result = conclude(Asked(), [HEAD, replace(WORKER, facts=denied)])
    assert result["stops"] == 1
    (stopping,) = (each for each in result["servers"][1]["findings"] if each["level"] == STOPS)
    assert stopping["subject"] == "storage" and result["servers"][1]["findings"][0] == stopping
    assert result["servers"][1]["facts"]["storage"]["problem"] == "Permission denied"


def test_facts_travel_as_json() -> None:
    assert FACTS.validate_json(FACTS.dump_json(WELL)) == WELL
