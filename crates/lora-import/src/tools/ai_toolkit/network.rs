//! ai-toolkit's `network`: the adapter.

use serde_json::json;

use crate::engine::Field;
use crate::outcome::{Outcome, Settings, becomes, lost, no_effect, refused, taken, translated};
use crate::row::{Kind, OFF, Row, by, gone, nothing, same, table};
use crate::tools::sd_scripts;
use crate::values;

pub(super) static NETWORK: &[Row] = &[
    by("type", &["variant", "target_modules"], "`lora`, `locon`, `lokr`", |field| {
        match field.text().to_ascii_lowercase().as_str() {
            "lora" => no_effect("a LoRA, as without it"),
            "locon" => becomes("target_modules", json!(["all-conv"]), "convolutions too"),
            "lokr" => taken("variant", "lokr"),
            "dora" => taken("variant", "dora"),
            other => refused(format!("no network {other} is trained here")),
        }
    }),
    by("linear", &["lora_rank"], "the rank", rank),
    by("rank", &["lora_rank"], "an old name of linear", rank),
    by("linear_alpha", &["lora_alpha"], "alpha where none is given, and 1 without that", |field| {
        alpha(field, field.number().or_else(|| field.here.number("alpha")))
    })
    .default("\"alpha\""),
    by("alpha", &[], "with linear_alpha", |field| match field.here.given("linear_alpha") {
        Some(_) => no_effect("linear_alpha says it"),
        None => translated(Settings::new(), "the alpha of linear layers"),
    })
    .default("1"),
    by("conv", &["target_modules", "rank_pattern"], "convolutions too, with this rank", |field| match field.count() {
        Some(0) => no_effect("off, as without it"),
        Some(rank) => translated(
            vec![
                ("target_modules", json!(["all-conv"])),
                ("rank_pattern", json!({ sd_scripts::network::SPATIAL: rank })),
            ],
            "convolutions too, with this rank",
        ),
        None => field.expected("a whole number"),
    }),
    by("conv_alpha", &["alpha_pattern"], "of convolutions", |field| match (field.here.count("conv"), field.number()) {
        (None | Some(0), _) => no_effect("only with conv"),
        (_, Some(alpha)) => becomes(
            "alpha_pattern",
            json!({ sd_scripts::network::SPATIAL: values::of_number(alpha) }),
            "of convolutions",
        ),
        _ => field.expected("a number"),
    }),
    by("dropout", &["lora_dropout"], "between a LoRA's factors", |field| match field.number() {
        Some(share) if share <= 0.0 => no_effect("off, as without it"),
        Some(_) if is_lokr(field) => lost("of this kind whole modules alone are dropped: module_dropout"),
        _ => field.number_as("lora_dropout"),
    }),
    by("lokr_full_rank", &["variant_options"], "of LoKr", |field| of_lokr(field, "full_matrix")),
    by("lokr_factor", &["variant_options"], "of LoKr", |field| of_lokr(field, "factor")),
    nothing("old_lokr_format", "how files are written"),
    nothing("transformer_only", "only blocks of a transformer are adapted, as by attention-mlp"),
    nothing("split_multistage_loras", "for bases of several stages"),
    same("pretrained_lora_path", "init_from", Kind::Text),
    gone("all_layers", OFF, "layers that are neither linear nor convolutions are not trained"),
    gone("layer_offloading", OFF, "the adapter stays on the device"),
    gone("lorm", OFF, "no LoRM"),
    gone("normalize", OFF, "the update is not normalised"),
    table("network_kwargs", &[KWARGS]),
];

static KWARGS: &[Row] = &[
    by("only_if_contains", &["target_modules"], "layers whose name has one of these", |field| {
        match values::texts(&field.value) {
            Some(parts) => {
                let parts: Vec<String> = parts.iter().map(|part| format!("*{part}*")).collect();
                becomes("target_modules", json!(parts), "layers whose name has one of these")
            }
            None => field.expected("a list of texts"),
        }
    }),
    gone("ignore_if_contains", OFF, "layers are named, not left out: target_modules"),
    gone("full_train_in_out", OFF, "the first and the last layer are not trained whole"),
    gone("full_if_contains", OFF, "no layer is trained whole"),
];

fn rank(field: &Field<'_>) -> Outcome {
    match field.count() {
        Some(rank @ 1..) => taken("lora_rank", rank),
        _ => field.expected("a whole number from 1 on"),
    }
}

fn alpha(field: &Field<'_>, alpha: Option<f64>) -> Outcome {
    match alpha {
        Some(alpha) if alpha > 0.0 => taken("lora_alpha", values::of_number(alpha)),
        _ => field.expected("a number above 0"),
    }
}

fn is_lokr(field: &Field<'_>) -> bool {
    field.here.text("type").is_some_and(|kind| kind.eq_ignore_ascii_case("lokr"))
}

fn of_lokr(field: &Field<'_>, ours: &str) -> Outcome {
    match is_lokr(field) {
        true => sd_scripts::network::option(field, ours),
        false => no_effect("a field of LoKr"),
    }
}
