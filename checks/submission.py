"""What can be known to fail once the data's report and the base model's facts are at hand."""

import difflib
from collections.abc import Mapping
from typing import Any

from tuneyard.specs.errors import InputError
from tuneyard.specs.finetune import FinetuneSpec

TRAINABLE = ("alpaca", "openai", "sharegpt")


def check_finetune(
    spec: FinetuneSpec,
    report: Mapping[str, Any] | None,
    facts: Mapping[str, Any] | None,
) -> list[InputError]:
    """All problems of a fine-tune; what is not known yet (None) is not judged."""
    found: list[InputError] = []
    if report is not None:
        found += _check_data(spec, report)
    if facts is not None:
        found += _check_model(spec, facts)
    return found


def _check_data(spec: FinetuneSpec, report: Mapping[str, Any]) -> list[InputError]:
    found = []
    kind, rows = report.get("rows_kind"), int(report.get("rows") or 0)
    if kind not in TRAINABLE:
        message = f"The file holds {kind or 'no rows'}, and stage {spec.stage} needs answers."
        hint = "rows with instruction and output, messages, or conversations"
        found.append(
            InputError(message, code="wrong_dataset_kind", field="dataset", line=1, hint=hint)
        )
    held_out = spec.val_size if spec.val_size >= 1 else round(rows * spec.val_size)
    if spec.val_size and not 0 < held_out < rows:
        message = f"val_size = {spec.val_size:g} of {rows} rows leaves nothing on one side."
        found.append(InputError(message, code="too_few_rows", field="val_size"))
    return found


def _check_model(spec: FinetuneSpec, facts: Mapping[str, Any]) -> list[InputError]:
    found = []
    positions = facts.get("max_position_embeddings")
    if positions and spec.cutoff_len > positions and "cutoff_len" in spec.model_fields_set:
        message = f"cutoff_len = {spec.cutoff_len} is beyond the model's {positions} positions."
        found.append(
            InputError(message, code="too_long", field="cutoff_len", hint=f"at most {positions}")
        )
    if not facts.get("has_chat_template") and spec.template is None:
        message = "The base model has no chat template."
        found.append(InputError(message, code="no_template", field="template"))
    if spec.template is not None:
        message = "Named templates are not there yet."
        hint = "leave it out: the tokenizer's own template is used"
        found.append(InputError(message, code="not_supported_yet", field="template", hint=hint))
    found += _check_targets(spec, list(facts.get("linear_modules") or []))
    layers = int(facts.get("layers") or 0)
    beyond = [i for i in spec.layers_to_transform or [] if layers and i >= layers]
    if beyond:
        message = f"layers_to_transform names layer {beyond[0]}; the model has {layers}."
        hint = f"layers count from 0 to {layers - 1}"
        found.append(
            InputError(message, code="out_of_range", field="layers_to_transform", hint=hint)
        )
    return found


def _check_targets(spec: FinetuneSpec, linear: list[str]) -> list[InputError]:
    asked = spec.lora_target
    names = asked.split(",") if isinstance(asked, str) else asked
    names = [name.strip() for name in names]
    if not linear or names == ["all"]:
        return []
    found = []
    for name in names or [""]:
        if name.rpartition(".")[2] not in linear:
            near = difflib.get_close_matches(name, linear, n=3) or linear
            hint = f"did you mean {', '.join(near)}?"
            message = f"lora_target: no layer is named {name!r}."
            found.append(
                InputError(message, code="no_module_matches", field="lora_target", hint=hint)
            )
    return found
