//! How noise levels are drawn, as keys say it. The formulas are `lora_models::diffusion::flow`'s.

use lora_models::diffusion::flow::{Density, NoiseLevels, Shift};

use crate::Result;
use crate::config::TrainConfig;

/// What `timestep_sampling` is where no key says it: by the picture's size, unless a shift is given.
fn sampling(config: &TrainConfig) -> &str {
    let usual = if config.extra.number("discrete_flow_shift").is_some() { "shift" } else { "flux_shift" };
    config.extra.text("timestep_sampling").unwrap_or(usual)
}

/// The noise levels of a configuration; `usual` moves them where no key says it.
///
/// # Errors
/// [`crate::Error::Config`] where a shift is given beside one that comes from the picture's size, or the range is empty.
pub(super) fn of(config: &TrainConfig, usual: Shift) -> Result<NoiseLevels> {
    let number = |key: &str| config.extra.number(key);
    let factor = number("discrete_flow_shift");
    let normal = |mean: f64, deviation: f64| Density::LogitNormal { mean, deviation };
    let sigmoid = normal(0.0, number("sigmoid_scale").unwrap_or(1.0));
    let given = Shift::Factor(factor.unwrap_or(1.0));
    let (density, shift) = match sampling(config) {
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
        _ => (sigmoid, usual),
    };
    let range = (number("min_timestep").unwrap_or(0.0) / 1000.0, number("max_timestep").unwrap_or(1000.0) / 1000.0);
    if range.0 >= range.1 {
        let message = format!("{} is not above min_timestep, {}", range.1 * 1000.0, range.0 * 1000.0);
        return Err(config.refused([("max_timestep", message)]).into());
    }
    Ok(NoiseLevels { density, shift, range })
}

/// What a file says of them, in sd-scripts' words.
pub(super) fn record(config: &TrainConfig, levels: &NoiseLevels) -> Vec<(&'static str, String)> {
    let mut said = vec![("ss_timestep_sampling", sampling(config).to_owned())];
    if let Shift::Factor(factor) = levels.shift {
        said.push(("ss_discrete_flow_shift", factor.to_string()));
    }
    if let Density::LogitNormal { mean, deviation } = levels.density {
        match sampling(config) {
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
