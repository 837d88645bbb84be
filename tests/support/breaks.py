"""Deliberate breaks of what training must get right, and the test that each of them fails.

``tests/breaks`` applies one after the other to a copy of the tree; the table of
docs/training-maths.md is written from here:  python -P tests/support/breaks.py > rows
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "training-maths.md"


@dataclass(frozen=True)
class Break:
    """A wrong program that still runs, and whose loss may still fall.

    wrong: what it does, in words; file: below the root; old: text that stands there once; new: in
    its place; test: file and name of what fails.
    """

    wrong: str
    file: str
    old: str
    new: str
    test: str

    @property
    def name(self) -> str:
        """For the test's id."""
        return re.sub(r"[^a-z0-9]+", "-", self.wrong.lower()).strip("-")[:60]


DATA, TRAINING, STAGES, TRAPS = (
    f"tests/unit/test_runner_{name}.py" for name in ("data", "training", "stages", "traps")
)
MERGE, INFER, LAYOUTS, PACKING = (
    f"tests/unit/test_runner_{name}.py" for name in ("merge", "infer", "layouts", "packing")
)

BREAKS = (
    # Labels and tokens
    Break(
        "labels are masked by token id: where pad is eos, no end of a turn is learned",
        "runners/batches.py",
        "    positions = (following != IGNORED).any(0).nonzero().flatten()\n",
        "    following[following == pad_id] = IGNORED\n"
        "    positions = (following != IGNORED).any(0).nonzero().flatten()\n",
        f"{DATA}::test_labels_are_set_by_position_where_pad_is_eos",
    ),
    Break(
        "what closes an answer is no target",
        "runners/examples.py",
        "    return target[: end + 1], target[end + 1 :]\n",
        "    return target[:end], target[end:]\n",
        f"{DATA}::test_targets_are_the_answer_and_what_closes_it",
    ),
    Break(
        "a token is its own target: labels are not shifted",
        "runners/batches.py",
        "(*each.labels[1:], IGNORED)",
        "each.labels",
        f"{TRAINING}::test_gradients_are_those_of_the_plain_recipe",
    ),
    Break(
        "questions are learned, too",
        "runners/examples.py",
        "ids[:source_len] if cutting.train_on_prompt else [IGNORED] * source_len",
        "ids[:source_len]",
        f"{DATA}::test_targets_are_the_answer_and_what_closes_it",
    ),
    Break(
        "a rendered text gets a second BOS from the tokenizer",
        "runners/chat.py",
        "encode(flat, add_special_tokens=False)",
        "encode(flat, add_special_tokens=True)",
        f"{DATA}::test_a_rendered_text_has_one_bos_or_none",
    ),
    Break(
        "a turn ends at the tokenizer's eos alone",
        "runners/chat.py",
        "        found = {*generation_ends, self.tokenizer.eos_token_id, self.closing_id}\n",
        "        found = {self.tokenizer.eos_token_id}\n",
        f"{INFER}::test_a_turn_ends_at_what_the_configuration_the_tokenizer_and_the_template_say",
    ),
    Break(
        "a template prints the day of the run",
        "runners/chat.py",
        "chat_template=_CLOCK + template",
        "chat_template=template",
        f"{TRAPS}::test_a_template_that_prints_the_day_is_given_one_that_does_not_pass",
    ),
    Break(
        "tokens span the border of two texts that LLaMA-Factory tokenises apart",
        "runners/chat.py",
        "text.split(SEAM) if self.seamed else [text]",
        'text.replace(SEAM, "") if self.seamed else [text]',
        f"{TRAPS}::test_no_token_spans_a_seam",
    ),
    Break(
        "under LLaMA-Factory's names the newline after an answer is not learned",
        "runners/examples.py",
        "    if chat.seamed:\n        return target, []\n",
        "",
        f"{LAYOUTS}::test_all_that_closes_an_answer_is_learned_under_llama_factorys_names",
    ),
    Break(
        "functions are called by answers that are learned as empty texts",
        "runners/examples.py",
        "    if calls and not chat.writes_calls:\n",
        "    if False:\n",
        f"{LAYOUTS}::test_a_template_that_leaves_calls_out_is_refused_rather_than_learned_empty",
    ),
    Break(
        "the template that trained is not written into the adapter",
        "runners/adapter_folder.py",
        '        "template": chat.template or None,\n',
        "",
        f"{TRAINING}::test_the_adapter_loads_with_peft_and_says_what_the_trained_model_says",
    ),
    # A step
    Break(
        "the loss is a mean of the groups' means, not of all tokens of the step",
        "runners/training.py",
        "parts.append(self._backward(batch, units))",
        "own = sum(map(self.objective.units, group)) * len(self._groups(examples))\n"
        "            parts.append(self._backward(batch, own))",
        f"{TRAINING}::test_accumulation_changes_nothing_but_the_size_of_groups",
    ),
    Break(
        "a step without any target divides by 0",
        "runners/training.py",
        "        units = max(1, sum(map(self.objective.units, examples)))\n",
        "        units = sum(map(self.objective.units, examples))\n",
        f"{TRAPS}::test_a_step_whose_rows_are_all_masked_has_loss_0_and_moves_nothing",
    ),
    Break(
        "gradients are not clipped",
        "runners/training.py",
        "mover.clip(self.plan.max_grad_norm or math.inf)",
        "mover.clip(math.inf)",
        f"{TRAPS}::test_clipping_shrinks_all_gradients_alike_to_the_limit",
    ),
    Break(
        "each tensor's gradient is clipped by itself",
        "runners/mover.py",
        "            return float(torch.nn.utils.clip_grad_norm_(self.learn.values(), limit))\n",
        "            norm = float(torch.nn.utils.clip_grad_norm_(self.learn.values(), math.inf))\n"
        "            for parameter in self.learn.values():\n"
        "                torch.nn.utils.clip_grad_norm_([parameter], limit / len(found) ** 0.5)\n"
        "            return norm\n",
        f"{TRAPS}::test_clipping_shrinks_all_gradients_alike_to_the_limit",
    ),
    Break(
        "gradients are clipped before the scaler's factor is taken out",
        "runners/training.py",
        "        mover.unscale(scaler)\n",
        "",
        f"{TRAPS}::test_gradients_are_unscaled_before_they_are_clipped",
    ),
    Break(
        "the last, short step of an epoch is dropped",
        "runners/batches.py",
        "    each = math.ceil(count / rows_per_step)\n",
        "    each = count // rows_per_step\n",
        f"{TRAINING}::test_the_last_short_step_of_an_epoch_is_kept",
    ),
    Break(
        "noise on embeddings has the size of the whole row's length",
        "runners/noise.py",
        "read.spans * embedded.shape[-1]",
        "torch.full_like(read.spans, embedded.shape[1]) * embedded.shape[-1]",
        f"{PACKING}::test_noise_is_sized_by_the_example_not_by_the_row",
    ),
    # Rows that share a row
    Break(
        "examples that share a row see one another",
        "runners/attention.py",
        "    return Segments(bounds, [_mask_between(plain, asked, *each) for each in bounds])\n",
        "    return Segments([(0, ends[-1])], [None])\n",
        f"{PACKING}::test_a_shared_row_gives_the_losses_and_gradients_of_rows_of_their_own",
    ),
    Break(
        "where a window ends is left to the whole row",
        "runners/attention.py",
        "which is faster\n    return mask\n",
        "which is faster\n    return None\n",
        f"{PACKING}::test_a_shared_row_gives_the_losses_and_gradients_of_rows_of_their_own",
    ),
    Break(
        "positions go on from one example of a pack to the next",
        "runners/batches.py",
        "[[i for each in s for i in range(len(each.ids))] for s in sequences]",
        "[[*range(_length(s))] for s in sequences]",
        f"{PACKING}::test_rows_of_a_pack_see_each_other_unless_it_is_neat",
    ),
    Break(
        "the first token of an example in a pack is the target of the one before",
        "runners/batches.py",
        "[[i for each in s for i in (*each.labels[1:], IGNORED)] for s in sequences]",
        "[[*[i for each in s for i in each.labels][1:], IGNORED] for s in sequences]",
        f"{PACKING}::test_the_first_token_of_a_row_in_a_pack_is_nobodys_target",
    ),
    # Answers while training
    Break(
        "answering watch-prompts moves the random streams",
        "runners/generation.py",
        "with torch.random.fork_rng(devices), casting:",
        "with casting:",
        "tests/unit/test_runner_saying.py::test_watching_alters_no_bit_of_the_adapter",
    ),
    # Defaults, beginnings
    Break(
        "lora_alpha is 8 whatever the rank",
        "runners/arguments.py",
        "2 * self.lora_rank if self.lora_alpha is None",
        "8 if self.lora_alpha is None",
        f"{TRAINING}::test_the_scale_is_twice_the_rank_unless_set",
    ),
    Break(
        "the learning rate's default is another library's",
        "specs/optimizing.py",
        "    learning_rate: float = Field(5e-5,",
        "    learning_rate: float = Field(2e-5,",
        "tests/unit/test_specs_jobs.py::test_defaults_are_llama_factorys_and_transformers",
    ),
    Break(
        "a number such as 5e-5 is read as a text",
        "specs/yaml_documents.py",
        "|[0-9][0-9_]*[eE][-+]?[0-9]+)",
        ")",
        "tests/unit/test_specs_documents.py"
        "::test_yaml_numbers_are_read_as_llama_factory_reads_them",
    ),
    Break(
        "the adapter begins from the one stream that all else draws from",
        "runners/beginnings.py",
        'torch.Generator().manual_seed(stream_seed(seed, "adapter", name))',
        "torch.default_generator",
        f"{TRAINING}::test_the_adapter_begins_the_same_however_the_run_is_made",
    ),
    # Order, evaluation, resume
    Break(
        "every epoch has the same order",
        "runners/batches.py",
        'stream_seed(seed, "order", epoch)',
        'stream_seed(seed, "order")',
        f"{DATA}::test_every_epoch_has_its_own_order_and_keeps_its_short_step",
    ),
    Break(
        "a resumed run begins the data anew",
        "runners/checkpoint.py",
        "    return Position(**state, log=",
        '    state["examples"] = 0\n    return Position(**state, log=',
        f"{TRAINING}::test_a_resumed_run_ends_in_the_same_bits",
    ),
    Break(
        "a resumed run forgets the optimizer's moments",
        "runners/checkpoint.py",
        "    running.mover.restore(folder / OPTIMIZER_FILE)\n",
        "",
        f"{TRAINING}::test_a_resumed_run_ends_in_the_same_bits",
    ),
    Break(
        "a resumed run draws its dropout anew",
        "runners/checkpoint.py",
        "    _restore_random(load_file(folder / RANDOM_FILE), running.device)\n",
        "",
        f"{TRAINING}::test_a_resumed_run_ends_in_the_same_bits",
    ),
    Break(
        "after an evaluation dropout stays off",
        "runners/training.py",
        "        model.train()\n",
        "",
        f"{TRAINING}::test_evaluation_alters_nothing_and_begins_with_the_base",
    ),
    Break(
        "the base is not measured before the first step",
        "runners/training.py",
        "step in (0, self.steps) or step % self.eval_every == 0",
        "step == self.steps or (step > 0 and step % self.eval_every == 0)",
        f"{TRAINING}::test_evaluation_alters_nothing_and_begins_with_the_base",
    ),
    # Preferences
    Break(
        "the reference is the trained model, not its base",
        "runners/reference.py",
        "with model.disable_adapter() if self.start is None else _put_in(model, self.start):",
        "if True:",
        f"{STAGES}::test_the_reference_stays_as_it_was",
    ),
    Break(
        "the reference is asked with noise and dropout",
        "runners/reference.py",
        "        model.eval()\n",
        "",
        f"{TRAPS}::test_the_reference_is_the_base_without_adapter_noise_or_dropout",
    ),
    Break(
        "where norms learn in fp32, the reference's hand on bf16",
        "runners/reference.py",
        "            _as_it_learns(frozen, model)\n",
        "            pass\n",
        f"{STAGES}::test_a_start_in_bf16_is_as_exact_whatever_learns_in_fp32",
    ),
    Break(
        "dora begins at norms that the base's own format rounded",
        "runners/adapter.py",
        "    begin_by_norms(model)\n",
        "",
        f"{STAGES}::test_a_start_in_bf16_is_as_exact_whatever_learns_in_fp32",
    ),
    Break(
        "oft's dropout is made, and never asked",
        "runners/assembly.py",
        "    drop_blocks(model)\n",
        "",
        "tests/unit/test_runner_tuning.py::test_blocks_that_are_left_out_take_no_part_in_a_step",
    ),
    Break(
        "kto's wanted rows are weighed by their number alone",
        "runners/preferences.py",
        " * wanted / share**2",
        " * wanted",
        f"{STAGES}::test_what_ftx_adds_to_kto_is_what_llama_factory_adds",
    ),
    Break(
        "epochs are counted by steps, the last of which is short",
        "runners/training.py",
        "        return self.plan.epoch(self.at.examples, len(self.data.examples))\n",
        "        return self.at.step / self.plan.steps_per_epoch\n",
        f"{TRAINING}::test_an_epoch_is_a_share_of_its_batches_as_in_transformers",
    ),
    Break(
        "an overflowing loss in fp16 makes the run's mean infinite",
        "runners/training.py",
        "step.loss if math.isfinite(step.loss) else before",
        "step.loss",
        "tests/unit/test_optimizers.py"
        "::test_a_loss_that_overflows_is_skipped_and_no_file_holds_what_is_no_number",
    ),
    Break(
        "ipo sums over an answer's tokens in place of their mean",
        "runners/preferences.py",
        'AVERAGED = frozenset({"ipo", "orpo", "simpo"})',
        'AVERAGED = frozenset({"orpo", "simpo"})',
        f"{STAGES}::test_the_loss_of_a_pair_is_the_papers",
    ),
    Break(
        "kto's mismatched answer is the row's own",
        "runners/examples.py",
        "answered[i - 1].messages[-1]",
        "answered[i].messages[-1]",
        f"{STAGES}::test_a_mismatched_answer_is_that_of_the_row_before",
    ),
    Break(
        "each answer of a pair is cut by itself, so that their questions differ",
        "runners/examples.py",
        "answer(asked[:kept], good[:room])",
        "answer(asked[: share(len(asked), len(good), cutting.cutoff_len)[0]], good[:room])",
        f"{TRAPS}::test_a_long_answer_shortens_the_question_of_both",
    ),
    Break(
        "a reward is read at the padding's place",
        "runners/batches.py",
        "ids.shape[1] + lengths - 1",
        "ids.shape[1] + ids.shape[1] - 1",
        f"{STAGES}::test_a_score_is_the_heads_at_the_last_token_even_where_that_is_padding_too",
    ),
    # Merging, answering
    Break(
        "the adapter's files stand beside merged weights, and are applied again when they load",
        "runners/merged_folder.py",
        'ADAPTER_FOLDER = "adapter"',
        'ADAPTER_FOLDER = "."',
        f"{MERGE}::test_plain_transformers_applies_the_adapter_once",
    ),
    Break(
        "a merge rounds twice: the product, then the sum",
        "runners/merging.py",
        "delta.mul_(pair.scale).add_(",
        "delta.copy_(delta.mul_(pair.scale).to(torch.bfloat16)).add_(",
        f"{MERGE}::test_the_result_is_pefts_bit_for_bit",
    ),
    Break(
        "sums of a merge are made in less than fp32",
        "runners/merging.py",
        '    torch.set_float32_matmul_precision("highest")\n',
        "    pass\n",
        f"{MERGE}::test_sums_are_made_in_whole_fp32_whatever_was_set_before",
    ),
    Break(
        "rslora's scale is alpha over the rank",
        "runners/merge_plan.py",
        "(math.sqrt(rank) if config",
        "(rank if config",
        f"{MERGE}::test_the_result_is_pefts_bit_for_bit",
    ),
    Break(
        "transformers 4 reads another rope_theta than the merged model's",
        "runners/merged_folder.py",
        '        changes["rope_theta"] =',
        '        changes["rope_thet"] =',
        f"{MERGE}::test_what_transformers_4_would_misread_is_said_in_its_words_too",
    ),
    Break(
        "a piece of an answer holds half a character",
        "runners/deltas.py",
        "    text = text.rstrip(HALF)\n",
        "",
        "tests/unit/test_runner_serve.py::test_a_piece_never_holds_half_a_character",
    ),
)


def rows() -> str:
    """The table of the documentation."""
    lines = ["| break | test that fails |", "| --- | --- |"]
    for each in BREAKS:
        file, _, test = each.test.partition("::")
        lines.append(f"| {each.wrong} | [`{test}`](../{file}) |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(rows(), end="")  # noqa: T201
