//! The networks of a base in OneTrainer's files, a table each: what is trained, how fast, how it is stored.

use serde_json::Value;

use super::run::precision;
use super::{is_flow, is_sdxl};
use crate::engine::Field;
use crate::outcome::{Outcome, becomes, lost, no_effect, taken, translated};
use crate::row::{Kind, OFF, Row, by, gone, nothing, same, table};
use crate::values;

pub(super) static ROWS: &[Row] = &[
    table("unet transformer", &[UNET, PART]),
    table("text_encoder", &[TEXT_ENCODER, OF_ENCODERS, PART]),
    table("text_encoder_2", &[TEXT_ENCODER_2, OF_ENCODERS, PART]),
    table("text_encoder_3", &[TEXT_ENCODER_3, OF_ENCODERS, PART]),
    table("vae", &[VAE, PART]),
    by("text_encoder_layer_skip", &["clip_skip"], "layers that are left out: one less than clip_skip", |field| {
        match field.count() {
            Some(0) => no_effect("none, as without it"),
            Some(skipped) if !is_sdxl(&field.root) => becomes("clip_skip", skipped + 1, "counted from 1"),
            Some(_) => no_effect("the layer that is read is the base's own"),
            None => field.expected("a whole number"),
        }
    }),
    by(
        "gradient_checkpointing",
        &["gradient_checkpointing", "cpu_offload_checkpointing"],
        "`ON`, `OFF` and `CPU_OFFLOADED`, of files before those by network",
        |field| match field.text().as_str() {
            "CPU_OFFLOADED" => translated(
                vec![("gradient_checkpointing", true.into()), ("cpu_offload_checkpointing", offloads(field).into())],
                "with what blocks began with in host memory",
            ),
            "OFF" => becomes("gradient_checkpointing", false, "off"),
            _ => taken("gradient_checkpointing", values::switch(&field.value) != Some(false)),
        },
    ),
    by("layer_offload_fraction", &["offload_base"], "an old name of offload_fraction", offload),
    nothing("enable_activation_offloading", "with gradient_checkpointing = CPU_OFFLOADED"),
    nothing("weight_dtype", "each network has its own"),
    gone("extra_model_name", OFF, "the base alone is read"),
    nothing(
        "prior effnet_encoder decoder decoder_text_encoder decoder_vqgan text_encoder_3_layer_skip text_encoder_4 \
         text_encoder_4_layer_skip unconditional_transformer text_encoder_2_layer_skip text_encoder_2_sequence_length \
         text_encoder_sequence_length vb_loss_strength",
        "a part of other bases",
    ),
];

static UNET: &[Row] = &[
    by("train", &["train_unet"], "adapted", |field| match field.on() {
        true => no_effect("adapted, as without it"),
        false => taken("train_unet", false),
    }),
    by("learning_rate", &["unet_lr", "learning_rate"], "learning_rate where none is given", |field| {
        match field.number() {
            Some(_) if is_flow(&field.root) => {
                becomes("learning_rate", values::of_number(field.number().unwrap_or(0.0)), "the transformer's")
            }
            _ => field.number_as("unet_lr"),
        }
    }),
    by("weight_dtype", &["base_storage"], "in fewer bits: base_storage", storage),
    by("gradient_checkpointing", &["gradient_checkpointing"], "on where it is not given", |field| {
        field.when_on(taken("gradient_checkpointing", true))
    })
    .default("true"),
    by("activation_offloading", &["cpu_offload_checkpointing"], "its name here", |field| {
        field.when_on(taken("cpu_offload_checkpointing", true))
    }),
    by("offload_fraction", &["offload_base"], "all frozen weights are streamed", offload),
    by("stop_training_after", &[], "trained to the end", stop),
    nothing("stop_training_after_unit", "with stop_training_after"),
    by("guidance_scale", &["guidance_scale"], "of FLUX.1", |field| {
        match field.root.text("model_type").is_some_and(|kind| kind.starts_with("FLUX")) {
            true => taken("guidance_scale", field.number().map_or(Value::Null, values::of_number)),
            false => no_effect("only FLUX.1 is told it"),
        }
    }),
];

static TEXT_ENCODER: &[Row] = &[
    by("train", &["train_text_encoder", "train_text_encoder_1"], "adapted", |field| {
        match (field.on(), is_sdxl(&field.root)) {
            _ if is_flow(&field.root) => no_effect("text encoders of this base are never trained here"),
            (true, _) => no_effect("adapted, as without it"),
            (false, false) => taken("train_text_encoder", false),
            (false, true) => becomes("train_text_encoder_1", false, "SDXL's first"),
        }
    }),
    by(
        "learning_rate",
        &["text_encoder_lr", "text_encoder_1_lr"],
        "learning_rate where none is given (here half of it)",
        |field| {
            encoder_rate(
                field,
                if is_sdxl(&field.root) { "text_encoder_1_lr" } else { "text_encoder_lr" },
                "text_encoder.train",
            )
        },
    )
    .default("\"learning_rate\""),
    by("stop_training_after", &[], "trained to the end; 30 epochs where none are given", stop).default("30"),
    UNIT,
    by("dropout_probability", &["caption_dropout_rate"], "captions that are left out", |field| match field.number() {
        Some(0.0) => no_effect("off, as without it"),
        Some(rate) => becomes("caption_dropout_rate", values::of_number(rate), "for all text encoders together"),
        None => field.expected("a number"),
    }),
    by("weight_dtype", &["base_storage"], "in fewer bits: base_storage", |field| match precision(&field.text()) {
        Some(_) => no_effect("weights are in the precision of the run"),
        None => no_effect("stored as the base is"),
    }),
];

static TEXT_ENCODER_2: &[Row] = &[
    by("train", &["train_text_encoder_2"], "adapted", |field| match field.on() || !is_sdxl(&field.root) {
        true => no_effect("adapted, as without it"),
        false => becomes("train_text_encoder_2", false, "SDXL's second"),
    }),
    by("learning_rate", &["text_encoder_2_lr"], "learning_rate where none is given (here half of it)", |field| {
        match is_sdxl(&field.root) {
            true => encoder_rate(field, "text_encoder_2_lr", "text_encoder_2.train"),
            false => no_effect("a text encoder of other bases"),
        }
    })
    .default("\"learning_rate\""),
    by("stop_training_after", &[], "trained to the end; 30 epochs where none are given", |field| {
        match is_sdxl(&field.root) {
            true => stop(field),
            false => no_effect("a text encoder of other bases"),
        }
    })
    .default("30"),
    UNIT,
];

static TEXT_ENCODER_3: &[Row] = &[nothing(
    "train learning_rate stop_training_after stop_training_after_unit",
    "text encoders of this base are never trained here",
)];

/// The unit of a text encoder's `stop_training_after`.
const UNIT: Row = nothing("stop_training_after_unit", "with stop_training_after").default("\"EPOCH\"");

/// What is the same of all text encoders.
static OF_ENCODERS: &[Row] = &[
    nothing("dropout_probability", "that of the first text encoder counts for all"),
    nothing("weight_dtype", "stored as the base is"),
    nothing("gradient_checkpointing activation_offloading offload_fraction", "as for the trained network"),
];

/// What is the same of all networks.
static PART: &[Row] = &[
    nothing("include", "which networks there are"),
    gone("model_name", OFF, "the base's own networks are used"),
    nothing("dropout_probability", "a field of text encoders"),
    nothing("train_embedding", "a field of embeddings"),
    nothing("attention_mask", "how captions' padding is treated, the base says"),
    nothing("guidance_scale", "a field of other parts"),
];

static VAE: &[Row] = &[
    same("model_name", "vae", Kind::Text),
    nothing("weight_dtype", "an autoencoder that overflows goes on in fp32"),
    nothing("train", "the autoencoder is not trained"),
    nothing("learning_rate stop_training_after stop_training_after_unit", "the autoencoder is not trained"),
    nothing("gradient_checkpointing activation_offloading offload_fraction", "the autoencoder is not trained"),
];

/// Whether what blocks began with goes to host memory, by files of before settings by network.
fn offloads(field: &Field<'_>) -> bool {
    field.root.given("enable_activation_offloading").is_none_or(|on| values::switch(&on) != Some(false))
}

fn offload(field: &Field<'_>) -> Outcome {
    match field.number() {
        Some(fraction) if fraction > 0.0 => {
            becomes("offload_base", true, "all frozen weights are streamed, not a share")
        }
        Some(_) => no_effect("off, as without it"),
        None => field.expected("a share"),
    }
}

fn storage(field: &Field<'_>) -> Outcome {
    match field.text().as_str() {
        "FLOAT_32" | "TFLOAT_32" | "FLOAT_16" | "BFLOAT_16" | "NONE" => {
            no_effect("weights are in the precision of the run")
        }
        "FLOAT_8" | "FLOAT_W8A8" => becomes("base_storage", "fp8", "with a factor for each output"),
        "INT_8" | "INT_W8A8" => becomes("base_storage", "int8", "with a factor for each output"),
        "NFLOAT_4" => taken("base_storage", "nf4"),
        "GGUF" => no_effect("a GGUF file's weights stay as they are"),
        other => lost(format!("weights are not stored as {other}")),
    }
}

fn encoder_rate(field: &Field<'_>, ours: &'static str, train: &str) -> Outcome {
    let trained = field.root.get(train).is_none_or(|train| values::switch(&train) != Some(false));
    match (&field.value, field.root.number("learning_rate")) {
        _ if is_flow(&field.root) => no_effect("text encoders of this base are never trained here"),
        _ if !trained => no_effect("it is not trained"),
        (Value::String(text), Some(rate)) if text == "learning_rate" => {
            becomes(ours, values::of_number(rate), "learning_rate")
        }
        _ => field.number_as(ours),
    }
}

fn stop(field: &Field<'_>) -> Outcome {
    let after = field.number().unwrap_or(0.0);
    let trained = field.here.get("train").is_none_or(|train| values::switch(&train) != Some(false));
    match field.here.text("stop_training_after_unit").as_deref() {
        None | Some("NEVER") => no_effect("trained to the end, as without it"),
        _ if !trained || after == 0.0 || is_flow(&field.root) => no_effect("trained to the end, as without it"),
        Some("EPOCH") if field.root.number("epochs").is_some_and(|epochs| epochs <= after) => {
            no_effect("the run ends before")
        }
        Some(unit) => lost(format!("trained to the end, not for {after} {}s", unit.to_ascii_lowercase())),
    }
}
