"""What can be known to fail once the data's report and the base model's facts are at hand."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tuneyard.specs.errors import InputError
from tuneyard.specs.evaluate import EvaluateSpec
from tuneyard.specs.fields import words_in
from tuneyard.specs.finetune import TEMPLATES, FinetuneSpec
from tuneyard.specs.inference import InferenceSpec
from tuneyard.specs.problems import problem
from tuneyard.specs.rewards import ONLINE
from tuneyard.specs.rows import ANSWERS, NEEDS, STAGE_OF, TRAINABLE
from tuneyard.specs.serve import ServeSpec
from tuneyard.specs.tuning import PROMPTS

Report = Mapping[str, Any]


def check_finetune(
    spec: FinetuneSpec,
    report: Report | None,
    facts: Mapping[str, Any] | None,
    *,
    eval_report: Report | None = None,
    judge: Mapping[str, Any] | None = None,
) -> list[InputError]:
    """All problems of a fine-tune; what is not known yet (None) is not judged.

    judge: the facts of a whole model that is to be its reward_model.
    """
    found: list[InputError] = []
    if report is not None:
        found += [*_check_kinds(spec, report, "dataset"), *_check_split(spec, report)]
        found += _check_columns(spec, report)
    if eval_report is not None:
        found += _check_kinds(spec, eval_report, "eval_dataset")
    if facts is not None:
        found += _check_model(spec, facts)
    if judge is not None and not judge["scores"]:
        message = "It is a model without a head that scores answers."
        hint = "name what a fine-tune of stage rm brought forth"
        found.append(problem("unfit_model", message, "reward_model", hint))
    return found


def check_evaluate(
    spec: EvaluateSpec,
    reports: Mapping[str, Report | None],
    facts: Mapping[str, Any] | None = None,
) -> list[InputError]:
    """Whether rows have answers that the model can read, and val_size leaves some to measure."""
    found = _check_cutoff(spec, (facts or {}).get("max_position_embeddings"))
    for field, report in reports.items():
        if report is not None:
            found += _check_kinds(spec, report, field)
    if (whole := reports.get("dataset")) is not None:
        found += _check_split(spec, whole)
    return found


def check_inference(spec: InferenceSpec, facts: Mapping[str, Any] | None) -> list[InputError]:
    """Whether the base can write answers of that length; not judged where it is not known."""
    positions = (facts or {}).get("max_position_embeddings")
    if not positions or (spec.max_new_tokens or 0) < positions:
        return []
    message = f"max_new_tokens = {spec.max_new_tokens} is beyond the model's {positions} positions."
    hint = f"below {positions}, the prompt counts too"
    return [problem("too_long", message, "max_new_tokens", hint)]


def check_prompts(report: Report) -> list[InputError]:
    """Whether a file that an inference job names holds prompts."""
    if report.get("rows_kind") in ("prompts", None):
        return []
    message = f"The file holds {report['rows_kind']} rows, no prompts."
    hint = "upload it with purpose prompts: a text a line, or {messages: […]}"
    return [problem("wrong_dataset_kind", message, "prompts", hint)]


def check_serve(spec: ServeSpec, facts: Mapping[str, Any] | None) -> list[InputError]:
    """Whether a base speaks at all; an adapter brings the template that trained it."""
    return [] if facts is None else _check_template(spec, facts)


def _check_kinds(spec: FinetuneSpec | EvaluateSpec, report: Report, field: str) -> list[InputError]:
    kinds = report.get("kinds") or {str(report.get("rows_kind")): {"line": 1}}
    wrong = [kind for kind in kinds if kind not in TRAINABLE[spec.stage]]
    if not wrong:
        return []
    kind, line = wrong[0], kinds[wrong[0]].get("line")
    article = "an" if kind[:1] in "aeiou" else "a"
    row = f"{article} {kind} row"
    message = f"Line {line} holds {row}, and stage {spec.stage} needs {NEEDS[spec.stage]}."
    default = "upload it with purpose dataset, as rows that teach something"
    hint = STAGE_OF.get(kind, default)
    if spec.stage == "kto" and kind in ANSWERS:
        hint = "give each row kto_tag or label, true or false without quotes"
    return [InputError(message, code="wrong_dataset_kind", field=field, line=line, hint=hint)]


def _check_columns(spec: FinetuneSpec, report: Report) -> list[InputError]:
    """Whether all rows have what the reward functions read."""
    rows, columns = int(report.get("rows") or 0), report.get("columns")
    if columns is None or rows > (spec.max_samples or rows):
        return []  # an older report, or one of more rows than are used: the runner looks itself
    found = []
    for number, function in enumerate(spec.reward_funcs or ()):
        have = 0 if function.needs is None else columns.get(function.needs, 0)
        if function.needs is None or have == rows:
            continue
        of_all = f"{have} of {rows} rows have" if have else "no row has"
        message = f"{function.name} reads the column {function.needs!r}, which {of_all}."
        complete = [name for name, count in columns.items() if count == rows]
        hint = f"set column to one of: {', '.join(complete[:10])}" if complete else "add it"
        found.append(problem("missing_column", message, f"reward_funcs[{number}]", hint))
    return found


def _check_split(spec: FinetuneSpec | EvaluateSpec, report: Report) -> list[InputError]:
    """The runner's own arithmetic: runners/batches.py, split."""
    rows = min(int(report.get("rows") or 0), spec.max_samples or 10**12)
    held_out = int(spec.val_size) if spec.val_size >= 1 else int(rows * spec.val_size)
    if not spec.val_size or 0 < held_out < rows:
        return []
    message = f"val_size = {spec.val_size:g} of {rows} rows leaves nothing on one side."
    hint = f"between 1 and {rows - 1} rows" if rows > 1 else "leave it out, or bring more rows"
    return [problem("too_few_rows", message, "val_size", hint)]


def _check_model(spec: FinetuneSpec, facts: Mapping[str, Any]) -> list[InputError]:
    found = [*_check_template(spec, facts), *_check_layers(spec, facts)]
    positions = facts.get("max_position_embeddings")
    found += _check_cutoff(spec, positions)
    if positions and spec.stage in ONLINE and spec.max_completion_length >= positions:
        message = (
            f"max_completion_length = {spec.max_completion_length} leaves no room for questions"
        )
        message += f" within the model's {positions} positions."
        found.append(problem("too_long", message, "max_completion_length", f"below {positions}"))
    found += _check_virtual(spec, positions)
    linear = list(facts.get("linear_modules") or [])
    modules = list(facts.get("modules") or linear)
    everything = ("all", "all-linear")
    found += _check_names("lora_target", spec.lora_target, linear, all_=everything)
    found += _check_names("oft_target", spec.oft_target, linear, all_=everything)
    found += _check_names("additional_target", spec.additional_target, modules)
    if spec.finetuning_type == "freeze":
        parts, outer = (list(facts.get(name) or []) for name in ("layer_parts", "outer_modules"))
        found += _check_names(
            "freeze_trainable_modules", spec.freeze_trainable_modules, parts, all_=("all",)
        )
        found += _check_names("freeze_extra_modules", spec.freeze_extra_modules, outer)
    projected = {
        "galore_target": spec.use_galore and spec.galore_target,
        "apollo_target": spec.use_apollo and spec.apollo_target,
        "optim_target_modules": spec.optim_target_modules,
    }
    for field, asked in projected.items():
        found += _check_parts(field, asked or (), facts)
    return found


def _check_parts(
    field: str, asked: str | Sequence[str], facts: Mapping[str, Any]
) -> list[InputError]:
    """Whether some linear layer's path holds one of the names; a regex is left to its reader."""
    paths, names = list(facts.get("linear_paths") or []), words_in(asked)
    plain = all(re.fullmatch(r"[a-z_.]+", name) for name in names)
    if not (paths and names and plain) or names in (["all"], ["all-linear"]):
        return []
    if any(name in path for name in names for path in paths):
        return []
    message = f"{field}: no linear layer is named {', '.join(names)[:60]!r}."
    hint = f"all-linear, or of: {', '.join(facts['linear_modules'])}"
    return [problem("no_module_matches", message, field, hint)]


def _check_cutoff(spec: FinetuneSpec | EvaluateSpec, positions: int | None) -> list[InputError]:
    if not positions or spec.cutoff_len <= positions or "cutoff_len" not in spec.model_fields_set:
        return []
    message = f"cutoff_len = {spec.cutoff_len} is beyond the model's {positions} positions."
    return [problem("too_long", message, "cutoff_len", f"at most {positions}")]


def _check_virtual(spec: FinetuneSpec, positions: int | None) -> list[InputError]:
    """Whether virtual tokens and a row both fit; a cutoff_len that nobody set may give way."""
    if not positions or spec.finetuning_type not in PROMPTS:
        return []
    rows = spec.cutoff_len if "cutoff_len" in spec.model_fields_set else 1
    if spec.num_virtual_tokens + min(rows, positions) <= positions:
        return []
    message = f"num_virtual_tokens = {spec.num_virtual_tokens} and rows of {rows} tokens are "
    message += f"beyond the model's {positions} positions."
    field = "num_virtual_tokens" if spec.num_virtual_tokens >= positions else "cutoff_len"
    most = positions - (1 if field == "num_virtual_tokens" else spec.num_virtual_tokens)
    return [problem("too_long", message, field, f"at most {most}")]


def _check_template(spec: FinetuneSpec | ServeSpec, facts: Mapping[str, Any]) -> list[InputError]:
    plain = isinstance(spec, FinetuneSpec) and spec.stage == "pt" and not spec.template
    if plain or facts.get("has_chat_template") or (spec.template and "{" in spec.template):
        return []
    hint = f"set template to one of {', '.join(TEMPLATES)}, or to jinja of your own"
    if spec.template is None:
        message = "The base model has no chat template."
        return [problem("no_template", message, "template", hint)]
    if spec.template in TEMPLATES:
        return []
    near = difflib.get_close_matches(spec.template[:80], TEMPLATES, n=1)
    hint = f"did you mean {near[0]}? {hint}" if near else hint
    message = f"There is no template {spec.template[:60]!r}, and the base brings none."
    return [problem("unknown_template", message, "template", hint)]


def _check_layers(spec: FinetuneSpec, facts: Mapping[str, Any]) -> list[InputError]:
    layers, asked = int(facts.get("layers") or 0), spec.freeze_trainable_layers
    if spec.use_llama_pro and layers and asked > 0 and layers % asked:
        message = f"use_llama_pro: the model's {layers} layers are no multiple of {asked}."
        fitting = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
        return [problem("out_of_range", message, "freeze_trainable_layers", f"one of {fitting}")]
    if spec.finetuning_type == "freeze" and layers and abs(asked) > layers:
        message = f"freeze_trainable_layers = {asked}, and the model has {layers} layers."
        hint = f"{-layers} to {layers}; finetuning_type full lets everything learn"
        return [problem("out_of_range", message, "freeze_trainable_layers", hint)]
    if spec.use_badam and layers and (spec.badam_start_block or 0) >= layers:
        message = f"badam_start_block = {spec.badam_start_block}; the model has {layers} blocks."
        hint = f"blocks count from 0 to {layers - 1}"
        return [problem("out_of_range", message, "badam_start_block", hint)]
    beyond = [i for i in spec.layers_to_transform or [] if layers and i >= layers]
    if not beyond:
        return []
    message = f"layers_to_transform names layer {beyond[0]}; the model has {layers}."
    hint = f"layers count from 0 to {layers - 1}"
    return [problem("out_of_range", message, "layers_to_transform", hint)]


def _check_names(
    field: str, asked: str | Sequence[str] | None, known: list[str], *, all_: Sequence[str] = ()
) -> list[InputError]:
    names = [name.strip() for name in (asked.split(",") if isinstance(asked, str) else asked or ())]
    if not known or asked is None or (len(names) == 1 and names[0] in all_):
        return []
    found = []
    for name in names:
        if name.rpartition(".")[2] not in known:
            near = difflib.get_close_matches(name[:80], known, n=3) or sorted(known)[:8]
            hint = f"did you mean {', '.join(near)}?"
            message = f"{field}: no module is named {name[:60]!r}."
            found.append(problem("no_module_matches", message, field, hint))
    return found
