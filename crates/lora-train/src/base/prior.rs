//! Prior preservation without pictures: what the base itself answers, its adapter off, is a target beside the
//! pictures'. Each micro-batch is noised once; the network is asked what it answers there to other captions, with its
//! adapter and without, and the mean square between the two is added to the loss. Bases of noise and of velocities
//! share it: an answer is an answer.
//!
//! | key | where the base's answer is kept |
//! |---|---|
//! | `prior_prompt` | for each picture's caption with this class in the place of its trigger word, or for the class alone |
//! | `prior_blank_weight` | for the empty caption |
//! | `prior_mask_weight` | for the picture's own caption, outside its mask |
//!
//! The first two are ai-toolkit's differential output preservation and blank prompt preservation, the third is
//! OneTrainer's masked prior preservation.

use lora_data::caption::trigger;
use lora_models::layers::Pass;
use lora_torch::tch::{Kind, Tensor, no_grad_guard};

use super::{Inputs, Item};
use crate::Result;
use crate::config::TrainConfig;
use crate::difference::{LossType, Target};

/// What is told of each step.
const FIGURES: &[&str] = &["prior_loss"];

/// A network's answer on the noised latents of a micro-batch: what of it depends on the caption comes from these
/// inputs.
pub(super) type Answer<'a> = dyn Fn(&Inputs, &Pass) -> Result<Tensor> + 'a;

/// A caption that is asked beside an item's own.
#[derive(Debug, Clone)]
enum Asked {
    /// The item's with the class in the place of the trigger word that it has; the class alone where it has none.
    Class { class: String, triggers: Vec<String> },
    /// The empty one.
    Blank,
}

impl Asked {
    fn of(&self, caption: &str) -> String {
        let Self::Class { class, triggers } = self else { return String::new() };
        let word = triggers.iter().filter(|word| trigger::has(caption, word)).max_by_key(|word| word.len());
        let Some(word) = word else { return class.clone() };
        let replaced = trigger::replaced(caption, word, class);
        // Where nothing takes the word's place, what divided it from the rest goes too.
        if class.is_empty() { replaced.trim_matches([',', ' ']).to_owned() } else { replaced }
    }
}

/// How much each place counts that the mask leaves out, `[batch, 1, height, width]`.
const OUTSIDE: &str = "outside_mask";

/// Whose answers are kept, and how much that counts.
#[derive(Debug, Default)]
pub(super) struct Prior {
    /// Captions, by the names of their tensors' group, with their weights.
    prompts: Vec<(&'static str, Asked, f64)>,
    /// The weight of places that a picture's mask leaves out.
    outside_mask: f64,
}

impl Prior {
    /// What a configuration asks for.
    pub(super) fn of(config: &TrainConfig) -> Self {
        let words = config.datasets.iter().map(|dataset| dataset.captions.trigger_word.clone());
        let triggers: Vec<String> = words.filter(|word| !word.is_empty()).collect();
        let prompt = config.prior_prompt.clone().map(|class| Asked::Class { class, triggers });
        let prompt = prompt.map(|asked| ("prior_prompt", asked, config.prior_prompt_weight));
        let blank = Some(("prior_blank", Asked::Blank, config.prior_blank_weight));
        let prompts = prompt.into_iter().chain(blank).filter(|(.., weight)| *weight > 0.0);
        Self { prompts: prompts.collect(), outside_mask: config.prior_mask_weight }
    }

    fn is_on(&self) -> bool {
        !self.prompts.is_empty() || self.outside_mask > 0.0
    }

    /// As [`super::Base::captions`].
    pub(super) fn captions(&self, caption: &str) -> Vec<String> {
        self.prompts.iter().map(|(_, asked, _)| asked.of(caption)).collect()
    }

    /// As [`super::Base::figures`].
    pub(super) fn figures(&self) -> &'static [&'static str] {
        if self.is_on() { FIGURES } else { &[] }
    }

    /// Adds the tensors of these captions, one of each for each item, as `captions` lays them out, and the places that
    /// the items' masks leave out, where the answer there is kept.
    pub(super) fn beside(
        &self,
        mut inputs: Inputs,
        items: &[Item],
        captions: impl Fn(&[Item]) -> Result<Inputs>,
    ) -> Result<Inputs> {
        for (group, asked, _) in &self.prompts {
            let asked: Vec<Item> = items.iter().map(|item| item.asked(&asked.of(&item.caption))).collect();
            inputs = inputs.beside(group, captions(&asked)?);
        }
        if self.outside_mask > 0.0 {
            let outside = inputs.find("mask").map(|mask| mask.f_neg()?.f_add_scalar(1.0)).transpose()?;
            inputs = inputs.with(OUTSIDE, outside);
        }
        Ok(inputs)
    }

    /// The loss `own` of the answer to the items' own captions, with what is kept of the base's answers; where there is
    /// anything to keep, `[2]`, the sum and [`FIGURES`]. Items count as they do in the loss (`factors`), masks do not.
    /// Inputs without such captions, by which items are judged, have the loss alone.
    pub(super) fn loss(
        &self,
        inputs: &Inputs,
        pass: &Pass,
        answer: &Answer<'_>,
        own: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        if !self.is_on() {
            return own(&answer(inputs, pass)?);
        }
        // What the base answers comes first: beside what a backward pass keeps it would have no room.
        let outside = inputs.find(OUTSIDE);
        let there = outside.map(|_| of_base(answer, inputs)).transpose()?;
        let asked = self.prompts.iter().filter_map(|(group, _, weight)| Some((inputs.part(group)?, *weight)));
        let asked = asked.map(|(part, weight)| Ok((of_base(answer, &part)?, part, weight)));
        let asked = asked.collect::<Result<Vec<_>>>()?;

        let answered = answer(inputs, pass)?;
        let loss = own(&answered)?;
        let mut kept = loss.f_zeros_like()?;
        if let (Some(outside), Some(there)) = (outside, &there) {
            let part = mean_square(&answered, there, Some(outside), inputs)?;
            kept = kept.f_add(&part.f_mul_scalar(self.outside_mask)?)?;
        }
        for (base, part, weight) in &asked {
            let part = mean_square(&answer(part, pass)?, base, None, inputs)?;
            kept = kept.f_add(&part.f_mul_scalar(*weight)?)?;
        }
        Ok(Tensor::f_stack(&[loss.f_add(&kept)?, kept.f_detach()?], 0)?.f_to_kind(Kind::Float)?)
    }
}

/// Mean over the batch of each item's mean square between two answers. Items count as `inputs` say, places as the mask.
pub(super) fn mean_square(answer: &Tensor, base: &Tensor, mask: Option<&Tensor>, inputs: &Inputs) -> Result<Tensor> {
    let own = |tensor: Option<&Tensor>| tensor.map(Tensor::shallow_clone);
    let target = Inputs::default()
        .with("target", own(Some(base)))
        .with("mask", own(mask))
        .with("factors", own(inputs.find("factors")));
    Target::of(&target, LossType::L2)?.mean_loss(answer)
}

/// What the base answers without its adapter and without gradients.
pub(super) fn of_base(answer: &Answer<'_>, inputs: &Inputs) -> Result<Tensor> {
    let _guard = no_grad_guard();
    answer(inputs, &Pass { without_adapters: true, ..Pass::default() })
}

/// What an adapter's file says of it.
pub(super) fn record(config: &TrainConfig) -> Vec<(&'static str, String)> {
    let prompt = config.prior_prompt.as_ref().map(|prompt| ("lora_prior_prompt", prompt.clone()));
    let prompt_weight = config.prior_prompt.as_ref().map(|_| ("lora_prior_prompt_weight", config.prior_prompt_weight));
    let weights = [
        prompt_weight,
        Some(("lora_prior_blank_weight", config.prior_blank_weight)),
        Some(("lora_prior_mask_weight", config.prior_mask_weight)),
    ];
    let weights = weights.into_iter().flatten().filter(|(_, weight)| *weight > 0.0);
    prompt.into_iter().chain(weights.map(|(key, weight)| (key, weight.to_string()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_class_takes_the_place_of_the_trigger_word_or_stands_alone() {
        let triggers = || ["ink", "ink style"].map(str::to_owned).to_vec();
        let asked = |class: &str, caption: &str| Asked::Class { class: class.into(), triggers: triggers() }.of(caption);
        assert_eq!(asked("drawing", "ink style, a bear"), "drawing, a bear");
        assert_eq!(asked("drawing", "a bear in ink"), "a bear in drawing");
        assert_eq!(asked("drawing", "a bear"), "drawing");
        assert_eq!(asked("drawing", "a pink bear in ink"), "a pink bear in drawing");
        assert_eq!((asked("", "ink, a bear"), asked("", "")), ("a bear".to_owned(), String::new()));
        assert_eq!(Asked::Blank.of("ink, a bear"), "");
    }
}
