//! Keys that bases bring which are trained by flow matching: where their parts are, how long captions are, the guidance
//! that some are told. Names are sd-scripts' and diffusers'.

use super::denoising::{DIFFERENCE, LEVELS, NOISE};
use super::prior::PRIOR;
use super::slider::SLIDERS;
use super::stable_diffusion::AUTOENCODER;
use super::{Given, Group, Key, Reads, Resumed, Setting};

/// All of them.
pub static KEYS: &[&Group] = &[&CAPTIONS, &SLIDERS, &PRIOR, &LEVELS, &NOISE, &DIFFERENCE, &AUTOENCODER, &PARTS];

/// Anima's: the same, and a second tokenizer.
pub static ANIMA: &[&Group] = &[&CAPTIONS, &LEVELS, &NOISE, &DIFFERENCE, &AUTOENCODER, &PARTS, &SECOND_TOKENIZER];

/// FLUX.1's: the same, a second text encoder and the guidance that it is told.
pub static FLUX: &[&Group] =
    &[&CAPTIONS, &SLIDERS, &PRIOR, &LEVELS, &NOISE, &DIFFERENCE, &GUIDANCE, &AUTOENCODER, &PARTS, &SECOND_ENCODER];

/// Stable Diffusion 3's: the same, and two more text encoders.
pub static SD3: &[&Group] =
    &[&CAPTIONS, &SLIDERS, &PRIOR, &LEVELS, &NOISE, &DIFFERENCE, &AUTOENCODER, &PARTS, &SECOND_ENCODER, &THIRD_ENCODER];

/// The guidance that a network is told.
pub static GUIDANCE: Group = Group {
    section: "Pictures and captions",
    behind: Some("max_timestep"),
    keys: &[Key {
        name: "guidance_scale",
        values: "0 …",
        default: "1",
        meaning: "The strength of guidance that FLUX.1 dev is told in training, as a constant; adapters that are trained at 1 are used at the usual 3.5. Samples are told `sample_guidance_scale`.",
        memory: "",
        resumed: Resumed::FixedSince("1.0", |config| config.extra.shown("guidance_scale")),
        reads: Reads::Extra(|given| Setting::Number(given.not_negative().unwrap_or(1.0))),
    }],
};

/// Where the second text encoder is.
pub static SECOND_ENCODER: Group = Group {
    section: "Precision and memory",
    behind: Some("text_encoder"),
    keys: &[Key {
        name: "text_encoder_2",
        values: "path",
        default: "the base's own",
        meaning: "The second text encoder of a base whose file is the transformer alone: FLUX.1's T5-XXL, Stable Diffusion 3's CLIP-bigG; a folder, a file or a diffusers folder that has it.",
        memory: "As `text_encoder`.",
        resumed: Resumed::FixedSince("none", |config| config.extra.shown("text_encoder_2")),
        reads: Reads::Extra(path),
    }],
};

/// Where the third one is.
pub static THIRD_ENCODER: Group = Group {
    section: "Precision and memory",
    behind: Some("text_encoder_2"),
    keys: &[Key {
        name: "text_encoder_3",
        values: "path",
        default: "the base's own",
        meaning: "The third text encoder, likewise: Stable Diffusion 3's T5-XXL.",
        memory: "As `text_encoder`.",
        resumed: Resumed::FixedSince("none", |config| config.extra.shown("text_encoder_3")),
        reads: Reads::Extra(path),
    }],
};

/// Where the tokenizer of a text conditioner is.
pub static SECOND_TOKENIZER: Group = Group {
    section: "Precision and memory",
    behind: Some("tokenizer"),
    keys: &[Key {
        name: "t5_tokenizer",
        values: "path",
        default: "beside the base",
        meaning: "Anima: the folder with T5's tokenizer.json, whose tokens its text conditioner reads; T5 itself is not needed.",
        memory: "",
        resumed: Resumed::FixedSince("none", |config| config.extra.shown("t5_tokenizer")),
        reads: Reads::Extra(path),
    }],
};

/// How captions become states.
pub static CAPTIONS: Group = Group {
    section: "Pictures and captions",
    behind: Some("max_token_length"),
    keys: &[Key {
        name: "max_sequence_length",
        values: "1 …",
        default: "512",
        meaning: "Tokens of a caption for a text encoder that is a language model, with the template around it; what is longer is cut. Qwen-Image: without what stands before the caption, 1024 by default.",
        memory: "A plan counts with captions of this length; shorter ones take less.",
        resumed: Resumed::FixedSince("512", |config| config.extra.shown("max_sequence_length")),
        reads: Reads::Extra(|given| Setting::Whole(given.count_to(1, 4096).unwrap_or(512))),
    }],
};

/// Where parts of a base are.
pub static PARTS: Group = Group {
    section: "Precision and memory",
    behind: Some("vae"),
    keys: &[
        Key {
            name: "text_encoder",
            values: "path",
            default: "the base's own",
            meaning: "The text encoder of a base whose file is the transformer alone: the folder or the file of the language model, or a diffusers folder that has it.",
            memory: "It is read, used and gone before the transformer comes.",
            resumed: Resumed::FixedSince("none", |config| config.extra.shown("text_encoder")),
            reads: Reads::Extra(path),
        },
        Key {
            name: "tokenizer",
            values: "path",
            default: "beside the text encoder",
            meaning: "The folder with the tokenizer.json of the text encoder.",
            memory: "",
            resumed: Resumed::FixedSince("none", |config| config.extra.shown("tokenizer")),
            reads: Reads::Extra(path),
        },
    ],
};

fn path(given: &mut Given<'_>) -> Setting {
    given.text().map_or(Setting::Nothing, Setting::Text)
}
