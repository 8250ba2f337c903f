"""Build everything in `orpo_ray/demo/` from one seed: pairs, judge and a chat model.

    python examples/quickstart-cpu/build_demo.py              # all of it, about 4 CPU minutes
    python examples/quickstart-cpu/build_demo.py --text-only  # pairs and judge, one second

The model has 0.8 M parameters. Pairs and judge are the same bytes every time. The weights behave
the same, but floating-point numbers differ between machines.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import corpus

if TYPE_CHECKING:  # imported late at run time: --text-only must not wait for torch
    from transformers import BatchEncoding, LlamaForCausalLM, PreTrainedTokenizerFast

DEMO = Path(__file__).resolve().parents[2] / "orpo_ray" / "demo"

VOCABULARY = 1024
PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
# The newline comes before a message, not after it. So an answer ends with exactly one END, which is
# the eos token.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '' if loop.first else '\n' }}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{{ '\n<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)
TOKENIZER_CONVERSATIONS = 8000

HIDDEN, LAYERS, MLP, HEADS = 128, 4, 256, 4
STEPS, BATCH, LEARNING_RATE, WARMUP_STEPS = 700, 64, 3e-3, 40
CONTEXT = 512


def write_text_files(folder: Path, seed: int) -> None:
    """Write the pair files and judge.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in corpus.text_files(seed).items():
        (folder / name).write_text(text, encoding="utf-8")


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the base's corpus.

    Phrases are frequent in it, so each of their words becomes one token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    chats = islice(corpus.conversations(Random(seed)), TOKENIZER_CONVERSATIONS)
    bpe.train_from_iterator(
        ("\n".join(m[key] for m in chat for key in ("role", "content")) for chat in chats), trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama with tied embeddings.

    It is small enough to ship, and large enough to know 144 facts in two moods.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            intermediate_size=MLP,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def next_batch(
    tokenizer: PreTrainedTokenizerFast, chats: Iterator[list[dict[str, str]]]
) -> BatchEncoding:
    """The next BATCH conversations as input ids, attention mask and labels, padded on the right."""
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in islice(chats, BATCH)]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int
) -> None:
    """Train the model on the next token of whole conversations.

    It learns both moods, and for each filler how often each mood comes.
    """
    import torch
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, steps)
    chats = corpus.conversations(Random(seed + 1))
    model.train()
    for step in range(1, steps + 1):
        loss = model(**next_batch(tokenizer, chats)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(
                f"step {step}/{steps}  loss {loss.item():.3f}  {time.process_time():.0f} CPU s",
                flush=True,
            )


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save weights as float16, which halves the package, but declare float32.

    They are then loaded as float32.
    """
    import torch

    tokenizer.save_pretrained(folder)
    model.generation_config.do_sample = False
    model.to(torch.float16).save_pretrained(folder)
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=DEMO, help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=corpus.SEED)
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of the base model")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; one gives the same weights every time"
    )
    parser.add_argument(
        "--text-only", action="store_true", help="write the pairs and the judge, not the base model"
    )
    arguments = parser.parse_args()

    write_text_files(arguments.out, arguments.seed)
    if arguments.text_only:
        return
    import torch

    torch.set_num_threads(arguments.threads)
    tokenizer = train_tokenizer(arguments.seed)
    model = new_model(tokenizer, arguments.seed)
    pretrain(model, tokenizer, arguments.seed, arguments.steps)
    save_base(model, tokenizer, arguments.out / "base")
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"{arguments.out}: {size / 1e6:.2f} MB, {time.process_time():.0f} CPU s")


if __name__ == "__main__":
    main()
