//! The numbers that a run trains, whatever they belong to: f32 leaves of libtorch's graph with the optimiser's state and,
//! where asked for, a running average. What they are for, an adapter's factors or a network's own weights, is said by
//! `trainable` and `whole`.

use std::collections::BTreeMap;

use lora_core::Component;
use lora_torch::foreach;
use lora_torch::gradients::{self, Settled};
use lora_torch::tch::{Device, Kind, Tensor, no_grad_guard};

use crate::meter::MemoryPart;
use crate::optimiser::{OptimiserState, Slope};
use crate::{Error, Result};

/// One trained tensor.
#[derive(Debug)]
pub struct Parameter {
    /// The network that it belongs to.
    pub component: Component,
    /// Its name, one of a kind in the run.
    pub name: String,
    /// Whether it is an adapter's up-projection (LoRA+ trains those faster).
    pub is_up: bool,
    /// Its learning rate before the schedule, where it has another than its network's.
    pub rate: Option<f64>,
    leaf: Tensor,
    /// A copy in half precision that networks compute with in the leaf's place; the leaf itself is then no part of a graph.
    copy: Option<Tensor>,
    /// The running average; for an optimiser that saves others than it trains, what the leaf is exchanged with, while it is.
    average: Option<Tensor>,
}

impl Parameter {
    /// L2 norm; waits for the device.
    ///
    /// # Errors
    /// Where the device is lost.
    pub fn norm(&self) -> Result<f64> {
        Ok(f64::try_from(self.leaf.detach().f_norm()?)?)
    }
}

/// All trained tensors of a run, in f32, with their optimiser.
#[derive(Debug)]
pub struct ParameterList {
    list: Vec<Parameter>,
    optimiser: OptimiserState,
    /// Decay of the running average; 0 where there is none.
    decay: f64,
    averaged_steps: i32,
}

impl ParameterList {
    /// An empty list. The tensors' running average decays by `ema_decay` a step; 0 for none.
    pub fn new(optimiser: OptimiserState, ema_decay: f64) -> Self {
        Self { list: Vec::new(), optimiser, decay: ema_decay, averaged_steps: 0 }
    }

    /// Adds a leaf that requires gradients.
    ///
    /// # Errors
    /// Where there is no memory for what the optimiser keeps of it.
    pub fn add(&mut self, component: Component, name: String, is_up: bool, leaf: &Tensor) -> Result<()> {
        self.push(component, name, is_up, leaf.shallow_clone(), None)
    }

    /// Adds an f32 tensor that a network computes with in half precision, and gives the leaf for that: a copy, which the list
    /// keeps in step. One cast for all after each step takes the place of one for each tensor in each pass.
    pub(crate) fn add_in(
        &mut self,
        kind: Kind,
        component: Component,
        name: String,
        is_up: bool,
        values: &Tensor,
    ) -> Result<Tensor> {
        let copy = values.detach().f_to_kind(kind)?.f_set_requires_grad(true)?;
        self.push(component, name, is_up, values.detach(), Some(copy.shallow_clone()))?;
        Ok(copy)
    }

    fn push(
        &mut self,
        component: Component,
        name: String,
        is_up: bool,
        leaf: Tensor,
        copy: Option<Tensor>,
    ) -> Result<()> {
        let _label = MemoryPart::Optimiser.label();
        self.optimiser.register(&[(&name, &leaf)])?;
        let average = (self.decay > 0.0).then(|| leaf.detach().f_detach_copy()).transpose()?;
        self.list.push(Parameter { component, name, is_up, rate: None, leaf, copy, average });
        Ok(())
    }

    /// The optimiser and what it keeps.
    pub(crate) fn optimiser(&self) -> &OptimiserState {
        &self.optimiser
    }

    /// The tensors, in the order in which they were added.
    pub fn iter(&self) -> impl Iterator<Item = &Parameter> {
        self.list.iter()
    }

    /// The trained tensors themselves, whose gradients steps are taken by.
    pub(crate) fn leaves(&self) -> impl Iterator<Item = &Tensor> {
        self.list.iter().map(|parameter| &parameter.leaf)
    }

    /// Number of trained numbers.
    pub fn elements(&self) -> usize {
        self.list.iter().map(|parameter| parameter.leaf.numel()).sum()
    }

    /// The gradients that the last backward passes left, of those tensors that got one. What a pass leaves in half precision
    /// counts once it is [collected](Self::collect).
    pub fn gradients(&self) -> Vec<Tensor> {
        self.list.iter().map(|parameter| parameter.leaf.grad()).filter(Tensor::defined).collect()
    }

    /// Adds up what a backward pass left, in f32. To be called after each, or what they leave is summed in half precision until
    /// the step is [settled](Self::settle).
    ///
    /// # Errors
    /// Where memory runs out.
    pub fn collect(&self) -> Result<()> {
        let (copies, leaves) = self.copies();
        Ok(gradients::collect(&copies, &leaves)?)
    }

    /// Copies in half precision, and what they are copies of.
    fn copies(&self) -> (Vec<&Tensor>, Vec<&Tensor>) {
        self.list.iter().filter_map(|parameter| Some((parameter.copy.as_ref()?, &parameter.leaf))).unzip()
    }

    /// Brings the copies in step with what they are copies of.
    fn refresh(&self) -> Result<()> {
        let (copies, leaves) = self.copies();
        Ok(foreach::copy(&copies, &leaves)?)
    }

    /// Gives tensors learning rates of their own, by name.
    pub(crate) fn set_rates(&mut self, rates: &BTreeMap<String, f64>) {
        self.list.iter_mut().for_each(|parameter| parameter.rate = rates.get(&parameter.name).copied());
    }

    /// Takes a step of the optimiser with the gradients as they are, which may change them. `learning_rate` is told the
    /// tensor. One without a gradient is left alone: no decay either.
    ///
    /// # Errors
    /// As of [`Optimiser::step`](crate::optimiser::Optimiser::step).
    pub fn step(&mut self, learning_rate: impl Fn(&Parameter) -> f64) -> Result<()> {
        self.step_and(learning_rate, || Ok(()))
    }

    /// The same, and what is done to the tensors after each step, before copies and averages follow them.
    pub(crate) fn step_and<T>(
        &mut self,
        learning_rate: impl Fn(&Parameter) -> f64,
        after: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let slopes: Vec<Slope<'_>> = self
            .list
            .iter()
            .map(|parameter| (parameter, parameter.leaf.grad()))
            .filter(|(_, gradient)| gradient.defined())
            .map(|(parameter, gradient)| Slope {
                name: &parameter.name,
                parameter: parameter.leaf.detach(),
                gradient,
                learning_rate: learning_rate(parameter),
            })
            .collect();
        let done = self.optimiser.step(&slopes);
        drop(slopes);
        let after = done.and_then(|()| after());
        self.refresh()?;
        let after = after?;
        self.average()?;
        Ok(after)
    }

    /// Brings the running average one step on. Early on it decays faster, as diffusers' and others' averages do, so that it
    /// does not remember the first values for long.
    fn average(&mut self) -> Result<()> {
        self.averaged_steps += 1;
        let steps = f64::from(self.averaged_steps);
        let decay = self.decay.min((1.0 + steps) / (10.0 + steps));
        let (averages, now): (Vec<&Tensor>, Vec<Tensor>) = self
            .list
            .iter()
            .filter_map(|parameter| Some((parameter.average.as_ref()?, parameter.leaf.detach())))
            .unzip();
        Ok(foreach::lerp(&averages, &now, 1.0 - decay)?)
    }

    /// Exchanges the trained values with those to save and to draw with, where they are others: the running averages, or
    /// what the optimiser says (schedule-free). A second call puts them back, to the last bit. The exchange itself is in
    /// place and allocates nothing, so that it cannot fail half-way.
    ///
    /// # Errors
    /// Where memory runs out, before anything is exchanged.
    pub fn exchange_averages(&mut self) -> Result<()> {
        let _guard = no_grad_guard();
        let own = self.optimiser.optimiser().evaluates_elsewhere();
        let away = own && self.list.iter().any(|parameter| parameter.average.is_some());
        if own && !away {
            let values = |parameter: &Parameter| self.optimiser.evaluation(&parameter.name, &parameter.leaf);
            let values = self.list.iter().map(values).collect::<Result<Vec<_>>>()?;
            self.list.iter_mut().zip(values).for_each(|(parameter, value)| parameter.average = value);
        }
        for parameter in &mut self.list {
            if let Some(average) = &parameter.average {
                let (mut now, mut average) =
                    (parameter.leaf.detach().f_view_dtype(Kind::Int)?, average.f_view_dtype(Kind::Int)?);
                let _ = now.f_bitwise_xor_tensor_(&average)?;
                let _ = average.f_bitwise_xor_tensor_(&now)?;
                let _ = now.f_bitwise_xor_tensor_(&average)?;
            }
            if away {
                parameter.average = None;
            }
        }
        self.refresh()
    }

    /// Everything that a later run needs to go on, by stable names: `trained.…`, `average.…`, and `optimiser.…` for what the
    /// optimiser keeps. The tensors are the list's own: write or copy them before the next step.
    ///
    /// # Errors
    /// Where memory runs out.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for parameter in &self.list {
            state.insert(format!("trained.{}", parameter.name), parameter.leaf.detach());
            if let Some(average) = &parameter.average {
                state.insert(format!("average.{}", parameter.name), average.shallow_clone());
            }
        }
        if self.decay > 0.0 {
            let steps = Tensor::f_full([0i64; 0], i64::from(self.averaged_steps), (Kind::Int64, Device::Cpu))?;
            state.insert("average_steps".into(), steps);
        }
        state.extend(self.optimiser.state()?.into_iter().map(|(name, tensor)| (format!("optimiser.{name}"), tensor)));
        Ok(state)
    }

    /// Puts back what [`ParameterList::state`] gave: all of it, or nothing where something does not fit.
    pub(crate) fn load_state(&mut self, mut state: BTreeMap<String, Tensor>) -> Result<()> {
        let (mut copies, mut averaged_steps) = (Vec::new(), self.averaged_steps);
        for parameter in &self.list {
            let name = format!("trained.{}", parameter.name);
            copies.push((parameter.leaf.detach(), take(&mut state, &name, &parameter.leaf)?));
            if let Some(average) = &parameter.average {
                let name = format!("average.{}", parameter.name);
                copies.push((average.shallow_clone(), take(&mut state, &name, average)?));
            }
        }
        if self.decay > 0.0 {
            let number = Tensor::f_zeros([0i64; 0], (Kind::Int64, Device::Cpu))?;
            averaged_steps = i64::try_from(take(&mut state, "average_steps", &number)?)? as i32;
        }
        let (optimiser, other): (BTreeMap<_, _>, BTreeMap<_, _>) =
            state.into_iter().partition(|(name, _)| name.starts_with("optimiser."));
        if let Some((name, tensor)) = other.first_key_value() {
            return Err(mismatch(name, "no such tensor".into(), shape(tensor)));
        }
        let own = optimiser.into_iter().map(|(name, tensor)| (name["optimiser.".len()..].to_owned(), tensor));
        self.optimiser.load_state(&own.collect())?;
        let _guard = no_grad_guard();
        for (mut own, found) in copies {
            own.f_copy_(&found)?;
        }
        self.averaged_steps = averaged_steps;
        self.refresh()
    }

    /// Forgets all gradients.
    ///
    /// # Errors
    /// Where the device is lost.
    pub fn clear_gradients(&mut self) -> Result<()> {
        let own = |parameter: &Parameter| {
            [Some(parameter.leaf.shallow_clone()), parameter.copy.as_ref().map(Tensor::shallow_clone)]
        };
        let mut leaves: Vec<Tensor> = self.list.iter().flat_map(own).flatten().collect();
        Ok(gradients::clear(&mut leaves)?)
    }

    /// Unscales the gradients, limits their common norm and reads loss and norm (see [`gradients::settle`]).
    ///
    /// # Errors
    /// Where the device is lost or memory runs out. Numbers that are not finite are no error: [`Settled::finite`] says
    /// so.
    pub fn settle(&mut self, losses: &Tensor, scale: f64, limit: f64) -> Result<Settled> {
        self.collect()?;
        Ok(gradients::settle(&mut self.gradients(), losses, scale, limit)?)
    }

    /// Whether every trained number is finite; waits for the device.
    pub(crate) fn is_finite(&self) -> Result<bool> {
        for parameter in &self.list {
            if !crate::base::is_finite(&parameter.leaf)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// The tensor of a name, of the same shape and number type as what it is to take the place of.
fn take(state: &mut BTreeMap<String, Tensor>, name: &str, own: &Tensor) -> Result<Tensor> {
    let found = state.remove(name).ok_or_else(|| mismatch(name, shape(own), "nothing".into()))?;
    if found.size() != own.size() || found.f_kind()? != own.f_kind()? {
        return Err(mismatch(name, shape(own), shape(&found)));
    }
    Ok(found)
}

fn mismatch(name: &str, expected: String, found: String) -> Error {
    Error::StateTensor { name: name.to_owned(), expected, found }
}

fn shape(tensor: &Tensor) -> String {
    format!("{:?} {:?}", tensor.kind(), tensor.size())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optimiser::OptimiserState;

    #[test]
    fn copies_in_half_precision_follow_what_they_are_copies_of() {
        let values = Tensor::from_slice(&[1.0f32, -2.0, 3.0]);
        let mut list = ParameterList::new(OptimiserState::adamw(), 0.5);
        let copy = list.add_in(Kind::BFloat16, Component::UNET, "a".into(), false, &values).unwrap();
        let mut last = Vec::new();
        let mut followed = || {
            assert_eq!(copy.detach(), values.to_kind(Kind::BFloat16));
            let now = Vec::<f32>::try_from(&values).unwrap();
            assert_ne!(std::mem::replace(&mut last, now.clone()), now);
        };
        followed();
        let state: BTreeMap<_, _> =
            list.state().unwrap().into_iter().map(|(name, tensor)| (name, tensor.copy())).collect();
        for step in 1..=3 {
            // Two micro-batches, the second of which is summed by `settle`.
            for slope in [256.0, 1.0] {
                let loss = (&copy * slope).sum(Kind::Float);
                loss.backward();
                if slope > 1.0 {
                    list.collect().unwrap();
                }
            }
            let settled = list.settle(&Tensor::from(0.5f32), 1.0, 0.0).unwrap();
            assert!((settled.norm - 257.0 * 3f64.sqrt()).abs() < 1e-3, "{settled:?}");
            list.step(|_| 0.1).unwrap();
            followed();
            list.clear_gradients().unwrap();
            assert!(list.gradients().is_empty() && !copy.grad().defined(), "step {step}");
        }
        for _ in 0..2 {
            list.exchange_averages().unwrap();
            followed();
        }
        list.load_state(state).unwrap();
        followed();
        // A backward pass that was given up leaves nothing.
        (&copy * 2.0).sum(Kind::Float).backward();
        list.clear_gradients().unwrap();
        list.collect().unwrap();
        assert!(list.gradients().is_empty());
    }
}
