"""What an answer is worth: each function of the list, and what a pattern may cost."""

import json
import re
import time
from pathlib import Path

import pytest

from tuneyard.runners.failures import BadData
from tuneyard.runners.rewards import Answered, check_columns, last_number, names_of, score_of
from tuneyard.runners.rows import read_stage
from tuneyard.specs.documents import apply_overrides, read_yaml
from tuneyard.specs.errors import SpecRejected
from tuneyard.specs.jobs import read_spec
from tuneyard.specs.pipelines import read_pipeline
from tuneyard.specs.rewards import FUNCTIONS, RewardFields


def asked(entry):
    (function,) = RewardFields(kind="finetune", reward_funcs=[entry]).reward_funcs
    return function


def worth(entry, text, *, tokens=0, **columns) -> float:
    return score_of(asked(entry))(Answered(text, tokens, columns))


EXACT = {"name": "exact_match"}
NUMBER = {"name": "numeric_equality"}


@pytest.mark.parametrize(
    ("entry", "text", "columns", "expected"),
    [
        ("exact_match", " Paris\n", {"answer": "Paris "}, 1),
        ("exact_match", "Paris.", {"answer": "Paris"}, 0),
        ("exact_match", "paris", {"answer": "Paris"}, 0),
        (EXACT | {"ignore_case": True}, "paris", {"answer": "Paris"}, 1),
        (EXACT | {"column": "gold"}, "Paris", {"gold": "Paris", "answer": "Rome"}, 1),
        (EXACT | {"tag": "answer"}, "<think>Rome?</think><answer>Paris</answer>", "Paris", 1),
        (EXACT | {"tag": "answer"}, "<answer>Rome</answer><answer>Paris</answer>", "Paris", 1),
        (EXACT | {"tag": "answer"}, "Paris", "Paris", 0),
        (EXACT | {"tag": "answer"}, "<answer>Paris", "Paris", 0),
        ("exact_match", "7", {"answer": 7}, 1),
        ("exact_match", "true", {"answer": True}, 1),
        ("contains", "It is Paris.", {"answer": "Paris"}, 1),
        ("contains", "It is Rome.", {"answer": "Paris"}, 0),
        ("contains", "anything", {"answer": " "}, 0),
        ({"name": "contains", "text": "please", "ignore_case": True}, "Please wait", {}, 1),
        ({"name": "regex", "pattern": r"^\d{3}$"}, "123", {}, 1),
        ({"name": "regex", "pattern": r"^\d{3}$"}, "1234", {}, 0),
        ({"name": "regex", "pattern": r"(?s)a.*b"}, "x a\n\nb y", {}, 1),
        ("numeric_equality", "3 + 4 = 7.", {"answer": "#### 7"}, 1),
        ("numeric_equality", "It costs $1,250.50", {"answer": 1250.5}, 1),
        ("numeric_equality", "-3", {"answer": "3"}, 0),
        ("numeric_equality", "no number", {"answer": "3"}, 0),
        (NUMBER | {"tolerance": 0.01}, "3.14", {"answer": "3.145"}, 1),
        (NUMBER | {"tag": "answer"}, "<answer>8</answer> 7", {"answer": "8"}, 1),
        ("json_valid", '{"a": [1, 2]}', {}, 1),
        ("json_valid", '{"a": NaN}', {}, 0),
        ("json_valid", "{'a': 1}", {}, 0),
        ("json_valid", "[" * 100_000, {}, 0),
        ("json_valid", "9" * 100_000, {}, 0),
        ({"name": "json_valid", "keys": ["a", "b"]}, '{"a": 1, "b": 2}', {}, 1),
        ({"name": "json_valid", "keys": ["a", "b"]}, '{"a": 1}', {}, 0),
        ({"name": "json_valid", "keys": ["a"]}, '["a"]', {}, 0),
        ({"name": "length", "target": 4, "unit": "words"}, "one two three four", {}, 1),
        ({"name": "length", "target": 4, "unit": "words"}, "one two three", {}, 0.75),
        ({"name": "length", "target": 4, "unit": "characters", "within": 2}, "abcde", {}, 0.5),
        ({"name": "length", "target": 4, "unit": "characters"}, "a" * 40, {}, 0),
        ("format", "<think>a</think>\n<answer>b</answer>", {}, 1),
        ("format", "<think></think><answer></answer>", {}, 1),
        ("format", "<answer>b</answer><think>a</think>", {}, 0),
        ("format", "<think>a</think><answer>b</answer> and more", {}, 0),
        ("format", "so: <think>a</think><answer>b</answer>", {}, 0),
        ("format", "<think>a</think><think>a</think><answer>b</answer>", {}, 0),
        ("format", "<think>a<think></think><answer>b</answer>", {}, 0),
        ("format", "<think>a</think><answer>b", {}, 0),
        ({"name": "format", "tags": ["plan"]}, "<plan>a</plan>", {}, 1),
    ],
)  # fmt: skip
def test_an_answer_is_worth(entry, text, columns, expected):
    columns = columns if isinstance(columns, dict) else {"answer": columns}
    assert worth(entry, text, **columns) == pytest.approx(expected)


def test_length_counts_tokens_unless_told_otherwise():
    assert worth({"name": "length", "target": 10}, "a word", tokens=5) == 0.5


def test_every_function_of_the_list_can_score():
    for name in FUNCTIONS:
        entry = {"name": name} | {"regex": {"pattern": "a"}, "length": {"target": 1}}.get(name, {})
        assert 0 <= worth(entry, "a", tokens=1, answer="1") <= 1


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a|aa)+$", r"(.*)*x", r"(?:[ab]{1,90}[ab]?){9}!"])
def test_no_pattern_takes_more_than_a_moment(pattern):
    began = time.process_time()
    assert worth({"name": "regex", "pattern": pattern}, "a" * 20_000 + "b") == 0
    assert time.process_time() - began < 5


def test_no_text_makes_the_search_for_a_number_slow():
    began = time.process_time()
    for text in ("1," * 50_000 + "x", "-" * 100_000, "1e" * 50_000, "." * 100_000):
        last_number(text)
    assert time.process_time() - began < 2


def test_functions_of_one_name_have_metrics_of_their_own():
    entries = ["format", "exact_match", {"name": "exact_match", "tag": "answer"}]
    functions = RewardFields(kind="finetune", reward_funcs=entries).reward_funcs
    assert names_of(functions) == ["format", "exact_match", "exact_match_2"]


@pytest.mark.parametrize(
    ("entry", "row", "said"),
    [
        ("exact_match", {"gold": "a"}, "its columns are: gold"),
        ("contains", {}, "its columns are: none"),
        (NUMBER, {"answer": "seven"}, "holds no number"),
    ],
)
def test_a_row_without_what_a_reward_reads_is_named(entry, row, said):
    with pytest.raises(BadData) as refused:
        check_columns([asked(entry)], [{"answer": "1"}, row], [1, 2])
    assert refused.value.line == 2
    assert said in f"{refused.value.message} {refused.value.hint}"


GRPO = {"kind": "finetune", "model": "m", "dataset": "d", "stage": "grpo"}
SCORED = GRPO | {"reward_funcs": ["exact_match"]}
REGEX = {"name": "regex", "pattern": "a"}


@pytest.mark.parametrize(
    ("document", "field", "said"),
    [
        (GRPO, "reward_funcs", "Nothing says what an answer is worth"),
        (SCORED | {"reward_model": "rm"}, "reward_funcs", "exclude each other"),
        (SCORED | {"reward_weights": [1.0, 2.0]}, "reward_weights", "2 weights for 1 reward"),
        (GRPO | {"reward_model": "r", "reward_weights": [1.0]}, "reward_weights", "for 0 reward"),
        (SCORED | {"reward_weights": [0.0]}, "reward_weights", "All weights are 0"),
        (SCORED | {"num_generations": 3}, "num_generations", "does not divide the 8 answers"),
        (SCORED | {"per_device_train_batch_size": 4}, "num_generations", "does not divide the 4"),
        (SCORED | {"num_generations": 1}, "num_generations", "no other answer"),
        (SCORED | {"temperature": 0.0}, "temperature", "the same answer every time"),
        (SCORED | {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha", "no meaning in stage grpo"),
        (SCORED | {"normalize_advantages": True}, "normalize_advantages", "no meaning in stage gr"),
        (SCORED | {"train_on_prompt": True}, "train_on_prompt", "no meaning in stage grpo"),
        (SCORED | {"ref_model": "m"}, "ref_model", "beta = 0 compares with no reference"),
        (SCORED | {"stage": "rloo", "loss_type": "grpo"}, "loss_type", "no meaning in stage rloo"),
        (SCORED | {"loss_type": "bnpo"}, "loss_type", "is no choice"),
        (SCORED | {"stage": "sft"}, "reward_funcs", "is of stages grpo and rloo, and this is sft"),
        (SCORED | {"stage": "dpo"}, "reward_funcs", "is of stages grpo and rloo, and this is dpo"),
        (SCORED | {"num_iterations": 2}, "num_iterations", "not supported yet"),
        (SCORED | {"use_vllm": True}, "use_vllm", "not supported yet"),
        (GRPO | {"reward_funcs": ["exact_mach"]}, "reward_funcs[0]", "is no reward function"),
        (GRPO | {"reward_funcs": ["regex"]}, "reward_funcs[0].pattern", "is missing"),
        (
            GRPO | {"reward_funcs": [REGEX | {"pattern": r"(?<=a)b"}]},
            "reward_funcs[0].pattern",
            "look-around",
        ),
        (
            GRPO | {"reward_funcs": [REGEX | {"column": "x"}]},
            "reward_funcs[0].column",
            "There is no field",
        ),
        (
            GRPO | {"reward_funcs": [{"name": "exact_match", "tag": "a b"}]},
            "reward_funcs[0].tag",
            "no name of a tag",
        ),
    ],
)
def test_a_mistake_is_refused_with_its_field_and_mend(document, field, said):
    with pytest.raises(SpecRejected) as refused:
        read_spec(document)
    (found,) = refused.value.problems
    assert (found.field, said in found.message) == (field, True), found.message
    assert found.hint or said == "There is no field"


def test_ppo_is_refused_in_a_sentence_that_names_what_to_use():
    with pytest.raises(SpecRejected) as refused:
        read_spec(SCORED | {"stage": "ppo"})
    found = refused.value.problems[0]
    assert found.field == "stage"
    assert {"grpo", "rloo", "dpo"} <= set(found.hint.replace(",", "").split())


@pytest.mark.parametrize(
    ("stage", "batch", "defaults"), [("grpo", 8, (8, 0.0)), ("rloo", 2, (2, 0.05))]
)
def test_defaults_are_trls_for_each_stage(stage, batch, defaults):
    spec, notes = read_spec(SCORED | {"stage": stage, "per_device_train_batch_size": batch})
    assert (spec.generations, spec.distance_weight) == defaults
    assert (spec.max_completion_length, spec.drawn_at, spec.loss_type) == (512, 1.0, "dapo")
    assert notes == []


def test_what_has_no_effect_is_noted():
    _, notes = read_spec(SCORED | {"epsilon": 0.2})
    assert [note.field for note in notes] == ["epsilon"]
    sft = {"kind": "finetune", "model": "m", "dataset": "d", "temperature": 0.95}
    _, notes = read_spec(sft)
    assert [note.field for note in notes] == ["temperature"]


PAGE = (Path(__file__).parents[2] / "docs/howto/rewards.md").read_text(encoding="utf-8")
ENDS = ("ROWS", "SPEC")


def test_what_the_page_on_rewards_shows_is_accepted(tmp_path):
    rows, spec = (re.search(rf"<<'{end}'\n(.*?){end}\n", PAGE, re.DOTALL)[1] for end in ENDS)
    read, notes = read_spec(read_yaml(spec) | {"dataset": "sums"})
    assert [function.name for function in read.reward_funcs] == ["length", "numeric_equality"]
    assert notes == []
    path = tmp_path / "questions.jsonl"
    path.write_text(rows, encoding="utf-8")
    asked = read_stage(path, "grpo")
    assert [row.messages[-1]["role"] for row in asked] == ["user"] * 4
    check_columns(read.reward_funcs, [row.columns for row in asked], [1, 2, 3, 4])
    (pipeline,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert len(read_pipeline(json.loads(pipeline.replace(".jsonl", "")))) == 2
    (inline,) = re.findall(r"`(reward_funcs: .*?\])`", PAGE)
    assert read_spec(GRPO | read_yaml(inline))[0].reward_funcs[1].tag == "answer"


def test_the_page_on_rewards_names_every_function_and_option():
    for name, function in FUNCTIONS.items():
        (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}`")]
        options = function.model_fields.keys() - {"name"}
        assert {option for option in options if f"`{option}`" not in line} == set()


def test_numbers_within_options_are_numbers_in_yaml():
    spec, _ = read_spec(SCORED | read_yaml("reward_funcs: {name: length, target: 40, within: 8}"))
    (length,) = spec.reward_funcs
    assert (length.target, length.within) == (40, 8)
    spec, _ = read_spec(SCORED | apply_overrides({}, ["reward_weights=[2]"]))
    assert spec.reward_weights == [2.0]


def test_none_is_a_choice_and_not_the_default():
    spec, _ = read_spec(read_yaml("scale_rewards: none") | SCORED)
    assert spec.scale_rewards == "none"
