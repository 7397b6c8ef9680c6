//! The numbers that a run trains, whatever they belong to: f32 leaves of libtorch's graph with the optimiser's state and,
//! where asked for, a running average. What they are for, an adapter's factors or a network's own weights, is said by
//! `trainable` and `whole`.

use std::collections::BTreeMap;

use lora_core::Component;
use lora_torch::gradients::{self, AdamW, AdamWEntry};
use lora_torch::tch::{Device, Kind, Tensor, no_grad_guard};

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
    leaf: Tensor,
    mean: Tensor,
    square: Tensor,
    steps: Tensor,
    average: Option<Tensor>,
}

impl Parameter {
    /// L2 norm; waits for the device.
    pub fn norm(&self) -> Result<f64> {
        Ok(f64::try_from(self.leaf.detach().f_norm()?)?)
    }
}

/// All trained tensors of a run, in f32.
#[derive(Debug, Default)]
pub struct ParameterList {
    list: Vec<Parameter>,
    /// Decay of the running average; 0 where there is none.
    decay: f64,
    averaged_steps: i32,
}

impl ParameterList {
    /// An empty list whose tensors' running average decays by `ema_decay` a step; 0 for none.
    pub fn new(ema_decay: f64) -> Self {
        Self { decay: ema_decay, ..Self::default() }
    }

    /// Adds a leaf that requires gradients.
    pub fn add(&mut self, component: Component, name: String, is_up: bool, leaf: &Tensor) -> Result<()> {
        let still = leaf.detach();
        self.list.push(Parameter {
            component,
            name,
            is_up,
            mean: still.f_zeros_like()?,
            square: still.f_zeros_like()?,
            steps: Tensor::f_zeros([0i64; 0], (Kind::Float, leaf.device()))?,
            average: (self.decay > 0.0).then(|| still.f_detach_copy()).transpose()?,
            leaf: leaf.shallow_clone(),
        });
        Ok(())
    }

    /// The tensors, in the order in which they were added.
    pub fn iter(&self) -> impl Iterator<Item = &Parameter> {
        self.list.iter()
    }

    /// Number of trained numbers.
    pub fn elements(&self) -> usize {
        self.list.iter().map(|parameter| parameter.leaf.numel()).sum()
    }

    /// The gradients that the last backward passes left, of those tensors that got one.
    pub fn gradients(&self) -> Vec<Tensor> {
        self.list.iter().map(|parameter| parameter.leaf.grad()).filter(Tensor::defined).collect()
    }

    /// Takes one AdamW step with the gradients as they are, by each component's own numbers and, where the flag is set,
    /// those of up-projections (LoRA+). A tensor without a gradient is left alone: no decay either.
    pub fn step(&mut self, numbers: impl Fn(Component, bool) -> AdamW) -> Result<()> {
        let mut groups: BTreeMap<(Component, bool), Vec<AdamWEntry>> = Default::default();
        for parameter in &self.list {
            let gradient = parameter.leaf.grad();
            if gradient.defined() {
                groups.entry((parameter.component, parameter.is_up)).or_default().push(AdamWEntry {
                    parameter: parameter.leaf.detach(),
                    gradient,
                    mean: parameter.mean.shallow_clone(),
                    square: parameter.square.shallow_clone(),
                    steps: parameter.steps.shallow_clone(),
                });
            }
        }
        for ((component, is_up), entries) in groups {
            numbers(component, is_up).step(entries)?;
        }
        self.average()
    }

    /// Brings the running average one step on. Early on it decays faster, as diffusers' and others' averages do, so that it
    /// does not remember the first values for long.
    fn average(&mut self) -> Result<()> {
        self.averaged_steps += 1;
        let steps = f64::from(self.averaged_steps);
        let decay = self.decay.min((1.0 + steps) / (10.0 + steps));
        let mut averages: Vec<_> =
            self.list.iter().filter_map(|parameter| parameter.average.as_ref().map(Tensor::shallow_clone)).collect();
        if averages.is_empty() {
            return Ok(());
        }
        let mut now: Vec<_> = self.list.iter().map(|parameter| parameter.leaf.detach()).collect();
        Ok(gradients::lerp(&mut averages, &mut now, 1.0 - decay)?)
    }

    /// Exchanges the trained values with their running averages, if there are any; a second call puts them back. What is
    /// saved and drawn is the average. Bit by bit, in place: it needs no memory, so that it cannot fail half-way.
    pub fn exchange_averages(&mut self) -> Result<()> {
        let _guard = no_grad_guard();
        for parameter in &self.list {
            if let Some(average) = &parameter.average {
                let (mut now, mut average) =
                    (parameter.leaf.detach().f_view_dtype(Kind::Int)?, average.f_view_dtype(Kind::Int)?);
                let _ = now.f_bitwise_xor_tensor_(&average)?;
                let _ = average.f_bitwise_xor_tensor_(&now)?;
                let _ = now.f_bitwise_xor_tensor_(&average)?;
            }
        }
        Ok(())
    }

    /// Everything that a later run needs to go on, by stable names: `trained.…`, `average.…`, and `optimiser.…` for what the
    /// optimiser keeps. The tensors are the list's own: write or copy them before the next step.
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
        state.extend(self.optimiser_state()?.into_iter().map(|(name, tensor)| (format!("optimiser.{name}"), tensor)));
        Ok(state)
    }

    /// Puts back what [`ParameterList::state`] gave: all of it, or nothing where something does not fit.
    pub fn load_state(&mut self, mut state: BTreeMap<String, Tensor>) -> Result<()> {
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
        self.load_optimiser_state(own.collect())?;
        let _guard = no_grad_guard();
        for (mut own, found) in copies {
            own.f_copy_(&found)?;
        }
        self.averaged_steps = averaged_steps;
        Ok(())
    }

    /// What the optimiser keeps, by names that hold for its kind.
    fn optimiser_state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for Parameter { name, mean, square, steps, .. } in &self.list {
            for (part, tensor) in [("mean", mean), ("square", square), ("steps", steps)] {
                state.insert(format!("{name}.{part}"), tensor.shallow_clone());
            }
        }
        Ok(state)
    }

    /// Puts back what the optimiser kept: all of it, or nothing where something does not fit.
    fn load_optimiser_state(&mut self, mut state: BTreeMap<String, Tensor>) -> Result<()> {
        let mut copies = Vec::new();
        for Parameter { name, mean, square, steps, .. } in &self.list {
            for (part, tensor) in [("mean", mean), ("square", square), ("steps", steps)] {
                let found = take(&mut state, &format!("{name}.{part}"), tensor)?;
                copies.push((tensor.shallow_clone(), found));
            }
        }
        if let Some((name, tensor)) = state.first_key_value() {
            return Err(mismatch(&format!("optimiser.{name}"), "no such tensor".into(), shape(tensor)));
        }
        let _guard = no_grad_guard();
        for (mut own, found) in copies {
            own.f_copy_(&found)?;
        }
        Ok(())
    }

    /// Forgets all gradients.
    pub fn clear_gradients(&mut self) -> Result<()> {
        let mut leaves: Vec<Tensor> = self.list.iter().map(|parameter| parameter.leaf.shallow_clone()).collect();
        Ok(gradients::clear(&mut leaves)?)
    }

    /// Limits the gradients' common norm and returns it (see [`gradients::clip`]).
    pub fn clip(&mut self, limit: f64) -> Result<f64> {
        Ok(gradients::clip(&mut self.gradients(), limit)?)
    }

    /// Whether every trained number is finite; waits for the device.
    pub fn is_finite(&self) -> Result<bool> {
        for parameter in &self.list {
            if !crate::encode::is_finite(&parameter.leaf)? {
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
