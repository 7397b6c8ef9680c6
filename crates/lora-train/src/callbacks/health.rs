//! Watches for runs that go wrong quietly: skipped steps, spikes, losses that explode, adapters that learn nothing, runs
//! that end where they began. Each finding is told once, with numbers and what helps in practice.
//!
//! A diffusion loss is noisy by nature: a step's timesteps alone move it by a factor of ten. What counts as a finding is
//! therefore measured against the series' own scatter, on a logarithmic scale and by medians.

use std::collections::VecDeque;

use crate::Result;
use crate::callback::{Callback, Control};
use crate::callbacks::history;
use crate::config::RunLength;
use crate::event::About;
use crate::session::{Session, StepReport};

/// Losses that the running median and scatter are taken over.
const WINDOW: usize = 64;
/// Losses that are averaged for the level of a window.
const BLOCK: usize = 8;
/// Steps that a risen level has to stay.
const STAYS: usize = 32;
/// Losses after an outlier by which a spike is told from a new level.
const AFTERMATH: usize = 10;
/// Steps in a row without gradient that are no accident.
const WITHOUT_GRADIENT: usize = 20;
/// Steps after which updates that are all still zero are no accident.
const ENOUGH_STEPS: usize = 50;
/// Least steps of a run of which it can be said that its loss did not fall.
const LONG_RUN: usize = 300;
/// A fall of the loss that would count, as a share.
const WORTHWHILE: f64 = 0.05;

/// What a run may suffer from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Finding {
    /// More steps were skipped for gradients that were not finite than a settling loss scale explains.
    NotFinite {
        /// Steps skipped.
        skipped: usize,
        /// Of so many.
        of: usize,
    },
    /// A single loss far outside of what is usual, after which all was as before.
    Spike {
        /// The step.
        step: usize,
        /// Its loss.
        loss: f64,
        /// What was usual.
        median: f64,
    },
    /// The loss has risen beyond what its scatter explains, and stays there.
    Divergence {
        /// The lowest level that the losses had.
        lowest: f64,
        /// Their level now.
        now: f64,
    },
    /// Nothing reaches the trained numbers.
    Dead {
        /// Steps without any gradient.
        steps: usize,
    },
    /// The loss has not fallen by an amount that would count.
    Plateau {
        /// Mean of the first third.
        first: f64,
        /// Mean of the last third.
        last: f64,
        /// Twice the standard error of their difference.
        uncertainty: f64,
    },
}

impl Finding {
    /// What it is called in events.
    fn kind(&self) -> &'static str {
        match self {
            Finding::NotFinite { .. } => "not_finite",
            Finding::Spike { .. } => "spike",
            Finding::Divergence { .. } => "divergence",
            Finding::Dead { .. } => "dead",
            Finding::Plateau { .. } => "plateau",
        }
    }
}

/// Findings in a series of steps.
#[derive(Debug, Clone, Default)]
pub(crate) struct LossHealth {
    /// Logarithms of the last losses.
    window: VecDeque<f64>,
    /// Lowest level of a window, as a logarithm.
    lowest: Option<f64>,
    /// Running mean of the scatter: that of one window may be small by chance just where its level is low.
    usual: Option<f64>,
    /// Steps that the level has been risen for.
    risen: usize,
    outlier: Option<Outlier>,
    losses: Vec<f64>,
    skips: VecDeque<bool>,
    without_gradient: usize,
    told: Vec<std::mem::Discriminant<Finding>>,
}

/// A loss far off, until it is known what it was.
#[derive(Debug, Clone)]
struct Outlier {
    step: usize,
    loss: f64,
    median: f64,
    scatter: f64,
    after: Vec<f64>,
}

impl LossHealth {
    /// Takes in a step; the findings that it brings up for the first time.
    pub(crate) fn observe(
        &mut self,
        step: usize,
        loss: f64,
        gradient_norm: Option<f64>,
        skipped: bool,
    ) -> Vec<Finding> {
        let mut found = Vec::new();
        self.skips.push_back(skipped);
        if self.skips.len() > 100 {
            self.skips.pop_front();
        }
        let skips = self.skips.iter().filter(|&&skipped| skipped).count();
        // A scale that begins too high halves a dozen times, and that is all.
        if skips >= 15 || (skips >= 5 && step > 130) {
            found.push(Finding::NotFinite { skipped: skips, of: self.skips.len() });
        }
        if !skipped && gradient_norm.is_some_and(|norm| norm < 1e-12) {
            self.without_gradient += 1;
            if self.without_gradient >= WITHOUT_GRADIENT {
                found.push(Finding::Dead { steps: self.without_gradient });
            }
        } else if !skipped {
            self.without_gradient = 0;
        }
        if loss.is_finite() && loss > 0.0 {
            self.losses.push(loss);
            found.extend(self.outliers(step, loss));
            found.extend(self.divergence());
        }
        found.retain(|finding| self.is_new(finding));
        found
    }

    /// What can only be said at the end.
    pub(crate) fn finish(&mut self) -> Option<Finding> {
        let worse = [Finding::Divergence { lowest: 0.0, now: 0.0 }, Finding::Dead { steps: 0 }];
        let explained = worse.iter().any(|worse| self.told.contains(&std::mem::discriminant(worse)));
        if self.losses.len() < LONG_RUN || explained {
            return None;
        }
        let third = self.losses.len() / 3;
        let mut sorted = self.losses.clone();
        sorted.sort_by(f64::total_cmp);
        // A few far-off losses must not decide it.
        let most = sorted[sorted.len() * 99 / 100];
        let moments = |losses: &[f64]| {
            let count = losses.len() as f64;
            let mean = losses.iter().map(|loss| loss.min(most)).sum::<f64>() / count;
            let variance = losses.iter().map(|loss| (loss.min(most) - mean).powi(2)).sum::<f64>() / (count - 1.0);
            (mean, variance / count)
        };
        let (first, last) = (moments(&self.losses[..third]), moments(&self.losses[self.losses.len() - third..]));
        let uncertainty = 2.0 * (first.1 + last.1).sqrt();
        let plateau = Finding::Plateau { first: first.0, last: last.0, uncertainty };
        // Only where a worthwhile fall can be excluded; a short noisy run says nothing.
        (first.0 - last.0 + uncertainty < WORTHWHILE * first.0)
            .then_some(plateau)
            .filter(|plateau| self.is_new(plateau))
    }

    fn is_new(&mut self, finding: &Finding) -> bool {
        let kind = std::mem::discriminant(finding);
        let new = !self.told.contains(&kind);
        if new {
            self.told.push(kind);
        }
        new
    }

    fn outliers(&mut self, step: usize, loss: f64) -> Option<Finding> {
        let log = loss.ln();
        if let Some(outlier) = &mut self.outlier {
            outlier.after.push(log);
            if outlier.after.len() < AFTERMATH {
                return None;
            }
            let Outlier { step, loss, median, scatter, after } = self.outlier.take()?;
            let level = middle(&after);
            after.into_iter().for_each(|log| self.push(log));
            // Where the losses stay up there it was no spike but the first step of something else. Four standard errors.
            let single = level < median + 4.0 * 1.2533 * scatter / (AFTERMATH as f64).sqrt();
            return single.then_some(Finding::Spike { step, loss, median: median.exp() });
        }
        if self.window.len() >= WINDOW / 2 {
            let (median, scatter) = self.scatter();
            let highest = self.window.iter().copied().fold(f64::MIN, f64::max);
            // Far outside by its distance from the median, or from all that came before where those lie far apart.
            if (log > median + 6.0 * scatter && log > highest + std::f64::consts::LN_2)
                || log > highest + std::f64::consts::LN_10
            {
                self.outlier = Some(Outlier { step, loss, median, scatter, after: Vec::new() });
                return None;
            }
        }
        self.push(log);
        None
    }

    fn divergence(&mut self) -> Option<Finding> {
        if self.window.len() < WINDOW {
            return None;
        }
        let (level, scatter) = self.level();
        let usual = self.usual.map_or(scatter, |usual| usual + (scatter - usual) / (2 * WINDOW) as f64);
        let lowest = self.lowest.map_or(level, |lowest| lowest.min(level));
        (self.usual, self.lowest) = (Some(usual), Some(lowest));
        // Nine standard errors of a median, and no less than twice the loss: chance reaches eight within thousands of steps.
        let error = 1.2533 * usual / ((WINDOW / BLOCK) as f64).sqrt();
        self.risen = if level - lowest > (9.0 * error).max(std::f64::consts::LN_2) { self.risen + 1 } else { 0 };
        (self.risen > STAYS).then(|| Finding::Divergence { lowest: lowest.exp(), now: level.exp() })
    }

    /// The window's level and the scatter of what it is made of: the median of the means of blocks. Means, as the mean loss
    /// is what training lowers and single ones lie far apart; their median, as a few far-off losses must not move it.
    fn level(&self) -> (f64, f64) {
        let losses: Vec<f64> = self.window.iter().map(|log| log.exp()).collect();
        let means: Vec<f64> =
            losses.chunks(BLOCK).map(|block| (block.iter().sum::<f64>() / block.len() as f64).ln()).collect();
        spread(&means, 0.05)
    }

    fn push(&mut self, log: f64) {
        self.window.push_back(log);
        if self.window.len() > WINDOW {
            self.window.pop_front();
        }
    }

    /// Median and scatter of the window's single losses.
    fn scatter(&self) -> (f64, f64) {
        let logs: Vec<f64> = self.window.iter().copied().collect();
        spread(&logs, 0.1)
    }
}

/// Median and median absolute deviation, scaled to a standard deviation and no less than `least`.
fn spread(values: &[f64], least: f64) -> (f64, f64) {
    let median = middle(values);
    let deviations: Vec<f64> = values.iter().map(|value| (value - median).abs()).collect();
    (median, (1.4826 * middle(&deviations)).max(least))
}

fn middle(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => sorted[count / 2],
        count => (sorted[count / 2 - 1] + sorted[count / 2]) / 2.0,
    }
}

/// Warns, once for each finding, with numbers and what helps.
#[derive(Debug, Default)]
pub(crate) struct HealthCheck {
    health: LossHealth,
    skipped: bool,
    looked: bool,
}

impl HealthCheck {
    fn tell(&self, finding: &Finding, session: &mut Session) {
        let message = told(finding, session);
        session.warn(About::Health, finding.kind(), message);
    }

    /// An up-projection that is still zero never got a gradient that mattered.
    fn updates(&mut self, session: &mut Session, at_end: bool) -> Result<()> {
        let (mut all, mut dead) = (0, Vec::new());
        let unread = session.unread();
        let is_read = |name: &str| !unread.iter().any(|start| name.starts_with(start));
        for up in session.parameters().iter().filter(|parameter| parameter.is_up && is_read(&parameter.name)) {
            all += 1;
            if up.norm()? == 0.0 {
                dead.push(up.name.clone());
            }
        }
        if dead.is_empty() {
            return Ok(());
        }
        if dead.len() == all {
            if !std::mem::replace(&mut self.looked, true) {
                let message = format!(
                    "after {} steps the update of every module is still zero: nothing is learnt; look at the learning rates and target_modules",
                    session.steps_done()
                );
                session.warn(About::Health, "dead", message);
            }
        } else if at_end {
            let message = format!(
                "{} of {all} modules have learnt nothing (their update is still zero), {} among them",
                dead.len(),
                dead[..dead.len().min(3)].join(", ")
            );
            session.warn(About::Health, "dead_modules", message);
        }
        Ok(())
    }
}

/// A finding in numbers, and what helps.
fn told(finding: &Finding, session: &Session) -> String {
    let config = session.config();
    let (rate, accumulation) = (config.learning_rate, config.gradient_accumulation_steps);
    match finding {
        Finding::NotFinite { skipped, of } => format!(
            "{skipped} of the last {of} steps were skipped, as a gradient was not finite: use precision = \"bf16\" (or \"fp32\"), or a lower learning_rate than {rate:e}"
        ),
        Finding::Spike { step, loss, median } => format!(
            "the loss of step {step} was {loss:.4}, {:.0} times the usual {median:.4}: a single one does little harm; if they come again, use max_grad_norm = {}, more gradient_accumulation_steps than {accumulation}, or a lower learning_rate than {rate:e}",
            loss / median,
            if config.max_grad_norm > 0.0 { config.max_grad_norm / 2.0 } else { 1.0 }
        ),
        Finding::Divergence { lowest, now } => format!(
            "the loss has risen from {lowest:.4} to {now:.4} and stays there: the run diverges; go back to an earlier save and use a lower learning_rate ({:e}, a third of now) or more gradient_accumulation_steps ({}, now {accumulation})",
            rate / 3.0,
            accumulation * 4
        ),
        Finding::Dead { steps } => format!(
            "no gradient has reached the trained weights for {steps} steps: nothing is learnt; look at target_modules and the learning rates, and in fp16 try precision = \"bf16\""
        ),
        Finding::Plateau { first, last, uncertainty } => {
            let longer = match config.length {
                RunLength::Epochs(epochs) => format!("more epochs than {epochs}"),
                RunLength::Steps(steps) => format!("more max_train_steps than {steps}"),
            };
            let rank = match session.adapter() {
                Some(_) => format!("a higher lora_rank than {}, ", config.lora_rank),
                None => String::new(),
            };
            format!(
                "the loss has hardly fallen: {first:.4} in the run's first third, {last:.4} in its last (± {uncertainty:.4}); if the result is weak, use {rank}{longer} or a higher learning_rate than {rate:e}"
            )
        }
    }
}

impl Callback for HealthCheck {
    /// What an earlier part of the run was told is not told again, and its losses count.
    fn on_start(&mut self, session: &mut Session) -> Result<Control> {
        if let Some(resumed) = session.resumed() {
            for line in history::metrics(&session.config().output_dir, resumed) {
                let loss = line.loss.unwrap_or(f64::NAN);
                self.health.observe(line.step, loss, line.gradient_norm, line.skipped);
                self.skipped |= line.skipped;
            }
        }
        Ok(Control::Continue)
    }

    fn on_step(&mut self, session: &mut Session, report: &StepReport) -> Result<Control> {
        if report.skipped && !std::mem::replace(&mut self.skipped, true) {
            let message = format!(
                "step {} was skipped: a gradient was not finite (loss scale now {}); a few of these are usual while the scale settles, and further ones are only counted",
                report.step, report.loss_scale
            );
            session.warn(About::Health, "skipped_step", message);
        }
        for finding in self.health.observe(report.step, report.loss, report.gradient_norm, report.skipped) {
            self.tell(&finding, session);
        }
        if report.step == ENOUGH_STEPS {
            self.updates(session, false)?;
        }
        Ok(Control::Continue)
    }

    fn on_end(&mut self, session: &mut Session) -> Result<()> {
        if let Some(finding) = self.health.finish() {
            self.tell(&finding, session);
        }
        if session.steps_done() > 0 {
            self.updates(session, true)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use lora_core::random::Stream;

    use super::*;

    /// What a diffusion loss looks like: by uniform timesteps between 0.003 and 0.6, averaged over `batch`, times a trend.
    fn series(seed: u64, steps: usize, batch: usize, trend: impl Fn(f64) -> f64) -> Vec<f64> {
        let mut random = Stream::new(seed);
        let mut picture = || {
            let time = f64::from(random.uniform());
            let noise = f64::from(random.normals(1)[0]);
            (0.003 + 0.6 * (1.0 - time).powi(4)) * (0.3 * noise).exp()
        };
        let mut losses = Vec::new();
        for step in 0..steps {
            let mean = (0..batch).map(|_| picture()).sum::<f64>() / batch as f64;
            losses.push(mean * trend(step as f64 / steps as f64));
        }
        losses
    }

    fn findings(losses: &[f64]) -> Vec<Finding> {
        let mut health = LossHealth::default();
        let mut all: Vec<Finding> = losses
            .iter()
            .enumerate()
            .flat_map(|(index, &loss)| health.observe(index + 1, loss, Some(0.1), false))
            .collect();
        all.extend(health.finish());
        all
    }

    #[test]
    fn ordinary_noise_is_no_finding() {
        let learning = |share: f64| 0.75 + 0.25 * (-4.0 * share).exp();
        for seed in 0..12 {
            for batch in [1, 2, 4, 16] {
                for steps in [40, 250, 1500, 4000] {
                    let losses = series(seed, steps, batch, learning);
                    assert_eq!(findings(&losses), [], "seed {seed}, batch {batch}, {steps} steps");
                }
                // Too short to say that it stands still.
                assert_eq!(findings(&series(seed, LONG_RUN - 1, batch, |_| 1.0)), []);
            }
            // Long, but too noisy to tell.
            assert_eq!(findings(&series(seed, 400, 1, |_| 1.0)), []);
        }
    }

    #[test]
    fn each_disease_is_found_once_and_no_other() {
        let learning = |share: f64| 0.75 + 0.25 * (-4.0 * share).exp();
        for seed in 0..8 {
            let mut spiked = series(seed, 1500, 4, learning);
            for step in [700, 900, 1100] {
                spiked[step] = 40.0;
            }
            let found = findings(&spiked);
            assert!(matches!(found[..], [Finding::Spike { step: 701, loss: 40.0, .. }]), "{found:?}");

            // Creeping up, and by one jump.
            let creeping = series(seed, 1500, 4, |share| if share < 0.5 { 1.0 } else { (8.0 * (share - 0.5)).exp() });
            let jump = series(seed, 1500, 4, |share| if share < 0.5 { 1.0 } else { 8.0 });
            for losses in [creeping, jump] {
                let found = findings(&losses);
                let [Finding::Divergence { lowest, now }] = found[..] else { panic!("{found:?}") };
                assert!(now > 2.0 * lowest, "{now} {lowest}");
            }

            let found = findings(&series(seed, 9000, 16, |_| 1.0));
            let [Finding::Plateau { first, last, uncertainty }] = found[..] else { panic!("{found:?}") };
            assert!((first - last).abs() < WORTHWHILE * first && uncertainty < WORTHWHILE * first);

            let losses = series(seed, 1500, 4, learning);
            let watch = |gradient: &dyn Fn(usize) -> Option<f64>| {
                let mut health = LossHealth::default();
                let steps = losses.iter().enumerate();
                let mut all: Vec<_> = steps
                    .flat_map(|(index, &loss)| {
                        let norm = gradient(index);
                        health.observe(index + 1, loss, norm, norm.is_none())
                    })
                    .collect();
                all.extend(health.finish());
                all
            };
            let found = watch(&|_| Some(0.0));
            assert!(matches!(found[..], [Finding::Dead { steps: WITHOUT_GRADIENT }]), "{found:?}");
            let found = watch(&|step| (step % 10 != 0).then_some(0.1));
            assert!(matches!(found[..], [Finding::NotFinite { skipped: 5.., .. }]), "{found:?}");
            // A loss scale that settles, and one overflow now and then.
            assert_eq!(watch(&|step| (step >= 12 && step % 400 != 0).then_some(0.1)), []);
        }
    }

    #[test]
    fn a_loss_that_is_no_number_is_left_to_others() {
        let mut health = LossHealth::default();
        for step in 0..200 {
            let loss = if step % 3 == 0 { f64::NAN } else { 0.0 };
            assert_eq!(health.observe(step, loss, Some(1.0), false), []);
        }
        assert_eq!(health.finish(), None);
    }
}
