"""What we use of the insides of libraries: one list, and for each entry what has to hold of it.

An upgrade that moves one of them fails here, by its name, before a run fails elsewhere. The
versions are those that each was last read in; another one is no failure as long as its contract
holds.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import orpo_ray

PACKAGE = Path(orpo_ray.__file__).parent
TREES = {
    path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))
}
RAY, TRANSFORMERS, ACCELERATE, DEEPSPEED, TRL, BNB = (
    "2.60.0",
    "5.23.0",
    "1.15.0",
    "0.19.8",
    "1.16.0",
    "0.50.2",
)


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and not name.endswith("_")


@dataclass(frozen=True)
class Inside:
    """`name`: a module or what is in one. `takes`: parameters that we pass.

    `reads`: words in its source.
    """

    name: str
    version: str
    why: str
    takes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    @property
    def used(self) -> set[str]:
        """The private words that stand in our code for it."""
        return {
            word
            for text in (self.name, *self.reads)
            for word in re.findall(r"\w+", text)
            if private(word)
        }


_TRAIN = "ray.train.v2._internal"
_TRAINER = "transformers.trainer.Trainer"
_ZERO_12 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
_ZERO_3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"

INSIDES = [
    # Ray: starting it lean (ray_runtime.py).
    Inside(
        "ray._private.parameter.RayParams", RAY, "no monitor", ("no_monitor", "include_log_monitor")
    ),
    Inside("ray._private.node.Node.start_api_server", RAY, "no dashboard's server"),
    Inside(
        "ray._private.worker.init", RAY, "makes both", reads=("ray._private.parameter.RayParams(",)
    ),
    # What servers have, and who holds it (distributed/).
    Inside(
        "ray._private.worker._global_node",
        RAY,
        "Ray's disk on a server",
        reads=("def get_session_dir_path",),
    ),
    Inside("ray._private.node.Node.get_session_dir_path", RAY, "Ray's disk on a server"),
    Inside("ray._private.state.available_resources_per_node", RAY, "what each server has free"),
    Inside(
        "ray._private.state.state",
        RAY,
        "places of workers",
        reads=("def _connect_and_get_accessor",),
    ),
    Inside("ray._private.ray_constants.env_integer", RAY, "Ray's own patience", ("key", "default")),
    Inside("ray._raylet.RAY_NODE_ID_KEY", RAY, "the controller stays on the driver's server"),
    Inside(
        "ray._common.constants.RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR", RAY, "one warning less"
    ),
    # Ray Train's parts, with some of ours in their place (distributed/trainer.py, network.py).
    Inside("ray.train._internal.utils.get_address_and_port", RAY, "where workers meet"),
    Inside(
        "ray.train.v2.api.data_parallel_trainer.DataParallelTrainer",
        RAY,
        "a trainer without helpers that have no work",
        reads=("self._create_default_callbacks(", "self._initialize_and_run_controller("),
    ),
    Inside(f"{_TRAIN}.util.TrainingFramework", RAY, "a backend tells what it is", reads=("TORCH",)),
    Inside(f"{_TRAIN}.constants.get_env_vars_to_propagate", RAY, "the controller's environment"),
    Inside(f"{_TRAIN}.callbacks.DatasetsCallback", RAY, "left out"),
    Inside(
        f"{_TRAIN}.callbacks.placement_group_callback.PlacementGroupCleanerCallback",
        RAY,
        "left out",
    ),
    Inside(
        f"{_TRAIN}.execution.controller.TrainController",
        RAY,
        "ends at once",
        reads=("worker_group_cls", "def run("),
    ),
    Inside(
        f"{_TRAIN}.execution.worker_group.WorkerGroup.poll_status",
        RAY,
        "waits for news longer",
        ("timeout",),
    ),
    Inside(
        f"{_TRAIN}.execution.scaling_policy.FixedScalingPolicy",
        RAY,
        "asks nobody for servers",
        reads=("after_controller_start", "_maybe_send_resource_request"),
    ),
    Inside(f"{_TRAIN}.exceptions.WorkerGroupStartupFailedError", RAY, "a loss that may be excused"),
    Inside(f"{_TRAIN}.exceptions.WorkerGroupStartupTimeoutError", RAY, "a cluster that is busy"),
    Inside(f"{_TRAIN}.exceptions.RayTrainError", RAY, "a process that is gone"),
    # Ray's client of jobs, over requests of ours (jobs/ray_jobs.py).
    Inside(
        "ray.dashboard.modules.dashboard_sdk.SubmissionClient._do_request",
        RAY,
        "requests that end",
        ("method", "endpoint", "data", "json_data"),
    ),
    Inside(
        "ray.dashboard.modules.dashboard_sdk.SubmissionClient",
        RAY,
        "address, token and version",
        reads=("self._address", "self._headers", "self._server_ray_version"),
    ),
    # The Trainer's seams (training/trainer.py): it calls them, with what we take.
    Inside(
        f"{_TRAINER}.training_step",
        TRANSFORMERS,
        "a step of ours",
        ("model", "inputs", "num_items_in_batch"),
    ),
    Inside(
        f"{_TRAINER}.get_batch_samples",
        TRANSFORMERS,
        "one step a batch",
        ("epoch_iterator", "num_batches"),
    ),
    Inside(
        f"{_TRAINER}._get_grad_norm",
        TRANSFORMERS,
        "the last stop before the optimizer",
        ("model", "grad_norm"),
    ),
    Inside(
        f"{_TRAINER}._evaluate", TRANSFORMERS, "our evaluation", ("trial", "ignore_keys_for_eval")
    ),
    Inside(f"{_TRAINER}._save_checkpoint", TRANSFORMERS, "our checkpoints", ("model", "trial")),
    Inside(
        f"{_TRAINER}._determine_best_metric",
        TRANSFORMERS,
        "our keeping policy",
        ("metrics", "trial"),
    ),
    Inside(
        f"{_TRAINER}._init_training_state",
        TRANSFORMERS,
        "starts where a checkpoint was",
        ("max_steps",),
    ),
    Inside(f"{_TRAINER}._prepare_for_training", TRANSFORMERS, "puts weights and optimizer back"),
    Inside(
        "transformers.trainer",
        TRANSFORMERS,
        "calls all of these",
        reads=(
            "self.get_batch_samples(",
            "self._get_grad_norm(",
            "self._evaluate(",
            "self._save_checkpoint(",
            "self._determine_best_metric(",
            "self._init_training_state(",
            "self._prepare_for_training(",
            "self.model_wrapped",
            "is_datasets_available",
        ),
    ),
    Inside(
        "transformers.training_args.TrainingArguments",
        TRANSFORMERS,
        "no DataParallel",
        reads=("self._n_gpu",),
    ),
    Inside("transformers.integrations.rewrite_logs", TRANSFORMERS, "names of metrics"),
    # Plain conversations (data/template.py).
    Inside(
        "transformers.utils.chat_template_utils._compile_jinja_template",
        TRANSFORMERS,
        "a template that is compiled once",
        ("chat_template",),
    ),
    Inside(
        "transformers.utils.chat_template_utils.render_jinja_template",
        TRANSFORMERS,
        "what a template is given",
        reads=(
            "messages=chat",
            "tools=tool_schemas",
            "documents=documents",
            "add_generation_prompt=add_generation_prompt",
        ),
    ),
    # What a base can do (models/, training/pair_model.py).
    Inside("transformers.AutoModelForCausalLM._model_mapping", TRANSFORMERS, "the class of a base"),
    Inside(
        "transformers.PreTrainedModel._supports_attention_backend",
        TRANSFORMERS,
        "may take our attention",
    ),
    Inside("transformers.PreTrainedModel._supports_sdpa", TRANSFORMERS, "knows sdpa"),
    Inside("transformers.PreTrainedModel._supports_flash_attn", TRANSFORMERS, "knows flash-attn"),
    Inside(
        "transformers.PreTrainedModel._is_stateful", TRANSFORMERS, "carries a state over tokens"
    ),
    Inside(
        "transformers.PreTrainedModel._from_config", TRANSFORMERS, "random weights for benchmarks"
    ),
    Inside(
        "transformers.PreTrainedConfig._attn_implementation",
        TRANSFORMERS,
        "the base's own attention",
    ),
    Inside(
        "transformers.configuration_utils",
        TRANSFORMERS,
        "the commit of a hub's model",
        reads=("_commit_hash",),
    ),
    # What is put off until it is used (lean_imports.py).
    Inside("transformers.activations.ACT2FN", TRANSFORMERS, "looked up when a config names one"),
    Inside(
        "transformers.utils.type_validators",
        TRANSFORMERS,
        "asks for the names only",
        reads=("ACT2FN",),
    ),
    Inside(
        "accelerate.utils.other",
        ACCELERATE,
        "asks for DeepSpeed",
        reads=("is_deepspeed_available()",),
    ),
    # Steps of several packs (training/trainer.py).
    Inside(
        "accelerate.state.GradientState._set_sync_gradients",
        ACCELERATE,
        "the last pack of a step",
        ("sync_gradients",),
    ),
    Inside(
        "accelerate.Accelerator.backward",
        ACCELERATE,
        "DeepSpeed must not divide",
        reads=("kwargs",),
    ),
    # Named full tensors in and out of ZeRO's shards (training/zero.py).
    Inside("deepspeed.utils.safe_get_full_fp32_param", DEEPSPEED, "weights out", ("param",)),
    Inside(
        "deepspeed.utils.safe_get_full_optimizer_state",
        DEEPSPEED,
        "moments out",
        ("param", "optim_state_key"),
    ),
    Inside(
        "deepspeed.utils.safe_set_full_optimizer_state", DEEPSPEED, "moments in", ("param", "value")
    ),
    Inside(
        "deepspeed.utils.safe_set_local_optimizer_state",
        DEEPSPEED,
        "moments in",
        ("param", "value"),
    ),
    Inside(
        _ZERO_12,
        DEEPSPEED,
        "its flat shards, and how it links moments to parameters",
        reads=(
            "self.single_partition_of_fp32_groups",
            "self._hp_optimizer_states_linked",
            "def _lazy_init_hp_params_optimizer_state",
            "self.overflow",
        ),
    ),
    Inside(
        _ZERO_3,
        DEEPSPEED,
        "its flat shards",
        reads=("self.fp32_partitioned_groups_flat", "self.overflow"),
    ),
    Inside("deepspeed.ops.__compatible_ops__", DEEPSPEED, "no compiler on a CPU"),
    # TRL's trainers inside of ours (training/trl_engine.py).
    Inside("trl.trainer.utils.add_fused_lm_head", TRL, "a head without full logits", ("outputs",)),
    Inside(
        "trl.DPOTrainer",
        TRL,
        "reads reference log-probs",
        reads=("self.precompute_ref_logps", "self._metrics["),
    ),
    Inside("trl.KTOTrainer", TRL, "KTO", reads=("self._metrics[",)),
    Inside("trl.experimental.orpo.ORPOTrainer", TRL, "ORPO", reads=("self._stored_metrics[",)),
    Inside(
        "trl.experimental.cpo.CPOTrainer", TRL, "CPO and SimPO", reads=("self._stored_metrics[",)
    ),
    # 8-bit optimizers and 4-bit layers (models/base.py, training/).
    Inside("bitsandbytes.optim.GlobalOptimManager.initialize", BNB, "forgets earlier runs"),
    Inside(
        "bitsandbytes.optim.optimizer.Optimizer8bit.check_overrides",
        BNB,
        "before its state comes back",
    ),
    Inside(
        "bitsandbytes.optim.optimizer.Optimizer2State.init_state",
        BNB,
        "makes its buffers",
        ("group", "p", "gindex", "pindex"),
    ),
    Inside(
        "bitsandbytes.optim.optimizer.Optimizer8bit.get_config",
        BNB,
        "settings that galore-torch means otherwise",
        reads=("self.args.max_unorm", "self.args.skip_zeros"),
    ),
    # Weights that are averaged, gradients that are projected (training/state.py, optimizers.py).
    Inside(
        "schedulefree.AdamWScheduleFree",
        "1.4.1",
        "what it counts by group, and its two sets of weights",
        reads=("k=0", "train_mode=False", "weight_sum=0.0", "lr_max=-1.0", "scheduled_lr=0.0"),
    ),
    Inside(
        "galore_torch.galore_projector.GaLoreProjector",
        "1.0",
        "the matrix that projects",
        ("rank", "update_proj_gap", "scale", "proj_type"),
        reads=("self.ortho_matrix = None",),
    ),
    Inside(
        "galore_torch.adamw8bit.AdamW8bit",
        "1.0",
        "needs a GPU, and passes two settings by position",
        reads=("torch.cuda.synchronize()", "min_8bit_size, percentile_clipping, block_wise"),
    ),
    # What PiSSA and OLoRA take out of a weight, which a resume takes out again (models/start.py).
    Inside(
        "peft.tuners.lora.layer.LoraLayer.pissa_init",
        "0.21.2",
        "the largest part",
        ("adapter_name", "init_lora_weights"),
        reads=("weight.data - self.scaling[adapter_name] * lora_B @ lora_A",),
    ),
    Inside(
        "peft.tuners.lora.layer.LoraLayer.olora_init",
        "0.21.2",
        "an orthonormal part",
        ("adapter_name",),
        reads=("self.lora_B[adapter_name].weight @ self.lora_A[adapter_name].weight",),
    ),
    Inside(
        "bitsandbytes.nn.Linear4bit",
        BNB,
        "keeps its training format",
        reads=("support_avx512bf16_for_cpu",),
    ),
]


def resolved(name: str) -> Any:
    """The module, or what is in one, of a dotted name."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def source_of(found: Any) -> str:
    """Of instances that of their class, and with what a class inherits."""
    if inspect.ismodule(found) or inspect.isfunction(found):
        return inspect.getsource(found)
    kind = found if inspect.isclass(found) else type(found)
    own = [base for base in kind.__mro__ if base.__module__.partition(".")[0] in LIBRARIES]
    return "\n".join(inspect.getsource(base) for base in own)


LIBRARIES = {inside.name.partition(".")[0] for inside in INSIDES}


@pytest.mark.parametrize("inside", INSIDES, ids=lambda inside: inside.name)
def test_it_is_what_we_take_it_for(inside: Inside) -> None:
    found = resolved(inside.name)
    if inside.takes:
        known = inspect.signature(found).parameters
        assert set(inside.takes) <= known.keys(), f"{inside.name}{inspect.signature(found)}"
    for words in inside.reads if found is not None else ():
        assert words in source_of(found), (
            f"{inside.name} has no {words} ({inside.why}; read in {inside.version})"
        )


# --- nothing of the kind is used that is not on the list ------------------------------------------


def ours() -> set[str]:
    """Private names that our own code makes."""
    made: set[str] = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) if private(name):
                    made.add(name)
                case (
                    ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store())
                    | ast.Name(id=name)
                ):
                    made.add(name)
                case ast.AnnAssign(target=ast.Name(id=name)):
                    made.add(name)
    return made


def used() -> Iterator[tuple[str, str]]:
    """Private names of others in our code, and where: imported, looked up, or overridden."""
    made, known = ours(), {word for inside in INSIDES for word in inside.used}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            where = f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}"
            match node:
                case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in LIBRARIES:
                    yield from ((part, where) for part in module.split(".") if private(part))
                case ast.Attribute(value=value, attr=name) if private(name) and not named(
                    value, *NOT_LIBRARIES
                ):
                    yield from [] if name in made else [(name, where)]
                case ast.ClassDef(bases=bases, body=body) if bases:
                    yield from overridden(body, known, where)


NOT_LIBRARIES = ("self", "cls", "os")


def named(value: ast.expr, *names: str) -> bool:
    return isinstance(value, ast.Name) and value.id in names


def overridden(body: list[ast.stmt], known: set[str], where: str) -> Iterator[tuple[str, str]]:
    """Private methods that call what they replace, or that a library's class is known to call."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef) and private(statement.name):
            calls = ast.unparse(statement)
            if f"super().{statement.name}" in calls or statement.name in known:
                yield statement.name, where


def test_every_inside_that_we_use_is_on_the_list() -> None:
    listed = {word for inside in INSIDES for word in inside.used}
    found = list(used())
    assert {"_internal", "_private", "_get_grad_norm", "_set_sync_gradients"} <= {
        name for name, _ in found
    }
    assert [f"{where}: {name}" for name, where in found if name not in listed] == []


def test_every_private_word_of_the_list_is_used() -> None:
    """Nothing stays on it that our code does without."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in TREES)
    assert [
        f"{inside.name}: {word}"
        for inside in INSIDES
        for word in sorted(inside.used)
        if word not in text
    ] == []
