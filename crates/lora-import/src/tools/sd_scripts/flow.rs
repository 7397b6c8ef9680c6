//! Bases that sd-scripts trains by flow matching: FLUX.1, Chroma, Stable Diffusion 3 and Anima.

use serde_json::Value;

use super::network::blocks;
use super::{Base, base, of_flow};
use crate::engine::{Field, Scope};
use crate::outcome::{Outcome, becomes, instead, lost, no_effect, taken};
use crate::row::{Kind, OFF, Row, by, gone, nothing, same};
use crate::values;

pub(in crate::tools) static ROWS: &[Row] = &[
    by("clip_l", &["text_encoder"], "CLIP-L", |field| of_flow(field, taken("text_encoder", field.text()))),
    by("clip_g", &["text_encoder_2"], "CLIP-G of Stable Diffusion 3", |field| {
        of_flow(field, taken("text_encoder_2", field.text()))
    }),
    by(
        "t5xxl",
        &["text_encoder", "text_encoder_2", "text_encoder_3"],
        "T5-XXL: Chroma's text encoder, FLUX.1's second, Stable Diffusion 3's third",
        |field| {
            let ours = match base(&field.root) {
                Base::Chroma => "text_encoder",
                Base::Sd3 => "text_encoder_3",
                _ => "text_encoder_2",
            };
            of_flow(field, taken(ours, field.text()))
        },
    ),
    nothing("model_type", "the base's files say whether they are FLUX.1's or Chroma's"),
    same("qwen3", "text_encoder", Kind::Text),
    same("t5_tokenizer_path", "t5_tokenizer", Kind::Text),
    nothing("qwen3_max_token_length t5_max_token_length", "the text conditioner reads 512 states"),
    gone("llm_adapter_path", &["\"\""], "the text conditioner is read from the base's own file"),
    by("ae", &["vae"], "the autoencoder", |field| of_flow(field, taken("vae", field.text()))),
    by("guidance_scale", &["guidance_scale"], "3.5 where none is given; here 1", |field| match base(&field.root) {
        Base::Flux => taken("guidance_scale", field.number().map_or(Value::Null, values::of_number)),
        _ => no_effect("only FLUX.1 is told it"),
    })
    .default("3.5"),
    by("timestep_sampling", &["timestep_sampling"], "`sigma` draws evenly, or by weighting_scheme", |field| {
        of_flow(
            field,
            match field.text().as_str() {
                // What each script has for usual.
                "sigma" => match sampling(&field.root).as_str() {
                    "sigma" => becomes("timestep_sampling", density(&field.root), "timesteps of a scheduler"),
                    usual => becomes("timestep_sampling", usual, "its script's usual way"),
                },
                same @ ("uniform" | "sigmoid" | "shift" | "flux_shift") => taken("timestep_sampling", same),
                "qwen_shift" => becomes("timestep_sampling", "flux_shift", "by the picture's size, as the base does"),
                other @ ("logsnr" | "flux2_shift" | "qinglong_flux" | "qinglong_qwen") => instead(
                    vec![("timestep_sampling", "sigmoid".into())],
                    format!("noise levels are not drawn by {other}"),
                ),
                _ => field.expected("sigma, uniform, sigmoid, shift, flux_shift or qwen_shift"),
            },
        )
    })
    .default("\"sigma\""),
    by("sigmoid_scale", &["sigmoid_scale"], "of sigmoid, shift and flux_shift", |field| {
        of_flow(field, field.number_as("sigmoid_scale"))
    }),
    by("discrete_flow_shift", &["discrete_flow_shift"], "of shift and sigma; 3 where none is given", shift)
        .default("3"),
    by("training_shift", &["discrete_flow_shift"], "of Stable Diffusion 3", |field| match field.number() {
        Some(1.0) => no_effect("1: noise levels are not moved"),
        _ if base(&field.root) == Base::Sd3 => field.number_as("discrete_flow_shift"),
        _ => no_effect("an option of Stable Diffusion 3"),
    }),
    by("model_prediction_type", &[], "`raw` alone", |field| {
        of_flow(
            field,
            match field.text().as_str() {
                "raw" => no_effect("the velocity is what is predicted"),
                _ => lost("the loss is that of the velocity, without a weight by sigma"),
            },
        )
    })
    .default("\"sigma_scaled\""),
    by("weighting_scheme", &["timestep_sampling"], "`none`; `logit_normal` and `mode` are ways of drawing", |field| {
        of_flow(
            field,
            match field.text().as_str() {
                "none" | "uniform" => no_effect("off, as without it"),
                "logit_normal" | "mode" if sampling(&field.root) != "sigma" => {
                    no_effect("only with timestep_sampling = sigma")
                }
                scheme @ ("logit_normal" | "mode") => {
                    becomes("timestep_sampling", scheme, "a way of drawing noise levels")
                }
                _ => lost("no weights by noise level"),
            },
        )
    }),
    by(
        "logit_mean",
        &["logit_mean"],
        "of `logit_normal`, with the other sign: there it counts towards data",
        |field| match (density(&field.root), field.number()) {
            ("logit_normal", Some(mean)) if mean != 0.0 => {
                becomes("logit_mean", values::of_number(-mean), "counted towards data there, towards noise here")
            }
            (_, Some(_)) => no_effect("0, or a number of another weighting_scheme"),
            (_, None) => field.expected("a number"),
        },
    ),
    by("logit_std", &["logit_std"], "of `logit_normal`", |field| of_density(field, "logit_normal", "logit_std")),
    by("mode_scale", &["mode_scale"], "of `mode`", |field| of_density(field, "mode", "mode_scale")),
    by("t5xxl_max_token_length", &["max_sequence_length"], "tokens of a caption", |field| {
        of_flow(field, taken("max_sequence_length", field.count().unwrap_or(512)))
    }),
    by("apply_t5_attn_mask", &[], "captions' padding in attention", |field| match field.on() {
        true if base(&field.root) == Base::Chroma => no_effect("nothing reads captions' padding"),
        true => of_flow(field, lost("padding of captions is attended to, as FLUX.1 was trained")),
        false => no_effect("off, as without it"),
    }),
    by("blocks_to_swap", &["offload_base"], "`offload_base`: all frozen weights are streamed", |field| {
        match field.count() {
            Some(1..) => becomes("offload_base", true, "all frozen weights are streamed, not so many blocks"),
            _ => no_effect("off, as without it"),
        }
    }),
    nothing("split_mode", "how memory is saved"),
    nothing("split_qkv", "how weights are laid out"),
    nothing("disable_mmap_load_safetensors", "how files are read"),
    nothing("text_encoder_batch_size", "how many captions are encoded at once"),
    nothing("t5xxl_device", "where captions are encoded"),
    nothing("t5xxl_dtype", "in what captions are encoded"),
    by("train_blocks", &["target_modules"], "of FLUX.1: `all`, `single` or `double`", blocks),
    gone("train_double_block_indices train_single_block_indices", &["\"all\""], "blocks are chosen by target_modules"),
    gone("save_clip save_t5xxl", OFF, "there is no switch for the networks that a checkpoint holds"),
    gone("apply_lg_attn_mask", OFF, "padding of captions is attended to"),
    gone("pos_emb_random_crop_rate enable_scaled_pos_embed", OFF, "positions are those of the whole picture"),
    gone(
        "clip_l_dropout_rate clip_g_dropout_rate t5_dropout_rate",
        OFF,
        "captions are dropped whole: caption_dropout_rate",
    ),
];

/// The way of drawing noise levels, or the usual of the script.
fn sampling(root: &Scope<'_>) -> String {
    match (root.given("timestep_sampling").as_ref().and_then(values::text), base(root)) {
        (_, Base::Sd3) => "sigma".to_owned(),
        (Some(given), _) => given,
        (None, Base::Anima) => "sigmoid".to_owned(),
        (None, _) => "sigma".to_owned(),
    }
}

/// What moves noise levels towards noise.
pub(in crate::tools) fn shift(field: &Field<'_>) -> Outcome {
    match sampling(&field.root).as_str() {
        _ if base(&field.root) == Base::Sd3 => no_effect("an option of other bases"),
        "sigma" if field.number() == Some(1.0) => no_effect("1: noise levels are not moved"),
        "shift" | "sigma" => of_flow(field, field.number_as("discrete_flow_shift")),
        _ => no_effect("only with timestep_sampling = shift or sigma"),
    }
}

/// How a scheduler's timesteps are drawn.
fn density(root: &Scope<'_>) -> &'static str {
    match root.text("weighting_scheme").as_deref() {
        _ if sampling(root) != "sigma" => "uniform",
        Some("logit_normal") => "logit_normal",
        Some("mode") => "mode",
        _ => "uniform",
    }
}

/// A number of one way of drawing a scheduler's timesteps.
fn of_density(field: &Field<'_>, own: &str, ours: &'static str) -> Outcome {
    match density(&field.root) == own {
        true => field.number_as(ours),
        false => no_effect(format!("only with weighting_scheme = {own}")),
    }
}
