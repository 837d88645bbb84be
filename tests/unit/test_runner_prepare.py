"""Tokens that were made before: the same training from them, bit for bit, and nothing else."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from support.attempts_by_hand import Ran, run_here, run_process
from support.tiny_models import ANIMALS, a_dataset, a_tiny_base

from tuneyard.runners.finetune import finetune
from tuneyard.runners.prepare import prepare
from tuneyard.runners.tokens import TokenRows

TRAINING = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_dataset(tmp_path_factory.mktemp("data") / "rows.jsonl")


def prepared(folder: Path, base: Path, dataset: Path, **arguments: Any) -> Path:
    inputs = {"model": base, "dataset": dataset}
    inputs |= {k: arguments.pop(k) for k in ("eval_dataset",) if k in arguments}
    ran = run_here(folder, prepare, kind="prepare", inputs=inputs, arguments=arguments)
    assert ran.code == 0, ran.events
    return ran.workdir / "output"


def tuned(folder: Path, resume: Path | None = None, **spec: Any) -> Ran:
    arguments = TRAINING | spec.pop("arguments", {})
    return run_here(
        folder, finetune, seed=42, resume=resume and str(resume), arguments=arguments, **spec
    )


@pytest.mark.parametrize(
    "arguments", [{}, {"val_size": 2, "eval_strategy": "steps", "eval_steps": 2}], ids=str
)
def test_a_run_from_tokens_is_the_run_from_rows_bit_for_bit(
    tmp_path: Path, base: Path, dataset: Path, arguments: dict[str, Any]
) -> None:
    tokens = prepared(tmp_path, base, dataset)
    rows = {"model": base, "dataset": dataset}
    plain = tuned(tmp_path, inputs=rows, arguments=arguments)
    from_tokens = tuned(tmp_path, inputs={"model": base, "tokens": tokens}, arguments=arguments)
    assert plain.code == from_tokens.code == 0, from_tokens.events
    assert plain.adapter_sha256 == from_tokens.adapter_sha256
    assert plain.metric("eval_loss") == from_tokens.metric("eval_loss")


def test_rows_to_evaluate_on_are_prepared_too(tmp_path: Path, base: Path, dataset: Path) -> None:
    more = a_dataset(tmp_path / "more.jsonl", [{"instruction": "a?", "output": "b!"}] * 3)
    tokens = prepared(tmp_path, base, dataset, eval_dataset=more)
    rows = {"model": base, "dataset": dataset, "eval_dataset": more}
    asked = {"eval_strategy": "steps", "eval_steps": 2}
    plain = tuned(tmp_path, inputs=rows, arguments=asked)
    from_tokens = tuned(tmp_path, inputs={"model": base, "tokens": tokens}, arguments=asked)
    assert plain.metric("eval_loss") == from_tokens.metric("eval_loss") != {}


def test_a_checkpoint_made_from_rows_goes_on_from_tokens(
    tmp_path: Path, base: Path, dataset: Path
) -> None:
    rows = {"model": base, "dataset": dataset}
    whole = tuned(tmp_path, inputs=rows, arguments={"save_steps": 2})
    tokens = {"model": base, "tokens": prepared(tmp_path, base, dataset)}
    rest = tuned(tmp_path, resume=whole.workdir / "checkpoints" / "step-2", inputs=tokens)
    assert rest.code == 0, rest.events
    assert sorted(rest.metric("loss")) == [3, 4]
    assert rest.adapter_sha256 == whole.adapter_sha256


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"cutoff_len": 16}, "cutoff_len"),
        ({"train_on_prompt": True}, "train_on_prompt"),
        ({"default_system": "Be brief."}, "default_system"),
        ({"template": "{{ messages[0]['content'] }}{{ eos_token }}"}, "template"),
    ],
)
def test_tokens_made_otherwise_are_refused(
    tmp_path: Path, base: Path, dataset: Path, arguments: dict[str, Any], named: str
) -> None:
    tokens = prepared(tmp_path, base, dataset)
    ran = tuned(tmp_path, inputs={"model": base, "tokens": tokens}, arguments=arguments)
    assert ran.code == 64
    assert f"another {named}" in ran.failure["evidence"]


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path, base: Path, dataset: Path) -> None:
    tokens = prepared(tmp_path, base, dataset)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 9}))
    ran = tuned(tmp_path, inputs={"model": other, "tokens": tokens})
    assert ran.code == 64
    assert "another tokenizer" in ran.failure["evidence"]


def test_a_bad_row_is_named_by_its_line(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"\n')
    inputs = {"model": base, "dataset": path}
    ran = run_here(tmp_path, prepare, kind="prepare", inputs=inputs, arguments={})
    assert (ran.code, ran.failure["cause"]) == (65, "bad_data")
    assert "ine 2" in ran.failure["evidence"]


def test_rows_that_teach_nothing_are_noted_where_they_are_prepared_and_learned(
    tmp_path: Path, base: Path
) -> None:
    asked = {"role": "user", "content": "Who?"}
    rows = [
        {"messages": [asked, {"role": "assistant", "content": "I.", "weight": weight}]}
        for weight in (1, 0, 1)
    ]
    dataset = a_dataset(tmp_path / "rows.jsonl", rows)
    tokens = prepared(tmp_path, base, dataset)
    ran = tuned(tmp_path, inputs={"model": base, "tokens": tokens})
    plain = tuned(tmp_path, inputs={"model": base, "dataset": dataset})
    notes = [[e["message"] for e in each.of_type("warning")] for each in (ran, plain)]
    assert notes[0] == notes[1]
    assert any("1 of 3 rows teach nothing" in note for note in notes[0])


def test_examples_are_read_one_by_one_as_a_list_gives_them(
    tmp_path: Path, base: Path, dataset: Path
) -> None:
    rows = TokenRows(prepared(tmp_path, base, dataset) / "training.safetensors")
    assert len(rows) == len(ANIMALS)
    assert rows[-1] == list(rows)[-1] == rows[len(rows) - 1]
    assert rows[2:4] == [rows[2], rows[3]]
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_preparing_imports_no_torch(tmp_path: Path, base: Path, dataset: Path) -> None:
    """In a process of its own, whose modules a probe at its end writes down."""
    probe = tmp_path / "probe"
    probe.mkdir()
    (probe / "sitecustomize.py").write_text(
        "import os, sys\n"
        "leave = os._exit\n"
        "def _exit(code):\n"
        f"    open({str(tmp_path / 'modules')!r}, 'w').write(' '.join(sys.modules))\n"
        "    leave(code)\n"
        "os._exit = _exit\n"
    )
    ran = run_process(
        tmp_path,
        "prepare",
        kind="prepare",
        inputs={"model": base, "dataset": dataset},
        arguments={},
        environment={"PYTHONPATH": f"{probe}:{':'.join(sys.path)}"},
    )
    assert ran.code == 0, (ran.workdir / "log").read_text()
    modules = (tmp_path / "modules").read_text().split()
    assert "tuneyard.runners.prepare" in modules or "__main__" in modules
    assert "torch" not in modules
