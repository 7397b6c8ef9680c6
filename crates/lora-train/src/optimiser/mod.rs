//! Optimisers: the formulas, one a file, and what they share. An optimiser keeps a few tensors for each trained tensor
//! ([`StatePart`]) and a few numbers of its own; [`OptimiserState`] holds them by name, saves and loads them. Which one a run
//! uses is a name in the configuration ([`OptimiserRegistry`]).
//!
//! Steps work on lists of tensors ([`lora_torch::foreach`]), never on one number of the device at a time: at most one wait
//! for the device a step, and only where the formula needs one (Prodigy).

mod adafactor;
mod adamw;
mod adamw8bit;
mod came;
mod dynamic_map;
mod lion;
mod muon;
mod prodigy;
mod registry;
mod schedule_free;
mod settings;
mod stable_adamw;
mod state;

pub(crate) use adafactor::Adafactor;
pub(crate) use adamw::AdamW;
pub(crate) use adamw8bit::AdamW8bit;
pub(crate) use came::Came;
pub(crate) use lion::Lion;
pub(crate) use muon::Muon;
pub(crate) use prodigy::Prodigy;
pub use registry::{Chosen, OptimiserRegistry};
pub(crate) use schedule_free::ScheduleFreeAdamW;
pub use settings::{Arguments, Settings};
pub(crate) use stable_adamw::StableAdamW;
pub use state::{OptimiserState, Slope};

use std::collections::BTreeMap;
use std::fmt;

use lora_torch::tch::{Kind, Tensor};

use crate::Result;

/// Most elements that a step holds temporary copies of at once, so that they stay small beside the state.
const WORKING_SET: usize = 1 << 20;

/// One formula. Trained tensors, gradients and what is kept are f32 unless a [`StatePart`] says otherwise.
pub trait Optimiser: fmt::Debug {
    /// What is kept for a tensor of a shape. Names are stable: files hold them.
    fn parts(&self, shape: &[i64]) -> Vec<StatePart>;

    /// Takes a step with all tensors that have a gradient. Gradients may be overwritten.
    ///
    /// # Errors
    /// Where memory runs out. Some tensors may have taken the step then.
    fn step(&mut self, entries: &[Entry<'_>]) -> Result<()>;

    /// Numbers kept besides the tensors, by stable names.
    fn numbers(&self) -> Vec<(&'static str, f64)> {
        Vec::new()
    }

    /// Puts back numbers that [`Optimiser::numbers`] gave, in its order.
    fn set_numbers(&mut self, values: &[f64]) {
        let _ = values;
    }

    /// Whether the weights to save and to sample with are others than those that train (see [`Optimiser::evaluation`]).
    fn evaluates_elsewhere(&self) -> bool {
        false
    }

    /// The weights to save and to sample with, where they are others than those that train.
    ///
    /// # Errors
    /// Where memory runs out.
    fn evaluation(&self, parameter: &Tensor, state: &[Tensor]) -> Result<Option<Tensor>> {
        let _ = (parameter, state);
        Ok(None)
    }

    /// What the learning rate is multiplied with, where the optimiser finds that itself.
    fn rate_factor(&self) -> f64 {
        1.0
    }

    /// What to know before the first step, for a learning rate: advice, at most a line each.
    fn notes(&self, learning_rate: f64) -> Vec<String> {
        let _ = learning_rate;
        Vec::new()
    }

    /// Bytes kept for a tensor of a shape, at most: a part that turns out to be all zeros may take none.
    fn state_bytes(&self, shape: &[i64]) -> usize {
        self.parts(shape).iter().map(StatePart::bytes).sum()
    }
}

/// A tensor that an optimiser keeps for a trained one.
#[derive(Debug, Clone, PartialEq)]
pub struct StatePart {
    /// Its name after that of the trained tensor, as in `<tensor>.mean`.
    pub name: &'static str,
    /// Its shape.
    pub shape: Vec<i64>,
    /// Its number type.
    pub kind: Kind,
    /// What it begins with.
    pub first: First,
}

/// What a kept tensor begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum First {
    /// Zeros.
    Zeros,
    /// A copy of the trained tensor.
    Copy,
    /// Every so many-th element of the trained tensor, flat; a single zero where all of them are zero.
    Sample(usize),
}

impl StatePart {
    /// Zeros in f32.
    pub fn zeros(name: &'static str, shape: &[i64]) -> Self {
        Self { name, shape: shape.to_vec(), kind: Kind::Float, first: First::Zeros }
    }

    /// Bytes of its elements.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<i64>() as usize * self.kind.elt_size_in_bytes()
    }
}

/// One trained tensor at a step.
#[derive(Debug)]
pub struct Entry<'a> {
    /// The tensor, detached; changed in place.
    pub parameter: &'a Tensor,
    /// Its gradient.
    pub gradient: &'a Tensor,
    /// What is kept for it, in the order of [`Optimiser::parts`]; changed in place.
    pub state: &'a [Tensor],
    /// Steps that it has taken, this one included.
    pub steps: u64,
    /// Its learning rate.
    pub learning_rate: f64,
}

/// Entries of one learning rate and number of steps, as lists of at most `elements` numbers (or one tensor).
fn batches<'e, 'a>(entries: &'e [Entry<'a>], elements: usize) -> Vec<Batch<'e, 'a>> {
    batches_by(entries, elements, |_| ())
}

/// As [`batches`], and of one `key` too.
fn batches_by<'e, 'a, K: Ord>(
    entries: &'e [Entry<'a>],
    elements: usize,
    key: impl Fn(&Entry<'_>) -> K,
) -> Vec<Batch<'e, 'a>> {
    type Lists<'e, 'a> = Vec<(usize, Vec<&'e Entry<'a>>)>;
    let mut groups: BTreeMap<(u64, u64, K), Lists<'e, 'a>> = BTreeMap::new();
    for entry in entries {
        let lists = groups.entry((entry.learning_rate.to_bits(), entry.steps, key(entry))).or_default();
        let size = entry.parameter.numel();
        match lists.last_mut() {
            Some((total, list)) if *total + size <= elements => {
                *total += size;
                list.push(entry);
            }
            _ => lists.push((size, vec![entry])),
        }
    }
    groups.into_values().flatten().map(|(_, entries)| Batch { entries }).collect()
}

/// Entries that take the same step.
struct Batch<'e, 'a> {
    /// Never empty.
    entries: Vec<&'e Entry<'a>>,
}

impl<'a> Batch<'_, 'a> {
    fn learning_rate(&self) -> f64 {
        self.entries[0].learning_rate
    }

    fn steps(&self) -> u64 {
        self.entries[0].steps
    }

    fn parameters(&self) -> Vec<&'a Tensor> {
        self.entries.iter().map(|entry| entry.parameter).collect()
    }

    fn gradients(&self) -> Vec<&'a Tensor> {
        self.entries.iter().map(|entry| entry.gradient).collect()
    }

    /// What is kept at a place in [`Optimiser::parts`].
    fn state(&self, part: usize) -> Vec<&'a Tensor> {
        self.entries.iter().map(|entry| &entry.state[part]).collect()
    }
}

/// 1 − βᵗ.
fn bias_correction(beta: f64, steps: u64) -> f64 {
    1.0 - beta.powi(steps.min(i32::MAX as u64) as i32)
}
