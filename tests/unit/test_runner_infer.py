"""Answering prompts: order, settings, ends. Tiny model, fp32, CPU."""

import json
from pathlib import Path

import pytest
from support.attempts_by_hand import Ran, run_here
from support.tiny_models import LLAMA, a_tiny_base

from tuneyard.runners.arguments import InferArguments
from tuneyard.runners.base_model import load_tokenizer
from tuneyard.runners.chat import chat_of
from tuneyard.runners.download import download
from tuneyard.runners.generation import choose_settings
from tuneyard.runners.infer import infer
from tuneyard.runners.results import key_of, write_results
from tuneyard.specs.exits import ExitCode
from tuneyard.store.folder import publish_folder, verify_folder

QUESTIONS = ["Who?", "What is it that you do all day long?", "Why not?", "A", "Where to, and how?"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return a_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def ask(tmp_path, base):
    """Ask the tiny base, with these arguments."""

    def run(*, model: Path = base, resume: Path | None = None, **arguments) -> Ran:
        (tmp_path / "prompts.txt").write_text("\n".join(arguments.pop("questions", QUESTIONS)))
        return run_here(
            tmp_path,
            infer,
            kind="inference",
            inputs={"model": model, "prompts": tmp_path / "prompts.txt"},
            resume=resume and str(resume),
            arguments={"temperature": 0, "max_new_tokens": 12} | arguments,
        )

    return run


def test_results_stand_in_the_order_of_the_prompts(ask):
    ran = ask(batch_size=2)
    assert ran.code == ExitCode.DONE
    assert [row["prompt"] for row in ran.results] == QUESTIONS
    assert [row["index"] for row in ran.results] == [0, 1, 2, 3, 4]
    assert ran.of_type("progress")[-1]["done"] == 5
    assert verify_folder(ran.workdir / "output")["settings"]["max_new_tokens"] == 12


def test_batches_change_no_answer(ask):
    alone, together = ask(batch_size=1), ask(batch_size=5)
    assert alone.results == together.results


def test_the_prompt_is_counted_with_its_template_and_one_bos(ask, tmp_path):
    base = a_tiny_base(tmp_path / "llama", template=LLAMA)
    (row,) = ask(model=base, questions=["hi"]).results
    rendered = "<|start|>user<|end|>\n\nhi<|eot|><|start|>assistant<|end|>\n\n"
    tokens = load_tokenizer(base)(rendered, add_special_tokens=False).input_ids
    assert row["prompt_tokens"] == 1 + len(tokens)


def test_an_answer_that_does_not_end_is_cut_at_max_new_tokens(ask):
    for row in ask().results:
        assert row["completion_tokens"] == 12 or row["finish_reason"] == "stop"


def test_a_stop_string_ends_an_answer_and_is_not_part_of_it(ask):
    (whole,) = ask(questions=["Who?"], max_new_tokens=40).results
    stop = whole["text"][5:8]
    (cut,) = ask(questions=["Who?"], max_new_tokens=40, stop=[stop, "never there"]).results
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["finish_reason"] == "stop"
    assert cut["completion_tokens"] < 40


def test_texts_hold_no_special_tokens(ask):
    for row in ask(temperature=3.0, max_new_tokens=100).results:
        assert "<|" not in row["text"]


def test_what_is_drawn_depends_on_the_seed_alone(ask):
    first, again, other = ask(temperature=1.0), ask(temperature=1.0), ask(temperature=1.0, seed=7)
    assert first.results == again.results != other.results


def test_answered_prompts_are_not_asked_again(ask, tmp_path):
    first = ask(batch_size=2)
    asked = InferArguments(temperature=0, max_new_tokens=12, batch_size=2).model_dump()
    aside = tmp_path / "aside"
    aside.mkdir()
    done = {row["index"]: row | {"text": "kept"} for row in first.results if row["index"] in (1, 4)}
    write_results(aside / "results.jsonl", done)
    key = key_of([asked, 42, [{"prompt": question} for question in QUESTIONS]])
    (aside / "state.json").write_text(json.dumps({"key": key}))
    publish_folder(aside, tmp_path / "step-2", {})
    resumed = ask(batch_size=2, resume=tmp_path / "step-2")
    assert [row["text"] == "kept" for row in resumed.results] == [False, True, False, False, True]
    others = ask(batch_size=2, resume=tmp_path / "step-2", questions=["Else?"])
    assert [row["prompt"] for row in others.results] == ["Else?"]
    assert others.of_type("warning")[0]["code"] == "resume_ignored"


def test_prompts_may_stand_in_the_arguments(base, tmp_path):
    ran = run_here(
        tmp_path,
        infer,
        inputs={"model": base},
        arguments={"prompts": ["Who?", {"prompt": "What?"}], "max_new_tokens": 2},
    )
    assert [row["prompt"] for row in ran.results] == ["Who?", "What?"]


def test_a_prompt_longer_than_the_model_reads_is_refused(ask):
    ran = ask(questions=["x" * 600])
    assert ran.code == ExitCode.BAD_DATA
    assert "512" in ran.failure["evidence"] or "511" in ran.failure["evidence"]


def test_no_prompts_are_refused(ask):
    assert ask(questions=[""]).code == ExitCode.BAD_DATA


@pytest.mark.parametrize(
    ("asked", "model_says", "temperature", "top_p"),
    [
        ({}, {}, 1.0, 1.0),
        ({}, {"temperature": 0.6, "top_p": 0.9}, 0.6, 0.9),
        ({"temperature": 0.2}, {"temperature": 0.6, "top_p": 0.9}, 0.2, 0.9),
        ({"temperature": 0}, {"temperature": 0.6}, 0.0, 1.0),
        ({"do_sample": False}, {"temperature": 0.6}, 0.0, 1.0),
        ({}, {"do_sample": False}, 0.0, 1.0),
        ({"temperature": 0.5}, {"do_sample": False}, 0.5, 1.0),
    ],
)
def test_the_request_wins_then_the_model_then_openais_defaults(
    asked, model_says, temperature, top_p
):
    settings = choose_settings(InferArguments(**asked), model_says, stop_ids=[2], seed=1)
    assert (settings.temperature, settings.top_p) == (temperature, top_p)


def test_a_turn_ends_at_what_the_configuration_the_tokenizer_and_the_template_say(tmp_path):
    chat = chat_of(
        load_tokenizer(a_tiny_base(tmp_path, template=LLAMA)), template=None, default_system=None
    )
    names = chat.tokenizer.convert_ids_to_tokens(chat.stop_ids([2]))
    assert names == ["<|text_end|>", "<|start|>", "<|eot|>"]


def test_an_adapter_that_names_modules_to_import_is_refused(ask, base, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").touch()
    (adapter / "adapter_config.json").write_text(json.dumps({"megatron_config": {"a": 1}}))
    (tmp_path / "prompts.txt").write_text("hi")
    inputs = {"model": base, "adapter": adapter, "prompts": tmp_path / "prompts.txt"}
    ran = run_here(tmp_path, infer, inputs=inputs)
    assert ran.code == ExitCode.BAD_SPEC


def test_a_folder_is_copied_without_what_could_run(base, tmp_path, ask):
    source = tmp_path / "source"
    a_tiny_base(source)
    (source / "evil.py").write_text("")
    (source / "pytorch_model.bin").write_bytes(b"")
    ran = run_here(tmp_path, download, kind="download", arguments={"source": str(source)})
    assert ran.code == ExitCode.DONE
    names = {e["path"] for e in verify_folder(ran.workdir / "output")["files"]}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"evil.py", "pytorch_model.bin"}
    assert ask(model=ran.workdir / "output").results == ask(model=source).results
