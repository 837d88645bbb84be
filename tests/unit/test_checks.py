"""Checks of data files and of what a submission names: the line, the reason, the mend."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneyard.checks.limits import check_file
from tuneyard.checks.report import report_on
from tuneyard.checks.submission import check_finetune, check_inference, check_prompts
from tuneyard.runners.failures import BadData
from tuneyard.runners.prompts import prompts_of, read_prompts
from tuneyard.runners.rows import read_conversations, read_stage
from tuneyard.specs.conversations import ROLES, check_prompt
from tuneyard.specs.errors import InputError
from tuneyard.specs.finetune import FinetuneSpec
from tuneyard.specs.inference import InferenceSpec
from tuneyard.specs.jobs import read_spec
from tuneyard.specs.rows import ANSWERS, SPEAKERS, check_row

ROW = '{"instruction": "a", "output": "b"}'


def report(tmp_path: Path, content: bytes | str, *, purpose: str = "dataset") -> dict[str, Any]:
    path = tmp_path / "data"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return report_on(path, purpose=purpose)


@pytest.mark.parametrize(
    ("content", "kind", "rows"),
    [
        (ROW, "alpaca", 1),
        (f"{ROW}\n{ROW}\n", "alpaca", 2),
        (f"\ufeff{ROW}\r\n\r\n{ROW}", "alpaca", 2),
        (f"[{ROW},\n {ROW}]", "alpaca", 2),
        (' [\n{"prompt": "a", "completion": "b"}\n] \n', "alpaca", 1),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
         "openai", 1),
        ('{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}',
         "sharegpt", 1),
        ('{"conversations": [{"from": "human", "value": "a"}, {"from": "function_call",'
         ' "value": "{\\"name\\": \\"f\\", \\"arguments\\": {}}"},'
         ' {"from": "observation", "value": "o"}, {"from": "gpt", "value": "b"}], "tools": "[]"}',
         "sharegpt", 1),
        ('{"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content":'
         ' [{"text": "a"}]}, {"role": "assistant", "content": null, "tool_calls": [{}]},'
         ' {"role": "tool", "content": "t"},'
         ' {"role": "assistant", "content": "b", "weight": 1}], "tools": "[]"}',
         "openai", 1),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],'
         ' "label": true}', "kto", 1),
        ('{"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value":'
         ' "b"}, "rejected": {"from": "gpt", "value": "c"}}', "preference", 1),
        ('{"text": "once"}', "text", 1),
        ('{"instruction": "a", "input": null, "output": "b", "history": [["c", "d"]]}',
         "alpaca", 1),
    ],
)  # fmt: skip
def test_what_the_field_uses_is_accepted(
    tmp_path: Path, content: str, kind: str, rows: int
) -> None:
    found = report(tmp_path, content)
    assert (found["ok"], found["rows_kind"], found["rows"]) == (True, kind, rows), found


@pytest.mark.parametrize(
    ("content", "code", "line"),
    [
        (b"", "dataset_empty", None),
        (b"\n\n", "dataset_empty", None),
        (b"[]", "dataset_empty", None),
        (b" \n" * 600_000, "dataset_empty", None),
        (b'{"instruction": "a", "output": "\\ud800"}', "bad_character", 1),
        (b'{"instruction": "a", "output": "\\u0000"}', "bad_character", 1),
        (b"{\n", "bad_line", 1),
        (b'{"a": ' + b"1" * 5000 + b"}", "bad_line", 1),
        (b'{"a": NaN}', "bad_line", 1),
        (b'{"a": ' + b"[" * 100_000, "too_deep", 1),
        (b"[" * 100_000, "too_deep", 1),
        (b"[1e5]", "wrong_type", 1),
        (b'["' + b"x" * 17 * 1024**2, "line_too_long", 1),
        (b"a,b,c\n1,2,3\n", "wrong_format", 1),
        (b"PK\x03\x04..[Content_Types].xml", "wrong_format", None),
        (b"\xd0\xcf\x11\xe0", "wrong_format", None),
        (b"\x80\x03rest", "wrong_format", None),
        (b"\x1f\x8brest", "wrong_format", None),
        (b"abc\x00", "wrong_format", None),
        (b"PK\x03\x04rest", "wrong_format", None),
        (b"\x80\x04rest", "wrong_format", None),
        (b"PAR1rest", "wrong_format", None),
        ("x".encode("utf-16"), "wrong_format", None),
        ("x".encode("utf-32"), "wrong_format", None),
        (f"{ROW}\n{{broken".encode(), "bad_line", 2),
        (f"{ROW}\n".encode() + b'{"instruction": "\xc4", "output": "b"}', "not_utf8", 2),
        (f"[{ROW}\n{ROW}]".encode(), "bad_line", 2),
        (f"[{ROW}".encode(), "bad_line", 1),
        (f"[{ROW}] x".encode(), "bad_line", 1),
        (b'{"promt": "a", "output": "b"}', "missing_column", 1),
        (b'{"instruction": "a", "ouput": "b"}', "missing_column", 1),
        (b'{"instruction": " "}', "empty_prompt", 1),
        (b'{"instruction": null, "output": "b"}', "wrong_type", 1),
        (b'{"instruction": "a", "output": 3}', "wrong_type", 1),
        (b'{"instruction": "a", "output": " "}', "no_trainable_tokens", 1),
        (b'{"text": 3}', "wrong_type", 1),
        (b'{"prompt": "a", "completions": "b"}', "missing_column", 1),
        (b'{"prompt": "a", "chosen": "b"}', "missing_column", 1),
        (b'{"prompt": "a", "chosen": "b", "rejected": 1}', "wrong_type", 1),
        (b'{"instruction": "a", "output": "b", "history": "x"}', "wrong_type", 1),
        (b'{"instruction": "a", "output": "b", "history": [["x", 1]]}', "wrong_type", 1),
        (b'{"instruction": "a", "output": "b", "system": 1}', "wrong_type", 1),
        (b'{"messages": []}', "wrong_type", 1),
        (b'{"messages": [3]}', "missing_column", 1),
        (b'{"messages": [{"role": [], "content": "a"}]}', "unknown_role", 1),
        (b'{"messages": [{"role": "user", "content": null}]}', "wrong_type", 1),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "bad_turns", 1),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},'
         b' {"role": "system", "content": "c"}]}', "bad_turns", 1),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"},'
         b' {"role": "user", "content": "c"}]}', "bad_turns", 1),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b",'
         b' "weight": 2}]}', "out_of_range", 1),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],'
         b' "tools": "{"}', "wrong_type", 1),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],'
         b' "tools": [1]}', "wrong_type", 1),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c", "tools": "no JSON"}', "wrong_type", 1),
        (b'{"prompt": "a", "completion": "b", "label": true, "tools": "{bad"}', "wrong_type", 1),
        (b'{"instruction": "<image>a", "output": "b", "images": ["a.png"]}', "not_text", 1),
        (b'{"conversations": [{"from": "bot", "value": "a"}]}', "unknown_role", 1),
        (b'{"messages": [{"role": "bot", "content": "a"}]}', "unknown_role", 1),
        (b'{"messages": [{"role": "system", "content": "a"}]}', "no_trainable_tokens", 1),
        (b'{"conversations": [{"value": "a"}]}', "missing_column", 1),
        (b"{}\n[1]", "missing_column", 1),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_its_line(
    tmp_path: Path, content: bytes, code: str, line: int | None
) -> None:
    found = report(tmp_path, content)
    first = found["problems"][0]
    assert (found["ok"], first["code"], first["line"]) == (False, code, line), first
    assert first["hint"], first


def test_an_encoding_is_called_by_its_name(tmp_path: Path) -> None:
    for encoding in ("utf-16", "utf-32"):
        found = report(tmp_path, ROW.encode(encoding))["problems"][0]
        assert found["message"] == f"This is text in {encoding.upper()}, no data set."


def test_a_misspelt_column_gets_its_real_name(tmp_path: Path) -> None:
    hint = report(tmp_path, '{"instruction": "a", "ouput": "b"}')["problems"][0]["hint"]
    assert "did 'ouput' mean 'output'?" in hint


def test_the_first_five_bad_lines_are_named_and_all_are_counted(tmp_path: Path) -> None:
    found = report(tmp_path, "\n".join([ROW, *["{bad"] * 9]))
    assert [p["line"] for p in found["problems"]] == [2, 3, 4, 5, 6]
    assert found["problem_count"] == 9


def test_a_line_that_never_ends_is_refused_at_flat_memory(tmp_path: Path) -> None:
    path = tmp_path / "long"
    with path.open("wb") as file:
        file.writelines([b'{"instruction": "', *[b"x" * 1024**2] * 200])
    found = check_file(path, memory_bytes=150 * 1024**2)
    assert found["problems"][0]["code"] == "line_too_long"


def test_an_array_with_a_row_longer_than_a_piece_is_read(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "long " * 700_000}, {"instruction": "a", "output": "b"}]
    found = report(tmp_path, json.dumps(rows))
    assert (found["ok"], found["rows"]) == (True, 2), found["problems"]


def test_a_place_within_an_array_is_that_of_the_file(tmp_path: Path) -> None:
    rows = ",\n".join([ROW] * 40_000)
    found = report(tmp_path, f'[{rows},\n{ROW}, {{"a" 1}}]')["problems"][0]
    assert (found["line"], found["column"]) == (40_001, len(ROW) + 8)
    broken = f"[{rows},\n".encode() + b"\xc4]"
    found = report(tmp_path, broken)["problems"][0]
    assert (found["code"], found["line"]) == ("not_utf8", 40_001)
    assert f"byte {len(broken) - 1} of the file is 0xc4" in found["message"]


def test_an_empty_answer_is_a_warning_and_nothing_but_empty_ones_an_error(tmp_path: Path) -> None:
    empty = '{"instruction": "a", "output": " "}'
    found = report(tmp_path, f"{ROW}\n{empty}\n{empty}")
    assert found["ok"]
    assert found["warnings"] == ["2 rows have an empty answer (lines 2, 3)"]
    assert report(tmp_path, f"{empty}\n{empty}")["problems"][0]["code"] == "no_trainable_tokens"


def test_forms_are_counted_and_the_most_frequent_names_the_file(tmp_path: Path) -> None:
    found = report(tmp_path, f'{{"text": "a"}}\n{ROW}\n{ROW}')
    assert found["rows_kind"] == "alpaca"
    assert found["kinds"] == {"text": {"rows": 1, "line": 1}, "alpaca": {"rows": 2, "line": 2}}


def test_a_preview_is_short_and_can_be_stored(tmp_path: Path) -> None:
    row = json.dumps({"instruction": "\ud800\x00" + "x" * 10_000, "output": "b"})
    (shown,) = report(tmp_path, row)["preview"]
    assert len(shown) == 301
    assert "\ud800" not in shown


@pytest.mark.parametrize("purpose", ["dataset", "prompts"])
def test_a_pipe_is_refused_and_does_not_hang(tmp_path: Path, purpose: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    found = report_on(tmp_path / "pipe", purpose=purpose)
    assert found["problems"][0]["code"] == "not_a_regular_file"


@given(st.binary(max_size=60) | st.text('[]{}",:123.eE-ntfalsu \\\n').map(str.encode))
def test_no_bytes_make_a_check_crash(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for purpose in ("dataset", "prompts"):
            json.dumps(report(Path(folder), content, purpose=purpose), ensure_ascii=False).encode()


ROWS = [
    {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["d", "e"]]},
    {"prompt": "a", "completion": "b"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {
        "messages": [
            {"role": "user", "content": [{"text": "a"}]},
            {"role": "assistant", "content": "b"},
        ]
    },
    {"instruction": "a", "output": ""},
]


def test_plain_text_is_rows_of_text_where_the_name_says_so(tmp_path: Path) -> None:
    path = tmp_path / "wiki"
    path.write_text("One text.\n\n  Another, with a comma.\n")
    refused = report_on(path, purpose="dataset")["problems"]
    assert [each["code"] for each in refused] == ["wrong_format"]
    found = check_file(path, plain=True)
    assert found["ok"], found["problems"]
    assert found["kinds"] == {"text": {"rows": 2, "line": 1}}
    assert [row.text for row in read_stage(path, "pt")] == ["One text.", "  Another, with a comma."]
    with pytest.raises(BadData, match="needs answers"):
        read_stage(path, "sft")


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"\xef\xbb\xbfone\r\n\r\ntwo\r\n", ["one", "two"]),
        (b"[Chapter 1] It was dark.\n{so} it was.", ["[Chapter 1] It was dark.", "{so} it was."]),
        (b"{curly} first\n[1]", ["{curly} first", "[1]"]),
        (b'{"text": "one"}\n{"text": "two"}', ["one", "two"]),
        (b'[{"text": "one"},\n{"text": "two"}]', ["one", "two"]),
    ],
)
def test_plain_text_is_told_from_json_as_the_runner_tells_it(
    tmp_path: Path, content: bytes, texts: list[str]
) -> None:
    path = tmp_path / "data"
    path.write_bytes(content)
    assert [row.text for row in read_stage(path, "pt")] == texts
    found = check_file(path, plain=True)
    assert (found["ok"], found["kinds"]["text"]["rows"]) == (True, 2), found


@pytest.mark.parametrize(
    ("stage", "row", "field"),
    [
        ("pt", {"text": "a"}, None),
        ("pt", {"instruction": "a", "output": "b"}, "dataset"),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": "c"}, None),
        ("rm", {"prompt": "a", "chosen": "b", "rejected": "c"}, None),
        ("dpo", {"instruction": "a", "output": "b"}, "dataset"),
        ("kto", {"instruction": "a", "output": "b", "kto_tag": False}, None),
        ("kto", {"instruction": "a", "output": "b"}, "dataset"),
    ],
)
def test_rows_that_a_stage_does_not_learn_are_refused_at_submission(
    tmp_path: Path, stage: str, row: dict[str, Any], field: str | None
) -> None:
    path = tmp_path / "rows"
    path.write_text(json.dumps(row))
    report = report_on(path, purpose="dataset")
    assert report["ok"], report["problems"]
    spec = FinetuneSpec(model="m", dataset="d", stage=stage)
    found = check_finetune(spec, report, None)
    assert [each.field for each in found] == ([field] if field else [])


def test_what_is_accepted_for_training_is_what_the_runner_reads(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    found = report_on(path, purpose="dataset")
    assert found["ok"], found["problems"]
    assert set(found["kinds"]) <= ANSWERS
    assert len(read_conversations(path)) == len(ROWS)


JUNK = st.none() | st.booleans() | st.integers(-1, 2) | st.sampled_from(["", "a", " ", "\0"])
TEXTS = st.sampled_from(["a", "b", ""]) | JUNK
PARTS = st.lists(st.fixed_dictionaries({"text": TEXTS}) | JUNK, max_size=2)
TURNS = st.fixed_dictionaries({"from": st.sampled_from([*SPEAKERS, "bot"]), "value": TEXTS})
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from([*ROLES, "bot"])},
    optional={
        "content": TEXTS | PARTS,
        "weight": JUNK,
        "tool_calls": st.lists(JUNK, max_size=1),
    },
)
COLUMN_VALUES = {
    **dict.fromkeys(("instruction", "input", "output", "system", "prompt", "completion"), TEXTS),
    **dict.fromkeys(("text", "chosen", "rejected", "label"), TEXTS),
    "history": JUNK | st.lists(st.lists(TEXTS, max_size=3), max_size=2),
    "messages": JUNK | st.lists(MESSAGES | JUNK, max_size=3),
    "conversations": JUNK | st.lists(TURNS | JUNK, max_size=3),
    "tools": JUNK | st.sampled_from(["[]", "[{}]", "{", "{}"]) | st.lists(JUNK, max_size=1),
}


@given(st.fixed_dictionaries({}, optional=COLUMN_VALUES) | JUNK)
def test_a_row_is_accepted_for_training_exactly_if_the_runner_reads_it(row: Any) -> None:
    try:
        accepted = check_row(row).kind in ANSWERS
    except InputError:
        accepted = False
    with tempfile.NamedTemporaryFile("w") as file:
        json.dump([row], file)
        file.flush()
        if not accepted:
            with pytest.raises(BadData):
                read_conversations(Path(file.name))
            return
        (read,) = read_conversations(Path(file.name))
    assert all(isinstance(message["content"], str) for message in read.messages)
    assert read.messages[-1]["role"] == "assistant"


@pytest.mark.parametrize(
    "content",
    ["a?\nb?\n", '["a?", "b?"]', '{"prompt": "a?"}\n{"prompt": "b?"}', '"a?"\n"b?"',
     "[INST] a?\n[INST] b?", "{name}, a?\nb?", "\ufeffa?\r\n\r\nb?"],
)  # fmt: skip
def test_prompts_are_told_from_json_as_the_runner_tells_them(tmp_path: Path, content: str) -> None:
    found = report(tmp_path, content, purpose="prompts")
    assert (found["ok"], found["rows"], found["rows_kind"]) == (True, 2, "prompts"), found
    assert len(read_prompts(tmp_path / "data")) == 2


PROMPT_VALUES = {
    "prompt": JUNK | st.sampled_from(["a?", "  "]),
    "messages": JUNK
    | st.lists(
        st.fixed_dictionaries(
            {}, optional={"role": st.sampled_from(["user", "assistant", "x"]), "content": JUNK}
        ),
        max_size=2,
    ),
}


@given(st.fixed_dictionaries({}, optional=PROMPT_VALUES) | JUNK)
def test_a_prompt_is_accepted_exactly_if_the_runner_reads_it(prompt: Any) -> None:
    try:
        check_prompt(prompt)
    except InputError:
        with pytest.raises(BadData):
            prompts_of([(1, prompt)])
        return
    (read,) = prompts_of([(1, prompt)])
    given_messages = isinstance(prompt, dict) and "messages" in prompt
    assert list(read.messages) == (
        prompt["messages"]
        if given_messages
        else [{"role": "user", "content": prompt["prompt"] if isinstance(prompt, dict) else prompt}]
    )


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ('{"question": "a"}', "missing_column"),
        ('{"instruction": "a"}', "missing_column"),
        ('{"prompt": " "}', "empty_prompt"),
        ('{"prompt": 3}', "wrong_type"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "bad_turns"),
        ('{"prompt": "a"}\nb?', "bad_line"),
        ("", "dataset_empty"),
        ("a\x00b", "wrong_format"),
    ],
)
def test_prompts_that_are_none_are_refused(tmp_path: Path, content: str, code: str) -> None:
    (first, *_) = report(tmp_path, content, purpose="prompts")["problems"]
    assert (first["code"], bool(first["hint"])) == (code, True), first


def test_characters_split_between_two_pieces_of_an_array_are_whole(tmp_path: Path) -> None:
    rows = [{"instruction": "é" * 997 + str(i), "output": "你好"} for i in range(1500)]
    found = report(tmp_path, json.dumps(rows, ensure_ascii=False))
    assert (found["ok"], found["rows"]) == (True, 1500)


def test_a_check_that_takes_too_long_is_a_report_as_well(tmp_path: Path) -> None:
    (tmp_path / "data").write_text(ROW)
    found = check_file(tmp_path / "data", timeout_s=0.0001)
    assert found["problems"][0]["code"] == "check_failed"


def test_a_child_that_dies_is_a_report_with_all_its_names(tmp_path: Path) -> None:
    (tmp_path / "data").write_text(ROW)
    found = check_file(tmp_path / "data", memory_bytes=1024**2)
    assert found["problems"][0]["code"] == "check_failed"
    assert found.keys() == report_on(tmp_path / "data", purpose="dataset").keys()


FACTS = {
    "linear_modules": ["q_proj", "v_proj"],
    "linear_paths": ["model.layers.self_attn.q_proj", "model.layers.self_attn.v_proj"],
    "modules": ["embed_tokens", "lm_head", "q_proj", "v_proj"],
    "max_position_embeddings": 128,
    "layers": 2,
    "has_chat_template": True,
}
PLAIN = FACTS | {"has_chat_template": False}
GOOD = {"kinds": {"alpaca": {"rows": 10, "line": 1}}, "rows_kind": "alpaca", "rows": 10}
MIXED = {"kinds": {"alpaca": {"rows": 9}, "preference": {"rows": 1, "line": 7}}, "rows": 10}


FULL = {"finetuning_type": "full"}


def finetune(changes: dict[str, Any]) -> FinetuneSpec:
    spec, _ = read_spec({"kind": "finetune", "model": "m", "dataset": "d"} | changes)
    assert isinstance(spec, FinetuneSpec)
    return spec


@pytest.mark.parametrize(
    ("changes", "report_", "facts", "code"),
    [
        ({"lora_target": "q_porj"}, GOOD, FACTS, "no_module_matches"),
        ({"lora_target": "q_proj, v_porj"}, GOOD, FACTS, "no_module_matches"),
        ({"lora_target": ["lm_head"]}, GOOD, FACTS, "no_module_matches"),
        ({"lora_target": "(a+)+$"}, GOOD, FACTS, "no_module_matches"),
        ({"additional_target": "embed_token"}, GOOD, FACTS, "no_module_matches"),
        ({"cutoff_len": 999}, GOOD, FACTS, "too_long"),
        (
            {"finetuning_type": "prefix", "num_virtual_tokens": 20, "cutoff_len": 120},
            GOOD,
            FACTS,
            "too_long",
        ),
        ({"layers_to_transform": [2]}, GOOD, FACTS, "out_of_range"),
        (
            {"finetuning_type": "freeze", "freeze_trainable_layers": 3},
            GOOD,
            FACTS,
            "out_of_range",
        ),
        (FULL | {"use_galore": True, "galore_target": "mlp,up"}, GOOD, FACTS, "no_module_matches"),
        (FULL | {"use_apollo": True, "apollo_target": "q_porj"}, GOOD, FACTS, "no_module_matches"),
        (
            FULL | {"optim": "galore_adamw", "optim_target_modules": "mlp"},
            GOOD,
            FACTS,
            "no_module_matches",
        ),
        (FULL | {"use_badam": True, "badam_start_block": 2}, GOOD, FACTS, "out_of_range"),
        ({}, GOOD, PLAIN, "no_template"),
        ({"template": "glm4"}, GOOD, PLAIN, "unknown_template"),
        ({"val_size": 0.01}, GOOD, FACTS, "too_few_rows"),
        ({"val_size": 10}, GOOD, FACTS, "too_few_rows"),
        ({"val_size": 5, "max_samples": 5}, GOOD, FACTS, "too_few_rows"),
        ({}, {"rows_kind": "prompts", "rows": 3}, FACTS, "wrong_dataset_kind"),
        ({}, MIXED, FACTS, "wrong_dataset_kind"),
    ],
)
def test_what_data_and_model_rule_out_is_refused_at_submission(
    changes: dict[str, Any], report_: dict[str, Any], facts: dict[str, Any], code: str
) -> None:
    assert [p.code for p in check_finetune(finetune(changes), report_, facts)] == [code]


GRPO = {
    "stage": "grpo",
    "reward_funcs": ["format", "exact_match"],
    "max_completion_length": 64,
}
SFT = {"stage": "sft", "reward_funcs": None, "max_completion_length": None}
ASKED = {"kinds": {"question": {"rows": 10, "line": 1}}, "rows_kind": "question", "rows": 10}


@pytest.mark.parametrize(
    ("changes", "columns", "said"),
    [
        ({}, {"gold": 10}, "reads the column 'answer', which no row has"),
        ({}, {"answer": 9, "gold": 10}, "reads the column 'answer', which 9 of 10 rows have"),
        ({"reward_funcs": ["contains"]}, {}, "which no row has"),
        ({"max_completion_length": 128}, {"answer": 10}, "leaves no room for questions"),
        (SFT, {}, "holds a question row, and stage sft needs"),
    ],
)
def test_questions_that_no_reward_can_judge_are_refused(
    changes: dict[str, Any], columns: dict[str, int], said: str
) -> None:
    (found,) = check_finetune(finetune(GRPO | changes), ASKED | {"columns": columns}, FACTS)
    assert said in found.message
    assert found.hint


def test_what_rewards_may_read_is_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "1 + 1?", "answer": "2", "level": 3},
        {"instruction": "Say hi", "output": "hi"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}], "gold": "b", "tags": ["x"]},
    ]
    found = report(tmp_path, "\n".join(map(json.dumps, rows)))
    assert found["ok"], found
    assert found["columns"] == {"answer": 3, "level": 1, "output": 1, "gold": 1}
    assert found["kinds"]["question"] == {"rows": 2, "line": 1}
    fits = ASKED | {"kinds": found["kinds"], "rows": 4, "columns": {"answer": 4}}
    assert check_finetune(finetune(GRPO), fits, FACTS) == []


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({}, FACTS),
        ({"lora_target": "q_proj,model.layers.0.v_proj"}, FACTS),
        ({"lora_target": "all-linear", "additional_target": ["lm_head"]}, FACTS),
        (FULL | {"use_galore": True, "galore_target": "mlp,attn"}, FACTS),
        (FULL | {"use_apollo": True, "apollo_target": "layers.1.mlp"}, FACTS),
        (FULL | {"optim": "galore_adamw", "optim_target_modules": r".*\.mlp\..*"}, FACTS),
        (FULL | {"use_badam": True, "badam_start_block": 1}, FACTS),
        ({"template": "glm4"}, FACTS),
        ({"template": "llama3"}, PLAIN),
        ({"template": "chatml"}, PLAIN),
        ({"template": "{{ messages }}"}, PLAIN),
        ({"layers_to_transform": [0, 1], "val_size": 0.1, "cutoff_len": 128}, FACTS),
    ],
)
def test_what_can_work_is_let_through(changes: dict[str, Any], facts: dict[str, Any]) -> None:
    assert check_finetune(finetune(changes), GOOD, facts, eval_report=GOOD) == []


def test_answers_without_labels_are_told_what_a_label_is() -> None:
    (found,) = check_finetune(finetune({"stage": "kto"}), GOOD, FACTS)
    assert (found.code, found.field) == ("wrong_dataset_kind", "dataset")
    assert "kto_tag or label, true or false" in (found.hint or "")


def test_a_model_without_a_scoring_head_is_no_judge() -> None:
    asked = finetune({"stage": "grpo", "reward_model": "m", "max_completion_length": 8})
    (found,) = check_finetune(asked, None, None, judge={"scores": False})
    assert (found.field, found.code) == ("reward_model", "unfit_model")
    assert check_finetune(asked, None, None, judge={"scores": True}) == []


def test_the_first_row_of_another_form_is_named() -> None:
    (found,) = check_finetune(finetune({}), MIXED, None)
    assert (found.line, found.field) == (7, "dataset")
    (found,) = check_finetune(finetune({}), GOOD, None, eval_report=MIXED)
    assert found.field == "eval_dataset"


def test_an_answer_is_shorter_than_the_model_is_long() -> None:
    asked = {"kind": "inference", "model": "m", "prompts": ["a"]}
    for tokens, codes in ((128, ["too_long"]), (127, []), (None, [])):
        spec, _ = read_spec(asked | {"max_new_tokens": tokens})
        assert isinstance(spec, InferenceSpec)
        assert [p.code for p in check_inference(spec, FACTS)] == codes
        assert check_inference(spec, None) == []


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_a_column_that_is_given_twice_is_refused_by_line_here_and_in_the_runner(
    tmp_path: Path, form: str
) -> None:
    good, twice = (
        '{"instruction": "a", "output": "b"}',
        '{"instruction": "a", "output": "b", "output": "c"}',
    )
    path = tmp_path / f"rows.{form}"
    path.write_text(f"{good}\n{twice}\n" if form == "jsonl" else f"[{good},\n{twice}]")
    (found,) = report_on(path, purpose="dataset")["problems"]
    assert (found["line"], found["hint"]) == (2, "keep one of them")
    assert "'output' is given twice" in found["message"]
    with pytest.raises(BadData, match="'output' is given twice") as refused:
        read_conversations(path)
    assert refused.value.line == 2


def test_a_row_of_another_kind_is_told_in_a_sentence() -> None:
    (found,) = check_finetune(finetune({"stage": "dpo"}), GOOD, FACTS)
    assert found.message.startswith("Line 1 holds an alpaca row, and stage dpo needs")


def test_a_file_of_rows_is_no_file_of_prompts() -> None:
    assert [p.code for p in check_prompts(GOOD)] == ["wrong_dataset_kind"]
    assert check_prompts({"rows_kind": "prompts"}) == []


def test_what_is_not_known_yet_is_not_judged() -> None:
    assert check_finetune(finetune({"cutoff_len": 10**6}), None, None) == []
