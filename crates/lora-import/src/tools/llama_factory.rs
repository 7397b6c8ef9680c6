//! hiyouga/LLaMA-Factory: YAML or JSON of a run of `llamafactory-cli train`.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::language::{self, TRAINER};
use super::{Table, Tool, as_it_is, sd_scripts};
use crate::config::Draft;
use crate::engine::{Field, Scope};
use crate::input::{self, Problem, Source};
use crate::outcome::{Outcome, Settings, becomes, lost, no_effect, refused, taken, translated};
use crate::report::{Accounted, Verdict};
use crate::row::{Kind, OFF, Row, by, gone, nothing, same};
use crate::values;

pub(crate) static TABLE: Table = Table {
    tool: Tool::LlamaFactory,
    name: "llama-factory",
    title: "LLaMA-Factory",
    about: "YAML or JSON of `llamafactory-cli train`. Names of datasets are looked up in `dataset_dir`/dataset_info.json; records \
            are read by their own form, and columns that are not known here are told. Documents longer than `cutoff_len` are cut, \
            or, with stage = pt, split; `lora_alpha` is twice the rank where none is given; activations are computed again \
            unless `disable_gradient_checkpointing` is on. Keys of transformers' trainer that are not listed here are as under axolotl.",
    groups: &[ROWS, TRAINER],
    own: &[ROWS],
    is: |has| {
        has("model_name_or_path") && (has("stage") || has("finetuning_type") || has("template") || has("cutoff_len"))
    },
    prepare: as_it_is,
    finish: named_datasets,
};

static ROWS: &[Row] = &[
    by("model_name_or_path", &["base_model"], "a folder or a GGUF file", |field| language::place(field, "base_model")),
    by(
        "adapter_name_or_path",
        &["init_from", "fuse_adapters"],
        "the last is gone on from, others are merged",
        adapters,
    ),
    by("stage", &["objective"], "`sft`, `pt`; `dpo` by pref_loss", |field| match field.text().as_str() {
        "sft" => no_effect("texts are learned, as without it"),
        "pt" => translated(vec![("objective", "sft".into())], "plain texts are learned whole"),
        "dpo" => match field.root.text("pref_loss").as_deref() {
            None | Some("sigmoid") => taken("objective", "dpo"),
            Some("orpo") => becomes("objective", "orpo", "pref_loss"),
            Some(other) => refused(format!("pref_loss = {other} is not trained here; sigmoid (DPO) and orpo are")),
        },
        other => refused(format!("stage = {other} is not trained here; sft, pt and dpo are")),
    })
    .default("\"sft\""),
    by("do_train", &[], "on", |field| match field.on() {
        true => no_effect("a run of training"),
        false => refused("nothing is trained without it"),
    }),
    by("finetuning_type", &["train", "variant"], "`lora`, `oft`; `full` trains all weights", |field| {
        match field.text().as_str() {
            "lora" => no_effect("a LoRA, as without it"),
            "full" => becomes("train", "full", "all weights"),
            "oft" => becomes("variant", "peft-oft", "rotations of the inputs"),
            other => refused(format!("finetuning_type = {other} is not trained here; lora, oft and full are")),
        }
    }),
    by("oft_block_size", &["variant_options"], "with finetuning_type oft; 32 where none is given", |field| match field
        .root
        .text("finetuning_type")
        .as_deref()
    {
        Some("oft") => sd_scripts::network::option(field, "block_size"),
        _ => no_effect("only with finetuning_type = oft"),
    })
    .default("32"),
    by("oft_target", &["target_modules"], "with finetuning_type oft", |field| {
        match (field.root.text("finetuning_type").as_deref(), language::targets(&field.value)) {
            (Some("oft"), Some(names)) => taken("target_modules", names),
            (Some("oft"), None) => field.expected("names"),
            _ => no_effect("only with finetuning_type = oft"),
        }
    }),
    gone("oft_rank", OFF, "blocks have the size of oft_block_size"),
    by("lora_rank", &["lora_rank"], "8 where none is given", |field| match field.count() {
        Some(rank @ 1..) => taken("lora_rank", rank),
        _ => field.expected("a whole number from 1 on"),
    })
    .default("8"),
    by("lora_alpha", &["lora_alpha"], "twice the rank where none is given", |field| match field.number() {
        Some(alpha) if alpha > 0.0 => taken("lora_alpha", values::of_number(alpha)),
        _ if field.value == json!("2 × lora_rank") => {
            becomes("lora_alpha", field.root.count("lora_rank").unwrap_or(8) * 2, "twice the rank")
        }
        _ => field.expected("a number above 0"),
    })
    .default("\"2 × lora_rank\""),
    same("lora_dropout", "lora_dropout", Kind::Positive),
    by("lora_target", &["target_modules"], "`all`: all-linear", |field| match language::targets(&field.value) {
        _ if field.root.text("finetuning_type").as_deref() == Some("oft") => no_effect("oft_target says it"),
        Some(names) if names == json!(["all-linear"]) => {
            becomes("target_modules", names, "all linear layers but the head")
        }
        Some(names) => taken("target_modules", names),
        None => field.expected("names"),
    })
    .default("\"all\""),
    by("additional_target", &["modules_to_save"], "trained whole", |field| match values::texts(&field.value) {
        Some(names) => {
            let names: Vec<String> =
                names.iter().flat_map(|names| names.split(',')).map(|name| name.trim().to_owned()).collect();
            taken("modules_to_save", json!(names))
        }
        None => field.expected("names"),
    }),
    same("use_rslora", "use_rslora", Kind::Flag),
    by("use_dora", &["variant"], "`dora`", |field| variant(field, "dora")),
    by("pissa_init", &["variant"], "`pissa`", |field| variant(field, "pissa")),
    nothing("pissa_iter", "PiSSA is exact; variant = pissa-fast is not"),
    nothing("pissa_convert", "a file of PiSSA is a plain LoRA"),
    nothing("create_new_adapter", "with adapter_name_or_path"),
    gone("use_galore use_apollo", OFF, "gradients are not projected"),
    nothing(
        "galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise apollo_target \
         apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_layerwise \
         apollo_scale_type apollo_scale_front badam_mode badam_start_block badam_switch_mode badam_switch_interval \
         badam_update_ratio badam_mask_mode badam_verbose asft_alpha eaft_alpha",
        "with its switch",
    ),
    nothing("freeze_trainable_layers freeze_trainable_modules freeze_extra_modules", "with finetuning_type = freeze"),
    nothing("do_predict predict_with_generate max_new_tokens top_p temperature", "samples are drawn by lora generate"),
    nothing(
        "fp8_backend fp8_enable_fsdp_float8_all_gather fsdp_transformer_layer_cls_to_wrap",
        "how steps are computed",
    ),
    gone(
        "tensor_model_parallel_size sequence_parallel pipeline_model_parallel_size expert_model_parallel_size",
        &["1", "false"],
        "a network is not split over devices",
    ),
    gone("use_badam", OFF, "all adapted layers are trained at each step"),
    gone("use_muon", OFF, "no Muon; optimizer says which"),
    gone("use_adam_mini", OFF, "no Adam-mini; optimizer says which"),
    gone("use_llama_pro", OFF, "layers are not repeated"),
    gone("use_dft_loss use_asft_loss use_eaft_loss", OFF, "the loss is cross-entropy"),
    gone("mixture_of_depths", OFF, "the base's own layers are trained"),
    gone("shift_attn", OFF, "attention is the base's own"),
    gone("rope_scaling", OFF, "the base's own configuration counts"),
    gone("moe_aux_loss_coef", OFF, "experts are not balanced"),
    nothing("use_unsloth use_unsloth_gc enable_liger_kernel use_v1_kernels", "how steps are computed"),
    nothing("flash_attn", "how attention is computed"),
    nothing("use_reentrant_gc", "how steps are computed"),
    gone("upcast_layernorm", OFF, "norms accumulate in fp32"),
    nothing("upcast_lmhead_output", "logits are fp32"),
    by("disable_gradient_checkpointing", &["gradient_checkpointing"], "computed again unless it is on", |field| {
        match field.on() {
            true => no_effect("off, as without it"),
            false => becomes("gradient_checkpointing", true, "unless disable_gradient_checkpointing is on"),
        }
    })
    .default("false"),
    nothing("gradient_checkpointing", "disable_gradient_checkpointing says it"),
    by("quantization_bit", &["base_storage"], "4: `nf4`, 8: `int8`", |field| match field.count() {
        Some(4) if field.root.text("quantization_type").is_some_and(|kind| kind == "fp4") => {
            becomes("base_storage", "nf4", "nf4 instead of fp4")
        }
        Some(4) => becomes("base_storage", "nf4", "double quantisation too"),
        Some(8) => becomes("base_storage", "int8", "with a factor for each output; outliers are not apart"),
        Some(bits) => lost(format!("weights are not stored in {bits} bits")),
        None => field.expected("4 or 8"),
    }),
    by("quantization_method", &[], "`bnb`", |field| match field.text().as_str() {
        "bnb" | "bitsandbytes" => no_effect("with quantization_bit"),
        other => lost(format!("weights are stored by base_storage, not by {other}")),
    }),
    nothing("quantization_type", "with quantization_bit"),
    nothing("double_quantization", "with quantization_bit: nf4 has it"),
    nothing("quantization_device_map", "one device trains"),
    // What is learned.
    by("pref_beta", &["dpo_beta", "orpo_lambda"], "with stage = dpo", |field| {
        match (field.root.text("pref_loss").as_deref(), field.number()) {
            _ if field.root.text("stage").is_none_or(|stage| stage != "dpo") => no_effect("only with stage = dpo"),
            (Some("orpo"), Some(lambda)) => taken("orpo_lambda", values::of_number(lambda)),
            (_, Some(beta)) => taken("dpo_beta", values::of_number(beta)),
            _ => field.expected("a number"),
        }
    }),
    nothing("pref_loss", "with stage = dpo"),
    gone("pref_ftx", OFF, "the better answer is not learned beside"),
    gone("pref_bco_weight", OFF, "pairs alone are learned"),
    same("dpo_label_smoothing", "label_smoothing", Kind::Positive),
    gone("ld_alpha", OFF, "answers' lengths are not weighted"),
    gone("simpo_gamma", OFF, "SimPO is not trained here"),
    gone(
        "ref_model ref_model_adapters ref_model_quantization_bit",
        OFF,
        "the reference is the base without its adapter",
    ),
    by("train_on_prompt", &["train_on_inputs"], "its name here", |field| field.when_on(taken("train_on_inputs", true))),
    gone("mask_history", OFF, "all answers of a conversation are learned"),
    // Data.
    by("dataset", &["datasets"], "names in dataset_info.json", |_| {
        translated(Settings::new(), "looked up in dataset_info.json")
    }),
    nothing("dataset_dir", "where dataset_info.json is"),
    by("eval_dataset", &["validation_data_dir"], "a name in dataset_info.json", |_| {
        translated(Settings::new(), "looked up in dataset_info.json")
    }),
    nothing("media_dir", "pictures beside texts are not trained on"),
    by(
        "template",
        &["chat_template", "system_prompt"],
        "`chatml`, `llama3`, `gemma`, `alpaca`; else the base's own",
        template,
    ),
    by(
        "cutoff_len",
        &["max_seq_length", "long_documents"],
        "2048 where none is given; of both answers with stage = dpo, where it is one's there",
        cutoff,
    )
    .default("2048"),
    gone("max_samples", OFF, "all records are trained on"),
    by(
        "packing",
        &["packing"],
        "documents are isolated here; on with stage = pt where it is not given",
        |field| match (packs(&field.root), field.on() && field.root.on("neat_packing")) {
            (false, _) => no_effect("off, as without it"),
            (true, true) => taken("packing", true),
            (true, _) => becomes("packing", true, "each document attends to itself alone, as with neat_packing"),
        },
    )
    .default("\"with stage = pt\""),
    by("neat_packing", &["packing"], "packing with isolated documents", |field| {
        field.when_on(becomes("packing", true, "documents are isolated"))
    }),
    gone("streaming", OFF, "texts are tokenised before the first step"),
    nothing("buffer_size", "with streaming"),
    gone("mix_strategy", &["\"concat\""], "datasets are read one after the other"),
    gone("interleave_probs", OFF, "datasets are read one after the other"),
    gone("tool_format", OFF, "tools are laid out by the base's template"),
    same("default_system", "system_prompt", Kind::Text),
    gone("enable_thinking", &["true"], "thoughts are in the answers"),
    nothing("preserve_thinking", "thoughts are in the answers"),
    nothing("overwrite_cache", "texts are tokenised before the first step"),
    nothing("preprocessing_batch_size preprocessing_num_workers", "how texts are read"),
    nothing("tokenized_path", "texts are tokenised before the first step"),
    nothing("data_shared_file_system", "how texts are read"),
    gone("disable_shuffling", OFF, "records are drawn in another order each epoch"),
    by("val_size", &["validation_split"], "a share, or a number of records", language::held_out),
    gone("resize_vocab add_tokens add_special_tokens", OFF, "no tokens are added to the base's"),
    gone("split_special_tokens", OFF, "special tokens are those of the base's tokenizer"),
    nothing("use_fast_tokenizer", "the base's folder has it"),
    nothing("cache_dir", "nothing is fetched"),
    nothing("model_revision", "the base is what lies there"),
    nothing("hf_hub_token", "nothing is fetched"),
    nothing("low_cpu_mem_usage", "how files are read"),
    nothing("print_param_status", "what is printed"),
    nothing(
        "freeze_vision_tower freeze_multi_modal_projector freeze_language_model",
        "pictures beside texts are not trained on",
    ),
    gone("image_max_pixels image_min_pixels", OFF, "pictures beside texts are not trained on"),
    gone("video_max_pixels video_min_pixels", OFF, "films beside texts are not trained on"),
    // Optimisation.
    by("per_device_train_batch_size", &["batch_size"], "8 where none is given", |field| match field.count() {
        Some(size @ 1..) => taken("batch_size", size),
        _ => field.expected("a whole number from 1 on"),
    })
    .default("8"),
    nothing("per_device_eval_batch_size", "how held-out losses are computed"),
    same("learning_rate", "learning_rate", Kind::Number).default("0.00005"),
    by("num_train_epochs", &["epochs"], "3 where none are given", language::epochs).default("3"),
    by("lr_scheduler_type", &["lr_scheduler"], "linear where none is given", language::schedule).default("\"linear\""),
    by("optim", &["optimizer"], "by its name", language::optimiser),
    by("bf16", &["precision"], "fp32 where neither is given", |field| match (field.on(), field.root.on("fp16")) {
        (true, true) => refused("contradicts fp16; keep one of them"),
        (true, false) => taken("precision", "bf16"),
        (false, true) => no_effect("fp16 is on"),
        (false, false) if field.root.on("pure_bf16") => no_effect("pure_bf16 is on"),
        (false, false) => becomes("precision", "fp32", "neither bf16 nor fp16"),
    })
    .default("false"),
    by("fp16", &["precision"], "`fp16`", |field| language::precision(field, "fp16")),
    by("pure_bf16", &["precision"], "`bf16`; trained numbers stay fp32", |field| {
        field.when_on(becomes("precision", "bf16", "trained numbers stay fp32"))
    }),
    gone("fp8", OFF, "nothing is multiplied in 8 bits"),
    nothing("infer_dtype", "weights are in the precision of the run"),
    nothing(
        "ray_init_kwargs ray_num_workers ray_run_name ray_storage_path resources_per_worker placement_strategy \
         master_addr master_port",
        "one device trains",
    ),
    // Looking and saving.
    by("do_eval", &[], "with val_size or eval_dataset", |_| no_effect("with val_size or eval_dataset")),
    by("eval_strategy", &[], "by steps", |_| no_effect("with eval_steps")),
    by("eval_steps", &["validate_every_n_steps"], "with val_size or eval_dataset", |field| {
        let looks = language::has_held_out(field, "val_size") || field.root.given("eval_dataset").is_some();
        match (looks, field.number()) {
            (false, _) => no_effect("nothing is held out"),
            (true, Some(steps)) if steps >= 1.0 => taken("validate_every_n_steps", values::of_number(steps)),
            _ => lost("held-out loss is told by whole steps"),
        }
    }),
    nothing("eval_on_each_dataset", "held-out loss is one figure"),
    nothing("compute_accuracy", "held-out loss is told"),
    by("early_stopping_steps", &["early_stopping_patience"], "looks without a lower held-out loss", |field| {
        let looks = language::has_held_out(field, "val_size")
            && field.root.number("eval_steps").is_some_and(|steps| steps >= 1.0);
        match (looks, field.count()) {
            (true, Some(patience @ 1..)) => taken("early_stopping_patience", patience),
            (false, Some(1..)) => lost("needs validate_every_n_steps"),
            _ => no_effect("off, as without it"),
        }
    }),
    by("save_steps", &["save_every_n_steps"], "500 where none are given", |field| {
        match (field.root.text("save_strategy").as_deref(), field.number()) {
            (Some("no" | "epoch"), _) => no_effect("save_strategy wins over it"),
            (_, Some(steps)) if steps >= 1.0 => taken("save_every_n_steps", values::of_number(steps)),
            _ => lost("saves are made by whole steps or epochs"),
        }
    })
    .default("500"),
    by("save_strategy", &["save_every_n_epochs"], "`epoch` is every epoch", |field| match field.text().as_str() {
        "epoch" => becomes("save_every_n_epochs", 1, "every epoch"),
        "best" => lost("save_best keeps it"),
        _ => no_effect("with save_steps"),
    }),
    nothing("save_only_model", "a state is written with save_state"),
    nothing("overwrite_output_dir", "files of the same name are replaced"),
    nothing("plot_loss", "loss.png is drawn"),
    nothing("include_effective_tokens_per_second", "what is printed"),
    nothing("swanlab_api_key swanlab_logdir", "nothing is sent anywhere"),
    gone("use_kt", OFF, "experts are computed where other layers are"),
    nothing("kt_weight_path", "with use_kt"),
];

/// Whether rows are filled: where nothing says it, with `stage = pt` (`hparams/parser.py`).
fn packs(root: &Scope<'_>) -> bool {
    match root.given("packing") {
        Some(given) => values::switch(&given) == Some(true),
        None => root.on("neat_packing") || root.text("stage").is_some_and(|stage| stage == "pt"),
    }
}

/// Tokens of a row. With `stage = dpo` the limit is of a prompt with one answer (`data/processor/pairwise.py`), ours of
/// a pair. With `stage = pt` texts that fill rows are cut into such rows and not cut off
/// (`data/processor/pretrain.py`).
fn cutoff(field: &Field<'_>) -> Outcome {
    let Some(length) = field.count() else { return field.expected("a whole number") };
    let (length, long, how) = match field.root.text("stage").as_deref() {
        Some("dpo") => {
            (length.saturating_mul(2), "truncate", "twice, for both answers of a pair; longer pairs are cut")
        }
        Some("pt") if packs(&field.root) => (length, "split", "longer documents are split"),
        _ => (length, "truncate", "longer documents are cut"),
    };
    translated(vec![("max_seq_length", length.into()), ("long_documents", long.into())], how)
}

/// The layout of conversations. LLaMA-Factory's templates are texts of its own; most follow the models of their name.
fn template(field: &Field<'_>) -> Outcome {
    // What its `alpaca` says where no system speaks (`data/template.py`).
    const TASK: &str =
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.";
    match field.text().as_str() {
        name @ ("chatml" | "llama3" | "gemma") => taken("chat_template", name),
        "alpaca" if field.root.given("default_system").is_none() => translated(
            vec![("chat_template", "alpaca".into()), ("system_prompt", TASK.into())],
            "the same headings, and its sentence before them",
        ),
        "alpaca" => taken("chat_template", "alpaca"),
        name @ ("default" | "empty" | "fewshot" | "vanilla") => lost(format!(
            "conversations are laid out by the base's own template, not as {name} does; chat_template names another, or a file"
        )),
        name => translated(
            Settings::new(),
            format!(
                "the base's own, which is not compared with LLaMA-Factory's {name}; lora dataset shows rows as they are learned"
            ),
        ),
    }
}

fn variant(field: &Field<'_>, ours: &'static str) -> Outcome {
    field.when_on(taken("variant", ours))
}

/// Files of datasets by their names in `dataset_info.json`.
#[expect(clippy::ptr_arg, reason = "as the others in the table of trainers")]
fn named_datasets(root: &Scope<'_>, draft: &mut Draft, keys: &mut Vec<Accounted>) -> Result<(), Problem> {
    let folder = PathBuf::from(root.text("dataset_dir").unwrap_or_else(|| "data".to_owned()));
    let index = folder.join("dataset_info.json");
    let info = if index.is_file() { Some(input::read(&Source::file(&index))?.root.value()) } else { None };
    for (key, ours) in [("dataset", "train_data_dir"), ("eval_dataset", "validation_data_dir")] {
        let Some(given) = root.given(key) else { continue };
        let names = values::texts(&given).unwrap_or_default();
        for name in names.iter().flat_map(|names| names.split(',')).map(str::trim).filter(|name| !name.is_empty()) {
            let Some(info) = &info else {
                let index = index.display();
                note(
                    keys,
                    key,
                    format!("{index} is not here, so that it is not known which file {name} is; give {ours}"),
                );
                continue;
            };
            match file(info, &folder, name) {
                Ok(path) => {
                    let dataset = (ours == "train_data_dir").then(|| draft.add_dataset());
                    let verdict = Verdict::Translated(format!("{name} of dataset_info.json"));
                    let set = draft.set(dataset, ours, &path.into(), key, &verdict, false);
                    set.map_err(|error| Problem::new("", 0, key, error))?;
                    unread(&info[name]).into_iter().for_each(|what| note(keys, key, format!("{name}: {what}")));
                }
                Err(what) => note(keys, key, what),
            }
        }
    }
    Ok(())
}

/// Columns and tags of an entry in `dataset_info.json` (LLaMA-Factory's `data/parser.py`), and the names in records
/// that mean the same where `lora_data::texts` reads them.
const READ: &[(&str, &[&str])] = &[
    ("prompt", &["instruction", "prompt", "question", "query", "text", "content"]),
    ("query", &["input", "context"]),
    ("response", &["output", "response", "completion", "answer"]),
    ("history", &["history"]),
    ("messages", &["messages", "conversations"]),
    ("system", &["system", "system_prompt"]),
    ("tools", &["tools", "functions"]),
    ("chosen", &["chosen"]),
    ("rejected", &["rejected"]),
    ("role_tag", &["role", "from"]),
    ("content_tag", &["content", "value"]),
    ("user_tag", &["user", "human"]),
    ("assistant_tag", &["assistant", "gpt", "model", "chatgpt"]),
    ("observation_tag", &["tool", "function", "observation", "ipython"]),
    ("function_tag", &["function_call"]),
    ("system_tag", &["system", "developer"]),
];

/// What an entry of `dataset_info.json` says of its records that is not so here.
fn unread(entry: &Value) -> Vec<String> {
    let mut unread = Vec::new();
    for (part, thing) in [("columns", "column"), ("tags", "tag")] {
        for (column, name) in entry.get(part).and_then(Value::as_object).into_iter().flatten() {
            let Some(name) = name.as_str() else { continue };
            match READ.iter().find(|(known, _)| known == column) {
                Some((_, names)) if names.contains(&name) => {}
                Some((_, names)) => {
                    unread.push(format!("`{name}`, its {thing} {column}, is not read; call it `{}`", names[0]));
                }
                None => unread.push(format!("`{name}`, its {thing} {column}, is not read")),
            }
        }
    }
    if let Some(count) = entry.get("num_samples").filter(|count| !count.is_null()) {
        unread.push(format!("the whole file is read, not {count} records (num_samples)"));
    }
    for key in ["subset", "split", "folder"] {
        match entry.get(key).and_then(Value::as_str) {
            None => {}
            Some("train") if key == "split" => {}
            Some(part) => unread.push(format!("the whole file is read, not the {key} {part}")),
        }
    }
    unread
}

/// What is lost of a key that was taken for translated before its files were looked for.
fn note(keys: &mut [Accounted], key: &str, what: String) {
    if let Some(accounted) = keys.iter_mut().find(|accounted| accounted.key == key) {
        accounted.verdict = match &accounted.verdict {
            Verdict::NoCounterpart(before) => Verdict::NoCounterpart(format!("{before}; {what}")),
            _ => Verdict::NoCounterpart(what),
        };
    }
}

fn file(info: &Value, folder: &Path, name: &str) -> Result<String, String> {
    let entry = info.get(name).ok_or_else(|| format!("dataset_info.json has no {name}"))?;
    match entry.get("file_name").and_then(Value::as_str) {
        Some(file) => Ok(folder.join(file).to_string_lossy().into_owned()),
        None => Err(format!("{name} is on a hub: fetch it and give its file")),
    }
}

/// Adapters: the last one is trained on, unless a new one is asked for, and all others are merged into the base.
fn adapters(field: &Field<'_>) -> Outcome {
    let mut all: Vec<String> = field.text().split(',').map(|path| path.trim().to_owned()).collect();
    let last = if field.root.on("create_new_adapter") { None } else { all.pop() };
    let fused = (!all.is_empty()).then(|| ("fuse_adapters", Value::from(all)));
    Outcome::Taken(last.map(|last| ("init_from", Value::from(last))).into_iter().chain(fused).collect())
}
