//! Keys of what all bases that learn to take noise off pictures share: how noise levels are drawn, what the noise is, and what a
//! difference from the target counts. Names are sd-scripts' and diffusers'.

use super::{Given, Group, Key, Reads, Resumed, Setting, shown};

/// A key whose value is kept in [`TrainConfig::extra`](crate::config::TrainConfig::extra), where its name stands once, and which a
/// resumed run keeps: states of before it was known had the value `before`.
macro_rules! kept {
    ($name:literal, values $values:literal, default $default:literal, before $before:literal, $meaning:literal, $reads:expr) => {
        Key {
            name: $name,
            values: $values,
            default: $default,
            meaning: $meaning,
            memory: "",
            resumed: Resumed::FixedSince($before, |config| config.extra.shown($name)),
            reads: Reads::Extra($reads),
        }
    };
}

/// How noise levels and timesteps are drawn.
pub static LEVELS: Group = Group {
    section: "Pictures and captions",
    behind: Some("weighted_captions"),
    keys: &[
        kept! {
            "timestep_sampling", values "uniform, sigmoid, shift, flux_shift, logit_normal, mode", default "flux_shift; Stable Diffusion 1, 2 and XL: uniform", before "none",
            "How noise levels are drawn, and timesteps, which are thousandths of them: evenly; the sigmoid of normal numbers; the same moved towards noise by `discrete_flow_shift` (3 without it), or by the picture's size, as FLUX.1's or, for Qwen-Image, as that one's, which is for bases that are trained by flow matching; with `logit_mean` and `logit_std`; with a mode in the middle. Where `discrete_flow_shift` is given, `shift`.",
            sampling
        },
        kept! {
            "discrete_flow_shift", values "above 0", default "none", before "none",
            "Moves noise levels σ to sσ / (1 + (s − 1)σ): above 1 towards noise, as larger pictures need it.",
            |given| given.positive().map_or(Setting::Nothing, Setting::Number)
        },
        kept! {
            "sigmoid_scale", values "above 0", default "1", before "1.0",
            "What normal numbers are multiplied by before their sigmoid is taken: less than 1 gathers noise levels in the middle.",
            |given| Setting::Number(given.positive().unwrap_or(1.0))
        },
        kept! {
            "logit_mean", values "number", default "0", before "0.0",
            "Mean of the normal numbers of `logit_normal`: below 0 towards data, above towards noise.",
            |given| Setting::Number(given.number("a number", f64::is_finite).unwrap_or(0.0))
        },
        kept! {
            "logit_std", values "above 0", default "1", before "1.0",
            "Standard deviation of the normal numbers of `logit_normal`.",
            |given| Setting::Number(given.positive().unwrap_or(1.0))
        },
        kept! {
            "mode_scale", values "0 …", default "1.29", before "1.29",
            "How much the middle is favoured by `mode`.",
            |given| Setting::Number(given.not_negative().unwrap_or(1.29))
        },
        kept! {
            "min_timestep", values "0 … 1000", default "0", before "0.0",
            "Drawn noise levels are brought into the range from this on, in thousandths: the lowest timestep.",
            |given| Setting::Number(thousandths(given).unwrap_or(0.0))
        },
        kept! {
            "max_timestep", values "0 … 1000", default "1000", before "1000.0",
            "The end of that range: timesteps are below it.",
            |given| Setting::Number(thousandths(given).unwrap_or(1000.0))
        },
    ],
};

/// What the noise is.
pub static NOISE: Group = Group {
    section: "Pictures and captions",
    behind: Some("max_timestep"),
    keys: &[
        Key {
            name: "noise_offset",
            values: "0 …",
            default: "0",
            meaning: "Adds a constant per channel to the noise, for darker darks and lighter lights (0.05 to 0.1).",
            memory: "",
            resumed: Resumed::Fixed(|config| shown(&config.noise_offset)),
            reads: Reads::Run(|given, config| config.noise_offset = given.not_negative().unwrap_or(0.0)),
        },
        kept! {
            "noise_offset_random_strength", values "true/false", default "false", before "false",
            "The offset's strength is drawn anew for each picture of a step, from 0 to `noise_offset`.",
            |given| Setting::Switch(given.boolean(false))
        },
        kept! {
            "adaptive_noise_scale", values "number", default "0", before "0.0",
            "Adds so much of the absolute mean of a channel's latents to the strength of its `noise_offset`; what falls below 0 counts as 0.",
            |given| Setting::Number(given.number("a number", f64::is_finite).unwrap_or(0.0))
        },
        kept! {
            "multires_noise_iterations", values "0 …", default "0", before "0",
            "Adds noise of so many coarser and coarser resolutions (6 to 10 are usual), so that large areas of light and dark are learned; each picture's noise has unit variance afterwards. Instead of `noise_offset`.",
            |given| Setting::Whole(given.count_to(0, 64).unwrap_or(0))
        },
        kept! {
            "multires_noise_discount", values "0 … 1", default "0.3", before "0.3",
            "How strong each of these is beside the one before.",
            |given| Setting::Number(given.share().unwrap_or(0.3))
        },
        kept! {
            "ip_noise_gamma", values "0 …", default "0", before "0.0",
            "Perturbs what the network is shown by so much further noise that is not in the target (0.1 in the paper, arXiv 2301.11706), which makes up for errors that add up while pictures are drawn.",
            |given| Setting::Number(given.not_negative().unwrap_or(0.0))
        },
        kept! {
            "ip_noise_gamma_random_strength", values "true/false", default "false", before "false",
            "That strength is drawn anew for each picture of a step, from 0 to `ip_noise_gamma`.",
            |given| Setting::Switch(given.boolean(false))
        },
    ],
};

/// What a difference between answer and target counts.
pub static DIFFERENCE: Group = Group {
    section: "Pictures and captions",
    behind: Some("ip_noise_gamma_random_strength"),
    keys: &[
        kept! {
            "loss_type", values "l2, l1, huber, smooth_l1", default "\"l2\"", before "l2",
            "The loss of a difference d from the target: d²; |d|; 2c(√(d² + c²) − c), which outliers pull at less; the same over c. Held-out loss is measured likewise.",
            |given| text_of(given, &["l2", "l1", "huber", "smooth_l1"]).unwrap_or_else(|| Setting::Text("l2".into()))
        },
        kept! {
            "huber_schedule", values "constant, snr, exponential", default "snr; bases that are trained by flow matching: constant", before "none",
            "What c of `huber` and `smooth_l1` follows: huber_c·huber_scale; (1 − huber_c)/(1 + σ)² + huber_c with σ = √((1 − ᾱ)/ᾱ) of the timestep; huber_c^(t/1000)·huber_scale.",
            |given| text_of(given, &["constant", "snr", "exponential"]).unwrap_or(Setting::Nothing)
        },
        kept! {
            "huber_c", values "above 0", default "0.1", before "0.1",
            "The threshold of `huber` and `smooth_l1`, above which differences count by themselves and not by their squares.",
            |given| Setting::Number(given.positive().unwrap_or(0.1))
        },
        kept! {
            "huber_scale", values "above 0", default "1", before "1.0",
            "What the threshold is multiplied by, but for `snr`.",
            |given| Setting::Number(given.positive().unwrap_or(1.0))
        },
    ],
};

fn sampling(given: &mut Given<'_>) -> Setting {
    let names = ["uniform", "sigmoid", "shift", "flux_shift", "logit_normal", "mode"];
    text_of(given, &names).unwrap_or(Setting::Nothing)
}

fn thousandths(given: &mut Given<'_>) -> Option<f64> {
    given.number("a number from 0 to 1000", |number| (0.0..=1000.0).contains(&number))
}

/// One of these names.
fn text_of(given: &mut Given<'_>, names: &[&'static str]) -> Option<Setting> {
    let names: Vec<(&str, &'static str)> = names.iter().map(|name| (*name, *name)).collect();
    given.choice(&names).map(|name| Setting::Text(name.to_owned()))
}
