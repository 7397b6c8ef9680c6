//! What can be said of a base that is of no known family: what else it may be, or else what is in it.

use std::collections::BTreeSet;

use super::{BaseNames, Family};

/// Beginnings of names that are listed in a description.
const LISTED: usize = 4;

/// What a base of none of these families seems to be; `dtypes` are the element types of its tensors.
pub(crate) fn describe(names: &BaseNames<'_>, dtypes: &BTreeSet<&str>, families: &[&Family]) -> String {
    const ADAPTER: &[&str] = &["lora_down", "lora_A", "lora_up", "hada_w1", "lokr_w1"];
    if ADAPTER.iter().any(|part| names.contains(part)) {
        return "a LoRA, not a base model".into();
    }
    if names.begins("conditioner.embedders.0.model.") {
        return "Stable Diffusion XL's refiner, which is another network".into();
    }
    if names.begins("unet/add_embedding.") {
        return "Stable Diffusion XL without its first text encoder: its refiner, which is another network, or not whole".into();
    }
    if names.begins("model.diffusion_model.input_blocks.") || names.begins("down_blocks.") {
        return "a U-Net alone, without text encoder and autoencoder".into();
    }
    if names.begins("first_stage_model.") || names.begins("encoder.down") {
        return "an autoencoder alone".into();
    }
    let tops: BTreeSet<&str> = names.iter().map(|name| name.split_once('.').map_or(name, |(top, _)| top)).collect();
    let mut shown: Vec<String> = tops.iter().take(LISTED).map(|top| format!("`{}`", short(top))).collect();
    if tops.len() > LISTED {
        shown.push("…".into());
    }
    let dtypes: Vec<&str> = dtypes.iter().copied().collect();
    let known: Vec<&str> = families.iter().map(|family| family.title).collect();
    format!(
        "no model that is known here: {} tensors ({}) whose names begin with {}; known are {}",
        names.iter().count(),
        dtypes.join(", "),
        shown.join(", "),
        known.join(", ")
    )
}

/// The beginning of a name, which a strange file may make as long as it likes.
fn short(name: &str) -> String {
    name.chars().take(40).collect()
}
