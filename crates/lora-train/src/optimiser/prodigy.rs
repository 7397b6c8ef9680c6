//! Prodigy (Mishchenko & Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", ICML 2024): Adam whose step
//! size is the learning rate times d, an estimate of the distance to the solution that grows over a run.

use lora_torch::foreach;
use lora_torch::tch::{Kind, Tensor};

use super::{Entry, First, Optimiser, Settings, StatePart, WORKING_SET, batches};
use crate::Result;

/// Prodigy.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Prodigy {
    betas: (f64, f64),
    beta3: f64,
    epsilon: f64,
    weight_decay: f64,
    decouple: bool,
    use_bias_correction: bool,
    safeguard_warmup: bool,
    d0: f64,
    d_coef: f64,
    growth_rate: f64,
    slice: usize,
    taken: u64,
    d: f64,
    d_max: f64,
    numerator: f64,
}

const SQUARE: usize = 0;
const SUM: usize = 1;
const START: usize = 2;
/// Only there where the first beta is above 0.
const MEAN: usize = 3;

impl Prodigy {
    /// From the configuration's numbers.
    pub(crate) fn new(settings: &mut Settings) -> Self {
        let positive = |value: f64| value > 0.0;
        let betas = settings.betas((0.9, 0.999));
        let d0 = settings.number("d0", 1e-6, "a number above 0", positive);
        Self {
            betas,
            beta3: settings.number("beta3", betas.1.sqrt(), "a number from 0 to below 1", |b| (0.0..1.0).contains(&b)),
            epsilon: settings.number("eps", 1e-8, "a number above 0", positive),
            weight_decay: settings.weight_decay(0.0),
            decouple: settings.switch("decouple", true),
            use_bias_correction: settings.switch("use_bias_correction", false),
            safeguard_warmup: settings.switch("safeguard_warmup", false),
            d0,
            d_coef: settings.number("d_coef", 1.0, "a number above 0", positive),
            growth_rate: settings.number("growth_rate", f64::INFINITY, "a number above 1", |rate| rate > 1.0),
            slice: settings.number("slice_p", 1.0, "a whole number from 1 on", |p| p >= 1.0 && p.fract() == 0.0)
                as usize,
            taken: 0,
            d: d0,
            d_max: d0,
            numerator: 0.0,
        }
    }

    /// The elements that the estimate looks at.
    fn sampled(&self, tensors: &[&Tensor]) -> Result<Vec<Tensor>> {
        let every = self.slice as i64;
        tensors.iter().map(|tensor| Ok(tensor.f_reshape(-1)?.f_slice(0, None::<i64>, None::<i64>, every)?)).collect()
    }
}

impl Optimiser for Prodigy {
    fn parts(&self, shape: &[i64]) -> Vec<StatePart> {
        let sampled = [shape.iter().product::<i64>().max(0).unsigned_abs().div_ceil(self.slice as u64) as i64];
        let mut parts = vec![
            StatePart::zeros("square", shape),
            StatePart::zeros("sum", &sampled),
            StatePart { name: "start", shape: sampled.to_vec(), kind: Kind::Float, first: First::Sample(self.slice) },
        ];
        if self.betas.0 > 0.0 {
            parts.push(StatePart::zeros("mean", shape));
        }
        parts
    }

    fn step(&mut self, entries: &[Entry<'_>]) -> Result<()> {
        let rate = entries.iter().map(|entry| entry.learning_rate).fold(0.0, f64::max);
        if rate == 0.0 {
            return Ok(());
        }
        let batches: Vec<_> =
            batches(entries, WORKING_SET).into_iter().filter(|batch| batch.learning_rate() > 0.0).collect();
        let (d, beta3) = (self.d, self.beta3);
        let correction = match self.use_bias_correction {
            true => {
                let next = self.taken + 1;
                super::bias_correction(self.betas.1, next).sqrt() / super::bias_correction(self.betas.0, next)
            }
            false => 1.0,
        };
        let step = d * rate * correction;
        // In units of d0, which keeps sums of small numbers in range.
        let scale = d / self.d0;
        let sum_factor = scale * if self.safeguard_warmup { d } else { step };
        let (mut numerators, mut denominators) = (Vec::new(), Vec::new());
        for batch in &batches {
            let (parameters, gradients) = (batch.parameters(), batch.gradients());
            if self.weight_decay != 0.0 && !self.decouple {
                foreach::add(&gradients, &parameters, self.weight_decay)?;
            }
            let sampled = self.sampled(&gradients)?;
            // ⟨gradient, start − parameter⟩; a start of zeros is not kept.
            let way = foreach::scaled(&self.sampled(&parameters)?, -1.0)?;
            let starts = batch.state(START);
            let (moved, starts): (Vec<&Tensor>, Vec<&Tensor>) =
                way.iter().zip(starts).filter(|(_, start)| start.dim() > 0).unzip();
            foreach::add(&moved, &starts, 1.0)?;
            foreach::mul(&way, &sampled)?;
            numerators.push(Tensor::f_cat(&way, 0)?.f_sum(Kind::Double)?);

            if self.betas.0 > 0.0 {
                let means = batch.state(MEAN);
                foreach::scale(&means, self.betas.0)?;
                foreach::add(&means, &gradients, d * (1.0 - self.betas.0))?;
            }
            let squares = batch.state(SQUARE);
            foreach::scale(&squares, self.betas.1)?;
            foreach::add_product(&squares, &gradients, &gradients, d * d * (1.0 - self.betas.1))?;
            let sums = batch.state(SUM);
            foreach::scale(&sums, beta3)?;
            foreach::add(&sums, &sampled, sum_factor)?;
            denominators.push(foreach::absolute_sums(&sums)?.f_sum(Kind::Double)?);
        }
        // The one wait for the device.
        numerators.append(&mut denominators);
        let sums = Tensor::f_stack(&numerators, 0)?.f_view([2, -1])?;
        let sums = Vec::<f64>::try_from(sums.f_sum_dim_intlist([1i64].as_slice(), false, Kind::Double)?)?;
        let (numerator, denominator) = (self.numerator * beta3 + scale * step * sums[0], sums[1]);
        if denominator == 0.0 {
            return Ok(());
        }
        let found = self.d_coef * numerator / denominator;
        self.numerator = numerator;
        self.d_max = self.d_max.max(found);
        // As long as nothing was found, growth is not limited.
        let grown = if d == self.d0 { d.max(found) } else { d } * self.growth_rate;
        self.d = self.d_max.min(grown);

        for batch in &batches {
            let parameters = batch.parameters();
            let step = step * batch.learning_rate() / rate;
            let divisor = foreach::scaled(&batch.state(SQUARE), 1.0)?;
            foreach::sqrt(&divisor)?;
            foreach::shift(&divisor, self.d * self.epsilon)?;
            if self.weight_decay != 0.0 && self.decouple {
                foreach::scale(&parameters, 1.0 - self.weight_decay * step)?;
            }
            match self.betas.0 > 0.0 {
                true => foreach::add_quotient(&parameters, &batch.state(MEAN), &divisor, -step)?,
                false => foreach::add_quotient(&parameters, &batch.gradients(), &divisor, -step * self.d)?,
            }
        }
        self.taken += 1;
        Ok(())
    }

    fn numbers(&self) -> Vec<(&'static str, f64)> {
        vec![("taken", self.taken as f64), ("d", self.d), ("d_max", self.d_max), ("numerator", self.numerator)]
    }

    fn set_numbers(&mut self, values: &[f64]) {
        if let [taken, d, d_max, numerator] = *values {
            (self.taken, self.d, self.d_max, self.numerator) = (taken as u64, d, d_max, numerator);
        }
    }

    fn rate_factor(&self) -> f64 {
        self.d
    }

    fn notes(&self, learning_rate: f64) -> Vec<String> {
        match learning_rate == 1.0 {
            true => Vec::new(),
            false => vec![format!(
                "prodigy finds the step size itself and wants learning_rate = 1 (it is {learning_rate:e}); to make it bolder \
                 or more careful, optimizer_args = {{ d_coef = 2.0 }} or 0.5"
            )],
        }
    }
}
