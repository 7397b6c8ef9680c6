//! What is done every so many minutes: of a run's time from its start on, or from the last time on.

use std::time::{Duration, Instant};

/// Tells when so many minutes have passed again.
#[derive(Debug)]
pub(super) struct Clock {
    every: Option<Duration>,
    last: Instant,
}

impl Clock {
    /// Of a run that begins now; `None` is never due.
    pub(super) fn of_minutes(minutes: Option<f64>) -> Self {
        // What is longer than any run is never due either.
        let every = minutes.and_then(|minutes| Duration::try_from_secs_f64(60.0 * minutes).ok());
        Self { every, last: Instant::now() }
    }

    /// Counts from now on.
    pub(super) fn restart(&mut self) {
        self.last = Instant::now();
    }

    /// Whether it is due; then it counts from now on.
    pub(super) fn is_due(&mut self) -> bool {
        let due = self.every.is_some_and(|every| self.last.elapsed() >= every);
        if due {
            self.restart();
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_due_each_time_that_it_has_run_down() {
        let mut clock = Clock::of_minutes(Some(1e-3));
        let start = Instant::now();
        let due = std::iter::repeat_with(|| {
            std::thread::sleep(Duration::from_millis(5));
            clock.is_due()
        });
        let due: Vec<bool> = due.take(40).collect();
        let most = (start.elapsed().as_millis() / 60 + 1) as usize;
        let count = due.iter().filter(|due| **due).count();
        assert!(!due[0] && count >= 1 && count <= most, "{count} {most}");
        for never in [None, Some(f64::MAX)] {
            assert!(!Clock::of_minutes(never).is_due());
        }
    }
}
