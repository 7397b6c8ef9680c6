//! How pictures become optimiser steps.

use std::fmt;

/// The arithmetic of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct StepPlan {
    /// Visits of pictures in an epoch, repeats included.
    pub visits_per_epoch: usize,
    /// Pictures of a micro-batch.
    pub batch_size: usize,
    /// Micro-batches of a step.
    pub accumulation: usize,
    /// Micro-batches of an epoch; the last may be smaller, none is dropped.
    pub batches_per_epoch: usize,
    /// Optimiser steps of an epoch; the last may take fewer micro-batches.
    pub steps_per_epoch: usize,
    /// Epochs begun by the end.
    pub epochs: usize,
    /// Optimiser steps of the run.
    pub steps: usize,
}

impl StepPlan {
    /// For a number of visits per epoch, and either epochs or steps.
    pub fn new(visits_per_epoch: usize, batch_size: usize, accumulation: usize, length: RunLength) -> Self {
        Self::of_batches(visits_per_epoch, visits_per_epoch.div_ceil(batch_size), batch_size, accumulation, length)
    }

    /// Where buckets have a last, smaller batch each.
    pub(crate) fn of_batches(
        visits_per_epoch: usize,
        batches_per_epoch: usize,
        batch_size: usize,
        accumulation: usize,
        length: RunLength,
    ) -> Self {
        let steps_per_epoch = batches_per_epoch.div_ceil(accumulation).max(1);
        let (epochs, steps) = match length {
            RunLength::Epochs(epochs) => (epochs, epochs.saturating_mul(steps_per_epoch)),
            RunLength::Steps(steps) => (steps.div_ceil(steps_per_epoch), steps),
        };
        Self { visits_per_epoch, batch_size, accumulation, batches_per_epoch, steps_per_epoch, epochs, steps }
    }
}

impl fmt::Display for StepPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} visits an epoch (repeats included) / batch {} × {} accumulated = {} step(s) an epoch; {} epoch(s): {} steps",
            self.visits_per_epoch, self.batch_size, self.accumulation, self.steps_per_epoch, self.epochs, self.steps
        )
    }
}

/// How long to train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RunLength {
    /// Times through all pictures.
    Epochs(usize),
    /// Optimiser steps.
    Steps(usize),
}

impl Default for RunLength {
    fn default() -> Self {
        RunLength::Epochs(10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_dropped() {
        let plan = StepPlan::new(10, 4, 2, RunLength::Epochs(3));
        assert_eq!((plan.batches_per_epoch, plan.steps_per_epoch, plan.steps), (3, 2, 6));
        let plan = StepPlan::new(10, 4, 2, RunLength::Steps(5));
        assert_eq!((plan.epochs, plan.steps), (3, 5));
        assert!(plan.to_string().contains("5 steps"));
    }
}
