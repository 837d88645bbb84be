"""Optimizers by name: groups, decay, packages, and their state in a checkpoint."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.attempts_by_hand import Ran, run_here
from support.tiny_models import a_dataset, a_tiny_base
from support.tunings import examples_of, mean_loss, plain_result
from transformers import LlamaForCausalLM, Trainer

from tuneyard.runners import assembly, packages
from tuneyard.runners.adapter import add_adapter, decaying_names, parameter_groups
from tuneyard.runners.arguments import FinetuneArguments
from tuneyard.runners.batches import collate, split
from tuneyard.runners.examples import IGNORED, Example
from tuneyard.runners.failures import BadSpec
from tuneyard.runners.finetune import finetune
from tuneyard.runners.losses import TokenLoss
from tuneyard.runners.optimizer_state import Reader, Writer
from tuneyard.runners.optimizers import build_mover
from tuneyard.runners.packages import check_packages
from tuneyard.runners.precision import Precision, choose_precision
from tuneyard.specs.errors import SpecRejected
from tuneyard.specs.exits import ExitCode
from tuneyard.specs.jobs import read_spec
from tuneyard.store.folder import read_manifest

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

SHORT = {"per_device_train_batch_size": 4, "learning_rate": 0.01, "lora_dropout": 0.1}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return a_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return a_dataset(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture
def tune(tmp_path, base, dataset):
    def run(*, resume: Path | None = None, **arguments) -> Ran:
        inputs = {"model": base, "dataset": dataset}
        return run_here(
            tmp_path,
            finetune,
            inputs=inputs,
            resume=resume and str(resume),
            arguments=SHORT | arguments,
        )

    return run


def arguments_of(**told) -> FinetuneArguments:
    return FinetuneArguments.model_validate({"model": "m", "dataset": "d"} | told)


def problems(**told) -> dict[str, tuple[str, str]]:
    with pytest.raises(SpecRejected) as refused:
        read_spec({"kind": "finetune", "model": "m", "dataset": "d"} | told)
    return {
        each.field: (each.code, f"{each.message} {each.hint}") for each in refused.value.problems
    }


@pytest.mark.parametrize(
    ("told", "field", "said"),
    [
        ({"use_galore": True}, "use_galore", "finetuning_type: full or freeze"),
        ({"use_apollo": True}, "use_apollo", "finetuning_type: full or freeze"),
        ({"use_badam": True}, "use_badam", "finetuning_type: full or freeze"),
        ({"use_adam_mini": True}, "use_adam_mini", "finetuning_type: full or freeze"),
        ({"use_muon": True, "use_galore": True}, "use_muon", "exclude each other"),
        ({"use_muon": True, "optim": "sgd"}, "optim", "leave optim out"),
        ({"optim": "galore_adamw"}, "optim_target_modules", "for example all-linear"),
        ({"optim": "apollo_adamw"}, "optim", "of low rank already"),
        ({"optim_target_modules": "q_proj"}, "optim_target_modules", "galore_adamw"),
        ({"optim": "adamw_torch_xla"}, "optim", "use adamw_torch"),
        ({"optim": "adamw_hf"}, "optim", "did you mean"),
        ({"optim": "sgd", "optim_args": "momentun=0.9"}, "optim_args", "did you mean momentum"),
        ({"optim": "sgd", "optim_args": "momentum"}, "optim_args", "for example rank"),
        ({"optim": "sgd", "optim_args": "nesterov=perhaps"}, "optim_args", "true or false"),
        ({"optim": "adafactor", "optim_args": "eps=1"}, "optim_args", "leave it out"),
        ({"optim": "sgd", "optim_args": "momentum=nan"}, "optim_args", "a number"),
        ({"optim": "sgd", "optim_args": "momentum=1e999"}, "optim_args", "a number"),
        ({"optim": "sgd", "optim_args": "momentum=-1"}, "optim_args", "0 or above"),
        ({"optim": "sgd", "optim_args": "momentum=0.1,momentum=0.9"}, "optim_args", "twice"),
        ({"optim": "sgd", "optim_args": "nesterov=true"}, "optim_args", "momentum above 0"),
        (
            {"optim": "galore_adamw", "optim_args": "update_proj_gap=0"},
            "optim_args",
            "update_proj_gap = '0' is out of range. above 0",
        ),
        ({"use_badam": True, "badam_switch_mode": "fixed"}, "badam_start_block", "which block"),
        ({"optim": "schedule_free_adamw", "adam_beta1": 0.0}, "adam_beta1", "above 0"),
        (
            {"use_galore": True, "galore_layerwise": True, "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps",
            "gradient_accumulation_steps: 1",
        ),
        ({"use_apollo": True, "apollo_layerwise": True, "fp16": True}, "fp16", "bf16: true"),
        ({"label_smoothing_factor": 0.1, "stage": "dpo"}, "label_smoothing_factor", "dpo_label"),
        ({"fp16": True, "pure_bf16": True}, "pure_bf16", "give one of them"),
        ({"precision": "fp32", "bf16": True}, "bf16", "give one of them"),
        ({"precision": "bf16", "fp16": True}, "fp16", "give one of them"),
        ({"use_muon": True, "loraplus_lr_ratio": 16.0}, "loraplus_lr_ratio", "give one of them"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_use_instead(told, field, said):
    assert said in problems(**told)[field][1]


def test_an_optimizer_whose_package_is_missing_is_refused_before_anything_slow(tune, monkeypatch):
    monkeypatch.setattr(packages, "version", _only("torch"))
    ran = tune(optim="schedule_free_adamw")
    assert ran.code == ExitCode.BAD_SPEC
    assert "optim: schedule_free_adamw needs the package schedulefree" in ran.failure["evidence"]
    assert "pip install schedulefree" in ran.failure["evidence"]
    assert not ran.of_type("phase")
    for told, package in [
        ({"optim": "adamw_8bit"}, "bitsandbytes"),
        ({"optim": "galore_adamw"}, "galore-torch"),
        ({"optim": "adamw_torch_4bit"}, "torchao"),
        ({"optim": "stable_adamw"}, "torch-optimi"),
        ({"use_badam": True}, "badam"),
        ({"use_adam_mini": True}, "adam-mini"),
        ({"use_apollo": True}, "apollo-torch"),
    ]:
        with pytest.raises(BadSpec, match=package):
            check_packages(arguments_of(**told))
    for told in ({}, {"optim": "adafactor"}, {"use_muon": True}):
        check_packages(arguments_of(**told))


def test_a_package_that_is_too_old_is_named_with_its_version(monkeypatch):
    monkeypatch.setattr(packages, "version", lambda _: "1.3.0")
    with pytest.raises(BadSpec, match=r"needs schedulefree 1\.4, here is 1\.3\.0"):
        check_packages(arguments_of(optim="schedule_free_radam"))


def _only(*installed: str):
    def version(package: str) -> str:
        if package not in installed:
            raise packages.PackageNotFoundError(package)
        return "1.0"

    return version


def test_norms_and_biases_do_not_decay_as_in_transformers(base):
    model = LlamaForCausalLM.from_pretrained(base)
    theirs = Trainer.get_decay_parameter_names(None, model)
    assert decaying_names(model) == set(theirs)
    groups = parameter_groups(model, arguments_of(weight_decay=0.1))
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    still = {name for name, _ in model.named_parameters()} - decaying_names(model)
    assert len(groups[1]["params"]) == len(still) == 5
    assert all("norm" in name for name in still)


def test_an_adapter_decays_as_a_whole(base):
    model = add_adapter(
        LlamaForCausalLM.from_pretrained(base),
        arguments_of(),
        seed=0,
        precision=Precision("float32"),
    )
    (group,) = parameter_groups(model, arguments_of(weight_decay=0.1))
    assert len(group["params"]) == 28


def test_muon_moves_matrices_and_adamw_the_rest(base):
    model = LlamaForCausalLM.from_pretrained(base)
    arguments = arguments_of(use_muon=True, weight_decay=0.1)
    muon, adamw = build_mover(model, arguments, warmup_steps=0, device="cpu").parts
    moved = {id(p) for group in muon.param_groups for p in group["params"]}
    rest = {id(p) for group in adamw.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        assert id(parameter) in (moved if inside else rest)


def weights_of(ran: Ran) -> dict[str, str]:
    """Digests of what a run leaves."""
    files = read_manifest(ran.workdir / "output")["files"]
    found = {each["path"]: each["sha256"] for each in files if ".safetensors" in each["path"]}
    assert found
    return found


@pytest.mark.parametrize(
    "told",
    [
        {"optim": "adafactor"},
        {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.5},
        {"use_muon": True},
        {"finetuning_type": "full", "optim": "rmsprop", "learning_rate": 0.002},
        {"loraplus_lr_ratio": 3.0, "optim": "adamw_torch"},
        {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
        {"optim": "adamw_torch_fused", "lr_scheduler_type": "reduce_lr_on_plateau"}
        | {"lr_scheduler_kwargs": {"patience": 0, "threshold": 0.9, "factor": 0.5}},
    ],
    ids=lambda told: "-".join(map(str, told.values())),
)
def test_a_resumed_run_ends_in_the_same_bits(tune, told):
    told = {"max_steps": 6, "save_steps": 3, "eval_strategy": "steps", "eval_steps": 1} | told
    told |= {"val_size": 2}
    whole = tune(**told)
    assert whole.code == ExitCode.DONE
    resumed = tune(**told, resume=whole.workdir / "checkpoints" / "step-3")
    assert weights_of(resumed) == weights_of(whole)
    assert {k: v for k, v in whole.metric("lr").items() if k > 3} == resumed.metric("lr")
    assert whole.metric("eval_loss")[6] == resumed.metric("eval_loss")[6]
    assert whole.metric("loss")[6] < whole.metric("loss")[1]


def test_what_schedule_free_measures_is_what_it_leaves(tune, base, dataset):
    told = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "lora_dropout": 0.0}
    ran = tune(**told, max_steps=4, val_size=2, eval_strategy="steps", eval_steps=1)
    more = tune(**told, max_steps=4, val_size=2)
    assert ran.adapter_sha256 == more.adapter_sha256  # measuring alters nothing
    _, held = split(examples_of(base, dataset), 2, seed=42)
    left = mean_loss(plain_result(ran, base), held)
    assert left == pytest.approx(ran.metric("eval_loss")[4], rel=1e-5)
    assert not ran.of_type("warning")
    (warning,) = tune(optim="schedule_free_adamw", max_steps=1).of_type("warning")
    assert "made for lr_scheduler_type: constant" in warning["message"]


def test_what_is_kept_when_schedule_free_is_over_still_knows_the_point_that_trains(base, tmp_path):
    """Before held-out rows are answered the last step is kept, at its average already."""

    def run(first: int, last: int, state: Path | None = None):
        model = LlamaForCausalLM.from_pretrained(base)
        told = arguments_of(optim="schedule_free_adamw", learning_rate=0.01)
        mover = build_mover(model, told, warmup_steps=0, device="cpu")
        if state is not None:
            mover.restore(state)
        for step in range(first, last):
            ids = torch.arange(24).view(2, 12) % 17 + step + 3
            model(input_ids=ids, labels=ids).loss.backward()
            mover.step(torch.amp.GradScaler("cuda", enabled=False), norm=1.0)
            mover.forget()
        mover.settle()
        return mover, {name: p.detach().clone() for name, p in model.named_parameters()}

    mover, settled = run(0, 3)
    with mover.at_rest():
        mover.save(tmp_path / "state")
    assert all(torch.equal(p, settled[name]) for name, p in mover.learn.items())
    _, again = run(3, 3, tmp_path / "state")
    assert [name for name, p in again.items() if not torch.equal(p, settled[name])] == []


def test_the_checkpoint_of_another_optimizer_is_refused_or_left_aside(tune):
    whole = tune(max_steps=2, save_steps=1, optim="sgd")
    folder = whole.workdir / "checkpoints" / "step-2"
    refused = tune(max_steps=3, resume=folder)
    assert refused.code == ExitCode.BAD_SPEC
    assert "another optimizer" in refused.failure["evidence"]


def test_an_optimizers_state_of_any_shape_comes_back_the_same():
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    shared, turned = torch.arange(4), torch.randn(4, 3).t()
    state = {
        "step": 7,
        "none": None,
        "flag": True,
        "rate": 0.1,
        "infinite": float("inf"),
        "nested": {"moments": [torch.randn(2, dtype=torch.bfloat16), (1, "two")], 5: shared},
        "codes": torch.arange(9, dtype=torch.uint8),
        "same": shared,
        "turned": turned,
        "of": {parameter: {"mean": torch.ones(1)}},
        "empty": torch.zeros(0),
        "kind": torch.float16,
    }
    writer = Writer({parameter: "weight"})
    tree = json.loads(json.dumps(writer.tree(state, "weight")))
    back = Reader(writer.tensors, {"weight": parameter}, "cpu").value(tree)
    assert back.keys() == state.keys()
    assert back["nested"]["moments"][1] == (1, "two")
    assert back["nested"][5] is back["same"]
    assert back["turned"].stride() == turned.stride()
    assert torch.equal(back["turned"], turned)
    assert back["of"][parameter]["mean"].item() == 1.0
    assert {k: back[k] for k in ("step", "none", "flag", "rate", "infinite", "kind")} == {
        k: state[k] for k in ("step", "none", "flag", "rate", "infinite", "kind")
    }
    for mean, was in ((back["codes"], state["codes"]), (back["empty"], state["empty"])):
        assert mean.dtype == was.dtype
        assert torch.equal(mean, was)


def test_what_is_no_state_is_neither_kept_nor_made():
    with pytest.raises(TypeError, match="cannot be kept"):
        Writer({}).tree({"open": Path("x")}, "weight")
    for tree in (
        {"object": "subprocess.Popen", "values": {"entries": []}},
        {"quantised": "os.system", "inner": {"entries": []}, "context": {"list": []}},
    ):
        with pytest.raises(BadSpec, match="holds a"):
            Reader({}, {}, "cpu").value(tree)


@torch.no_grad()
def test_smoothed_labels_lose_what_transformers_says(base):
    from transformers.trainer_pt_utils import LabelSmoother

    model = LlamaForCausalLM.from_pretrained(base)
    rows = [
        Example([5, 9, 11, 12], [IGNORED, IGNORED, 11, 12]),
        Example([7, 8, 9], [IGNORED, 8, 9]),
    ]
    batch = collate(rows, pad_id=2)
    ours = TokenLoss(smoothing=0.1).loss(model, batch).loss / 4
    ids = torch.tensor([row.ids + [2] * (4 - len(row.ids)) for row in rows])
    labels = torch.tensor([row.labels + [IGNORED] * (4 - len(row.ids)) for row in rows])
    theirs = LabelSmoother(0.1)(model(input_ids=ids), labels, shift_labels=True)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    assert float(ours) > float(TokenLoss().loss(model, batch).loss / 4)


def test_a_step_whose_scaled_gradients_overflow_is_skipped_counted_and_survives_a_resume(
    tune, monkeypatch
):
    monkeypatch.setattr(
        assembly, "scaler_of", lambda _: torch.amp.GradScaler("cpu", init_scale=2.0**127)
    )
    told = {"max_steps": 6, "save_steps": 3, "use_muon": True, "finetuning_type": "full"}
    whole = tune(**told)
    (result,) = whole.of_type("result")
    assert 0 < (skipped := result["values"]["skipped_steps"]) < 6
    losses = whole.metric("loss")
    assert whole.code == ExitCode.DONE
    assert losses[6] < losses[1]
    resumed = tune(**told, resume=whole.workdir / "checkpoints" / "step-3")
    assert weights_of(resumed) == weights_of(whole)
    assert resumed.of_type("result")[0]["values"]["skipped_steps"] == skipped


def test_layers_that_move_within_the_backward_pass_are_refused_where_a_base_is_in_fp16(base):
    arguments = arguments_of(use_apollo=True, apollo_layerwise=True, finetuning_type="full")
    chosen = choose_precision(precision="auto", base="float16", device="cuda")
    model = LlamaForCausalLM.from_pretrained(base)
    mover = build_mover(model, arguments, warmup_steps=0, device="cpu")
    with pytest.raises(BadSpec, match="before the scaled gradients of fp16"):
        assembly.check_scaling(mover, chosen)


@pytest.fixture
def fourth_overflows(monkeypatch):
    """fp16's scaling on a CPU, and a fourth step whose loss is beyond all numbers."""
    groups, loss = iter(range(99)), TokenLoss.loss

    def overflowing(objective, model, batch):
        outcome = loss(objective, model, batch)
        return replace(outcome, loss=outcome.loss * (math.inf if next(groups) == 3 else 1.0))

    monkeypatch.setattr(TokenLoss, "loss", overflowing)
    monkeypatch.setattr(assembly, "scaler_of", lambda _: torch.amp.GradScaler("cpu"))


@pytest.mark.usefixtures("fourth_overflows")
def test_gradients_that_overflow_tell_adalora_nothing_of_what_matters(tune):
    ran = tune(finetuning_type="adalora", max_steps=9, save_steps=5)
    (result,) = ran.of_type("result")
    assert result["values"]["skipped_steps"] == 1
    known = load_file(ran.workdir / "checkpoints" / "step-5" / "allocation.safetensors")
    assert known
    assert all(bool(torch.isfinite(value).all()) for value in known.values())


@pytest.mark.usefixtures("fourth_overflows")
def test_a_loss_that_overflows_is_skipped_and_no_file_holds_what_is_no_number(tune):
    ran = tune(max_steps=4)
    assert ran.code == ExitCode.DONE
    (result,) = ran.of_type("result")
    finite = list(ran.metric("loss").values())
    assert (result["values"]["skipped_steps"], len(finite)) == (1, 3)
    assert result["values"]["loss"] == pytest.approx(sum(finite) / 3)
    for name in ("trainer_log.jsonl", "trainer_state.json", "all_results.json"):
        text = (ran.workdir / "output" / name).read_text()
        assert not re.search("NaN|Infinity", text), name


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_gradient_checkpointing_gives_the_same_gradients(tune, kind):
    told = {"max_steps": 3, "lora_dropout": 0.0, "finetuning_type": kind}
    plain, lean = tune(**told), tune(**told, gradient_checkpointing=True)
    for step, norm in plain.metric("grad_norm").items():
        assert lean.metric("grad_norm")[step] == pytest.approx(norm, rel=1e-6)
    one, other = (
        load_file(ran.workdir / "output" / next(iter(weights_of(ran)))) for ran in (plain, lean)
    )
    for name, weight in one.items():
        assert (weight - other[name]).norm() <= 1e-5 * weight.norm()


def test_batches_that_are_gathered_move_any_optimizer_as_one_batch_does(tune):
    for optim in ("adafactor", "sgd"):
        told = {"optim": optim, "lora_dropout": 0.0, "max_steps": 3}
        whole = tune(**told, per_device_train_batch_size=4)
        parts = tune(**told, per_device_train_batch_size=1, gradient_accumulation_steps=4)
        for step, loss in whole.metric("loss").items():
            assert parts.metric("loss")[step] == pytest.approx(loss, rel=1e-5)
