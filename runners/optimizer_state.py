"""An optimizer's state as tensors and JSON, and back, bit for bit. No pickle.

Moments are tensors, and beside them stand counters, texts, None, lists, nested dicts, projectors
(GaLore's, APOLLO's) and quantised tensors (torchao's). A state becomes a tree of JSON whose leaves
name tensors; the tree travels in the head of the same safetensors file.
"""

import importlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tuneyard.runners.failures import BadSpec

HEAD = "state"
Tree = Any
Tensors = dict[str, torch.Tensor]

OBJECTS = (
    "galore_torch.galore_projector.GaLoreProjector",
    "apollo_torch.svd_projector.GaLoreProjector",
    "apollo_torch.random_projector.GradientProjector",
)
"""Classes whose instances a state may hold: nothing but values stands in them."""

QUANTISED = (
    "torchao.optim.subclass_4bit.OptimState4bit",
    "torchao.optim.subclass_8bit.OptimState8bit",
)
"""Tensors that are made of others."""


class Writer:
    """Turns values into trees; tensors that are the same in memory are kept once."""

    def __init__(self, names: Mapping[torch.Tensor, str]) -> None:
        self.tensors: Tensors = {}
        self._names = {id(tensor): name for tensor, name in names.items()}
        self._kept: dict[object, str] = {}
        self._alive: list[
            torch.Tensor
        ] = []  # what is freed may be followed by another in its place

    def tree(self, value: Any, at: str) -> Tree:
        """The tree of a value. ``at`` becomes the name of its tensor, or the beginning of it."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor(value, at)
        if isinstance(value, dict):
            keyed = ((self._key(k), v, self._shown(k)) for k, v in value.items())
            return {"entries": [[key, self.tree(v, f"{at}:{shown}")] for key, v, shown in keyed]}
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [self.tree(each, f"{at}:{i}") for i, each in enumerate(value)]}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        return {"object": _known(value, OBJECTS), "values": self.tree(vars(value), at)}

    def _tensor(self, value: torch.Tensor, at: str) -> Tree:
        if id(value) in self._names:
            return {"parameter": self._names[id(value)]}
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            names, context = value.__tensor_flatten__()  # type: ignore[attr-defined]
            inner = {name: getattr(value, name) for name in names}
            parts = {"inner": self.tree(inner, at), "context": self.tree(context, at)}
            return {"quantised": _known(value, QUANTISED), **parts}
        tree: Tree = {"tensor": self._keep(value, at), "on_cpu": value.device.type == "cpu"}
        if not value.is_contiguous():  # products of it have other bits where it lies otherwise
            tree["strides"] = list(value.stride())
        if getattr(value, "is_paged", False):
            tree["paged"] = True
        return tree

    def _keep(self, value: torch.Tensor, at: str) -> str:
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        same: object = place if value.numel() else at
        if same not in self._kept:
            self._kept[same] = at
            self._alive.append(value)
            self.tensors[at] = value.detach().cpu().contiguous().clone()
        return self._kept[same]

    def _key(self, key: Any) -> Tree:
        if isinstance(key, torch.Tensor):
            return {"parameter": self._names[id(key)]}
        return self.tree(tuple(key) if isinstance(key, torch.Size) else key, "")

    def _shown(self, key: Any) -> str:
        return self._names[id(key)] if isinstance(key, torch.Tensor) else str(key)


Pages = Callable[[torch.Tensor, torch.device], torch.Tensor]
"""Puts a tensor where bitsandbytes keeps what it pages."""


class Reader:
    """Turns trees into values again."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        parameters: Mapping[str, torch.nn.Parameter],
        device: str,
    ) -> None:
        self._tensors, self._parameters = tensors, parameters
        self._device = torch.device(device)
        self._made: Tensors = {}

    def value(self, tree: Tree) -> Any:
        """The value of a tree."""
        if not isinstance(tree, dict):
            return tree
        if "tensor" in tree:
            return self._tensor(tree)
        if "entries" in tree:
            return {self._key(key): self.value(each) for key, each in tree["entries"]}
        if "list" in tree:
            return [self.value(each) for each in tree["list"]]
        if "tuple" in tree:
            return tuple(self.value(each) for each in tree["tuple"])
        if "parameter" in tree:
            return self._parameters[tree["parameter"]]
        if "dtype" in tree:
            return getattr(torch, tree["dtype"])
        if "quantised" in tree:
            kind = _class(tree["quantised"], QUANTISED)
            return kind.__tensor_unflatten__(self.value(tree["inner"]), self.value(tree["context"]))
        made = object.__new__(_class(tree["object"], OBJECTS))
        vars(made).update(self.value(tree["values"]))
        return made

    def _tensor(self, tree: Tree) -> torch.Tensor:
        name = tree["tensor"]
        if name not in self._made:
            value = self._tensors[name]
            if tree.get("paged"):
                value = _paged(value, self._device)
            elif not tree["on_cpu"]:
                value = value.to(self._device)
            if strides := tree.get("strides"):
                laid = torch.empty_strided(
                    value.shape, strides, dtype=value.dtype, device=value.device
                )
                value = laid.copy_(value)
            self._made[name] = value
        return self._made[name]

    def _key(self, tree: Tree) -> Any:
        value = self.value(tree)
        return torch.Size(value) if isinstance(value, tuple) else value


def _paged(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """In memory that GPU and host share, as bitsandbytes has it; it wants a numbered GPU."""
    from bitsandbytes import functional

    paging: Any = functional
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())
    buffer: torch.Tensor = paging.get_paged(*value.shape, dtype=value.dtype, device=device)
    buffer.copy_(value)
    paging.GlobalPageManager.get_instance().paged_tensors.append(buffer)
    return buffer


def _known(value: Any, allowed: tuple[str, ...]) -> str:
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if name not in allowed:
        raise TypeError(f"A {name} in an optimizer's state cannot be kept.")
    return name


def _class(name: str, allowed: tuple[str, ...]) -> Any:
    if name not in allowed:
        raise BadSpec(f"The checkpoint's optimizer holds a {name}.", field="resume")
    module, _, kind = name.rpartition(".")
    return getattr(importlib.import_module(module), kind)


def write_tree(path: Path, tree: Tree, tensors: Tensors) -> None:
    """One file: tensors by name, the tree in its head."""
    save_file(tensors, path, metadata={HEAD: json.dumps(tree, sort_keys=True)})


def read_tree(path: Path) -> Tree:
    """The tree that ``write_tree`` wrote; None: an older file has none."""
    with safe_open(path, framework="pt") as file:
        head = (file.metadata() or {}).get(HEAD)
    return json.loads(head) if head else None


def changed(group: Mapping[str, Any], begun: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer itself wrote into a group: arguments and rates are set anew each run."""
    skipped = ("params", "lr", "train_mode")
    return {
        name: value
        for name, value in group.items()
        if name not in skipped and not (name in begun and _same(value, begun[name]))
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    return bool(a == b)


def state_tree(
    optimizer: torch.optim.Optimizer,
    begun: list[dict[str, Any]],
    writer: Writer,
    names: Mapping[torch.Tensor, str],
) -> Tree:
    """The moments of one optimizer, by the names of their parameters."""
    moments = {
        names[parameter]: writer.tree(dict(state), names[parameter])
        for parameter, state in optimizer.state.items()
        if state
    }
    groups = [
        writer.tree(changed(group, before), f"group{i}")
        for i, (group, before) in enumerate(zip(optimizer.param_groups, begun, strict=True))
    ]
    formats = {names[p]: str(p.dtype).removeprefix("torch.") for p in optimizer.state if p in names}
    return {
        "class": type(optimizer).__qualname__,
        "moments": moments,
        "formats": formats,
        "groups": groups,
    }


def _in_format(moments: Any, before: torch.dtype, now: torch.dtype) -> Any:
    """Moments of a parameter that learns in another format than before follow it."""
    if before == now:
        return moments
    return {
        name: value.to(now) if isinstance(value, torch.Tensor) and value.dtype == before else value
        for name, value in moments.items()
    }


def restore_tree(
    optimizer: torch.optim.Optimizer,
    tree: Tree,
    reader: Reader,
    parameters: Mapping[str, torch.nn.Parameter],
) -> None:
    """Put moments and groups back."""
    optimizer.state = defaultdict(dict)
    for name, kept in tree["moments"].items():
        moments, parameter = reader.value(kept), parameters[name]
        before = getattr(torch, tree["formats"][name])
        optimizer.state[parameter] = _in_format(moments, before, parameter.dtype)
    for group, kept in zip(optimizer.param_groups, tree["groups"], strict=True):
        group.update(reader.value(kept))
