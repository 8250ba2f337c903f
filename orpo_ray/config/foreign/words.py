"""What the names of TRL, LLaMA-Factory and Axolotl are here, and what differs: one table."""

from collections.abc import Sequence
from dataclasses import dataclass

from orpo_ray.config.keys import EXTENDS

_NO_COUNTERPART = "orpo_ray has no such setting"


@dataclass(frozen=True)
class Word:
    """A foreign name: our key and what differs. Without a key: what orpo_ray does instead."""

    here: str = ""
    differs: str = ""
    kind: str = ""
    """The only objective that has our key, if there is just one."""


def word_of(section: str, name: str, kind: str) -> Word | None:
    """What a foreign name is here; `section` is where it stands, `kind` the run's objective."""
    for written in (f"{section}.{name}", f"{kind}:{name}", name):
        if written in WORDS:
            return WORDS[written]
    return next((word for start, word in _FAMILIES.items() if name.startswith(start)), None)


def instead_of(name: str, kind: str) -> str:
    """What orpo_ray does instead of a foreign key without a counterpart; `kind`: the objective."""
    word = word_of("", name, kind)
    if word is None:
        return _NO_COUNTERPART
    if word.kind not in ("", kind):
        return f"{kind} has none; with kind: {word.kind} it is {word.here}"
    if not word.here:
        return word.differs
    return f"{word.here} is the nearest" + (f": {word.differs}" if word.differs else "")


def _all(names: str, word: Word) -> dict[str, Word]:
    return dict.fromkeys(names.split(), word)


def _merged(tables: Sequence[dict[str, Word]]) -> dict[str, Word]:
    return {name: word for table in tables for name, word in table.items()}


_BATCH = Word(
    "training.pairs_per_step",
    "it is the global batch: per-device batch x accumulation x number of GPUs",
)
_GPUS = Word("scale.workers", "auto takes every GPU in sight; pairs_per_step stays what it is")
_EVAL_BATCH = Word(differs="evaluation cuts its batches to the memory there is")
_HUB = Word(differs="a run uploads nothing; its adapter folder is ready for `hf upload`")
_WANDB = Word(
    "training.trackers", "write wandb; its own settings are variables such as WANDB_PROJECT"
)
_CPUS = Word(differs="the pairs are prepared once; if there are many, on all CPUs")
_PACKING = Word("training.layout", "auto packs pairs if the base allows it")
_KERNELS = Word(differs="with engine: fast the losses are computed without full logits")
_REFERENCE = Word(differs="the reference is the model that the run starts from")
_RESUME = Word(differs="the same command resumes from the last checkpoint")
_BEST = Word(differs="the best checkpoint is kept, and the newest")
_NO_CODE = Word(differs="code that a model or a dataset brings is never run")
_TOKENIZER = Word(differs="the tokenizer is the base's own, with its special tokens")
_ARCHITECTURE = Word(differs="the base's own config.json names its architecture")
_BODY_ONLY = Word(differs="LoRA's own weights are all that an adapter trains")
_ADAMW = Word(differs="AdamW keeps PyTorch's betas and epsilon")
_GALORES_LAYERS = Word(differs="GaLore projects every linear layer of the body")
_LOGS = Word(differs="every step is logged, to metrics.jsonl and TensorBoard")
_LOG_LEVEL = Word(differs="`orpo-ray train --verbose` shows what the libraries log")
_SHARDS = Word("scale.deepspeed", "auto chooses; weights are shared out by DeepSpeed's stage 3")
_FILES = Word(differs="prepared pairs are kept in <storage>/artifacts and found again")
_NOT_FOR_PAIRS = Word(differs="the text of prompt and answers alone is trained on")
_LAMBDA = Word("objective.lambda", kind="orpo")

WORDS = _merged(
    [
        # The model
        _all(
            "model_name_or_path base_model model_name model_id pretrained_model_name_or_path "
            "base_model_name_or_path model.name model.path model.id model.name_or_path",
            Word("model.base"),
        ),
        _all("model_revision revision_of_model", Word("model.revision")),
        _all("torch_dtype", Word("model.dtype")),
        _all(
            "bf16 pure_bf16 bfloat16 bf16_full_eval",
            Word("model.dtype", "write bfloat16; auto takes it if the GPU has it"),
        ),
        _all("fp16 float16 fp16_full_eval", Word("model.dtype", "write float16")),
        _all(
            "load_in_4bit",
            Word("model.quantization", "write nf4 (the default) for true, none for false"),
        ),
        _all("load_in_8bit", Word("model.quantization", "write int8")),
        _all("quantization_bit", Word("model.quantization", "write nf4 for 4 bits, int8 for 8")),
        _all(
            "quantization_method quantization_type bnb_4bit_quant_type bnb_config_kwargs gptq",
            Word("model.quantization", "there are nf4, int8 and none"),
        ),
        _all(
            "bnb_4bit_use_double_quant use_bnb_nested_quant double_quantization",
            Word(differs="nf4 quantises its constants, too"),
        ),
        _all("bnb_4bit_compute_dtype", Word("model.dtype")),
        _all("bnb_4bit_quant_storage", Word(differs="4-bit weights are stored as bytes")),
        _all("attn_implementation", Word("model.attention")),
        _all("flash_attn", Word("model.attention", "write flash_attention_2 for fa2")),
        _all(
            "flash_attention use_flash_attention_2 use_flash_attention",
            Word("model.attention", "write flash_attention_2"),
        ),
        _all("sdp_attention", Word("model.attention", "write sdpa")),
        _all("eager_attention", Word("model.attention", "write eager")),
        _all(
            "xformers_attention shift_attn",
            Word("model.attention", "auto, eager, sdpa or flash_attention_2"),
        ),
        _all(
            "template chat_template_jinja chat_template_path",
            Word("model.chat_template", "name a template, or a Jinja file"),
        ),
        _all("trust_remote_code", _NO_CODE),
        _all("model_type is_llama_derived_model is_mistral_derived_model", _ARCHITECTURE),
        _all(
            "tokenizer_type tokenizer_name tokenizer_name_or_path tokenizer_config "
            "special_tokens tokens pad_token eos_token use_fast_tokenizer tokenizer_use_fast "
            "resize_vocab resize_token_embeddings_to_32x add_tokens add_special_tokens "
            "model.tokenizer",
            _TOKENIZER,
        ),
        # The adapter
        _all("lora_r lora_rank rank peft_r adapter.rank", Word("adapter.r")),
        _all("lora_alpha", Word("adapter.alpha")),
        _all("lora_dropout", Word("adapter.dropout")),
        _all(
            "lora_target_modules lora_target target_modules",
            Word("adapter.targets", "a list of names, or all-linear for all"),
        ),
        _all(
            "lora_target_linear", Word("adapter.targets", "write all-linear, which is the default")
        ),
        _all("use_dora peft_use_dora", Word("adapter.dora")),
        _all(
            "use_peft use_lora lora peft",
            Word("adapter.kind", "write lora, or none to train all weights"),
        ),
        _all("finetuning_type", Word("adapter.kind", "write lora, or none to train all weights")),
        _all("adapter.type adapter.peft_type", Word("adapter.kind")),
        _all("lora_model_dir adapter_name_or_path adapter_path", Word("adapter.init_from")),
        _all("use_rslora peft_use_rslora", Word("adapter.rslora")),
        _all("loraplus_lr_ratio", Word("adapter.lora_plus_ratio")),
        _all(
            "init_lora_weights peft_init_lora_weights",
            Word("adapter.init", "default, loftq, eva, olora or pissa"),
        ),
        _all("pissa_init", Word("adapter.init", "write pissa")),
        _all("loftq_config", Word("adapter.init", "write loftq")),
        _all("disable_dropout", Word("adapter.dropout", "write 0")),
        _all(
            "lora_modules_to_save additional_target modules_to_save lora_target_parameters "
            "lora_fan_in_fan_out peft_layers_to_transform lora_task_type create_new_adapter "
            "unfrozen_parameters",
            _BODY_ONLY,
        ),
        # The pairs
        _all(
            "dataset datasets dataset_name dataset_mixer dataset_mixture train_file "
            "dataset_path train_dataset data.dataset data.datasets data.path data.train_file",
            Word("data.train"),
        ),
        _all(
            "dataset_train_split dataset_split dataset_splits train_split",
            Word("data.train", "split is a key of each source"),
        ),
        _all(
            "dataset_config dataset_config_name",
            Word(differs="a source has no configurations; name its files"),
        ),
        _all(
            "data.train.name data.eval.name",
            Word(differs="a source has no configurations; name its files"),
        ),
        _all(
            "data.train.path data.train.id data.train.dataset data.train.file",
            Word("data.train.source"),
        ),
        _all(
            "data.eval.path data.eval.id data.eval.dataset data.eval.file", Word("data.eval.source")
        ),
        _all("data.train.data_files", Word("data.train.source", "a file is a source by itself")),
        _all("data.eval.data_files", Word("data.eval.source", "a file is a source by itself")),
        _all("data.train.fraction", Word("data.train.weight", "0.5 is a seeded half of the pairs")),
        _all(
            "data.train.type data.train.ds_type data.train.conversation data.eval.type",
            Word(differs="the shape of the rows is recognised"),
        ),
        _all("eval_dataset test_datasets dataset_test_split test_file", Word("data.eval")),
        _all(
            "val_size val_set_size test_split_size test_size",
            Word("data.eval_fraction", "it is a share of the pairs"),
        ),
        _all("max_samples max_train_samples", Word("data.train", "limit is a key of each source")),
        _all("max_eval_samples", Word("data.eval", "limit is a key of each source")),
        _all(
            "cutoff_len sequence_len max_seq_length max_seq_len max_len model_max_length seq_len "
            "max_sequence_length",
            Word("data.max_length", "it is tokens of prompt and answer together"),
        ),
        _all("max_prompt_len", Word("data.max_prompt_length")),
        _all(
            "max_completion_length max_target_length",
            Word("data.max_length", "it is tokens of prompt and answer together"),
        ),
        _all("truncation_mode excess_length_strategy", Word("data.overlong")),
        _all(
            "dataset_num_proc preprocessing_num_workers dataloader_num_workers dataset_processes "
            "num_proc preprocessing_batch_size",
            _CPUS,
        ),
        _all("overwrite_cache dataset_prepared_path tokenized_path cache_dir dataset_dir", _FILES),
        _all(
            "shuffle_merged_datasets data_seed shuffle",
            Word("training.seed", "it orders the pairs, too"),
        ),
        _all(
            "dataset_streaming streaming",
            Word(differs="pairs are prepared once and read from disk"),
        ),
        _all(
            "field_messages field_chosen field_rejected field_prompt column_names columns_mapping",
            Word("data.columns"),
        ),
        _all(
            "train_on_inputs train_on_prompt",
            Word("objective.nll_on", "write full for prompt and response"),
        ),
        _all(
            "mask_history roles_to_train",
            Word("data.train_on", "last, or all-assistant for earlier turns, too"),
        ),
        _all("train_on_eos", Word(differs="each trained turn has its end token")),
        _all("mix_strategy interleave_probs", Word("data.train", "weight is a key of each source")),
        # The objective
        _all(
            "rl pref_loss trainer_type objective.type objective.name objective.method",
            Word("objective.kind"),
        ),
        _all("stage", Word("objective.kind", "stages is a list of runs one after the other")),
        _all(
            "loss_type dpo_loss_type",
            Word("objective.kind", "hinge, robust and their like are objective.loss of dpo"),
        ),
        _all("rl_beta pref_beta dpo_beta", Word("objective.beta")),
        _all("orpo:rl_beta orpo:pref_beta", Word("objective.lambda")),
        _all("orpo:beta", Word("objective.lambda", "TRL calls it beta")),
        _all("orpo:alpha", Word("objective.lambda", "the authors' code calls it alpha")),
        _all("orpo_alpha orpo_beta orpo_lambda", _LAMBDA),
        _all("cpo_alpha", Word("objective.alpha", kind="cpo")),
        _all(
            "gamma simpo_gamma",
            Word("objective.gamma_beta_ratio", "it is gamma divided by beta", "simpo"),
        ),
        _all("simpo_beta", Word("objective.beta")),
        _all("rpo_alpha pref_ftx sft_weight", Word("objective.nll_weight", kind="dpo")),
        _all("dpo_label_smoothing", Word("objective.label_smoothing", kind="dpo")),
        _all(
            "kto_desirable_weight kto_chosen_weight", Word("objective.desirable_weight", kind="kto")
        ),
        _all(
            "kto_undesirable_weight kto_rejected_weight",
            Word("objective.undesirable_weight", kind="kto"),
        ),
        _all(
            "ref_model ref_model_adapters ref_model_quantization_bit model_ref reference_free "
            "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps ref_model_init_kwargs "
            "model_adapter_name ref_adapter_name force_use_ref_model",
            _REFERENCE,
        ),
        _all(
            "f_divergence_type f_alpha_divergence_coef",
            Word(differs="the divergence is the reverse KL"),
        ),
        _all(
            "precompute_ref_log_probs precompute_ref_batch_size",
            Word(differs="dpo and ipo always compute reference log-probs once, before training"),
        ),
        # The training
        _all("lr", Word("training.learning_rate")),
        _all("num_train_epochs num_epochs n_epochs epoch", Word("training.epochs")),
        _all("total_steps num_steps num_train_steps", Word("training.max_steps")),
        _all(
            "per_device_train_batch_size gradient_accumulation_steps micro_batch_size batch_size "
            "train_batch_size per_gpu_train_batch_size global_batch_size grad_accum_steps",
            _BATCH,
        ),
        _all("per_device_eval_batch_size eval_batch_size eval_accumulation_steps", _EVAL_BATCH),
        _all(
            "auto_find_batch_size", Word("training.tokens_per_microbatch", "auto finds what fits")
        ),
        _all(
            "lr_scheduler_type lr_scheduler scheduler",
            Word("training.schedule", "cosine, linear or constant"),
        ),
        _all(
            "lr_scheduler_kwargs cosine_min_lr_ratio cosine_constant_lr_ratio lr_div_factor",
            Word("training.schedule", "cosine and linear end at 0"),
        ),
        _all(
            "warmup_ratio warmup_steps",
            Word("training.warmup", "steps if whole, else a fraction of the run"),
        ),
        _all(
            "optim",
            Word("training.optimizer", "such as adamw, adamw-8bit, lion-8bit or galore-adamw"),
        ),
        _all("use_galore", Word("training.optimizer", "write galore-adamw")),
        _all(
            "optim_args galore_rank galore_update_interval galore_scale",
            Word("training.galore", "it has rank, update_every and scale"),
        ),
        _all("optim_target_modules galore_target", _GALORES_LAYERS),
        _all("adam_beta1 adam_beta2 adam_epsilon", _ADAMW),
        _all("gradient_clipping clip_grad_norm grad_clip", Word("training.max_grad_norm")),
        _all(
            "save_steps saves_per_epoch save_strategy",
            Word("training.checkpoint_every", "steps if whole, else a fraction of the run"),
        ),
        _all(
            "eval_steps evals_per_epoch eval_strategy evaluation_strategy",
            Word("training.eval_every", "steps if whole, else a fraction of the run"),
        ),
        _all("load_best_model_at_end", Word("training.adapter_from", "write best")),
        _all("plugins", Word(differs="there are no plugins")),
        _all("save_total_limit", Word("training.keep")),
        _all("logging_steps logging_strategy logging_first_step logging_dir plot_loss", _LOGS),
        _all("log_level log_level_replica disable_tqdm debug", _LOG_LEVEL),
        _all(
            "report_to",
            Word("training.trackers", "wandb or mlflow, [] for none; TensorBoard is always on"),
        ),
        _all("use_mlflow mlflow_tracking_uri", Word("training.trackers", "write mlflow")),
        _all("use_wandb", _WANDB),
        _all("output_dir", Word("storage", "a run is kept in <storage>/<name>")),
        _all("run_name", Word("name")),
        _all(
            "_base_ base_config defaults extends include inherit inherit_from inherits",
            Word(EXTENDS, "at the top of a file it names the one config that this one changes"),
        ),
        _all("resume_from_checkpoint auto_resume_from_checkpoints ignore_data_skip", _RESUME),
        _all("overwrite_output_dir", Word(differs="a run is never overwritten; give another name")),
        _all(
            "metric_for_best_model greater_is_better early_stopping_patience",
            _BEST,
        ),
        _all(
            "save_only_model save_safetensors save_first_step save_on_each_node",
            Word(differs="a checkpoint holds all that a run resumes from, as safetensors"),
        ),
        _all(
            "disable_gradient_checkpointing", Word("training.gradient_checkpointing", "write false")
        ),
        _all(
            "gradient_checkpointing_kwargs use_reentrant_gc use_unsloth_gc activation_offloading",
            Word(differs="activations are recomputed without re-entry"),
        ),
        _all(
            "sample_packing eval_sample_packing packing neat_packing pad_to_sequence_len "
            "padding_free "
            "group_by_length pad_to_multiple_of dpo_padding_free",
            _PACKING,
        ),
        _all(
            "use_liger_kernel use_liger_loss enable_liger_kernel torch_compile use_unsloth "
            "use_logits_to_keep",
            _KERNELS,
        ),
        _all(
            "do_train do_eval do_predict predict_with_generate",
            Word(differs="the command says what is done"),
        ),
        _all(
            "remove_unused_columns label_names",
            Word(differs="columns that are not needed are left out"),
        ),
        _all("tf32", Word(differs="PyTorch's own choice is left alone")),
        _all(
            "loss_watchdog_threshold loss_watchdog_patience",
            Word(differs="a loss that is no number stops the run"),
        ),
        _all("use_cpu no_cuda", Word("scale.gpus_per_worker", "write 0")),
        _all(
            "deepspeed",
            Word(
                "scale.deepspeed", "write auto, none, or {stage: 0} to {stage: 3}; there is no file"
            ),
        ),
        _all("scale.stage", Word("scale.deepspeed", "write {stage: 0} to {stage: 3}")),
        _all(
            "num_gpus n_gpu n_gpus gpus num_processes nproc_per_node world_size ray_num_workers",
            _GPUS,
        ),
    ]
)
"""By name. If its section decides what it means, SECTION.NAME; if the objective does, KIND:NAME."""

_FAMILIES = {
    "hub_": _HUB,
    "push_to_hub": _HUB,
    "wandb_": _WANDB,
    "mlflow_": Word("training.trackers", "write mlflow"),
    "swanlab_": _LOGS,
    "fsdp": _SHARDS,
    "ddp_": Word(differs="the processes are Ray's, and their settings ours"),
    "ray_": Word(differs="the processes are Ray's, and their settings ours"),
    "dataloader_": _CPUS,
    "ppo_": Word(differs="there is no PPO"),
    "vllm_": Word(differs="training generates nothing"),
    "loraplus_lr_embedding": Word(differs="an adapter of an embedding has the rate of A"),
    "loraplus": Word("adapter.lora_plus_ratio"),
    "pissa_": Word("adapter.init", "write pissa; 16 iterations are taken"),
    "galore_": _GALORES_LAYERS,
    "liger_": _KERNELS,
    "lora_mlp_": _KERNELS,
    "lora_qkv_": _KERNELS,
    "lora_o_": _KERNELS,
    "neftune": Word(differs="no noise is added to the embeddings"),
    "include_": _LOGS,
    "image_": _NOT_FOR_PAIRS,
    "video_": _NOT_FOR_PAIRS,
}
"""By the start of a name."""
