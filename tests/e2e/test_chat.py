"""Chatting with the real small model: the command with pipes, and the API in pieces."""

import json
import subprocess
from typing import Any

from support.yards import TUNEYARD, LocalYard, wait_for


def asked(yard: LocalYard, job: str, **body: Any) -> dict[str, Any]:
    """A whole answer."""
    with yard.http as http:
        answer = http.post(f"/jobs/{job}/chat", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def in_pieces(yard: LocalYard, job: str, **body: Any) -> list[str]:
    """The same answer's deltas."""
    request = {"json": body | {"stream": True}, "timeout": 120}
    with yard.http as http, http.stream("POST", f"/jobs/{job}/chat", **request) as answer:
        data = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    assert data[-1]["done"]
    return [piece["delta"] for piece in data if "delta" in piece]


def test_several_turns_with_the_real_model_by_pipe_and_in_pieces_of_whole_characters(
    yard: LocalYard, base_model: str
) -> None:
    command = ["chat", base_model, "--temperature", "0", "--max-new-tokens", "40", "--keep"]
    turns = "What is the capital of France?\n/exit\n"
    first = subprocess.run(
        [*TUNEYARD, *command], env=dict(yard.env), input=turns, capture_output=True, text=True,
        check=False, timeout=240,
    )  # fmt: skip
    assert first.returncode == 0, first.stderr
    assert "Paris" in first.stdout
    turns = "My name is Quentin.\nWhat is my name?\n"
    again = subprocess.run(
        [*TUNEYARD, *command, "--json"], env=dict(yard.env), input=turns, capture_output=True,
        text=True, check=False, timeout=240,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "joins" in again.stderr
    told, recalled = map(json.loads, again.stdout.splitlines())
    before = told["usage"]["prompt_tokens"] + told["usage"]["completion_tokens"]
    assert recalled["usage"]["prompt_tokens"] > before  # the first turn went along
    job = recalled["job"]
    chinese = [{"role": "user", "content": "请只重复这些字: 今天天气很好, 我们去公园吧。🙂"}]
    body = {"messages": chinese, "temperature": 0, "max_new_tokens": 48}
    pieces = in_pieces(yard, job, **body)
    whole = asked(yard, job, **body)["text"]
    assert "".join(pieces) == whole
    assert len(pieces) > 5
    assert any(character >= "\u4e00" for character in whole)
    assert not any("\ufffd" in piece for piece in pieces[:-1])
    stop = whole[8:11]
    cut = in_pieces(yard, job, **body, stop=[stop])
    assert "".join(cut) == whole[: whole.index(stop)]
    yard.cli("cancel", job)
    wait_for(lambda: yard.job(job)["state"] == "cancelled", within_s=30, what="the end")
