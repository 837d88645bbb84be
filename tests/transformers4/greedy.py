"""What a folder says, by whichever transformers runs this:  python greedy.py FOLDER [FOLDER …]

Prints a line of JSON for each: the version, the prompt's ids by the folder's own template, and the
greedy answer as ids and text.
"""

import json
import sys

import torch
import transformers

PROMPT = "How far does a heron see, and what does it say to the eel when it is hungry?"


def answer(folder):
    """Load and ask as plain users do."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    out = model.generate(ids, do_sample=False, max_new_tokens=48, pad_token_id=0)
    said = out[0, ids.shape[1] :]
    return {
        "version": transformers.__version__,
        "prompt": ids[0].tolist(),
        "ids": said.tolist(),
        "text": tokenizer.decode(said),
        "ends": model.generation_config.eos_token_id,
    }


if __name__ == "__main__":
    for each in sys.argv[1:]:
        print(json.dumps(answer(each)))
