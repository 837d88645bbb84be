"""Placing: gangs whole or not at all, on one node, in order; properties without a database."""

from collections import Counter
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from tuneyard.models.placements import Capacity, FreeSlot, QueuedJob
from tuneyard.scheduler.placing import place, plan
from tuneyard.specs.ids import new_id


def a_job(devices: int = 1, kind: str = "gpu") -> QueuedJob:
    return QueuedJob(new_id(), "finetune", "j", devices, kind, frozenset({"base"}))


def slots_of(node: str, count: int, kind: str = "gpu") -> list[FreeSlot]:
    node_id = UUID(int=hash(node) & (1 << 100) - 1)
    return [FreeSlot(new_id(), node_id, node, f"{node}-{i}", kind, 0) for i in range(count)]


def capacity_of(slots: list[FreeSlot]) -> dict[str, dict[str, Capacity]]:
    counted = Counter((slot.kind, slot.node_name) for slot in slots)
    found: dict[str, dict[str, Capacity]] = {}
    for (kind, node), count in counted.items():
        found.setdefault(kind, {})[node] = Capacity(count)
    return found


def test_the_fullest_node_that_fits_is_chosen() -> None:
    free = slots_of("a", 4) + slots_of("b", 2)
    chosen = place(a_job(2), free)
    assert chosen is not None
    assert chosen.node_name == "b"


def test_a_gang_is_never_split_over_nodes() -> None:
    assert place(a_job(3), slots_of("a", 2) + slots_of("b", 2)) is None


def test_a_gpu_job_does_not_take_a_cpu_slot() -> None:
    assert place(a_job(), slots_of("a", 3, kind="cpu")) is None


def test_a_waiting_gang_keeps_its_node_from_smaller_jobs_behind_it() -> None:
    free = slots_of("a", 1)
    gang, small = a_job(2), a_job(1)
    decided = plan([gang, small], free, {"gpu": {"a": Capacity(2)}})
    assert decided.placements == []
    assert set(decided.wait_reasons) == {gang.id, small.id}


def test_jobs_behind_a_waiting_gang_use_the_other_nodes() -> None:
    gang, small = a_job(2), a_job(1)
    free = slots_of("a", 1) + slots_of("b", 1)
    decided = plan([gang, small], free, {"gpu": {"a": Capacity(2), "b": Capacity(1)}})
    assert [(job.id, chosen.node_name) for job, chosen in decided.placements] == [(small.id, "b")]


def test_a_job_larger_than_every_node_holds_nothing_back() -> None:
    giant, small = a_job(9), a_job(1)
    decided = plan([giant, small], slots_of("a", 1), {"gpu": {"a": Capacity(1)}})
    assert [job.id for job, _ in decided.placements] == [small.id]
    assert decided.wait_reasons[giant.id] == "waits for 9 GPUs: the largest node has 1"


def test_a_node_that_has_the_base_comes_before_a_fuller_one() -> None:
    free = slots_of("a", 4) + slots_of("b", 2)
    job = QueuedJob(new_id(), "finetune", "j", 2, "gpu", frozenset({"base", "data"}))
    for digests, node in (({"base"}, "a"), ({"other"}, "b")):
        cached = {free[0].node_id: frozenset(digests)}
        chosen = place(job, free, cached)
        assert chosen is not None
        assert chosen.node_name == node


def test_a_node_that_has_the_base_and_no_room_is_not_waited_for() -> None:
    full, free = slots_of("a", 1)[0], slots_of("b", 1)
    job = QueuedJob(new_id(), "finetune", "j", 1, "gpu", frozenset({"base"}))
    decided = plan([job], free, {"gpu": {"a": 1, "b": 1}}, cached={full.node_id: job.digests})
    assert [chosen.node_name for _, chosen in decided.placements] == ["b"]


def test_the_wait_reason_counts_what_is_busy() -> None:
    third = a_job()
    decided = plan([third], [], {"gpu": {"a": Capacity(2)}})
    assert decided.wait_reasons[third.id] == "waits for 1 GPU: 2 of 2 busy"


def test_the_wait_reason_counts_those_ahead_that_wait_for_the_same_kind() -> None:
    jobs = [a_job(kind="cpu"), a_job(), a_job(), a_job()]
    capacity = {"gpu": {"a": Capacity(1)}, "cpu": {"a": Capacity(1)}}
    decided = plan(jobs, slots_of("a", 1), capacity)
    reasons = [decided.wait_reasons.get(job.id) for job in jobs]
    assert reasons == [
        "waits for 1 CPU slot: 1 of 1 busy",
        None,
        "waits for 1 GPU: 1 of 1 busy",
        "waits for 1 GPU: 1 of 1 busy, 1 ahead of it",
    ]


def test_the_wait_reason_names_nodes_whose_disk_is_nearly_full() -> None:
    job = a_job()
    full = {"a": Capacity(2, disk_low=True)}
    decided = plan([job], [], {"gpu": full})
    assert decided.wait_reasons[job.id] == "waits for 1 GPU: the disk of a is nearly full"
    decided = plan([job], [], {"gpu": full | {"b": Capacity(1)}})
    assert decided.wait_reasons[job.id] == (
        "waits for 1 GPU: 1 of 1 busy; the disk of a is nearly full"
    )


@given(
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["gpu", "cpu"])), max_size=12),
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["gpu", "cpu"])), max_size=5),
)
def test_no_slot_is_given_twice_and_every_gang_is_whole_on_one_node(
    wanted: list[tuple[int, str]], nodes: list[tuple[int, str]]
) -> None:
    jobs = [a_job(devices, kind) for devices, kind in wanted]
    free = [s for i, (count, kind) in enumerate(nodes) for s in slots_of(f"n{i}", count, kind)]
    cached = {slot.node_id: frozenset({"base"}) for slot in free[::2]}
    decided = plan(jobs, free, capacity_of(free), cached=cached)
    given_away = [slot for _, chosen in decided.placements for slot in chosen.slot_ids]
    by_id = {slot.id: slot for slot in free}
    assert len(given_away) == len(set(given_away))
    for job, chosen in decided.placements:
        slots = [by_id[slot] for slot in chosen.slot_ids]
        assert len(slots) == job.devices_each
        assert {s.node_id for s in slots} == {chosen.node_id}
        assert {s.kind for s in slots} == {job.device_kind}
    placed = {job.id for job, _ in decided.placements}
    assert placed | set(decided.wait_reasons) == {job.id for job in jobs}
