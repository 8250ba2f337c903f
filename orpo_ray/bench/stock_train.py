"""Stock TRL's side of `bench start` and `bench run`.

Usage: python -P stock_train.py SETTINGS.json

It is what a user of TRL would write for the same steps: base, LoRA on all linear layers, pairs, an
evaluation at each end, and the adapter on disk. It is run by its path and imports nothing of
orpo_ray, so that the libraries load as they do for that user.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def main(settings: dict[str, Any]) -> None:
    """Train an adapter, and save it in a folder."""
    disable_progress_bars()
    rows = {
        split: load_dataset(
            "json", data_files=settings[split], split="train", cache_dir=settings["folder"]
        )
        for split in ("train", "eval")
    }
    tokenizer = AutoTokenizer.from_pretrained(settings["base"])
    trainer = trainer_of(
        settings,
        model=load(settings),
        train_dataset=rows["train"].select(range(settings["pairs"])),
        eval_dataset=rows["eval"].select(range(settings["eval_pairs"])),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules="all-linear"
        ),
    )
    trainer.train()
    trainer.save_model(settings["folder"])


def load(settings: dict[str, Any]) -> Any:
    """The base, with 4-bit weights if asked for."""
    quantization = None
    if settings["quantization"] == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model: Any = AutoModelForCausalLM.from_pretrained(
        settings["base"],
        quantization_config=quantization,
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Otherwise bitsandbytes repacks the weights at the first evaluation, and no gradient
            # passes through them afterwards.
            module.support_avx512bf16_for_cpu = False
    return model


def trainer_of(settings: dict[str, Any], **given: Any) -> Any:
    """ORPOTrainer or DPOTrainer, which reads the pairs in their order."""
    arguments = {
        "output_dir": settings["folder"],
        "max_steps": settings["steps"],
        "per_device_train_batch_size": settings["micro_batch"],
        "gradient_accumulation_steps": settings["accumulation"],
        "per_device_eval_batch_size": settings["eval_batch"],
        "eval_strategy": "steps",
        "eval_steps": settings["steps"],
        "eval_on_start": True,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "max_length": settings["max_length"],
        "beta": settings["beta"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    if settings["objective"] == "dpo":
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer(args=DPOConfig(**arguments), **given)
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return ORPOTrainer(args=ORPOConfig(**arguments), **given)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
