"""Missing trackers are refused before a run begins; TRL's names stand for the same numbers."""

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from run_folders import lines_of, write_run
from support import run_config

from orpo_ray import api
from orpo_ray.config import RunConfig
from orpo_ray.config.objectives import OBJECTIVES
from orpo_ray.errors import ConfigError, ResourceError
from orpo_ray.runs.console import SILENT
from orpo_ray.runs.files import REPORT_FILE
from orpo_ray.runs.log import is_kept
from orpo_ray.runs.run import Run
from orpo_ray.training import trackers
from orpo_ray.training.trackers import refuse_missing_trackers, send_page

OURS = {
    "nll": 1.5,
    "accuracy": 0.75,
    "margin": 0.2,
    "chosen_logp": -1.0,
    "rejected_logp": -1.2,
    "log_odds_ratio": 0.3,
}

SUMS = {
    "chosen_sum": -40.0,
    "rejected_sum": -60.0,
    "chosen_gain": 3.0,
    "rejected_gain": -1.0,
    "gain_accuracy": 0.5,
}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return run_config(tmp_path, training={"trackers": ["wandb"]})


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that has wandb but no key for it."""
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_a_tracker_that_is_not_installed_is_refused_in_a_dry_run_too(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"^training\.trackers: wandb is not installed; pip"):
        api.plan(config, SILENT)
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_of_one_stage_is_refused_in_a_dry_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = ({"objective": {"kind": "sft"}}, {"training": {"trackers": ["wandb"]}})
    config = run_config(tmp_path).model_copy(update={"stages": stages})
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="wandb is not installed"):
        api.plan(config, SILENT)


@pytest.mark.usefixtures("installed")
def test_wandb_without_a_key_is_refused(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"^training\.trackers: wandb has no key on this"):
        refuse_missing_trackers(config)
    (tmp_path / "netrc").write_text("machine example.org login a password b\n", encoding="utf-8")
    with pytest.raises(ResourceError, match="no key"):
        refuse_missing_trackers(config)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "value"), [("WANDB_API_KEY", "secret"), ("WANDB_MODE", "offline"), ("", "")]
)
def test_a_key_a_login_or_no_connection_is_enough(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str
) -> None:
    if name:
        monkeypatch.setenv(name, value)
    else:
        login = "machine api.wandb.ai login user password secret\n"
        (tmp_path / "netrc").write_text(login, encoding="utf-8")
    refuse_missing_trackers(config)


@pytest.mark.parametrize(
    ("objective", "weight"),
    [({"kind": "orpo", "lambda": 0.5}, 0.5), ({"kind": "simpo", "beta": 2.0}, 2.0)],
)
def test_trls_names_stand_for_the_same_numbers(
    tmp_path: Path, objective: dict[str, Any], weight: float
) -> None:
    config = run_config(tmp_path, objective=objective, training={"trl_metric_names": True})
    assert config.objective.trl_metrics(OURS) == pytest.approx(
        {
            "nll_loss": 1.5,
            "rewards/accuracies": 0.75,
            "rewards/margins": weight * 0.2,
            "rewards/chosen": weight * -1.0,
            "rewards/rejected": weight * -1.2,
            "logps/chosen": -1.0,
            "logps/rejected": -1.2,
            "log_odds_chosen": 0.3,
        }
    )


def test_trls_rewards_of_dpo_are_gains_over_the_reference(tmp_path: Path) -> None:
    """TRL's own numbers for the same pairs are compared in tests/parity/test_trl.py."""
    config = run_config(tmp_path, objective={"kind": "dpo"}, training={"trl_metric_names": True})
    found = config.objective.trl_metrics(OURS | SUMS)
    assert found["rewards/margins"] == pytest.approx(0.1 * (3.0 - -1.0))
    assert (found["logps/chosen"], found["rewards/accuracies"]) == (-40.0, 0.5)
    assert config.objective.trl_metrics(OURS) == {"nll_loss": 1.5}, "no sums, no rewards"


def test_every_objective_of_our_engine_has_trls_names(tmp_path: Path) -> None:
    for kind, settings in OBJECTIVES.items():
        training = {"trl_metric_names": True}
        if settings.only_in_trl:
            training["engine"] = "trl"
            with pytest.raises(ConfigError, match=rf"the metrics of {kind} stay inside of TRL"):
                run_config(tmp_path, objective={"kind": kind}, training=training)
            continue
        named = run_config(tmp_path, objective={"kind": kind}, training=training).objective
        rewards = {"rewards/chosen"} if kind != "sft" else set()
        assert named.trl_metrics(OURS | SUMS).keys() & {"rewards/chosen"} == rewards


@pytest.mark.parametrize(
    ("name", "level", "kept"),
    [
        ("orpo_ray", logging.INFO, True),
        ("orpo_ray.search.trial", logging.WARNING, True),
        ("orpo_rayon", logging.WARNING, False),
        ("py.warnings", logging.WARNING, False),
        ("ray.data", logging.ERROR, True),
    ],
)
def test_the_log_of_a_run_keeps_our_lines_and_errors(name: str, level: int, kept: bool) -> None:
    record = logging.LogRecord(name, level, __file__, 1, "said", None, None)
    assert is_kept(record) is kept


# --- the page of a finished run -------------------------------------------------------------------


class _Wandb:
    """What is called of wandb."""

    class Artifact:
        def __init__(self, name: str, type: str) -> None:
            self.name, self.type, self.files = name, type, []

        def add_file(self, path: str) -> None:
            self.files.append(path)

    def __init__(self) -> None:
        self.id, self.logged = "abc", []
        self.run: _Wandb | None = self

    def log_artifact(self, artifact: Any) -> None:
        self.logged.append((artifact.name, artifact.type, artifact.files))


class _Mlflow:
    """What is called of mlflow, whose run has ended."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, str]] = []

    def last_active_run(self) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id="7"))

    def log_artifact(self, path: str, run_id: str) -> None:
        self.logged.append((path, run_id))


def finished_run(folder: Path, *names: str) -> Run:
    config = run_config(folder, training={"trackers": list(names)})
    write_run(folder, lines=lines_of(4, 2))
    return Run(config)


def test_trackers_get_the_page_as_an_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb, mlflow = _Wandb(), _Mlflow()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    run = finished_run(tmp_path, "wandb", "mlflow")
    said: list[str] = []
    send_page(run, said.append)
    page = str(run.path(REPORT_FILE))
    assert wandb.logged == [("report-abc", "report", [page])]
    assert mlflow.logged == [(page, "7")]
    assert said == [] and Path(page).exists()


def test_a_tracker_that_fails_is_announced_and_fails_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    said: list[str] = []
    send_page(finished_run(tmp_path, "wandb"), said.append)
    (line,) = said
    assert line.startswith("wandb did not get report.html: AttributeError: ")


def test_without_trackers_no_page_is_made_for_them(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    send_page(run, pytest.fail)
    assert not run.path(REPORT_FILE).exists()
