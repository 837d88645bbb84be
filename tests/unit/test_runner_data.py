"""Rows, templates, tokens and labels."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import CHATML, LLAMA, a_tiny_base

from tuneyard.runners.base_model import load_tokenizer, read_config
from tuneyard.runners.batches import Order, collate, split, steps_of
from tuneyard.runners.chat import Chat, chat_of
from tuneyard.runners.examples import IGNORED, Cutting, Example, cut, encode, share
from tuneyard.runners.failures import BadData, BadSpec, InputGone
from tuneyard.runners.prompts import read_prompts
from tuneyard.runners.rows import Conversation, read_conversations

ALPACA = {"instruction": "Say hi", "input": "now", "output": "hi"}


@pytest.fixture(scope="module")
def chatml(tmp_path_factory) -> Chat:
    folder = a_tiny_base(tmp_path_factory.mktemp("chatml"))
    return chat_of(load_tokenizer(folder), template=None, default_system=None)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Chat:
    folder = a_tiny_base(tmp_path_factory.mktemp("llama"), template=LLAMA)
    return chat_of(load_tokenizer(folder), template=None, default_system=None)


def text_of(chat: Chat, ids: list[int]) -> str:
    return chat.tokenizer.decode(ids, skip_special_tokens=False)


def targets_of(chat: Chat, example: Example) -> str:
    return text_of(chat, [i for i in example.labels if i != IGNORED])


def conversation(*turns: str, trained: tuple[bool, ...] | None = None) -> Conversation:
    messages = [
        {"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)
    ]
    return Conversation(messages, trained or (True,) * (len(turns) // 2), line=1)


def examples_of(chat: Chat, *conversations: Conversation, **cutting) -> list[Example]:
    return encode(conversations, chat, Cutting(**cutting)).examples


def written(tmp_path, text: str | bytes):
    path = tmp_path / "rows"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    "row",
    [
        ALPACA,
        {"messages": [
            {"role": "user", "content": [{"type": "text", "text": "Say hi\nnow"}]},
            {"role": "assistant", "content": "hi"},
        ]},
        {"conversations": [
            {"from": "human", "value": "Say hi\nnow"}, {"from": "gpt", "value": "hi"},
        ]},
    ],
)  # fmt: skip
def test_three_forms_of_a_row_say_the_same(tmp_path, row):
    (read,) = read_conversations(written(tmp_path, json.dumps(row)))
    assert [(m["role"], m["content"]) for m in read.messages] == [
        ("user", "Say hi\nnow"),
        ("assistant", "hi"),
    ]


def test_history_and_system_come_first(tmp_path):
    row = ALPACA | {"system": "Be kind.", "history": [["one", "two"]]}
    (read,) = read_conversations(written(tmp_path, json.dumps(row)))
    assert [m["content"] for m in read.messages] == ["Be kind.", "one", "two", "Say hi\nnow", "hi"]
    assert list(read.trained) == [True, True]


def test_bom_crlf_blank_lines_and_a_missing_newline_change_nothing(tmp_path):
    line = json.dumps(ALPACA)
    odd = b"\xef\xbb\xbf" + f"{line}\r\n\r\n  \r\n{line}".encode()
    assert read_conversations(written(tmp_path, odd)) == [
        *read_conversations(written(tmp_path, f"{line}\n")),
        *read_conversations(written(tmp_path, f"\n\n\n{line}\n")),
    ]


def test_placeholders_stay_as_they_are(tmp_path):
    row = ALPACA | {"output": "I am {{name}}."}
    (read,) = read_conversations(written(tmp_path, json.dumps(row)))
    assert read.messages[-1]["content"] == "I am {{name}}."


GOOD = json.dumps(ALPACA)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (f"{GOOD}\n{GOOD}\n{{broken\n", 3, "not JSON"),
        (f"[{GOOD},\n{GOOD},\n{{broken]", 3, "not JSON"),
        (f'[{GOOD},\n {{"instruction": 1, "output": ""}}]', 2, "instruction"),
        (f'{GOOD}\n{{"instruction": "a", "output": NaN}}', 2, "NaN"),
        (f'{GOOD}\n{{"promt": "a", "output": "b"}}', 2, "no column"),
        (f'{GOOD}\n{{"instruction": "a"}}', 2, "needs answers"),
        (f'{GOOD}\n{{"instruction": "a", "ouput": "b"}}', 2, "output"),
        (f"{GOOD}\n[1]\n", 2, "must be an object"),
        ('{"messages": [{"role": "user", "content": "a"}]}', 1, "needs answers"),
        ('{"messages": [{"role": "system", "content": "a"}]}', 1, "to learn from"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', 1, "role"),
        ('{"messages": [{"role": "user", "content": null}]}', 1, "must be a text"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', 1, "before anybody asked"),
        ('{"conversations": [{"from": "obs", "value": "a"}]}', 1, "'obs' is unknown"),
        ('{"instruction": "a", "output": "b", "history": [["c"]]}', 1, "history"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, text, line, said):
    with pytest.raises(BadData, match=said) as caught:
        read_conversations(written(tmp_path, text))
    assert caught.value.line == line


def test_what_is_not_utf8_is_named_by_its_line(tmp_path):
    with pytest.raises(BadData) as caught:
        read_conversations(written(tmp_path, GOOD.encode() + b"\n\xe9\n"))
    assert caught.value.line == 2


@pytest.mark.parametrize("text", ["", "\n\n", "[]", "[ ]"])
def test_an_empty_file_is_refused(tmp_path, text):
    with pytest.raises(BadData, match="no rows"):
        read_conversations(written(tmp_path, text))


def test_targets_are_the_answer_and_what_closes_it(chatml, llama):
    for chat, end in ((chatml, "<|im_end|>"), (llama, "<|eot|>")):
        (example,) = examples_of(chat, conversation("ask", "answer"))
        assert targets_of(chat, example) == f"answer{end}"
        assert example.ids[-1] == chat.closing_id


def test_labels_are_set_by_position_where_pad_is_eos(chatml):
    assert chatml.tokenizer.pad_token_id == chatml.tokenizer.eos_token_id
    rows = examples_of(chatml, conversation("ask", "a"), conversation("ask", "a longer answer"))
    batch = collate(rows, chatml.tokenizer.pad_token_id)
    ends = (batch.targets == chatml.closing_id).sum(1)
    assert ends.tolist() == [1, 1]  # the end of the turn is learned, the padding is not
    assert (batch.targets != IGNORED).sum(1).tolist() == [2, 16]


def test_a_rendered_text_has_one_bos_or_none(chatml, llama):
    (with_bos,) = examples_of(llama, conversation("ask", "answer", "again", "more"))
    assert with_bos.ids.count(llama.tokenizer.bos_token_id) == 1
    assert llama.tokenizer("x").input_ids[0] == llama.tokenizer.bos_token_id  # it would add one
    (without,) = examples_of(chatml, conversation("ask", "answer"))
    assert text_of(chatml, without.ids).startswith("<|im_start|>user\nask<|im_end|>\n")


def test_ids_are_those_of_the_rendered_text(chatml):
    turns = conversation("ask", "answer", "again", "more")
    (example,) = examples_of(chatml, turns)
    whole = chatml.render(turns.messages)
    assert text_of(chatml, example.ids) + "\n" == whole


def test_each_turn_is_trained_or_the_last_or_all(chatml):
    turns = conversation("ask", "one", "more", "two")
    (each,) = examples_of(chatml, turns)
    assert targets_of(chatml, each) == "one<|im_end|>two<|im_end|>"
    (last,) = examples_of(chatml, turns, mask_history=True)
    assert targets_of(chatml, last) == "two<|im_end|>"
    assert last.ids == each.ids
    (all_,) = examples_of(chatml, turns, train_on_prompt=True)
    assert all_.labels == all_.ids == each.ids


def test_weight_0_leaves_an_answer_out(chatml):
    (example,) = examples_of(chatml, conversation("a", "one", "b", "two", trained=(False, True)))
    assert targets_of(chatml, example) == "two<|im_end|>"


def test_a_row_whose_answer_is_cut_away_is_counted_and_skipped(chatml):
    kept, gone = conversation("ask", "a"), conversation("ask" * 99, "answer")
    cutting = Cutting(cutoff_len=8)
    encoded = encode([kept, gone], chatml, cutting)
    assert (encoded.kept, encoded.skipped) == ([0], 1)
    with pytest.raises(BadData, match="No row has a token to learn"):
        encode([gone], chatml, cutting)


def test_the_default_system_message_yields_to_a_rows_own(chatml):
    chat = chat_of(chatml.tokenizer, template=None, default_system="Be brief.")
    messages = [{"role": "user", "content": "ask"}]
    assert "Be brief." in chat.render(chat.with_system(messages))
    own = [{"role": "system", "content": "Be long."}, *messages]
    assert "Be brief." not in chat.render(chat.with_system(own))


REWRITING = CHATML.replace(
    "m['content'] +",
    "(m['content'].upper() if m['role'] == 'assistant' and not loop.last else m['content']) +",
)


def test_where_a_template_rewrites_earlier_answers_the_last_alone_is_trained(chatml):
    chat = Chat(chatml.tokenizer, REWRITING)
    encoded = encode([conversation("a", "one", "b", "two")], chat, Cutting())
    assert encoded.last_turn_only == 1
    assert targets_of(chat, encoded.examples[0]) == "two<|im_end|>"
    assert "ONE" in text_of(chat, encoded.examples[0].ids)


def test_a_base_without_template_is_refused_with_the_list(tmp_path):
    tokenizer = load_tokenizer(a_tiny_base(tmp_path, template=None))
    with pytest.raises(BadSpec) as caught:
        chat_of(tokenizer, template=None, default_system=None)
    assert caught.value.field == "template"
    assert "alpaca" in str(caught.value.hint)
    alpaca = chat_of(tokenizer, template="alpaca", default_system=None)
    (example,) = examples_of(alpaca, conversation("ask", "answer"))
    assert targets_of(alpaca, example) == "answer<|im_end|>\n\n"


def test_what_the_template_refuses_is_bad_data(chatml):
    chat = Chat(chatml.tokenizer, "{{ raise_exception('only two turns') }}")
    with pytest.raises(BadData, match="only two turns"):
        examples_of(chat, conversation("a", "b"))


def test_a_template_that_fails_by_itself_is_bad_data(chatml):
    for broken in ("{% for i in range(10 ** 9) %}x{% endfor %}", "{{ 1 // 0 }}"):
        with pytest.raises(BadData, match="The chat template refuses this"):
            examples_of(Chat(chatml.tokenizer, broken), conversation("a", "b"))


def test_a_template_that_is_no_jinja_is_named_with_its_line(chatml):
    given = chat_of(chatml.tokenizer, template="{% for %}", default_system=None)
    with pytest.raises(BadSpec, match="no jinja: line 1: ") as refused:
        given.render([{"role": "user", "content": "hi"}])
    assert refused.value.field == "template"


def test_a_template_that_leaves_the_answer_out_is_refused(chatml):
    asked_alone = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(BadSpec, match="leaves the answer of line") as caught:
        examples_of(Chat(chatml.tokenizer, asked_alone), conversation("a", "b"))
    assert caught.value.field == "template"


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 200))
def test_a_cut_never_exceeds_the_room_and_wastes_none(source, target, room):
    kept_source, kept_target = share(source, target, room)
    assert 0 <= kept_source <= source
    assert 0 <= kept_target <= target
    assert kept_source + kept_target <= room
    if source + target <= room:
        assert (kept_source, kept_target) == (source, target)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=5),
    st.integers(2, 60),
    st.booleans(),
)
def test_turns_are_cut_to_cutoff_len_with_their_labels(sizes, cutoff_len, mask_history):
    pieces = [([1] * s, [2] * t, True) for s, t in sizes]
    example = cut(pieces, Cutting(cutoff_len, mask_history=mask_history))
    assert len(example.ids) == len(example.labels) <= cutoff_len
    assert all(label == 2 for label in example.labels if label != IGNORED)


@given(st.integers(1, 40), st.integers(0, 10), st.booleans(), st.lists(st.integers(1, 7)))
def test_the_order_does_not_depend_on_how_it_is_taken(count, seed, shuffled, sizes):
    order = Order(count, seed, shuffled)
    consumed = 0
    for size in sizes:
        taken = order.take(consumed, size)
        one_by_one = [order.take(consumed + i, 1)[0] for i in range(len(taken))]
        assert taken == one_by_one
        consumed += len(taken)
    epoch = order.take(0, count)
    assert sorted(epoch) == list(range(count))
    assert shuffled or epoch == list(range(count))


def test_every_epoch_has_its_own_order_and_keeps_its_short_step():
    order = Order(10, seed=1)
    assert order.take(0, 10) != order.take(10, 10)
    assert len(order.take(8, 4)) == 2
    assert steps_of(10, rows_per_step=4, epochs=3, max_steps=-1) == (3, 9)
    assert steps_of(10, rows_per_step=4, epochs=3, max_steps=5) == (3, 5)


def test_the_validation_split_is_the_seeds_and_leaves_both_sides_something():
    items = list(range(20))
    train, held = split(items, 0.25, seed=3)
    assert (len(train), len(held)) == (15, 5)
    assert sorted([*train, *held]) == items
    assert list(split(items, 5, seed=3)[1]) == list(held)
    for size in (0.01, 20):
        with pytest.raises(BadData, match="val_size"):
            split(items, size, seed=3)


def harmed(folder, name: str, **more):
    content = json.loads((folder / name).read_text()) | more
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_base_that_brings_code_is_refused(tmp_path, name):
    folder = a_tiny_base(tmp_path)
    harmed(folder, name, auto_map={"AutoModelForCausalLM": "evil.Evil"})
    with pytest.raises(BadSpec, match="auto_map"):
        read_config(folder)


def test_a_nested_attention_implementation_is_refused(tmp_path):
    folder = a_tiny_base(tmp_path)
    harmed(folder, "config.json", text_config={"_attn_implementation_internal": "someone/kernel"})
    with pytest.raises(BadSpec, match="_attn_implementation_internal"):
        read_config(folder)


def test_pickled_weights_are_refused_and_missing_ones_named(tmp_path):
    folder = a_tiny_base(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputGone, match="safetensors"):
        read_config(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(BadSpec, match="pickled"):
        read_config(folder)


@pytest.mark.parametrize("names", [["LlamaModel"], [], ["os.system"], None])
def test_a_base_that_is_no_causal_model_is_refused(tmp_path, names):
    folder = a_tiny_base(tmp_path)
    harmed(folder, "config.json", architectures=names)
    with pytest.raises(BadSpec, match="causal"):
        read_config(folder)


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("Who?\r\n\nWhat?", ["Who?", "What?"]),
        ('"Who?"\n{"prompt": "What?"}\n', ["Who?", "What?"]),
        ('["Who?", {"messages": [{"role": "user", "content": "What?"}]}]', ["Who?", "What?"]),
        ("[INST] Who?\nWhat?", ["[INST] Who?", "What?"]),
        ("42\n43", ["42", "43"]),
    ],
)
def test_prompts_are_json_or_plain_lines(tmp_path, text, asked):
    prompts = read_prompts(written(tmp_path, text))
    assert [p.messages[-1]["content"] for p in prompts] == asked


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"prompt": "a"}\n{broken', 2),
        ('{"prompt": "a"}\n{"promt": "b"}', 2),
        ('["a", 5]', 2),
        ('{"messages": [{"role": "assistant", "content": "b"}]}', 1),
    ],
)
def test_a_bad_prompt_is_named_by_its_line(tmp_path, text, line):
    with pytest.raises(BadData) as caught:
        read_prompts(written(tmp_path, text))
    assert caught.value.line == line


def test_the_system_message_leads_prompts_that_have_none(tmp_path):
    (prompt,) = read_prompts(written(tmp_path, "Who?"), system="Be kind.")
    assert [m["role"] for m in prompt.messages] == ["system", "user"]
