"""Putting a run together: weights, adapter, plan, and where to begin."""

import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tuneyard.runners.adapter import computes_by_casting, drop_blocks, tune
from tuneyard.runners.allocation import allocation_of
from tuneyard.runners.answering import answerable, rollouts_of
from tuneyard.runners.arguments import FinetuneArguments, Way
from tuneyard.runners.asked import Asked
from tuneyard.runners.attempt import Attempt
from tuneyard.runners.attention import attend_by, choose_way
from tuneyard.runners.base_model import load_weights
from tuneyard.runners.batches import Order, split, steps_of
from tuneyard.runners.best_model import look_for_best, measure_of, ranking_of
from tuneyard.runners.chat import Chat
from tuneyard.runners.checkpoint import (
    Position,
    Running,
    differences,
    job_of,
    read_checkpoint,
)
from tuneyard.runners.continuing import go_on
from tuneyard.runners.examples import Item, sequences_of
from tuneyard.runners.experts import experts_of
from tuneyard.runners.failures import BadSpec
from tuneyard.runners.mover import Mover
from tuneyard.runners.noise import EmbeddingNoise
from tuneyard.runners.objectives import objective_of
from tuneyard.runners.optimizers import (
    build_mover,
    schedule_of,
    warmup_of,
    warnings_about,
)
from tuneyard.runners.origin import read_origin
from tuneyard.runners.packing import packed
from tuneyard.runners.precision import Precision, precision_of
from tuneyard.runners.reference import Reference, load_reference
from tuneyard.runners.seeds import stream_seed
from tuneyard.runners.tokenising import Tokenised
from tuneyard.runners.tokens import digest_of
from tuneyard.runners.training import Data, Plan, Trainer
from tuneyard.specs.evaluating import Strategy
from tuneyard.specs.numbers import asked_format
from tuneyard.specs.rewards import ONLINE

log = logging.getLogger(__name__)


def build_trainer(
    asked: Asked,
    attempt: Attempt,
    chat: Chat,
    tokenised: Tokenised,
) -> Trainer:
    """Load the base, add the adapter, go to the checkpoint if there is one."""
    arguments, device = asked.arguments, attempt.device.torch_name
    examples, held_out = divide(tokenised, asked, attempt)
    precision = pick_precision(asked, attempt)
    plan = plan_of(arguments, len(examples))
    model = load_model(asked, precision, device, steps=plan.steps)
    warn_of_another_template(asked, chat, attempt)
    warn_of_experts(model, attempt)
    warn_of_blocks(model, asked.arguments, attempt)
    reference = reference_of(asked, attempt, model, precision)
    computed = casting_of(model, precision)
    models = [model] if reference is None or reference.frozen is None else [model, reference.frozen]
    way = pick_attention(models, asked, attempt, computed=computed)
    if arguments.neftune_noise_alpha:
        EmbeddingNoise(model, arguments.neftune_noise_alpha)
    running = Running(
        model,
        mover_of(model, asked, precision, plan, attempt),
        scaler_of(precision),
        device,
        cast_to=computed,
        allocation=allocation_of(model),
    )
    torch.manual_seed(stream_seed(asked.seed, "dropout"))
    run = description(asked, tokenised.digest, len(examples), device, job=attempt.spec.job)
    run["platform"]["attention"] = way
    order = Order(len(examples), asked.seed, not arguments.disable_shuffling)
    ranking, schedule = ranking_of(arguments), schedule_of(arguments, plan.steps)
    at = resume(attempt, running, run, steps=plan.steps)
    if at.schedule:
        schedule.restore(at.schedule)
    resumed = Path(attempt.spec.resume) if attempt.spec.resume else None
    objective = objective_of(arguments, reference, at.baseline)
    measure = measure_of(ranking, objective, asked, attempt, digest_of(tokenised.held_out))
    look_for_best(at, ranking, attempt, resumed, measure=measure)
    rollouts = None
    if arguments.stage in ONLINE:
        dtype = getattr(torch, precision.weights)
        rollouts = rollouts_of(asked, attempt, chat, running, reference=reference, dtype=dtype)
    return Trainer(
        running=running,
        data=Data(examples, order, held_out, chat.tokenizer.pad_token_id),
        plan=plan,
        objective=objective,
        schedule=schedule,
        at=at,
        events=attempt.events,
        stops=attempt.stops,
        workdir=attempt.workdir,
        run=run,
        base_id=asked.base_id,
        ranking=ranking,
        resumed=resumed,
        draw=rollouts,
        shared=way != "padded",
    )


def divide(
    tokenised: Tokenised, asked: Asked, attempt: Attempt
) -> tuple[Sequence[Item], Sequence[Item]]:
    """What is learned and what is held out: rows of a file of their own, or those of val_size."""
    arguments = asked.arguments
    examples, held_out = tokenised.examples, tokenised.held_out
    if arguments.stage in ONLINE:
        examples, held_out = (answerable(each, asked, attempt) for each in (examples, held_out))
    warn_of_positions(tokenised, asked, attempt)
    if not held_out:
        examples, held_out = split(examples, arguments.val_size, seed=asked.seed)
    return packed(examples, arguments), packed(held_out, arguments)


def warn_of_positions(tokenised: Tokenised, asked: Asked, attempt: Attempt) -> None:
    """A cutoff_len that nobody set may be beyond what a small base was made for."""
    limit = asked.config.get("max_position_embeddings") or 1 << 30
    if asked.arguments.cutoff_len <= limit:
        return
    items = (item for part in (tokenised.examples, tokenised.held_out) for item in part)
    longest = max((len(each.ids) for item in items for each in sequences_of(item)), default=0)
    if longest > limit:
        said = f"Rows have up to {longest} tokens, and the model was made for {limit} positions: "
        attempt.events.warn("beyond_positions", f"{said}cutoff_len = {limit} would cut them.")


def warn_of_blocks(model: Any, arguments: FinetuneArguments, attempt: Attempt) -> None:
    """peft takes the nearest size of oft's blocks that divides a layer's width."""
    if arguments.finetuning_type != "oft":
        return
    field, attribute = ("oft_rank", "r") if arguments.oft_rank else ("oft_block_size",) * 2
    asked = getattr(arguments, field)
    layers = [module for module in model.modules() if hasattr(module, "oft_R")]
    sizes = [getattr(layer, attribute) for layer in layers]
    taken = {size for each in sizes if isinstance(each, dict) for size in each.values()}
    if other := sorted(taken - {asked}):
        said = f"{field} = {asked} does not divide the width of some layers: "
        attempt.events.warn("oft_blocks", f"{said}they have {', '.join(map(str, other))}.")


def warn_of_experts(model: Any, attempt: Attempt) -> None:
    """A mixture of which only the rest learns is not what everybody expects."""
    experts = experts_of(model)
    if experts and not any(experts.values()):
        said = f"The experts ({', '.join(sorted(experts))}) do not learn, only what is around them."
        attempt.events.warn("experts_left", said)


def pick_attention(
    models: Sequence[Any], asked: Asked, attempt: Attempt, *, computed: torch.dtype | None = None
) -> Way:
    """Choose how examples stand in rows, and say why where they could not stand together.

    models: all that read the same groups; computed: the format that products are computed in, where
    it is not that of the weights.
    """
    device, wanted = attempt.device.torch_name, asked.arguments.attention
    choices = [choose_way(m, device=device, wanted=wanted, computed=computed) for m in models]
    choice = next((each for each in choices if each.way == "padded"), choices[0])
    if choice.why is not None:
        attempt.events.warn("rows_padded", f"Rows are padded: {choice.why}.")
    log.info("attention: %s%s", choice.way, f" ({choice.why})" if choice.why else "")
    for each in models:
        attend_by(each, choice.way)
    return choice.way


def reference_of(
    asked: Asked, attempt: Attempt, model: Any, precision: Precision
) -> Reference | None:
    """What the stage compares with, if it does; before a checkpoint is gone to."""
    if not asked.arguments.compares:
        return None
    dtype = getattr(torch, precision.weights)
    quantisation = quantisation_of(asked.arguments, "ref_model_quantization_bit", dtype)
    return load_reference(asked, attempt, model, dtype=dtype, quantisation=quantisation)


def pick_precision(asked: Asked, attempt: Attempt) -> Precision:
    """Choose the number formats, and say so where a person might expect others."""
    arguments, device = asked.arguments, attempt.device.torch_name
    precision = precision_of(
        asked.config, device, asked_format(arguments), pure_bf16=arguments.pure_bf16
    )
    if precision.note:
        attempt.events.warn("precision", precision.note)
    formats = precision.weights, precision.trained
    log.info("frozen weights in %s, what learns in %s, on %s", *formats, device)
    return precision


def load_model(asked: Asked, precision: Precision, device: str, *, steps: int) -> Any:
    """The base with what learns: a fresh adapter, one that goes on, or weights of its own."""
    dtype, arguments = getattr(torch, precision.weights), asked.arguments
    base = load_weights(
        asked.model,
        asked.config,
        dtype=dtype,
        device=device,
        scoring=arguments.stage == "rm",
        quantisation=quantisation_of(arguments, "quantization_bit", dtype),
    )
    if arguments.gradient_checkpointing and not arguments.disable_gradient_checkpointing:
        # Not reentrant: it needs no gradient at the input, so layers below the first adapter
        # still take no part in the backward pass.
        base.gradient_checkpointing_enable({"use_reentrant": False})
    if asked.adapters:
        model = go_on(base, asked.adapters, arguments, seed=asked.seed, precision=precision)
    else:
        model = tune(base, arguments, seed=asked.seed, precision=precision, steps=steps)
    drop_blocks(model)
    return model


def quantisation_of(arguments: FinetuneArguments, field: str, dtype: torch.dtype) -> Any:
    """How a base is quantised while it is loaded, to as many bits as the field says.

    Products are computed in the weights' format. Norms, embedding and output stay as they are:
    peft's prepare_model_for_kbit_training would widen them to fp32, which is slow and costs 4 GiB
    at 8B. Raises: BadSpec without bitsandbytes.
    """
    bits = getattr(arguments, field)
    if bits is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        message = "This node's runner has no bitsandbytes."
        raise BadSpec(message, field=field, hint="an admin can install it")
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type=arguments.quantization_type,
        bnb_4bit_use_double_quant=arguments.double_quantization,
    )


def warn_of_another_template(asked: Asked, chat: Chat, attempt: Attempt) -> None:
    """An adapter that goes on learned by a template; another one teaches it to speak anew."""
    for adapter in asked.adapters[-1:]:
        trained = read_origin(adapter).get("template")
        if trained is not None and trained != chat.template:
            said = "The adapter was tuned by another chat template; this run uses its own."
            attempt.events.warn("other_template", said)


def casting_of(model: Any, precision: Precision) -> torch.dtype | None:
    """What products are computed in, where weights in another format take part in them."""
    if precision.autocast or computes_by_casting(model, precision):
        format_: torch.dtype = getattr(torch, precision.weights)
        return format_
    return None


def mover_of(model: Any, asked: Asked, precision: Precision, plan: Plan, attempt: Attempt) -> Mover:
    """The optimizer, and a warning of what it does otherwise than may be expected."""
    for sentence in warnings_about(asked.arguments):
        attempt.events.warn("optimizer", sentence)
    torch.manual_seed(stream_seed(asked.seed, "optimizer"))
    mover = build_mover(
        model,
        asked.arguments,
        warmup_steps=warmup_of(asked.arguments, plan.steps),
        device=attempt.device.torch_name,
    )
    check_scaling(mover, precision)
    return mover


def check_scaling(mover: Mover, precision: Precision) -> None:
    """fp16 may have been chosen for the base's or the GPU's sake. Raises: BadSpec."""
    if precision.autocast and mover.within_backward:
        message = "Layers move before the scaled gradients of fp16 can be looked at."
        raise BadSpec(message, field="precision", hint="bf16: true, or no layerwise optimizer")


def scaler_of(precision: Precision) -> torch.amp.GradScaler:
    """Loss scaling, which fp16 alone needs."""
    return torch.amp.GradScaler("cuda", enabled=precision.autocast)


def plan_of(arguments: FinetuneArguments, examples: int) -> Plan:
    """How many steps, and what happens after which."""
    rows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    if arguments.stage in ONLINE:
        rows //= arguments.generations
    epoch, steps = steps_of(
        examples,
        rows_per_step=rows,
        epochs=arguments.num_train_epochs,
        max_steps=arguments.max_steps,
    )
    eval_steps = arguments.eval_steps or arguments.logging_steps
    eval_every = every(arguments.eval_strategy, eval_steps, epoch=epoch, total=steps)
    if eval_every is None and arguments.do_eval:
        eval_every = steps  # before the first and after the last
    save: Strategy = "no" if arguments.save_strategy == "best" else arguments.save_strategy
    return Plan(
        steps=steps,
        steps_per_epoch=epoch,
        rows_per_batch=arguments.per_device_train_batch_size,
        rows_per_step=rows,
        eval_rows_per_batch=arguments.per_device_eval_batch_size,
        max_grad_norm=arguments.max_grad_norm,
        eval_every=eval_every,
        save_every=every(save, arguments.save_steps, epoch=epoch, total=steps),
        log_every=every("steps", arguments.logging_steps, epoch=epoch, total=steps) or 1,
        keep=arguments.save_total_limit,
    )


def every(strategy: Strategy, steps: float, *, epoch: int, total: int) -> int | None:
    """How many steps lie between two; ``steps`` below 1 is a share of all.

    >>> every("steps", 0.25, epoch=10, total=30), every("epoch", 5, epoch=10, total=30)
    (8, 10)
    """
    if strategy == "no":
        return None
    if strategy == "epoch":
        return epoch
    return math.ceil(total * steps) if steps < 1 else int(steps)


def description(asked: Asked, data: str, examples: int, device: str, *, job: str) -> dict[str, Any]:
    """What a resumed run must agree with, and what it runs on."""
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    threads = torch.get_num_threads()
    platform = {"torch": str(torch.__version__), "threads": threads, "device": name}
    return {
        "examples": examples,
        "data": data,
        "seed": asked.seed,
        "job": job,
        "platform": platform,
    }


def resume(attempt: Attempt, running: Running, run: Mapping[str, Any], *, steps: int) -> Position:
    """Start at the checkpoint that the spec names, or at the beginning.

    Another job's that does not fit is left aside. Raises: FolderDamaged, BadSpec (this job's own).
    """
    if attempt.spec.resume is None:
        return Position()
    folder = Path(attempt.spec.resume)
    try:
        position = read_checkpoint(folder, running, run=run, steps=steps)
    except BadSpec as unfit:
        if job_of(folder) in (None, attempt.spec.job):
            raise
        said = f"{unfit.message} Training begins at step 0."
        attempt.events.warn("resume_ignored", said)
        return Position()
    if other := differences(folder, run):
        attempt.events.warn("not_bit_for_bit", f"The checkpoint ran elsewhere: {'; '.join(other)}.")
    log.info("resumed at step %d", position.step)
    return position
