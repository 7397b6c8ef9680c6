//! axolotl-ai-cloud/axolotl: YAML of a run with an adapter.

use serde_json::{Value, json};

use super::language::{self, TRAINER};
use super::{Table, Tool, as_it_is, tracking};
use crate::config::Draft;
use crate::engine::{Field, Scope};
use crate::input::Problem;
use crate::outcome::{Outcome, Settings, becomes, instead, lost, no_effect, refused, taken, translated};
use crate::report::Accounted;
use crate::row::{Element, Kind, OFF, Row, by, datasets, gone, nothing, same};
use crate::values;

pub(crate) static TABLE: Table = Table {
    tool: Tool::Axolotl,
    name: "axolotl",
    title: "axolotl",
    about: "YAML of a run with an adapter. A step has `micro_batch_size` × `gradient_accumulation_steps` rows. Conversations that are \
            too long are left out unless `excess_length_strategy` says otherwise, plain texts are split. Records are read by their form; what a `type` \
            puts around them is told.",
    groups: &[ROWS, TRAINER],
    own: &[ROWS, TRAINER],
    is: |has| {
        has("base_model")
            && ["micro_batch_size", "adapter", "sequence_len", "lora_r", "num_epochs"].iter().any(|key| has(key))
    },
    prepare: as_it_is,
    finish: one_template,
};

static ROWS: &[Row] = &[
    by("base_model", &["base_model"], "a folder or a GGUF file", |field| language::place(field, "base_model")),
    same("output_dir", "output_dir", Kind::Text).default("\"./model-out\""),
    nothing("base_model_config", "the base's folder has it"),
    nothing("model_type type_of_model tokenizer_type", "the base's folder says it"),
    nothing(
        "tokenizer_config tokenizer_use_fast tokenizer_legacy tokenizer_use_mistral_common",
        "the base's folder has it",
    ),
    nothing("tokenizer_save_jinja_files", "the adapter's folder has no tokenizer"),
    gone("processor_type", OFF, "pictures beside texts are not trained on"),
    nothing("processor_kwargs", "pictures beside texts are not trained on"),
    nothing(
        "is_falcon_derived_model is_llama_derived_model is_mistral_derived_model is_qwen_derived_model",
        "the base's folder says it",
    ),
    nothing("revision_of_model", "the base is what lies there"),
    gone(
        "model_config overrides_of_model_config overrides_of_model_kwargs rope_scaling",
        OFF,
        "the base's own configuration counts",
    ),
    by("adapter", &["base_storage", "train"], "`lora`, `qlora`; none trains all weights", |field| {
        match field.text().as_str() {
            "lora" => no_effect("a LoRA, as without it"),
            "qlora" => translated(Settings::new(), "a LoRA on a base in 4 bits"),
            "" => becomes("train", "full", "without an adapter all weights are trained"),
            other => refused(format!("no adapter {other} is trained here")),
        }
    })
    .default("\"\""),
    by("load_in_4bit", &["base_storage"], "`nf4`", |field| match field.on() {
        true if field.root.on("load_in_8bit") => refused("contradicts load_in_8bit; keep one of them"),
        true => becomes("base_storage", "nf4", "double quantisation too"),
        false => no_effect("off, as without it"),
    }),
    by("load_in_8bit", &["base_storage"], "`int8`", |field| {
        field.when_on(becomes("base_storage", "int8", "with a factor for each output; outliers are not apart"))
    }),
    nothing("bnb_config_kwargs", "how 4 bits are chosen: nf4 with double quantisation"),
    gone("gptq", OFF, "a base in GPTQ's form is not read"),
    nothing("gptq_groupsize gptq_model_v1 gptq_disable_exllama", "with gptq"),
    gone("model_quantization_config", OFF, "base_storage says how the base is stored"),
    nothing("model_quantization_config_kwargs", "with model_quantization_config"),
    gone("quantize_moe_experts", OFF, "experts are stored as other layers"),
    by("lora_model_dir", &["init_from"], "an adapter to go on from", |field| taken("init_from", field.text())),
    by("lora_r", &["lora_rank"], "the rank", |field| match field.count() {
        Some(rank @ 1..) => taken("lora_rank", rank),
        _ => field.expected("a whole number from 1 on"),
    }),
    same("lora_alpha", "lora_alpha", Kind::Number),
    same("lora_dropout", "lora_dropout", Kind::Positive),
    by("lora_target_modules", &["target_modules"], "names or an expression", |field| match &field.value {
        Value::String(text) if text.contains(['*', '|', '\\', '(']) => {
            becomes("target_modules", json!([format!("re:{text}")]), "an expression")
        }
        names => match language::targets(names) {
            Some(names) => taken("target_modules", names),
            None => field.expected("a list of names"),
        },
    }),
    by("lora_target_linear", &["target_modules"], "`all-linear`", |field| {
        match (field.on(), field.root.given("lora_target_modules")) {
            (false, _) => no_effect("off, as without it"),
            (true, None) => becomes("target_modules", json!(["all-linear"]), "all linear layers but the head"),
            (true, Some(_)) => no_effect("all linear layers; lora_target_modules names them"),
        }
    }),
    gone("lora_target_parameters", OFF, "adapters are on linear layers"),
    by("lora_modules_to_save", &["modules_to_save"], "trained whole", |field| match values::texts(&field.value) {
        Some(names) => taken("modules_to_save", json!(names)),
        None => field.expected("a list of names"),
    }),
    gone("lora_fan_in_fan_out", OFF, "weights lie as outputs by inputs"),
    gone("lora_rank_pattern", OFF, "rank_pattern says it, by our names"),
    gone("lora_alpha_pattern", OFF, "alpha_pattern says it, by our names"),
    gone("peft_layers_to_transform peft_layers_pattern", OFF, "layers are named by target_modules"),
    gone("peft_layer_replication", OFF, "layers are not repeated"),
    gone("peft_init_lora_weights", &["true"], "LoRA begins as usual; variant = pissa or olora begins otherwise"),
    by("peft_trainable_token_indices", &["trainable_token_indices"], "rows of the embedding", |field| {
        match &field.value {
            Value::Array(items) if items.iter().all(|item| values::count(item).is_some()) => {
                taken("trainable_token_indices", field.value.clone())
            }
            _ => lost("tokens of the embedding alone are named, by their numbers"),
        }
    }),
    nothing("peft_ensure_weight_tying", "an adapted tied layer is untied, as in PEFT"),
    nothing("peft_autocast_adapter_dtype", "trained numbers are fp32"),
    gone("peft", OFF, "no LoftQ"),
    by("peft_use_dora", &["variant"], "`dora`", |field| field.when_on(taken("variant", "dora"))),
    same("peft_use_rslora", "use_rslora", Kind::Flag),
    nothing("qlora_sharded_model_loading", "one device trains"),
    nothing("lora_on_cpu", "where the adapter is read to"),
    nothing("lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel", "how steps are computed"),
    nothing("merge_lora merge_method", "lora merge does it"),
    gone("unfrozen_parameters", OFF, "modules_to_save trains whole layers"),
    gone("freeze_mm_modules", OFF, "pictures beside texts are not trained on"),
    gone("qat", OFF, "weights are trained as they are, not as they will be stored"),
    gone("num_labels center_rewards_coefficient", OFF, "no classes and no rewards are trained"),
    gone("reinit_weights diffusion llmcompressor use_onebitllms cls_model_config", OFF, "the base is trained as it is"),
    gone("eaft_alpha eaft_k", OFF, "the loss is cross-entropy"),
    nothing(
        "streaming_multipack_buffer_size pretrain_multipack_attn sample_packing_seq_len_multiplier total_num_tokens \
         base_model_ignore_patterns fp8_enable_fsdp_float8_all_gather",
        "how steps are computed",
    ),
    gone("relora", OFF, "the adapter is not merged on the way"),
    nothing("relora_prune_ratio relora_prune_method relora_cpu_offload", "with relora"),
    gone("jagged_restart_steps", OFF, "schedules do not start again"),
    nothing("jagged_restart_warmup_steps jagged_restart_anneal_steps", "with jagged_restart_steps"),
    gone("lisa_n_layers", OFF, "all adapted layers are trained at each step"),
    nothing("lisa_step_interval lisa_layers_attribute", "with lisa_n_layers"),
    // What is learned.
    by("rl", &["objective"], "`dpo`, `orpo`", |field| match field.text().as_str() {
        "dpo" => taken("objective", "dpo"),
        "orpo" => taken("objective", "orpo"),
        other => refused(format!("{other} is not trained here; dpo and orpo are")),
    }),
    by("rl_beta", &["dpo_beta"], "with rl = dpo", |field| field.number_as("dpo_beta")),
    by("orpo_alpha", &["orpo_lambda"], "with rl = orpo", |field| field.number_as("orpo_lambda")),
    same("dpo_label_smoothing", "label_smoothing", Kind::Positive),
    gone("dpo_loss_type", &["[\"sigmoid\"]", "\"sigmoid\""], "DPO's loss is that of the paper"),
    gone("dpo_use_weighting", OFF, "pairs are not weighted"),
    nothing("precompute_ref_log_probs", "how steps are computed"),
    by("reward_model", &[], "no reward models", |field| refused_if(field, "reward models are not trained here")),
    by("process_reward_model", &[], "no reward models", |field| {
        refused_if(field, "reward models are not trained here")
    }),
    gone("trl", OFF, "nothing is learned from rewards"),
    gone("ebft", OFF, "nothing is learned from features"),
    gone("vllm", OFF, "nothing is sampled by a server"),
    gone("kto_desirable_weight kto_undesirable_weight", OFF, "KTO is not trained here"),
    gone("simpo_gamma", OFF, "SimPO is not trained here"),
    gone("cpo_alpha", OFF, "CPO is not trained here"),
    same("train_on_inputs", "train_on_inputs", Kind::Flag),
    gone("use_eaft use_dft", OFF, "the loss is cross-entropy"),
    // Data.
    datasets("datasets", DATASET, |_| Element::Dataset),
    by("test_datasets", &["validation_data_dir"], "the first of them", |field| {
        let path = field
            .value
            .as_array()
            .and_then(|all| all.first())
            .and_then(|first| first.get("path"))
            .and_then(values::text);
        match path {
            Some(path) => becomes("validation_data_dir", path, "the first of them"),
            None => field.expected("a list with a path"),
        }
    }),
    gone("pretraining_dataset", OFF, "texts are read from disk: datasets"),
    nothing("dataset_prepared_path", "texts are tokenised before the first step"),
    nothing("dataset_processes dataset_num_proc dataset_keep_in_memory skip_prepare_dataset", "how texts are read"),
    nothing("push_dataset_to_hub hf_use_auth_token", "nothing is sent anywhere"),
    gone("dataset_exact_deduplication", OFF, "equal records are all trained on"),
    nothing("shuffle_merged_datasets shuffle_before_merging_datasets", "records are drawn in another order each epoch"),
    gone("curriculum_sampling", OFF, "records are drawn in another order each epoch"),
    gone("streaming", OFF, "texts are tokenised before the first step"),
    by("val_set_size", &["validation_split"], "a share, or a number of records", language::held_out),
    // The limit is of a prompt with one answer (`utils/data/rl.py`), ours of a pair.
    by("sequence_len", &["max_seq_length"], "512 where none is given; of both answers with rl", |field| {
        match (field.root.text("rl").as_deref(), field.count()) {
            (Some("dpo" | "orpo"), Some(length)) => {
                becomes("max_seq_length", length.saturating_mul(2), "twice, for both answers of a pair")
            }
            _ => field.count_as("max_seq_length"),
        }
    })
    .default("512"),
    by(
        "excess_length_strategy",
        &["long_documents"],
        "left out where it is not given (here split); plain texts are split",
        long_documents,
    )
    .default("\"drop\""),
    gone("min_sample_len", OFF, "short documents are trained on, too"),
    gone("max_prompt_len", OFF, "prompts have no limit of their own"),
    by("sample_packing", &["packing"], "documents are isolated, there and here", |field| {
        field.when_on(becomes("packing", true, "each attends to itself alone"))
    }),
    nothing("eval_sample_packing", "how held-out losses are computed"),
    nothing(
        "multipack_real_batches sample_packing_group_size sample_packing_bin_size sample_packing_sequentially \
         sample_packing_eff_est batch_flattening",
        "how rows are filled",
    ),
    nothing("max_packed_sequence_len", "an old form of sample_packing"),
    nothing("pad_to_sequence_len pad_to_multiple_of", "how rows are padded"),
    nothing("group_by_length", "rows are drawn in another order each epoch"),
    by("chat_template", &["chat_template"], "`tokenizer_default` is the base's own", template),
    by("chat_template_jinja", &["chat_template"], "a file", |field| match field.text().contains(['\n', '{']) {
        true => lost("a template stands in a file: chat_template"),
        false => taken("chat_template", field.text()),
    }),
    gone("chat_template_kwargs", OFF, "templates see what records have"),
    same("default_system_message", "system_prompt", Kind::Text),
    gone("special_tokens", OFF, "special tokens are those of the base's tokenizer"),
    gone("tokens added_tokens_overrides", OFF, "no tokens are added to the base's"),
    gone("eot_tokens", OFF, "answers end with the template's own token"),
    gone("resize_token_embeddings_to_32x fix_untrained_tokens", OFF, "no tokens are added to the base's"),
    // Optimisation.
    by("micro_batch_size", &["batch_size"], "1 where none is given", |field| match field.count() {
        Some(size @ 1..) => taken("batch_size", size),
        _ => field.expected("a whole number from 1 on"),
    }),
    by("batch_size", &["gradient_accumulation_steps"], "rows of a step: divided by micro_batch_size", |field| {
        let micro = field.root.count("micro_batch_size").unwrap_or(1).max(1);
        match (field.count(), field.root.count("gradient_accumulation_steps")) {
            (Some(total), None) if total % micro == 0 && total > 0 => {
                becomes("gradient_accumulation_steps", total / micro, "divided by micro_batch_size")
            }
            (Some(total), Some(own)) if total == micro * own => {
                no_effect("micro_batch_size × gradient_accumulation_steps")
            }
            (Some(_), Some(_)) => refused("contradicts micro_batch_size × gradient_accumulation_steps; leave it out"),
            _ => field.expected("a multiple of micro_batch_size"),
        }
    }),
    nothing("eval_batch_size", "how held-out losses are computed"),
    by("num_epochs", &["epochs"], "1 where none are given", language::epochs).default("1"),
    by("optimizer", &["optimizer"], "by its name", language::optimiser).default("\"adamw_torch_fused\""),
    gone("optim_target_modules", OFF, "one optimiser trains everything"),
    by("lr_scheduler", &["lr_scheduler"], "cosine where none is given", language::schedule).default("\"cosine\""),
    gone("lr_quadratic_warmup", OFF, "the warm-up is linear"),
    by("cosine_min_lr_ratio", &["lr_min_ratio"], "with lr_scheduler = cosine", |field| match field.number() {
        Some(0.0) => no_effect("off, as without it"),
        Some(ratio) if field.root.text("lr_scheduler").is_some_and(|name| name == "cosine") => {
            taken("lr_min_ratio", values::of_number(ratio))
        }
        _ => no_effect("only with lr_scheduler = cosine"),
    }),
    gone("cosine_constant_lr_ratio", OFF, "the cosine falls to the end of the run"),
    gone("lr_groups embedding_lr embedding_lr_scale", OFF, "no learning rates by layer"),
    by("bf16", &["precision"], "`auto` and `true` are bf16; `auto` where none is given", |field| {
        match ["fp16", "float16", "float32"].iter().any(|key| field.root.on(key)) {
            true if field.on() => refused("contradicts another number type; keep one of them"),
            true => no_effect("another number type is on"),
            false => match language::precision(field, "bf16") {
                Outcome::NoEffect(_) => becomes("precision", "fp32", "neither bf16 nor fp16"),
                outcome => outcome,
            },
        }
    })
    .default("\"auto\""),
    by("bfloat16", &["precision"], "`bf16`", |field| language::precision(field, "bf16")),
    by("fp16", &["precision"], "`fp16`", |field| language::precision(field, "fp16")),
    by("float16", &["precision"], "`fp16`", |field| language::precision(field, "fp16")),
    by("float32", &["precision"], "`fp32`", |field| language::precision(field, "fp32")),
    gone("fp8", OFF, "nothing is multiplied in 8 bits"),
    nothing("torch_dtype", "weights are in the precision of the run"),
    by(
        "gradient_checkpointing",
        &["gradient_checkpointing", "cpu_offload_checkpointing"],
        "`offload` waits in host memory",
        |field| match (field.text().as_str(), field.on()) {
            ("offload" | "offload_disk", _) => translated(
                vec![("gradient_checkpointing", true.into()), ("cpu_offload_checkpointing", true.into())],
                "in host memory",
            ),
            (_, true) => taken("gradient_checkpointing", true),
            _ => no_effect("off, as without it"),
        },
    ),
    by(
        "activation_offloading",
        &["cpu_offload_checkpointing", "gradient_checkpointing"],
        "in host memory, with gradient_checkpointing",
        |field| match field.on() || !field.text().is_empty() {
            true => translated(
                vec![("gradient_checkpointing", true.into()), ("cpu_offload_checkpointing", true.into())],
                "what blocks need waits in host memory",
            ),
            false => no_effect("off, as without it"),
        },
    ),
    by("layer_offloading", &["offload_base"], "all frozen weights are streamed", |field| {
        field.when_on(becomes("offload_base", true, "all frozen weights are streamed"))
    }),
    // Looking and saving.
    by("eval_steps", &["validate_every_n_steps"], "with val_set_size", |field| {
        match (language::has_held_out(field, "val_set_size"), field.number()) {
            (false, _) => no_effect("nothing is held out"),
            (true, Some(steps)) if steps >= 1.0 => taken("validate_every_n_steps", values::of_number(steps)),
            _ => lost("held-out loss is told by whole steps"),
        }
    }),
    by("evals_per_epoch", &[], "by steps", |field| {
        match language::has_held_out(field, "val_set_size") && field.number() != Some(0.0) {
            true => lost("held-out loss is told before and after training, and every validate_every_n_steps"),
            false => no_effect("nothing is held out"),
        }
    }),
    by("eval_strategy", &[], "by steps", |_| no_effect("with eval_steps")),
    nothing("evaluation_strategy", "an old name of eval_strategy"),
    by("save_steps", &["save_every_n_steps"], "whole steps", |field| match field.number() {
        Some(0.0) => no_effect("off, as without it"),
        Some(steps) if steps >= 1.0 => taken("save_every_n_steps", values::of_number(steps)),
        _ => lost("saves are made by whole steps or epochs"),
    }),
    by("saves_per_epoch", &["save_every_n_epochs"], "1 is every epoch", |field| match field.number() {
        Some(0.0) => no_effect("off, as without it"),
        Some(1.0) => becomes("save_every_n_epochs", 1, "every epoch"),
        _ => lost("saves are made every so many steps or epochs"),
    }),
    by("save_strategy", &["save_every_n_epochs"], "`epoch` is every epoch", |field| match field.text().as_str() {
        "epoch" => becomes("save_every_n_epochs", 1, "every epoch"),
        "best" => lost("save_best keeps it"),
        _ => no_effect("with save_steps"),
    }),
    nothing("save_first_step", "a save more"),
    nothing("save_safetensors", "files are safetensors"),
    by("save_only_model", &["save_state"], "without the optimiser's state", |_| {
        no_effect("a state is written with save_state")
    }),
    by("early_stopping_patience", &["early_stopping_patience"], "with val_set_size and eval_steps", |field| {
        match (
            language::has_held_out(field, "val_set_size")
                && field.root.number("eval_steps").is_some_and(|steps| steps >= 1.0),
            field.count(),
        ) {
            (true, Some(patience @ 1..)) => taken("early_stopping_patience", patience),
            (false, Some(1..)) => lost("needs validate_every_n_steps"),
            _ => no_effect("off, as without it"),
        }
    }),
    gone("auto_resume_from_checkpoints", OFF, "resume = auto goes on from a state of this program"),
    nothing("generate_samples eval_table_size eval_max_new_tokens", "sample_prompts are prompts of one's own"),
    nothing("do_causal_lm_eval eval_causal_lm_metrics", "held-out loss is told"),
    gone("loss_watchdog_threshold", OFF, "the health of a run is told, and does not end it"),
    nothing("loss_watchdog_patience", "with loss_watchdog_threshold"),
    nothing(
        "use_wandb wandb_name wandb_run_id wandb_mode wandb_project wandb_entity wandb_watch wandb_log_model \
         use_mlflow mlflow_tracking_uri mlflow_experiment_name use_comet comet_project_name",
        "nothing is sent anywhere",
    ),
    by("use_tensorboard", &["log_with"], "files for TensorBoard", tracking::tensorboard),
    nothing(
        "use_trackio trackio_project_name trackio_run_name trackio_space_id swanlab_experiment_name \
         swanlab_description swanlab_log_model swanlab_log_completions swanlab_completion_log_interval \
         swanlab_completion_max_buffer use_otel_metrics otel_metrics_host otel_metrics_port",
        "nothing is sent anywhere",
    ),
    // How steps are computed.
    gone("plugins", OFF, "no plug-ins of Python; kernels are the program's own"),
    nothing(
        "liger_rope liger_rms_norm liger_rms_norm_gated liger_layer_norm liger_glu_activation \
         liger_fused_linear_cross_entropy liger_cross_entropy cut_cross_entropy chunked_cross_entropy \
         chunked_cross_entropy_num_chunks",
        "how steps are computed",
    ),
    nothing(
        "attn_implementation xformers_attention sdp_attention flex_attention flex_attn_compile_kwargs flash_attention \
         flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp flash_optimum sage_attention \
         eager_attention gemma4_hybrid_attn_impl fused_attn_kernel",
        "how attention is computed",
    ),
    nothing("experts_implementation use_scattermoe use_sonicmoe llama4_linearized_experts", "how experts are computed"),
    nothing("expert_parallel_size expert_parallel_num_nvl_bytes expert_parallel_token_capacity", "one device trains"),
    nothing("nvfp4_merge_aware", "how weights are merged"),
    nothing(
        "dsv4_fp4_grouped_mode use_dsv4_kernels use_glm_dsa_kernels use_kernels tiled_mlp",
        "how steps are computed",
    ),
    nothing("ple_cpu_offload", "where embeddings lie"),
    nothing("low_cpu_mem_usage experimental_skip_move_to_device", "how files are read"),
    same("device", "device", Kind::Text),
    nothing("device_map", "one device trains"),
    nothing("max_memory gpu_memory_limit", "vram_budget says what there is"),
    nothing(
        "ddp world_size fsdp_version fsdp_final_state_dict_type context_parallel_size sequence_parallel_degree \
         tensor_parallel_size dp_shard_size dp_replicate_size heads_k_stride ring_attn_func accelerator_config \
         use_ray ray_run_name ray_num_workers resources_per_worker",
        "one device trains",
    ),
    nothing("torchdistx_path", "an old form"),
    nothing("gc_steps gc_collect_steps", "how memory is given back"),
    nothing("profiler_steps include_tkps debug", "what is printed"),
    nothing("strict", "how the program reads its files"),
];

static DATASET: &[Row] = &[
    by("path", &["train_data_dir"], "a file or a folder of texts", |field| match field.here.given("data_files") {
        Some(_) => no_effect("data_files say which"),
        None => language::place(field, "train_data_dir"),
    }),
    by("data_files", &["train_data_dir"], "the first of them", |field| match values::texts(&field.value).as_deref() {
        Some([one]) => taken("train_data_dir", one.clone()),
        Some([first, ..]) => {
            becomes("train_data_dir", first.clone(), "the first of them; put the others into datasets of their own")
        }
        _ => field.expected("a name or a list of names"),
    }),
    by(
        "type",
        &["chat_template"],
        "what a record looks like; `alpaca` lays texts out by headings",
        |field| match &field.value {
            Value::String(kind) => kind_of_records(kind),
            _ => lost("records are read by their own form, not by a format of one's own"),
        },
    ),
    nothing("ds_type", "files say it by their names"),
    by("split", &[], "`train`", |field| match field.text().as_str() {
        "train" => no_effect("the whole file is read"),
        split => lost(format!("the whole file is read, not {split}")),
    }),
    gone("name shards shards_idx preprocess_shards", OFF, "the whole file is read"),
    nothing("revision", "what lies there is read"),
    nothing("trust_remote_code", "no code is run but the program's"),
    by("chat_template", &["chat_template"], "`tokenizer_default` is the base's own", template),
    gone("chat_template_jinja", OFF, "a template stands in a file: chat_template"),
    gone("conversation", OFF, "conversations are laid out by chat_template"),
    gone("field", &["\"text\""], "texts are in the field text"),
    gone(
        "field_messages",
        &["\"messages\"", "\"conversations\""],
        "conversations are in the field messages or conversations",
    ),
    gone("field_human", &["\"human\""], "speakers are human and gpt, or user and assistant"),
    gone("field_model", &["\"gpt\""], "speakers are human and gpt, or user and assistant"),
    gone("field_tools", &["\"tools\""], "tools are in the field tools"),
    gone("field_thinking", OFF, "thoughts are in the answers"),
    nothing("template_thinking_key", "with field_thinking"),
    gone("split_thinking", OFF, "thoughts are in the answers"),
    gone("field_chosen", &["\"chosen\""], "the better answer is in the field chosen"),
    gone("field_rejected", &["\"rejected\""], "the worse answer is in the field rejected"),
    gone("message_field_role", &["\"role\"", "\"from\""], "a message has role and content, or from and value"),
    gone("message_field_content", &["\"content\"", "\"value\""], "a message has role and content, or from and value"),
    by("message_property_mappings", &[], "role and content, or from and value", |field| {
        let is = |role: &str, content: &str| {
            field.value.get("role").and_then(values::text).as_deref() == Some(role)
                && field.value.get("content").and_then(values::text).as_deref() == Some(content)
        };
        match is("role", "content") || is("from", "value") {
            true => no_effect("a message has these names here, too"),
            false => lost("a message has role and content, or from and value"),
        }
    }),
    gone("message_field_training", &["\"train\""], "an answer that is not learned has train: false or weight: 0"),
    gone("message_field_training_detail", OFF, "an answer is learned whole"),
    by("roles", &[], "user, assistant, system, tool and their like", |_| {
        no_effect("human, user, gpt, assistant, system and tool are known")
    }),
    gone(
        "roles_to_train",
        &["[\"assistant\"]", "[\"gpt\",\"assistant\"]", "[\"assistant\",\"gpt\"]"],
        "answers are learned",
    ),
    gone("train_on_eos train_on_eot", &["\"turn\"", "\"all\""], "the token that ends an answer is learned"),
    gone("drop_system_message", OFF, "what the system says is read"),
    gone("input_format input_transform", OFF, "records are read by their own form"),
];

fn refused_if(field: &Field<'_>, message: &str) -> Outcome {
    if field.on() { refused(message) } else { no_effect("off, as without it") }
}

fn template(field: &Field<'_>) -> Outcome {
    match field.text().as_str() {
        "tokenizer_default" => no_effect("the base's own, as without it"),
        name @ ("chatml" | "alpaca" | "llama3" | "gemma") => taken("chat_template", name),
        name if name.starts_with("tokenizer_default_fallback") => no_effect("the base's own, as without it"),
        "jinja" => no_effect("with chat_template_jinja"),
        other => translated(Settings::new(), format!("the base's own, which axolotl's {other} copies")),
    }
}

/// Plain texts are cut into rows as they are read (`prompt_strategies/completion.py`), so that `excess_length_strategy`
/// never sees one.
fn long_documents(field: &Field<'_>) -> Outcome {
    let kinds: Vec<Value> = match field.root.given("datasets") {
        Some(Value::Array(sets)) => sets.iter().map(|set| set.get("type").cloned().unwrap_or_default()).collect(),
        _ => Vec::new(),
    };
    let plain = kinds.iter().filter(|kind| matches!(kind.as_str(), Some("completion" | "pretrain"))).count();
    if plain > 0 && plain == kinds.len() {
        return becomes("long_documents", "split", "plain texts are split");
    }
    let (ours, how) = match field.text().as_str() {
        "drop" => ("skip", "left out, counted and named"),
        "truncate" => ("truncate", "cut"),
        "raise" => ("error", "an error"),
        _ => return field.expected("drop, truncate or raise"),
    };
    match plain {
        0 => becomes("long_documents", ours, how),
        _ => instead(
            vec![("long_documents", ours.into())],
            "it holds for plain texts, too, which axolotl splits: train on them in a run of their own, or split their file",
        ),
    }
}

fn kind_of_records(kind: &str) -> Outcome {
    match kind {
        "alpaca" => instead(
            vec![("chat_template", "alpaca".into())],
            "its headings, without axolotl's sentence before them; an input stands below the instruction, without `### Input:`",
        ),
        "completion" | "pretrain" => no_effect("plain texts, told by their form"),
        "chat_template" | "sharegpt" => no_effect("conversations, told by their form"),
        kind if kind.starts_with("chat_template.") => no_effect("conversations, told by their form"),
        "input_output" => lost("parts of texts with a mark of their own each are not read"),
        other => lost(format!("records are laid out by the base's template, not as {other} does")),
    }
}

/// The template of datasets is that of the run.
fn one_template(_: &Scope<'_>, draft: &mut Draft, _: &mut Vec<Accounted>) -> Result<(), Problem> {
    draft.hoist("chat_template").map_err(|message| Problem::new("datasets", 0, "chat_template", message))
}
