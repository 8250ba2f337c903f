"""The servers of a cluster, as hosts.yaml names them."""

import re
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from orpo_ray.config.build import build
from orpo_ray.config.section import Section
from orpo_ray.config.storage import expanded
from orpo_ray.config.yaml_file import read_yaml
from orpo_ray.jobs.token import DEFAULT_FILE

# The values are put into shell commands, so only letters that need no quotes are allowed.
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PATH = re.compile(r"[~/][A-Za-z0-9._/-]*")


def _text(address: Any) -> Any:
    """Refuse a number, which pydantic would accept as an address."""
    if isinstance(address, int):
        raise ValueError(f"must be an IPv4 address, not {address}")
    return address


Address = Annotated[IPv4Address, BeforeValidator(_text)]


class SshConfig(Section):
    """How the servers are reached over SSH."""

    user: str = Field("root", description="who starts Ray on each server")
    key: str = Field(
        "~/.ssh/id_ed25519", description="file of the private key, here and then on the head"
    )

    @property
    def key_file(self) -> Path:
        """The private key on this machine."""
        return expanded(self.key, "ssh.key")


class HostsConfig(Section):
    """The servers of a cluster that `orpo-ray cluster` starts and stops."""

    name: str = Field(description="of the cluster; its files are named after it")
    head: Address = Field(description="the head's address on the network that joins the servers")
    workers: tuple[Address, ...] = Field(
        (), description="the other servers' addresses on that network"
    )
    ssh: SshConfig = SshConfig()
    token: str = Field(
        DEFAULT_FILE, description="file of the cluster's token here; made if it is not there"
    )
    environment: str = Field(
        "/opt/orpo-ray", description="virtual environment that holds orpo-ray on every server"
    )

    @field_validator("name")
    @classmethod
    def _name_is_a_word(cls, name: str) -> str:
        if not _WORD.fullmatch(name):
            raise ValueError(
                "must be letters, digits and . _ - and begin with one of the first two, not "
                f"{name!r}"
            )
        return name

    @field_validator("environment")
    @classmethod
    def _environment_is_a_path(cls, path: str) -> str:
        if not _PATH.fullmatch(path):
            raise ValueError(
                f"must be an absolute path of letters, digits and . _ - /, not {path!r}"
            )
        return path.rstrip("/")

    @field_validator("token")
    @classmethod
    def _token_is_a_file(cls, token: str) -> str:
        if not Path(token).name:
            raise ValueError(f"must be the path of a file, not {token!r}")
        return token

    @model_validator(mode="after")
    def _each_server_is_named_once(self) -> Self:
        for number, address in enumerate(self.workers):
            if address in (self.head, *self.workers[:number]):
                raise ValueError(f"workers: {address} is named twice")
        return self

    @property
    def token_file(self) -> Path:
        """Where the token is kept on this machine."""
        return expanded(self.token, "token")

    @property
    def known_hosts_file(self) -> Path:
        """Where the servers' keys are kept on this machine."""
        return self.token_file.with_name(f"{self.name}.known_hosts")

    @property
    def addresses(self) -> list[str]:
        """All servers, the head first."""
        return [str(self.head), *map(str, self.workers)]


def load_hosts(path: Path) -> HostsConfig:
    """Read hosts.yaml. Raises ConfigError with one line on any mistake."""
    tree, places = read_yaml(path, "the servers are a YAML mapping with name, head and workers")
    return build(HostsConfig, tree, places)
