//! A whole run: prepare, step, watch, save.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::callback::{Callback, Control};
use crate::callbacks::{
    Crowded, HealthCheck, Metrics, Samples, SaveCheckpoints, SaveStates, ValidationLoss, best_name,
};
use crate::config::TrainConfig;
use crate::plugins::Plugins;
use crate::session::{Preparing, Session};
use crate::{Result, auto_label};

/// What a run left behind.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct RunResult {
    /// The LoRA.
    pub lora: PathBuf,
    /// Steps done.
    pub steps: usize,
    /// Why it stopped before its end, if it did.
    pub stopped: Option<String>,
    /// Where the held-out loss was lowest, if it was looked at while training.
    pub best: Option<Best>,
}

/// The look at the held-out loss that showed the lowest.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Best {
    /// The step before it.
    pub step: usize,
    /// The loss.
    pub loss: f64,
    /// The LoRA of that step, with `save_best`.
    pub lora: Option<PathBuf>,
}

/// Trains from a configuration to a LoRA on disk.
///
/// Metrics, loss curve, samples, intermediate saves and health checks are callbacks like the configuration's own and
/// those given here. `stop` ends the run at the next step, with the LoRA saved: set it from a signal handler.
///
/// # Errors
/// Whatever ends the run before its end, with what to do about it. The trained weights are saved before it returns
/// wherever they are whole.
pub fn train(
    config: TrainConfig,
    plugins: &Plugins,
    mut extra: Vec<Box<dyn Callback>>,
    stop: &Arc<AtomicBool>,
    progress: &mut dyn FnMut(Preparing),
) -> Result<RunResult> {
    let mut callbacks: Vec<Box<dyn Callback>> = vec![
        Box::new(Metrics::new(&config)),
        Box::new(HealthCheck::default()),
        Box::new(Crowded::default()),
        Box::new(ValidationLoss::new(&config)),
        Box::new(Samples::new(&config)),
        Box::new(SaveCheckpoints::new(&config)),
        Box::new(SaveStates::new(&config)),
    ];
    callbacks.extend(plugins.callbacks(&config.callbacks)?);
    callbacks.append(&mut extra);

    auto_label(&config, plugins, stop, progress)?;
    let mut session = Session::prepare(config, plugins, progress)?;
    let stopped = match drive(&mut session, &mut callbacks, stop) {
        Ok(stopped) => stopped,
        Err(error) => {
            match error.is_device_lost() {
                true => tell_what_is_saved(&session),
                false => rescue(&mut session),
            }
            return Err(error);
        }
    };
    // The LoRA first: nothing that follows may cost it.
    let name = session.config().output_name.clone();
    let lora = session.save(&name)?;
    // Told after everything else is done: the LoRA is whole whatever becomes of the state.
    let state = if session.config().save_state { session.save_state().map(|_| ()) } else { Ok(()) };
    for callback in &mut callbacks {
        callback.on_end(&mut session)?;
    }
    state?;
    let best = session.looks().best.map(|(step, loss)| {
        let lora = session.save_path(&best_name(session.config()));
        Best { step, loss, lora: Some(lora).filter(|path| session.config().save_best && path.exists()) }
    });
    Ok(RunResult { lora, steps: session.steps_done(), stopped, best })
}

/// Steps until the end, a callback's wish or `stop`; the reason where it is not the end.
fn drive(session: &mut Session, callbacks: &mut [Box<dyn Callback>], stop: &AtomicBool) -> Result<Option<String>> {
    let mut stopped = None;
    for callback in &mut *callbacks {
        note(callback.on_start(session)?, &mut stopped);
    }
    while stopped.is_none() {
        if stop.load(Ordering::Relaxed) {
            return Ok(Some("interrupted".to_owned()));
        }
        let Some(report) = session.step()? else { break };
        for callback in &mut *callbacks {
            note(callback.on_step(session, &report)?, &mut stopped);
        }
    }
    Ok(stopped)
}

/// Saves the weights that were trained before an error, where there are any and all are finite.
fn rescue(session: &mut Session) {
    if session.steps_done() == 0 {
        return;
    }
    rescue_state(session);
    let name = format!("{}-rescued", session.config().output_name);
    match session.save(&name) {
        Ok(path) => tracing::warn!("the LoRA of the {} steps done is in {}", session.steps_done(), path.display()),
        Err(error) => tracing::warn!("the LoRA of the steps done cannot be saved: {error}"),
    }
}

/// Saves the state after an error, if the configuration asks for states; where that fails, the state before stays.
fn rescue_state(session: &mut Session) {
    if !session.config().save_state {
        return;
    }
    match session.save_state() {
        Ok(path) => tracing::warn!("the state is in {}; resume = true goes on from it", path.display()),
        Err(error) => tracing::warn!("the state cannot be saved: {error}"),
    }
}

/// What was on a device that is gone cannot be saved: says what is on disk.
fn tell_what_is_saved(session: &Session) {
    let path = session.state_path();
    match path.exists() {
        true => tracing::warn!("resume = true goes on from the last state, {}", path.display()),
        false => tracing::warn!(
            "the steps since the last save are lost; save_state_every_n_steps limits that for the next run"
        ),
    }
}

fn note(control: Control, stopped: &mut Option<String>) {
    if let Control::Stop(reason) = control
        && stopped.is_none()
    {
        *stopped = Some(reason);
    }
}
