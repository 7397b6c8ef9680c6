//! What a run of sd-scripts is for, what stands around training, and options of `accelerate launch`.

use super::{Base, base, is_flow};
use crate::engine::Field;
use crate::input::command::LAUNCH;
use crate::outcome::{Outcome, becomes, lost, no_effect, taken};
use crate::row::{Kind, OFF, Row, by, gone, nothing, same, table};
use crate::tools::tracking;
use crate::values;

pub(in crate::tools) static ROWS: &[Row] = &[
    by("config_file", &[], "read, under the options of the command line", |_| {
        no_effect("its keys are read with these")
    }),
    nothing("output_config", "nothing is written but what `--out` names"),
    nothing("v2", "the base's files say it"),
    by("clip_skip", &["clip_skip"], "SDXL reads a layer of its own", |field| {
        match (base(&field.root), field.count()) {
            (Base::Sd, Some(layers @ 1..)) => taken("clip_skip", layers),
            (_, Some(_)) => no_effect("the layer that is read is the base's own"),
            (_, None) => field.expected("a whole number"),
        }
    }),
    by("max_token_length", &["max_token_length"], "75, 150 or 225", max_token_length),
    by("pretrained_model_name_or_path", &["base_model"], "a file or a folder", base_model),
    same("vae", "vae", Kind::Text),
    nothing("no_metadata", "the file says what it was trained with"),
    nothing(
        "training_comment metadata_title metadata_author metadata_description metadata_license metadata_tags",
        "a note for the file's metadata",
    ),
    by("log_with", &["log_with"], "files for TensorBoard", tracking::trackers),
    nothing("log_prefix log_tracker_name log_tracker_config log_config", "metrics.jsonl and loss.png are written"),
    nothing(
        "wandb_api_key wandb_run_name huggingface_repo_id huggingface_repo_type huggingface_path_in_repo \
         huggingface_token huggingface_repo_visibility save_state_to_huggingface async_upload",
        "nothing is sent anywhere",
    ),
    nothing("tokenizer_cache_dir", "the tokenizer is in the program"),
    nothing("cache_info", "headers are read each time"),
    nothing("skip_cache_check", "a cache is never stale"),
    gone("debug_dataset", OFF, "lora dataset looks at the pictures"),
    gone("dataset_class", OFF, "no datasets of one's own code"),
    nothing(
        "ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph deepspeed zero_stage offload_optimizer_device \
         offload_optimizer_nvme_path offload_param_device offload_param_nvme_path zero3_init_flag \
         zero3_save_16bit_model fp16_master_weights_and_gradients",
        "one device trains",
    ),
    nothing("fused_backward_pass fused_optimizer_groups blockwise_fused_optimizers", "how steps are computed"),
    nothing("console_log_level console_log_file console_log_simple", "what is printed"),
    nothing("use_safetensors", "files are safetensors"),
    table(LAUNCH, &[LAUNCHED]),
];

static LAUNCHED: &[Row] = &[
    by("num_processes", &[], "ranks are started by torchrun", |field| match field.count() {
        Some(0 | 1) => no_effect("one rank is the usual"),
        _ => lost("start as many ranks by torchrun: docs/multiple-gpus.md"),
    }),
    gone("multi_gpu", OFF, "start as many ranks by torchrun: docs/multiple-gpus.md"),
    nothing("mixed_precision", "the script's own option decides"),
    nothing("num_machines machine_rank main_process_ip main_process_port", "the launcher says it"),
    nothing("num_cpu_threads_per_process", "how steps are computed"),
    nothing("gpu_ids", "`device` says which"),
    nothing("dynamo_backend dynamo_mode dynamo_use_fullgraph dynamo_use_dynamic", "how steps are computed"),
    nothing("config_file", "one device trains"),
    nothing("quiet", "what is printed"),
    nothing("use_deepspeed", "one device trains"),
];

pub(in crate::tools) fn base_model(field: &Field<'_>) -> Outcome {
    let name = field.text();
    match values::is_hub_name(&name) {
        true => becomes("base_model", name, "a name on a hub: it is found once `hf download` has fetched it"),
        false => taken("base_model", name),
    }
}

pub(in crate::tools) fn max_token_length(field: &Field<'_>) -> Outcome {
    match field.count() {
        Some(tokens @ (75 | 150 | 225)) if !is_flow(&field.root) => taken("max_token_length", tokens),
        Some(75 | 150 | 225) => no_effect("captions have the length of this base's encoders"),
        _ => field.expected("75, 150 or 225"),
    }
}
