//! How noise levels and timesteps are drawn, as keys say it, and a look at those of a run. The formulas are
//! `lora_models::diffusion::flow`'s.

use std::fmt::Write;

use lora_core::random::Stream;
use lora_models::diffusion::NoiseSchedule;
use lora_models::diffusion::flow::{Density, NoiseLevels, Shift};

use crate::Result;
use crate::config::TrainConfig;

/// What `timestep_sampling` is. Where no key says it: by the picture's size for a base that has tokens, evenly for one that has
/// none, unless a shift is given.
fn sampling(config: &TrainConfig, usual: Option<Shift>) -> &str {
    let usual = match config.extra.number("discrete_flow_shift") {
        Some(_) => "shift",
        None if usual.is_some() => "flux_shift",
        None => "uniform",
    };
    config.extra.text("timestep_sampling").unwrap_or(usual)
}

/// The noise levels of a configuration; `usual` moves them where no key says it, none for a base whose levels do not follow the
/// picture's size.
///
/// # Errors
/// [`crate::Error::Config`] where a shift is given beside one that comes from the picture's size, or the base has no such, or
/// the range is empty.
pub(super) fn of(config: &TrainConfig, usual: Option<Shift>) -> Result<NoiseLevels> {
    let number = |key: &str| config.extra.number(key);
    let factor = number("discrete_flow_shift");
    let normal = |mean: f64, deviation: f64| Density::LogitNormal { mean, deviation };
    let sigmoid = normal(0.0, number("sigmoid_scale").unwrap_or(1.0));
    let given = Shift::Factor(factor.unwrap_or(1.0));
    let (density, shift) = match sampling(config, usual) {
        "uniform" => (Density::Uniform, given),
        "sigmoid" => (sigmoid, given),
        "logit_normal" => (normal(number("logit_mean").unwrap_or(0.0), number("logit_std").unwrap_or(1.0)), given),
        "mode" => (Density::Mode { scale: number("mode_scale").unwrap_or(1.29) }, given),
        "shift" => (sigmoid, Shift::Factor(factor.unwrap_or(3.0))),
        _ if factor.is_some() => {
            let message =
                "timestep_sampling = \"flux_shift\" takes the shift from the picture's size; take one of both out";
            return Err(config.refused([("discrete_flow_shift", message.to_owned())]).into());
        }
        _ => match usual {
            Some(usual) => (sigmoid, usual),
            None => {
                let message = "\"flux_shift\" is for bases that are trained by flow matching; take \"shift\" with discrete_flow_shift";
                return Err(config.refused([("timestep_sampling", message.to_owned())]).into());
            }
        },
    };
    let range = (number("min_timestep").unwrap_or(0.0) / 1000.0, number("max_timestep").unwrap_or(1000.0) / 1000.0);
    if range.0 >= range.1 {
        let message = format!("{} is not above min_timestep, {}", range.1 * 1000.0, range.0 * 1000.0);
        return Err(config.refused([("max_timestep", message)]).into());
    }
    Ok(NoiseLevels { density, shift, range })
}

/// The timestep below [`NoiseSchedule::TIMESTEPS`] that a stream draws for a base whose levels are so many.
pub(super) fn timestep(levels: &NoiseLevels, stream: &Stream) -> usize {
    let all = NoiseSchedule::TIMESTEPS as f64;
    let (low, high) = ((levels.range.0 * all).floor() as usize, (levels.range.1 * all).ceil() as usize);
    match (levels.density, levels.shift) {
        (Density::Uniform, Shift::Factor(1.0)) => low + stream.clone().below((high - low) as u64) as usize,
        _ => ((levels.draw(stream, 0) * all) as usize).clamp(low, high - 1),
    }
}

/// What a file says of them, in sd-scripts' words.
pub(super) fn record(config: &TrainConfig, usual: Option<Shift>, levels: &NoiseLevels) -> Vec<(&'static str, String)> {
    let sampling = sampling(config, usual);
    let mut said = vec![("ss_timestep_sampling", sampling.to_owned())];
    if let Shift::Factor(factor) = levels.shift {
        said.push(("ss_discrete_flow_shift", factor.to_string()));
    }
    if let Density::LogitNormal { mean, deviation } = levels.density {
        match sampling {
            "logit_normal" => {
                said.extend([("ss_logit_mean", mean.to_string()), ("ss_logit_std", deviation.to_string())]);
            }
            _ => said.push(("ss_sigmoid_scale", deviation.to_string())),
        }
    }
    if let Density::Mode { scale } = levels.density {
        said.push(("ss_mode_scale", scale.to_string()));
    }
    said
}

/// Bars of a histogram.
const BARS: usize = 10;

/// Characters of the longest bar.
const WIDTH: usize = 40;

/// How noise levels from 0 to 1 are spread, as bars of text over timesteps.
pub(crate) fn histogram(levels: &[f64]) -> String {
    let mut counts = [0usize; BARS];
    for level in levels {
        counts[((level * BARS as f64) as usize).min(BARS - 1)] += 1;
    }
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    let step = NoiseSchedule::TIMESTEPS / BARS;
    let mut text =
        format!("timesteps of {} draws, from data (0) to noise ({}):", levels.len(), NoiseSchedule::TIMESTEPS);
    for (bar, count) in counts.into_iter().enumerate() {
        let (from, marks) = (bar * step, "#".repeat((count * WIDTH).div_ceil(most)));
        let _ = write!(text, "\n  {from:>4} … {:<4} {marks} {count}", from + step - 1);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Format;

    fn config(keys: &[&str]) -> TrainConfig {
        let text = "base_model: b\ntrain_data_dir: d\noutput_dir: o\n";
        TrainConfig::from_text(text, Format::Yaml, keys).unwrap()
    }

    fn timesteps(keys: &[&str]) -> Vec<usize> {
        let levels = of(&config(keys), None).unwrap();
        (0..4000).map(|visit| timestep(&levels, &Stream::new(5).with(visit))).collect()
    }

    /// The share below a timestep.
    fn share(timesteps: &[usize], below: usize) -> f64 {
        timesteps.iter().filter(|&&timestep| timestep < below).count() as f64 / timesteps.len() as f64
    }

    #[test]
    fn timesteps_without_keys_are_even_and_those_of_before() {
        let found = timesteps(&[]);
        let before: Vec<usize> = (0..4000).map(|visit| Stream::new(5).with(visit).below(1000) as usize).collect();
        assert_eq!(found, before);
    }

    #[test]
    fn a_range_ends_before_its_highest_timestep_whatever_the_distribution() {
        for sampling in ["uniform", "sigmoid", "shift", "logit_normal", "mode"] {
            let sampling = format!("timestep_sampling={sampling}");
            let found = timesteps(&[&sampling, "min_timestep=200", "max_timestep=203"]);
            assert!((200..203).all(|timestep| found.contains(&timestep)), "{sampling}");
            assert!(found.iter().all(|timestep| (200..203).contains(timestep)), "{sampling}");
        }
    }

    /// Shares below timesteps in closed form: of a sigmoid of normal numbers P(σ < x) = Φ(logit x / s).
    #[test]
    fn distributions_are_those_of_their_definitions() {
        let near = |keys: &[&str], below: usize, expected: f64| {
            let found = share(&timesteps(keys), below);
            // Three standard deviations of 4000 draws.
            assert!((found - expected).abs() < 0.024, "{keys:?} {found} {expected}");
        };
        near(&[], 250, 0.25);
        // Φ(-ln 3).
        near(&["timestep_sampling=sigmoid"], 250, 0.1360);
        near(&["timestep_sampling=sigmoid", "sigmoid_scale=0.5"], 250, 0.0140);
        // Moved by 3, below 1/2 is below 1/4 before: as the first.
        near(&["timestep_sampling=shift"], 500, 0.1360);
        near(&["discrete_flow_shift=3"], 500, 0.1360);
        near(&["timestep_sampling=uniform", "discrete_flow_shift=3"], 500, 0.25);
        // Φ((0 - 1) / 2).
        near(&["timestep_sampling=logit_normal", "logit_mean=1", "logit_std=2"], 500, 0.3085);
    }

    #[test]
    fn what_means_nothing_for_a_base_without_tokens_is_refused() {
        let error = of(&config(&["timestep_sampling=flux_shift"]), None).unwrap_err().to_string();
        assert!(error.contains("timestep_sampling") && error.contains("discrete_flow_shift"), "{error}");
        assert!(of(&config(&["min_timestep=500", "max_timestep=500"]), None).is_err());
    }

    #[test]
    fn a_histogram_counts_every_level_once() {
        let text = histogram(&[0.0, 0.05, 0.05, 0.95, 1.0]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 11);
        assert!(lines[0].contains("5 draws"));
        assert_eq!(lines[1].trim_start(), format!("0 … 99   {} 3", "#".repeat(40)));
        assert_eq!(lines[5].trim(), "400 … 499   0");
        assert_eq!(lines[10].trim(), format!("900 … 999  {} 2", "#".repeat(27)));
    }
}
