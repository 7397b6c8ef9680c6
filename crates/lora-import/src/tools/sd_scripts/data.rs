//! sd-scripts' data: folders, datasets of `--dataset_config`, sizes, captions.

use std::path::Path;

use serde_json::Value;

use crate::config::Draft;
use crate::engine::{Field, Scope};
use crate::input::Problem;
use crate::outcome::{Outcome, Settings, becomes, no_effect, taken, translated};
use crate::report::{Accounted, Verdict};
use crate::row::{Kind, OFF, Row, by, gone, same};
use crate::tools::shared;
use crate::values;

/// Of a whole run and of datasets alike.
pub(super) const ALPHA_MASK: Row =
    by("alpha_mask", &["alpha_mask", "masked_loss"], "counts in the loss without masked_loss, there", |field| {
        field.when_on(translated(
            vec![("alpha_mask", true.into()), ("masked_loss", true.into())],
            "transparency weights the loss",
        ))
    });

pub(in crate::tools) static ROWS: &[Row] = &[
    by("resolution", &["max_resolution"], "an area where there are buckets, there and here", resolution),
    by("caption_extension", &["caption_extension"], "captions are looked for with this extension alone", |field| {
        taken("caption_extension", field.text())
    })
    .default("\".caption\""),
    by("caption_extention", &["caption_extension"], "an old spelling", |field| {
        taken("caption_extension", field.text())
    }),
    by("in_json", &["metadata_file", "train_data_dir"], "a metadata file", |field| {
        let mut settings: Settings = vec![("metadata_file", field.text().into())];
        if field.root.given("train_data_dir").is_none() {
            settings.push(("train_data_dir", ".".into()));
        }
        translated(settings, "its pictures are trained on")
    }),
    by("dataset_repeats", &["repeats"], "with `in_json`", |field| match field.root.given("in_json") {
        Some(_) => taken("repeats", field.count().unwrap_or(1)),
        None => no_effect("only with in_json"),
    }),
    by("train_data_dir", &["train_data_dir"], "a folder of `N_name` folders", |field| folder(field, "train_data_dir")),
    by("reg_data_dir", &["reg_data_dir"], "regularisation pictures", |field| folder(field, "reg_data_dir")),
    by("dataset_config", &["datasets"], "each of its subsets becomes a dataset", |_| {
        translated(vec![], "each of its subsets is a dataset")
    }),
    by("conditioning_data_dir", &["mask_dir"], "masks", |field| match field.root.on("masked_loss") {
        true => taken("mask_dir", field.text()),
        false => no_effect("only with masked_loss"),
    }),
    same("masked_loss", "masked_loss", Kind::Flag),
    ALPHA_MASK,
    same("prior_loss_weight", "prior_loss_weight", Kind::Number),
    same("enable_bucket", "enable_bucket", Kind::Flag),
    same("min_bucket_reso", "min_bucket_reso", Kind::Count),
    same("max_bucket_reso", "max_bucket_reso", Kind::Count),
    by("bucket_reso_steps", &["bucket_reso_steps"], "multiples of 8", bucket_steps),
    same("bucket_no_upscale", "bucket_no_upscale", Kind::Flag),
    same("shuffle_caption", "shuffle_caption", Kind::Flag),
    same("caption_separator", "caption_separator", Kind::Text),
    same("keep_tokens", "keep_tokens", Kind::AtLeastOne),
    same("keep_tokens_separator", "keep_tokens_separator", Kind::Text),
    same("secondary_separator", "secondary_separator", Kind::Text),
    same("enable_wildcard", "enable_wildcard", Kind::Flag),
    same("caption_prefix", "caption_prefix", Kind::Text),
    same("caption_suffix", "caption_suffix", Kind::Text),
    same("caption_dropout_rate", "caption_dropout_rate", Kind::Positive),
    same("caption_dropout_every_n_epochs", "caption_dropout_every_n_epochs", Kind::AtLeastOne),
    same("caption_tag_dropout_rate", "caption_tag_dropout_rate", Kind::Positive),
    same("token_warmup_min", "token_warmup_min", Kind::Count),
    same("token_warmup_step", "token_warmup_step", Kind::Positive),
    by("flip_aug", &["processors"], "`flip`", processors),
    by("color_aug", &["processors"], "`color_jitter`", processors),
    by("random_crop", &["processors"], "`random_crop`", processors),
    gone("face_crop_aug_range", OFF, "no crops around faces"),
    gone("resize_interpolation", &["\"lanczos\"", "null"], "pictures are always resized with Lanczos filters"),
    same("weighted_captions", "weighted_captions", Kind::Flag),
    by("train_batch_size", &["batch_size"], "pictures at once", |field| field.count_as("batch_size")),
];

fn folder(field: &Field<'_>, ours: &'static str) -> Outcome {
    match field.root.given("dataset_config") {
        Some(_) => no_effect("dataset_config takes its place"),
        None => taken(ours, field.text()),
    }
}

/// A size in pixels, which here has sides of multiples of 8.
pub(in crate::tools) fn resolution(field: &Field<'_>) -> Outcome {
    let sides: Option<Vec<u64>> = match &field.value {
        Value::Array(items) => items.iter().map(values::count).collect(),
        Value::String(text) => text.split([',', 'x']).map(|side| side.trim().parse().ok()).collect(),
        value => values::count(value).map(|side| vec![side]),
    };
    let (width, height) = match sides.as_deref() {
        Some(&[side]) => (side, side),
        Some(&[width, height]) => (width, height),
        _ => return field.expected("\"width,height\" or one number"),
    };
    let eights = |side: u64| side / 8 * 8;
    let value = match (eights(width), eights(height)) {
        (width, height) if width == height => Value::from(width),
        (width, height) => format!("{width},{height}").into(),
    };
    match width % 8 == 0 && height % 8 == 0 {
        true => taken("max_resolution", value),
        false => becomes("max_resolution", value, "sides are multiples of 8"),
    }
}

/// Sides are multiples of it; here it is a multiple of 8 itself.
pub(in crate::tools) fn bucket_steps(field: &Field<'_>) -> Outcome {
    match field.count() {
        Some(steps) if steps > 0 && steps % 8 == 0 => taken("bucket_reso_steps", steps),
        Some(steps) => becomes("bucket_reso_steps", steps.max(1).next_multiple_of(8), "sides are multiples of 8"),
        None => field.expected("a whole number"),
    }
}

/// Switches that become processors, all together.
pub(in crate::tools) fn processors(field: &Field<'_>) -> Outcome {
    if !field.on() {
        return match values::switch(&field.value) {
            Some(_) => no_effect("off, as without it"),
            None => field.expected("true or false"),
        };
    }
    let on = |key: &str| field.here.on(key);
    shared::processors(on("random_crop"), &[("flip", on("flip_aug")), ("color_jitter", on("color_aug"))])
}

/// The subsets of `dataset_config`.
pub(in crate::tools) fn dataset_file(
    root: &Scope<'_>,
    draft: &mut Draft,
    keys: &mut Vec<Accounted>,
) -> Result<(), Problem> {
    let Some(name) = root.given("dataset_config").as_ref().and_then(values::text) else { return Ok(()) };
    let file = crate::sd_scripts::read(Path::new(&name))?;
    if let Some(problem) = file.problems.into_iter().next() {
        return Err(problem);
    }
    keys.extend(file.keys.into_iter().map(|key| Accounted { key: format!("{name}: {}", key.key), ..key }));
    for subset in file.subsets {
        let dataset = Some(draft.add_dataset());
        for (key, value) in &subset.keys {
            let Some(key) = crate::keys_written().into_iter().find(|known| known == key) else { continue };
            draft.set(dataset, key, value, key, &Verdict::Taken, false).map_err(|error| Problem::of(&name, error))?;
        }
    }
    Ok(())
}
