"""Every optimizer learns, and goes on from its saved state in the same bits."""

import gc
from pathlib import Path
from typing import get_args

import pytest
import torch
from support.attempts_by_hand import run_here
from support.tiny_models import a_dataset, a_tiny_base
from transformers import LlamaForCausalLM

from tuneyard.runners.arguments import FinetuneArguments
from tuneyard.runners.finetune import finetune
from tuneyard.runners.mover import Mover
from tuneyard.runners.optimizers import build_mover
from tuneyard.runners.packages import check_packages
from tuneyard.specs.exits import ExitCode
from tuneyard.specs.optimizers import SWITCHES, Optim
from tuneyard.store.folder import read_manifest

pytestmark = [
    pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:BAdam expect model to be loaded"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
    pytest.mark.filterwarnings("ignore:.torch.cuda.amp.autocast:FutureWarning"),
    pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda', but CUDA"),
    pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
]

STEPS, SAVED = 6, 3
RATES = {"sgd": 0.5, "schedule_free_sgd": 0.5, "adagrad": 0.02}
LOW_RANK = {"optim_target_modules": "all-linear", "optim_args": "rank=4,update_proj_gap=2"}
ON_A_GPU = {"galore_adamw_8bit", "galore_adamw_8bit_layerwise"}
ALL = [name for name in get_args(Optim) if name not in ON_A_GPU]

CASES = [
    *({"optim": name} | (LOW_RANK if "galore" in name or "apollo" in name else {}) for name in ALL),
    {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true"},
    {"optim": "rmsprop", "optim_args": "momentum=0.9,centered=true"},
    {"optim": "stable_adamw", "optim_args": "kahan_sum=false"},
    {"optim": "apollo_adamw", **LOW_RANK, "optim_args": "rank=4,update_proj_gap=2,proj=svd"},
    {"use_muon": True},
    {"use_adam_mini": True},
    *(
        {"use_galore": True, "galore_rank": 4, "galore_update_interval": 2, **more}
        for more in (
            {},
            {"optim": "adafactor"},
            {"galore_layerwise": True},
            {"galore_proj_type": "full"},
        )
    ),
    *(
        {"use_apollo": True, "apollo_rank": 4, "apollo_update_interval": 2, **more}
        for more in ({}, {"apollo_layerwise": True}, {"apollo_scale_type": "tensor"})
    ),
    *(
        {"use_badam": True, "badam_switch_interval": 2, "badam_switch_mode": mode}
        for mode in ("ascending", "descending", "random")
    ),
    {"use_badam": True, "badam_mode": "ratio", "badam_update_ratio": 0.3},
    {"use_badam": True, "badam_mode": "ratio", "badam_mask_mode": "scatter"},
]


def named(case) -> str:
    return "-".join(str(value) for value in case.values() if value is not True) or "default"


def ids(case) -> str:
    switch = [name for name in SWITCHES if case.get(name)]
    return "-".join([*switch, named(case)])


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """BAdam collects garbage whenever it goes to the next block."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return a_tiny_base(tmp_path_factory.mktemp("base"), hidden=64)


@pytest.fixture(autouse=True)
def nothing_that_is_not_there(request):
    """torchao is left out of the tested environment: with it peft fills every log."""
    case = request.node.callspec.params["case"]
    if case.get("optim", "") in ("adamw_torch_4bit", "adamw_torch_8bit"):
        pytest.importorskip("torchao")


def arguments_of(case) -> FinetuneArguments:
    optim = case.get("optim", "adamw_torch")
    told = {"model": "m", "dataset": "d", "learning_rate": RATES.get(optim, 0.01)}
    return FinetuneArguments.model_validate(told | {"weight_decay": 0.01} | case)


class Run:
    """A whole small model that learns one batch by heart."""

    def __init__(self, base: Path, case, *, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(5)
        self.model = LlamaForCausalLM.from_pretrained(base, dtype=dtype).train()
        self.arguments = arguments_of(case)
        check_packages(self.arguments)
        self.mover: Mover = build_mover(self.model, self.arguments, warmup_steps=2, device="cpu")
        self.batch = torch.arange(48).view(4, 12) % 37 + 3
        self.losses: list[float] = []

    def steps(self, first: int, last: int) -> "Run":
        scaler = torch.amp.GradScaler("cuda", enabled=False)
        for step in range(first, last):
            self.mover.set_rate(self.arguments.learning_rate * (1 - step / 20))
            loss = self.model(input_ids=self.batch, labels=self.batch).loss
            loss.backward()
            self.losses.append(float(loss.detach()))
            norm = self.mover.clip(1.0)
            self.mover.step(scaler, norm=norm)
            self.mover.forget()
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def save(run: Run, folder: Path) -> Path:
    """As a checkpoint does: weights as they are used, and the optimizer's state."""
    with run.mover.at_rest():
        torch.save(run.weights(), folder / "weights")
        run.mover.save(folder / "optimizer.safetensors")
    return folder


def resume(base: Path, case, folder: Path, **more) -> Run:
    run = Run(base, case, **more)
    torch.manual_seed(99)  # nothing may be drawn anew
    with torch.no_grad():
        for name, value in torch.load(folder / "weights").items():
            run.model.get_parameter(name).copy_(value)
    run.mover.restore(folder / "optimizer.safetensors")
    return run


def equal(one: Run, other: Run) -> list[str]:
    """Names of parameters that differ."""
    pairs = zip(one.weights().items(), other.weights().values(), strict=True)
    return [name for (name, a), b in pairs if not torch.equal(a, b)]


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_it_learns_and_goes_on_in_the_same_bits(base, tmp_path, case):
    whole = Run(base, case).steps(0, STEPS)
    stopped = Run(base, case).steps(0, SAVED)
    assert not equal(stopped, Run(base, case).steps(0, SAVED))  # the same run is the same
    save(stopped, tmp_path)
    state = torch.get_rng_state()
    resumed = resume(base, case, tmp_path)
    torch.set_rng_state(state)
    resumed.steps(SAVED, STEPS)
    assert equal(whole, resumed) == []
    assert resumed.losses == whole.losses[SAVED:]
    assert whole.losses[-1] < whole.losses[0]
    stopped.steps(SAVED, STEPS)  # saving alters nothing
    assert equal(whole, stopped) == []


FULL = [
    {"use_galore": True, "galore_rank": 4, "galore_update_interval": 2},
    {"use_galore": True, "galore_rank": 4, "galore_layerwise": True},
    {"use_apollo": True, "apollo_rank": 4},
    {"use_adam_mini": True},
    {"use_badam": True, "badam_switch_interval": 2, "pure_bf16": True},
    {"use_badam": True, "badam_mode": "ratio", "badam_update_ratio": 0.3},
    {"optim": "apollo_adamw_layerwise", "optim_target_modules": "q_proj,v_proj"},
    {"optim": "galore_adafactor", "optim_target_modules": "all-linear"},
    {"optim": "paged_adamw_8bit"},
    {"optim": "grokadamw"},
]
ADAPTER = [{"optim": name} for name in ("lion_8bit", "adagrad", "stable_adamw", "ademamix")]
CASES_OF_RUNS = [
    *({"finetuning_type": "full", "learning_rate": 0.002, **case} for case in FULL),
    *({"finetuning_type": "lora", "lora_dropout": 0.1, **case} for case in ADAPTER),
    {"finetuning_type": "freeze", "use_galore": True, "galore_rank": 4, "learning_rate": 0.002},
    {"finetuning_type": "adalora", "optim": "adafactor"},
]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("case", CASES_OF_RUNS, ids=lambda c: f"{c['finetuning_type']}-{ids(c)}")
def test_a_whole_run_goes_on_in_the_same_bits(base, tmp_path, case):
    told = {"max_steps": 6, "save_steps": 3, "learning_rate": 0.01, "val_size": 2}
    told |= {"eval_strategy": "steps", "eval_steps": 2, "per_device_train_batch_size": 3} | case
    dataset = a_dataset(tmp_path / "rows.jsonl")

    def tune(resume: Path | None = None):
        inputs = {"model": base, "dataset": dataset}
        ran = run_here(
            tmp_path, finetune, inputs=inputs, arguments=told, resume=resume and str(resume)
        )
        assert ran.code == ExitCode.DONE, ran.failure
        files = read_manifest(ran.workdir / "output")["files"]
        return ran, {e["path"]: e["sha256"] for e in files if ".safetensors" in e["path"]}

    whole, weights = tune()
    resumed, again = tune(whole.workdir / "checkpoints" / "step-3")
    assert again == weights != {}
    assert resumed.metric("eval_loss")[6] == whole.metric("eval_loss")[6]
    assert whole.metric("eval_loss")[6] < whole.metric("eval_loss")[0]
