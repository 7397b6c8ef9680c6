//! How the learning rate goes over a run.

use crate::config::{LrScheduler, Warmup};

/// A schedule over a known number of steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Schedule {
    kind: LrScheduler,
    warmup: usize,
    steps: usize,
}

impl Schedule {
    /// For a run of `steps`.
    pub(crate) fn new(kind: LrScheduler, warmup: Warmup, steps: usize) -> Self {
        let warmup = match warmup {
            Warmup::Steps(warmup) => warmup,
            Warmup::Share(share) => (share * steps as f64) as usize,
        };
        Self { kind, warmup, steps }
    }

    /// Steps of warm-up.
    pub(crate) fn warmup(&self) -> usize {
        self.warmup
    }

    /// The factor on the learning rate for a step, counted from 0 (the formulas of transformers' schedules).
    pub(crate) fn factor(&self, step: usize) -> f64 {
        if step < self.warmup {
            return step as f64 / self.warmup as f64;
        }
        let progress = (step - self.warmup) as f64 / self.steps.saturating_sub(self.warmup).max(1) as f64;
        match self.kind {
            LrScheduler::Constant => 1.0,
            LrScheduler::Linear => (1.0 - progress).max(0.0),
            LrScheduler::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_follow_the_formulas() {
        let cosine = Schedule::new(LrScheduler::Cosine, Warmup::Steps(10), 110);
        assert_eq!(cosine.factor(0), 0.0);
        assert_eq!(cosine.factor(5), 0.5);
        assert_eq!(cosine.factor(10), 1.0);
        assert!((cosine.factor(60) - 0.5).abs() < 1e-12);
        assert!(cosine.factor(110) < 1e-12);
        let linear = Schedule::new(LrScheduler::Linear, Warmup::Share(0.1), 100);
        assert_eq!((linear.warmup(), linear.factor(55)), (10, 0.5));
        let constant = Schedule::new(LrScheduler::Constant, Warmup::Steps(0), 100);
        assert_eq!((constant.factor(0), constant.factor(99)), (1.0, 1.0));
        // A warm-up longer than the run only warms up.
        assert_eq!(Schedule::new(LrScheduler::Cosine, Warmup::Steps(20), 10).factor(9), 0.45);
    }
}
