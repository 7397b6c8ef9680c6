//! sd-scripts' dataset files (`--dataset_config`, TOML or JSON): `[general]`, `[[datasets]]`, `[[datasets.subsets]]`, the
//! nearest value wins. Each subset becomes a table of our own keys. What has no counterpart here is a problem that says so,
//! never silently dropped.

use std::path::Path;

use serde_json::{Map, Value};

use super::datasets::Table;
use super::read::{Format, Problem};
use super::text;

/// Their keys and ours, with the same values.
const SAME: &[(&str, &str)] = &[
    ("resolution", "max_resolution"),
    ("batch_size", "batch_size"),
    ("enable_bucket", "enable_bucket"),
    ("min_bucket_reso", "min_bucket_reso"),
    ("max_bucket_reso", "max_bucket_reso"),
    ("bucket_reso_steps", "bucket_reso_steps"),
    ("bucket_no_upscale", "bucket_no_upscale"),
    ("num_repeats", "repeats"),
    ("shuffle_caption", "shuffle_caption"),
    ("caption_separator", "caption_separator"),
    ("keep_tokens", "keep_tokens"),
    ("keep_tokens_separator", "keep_tokens_separator"),
    ("secondary_separator", "secondary_separator"),
    ("enable_wildcard", "enable_wildcard"),
    ("caption_prefix", "caption_prefix"),
    ("caption_suffix", "caption_suffix"),
    ("caption_dropout_rate", "caption_dropout_rate"),
    ("caption_dropout_every_n_epochs", "caption_dropout_every_n_epochs"),
    ("caption_tag_dropout_rate", "caption_tag_dropout_rate"),
    ("token_warmup_min", "token_warmup_min"),
    ("token_warmup_step", "token_warmup_step"),
    ("caption_extension", "caption_extension"),
    ("class_tokens", "class_tokens"),
    ("image_dir", "train_data_dir"),
    ("metadata_file", "metadata_file"),
    ("conditioning_data_dir", "mask_dir"),
    ("is_reg", "is_reg"),
    ("alpha_mask", "alpha_mask"),
];

/// Switches that become processors.
const SWITCHES: &[&str] = &["flip_aug", "color_aug", "random_crop"];

/// Keys without a counterpart, with the value that does nothing, which is accepted.
const WITHOUT: &[(&str, f64)] = &[("network_multiplier", 1.0), ("validation_split", 0.0)];

/// Keys that change nothing about what is trained.
const IGNORED: &[&str] = &["cache_info", "validation_seed"];

/// The subsets of a file, each with all that holds for it.
pub(super) fn read(path: &Path) -> Result<Vec<Table>, Vec<String>> {
    let named = |message: String| vec![format!("{}: {message}", path.display())];
    let told = |Problem { line, key, message }: Problem| {
        let line = line.map_or_else(String::new, |line| format!("line {line}: "));
        format!("{line}{}{message}", key.map_or_else(String::new, |key| format!("`{key}`: ")))
    };
    let text = std::fs::read_to_string(path).map_err(|error| named(format!("cannot read: {error}")))?;
    let (whole, not_numbers) = match path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json")) {
        true => (text::parse_json(&text).map_err(|problem| named(told(problem)))?, Vec::new()),
        false => text::parse(&text, Format::Toml).map_err(|problem| named(told(problem)))?,
    };
    let mut problems: Vec<String> = not_numbers.into_iter().map(told).collect();
    let tables = tables(&whole, &mut problems);
    if tables.is_empty() && problems.is_empty() {
        problems.push("no [[datasets.subsets]]".into());
    }
    match problems.is_empty() {
        true => Ok(tables),
        false => Err(problems.into_iter().flat_map(named).collect()),
    }
}

fn tables(whole: &Value, problems: &mut Vec<String>) -> Vec<Table> {
    let empty = Map::new();
    let Some(whole) = whole.as_object() else {
        problems.push("expected [general] and [[datasets]]".into());
        return Vec::new();
    };
    for key in whole.keys().filter(|key| !["general", "datasets"].contains(&key.as_str())) {
        problems.push(format!("unknown section `{key}`; expected [general] and [[datasets]]"));
    }
    let general = whole.get("general").and_then(Value::as_object).unwrap_or(&empty);
    let list = |value: Option<&Value>| value.and_then(Value::as_array).cloned().unwrap_or_default();
    let mut tables = Vec::new();
    for (group, dataset) in list(whole.get("datasets")).iter().enumerate() {
        let dataset = dataset.as_object().unwrap_or(&empty);
        for (number, subset) in list(dataset.get("subsets")).iter().enumerate() {
            let label = format!("datasets[{group}].subsets[{number}]");
            let mut merged = general.clone();
            merged.extend(
                dataset.iter().filter(|(key, _)| *key != "subsets").map(|(key, value)| (key.clone(), value.clone())),
            );
            merged.extend(subset.as_object().unwrap_or(&empty).clone());
            let keys = translated(&merged, |problem| problems.push(format!("{label}: {problem}")));
            tables.push(Table { label, group, keys });
        }
    }
    tables
}

fn translated(theirs: &Map<String, Value>, mut problem: impl FnMut(String)) -> Map<String, Value> {
    let mut ours = Map::new();
    for (key, value) in theirs {
        if let Some((_, name)) = SAME.iter().find(|(name, _)| name == key) {
            // Their separators may be written as nothing.
            if !value.is_null() && value.as_str() != Some("") {
                ours.insert((*name).to_owned(), value.clone());
            }
        } else if let Some((_, nothing)) = WITHOUT.iter().find(|(name, _)| name == key) {
            if value.as_f64() != Some(*nothing) {
                problem(format!("`{key}` has no counterpart here; remove it"));
            }
        } else if key == "resize_interpolation" {
            if !matches!(value.as_str(), None | Some("lanczos")) {
                problem(format!("`{key}` = {value}: pictures are always resized with Lanczos filters; remove it"));
            }
        } else if key == "face_crop_aug_range" || key == "custom_attributes" {
            if value.as_object().is_none_or(|table| !table.is_empty()) {
                problem(format!("`{key}` has no counterpart here; remove it"));
            }
        } else if !SWITCHES.contains(&key.as_str()) && !IGNORED.contains(&key.as_str()) {
            problem(format!("unknown key `{key}`"));
        }
    }
    let on = |key: &str| theirs.get(key).and_then(Value::as_bool).unwrap_or(false);
    if SWITCHES.iter().any(|switch| on(switch)) {
        let crop = if on("random_crop") { "random_crop" } else { "center_crop" };
        let mut processors = vec![crop];
        processors.extend(on("flip_aug").then_some("flip"));
        processors.extend(on("color_aug").then_some("color_jitter"));
        ours.insert("processors".into(), processors.into());
    }
    // A metadata file may do without a folder: its paths then stand for themselves.
    if ours.contains_key("metadata_file") && !ours.contains_key("train_data_dir") {
        ours.insert("train_data_dir".into(), ".".into());
    }
    ours
}
