//! The noise schedule of a base and what its U-Net predicts: as the configuration says, or a mark in the file, the scheduler of a
//! folder or the file's metadata. The formulas are `lora_models::diffusion`'s.

use lora_io::checkpoint::Checkpoint;
use lora_models::diffusion::{NoiseSchedule, Prediction, noise_schedule};

use crate::config::TrainConfig;
use crate::{Error, Result};

/// The schedule of a base, and by what it is known, for people. `usual` is what all bases of its kind predict where nothing
/// says otherwise; where they differ it is `None`, and nothing is guessed.
///
/// # Errors
/// Where nothing says what the base predicts, the folder's scheduler is of another kind, or noise is predicted with zero terminal
/// SNR.
pub(super) fn schedule(
    config: &TrainConfig,
    checkpoint: &Checkpoint,
    usual: Option<Prediction>,
) -> Result<(NoiseSchedule, &'static str)> {
    let (schedule, by) = published(config, checkpoint, usual)?;
    let zero = config.extra.switch("zero_terminal_snr");
    let marked = checkpoint.is_marked("ztsnr") && schedule.prediction() == Prediction::Velocity;
    Ok(match zero.unwrap_or(marked || schedule.has_zero_terminal_snr()) {
        true if schedule.has_zero_terminal_snr() => (schedule, by),
        true => (schedule.with_zero_terminal_snr()?, by),
        false => (NoiseSchedule::new(schedule.prediction()), by),
    })
}

fn published(
    config: &TrainConfig,
    checkpoint: &Checkpoint,
    usual: Option<Prediction>,
) -> Result<(NoiseSchedule, &'static str)> {
    let of = |velocity: bool| NoiseSchedule::new(if velocity { Prediction::Velocity } else { Prediction::Epsilon });
    if let Some(velocity) = config.v_parameterization {
        return Ok((of(velocity), "v_parameterization says"));
    }
    if checkpoint.is_marked("v_pred") {
        return Ok((of(true), "the mark `v_pred` in its file says"));
    }
    if checkpoint.scheduler().is_some() {
        return Ok((noise_schedule(checkpoint)?, "its folder's scheduler says"));
    }
    match checkpoint.metadata().get("modelspec.prediction_type").map(String::as_str) {
        Some("v") => return Ok((of(true), "its metadata say")),
        Some("epsilon") => return Ok((of(false), "its metadata say")),
        _ => {}
    }
    let labelled = checkpoint.family().labels.and_then(|labels| {
        let architecture = checkpoint.metadata().get("modelspec.architecture")?;
        let known = [false, true].map(|velocity| labels.architecture(velocity));
        // A label that both kinds have says nothing.
        (known[0] != known[1]).then(|| known.iter().position(|label| label == architecture)).flatten()
    });
    match (labelled, usual) {
        (Some(kind), _) => Ok((of(kind == 1), "its metadata say")),
        (None, Some(usual)) => Ok((
            NoiseSchedule::new(usual),
            "bases of its kind do unless their files say otherwise (v_parameterization = true changes it)",
        )),
        (None, None) => {
            Err(Error::PredictionUnknown { path: checkpoint.path().to_owned(), family: checkpoint.family().title })
        }
    }
}
