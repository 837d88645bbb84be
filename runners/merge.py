"""Merge an adapter into its base:  python -P -m tuneyard.runners.merge SPEC.json WORKDIR

inputs: model (a folder), adapter (a folder). arguments: those of MergeArguments. output: a model's
folder that stands alone, the adapter's files in adapter/ below it, and tuneyard.json.
"""

import errno
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneyard.runners.arguments import MergeArguments, arguments_of
from tuneyard.runners.attempt import Attempt, library_versions, main
from tuneyard.runners.base_model import read_config
from tuneyard.runners.devices import make_ready
from tuneyard.runners.failures import BadSpec
from tuneyard.runners.merge_plan import Plan, WholeModelNeeded, plan_merge
from tuneyard.runners.merged_folder import Change, keep_adapter, write_surroundings
from tuneyard.runners.origin import (
    WEIGHTS_FILE,
    published_digest,
    read_adapter_config,
    read_origin,
)
from tuneyard.runners.shards import write_weights
from tuneyard.runners.tensor_files import FLOATS, Tensor, tensors_in, weights_of
from tuneyard.specs.runner import TUNEYARD_FILE
from tuneyard.store.folder import publish_folder, read_manifest

log = logging.getLogger(__name__)

GB = 10**9
REPORT_EVERY_S = 0.5
SPARE_BYTES = 64 * 1024**2


@dataclass(frozen=True)
class Asked:
    """What is merged, read and checked without torch. dtype: the result's, if it is another."""

    arguments: MergeArguments
    model: Path
    adapter: Path
    config: Mapping[str, Any]
    adapter_config: Mapping[str, Any]
    origin: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    base_dtype: str
    dtype: str | None


def merge(attempt: Attempt) -> None:
    """Check, sum tensor by tensor, put the base's files around, publish."""
    asked = read_asked(attempt)
    check_base(asked, attempt)
    check_room(asked, attempt)
    attempt.events.emit("phase", phase="loading")
    make_ready(attempt.device)
    attempt.begin()
    aside = attempt.fresh_aside()
    change, pairs = write_merged(asked, attempt, aside)
    write_surroundings(asked.model, aside, change)
    keep_adapter(asked.adapter, aside)
    publish(asked, attempt, aside, pairs=pairs)


def read_asked(attempt: Attempt) -> Asked:
    """Read arguments, configurations and headers. Raises: BadSpec, BadData, InputGone."""
    arguments = arguments_of(attempt, MergeArguments)
    model, adapter = attempt.input("model"), attempt.input("adapter")
    config = read_config(model)
    if config.get("quantization_config"):
        message = "The base is quantised: a sum rounded to so few bits would spoil it."
        hint = "merge onto the model that it was quantised from"
        raise BadSpec(message, field="model", hint=hint)
    adapter_config = read_adapter_config(adapter)
    weights = weights_of(model)
    base_dtype = format_of(weights)
    dtype = arguments.dtype
    if dtype == "auto":
        # LLaMA-Factory's rule: what is stored in fp32 goes out in bf16.
        dtype = "bfloat16" if base_dtype == "float32" else base_dtype  # type: ignore[assignment]
    return Asked(
        arguments=arguments,
        model=model,
        adapter=adapter,
        config=config,
        adapter_config=adapter_config,
        origin=read_origin(adapter),
        weights=weights,
        tensors=tensors_in(adapter / WEIGHTS_FILE, field="adapter"),
        base_dtype=base_dtype,
        dtype=None if dtype == base_dtype else dtype,
    )


def format_of(weights: Mapping[str, Tensor]) -> str:
    """The format of most bytes of the weights, by torch's name. Raises: BadSpec for integers."""
    sizes: dict[str, int] = {}
    for tensor in weights.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.bytes
    most = max(sizes, key=lambda tag: sizes[tag], default="none")
    if most not in FLOATS:
        message = f"The base's weights are {most}, which is not merged into."
        hint = f"take one in {', '.join(FLOATS.values())}"
        raise BadSpec(message, field="model", hint=hint)
    return FLOATS[most]


def check_base(asked: Asked, attempt: Attempt) -> None:
    """Whether this is the very base that the adapter was tuned over, as far as both say it.

    Raises: BadSpec, unless forced.
    """
    tuned_over = (asked.origin.get("base") or {}).get("digest")
    digest = published_digest(asked.model)
    if tuned_over is None or digest is None or tuned_over == digest:
        return
    message = f"The adapter was tuned over {tuned_over[:12]}; this is {digest[:12]}."
    if not asked.arguments.force:
        hint = "merge onto the adapter's own base, or set force: true"
        raise BadSpec(message, field="model", hint=hint)
    attempt.events.warn("other_base", message)


def check_room(asked: Asked, attempt: Attempt) -> None:
    """Raises: OSError when the result cannot fit on the disk."""
    count = {"float32": 4, "bfloat16": 2, "float16": 2}
    factor = count[asked.dtype] / count[asked.base_dtype] if asked.dtype else 1
    needed = int(sum(tensor.bytes for tensor in asked.weights.values()) * factor) + SPARE_BYTES
    free = shutil.disk_usage(attempt.workdir).free
    if free < needed:
        message = f"the result needs {needed / GB:.1f} GB, and {free / GB:.1f} GB are free"
        raise OSError(errno.ENOSPC, message)


def write_merged(asked: Asked, attempt: Attempt, folder: Path) -> tuple[Change, int]:
    """Write the weights; how the files around them change, and how many pairs went in."""
    most_bytes = asked.arguments.export_size * GB
    try:
        plan = plan_merge(
            asked.weights,
            asked.tensors,
            config=asked.config,
            adapter_config=asked.adapter_config,
            dtype=asked.dtype,
        )
        _sum(plan, attempt, folder, most_bytes=most_bytes)
        untied, pairs = plan.untied, plan.pairs
    except WholeModelNeeded as reason:
        note = f"Merged by peft with the whole model in memory: {reason}."
        attempt.events.warn("merged_in_memory", note)
        from tuneyard.runners.whole_merge import merge_whole

        untied = merge_whole(
            asked.model,
            asked.adapter,
            folder,
            config=asked.config,
            dtypes=(asked.base_dtype, asked.dtype or asked.base_dtype),
            most_bytes=most_bytes,
        )
        pairs = sum(".lora_A." in name for name in asked.tensors)
    return Change(asked.dtype, untied, asked.origin, asked.arguments.template), pairs


def _sum(plan: Plan, attempt: Attempt, folder: Path, *, most_bytes: float) -> None:
    from tuneyard.runners.merging import Merger, make_exact

    make_exact()
    log.info("%d tensors, %d of them with an adapter", len(plan.parts), plan.pairs)
    with closing(Merger(attempt.device.torch_name)) as merger:
        report = progress_of(plan, attempt)
        report(0)
        write_weights(folder, plan.parts, merger.blocks, most_bytes=most_bytes, progress=report)
    if merger.applied != plan.pairs:
        raise RuntimeError(f"{merger.applied} of {plan.pairs} pairs were applied")


def progress_of(plan: Plan, attempt: Attempt) -> Callable[[int], None]:
    """Emit a progress event now and then, and at both ends. Raises Stopped by the signal."""
    sizes = [part.bytes for part in plan.parts]
    total, began = len(sizes), time.monotonic()
    reported_at = float("-inf")

    def report(done: int) -> None:
        nonlocal reported_at
        now = time.monotonic()
        if now - reported_at < REPORT_EVERY_S and done != total:
            return
        reported_at = now
        written, left = sum(sizes[:done]), sum(sizes[done:])
        eta_s = round((now - began) * left / written, 1) if written else None
        attempt.events.emit("progress", done=done, total=total, unit="tensors", eta_s=eta_s)

    return report


def publish(asked: Asked, attempt: Attempt, aside: Path, *, pairs: int) -> None:
    """Say what the model was made of, and make it visible. A stop that comes now is too late."""
    lineage = lineage_of(asked, attempt)
    about = json.dumps(
        {
            **asked.origin,
            "format": 1,
            **lineage,
            "dtype": asked.dtype or asked.base_dtype,
            "versions": dict(library_versions()),
        },
        indent=1,
        sort_keys=True,
    )
    (aside / TUNEYARD_FILE).write_text(about + "\n", encoding="utf-8")
    attempt.stops.defer()
    manifest = publish_folder(aside, attempt.output, {"kind": "model", "lineage": lineage})
    size = sum(entry["size"] for entry in manifest["files"])
    attempt.events.emit("result", values={"pairs": pairs, "bytes": size, "lineage": lineage})


def lineage_of(asked: Asked, attempt: Attempt) -> dict[str, Any]:
    """Base with revision and digest, adapter with digest, job."""
    ids = attempt.spec.input_ids
    digest = published_digest(asked.model)
    manifest = read_manifest(asked.model) if digest else {}
    base = {"id": ids.get("model") or asked.model.name, "digest": digest}
    base |= {name: manifest[name] for name in ("source", "revision") if name in manifest}
    adapter = {
        "id": ids.get("adapter") or asked.adapter.name,
        "digest": published_digest(asked.adapter),
    }
    bits = (asked.origin.get("arguments") or {}).get("quantization_bit")
    if bits is not None:  # the sum is onto the base as it is stored, not as it was trained over
        adapter["trained_over_bits"] = bits
    return {"base": base, "adapter": adapter, "job": attempt.spec.job}


if __name__ == "__main__":
    main(merge)
