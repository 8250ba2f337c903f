"""Finds which project a config was written for, by its top keys."""

from collections.abc import Mapping
from typing import Any

TRL, LLAMA_FACTORY, AXOLOTL = "TRL", "LLaMA-Factory", "Axolotl"

_OURS = ("model", "data", "adapter", "objective", "training", "scale")
_OF_ONE = {
    LLAMA_FACTORY: {
        "stage",
        "finetuning_type",
        "cutoff_len",
        "lora_rank",
        "lora_target",
        "pref_beta",
        "pref_loss",
        "pref_ftx",
        "quantization_bit",
        "preprocessing_num_workers",
        "dataset_dir",
        "template",
        "plot_loss",
        "max_samples",
    },
    AXOLOTL: {
        "base_model",
        "micro_batch_size",
        "num_epochs",
        "sequence_len",
        "val_set_size",
        "dataset_prepared_path",
        "rl",
        "rl_beta",
        "orpo_alpha",
        "lora_target_linear",
        "lora_model_dir",
        "sample_packing",
        "pad_to_sequence_len",
        "evals_per_epoch",
        "saves_per_epoch",
        "flash_attention",
    },
    TRL: {
        "model_name_or_path",
        "dataset_name",
        "dataset_mixer",
        "dataset_mixture",
        "dataset_train_split",
        "dataset_num_proc",
        "num_train_epochs",
        "per_device_train_batch_size",
        "lr_scheduler_type",
        "lora_target_modules",
        "use_peft",
        "output_dir",
        "logging_steps",
        "save_strategy",
        "max_prompt_length",
        "gradient_accumulation_steps",
    },
}
"""Keys of a project. Many of TRL's come from transformers, so the others have some of them, too."""
_ENOUGH = 2


def project_of(tree: Mapping[str, Any]) -> str | None:
    """The project whose config this is; None for a config of ours, valid or not."""
    if any(isinstance(tree.get(section), Mapping) for section in _OURS):
        return None
    counts = {project: len(keys & set(tree)) for project, keys in _OF_ONE.items()}
    own = max((LLAMA_FACTORY, AXOLOTL), key=lambda project: counts[project])
    if counts[own] >= _ENOUGH:
        return own
    return TRL if counts[TRL] >= _ENOUGH else None
