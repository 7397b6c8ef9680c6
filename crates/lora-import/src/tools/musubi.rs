//! kohya-ss/musubi-tuner: the options of `qwen_image_train_network.py`, `zimage_train_network.py` and their like, on the command
//! line or in a TOML file. What it has of sd-scripts stands in [`super::sd_scripts`], the keys of its dataset files too.

use super::sd_scripts::{self, Base, base};
use super::{Table, Tool};
use crate::outcome::{Settings, becomes, instead, lost, no_effect, taken};
use crate::row::{Kind, OFF, Row, by, gone, nothing, same};

pub(crate) static TABLE: Table = Table {
    tool: Tool::Musubi,
    name: "musubi-tuner",
    title: "musubi-tuner",
    about: "Options of the command line, or the TOML file of `--config_file`; the file of `--dataset_config` becomes `datasets`. \
            Latents and captions are encoded by the run itself: its scripts that cache have no counterpart and need none. Options \
            that are not listed here have names and meaning of sd-scripts'. Sides of buckets are multiples of 64 here unless \
            `bucket_reso_steps` says another number, there of 16.",
    groups: &sd_scripts::behind(OWN),
    own: &[OWN],
    is: |has| has("dit") && (has("network_module") || has("dataset_config")),
    prepare: sd_scripts::flat,
    finish: sd_scripts::data::dataset_file,
};

static OWN: &[Row] = &[
    by("dit", &["base_model"], "the transformer's file", |field| {
        let file: Settings = vec![("base_model", field.text().into())];
        let script = field.root.script().unwrap_or_default();
        match base(&field.root) {
            Base::QwenImage | Base::ZImage => taken("base_model", field.text()),
            _ if script.starts_with("flux_2") || script.is_empty() => taken("base_model", field.text()),
            _ => instead(file, format!("no base of {script} is trained here")),
        }
    }),
    same("text_encoder", "text_encoder", Kind::Text),
    by("model_version", &[], "`original` alone", |field| match field.text().as_str() {
        "original" => no_effect("the base's files say it"),
        _ if base(&field.root) != Base::QwenImage => no_effect("the base's files say it"),
        other => lost(format!("{other}: no pictures beside the captions are trained on")),
    }),
    gone("edit edit_plus", OFF, "no pictures beside the captions are trained on"),
    by(
        "discrete_flow_shift",
        &["discrete_flow_shift"],
        "of shift and sigma; 1 where none is given",
        sd_scripts::flow::shift,
    )
    .default("1"),
    by("save_precision", &["save_precision"], "not an option there; files are bf16", |_| {
        becomes("save_precision", "bf16", "files have the type in which the transformer computes")
    })
    .default("\"bf16\""),
    by("gradient_checkpointing_cpu_offload", &["cpu_offload_checkpointing"], "with gradient_checkpointing", |field| {
        field.when_on(taken("cpu_offload_checkpointing", true))
    }),
    nothing("caption_extension", "the file of dataset_config says it"),
    nothing("model_prediction_type guidance_scale", "the velocity is what is predicted, without guidance"),
    nothing("fp8_scaled", "with fp8_base"),
    nothing(
        "fp8_vl fp8_llm fp8_t5 fp8_text_encoder text_encoder_dtype text_encoder_cpu",
        "text encoders are gone once captions are encoded",
    ),
    nothing("dit_dtype", "weights are in the precision of the run"),
    nothing(
        "vae_dtype vae_tiling vae_chunk_size vae_spatial_tile_sample_min_size vae_enable_tiling",
        "how pictures are encoded",
    ),
    nothing("flash_attn flash3 sage_attn split_attn", "how attention is computed"),
    nothing(
        "compile compile_backend compile_mode compile_dynamic compile_fullgraph compile_cache_size_limit cuda_allow_tf32 \
         cuda_cudnn_benchmark dynamo_mode dynamo_fullgraph dynamo_dynamic",
        "how steps are computed",
    ),
    nothing(
        "use_pinned_memory_for_block_swap block_swap_h2d_only block_swap_ring_size block_swap_granularity \
         img_in_txt_in_offloading block_swap_optimizer_patch_params mem_eff_save disable_numpy_memmap",
        "how memory is saved",
    ),
    gone("num_timestep_buckets", &["null", "0", "1"], "noise levels are drawn independently, not in strata"),
    nothing("preserve_distribution_shape", "with min_timestep and max_timestep"),
    nothing("show_timesteps", "what is printed"),
    nothing("metadata_reso metadata_arch", "a note for the file's metadata"),
    nothing("num_layers dit_in_channels text_encoder1 text_encoder2 clip image_encoder", "an option of other bases"),
];
