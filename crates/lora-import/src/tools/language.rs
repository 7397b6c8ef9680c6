//! What axolotl and LLaMA-Factory share: both hand their numbers to transformers' trainer.

use serde_json::Value;

use super::{optimisers, tracking};
use crate::engine::Field;
use crate::outcome::{Outcome, becomes, lost, no_effect, taken};
use crate::row::{Kind, OFF, Row, by, gone, nothing, same};
use crate::values;

/// Keys of transformers' `TrainingArguments`, but for those that a trainer treats in its own way.
pub(super) static TRAINER: &[Row] = &[
    same("output_dir", "output_dir", Kind::Text),
    same("learning_rate", "learning_rate", Kind::Number),
    same("seed", "seed", Kind::Count),
    same("weight_decay", "weight_decay", Kind::Number).default("0"),
    by("adam_beta1", &["adam_betas"], "the first of `adam_betas`", betas),
    by("adam_beta2", &["adam_betas"], "the second of `adam_betas`", betas),
    by("adam_epsilon", &["adam_eps"], "its name here", |field| match field.number() {
        Some(eps) if eps > 0.0 => taken("adam_eps", eps),
        _ => field.expected("a number above 0"),
    }),
    gone("adam_beta3 adam_epsilon2", OFF, "the optimiser has no number of this name"),
    same("max_grad_norm", "max_grad_norm", Kind::Number),
    same("gradient_accumulation_steps", "gradient_accumulation_steps", Kind::Count),
    by("max_steps", &["max_train_steps"], "optimiser steps; wins over epochs", |field| match field.number() {
        Some(steps) if steps > 0.0 => taken("max_train_steps", values::of_number(steps)),
        Some(_) => no_effect("off, as without it"),
        None => field.expected("a whole number"),
    }),
    by("warmup_steps", &["lr_warmup_steps"], "wins over warmup_ratio", |field| match field.number() {
        Some(0.0) => no_effect("off, as without it"),
        Some(steps) => taken("lr_warmup_steps", values::of_number(steps)),
        None => field.expected("steps"),
    }),
    by("warmup_ratio", &["lr_warmup_steps"], "a share of the run", |field| match field.number() {
        Some(0.0) => no_effect("off, as without it"),
        Some(_) if field.root.number("warmup_steps").is_some_and(|steps| steps > 0.0) => {
            no_effect("warmup_steps wins over it")
        }
        Some(share) if share < 1.0 => becomes("lr_warmup_steps", share, "a share of the run"),
        _ => field.expected("a share below 1"),
    }),
    by("logging_steps", &[], "each step is written to metrics.jsonl", |_| {
        no_effect("each step is written to metrics.jsonl")
    }),
    same("save_total_limit", "save_total_limit", Kind::AtLeastOne),
    gone("load_best_model_at_end", OFF, "save_best keeps it beside the last"),
    gone("metric_for_best_model", &["\"eval_loss\"", "\"loss\""], "the best has the lowest held-out loss"),
    gone("greater_is_better", &["false"], "the best has the lowest held-out loss"),
    same("neftune_noise_alpha", "neftune_noise_alpha", Kind::Positive),
    same("label_smoothing_factor", "label_smoothing", Kind::Positive),
    same("loraplus_lr_ratio", "loraplus_lr_ratio", Kind::Positive),
    nothing("loraplus_lr_embedding", "embeddings in modules_to_save have learning_rate"),
    gone(
        "resume_from_checkpoint",
        OFF,
        "a checkpoint of transformers cannot be gone on from; init_from goes on from its adapter",
    ),
    gone("optim_args", OFF, "the optimiser's numbers are optimizer_args"),
    gone("lr_scheduler_kwargs", OFF, "schedules have no numbers of their own"),
    gone("auto_find_batch_size", OFF, "vram_budget finds what fits, at an equal effective batch"),
    nothing("trust_remote_code", "no code is run but the program's"),
    nothing(
        "deepspeed fsdp fsdp_config local_rank ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers \
         ddp_find_unused_parameters",
        "one device trains",
    ),
    nothing("dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor", "how texts are read"),
    gone("dataloader_drop_last", OFF, "nothing is dropped"),
    nothing("remove_unused_columns", "how texts are read"),
    nothing(
        "gradient_checkpointing_kwargs tf32 torch_compile torch_compile_backend torch_compile_mode \
         torch_empty_cache_steps use_liger_kernel",
        "how steps are computed",
    ),
    nothing("eval_accumulation_steps", "how held-out losses are computed"),
    by("report_to", &["log_with"], "files for TensorBoard", tracking::trackers),
    by("logging_dir", &["logging_dir"], "where files for TensorBoard go", tracking::folder),
    nothing("logging_first_step logging_strategy", "metrics.jsonl and loss.png are written"),
    nothing("run_name", "a note"),
    nothing(
        "hub_model_id hub_strategy hub_revision hub_token hub_private_repo push_to_hub",
        "nothing is sent anywhere",
    ),
    nothing("include_tokens_per_second include_num_input_tokens_seen", "what is printed"),
    nothing("use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode", "nothing is sent anywhere"),
];

/// The optimiser by transformers' names.
pub(super) fn optimiser(field: &Field<'_>) -> Outcome {
    optimisers::named(&field.text())
}

/// The schedule by transformers' names; axolotl's `constant_with_warmup` among them.
pub(super) fn schedule(field: &Field<'_>) -> Outcome {
    optimisers::schedule(&field.text())
}

fn betas(field: &Field<'_>) -> Outcome {
    let first = field.root.number("adam_beta1").unwrap_or(0.9);
    let second = field.root.number("adam_beta2").unwrap_or(0.999);
    becomes("adam_betas", serde_json::json!([first, second]), "both together")
}

/// Times through all texts: whole numbers here.
pub(super) fn epochs(field: &Field<'_>) -> Outcome {
    match field.number() {
        _ if field.root.number("max_steps").is_some_and(|steps| steps > 0.0) => no_effect("max_steps wins over it"),
        Some(epochs) if epochs >= 1.0 && epochs.fract() == 0.0 => taken("epochs", values::of_number(epochs)),
        Some(epochs) => lost(format!("epochs are whole numbers, not {epochs}; give max_train_steps")),
        None => field.expected("a number"),
    }
}

/// A share or a number of records that are held out.
pub(super) fn held_out(field: &Field<'_>) -> Outcome {
    match field.number() {
        Some(0.0) => no_effect("off, as without it"),
        Some(share) => becomes("validation_split", values::of_number(share), "which ones, `seed` says"),
        None => field.expected("a share or a number of records"),
    }
}

/// Whether something is held out, so that there is something to look at.
pub(super) fn has_held_out(field: &Field<'_>, key: &str) -> bool {
    field.root.number(key).is_some_and(|share| share > 0.0)
}

/// `auto` or a switch for a number type.
pub(super) fn precision(field: &Field<'_>, ours: &'static str) -> Outcome {
    match field.on() || field.text() == "auto" || field.text() == "full" {
        true => taken("precision", ours),
        false => no_effect("off, as without it"),
    }
}

/// A base or data by their name on a hub or on disk.
pub(super) fn place(field: &Field<'_>, ours: &'static str) -> Outcome {
    let name = field.text();
    let how = match ours {
        "base_model" => "a name on a hub: it is found once `hf download` has fetched it",
        _ => "a name on a hub: fetch it and put its place here",
    };
    match values::is_hub_name(&name) {
        true => becomes(ours, name, how),
        false => taken(ours, name),
    }
}

/// Layers by name.
pub(super) fn targets(names: &Value) -> Option<Value> {
    let names = values::texts(names)?;
    let names: Vec<String> = names.iter().flat_map(|name| name.split(',')).map(|name| name.trim().to_owned()).collect();
    match names.iter().any(|name| name == "all" || name == "all-linear") {
        true => Some(serde_json::json!(["all-linear"])),
        false => Some(names.into()),
    }
}
