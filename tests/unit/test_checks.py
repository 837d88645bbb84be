"""Checks of data files and model folders: the line, the reason, the mend; flat memory."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from tuneyard.checks.limits import check_file
from tuneyard.checks.models import model_facts, read_header
from tuneyard.checks.report import report_on
from tuneyard.checks.submission import check_finetune
from tuneyard.specs.errors import InputError
from tuneyard.specs.finetune import FinetuneSpec
from tuneyard.specs.jobs import read_spec

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
        (b"a,b,c\n1,2,3\n", "wrong_format", 1),
        (b"PK\x03\x04rest", "wrong_format", None),
        (b"\x80\x04rest", "wrong_format", None),
        (b"PAR1rest", "wrong_format", None),
        ("x".encode("utf-16"), "wrong_format", None),
        (f"{ROW}\n{{broken".encode(), "bad_line", 2),
        (f"{ROW}\n".encode() + b'{"instruction": "\xc4", "output": "b"}', "not_utf8", 2),
        (f"[{ROW}\n{ROW}]".encode(), "bad_line", 2),
        (f"[{ROW}".encode(), "bad_line", 1),
        (f"[{ROW}] x".encode(), "bad_line", 1),
        (b'{"promt": "a", "output": "b"}', "missing_column", 1),
        (b'{"instruction": "a"}', "missing_column", 1),
        (b'{"instruction": null, "output": "b"}', "wrong_type", 1),
        (b'{"instruction": "a", "output": 3}', "wrong_type", 1),
        (b'{"instruction": "a", "output": " "}', "no_trainable_tokens", 1),
        (b'{"messages": []}', "wrong_type", 1),
        (b'{"messages": [{"role": "bot", "content": "a"}]}', "unknown_role", 1),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "no_trainable_tokens", 1),
        (b'{"conversations": [{"value": "a"}]}', "missing_column", 1),
        (b"{}\n[1]", "missing_column", 1),
    ],
)
def test_a_bad_file_is_refused_with_its_line(
    tmp_path: Path, content: bytes, code: str, line: int | None
) -> None:
    found = report(tmp_path, content)
    first = found["problems"][0]
    assert (found["ok"], first["code"], first["line"]) == (False, code, line), first


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
        file.write(b'{"instruction": "')
        file.truncate(200 * 1024**2)
    found = check_file(path, memory_bytes=150 * 1024**2)
    assert found["problems"][0]["code"] == "line_too_long"


def test_characters_split_between_two_pieces_of_an_array_are_whole(tmp_path: Path) -> None:
    rows = [{"instruction": "é" * 997 + str(i), "output": "你好"} for i in range(1500)]
    found = report(tmp_path, json.dumps(rows, ensure_ascii=False))
    assert (found["ok"], found["rows"]) == (True, 1500)


def test_prompts_are_texts_or_messages(tmp_path: Path) -> None:
    assert report(tmp_path, "a?\nb?\n", purpose="prompts")["rows"] == 2
    assert report(tmp_path, '{"prompt": "a"}\n', purpose="prompts")["ok"]
    assert not report(tmp_path, '{"question": "a"}\n', purpose="prompts")["ok"]


def test_a_check_that_takes_too_long_is_a_report_as_well(tmp_path: Path) -> None:
    (tmp_path / "data").write_text(ROW)
    found = check_file(tmp_path / "data", timeout_s=0.0001)
    assert found["problems"][0]["code"] == "check_failed"


def a_model(
    folder: Path, *, config: dict[str, Any] | None = None, weights: bytes | None = None
) -> Path:
    folder.mkdir()
    basics = {"model_type": "llama", "num_hidden_layers": 2, "max_position_embeddings": 128}
    (folder / "config.json").write_text(json.dumps(basics | (config or {})))
    (folder / "model.safetensors").write_bytes(safetensors() if weights is None else weights)
    return folder


def safetensors(**changes: Any) -> bytes:
    tensor = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes
    header = json.dumps({"model.layers.0.self_attn.q_proj.weight": tensor}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(16)


def test_a_models_facts_come_from_its_headers(tmp_path: Path) -> None:
    facts = model_facts(a_model(tmp_path / "m"))
    assert facts["linear_modules"] == ["q_proj"]
    assert (facts["layers"], facts["parameters"]) == (2, 4)


@pytest.mark.parametrize(
    ("config", "weights", "code"),
    [
        ({"auto_map": {}}, None, "remote_code_forbidden"),
        ({"text_config": {"_attn_implementation_internal": "x"}}, None, "remote_code_forbidden"),
        (None, b"\x80\x04pickle", "unsafe_format"),
        (None, struct.pack("<Q", 2**63) + b"{}", "bad_safetensors"),
        (None, struct.pack("<Q", 2) + b"{", "bad_safetensors"),
        (None, safetensors(dtype="F33"), "bad_safetensors"),
        (None, safetensors(shape=[9, 9]), "bad_safetensors"),
        (None, safetensors(data_offsets=[0, 999]), "bad_safetensors"),
        (None, safetensors(shape=[-1, 2]), "bad_safetensors"),
        (None, b"", "bad_safetensors"),
    ],
)
def test_a_hostile_model_folder_is_refused(
    tmp_path: Path, config: dict[str, Any] | None, weights: bytes | None, code: str
) -> None:
    with pytest.raises(InputError) as refused:
        model_facts(a_model(tmp_path / "m", config=config, weights=weights))
    assert refused.value.code == code


def test_a_link_in_a_model_folder_is_refused(tmp_path: Path) -> None:
    folder = a_model(tmp_path / "m")
    (folder / "extra.json").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="not a regular file"):
        model_facts(folder)


def test_a_name_given_twice_in_a_header_is_refused(tmp_path: Path) -> None:
    header = b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": {}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"0")
    with pytest.raises(InputError, match="given twice"):
        read_header(path)


FACTS = {
    "linear_modules": ["q_proj", "v_proj"],
    "max_position_embeddings": 128,
    "layers": 2,
    "has_chat_template": True,
}
GOOD = {"rows_kind": "alpaca", "rows": 10}


@pytest.mark.parametrize(
    ("changes", "report_", "facts", "code"),
    [
        ({"lora_target": "q_porj"}, GOOD, FACTS, "no_module_matches"),
        ({"cutoff_len": 999}, GOOD, FACTS, "too_long"),
        ({"layers_to_transform": [2]}, GOOD, FACTS, "out_of_range"),
        ({}, GOOD, FACTS | {"has_chat_template": False}, "no_template"),
        ({"val_size": 0.01}, GOOD, FACTS, "too_few_rows"),
        ({"val_size": 10}, GOOD, FACTS, "too_few_rows"),
        ({}, {"rows_kind": "prompts", "rows": 3}, FACTS, "wrong_dataset_kind"),
    ],
)
def test_what_data_and_model_rule_out_is_refused_at_submission(
    changes: dict[str, Any], report_: dict[str, Any], facts: dict[str, Any], code: str
) -> None:
    document = {"kind": "finetune", "model": "m", "dataset": "d"} | changes
    spec, _ = read_spec(document)
    assert isinstance(spec, FinetuneSpec)
    assert [p.code for p in check_finetune(spec, report_, facts)] == [code]


def test_what_is_not_known_yet_is_not_judged() -> None:
    spec, _ = read_spec({"kind": "finetune", "model": "m", "dataset": "d", "cutoff_len": 10**6})
    assert isinstance(spec, FinetuneSpec)
    assert check_finetune(spec, None, None) == []
