//! Concept sliders (Gandikota et al., "Concept Sliders: LoRA Adaptors for Precise Control in Diffusion Models", 2023): what is
//! learned of prompts alone. Latents are denoised from noise to the drawn timestep, by the base with the adapter as it is then;
//! there the base says, its adapter off, what the target prompt, the positive and the negative one mean. The adapter learns to
//! answer the target prompt with
//!
//! `base(target) ± guidance · (base(positive) − base(negative))`
//!
//! at a strength of ±1, both at once. Bases of noise and of velocities share it: an answer is an answer.
//!
//! | of | as published | here |
//! |---|---|---|
//! | which end | the paper's program learns +1 and leaves −1 to follow | both are learned, so that both ends are held |
//! | on the way to the latents | the adapter acts at +1 | at +1 or −1, drawn for each visit |

use lora_data::sliders::Contrast;
use lora_data::source::Example;
use lora_models::layers::Pass;
use lora_torch::dry;
use lora_torch::tch::{Device, Kind, Tensor};
use lora_torch::tensor::from_f32;

use super::prior::{Answer, mean_square, of_base};
use super::{Inputs, Item};
use crate::config::TrainConfig;
use crate::difference::numbers;
use crate::{Error, Result};

/// The groups of the prompts that are asked beside an item's own.
const POSITIVE: &str = "positive";
const NEGATIVE: &str = "negative";

/// How many times the difference of these, `[batch, 1, 1, 1]`.
const TIMES: &str = "slider_guidance";

/// What the sliders of a run ask for.
#[derive(Debug)]
pub(super) struct Slider {
    contrasts: Vec<Contrast>,
    /// Whether some count more than others.
    weighted: bool,
    /// Steps of the whole way from noise to data.
    steps: usize,
    /// Guidance on that way.
    pub(super) guidance: f64,
}

impl Slider {
    /// What a configuration asks for; nothing without sliders.
    pub(super) fn of(config: &TrainConfig) -> Option<Self> {
        let size = *config.slider_sizes().first()?;
        let contrasts: Vec<Contrast> = config.sliders.iter().flat_map(|slider| slider.contrasts(size)).collect();
        let weighted = config.sliders.iter().any(|slider| slider.weight != 1.0);
        let (steps, guidance) = (config.slider_steps, config.slider_sample_guidance);
        (!contrasts.is_empty()).then_some(Self { contrasts, weighted, steps, guidance })
    }

    /// As [`super::Base::captions`]: what any slider of a target asks beside it, and the empty caption of guidance.
    pub(super) fn captions(&self, caption: &str) -> Vec<String> {
        let own = self.contrasts.iter().filter(|own| own.target == caption);
        let asked = own.flat_map(|own| [own.positive.clone(), own.negative.clone()]);
        let mut all: Vec<String> = asked.chain([String::new()]).collect();
        all.sort();
        all.dedup();
        all
    }

    /// Width and height of a micro-batch in pixels.
    pub(super) fn size(&self, items: &[Item]) -> Result<(usize, usize)> {
        items.first().map_or_else(|| Err(missing()), |item| Ok(contrast(item)?.size))
    }

    /// Steps of the whole way. A dry run takes few: all take the same memory.
    pub(super) fn steps(&self, device: Device) -> usize {
        if dry::is_dry(device) { self.steps.min(2) } else { self.steps }
    }

    /// How the network answers on an item's way: the adapter acts to either side, as it is trained to both.
    pub(super) fn way(&self, item: &Item) -> Pass {
        let reversed = item.draw.at("slider_strength").uniform() < 0.5;
        Pass { reversed, ..Pass::default() }
    }

    /// Adds the tensors of the prompts that items are held against, as `captions` lays them out.
    pub(super) fn beside(
        &self,
        inputs: Inputs,
        items: &[Item],
        captions: impl Fn(&[Item]) -> Result<Inputs>,
    ) -> Result<Inputs> {
        let contrasts = items.iter().map(contrast).collect::<Result<Vec<_>>>()?;
        let asked = |prompt: fn(&Contrast) -> &str| -> Result<Inputs> {
            let asked = items.iter().zip(&contrasts).map(|(item, own)| item.asked(prompt(own)));
            captions(&asked.collect::<Vec<_>>())
        };
        let device = inputs.get("noised")?.device();
        let times: Vec<f32> = contrasts.iter().map(|own| own.guidance_scale as f32).collect();
        let weights: Vec<f64> = items.iter().map(|item| item.weight).collect();
        let factors = self.weighted.then(|| numbers(&weights, device)).transpose()?;
        Ok(inputs
            .beside(POSITIVE, asked(|own| &own.positive)?)
            .beside(NEGATIVE, asked(|own| &own.negative)?)
            .with(TIMES, Some(from_f32(&times, &[times.len(), 1, 1, 1], device)?))
            .with("factors", factors))
    }

    /// The mean over both strengths of each item's mean square from what is wished there.
    pub(super) fn loss(&self, inputs: &Inputs, pass: &Pass, answer: &Answer<'_>) -> Result<Tensor> {
        // What the base answers comes first: beside what a backward pass keeps it would have no room.
        let base = |inputs: &Inputs| Ok::<_, Error>(of_base(answer, inputs)?.f_to_kind(Kind::Float)?);
        let asked = |group| base(&inputs.part(group).ok_or_else(missing)?);
        let change = asked(POSITIVE)?.f_sub(&asked(NEGATIVE)?)?.f_mul(inputs.get(TIMES)?)?;
        let plain = base(inputs)?;
        let wished = [plain.f_add(&change)?, plain.f_sub(&change)?];
        drop((plain, change));
        let [towards, away] = [false, true].map(|reversed| {
            let pass = Pass { reversed, ..pass.clone() };
            mean_square(&answer(inputs, &pass)?, &wished[usize::from(reversed)], None, inputs)
        });
        Ok(towards?.f_add(&away?)?.f_mul_scalar(0.5)?.f_to_kind(Kind::Float)?)
    }
}

/// What an item without prompts lacks.
fn missing() -> Error {
    Error::MissingInput { name: "the prompts of a slider" }
}

fn contrast(item: &Item) -> Result<&Contrast> {
    match &item.example {
        Some(Example::Contrast(own)) => Ok(own),
        _ => Err(missing()),
    }
}

/// What an adapter's file says of it.
pub(super) fn record(config: &TrainConfig) -> Option<(&'static str, String)> {
    let sliders = (!config.sliders.is_empty()).then(|| serde_json::to_string(&config.sliders).ok());
    sliders.flatten().map(|text| ("lora_sliders", text))
}
