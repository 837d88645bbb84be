"""LLaMA-Factory's and transformers' argument names: which mean something here, and how.

Users bring YAML files that hold many names of which few change a result. Names and defaults as of
LLaMA-Factory 0.9.5 and transformers 5.23; what is ours to honour stands in specs/finetune.py.
"""

from collections.abc import Mapping
from typing import Any

SAME_AS = {
    "model_name_or_path": "model",
    "adapter_name_or_path": "adapter",
    "training_file": "dataset",
    "validation_file": "eval_dataset",
    "evaluation_strategy": "eval_strategy",
    "infer_dtype": "dtype",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
}
"""Another name -> ours."""

_REASONS = {
    "results, logs and checkpoints have their place here; `tuneyard fetch` brings them": """
        data_shared_file_system logging_dir media_dir offload_folder output_dir
        overwrite_output_dir save_on_each_node cache_dir swanlab_logdir
    """,
    "checkpoints hold the optimizer's state anyway": "save_only_model",
    "dataset_info.json is not read: dataset names the file itself": "dataset_dir",
    "weights are loaded file by file whatever this says": "low_cpu_mem_usage",
    "rows are read the same whatever this says": """
        dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers
        dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor
        overwrite_cache preprocessing_batch_size preprocessing_num_workers
        remove_unused_columns ignore_data_skip
    """,
    "progress, metrics and logs are always recorded": """
        disable_tqdm include_effective_tokens_per_second include_for_metrics
        include_num_input_tokens_seen include_tokens_per_second log_level log_level_replica
        log_on_each_node logging_first_step logging_nan_inf_filter logging_strategy
        print_param_status skip_memory_metrics
    """,
    "the scheduler and the worker see to it": """
        ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters
        ddp_static_graph ddp_timeout local_rank master_addr master_port placement_strategy
        ray_init_kwargs ray_num_workers ray_run_name ray_storage_filesystem ray_storage_path
        resources_per_worker
    """,
    "the held-out rows are evaluated as eval_strategy says, and once before the first step": """
        batch_eval_metrics eval_accumulation_steps eval_do_concat_batches eval_on_start
        eval_use_gather_object prediction_loss_only
    """,
    "nothing is pushed to a hub": """
        hub_always_push hub_private_repo hub_strategy trackio_space_id
    """,
    "a spec holds no secrets, so it was not kept": "hf_hub_token ms_hub_token om_hub_token",
    "each answer is learned once, so that no ratio is far enough from 1 to be clipped": """
        epsilon epsilon_high delta
    """,
    "the way of computing is chosen here": """
        flash_attn fp16_opt_level tf32 torch_empty_cache_steps use_cache
        use_kv_cache use_reentrant_gc
    """,
    "files are safetensors anyway": "save_safetensors",
    "rows come in random order, not by length": "group_by_length",
    "it was the test of LLaMA-Factory's old evaluation": """
        task task_dir lang n_shot save_dir download_mode
    """,
}

WITHOUT_EFFECT: Mapping[str, str] = {
    name: reason for reason, names in _REASONS.items() for name in names.split()
}
"""Name that changes nothing here -> why; a note says so, and the job runs."""

TEMPLATE_NAMES = frozenset(
    """
    aeva alpaca aquila atom baichuan baichuan2 bailing bailing_v2 belle bluelm breeze chatglm2
    chatglm3 chatml chatml_de codegeex2 codegeex4 cohere cpm cpm3 cpm4 dbrx deepseek deepseek3
    deepseekcoder deepseekr1 default dots_ocr empty ernie ernie_nothink ernie_vl exaone falcon
    falcon_h1 fewshot gemma gemma2 gemma3 gemma3n gemma4 gemma4n glm4 glm4_5v glm4_7 glm4_moe glm4v
    glm_ocr glmz1 gpt gpt_oss granite3 granite3_vision granite4 hunyuan hunyuan_small hy3
    hy_dense_1_8b hy_dense_7b index intern intern2 intern_s1 intern_vl keye_vl kimi_vl lfm lfm2
    lfm2_vl llama2 llama2_zh llama3 llama4 llava llava_next llava_next_llama3 llava_next_mistral
    llava_next_qwen llava_next_video llava_next_video_mistral llava_next_video_yi llava_next_yi
    marco mimo mimo_v2 mimo_vl minicpm_o minicpm_v minicpm_v_4_6 minimax1 minimax2 ministral
    ministral3 mistral mistral_small mllama moonlight moss_vl olmo openchat openchat-3.6 opencoder
    orion paligemma paligemma_chat phi phi4 phi4_mini phi_small pixtral qwen qwen2_audio qwen2_omni
    qwen2_vl qwen3 qwen3_5 qwen3_5_nothink qwen3_6 qwen3_nothink qwen3_omni qwen3_omni_nothink
    qwen3_vl qwen3_vl_nothink sailor seed_coder seed_oss skywork_o1 smollm smollm2 solar spark
    starchat telechat telechat2 vicuna video_llava xuanyuan xverse yayi yi yi_vl youtu youtu_vl yuan
    zephyr
    """.split()  # noqa: SIM905 - reads best as text
)
"""Names of chat templates in LLaMA-Factory, old and new; here they mean the base's own."""

GENERATING = frozenset(
    {"do_sample", "temperature", "top_p", "top_k", "max_new_tokens", "repetition_penalty"}
)
"""How a model speaks: a merge's file may carry it without effect."""

TUNING = frozenset(
    {"stage", "finetuning_type", "cutoff_len", "create_new_adapter"}
    | {"quantization_type", "double_quantization"}
)
"""Fields of a fine-tune that a file for inference or a merge may carry without effect."""

ON_CPU = frozenset({"use_cpu", "no_cuda"})
"""Flags that mean ``device: cpu``."""

SECRETS = frozenset({"hub_token", "swanlab_api_key", "swanlab_lark_secret"})
"""Never shown again, not even in the refusal."""

PATHS = frozenset({"resume_from_checkpoint", "tokenized_path", "adapter_folder"})
"""What takes a path there, and cannot here."""

ALSO_DEFAULT: Mapping[str, tuple[str, ...]] = {
    "reward_model_type": ("full",),
    "infer_backend": ("hf",),
}
"""Values that give the same result as the default."""

LATER: Mapping[str, tuple[str, ...]] = {
    "stage": ("ppo",),
    "pref_loss": ("kto_pair",),
    "optim": (
        "adalomo",
        "adamw_anyprecision",
        "adamw_torch_npu_fused",
        "adamw_torch_xla",
        "galore_adafactor_layerwise",
        "lomo",
    ),
}
"""Field -> values that LLaMA-Factory knows and this version does not."""

INSTEAD: Mapping[str, str] = {
    "generation_max_length": "max_new_tokens bounds what is answered",
    "deepspeed": "leave it out; gradient_checkpointing: true saves memory on one GPU",
    "do_train": "do_eval or do_predict measures without training; kind: inference answers prompts",
    "eval_num_beams": "leave it out: answers are drawn, or greedy with do_sample: false",
    "generation_num_beams": "leave it out: answers are drawn, or greedy with do_sample: false",
    "num_beams": "leave it out: answers are drawn, or greedy with do_sample: false",
    "export_hub_model_id": "leave it out; `tuneyard fetch JOB` fetches the model to be pushed",
    "export_quantization_bit": "leave it out: merge first, then quantise the folder",
    "export_quantization_dataset": "leave it out: merge first, then quantise the folder",
    "enable_liger_kernel": "leave it out: it saves memory and changes nothing else",
    "fsdp": "leave it out; gradient_checkpointing: true saves memory on one GPU",
    "infer_backend": "huggingface",
    "max_prompt_length": "cutoff_len bounds questions, too",
    "num_iterations": "leave it out: each answer is learned once",
    "optim": "adamw_torch; galore_adamw and apollo_adamw save memory in full tuning",
    "quantization_bit": "leave it out: the base is taken as it is stored",
    "resume_from_checkpoint": "`tuneyard retry JOB` goes on from its newest checkpoint",
    "pref_loss": "stage: kto, whose rows have a label each",
    "quantization_method": "leave it out: bitsandbytes brings a base to 4 or 8 bits",
    "stage": "grpo or rloo, which learn from the same reward_model or from reward_funcs, or dpo, "
    "which learns from pairs of answers",
    "streaming": "leave it out; max_samples bounds what is read",
    "tokenized_path": "name the rows as dataset: they are tokenised when the job runs",
    "train_from_scratch": "leave it out: finetuning_type: full tunes all of the base",
    "swanlab_api_key": "leave it out: name SWANLAB_API_KEY in the worker's tracker_variables",
    "swanlab_lark_webhook_url": "leave it out: `tuneyard watch JOB` tells how a job ends",
    "use_unsloth": "leave it out",
    "use_vllm": "leave it out: the model that learns draws its answers itself",
}
"""What to use in the place of something that is not there yet."""

MEANT: Mapping[str, str] = {
    "alpha": "lora_alpha",
    "base_model": "model",
    "batch_size": "per_device_train_batch_size",
    "dropout": "lora_dropout",
    "load_in_4bit": "quantization_bit",
    "load_in_8bit": "quantization_bit",
    "lora_modules": "lora_target",
    "lora_target_modules": "lora_target",
    "use_peft": "finetuning_type",
    "max_source_length": "cutoff_len",
    "max_target_length": "cutoff_len",
    "use_lora": "finetuning_type",
    "use_qlora": "quantization_bit",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "max_seq_len": "cutoff_len",
    "max_seq_length": "cutoff_len",
    "n_epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "per_device_batch_size": "per_device_train_batch_size",
    "r": "lora_rank",
    "rank": "lora_rank",
    "steps": "max_steps",
    "system_prompt": "system",
    "target_modules": "lora_target",
    "train_file": "dataset",
}
"""What other programs call a field, where likeness would not find it."""

NOT_YET: Mapping[str, Any] = {
    "accelerator_config": None,
    "account_for_embedding_in_pipeline_split": None,
    "account_for_loss_in_pipeline_split": None,
    "activation_checkpointing": None,
    "activation_checkpointing_kwargs": None,
    "adapter_folder": None,
    "add_special_tokens": None,
    "add_tokens": None,
    "apply_rope_fusion": None,
    "asft_alpha": 0.1,
    "audio_sampling_rate": 16000,
    "auto_find_batch_size": False,
    "average_tokens_across_devices": True,
    "bf16_full_eval": False,
    "bias_activation_fusion": None,
    "buffer_size": 16384,
    "calculate_per_token_loss": None,
    "context_parallel_size": 1,
    "crop_to_patches": False,
    "cross_entropy_loss_fusion": None,
    "data_seed": None,
    "dataloader_drop_last": False,
    "debug": "",
    "deepspeed": None,
    "do_train": True,
    "eaft_alpha": 1.0,
    "enable_jit_checkpoint": False,
    "enable_liger_kernel": False,
    "enable_thinking": True,
    "enable_torch_profiler": False,
    "eval_delay": 0,
    "eval_num_beams": None,
    "eval_on_each_dataset": False,
    "expert_model_parallel_size": 1,
    "export_device": "cpu",
    "export_dir": None,
    "export_hf_on_finish": False,
    "export_hub_model_id": None,
    "export_legacy_format": False,
    "export_quantization_bit": None,
    "export_quantization_dataset": None,
    "export_quantization_maxlen": 1024,
    "export_quantization_nsamples": 128,
    "export_size": 5,
    "extra_config": None,
    "fp16_full_eval": False,
    "fp8": False,
    "fp8_backend": "auto",
    "fp8_enable_fsdp_float8_all_gather": False,
    "freeze_language_model": False,
    "freeze_multi_modal_projector": True,
    "freeze_vision_tower": True,
    "fsdp": None,
    "fsdp_config": None,
    "generation_config": None,
    "generation_max_length": None,
    "generation_num_beams": None,
    "gradient_checkpointing_kwargs": None,
    "hub_model_id": None,
    "hub_revision": None,
    "hub_token": None,
    "hyper_parallel_args": None,
    "hyper_parallel_cp_size": 1,
    "ignore_pad_token_for_loss": True,
    "image_do_pan_and_scan": False,
    "image_max_pixels": 589824,
    "image_min_pixels": 1024,
    "importance_sampling_level": "token",
    "infer_backend": "huggingface",
    "infer_dtype": "auto",
    "init_special_tokens": "noise_init",
    "interleave_probs": None,
    "kt_cpu_activation": None,
    "kt_expert_checkpoint_path": None,
    "kt_lora_expert_intermediate_size": None,
    "kt_lora_expert_num": None,
    "kt_non_expert_weight_path": None,
    "kt_use_lora_experts": None,
    "kt_weight_path": None,
    "label_names": None,
    "length_column_name": "length",
    "length_penalty": 1.0,
    "liger_kernel_config": None,
    "masked_softmax_fusion": None,
    "max_length": 1024,
    "megatron_pretrained_checkpoint": None,
    "mix_strategy": "concat",
    "mixed_precision": "bf16_mixed",
    "mixture_of_depths": None,
    "max_prompt_length": None,
    "model_revision": "main",
    "moe_aux_loss_coef": None,
    "moe_grouped_gemm": None,
    "moe_token_dispatcher_type": None,
    "new_special_tokens_config": None,
    "multi_objective_aggregation": "sum_then_normalize",
    "num_beams": 1,
    "num_iterations": 1,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "parallelism_config": None,
    "pipeline_model_parallel_size": 1,
    "ppo_buffer_size": 1,
    "ppo_epochs": 4,
    "ppo_score_norm": False,
    "ppo_target": 6.0,
    "ppo_whiten_rewards": False,
    "preserve_thinking": False,
    "profile_modules": None,
    "profiler_active_steps": 1,
    "profiler_output_dir": None,
    "profiler_profile_memory": True,
    "profiler_record_shapes": True,
    "profiler_repeat": 1,
    "profiler_wait_steps": 1,
    "profiler_warmup_steps": 1,
    "profiler_with_stack": True,
    "push_to_hub": False,
    "quantization_device_map": None,
    "quantization_method": "bnb",
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "resize_vocab": False,
    "restore_callback_states_from_checkpoint": False,
    "resume_from_checkpoint": None,
    "reward_model_adapters": None,
    "reward_model_quantization_bit": None,
    "reward_model_type": "lora",
    "rope_scaling": None,
    "sequence_parallel": False,
    "sglang_config": None,
    "sglang_lora_backend": "triton",
    "sglang_maxlen": 4096,
    "sglang_mem_fraction": 0.7,
    "sglang_tp_size": -1,
    "shift_attn": False,
    "skip_special_tokens": True,
    "sortish_sampler": False,
    "split_special_tokens": False,
    "streaming": False,
    "swanlab_api_key": None,
    "swanlab_lark_secret": None,
    "swanlab_lark_webhook_url": None,
    "tensor_model_parallel_size": 1,
    "tokenized_path": None,
    "tool_format": None,
    "torch_compile": False,
    "torch_compile_backend": None,
    "torch_compile_mode": None,
    "trackio_bucket_id": None,
    "trackio_static_space_id": None,
    "train_from_scratch": False,
    "train_sampling_strategy": "random",
    "trust_remote_code": False,
    "upcast_layernorm": False,
    "upcast_lmhead_output": False,
    "use_asft_loss": False,
    "use_audio_in_video": False,
    "use_dft_loss": False,
    "use_distributed_optimizer": True,
    "use_eaft_loss": False,
    "use_fast_tokenizer": True,
    "use_hyper_parallel": False,
    "use_kt": False,
    "use_liger_kernel": False,
    "use_mca": False,
    "use_megatron_bridge": False,
    "use_packed_sequences": False,
    "use_unsloth": False,
    "use_unsloth_gc": False,
    "use_v1_kernels": False,
    "use_vllm": False,
    "video_fps": 2.0,
    "video_max_pixels": 65536,
    "video_maxlen": 128,
    "video_min_pixels": 256,
    "virtual_pipeline_model_parallel_size": None,
    "vllm_config": None,
    "vllm_enforce_eager": False,
    "vllm_gpu_util": 0.7,
    "vllm_max_lora_rank": 32,
    "vllm_maxlen": 4096,
}
"""Names that would change the result and cannot be honoured yet -> their default, at which they are
accepted."""
