"""A config that extends another one: what is merged, and the one line that refuses the rest."""

from pathlib import Path

import jsonschema
import pytest
import yaml

from orpo_ray.config import RunConfig, dump, load_config
from orpo_ray.config.extends import read_config, standalone
from orpo_ray.config.schema import schema
from orpo_ray.config.storage import mirrors
from orpo_ray.errors import ConfigError
from orpo_ray.jobs.package import pack, sort_luggage

BASE = """\
storage: kept
model: {base: some/model, quantization: int8}
data:
  train: [{source: pairs.jsonl}, {source: more.jsonl}]
  max_length: 512
objective: {kind: orpo, lambda: 0.2, nll_on: full}
training:
  pairs_per_step: 16
  epochs: 2
search:
  space: {objective.lambda: {loguniform: [0.1, 1.0]}}
"""
OWN = "extends: base.yaml\nname: own\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a base recipe."""
    (tmp_path / "base.yaml").write_text(BASE, encoding="utf-8")
    return tmp_path


def load(folder: Path, text: str, *overrides: str) -> RunConfig:
    (folder / "own.yaml").write_text(text, encoding="utf-8")
    return load_config(folder / "own.yaml", overrides)


def complaint(folder: Path, text: str, *overrides: str) -> str:
    """The one line that refuses a config, with the folder cut off wherever it stands."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert caught.value.exit_code == 2
    return line.replace(f"{folder}/", "")


# --- what is merged -------------------------------------------------------------------------------


def test_a_config_is_its_base_with_single_settings_replaced(folder: Path) -> None:
    config = load(folder, OWN + "training: {pairs_per_step: 8}\nmodel: {base: other/model}\n")
    assert (config.name, config.storage) == ("own", "kept")
    assert (config.model.base, config.model.quantization) == ("other/model", "int8")
    assert (config.training.pairs_per_step, config.training.epochs) == (8, 2)


def test_lists_and_values_inside_a_setting_are_replaced_as_a_whole(folder: Path) -> None:
    space = "search: {space: {training.learning_rate: {loguniform: [1.0e-5, 1.0e-4]}}}\n"
    config = load(folder, OWN + "data: {train: mine.csv}\n" + space)
    assert [source.source for source in config.data.train] == ["mine.csv"]
    assert config.data.max_length == 512
    assert config.search is not None and list(config.search.space) == ["training.learning_rate"]


def test_null_takes_a_setting_or_a_section_back(folder: Path) -> None:
    config = load(folder, OWN + "search: null\ntraining: {epochs: null, max_steps: 100}\n")
    assert (config.search, config.training.epochs, config.training.max_steps) == (None, None, 100)


def test_a_length_of_the_prompt_that_follows_the_whole_follows_the_new_one(folder: Path) -> None:
    assert load(folder, OWN).data.max_prompt_length == 256
    assert load(folder, OWN + "data: {max_length: 128}\n").data.max_prompt_length == 64


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("", {"kind": "orpo", "lambda": 0.2, "nll_on": "full"}),
        ("objective: {lambda: 0.3}", {"kind": "orpo", "lambda": 0.3, "nll_on": "full"}),
        ("objective: {kind: orpo}", {"kind": "orpo", "lambda": 0.2, "nll_on": "full"}),
        ("objective: {kind: sft}", {"kind": "sft"}),
    ],
)
def test_an_objective_of_another_kind_inherits_nothing(
    folder: Path, written: str, kept: dict[str, object]
) -> None:
    found = dump(load(folder, f"{OWN}{written}\n").objective)
    assert {key: found[key] for key in kept} == kept
    assert "lambda" not in found or found["kind"] == "orpo"


def test_an_objective_without_a_kind_is_orpo_in_either_file(folder: Path) -> None:
    (folder / "base.yaml").write_text(BASE.replace("kind: orpo, ", ""), encoding="utf-8")
    assert dump(load(folder, OWN + "objective: {kind: orpo}\n").objective)["lambda"] == 0.2
    assert load(folder, OWN + "objective: {kind: dpo}\n").objective.kind == "dpo"


def test_overrides_come_last(folder: Path) -> None:
    config = load(folder, OWN + "training: {epochs: 3}\n", "training.epochs=4", "storage=x")
    assert (config.training.epochs, config.storage) == (4, "x")


def test_stages_may_be_inherited(folder: Path) -> None:
    stages = "stages:\n  - {objective: {kind: sft}}\n  - {objective: {kind: dpo}}\n"
    text = BASE.partition("search:")[0] + stages
    (folder / "base.yaml").write_text(text, encoding="utf-8")
    assert len(load(folder, OWN).stages) == 2
    assert len(load(folder, OWN + "stages: [{objective: {kind: sft}}]\n").stages) == 1


# --- which file -----------------------------------------------------------------------------------


def test_the_path_is_relative_to_the_file_that_names_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "recipes" / "deep").mkdir(parents=True)
    (folder / "recipes" / "middle.yaml").write_text(
        "extends: ../base.yaml\ntraining: {pairs_per_step: 4}\n", encoding="utf-8"
    )
    run = folder / "recipes" / "deep" / "run.yaml"
    run.write_text("extends: ../middle.yaml\nname: deep\n", encoding="utf-8")
    monkeypatch.chdir("/")
    config = load_config(run)
    assert (config.training.pairs_per_step, config.model.base) == (4, "some/model")
    assert config.data.train[0].source == "pairs.jsonl", "paths of settings are left as written"


def test_an_absolute_path_and_one_in_the_home_are_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    for path in (folder / "base.yaml", "~/base.yaml"):
        assert load(folder, f"extends: {path}\nname: own\n").training.epochs == 2


def test_a_dict_extends_a_file_of_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    written = {"extends": Path("base.yaml"), "name": "own", "training": {"epochs": 1}}
    assert load_config(written) == load(folder, OWN + "training: {epochs: 1}\n")
    assert written["training"] == {"epochs": 1}


def test_the_resolved_config_names_no_other_file(folder: Path) -> None:
    config = load(folder, OWN)
    assert "extends" not in dump(config)
    assert load_config(dump(config)) == config


def test_what_is_submitted_needs_no_other_file(folder: Path) -> None:
    config, package = load(folder, OWN, "storage=/data"), folder / "package"
    package.mkdir()
    pack(config, sort_luggage(config, folder), folder, package)
    (folder / "base.yaml").unlink()
    assert load_config(package / "run.yaml") == config


def test_the_settings_as_written_are_there_without_the_defaults(folder: Path) -> None:
    (folder / "own.yaml").write_text(OWN + "objective: {kind: sft}\n", encoding="utf-8")
    tree, places = read_config(folder / "own.yaml")
    assert yaml.safe_load(standalone(folder / "own.yaml")) == tree
    assert standalone(folder / "base.yaml") == BASE, "comments and all"
    assert tree == {**yaml.safe_load(BASE), "name": "own", "objective": {"kind": "sft"}}
    assert places["training", "epochs"] == f"{folder}/base.yaml:9"
    assert places["objective", "kind"] == f"{folder}/own.yaml:3"
    assert ("objective", "lambda") not in places


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: own\nextends: gone.yaml\n", "own.yaml:2: extends: gone.yaml: no such file"),
        ("extends: .\n", "own.yaml:1: extends: FOLDER: is a folder; name a YAML file"),
        (
            "extends: [base.yaml]\n",
            "own.yaml:1: extends: must be the path of one YAML file, not ['base.yaml']",
        ),
        ("extends:\n", "own.yaml:1: extends: must be the path of one YAML file, not None"),
        ("extends: ''\n", "own.yaml:1: extends: must be the path of one YAML file, not ''"),
        (
            "extends: s3://me:secret@bucket/base.yaml\n",
            "own.yaml:1: extends: s3://...@bucket/base.yaml: is a URL; copy the file here, and "
            "name its path",
        ),
        (
            "extends: ~nobody-here/base.yaml\n",
            "own.yaml:1: extends: ~nobody-here/base.yaml: no user of this server has that name; "
            "write the whole path",
        ),
        (
            "extends: own.yaml\n",
            "own.yaml:1: extends: own.yaml: extends itself; remove one of the lines that lead back "
            "to it",
        ),
        ("extends: broken.yaml\n", "own.yaml:1: extends: broken.yaml:2: a stands twice, first in "),
        ("extends: list.yaml\n", "own.yaml:1: extends: list.yaml:1: a config is a YAML mapping of"),
        (
            "extends: theirs.yaml\n",
            "own.yaml:1: extends: theirs.yaml: looks like a config of Axolotl; write ours with: "
            "orpo-ray config from theirs.yaml > run.yaml",
        ),
        ("extends: pairs.csv\n", "own.yaml:1: extends: pairs.csv: a file of pairs is no config"),
        (OWN + "data: null\n", "own.yaml:3: data: has no value; it must be a section with"),
        ("extends: base.yaml\n", "own.yaml: name: missing; every run needs it"),
        (
            OWN + "training: {extends: base.yaml}\n",
            "own.yaml:3: training.extends: unknown key; here it is extends; at the top of a "
            "file it names the one config that this one changes",
        ),
        (
            OWN + "stages: [{extends: base.yaml}]\n",
            "own.yaml:3: stages.0: extends is no section of a stage",
        ),
    ],
)
def test_what_cannot_be_extended_is_refused_in_one_line(folder: Path, text: str, says: str) -> None:
    (folder / "broken.yaml").write_text("a: 1\na: 2\n", encoding="utf-8")
    (folder / "list.yaml").write_text("- 1\n", encoding="utf-8")
    (folder / "theirs.yaml").write_text("base_model: x\nrl: orpo\n", encoding="utf-8")
    (folder / "pairs.csv").write_text("prompt,chosen,rejected\n", encoding="utf-8")
    assert complaint(folder, text).replace(str(folder), "FOLDER").startswith(says)


def test_a_circle_is_told_with_every_file_of_it(folder: Path) -> None:
    (folder / "one.yaml").write_text("extends: two.yaml\n", encoding="utf-8")
    (folder / "two.yaml").write_text("name: x\nextends: one.yaml\n", encoding="utf-8")
    assert complaint(folder, "extends: one.yaml\n") == (
        "own.yaml:1: extends: one.yaml:1: extends: two.yaml:2: extends: one.yaml: extends itself; "
        "remove one of the lines that lead back to it"
    )


def test_a_config_of_a_bucket_extends_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    copy = mirrors() / "bucket"
    copy.mkdir(parents=True)
    (copy / "base.yaml").write_text(BASE, encoding="utf-8")
    assert complaint(copy, OWN) == (
        "own.yaml:1: extends: base.yaml: a config in a bucket cannot extend another file; store "
        "what `orpo-ray config show` prints"
    )


def test_an_override_extends_nothing(folder: Path) -> None:
    assert complaint(folder, OWN, "extends=base.yaml") == (
        "override 'extends=base.yaml': only a file extends another one; write extends into it"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (OWN, "base.yaml:8: training.pair_per_step: unknown key; did you mean "),
        (OWN + "training: {epochs: 1}\n", "base.yaml:8: training.pair_per_step: unknown key"),
        (OWN + "training: {epochs: x}\n", "base.yaml:8: training.pair_per_step: unknown key"),
    ],
)
def test_a_mistake_is_told_with_the_file_that_has_it(folder: Path, text: str, says: str) -> None:
    (folder / "base.yaml").write_text(
        BASE.replace("pairs_per_step", "pair_per_step"), encoding="utf-8"
    )
    assert complaint(folder, text).startswith(says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("adapter: {kind: none}\n", "own.yaml:3: adapter.kind=none trains the base's own weights"),
        ("training: {max_steps: 9}\n", "own.yaml:3: training: epochs and max_steps both set the"),
        ("objective: {kind: kto}\n", "own.yaml:3: objective.kind: kto is computed by TRL's"),
    ],
)
def test_a_rule_that_both_files_break_is_told_where_the_change_is(
    folder: Path, text: str, says: str
) -> None:
    assert complaint(folder, OWN + text).startswith(says)


@pytest.mark.parametrize(
    "key", ["extend", "Extends", "_base_", "defaults", "inherits", "base_config"]
)
def test_other_names_of_extends_are_answered_with_it(folder: Path, key: str) -> None:
    says = complaint(folder, BASE + f"name: own\n{key}: base.yaml\n")
    assert says.startswith(f"own.yaml:13: {key}: unknown key; ")
    assert "extends" in says.partition("unknown key; ")[2]


def test_extends_is_among_the_known_keys(folder: Path) -> None:
    assert "known here: adapter, compare, data, extends, model," in complaint(
        folder, OWN + "colour: red\n"
    )


# --- what editors are told ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "is_valid"),
    [
        (OWN, True),
        (OWN + "model: {quantization: none}\ndata: {max_length: 64}\n", True),
        (OWN + "model: {quantisation: none}\n", False),
        ("extends: [base.yaml]\n", False),
        ("name: own\nmodel: {base: x}\ndata: {train: [{source: x}]}\n", True),
        ("name: own\nmodel: {quantization: none}\ndata: {train: [{source: x}]}\n", False),
        ("name: own\nmodel: {base: x}\ndata: {max_length: 64}\n", False),
        ("model: {base: x}\ndata: {train: [{source: x}]}\n", False),
    ],
)
def test_the_schema_lets_a_config_leave_out_what_it_inherits(text: str, is_valid: bool) -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    validator = jsonschema.Draft202012Validator(schema())
    assert validator.is_valid(yaml.safe_load(text)) == is_valid
