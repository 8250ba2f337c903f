"""Imports go one way, and nothing unpickles or runs code that a model or data folder brings."""

import ast
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "orpo_ray"

# A room sees the rooms of the lines above its own, never those of its own line.
LEVELS = (
    {"errors", "lean_imports"},
    {"config", "ray_runtime"},
    {"bucket"},
    {"storage"},
    {"runs"},
    {"objectives", "data", "models", "report"},
    {"training"},
    {"evaluation", "distributed", "planner"},
    {"search", "doctor"},
    {"bench", "cli", "api", "__init__"},
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms} | {
    "jobs": len(LEVELS) - 2
}
ALSO_ALLOWED = {("cli", "api"), ("cli", "bench"), ("__init__", "api")}
SEEN_BY_JOBS = {"config", "errors"}
RAY_ROOMS = {"ray_runtime", "distributed", "search", "jobs", "bench"}
RAY_FILES = {f"{PACKAGE}/data/parallel.py"}
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_TRUE = {"trust_remote_code", "allow_pickle"}


def violations(root: Path) -> list[str]:
    """Everything under `root`/orpo_ray that goes against the rules, as `file:line: what`."""
    found = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        name = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"), name)
        complaints = [*wrong_imports(name, tree, rooms_of(root)), *dangerous_calls(tree)]
        found += [f"{name}:{line}: {what}" for line, what in sorted(complaints)]
    return found


def rooms_of(root: Path) -> set[str]:
    """Folders and modules directly under the package."""
    return {
        path.stem for path in (root / PACKAGE).iterdir() if path.is_dir() or path.suffix == ".py"
    }


def wrong_imports(name: str, tree: ast.AST, rooms: set[str]) -> Iterator[tuple[int, str]]:
    importer = Path(name).with_suffix("").parts[1]
    if importer not in LEVEL_OF:
        yield 1, f"{importer} is no known room; give it a level in this test"
        return
    for line, module in imports(name, tree):
        top = module.partition(".")[0]
        if top == "ray" and importer not in RAY_ROOMS and name not in RAY_FILES:
            yield line, f"{importer} imports ray"
        elif top in PICKLES:
            yield line, f"imports {top}"
        elif top == PACKAGE:
            imported = module.split(".")[1] if "." in module else "__init__"
            imported = imported if imported in rooms else "__init__"
            if not may_import(importer, imported):
                yield line, f"{importer} imports {imported}"


def may_import(importer: str, imported: str) -> bool:
    if importer == imported or (importer, imported) in ALSO_ALLOWED:
        return True
    if importer == "jobs":
        return imported in SEEN_BY_JOBS
    return LEVEL_OF.get(imported, len(LEVELS)) < LEVEL_OF[importer] and (
        imported != "jobs" or importer in LEVELS[-1]
    )


def imports(name: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import of a module, also of those inside functions."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = list(Path(name).with_suffix("").parts[:-level]) if level else []
                yield from (
                    (node.lineno, ".".join([*base, *filter(None, [module]), alias.name]))
                    for alias in names
                )
            case ast.Call(
                func=ast.Name(id=called) | ast.Attribute(attr=called),
                args=[ast.Constant(value=str(text)), *_],
            ):
                if called in ("import_module", "__import__"):
                    yield node.lineno, text


def dangerous_calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Uses of torch.load, and settings that let data or a model folder bring its own code."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                yield node.lineno, "uses torch.load"
            case ast.ImportFrom(module="torch" | "torch.serialization", names=names):
                yield from (
                    (node.lineno, "uses torch.load") for alias in names if alias.name == "load"
                )
            case ast.keyword(arg=str(setting), value=value) if (
                setting in FORBIDDEN_TRUE and not is_false(value)
            ):
                yield node.value.lineno, f"sets {setting}"
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    if (
                        isinstance(key, ast.Constant)
                        and key.value in FORBIDDEN_TRUE
                        and not is_false(value)
                    ):
                        yield key.lineno, f"sets {key.value}"


def is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def planted(root: Path, files: dict[str, str]) -> list[str]:
    """Violations of a small tree with these files; every room that they name exists."""
    for name, text in {"orpo_ray/__init__.py": "", "orpo_ray/errors.py": "", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return violations(root)


def test_imports_go_one_way_and_nothing_unpickles():
    assert violations(ROOT) == []


# Places of files that are no run's: a base or an adapter that a config names, a marker that servers
# look for, pairs that any run prepared.
OTHER_PLACES = {
    "models/trained.py": 1,
    "distributed/servers.py": 1,
    "doctor/marker.py": 1,
    "planner/lengths.py": 1,
}
# They see no run: a config says where a run will be, a job's script where its result is.
SAY_WHERE = {"config/run.py", "jobs/slurm.py"}


def finds_a_run(tree: ast.AST) -> Iterator[str]:
    """Where a module finds out by itself where a run is kept, which `runs.Run` is for."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="storage_at") | ast.Attribute(attr="storage_at")):
                yield "storage_at"
            case ast.Attribute(attr="run_dir" | "storage_dir" as name):
                yield name


def test_nobody_but_a_run_joins_its_storage_and_its_folder():
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = path.relative_to(ROOT / PACKAGE).as_posix()
        if not name.startswith("runs/") and name not in SAY_WHERE | {"storage.py"}:
            calls = list(finds_a_run(ast.parse(path.read_text(encoding="utf-8"))))
            found |= {name: len(calls)} if calls else {}
    assert found == OTHER_PLACES


def test_every_package_travels_in_the_wheel():
    """The list of packages is written by hand, because one package lies elsewhere.

    An editable installation works even if the list lacks a package, so this test checks it.
    """
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / PACKAGE).rglob("__init__.py")}
    assert sorted(listed) == sorted(
        {".".join(folder.parts) for folder in folders} | {"orpo_ray.cluster"}
    )


def test_what_a_run_says_and_hears_has_one_type():
    """`jobs` knows nothing of runs, and speaks for itself."""
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT / PACKAGE).as_posix()
        if name != "runs/console.py" and not name.startswith("jobs/"):
            assert "Callable[[str], None]" not in text, f"{name}: that is Announce"
        assert "lambda line: None" not in text, f"{name}: that is SILENT.announce"


def test_the_check_of_runs_sees_who_finds_one():
    text = "storage_at(config.storage).store(config.run_dir)\nrecord.storage_at(place)\nrun.folder"
    assert sorted(finds_a_run(ast.parse(text))) == ["run_dir", "storage_at", "storage_at"]


def test_no_files_import_each_other_in_a_circle():
    files = {path: path.relative_to(ROOT).as_posix() for path in (ROOT / PACKAGE).rglob("*.py")}
    modules = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name
        for name in files.values()
    }
    graph = {}
    for path, name in files.items():
        found = [module for _, module in imports(name, ast.parse(path.read_text(encoding="utf-8")))]
        near = {modules.get(module) or modules.get(module.rpartition(".")[0]) for module in found}
        graph[name] = near - {None, name}
    assert graph["orpo_ray/runs/search_run.py"] >= {
        "orpo_ray/runs/run.py",
        "orpo_ray/runs/search.py",
    }
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_check_reads_the_whole_package():
    assert {"errors", "config", "objectives", "__init__"} <= rooms_of(ROOT)
    graph = {
        (path.parent.name, module)
        for path in (ROOT / PACKAGE / "config").glob("*.py")
        for _, module in imports(
            f"{PACKAGE}/config/{path.name}", ast.parse(path.read_text("utf-8"))
        )
    }
    assert ("config", "orpo_ray.errors.ConfigError") in graph


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (
            "config/a.py",
            "from orpo_ray.data.store import Artifact",
            "orpo_ray/config/a.py:1: config imports data",
        ),
        ("config/a.py", "from orpo_ray import data", "orpo_ray/config/a.py:1: config imports data"),
        ("config/a.py", "import orpo_ray.data", "orpo_ray/config/a.py:1: config imports data"),
        ("config/a.py", "from ..data import store", "orpo_ray/config/a.py:1: config imports data"),
        ("config/a.py", "from .. import data", "orpo_ray/config/a.py:1: config imports data"),
        (
            "config/a.py",
            "def f():\n    import orpo_ray.data",
            "orpo_ray/config/a.py:2: config imports data",
        ),
        (
            "config/a.py",
            "m = importlib.import_module('orpo_ray.data')",
            "orpo_ray/config/a.py:1: config imports data",
        ),
        ("config/a.py", "import orpo_ray", "orpo_ray/config/a.py:1: config imports __init__"),
        (
            "config/a.py",
            "from orpo_ray import train",
            "orpo_ray/config/a.py:1: config imports __init__",
        ),
        ("errors.py", "from orpo_ray import config", "orpo_ray/errors.py:1: errors imports config"),
        ("runs/a.py", "import orpo_ray.data", "orpo_ray/runs/a.py:1: runs imports data"),
        ("runs/a.py", "import ray", "orpo_ray/runs/a.py:1: runs imports ray"),
        ("bucket.py", "import orpo_ray.storage", "orpo_ray/bucket.py:1: bucket imports storage"),
        (
            "objectives/a.py",
            "import orpo_ray.data",
            "orpo_ray/objectives/a.py:1: objectives imports data",
        ),
        (
            "training/a.py",
            "from orpo_ray.evaluation import b",
            "orpo_ray/training/a.py:1: training imports evaluation",
        ),
        (
            "distributed/a.py",
            "import orpo_ray.jobs",
            "orpo_ray/distributed/a.py:1: distributed imports jobs",
        ),
        ("search/a.py", "import orpo_ray.cli.main", "orpo_ray/search/a.py:1: search imports cli"),
        ("search/a.py", "import orpo_ray.jobs", "orpo_ray/search/a.py:1: search imports jobs"),
        ("bench/a.py", "import orpo_ray.cli", "orpo_ray/bench/a.py:1: bench imports cli"),
        ("api.py", "import orpo_ray.cli", "orpo_ray/api.py:1: api imports cli"),
        ("jobs/a.py", "import orpo_ray.training", "orpo_ray/jobs/a.py:1: jobs imports training"),
        ("training/a.py", "import ray", "orpo_ray/training/a.py:1: training imports ray"),
        ("evaluation/a.py", "import ray", "orpo_ray/evaluation/a.py:1: evaluation imports ray"),
        (
            "ray_runtime.py",
            "import orpo_ray.config",
            "orpo_ray/ray_runtime.py:1: ray_runtime imports config",
        ),
        ("data/a.py", "from ray import data", "orpo_ray/data/a.py:1: data imports ray"),
        ("data/a.py", "import pickle", "orpo_ray/data/a.py:1: imports pickle"),
        ("training/a.py", "torch.load(path)", "orpo_ray/training/a.py:1: uses torch.load"),
        ("training/a.py", "from torch import load", "orpo_ray/training/a.py:1: uses torch.load"),
        (
            "models/a.py",
            "f(trust_remote_code=True)",
            "orpo_ray/models/a.py:1: sets trust_remote_code",
        ),
        (
            "models/a.py",
            "f(**{'trust_remote_code': flag})",
            "orpo_ray/models/a.py:1: sets trust_remote_code",
        ),
        (
            "data/a.py",
            "np.load(path, allow_pickle=True)",
            "orpo_ray/data/a.py:1: sets allow_pickle",
        ),
        (
            "helpers/a.py",
            "",
            "orpo_ray/helpers/a.py:1: helpers is no known room; give it a level in this test",
        ),
    ],
)
def test_a_planted_violation_is_found(tmp_path, name, text, says):
    rooms = {
        f"orpo_ray/{room}/__init__.py": ""
        for room in ("config", "data", "evaluation", "training", "jobs", "cli")
    }
    rooms |= {f"orpo_ray/{room}.py": "" for room in ("storage", "ray_runtime")}
    assert planted(tmp_path, {**rooms, f"orpo_ray/{name}": text}) == [says]


def test_a_clean_tree_passes(tmp_path):
    files = {
        "orpo_ray/__init__.py": "def train(config):\n    from orpo_ray.api import train",
        "orpo_ray/config/a.py": "from orpo_ray.errors import E\nfrom orpo_ray.config import "
        "b\nfrom . import b",
        "orpo_ray/objectives/a.py": "import torch\nfrom orpo_ray.config import b",
        "orpo_ray/storage.py": "from orpo_ray import bucket\nfrom orpo_ray.config import a",
        "orpo_ray/bucket.py": "from orpo_ray.config import a\nfrom orpo_ray.errors import E",
        "orpo_ray/runs/a.py": "from orpo_ray.storage import s\nfrom orpo_ray.config import a",
        "orpo_ray/data/parallel.py": "import ray\nimport ray.data\nimport orpo_ray.runs.a",
        "orpo_ray/training/a.py": "from ..objectives import a\nfrom orpo_ray import data, models, "
        "errors",
        "orpo_ray/models/a.py": "load(path, trust_remote_code=False)",
        "orpo_ray/jobs/a.py": "import ray\nfrom orpo_ray.config import b",
        "orpo_ray/ray_runtime.py": "import ray\nfrom orpo_ray import errors",
        "orpo_ray/evaluation/a.py": "import orpo_ray.training.a\nimport orpo_ray.ray_runtime",
        "orpo_ray/api.py": "import orpo_ray.training.a\nimport orpo_ray.search",
        "orpo_ray/search/a.py": "import ray\nimport orpo_ray.evaluation.a",
        "orpo_ray/cli/main.py": "import orpo_ray.api\nimport orpo_ray.jobs.a\nimport "
        "orpo_ray.search.a",
    }
    assert planted(tmp_path, files) == []
