"""What the READMEs tell people to type works as it stands there."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from terminal import Command, shown_commands

import orpo_ray
from orpo_ray.cli.main import COMMANDS
from orpo_ray.config import SearchConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
TRAINS = ["README.md", "examples/quickstart-cpu/README.md", "examples/sft-then-dpo/README.md"]
SEARCHES = ["examples/search/README.md", "examples/compare/README.md"]
READMES = [*TRAINS, *SEARCHES]
NEEDS_A_DOWNLOAD = [
    "examples/README.md",
    *(
        f"examples/{name}/README.md"
        for name in (
            "bases",
            "compare/smollm2",
            "four-rtx-4090",
            "kto-thumbs",
            "llama-3-8b",
            "mistral-7b-dora",
            "mistral-7b-galore",
            "mistral-7b-notebook",
            "mistral-7b-orpo",
            "mistral-7b-paper",
            "qwen-0.5b-rtx3050",
            "smollm2-cpu",
            "two-servers",
        )
    ),
]
"""What they show is not run, but it loads: bases of the hub, and machines that are not here."""
SCRIPTS = ["examples/paper-curves/README.md"]
"""Their scripts train for minutes; tests of their own run what the scripts call."""
WALKS = ["examples/own-data/README.md"]
"""Their script types what they show; a test of its own runs it."""

IN_SHORT = {
    "train": ["training.max_steps=2", "training.eval_every=2", "scale={workers: 1}"],
    "tune": ["training.max_steps=2", "search.trials=1"],
    "compare": ["compare={methods: [orpo], seeds: 1, budget: {pairs: 64}, answers: 2}"],
}
"""Appended to what is trained and searched: the settings shown would take minutes.

The quickstart's workers are the demo's, which is tested as a whole.
"""


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the commands read: nothing is left in the project itself.

    Who follows one README after the other finds what a command has made, and so do these tests.
    """
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copytree(ROOT / "orpo_ray" / "demo", folder / "orpo_ray" / "demo")
    return folder


@pytest.fixture
def project(copied: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """It is the working directory."""
    monkeypatch.chdir(copied)
    return copied


def test_every_readme_shows_commands() -> None:
    readmes = {
        str(path.relative_to(ROOT)) for path in [README, *(ROOT / "examples").rglob("README.md")]
    }
    assert readmes == {*READMES, *NEEDS_A_DOWNLOAD, *SCRIPTS, *WALKS}
    others = {name: {"python"} for name in SCRIPTS}
    others |= {name: {"bash", "orpo-ray", "python"} for name in WALKS}
    for name in readmes:
        words = {words[0] for words in shown_commands(ROOT / name)}
        assert words and words <= others.get(name, {"make", "orpo-ray"}), name


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_that_a_readme_shows_are_there(name: str) -> None:
    assert all((ROOT / words[1]).is_file() for words in shown_commands(ROOT / name))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*TRAINS, *(pytest.param(name, marks=pytest.mark.long) for name in SEARCHES)]
)
def test_the_commands_of_a_readme(command: Command, project: Path, name: str) -> None:
    for words in shown_commands(ROOT / name):
        if words[0] == "make" or words[1] == "demo":
            continue
        done = command(*words[1:], *(IN_SHORT.get(words[1], []) if "--show" not in words else []))
        assert done.code == 0, f"{' '.join(words)}: {done.err}"
        if words[1] == "train":
            run_dir = load_config(words[2], words[3:]).run_dir
            assert (run_dir / "adapter" / "adapter_model.safetensors").is_file()
            assert run_dir.is_relative_to(project)


def test_make_has_the_targets_that_the_readmes_show() -> None:
    targets = {
        words[1] for name in READMES for words in shown_commands(ROOT / name) if words[0] == "make"
    }
    assert targets == {"demo", "test"}
    for target in sorted(targets):
        done = subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert {"demo": "orpo-ray demo", "test": "pytest"}[target] in done.stdout


@pytest.mark.parametrize("name", NEEDS_A_DOWNLOAD)
def test_commands_that_need_a_download_name_a_config_that_loads(
    command: Command, project: Path, name: str
) -> None:
    shown = [words for words in shown_commands(ROOT / name) if words != ["make", "real"]]
    assert any(word.endswith(".yaml") for words in shown for word in words)
    for words in shown:
        assert words[0] == "orpo-ray" and words[1] in COMMANDS
        settings = [word for word in words[2:] if "=" in word]
        for file in (word for word in words if word.endswith(".yaml")):
            if file.endswith("/hosts.yaml"):
                assert command("cluster", "render", file, "--out", project / "hosts").code == 0
            else:
                assert command("config", "show", file, *settings).code == 0


def test_commands_in_running_text_exist_and_their_settings_load(
    command: Command, project: Path
) -> None:
    found = re.findall(r"`orpo-ray ([^`]+)`", README.read_text(encoding="utf-8"))
    assert found
    for words in (line.split() for line in found):
        assert words[0] in COMMANDS
        settings = [word for word in words[1:] if word.endswith(".yaml") or "=" in word]
        if settings:
            assert command("config", "show", *settings).code == 0
        else:
            assert command(*words, "--help").code == 0


def test_the_yaml_of_the_readme_loads_and_is_its_example_in_short(tmp_path: Path) -> None:
    readme = README.read_text(encoding="utf-8")
    mine, text, search, scale = re.findall(r"^```yaml\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    path = tmp_path / "short.yaml"
    path.write_text(mine, encoding="utf-8")
    assert len(mine.splitlines()) == 6 and load_config(path).data.train[0].source == "pairs.csv"
    path.write_text(text, encoding="utf-8")
    example = load_config(
        ROOT / "examples" / "mistral-7b-orpo" / "orpo.yaml", ["training.epochs=null"]
    )
    assert load_config(path) == example
    path.write_text(text + scale, encoding="utf-8")
    assert load_config(path) == example, "the scale that the README shows is the default"
    path.write_text(text + search, encoding="utf-8")
    assert load_config(path).search == SearchConfig(trials=16)


def test_the_python_of_the_readme_names_what_the_package_has() -> None:
    names = set(re.findall(r"orpo_ray\.(\w+)\(", README.read_text(encoding="utf-8")))
    assert names and names <= set(orpo_ray.__all__)


def test_the_places_that_the_readme_names_are_there() -> None:
    text = README.read_text(encoding="utf-8")
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link}
    folders = set(re.findall(r"^\| `([^`]+)`", text, re.MULTILINE))
    assert links and folders
    assert [name for name in sorted(links | folders) if not (ROOT / name).exists()] == []
