"""A merged folder says the same in transformers 4.57 and 5; `make test-transformers4` runs this.

TRANSFORMERS4_PYTHON names an interpreter with transformers 4.57, which the target makes.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.attempts_by_hand import run_here
from support.tiny_models import a_dataset, a_tiny_base

from tuneyard.runners.finetune import finetune
from tuneyard.runners.merge import merge
from tuneyard.specs.exits import ExitCode

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

GREEDY = Path(__file__).with_name("greedy.py")
THETA = 1_000.0
"""Not 10,000, which transformers 4 falls back to without a word."""

WRITERS = {
    "transformers 4": ({"rope_theta": THETA, "torch_dtype": "bfloat16"}, "PreTrainedTokenizerFast"),
    "transformers 5": (
        {"rope_parameters": {"rope_theta": THETA, "rope_type": "default"}, "dtype": "bfloat16"},
        "TokenizersBackend",
    ),
    "our own conversion": (
        {
            "rope_theta": THETA,
            "rope_parameters": {"rope_theta": THETA, "rope_type": "default"},
            "torch_dtype": "bfloat16",
            "dtype": "bfloat16",
        },
        "PreTrainedTokenizerFast",
    ),
}


def a_base(folder: Path, writer: str) -> Path:
    """A base whose files say their rope and format as this writer does."""
    theirs, tokenizer_class = WRITERS[writer]
    a_tiny_base(
        folder, dtype="bfloat16", rope_parameters={"rope_type": "default", "rope_theta": THETA}
    )
    config = json.loads((folder / "config.json").read_text())
    plain = {k: v for k, v in config.items() if k not in ("rope_parameters", "dtype")}
    (folder / "config.json").write_text(json.dumps(plain | theirs, indent=2))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    text = json.dumps(tokenizer | {"tokenizer_class": tokenizer_class})
    (folder / "tokenizer_config.json").write_text(text)
    return folder


def merged(folder: Path, base: Path) -> Path:
    """Tuned with a template of its own, and merged."""
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    tuned = run_here(
        folder,
        finetune,
        inputs={"model": base, "dataset": a_dataset(folder / "rows.jsonl")},
        arguments={"max_steps": 4, "learning_rate": 0.02, "template": template},
    )
    inputs = {"model": base, "adapter": tuned.workdir / "output"}
    ran = run_here(folder, merge, kind="merge", inputs=inputs)
    assert ran.code == ExitCode.DONE, ran.events
    return ran.workdir / "output"


def ask(python: str, *folders: Path) -> list[dict[str, Any]]:
    """Answers by one interpreter."""
    done = subprocess.run(
        [python, "-P", str(GREEDY), *map(str, folders)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("writer", WRITERS)
def test_both_versions_give_the_same_greedy_text(tmp_path: Path, writer: str) -> None:
    folder = merged(tmp_path, a_base(tmp_path / "base", writer))
    fallen = shutil.copytree(folder, tmp_path / "fallen")
    config = json.loads((folder / "config.json").read_text())
    (fallen / "config.json").write_text(json.dumps(config | {"rope_theta": 10_000.0}))
    old, misread = ask(os.environ["TRANSFORMERS4_PYTHON"], folder, fallen)
    (new,) = ask(sys.executable, folder)
    assert (old.pop("version")[:5], new.pop("version")[:2]) == ("4.57.", "5.")
    assert old == new
    # The test would see a rope that was misread.
    assert misread["prompt"] == old["prompt"]
    assert misread["ids"] != old["ids"]
