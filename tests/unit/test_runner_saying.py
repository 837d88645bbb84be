"""What a fine-tune says: watch-prompts on the way, predictions at last. Tiny model, fp32, CPU."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from support.attempts_by_hand import Ran, run_here
from support.tiny_models import ANIMALS, a_dataset, a_tiny_base
from transformers import LlamaForCausalLM

from tuneyard.runners.base_model import load_tokenizer
from tuneyard.runners.chat import chat_of
from tuneyard.runners.events import EventLog
from tuneyard.runners.examples import IGNORED, Cutting, encode, encode_questions
from tuneyard.runners.finetune import finetune
from tuneyard.runners.infer import infer
from tuneyard.runners.rows import read_conversations
from tuneyard.runners.similarity import scores
from tuneyard.specs.exits import ExitCode
from tuneyard.store.folder import verify_folder

# peft asks transformers for a property that transformers renamed: no affair of ours.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

SHORT = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.01, "save_steps": 2}
WATCH = {"watch_prompts": ["What does a cat say?", "Who are you?"], "watch_max_new_tokens": 12}
LEARNED = {
    "lora_rank": 16, "learning_rate": 0.01, "max_steps": 150, "per_device_train_batch_size": 8,
    "lr_scheduler_type": "cosine", "save_strategy": "no",
}  # fmt: skip
PREDICT = {"do_predict": True, "predict_with_generate": True, "max_new_tokens": 16}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return a_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return a_dataset(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture
def tune(tmp_path, base, dataset):
    """Fine-tune the tiny base on the eight rows, with these arguments."""

    def run(*, resume: Path | None = None, eval_dataset: Path | None = None, **arguments) -> Ran:
        inputs = {"model": base, "dataset": dataset}
        inputs |= {"eval_dataset": eval_dataset} if eval_dataset else {}
        return run_here(
            tmp_path,
            finetune,
            inputs=inputs,
            resume=resume and str(resume),
            arguments=SHORT | arguments,
        )

    return run


def lines_of(ran: Ran, name: str) -> list[dict]:
    text = (ran.workdir / "output" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def asked(ran: Ran) -> list[tuple[int, str]]:
    return [(event["step"], event["prompt"]) for event in ran.of_type("sample")]


def each_at(*steps: int) -> list[tuple[int, str]]:
    return [(step, prompt) for step in steps for prompt in WATCH["watch_prompts"]]


# Watch-prompts --------------------------------------------------------------------------------


def test_watch_prompts_are_answered_at_step_0_and_at_every_checkpoint(tune):
    ran = tune(**WATCH)
    assert asked(ran) == each_at(0, 2, 4)
    texts = [event["text"] for event in ran.of_type("sample")]
    assert texts[:2] != texts[-2:]  # it learned something
    told = [{k: e[k] for k in ("step", "prompt", "text")} for e in ran.of_type("sample")]
    assert lines_of(ran, "watch_prompts.jsonl") == told


def test_they_are_answered_at_last_where_no_checkpoint_was_asked_for(tune):
    assert asked(tune(**WATCH, save_strategy="no")) == each_at(0, 4)


@pytest.mark.parametrize(
    "arguments",
    [
        {"lora_dropout": 0.2, "neftune_noise_alpha": 5.0},
        {"lora_dropout": 0.2, "gradient_checkpointing": True},
        {"lora_dropout": 0.2, "bf16": True},
    ],
)
def test_watching_alters_no_bit_of_the_adapter(tune, arguments):
    plain, watched = tune(**arguments), tune(**arguments, **WATCH)
    assert len(asked(watched)) == 6
    assert watched.adapter_sha256 == plain.adapter_sha256
    assert watched.metric("loss") == plain.metric("loss")


def test_the_same_run_says_the_same(tune):
    first, second = tune(**WATCH, lora_dropout=0.1), tune(**WATCH, lora_dropout=0.1)
    one, two = (verify_folder(ran.workdir / "output") for ran in (first, second))
    assert one == two
    assert "watch_prompts.jsonl" in {file["path"] for file in one["files"]}


def test_the_last_answers_are_those_of_the_adapter_that_is_left(tmp_path, tune, base):
    ran = tune(**WATCH)
    arguments = {
        "prompts": WATCH["watch_prompts"],
        "temperature": 0,
        "max_new_tokens": 12,
        "batch_size": 1,
    }
    inputs = {"model": base, "adapter": ran.workdir / "output"}
    said = run_here(tmp_path, infer, kind="inference", inputs=inputs, arguments=arguments)
    assert [row["text"] for row in said.results] == [
        event["text"] for event in ran.of_type("sample")[-2:]
    ]


def test_a_resumed_run_answers_no_step_twice_and_leaves_the_same_file(tune):
    whole = tune(**WATCH)
    resumed = tune(**WATCH, resume=whole.workdir / "checkpoints" / "step-2")
    assert asked(resumed) == each_at(4)
    first, second = (ran.workdir / "output" / "watch_prompts.jsonl" for ran in (whole, resumed))
    assert first.read_bytes() == second.read_bytes()
    assert resumed.adapter_sha256 == whole.adapter_sha256


def after(number: int, type_: str, send: signal.Signals, monkeypatch) -> None:
    """Send this process a signal when the nth event of a type was written."""
    emit, seen = EventLog.emit, []

    def watched(log: EventLog, kind: str, **fields) -> None:
        emit(log, kind, **fields)
        seen.append(kind)
        if kind == type_ and seen.count(kind) == number:
            os.kill(os.getpid(), send)

    monkeypatch.setattr(EventLog, "emit", watched)


def test_what_was_stopped_before_its_answers_gives_them_when_it_is_resumed(tune, monkeypatch):
    """The stop comes with the second step's progress: there is no time to answer then."""
    with monkeypatch.context() as patch:
        after(3, "progress", signal.SIGTERM, patch)
        stopped = tune(**WATCH)
    assert (stopped.code, asked(stopped)) == (ExitCode.STOPPED_AT_CHECKPOINT, each_at(0))
    (checkpoint,) = (stopped.workdir / "checkpoints").glob("step-*")
    assert checkpoint.name == "step-2"
    resumed = tune(**WATCH, resume=checkpoint)
    assert asked(resumed) == each_at(2, 4)
    whole = tune(**WATCH)
    assert lines_of(resumed, "watch_prompts.jsonl") == lines_of(whole, "watch_prompts.jsonl")


def test_a_resume_point_is_answered_too_and_leaves_no_trace_in_the_file(tune, monkeypatch):
    with monkeypatch.context() as patch:
        after(2, "progress", signal.SIGUSR1, patch)
        ran = tune(**WATCH)
    assert asked(ran) == each_at(0, 1, 2, 4)
    assert {line["step"] for line in lines_of(ran, "watch_prompts.jsonl")} == {0, 2, 4}


def test_a_watch_prompt_that_is_too_long_is_refused_before_the_first_step(tune):
    ran = tune(watch_prompts=["a", "b" * 600])
    assert (ran.code, ran.metric("loss")) == (ExitCode.BAD_SPEC, {})
    assert "watch_prompts[1]" in ran.failure["evidence"]


# Predictions ----------------------------------------------------------------------------------


def test_held_out_rows_are_answered_in_llamafactorys_form(tune, dataset):
    ran = tune(**PREDICT, eval_dataset=dataset, do_sample=False)
    assert ran.code == ExitCode.DONE
    lines = lines_of(ran, "generated_predictions.jsonl")
    assert len(lines) == 8
    assert lines[0].keys() == {"prompt", "predict", "label"}
    assert lines[0]["prompt"] == (
        "<|im_start|>user\nWhat does a cat say?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [line["label"] for line in lines[:2]] == ["tac!", "god!god!"]
    content = (ran.workdir / "output" / "predict_results.json").read_text()
    values = json.loads(content)
    each = [scores(line["predict"], line["label"]) for line in lines]
    for name in ("bleu-4", "rouge-1", "rouge-2", "rouge-l"):
        assert values[f"predict_{name}"] == sum(row[name] for row in each) / 8
        assert ran.metric(f"predict_{name}") == {4: values[f"predict_{name}"]}
    everything = json.loads((ran.workdir / "output" / "all_results.json").read_text())
    assert everything.items() >= values.items()
    assert [e["done"] for e in ran.of_type("progress")][-1] == 4  # steps, again


def test_a_model_that_learned_its_rows_predicts_them_whole(tmp_path, dataset):
    asking = {**PREDICT, "max_new_tokens": 32, "do_sample": False}
    inputs = {"model": a_tiny_base(tmp_path / "base", hidden=64), "dataset": dataset}
    inputs["eval_dataset"] = dataset
    ran = run_here(tmp_path, finetune, inputs=inputs, arguments={**LEARNED, **asking})
    lines = lines_of(ran, "generated_predictions.jsonl")
    assert [line["predict"] for line in lines] == [line["label"] for line in lines]
    assert ran.metric("predict_rouge-1")[LEARNED["max_steps"]] == 100.0


def test_the_rows_that_val_size_holds_out_are_predicted_and_no_others(tune):
    ran = tune(**PREDICT, val_size=3, do_eval=True)
    assert sorted(ran.metric("eval_loss")) == [0, 4]  # do_eval: the base, and what was learned
    labels = [line["label"] for line in lines_of(ran, "generated_predictions.jsonl")]
    assert len(labels) == 3
    every = tune(val_size=3, train_on_prompt=True, **PREDICT)
    assert [line["label"] for line in lines_of(every, "generated_predictions.jsonl")] == labels


def test_rows_without_a_token_to_learn_do_not_shift_which_are_held_out(tmp_path, base, tune):
    rows = [{"instruction": f"{a}?", "output": a} for a in ANIMALS]
    mixed = [{"instruction": "x", "output": ""}, *rows[:4], {"instruction": "y", "output": " "}]
    mixed += rows[4:]
    found = []
    for name, data in (("plain", rows), ("mixed", mixed)):
        ran = run_here(
            tmp_path,
            finetune,
            inputs={"model": base, "dataset": a_dataset(tmp_path / f"{name}.jsonl", data)},
            arguments={**SHORT, **PREDICT, "val_size": 3, "cutoff_len": 40},
        )
        assert ran.code == ExitCode.DONE, ran.failure
        found.append({line["label"] for line in lines_of(ran, "generated_predictions.jsonl")})
    assert len(found[0]) == len(found[1]) == 3


def test_what_is_drawn_follows_from_the_seed_and_alters_nothing(tune, dataset):
    plain = tune(lora_dropout=0.1)
    one, two = (tune(**PREDICT, eval_dataset=dataset, lora_dropout=0.1) for _ in range(2))
    assert plain.adapter_sha256 == one.adapter_sha256
    assert verify_folder(one.workdir / "output") == verify_folder(two.workdir / "output")
    other = tune(**PREDICT, eval_dataset=dataset, lora_dropout=0.1, temperature=5.0, top_p=1.0)
    assert lines_of(one, "generated_predictions.jsonl") != lines_of(
        other, "generated_predictions.jsonl"
    )


def test_a_stop_while_it_predicts_keeps_the_trained_model(tune, dataset, monkeypatch):
    asking = {**PREDICT, "per_device_eval_batch_size": 2, "do_sample": False}
    with monkeypatch.context() as patch:
        after(7, "progress", signal.SIGTERM, patch)  # five of steps, then one of rows answered
        stopped = tune(**asking, eval_dataset=dataset)
    assert stopped.code == ExitCode.STOPPED_AT_CHECKPOINT
    resumed = tune(**asking, eval_dataset=dataset, resume=stopped.workdir / "checkpoints/step-4")
    assert resumed.metric("loss") == {}
    whole = tune(**asking, eval_dataset=dataset)
    assert resumed.adapter_sha256 == whole.adapter_sha256
    assert lines_of(resumed, "generated_predictions.jsonl") == lines_of(
        whole, "generated_predictions.jsonl"
    )


def test_a_row_too_long_to_answer_is_refused_before_the_first_step(tmp_path, tune):
    rows = [{"instruction": "x" * 600, "output": "y"}]
    ran = tune(**PREDICT, eval_dataset=a_dataset(tmp_path / "long.jsonl", rows))
    assert (ran.code, ran.metric("loss")) == (ExitCode.BAD_DATA, {})
    assert "cutoff_len: line 1: A row to predict" in ran.failure["evidence"]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"do_predict": True, "val_size": 2}, "predict_with_generate"),
        ({**PREDICT}, "do_predict"),
        ({"do_eval": True}, "do_eval"),
        ({**PREDICT, "val_size": 2, "compute_accuracy": True}, "compute_accuracy"),
    ],
)
def test_what_cannot_be_predicted_is_refused_by_hand_too(tune, arguments, field):
    ran = tune(**arguments)
    assert ran.code == ExitCode.BAD_SPEC
    assert ran.failure["evidence"].startswith(f"{field}: ")


def test_accuracy_is_the_mean_over_rows_of_their_shares_of_tokens(tune, base, dataset):
    ran = tune(
        compute_accuracy=True, do_eval=True, eval_dataset=dataset, per_device_eval_batch_size=3
    )
    chat = chat_of(load_tokenizer(base), template=None, default_system=None)
    examples = encode(read_conversations(dataset), chat, Cutting()).examples
    model = LlamaForCausalLM.from_pretrained(base)
    shares = []
    for example in examples:
        with torch.no_grad():
            likeliest = model(input_ids=torch.tensor([example.ids])).logits[0, :-1].argmax(-1)
        labels = torch.tensor(example.labels[1:])
        wanted = labels != IGNORED
        shares.append(float((likeliest[wanted] == labels[wanted]).double().mean()))
    measured = ran.metric("eval_accuracy")
    assert sorted(measured) == [0, 4]
    assert measured[0] == pytest.approx(sum(shares) / len(shares), abs=1e-12)
    assert len({len(example.ids) for example in examples}) > 1
    assert "accuracy" not in ran.events[-1]["values"]
    assert ran.metric("accuracy") == {}  # nothing is spent on it where rows are learned


def test_plain_text_is_continued_where_text_is_learned(tmp_path):
    base = a_tiny_base(tmp_path / "base", template=None, hidden=64)
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": f"{a} {a}"}) + "\n" for a in ANIMALS))
    ran = run_here(
        tmp_path,
        finetune,
        inputs={"model": base, "dataset": data},
        arguments={**LEARNED, "stage": "pt", "packing": False, "watch_prompts": ["heron "]},
    )
    assert ran.code == ExitCode.DONE, ran.failure
    assert ran.of_type("sample")[-1]["text"] == "heron"


# Prompts and labels ---------------------------------------------------------------------------


def test_a_row_of_several_turns_is_asked_its_last_question(tmp_path, base):
    row = {"instruction": "now?", "output": "four", "history": [["one", "two"], ["three", "3"]]}
    rows = read_conversations(a_dataset(tmp_path / "turns.jsonl", [row]))
    chat = chat_of(load_tokenizer(base), template=None, default_system=None)
    (question,) = encode_questions(rows, chat, 2048)
    (example,) = encode(rows, chat, Cutting()).examples
    assert question.prompt + question.label == example.ids
    said = chat.tokenizer.decode(question.label)
    assert said == "four<|im_end|>"


def test_prompts_are_cut_by_one_share_for_all_turns_as_llamafactory_cuts(tmp_path, base):
    row = {"instruction": "x" * 50, "output": "y" * 10, "history": [["a" * 30, "b" * 30]]}
    rows = read_conversations(a_dataset(tmp_path / "turns.jsonl", [row]))
    chat = chat_of(load_tokenizer(base), template=None, default_system=None)
    (whole,) = encode_questions(rows, chat, 2048)
    (cut,) = encode_questions(rows, chat, 64)
    assert (len(cut.prompt), len(cut.label)) == (64 - 11, 11)
    assert cut.prompt == whole.prompt[:53]


@pytest.mark.parametrize(
    "ways",
    [
        {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
        {"finetuning_type": "full"},
        {"additional_target": "lm_head"},
    ],
    ids=lambda each: "-".join(map(str, each.values())),
)
def test_a_model_of_two_formats_speaks_in_the_one_that_it_learns_in(tune, ways):
    ran = tune(**ways, **WATCH, **PREDICT, bf16=True, val_size=2)
    assert ran.code == ExitCode.DONE, ran.failure
    assert asked(ran) == each_at(0, 2, 4)
    assert len(lines_of(ran, "generated_predictions.jsonl")) == 2
