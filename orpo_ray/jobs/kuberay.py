"""A run on Kubernetes, through the KubeRay operator: its manifests."""

import importlib.metadata
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from textwrap import indent

import yaml

from orpo_ray.config import RunConfig, dump
from orpo_ray.errors import ConfigError
from orpo_ray.jobs import ports
from orpo_ray.jobs.nodes import Nodes
from orpo_ray.jobs.render import fill
from orpo_ray.jobs.request import STOP
from orpo_ray.jobs.secrets import refuse_secrets

TOKEN_SECRET, SECRETS = "orpo-ray-token", "orpo-ray-secrets"
"""Names of the Secrets that the pods mount; the first one's key is `auth_token`, as KubeRay wants it."""

_LONGEST_NAME = 47
"""KubeRay appends to it, and Kubernetes allows 63."""
_CONFIG_FILE = "/etc/orpo-ray/config/config.yaml"


@dataclass(frozen=True)
class Pods:
    """What the pods are made of. `claim` is the volume claim that holds a storage that is a folder."""

    nodes: Nodes
    image: str
    claim: str | None


def manifests(config: RunConfig, text: str, overrides: Sequence[str], pods: Pods) -> dict[str, str]:
    """A RayJob that trains a config, and a RayCluster that stays, by file name; `text` is the config's file.

    Raises ConfigError where the run's name or its storage is of no use on Kubernetes, and for secrets: whoever may look
    at the cluster reads the config.
    """
    refuse_secrets(dump(config), {})
    refuse_secrets(yaml.safe_load(text), {})  # overrides may hide what the file says
    name = _kubernetes_name(config.name)
    storage = _storage(config.storage, pods.claim)
    cluster = fill("kuberay/cluster.yaml", {"name": name, **_ports(), **_pods(pods), **storage})
    policy = fill("kuberay/network-policy.yaml", {"name": name, **_ports()}).rstrip()
    job = {
        "name": name,
        "config": indent(text.rstrip(), " " * 4),
        "network_policy": policy,
        "entrypoint": json.dumps(shlex.join(["orpo-ray", "train", _CONFIG_FILE, *overrides])),
        "cluster": indent(cluster.rstrip(), " " * 4),
        "image": json.dumps(pods.image),
    }
    standing = {"name": name, "network_policy": policy, "cluster": indent(cluster.rstrip(), " " * 2)}
    return {
        f"{name}.rayjob.yaml": fill("kuberay/rayjob.yaml", job),
        f"{name}.raycluster.yaml": fill("kuberay/raycluster.yaml", standing),
    }


def _kubernetes_name(name: str) -> str:
    """The run's name in the letters that Kubernetes allows."""
    found = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not found[:1].isalpha() or len(found) > _LONGEST_NAME or not isinstance(yaml.safe_load(found), str):
        raise ConfigError(
            f"name: {name} would be {found} on Kubernetes, where it must begin with a letter "
            f"have {_LONGEST_NAME} characters at most, and be no word of YAML's; choose another name"
        )
    return found


def _storage(storage: str, claim: str | None) -> dict[str, str]:
    """The volume that a folder of the pods is: what they write elsewhere is gone with them."""
    if "://" in storage:
        if claim:
            raise ConfigError(f"--claim: storage is {storage}, which no volume is mounted for; leave the option out")
        return {"storage_volume": "", "storage_mount": ""}
    if not claim or not PurePosixPath(storage).is_absolute():
        raise ConfigError(
            f"storage: {storage} would be gone with its pod; give an absolute path and the volume claim "
            "that all pods mount there (--claim), or a URL"
        )
    volume = f"\n- name: storage\n  persistentVolumeClaim:\n    claimName: {json.dumps(claim)}"
    mount = f"\n- name: storage\n  mountPath: {json.dumps(storage)}"
    return {"storage_volume": indent(volume, " " * 8), "storage_mount": indent(mount, " " * 12)}


def _pods(pods: Pods) -> dict[str, str]:
    nodes = pods.nodes
    return {
        "ray_version": importlib.metadata.version("ray"),
        "image": json.dumps(pods.image),
        "token_secret": TOKEN_SECRET,
        "secrets": SECRETS,
        "stop_signal": STOP["RAY_JOB_STOP_SIGNAL"],
        "stop_wait": STOP["RAY_JOB_STOP_WAIT_TIME_S"],
        "nodes": str(nodes.count),
        "cpus": str(nodes.cpus),
        "memory": str(nodes.memory_gib),
        "gpus": indent(f"\nnvidia.com/gpu: {nodes.gpus}", " " * 16) if nodes.gpus else "",
    }


def _ports() -> dict[str, str]:
    return {
        "gcs": str(ports.GCS),
        "client": str(ports.CLIENT),
        "dashboard": str(ports.DASHBOARD),
        "agent": str(ports.OF_EACH_SERVER["dashboard-agent-listen-port"]),
        "metrics": str(ports.OF_EACH_SERVER["metrics-export-port"]),
    }
