//! sd-scripts' precision and memory: what is computed in how many bits, what is cached and kept where.

use crate::engine::Field;
use crate::outcome::{Outcome, becomes, no_effect, taken};
use crate::row::{Kind, OFF, Row, by, gone, nothing, same};

pub(in crate::tools) static ROWS: &[Row] = &[
    by("no_half_vae", &[], "an autoencoder that overflows goes on in fp32", |_| {
        no_effect("an autoencoder that overflows goes on in fp32")
    }),
    nothing("xformers", "how attention is computed"),
    nothing("cache_text_encoder_outputs", "captions are encoded once wherever they may be"),
    nothing("cache_text_encoder_outputs_to_disk", "with `cache_dir`"),
    by("cache_latents", &["cache_latents"], "on here even without it", |field| match field.on() {
        true => taken("cache_latents", true),
        false => no_effect("latents are cached without it; the result is the same"),
    }),
    nothing("cache_latents_to_disk", "`cache_dir` keeps them for the next run"),
    nothing("vae_batch_size", "how many pictures are encoded at once"),
    same("gradient_checkpointing", "gradient_checkpointing", Kind::Flag),
    by("cpu_offload_checkpointing", &["cpu_offload_checkpointing"], "with gradient_checkpointing", |field| {
        field.when_on(taken("cpu_offload_checkpointing", true))
    }),
    by("mixed_precision", &["precision"], "`no` is fp32", mixed_precision).default("\"no\""),
    gone("full_fp16 full_bf16", OFF, "trained numbers and their optimiser's stay in fp32"),
    by("fp8_base", &["base_storage"], "`fp8`, with a factor for each output", fp8),
    by("fp8_base_unet", &["base_storage"], "`fp8`, with a factor for each output, for the text encoders too", fp8),
    nothing("lowram", "where models are loaded to"),
    nothing("highvram", "what is kept on the device"),
    nothing("mem_eff_attn sdpa", "how attention is computed"),
    nothing("torch_compile dynamo_backend", "how steps are computed"),
    nothing("max_data_loader_n_workers persistent_data_loader_workers", "how pictures are read"),
];

pub(in crate::tools) fn fp8(field: &Field<'_>) -> Outcome {
    field.when_on(becomes("base_storage", "fp8", "with a factor for each output"))
}

pub(in crate::tools) fn mixed_precision(field: &Field<'_>) -> Outcome {
    match field.text().as_str() {
        precision @ ("fp16" | "bf16") => taken("precision", precision),
        "no" => becomes("precision", "fp32", "no mixed precision"),
        _ => field.expected("no, fp16 or bf16"),
    }
}
