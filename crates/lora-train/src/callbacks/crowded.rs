//! Says so when steps crawl because another program came to need the cores that threads of this one spin on.

use std::time::{Duration, Instant};

use lora_core::openmp::{self, CROWDED, Load};

use crate::Result;
use crate::callback::{Callback, Control};
use crate::event::About;
use crate::session::{Session, StepReport};

/// How long steps are counted together.
const WINDOW: Duration = Duration::from_secs(10);

/// Steps that take this many times as long as the fastest window's crawl.
const CRAWLING: f64 = 2.0;

/// Warns once.
#[derive(Debug, Default)]
pub(crate) struct Crowded {
    /// `None` where there is nothing to watch, and after the warning.
    watched: Option<Watched>,
}

#[derive(Debug)]
struct Watched {
    load: Load,
    since: Instant,
    seconds: f64,
    steps: u32,
    /// Seconds of a step in the fastest window.
    fastest: f64,
}

impl Watched {
    fn new(load: Load, fastest: f64) -> Self {
        Self { load, since: Instant::now(), seconds: 0.0, steps: 0, fastest }
    }

    /// Counts a step; how many times as long steps take, and the cores that others keep busy, where they crawl for that.
    fn step(&mut self, seconds: f64, others: impl Fn(&Load) -> Option<f64>) -> Option<(f64, f64)> {
        self.seconds += seconds;
        self.steps += 1;
        let mean = self.seconds / f64::from(self.steps);
        let cores = others(&self.load)?;
        let times = mean / self.fastest;
        self.fastest = self.fastest.min(mean);
        (self.seconds, self.steps) = (0.0, 0);
        (cores >= CROWDED && times >= CRAWLING).then_some((times, cores))
    }
}

impl Callback for Crowded {
    fn on_start(&mut self, session: &mut Session) -> Result<Control> {
        if session.device_memory()?.is_none() && !openmp::yields() {
            self.watched = Load::now().map(|load| Watched::new(load, f64::INFINITY));
        }
        Ok(Control::Continue)
    }

    fn on_step(&mut self, session: &mut Session, report: &StepReport) -> Result<Control> {
        let Some(watched) = &mut self.watched else { return Ok(Control::Continue) };
        let over = watched.since.elapsed() >= WINDOW;
        let crawls = watched.step(report.seconds, |load| over.then(|| load.others_since()).flatten());
        if let Some((times, cores)) = crawls {
            let message = format!(
                "steps take {times:.1} times as long as before, beside programs that keep {cores:.1} cores busy: a run that is started \
                 now lets its threads yield to them; stop this one (it saves what it has) and go on with resume = \"auto\", \
                 if save_state = true"
            );
            session.warn(About::Machine, "crowded", message);
            self.watched = None;
        } else if over {
            self.watched = Load::now().map(|load| Watched::new(load, watched.fastest));
        }
        Ok(Control::Continue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_crawl_where_they_slow_down_beside_others() {
        let Some(load) = Load::now() else { return };
        let mut watched = Watched::new(load, f64::INFINITY);
        assert_eq!(watched.step(1.0, |_| None), None);
        assert_eq!(watched.step(3.0, |_| Some(1.0)), None, "the first window is what others are held against");
        assert_eq!(watched.fastest, 2.0);
        assert_eq!(watched.step(6.0, |_| Some(0.1)), None, "nobody else computes");
        assert_eq!(watched.step(3.0, |_| Some(1.0)), None, "not slow enough");
        assert_eq!(watched.step(5.0, |_| Some(1.0)), Some((2.5, 1.0)));
    }
}
