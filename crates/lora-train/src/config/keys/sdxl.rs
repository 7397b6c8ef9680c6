//! Keys that Stable Diffusion XL brings beside those of all Stable Diffusion: each of its two text encoders for itself.

use super::denoising::{DIFFERENCE, LEVELS, NOISE};
use super::prior::PRIOR;
use super::slider::SLIDERS;
use super::stable_diffusion::{AUTOENCODER, CAPTIONS, LOSS, NETWORKS, RATES, SAMPLER, WEIGHTS};
use super::{Given, Group, Key, Reads, Resumed, Setting};

/// All of them.
pub static KEYS: &[&Group] = &[
    &NETWORKS,
    &ENCODERS,
    &RATES,
    &ENCODER_RATES,
    &CAPTIONS,
    &SLIDERS,
    &PRIOR,
    &WEIGHTS,
    &LEVELS,
    &NOISE,
    &DIFFERENCE,
    &LOSS,
    &AUTOENCODER,
    &SAMPLER,
];

/// Which text encoders are trained.
pub static ENCODERS: Group = Group {
    section: "Adapter",
    behind: Some("train_text_encoder"),
    keys: &[
        Key {
            name: "train_text_encoder_1",
            values: "true/false",
            default: "train_text_encoder",
            meaning: "Adapt SDXL's first text encoder (CLIP-L).",
            memory: "As train_text_encoder.",
            resumed: Resumed::Fixed(|config| config.extra.shown("train_text_encoder_1")),
            reads: Reads::Extra(switch),
        },
        Key {
            name: "train_text_encoder_2",
            values: "true/false",
            default: "train_text_encoder",
            meaning: "Adapt SDXL's second text encoder (OpenCLIP bigG).",
            memory: "As train_text_encoder; its weights take 1.4 GB in fp16.",
            resumed: Resumed::Fixed(|config| config.extra.shown("train_text_encoder_2")),
            reads: Reads::Extra(switch),
        },
    ],
};

/// Their learning rates.
pub static ENCODER_RATES: Group = Group {
    section: "Optimisation",
    behind: Some("text_encoder_lr"),
    keys: &[
        Key {
            name: "text_encoder_1_lr",
            values: "0 …",
            default: "text_encoder_lr",
            meaning: "Learning rate of the adapter of SDXL's first text encoder.",
            memory: "",
            resumed: Resumed::Free(|config| config.extra.shown("text_encoder_1_lr")),
            reads: Reads::Extra(rate),
        },
        Key {
            name: "text_encoder_2_lr",
            values: "0 …",
            default: "text_encoder_lr",
            meaning: "Learning rate of the adapter of SDXL's second text encoder.",
            memory: "",
            resumed: Resumed::Free(|config| config.extra.shown("text_encoder_2_lr")),
            reads: Reads::Extra(rate),
        },
    ],
};

fn switch(given: &mut Given<'_>) -> Setting {
    given.optional_boolean().map_or(Setting::Nothing, Setting::Switch)
}

fn rate(given: &mut Given<'_>) -> Setting {
    given.not_negative().map_or(Setting::Nothing, Setting::Number)
}
