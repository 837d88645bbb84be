"""How far bf16 takes the log-probability of an answer, which dpo compares sums of.

    python -P bench/bf16_logps.py MODEL_FOLDER PAIRS.json [--rows 30]

PAIRS.json has preferences in ShareGPT's form; the first 300 tokens of each wanted answer are read
by plain transformers on the CPU. Prints their mean length, and the root mean square of how far
log p of the whole is from fp32: all in bf16, with the last product alone in fp32, and with the
residual stream in fp32, where products alone are bf16.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--rows", type=int, default=30)
    asked = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    half = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.bfloat16).eval()
    exact = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.bfloat16).float().eval()
    apart, with_head, with_stream, lengths = [], [], [], []
    for pair in json.loads(asked.pairs.read_text())[: asked.rows]:
        ids = tokenizer(pair["chosen"]["value"], return_tensors="pt").input_ids[:, :300]
        with torch.no_grad():
            hidden = half.model(input_ids=ids).last_hidden_state
            truth = logp(exact(input_ids=ids).logits, ids)
            apart.append(logp(half.lm_head(hidden), ids) - truth)
            with_head.append(logp(exact.lm_head(hidden.float()), ids) - truth)
            stream = half.get_input_embeddings()(ids).float()
            with torch.autocast("cpu", torch.bfloat16):
                with_stream.append(logp(half(inputs_embeds=stream).logits, ids) - truth)
        lengths.append(ids.shape[1])
    print(
        f"{sum(lengths) / len(lengths):.0f} tokens: {rms(apart):.2f} from fp32 in bf16, "
        f"{rms(with_head):.2f} with the last product in fp32, {rms(with_stream):.2f} with the "
        "residual stream in fp32"
    )
    return 0


def logp(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """log p of all tokens after the first; logits: [1, time, words], ids: [1, time]."""
    return -float(cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum"))


def rms(values: list[float]) -> float:
    """The root of the mean square."""
    return float(torch.tensor(values).square().mean().sqrt())


if __name__ == "__main__":
    raise SystemExit(main())
