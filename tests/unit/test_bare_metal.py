"""Starting and stopping a cluster on the user's servers, with servers that only record."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo_ray.errors import ConfigError, ResourceError
from orpo_ray.jobs import bare_metal
from orpo_ray.jobs.bare_metal import Server
from orpo_ray.jobs.hosts import HostsConfig, SshConfig
from orpo_ray.jobs.ssh import Ssh, ssh_to
from orpo_ray.jobs.token import make_token, read_token

HEAD, SECOND, THIRD = "10.0.0.1", "10.0.0.2", "10.0.0.3"
STACK = "3.11.7, ray 2.60.0, torch 2.13.0, orpo-ray 0.1.0"


@dataclass
class Servers:
    """Three servers: `joined` of them are in the cluster, `dead` ones do not answer."""

    joined: list[str] = field(default_factory=list)
    dead: set[str] = field(default_factory=set)
    versions: dict[str, str] = field(default_factory=dict)
    told: list[tuple[str, str, str]] = field(default_factory=list)

    def run(self, address: str, command: str, stdin: str = "") -> str:
        if address in self.dead:
            raise ResourceError(f"{address}: cannot be reached as root: No route to host")
        self.told.append((address, command, stdin))
        if "ray.nodes()" in command:
            return (
                "a line of Ray's\n" + json.dumps([[server, 4, 1] for server in self.joined]) + "\n"
            )
        return self.versions.get(address, STACK) + "\n" if "importlib.metadata" in command else ""

    def launch(self, text: str, *, keep_head: bool) -> None:
        assert keep_head == bool(self.joined)
        provider = yaml.safe_load(text)["provider"]
        self.joined = [provider["head_ip"], *provider["worker_ips"]]


@pytest.fixture
def hosts(tmp_path: Path) -> HostsConfig:
    settings: dict[str, Any] = {"name": "trio", "head": HEAD, "workers": [SECOND, THIRD]}
    return HostsConfig.model_validate({**settings, "token": str(tmp_path / "secrets" / "token")})


def test_every_server_gets_the_token_and_joins(hosts: HostsConfig) -> None:
    servers, said = Servers(), list[str]()
    assert bare_metal.up(hosts, servers, servers.launch, said.append) == [
        Server(address, joined=True, cpus=4, gpus=1) for address in (HEAD, SECOND, THIRD)
    ]
    token = read_token(hosts.token_file)
    assert len(token) == 64 and hosts.token_file.stat().st_mode & 0o777 == 0o600
    assert [address for address, _, stdin in servers.told if stdin == f"{token}\n"] == [
        HEAD,
        SECOND,
        THIRD,
    ]
    assert not any(token in text for text in [*said, *(command for _, command, _ in servers.told)])


def test_a_cluster_that_is_up_is_left_alone(hosts: HostsConfig) -> None:
    servers, said = Servers(joined=[HEAD, SECOND, THIRD]), list[str]()
    bare_metal.up(hosts, servers, must_not_be_called, said.append)
    assert said == ["cluster trio is up already"]
    assert not hosts.token_file.exists()


def test_a_server_that_was_lost_is_started_and_the_head_left_alone(hosts: HostsConfig) -> None:
    servers, said = Servers(joined=[HEAD, THIRD]), list[str]()
    assert all(
        server.joined for server in bare_metal.up(hosts, servers, servers.launch, said.append)
    )
    assert said[-1].endswith("starting Ray on 10.0.0.2")


def must_not_be_called(text: str, *, keep_head: bool) -> None:
    pytest.fail("Ray is started")


def test_a_server_that_does_not_answer_is_named_before_anything_starts(hosts: HostsConfig) -> None:
    servers = Servers(dead={THIRD})
    with pytest.raises(
        ResourceError, match=r"^10\.0\.0\.3: cannot be reached as root: No route to host$"
    ):
        bare_metal.up(hosts, servers, must_not_be_called, print)
    assert not hosts.token_file.exists()


def test_servers_with_other_versions_are_refused(hosts: HostsConfig) -> None:
    servers = Servers(versions={SECOND: STACK.replace("ray 2.60.0", "ray 2.61.0")})
    with pytest.raises(
        ConfigError,
        match=r"^10\.0\.0\.2 has .*ray 2\.61\.0.* but the head 10\.0\.0\.1 has .*2\.60\.0",
    ):
        bare_metal.up(hosts, servers, must_not_be_called, print)


def test_a_server_that_does_not_join_is_named(
    hosts: HostsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bare_metal, "_JOIN_S", 0.0)
    servers = Servers()

    def launch_without_the_last(text: str, *, keep_head: bool) -> None:
        servers.joined = [HEAD, SECOND]

    with pytest.raises(
        ResourceError, match=r"^10\.0\.0\.3 did not join within 0 s; the reason is in"
    ):
        bare_metal.up(hosts, servers, launch_without_the_last, print)


def test_where_the_head_is_gone_nobody_has_joined(hosts: HostsConfig) -> None:
    said: list[str] = []
    found = bare_metal.status(hosts, Servers([HEAD, SECOND], dead={HEAD}), said.append)
    assert not any(server.joined for server in found)
    assert said == [
        "no cluster answers on the head: 10.0.0.1: cannot be reached as root: No route to host"
    ]


def test_all_servers_that_answer_are_stopped_the_head_first(hosts: HostsConfig) -> None:
    servers, said = Servers(dead={SECOND}), list[str]()
    assert bare_metal.down(hosts, servers, said.append) == [SECOND]
    stop = "/opt/orpo-ray/bin/ray stop"
    assert [(address, command) for address, command, _ in servers.told] == [
        (HEAD, stop),
        (THIRD, stop),
    ]
    assert said == [f"{SECOND}: cannot be reached as root: No route to host"]


# --- ssh ------------------------------------------------------------------------------------------


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Ssh]:
    """Servers that a shell script in place of the ssh command stands for."""

    def ssh(script: str, known_hosts: Path = tmp_path / "known_hosts") -> Ssh:
        (tmp_path / "ssh").write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (tmp_path / "ssh").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return Ssh("root", Path("/keys/id"), known_hosts)

    return ssh


def test_a_server_hears_the_command_and_its_input(ssh: Callable[[str], Ssh]) -> None:
    said = ssh('echo "$@"; cat').run(HEAD, "echo hello", stdin="the token")
    assert said.startswith("-i /keys/id -o BatchMode=yes ") and said.endswith(
        "root@10.0.0.1 echo hello\nthe token"
    )


def test_the_servers_keys_are_in_the_one_file_that_is_named(
    ssh: Callable[..., Ssh], hosts: HostsConfig, tmp_path: Path
) -> None:
    said = ssh('for word; do echo "$word"; done', tmp_path / "my keys %h" / "lab").run(HEAD, "true")
    (option,) = [word for word in said.splitlines() if word.startswith("UserKnownHostsFile=")]
    assert option == f'UserKnownHostsFile="{tmp_path}/my keys %%h/lab"'


@pytest.mark.parametrize("name", ['a"b', "a\\b", "${HOME}", "a\nb"])
def test_a_folder_that_ssh_would_misread_is_refused(
    hosts: HostsConfig, tmp_path: Path, name: str
) -> None:
    (tmp_path / "id").touch()
    odd = hosts.model_copy(
        update={"token": f"{tmp_path}/{name}/token", "ssh": SshConfig(key=str(tmp_path / "id"))}
    )
    with pytest.raises(ConfigError, match=r"(?s)^token: .* ssh takes no path with"):
        ssh_to(odd)


def test_a_key_that_is_not_here_is_named(hosts: HostsConfig, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"^ssh\.key: {tmp_path}/id cannot be read: No such file"
    ):
        ssh_to(hosts.model_copy(update={"ssh": SshConfig(key=str(tmp_path / "id"))}))


def test_a_folder_for_keys_that_cannot_be_made_is_told(
    ssh: Callable[..., Ssh], hosts: HostsConfig
) -> None:
    for known_hosts in (Path("/etc/passwd/x"), Path("/etc/passwd/x/y")):
        with pytest.raises(ConfigError, match=r"^token: the folder /etc/passwd.* cannot be made: "):
            bare_metal.status(hosts, ssh("true", known_hosts), print)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (
            "echo warning >&2; echo no route >&2; exit 255",
            "10.0.0.1: cannot be reached as root: no route",
        ),
        ("echo no such file >&2; exit 127", "10.0.0.1: a command failed: no such file"),
        ("exit 3", "10.0.0.1: a command failed: exit code 3"),
    ],
)
def test_what_goes_wrong_on_a_server_is_one_line_with_its_address(
    ssh: Callable[[str], Ssh], script: str, says: str
) -> None:
    with pytest.raises(ResourceError) as caught:
        ssh(script).run(HEAD, "true")
    assert str(caught.value) == says


def test_a_machine_without_ssh_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match=r"^ssh is not installed here"):
        Ssh("root", Path("/keys/id"), tmp_path / "known_hosts").run(HEAD, "true")


# --- the token ------------------------------------------------------------------------------------


def test_a_token_that_is_there_is_kept(tmp_path: Path) -> None:
    assert make_token(tmp_path / "token") == make_token(tmp_path / "token")


def test_two_tokens_differ(tmp_path: Path) -> None:
    assert make_token(tmp_path / "one") != make_token(tmp_path / "two")


def loosened(path: Path) -> None:
    make_token(path)
    path.chmod(0o640)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (loosened, r"others may read or write the token \(mode 640\); chmod 600 "),
        (lambda path: path.mkdir(), "the token cannot be read: Is a directory"),
        (lambda path: path.touch(mode=0o600), "must be one line with the token"),
        (lambda path: None, "the token cannot be read: No such file or directory"),
    ],
)
def test_a_token_that_cannot_be_used_is_refused(
    tmp_path: Path, write: Callable[[Path], None], says: str
) -> None:
    write(tmp_path / "token")
    with pytest.raises(ConfigError, match=f"token: {says}"):
        read_token(tmp_path / "token")
