//! Keys that bases bring which are trained by flow matching: where their parts are, how long captions are, how noise levels
//! are drawn. Names are sd-scripts' and diffusers'.

use super::prior::PRIOR;
use super::stable_diffusion::AUTOENCODER;
use super::{Given, Group, Key, Reads, Resumed, Setting};

/// All of them.
pub static KEYS: &[&Group] = &[&CAPTIONS, &PRIOR, &LEVELS, &AUTOENCODER, &PARTS];

/// FLUX.1's: the same, a second text encoder and the guidance that it is told.
pub static FLUX: &[&Group] = &[&CAPTIONS, &PRIOR, &LEVELS, &GUIDANCE, &AUTOENCODER, &PARTS, &SECOND_ENCODER];

/// Stable Diffusion 3's: the same, and two more text encoders.
pub static SD3: &[&Group] = &[&CAPTIONS, &PRIOR, &LEVELS, &AUTOENCODER, &PARTS, &SECOND_ENCODER, &THIRD_ENCODER];

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

/// How noise levels are drawn.
pub static LEVELS: Group = Group {
    section: "Pictures and captions",
    behind: Some("weighted_captions"),
    keys: &[
        Key {
            name: "timestep_sampling",
            values: "uniform, sigmoid, shift, flux_shift, logit_normal, mode",
            default: "flux_shift",
            meaning: "How noise levels are drawn for bases that are trained by flow matching: evenly; the sigmoid of normal numbers; the same moved towards noise by `discrete_flow_shift` (3 without it), or by the picture's size, as FLUX.1's or, for Qwen-Image, as that one's; with `logit_mean` and `logit_std`; with a mode in the middle. Where `discrete_flow_shift` is given, `shift`.",
            memory: "",
            resumed: Resumed::FixedSince("none", |config| config.extra.shown("timestep_sampling")),
            reads: Reads::Extra(sampling),
        },
        Key {
            name: "discrete_flow_shift",
            values: "above 0",
            default: "none",
            meaning: "Moves noise levels σ to sσ / (1 + (s − 1)σ): above 1 towards noise, as larger pictures need it.",
            memory: "",
            resumed: Resumed::FixedSince("none", |config| config.extra.shown("discrete_flow_shift")),
            reads: Reads::Extra(|given| given.positive().map_or(Setting::Nothing, Setting::Number)),
        },
        Key {
            name: "sigmoid_scale",
            values: "above 0",
            default: "1",
            meaning: "What normal numbers are multiplied by before their sigmoid is taken: less than 1 gathers noise levels in the middle.",
            memory: "",
            resumed: Resumed::FixedSince("1.0", |config| config.extra.shown("sigmoid_scale")),
            reads: Reads::Extra(|given| Setting::Number(given.positive().unwrap_or(1.0))),
        },
        Key {
            name: "logit_mean",
            values: "number",
            default: "0",
            meaning: "Mean of the normal numbers of `logit_normal`: below 0 towards data, above towards noise.",
            memory: "",
            resumed: Resumed::FixedSince("0.0", |config| config.extra.shown("logit_mean")),
            reads: Reads::Extra(|given| Setting::Number(given.number("a number", f64::is_finite).unwrap_or(0.0))),
        },
        Key {
            name: "logit_std",
            values: "above 0",
            default: "1",
            meaning: "Standard deviation of the normal numbers of `logit_normal`.",
            memory: "",
            resumed: Resumed::FixedSince("1.0", |config| config.extra.shown("logit_std")),
            reads: Reads::Extra(|given| Setting::Number(given.positive().unwrap_or(1.0))),
        },
        Key {
            name: "mode_scale",
            values: "0 …",
            default: "1.29",
            meaning: "How much the middle is favoured by `mode`.",
            memory: "",
            resumed: Resumed::FixedSince("1.29", |config| config.extra.shown("mode_scale")),
            reads: Reads::Extra(|given| Setting::Number(given.not_negative().unwrap_or(1.29))),
        },
        Key {
            name: "min_timestep",
            values: "0 … 1000",
            default: "0",
            meaning: "Drawn noise levels are brought into the range from this on, in thousandths.",
            memory: "",
            resumed: Resumed::FixedSince("0.0", |config| config.extra.shown("min_timestep")),
            reads: Reads::Extra(|given| Setting::Number(thousandths(given).unwrap_or(0.0))),
        },
        Key {
            name: "max_timestep",
            values: "0 … 1000",
            default: "1000",
            meaning: "The end of that range.",
            memory: "",
            resumed: Resumed::FixedSince("1000.0", |config| config.extra.shown("max_timestep")),
            reads: Reads::Extra(|given| Setting::Number(thousandths(given).unwrap_or(1000.0))),
        },
    ],
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

fn sampling(given: &mut Given<'_>) -> Setting {
    let names = ["uniform", "sigmoid", "shift", "flux_shift", "logit_normal", "mode"].map(|name| (name, name));
    given.choice(&names).map_or(Setting::Nothing, |name| Setting::Text(name.to_owned()))
}

fn thousandths(given: &mut Given<'_>) -> Option<f64> {
    given.number("a number from 0 to 1000", |number| (0.0..=1000.0).contains(&number))
}

fn path(given: &mut Given<'_>) -> Setting {
    given.text().map_or(Setting::Nothing, Setting::Text)
}
