"""`orpo-ray doctor` as a person gives it: screen, JSON, exit code, and that it leaves nothing."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray_head import free_ports
from stand_ins import stand_in
from support import BASE, ENVIRONMENT, Done
from terminal import LACKING, WRONG, Command, one_line, write_config

from orpo_ray.cli.doctor_screen import print_checkup
from orpo_ray.doctor import cluster
from orpo_ray.doctor.facts import ASKED, FACTS, Asked, Facts, RoundTrip
from orpo_ray.doctor.server import REMOVE, unanswered
from orpo_ray.errors import SetupError

pytestmark = pytest.mark.slow


def everything(folder: Path) -> list[tuple[str, int]]:
    """All folders below a folder, and all files with the time of their last change."""
    return sorted(
        (str(path), path.stat().st_mtime_ns if path.is_file() else 0) for path in folder.rglob("*")
    )


def surroundings(folder: Path, **variables: str) -> dict[str, str]:
    """A home, a hub's cache and a folder for temporary files below one folder, and no hub."""
    for name in ("home", "tmp", "work"):
        (folder / name).mkdir(exist_ok=True)
    places = {"HOME": "home", "TMPDIR": "tmp", "HF_HOME": "home/hub", "XDG_CACHE_HOME": "home/c"}
    own = {name: str(folder / place) for name, place in places.items()}
    return {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": "", **own, **variables}


def doctor(folder: Path, *words: object, **variables: str) -> Done:
    """Run it in a shell of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "orpo_ray.cli.main", "doctor", *map(str, words)],
        cwd=folder / "work",
        env=surroundings(folder, **variables),
        capture_output=True,
        text=True,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """One look at this machine, with a base and a storage."""
    # The paths of Ray's sockets lie below the folder for temporary files.
    folder = tmp_path_factory.mktemp("d")
    surroundings(folder)
    before = everything(folder)
    done = doctor(folder, "--base", BASE, "--storage", folder / "work" / "runs", "--json")
    assert everything(folder) == before, "it changes nothing"
    return done, folder


def findings_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    (server,) = result["servers"]
    return {finding["subject"]: finding for finding in server["findings"]}


def test_it_looks_at_all_that_a_run_needs(looked: tuple[Done, Path]) -> None:
    done, folder = looked
    (server,) = done.result["servers"]
    assert server["name"] == socket.gethostname()
    assert server["facts"]["failures"] == {}
    found = findings_of(done.result)
    wanted = {"software", "GPU", "flash attention", "NF4", "network", "/dev/shm", "open files"}
    assert wanted | {"disk", "storage", "hub", "base"} <= set(found)
    assert found["NF4"]["level"] == found["storage"]["level"] == found["base"]["level"] == "ok"
    assert "answers end with <|im_end|>" in found["base"]["what"]
    assert found["storage"]["what"].startswith(f"{folder}/work/runs: there and back in ")
    assert all(each["fix"] for each in found.values() if each["level"] != "ok")


def test_the_exit_code_says_whether_a_run_would_stop(looked: tuple[Done, Path]) -> None:
    done, _ = looked
    (server,) = done.result["servers"]
    bad = [each for each in server["findings"] if each["level"] == "stops"]
    assert done.result["stops"] == len(bad), bad
    assert done.code == done.result["exit_code"] == (LACKING if bad else 0), bad
    assert len(done.out.splitlines()) == 1, "one JSON object and nothing else"


def test_a_storage_that_refuses_stops_a_run(tmp_path: Path) -> None:
    surroundings(tmp_path)
    config = write_config(tmp_path)
    (tmp_path / "storage").touch()
    done = doctor(tmp_path, config, "--base", tmp_path / "none")
    assert done.code == LACKING, done.out + done.err
    lines = [line for line in done.out.splitlines() if line.startswith("stops")]
    assert any("storage" in line for line in lines) and any("base" in line for line in lines)
    assert "findings would stop a run on this machine" in done.out
    assert (tmp_path / "storage").is_file() and list((tmp_path / "tmp").iterdir()) == []


def test_a_stage_that_train_refuses_stops_a_run(tmp_path: Path) -> None:
    surroundings(tmp_path)
    stages = "stages=[{objective: {kind: sft}}, {model: {attention: flash_attention_2}}]"
    done = doctor(tmp_path, write_config(tmp_path), stages, "--json")
    found = findings_of(done.result)["settings"]
    assert (done.code, found["level"], found["fix"]) == (LACKING, "stops", "use auto")
    assert found["what"].startswith("model.attention: flash_attention_2 needs a GPU")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_base_that_cannot_come_is_one_finding_and_takes_no_time(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        variables = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": url, "NO_PROXY": "*"}
        done = doctor(tmp_path, "--base", "no/such", "--json", RAY_TMPDIR="/tmp", **variables)
    found = findings_of(done.result)
    assert found["hub"]["level"] == "stops" and found["base"]["level"] == "ok"
    assert "not in the cache, and no hub answers" in found["base"]["what"]
    assert (done.code, done.result["stops"]) == (LACKING, 1)


def test_a_hub_that_hangs_delays_nothing_for_long(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = doctor(tmp_path, "--json", HF_HUB_OFFLINE="0", HF_ENDPOINT=url, NO_PROXY="*")
    found = findings_of(done.result)["hub"]
    assert found["level"] == "note" and f"{url}: no answer: timed out" in found["what"]


def test_a_cluster_that_is_not_there_is_a_finding(tmp_path: Path) -> None:
    nowhere = f"127.0.0.1:{free_ports(1)[0]}"
    done = doctor(tmp_path, "--json", RAY_ADDRESS=nowhere)
    (finding,) = (each for each in done.result["findings"] if each["level"] == "stops")
    assert (done.code, finding["subject"]) == (LACKING, "cluster")
    assert f"no Ray cluster answers at {nowhere}" in finding["what"]
    assert "unset RAY_ADDRESS" in finding["fix"]
    assert len(done.result["servers"]) == 1, "this machine is looked at all the same"


# --- in this process ------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(variable, "")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    (tmp_path / "id").touch()
    tree = {
        "name": "lab",
        "head": "10.0.0.1",
        "workers": ["10.0.0.2"],
        "ssh": {"key": "~/id"},
        "token": "~/s/token",
    }
    (tmp_path / "hosts.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return tmp_path / "hosts.yaml"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--storage", "https://host/runs"], "--storage: https:// is not supported"),
        (["--base", "https://host/x.gguf"], "base: "),
        (["none.yaml"], "none.yaml"),
        (["--hosts", "hosts.yaml", "--address", "http://x"], "--hosts and --address both name"),
        (["--hosts", "hosts.yaml", "--storage", "runs"], "storage: runs is relative"),
        (["--address", "ftp://x"], "the token cannot be read"),
        (["--bases", "x"], "No such option: --bases"),
        (["--base", ""], "--base: has no value; name one, or leave --base out"),
        (["--storage", " "], "--storage: has no value"),
        (["none.yaml", "--base", ""], "--base: has no value"),
    ],
)
def test_wrong_usage_is_one_line(
    command: Command, hosts: Path, words: list[str], says: str
) -> None:
    one_line(command("doctor", *words), WRONG, says)


def test_a_dashboard_that_does_not_answer_is_a_finding(command: Command, tmp_path: Path) -> None:
    (tmp_path / "token").touch(mode=0o600)
    (tmp_path / "token").write_text("0123456789abcdef")
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    done = command("doctor", "--address", nowhere, "--token", "token", "--json")
    assert done.code == LACKING
    (finding,) = done.result["findings"]
    assert (finding["what"], done.result["servers"]) == (f"{nowhere}: no answer", [])


def test_servers_that_ssh_does_not_reach_are_findings(
    command: Command, hosts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    stand_in(tmp_path / "bin" / "ssh", "print('No route to host', file=sys.stderr); sys.exit(255)")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    done = command("doctor", "--hosts", hosts)
    assert done.code == LACKING
    assert "10.0.0.1: cannot be reached as root: No route to host" in " ".join(done.out.split())
    assert "2 findings would stop a run on 2 servers" in done.out


def test_an_error_whose_cause_it_finds_names_it_and_no_other_does(
    command: Command, tmp_path: Path
) -> None:
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    (tmp_path / "token").touch(mode=0o600)
    (tmp_path / "token").write_text("0123456789abcdef")
    line = one_line(command("status", "--address", nowhere, "--token", "token"), LACKING)
    assert line == f"orpo-ray: {nowhere}: no answer; `orpo-ray doctor` looks for the cause"
    too_many = command("train", write_config(tmp_path), "scale.cpus_per_worker=4096")
    assert "doctor" not in one_line(too_many, LACKING, "scale.cpus_per_worker")


# --- servers over SSH, without SSH ----------------------------------------------------------------


class Servers:
    """Servers that a shell reaches; `facts` by address, None for one without orpo-ray."""

    def __init__(self, facts: dict[str, Facts | None], ahead: float = 0.0) -> None:
        self._facts, self._ahead = facts, ahead
        self.asked: list[tuple[str, str, Asked]] = []

    def __call__(self, address: str, command: str, stdin: str) -> str:
        if command.startswith("date"):
            import time

            return f"{time.time() + (self._ahead if address == '10.0.0.2' else 0.0)}\n"
        facts, question = self._facts[address], ASKED.validate_json(stdin)
        self.asked.append((address, command.rpartition(".server")[2].strip(), question))
        if facts is None:
            raise SetupError(f"{address}: a command failed: No module named orpo_ray")
        return (
            "/data/_seen/marker\n" if command.endswith("leave") else FACTS.dump_json(facts).decode()
        )


WELL = Facts(storage=RoundTrip(place="/data", seconds=0.01, sees_marker=True))


def test_servers_are_asked_over_ssh_and_the_marker_is_removed() -> None:
    shell = Servers({"10.0.0.1": WELL, "10.0.0.2": WELL}, ahead=40.0)
    found = cluster.ask_over_ssh(Asked(storage="/data"), ["10.0.0.1", "10.0.0.2"], "/opt/x", shell)
    assert [server.name for server in found] == ["10.0.0.1", "10.0.0.2"]
    assert found[1].clock_offset == pytest.approx(40.0, abs=1.0)
    assert found[0].clock_offset == pytest.approx(0.0, abs=1.0)
    first, last = shell.asked[0], shell.asked[-1]
    assert first[:2] == ("10.0.0.1", "leave") and last[:2] == ("10.0.0.1", REMOVE)
    assert last[2].marker == "/data/_seen/marker"
    between = {(address, asked.address, asked.marker) for address, _, asked in shell.asked[1:-1]}
    assert between == {(each, each, "/data/_seen/marker") for each in ("10.0.0.1", "10.0.0.2")}


def test_a_server_without_orpo_ray_is_told_and_the_others_answer() -> None:
    shell = Servers({"10.0.0.1": None, "10.0.0.2": WELL})
    found = cluster.ask_over_ssh(Asked(storage="/data"), ["10.0.0.1", "10.0.0.2"], "/opt/x", shell)
    told = "10.0.0.1: a command failed: No module named orpo_ray"
    assert [server.facts for server in found] == [unanswered(told), WELL]
    assert not [words for _, words, _ in shell.asked if words == REMOVE], "nothing was left there"


def test_a_clock_is_known_to_half_the_time_of_the_question() -> None:
    assert cluster.offset(100.0, 140.5, 101.0) == (40.0, 0.5)


# --- the screen -----------------------------------------------------------------------------------


def finding(level: str, subject: str, what: str, fix: str = "") -> dict[str, str]:
    return {"level": level, "subject": subject, "what": what, "fix": fix}


def test_servers_stand_side_by_side_and_a_finding_that_they_share_comes_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    files = finding("warning", "open files", "at most 1024", "ulimit -n 8192")
    full = finding("stops", "disk", "/data has 0.1 GB free", "make room")
    gpu = finding("ok", "GPU", "1 x H100")
    servers = [
        {"name": f"10.0.0.{number}", "facts": {}, "findings": [*own, files, gpu]}
        for number, own in ((1, [full]), (2, []))
    ]
    clock = finding("ok", "clock", "apart by at most 0.1 s")
    print_checkup({"servers": servers, "findings": [clock], "stops": 1})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "10.0.0.1 10.0.0.2"
    assert "GPU 1 x H100 1 x H100" in lines and "open files warning warning" in lines
    assert lines[lines.index("stops disk 10.0.0.1: /data has 0.1 GB free") + 1] == "fix: make room"
    assert "warning open files every server: at most 1024" in lines
    assert "ok clock apart by at most 0.1 s" in lines
    assert lines[-1] == "1 finding would stop a run on 2 servers"


def test_one_machine_fits_on_a_screen(looked: tuple[Done, Path], capsys: Any) -> None:
    print_checkup(json.loads(looked[0].out))
    assert len(capsys.readouterr().out.splitlines()) <= 40
