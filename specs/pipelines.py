"""From a pipeline as people write it to its jobs: each step a spec, ``from`` naming other steps."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any
from uuid import UUID

from tuneyard.specs.base_models import RemoteCode
from tuneyard.specs.errors import InputError, SpecRejected
from tuneyard.specs.ids import is_id, new_id, show_id
from tuneyard.specs.jobs import JobSpec, Note, read_spec, rejected
from tuneyard.specs.problems import nearest, problem, shown

MAX_STEPS = 100


@dataclass(frozen=True)
class Step:
    """A step with the id that its job will have; ``from`` in its spec names jobs by now."""

    id: UUID
    spec: JobSpec
    notes: tuple[Note, ...]
    position: int  # as it was written, from 0


def read_pipeline(
    document: Mapping[str, Any], *, remote_code: RemoteCode = "refused"
) -> list[Step]:
    """Check ``{"pipeline": [step, …]}``; the steps in an order in which each follows its inputs.

    Raises: SpecRejected with the problems of all steps, fields as ``pipeline[1].lora_rank``.
    """
    steps = _steps(document)
    needs = _needs(steps, _names(steps))
    order = _order(steps, needs)
    # In this order their ids rise, so that whoever locks jobs by id locks parents first.
    ids = dict(zip(order, sorted(new_id() for _ in steps), strict=True))
    read, problems = [], []
    for position in order:
        document = dict(steps[position])
        for (field, place), (other, output) in needs[position].items():
            source = {"from": show_id("job", ids[other]) + (output and f".{output}")}
            if place is None:
                document[field] = source
            else:
                document[field] = [*document[field][:place], source, *document[field][place + 1 :]]
        try:
            spec, notes = read_spec(document, remote_code=remote_code)
            read.append(Step(ids[position], spec, tuple(notes), position))
        except InputError as error:
            problems += in_step(position, error).problems
    if problems:
        raise rejected(problems)
    return read


def in_step(position: int, error: InputError) -> SpecRejected:
    """The problems of a step's spec as problems of the pipeline."""
    found = error.problems if isinstance(error, SpecRejected) else [error]
    for each in found:
        each.field = f"pipeline[{position}].{each.field}" if each.field else f"pipeline[{position}]"
    refused = SpecRejected(found)
    refused.http_status = error.http_status
    return refused


def _steps(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    steps = document["pipeline"]
    hint = 'a list of jobs: {"pipeline": [{"name": "tune", "kind": "finetune", …}, …]}'
    if not isinstance(steps, list):
        raise SpecRejected([problem("wrong_type", "pipeline is no list.", "pipeline", hint)])
    if not 1 <= len(steps) <= MAX_STEPS:
        message = f"A pipeline has 1 to {MAX_STEPS} steps, this one {len(steps)}."
        raise SpecRejected([problem("out_of_range", message, "pipeline", hint)])
    beside = [name for name in document if name != "pipeline"]
    wrong = [
        problem(
            "unknown_field", f"{name[:60]} stands beside pipeline.", name[:60], "put it in a step"
        )
        for name in beside
    ]
    wrong += [
        problem("not_an_object", f"Step {position} is no object.", f"pipeline[{position}]", hint)
        for position, step in enumerate(steps)
        if not isinstance(step, Mapping)
    ]
    if wrong:
        raise rejected(wrong)
    return steps


def _names(steps: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Step's name -> its position. A step without a name cannot be referred to."""
    names: dict[str, int] = {}
    for position, step in enumerate(steps):
        name = step.get("name")
        if isinstance(name, str) and names.setdefault(name, position) != position:
            field = f"pipeline[{position}].name"
            message = f"Two steps are called {shown(name)}."
            raise SpecRejected([problem("conflicting_fields", message, field, "rename one")])
    return names


Needs = Mapping[tuple[str, int | None], tuple[int, str]]
"""Field of a step, and the place in it if it is a list -> the step it names, and the output."""


def _needs(steps: Sequence[Mapping[str, Any]], names: Mapping[str, int]) -> list[Needs]:
    """What each step's ``from`` names; ids of jobs elsewhere are no steps."""
    found: list[Needs] = []
    problems: list[InputError] = []
    for position, step in enumerate(steps):
        needs = {}
        for place, value in _places(step):
            source = value.get("from") if isinstance(value, Mapping) else None
            if not isinstance(source, str) or is_id("job", source.partition(".")[0]):
                continue
            try:
                needs[place] = _step_named(source, f"pipeline[{position}].{place[0]}", names)
            except InputError as error:
                problems.append(error)
        found.append(needs)
    if problems:
        raise rejected(problems)
    return found


def _places(step: Mapping[str, Any]) -> Iterator[tuple[tuple[str, int | None], Any]]:
    """Each field's value, and where it is a list of references (adapters) each of them."""
    for field, value in step.items():
        if isinstance(value, list) and field.startswith("adapter"):
            yield from (((field, i), each) for i, each in enumerate(value))
        else:
            yield (field, None), value


def _step_named(source: str, field: str, names: Mapping[str, int]) -> tuple[int, str]:
    """Which step ``name`` or ``name.output`` means, and the output."""
    if source in names:
        return names[source], ""
    name, _, output = source.rpartition(".")
    if name in names:
        return names[name], output
    near = nearest(name or source, names)
    hint = f"did you mean {near}?" if near else "the name of another step, or the id of a job"
    raise problem("unknown_step", f"No step is called {shown(source)}.", field, hint)


def _order(steps: Sequence[Mapping[str, Any]], needs: Sequence[Needs]) -> list[int]:
    graph = {
        position: sorted({other for other, _ in each.values()})
        for position, each in enumerate(needs)
    }
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        ring = list(reversed(error.args[1]))
        shown_ring = " needs ".join(str(steps[position].get("name")) for position in ring)
        message = f"These steps wait for each other: {shown_ring}."
        field = f"pipeline[{ring[0]}]"
        hint = "no step can use what only comes after it"
        raise SpecRejected([problem("dependency_cycle", message, field, hint)]) from None
