//! How the learning rate goes over a run.

use crate::config::{LrScheduler, TrainConfig, Warmup};

/// A schedule over a known number of steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Schedule {
    kind: LrScheduler,
    warmup: usize,
    steps: usize,
    cycles: usize,
    power: f64,
    /// What is left of the learning rate at the end.
    min_ratio: f64,
    /// The last steps, over which alone it falls.
    decay: Option<usize>,
}

/// Steps after which `inverse_sqrt` without a warm-up has fallen to 1/√2 (transformers').
const TIMESCALE: usize = 10_000;

impl Schedule {
    /// For a run of `steps`.
    pub(crate) fn new(config: &TrainConfig, steps: usize) -> Self {
        let warmup = match config.lr_warmup {
            Warmup::Steps(warmup) => warmup,
            Warmup::Share(share) => (share * steps as f64) as usize,
        };
        Self {
            kind: config.lr_scheduler,
            warmup,
            steps,
            cycles: config.lr_scheduler_num_cycles,
            power: config.lr_scheduler_power,
            min_ratio: config.lr_min_ratio,
            decay: config.lr_decay_steps,
        }
    }

    /// Steps of warm-up.
    pub(crate) fn warmup(&self) -> usize {
        self.warmup
    }

    /// The factor on the learning rate for a step, counted from 0 (the formulas of transformers' schedules; REX by its paper).
    pub(crate) fn factor(&self, step: usize) -> f64 {
        if step < self.warmup {
            return step as f64 / self.warmup as f64;
        }
        let progress = self.progress(step);
        let half_cosine = |progress: f64| 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        let factor = match self.kind {
            LrScheduler::Constant => return 1.0,
            LrScheduler::InverseSqrt => {
                let timescale = if self.warmup == 0 { TIMESCALE } else { self.warmup };
                return (timescale as f64 / (step - self.warmup + timescale) as f64).sqrt();
            }
            LrScheduler::Linear => 1.0 - progress,
            LrScheduler::Cosine => half_cosine(progress),
            LrScheduler::CosineWithRestarts if progress >= 1.0 => 0.0,
            LrScheduler::CosineWithRestarts => half_cosine((self.cycles as f64 * progress) % 1.0),
            LrScheduler::Polynomial => (1.0 - progress).powf(self.power),
            LrScheduler::Rex => (1.0 - progress) / (1.0 - progress / 2.0),
        };
        self.min_ratio + (1.0 - self.min_ratio) * factor
    }

    /// The part of the fall that lies behind a step after the warm-up, from 0 to 1.
    fn progress(&self, step: usize) -> f64 {
        let begin = self.decay.map_or(self.warmup, |decay| self.steps.saturating_sub(decay).max(self.warmup));
        let fallen = step.saturating_sub(begin) as f64 / self.steps.saturating_sub(begin).max(1) as f64;
        fallen.min(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Format;

    fn schedule(keys: &str, steps: usize) -> Schedule {
        let text = format!("base_model = \"b\"\ntrain_data_dir = \"d\"\noutput_dir = \"o\"\n{keys}\n");
        Schedule::new(&TrainConfig::from_text::<&str>(&text, Format::Toml, &[]).unwrap(), steps)
    }

    #[test]
    fn factors_follow_the_formulas() {
        let cosine = schedule("lr_scheduler = \"cosine\"\nlr_warmup_steps = 10", 110);
        assert_eq!(cosine.factor(0), 0.0);
        assert_eq!(cosine.factor(5), 0.5);
        assert_eq!(cosine.factor(10), 1.0);
        assert!((cosine.factor(60) - 0.5).abs() < 1e-12);
        assert!(cosine.factor(110) < 1e-12);
        let linear = schedule("lr_scheduler = \"linear\"\nlr_warmup_steps = 0.1", 100);
        assert_eq!((linear.warmup(), linear.factor(55)), (10, 0.5));
        let constant = schedule("", 100);
        assert_eq!((constant.factor(0), constant.factor(99)), (1.0, 1.0));
        // A warm-up longer than the run only warms up.
        assert_eq!(schedule("lr_scheduler = \"cosine\"\nlr_warmup_steps = 20", 10).factor(9), 0.45);
        // REX at half of its way, by the paper's formula.
        let rex = schedule("lr_scheduler = \"rex\"", 100);
        assert_eq!((rex.factor(0), rex.factor(50), rex.factor(100)), (1.0, 0.5 / 0.75, 0.0));
        // Without a warm-up, the time scale is 10,000 steps.
        assert!((schedule("lr_scheduler = \"inverse_sqrt\"", 10).factor(10_000) - 0.5f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn schedules_are_those_of_transformers() {
        let golden: serde_json::Value = serde_json::from_str(include_str!("../tests/golden/schedules.json")).unwrap();
        let (steps, warmup) = (golden["steps"].as_u64().unwrap() as usize, &golden["warmup"]);
        for case in golden["cases"].as_array().unwrap() {
            let mut keys = format!("lr_scheduler = {}\nlr_warmup_steps = {warmup}\n", case["name"]);
            for (key, value) in case["options"].as_object().unwrap() {
                keys.push_str(&format!("{key} = {value}\n"));
            }
            let own = schedule(&keys, steps);
            for (step, factor) in case["factors"].as_array().unwrap().iter().enumerate() {
                let (ours, theirs) = (own.factor(step), factor.as_f64().unwrap());
                assert!((ours - theirs).abs() < 1e-11, "{keys} at {step}: {ours}, there {theirs}");
            }
        }
    }
}
