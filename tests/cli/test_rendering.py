"""`orpo-ray slurm render` and `orpo-ray cluster kuberay`: what they write and refuse."""

import json
from pathlib import Path

import pytest
import yaml
from terminal import Command

from orpo_ray.config import load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples" / "quickstart-cpu" / "orpo.yaml"
ON_THE_HUB = (
    "model.base=team/base",
    "data.train.0.source=team/pairs",
    "data.eval.0.source=team/pairs",
)
SLURM, KUBERAY = (
    ("slurm", "render", CONFIG),
    ("cluster", "kuberay", CONFIG, "--image", "orpo-ray:1"),
)


def test_the_job_of_slurm_trains_what_was_typed_from_where_it_was_typed(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    relative = CONFIG.relative_to(ROOT)
    done = command(
        "slurm", "render", relative, "objective.lambda=0.3", "--time", "90", "--out", tmp_path
    )
    path = tmp_path / "quickstart-orpo.sbatch"
    assert (done.code, done.out, done.err) == (0, f"{path}\n", "")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert f"#SBATCH --chdir={ROOT}" in lines and "#SBATCH --time=90" in lines
    assert f"train=(orpo-ray train {CONFIG} objective.lambda=0.3)" in lines
    assert f"result={ROOT}/runs/quickstart-orpo/result.json" in lines


def test_the_manifests_hold_the_config_as_it_was_written(command: Command, tmp_path: Path) -> None:
    done = command(
        *KUBERAY, "storage=/runs", *ON_THE_HUB, "--claim", "runs", "--out", tmp_path, "--json"
    )
    files = [tmp_path / f"quickstart-orpo.{kind}.yaml" for kind in ("rayjob", "raycluster")]
    assert done.code == 0 and json.loads(done.out) == {"files": [str(path) for path in files]}
    config_map, _, job = yaml.safe_load_all(files[0].read_text(encoding="utf-8"))
    assert config_map["data"]["config.yaml"] == CONFIG.read_text(encoding="utf-8")
    assert job["spec"]["entrypoint"].endswith(
        f"config.yaml {' '.join(['storage=/runs', *ON_THE_HUB])}"
    )


def test_the_manifests_of_a_config_that_extends_another_hold_both(
    command: Command, tmp_path: Path
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f"extends: {CONFIG}\nobjective: {{kind: sft}}\n", encoding="utf-8")
    settings = ["storage=/runs", *ON_THE_HUB]
    done = command(*KUBERAY[:2], own, *KUBERAY[3:], *settings, "--claim", "runs", "--out", tmp_path)
    assert done.code == 0, done.err
    manifest = (tmp_path / "quickstart-orpo.rayjob.yaml").read_text(encoding="utf-8")
    mounted = tmp_path / "elsewhere" / "config.yaml"
    mounted.parent.mkdir()
    mounted.write_text(next(yaml.safe_load_all(manifest))["data"]["config.yaml"], encoding="utf-8")
    assert load_config(mounted, settings) == load_config(own, settings)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((*SLURM, "--nodes", 2), "storage: runs is not a folder that several nodes share"),
        ((*SLURM, "--time", "soon"), "--time: 'soon' is not a time that Slurm reads"),
        ((*SLURM, "--nodes", 0), "Invalid value for '--nodes'"),
        ((*SLURM, "scale.workers=auto"), "scale.workers: auto takes all GPUs"),
        ((*SLURM, "scale.wrkers=2"), "override 'scale.wrkers=2': scale.wrkers: unknown key"),
        ((*SLURM, "--time", "5"), "--time: 5 is too short"),
        (
            (*SLURM, "model.base=https://u:secret@h/x", "model.base=demo"),
            "model.base: the URL carries a secret",
        ),
        (KUBERAY, "storage: runs would be lost with its pod"),
        (
            (*KUBERAY, "storage=/runs", "--claim", "runs"),
            "data.train.0.source: no pod has orpo_ray/demo/train.jsonl",
        ),
        ((*KUBERAY[:3], "--image", ""), "--image: '' is not the name of an image"),
        (KUBERAY[:3], "Missing option '--image'"),
    ],
)
def test_a_mistake_is_one_line(
    command: Command, tmp_path: Path, arguments: tuple[object, ...], says: str
) -> None:
    done = command(*arguments, "--out", tmp_path / "out")
    assert done.code == 2 and done.out == ""
    assert done.err.startswith(f"orpo-ray: {says}") and done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
