"""LLaMA-Factory's chat templates under its names, as jinja that renders what it trains on.

A layout says what stands around a text of each role; ``jinja`` makes one template of it, which
training, inference, merged folders and GGUF files then share. Texts and default system messages are
those of LLaMA-Factory 0.9.5 (Apache-2.0), data/template.py and data/tool_utils.py: they decide
about tokens, and bases were tuned with them. ``make compare-llamafactory`` holds them against it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

_EOT = "<|im_end|>\n"
_ASSISTANT = "<|im_start|>assistant\n"


@dataclass(frozen=True)
class Layout:
    """Texts with {content}, {bos} and {eos} in them.

    user: a question, and what an answer begins after; tool: what a function returned, likewise;
    system_in_user: the system message is part of the first question; tools: how functions and calls
    are written, None: not at all; thought: what leads an answer that holds no thoughts.
    """

    user: str
    assistant: str = "{content}{eos}"
    system: str = "{content}"
    tool: str = ""
    prefix: str = ""
    default_system: str = ""
    system_in_user: bool = False
    tools: Literal["default", "qwen"] | None = "default"
    thought: str = ""


SEAM = "\0"
"""No row holds it."""


def jinja(layout: Layout, *, default_system: str | None = None, seams: bool = False) -> str:
    """The layout as a chat template; default_system: in the place of the layout's own.

    seams: it writes SEAM where LLaMA-Factory tokenises two texts apart, so that no token spans
    them; other borders are special tokens.
    """
    if default_system is not None:
        layout = replace(layout, default_system=default_system)
    seam = SEAM if seams else ""
    tool = layout.tool or layout.user
    lead = "(system if loop.index0 == 0 else '') ~ " if layout.system_in_user else ""
    return "".join(
        (
            "{% set leads = messages[0]['role'] == 'system' %}",
            "{% set system = (messages[0]['content'] if leads else '') or ",
            f"{json.dumps(layout.default_system)} %}}",
            _tools(layout),
            "{% if system or (tools is defined and tools is not none) %}",
            "{% set system = system ~ tool_text %}",
            f"{{% set system = {_written(layout.system, 'system')} %}}{{% endif %}}",
            f"{{{{ {_written(layout.prefix, '')} }}}}" if layout.prefix else "",
            "" if layout.system_in_user else f"{{{{ system ~ {json.dumps(seam)} }}}}",
            "{% for m in (messages[1:] if leads else messages) %}",
            "{% if m['role'] == 'assistant' %}",
            _calls(layout),
            _thought(layout.thought, seam),
            f"{{{{ {_written(layout.assistant, 'said')} }}}}",
            "{% elif m['role'] in ('tool', 'function') %}",
            f"{{{{ {_written(tool, _content(lead))} }}}}",
            f"{{% else %}}{{{{ {_written(layout.user, _content(lead))} }}}}",
            "{% endif %}{% endfor %}",
        )
    )


def _content(lead: str) -> str:
    return f"({lead}m['content'])"


def _written(text: str, content: str) -> str:
    """A jinja expression for a layout's text.

    >>> _written("<{content}>{eos}", "x")
    '"<" ~ x ~ ">" ~ eos_token'
    """
    names = {"{content}": content, "{bos}": "bos_token", "{eos}": "eos_token"}
    parts = re.split(r"(\{content\}|\{bos\}|\{eos\})", text)
    return " ~ ".join(names.get(part, json.dumps(part)) for part in parts if part)


def _tools(layout: Layout) -> str:
    """What sets ``tool_text``: the functions that the system message lists."""
    return f"{{% set tool_text %}}{{% if tools %}}{_TOOLS[layout.tools]}{{% endif %}}{{% endset %}}"


def _calls(layout: Layout) -> str:
    """What sets ``said``: the answer's text, and its calls in the place of one."""
    return (
        "{% set said = m['content'] or '' %}{% if m['tool_calls'] %}{% set said %}"
        '{{ said ~ "\\n" if said else "" }}{% for each in m[\'tool_calls\'] %}'
        "{% set call = each['function'] or each %}{% set given = call['arguments'] %}"
        "{% set given = given if given is string else given | tojson %}"
        f"{_CALL[layout.tools]}"
        '{{ "" if loop.last else "\\n" }}{% endfor %}{% endset %}{% endif %}'
    )


def _thought(thought: str, seam: str) -> str:
    """What leads an answer that has no thoughts with an empty one."""
    if not thought:
        return ""
    return (
        "{% if '<think>' not in said and '</think>' not in said %}"
        f"{{% set said = {json.dumps(thought + seam)} ~ said %}}{{% endif %}}"
    )


_NO_TOOLS = "{{ raise_exception('this template writes no functions; leave template out') }}"

_TOOLS: Mapping[str | None, str] = {
    None: _NO_TOOLS,
    "default": (
        '{{ "You have access to the following tools:\\n" }}{% set names = namespace(all="") %}'
        "{% for each in tools %}"
        "{% set tool = each['function'] if each['type'] == 'function' else each %}"
        '{% set names.all = names.all ~ (", " if names.all else "") ~ tool[\'name\'] %}'
        "{{ \"> Tool Name: \" ~ tool['name'] ~ \"\\nTool Description: \" ~ tool['description']"
        ' ~ "\\nTool Args:\\n" }}'
        "{% set parameters = tool['parameters'] or {} %}"
        "{% for name, what in (parameters['properties'] or {}).items() %}"
        '{{ "  - " ~ name ~ " (" ~ what[\'type\'] }}'
        '{{ ", required" if name in (parameters[\'required\'] or []) else "" }}'
        "{{ \"): \" ~ what['description'] }}"
        "{% if what['enum'] %}"
        '{{ ", should be one of [" ~ what[\'enum\'] | join(", ") ~ "]" }}{% endif %}'
        "{% if what.get('items') %}"
        "{{ \", where each item should be \" ~ what.get('items')['type'] }}{% endif %}"
        '{{ "\\n" }}{% endfor %}{{ "\\n" }}{% endfor %}'
        '{{ "Use the following format if using a tool:\\n```\\nAction: tool name (one of [" }}'
        '{{ names.all ~ "])\\nAction Input: the input to the tool, in a JSON format representing '
        'the kwargs (e.g. ```{\\"input\\": \\"hello world\\", \\"num_beams\\": 5}```)\\n```\\n" }}'
    ),
    "qwen": (
        '{{ "\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.'
        "\\n\\nYou are provided with function signatures within <tools></tools> XML tags:\\n"
        '<tools>" }}{% for each in tools %}'
        "{% set tool = each if each['type'] == 'function'"
        " else {'type': 'function', 'function': each} %}"
        '{{ "\\n" ~ tool | tojson }}{% endfor %}'
        '{{ "\\n</tools>\\n\\nFor each function call, return a json object with function name and '
        "arguments within <tool_call></tool_call> XML tags:\\n<tool_call>\\n"
        '{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call>" }}'
    ),
}
_CALL: Mapping[str | None, str] = {
    None: _NO_TOOLS,
    "default": '{{ "Action: " ~ call[\'name\'] ~ "\\nAction Input: " ~ given }}',
    "qwen": (
        '{{ "<tool_call>\\n{\\"name\\": " ~ call[\'name\'] | tojson ~ ", \\"arguments\\": "'
        ' ~ given ~ "}\\n</tool_call>" }}'
    ),
}


def _chatml(*, tool: str = "", end: str = _EOT, **more: str) -> Layout:
    return Layout(
        user=f"<|im_start|>user\n{{content}}{end}{_ASSISTANT}",
        assistant=f"{{content}}{end}",
        system=f"<|im_start|>system\n{{content}}{end}",
        tool=tool and f"<|im_start|>tool\n{{content}}{end}{_ASSISTANT}",
        **more,  # type: ignore[arg-type]
    )


def _qwen(**more: str) -> Layout:
    returned = "<tool_response>\n{content}\n</tool_response>"
    plain = _chatml(**more)
    return replace(plain, tools="qwen", tool=f"<|im_start|>user\n{returned}{_EOT}{_ASSISTANT}")


_LLAMA3 = "<|start_header_id|>{role}<|end_header_id|>\n\n"
_GEMMA = Layout(
    user="<start_of_turn>user\n{content}<end_of_turn>\n<start_of_turn>model\n",
    assistant="{content}<end_of_turn>\n",
    system="{content}\n\n",
    tool="<start_of_turn>tool\n{content}<end_of_turn>\n<start_of_turn>model\n",
    prefix="{bos}",
    system_in_user=True,
)
_PHI = Layout(
    user="<|user|>\n{content}<|end|>\n<|assistant|>\n",
    assistant="{content}<|end|>\n",
    system="<|system|>\n{content}<|end|>\n",
)
_GRANITE = "<|start_of_role|>{role}<|end_of_role|>"

LAYOUTS: Mapping[str, Layout] = {
    "alpaca": Layout(
        user="### Instruction:\n{content}\n\n### Response:\n",
        assistant="{content}{eos}\n\n",
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n",
    ),
    "chatml": _chatml(tool="tool"),
    "chatml_de": _chatml(
        tool="tool", default_system="Du bist ein freundlicher und hilfsbereiter KI-Assistent."
    ),
    "cohere": Layout(
        user="<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{content}<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
        prefix="{bos}",
    ),
    "cpm4": _chatml(tool="tool", prefix="{bos}"),
    "deepseek": Layout(
        user="User: {content}\n\nAssistant:", system="{content}\n\n", prefix="{bos}"
    ),
    "deepseek3": Layout(user="<｜User｜>{content}<｜Assistant｜>", prefix="{bos}"),  # noqa: RUF001
    "default": Layout(
        user="Human: {content}{eos}\nAssistant:",
        assistant="{content}{eos}\n",
        system="System: {content}{eos}\n",
    ),
    "exaone": Layout(
        user="[|user|]{content}\n[|assistant|]",
        assistant="{content}{eos}\n",
        system="[|system|]{content}[|endofturn|]\n",
    ),
    "falcon_h1": _chatml(tool="tool", prefix="{bos}"),
    "gemma": _GEMMA,
    "gemma3": _GEMMA,
    "granite3": Layout(
        user=_GRANITE.format(role="user")
        + "{content}<|end_of_text|>\n"
        + _GRANITE.format(role="assistant"),
        assistant="{content}<|end_of_text|>\n",
        system=_GRANITE.format(role="system") + "{content}<|end_of_text|>\n",
    ),
    "llama2": Layout(
        user="{bos}[INST] {content} [/INST]",
        system="<<SYS>>\n{content}\n<</SYS>>\n\n",
        system_in_user=True,
    ),
    "llama3": Layout(
        user=_LLAMA3.format(role="user") + "{content}<|eot_id|>" + _LLAMA3.format(role="assistant"),
        assistant="{content}<|eot_id|>",
        system=_LLAMA3.format(role="system") + "{content}<|eot_id|>",
        prefix="{bos}",
        tools=None,  # it lists them under the day of the run
    ),
    "mistral": Layout(
        user="[INST] {content}[/INST]",
        assistant=" {content}{eos}",
        system="{content}\n\n",
        prefix="{bos}",
        system_in_user=True,
        tools=None,
    ),
    "olmo": Layout(user="<|user|>\n{content}<|assistant|>\n", prefix="{eos}"),
    "openchat": Layout(
        user="GPT4 Correct User: {content}{eos}GPT4 Correct Assistant:", prefix="{bos}"
    ),
    "opencoder": _chatml(
        tool="tool", default_system="You are OpenCoder, created by OpenCoder Team."
    ),
    "phi": _PHI,
    "phi4": Layout(
        user="<|im_start|>user<|im_sep|>{content}<|im_end|><|im_start|>assistant<|im_sep|>",
        assistant="{content}<|im_end|>",
        system="<|im_start|>system<|im_sep|>{content}<|im_end|>",
    ),
    "phi4_mini": Layout(
        user="<|user|>{content}<|end|><|assistant|>",
        assistant="{content}<|end|>",
        system="<|system|>{content}<|end|>",
        tools=None,
    ),
    "qwen": _qwen(
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    ),
    "qwen3": _qwen(thought="<think>\n\n</think>\n\n"),
    "qwen3_nothink": _qwen(),
    "smollm": _chatml(),
    "smollm2": _chatml(
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face."
    ),
    "starchat": replace(_PHI, user="<|user|>\n{content}<|end|>\n<|assistant|>"),
    "vicuna": Layout(
        user="USER: {content} ASSISTANT:",
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
    "yi": _chatml(),
    "zephyr": Layout(
        user="<|user|>\n{content}{eos}<|assistant|>\n",
        system="<|system|>\n{content}{eos}",
        default_system="You are Zephyr, a helpful assistant.",
    ),
}
"""LLaMA-Factory's name -> its layout. Its other names mean the base's own template here: those that
train a token that is not there (efficient_eos), or need images, or write thoughts otherwise."""
