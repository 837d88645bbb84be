"""Merging: bit-equal to peft, in files that open everywhere, with the adapter applied once."""

import dataclasses
import json
import math
import os
import shutil
import signal
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.attempts_by_hand import Ran, run_here
from support.tiny_models import LLAMA, ROWS, a_dataset, a_tiny_base
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tuneyard.runners.attempt import Attempt
from tuneyard.runners.finetune import finetune
from tuneyard.runners.infer import infer
from tuneyard.runners.merge import merge
from tuneyard.runners.merge_plan import Pair, Part
from tuneyard.runners.merging import Merger, even_blocks
from tuneyard.runners.tensor_files import tensors_in
from tuneyard.specs.exits import ExitCode
from tuneyard.store.folder import manifest_digest, publish_folder, verify_folder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    # What a test's own save_pretrained leaves open.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return a_tiny_base(tmp_path_factory.mktemp("base") / "bf16", hidden=48, dtype="bfloat16")


def an_adapter(folder: Path, base: Path, *, dtype: str = "float32", **lora: Any) -> Path:
    """An adapter of random values, as peft writes it."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **(lora or PLAIN)))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter + 0.05 * torch.randn(parameter.shape))
    tuned.save_pretrained(folder, save_embedding_layers=False)
    path = folder / "adapter_model.safetensors"
    save_file({k: v.to(getattr(torch, dtype)) for k, v in load_file(path).items()}, path)
    return folder


@pytest.fixture
def merged(tmp_path):
    """Merge an adapter into a base, in this process."""

    def run(base: Path, adapter: Path, **arguments) -> Ran:
        inputs = {"model": base, "adapter": adapter}
        return run_here(tmp_path, merge, kind="merge", inputs=inputs, arguments=arguments)

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model's folder."""
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def by_peft(base: Path, adapter: Path, dtype: str) -> Any:
    """peft's own merge of the base loaded in a format."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def assert_same_bits(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Names, formats, shapes and every bit."""
    assert found.keys() == wanted.keys()
    different = [k for k in wanted if not torch.equal(found[k], wanted[k])]
    assert different == []
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in wanted.items()}


SCALES = {
    "2": {"r": 4, "lora_alpha": 8},
    "a third": {"r": 6, "lora_alpha": 2},
    "rslora's": {"r": 6, "lora_alpha": 5, "use_rslora": True},
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_result_is_pefts_bit_for_bit(tmp_path, merged, dtype, adapter_dtype, scale):
    base = a_tiny_base(tmp_path / "base", hidden=48, dtype=dtype)
    lora = {"target_modules": "all-linear", **SCALES[scale]}
    adapter = an_adapter(tmp_path / "adapter", base, dtype=adapter_dtype, **lora)
    ran = merged(base, adapter, dtype=dtype)
    assert ran.code == ExitCode.DONE
    peft = by_peft(base, adapter, dtype).state_dict()
    assert_same_bits(weights(ran.workdir / "output"), peft)
    assert not all(torch.equal(value, weights(base)[name]) for name, value in peft.items())
    (result,) = ran.of_type("result")
    assert result["values"]["pairs"] == 14


def test_ranks_and_scales_of_single_layers_are_honoured(tmp_path, merged, base):
    lora = PLAIN | {
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "v_proj": 3},
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 1, "down_proj": 7},
    }
    adapter = an_adapter(tmp_path / "adapter", base, **lora)
    ran = merged(base, adapter)
    assert_same_bits(
        weights(ran.workdir / "output"), by_peft(base, adapter, "bfloat16").state_dict()
    )


@pytest.mark.parametrize("rank", [1, 3, 8, 64, 257])
@pytest.mark.parametrize("embedding", [False, True])
def test_blocks_of_any_size_give_the_bits_of_the_whole(tmp_path, rank, embedding):
    torch.manual_seed(rank)
    w = torch.randn(1000, 300)
    rows, columns = (300, 1000) if embedding else (1000, 300)
    a, b = torch.randn(rank, columns), torch.randn(rows, rank)
    save_file({"w": w, "a": a, "b": b}, tmp_path / "x.safetensors")
    delta = (b @ a).T if embedding else b @ a
    wanted = w + delta * (1 / 3)
    found = tensors_in(tmp_path / "x.safetensors", field="model")
    part = Part("w", found["w"], "F32", Pair(found["a"], found["b"], 1 / 3, embedding))
    for block_bytes in (1, 97 * 1200, 10**9):
        merger = Merger(block_bytes=block_bytes)
        content = b"".join(bytes(block) for block in merger.blocks(part))
        merger.close()
        read = torch.frombuffer(bytearray(content), dtype=torch.float32).view(1000, 300)
        assert torch.equal(read, wanted), block_bytes


@pytest.mark.parametrize(("rows", "most"), [(1000, 64), (65, 64), (1, 64), (10**6, 97)])
def test_no_block_is_much_smaller_than_the_others(rows, most):
    sizes = [last - first for first, last in even_blocks(rows, most)]
    assert sum(sizes) == rows
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1


def test_a_base_in_fp32_goes_out_in_bf16_rounded_once(tmp_path, merged):
    base = a_tiny_base(tmp_path / "base")
    adapter = an_adapter(tmp_path / "adapter", base)
    output = merged(base, adapter).workdir / "output"
    once = {k: v.bfloat16() for k, v in by_peft(base, adapter, "float32").state_dict().items()}
    assert_same_bits(weights(output), once)
    before, after = (json.loads((f / "config.json").read_text()) for f in (base, output))
    assert after.pop("dtype") == "bfloat16"
    assert before.pop("dtype") == "float32"
    assert list(after.items())[: len(before)] == list(before.items())


def test_files_have_a_limited_size_and_an_index(tmp_path, merged, base):
    adapter = an_adapter(tmp_path / "adapter", base)
    whole = merged(base, adapter).workdir / "output"
    output = merged(base, adapter, export_size=3e-5).workdir / "output"
    index = json.loads((output / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in output.glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name in files:
        held = load_file(output / name)
        assert {key for key, place in index["weight_map"].items() if place == name} == held.keys()
        size = sum(t.numel() * t.element_size() for t in held.values())
        assert size <= 30_000 or len(held) == 1
    sizes = [t.numel() * t.element_size() for t in weights(whole).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert_same_bits(weights(output), weights(whole))
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype="auto").state_dict()
    assert_same_bits(dict(loaded), weights(whole))
    again = an_adapter(tmp_path / "again", output)
    assert merged(output, again).code == ExitCode.DONE


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("tied", [True, False])
def test_ends_that_learned_as_a_whole_are_pefts_folder_in_tensors_and_config(
    tmp_path, merged, tied, saved
):
    base = a_tiny_base(tmp_path / "base", dtype="bfloat16", tie_word_embeddings=tied)
    adapter = an_adapter(tmp_path / "adapter", base, **PLAIN, modules_to_save=saved)
    output = merged(base, adapter).workdir / "output"
    by_peft(base, adapter, "bfloat16").save_pretrained(tmp_path / "peft")
    assert_same_bits(weights(output), weights(tmp_path / "peft"))
    for folder in (output, tmp_path / "peft"):
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def logits(model: Any) -> torch.Tensor:
    """What a model says about some ids."""
    with torch.no_grad():
        return model.eval()(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("end", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_sum_onto_one_end_of_a_tied_base_leaves_the_other_as_it_was(tmp_path, merged, end):
    base = a_tiny_base(tmp_path / "base", tie_word_embeddings=True)
    lora = PLAIN | {"target_modules": ["q_proj", *end]}
    adapter = an_adapter(tmp_path / "adapter", base, **lora)
    output = merged(base, adapter, dtype="float32").workdir / "output"
    model = LlamaForCausalLM.from_pretrained(base)
    tuned = logits(PeftModel.from_pretrained(model, adapter))
    assert (logits(LlamaForCausalLM.from_pretrained(output)) - tuned).abs().max() < 1e-4
    # peft's own sum changes both ends: this is why it is not asked here.
    assert (logits(by_peft(base, adapter, "float32")) - tuned).abs().max() > 0.1


def test_a_tied_base_stays_tied_where_the_adapter_leaves_its_ends_alone(tmp_path, merged):
    base = a_tiny_base(tmp_path / "base", dtype="bfloat16", tie_word_embeddings=True)
    adapter = an_adapter(tmp_path / "adapter", base)
    output = merged(base, adapter).workdir / "output"
    assert "lm_head.weight" not in weights(output)
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is True


def test_the_bases_files_go_over_byte_for_byte(tmp_path, merged):
    base = a_tiny_base(tmp_path / "base", dtype="bfloat16")
    config = json.loads((base / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    (base / "config.json").write_text(json.dumps(config | {"rope_theta": theta}, indent=3))
    (base / "LICENSE").write_text("do as you like")
    (base / "README.md").write_text("the base's own story")
    (base / "run.py").write_text("")
    output = merged(base, an_adapter(tmp_path / "adapter", base)).workdir / "output"
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in [*names, "LICENSE"]:
        assert (output / name).read_bytes() == (base / name).read_bytes()
    assert {path.name for path in output.iterdir()} == {
        *names, "LICENSE", "model.safetensors", "adapter", "tuneyard.json", "manifest.json",
    }  # fmt: skip
    assert (output / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_what_transformers_4_would_misread_is_said_in_its_words_too(tmp_path, merged):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    base = a_tiny_base(tmp_path / "base", dtype="bfloat16", rope_parameters=rope)
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    tokenizer["tokenizer_class"] = "TokenizersBackend"
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    output = merged(base, an_adapter(tmp_path / "adapter", base)).workdir / "output"
    config = json.loads((output / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    said = json.loads((output / "tokenizer_config.json").read_text())
    assert said == tokenizer | {"tokenizer_class": "PreTrainedTokenizerFast"}


def test_plain_transformers_applies_the_adapter_once(tmp_path, merged, base):
    adapter = an_adapter(tmp_path / "adapter", base)
    output = merged(base, adapter).workdir / "output"
    once = logits(by_peft(base, adapter, "bfloat16"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(output, dtype="auto")), once)
    # The trap: the adapter's files beside the weights, as an export into its own folder leaves it.
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(output / "adapter" / name, output / name)
    trapped = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert not torch.equal(logits(trapped), once)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> tuple[Path, Path]:
    """A base as a download leaves it, and what our own fine-tune made over it."""
    folder = tmp_path_factory.mktemp("tuned")
    a_tiny_base(folder / "aside", template=LLAMA, dtype="bfloat16")
    meta = {"source": "here", "revision": "r1"}
    publish_folder(folder / "aside", folder / "base", meta)
    ran = run_here(
        folder,
        finetune,
        inputs={"model": folder / "base", "dataset": a_dataset(folder / "rows.jsonl", ROWS)},
        input_ids={"model": "tiny"},
        arguments={
            "max_steps": 4,
            "learning_rate": 0.02,
            "template": "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|eot|>"
            "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
            "default_system": "Be brief.",
        },
    )
    assert ran.code == ExitCode.DONE
    return folder / "base", ran.workdir / "output"


def ask(folder: Path, model: Path, adapter: Path | None = None) -> list[dict[str, Any]]:
    """Greedy answers of a model."""
    inputs = {"model": model} | ({"adapter": adapter} if adapter else {})
    arguments = {"prompts": ["What does a cat say?", "Who?"], "temperature": 0}
    ran = run_here(
        folder, infer, kind="inference", inputs=inputs, arguments=arguments | {"max_new_tokens": 24}
    )
    assert ran.code == ExitCode.DONE
    return ran.results


def test_a_merged_model_speaks_as_its_adapter_did(tmp_path, merged, tuned):
    base, adapter = tuned
    output = merged(base, adapter, dtype="float32").workdir / "output"
    assert ask(tmp_path, output) == ask(tmp_path, base, adapter)
    # The prompt alone tells: the template that trained, and its default system text.
    assert ask(tmp_path, output)[0]["prompt_tokens"] != ask(tmp_path, base)[0]["prompt_tokens"]


def test_a_merged_model_is_tuned_like_any_base(tmp_path, merged, tuned):
    output = merged(*tuned).workdir / "output"
    inputs = {"model": output, "dataset": a_dataset(tmp_path / "rows.jsonl", ROWS)}
    again = run_here(tmp_path, finetune, inputs=inputs, arguments={"max_steps": 1})
    assert again.code == ExitCode.DONE
    origin = json.loads((again.workdir / "output" / "tuneyard.json").read_text())
    assert origin["base"]["digest"] == manifest_digest(verify_folder(output))
    assert merged(output, again.workdir / "output").code == ExitCode.DONE
    assert merged(tuned[0], again.workdir / "output").code == ExitCode.BAD_SPEC


def test_sums_are_made_in_whole_fp32_whatever_was_set_before(tmp_path, merged, base):
    torch.set_float32_matmul_precision("medium")
    try:
        assert merged(base, an_adapter(tmp_path / "adapter", base)).code == ExitCode.DONE
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_template_and_ends_of_a_turn_are_carried_to_where_others_look(merged, tuned):
    base, adapter = tuned
    output = merged(base, adapter).workdir / "output"
    origin = json.loads((adapter / "tuneyard.json").read_text())
    assert (output / "chat_template.jinja").read_text() == origin["template"]
    said = json.loads((output / "tokenizer_config.json").read_text())
    before = json.loads((base / "tokenizer_config.json").read_text())
    assert said == before | {"chat_template": origin["template"]}
    assert json.loads((base / "generation_config.json").read_text())["eos_token_id"] == 1
    ends = json.loads((output / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(ends) == origin["stop_token_ids"] == [1, 4]
    carried = json.loads((output / "tuneyard.json").read_text())
    assert carried["default_system"] == "Be brief."


def test_the_manifest_says_what_the_model_was_made_of(tmp_path, tuned):
    base, adapter = tuned
    ids = {"model": "tiny", "adapter": "artifact_1"}
    ran = run_here(
        tmp_path, merge, kind="merge", inputs={"model": base, "adapter": adapter}, input_ids=ids,
        job="job_7",
    )  # fmt: skip
    manifest = verify_folder(ran.workdir / "output")
    assert manifest["kind"] == "model"
    assert manifest["lineage"] == {
        "base": {
            "id": "tiny",
            "digest": manifest_digest(verify_folder(base)),
            "source": "here",
            "revision": "r1",
        },
        "adapter": {"id": "artifact_1", "digest": manifest_digest(verify_folder(adapter))},
        "job": "job_7",
    }
    files = {entry["path"] for entry in manifest["files"]}
    assert "adapter/adapter_config.json" in files
    assert "adapter_config.json" not in files


def test_another_base_is_refused_unless_forced(tmp_path, merged, tuned):
    base, adapter = tuned
    shutil.copytree(base, tmp_path / "aside")
    (tmp_path / "aside" / "manifest.json").unlink()
    publish_folder(tmp_path / "aside", tmp_path / "other", {"source": "here", "revision": "r2"})
    refused = merged(tmp_path / "other", adapter)
    assert refused.code == ExitCode.BAD_SPEC
    assert "was tuned over" in refused.failure["evidence"]
    forced = merged(tmp_path / "other", adapter, force=True)
    assert forced.code == ExitCode.DONE
    assert [event["code"] for event in forced.of_type("warning")] == ["other_base"]


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["self_attn"], "target_modules": ["down_proj"]},
    ],
)
def test_more_than_a_plain_sum_is_left_to_peft(tmp_path, merged, lora):
    base = a_tiny_base(tmp_path / "base", dtype="bfloat16", mlp_bias=True, attention_bias=True)
    adapter = an_adapter(tmp_path / "adapter", base, **(PLAIN | lora))
    ran = merged(base, adapter, export_size=1e-4)
    assert ran.code == ExitCode.DONE
    output = ran.workdir / "output"
    assert_same_bits(weights(output), by_peft(base, adapter, "bfloat16").state_dict())
    codes = [event["code"] for event in ran.of_type("warning")]
    assert codes == ([] if "modules_to_save" in lora else ["merged_in_memory"])
    assert LlamaForCausalLM.from_pretrained(output)


def test_an_adapter_that_peft_cannot_merge_is_refused_in_a_sentence(tmp_path, merged, base):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "p")
    ran = merged(base, tmp_path / "p")
    assert ran.code == ExitCode.BAD_SPEC
    assert "PROMPT_TUNING" in ran.failure["evidence"]


def cut(folder: Path, adapter: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def lie(folder: Path, adapter: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].replace(b'"BF16"', b'"F32" ', 1)
    path.write_bytes(content[:8] + header + content[8 + length :])


def lose_a_shard(folder: Path, adapter: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    save_file({"b": torch.zeros(1)}, folder / "model-00001-of-00002.safetensors")


def climb(folder: Path, adapter: Path) -> None:
    index = {"weight_map": {"a": "../adapter/adapter_model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "x.safetensors")


def of_another_shape(folder: Path, adapter: Path) -> None:
    change(adapter, lambda tensors: {k: v[..., :3] if "lora_A" in k else v for k, v in tensors})


def half_an_adapter(folder: Path, adapter: Path) -> None:
    change(
        adapter, lambda tensors: {k: v for k, v in tensors if "1.self_attn.q_proj.lora_B" not in k}
    )


def no_numbers(folder: Path, adapter: Path) -> None:
    change(adapter, lambda tensors: {k: v * math.nan for k, v in tensors})


def another_rank(folder: Path, adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))


def of_a_layer_that_is_not_there(folder: Path, adapter: Path) -> None:
    change(adapter, lambda tensors: {k.replace("layers.1", "layers.9"): v for k, v in tensors})


def cut_adapter(folder: Path, adapter: Path) -> None:
    os.truncate(adapter / "adapter_model.safetensors", 900)


def change(adapter: Path, how: Any) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = {k: v.contiguous() for k, v in how(load_file(path).items()).items()}
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut, "cut off"),
        (lie, "needs"),
        (lose_a_shard, "1 tensors of model.safetensors.index.json are missing"),
        (climb, "index.json is not readable"),
        (of_another_shape, "does not fit this base"),
        (half_an_adapter, "one half"),
        (no_numbers, "no numbers in bfloat16"),
        (of_a_layer_that_is_not_there, "not those that its configuration speaks of"),
        (another_rank, "has rank 4, and adapter_config.json says 5"),
        (cut_adapter, "adapter_model.safetensors cannot be used"),
    ],
)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_broken_files_end_with_65_and_a_sentence(tmp_path, merged, base, spoil, said):
    folder = shutil.copytree(base, tmp_path / "copy")
    adapter = an_adapter(tmp_path / "adapter", base)
    spoil(folder, adapter)
    ran = merged(folder, adapter)
    assert ran.code == ExitCode.BAD_DATA, ran.failure
    assert said in ran.failure["evidence"]
    assert "\n" not in ran.failure["evidence"]
    assert not (ran.workdir / "output").exists()


def test_what_float16_cannot_hold_is_not_written(tmp_path, merged):
    base = a_tiny_base(tmp_path / "base", dtype="float16")
    adapter = an_adapter(tmp_path / "adapter", base)
    change(adapter, lambda tensors: {k: v * 1e4 for k, v in tensors})
    ran = merged(base, adapter)
    assert ran.code == ExitCode.BAD_DATA
    assert "dtype bfloat16" in ran.failure["evidence"]
    assert merged(base, adapter, dtype="bfloat16").code == ExitCode.DONE


def test_a_quantised_base_is_refused(tmp_path, merged, base):
    folder = shutil.copytree(base, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    ran = merged(folder, an_adapter(tmp_path / "adapter", base))
    assert ran.code == ExitCode.BAD_SPEC
    assert "quantised from" in ran.failure["evidence"]


class EndsAtProgress:
    """A log of events that has SIGTERM come with the first of one type."""

    def __init__(self, events: Any, type_: str) -> None:
        self._events, self._type = events, type_

    def emit(self, type_: str, **fields: Any) -> None:
        self._events.emit(type_, **fields)
        if type_ == self._type:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_merge_that_is_told_to_stop_ends_with_76_and_leaves_nothing_visible(tmp_path, base):
    inputs = {"model": base, "adapter": an_adapter(tmp_path / "adapter", base)}

    def interrupted(attempt: Attempt) -> None:
        merge(dataclasses.replace(attempt, events=EndsAtProgress(attempt.events, "progress")))

    ran = run_here(tmp_path, interrupted, kind="merge", inputs=inputs)
    assert ran.code == ExitCode.STOPPED_WITHOUT
    assert not (ran.workdir / "output").exists()


def test_progress_counts_tensors_to_the_last(tmp_path, merged, base):
    ran = merged(base, an_adapter(tmp_path / "adapter", base))
    first, *_, last = ran.of_type("progress")
    assert (first["done"], first["unit"]) == (0, "tensors")
    assert last["done"] == last["total"] == len(weights(base))
