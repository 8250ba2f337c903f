"""The config: what is accepted, what is refused, and the one line that says where and why."""

import json
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from orpo_ray.config import (
    RunConfig,
    Source,
    TrainingConfig,
    dump,
    every_to_steps,
    load_config,
    load_resolved,
    stage_configs,
)
from orpo_ray.config.objectives.dpo import DpoConfig
from orpo_ray.config.objectives.orpo import OrpoConfig
from orpo_ray.config.optimizers import OPTIMIZERS
from orpo_ray.errors import ConfigError
from orpo_ray.training import arguments

MINIMAL = """\
name: tiny
model: {base: some/model}
data:
  train: [{source: pairs.jsonl}]
"""
SECTIONS = (
    "adapter, compare, data, extends, model, name, objective, scale, search, stages, storage, "
    "training"
)
AN_EVENT = "a whole number of steps (1 or more), or a share of the run (above 0, at most 1.0)"
MODEL_KEYS = "attention, base, chat_template, dtype, quantization, revision"
WITH_OBJECTIVE = MINIMAL + "objective: {kind: orpo, lambda: 0.2}\n"

DESIGN_SECTION_4 = """\
name: mistral-7b-orpo
storage: s3://bucket/runs            # or a path every server sees; or a local path for one machine
model:   {base: mistralai/Mistral-7B-v0.1, revision: null, quantization: nf4, dtype: auto, attention: auto, chat_template: null}
                                     # quantization: nf4 | int8 | none; dtype: auto | float32 |
                                     # bfloat16 | float16
adapter: {kind: lora, r: 16, alpha: 16, dropout: 0.05, targets: all-linear, dora: false, init_from: null}   # kind: none = full
data:
  train: [{source: "HuggingFaceH4/ultrafeedback_binarized", split: train_prefs, weight: 1.0}]
  eval:  [{source: "HuggingFaceH4/ultrafeedback_binarized", split: test_prefs, limit: 512}]
  max_length: 2048
  max_prompt_length: 1024
  overlong: drop                     # drop | truncate-prompt-left | error
  bad_rows: quarantine               # quarantine | fail
  max_bad_fraction: 0.05
  columns: null                      # {prompt: question, chosen: right_answer, rejected: hallucinated_answer}
objective: {kind: orpo, lambda: 0.1, nll_on: response}
training:
  learning_rate: 1.0e-4              # the paper's 8e-6 is for full fine-tuning
  pairs_per_step: 64                 # the global batch, whatever the number of GPUs
  tokens_per_microbatch: auto        # memory, not results: the least over all ranks, recorded, reused on resume
  epochs: 1                          # or max_steps
  schedule: cosine                   # cosine | linear | constant
  warmup: 0.1
  weight_decay: 0.0
  max_grad_norm: 1.0
  optimizer: adamw                   # adamw | adamw-8bit | paged-adamw-8bit
  eval_every: 0.1                    # fraction of the run, or steps; also before the first step
  checkpoint_every: 0.1
  keep: 2                            # newest, and the best
  seed: 42
  layout: auto                       # padded | packed | shared-prefix | auto
  engine: fast                       # fast | trl
  trackers: []                       # tensorboard always; wandb, mlflow by name
scale:   {workers: auto, gpus_per_worker: 1, deepspeed: auto, max_failures: 3}   # deepspeed: auto | none | {stage: 0-3}
search:                              # only read by `tune`
  space: {objective.lambda: {loguniform: [0.05, 1.0]}, training.learning_rate: {loguniform: [2.0e-5, 4.0e-4]}}
  trials: 16
  metric: eval/accuracy
"""  # noqa: E501

LAUGHS = "l0: &l0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def load(path: Path, text: str | bytes, *overrides: str) -> RunConfig:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, overrides)


def complaint(path: Path, text: str | bytes, *overrides: str) -> str:
    """The one line that refuses a config, with the file's folder cut off."""
    with pytest.raises(ConfigError) as caught:
        load(path, text, *overrides)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert caught.value.exit_code == 2
    return line.removeprefix(f"{path.parent}/")


# What is accepted


def test_the_example_of_the_design_loads(path):
    config = load(path, DESIGN_SECTION_4)
    assert config.objective == OrpoConfig(lambda_=0.1, nll_on="response")
    assert config.data.eval[0].limit == 512
    assert config.training.learning_rate == 1e-4
    assert config.search.space["objective.lambda"] == {"loguniform": [0.05, 1.0]}


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        ([], 2e-4),
        (["objective.kind=dpo"], 5e-5),
        (["objective.kind=dpo", "objective.nll_weight=0.5"], 2e-4),
        (["adapter.kind=none", "model.quantization=none"], 5e-6),
        (["objective.kind=ipo", "adapter.kind=none", "model.quantization=none"], 5e-7),
        (["training.learning_rate=3e-4", "objective.kind=dpo"], 3e-4),
    ],
)
def test_a_run_without_a_learning_rate_gets_a_usual_one(path, overrides, rate):
    config = load(path, MINIMAL, *overrides)
    assert config.training.learning_rate == rate
    assert RunConfig.model_validate(dump(config)) == config


def test_a_bucket_is_a_storage_with_a_copy_on_this_server(path, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = load(path, DESIGN_SECTION_4)
    assert config.storage_dir == tmp_path / "orpo-ray" / "s3" / "bucket" / "runs"
    assert config.run_dir == config.storage_dir / "mistral-7b-orpo"
    assert config.place == "s3://bucket/runs/mistral-7b-orpo"


@pytest.mark.parametrize("key", ["storage", "model.base", "adapter.init_from"])
def test_places_on_other_kinds_of_server_are_refused(path, key):
    with pytest.raises(
        ConfigError, match=rf"{key}: gs:// is not supported; use s3://bucket/folder, or a folder$"
    ):
        load(path, MINIMAL, f"{key}=gs://bucket/x")


@pytest.mark.parametrize("key", ["storage", "model.base", "adapter.init_from"])
@pytest.mark.parametrize(
    "place", ["s3:/bucket/runs", "s3:bucket/x", "S3:b", "gs:/bucket/x", "file:/x"]
)
def test_half_a_url_is_no_folder(path, key, place):
    says = "a URL has two slashes after its colon; use s3://bucket/folder, or a folder"
    assert complaint(path, MINIMAL, f"{key}={place}") == f"override '{key}={place}': {key}: {says}"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("storage=s3://AKIA:se/cret@bucket/runs", "storage: a URL carries no user or password"),
        ("storage=s3://AKIA:secret/runs", "storage: s3:// needs the name of a bucket"),
        ("s3://AKIA:secret@bucket/runs", "write key=value"),
        ("storage={s3://AKIA:secret@bucket/runs", "not YAML"),
    ],
)
def test_a_secret_in_a_url_is_not_repeated(path, override, says):
    said = complaint(path, MINIMAL, override)
    assert says in said and "cret@" not in said and "secret" not in said


def test_a_storage_in_the_home_of_nobody_is_told_with_its_key(path):
    with pytest.raises(
        ConfigError, match=r"^storage: ~nosuchuser/runs: no user of this server has that name"
    ):
        print(load(path, MINIMAL, "storage=~nosuchuser/runs").run_dir)


def test_the_smallest_config_gets_the_defaults(path):
    config = load(path, MINIMAL)
    assert (config.model.quantization, config.adapter.kind, config.adapter.r) == ("nf4", "lora", 16)
    assert config.objective == OrpoConfig(lambda_=0.5)
    assert config.run_dir == Path("runs/tiny").resolve()


@pytest.mark.parametrize("text", [DESIGN_SECTION_4, MINIMAL, WITH_OBJECTIVE])
def test_a_dumped_config_loads_back_equal(path, text):
    config = load(
        path, text, "training.eval_every=1.0", "training.checkpoint_every=1", "training.warmup=3"
    )
    resolved = path.with_name("config.json")
    resolved.write_text(json.dumps(dump(config)), encoding="utf-8")
    again = load_resolved(resolved)
    assert again == config
    assert dump(again) == dump(config)
    assert type(again.training.eval_every) is float and type(again.training.checkpoint_every) is int


def test_dumped_names_are_those_of_the_yaml(path):
    assert dump(load(path, WITH_OBJECTIVE))["objective"] == {
        "kind": "orpo",
        "lambda": 0.2,
        "beta": 1.0,
        "nll_weight": 1.0,
        "nll_on": "response",
    }


def test_the_json_schema_knows_the_names_of_the_yaml():
    schema = RunConfig.model_json_schema(by_alias=True)
    assert "lambda" in schema["$defs"]["OrpoConfig"]["properties"]
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("value", "stored", "of_200"),
    [("10", 10, 10), ("1", 1, 1), ("0.1", 0.1, 20), ("1.0", 1.0, 200), ("1e-3", 1e-3, 1)],
)
def test_eval_every_is_steps_if_whole_and_else_a_fraction(path, value, stored, of_200):
    every = load(path, MINIMAL, f"training.eval_every={value}").training.eval_every
    assert (every, type(every)) == (stored, type(stored))
    assert every_to_steps(every, 200) == of_200


def test_an_exponent_without_a_dot_is_a_number(path):
    config = load(
        path, MINIMAL + "search: {space: {training.learning_rate: {loguniform: [2e-5, 4E-4]}}}\n"
    )
    assert config.search.space["training.learning_rate"]["loguniform"] == [2e-5, 4e-4]
    assert load(path, MINIMAL, "training.learning_rate=3e-4").training.learning_rate == 3e-4


def test_a_date_is_text(path):
    assert load(path, MINIMAL.replace("tiny", "2026-02-31")).name == "2026-02-31"


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL.replace("\n", "\r\n"),
        b"\xef\xbb\xbf" + MINIMAL.encode(),
        json.dumps({"name": "tiny"})[:-1]
        + (', "model": {"base": "some/model"}, "data": {"train": [{"source": "pairs.jsonl"}]}}'),
    ],
    ids=["windows-line-ends", "byte-order-mark", "json"],
)
def test_harmless_spellings_load_alike(path, text):
    assert load(path, text) == load(path, MINIMAL)


def test_an_escaped_character_beyond_16_bits_is_put_together(path):
    folder = "./caf\u00e9/\U0001f600"
    override = f"model.base={json.dumps(folder)}"
    assert r"\ud83d\ude00" in override
    assert load(path, MINIMAL, override).model.base == folder
    assert "is not str" in complaint(path, MINIMAL, r'model.base="\ud83d"')


def test_anchors_and_merge_keys_work(path):
    config = load(
        path,
        MINIMAL.replace("[{source: pairs.jsonl}]", "[&a {source: a.csv}, {<<: *a, weight: 2.0}]"),
    )
    assert [(s.source, s.weight) for s in config.data.train] == [("a.csv", 1.0), ("a.csv", 2.0)]


# Overrides


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("training.epochs=3", "training", "epochs", 3),
        ("training.layout=padded", "training", "layout", "padded"),
        ("adapter.targets=[q_proj, v_proj]", "adapter", "targets", ("q_proj", "v_proj")),
        ("adapter.dora=true", "adapter", "dora", True),
        ("model.revision=null", "model", "revision", None),
        ("model.base=a=b", "model", "base", "a=b"),
        ("training.trackers=[wandb]", "training", "trackers", ("wandb",)),
        ("data.train.0.limit=7", "data", "train", None),
        (" training.seed = 5", "training", "seed", 5),
    ],
)
def test_overrides_are_read_as_yaml(path, override, section, field, value):
    config = load(path, MINIMAL, override)
    if field == "train":
        assert (config.data.train[0].source, config.data.train[0].limit) == ("pairs.jsonl", 7)
    else:
        assert getattr(getattr(config, section), field) == value


def test_an_override_may_replace_a_whole_section_and_the_last_one_wins(path):
    config = load(
        path, WITH_OBJECTIVE, "objective={kind: dpo}", "objective.beta=0.3", "objective.beta=0.5"
    )
    assert config.objective == DpoConfig(beta=0.5)


def test_an_override_of_one_alias_leaves_the_other_alone(path):
    shared = MINIMAL.replace("[{source: pairs.jsonl}]", "&t [{source: pairs.jsonl}]\n  eval: *t")
    config = load(path, shared, "data.eval.0.limit=5")
    assert (config.data.train[0].limit, config.data.eval[0].limit) == (None, 5)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.seed", "write key=value, such as training.learning_rate=3e-4"),
        ("=1", "write key=value, such as training.learning_rate=3e-4"),
        ("training..seed=1", "write key=value, such as training.learning_rate=3e-4"),
        ("training.seed.more=1", "training.seed: must be a valid integer, not {'more': 1}"),
        ("name.first=x", "name.first: name is a value, not a section"),
        (
            "data.train.1.source=x",
            "data.train.1.source: data.train has 1 items, its keys are 0 to 0",
        ),
        (
            "data.train.-1.source=x",
            "data.train.-1.source: data.train has 1 items, its keys are 0 to 0",
        ),
        ("data.train.²=x", "data.train.²: data.train has 1 items, its keys are 0 to 0"),
        ("training.seed=[", "not YAML: expected the node content, but found '<stream end>'"),
        (
            "training.seed=!!python/object:os.system x",
            "the tag tag:yaml.org,2002:python/object:os.system is not allowed",
        ),
        ("objective={kind: dpo, kind: ipo}", "kind stands twice, first in line 1"),
        ("training.seed=0b_", "'0b_' is not int"),
        ("trainin.seed=1", "trainin: unknown key; did you mean training?"),
        ("training.sede=1", "training.sede: unknown key; did you mean training.seed?"),
        ("learning_rate=1", "learning_rate: unknown key; did you mean training.learning_rate?"),
        (
            "data.train.0.sorce=x",
            "data.train.0.sorce: unknown key; did you mean data.train.0.source?",
        ),
        (
            "adapter.rnk=8",
            "adapter.rnk: unknown key; known here: alpha, dora, dropout, init, init_from, kind, "
            "lora_plus_ratio, r, rslora, targets",
        ),
        (
            "name=artifacts",
            "name: artifacts is a folder that all runs of a storage share; choose another name",
        ),
        ("data.train=[]", "data.train: must have at least 1 item, not []"),
        ("name=", "has no value; write it after the =, or null to unset it"),
    ],
)
def test_a_wrong_override_is_named_as_written(path, override, says):
    assert complaint(path, MINIMAL, override) == f"override {override!r}: {says}"


def test_an_override_of_unbounded_depth_or_length_is_refused_in_a_short_line(path):
    assert complaint(path, MINIMAL, "training.seed=" + "[" * 600).endswith("...: nested too deeply")
    assert len(complaint(path, MINIMAL, "model.quantization=" + "x" * 5000)) < 300
    assert "is not int" in complaint(path, MINIMAL, "training.seed=" + "1" * 5000)


# Keys


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MINIMAL + "trainin: {}\n", "run.yaml:5: trainin: unknown key; did you mean training?"),
        (MINIMAL + "r: 8\n", "run.yaml:5: r: unknown key; did you mean adapter.r?"),
        (
            MINIMAL + "training:\n  epochs: 1\n  sede: 3\n",
            "run.yaml:7: training.sede: unknown key; did you mean training.seed?",
        ),
        (
            MINIMAL.replace(
                "[{source: pairs.jsonl}]",
                "\n    - source: a.csv\n    - source: b.csv\n      wieght: 2",
            ),
            "run.yaml:7: data.train.1.wieght: unknown key; did you mean data.train.1.weight?",
        ),
        (
            MINIMAL + "objective: {kind: orpo, lamda: 0.1}\n",
            "run.yaml:5: objective.lamda: unknown key; did you mean objective.lambda?",
        ),
        (MINIMAL + "5: x\n", f"run.yaml:5: 5: unknown key; known here: {SECTIONS}"),
        (MINIMAL + "on: x\n", f"run.yaml:5: on: unknown key; known here: {SECTIONS}"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(path, text, says):
    assert complaint(path, text) == says


def test_an_unknown_key_comes_before_other_mistakes_and_they_are_named(path):
    text = MINIMAL.replace("source:", "sorce:") + "training: {seed: -1}\n"
    says = (
        "run.yaml:4: data.train.0.sorce: unknown key; did you mean data.train.0.source? (also "
        "wrong: training.seed)"
    )
    assert complaint(path, text) == says


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MINIMAL + "name: other\n", "run.yaml:5: name stands twice, first in line 1"),
        (
            MINIMAL + "training:\n  seed: 1\n  epochs: 2\n  seed: 3\n",
            "run.yaml:8: seed stands twice, first in line 6",
        ),
        (
            MINIMAL.replace("pairs.jsonl", "a, source: b"),
            "run.yaml:4: source stands twice, first in line 4",
        ),
        (MINIMAL + '"name": other\n', "run.yaml:5: name stands twice, first in line 1"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(path, text, says):
    assert complaint(path, text) == says


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        ("{kind: dpo, lambda: 0.1}", "objective.lambda: dpo has no lambda; remove it"),
        (
            "{kind: orpo, label_smoothing: 0.1}",
            "objective.label_smoothing: orpo has no label_smoothing; remove it",
        ),
        (
            "{kind: sft, gamma_beta_ratio: 0.1}",
            "objective.gamma_beta_ratio: sft has no gamma_beta_ratio; remove it",
        ),
        (
            "{kind: kto2}",
            "objective.kind: 'kto2' is not one of 'cpo', 'dpo', 'ipo', 'kto', 'orpo', 'sft', "
            "'simpo'",
        ),
        ("{loss: hinge}", "objective.loss: orpo has no loss; remove it"),
        (
            "orpo",
            "objective: must be a section that names its kind, such as {kind: orpo}, not 'orpo'",
        ),
    ],
)
def test_settings_of_another_objective_are_refused(path, objective, says):
    assert complaint(path, MINIMAL + f"objective: {objective}\n") == f"run.yaml:5: {says}"


def test_a_python_name_never_competes_with_the_yaml_name(path):
    says = "run.yaml:5: objective.lambda_: unknown key; did you mean objective.lambda?"
    assert complaint(path, MINIMAL + "objective: {kind: orpo, lambda: 0.1, lambda_: 0.2}\n") == says


# Values


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.learning_rate=fast", "must be a valid number, not 'fast'"),
        ("training.learning_rate=-1", "must be greater than 0, not -1"),
        ("training.learning_rate=.inf", "must be a finite number, not inf"),
        ("training.learning_rate=.nan", "must be a finite number, not nan"),
        ("training.epochs=0", "must be greater than 0, not 0"),
        ("training.seed=4294967296", "must be less than 4294967296, not 4294967296"),
        ("training.eval_every=0", f"must be {AN_EVENT}, not 0"),
        ("training.eval_every=1.5", f"must be {AN_EVENT}, not 1.5"),
        ("training.eval_every=-0.1", f"must be {AN_EVENT}, not -0.1"),
        ("training.checkpoint_every='10'", f"must be {AN_EVENT}, not '10'"),
        (
            "training.warmup=1.0",
            "must be a whole number of steps (0 or more), or a share of the run (0 or more, below "
            "1.0), not 1.0",
        ),
        ("training.trackers=none", "none: no tracker; write [] for none"),
        (
            "training.trackers=[tensorboard]",
            "tensorboard: it is always on, so it is not listed here; remove it",
        ),
        ("training.seed=null", "has no value; it must be a valid integer"),
        ("training.schedule=cosin", "must be 'cosine', 'linear' or 'constant', not 'cosin'"),
        ("training.trackers=3", "must be a list, not 3"),
        ("adapter.dropout=1.0", "must be less than 1, not 1.0"),
        ("adapter.targets=all", "all is no module; write all-linear for every linear layer"),
        ("adapter.targets=3", "must be 'all-linear' or a list, not 3"),
        ("scale.workers=0", "must be 'auto' or greater than 0, not 0"),
        ("scale.workers=1.5", "must be 'auto' or a valid integer, not 1.5"),
        ("scale.gpus_per_worker=2", "must be 'auto' or less than or equal to 1, not 2"),
        ("scale.cpus_per_worker=0", "must be 'auto' or greater than 0, not 0"),
        (
            "scale.cpus_per_worker=0.33333",
            "0.33333 has more than four decimals, which Ray does not count; round it",
        ),
        (
            "scale.cpus_per_worker=1e-5",
            "1e-05 has more than four decimals, which Ray does not count; round it",
        ),
        ("scale.max_failures=-1", "must be greater than or equal to 0, not -1"),
        ("scale.deepspeed=zero", "must be 'auto' or 'none' or a section with stage, not 'zero'"),
        ("scale.deepspeed=2", "must be 'auto' or 'none' or a section with stage, not 2"),
        (
            "name=a/../b",
            "must be letters, digits and . _ - (and / between folders) and begin with a letter or "
            "digit, not 'a/../b'",
        ),
        (
            "name=..",
            "must be letters, digits and . _ - (and / between folders) and begin with a letter or "
            "digit, not '..'",
        ),
        (
            "name=artifacts/b",
            "artifacts is a folder that all runs of a storage share; choose another name",
        ),
        ("name=123", "must be text (write it in quotes), not 123"),
        ("model.revision=1234567", "must be text (write it in quotes), not 1234567"),
        ("model.base=''", "must have at least 1 character, not ''"),
        ("data.train=3", "must be a list, not 3"),
        ("data.max_length=4", "must be greater than or equal to 8, not 4"),
        ("model=mistral", f"must be a section with {MODEL_KEYS}, not 'mistral'"),
    ],
)
def test_a_wrong_value_says_what_it_must_be(path, override, says):
    key = override.partition("=")[0]
    assert complaint(path, MINIMAL, override) == f"override {override!r}: {key}: {says}"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "adapter.targets=[q_proj, 5]",
            "adapter.targets.1: must be text (write it in quotes), not 5",
        ),
        ("training.trackers=[tb]", "training.trackers.0: must be 'wandb' or 'mlflow', not 'tb'"),
        (
            "data.columns={prompt: a, chosen: b}",
            "data.columns: name both chosen and rejected",
        ),
        (
            "data.columns=[a]",
            "data.columns: must be a section with chosen, completion, label, prompt, rejected, "
            "system, not ['a']",
        ),
        (
            "data.train=[3]",
            "data.train.0: must be a section with config, limit, revision, source, split, weight, "
            "not 3",
        ),
    ],
)
def test_a_wrong_item_is_named_by_its_place_in_the_list(path, override, says):
    assert complaint(path, MINIMAL, override) == f"override {override!r}: {says}"


@pytest.mark.parametrize(
    ("overrides", "section", "field", "value"),
    [
        (["training.trackers=wandb"], "training", "trackers", ("wandb",)),
        (["adapter.targets=q_proj"], "adapter", "targets", ("q_proj",)),
        (["adapter.targets=all-linear"], "adapter", "targets", "all-linear"),
        (["data.train=a.csv"], "data", "train", (Source(source="a.csv"),)),
        (
            ["data.train=[a.csv, {source: b.csv}]"],
            "data",
            "train",
            (Source(source="a.csv"), Source(source="b.csv")),
        ),
        (
            ["data.train={source: a.csv, weight: 2}"],
            "data",
            "train",
            (Source(source="a.csv", weight=2),),
        ),
        (["stages={objective: {kind: sft}}"], None, "stages", ({"objective": {"kind": "sft"}},)),
        (["training.epochs=1.5"], "training", "epochs", 1.5),
        (["data.max_length=512"], "data", "max_prompt_length", 256),
        (["data.max_length=8192"], "data", "max_prompt_length", 4096),
        (["data.max_length=512", "data.max_prompt_length=400"], "data", "max_prompt_length", 400),
        ([], "data", "max_prompt_length", 1024),
    ],
)
def test_what_people_write_means_what_it_says(path, overrides, section, field, value):
    path.write_text(MINIMAL, encoding="utf-8")
    config = load_config(path, overrides)
    assert getattr(getattr(config, section) if section else config, field) == value


@pytest.mark.parametrize(
    "override",
    [
        "training.learning_rate=yes",
        "training.epochs=true",
        "scale.workers=on",
        "training.eval_every=true",
    ],
)
def test_yes_is_not_the_number_one(path, override):
    section, _, field = override.partition("=")[0].partition(".")
    says = complaint(path, MINIMAL, override)
    assert says.startswith(f"override {override!r}: {section}.{field}: must be ")
    assert says.endswith("not 'True'")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.quantization=true", "must be 'nf4', 'int8' or 'none', not True"),
        ("name=yes", "must be text (write it in quotes), not True"),
        ("data.train=true", "must be a list, not True"),
    ],
)
def test_yes_is_refused_by_the_key_that_has_it(path, override, says):
    key = override.partition("=")[0]
    assert complaint(path, MINIMAL, override) == f"override {override!r}: {key}: {says}"


def test_a_missing_key_names_its_section(path):
    assert (
        complaint(path, "name: tiny\ndata: {train: [{source: a}]}\n")
        == "run.yaml: model: missing; every run needs it"
    )
    says = "run.yaml:2: model.base: missing; model needs it"
    assert complaint(path, MINIMAL.replace("base: some/model", "quantization: none")) == says


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ("{stage: 4}", "scale.deepspeed.stage: must be less than or equal to 3, not 4"),
        ("{stage: -1}", "scale.deepspeed.stage: must be greater than or equal to 0, not -1"),
        ("{stage: two}", "scale.deepspeed.stage: must be a valid integer, not 'two'"),
        ("{stage: true}", "scale.deepspeed.stage: must be a valid integer, not 'True'"),
        ("{}", "scale.deepspeed.stage: missing; scale.deepspeed needs it"),
    ],
)
def test_a_wrong_zero_stage_is_named_inside_its_section(path, stage, says):
    override = f"scale.deepspeed={stage}"
    assert complaint(path, MINIMAL, override) == f"override {override!r}: {says}"


def test_the_place_is_that_of_the_value_that_the_message_names(path):
    override = "scale.deepspeed.stage=true"
    says = complaint(path, MINIMAL + "scale: {deepspeed: {stage: 2}}\n", override)
    assert (
        says == f"override {override!r}: scale.deepspeed.stage: must be a valid integer, not 'True'"
    )


# Rules over several keys


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        (
            MINIMAL,
            ["data.max_length=512", "data.max_prompt_length=512"],
            "override 'data.max_prompt_length=512': data: "
            "max_prompt_length (512) must be below max_length (512), or no answer fits",
        ),
        (
            MINIMAL + "  max_length: 512\n  max_prompt_length: 600\n",
            [],
            "run.yaml:6: data: max_prompt_length (600) must be below max_length (512), or no "
            "answer fits",
        ),
        (
            MINIMAL + "training: {epochs: 1}\n",
            ["training.max_steps=5"],
            "override 'training.max_steps=5': training: "
            "epochs and max_steps both set the length of the run; keep one of them, or unset one "
            "with an override such as training.epochs=null",
        ),
        (
            MINIMAL + "adapter:\n  kind: none\n",
            [],
            "run.yaml:6: adapter.kind=none trains the base's own weights, but "
            "model.quantization=nf4 freezes them; set model.quantization=none, or "
            "adapter.kind=lora",
        ),
        (
            MINIMAL,
            ["model.quantization=none", "adapter.kind=none", "adapter.dora=true"],
            "override 'adapter.kind=none': adapter: "
            "kind: none trains the base itself, so dora has no meaning; remove it",
        ),
        (
            MINIMAL + "adapter: {targets: []}\n",
            [],
            "run.yaml:5: adapter: targets is empty: name modules such as [q_proj, v_proj], or "
            "write all-linear",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(path, text, overrides, says):
    assert complaint(path, text, *overrides) == says


@pytest.mark.parametrize("optimizer", ["adamw-8bit", "paged-adamw-8bit"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_8_bit_optimizers_are_refused_where_zero_would_cut_their_blocks(path, optimizer, stage):
    says = complaint(
        path, MINIMAL, f"training.optimizer={optimizer}", f"scale.deepspeed={{stage: {stage}}}"
    )
    assert (
        f"training.optimizer: {optimizer} keeps its state in 8-bit blocks, which ZeRO stage "
        f"{stage} cannot split" in says
    )
    assert says.endswith("set scale.deepspeed=none, or training.optimizer=adamw")


def test_every_optimizer_has_its_kind_and_its_name_in_the_trainer(path):
    names = set(get_args(TrainingConfig.model_fields["optimizer"].annotation))
    assert set(OPTIMIZERS) == names == set(arguments._OPTIMIZERS)


WHOLE = ["model.quantization=none", "adapter.kind=none"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["training.optimizer=schedule-free-adamw"],
            "training.schedule: schedule-free-adamw averages the weights in place of a schedule; "
            "set training.schedule=constant (training.warmup is its own)",
        ),
        (
            [
                "training.optimizer=schedule-free-adamw",
                "training.schedule=constant",
                "scale.deepspeed={stage: 2}",
            ],
            "training.optimizer: schedule-free-adamw averages whole weights, which ZeRO stage 2 "
            "cannot split; set scale.deepspeed=none, or training.optimizer=adamw",
        ),
        (
            ["training.optimizer=galore-adamw"],
            "training.optimizer: galore-adamw trains whole weights through gradients of low rank, "
            "and an adapter has a low rank already; set adapter.kind=none with "
            "model.quantization=none, or training.optimizer=adamw",
        ),
        (
            ["training.optimizer=galore-adamw-8bit", "scale.deepspeed={stage: 1}", *WHOLE],
            "training.optimizer: galore-adamw-8bit projects the gradients of whole matrices, which "
            "ZeRO stage 1 cannot split; set scale.deepspeed=none, or training.optimizer=adamw",
        ),
        (
            ["training.optimizer=galore-adamw", "training.weight_decay=0.1", *WHOLE],
            "training.weight_decay: galore-adamw decays no weights here; set it to 0",
        ),
        (
            ["training.galore.rank=8", *WHOLE],
            "training.galore: adamw reads none of it; set training.optimizer=galore-adamw",
        ),
        (
            ["adapter.init=pissa", "adapter.dropout=0"],
            "adapter.init: pissa takes a part out of the weights, and model.quantization=nf4 would "
            "round what is left anew; set model.quantization=none, or adapter.init=default",
        ),
        (
            ["adapter.init=olora", "adapter.dropout=0", "model.quantization=int8"],
            "adapter.init: olora takes a part out of the weights, and model.quantization=int8 "
            "would round what is left anew; set model.quantization=none, or adapter.init=default",
        ),
        (
            ["adapter.init=loftq", "model.quantization=none"],
            "adapter.init: loftq makes up for the rounding to 4 bits; set "
            "model.quantization=nf4, or adapter.init=default",
        ),
    ],
)
def test_a_switch_that_does_not_fit_the_run_is_refused(path, overrides, says):
    assert complaint(path, MINIMAL, *overrides).endswith(says)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["adapter.init=eva", "adapter.init_from=runs/first"],
            "adapter: init: eva is the start of a new adapter, but init_from names an earlier one; "
            "remove one of them",
        ),
        (
            ["adapter.init=loftq", "adapter.dora=true"],
            "adapter: dora: its magnitudes are those of the base, and init: loftq starts beside "
            "it; set dora=false, or init=default",
        ),
        (
            ["adapter.init=pissa", "model.quantization=none"],
            "adapter: dropout: with init: pissa the adapter holds a part of the weights, which "
            "dropout would leave out at random; set dropout=0, or init=default",
        ),
        (
            [*WHOLE, "adapter.lora_plus_ratio=16", "adapter.rslora=true"],
            "adapter: kind: none trains the base itself, so rslora and lora_plus_ratio have no "
            "meaning; remove them",
        ),
        (["adapter.lora_plus_ratio=0.5"], "must be greater than or equal to 1, not 0.5"),
    ],
)
def test_an_adapter_that_contradicts_itself_is_refused(path, overrides, says):
    assert complaint(path, MINIMAL, *overrides).endswith(says)


def test_a_stage_starts_from_what_the_stage_before_saves(path):
    """An adapter of PiSSA is saved with twice the rank, at the same scale."""
    stages = "stages: [{objective: {kind: sft}}, {objective: {kind: dpo}}]\n"
    text = MINIMAL.replace("base: some/model", "base: some/model, quantization: none") + stages
    (first, second) = stage_configs(load(path, text, "adapter.init=eva"))
    assert (first.adapter.init, second.adapter.init) == ("eva", "default")
    with pytest.raises(ConfigError) as caught:
        stage_configs(load(path, text, "adapter.init=pissa", "adapter.dropout=0"))
    assert str(caught.value) == (
        "stages.1.adapter.r: 16, but the stage before it saves an adapter with 32 (init: pissa "
        "doubles the rank at the same scale); use the same value"
    )
    doubled = stages.replace("{kind: dpo}", "{kind: dpo}, adapter: {r: 32, alpha: 32}")
    started = load(path, text.replace(stages, doubled), "adapter.init=pissa", "adapter.dropout=0")
    (_, second) = stage_configs(started)
    assert (second.adapter.r, second.adapter.alpha) == (32, 32)
    with pytest.raises(ConfigError, match="init: eva is the start of a new adapter, but init_from"):
        named = stages.replace("{kind: dpo}", "{kind: dpo}, adapter: {init: eva}")
        stage_configs(load(path, text.replace(stages, named)))


@pytest.mark.parametrize("deepspeed", ["auto", "none", "{stage: 0}"])
def test_8_bit_optimizers_are_allowed_where_state_stays_whole(path, deepspeed):
    config = load(path, MINIMAL, "training.optimizer=adamw-8bit", f"scale.deepspeed={deepspeed}")
    assert config.training.optimizer == "adamw-8bit"


def test_workers_and_what_they_share_are_settings(path):
    scale = load(path, MINIMAL).scale
    assert (scale.workers, scale.deepspeed, scale.gpus_per_worker, scale.ray) == (
        "auto",
        "auto",
        "auto",
        False,
    )
    scale = load(
        path, MINIMAL, "scale.workers=8", "scale.deepspeed.stage=3", "scale.gpus_per_worker=1"
    ).scale
    assert (scale.workers, scale.deepspeed.stage, scale.gpus_per_worker) == (8, 3, 1)
    assert "which NCCL does not allow" in complaint(path, MINIMAL, "scale.gpus_per_worker=0.5")
    assert (
        load(path, MINIMAL, "scale.workers=1", "scale.gpus_per_worker=0.5").scale.gpus_per_worker
        == 0.5
    )


def test_a_config_is_frozen(path):
    config = load(path, MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "other"
    with pytest.raises(ValidationError, match="frozen"):
        config.training.seed = 1


# Files that are no config


@pytest.mark.parametrize("ending", [".csv", ".JSONL", ".parquet"])
def test_a_file_of_pairs_is_no_config(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"pairs{ending}"
    file.write_text("prompt,chosen,rejected\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="a file of pairs is no config; name it in one, as data:"):
        load_config(file)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "run.yaml:1: a config is a YAML mapping of sections such as model, data and training"),
        (
            "# nothing yet\n",
            "run.yaml:1: a config is a YAML mapping of sections such as model, data and training",
        ),
        (
            "- a\n- b\n",
            "run.yaml:1: a config is a YAML mapping of sections such as model, data and training",
        ),
        (
            "just text",
            "run.yaml:1: a config is a YAML mapping of sections such as model, data and training",
        ),
        (
            "name: a\n\tmodel: b\n",
            "run.yaml:2: not YAML: found character '\\t' that cannot start any token; indent with "
            "spaces",
        ),
        (
            MINIMAL + "scale: {workers: 1\n",
            "run.yaml:6: not YAML: expected ',' or '}', but got '<stream end>'",
        ),
        (MINIMAL + "---\n" + MINIMAL, "run.yaml:5: not YAML: but found another document"),
        (b"name: a\nstorage: caf\xe9\n", "run.yaml:2: not UTF-8 text: byte 0xe9"),
        (MINIMAL.encode("utf-16"), "run.yaml:1: not UTF-8 text: byte 0xff"),
        (
            b"name: a\nstorage: a\x00b\n",
            "run.yaml:2: not YAML: the character '\\x00' is not allowed",
        ),
        (
            MINIMAL + "storage: !!python/object/apply:os.system [touch x]\n",
            "run.yaml:5: the tag tag:yaml.org,2002:python/object/apply:os.system is not allowed",
        ),
        (MINIMAL + "storage: !secret x\n", "run.yaml:5: the tag !secret is not allowed"),
        (
            MINIMAL + "storage: !!binary aGk=\n",
            "run.yaml:5: the tag tag:yaml.org,2002:binary is not allowed",
        ),
        (MINIMAL + "storage: !!int abc\n", "run.yaml:5: 'abc' is not int"),
        (MINIMAL + "? [a, b]\n: x\n", "run.yaml:5: a key must be a plain name"),
        (MINIMAL + "scale: *nowhere\n", "run.yaml:5: not YAML: found undefined alias 'nowhere'"),
        (MINIMAL + "training: &t [*t]\n", "run.yaml:5: nested too deeply or too large"),
        (
            MINIMAL + "training: " + "[" * 60 + "]" * 60,
            "run.yaml:5: nested too deeply or too large",
        ),
        (MINIMAL + "training: " + "[" * 600, "run.yaml:1: nested too deeply"),
        (LAUGHS, "run.yaml:1: nested too deeply or too large"),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_line(path, text, says):
    assert complaint(path, text) == says


def test_a_missing_file_and_a_folder_are_refused(path, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file$"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="is a folder; name a YAML file"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{bad", "[1]", "{}", '{"name": "tiny"}', "[" * 100_000, "null"]
)
def test_a_broken_resolved_config_is_one_line(tmp_path, text):
    resolved = tmp_path / "config.json"
    resolved.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_resolved(resolved)
    assert str(caught.value).startswith(f"{resolved}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_no_tag_runs_code(path, tmp_path):
    witness = tmp_path / "witness"
    complaint(path, MINIMAL + f"storage: !!python/object/apply:os.system ['touch {witness}']\n")
    complaint(path, MINIMAL, f"storage=!!python/object/apply:os.system ['touch {witness}']")
    assert not witness.exists()


@pytest.mark.parametrize("loss", ["hinge", "apo-zero", "apo-down", "nca"])
def test_losses_without_a_flipped_label_are_not_smoothed(path, loss):
    objective = f"objective: {{kind: dpo, loss: {loss}, label_smoothing: 0.1}}\n"
    assert complaint(path, MINIMAL + objective) == (
        f"run.yaml:5: objective: label_smoothing: {loss} has none; set it to 0, or use loss: "
        "sigmoid, sigmoid-norm or robust"
    )


def test_the_usual_beta_of_dpo_suits_its_loss(path):
    def beta(objective: str) -> float:
        return load(path, MINIMAL + f"objective: {objective}\n").objective.beta

    assert beta("{kind: dpo}") == beta("{kind: dpo, loss: nca}") == 0.1
    assert beta("{kind: dpo, loss: sigmoid-norm}") == 5.0
    assert beta("{kind: dpo, loss: sigmoid-norm, beta: 0.3}") == 0.3


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        (
            "{nll_weight: 0, lambda: 0}",
            "objective: nll_weight and lambda are 0, so nothing is trained; set one of them",
        ),
        (
            "{kind: orpo, beta: 0.1}",
            "objective: beta 0.1 scales the log odds ratio here, and what TRL calls beta is "
            "lambda; set lambda=0.1 in its place, or name lambda beside it",
        ),
    ],
)
def test_an_orpo_without_sense_is_refused(path, objective, says):
    assert complaint(path, MINIMAL + f"objective: {objective}\n") == f"run.yaml:5: {says}"


def test_the_second_stage_orpo_beta_needs_no_lambda(path):
    found = load(path, MINIMAL + "objective: {nll_weight: 0, beta: 0.1}\n")
    assert (found.objective.beta, found.objective.nll_weight) == (0.1, 0.0)
    assert found.training.learning_rate == 5e-5, "it has no likelihood term"
    both = load(path, MINIMAL + "objective: {beta: 0.1, lambda: 0.5}\n")
    assert (both.objective.beta, both.objective.nll_weight) == (0.1, 1.0)
    assert both.training.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["objective.nll_on=full"],
            "data.train_on: with objective.nll_on: full all tokens are trained already, not "
            "all-assistant; set objective.nll_on=response, or data.train_on=last",
        ),
        (
            ["training.engine=trl", "objective.nll_on=full"],
            "data.train_on: TRL's trainers train whole answers, not all-assistant; set "
            "data.train_on=last, or training.engine=fast",
        ),
        (
            ["training.engine=trl", "objective.kind=kto"],
            "data.train_on: TRL's trainers train whole answers, not all-assistant; set "
            "data.train_on=last",
        ),
    ],
)
def test_turns_that_cannot_be_trained_are_refused(path, overrides, says):
    assert load(path, MINIMAL).data.train_on == "last"
    assert complaint(path, MINIMAL, "data.train_on=all-assistant", *overrides).endswith(says)


def test_the_objective_is_orpo_unless_it_is_named(path):
    assert load(path, MINIMAL, "objective.lambda=0.3").objective == OrpoConfig(lambda_=0.3)
    assert load(path, MINIMAL, "objective.kind=dpo").objective.kind == "dpo"
