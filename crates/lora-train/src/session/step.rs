//! A step: the passes of its micro-batches, what they add up to, the update, and what is told of it.
//!
//! What the micro-batches hold is drawn and encoded in `feed`; how a step gets by with less memory is in `out_of_memory`.

use std::collections::BTreeMap;
use std::time::Instant;

use lora_core::{Component, DType};
use lora_data::sampler::Visit;
use lora_models::layers::Pass;
use lora_torch::memory;
use lora_torch::tch::{Kind, Tensor, no_grad_guard};
use lora_torch::{dry, foreach};

use super::graphs::Recording;
use super::{Session, Trained, trained};
use crate::base::Inputs;
use crate::meter::MemoryPart;
use crate::parameters::Parameter;
use crate::ranks::Ranks;
use crate::{Error, Result};

/// Steps in a row that may be skipped for non-finite gradients before the run ends.
const MAX_SKIPPED_IN_A_ROW: usize = 30;

/// The figure of `scale_weight_norms`.
const SCALED_LAYERS: &str = "scaled_layers";

/// What the forward and backward passes of a step gave.
#[derive(Debug, Clone)]
pub(super) struct StepGradients {
    loss: f64,
    /// What the base tells beside the loss.
    figures: BTreeMap<&'static str, f64>,
    /// `None` where one was not finite.
    gradient_norm: Option<f64>,
}

/// The result of a step.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize)]
#[non_exhaustive]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: usize,
    /// Steps of the run.
    pub steps: usize,
    /// The epoch, from 1.
    pub epoch: u64,
    /// Mean loss of the step's items.
    pub loss: f64,
    /// Means of what the base tells beside the loss ([`Base::figures`](crate::base::Base::figures)).
    #[serde(flatten)]
    pub figures: BTreeMap<&'static str, f64>,
    /// Learning rate of the network that steps are made of (of the one before it where that alone trains).
    pub learning_rate: f64,
    /// Learning rates of all networks that train, by the network's name.
    pub learning_rates: BTreeMap<String, f64>,
    /// L2 norm of all gradients before clipping; `None` where the step was skipped.
    pub gradient_norm: Option<f64>,
    /// Whether the step was skipped because a gradient was not finite.
    pub skipped: bool,
    /// Steps skipped so far.
    pub skipped_steps: usize,
    /// The loss scale.
    pub loss_scale: f64,
    /// Items of the step.
    pub items: usize,
    /// How much there was to learn of the items: pictures, trained tokens.
    pub measure: f64,
    /// Most items at once: less than asked for where memory ran out.
    pub micro_batch: usize,
    /// Seconds that the step took.
    pub seconds: f64,
    /// Bytes of device memory at the peak so far; resident host memory on the CPU.
    pub memory: u64,
}

impl Session {
    /// Trains one step; `None` once the run is complete.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] where cutting the step smaller did not help either, with all that was tried;
    /// [`Error::NotFinite`] where the loss is NaN, or too many steps in a row were skipped; [`Error::Data`] where an
    /// example cannot be read. Unless it failed in the optimiser, the session stands as before the step.
    pub fn step(&mut self) -> Result<Option<StepReport>> {
        if self.progress.step >= self.plan.steps {
            return Ok(None);
        }
        let (start, position) = (Instant::now(), self.feed.sampler.position());
        let _scope = self.scope()?;
        let batches = self.next_batches();
        let gradients = match self.survive(&batches) {
            Ok(gradients) => gradients,
            Err(error) => {
                // As if the step had not begun: a state that is saved now is that of the step before.
                self.feed.sampler.restore(position);
                if !error.is_device_lost() {
                    self.forget_gradients()?;
                }
                return Err(error);
            }
        };
        let StepGradients { loss, mut figures, gradient_norm } = gradients;
        let rates = self.rates();
        match gradient_norm {
            Some(_) => {
                if let Some(scaled) = self.update(&rates)? {
                    figures.insert(SCALED_LAYERS, scaled);
                }
                self.progress.skipped_in_a_row = 0;
            }
            None => {
                self.progress.skipped += 1;
                self.progress.skipped_in_a_row += 1;
            }
        }
        self.forget_gradients()?;
        self.progress.step += 1;
        if self.progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW {
            return Err(Error::NotFinite {
                stage: "the gradients".into(),
                place: format!(" of {MAX_SKIPPED_IN_A_ROW} steps in a row, up to step {}", self.progress.step),
                remedy: "use precision = \"bf16\", or a lower learning_rate",
            });
        }
        // After the step: an optimiser may have chosen it there.
        let chosen = self.parameters.optimiser().optimiser().rate_factor();
        let memory = match self.device_memory()? {
            Some(device) => device.reserved_peak,
            None => memory::host_memory().map_or(0, |host| host.resident),
        };
        Ok(Some(StepReport {
            step: self.progress.step,
            steps: self.plan.steps,
            epoch: batches.first().and_then(|batch| batch.first()).map_or(0, |visit| visit.epoch) + 1,
            loss,
            figures,
            learning_rate: rates.first().map_or(0.0, |(_, rate)| rate * chosen),
            learning_rates: rates.iter().map(|(network, rate)| (network.to_string(), rate * chosen)).collect(),
            gradient_norm,
            skipped: gradient_norm.is_none(),
            skipped_steps: self.progress.skipped,
            loss_scale: self.scaler.scale(),
            items: batches.iter().map(Vec::len).sum(),
            measure: batches.iter().flatten().map(|visit| self.feed.source.amount(visit.index)).sum(),
            micro_batch: self.micro_batch(&batches),
            seconds: start.elapsed().as_secs_f64(),
            memory,
        }))
    }

    /// The learning rates of the next step by the networks that train, the one that steps are made of first.
    fn rates(&self) -> Vec<(Component, f64)> {
        let factor = self.lr_schedule.factor(self.progress.step);
        let rate = |network: Component| factor * self.base.learning_rate(network);
        trained(&*self.base).iter().map(|network| (network.component, rate(network.component))).collect()
    }

    /// The optimiser's step from the gradients that are in the parameters; how many layers `scale_weight_norms` made smaller.
    fn update(&mut self, rates: &[(Component, f64)]) -> Result<Option<f64>> {
        let factor = self.lr_schedule.factor(self.progress.step);
        let ratio = self.config.loraplus_lr_ratio;
        let of_network = |network| rates.iter().find(|(own, _)| *own == network).map_or(0.0, |(_, rate)| *rate);
        let of = |own: &Parameter| {
            own.rate.map_or_else(|| of_network(own.component), |rate| factor * rate)
                * if own.is_up { ratio } else { 1.0 }
        };
        let limit = self.config.extra.number("scale_weight_norms");
        let trained = &self.trained;
        let limited = || match (limit, trained) {
            (Some(limit), Trained::Adapter(trained)) => trained.adapter.limit_norms(limit),
            _ => Ok(None),
        };
        match lora_torch::caught(|| self.parameters.step_and(of, limited)) {
            Ok(scaled) => Ok(scaled.map(f64::try_from).transpose()?),
            Err(error) => {
                // What it had begun cannot be taken back.
                self.torn = true;
                let place = format!("in the optimiser at step {}", self.progress.step + 1);
                Err(if error.is_out_of_memory() { self.exhausted(place, &error) } else { error })
            }
        }
    }

    /// The gradients of a step, unscaled and clipped, in the parameters.
    ///
    /// Of several ranks each computes those of its share of the micro-batches, weighted by their part of the whole step.
    pub(super) fn gradients(&mut self, batches: &[Vec<Visit>]) -> Result<StepGradients> {
        let all: f64 = batches.iter().map(|batch| self.measure(batch)).sum();
        let most = self.progress.economy.micro_batch.unwrap_or(usize::MAX);
        let mut losses = Vec::with_capacity(batches.len());
        for batch in self.ranks.share().of(batches).flat_map(|batch| batch.chunks(most)) {
            let share = self.measure(batch) / all;
            let (inputs, pass) = self.batch_inputs(batch, share * self.scaler.scale())?;
            let loss = self.run_passes(inputs, &pass, losses.is_empty())?;
            losses.push(loss.f_mul_scalar(share)?);
        }
        let told = match losses.is_empty() {
            // Where an epoch ends there may be fewer micro-batches than ranks.
            true => Tensor::f_zeros([1 + self.base.figures().len() as i64], (Kind::Double, self.device))?,
            false => Tensor::f_stack(&losses, 0)?.f_reshape([losses.len() as i64, -1])?.f_sum_dim_intlist(
                [0i64].as_slice(),
                false,
                Kind::Float,
            )?,
        };
        self.parameters.collect()?;
        let told = self.ranks.add_up(&self.parameters, told)?;
        // What was added up cannot be taken apart again to take the step in smaller pieces.
        self.settle(batches, &told).map_err(|error| match self.ranks {
            Ranks::Joined(_) if error.is_out_of_memory() => {
                self.exhausted(format!("at step {}", self.progress.step + 1), &error)
            }
            _ => error,
        })
    }

    /// What a step's gradients and what was told of its losses, `[1 + figures]`, come to.
    fn settle(&mut self, batches: &[Vec<Visit>], told: &Tensor) -> Result<StepGradients> {
        // The only look at numbers in a step, as each waits for the device. It cannot come a step late: the optimiser must not
        // see gradients that are not finite.
        let settled = self.parameters.settle(&told.f_select(0, 0)?, self.scaler.scale(), self.config.max_grad_norm)?;
        let names = self.base.figures();
        let figures = match names.is_empty() {
            true => BTreeMap::new(),
            false => names
                .iter()
                .copied()
                .zip(Vec::<f64>::try_from(told.f_to_kind(Kind::Double)?)?.into_iter().skip(1))
                .collect(),
        };
        if !settled.loss.is_finite() {
            self.name_the_culprit(batches)?;
        }
        let finite = settled.finite && settled.loss.is_finite();
        self.scaler.update(finite);
        Ok(StepGradients { loss: settled.loss, figures, gradient_norm: finite.then_some(settled.norm) })
    }

    /// Gradients that are there no more, or where recordings write to them, zero.
    pub(super) fn forget_gradients(&mut self) -> Result<()> {
        match &self.graphs {
            Some(graphs) if graphs.hold_gradients() => Ok(foreach::zero(&self.parameters.gradients())?),
            _ => self.parameters.clear_gradients(),
        }
    }

    /// The loss of a micro-batch, whose gradients are added to those that are there: none, if it is the `first` of a step.
    pub(super) fn run_passes(&mut self, inputs: Inputs, pass: &Pass, first: bool) -> Result<Tensor> {
        if pass.inputs_in_host {
            return self.passes(&inputs, pass);
        }
        // Where an error leaves this function the recordings are gone: memory ran out, or the run ends.
        let Some(mut graphs) = self.graphs.take() else { return self.passes(&inputs, pass) };
        match graphs.run(inputs, first, &self.parameters, &|inputs| self.passes(inputs, pass))? {
            Recording::Goes(loss) => {
                self.graphs = Some(graphs);
                Ok(loss)
            }
            Recording::GivenUp(loss, error) => {
                tracing::warn!("training goes on without CUDA graphs: {error}");
                Ok(loss)
            }
        }
    }

    /// The mean loss of a micro-batch, whose gradients times the input `scale` are added to those of the parameters.
    fn passes(&self, inputs: &Inputs, pass: &Pass) -> Result<Tensor> {
        let loss = self.base.loss(inputs, pass)?;
        if dry::is_dry(self.device) {
            // What lives at the end of the forward pass does so for the backward pass.
            dry::relabel_all(MemoryPart::Working.number(), MemoryPart::Saved.number());
        }
        loss_of(&loss)?.f_mul(inputs.get("scale")?)?.f_backward()?;
        self.parameters.collect()?;
        if dry::is_dry(self.device) {
            dry::relabel(&self.parameters.gradients(), MemoryPart::Gradients.number());
        }
        Ok(loss.detach())
    }

    /// Names the stage that a NaN loss comes from.
    pub(super) fn name_the_culprit(&mut self, batches: &[Vec<Visit>]) -> Result<()> {
        let _guard = no_grad_guard();
        let place = format!(" at step {}", self.progress.step + 1);
        let culprit = |stage: &str, remedy| {
            Err(Error::NotFinite { stage: stage.to_owned().into(), place: place.clone(), remedy })
        };
        if !self.parameters.is_finite()? {
            return culprit("the trained weights", "use a lower learning_rate, or max_grad_norm = 1.0");
        }
        for batch in self.ranks.share().of(batches) {
            let items = self.items(batch)?;
            if let Some((stage, remedy)) = self.base.culprit(&items)? {
                return culprit(stage, remedy);
            }
        }
        // Only the last network is left. In fp16 the scaler skips the step and counts it; elsewhere it will not heal.
        if self.precision == DType::F16 {
            return Ok(());
        }
        let last = self.base.networks().last().map_or("network", |network| network.title);
        culprit(&format!("the {last}"), "use precision = \"fp32\", or a lower learning_rate")
    }
}

/// The loss alone of what [`Base::loss`] gives.
pub(super) fn loss_of(told: &Tensor) -> Result<Tensor> {
    Ok(if told.dim() == 0 { told.shallow_clone() } else { told.f_select(0, 0)? })
}
