//! Rotary positions (Su et al., "RoFormer", 2021, arXiv:2104.09864) and the ways in which models stretch them to longer
//! texts, as transformers computes them. Angles are in f32 whatever the compute dtype; the turning is in that dtype,
//! where a family does not say otherwise.

use lora_torch::rotary::{RotaryLayout, rotary};
use lora_torch::tch::{Device, Kind, Tensor};
use lora_torch::tensor::from_f32;

use super::keys::Reader;
use crate::Result;

/// The rotary positions of some of a decoder's layers.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Rope {
    /// Radians a position by pair of features; the first features of a head turn, twice as many as there are pairs.
    pub frequencies: Vec<f64>,
    /// Those of documents that are longer than the length that the model was first trained on, and this length.
    pub long: Option<(Vec<f64>, usize)>,
    /// What cosine and sine are multiplied by.
    pub factor: f64,
    /// Which features turn together.
    pub layout: RotaryLayout,
    /// Heads turn in f32 whatever the compute dtype, as OLMo's.
    pub in_f32: bool,
}

/// What of a configuration decides about rotary positions besides their parameters.
#[derive(Debug, Clone, Copy)]
pub(super) struct RopeDefaults {
    /// The base of the wavelengths where the file names none.
    pub(super) theta: f64,
    /// The share of a head that turns where the file names none.
    pub(super) share: f64,
    pub(super) layout: RotaryLayout,
    pub(super) in_f32: bool,
    /// A scaling that is longrope whatever it calls itself: early files of Phi do.
    pub(super) always_longrope: bool,
}

impl Rope {
    /// Of heads of this width, out of a configuration's rotary parameters.
    ///
    /// # Errors
    /// If a parameter is missing or of another kind, or the scaling is none that is known here.
    pub(super) fn read(parameters: &Reader<'_>, top: &Reader<'_>, head: usize, defaults: RopeDefaults) -> Result<Self> {
        let either = |key: &str| -> Result<Option<f64>> { Ok(parameters.real(key)?.or(top.real(key)?)) };
        let theta = either("rope_theta")?.unwrap_or(defaults.theta);
        let share = either("partial_rotary_factor")?.unwrap_or(defaults.share);
        let kind = parameters.text("rope_type")?.or(parameters.text("type")?).unwrap_or("default");
        // Of text all axes of a position are the same number.
        let kind = if kind == "mrope" { "default" } else { kind };
        let kind = if defaults.always_longrope && matches!(kind, "su" | "yarn") { "longrope" } else { kind };
        let width = ((head as f64 * share) as usize).min(head);
        let plain = |over: usize, pairs: usize| -> Vec<f64> {
            (0..pairs).map(|pair| theta.powf(-2.0 * pair as f64 / over as f64)).collect()
        };
        let RopeDefaults { layout, in_f32, .. } = defaults;
        let rope = |frequencies: Vec<f64>| Self { frequencies, long: None, factor: 1.0, layout, in_f32 };
        let stretch = || parameters.needed_real("factor");
        // Phi has it at the top of the file, some files nowhere.
        let original = || -> Result<f64> {
            let key = "original_max_position_embeddings";
            either(key)?.map_or_else(|| top.needed_real("max_position_embeddings"), Ok)
        };
        let frequencies = plain(width, width / 2);
        match kind {
            "default" => Ok(rope(frequencies)),
            "linear" => {
                let factor = stretch()?;
                Ok(rope(frequencies.into_iter().map(|own| own / factor).collect()))
            }
            "llama3" => {
                let (factor, original) = (stretch()?, original()?);
                let low = parameters.needed_real("low_freq_factor")?;
                let high = parameters.needed_real("high_freq_factor")?;
                Ok(rope(frequencies.into_iter().map(|own| llama3(own, factor, low, high, original)).collect()))
            }
            "yarn" => {
                let original = original()?;
                let most = || -> Result<f64> { Ok(top.needed_real("max_position_embeddings")? / original) };
                let factor = parameters.real("factor")?.map_or_else(most, Ok)?;
                let scaled = yarn(parameters, &frequencies, theta, factor, original)?;
                Ok(Self { factor: yarn_factor(parameters, factor)?, ..rope(scaled) })
            }
            "longrope" => {
                let original = original()?;
                let most = || -> Result<f64> { Ok(top.needed_real("max_position_embeddings")? / original) };
                let factor = parameters.real("factor")?.map_or_else(most, Ok)?;
                let own = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
                let divided = |key: &str| -> Result<Vec<f64>> {
                    let divisors = parameters.reals(key, frequencies.len())?;
                    Ok(frequencies.iter().zip(divisors).map(|(own, divisor)| own / divisor).collect())
                };
                Ok(Self {
                    long: Some((divided("long_factor")?, original as usize)),
                    factor: parameters.real("attention_factor")?.unwrap_or(own),
                    ..rope(divided("short_factor")?)
                })
            }
            // The wavelengths are those of the whole head; the pairs beyond the share stand still.
            "proportional" => {
                let turned = (share * head as f64 / 2.0) as usize;
                let factor = parameters.real("factor")?.unwrap_or(1.0);
                let mut frequencies: Vec<f64> = plain(head, turned).into_iter().map(|own| own / factor).collect();
                frequencies.resize(head / 2, 0.0);
                Ok(rope(frequencies))
            }
            other => Err(parameters.wrong(format!(
                "rope_type is `{other}`; known here are default, linear, llama3, yarn, longrope and proportional"
            ))),
        }
    }
}

/// Llama 3's scaling of one frequency: by wavelength not at all, by the factor, or in between.
fn llama3(frequency: f64, factor: f64, low: f64, high: f64, original: f64) -> f64 {
    let wavelength = std::f64::consts::TAU / frequency;
    if wavelength < original / high {
        frequency
    } else if wavelength > original / low {
        frequency / factor
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

/// YaRN's frequencies (Peng et al., 2023, arXiv:2309.00071): a ramp from those as they are to those divided.
fn yarn(parameters: &Reader<'_>, plain: &[f64], theta: f64, factor: f64, original: f64) -> Result<Vec<f64>> {
    let width = 2.0 * plain.len() as f64;
    let turns = |key: &str, default: f64| -> Result<f64> {
        let number = parameters.real(key)?.filter(|number| *number != 0.0).unwrap_or(default);
        Ok(width * (original / (number * std::f64::consts::TAU)).ln() / (2.0 * theta.ln()))
    };
    let (mut low, mut high) = (turns("beta_fast", 32.0)?, turns("beta_slow", 1.0)?);
    if parameters.flag("truncate")?.unwrap_or(true) {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(width - 1.0));
    if low == high {
        high += 0.001;
    }
    let scaled = plain.iter().enumerate().map(|(pair, own)| {
        let divided = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
        own / factor * divided + own * (1.0 - divided)
    });
    Ok(scaled.collect())
}

/// What YaRN multiplies cosine and sine by.
fn yarn_factor(parameters: &Reader<'_>, factor: f64) -> Result<f64> {
    if let Some(own) = parameters.real("attention_factor")? {
        return Ok(own);
    }
    let scale = |by: f64| if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 };
    let nonzero = |key: &str| -> Result<Option<f64>> { Ok(parameters.real(key)?.filter(|number| *number != 0.0)) };
    Ok(match (nonzero("mscale")?, nonzero("mscale_all_dim")?) {
        (Some(one), Some(all)) => scale(one) / scale(all),
        _ => scale(1.0),
    })
}

/// The frequencies of a [`Rope`] on the device.
#[derive(Debug)]
pub(super) struct Frequencies {
    /// `[pairs]`, f32.
    plain: Tensor,
    long: Option<(Tensor, i64)>,
    factor: f64,
    layout: RotaryLayout,
    /// The dtype that heads turn in.
    kind: Kind,
}

/// Cosines and sines of a batch's positions, `[batch, tokens, pairs]`, in the dtype that heads turn in.
#[derive(Debug)]
pub(super) struct Tables {
    cos: Tensor,
    sin: Tensor,
    layout: RotaryLayout,
}

impl Frequencies {
    /// `kind` is what the decoder computes in.
    pub(super) fn new(rope: &Rope, kind: Kind, device: Device) -> Result<Self> {
        let on_device = |values: &[f64]| {
            let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
            from_f32(&values, &[values.len()], device)
        };
        let long = rope.long.as_ref().map(|(values, from)| Ok::<_, crate::Error>((on_device(values)?, *from as i64)));
        Ok(Self {
            plain: on_device(&rope.frequencies)?,
            long: long.transpose()?,
            factor: rope.factor,
            layout: rope.layout,
            kind: if rope.in_f32 { Kind::Float } else { kind },
        })
    }

    /// Tables of `positions` `[batch, tokens]`. `lengths`, of the same shape or one that broadcasts to it, is the length
    /// of each token's document: a document that is longer than the model was first trained on has the long frequencies
    /// for all its tokens, whatever lies beside it.
    pub(super) fn tables(&self, positions: &Tensor, lengths: &Tensor) -> Result<Tables> {
        let positions = positions.f_unsqueeze(-1)?.f_to_kind(Kind::Float)?;
        let angles = match &self.long {
            None => positions.f_mul(&self.plain)?,
            Some((long, from)) => {
                let is_long = lengths.f_gt(*from)?.f_unsqueeze(-1)?;
                positions.f_mul(long)?.f_where_self(&is_long, &positions.f_mul(&self.plain)?)?
            }
        };
        let scaled = |table: Tensor| if self.factor == 1.0 { Ok(table) } else { table.f_mul_scalar(self.factor) };
        let cast = |table: Tensor| scaled(table)?.f_to_kind(self.kind);
        Ok(Tables { cos: cast(angles.f_cos()?)?, sin: cast(angles.f_sin()?)?, layout: self.layout })
    }

    /// Whether documents' lengths matter.
    pub(super) fn depends_on_lengths(&self) -> bool {
        self.long.is_some()
    }
}

impl Tables {
    /// The first features of `[batch, heads, tokens, head]` turned, the others as they are; in the same dtype.
    pub(super) fn turn(&self, input: &Tensor) -> Result<Tensor> {
        // The dtype of the tables is the one to turn in.
        let turned = rotary(&input.f_to_kind(self.cos.kind())?, &self.cos, &self.sin, self.layout)?;
        Ok(turned.f_to_kind(input.kind())?)
    }
}
