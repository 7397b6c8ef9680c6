//! Keys that Stable Diffusion brings: its networks, its captions, its loss, its autoencoder and its samplers. Another base
//! with the same parts names the same groups.

use lora_data::tokenizer::TextCleaning;
use lora_models::diffusion::SamplerKind;

use super::denoising::{DIFFERENCE, LEVELS, NOISE};
use super::prior::PRIOR;
use super::slider::SLIDERS;
use super::{Given, Group, Key, Reads, Resumed, Setting, shown};

/// What captions that change from visit to visit cost.
pub(super) const KEPT_ENCODER: &str =
    "Keeps the text encoder on the device (0.25 GB in fp16) even where it does not train.";

/// All of them.
pub static KEYS: &[&Group] = &[
    &NETWORKS,
    &RATES,
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

/// Which of its networks are trained.
pub static NETWORKS: Group = Group {
    section: "Adapter",
    behind: Some("target_modules"),
    keys: &[
        Key {
            name: "train_unet",
            values: "true/false",
            default: "true",
            meaning: "Adapt the U-Net.",
            memory: "",
            resumed: Resumed::Fixed(|config| shown(&config.train_unet)),
            reads: Reads::Run(|given, config| config.train_unet = given.boolean(true)),
        },
        Key {
            name: "train_text_encoder",
            values: "true/false",
            default: "true",
            meaning: "Adapt the text encoder.",
            memory: "Off saves its activations, and its weights once captions are encoded.",
            resumed: Resumed::Fixed(|config| shown(&config.train_text_encoder)),
            reads: Reads::Run(|given, config| {
                config.train_text_encoder = given.boolean(true);
                // Either of two text encoders may say otherwise.
                let either = ["train_text_encoder_1", "train_text_encoder_2"].iter().any(|key| given.has(key));
                if !config.train_unet && !config.train_text_encoder && !either {
                    given.problem("train_unet and train_text_encoder are both off; there is nothing to train");
                }
            }),
        },
    ],
};

/// Their learning rates.
pub static RATES: Group = Group {
    section: "Optimisation",
    behind: Some("learning_rate"),
    keys: &[
        Key {
            name: "unet_lr",
            values: "0 …",
            default: "learning_rate",
            meaning: "Learning rate of the U-Net's adapter.",
            memory: "",
            resumed: Resumed::Free(|config| shown(&config.unet_lr)),
            reads: Reads::Run(|given, config| config.unet_lr = given.not_negative().unwrap_or(config.learning_rate)),
        },
        Key {
            name: "text_encoder_lr",
            values: "0 …",
            default: "half of learning_rate",
            meaning: "Learning rate of the text encoder's adapter, which overfits sooner.",
            memory: "",
            resumed: Resumed::Free(|config| shown(&config.text_encoder_lr)),
            reads: Reads::Run(|given, config| {
                config.text_encoder_lr = given.not_negative().unwrap_or(config.learning_rate / 2.0)
            }),
        },
    ],
};

/// How captions become states.
pub static CAPTIONS: Group = Group {
    section: "Pictures and captions",
    behind: Some("processors"),
    keys: &[
        Key {
            name: "clip_skip",
            values: "1 …",
            default: "1",
            meaning: "2 leaves out the text encoder's last layer, as bases trained so expect.",
            memory: "",
            resumed: Resumed::Fixed(|config| shown(&config.clip_skip)),
            reads: Reads::Run(|given, config| config.clip_skip = given.count(1).unwrap_or(1)),
        },
        Key {
            name: "max_token_length",
            values: "75, 150, 225",
            default: "75",
            meaning: "Tokens of a caption; what is longer is cut.",
            memory: "Longer captions, longer cross-attention.",
            resumed: Resumed::Fixed(|config| shown(&config.max_token_length)),
            reads: Reads::Run(|given, config| config.max_token_length = max_token_length(given)),
        },
        Key {
            name: "text_cleaning",
            values: "ftfy, none",
            default: "\"ftfy\"",
            meaning: "How captions are cleaned before they are split into tokens: as CLIP and sd-scripts do, or as transformers 5 does. They differ on full-width punctuation, curly quotes and entities.",
            memory: "",
            resumed: Resumed::Fixed(|config| config.text_cleaning.name().to_owned()),
            reads: Reads::Run(|given, config| {
                config.text_cleaning =
                    given.choice(&[("ftfy", TextCleaning::Ftfy), ("none", TextCleaning::None)]).unwrap_or_default()
            }),
        },
    ],
};

/// What brackets in captions mean.
pub static WEIGHTS: Group = Group {
    section: "Pictures and captions",
    behind: Some("enable_wildcard"),
    keys: &[Key {
        name: "weighted_captions",
        values: "true/false",
        default: "false",
        meaning: "`(word:1.2)`, `(word)` and `[word]` in captions and sample prompts weigh words as in the WebUI.",
        memory: "",
        resumed: Resumed::Fixed(|config| shown(&config.weighted_captions)),
        reads: Reads::Run(|given, config| config.weighted_captions = given.boolean(false)),
    }],
};

/// What the base predicts, and weights of the loss by timestep.
pub static LOSS: Group = Group {
    section: "Pictures and captions",
    behind: Some("huber_scale"),
    keys: &[
        Key {
            name: "v_parameterization",
            values: "true/false",
            default: "as the base says",
            meaning: "Whether the base predicts the velocity (SD 2.x of 768 px) instead of the noise: for files that do not say it.",
            memory: "",
            // It says something of the base, whose digest is recorded.
            resumed: Resumed::Elsewhere,
            reads: Reads::Run(|given, config| config.v_parameterization = given.optional_boolean()),
        },
        Key {
            name: "zero_terminal_snr",
            values: "true/false",
            default: "as the base says",
            meaning: "Whether the base was trained with noise alone at the last timestep, as some that predict the velocity were: for files that do not say it. Samples are then drawn with trailing timesteps and rescaled guidance.",
            memory: "",
            resumed: Resumed::FixedSince("none", |config| config.extra.shown("zero_terminal_snr")),
            reads: Reads::Extra(|given| given.optional_boolean().map_or(Setting::Nothing, Setting::Switch)),
        },
        Key {
            name: "min_snr_gamma",
            values: "above 0",
            default: "none",
            meaning: "Weights the loss by min(SNR, γ)/SNR; 5 in the paper.",
            memory: "",
            resumed: Resumed::Fixed(|config| shown(&config.min_snr_gamma)),
            reads: Reads::Run(|given, config| config.min_snr_gamma = given.positive()),
        },
        Key {
            name: "debiased_estimation_loss",
            values: "true/false",
            default: "false",
            meaning: "Weights the loss by 1/√SNR (1/(SNR+1) where the velocity is predicted).",
            memory: "",
            resumed: Resumed::FixedSince("false", |config| config.extra.shown("debiased_estimation_loss")),
            reads: Reads::Extra(|given| Setting::Switch(given.boolean(false))),
        },
        Key {
            name: "scale_v_pred_loss_like_noise_pred",
            values: "true/false",
            default: "false",
            meaning: "Weights a loss of the velocity by SNR/(SNR+1), which is the scale of one of the noise.",
            memory: "",
            resumed: Resumed::FixedSince("false", |config| config.extra.shown("scale_v_pred_loss_like_noise_pred")),
            reads: Reads::Extra(|given| Setting::Switch(given.boolean(false))),
        },
        Key {
            name: "v_pred_like_loss",
            values: "0 …",
            default: "0",
            meaning: "Adds so much of the loss at the scale of one of the velocity to a loss of the noise.",
            memory: "",
            resumed: Resumed::FixedSince("0.0", |config| config.extra.shown("v_pred_like_loss")),
            reads: Reads::Extra(|given| Setting::Number(given.not_negative().unwrap_or(0.0))),
        },
    ],
};

/// Latents.
pub static AUTOENCODER: Group = Group {
    section: "Precision and memory",
    behind: Some("cuda_graphs"),
    keys: &[
        Key {
            name: "vae",
            values: "path",
            default: "the base's own",
            meaning: "Another autoencoder for the base: its file in the original or diffusers' layout, its folder, or a whole base that has it.",
            memory: "",
            resumed: Resumed::FixedSince("none", |config| config.extra.shown("vae")),
            reads: Reads::Extra(|given| given.text().map_or(Setting::Nothing, Setting::Text)),
        },
        Key {
            name: "cache_latents",
            values: "true/false",
            default: "true",
            meaning: "Encode all pictures once, before the first step; then the autoencoder leaves the device.",
            memory: "On saves the autoencoder's weights and its encoding of each step.",
            resumed: Resumed::Fixed(|config| shown(&config.cache_latents)),
            reads: Reads::Run(|given, config| config.cache_latents = given.boolean(true)),
        },
        Key {
            name: "vae_tiling",
            values: "true/false",
            default: "false",
            meaning: "Take pictures of more than 256 pixels a side (of SD 1.x) through the autoencoder in overlapping tiles that fade into each other, when they are encoded and when samples are drawn. The autoencoder's norms see a tile instead of the picture, so that latents and samples differ a little.",
            memory: "What drawing samples and encoding need beside weights falls to a fifth at 512 pixels, less at larger sizes. Costs two thirds more time in the autoencoder.",
            resumed: Resumed::Fixed(|config| shown(&config.vae_tiling)),
            reads: Reads::Run(|given, config| config.vae_tiling = given.boolean(false)),
        },
    ],
};

/// Drawing samples.
pub static SAMPLER: Group = Group {
    section: "Saving and looking",
    behind: Some("sample_guidance_scale"),
    keys: &[Key {
        name: "sample_sampler",
        values: "euler, euler_a, ddim, dpmpp_2m",
        default: "\"euler\"",
        meaning: "Sampler.",
        memory: "",
        resumed: Resumed::Unrecorded,
        reads: Reads::Run(|given, config| {
            config.samples.sampler = given.choice(&SamplerKind::ALL.map(|kind| (kind.name(), kind))).unwrap_or_default()
        }),
    }],
};

fn max_token_length(given: &mut Given<'_>) -> usize {
    let length = given.count(1).unwrap_or(75);
    if ![75, 150, 225].contains(&length) {
        given.problem(format!("expected 75, 150 or 225, found {length}"));
    }
    length
}
