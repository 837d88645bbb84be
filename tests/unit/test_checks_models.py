"""What a model folder says about itself, and what in it is refused, by content."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from tuneyard.checks.models import model_facts
from tuneyard.specs.errors import InputError
from tuneyard.store.safetensors import read_header


def a_model(
    folder: Path, *, config: dict[str, Any] | None = None, weights: bytes | None = None
) -> Path:
    folder.mkdir()
    basics = {"model_type": "llama", "num_hidden_layers": 2, "max_position_embeddings": 128}
    (folder / "config.json").write_text(json.dumps(basics | (config or {})))
    (folder / "model.safetensors").write_bytes(safetensors() if weights is None else weights)
    return folder


LAYER = "model.layers.0.self_attn.q_proj.weight"


def safetensors(name: str = LAYER, **changes: Any) -> bytes:
    tensor = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes
    header = json.dumps({name: tensor}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(16)


def test_a_models_facts_come_from_its_headers(tmp_path: Path) -> None:
    facts = model_facts(a_model(tmp_path / "m"))
    assert facts["linear_modules"] == ["q_proj"]
    assert facts["linear_paths"] == ["model.layers.self_attn.q_proj"]
    assert (facts["layers"], facts["parameters"], facts["scores"]) == (2, 4, False)


@pytest.mark.parametrize("name", ["score.weight", "model.score.weight", "v_head.summary.weight"])
def test_a_head_that_scores_is_seen(tmp_path: Path, name: str) -> None:
    folder = a_model(tmp_path / "m")
    (folder / "head.safetensors").write_bytes(safetensors(name))
    assert model_facts(folder)["scores"]


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
        (None, b"PK\x03\x04zip", "unsafe_format"),
        (None, b"\x80\x03pickle", "unsafe_format"),
        (None, struct.pack("<Q", 2) + b"[]", "bad_safetensors"),
        (None, struct.pack("<Q", 9000) + b"[" * 9000, "bad_safetensors"),
        (None, safetensors(data_offsets=["0", 16]), "bad_safetensors"),
        (None, safetensors(data_offsets=[0, 16, 32]), "bad_safetensors"),
        (None, safetensors(data_offsets=None), "bad_safetensors"),
        (None, safetensors(dtype=[]), "bad_safetensors"),
        (None, safetensors(shape=[True, 4]), "bad_safetensors"),
        (None, safetensors(shape="22"), "bad_safetensors"),
        (None, safetensors()[:-1], "bad_safetensors"),
        (None, safetensors() + b"more", "bad_safetensors"),
        ({"num_hidden_layers": 10**6}, None, "too_large"),
        ({"num_hidden_layers": "many"}, None, "bad_config"),
        ({"max_position_embeddings": True}, None, "bad_config"),
        ({"text_config": {"a": [{"auto_map": 1}]}}, None, "remote_code_forbidden"),
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


def test_an_overlap_a_hole_and_a_cut_name_their_tensor(tmp_path: Path) -> None:
    for second, reason in (([3, 7], "overlaps"), ([5, 9], "hole"), ([4, 12], "cut off")):
        tensors = {
            "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
            "b": {"dtype": "U8", "shape": [second[1] - second[0]], "data_offsets": second},
        }
        header = json.dumps(tensors).encode()
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(9))
        with pytest.raises(InputError, match=f"tensor 'b' .*{reason}"):
            read_header(path)


def test_a_header_of_101_mib_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 101 * 1024**2))
        file.truncate(102 * 1024**2)
    with pytest.raises(InputError, match="larger than 100 MiB"):
        read_header(path)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "x.pt", "x.ckpt"])
def test_weights_that_are_pickles_by_name_are_refused(tmp_path: Path, name: str) -> None:
    folder = a_model(tmp_path / "m")
    (folder / name).write_bytes(b"whatever")
    with pytest.raises(InputError, match="pickle"):
        model_facts(folder)


def test_pipes_and_links_to_folders_are_refused_below_as_well(tmp_path: Path) -> None:
    folder = a_model(tmp_path / "m")
    (folder / "below").mkdir()
    assert model_facts(folder)["layers"] == 2
    os.mkfifo(folder / "below" / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        model_facts(folder)
    (folder / "below" / "pipe").unlink()
    (folder / "below" / "loop").symlink_to(folder)
    with pytest.raises(InputError, match="not a regular file"):
        model_facts(folder)


def test_a_missing_shard_is_found_by_the_index(tmp_path: Path) -> None:
    folder = a_model(tmp_path / "m")
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="1 tensors of the index are missing"):
        model_facts(folder)


def test_a_chat_template_is_found_wherever_it_stands(tmp_path: Path) -> None:
    for number, name in enumerate(("chat_template.jinja", "tokenizer_config.json")):
        folder = a_model(tmp_path / str(number))
        assert model_facts(folder)["has_chat_template"] is False
        (folder / name).write_text('{"chat_template": "{{ messages }}"}')
        assert model_facts(folder)["has_chat_template"] is True


def test_a_tokenizer_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = a_model(tmp_path / "m")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "x.Y"}}')
    with pytest.raises(InputError, match="code of its own"):
        model_facts(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    folder = a_model(tmp_path / "m")
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError) as refused:
        model_facts(folder)
    assert refused.value.code == "bad_config"
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        model_facts(folder)
