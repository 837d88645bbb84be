"""LLaMA-Factory's template names write what it writes; make compare-llamafactory asks it itself."""

import json

import pytest
from support.breaks import DOCS
from support.tiny_models import a_tiny_base

from tuneyard.runners.base_model import load_tokenizer
from tuneyard.runners.chat import Chat, chat_of
from tuneyard.runners.examples import IGNORED, Cutting, Example, encode
from tuneyard.runners.failures import BadData, BadSpec
from tuneyard.runners.layouts import LAYOUTS, SEAM
from tuneyard.runners.rows import read_conversations

TOOL = {
    "name": "search",
    "description": "Search recipes",
    "parameters": {
        "type": "object",
        "properties": {
            "items": {"type": "array", "items": {"type": "string"}, "description": "What there is"},
            "kind": {"type": "string", "enum": ["soup", "cake"], "description": "Of what kind"},
        },
        "required": ["items"],
    },
}
CALLED = {
    "conversations": [
        {"from": "human", "value": "I have eggs."},
        {"from": "function_call", "value": '{"name": "search", "arguments": {"items": ["egg"]}}'},
        {"from": "observation", "value": '["omelette"]'},
        {"from": "gpt", "value": "An omelette."},
    ],
    "tools": json.dumps([TOOL]),
}
ASKED = {"instruction": "Who?", "output": "I.", "history": [["Hello", "Hi."]]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(a_tiny_base(tmp_path_factory.mktemp("base")))


def chat(tokenizer, template: str, **more) -> Chat:
    return chat_of(tokenizer, template=template, **{"default_system": None} | more)


def encoded(tmp_path, chat: Chat, row, **cutting) -> Example:
    path = tmp_path / "row.jsonl"
    path.write_text(json.dumps(row))
    (example,) = encode(read_conversations(path), chat, Cutting(**cutting)).examples
    assert isinstance(example, Example)
    return example


def texts(chat: Chat, example: Example) -> tuple[str, str]:
    """The whole, and what is learned."""
    learned = [i for i in example.labels if i != IGNORED]
    decode = chat.tokenizer.decode
    return decode(example.ids), decode(learned)


def test_all_that_closes_an_answer_is_learned_under_llama_factorys_names(tmp_path, tokenizer):
    speaking = chat(tokenizer, "chatml")
    whole, learned = texts(speaking, encoded(tmp_path, speaking, ASKED))
    assert whole == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nI.<|im_end|>\n"
    )
    assert learned == "Hi.<|im_end|>\nI.<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "whole"),
    [
        ("vicuna", "ns.USER: Hello ASSISTANT:Hi.<|im_end|>USER: Who? ASSISTANT:I.<|im_end|>"),
        ("llama2", "[INST] Hello [/INST]Hi.<|im_end|>[INST] Who? [/INST]I.<|im_end|>"),
        ("mistral", "[INST] Hello[/INST] Hi.<|im_end|>[INST] Who?[/INST] I.<|im_end|>"),
        ("default", "Human: Hello<|im_end|>\nAssistant:Hi.<|im_end|>\nHuman: Who?<|im_end|>\n"
         "Assistant:I.<|im_end|>\n"),
        ("qwen3", "assistant\n<think>\n\n</think>\n\nHi.<|im_end|>\n"
         "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nI.<|im_end|>\n"),
    ],
)  # fmt: skip
def test_layouts_write_turns_as_llama_factory_does(tmp_path, tokenizer, template, whole):
    speaking = chat(tokenizer, template)
    assert texts(speaking, encoded(tmp_path, speaking, ASKED))[0].endswith(whole)


def test_a_layouts_default_system_yields_to_the_specs_and_to_the_rows(tmp_path, tokenizer):
    def leads(row, **more) -> str:
        speaking = chat(tokenizer, "smollm2", **more)
        return texts(speaking, encoded(tmp_path, speaking, row))[0].partition("<|im_end|>")[0]

    assert leads(ASKED).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"
    )
    assert leads(ASKED, default_system="Be brief.") == "<|im_start|>system\nBe brief."
    assert leads(ASKED | {"system": "Be long."}, default_system="x").endswith("\nBe long.")
    assert leads(ASKED, default_system="") == "<|im_start|>user\nHello"


def test_a_system_message_is_part_of_the_first_question_where_the_layout_says_so(
    tmp_path, tokenizer
):
    speaking = chat(tokenizer, "gemma")
    whole, _ = texts(speaking, encoded(tmp_path, speaking, ASKED | {"system": "Be kind."}))
    assert whole.count("Be kind.") == 1
    assert "<start_of_turn>user\nBe kind.\n\nHello<end_of_turn>\n" in whole


def test_functions_are_listed_called_and_answered_in_llama_factorys_default_form(
    tmp_path, tokenizer
):
    speaking = chat(tokenizer, "chatml")
    whole, learned = texts(speaking, encoded(tmp_path, speaking, CALLED))
    assert whole == (
        "<|im_start|>system\nYou have access to the following tools:\n"
        "> Tool Name: search\nTool Description: Search recipes\nTool Args:\n"
        "  - items (array, required): What there is, where each item should be string\n"
        "  - kind (string): Of what kind, should be one of [soup, cake]\n\n"
        "Use the following format if using a tool:\n```\n"
        "Action: tool name (one of [search])\n"
        "Action Input: the input to the tool, in a JSON format representing the kwargs "
        '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n<|im_end|>\n'
        "<|im_start|>user\nI have eggs.<|im_end|>\n<|im_start|>assistant\n"
        'Action: search\nAction Input: {"items": ["egg"]}<|im_end|>\n'
        '<|im_start|>tool\n["omelette"]<|im_end|>\n<|im_start|>assistant\nAn omelette.<|im_end|>\n'
    )
    assert learned.startswith('Action: search\nAction Input: {"items": ["egg"]}<|im_end|>\n')


def test_functions_go_into_json_in_qwens_form(tmp_path, tokenizer):
    speaking = chat(tokenizer, "qwen")
    whole, learned = texts(speaking, encoded(tmp_path, speaking, CALLED))
    assert json.dumps({"type": "function", "function": TOOL}) in whole
    call = '{"name": "search", "arguments": {"items": ["egg"]}}'
    assert learned.startswith(f"<tool_call>\n{call}\n</tool_call><|im_end|>\n")
    assert '<|im_start|>user\n<tool_response>\n["omelette"]\n</tool_response><|im_end|>\n' in whole


def test_an_empty_list_of_functions_leaves_an_empty_system_message_as_there(tmp_path, tokenizer):
    speaking = chat(tokenizer, "chatml")
    asked = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    for tools, leads in (("[]", True), ("", False)):
        example = encoded(tmp_path, speaking, {"conversations": asked, "tools": tools})
        begin = texts(speaking, example)[0]
        assert begin.startswith("<|im_start|>system\n<|im_end|>\n") == leads


def test_a_template_that_leaves_calls_out_is_refused_rather_than_learned_empty(tmp_path, tokenizer):
    own = chat_of(tokenizer, template=None, default_system=None)
    with pytest.raises(BadSpec, match="Line 1 calls a function"):
        encoded(tmp_path, own, CALLED)
    with pytest.raises(BadData, match="writes no functions"):
        encoded(tmp_path, chat(tokenizer, "llama3"), CALLED)


@pytest.mark.parametrize("value", ["search()", '{"name": "search"}', '["search"]', "7"])
def test_a_call_that_is_no_json_is_refused_with_its_place(tmp_path, tokenizer, value):
    row = json.loads(json.dumps(CALLED))
    row["conversations"][1]["value"] = value
    with pytest.raises(BadData) as caught:
        encoded(tmp_path, chat(tokenizer, "chatml"), row)
    assert caught.value.field == "conversations[1].value"


def test_the_documentation_lists_the_layouts():
    page = DOCS.read_text(encoding="utf-8")
    listed = page.partition("included. The template goes")[2].split("```")[1]
    assert listed.removeprefix("text").replace(",", " ").split() == sorted(LAYOUTS)


def test_seams_are_in_no_text_that_is_kept(tokenizer):
    for name in LAYOUTS:
        speaking = chat(tokenizer, name)
        said = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
        said += [{"role": "assistant", "content": "a"}]
        plain, seamed = speaking.render(said), speaking.render(said, seams=True)
        assert SEAM not in plain
        assert seamed.replace(SEAM, "") == plain
        assert SEAM not in speaking.template
        assert json.dumps(SEAM) not in speaking.template
