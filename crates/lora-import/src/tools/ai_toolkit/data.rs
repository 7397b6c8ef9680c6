//! ai-toolkit's `datasets`: pictures, captions, sizes, masks.

use serde_json::{Value, json};

use crate::engine::Field;
use crate::outcome::{Outcome, becomes, lost, no_effect, taken, translated};
use crate::row::{Kind, OFF, Row, by, gone, nothing, same};
use crate::tools::shared;
use crate::values;

pub(super) static DATASET: &[Row] = &[
    by("folder_path", &["train_data_dir", "recursive"], "its pictures, of folders below it too", |field| {
        translated(
            vec![("train_data_dir", field.text().into()), ("recursive", true.into())],
            "and what lies in folders below it",
        )
    }),
    same("dataset_path", "train_data_dir", Kind::Text),
    gone("type", &["\"image\""], "pictures are trained on"),
    same("default_caption", "class_tokens", Kind::Text),
    gone("trigger_word", OFF, "one trigger_word holds for all datasets"),
    gone("random_triggers", OFF, "no words drawn from a list"),
    nothing("random_triggers_max", "with random_triggers"),
    by("caption_ext", CAPTION_FILES, "`txt` where none is given; with all lines of a file", caption_files)
        .default("\"txt\""),
    by("caption_type", CAPTION_FILES, "an old name of caption_ext", caption_files),
    by("resolution", &["max_resolution"], "an area; several are datasets of their own", resolution).default("512"),
    by("buckets", &["enable_bucket", "max_bucket_reso"], "on where it is not given, without limits", |field| {
        let sides = values::texts(&field.here.get("resolution").unwrap_or_default()).unwrap_or_default();
        field.when_on(shared::buckets(sides.iter().filter_map(|side| side.parse().ok())))
    })
    .default("true"),
    by("bucket_tolerance", &["bucket_reso_steps"], "sides are multiples of it", |field| match field.count() {
        Some(64) => no_effect("64, as without it"),
        Some(steps) if steps % 8 == 0 && steps > 0 => taken("bucket_reso_steps", steps),
        _ => lost("sides are multiples of 8"),
    }),
    same("is_reg", "is_reg", Kind::Flag),
    gone("prior_reg", OFF, "the base's own prediction is no target"),
    gone("network_weight", &["1"], "the adapter counts fully for each dataset"),
    by("token_dropout_rate", &["caption_tag_dropout_rate"], "tags that are left out", |field| {
        rate(field, "caption_tag_dropout_rate")
    }),
    same("shuffle_tokens", "shuffle_caption", Kind::Flag),
    same("keep_tokens", "keep_tokens", Kind::AtLeastOne),
    by("caption_dropout_rate", &["caption_dropout_rate"], "captions that are left out", |field| {
        rate(field, "caption_dropout_rate")
    }),
    by(
        "flip_x",
        &["processors", "repeats"],
        "`flip`, with twice the visits: a picture and its mirror image",
        |field| match processors(field) {
            Outcome::Translated(mut settings, how) => {
                settings.push(("repeats", visits(field).into()));
                translated(settings, format!("{how}; each epoch has a picture both ways"))
            }
            other => other,
        },
    ),
    gone("flip_y", OFF, "pictures are not turned upside down"),
    by("random_crop", &["processors"], "`random_crop`", processors),
    gone("random_scale", OFF, "pictures have one scale"),
    gone("scale", &["1"], "pictures have one scale"),
    gone("square_crop", OFF, "buckets keep aspects; without buckets all are squares"),
    gone("augments augmentations", OFF, "no augmentations by name"),
    nothing("shuffle_augmentations", "with augmentations"),
    gone(
        "control_path control_path_1 control_path_2 control_path_3 controls inpaint_path clip_image_path \
             unconditional_path",
        OFF,
        "no pictures beside the captions",
    ),
    nothing("full_size_control_images control_transparent_color", "with control_path"),
    by("alpha_mask", &["alpha_mask", "masked_loss"], "transparency weights the loss", |field| {
        field.when_on(translated(vec![("alpha_mask", true.into())], "with masked_loss"))
    }),
    by("mask_path", &["mask_dir"], "masks of the same names", |field| {
        becomes("mask_dir", field.text(), "with masked_loss")
    }),
    same("invert_mask", "invert_mask", Kind::Flag),
    same("mask_min_value", "unmasked_weight", Kind::Positive),
    gone("use_short_captions", OFF, "captions are those of the files"),
    by("num_repeats", &["repeats"], "visits of each picture in an epoch", |field| match field.count() {
        Some(1) => no_effect("1, as without it"),
        Some(2..) if field.here.on("flip_x") => becomes("repeats", visits(field), "twice as many with flip_x"),
        Some(count @ 2..) => taken("repeats", count),
        _ => field.expected("a whole number from 1 on"),
    }),
    by("loss_multiplier", &["loss_weight"], "how much it counts", |field| match field.number() {
        Some(1.0) => no_effect("1, as without it"),
        _ => field.number_as("loss_weight"),
    }),
    gone("replacements", OFF, "words of captions are not replaced"),
    gone("standardize_images", OFF, "pictures are as they are"),
    nothing("resize_method", "pictures are resized with Lanczos filters"),
    nothing("cache_latents", "latents are cached"),
    nothing("cache_latents_to_disk", "`cache_dir` keeps them for the next run"),
    nothing("cache_text_embeddings", "captions are encoded once wherever they may be"),
    nothing("cache_clip_vision_to_disk", "with control adapters"),
    nothing("load_image_when_caching_latents num_workers prefetch_factor fast_image_size", "how pictures are read"),
    nothing("debug", "what is printed"),
    nothing("extra_values", "for bases that read them"),
    nothing("replay_transforms", "with control_path"),
    nothing("guidance_type", "with sliders"),
    gone("num_frames", &["1"], "films are not trained on"),
    nothing("shrink_video_to_frames fps auto_frame_count do_i2v do_audio", "films are not trained on"),
];

pub(super) fn rate(field: &Field<'_>, ours: &'static str) -> Outcome {
    match field.number() {
        Some(0.0) => no_effect("off, as without it"),
        _ => field.number_as(ours),
    }
}

fn resolution(field: &Field<'_>) -> Outcome {
    let eights = |side: u64| side / 8 * 8;
    let sides = match &field.value {
        Value::Array(items) => items.iter().map(values::count).collect::<Option<Vec<_>>>(),
        value => values::count(value).map(|side| vec![side]),
    };
    match sides.as_deref() {
        Some(&[side]) => becomes("max_resolution", eights(side), "an area, in buckets"),
        Some(several) if !several.is_empty() => {
            let several: Vec<u64> = several.iter().map(|&side| eights(side)).collect();
            becomes("max_resolution", json!(several), "each is a dataset of its own")
        }
        _ => field.expected("a side in pixels, or several"),
    }
}

static CAPTION_FILES: &[&str] = &["caption_extension", "caption_lines"];

fn caption_files(field: &Field<'_>) -> Outcome {
    let extension = format!(".{}", field.text().trim_start_matches('.'));
    translated(
        vec![("caption_extension", extension.into()), ("caption_lines", "all".into())],
        "with all lines of a file",
    )
}

/// How often a picture comes in an epoch: with `flip_x` its mirror image is a picture of its own.
fn visits(field: &Field<'_>) -> u64 {
    let repeats = field.here.count("num_repeats").unwrap_or(1);
    repeats.saturating_mul(if field.here.on("flip_x") { 2 } else { 1 })
}

fn processors(field: &Field<'_>) -> Outcome {
    field.when_on(shared::processors(field.here.on("random_crop"), &[("flip", field.here.on("flip_x"))]))
}
