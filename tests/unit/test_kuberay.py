"""KubeRay's manifests and the image of their pods: stable, valid, and closed to strangers."""

import gzip
import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from support import run_config

from orpo_ray.config import load_config
from orpo_ray.errors import ConfigError
from orpo_ray.jobs import ports
from orpo_ray.jobs.kuberay import Pods, manifests
from orpo_ray.jobs.nodes import Nodes

ROOT = Path(__file__).resolve().parents[2]
RENDERED = Path(__file__).with_name("rendered")
PODS = Pods(Nodes(count=2, gpus=4, cpus=16, memory_gib=128), "orpo-ray:1", "runs")
CONFIG = """\
name: Teams/a.b
storage: /runs  # a claim

model: {base: mistralai/Mistral-7B-v0.1}
data:
  train: [{source: pairs.jsonl}]
objective: {lambda: 0.2}  # cost: $5
"""


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The manifests of a run by file name, for a fixed version of Ray."""
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2.60.0")
    return render()


def render(
    storage: str = "/runs", name: str = "Teams/a.b", claim: str | None = "runs"
) -> dict[str, str]:
    """The manifests of a run with one override."""
    pods = Pods(PODS.nodes, PODS.image, claim)
    config = run_config(Path("/runs"), name).model_copy(update={"storage": storage})
    return manifests(config, CONFIG, ["objective.lambda=0.5", "model.chat_template=a b"], pods)


def only(files: dict[str, str], kind: str) -> dict[str, Any]:
    """The one object of that kind among all files."""
    found = [
        document
        for text in files.values()
        for document in yaml.safe_load_all(text)
        if document["kind"] == kind
    ]
    assert all(document == found[0] for document in found)
    return found[0]


def pod_specs(files: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Every pod that the manifests describe."""
    job, cluster = only(files, "RayJob")["spec"], only(files, "RayCluster")["spec"]
    yield job["submitterPodTemplate"]
    for spec in (cluster, job["rayClusterSpec"]):
        yield from (
            group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
        )


def places(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object inside an object."""
    parts = list(tree.values()) if isinstance(tree, dict) else tree
    for part in parts if isinstance(parts, list) else []:
        if isinstance(part, dict):
            yield part
        yield from places(part)


def closed(schema: Any) -> Any:
    """A schema that refuses unknown fields, which Kubernetes itself drops without a message."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {key: closed(part) for key, part in schema.items()}
    if isinstance(parts.get("properties"), dict) and parts.get("type") == "object":
        parts.setdefault("additionalProperties", False)
    return parts


@pytest.mark.parametrize("name", ["teams-a-b.rayjob.yaml", "teams-a-b.raycluster.yaml"])
def test_a_change_of_a_rendered_file_is_seen(files: dict[str, str], name: str) -> None:
    assert files[name] == (RENDERED / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["RayJob", pytest.param("RayCluster", marks=pytest.mark.long)])
def test_kuberay_knows_every_field(files: dict[str, str], kind: str, shared_schemas: Path) -> None:
    packed = (shared_schemas / f"ray.io_{kind.lower()}s.yaml.gz").read_bytes()
    versions = yaml.load(gzip.decompress(packed), Loader=yaml.CSafeLoader)["spec"]["versions"]
    schema = closed(next(v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1"))
    manifest = only(files, kind)
    jsonschema.validate(manifest, schema)
    group = next(place for place in places(manifest) if "rayStartParams" in place)
    for place in (manifest["spec"], group["template"]["spec"]["containers"][0]["securityContext"]):
        place["nonRoot"] = True
        with pytest.raises(jsonschema.ValidationError, match="nonRoot"):
            jsonschema.validate(manifest, schema)
        del place["nonRoot"]


def test_the_job_trains_the_config_and_goes_on_by_its_name(
    files: dict[str, str], tmp_path: Path
) -> None:
    job, config_map = only(files, "RayJob"), only(files, "ConfigMap")
    assert config_map["data"]["config.yaml"] == CONFIG
    (tmp_path / "config.yaml").write_text(config_map["data"]["config.yaml"], encoding="utf-8")
    assert load_config(tmp_path / "config.yaml").name == "Teams/a.b"
    assert job["spec"]["entrypoint"] == (
        "orpo-ray train /etc/orpo-ray/config/config.yaml objective.lambda=0.5 "
        "'model.chat_template=a b'"
    )
    assert job["spec"]["backoffLimit"] > 0 and job["spec"]["shutdownAfterJobFinishes"]
    for pod in pod_specs(files):
        (volume,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == "config"]
        assert volume["configMap"]["name"] == config_map["metadata"]["name"]


def test_no_pod_is_root_or_may_speak_to_kubernetes(files: dict[str, str]) -> None:
    pods = list(pod_specs(files))
    assert len(pods) == 5
    for pod in pods:
        whole, (container,) = pod["spec"]["securityContext"], pod["spec"]["containers"]
        assert whole["runAsNonRoot"] and whole["runAsUser"] == 1000
        assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert container["image"] == PODS.image


def test_the_token_and_other_secrets_are_files(files: dict[str, str]) -> None:
    secret = "orpo-ray-token"
    for spec in (
        only(files, "RayCluster")["spec"],
        only(files, "RayJob")["spec"]["rayClusterSpec"],
    ):
        assert spec["authOptions"] == {"mode": "token", "secretName": secret}
    for pod in pod_specs(files):
        (container,) = pod["spec"]["containers"]
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN"] == "", "or KubeRay puts the token there"
        folders = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        mounted = {
            volume["name"]: volume["secret"]
            for volume in pod["spec"]["volumes"]
            if "secret" in volume
        }
        assert environment["RAY_AUTH_TOKEN_PATH"] == f"{folders['token']}/auth_token"
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "HF_TOKEN_PATH"):
            assert environment[name].startswith(f"{folders['secrets']}/")
        assert mounted["token"] == {"secretName": secret, "defaultMode": 0o440}
        assert mounted["secrets"] == {
            "secretName": "orpo-ray-secrets",
            "defaultMode": 0o440,
            "optional": True,
        }


def test_only_its_own_pods_and_the_operator_reach_a_cluster(files: dict[str, str]) -> None:
    policy = only(files, "NetworkPolicy")["spec"]
    ours = policy["podSelector"]["matchLabels"]
    assert all(pod["metadata"]["labels"] == ours for pod in pod_specs(files))
    assert policy["policyTypes"] == ["Ingress"]
    peers, operator = policy["ingress"]
    assert peers == {"from": [{"podSelector": {"matchLabels": ours}}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": ports.DASHBOARD}]


def test_ports_are_those_of_every_other_cluster(files: dict[str, str]) -> None:
    head = only(files, "RayCluster")["spec"]["headGroupSpec"]
    assert head["rayStartParams"] == {
        "num-cpus": "0",
        "port": str(ports.GCS),
        "ray-client-server-port": str(ports.CLIENT),
        "dashboard-port": str(ports.DASHBOARD),
        "dashboard-host": "0.0.0.0",
        "dashboard-agent-listen-port": str(ports.OF_EACH_SERVER["dashboard-agent-listen-port"]),
        "metrics-export-port": str(ports.OF_EACH_SERVER["metrics-export-port"]),
    }


def test_ray_answers_the_probes_without_a_token(files: dict[str, str]) -> None:
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    for group in (
        (spec := only(files, "RayCluster")["spec"])["headGroupSpec"],
        *spec["workerGroupSpecs"],
    ):
        (container,) = group["template"]["spec"]["containers"]
        for probe in (container["livenessProbe"], container["readinessProbe"]):
            assert probe["httpGet"]["path"] in PUBLIC_EXACT_PATHS
            assert (
                str(probe["httpGet"]["port"])
                == group["rayStartParams"]["dashboard-agent-listen-port"]
            )


def test_nodes_are_worker_pods(files: dict[str, str]) -> None:
    (group,) = only(files, "RayCluster")["spec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 2)
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"] == {
        "requests": {"cpu": "16"},
        "limits": {"memory": "128Gi", "nvidia.com/gpu": 4},
    }


def test_without_gpus_none_are_asked_for() -> None:
    pods = Pods(Nodes(1, 0, 4, 16), PODS.image, "runs")
    found = manifests(run_config(Path("/runs")), CONFIG, [], pods)
    (group,) = only(found, "RayCluster")["spec"]["workerGroupSpecs"]
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"] == {"memory": "16Gi"}


def test_a_storage_that_is_a_folder_is_the_claim() -> None:
    for pod in pod_specs(render()):
        assert {"name": "storage", "persistentVolumeClaim": {"claimName": "runs"}} in pod["spec"][
            "volumes"
        ]
        assert {"name": "storage", "mountPath": "/runs"} in pod["spec"]["containers"][0][
            "volumeMounts"
        ]


def test_a_storage_elsewhere_needs_no_volume() -> None:
    for pod in pod_specs(render("s3://bucket/runs", claim=None)):
        assert "storage" not in {volume["name"] for volume in pod["spec"]["volumes"]}


@pytest.mark.parametrize(
    ("storage", "claim", "says"),
    [
        (
            "/runs",
            None,
            "storage: /runs would be lost with its pod; give an absolute path and the volume claim",
        ),
        ("runs", "runs", "storage: runs would be lost with its pod"),
        (
            "s3://bucket/runs",
            "runs",
            "--claim: storage is s3://bucket/runs, a URL, which needs no volume",
        ),
    ],
)
def test_a_storage_that_would_be_lost_is_refused(
    storage: str, claim: str | None, says: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{says}"):
        render(storage, claim=claim)


@pytest.mark.parametrize(
    "storage", ["/", "//", "/etc", "/etc/runs", "/dev/shm", "/x/../usr", "/tmp", "/home/", "/a:b"]
)
def test_a_volume_hides_nothing_that_a_pod_needs(storage: str) -> None:
    assert render("/var/runs") and render("/runs/") and render("/home/me/runs")
    with pytest.raises(
        ConfigError, match=f"^storage: no volume is mounted at {storage}; give a folder of its own"
    ):
        render(storage)


@pytest.mark.parametrize("image", ["", "a b", "-x", 'a"b'])
def test_an_image_is_a_name(image: str) -> None:
    assert Pods(PODS.nodes, "registry.host:5000/team/orpo-ray:1@sha256:0f", None)
    with pytest.raises(ConfigError, match=r"^--image: .* is not the name of an image"):
        Pods(PODS.nodes, image, None)


@pytest.mark.parametrize("claim", ["", "Runs", "a b", "-runs", "runs-", "a/b", "a" * 254])
def test_a_claim_is_a_name_of_kubernetes(claim: str) -> None:
    assert Pods(PODS.nodes, "orpo-ray:1", "runs.2-b")
    with pytest.raises(ConfigError, match=r"^--claim: .* is not the name of a volume claim"):
        Pods(PODS.nodes, "orpo-ray:1", claim)


@pytest.mark.parametrize(
    ("section", "keys", "says"),
    [
        (
            "data",
            {"train": [{"source": "pairs.jsonl"}]},
            "data.train.0.source: no pod has pairs.jsonl",
        ),
        ("data", {"train": [{"source": "tests"}]}, "data.train.0.source: no pod has tests"),
        ("model", {"base": "./base"}, "model.base: no pod has ./base"),
        ("model", {"base": "~/base"}, "model.base: no pod has ~/base"),
        ("model", {"base": "a/b/c"}, "model.base: no pod has a/b/c"),
        ("model", {"chat_template": "a b"}, "model.chat_template: no pod has a b"),
        ("adapter", {"init_from": "runs/x"}, "adapter.init_from: no pod has runs/x"),
    ],
)
def test_files_of_this_machine_are_on_no_pod(
    section: str, keys: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(
        ConfigError, match=f"^{re.escape(says)}; name a model or dataset of the hub, a URL, or"
    ):
        manifests(run_config(Path("/runs"), **{section: keys}), CONFIG, [], PODS)


def test_what_pods_can_reach_is_taken() -> None:
    reached = {
        "train": [
            {"source": "team/set"},
            {"source": "https://h/x.jsonl"},
            {"source": "/runs/x.jsonl"},
        ]
    }
    sections: dict[str, dict[str, Any]] = {"data": reached, "model": {"base": "team/base"}}
    assert manifests(run_config(Path("/runs"), **sections), CONFIG, [], PODS)


@pytest.mark.parametrize("name", ["7b", "a" * 48])
def test_a_name_that_kubernetes_has_no_room_for_is_refused(name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"^name: {name} would be {name} on Kubernetes, .* a letter, have 47 char"
    ):
        render(name=name)


def test_a_secret_in_the_config_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^storage: the URL carries a secret"):
        render("s3://me:password@bucket/runs", claim=None)


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        (
            CONFIG,
            ["model.base=https://u:secret@h/x", "model.base=demo"],
            "model.base: the URL carries a secret",
        ),
        (CONFIG + "# https://u:secret@h/x\n", [], "the config's file: the URL carries a secret"),
    ],
)
def test_a_secret_that_is_hidden_is_refused(text: str, overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=f"^{says}") as refused:
        manifests(run_config(Path("/runs")), text, overrides, PODS)
    assert "secret@" not in str(refused.value)


def test_the_image_is_pinned_and_its_user_is_the_pods() -> None:
    lines = (ROOT / "cluster" / "docker" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    told = {word: rest for word, _, rest in (line.partition(" ") for line in lines if line)}
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-[a-z]+", told["FROM"])
    assert told["USER"] == "1000"
    assert "--constraint constraints.txt" in " ".join(lines)
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY ")]
    assert all((ROOT / source).exists() for sources in copied for source in sources)
    minor = re.search(r"python:3\.(\d+)", told["FROM"])
    assert minor and 11 <= int(minor[1]) <= 13, "constraints.txt is for these"
