//! The part of a configuration that says what is trained on. The same keys stand at the top, where they are defaults, and in
//! each table of `datasets`; sd-scripts' dataset files become such tables in [`super::sd_scripts`].

use std::path::{Path, PathBuf};

use lora_data::bucket::{BucketOptions, Buckets, Framing};
use lora_data::caption::CaptionOptions;
use lora_data::dataset::{Role, ScanOptions, Strictness};
use lora_data::{DatasetOptions, MaskOptions};
use serde_json::{Map, Value};

use super::read::Reader;
use super::sd_scripts;

/// Keys that each dataset may have of its own.
pub(super) const OWN: &[&str] = &[
    "train_data_dir",
    "repeats",
    "recursive",
    "caption_extension",
    "class_tokens",
    "metadata_file",
    "is_reg",
    "loss_weight",
    "batch_size",
    "max_resolution",
    "enable_bucket",
    "min_bucket_reso",
    "max_bucket_reso",
    "bucket_reso_steps",
    "bucket_no_upscale",
    "background",
    "processors",
    "mask_dir",
    "alpha_mask",
    "invert_mask",
    "unmasked_weight",
    "trigger_word",
    "caption_prefix",
    "caption_suffix",
    "caption_dropout_rate",
    "caption_dropout_every_n_epochs",
    "shuffle_caption",
    "caption_tag_dropout_rate",
    "keep_tokens",
    "keep_tokens_separator",
    "caption_separator",
    "secondary_separator",
    "enable_wildcard",
];

/// One dataset's own keys.
pub(super) struct Table {
    /// How messages call it.
    pub(super) label: String,
    /// Datasets of one group share their regularisation pictures.
    pub(super) group: usize,
    pub(super) keys: Map<String, Value>,
}

/// All datasets of a configuration. Without `required`, one that names none is no problem.
pub(super) fn read(reader: &mut Reader, required: bool) -> Vec<DatasetOptions> {
    let top = one(reader, 0);
    let mut tables = Vec::new();
    if reader.has("datasets") {
        tables.extend(reader.tables("datasets").into_iter().enumerate().map(|(index, keys)| Table {
            label: format!("datasets[{index}]"),
            group: 0,
            keys,
        }));
    }
    if let Some(path) = reader.text("dataset_config") {
        match sd_scripts::read(Path::new(&path)) {
            Ok(own) => tables.extend(own),
            Err(problems) => problems.into_iter().for_each(|problem| reader.problem(Some("dataset_config"), problem)),
        }
    }
    let named = reader.has("train_data_dir");
    let others = reader.has("datasets") || reader.has("dataset_config");
    if named && others {
        reader.problem(Some("train_data_dir"), "give it, or datasets, or dataset_config; only one of them");
    } else if required && !others {
        reader.required_text("train_data_dir");
    }
    let mut all = if named { vec![top.clone()] } else { Vec::new() };
    if let Some(path) = reader.text("reg_data_dir") {
        let mut regularisation = top.clone();
        regularisation.path = path.into();
        regularisation.scan.repeats = 1;
        regularise(&mut regularisation, reader);
        all.push(regularisation);
    }
    for table in tables {
        let mut nested = reader.nested(&table.keys);
        let mut options = one(&mut nested, table.group);
        nested.required_text("train_data_dir");
        if options.scan.role == Role::Regularisation {
            regularise(&mut options, reader);
        }
        reader.absorb(nested, &table.label, &table.keys, OWN);
        all.push(options);
    }
    all
}

fn regularise(options: &mut DatasetOptions, reader: &mut Reader) {
    options.scan.role = Role::Regularisation;
    options.loss_weight *=
        reader.number("prior_loss_weight", "a number from 0 on", |weight| weight >= 0.0).unwrap_or(1.0);
}

fn one(reader: &mut Reader, group: usize) -> DatasetOptions {
    let share = |reader: &mut Reader, key: &str| {
        reader.number(key, "a number from 0 to 1", |rate| (0.0..=1.0).contains(&rate)).unwrap_or(0.0)
    };
    let word = |reader: &mut Reader, key: &str| reader.text(key).unwrap_or_default();
    let path = |reader: &mut Reader, key: &str| reader.text(key).map(PathBuf::from);
    let resolution = reader.size("max_resolution").unwrap_or((512, 512));
    let enable_bucket = reader.boolean("enable_bucket", false);
    let limits = BucketOptions {
        resolution,
        min: reader.count("min_bucket_reso", 1).unwrap_or(256),
        max: reader.count("max_bucket_reso", 1).unwrap_or(1024),
        step: reader.count("bucket_reso_steps", 1).unwrap_or(64),
        no_upscale: reader.boolean("bucket_no_upscale", false),
    };
    let framing = match Buckets::new(limits) {
        Ok(buckets) if enable_bucket => Framing::Buckets(buckets),
        Err(lora_data::Error::Option { key, value, reason }) if enable_bucket => {
            reader.problem(Some(key), format!("{value}: {reason}"));
            Framing::Fixed(resolution)
        }
        _ => Framing::Fixed(resolution),
    };
    let background = match reader.text("background") {
        Some(color) => parse_color(&color).unwrap_or_else(|| {
            reader.problem(Some("background"), format!("`{color}` is not white, black or #rrggbb"));
            [255; 3]
        }),
        None => [255; 3],
    };
    let processors = reader.texts("processors").unwrap_or_else(|| vec!["center_crop".into()]);
    if processors.is_empty() {
        reader.problem(
            Some("processors"),
            "at least one processor must bring pictures to size, for instance center_crop",
        );
    }
    let strictness = if reader.boolean("strict", false) { Strictness::Strict } else { Strictness::Normal };
    let is_reg = reader.boolean("is_reg", false);
    DatasetOptions {
        path: path(reader, "train_data_dir").unwrap_or_default(),
        scan: ScanOptions {
            repeats: reader.count("repeats", 1).unwrap_or(1),
            strictness,
            recursive: reader.boolean("recursive", false),
            caption_extension: reader.text("caption_extension"),
            class: word(reader, "class_tokens"),
            metadata_file: path(reader, "metadata_file"),
            mask_dir: path(reader, "mask_dir"),
            role: if is_reg { Role::Regularisation } else { Role::Training },
        },
        framing,
        processors,
        captions: CaptionOptions {
            trigger_word: word(reader, "trigger_word"),
            prefix: word(reader, "caption_prefix"),
            suffix: word(reader, "caption_suffix"),
            dropout: share(reader, "caption_dropout_rate"),
            dropout_every_n_epochs: reader.count("caption_dropout_every_n_epochs", 0).unwrap_or(0) as u64,
            wildcards: reader.boolean("enable_wildcard", false),
            shuffle: reader.boolean("shuffle_caption", false),
            tag_dropout: share(reader, "caption_tag_dropout_rate"),
            keep_tokens: reader.count("keep_tokens", 0).unwrap_or(0),
            keep_separator: word(reader, "keep_tokens_separator"),
            separator: reader.text("caption_separator").unwrap_or_else(|| ",".into()),
            secondary_separator: word(reader, "secondary_separator"),
        },
        background,
        batch_size: reader.count("batch_size", 1).unwrap_or(1),
        loss_weight: reader.number("loss_weight", "a number from 0 on", |weight| weight >= 0.0).unwrap_or(1.0),
        masks: MaskOptions {
            enabled: reader.boolean("masked_loss", false),
            alpha: reader.boolean("alpha_mask", false),
            inverted: reader.boolean("invert_mask", false),
            unmasked_weight: share(reader, "unmasked_weight") as f32,
        },
        group,
    }
}

fn parse_color(text: &str) -> Option<[u8; 3]> {
    match text {
        "white" => Some([255; 3]),
        "black" => Some([0; 3]),
        _ => {
            let digits = text.strip_prefix('#').filter(|digits| digits.len() == 6 && digits.is_ascii())?;
            let channel = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).ok();
            Some([channel(0)?, channel(2)?, channel(4)?])
        }
    }
}
