//! OneTrainer's data: concepts with their pictures and texts, resolutions, masks.

use serde_json::{Value, json};

use crate::config::Draft;
use crate::engine::{Field, Scope};
use crate::input::Problem;
use crate::outcome::{Outcome, becomes, lost, no_effect, refused, taken, translated};
use crate::report::Accounted;
use crate::row::{Element, Kind, OFF, Row, by, datasets, gone, nothing, same, table};
use crate::tools::shared;
use crate::values;

pub(super) static ROWS: &[Row] = &[
    datasets("concepts", CONCEPT, concept),
    nothing("concept_file_name", "its concepts are read with these keys"),
    by(
        "aspect_ratio_bucketing",
        &["enable_bucket", "max_bucket_reso"],
        "on where it is not given; up to 4 : 1",
        |field| {
            let sides = field.root.text("resolution").unwrap_or_default();
            field.when_on(shared::buckets(sides.split([',', 'x']).filter_map(|side| side.trim().parse().ok())))
        },
    )
    .default("true"),
    by("resolution", &["max_resolution"], "an area; several are datasets of their own", |field| {
        resolutions(&field.text())
    })
    .default("\"512\""),
    same("masked_training", "masked_loss", Kind::Flag),
    by("unmasked_weight", &["unmasked_weight"], "with masked_training; 0.1 where none is given", |field| {
        match field.root.on("masked_training") {
            true => taken("unmasked_weight", field.number().map_or(Value::Null, values::of_number)),
            false => no_effect("only with masked_training"),
        }
    })
    .default("0.1"),
    by("unmasked_probability", &[], "with masked_training", |field| {
        match field.root.on("masked_training") && field.number() != Some(0.0) {
            true => lost("masks count at every step"),
            false => no_effect("only with masked_training"),
        }
    })
    .default("0.1"),
    gone("normalize_masked_area_loss", OFF, "the loss is a mean over the whole picture"),
    same("masked_prior_preservation_weight", "prior_mask_weight", Kind::Positive),
    gone("custom_conditioning_image", OFF, "no pictures beside the captions"),
    gone("circular_mask_generation", OFF, "masks are as they are"),
    gone("random_rotate_and_crop", OFF, "no rotations"),
    by("latent_caching", &["cache_latents"], "on where it is not given", |field| match field.on() {
        true => no_effect("on, as without it"),
        false => becomes("cache_latents", false, "crops and flips are drawn at each visit"),
    }),
    nothing("latent_caching_epochs", "`image_variations` come by turns, and are not made anew"),
    nothing("text_caching image_caching", "captions are encoded once wherever they may be"),
];

static CONCEPT: &[Row] = &[
    by("path", &["train_data_dir", "validation_data_dir"], "its pictures", |field| {
        match field.here.text("type").as_deref() {
            Some("VALIDATION") => becomes("validation_data_dir", field.text(), "a concept of validation"),
            _ => taken("train_data_dir", field.text()),
        }
    }),
    nothing("name", "a note"),
    nothing("seed", "draws belong to the pictures"),
    nothing("enabled", "those that are not enabled are left out"),
    nothing("type validation_concept", "of validation: validation_data_dir"),
    nothing("__version", "how files are kept"),
    nothing("concept_stats", "counts of the program"),
    same("include_subdirectories", "recursive", Kind::Flag),
    by("image_variations", &["image_variations"], "where crops or flips are drawn; 1 where it is not given", |field| {
        let image = field.here.given("image").unwrap_or_default();
        let drawn = ["enable_crop_jitter", "enable_random_flip"].map(|key| image.get(key).and_then(values::switch));
        match drawn.contains(&Some(true)) || drawn.contains(&None) {
            true => match field.count().unwrap_or(1) {
                many @ 101.. => becomes("image_variations", 100, format!("100, the most that are kept, not {many}")),
                count => taken("image_variations", count.max(1)),
            },
            false => no_effect("nothing is drawn"),
        }
    })
    .default("1"),
    gone("text_variations", &["1"], "captions are drawn anew at each visit"),
    by("balancing", &["repeats"], "with balancing_strategy REPEATS", balancing),
    by("repeats", &["repeats"], "an old name of balancing", balancing),
    gone("balancing_strategy", &["\"REPEATS\""], "pictures are visited by repeats, not by a number of samples"),
    by("loss_weight", &["loss_weight"], "how much it counts", |field| match field.number() {
        Some(1.0) => no_effect("1, as without it"),
        _ => field.number_as("loss_weight"),
    }),
    table("image", &[IMAGE]),
    table("text", &[TEXT]),
];

static IMAGE: &[Row] = &[
    by("enable_crop_jitter", &["processors"], "`random_crop`; on where it is not given", processors).default("true"),
    by("enable_random_flip", &["processors"], "`flip`; on where it is not given", processors).default("true"),
    gone("enable_fixed_flip", OFF, "flips are drawn"),
    gone("enable_random_rotate enable_fixed_rotate", OFF, "no rotations"),
    nothing("random_rotate_max_angle", "with rotations"),
    gone("enable_random_brightness", OFF, "colours vary by color_jitter alone"),
    gone("enable_fixed_brightness", OFF, "colours are as they are"),
    nothing("random_brightness_max_strength", "with brightness"),
    gone("enable_random_contrast", OFF, "colours vary by color_jitter alone"),
    gone("enable_fixed_contrast", OFF, "colours are as they are"),
    nothing("random_contrast_max_strength", "with contrast"),
    gone("enable_random_saturation", OFF, "colours vary by color_jitter alone"),
    gone("enable_fixed_saturation", OFF, "colours are as they are"),
    nothing("random_saturation_max_strength", "with saturation"),
    gone("enable_random_hue", OFF, "colours vary by color_jitter alone"),
    gone("enable_fixed_hue", OFF, "colours are as they are"),
    nothing("random_hue_max_strength", "with hue"),
    by("enable_resolution_override", &["max_resolution"], "with resolution_override", |field| {
        field.when_on(resolutions(&field.here.text("resolution_override").unwrap_or_default()))
    }),
    nothing("resolution_override", "with enable_resolution_override"),
    gone("enable_random_circular_mask_shrink enable_random_mask_rotate_crop", OFF, "masks are as they are"),
];

static TEXT: &[Row] = &[
    by(
        "prompt_source",
        &["caption_extension", "enable_wildcard"],
        "`sample`: a line of the picture's .txt file, drawn at each visit",
        |field| match field.text().as_str() {
            "sample" => translated(
                vec![("caption_extension", ".txt".into()), ("enable_wildcard", true.into())],
                "a line of it is drawn",
            ),
            "filename" => lost("names of files are no captions"),
            _ => lost("one file of captions for a concept is not read; class_tokens is one caption for all"),
        },
    )
    .default("\"sample\""),
    nothing("prompt_path", "with prompt_source"),
    same("enable_tag_shuffling", "shuffle_caption", Kind::Flag),
    same("tag_delimiter", "caption_separator", Kind::Text),
    by("keep_tags_count", &["keep_tokens"], "with enable_tag_shuffling; 1 where none is given", |field| {
        match field.here.on("enable_tag_shuffling") || field.here.on("tag_dropout_enable") {
            true => taken("keep_tokens", field.count().unwrap_or(1)),
            false => no_effect("tags stay where they are"),
        }
    })
    .default("1"),
    by(
        "tag_dropout_enable",
        &["caption_tag_dropout_rate", "caption_dropout_rate"],
        "with tag_dropout_probability",
        |field| match (field.on(), field.here.text("tag_dropout_mode").as_deref()) {
            (false, _) => no_effect("off, as without it"),
            (true, Some("RANDOM")) => becomes(
                "caption_tag_dropout_rate",
                field.here.number("tag_dropout_probability").map_or(json!(0), values::of_number),
                "each tag by itself",
            ),
            (true, Some("FULL")) => becomes(
                "caption_dropout_rate",
                field.here.number("tag_dropout_probability").map_or(json!(0), values::of_number),
                "all tags together",
            ),
            (true, _) => lost("tags are dropped with one probability for all"),
        },
    ),
    nothing("tag_dropout_mode tag_dropout_probability", "with tag_dropout_enable"),
    gone("tag_dropout_special_tags_mode", &["\"NONE\""], "all tags are alike"),
    nothing("tag_dropout_special_tags tag_dropout_special_tags_regex", "with its mode"),
    gone("caps_randomize_enable", OFF, "letters stay as they are"),
    nothing("caps_randomize_mode caps_randomize_probability caps_randomize_lowercase", "with caps_randomize_enable"),
];

pub(super) fn resolutions(text: &str) -> Outcome {
    let sides: Option<Vec<u64>> = text.split(',').map(|side| side.trim().parse::<u64>().ok()).collect();
    match sides.as_deref() {
        // Width and height are written with an x.
        None => match text
            .split_once('x')
            .map(|(width, height)| (width.trim().parse::<u64>(), height.trim().parse::<u64>()))
        {
            Some((Ok(width), Ok(height))) => {
                becomes("max_resolution", format!("{},{}", width / 8 * 8, height / 8 * 8), "width and height")
            }
            _ => refused(format!("expected a side in pixels, several, or WxH, found {text}")),
        },
        Some([side]) if side % 8 == 0 => taken("max_resolution", *side),
        Some([side]) => becomes("max_resolution", side / 8 * 8, "sides are multiples of 8"),
        Some(several) => {
            let several: Vec<u64> = several.iter().map(|side| side / 8 * 8).collect();
            becomes("max_resolution", json!(several), "each is a dataset of its own")
        }
    }
}

fn concept(field: &Field<'_>) -> Element {
    let kind = field.here.text("type").unwrap_or_default();
    let validation = kind == "VALIDATION" || field.here.on("validation_concept");
    match () {
        () if field.here.given("enabled").is_some_and(|on| values::switch(&on) == Some(false)) => {
            Element::Apart(&[], "its concept is not enabled")
        }
        () if validation && !field.root.on("validation") => Element::Apart(&[], "validation is off"),
        () if validation => Element::Apart(&["path"], "nothing of a concept of validation is trained on"),
        () => Element::Dataset,
    }
}

fn balancing(field: &Field<'_>) -> Outcome {
    match field.number() {
        _ if field.here.text("balancing_strategy").as_deref() == Some("SAMPLES") => {
            lost("pictures are visited by repeats, not by a number of samples")
        }
        Some(1.0) => no_effect("1, as without it"),
        Some(repeats) if repeats.fract() == 0.0 && repeats >= 1.0 => taken("repeats", values::of_number(repeats)),
        Some(repeats) => lost(format!("repeats are whole numbers, not {repeats}")),
        None => field.expected("a number"),
    }
}

fn processors(field: &Field<'_>) -> Outcome {
    shared::processors(field.here.on("enable_crop_jitter"), &[("flip", field.here.on("enable_random_flip"))])
}

/// Each of several resolutions is a dataset of its own.
pub(super) fn split_resolutions(_: &Scope<'_>, draft: &mut Draft, _: &mut Vec<Accounted>) -> Result<(), Problem> {
    if let Some(Value::Array(sides)) = draft.get("max_resolution").cloned() {
        if draft.datasets.is_empty() {
            draft.add_dataset();
        }
        draft.spread("max_resolution", &sides.into());
    }
    draft.split("max_resolution");
    Ok(())
}
