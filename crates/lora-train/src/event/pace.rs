//! How fast a run goes, and when it will be over.

use std::time::{Duration, Instant};

use super::Step;
use crate::session::StepReport;

/// Share of a new loss in the running mean.
const SHARE: f64 = 0.05;

/// Counts steps against the clock.
#[derive(Debug)]
pub(crate) struct Pace {
    start: Instant,
    paused: Duration,
    unit: &'static str,
    steps: usize,
    measured: f64,
    mean: Option<f64>,
}

impl Pace {
    /// From now on, for steps of what is counted in `unit`.
    pub(crate) fn new(unit: &'static str) -> Self {
        Self { start: Instant::now(), paused: Duration::ZERO, unit, steps: 0, measured: 0.0, mean: None }
    }

    /// So long the run was held, which says nothing of its speed.
    pub(crate) fn pause(&mut self, held: Duration) {
        self.paused += held;
    }

    /// Counts a step.
    pub(crate) fn step(&mut self, report: StepReport) -> Step {
        let elapsed = self.start.elapsed().saturating_sub(self.paused).as_secs_f64().max(1e-9);
        self.count(report, elapsed)
    }

    fn count(&mut self, report: StepReport, elapsed: f64) -> Step {
        self.steps += 1;
        self.measured += report.measure;
        if report.loss.is_finite() {
            self.mean = Some(self.mean.map_or(report.loss, |mean| mean + (report.loss - mean) * SHARE));
        }
        let left = report.steps.saturating_sub(report.step) as f64;
        Step {
            mean_loss: self.mean,
            rate: self.measured / elapsed,
            unit: self.unit,
            seconds_left: elapsed / self.steps as f64 * left,
            report,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_run_counts_its_own_steps_alone() {
        let report =
            |step: usize, loss: f64| StepReport { step, steps: 100, loss, measure: 4.0, ..StepReport::default() };
        let mut pace = Pace::new("img");
        let first = pace.count(report(91, 1.0), 2.0);
        assert_eq!((first.rate, first.seconds_left, first.mean_loss), (2.0, 18.0, Some(1.0)));
        let second = pace.count(report(92, f64::NAN), 4.0);
        assert_eq!((second.rate, second.seconds_left, second.mean_loss), (2.0, 16.0, Some(1.0)));
        assert_eq!(pace.count(report(100, 2.0), 6.0).mean_loss, Some(1.05));
    }
}
