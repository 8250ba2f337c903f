"""Stock TRL's side of `bench start`: `python -m orpo_ray.bench.stock_run FOLDER`.

What a user of TRL would write for the same four steps: the demo's base in NF4 with LoRA, its pairs,
an evaluation at either end, and the adapter on disk.
"""

import sys
from importlib.resources import files

import torch
from datasets import disable_progress_bars, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from orpo_ray.bench.start import EVAL_PAIRS, PAIRS_PER_STEP, STEPS


def main(folder: str) -> None:
    """Train the adapter and save it in a folder."""
    demo = files("orpo_ray") / "demo"
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
        max_steps=STEPS,
        per_device_train_batch_size=PAIRS_PER_STEP,
        per_device_eval_batch_size=EVAL_PAIRS,
        eval_strategy="steps",
        eval_steps=STEPS,
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
        train_dataset=rows["train"].select(range(STEPS * PAIRS_PER_STEP)),
        eval_dataset=rows["eval"].select(range(EVAL_PAIRS)),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model(folder)


if __name__ == "__main__":
    main(sys.argv[1])
