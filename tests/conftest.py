"""Fixtures every room's tests may use. No test reaches the network."""

import os
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Ray's workers step back behind all other processes, and would starve while other tests run.
os.environ.setdefault("RAY_worker_niceness", "0")

SHARED = Path(__file__).resolve().parents[2] / "shared"
SHARED_DATA = SHARED / "data"
SHARED_SCHEMAS = SHARED / "schemas"
SHARED_PLANNER = SHARED / "planner"


class TellAtOnce:
    """Failures as they come: a run that its time limit ends never gets to pytest's own report."""

    def __init__(self, writer: pytest.TerminalReporter) -> None:
        self._writer = writer

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Print what a test failed with."""
        if report.failed:
            self._writer.write_line("")
            self._writer.write_line(f"{report.nodeid}: {report.when}", red=True)
            self._writer.write_line(report.longreprtext)
            for title, text in report.sections:
                self._writer.write_line(f"{title}:")
                self._writer.write_line(text)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Takes pytest's reporter, which is there by now; processes that pytest-xdist starts have
    none.
    """
    writer = config.pluginmanager.getplugin("terminalreporter")
    if writer is not None:
        config.pluginmanager.register(TellAtOnce(writer))


class Lanes(LoadScopeScheduling):
    """How pytest-xdist shares out files: those marked `ray` as a whole one after the other.

    A run on two Ray workers keeps more than a core busy. All other files come as they may, each as
    a whole, for it shares what its fixtures make.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if _is_for_ray(self.config.rootpath / file) else file


@cache
def _is_for_ray(file: Path) -> bool:
    text = file.read_text(encoding="utf-8")
    return bool(re.search(r"^pytestmark = .*pytest\.mark\.ray\b", text, re.MULTILINE))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Lanes:
    """Whatever --dist says."""
    return Lanes(config, log)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real preference files and tokenizers, which are no part of the project; see their
    MANIFEST.md.
    """
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the real data files are not on this machine ({SHARED_DATA})")
    return SHARED_DATA


@pytest.fixture(scope="session")
def shared_schemas() -> Path:
    """KubeRay's own schemas, which are no part of the project; see README.md in their folder."""
    if not SHARED_SCHEMAS.is_dir():
        pytest.skip(f"KubeRay's schemas are not on this machine ({SHARED_SCHEMAS})")
    return SHARED_SCHEMAS


@pytest.fixture(scope="session")
def shared_planner() -> Path:
    """Published measurements, which are no part of the project; see README.md in their folder."""
    if not SHARED_PLANNER.is_dir():
        pytest.skip(f"the published measurements are not on this machine ({SHARED_PLANNER})")
    return SHARED_PLANNER


@pytest.fixture(scope="session")
def shared_tokenizer(shared_data: Path) -> Callable[..., Any]:
    """Gives one of the shared tokenizers by folder name, as a copy of its own, with a template
    where one is passed.
    """

    @cache
    def load(name: str) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name)

    def copy_of(name: str, template: str | None = None) -> Any:
        tokenizer = deepcopy(load(name))
        tokenizer.chat_template = template or tokenizer.chat_template
        return tokenizer

    return copy_of


@pytest.fixture
def chatml_tokenizer(shared_tokenizer: Callable[..., Any]) -> Any:
    """A byte-level tokenizer of 6,400 ids with ChatML's special tokens and its own chat
    template.
    """
    return shared_tokenizer("minimind_chatml_6400")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Whatever starts Ray in a test leaves it running for the next one; it ends with the
    session.
    """
    yield
    import ray

    ray.shutdown()
