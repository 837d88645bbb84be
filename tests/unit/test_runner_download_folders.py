"""Downloads from the nodes' own folders and GGUF files, and data sets of several files."""

import json
import os

import pytest
from support.attempts_by_hand import run_here
from support.hub_files import ALPACA, CONFIG, WEIGHTS, a_model, weights

from tuneyard.runners.data_files import data_file
from tuneyard.runners.download import download
from tuneyard.runners.failures import BadSpec
from tuneyard.runners.listings import files_of_model
from tuneyard.runners.rows import read_conversations
from tuneyard.specs.exits import ExitCode
from tuneyard.store.folder import verify_folder


@pytest.fixture
def folder(tmp_path):
    """A model below an allowed root."""
    made = tmp_path / "mnt" / "my-llama"
    for name, content in a_model().items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(content)
    return made


def from_node(tmp_path, path, **more):
    arguments = {"source": f"node:{path}", "node_roots": [str(tmp_path / "mnt")], **more}
    return run_here(tmp_path, download, kind="download", arguments=arguments)


def test_a_folder_of_the_nodes_is_copied(tmp_path, folder):
    ran = from_node(tmp_path, folder)
    assert ran.code == ExitCode.DONE
    manifest = verify_folder(ran.workdir / "output")
    assert WEIGHTS in {entry["path"] for entry in manifest["files"]}
    assert manifest["source"] == f"node:{folder}"
    # Its owner may write to it again: no link.
    assert not os.path.samefile(ran.workdir / "output" / WEIGHTS, folder / WEIGHTS)


def test_links_within_the_allowed_roots_are_followed(tmp_path, folder):
    blob = tmp_path / "mnt" / "blob"
    os.rename(folder / WEIGHTS, blob)
    (folder / WEIGHTS).symlink_to("../blob")
    assert from_node(tmp_path, folder).code == ExitCode.DONE


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "config.json").unlink() or (f / "config.json").symlink_to("/etc/passwd"),
         "config.json is a link that leads out of"),
        (lambda f: (f / WEIGHTS).unlink() or (f / WEIGHTS).symlink_to("nowhere"),
         "is a link that leads nowhere"),
        (lambda f: (f / WEIGHTS).unlink() or os.mkfifo(f / WEIGHTS), "is not a regular file"),
        (lambda f: (f / WEIGHTS).write_bytes(weights()[:-1]), "was it cut off?"),
        (lambda f: (f / WEIGHTS).write_bytes(b"\x80\x04pickle"), "cannot be used"),
        (lambda f: (f / WEIGHTS).unlink(), "has pickled weights alone (original/"),
        (lambda f: (f / "config.json").write_text(json.dumps(CONFIG | {"auto_map": {}})),
         "auto_map"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not readable"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"lost": 1}}'),
         "1 tensors of model.safetensors.index.json are missing, such as 'lost'"),
    ],
)  # fmt: skip
def test_hostile_and_broken_folders_are_refused_in_a_sentence(tmp_path, folder, spoil, said):
    spoil(folder)
    ran = from_node(tmp_path, folder)
    assert ran.code in (ExitCode.BAD_SPEC, ExitCode.INPUT_GONE)
    assert said in ran.failure["evidence"]
    assert not (ran.workdir / "output").exists()


def test_a_path_that_leads_out_of_the_roots_is_refused(tmp_path, folder):
    (tmp_path / "mnt" / "out").symlink_to("/etc")
    for path in (tmp_path / "mnt" / "out", tmp_path, tmp_path / "mnt" / "out" / "ssl"):
        ran = from_node(tmp_path, path)
        assert ran.code == ExitCode.BAD_SPEC
        assert "does not lie below an allowed root" in ran.failure["evidence"]
    gone = from_node(tmp_path, tmp_path / "mnt" / "nothing")
    assert gone.code == ExitCode.INPUT_GONE


@pytest.mark.parametrize(
    "content",
    [b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, b"no"],
    ids=["cut", "huge", "short"],
)
def test_a_broken_gguf_file_is_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "mnt").mkdir()
    (tmp_path / "mnt" / "x.gguf").write_bytes(content)
    ran = from_node(tmp_path, tmp_path / "mnt" / "x.gguf")
    assert ran.code == ExitCode.BAD_SPEC
    assert "x.gguf cannot be read as a GGUF model" in ran.failure["evidence"]


def test_only_the_models_own_weights_are_wanted():
    names = [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "consolidated.safetensors", "model.fp16.safetensors", "config.json", "merges.txt",
        "additional_chat_templates/tool.jinja", "vae/model.safetensors", "modeling.py", "x.onnx",
    ]  # fmt: skip
    assert files_of_model(names, shown="x") == [
        "additional_chat_templates/tool.jinja", "config.json", "merges.txt",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip


def test_a_data_file_is_picked_or_what_there_is_is_listed(tmp_path):
    rows = tmp_path / "mnt" / "rows"
    rows.mkdir(parents=True)
    (rows / "a.json").write_bytes(ALPACA)
    (rows / "b.csv").write_text('instruction,output\n"What,\nthen?",That.\n')
    ran = from_node(tmp_path, rows, what="dataset")
    assert ran.code == ExitCode.DONE
    output = ran.workdir / "output"
    assert data_file(rows / "a.json", None) == rows / "a.json"
    (read,) = read_conversations(data_file(output, "b.csv"))
    assert [m["content"] for m in read.messages] == ["What,\nthen?", "That."]
    for picked in (None, "c.json"):
        with pytest.raises(BadSpec) as refused:
            data_file(output, picked)
        assert refused.value.hint == "set data_file to one of: a.json, b.csv"
    one = from_node(tmp_path, rows / "a.json", what="dataset")
    assert data_file(one.workdir / "output", None).name == "a.json"
