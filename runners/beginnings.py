"""How what learns begins: each tensor from a stream of its own, in fp32 on the CPU.

So it begins the same whatever the precision, quantisation, device, order of modules or layers
chosen: peft draws from the one global stream and rounds to the base's format.
"""

import math
from typing import Any

import torch
from peft import PeftType
from peft.utils.integrations import dequantize_module_weight

from tuneyard.runners.failures import BadSpec
from tuneyard.runners.seeds import stream_seed
from tuneyard.runners.summing import Summand, adapter_state

SCORE_HEAD = "score"
"""What transformers calls the head of a model that scores sequences."""

SCORE_STD = 0.02
"""Its head's deviation at the start: transformers' usual initializer_range."""

ADALORA_STD = 0.02
"""Source: peft 0.21, tuners/adalora/layer.py, reset_lora_parameters."""

PREFIX_STD = 0.02
"""Small, so that a text begins with little to attend to before it; peft's 1.0 drowns it."""


def initialise(model: Any, seed: int) -> None:
    """Draw what peft draws at random. What it sets (B, lambda, R to 0 or 1) is the identity.

    Source of the distributions: peft 0.21, tuners/*/layer.py.
    """
    kind = model.peft_config["default"].peft_type
    if kind is PeftType.VERA:
        _project(model, seed)
    for name, parameter in model.named_parameters():
        stream = torch.Generator().manual_seed(stream_seed(seed, "adapter", name))
        values = _drawn(kind, name, parameter, model, stream)
        if values is not None:
            with torch.no_grad():
                parameter.copy_(values)


def _drawn(
    kind: PeftType, name: str, parameter: torch.Tensor, model: Any, stream: torch.Generator
) -> torch.Tensor | None:
    """Values of a tensor that begins at random; None for one that does not."""
    values = torch.empty(parameter.shape, dtype=torch.float32)
    if f".{SCORE_HEAD}." in name:
        return torch.nn.init.normal_(values, std=SCORE_STD, generator=stream)
    if kind is PeftType.ADALORA:
        random = ".lora_A." in name or ".lora_B." in name
        return values.normal_(std=ADALORA_STD, generator=stream) if random else None
    if ".vera_lambda_d." in name:
        return values.fill_(model.peft_config["default"].d_initial)
    if ".lora_A." in name:
        return torch.nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=stream)
    if ".lora_embedding_B." in name:
        return torch.nn.init.normal_(values, generator=stream)
    if not name.startswith("prompt_encoder."):
        return None
    if kind is PeftType.PREFIX_TUNING:
        return values.normal_(std=PREFIX_STD, generator=stream)
    if kind is PeftType.PROMPT_TUNING:
        words = model.get_base_model().get_input_embeddings().weight
        rows = torch.randint(len(words), (len(parameter),), generator=stream)
        chosen: torch.Tensor = words.detach()[rows.to(words.device)].float().cpu()
        return chosen
    if ".embedding." in name:
        return values.normal_(generator=stream)
    return _of_a_linear(name, values, model, stream)


def _project(model: Any, seed: int) -> None:
    """vera's two frozen projections, which all layers share."""
    for name, buffer in model.named_buffers():
        which = next((each for each in ("vera_A", "vera_B") if f".{each}." in name), None)
        if which is not None:
            stream = torch.Generator().manual_seed(stream_seed(seed, "adapter", which))
            bound = math.sqrt(6 / buffer.shape[1])
            values = torch.empty(buffer.shape, dtype=torch.float32)
            buffer.copy_(values.uniform_(-bound, bound, generator=stream))


def _of_a_linear(
    name: str, values: torch.Tensor, model: Any, stream: torch.Generator
) -> torch.Tensor:
    """As torch.nn.Linear begins: p-tuning's encoder has three of them."""
    width = model.get_submodule(name.rpartition(".")[0]).in_features
    bound = 1 / math.sqrt(width)
    return values.uniform_(-bound, bound, generator=stream)


@torch.no_grad()
def begin_by_norms(model: Any) -> None:
    """dora's magnitudes are the base's norms, in the format in which they will be divided by them.

    peft takes them in the base's own, from which a bf16 base begins as another one.
    """
    for module in model.modules():
        for name, magnitude in (getattr(module, "lora_magnitude_vector", None) or {}).items():
            if name not in module.lora_A:
                continue  # an embedding's, whose norms peft takes of its factors
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            weight = dequantize_module_weight(module.get_base_layer()).to(a.dtype)
            norms = magnitude.get_weight_norm(weight, b @ a, module.scaling[name])
            magnitude.weight.copy_(norms)


def begin_by_singular_values(model: Any, seed: int, *, iterations: int) -> None:
    """PiSSA: A and B are the base's largest singular values, which the base itself gives up.

    What that changed is remembered as a summand, so that the result can stand over the untouched
    base. iterations: of the randomised decomposition; -1: the whole one. Raises: BadSpec for a rank
    beyond a layer's.
    Source: Meng et al. 2024, arXiv:2404.02948.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if "default" in (getattr(module, "lora_A", None) or {})
    }
    most = min((min(each.get_base_layer().weight.shape) for each in layers.values()), default=0)
    for name, module in layers.items():
        if (rank := module.r["default"]) > most:
            message = f"pissa_init takes {rank} singular values, and a layer has {most}."
            raise BadSpec(message, field="lora_rank", hint=f"at most {most}")
        base, scale = module.get_base_layer(), module.scaling["default"]
        weight = base.weight.detach().to("cpu", torch.float32)
        seed_here = stream_seed(seed, "pissa", name)
        a, b = _principal(weight, rank, iterations, seed_here)
        a, b = a / math.sqrt(scale), b / math.sqrt(scale)
        with torch.no_grad():
            module.lora_A["default"].weight.copy_(a)
            module.lora_B["default"].weight.copy_(b)
            base.weight.copy_(weight - scale * (b @ a))
    config, tensors = adapter_state(model)
    model.summands = [*summands_of(model), Summand(-1.0, config, tensors)]


def _principal(
    weight: torch.Tensor, rank: int, iterations: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors a: [rank, columns], b: [rows, rank] of the largest part of a matrix."""
    if iterations < 0:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(weight, rank, niter=iterations)
        vh = v.T
    root = s.sqrt()
    return root[:, None] * vh, u * root


def summands_of(model: Any) -> list[Summand]:
    """What else belongs to the result beside the adapter that learns."""
    return list(getattr(model, "summands", ()))
