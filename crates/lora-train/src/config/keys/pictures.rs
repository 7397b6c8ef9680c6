//! How pictures are cut, masked and captioned; each dataset may say it for itself. Which pictures there are is in
//! `keys/data.rs`.

use std::path::PathBuf;

use lora_data::caption::{CaptionLines, WarmupLength};

use super::stable_diffusion::KEPT_ENCODER;
use super::{Given, Group, Key, Reads, Resumed, data, memory, saving, size};
use crate::config::Warmup;

/// All keys that mean something for pictures alone.
pub static KEYS: &[&Group] = &[&data::PICTURES, &TREATMENT, &memory::PICTURES, &saving::PICTURES];

/// How they are cut, masked and captioned.
pub(super) static TREATMENT: Group = Group {
    section: "Pictures and captions",
    behind: None,
    keys: &[
        Key {
            name: "max_resolution",
            values: "\"W,H\" or a side",
            default: "\"512,512\"",
            meaning: "Size that pictures are scaled and cut to; multiples of 8 (64 is best).",
            memory: "Activations grow with the area, attention's work with its square.",
            resumed: Resumed::Fixed(|config| size(config.max_resolution)),
            reads: Reads::Both(
                |given, config| config.max_resolution = given.size().unwrap_or((512, 512)),
                |given, dataset| dataset.buckets.resolution = given.size().unwrap_or((512, 512)),
            ),
        },
        Key {
            name: "enable_bucket",
            values: "true/false",
            default: "false",
            meaning: "Pictures keep their aspect: each goes to the bucket nearest to it, none larger in area than `max_resolution`; by sd-scripts' rule.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| dataset.enable_bucket = given.boolean(false)),
        },
        Key {
            name: "min_bucket_reso",
            values: "pixels",
            default: "256",
            meaning: "Shortest side of a bucket.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| dataset.buckets.min = given.count_to(1, 32_768).unwrap_or(256)),
        },
        Key {
            name: "max_bucket_reso",
            values: "pixels",
            default: "1024",
            meaning: "Longest side of a bucket.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| dataset.buckets.max = given.count_to(1, 32_768).unwrap_or(1024)),
        },
        Key {
            name: "bucket_reso_steps",
            values: "multiple of 8",
            default: "64",
            meaning: "Sides of buckets are multiples of this.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| dataset.buckets.step = given.count_to(1, 32_768).unwrap_or(64)),
        },
        Key {
            name: "bucket_no_upscale",
            values: "true/false",
            default: "false",
            meaning: "Small pictures are not enlarged; their bucket is their own size.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| dataset.buckets.no_upscale = given.boolean(false)),
        },
        Key {
            name: "masked_loss",
            values: "true/false",
            default: "false",
            meaning: "Weight the loss by masks: `name-mask.png` or `name-masklabel.png` beside the picture, white counts, black does not.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Common(
                |given, config| config.masked_loss = given.boolean(false),
                |given, dataset| dataset.options.masks.enabled = given.boolean(false),
            ),
        },
        Key {
            name: "mask_dir",
            values: "path",
            default: "none",
            meaning: "Folder of masks, each of its picture's name: in folders as the pictures are in, or directly in it.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Dataset(|given, dataset| dataset.options.scan.mask_dir = given.text().map(PathBuf::from)),
        },
        Key {
            name: "alpha_mask",
            values: "true/false",
            default: "false",
            meaning: "The picture's transparency is its mask where it has no other.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| dataset.options.masks.alpha = given.boolean(false)),
        },
        Key {
            name: "invert_mask",
            values: "true/false",
            default: "false",
            meaning: "Black counts, white does not.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| dataset.options.masks.inverted = given.boolean(false)),
        },
        Key {
            name: "unmasked_weight",
            values: "0 … 1",
            default: "0",
            meaning: "The least that any part of a picture counts.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| {
                dataset.options.masks.unmasked_weight = given.share().unwrap_or(0.0) as f32
            }),
        },
        Key {
            name: "background",
            values: "white, black, \"#rrggbb\"",
            default: "\"white\"",
            meaning: "What lies behind transparent pictures.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| dataset.options.background = color(given)),
        },
        Key {
            name: "processors",
            values: "list of names",
            default: "[\"center_crop\"]",
            meaning: "What pictures go through before training, in order: one of `center_crop`, `top_left_crop`, `random_crop`, `focus_crop` (the most salient part), `no_crop` (squashed to size), and `flip`, `color_jitter`, or what your program registers.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| dataset.options.processors = processors(given)),
        },
        Key {
            name: "image_variations",
            values: "1 … 100",
            default: "2 with `flip`, otherwise 1",
            meaning: "How many variations of each picture are kept where latents are cached and processors are random; they come by turns. With `flip` every second one is mirrored, so that the default keeps a picture both ways.",
            memory: "None; latents of each variation lie in host memory, and are encoded before training.",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| dataset.options.variations = given.count_to(1, 100)),
        },
        Key {
            name: "trigger_word",
            values: "text",
            default: "none",
            meaning: "Put in front of captions that do not have it as a word of its own, as a tag that stays there. `[trigger]` and `[name]` in a caption stand for it.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| {
                dataset.options.captions.trigger_word = given.text().unwrap_or_default()
            }),
        },
        Key {
            name: "caption_prefix",
            values: "text",
            default: "none",
            meaning: "Put before each caption, with a blank.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| dataset.options.captions.prefix = given.text().unwrap_or_default()),
        },
        Key {
            name: "caption_suffix",
            values: "text",
            default: "none",
            meaning: "Put after each caption, with a blank.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| dataset.options.captions.suffix = given.text().unwrap_or_default()),
        },
        Key {
            name: "caption_dropout_rate",
            values: "0 … 1",
            default: "0",
            meaning: "Share of visits without their caption.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| dataset.options.captions.dropout = given.share().unwrap_or(0.0)),
        },
        Key {
            name: "caption_dropout_every_n_epochs",
            values: "0 …",
            default: "0",
            meaning: "In every so-many-th epoch all captions are left out: with 3 in the third, the sixth …",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| {
                dataset.options.captions.dropout_every_n_epochs = given.count(0).unwrap_or(0) as u64
            }),
        },
        Key {
            name: "shuffle_caption",
            values: "true/false",
            default: "false",
            meaning: "Tags come in another order at each visit.",
            memory: KEPT_ENCODER,
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| dataset.options.captions.shuffle = given.boolean(false)),
        },
        Key {
            name: "caption_tag_dropout_rate",
            values: "0 … 1",
            default: "0",
            meaning: "Probability that a tag is left out at a visit.",
            memory: KEPT_ENCODER,
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| dataset.options.captions.tag_dropout = given.share().unwrap_or(0.0)),
        },
        Key {
            name: "token_warmup_min",
            values: "0 …",
            default: "1",
            meaning: "Tags behind the kept ones that are there at the first step, with `token_warmup_step`.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| {
                dataset.options.captions.warmup_tags = given.count_to(0, 1_000_000).unwrap_or(1)
            }),
        },
        Key {
            name: "token_warmup_step",
            values: "steps, or a share below 1",
            default: "0",
            meaning: "Steps over which tags come to a caption one after the other, until all are there.",
            memory: KEPT_ENCODER,
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| {
                dataset.options.captions.warmup = match given.steps_or_share() {
                    Some(Warmup::Share(share)) => WarmupLength::Share(share),
                    Some(Warmup::Steps(steps)) => WarmupLength::Steps(steps),
                    None => WarmupLength::Steps(0),
                }
            }),
        },
        Key {
            name: "keep_tokens",
            values: "0 …",
            default: "0",
            meaning: "Tags at the front that are neither shuffled nor left out.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| dataset.options.captions.keep_tokens = given.count(0).unwrap_or(0)),
        },
        Key {
            name: "keep_tokens_separator",
            values: "text",
            default: "none",
            meaning: "Divides kept tags from the others in a caption (`\\|\\|\\|`); a second one begins a kept end.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| {
                dataset.options.captions.keep_separator = given.text().unwrap_or_default()
            }),
        },
        Key {
            name: "caption_separator",
            values: "text",
            default: "\",\"",
            meaning: "Divides tags.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| {
                dataset.options.captions.separator = given.text().unwrap_or_else(|| ",".into())
            }),
        },
        Key {
            name: "secondary_separator",
            values: "text",
            default: "none",
            meaning: "Divides tags that move and drop together (`;;;`).",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| {
                dataset.options.captions.secondary_separator = given.text().unwrap_or_default()
            }),
        },
        Key {
            name: "caption_lines",
            values: "first, all, joined",
            default: "\"first\"",
            meaning: "What counts of a caption file with several lines: the first, as in sd-scripts; all with their breaks, as in ai-toolkit, musubi-tuner and diffusion-pipe; or all as one line, with `caption_separator` between them. Lines without text are left out; `enable_wildcard` chooses one.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| {
                let choices =
                    [("first", CaptionLines::First), ("all", CaptionLines::All), ("joined", CaptionLines::Joined)];
                dataset.options.captions.lines = given.choice(&choices).unwrap_or_default();
            }),
        },
        Key {
            name: "enable_wildcard",
            values: "true/false",
            default: "false",
            meaning: "Of a caption's lines one is chosen, of `{a\\|b}` one part.",
            memory: KEPT_ENCODER,
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| dataset.options.captions.wildcards = given.boolean(false)),
        },
    ],
};

fn processors(given: &mut Given<'_>) -> Vec<String> {
    let processors = given.texts().unwrap_or_else(|| vec!["center_crop".into()]);
    if processors.is_empty() {
        given.problem("at least one processor must bring pictures to size, for instance center_crop");
    }
    processors
}

fn color(given: &mut Given<'_>) -> [u8; 3] {
    const WHITE: [u8; 3] = [255; 3];
    let Some(text) = given.text() else { return WHITE };
    parse_color(&text).unwrap_or_else(|| {
        given.problem(format!("`{text}` is not white, black or #rrggbb"));
        WHITE
    })
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
