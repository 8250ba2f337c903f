"""The manifests of a run on Kubernetes, for the KubeRay operator."""

import importlib.metadata
import json
import posixpath
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from textwrap import indent

import yaml

from orpo_ray.config import RunConfig, dump
from orpo_ray.config.storage import is_url
from orpo_ray.errors import ConfigError
from orpo_ray.jobs import ports
from orpo_ray.jobs.nodes import Nodes
from orpo_ray.jobs.package import is_here, named_paths
from orpo_ray.jobs.render import fill
from orpo_ray.jobs.request import STOP
from orpo_ray.jobs.secrets import (
    refuse_secrets,
    refuse_secrets_in_text,
    refuse_secrets_of_overrides,
)

TOKEN_SECRET, SECRETS = "orpo-ray-token", "orpo-ray-secrets"
"""Names of the Secrets that the pods mount. KubeRay wants the key `auth_token` in the first."""

_LONGEST_NAME = 47
"""KubeRay appends to the name, and Kubernetes allows 63 characters."""
_CONFIG_FILE = "/etc/orpo-ray/config/config.yaml"
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*")
_CLAIM = re.compile(r"[a-z0-9]([a-z0-9.-]{,251}[a-z0-9])?")
_SYSTEM = ("bin", "boot", "dev", "etc", "lib", "lib64", "proc", "run", "sbin", "sys", "usr")
"""Folders of the image and the kernel. No volume is mounted in them."""
_SHARED = ("home", "opt", "root", "tmp", "var")
"""A volume may have a folder inside one of these, but must not hide the whole."""
_FILE = re.compile(r"[.~].*|.*/.*/.*|.*\.(jsonl|json|parquet|csv)(\.gz)?", re.DOTALL)
"""A path that is certainly a file, and not a name on the hub."""


@dataclass(frozen=True)
class Pods:
    """What the pods are made of.

    `claim` names the volume claim for a storage that is a folder. Raises ConfigError for names
    that Kubernetes does not allow.
    """

    nodes: Nodes
    image: str
    claim: str | None

    def __post_init__(self) -> None:
        """Refuse names that would break the manifests."""
        if not _IMAGE.fullmatch(self.image):
            raise ConfigError(f"--image: {self.image!r} is not the name of an image")
        if self.claim is not None and not _CLAIM.fullmatch(self.claim):
            raise ConfigError(
                f"--claim: {self.claim!r} is not the name of a volume claim; use a-z, 0-9, . and -"
            )


def manifests(config: RunConfig, text: str, overrides: Sequence[str], pods: Pods) -> dict[str, str]:
    """Manifests by file name: a RayJob that trains a config, and a RayCluster that stays.

    `text` is the config as a file that extends no other. Raises ConfigError if the run's name, its
    storage or a path cannot be used on Kubernetes. Raises ConfigError for secrets too, since
    everybody who may look at the cluster can read the config.
    """
    refuse_secrets(dump(config), {})
    # An override may hide a secret of the file or of an earlier override, but all are written out.
    refuse_secrets(yaml.safe_load(text), {})
    refuse_secrets_in_text("the config's file", text)
    refuse_secrets_of_overrides(overrides)
    name = _kubernetes_name(config.name)
    storage = _storage(config.storage, pods.claim)
    _refuse_files_of_this_machine(config)
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
    standing = {
        "name": name,
        "network_policy": policy,
        "cluster": indent(cluster.rstrip(), " " * 2),
    }
    return {
        f"{name}.rayjob.yaml": fill("kuberay/rayjob.yaml", job),
        f"{name}.raycluster.yaml": fill("kuberay/raycluster.yaml", standing),
    }


def _kubernetes_name(name: str) -> str:
    """The run's name in the letters that Kubernetes allows.

    Raises ConfigError if Kubernetes would not take the result.
    """
    found = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if (
        not found[:1].isalpha()
        or len(found) > _LONGEST_NAME
        or not isinstance(yaml.safe_load(found), str)
    ):
        raise ConfigError(
            f"name: {name} would be {found} on Kubernetes, where a name must begin with a letter, "
            f"have {_LONGEST_NAME} characters at most, and be no keyword of YAML; "
            "choose another name"
        )
    return found


def _storage(storage: str, claim: str | None) -> dict[str, str]:
    """The volume and its mount for a storage that is a folder.

    What pods write elsewhere is lost when they end. Raises ConfigError if `claim` does not fit.
    """
    if "://" in storage:
        if claim:
            raise ConfigError(
                f"--claim: storage is {storage}, a URL, which needs no volume; leave the option out"
            )
        return {"storage_volume": "", "storage_mount": ""}
    if not claim or not PurePosixPath(storage).is_absolute():
        raise ConfigError(
            f"storage: {storage} would be lost with its pod; give an absolute path and the volume "
            "claim that all pods mount there (--claim), or a URL"
        )
    _refuse_system_folder(storage)
    volume = f"\n- name: storage\n  persistentVolumeClaim:\n    claimName: {json.dumps(claim)}"
    mount = f"\n- name: storage\n  mountPath: {json.dumps(storage)}"
    return {"storage_volume": indent(volume, " " * 8), "storage_mount": indent(mount, " " * 12)}


def _refuse_system_folder(storage: str) -> None:
    """Raise ConfigError for a folder in which the volume would hide files that pods need."""
    first, *others = PurePosixPath(posixpath.normpath(storage)).parts[1:] or ("",)
    if not first or first in _SYSTEM or (first in _SHARED and not others) or ":" in storage:
        raise ConfigError(
            f"storage: no volume is mounted at {storage}; give a folder of its own, such as /runs"
        )


def _refuse_files_of_this_machine(config: RunConfig) -> None:
    """Raise ConfigError for paths that no pod has.

    No file is carried along to Kubernetes, and pods start in an empty home.
    """
    for key, path in named_paths(config):
        is_file = (
            _FILE.fullmatch(path)
            or key in ("model.chat_template", "adapter.init_from")
            or is_here(Path(path))
        )
        if is_file and not is_url(path) and not path.startswith("/"):
            raise ConfigError(
                f"{key}: no pod has {path}; name a model or dataset of the hub, a URL, or an "
                "absolute path below the storage"
            )


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
