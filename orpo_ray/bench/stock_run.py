"""Stock TRL's side of `bench start`.

Usage: python -P stock_run.py FOLDER DEMO STEPS PAIRS EVAL_PAIRS

It is what a user of TRL would write for the same steps: the demo's base in NF4 with LoRA, its
pairs, an evaluation at each end, and the adapter on disk. It is run by its path and imports nothing
of orpo_ray, so that the libraries load as they do for that user.
"""

import sys
from pathlib import Path

import torch
from datasets import disable_progress_bars, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl.experimental.orpo import ORPOConfig, ORPOTrainer


def main(folder: str, demo: Path, steps: int, pairs: int, eval_pairs: int) -> None:
    """Train an adapter on `pairs` pairs a step, and save it in a folder."""
    disable_progress_bars()
    rows = {
        split: load_dataset("json", data_files=str(demo / file), split="train", cache_dir=folder)
        for split, file in (("train", "train.jsonl"), ("eval", "h1.jsonl"))
    }
    tokenizer = AutoTokenizer.from_pretrained(str(demo / "base"))
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        str(demo / "base"),
        quantization_config=quantization,
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    arguments = ORPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=pairs,
        per_device_eval_batch_size=eval_pairs,
        eval_strategy="steps",
        eval_steps=steps,
        eval_on_start=True,
        save_strategy="no",
        max_length=96,
        beta=0.1,
        learning_rate=1.0e-4,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    trainer = ORPOTrainer(
        model=model,
        args=arguments,
        train_dataset=rows["train"].select(range(steps * pairs)),
        eval_dataset=rows["eval"].select(range(eval_pairs)),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules="all-linear"
        ),
    )
    trainer.train()
    trainer.save_model(folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
