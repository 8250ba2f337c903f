"""Ask an exported model a question, with transformers alone.

    python examples/own-data/load.py FOLDER "What sound does a bee make?"

The answer is the likeliest one, as `orpo-ray chat` gives it.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

if len(sys.argv) != 3:
    sys.exit(__doc__)
folder, question = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)

prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)
written = model.generate(**prompt, max_new_tokens=128, do_sample=False)
answer = written[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
