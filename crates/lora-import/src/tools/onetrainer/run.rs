//! What a run of OneTrainer is for: method, base, output, precision; and the fields of the program that change nothing.

use crate::outcome::{becomes, lost, no_effect, refused, taken, translated};
use crate::row::{Kind, OFF, Row, by, gone, nothing, same};
use crate::tools::{sd_scripts, tracking};

pub(super) static ROWS: &[Row] = &[
    by("training_method", &["train"], "`LORA`; `FINE_TUNE` trains all weights", |field| match field.text().as_str() {
        "LORA" => no_effect("an adapter, as without it"),
        "FINE_TUNE" => becomes("train", "full", "all weights"),
        other => refused(format!("{other} is not trained here; LORA and FINE_TUNE are")),
    })
    .default("\"FINE_TUNE\""),
    by("model_type", &[], "the base's files say it", |field| {
        let kind = field.text();
        let known = [
            "STABLE_DIFFUSION_15",
            "STABLE_DIFFUSION_2",
            "STABLE_DIFFUSION_XL",
            "STABLE_DIFFUSION_3",
            "FLUX",
            "Z_IMAGE",
            "CHROMA",
            "QWEN",
            "ANIMA",
        ];
        let conditioned = ["INPAINTING", "DEPTH", "FILL"].iter().any(|picture| kind.contains(picture));
        match known.iter().any(|known| kind.starts_with(known)) {
            true if conditioned => {
                refused(format!("{kind} reads pictures beside the noisy one; none such is trained here"))
            }
            true => no_effect("the base's files say it"),
            false => refused(format!("no base of the kind {kind} is trained here")),
        }
    }),
    by("base_model_name", &["base_model"], "a file or a folder", sd_scripts::program::base_model),
    by("output_model_destination", &["output_dir", "output_name"], "its folder and its name", |field| {
        let path = field.text().replace('\\', "/");
        let (folder, name) = path.rsplit_once('/').unwrap_or((".", &path));
        let name = name.strip_suffix(".safetensors").unwrap_or(name);
        translated(vec![("output_dir", folder.into()), ("output_name", name.into())], "folder and name")
    })
    .default("\"models/model.safetensors\""),
    by("output_dtype", &["save_precision"], "fp32 where none is given", |field| match precision(&field.text()) {
        Some(precision) => taken("save_precision", precision),
        None => lost("written as fp32, fp16 or bf16"),
    })
    .default("\"FLOAT_32\""),
    by("output_model_format", &[], "files are safetensors that most programs load", |_| {
        no_effect("files are safetensors in the layout that most programs load")
    }),
    by("train_dtype", &["precision"], "fp16 where none is given", |field| match precision(&field.text()) {
        Some(precision) => taken("precision", precision),
        None => lost("computed in fp32, fp16 or bf16"),
    })
    .default("\"FLOAT_16\""),
    same("train_device", "device", Kind::Text),
    nothing("token_count initial_embedding_text", "a field of embeddings"),
    nothing("save_after_unit", "with save_after"),
    by("continue_last_backup", &["resume"], "from a state of this program, where there is one", |field| {
        field.when_on(becomes("resume", "auto", "from a state of this program, where there is one"))
    }),
    gone("multi_gpu", OFF, "start as many ranks by torchrun: docs/multiple-gpus.md"),
    nothing(
        "workspace_dir cache_dir debug_mode debug_dir prevent_overwrites include_train_config \
         clear_cache_before_training save_filename_prefix secrets __version",
        "how files and runs are kept",
    ),
    by("tensorboard", &["log_with"], "files for TensorBoard", tracking::tensorboard),
    nothing(
        "tensorboard_expose tensorboard_always_on tensorboard_port samples_to_tensorboard",
        "metrics.jsonl and loss.png are written",
    ),
    nothing(
        "device_indexes gradient_reduce_precision gradient_reduce_prevision fused_gradient_reduce \
         async_gradient_reduce async_gradient_reduce_buffer",
        "one device trains",
    ),
    nothing(
        "async_offloading enable_async_offloading compile temp_device attention_mechanism enable_autocast_cache \
         fallback_train_dtype prefetch_next_batch dataloader_threads caching_threads",
        "how steps are computed",
    ),
    nothing("cloud", "nothing is sent anywhere"),
    nothing("frames sample_video_format sample_audio_format", "films are not trained on"),
    nothing(
        "backup_after backup_after_unit rolling_backup rolling_backup_count backup_before_save",
        "a state is written by steps: save_state_every_n_steps",
    ),
    nothing(
        "embedding_learning_rate preserve_embedding_norm embedding embeddings embedding_weight_dtype \
         bundle_additional_embeddings",
        "a field of embeddings",
    ),
    nothing("optimizer_defaults", "of optimisers that are not chosen"),
    nothing(
        "sample_image_format sample_skip_first non_ema_sampling save_skip_first only_cache",
        "a field of the program",
    ),
];

pub(super) fn precision(name: &str) -> Option<&'static str> {
    match name {
        "FLOAT_32" | "TFLOAT_32" => Some("fp32"),
        "FLOAT_16" => Some("fp16"),
        "BFLOAT_16" => Some("bf16"),
        _ => None,
    }
}
