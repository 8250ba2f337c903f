"""Names of TRL, LLaMA-Factory and Axolotl in a config of ours: told what they are here."""

import ast
import importlib.util
from pathlib import Path

import pytest

from orpo_ray.config import RunConfig, load_config
from orpo_ray.config.foreign.words import WORDS, instead_of, word_of
from orpo_ray.config.keys import EXTENDS, all_keys, fields_at, names_of
from orpo_ray.config.near import near_name
from orpo_ray.config.objectives import OBJECTIVES
from orpo_ray.errors import ConfigError

MINIMAL = """\
name: tiny
model: {base: some/model}
data:
  train: [{source: pairs.jsonl}]
"""
GLOBAL = "it is the global batch: per-device batch x accumulation x number of GPUs"
STEPS = "steps if whole, else a fraction of the run"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def complaint(path: Path, text: str, *overrides: str) -> str:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    return line.removeprefix(f"{path.parent}/")


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("training.num_train_epochs", "here it is training.epochs"),
        ("num_train_epochs", "here it is training.epochs"),
        ("training.lr", "here it is training.learning_rate"),
        ("lr", "here it is training.learning_rate"),
        ("per_device_train_batch_size", f"here it is training.pairs_per_step; {GLOBAL}"),
        ("training.gradient_accumulation_steps", f"here it is training.pairs_per_step; {GLOBAL}"),
        ("micro_batch_size", f"here it is training.pairs_per_step; {GLOBAL}"),
        ("training.save_steps", f"here it is training.checkpoint_every; {STEPS}"),
        ("save_steps", f"here it is training.checkpoint_every; {STEPS}"),
        ("training.eval_steps", f"here it is training.eval_every; {STEPS}"),
        ("adapter.lora_r", "here it is adapter.r"),
        ("lora_r", "here it is adapter.r"),
        ("adapter.lora_alpha", "here it is adapter.alpha"),
        (
            "load_in_4bit",
            "here it is model.quantization; write nf4 (the default) for true, none for false",
        ),
        ("model.load_in_8bit", "here it is model.quantization; write int8"),
        ("bf16", "here it is model.dtype; write bfloat16; auto takes it if the GPU has it"),
        (
            "training.logging_steps",
            "every step is logged, to metrics.jsonl and TensorBoard; remove it",
        ),
        (
            "report_to",
            "here it is training.trackers; wandb or mlflow, [] for none; TensorBoard is always on",
        ),
        (
            "data.cutoff_len",
            "here it is data.max_length; it is tokens of prompt and answer together",
        ),
        ("sequence_len", "here it is data.max_length; it is tokens of prompt and answer together"),
        ("warmup_ratio", f"here it is training.warmup; {STEPS}"),
        ("dataset_name", "here it is data.train"),
        ("data.train.0.path", "here it is data.train.0.source"),
        ("model_name_or_path", "here it is model.base"),
        ("trust_remote_code", "code that a model or a dataset brings is never run; remove it"),
        (
            "hub_strategy",
            "a run uploads nothing; its adapter folder is ready for `hf upload`; remove it",
        ),
        ("rl", "here it is objective.kind"),
        ("stage", "here it is objective.kind; stages is a list of runs one after the other"),
        ("beta", "here it is objective.lambda; TRL calls it beta"),
        ("objective.orpo_alpha", "here it is objective.lambda"),
        (
            "objective.gamma",
            "orpo has none; with kind: simpo it is objective.gamma_beta_ratio",
        ),
        ("objective.rpo_alpha", "orpo has none; with kind: dpo it is objective.nll_weight"),
    ],
)
def test_a_foreign_name_is_answered_with_ours(path: Path, key: str, says: str) -> None:
    override = f"{key}=1"
    assert (
        complaint(path, MINIMAL, override) == f"override {override!r}: {key}: unknown key; {says}"
    )


def test_the_line_of_a_foreign_name_in_a_file_is_told(path: Path) -> None:
    text = MINIMAL + "training:\n  seed: 1\n  num_train_epochs: 2\n"
    says = "run.yaml:7: training.num_train_epochs: unknown key; here it is training.epochs"
    assert complaint(path, text) == says


def test_all_foreign_names_of_a_file_are_answered_at_once(path: Path) -> None:
    text = MINIMAL + "training: {lr: 1e-4, num_train_epochs: 2, gamma: 1, colour: red, seed: x}\n"
    assert complaint(path, text) == (
        "run.yaml:5: training.lr: unknown key; here it is training.learning_rate (also unknown: "
        "training.num_train_epochs (here training.epochs), training.gamma (orpo has none), "
        "training.colour; also wrong: training.seed)"
    )


def test_further_keys_are_answered_as_the_first_is(path: Path) -> None:
    text = MINIMAL + "colour: red\n"
    overrides = ("objective.alpha=1", "max_steps=2", "objective.loss=hinge")
    assert complaint(path, text, *overrides).endswith(
        "(also unknown: objective.loss (orpo has none), colour, max_steps (here "
        "training.max_steps))"
    )


def test_an_override_of_the_kind_is_blamed_for_the_keys_that_it_makes_unknown(path: Path) -> None:
    text = MINIMAL + "objective: {kind: dpo, beta: 0.1}\n"
    assert complaint(path, text, "objective.kind=sft") == (
        "override 'objective.kind=sft': objective.beta: sft has no beta; remove it "
        f"({path}:5), or replace the section: objective={{kind: sft}}"
    )
    known = "known here: beta, kind, label_smoothing, loss, nll_on, nll_weight"
    assert complaint(path, text, "objective.colour=1").endswith(
        f"objective.colour: unknown key; {known}"
    )


@pytest.mark.parametrize(
    ("kind", "key", "says"),
    [
        ("simpo", "gamma", "here it is objective.gamma_beta_ratio; it is gamma divided by beta"),
        ("dpo", "pref_beta", "here it is objective.beta"),
        ("orpo", "pref_beta", "here it is objective.lambda"),
        ("kto", "kto_chosen_weight", "here it is objective.desirable_weight"),
        ("cpo", "cpo_alpha", "here it is objective.alpha"),
        ("dpo", "cpo_alpha", "dpo has none; with kind: cpo it is objective.alpha"),
    ],
)
def test_the_answer_is_that_of_the_objective(path: Path, kind: str, key: str, says: str) -> None:
    text = f"{MINIMAL}objective: {{kind: {kind}, {key}: 0.5}}\n"
    assert complaint(path, text) == f"run.yaml:5: objective.{key}: unknown key; {says}"


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("orpo", "beta, kind, lambda, nll_on, nll_weight"),
        ("sft", "kind, nll_on"),
        ("kto", "beta, desirable_weight, kind, undesirable_weight"),
        ("simpo", "beta, gamma_beta_ratio, kind"),
    ],
)
def test_keys_that_are_listed_are_those_of_the_kind(path: Path, kind: str, keys: str) -> None:
    says = f"run.yaml:5: objective.colour: unknown key; known here: {keys}"
    assert complaint(path, f"{MINIMAL}objective: {{kind: {kind}, colour: red}}\n") == says


def test_without_a_kind_the_listed_keys_are_orpos(path: Path) -> None:
    known = "known here: beta, kind, lambda, nll_on, nll_weight"
    says = f"run.yaml:5: objective.colour: unknown key; {known}"
    assert complaint(path, MINIMAL + "objective: {colour: red}\n") == says


def test_a_key_of_another_kind_is_not_offered_from_elsewhere(path: Path) -> None:
    label = "label_smoothing"
    assert complaint(path, MINIMAL, f"{label}=0.1").endswith("training")  # the list of sections
    said = complaint(path, MINIMAL + "objective: {kind: dpo}\n", f"{label}=0.1")
    assert said.endswith(f"{label}: unknown key; did you mean objective.{label}?")


def test_a_name_that_stands_in_two_sections_is_told_with_both(path: Path) -> None:
    said = complaint(path, MINIMAL, "kind=orpo")
    assert said.endswith("kind: unknown key; did you mean adapter.kind or objective.kind?")


# The table


def test_every_answer_names_a_key_that_is_there() -> None:
    known = {*all_keys(RunConfig), EXTENDS}
    wrong = {
        name: word.here for name, word in WORDS.items() if word.here and word.here not in known
    }
    assert wrong == {}


def test_a_word_of_one_kind_names_a_key_of_it() -> None:
    for name, word in WORDS.items():
        if word.kind:
            field = word.here.removeprefix("objective.")
            assert field in names_of(OBJECTIVES[word.kind]), name


def test_every_word_says_something() -> None:
    assert [name for name, word in WORDS.items() if not word.here and not word.differs] == []
    assert instead_of("something_nobody_knows", "orpo") == "orpo_ray has no such setting"


def test_no_word_stands_in_the_way_of_a_key_of_ours() -> None:
    """A word may bear the name of one of our keys only where that key is unknown."""
    taken = {name for name in WORDS if "." in name and ":" not in name} & set(all_keys(RunConfig))
    assert taken == set()


# Near names


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("sede", "seed"),
        ("learning_rat", "learning_rate"),
        ("learningrate", "learning_rate"),
        ("learningRate", "learning_rate"),
        ("learning-rate", "learning_rate"),
        ("max_step", "max_steps"),
        ("schedul", "schedule"),
        ("epoch", "epochs"),
        ("optimiser", "optimizer"),
        ("weight_deacy", "weight_decay"),
    ],
)
def test_a_slip_is_mended(written: str, meant: str) -> None:
    assert near_name(written, fields_at(RunConfig, ["training"])) == meant


@pytest.mark.parametrize(
    ("written", "known"),
    [
        ("save_steps", "max_steps"),
        ("eval_steps", "max_steps"),
        ("lora_r", "dora"),
        ("lora", "dora"),
        ("min_length", "max_length"),
        ("lr", "r"),
        ("warmup_ratio", "warmup"),
        ("rank", "base"),
        ("eval_fractions_of", "eval_fraction"),
        ("", "r"),
    ],
)
def test_another_name_is_no_slip(written: str, known: str) -> None:
    assert near_name(written, [known]) is None


def fields_of(package: str, *files: str) -> set[str]:
    """Names that the dataclasses of an installed package's files have, without importing it."""
    found = importlib.util.find_spec(package)
    assert found is not None and found.submodule_search_locations
    root = Path(found.submodule_search_locations[0])
    names = set()
    for file in files:
        tree = ast.parse((root / file).read_text(encoding="utf-8"))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        bodies = [item for node in classes for item in node.body]
        names |= {
            item.target.id
            for item in bodies
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
    return {name for name in names if not name.startswith("_")}


FOREIGN = {
    *fields_of("transformers", "training_args.py"),
    *fields_of(
        "trl",
        "scripts/utils.py",
        "trainer/model_config.py",
        "trainer/dpo_config.py",
        "trainer/kto_config.py",
        "experimental/orpo/orpo_config.py",
        "experimental/cpo/cpo_config.py",
    ),
    *(name for name in WORDS if "." not in name and ":" not in name),
}
SECTIONS = [
    "",
    "model",
    "adapter",
    "data",
    "data.train",
    "objective",
    "training",
    "scale",
    "search",
]


def test_no_foreign_name_is_taken_for_a_slip() -> None:
    assert len(FOREIGN) > 250
    wrong = []
    for section in SECTIONS:
        known = fields_at(RunConfig, section.split(".") if section else [])
        for name in FOREIGN - set(known):
            near = near_name(name, known)
            if near is not None and word_of(section, name, "orpo") is None:
                wrong.append((section, name, near))
    assert wrong == []


def test_the_settings_that_trl_and_transformers_share_with_ours_are_all_known() -> None:
    """Everything that decides what a run of TRL's computes has an answer."""
    deciding = {
        "learning_rate",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "lr_scheduler_type",
        "warmup_steps",
        "optim",
        "bf16",
        "fp16",
        "save_steps",
        "eval_steps",
        "report_to",
        "loss_type",
        "lora_r",
        "lora_target_modules",
        "load_in_4bit",
        "attn_implementation",
        "use_dora",
        "simpo_gamma",
        "cpo_alpha",
    }
    assert deciding <= FOREIGN
    ours = set(all_keys(RunConfig))
    answered = {
        name
        for name in deciding
        if word_of("", name, "orpo") or any(key.endswith(f".{name}") for key in ours)
    }
    assert answered == deciding
