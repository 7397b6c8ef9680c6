//! OneTrainer's adapter: its kind, rank, layers.

use serde_json::json;

use super::{is_flow, is_full};
use crate::engine::Field;
use crate::outcome::{Outcome, becomes, lost, no_effect, refused, taken};
use crate::row::{OFF, Row, by, gone, nothing};
use crate::tools::sd_scripts;
use crate::values;

pub(super) static ROWS: &[Row] = &[
    by("peft_type", &["variant"], "by its name", |field| match field.text().as_str() {
        _ if is_full(&field.root) => no_effect("all weights are trained"),
        "LORA" => no_effect("a LoRA, as without it"),
        "LOHA" => taken("variant", "loha"),
        "LOKR" => taken("variant", "lokr"),
        "OFT_2" | "OFT" => becomes("variant", "peft-oft", "rotations of the inputs"),
        other => refused(format!("no adapter {other} is known")),
    }),
    by("lora_rank", &["lora_rank"], "16 where none is given", |field| {
        of_lora(field, field.count().map(|rank| taken("lora_rank", rank)))
    })
    .default("16"),
    by("lora_alpha", &["lora_alpha"], "1 where none is given; here the rank", |field| {
        of_lora(
            field,
            field.number().filter(|&alpha| alpha > 0.0).map(|alpha| taken("lora_alpha", values::of_number(alpha))),
        )
    })
    .default("1"),
    by("lora_decompose", &["variant"], "with magnitudes", |field| match field.on() {
        true if !is_full(&field.root) => {
            becomes("variant", "lycoris-dora", "with magnitudes, and an epsilon beside their norms")
        }
        _ => no_effect("off, as without it"),
    }),
    nothing("lora_decompose_norm_epsilon", "with lora_decompose"),
    by("lora_decompose_output_axis", &[], "with lora_decompose", |field| {
        match field.on() && field.root.on("lora_decompose") {
            true => lost("magnitudes are of the inputs"),
            false => no_effect("off, as without it"),
        }
    }),
    gone("lora_weight_dtype", &["\"FLOAT_32\""], "trained numbers are fp32"),
    by("lora_model_name", &["init_from"], "a LoRA to go on from", |field| {
        of_lora(field, Some(taken("init_from", field.text())))
    }),
    by("dropout_probability", &["lora_dropout"], "dropout of the adapter", |field| match field.number() {
        Some(0.0) => no_effect("off, as without it"),
        _ if ["LOHA", "LOKR", "OFT"].iter().any(|kind| is_peft(field, kind)) => {
            lost("of this kind whole modules alone are dropped: module_dropout")
        }
        number => of_lora(field, number.map(|rate| taken("lora_dropout", values::of_number(rate)))),
    }),
    by("layer_filter_preset", &["target_modules"], "`full`: all layers; `attn-mlp`, `attn-only`, `custom`", layers)
        .default("\"full\""),
    by("layer_filter", &["target_modules"], "with the preset `custom`: what names of layers contain", |field| {
        match field.root.text("layer_filter_preset").as_deref() {
            Some("custom") if !is_full(&field.root) => custom_layers(field),
            _ => no_effect("only with the preset custom"),
        }
    }),
    nothing("layer_filter_regex", "with layer_filter"),
    nothing("lora_layers", "an old name of layer_filter"),
    nothing("lora_layer_preset", "an old name of layer_filter_preset"),
    nothing("lora_layers_regex", "an old name of layer_filter_regex"),
    gone("quantization", OFF, "all layers of the base are stored alike: base_storage"),
    by("oft_block_size", &["variant_options"], "of OFT", |field| of_peft(field, "OFT", "block_size")),
    by("oft_block_share", &["variant_options"], "of OFT", |field| of_peft(field, "OFT", "block_share")),
    gone("dora_oft", OFF, "no magnitudes with rotations"),
    gone("oft_scaled", OFF, "no scales with rotations"),
    nothing("oft_clipped_norm", "of OFT"),
    gone("oft_cans", OFF, "rotations are exact"),
    by("lokr_dim", &["lora_rank"], "of LoKr", |field| match is_peft(field, "LOKR") {
        true => no_effect("lora_rank says it"),
        false => no_effect("a field of LoKr"),
    }),
    by("lokr_decompose_both", &["variant_options"], "of LoKr", |field| of_peft(field, "LOKR", "decompose_both")),
    by("lokr_decompose_factor", &["variant_options"], "of LoKr", |field| of_peft(field, "LOKR", "factor")),
    by("lokr_use_tucker", &["variant_options"], "of LoKr", |field| of_peft(field, "LOKR", "tucker")),
    by("lokr_full_matrix", &["variant_options"], "of LoKr", |field| of_peft(field, "LOKR", "full_matrix")),
    gone("lokr_weight_decompose", OFF, "see lora_decompose"),
    nothing("lokr_dora_on_output", "with lokr_weight_decompose"),
    nothing("lokr_vec_trick", "how steps are computed"),
    gone("additional_embeddings", OFF, "no embeddings are trained"),
];

fn of_lora(field: &Field<'_>, outcome: Option<Outcome>) -> Outcome {
    match is_full(&field.root) {
        true => no_effect("all weights are trained"),
        false => outcome.unwrap_or_else(|| field.expected("a number above 0")),
    }
}

fn is_peft(field: &Field<'_>, kind: &str) -> bool {
    !is_full(&field.root) && field.root.text("peft_type").is_some_and(|own| own.starts_with(kind))
}

fn of_peft(field: &Field<'_>, kind: &str, ours: &str) -> Outcome {
    match is_peft(field, kind) {
        true => sd_scripts::network::option(field, ours),
        false => no_effect(format!("a field of {kind}")),
    }
}

fn layers(field: &Field<'_>) -> Outcome {
    let all = json!(["all-linear", "all-conv"]);
    match field.text().as_str() {
        _ if is_full(&field.root) => no_effect("all weights are trained"),
        "full" if is_flow(&field.root) => becomes("target_modules", json!(["all-linear"]), "all layers"),
        "full" => becomes("target_modules", all, "all layers"),
        "attn-mlp" => taken("target_modules", json!(["attention-mlp"])),
        "attn-only" => taken("target_modules", json!(["attention"])),
        "custom" => no_effect("layer_filter says which"),
        other => lost(format!("no preset {other} of layers; set target_modules")),
    }
}

fn custom_layers(field: &Field<'_>) -> Outcome {
    let text = field.text();
    let parts: Vec<String> = match field.root.on("layer_filter_regex") {
        true => text.split(',').map(|part| format!("re:.*{}.*", part.trim())).collect(),
        false => text.split(',').map(|part| format!("*{}*", part.trim())).collect(),
    };
    becomes("target_modules", json!(parts), "layers whose name has it; text encoders' too")
}
