//! What an optimiser keeps, by the names of the trained tensors: made, stepped with, saved and loaded.

use std::collections::BTreeMap;

use lora_torch::foreach;
use lora_torch::tch::{Device, Kind, Tensor};

use super::{AdamW, Arguments, Chosen, Entry, First, Optimiser, Settings, StatePart};
use crate::{Error, Result};

/// Beginning of the names of numbers that belong to no tensor.
const OWN: &str = "optimizer.";

/// An optimiser with its state.
#[derive(Debug)]
pub struct OptimiserState {
    optimiser: Box<dyn Optimiser>,
    record: String,
    slots: BTreeMap<String, Slot>,
}

/// What is kept for one trained tensor.
#[derive(Debug)]
struct Slot {
    steps: u64,
    parts: Vec<StatePart>,
    tensors: Vec<Tensor>,
}

/// A trained tensor with its gradient.
#[derive(Debug)]
pub struct Slope<'a> {
    /// Its name.
    pub name: &'a str,
    /// The tensor, detached.
    pub parameter: Tensor,
    /// The gradient; may be overwritten.
    pub gradient: Tensor,
    /// Its learning rate at this step.
    pub learning_rate: f64,
}

impl OptimiserState {
    /// Without any tensor yet.
    pub fn new(chosen: Chosen) -> Self {
        Self { optimiser: chosen.optimiser, record: chosen.record, slots: BTreeMap::new() }
    }

    /// AdamW with the numbers that are usual.
    pub fn adamw() -> Self {
        let mut settings = Settings::new("adamw", 1e-4, &Arguments::new());
        Self::new(Chosen { optimiser: Box::new(AdamW::new(&mut settings)), record: String::new() })
    }

    /// The optimiser.
    pub(crate) fn optimiser(&self) -> &dyn Optimiser {
        &*self.optimiser
    }

    /// Its class and numbers, as files record them.
    pub(crate) fn record(&self) -> &str {
        &self.record
    }

    /// Makes the state of tensors that have none; their values now are those that training begins with.
    ///
    /// # Errors
    /// Where memory runs out.
    pub fn register(&mut self, parameters: &[(&str, &Tensor)]) -> Result<()> {
        let new: Vec<_> = parameters.iter().filter(|(name, _)| !self.slots.contains_key(*name)).collect();
        let slots: Vec<Vec<StatePart>> =
            new.iter().map(|(_, parameter)| self.optimiser.parts(&parameter.size())).collect();
        // One look at the device for all tensors, where it matters that some of them are zero.
        let samples = slots.iter().flatten().any(|part| matches!(part.first, First::Sample(_)));
        let norms = match samples {
            true => {
                let tensors: Vec<Tensor> = new.iter().map(|(_, parameter)| parameter.detach()).collect();
                Vec::<f64>::try_from(foreach::norms(&tensors)?.f_to_kind(Kind::Double)?)?
            }
            false => vec![1.0; new.len()],
        };
        for (((name, parameter), parts), norm) in new.into_iter().zip(slots).zip(norms) {
            let parameter = parameter.detach();
            let tensors = parts.iter().map(|part| first(part, &parameter, norm == 0.0)).collect::<Result<_>>()?;
            self.slots.insert((*name).to_owned(), Slot { steps: 0, parts, tensors });
        }
        Ok(())
    }

    /// Takes a step with all tensors given.
    ///
    /// # Errors
    /// As of [`Optimiser::step`].
    pub fn step(&mut self, slopes: &[Slope<'_>]) -> Result<()> {
        let new: Vec<_> = slopes.iter().map(|slope| (slope.name, &slope.parameter)).collect();
        self.register(&new)?;
        let entry = |slope: &'_ Slope<'_>| (slope.name.to_owned(), slope.learning_rate);
        debug_assert!(slopes.iter().map(entry).all(|(_, rate)| rate >= 0.0));
        let entries: Vec<Entry<'_>> = slopes
            .iter()
            .filter_map(|slope| {
                let slot = self.slots.get(slope.name)?;
                Some(Entry {
                    parameter: &slope.parameter,
                    gradient: &slope.gradient,
                    state: &slot.tensors,
                    steps: slot.steps + 1,
                    learning_rate: slope.learning_rate,
                })
            })
            .collect();
        self.optimiser.step(&entries)?;
        for slope in slopes {
            if let Some(slot) = self.slots.get_mut(slope.name) {
                slot.steps += 1;
            }
        }
        Ok(())
    }

    /// The weights to save and to sample with, where they are others than those that train.
    ///
    /// # Errors
    /// As of [`Optimiser::evaluation`].
    pub fn evaluation(&self, name: &str, parameter: &Tensor) -> Result<Option<Tensor>> {
        match self.slots.get(name) {
            Some(slot) => self.optimiser.evaluation(parameter, &slot.tensors),
            None => Ok(None),
        }
    }

    /// Bytes of all that is kept.
    pub fn bytes(&self) -> usize {
        let size = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
        self.slots.values().flat_map(|slot| &slot.tensors).map(size).sum()
    }

    /// Everything that a later run needs to go on, by stable names: `<tensor>.<part>`, `<tensor>.steps`, and `optimizer.…`
    /// for numbers that belong to no tensor. The tensors are those of the state itself: copy or write them before the next
    /// step. The trained tensors are not among them; what training goes on from is these as they are, not
    /// [`OptimiserState::evaluation`].
    ///
    /// # Errors
    /// Where memory runs out.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for (name, slot) in &self.slots {
            for (part, tensor) in slot.parts.iter().zip(&slot.tensors) {
                state.insert(format!("{name}.{}", part.name), tensor.shallow_clone());
            }
            state.insert(
                format!("{name}.steps"),
                Tensor::f_full([0i64; 0], slot.steps as i64, (Kind::Int64, Device::Cpu))?,
            );
        }
        for (name, value) in self.optimiser.numbers() {
            state.insert(format!("{OWN}{name}"), Tensor::f_full([0i64; 0], value, (Kind::Double, Device::Cpu))?);
        }
        Ok(state)
    }

    /// Puts back what [`OptimiserState::state`] gave, for the tensors that are registered: all of it, or nothing where
    /// something does not fit.
    ///
    /// # Errors
    /// [`Error::StateTensor`] for the first tensor that is missing, superfluous or of another shape or number type.
    pub fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let mismatch =
            |name: &str, expected: String, found: String| Error::StateTensor { name: name.to_owned(), expected, found };
        let find = |name: &str, expected: &dyn Fn() -> String| {
            state.get(name).ok_or_else(|| mismatch(name, expected(), "nothing".into()))
        };
        let number = |name: &str| -> Result<f64> {
            let tensor = find(name, &|| "a number".into())?;
            match tensor.numel() {
                1 => Ok(f64::try_from(tensor.f_to_kind(Kind::Double)?.f_view([0i64; 0])?)?),
                _ => Err(mismatch(name, "a number".into(), written(tensor.kind(), &tensor.size()))),
            }
        };
        let mut known = 0;
        let (mut copies, mut starts, mut steps) = (Vec::new(), Vec::new(), Vec::new());
        for (name, slot) in &self.slots {
            for (index, (part, own)) in slot.parts.iter().zip(&slot.tensors).enumerate() {
                let key = format!("{name}.{}", part.name);
                let found = find(&key, &|| written(part.kind, &part.shape))?;
                let sampled = matches!(part.first, First::Sample(_));
                let fits = found.size() == part.shape || (sampled && found.dim() == 0);
                if found.f_kind()? != part.kind || !fits {
                    return Err(mismatch(&key, written(part.kind, &part.shape), written(found.kind(), &found.size())));
                }
                match sampled {
                    // Whether it is kept at all depends on where training began, not on where it is now.
                    true => {
                        starts.push((name.clone(), index, found.f_to_device_(own.device(), part.kind, false, true)?))
                    }
                    false => copies.push((own, found)),
                }
                known += 1;
            }
            steps.push((name.clone(), number(&format!("{name}.steps"))? as u64));
            known += 1;
        }
        let names: Vec<_> = self.optimiser.numbers().into_iter().map(|(name, _)| format!("{OWN}{name}")).collect();
        let numbers = names.iter().map(|name| number(name)).collect::<Result<Vec<_>>>()?;
        if known + names.len() != state.len() {
            let expected = self.state()?;
            let other = state.keys().find(|name| !expected.contains_key(*name)).cloned().unwrap_or_default();
            return Err(mismatch(
                &other,
                "no such tensor".into(),
                written(state[&other].kind(), &state[&other].size()),
            ));
        }
        for (own, found) in copies {
            own.shallow_clone().f_copy_(found)?;
        }
        for (name, index, start) in starts {
            if let Some(slot) = self.slots.get_mut(&name) {
                slot.tensors[index] = start;
            }
        }
        for (name, steps) in steps {
            if let Some(slot) = self.slots.get_mut(&name) {
                slot.steps = steps;
            }
        }
        self.optimiser.set_numbers(&numbers);
        Ok(())
    }
}

/// What a part begins with; `zero`: whether the trained tensor is all zeros.
fn first(part: &StatePart, parameter: &Tensor, zero: bool) -> Result<Tensor> {
    let options = (part.kind, parameter.device());
    Ok(match part.first {
        First::Zeros => Tensor::f_zeros(&part.shape, options)?,
        First::Copy => parameter.f_to_device_(parameter.device(), part.kind, false, true)?,
        First::Sample(_) if zero => Tensor::f_zeros([0i64; 0], options)?,
        First::Sample(every) => {
            let sampled = parameter.f_reshape(-1)?.f_slice(0, None::<i64>, None::<i64>, every as i64)?;
            sampled.f_to_device_(parameter.device(), part.kind, false, true)?.f_contiguous()?
        }
    })
}

/// A type and shape in an error.
fn written(kind: Kind, shape: &[i64]) -> String {
    format!("{kind:?} {shape:?}")
}
