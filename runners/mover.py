"""What moves the parameters: an optimizer, or several that share the work, and their state."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tuneyard.runners.failures import BadSpec
from tuneyard.runners.optimizer_state import (
    Reader,
    Tree,
    Writer,
    read_tree,
    restore_tree,
    state_tree,
    write_tree,
)


class Mover:
    """Optimizers over the parameters of one model.

    parts: each moves parameters of its own. learn: all that learns, by name. within_backward: the
    parts step by themselves as gradients appear. device: where states live.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        parts: Sequence[torch.optim.Optimizer],
        *,
        learn: Mapping[str, torch.nn.Parameter],
        rate: float,
        device: str,
        within_backward: bool = False,
    ) -> None:
        self.parts, self.learn = list(parts), dict(learn)
        self.within_backward = within_backward
        self._device = device
        self._parameters = dict(model.named_parameters())
        self._names: dict[torch.Tensor, str] = {p: name for name, p in self._parameters.items()}
        # Beside each other groups may have other rates (LoRA+): they keep their proportion.
        self._shares = [[_share(group, rate) for group in p.param_groups] for p in self.parts]
        self._begun = [[_copied(g) for g in part.param_groups] for part in self.parts]

    def set_rate(self, rate: float) -> None:
        """Say the learning rate of the next step."""
        for part, shares in zip(self.parts, self._shares, strict=True):
            for group, share in zip(part.param_groups, shares, strict=True):
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(rate * share)
                else:
                    group["lr"] = rate * share

    def clip(self, limit: float) -> float:
        """Scale all gradients to a common norm of ``limit`` at most; returns the norm before."""
        found = [p.grad for p in self.learn.values() if p.grad is not None]
        if not any(gradient.is_sparse for gradient in found):
            return float(torch.nn.utils.clip_grad_norm_(self.learn.values(), limit))
        norms = [torch.linalg.vector_norm(_values(gradient)) for gradient in found]
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        if norm > limit:
            for gradient in found:
                gradient.mul_(limit / (norm + 1e-6))
        return norm

    def unscale(self, scaler: torch.amp.GradScaler) -> None:
        """Undo the scaling of fp16's loss in all gradients."""
        for part in self.parts:
            scaler.unscale_(part)

    def step(self, scaler: torch.amp.GradScaler, *, norm: float) -> None:
        """Move, unless a gradient overflowed."""
        if not self.within_backward and (math.isfinite(norm) or not scaler.is_enabled()):
            for part in self.parts:
                scaler.step(part)
        scaler.update()

    def forget(self) -> None:
        """Drop the gradients."""
        for parameter in self.learn.values():
            parameter.grad = None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All that learns counts as such, also what waits for its turn."""
        yield

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """The model as it is to be measured and saved; training goes on afterwards as before."""
        yield

    def settle(self) -> None:
        """The model as it is to be measured and saved, for good."""

    def save(self, path: Path) -> None:
        """Write the state into a file."""
        writer = Writer(self._names)
        write_tree(path, self._tree(writer), writer.tensors)

    def check(self, path: Path) -> None:
        """Look whether a state is of these optimizers. Raises: BadSpec."""
        tree = read_tree(path)
        kinds = [type(part).__qualname__ for part in self.parts]
        groups = [len(part.param_groups) for part in self.parts]
        parts = tree["parts"] if tree else []
        if [part["class"] for part in parts] != kinds or groups != [
            len(part["groups"]) for part in parts
        ]:
            raise BadSpec(
                "The checkpoint holds the state of another optimizer than the arguments ask for.",
                field="optim",
                hint="keep optim and its kind as they were, or start from scratch",
            )

    def restore(self, path: Path) -> None:
        """Go on from a state that was checked; the model has its own back already."""
        self._restore(read_tree(path), Reader(load_file(path), self._parameters, self._device))

    def _tree(self, writer: Writer) -> Tree:
        parts = zip(self.parts, self._begun, strict=True)
        return {"parts": [state_tree(part, begun, writer, self._names) for part, begun in parts]}

    def _restore(self, tree: Tree, reader: Reader) -> None:
        for part, kept in zip(self.parts, tree["parts"], strict=True):
            restore_tree(part, kept, reader, self._parameters)


def _copied(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's values as they are now: some change in their place."""
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in group.items()}


def _share(group: Mapping[str, Any], rate: float) -> float:
    return float(group["lr_scale"] if "lr_scale" in group else group["lr"] / rate)


def _values(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


class ScheduleFree(Mover):
    """Trains one point and answers with another, the average of where it has been.

    What is measured and saved is the average. The way back from it is not exact in floating point,
    so the point that trains is put aside meanwhile, and stands in the state beside the moments.
    """

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._aside: dict[str, torch.Tensor] = {}
        self._each("train")

    def _each(self, mode: str) -> None:
        for part in self.parts:
            getattr(part, mode)()

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Go to the average, and back; a run that is over stays there."""
        if self._aside:
            yield
            return
        self.settle()
        try:
            yield
        finally:
            self._each("train")
            self._put(self._aside)
            self._aside = {}

    def settle(self) -> None:
        """Go to the average."""
        self._aside = {name: p.detach().clone() for name, p in self.learn.items()}
        self._each("eval")

    @torch.no_grad()
    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.learn[name].copy_(value)

    def _tree(self, writer: Writer) -> Tree:
        trains = self._aside or {name: p.detach() for name, p in self.learn.items()}
        return super()._tree(writer) | {
            "trains": {name: writer.tree(p, f"{name}:trains") for name, p in trains.items()}
        }

    def _restore(self, tree: Tree, reader: Reader) -> None:
        super()._restore(tree, reader)
        self._put({name: reader.value(kept) for name, kept in tree["trains"].items()})


class Blocks(Mover):
    """BAdam by layers: copies of one block in fp32 learn, and it says which block is next.

    The moments are the copies', and are gone when the block is.
    """

    @property
    def _badam(self) -> Any:
        return self.parts[0]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All that learns counts as such, whichever block it is in."""
        active = {name: p.requires_grad for name, p in self.learn.items()}
        self.settle()
        try:
            yield
        finally:
            for name, flag in active.items():
                self.learn[name].requires_grad_(flag)

    at_rest = whole

    def settle(self) -> None:
        """The same, for good."""
        for parameter in self.learn.values():
            parameter.requires_grad_(True)

    def _copies(self) -> dict[str, torch.nn.Parameter]:
        listed = self._badam.named_parameters_list
        return {listed[i][0]: copy for i, copy in self._badam.param_idx2hp.items()}

    def _tree(self, writer: Writer) -> Tree:
        badam, copies = self._badam, self._copies()
        base = badam.base_optimizer
        groups: list[Tree] = [None for _ in self._begun[0]]
        return {
            "parts": [{"class": type(badam).__qualname__, "groups": groups}],
            "active": badam.active_param_prefixs,
            "next": badam.current_block_idx,
            "order": getattr(badam, "block_order", None),
            "step": badam.global_step,
            "copies": {n: writer.tree(c.detach(), f"{n}:copy") for n, c in copies.items()},
            "moments": {n: writer.tree(dict(base.state[c]), n) for n, c in copies.items()},
        }

    def _restore(self, tree: Tree, reader: Reader) -> None:
        badam = self._badam
        blocks = [prefixes + badam.active_modules for prefixes in badam.block_prefix_list]
        badam.current_block_idx = blocks.index(tree["active"])
        if tree["order"] is not None:
            badam.block_order = list(tree["order"]) or [0]  # so that nothing is drawn
        badam.switch_trainable_params(verbose=0)
        if tree["order"] is not None:
            badam.block_order = list(tree["order"])
        badam.current_block_idx, badam.global_step = tree["next"], tree["step"]
        for name, copy in self._copies().items():
            copy.data.copy_(reader.value(tree["copies"][name]))
            badam.base_optimizer.state[copy] = reader.value(tree["moments"][name])


class Shares(Mover):
    """BAdam by ratio: a share of the entries of each matrix learns at a time."""

    def _tree(self, writer: Writer) -> Tree:
        badam: Any = self.parts[0]
        masks = {
            shape: None if mask is None else mask._indices()
            for shape, mask in badam.mask_dict.items()
        }
        return super()._tree(writer) | {
            "step": badam.global_step,
            "places": writer.tree({p: dict(at) for p, at in badam.sparse_dict.items()}, "places"),
            "masks": writer.tree(masks, "masks"),
        }

    def _restore(self, tree: Tree, reader: Reader) -> None:
        super()._restore(tree, reader)
        badam: Any = self.parts[0]
        badam.global_step = tree["step"]
        badam.sparse_dict.update(reader.value(tree["places"]))
        dtypes = {p.shape: p.dtype for p in self.learn.values()}
        for shape, indices in reader.value(tree["masks"]).items():
            badam.mask_dict[shape] = None
            if indices is not None:
                ones = torch.ones(indices.shape[1], device=indices.device, dtype=dtypes[shape])
                badam.mask_dict[shape] = torch.sparse_coo_tensor(indices, ones, shape)
