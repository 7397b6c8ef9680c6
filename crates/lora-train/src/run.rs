//! A whole run: prepare, step, watch, save.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lora_torch::memory;

use crate::callback::{Answer, Callback, Control};
use crate::callbacks::{
    Crowded, HealthCheck, Metrics, MetricsCsv, Report, Samples, SaveCheckpoints, SaveStates, TensorBoard,
    ValidationLoss, best_name,
};
use crate::command::Command;
use crate::config::{Tracker, TrainConfig};
use crate::event::{Event, Finished, Pace, Started};
use crate::plugins::Plugins;
use crate::ranks::{Ranks, Wish};
use crate::session::{Preparing, Session};
use crate::{Result, auto_label, plan};

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
/// those given here, which hear of everything that happens ([`Callback::on_event`]) and may steer it
/// ([`Callback::commands`]). `stop` ends the run at the next step, with the LoRA saved: set it from a signal handler.
///
/// # Errors
/// Whatever ends the run before its end, with what to do about it. The trained weights are saved before it returns
/// wherever they are whole.
pub fn train(
    config: TrainConfig,
    plugins: &Plugins,
    extra: Vec<Box<dyn Callback>>,
    stop: &Arc<AtomicBool>,
    progress: &mut dyn FnMut(Preparing),
) -> Result<RunResult> {
    let start = Instant::now();
    let mut callbacks = Callbacks::new(&config, extra);
    let result = run(config, plugins, &mut callbacks, stop, progress);
    callbacks.tell(&match &result {
        Ok(result) => Event::Finished(Finished {
            step: result.steps,
            path: result.lora.clone(),
            stopped: result.stopped.clone(),
            best: result.best.clone(),
            seconds: start.elapsed().as_secs_f64(),
        }),
        Err(error) => Event::Failed { message: error.to_string(), usage: error.is_usage() },
    });
    result
}

/// The callbacks of a run, called in their order. What one of them tells reaches all before the next is called.
struct Callbacks {
    all: Vec<Box<dyn Callback>>,
    /// Where those of the configuration go: behind the run's own.
    own: usize,
}

impl Callbacks {
    /// The run's own callbacks, which write files, and those of the program. A rank other than the first has the program's alone.
    fn new(config: &TrainConfig, extra: Vec<Box<dyn Callback>>) -> Self {
        let leads = config.place.as_ref().is_none_or(|place| place.rank == 0);
        let mut all = if leads { Self::of_run(config) } else { Vec::new() };
        let own = all.len();
        all.extend(extra);
        Self { all, own }
    }

    fn of_run(config: &TrainConfig) -> Vec<Box<dyn Callback>> {
        let mut all: Vec<Box<dyn Callback>> = vec![
            Box::new(Metrics::new(config)),
            Box::new(Report::new(config)),
            Box::new(HealthCheck::default()),
            Box::new(Crowded::default()),
            Box::new(ValidationLoss::new(config)),
            Box::new(Samples::new(config)),
            Box::new(SaveCheckpoints::new(config)),
            Box::new(SaveStates::new(config)),
        ];
        // Before those that tell something when the run starts.
        for tracker in &config.log_with {
            all.insert(
                1,
                match tracker {
                    Tracker::TensorBoard => Box::new(TensorBoard::new(config)),
                    Tracker::Csv => Box::new(MetricsCsv::new(config)),
                },
            );
        }
        all
    }

    fn tell(&mut self, event: &Event) {
        self.all.iter_mut().for_each(|callback| callback.on_event(event));
    }

    /// Tells what the session has to tell.
    fn pass_on(&mut self, session: &mut Session) {
        session.take_events().iter().for_each(|event| self.tell(event));
    }

    /// What the run is told to do.
    fn commands(&mut self) -> Vec<Command> {
        self.all.iter_mut().flat_map(|callback| callback.commands()).collect()
    }

    /// Calls each.
    fn each(
        &mut self,
        session: &mut Session,
        mut call: impl FnMut(&mut dyn Callback, &mut Session) -> Result<()>,
    ) -> Result<()> {
        for index in 0..self.all.len() {
            let result = call(&mut *self.all[index], session);
            self.pass_on(session);
            result?;
        }
        Ok(())
    }

    /// Calls each where it may end the run; the first reason for that.
    fn ask(
        &mut self,
        session: &mut Session,
        mut call: impl FnMut(&mut dyn Callback, &mut Session) -> Result<Control>,
    ) -> Result<Option<String>> {
        let mut stopped = None;
        self.each(session, |callback, session| {
            if let Control::Stop(reason) = call(callback, session)? {
                stopped.get_or_insert(reason);
            }
            Ok(())
        })?;
        Ok(stopped)
    }
}

fn run(
    config: TrainConfig,
    plugins: &Plugins,
    callbacks: &mut Callbacks,
    stop: &Arc<AtomicBool>,
    progress: &mut dyn FnMut(Preparing),
) -> Result<RunResult> {
    callbacks.all.splice(callbacks.own..callbacks.own, plugins.callbacks(&config.callbacks)?);
    let progress = &mut |stage: Preparing| {
        callbacks.tell(&Event::Preparing(stage.into()));
        progress(stage);
    };
    let ranks = Ranks::join(&config)?;
    if ranks.leads() {
        auto_label(&config, plugins, stop, progress).inspect_err(|error| ranks.fail(error))?;
    }
    ranks.wait("captions of pictures")?;
    // What a process holds beside what it loads.
    let held = memory::host_memory().map_or(0, |memory| memory.resident);
    let mut session = Session::prepare_among(ranks, config, plugins, progress)?;
    let planned = plan::predicted_peak(session.config(), plugins, held);
    let stopped = match drive(&mut session, planned, callbacks, stop) {
        Ok(stopped) => stopped,
        Err(error) => {
            session.ranks().fail(&error);
            match (session.ranks().saves_the_rest(), error.is_device_lost()) {
                (false, _) => {}
                (true, true) => tell_what_is_saved(&session),
                (true, false) => rescue(&mut session),
            }
            callbacks.pass_on(&mut session);
            return Err(error);
        }
    };
    // The LoRA first: nothing that follows may cost it.
    let name = session.config().output_name.clone();
    let (lora, state) = match session.ranks().leads() {
        true => {
            let lora = session.save(&name).inspect_err(|error| session.ranks().fail(error))?;
            // Told after everything else is done: the LoRA is whole whatever becomes of the state.
            (lora, if session.config().save_state { session.save_state().map(drop) } else { Ok(()) })
        }
        false => (session.save_path(&name), Ok(())),
    };
    callbacks.pass_on(&mut session);
    // It is there in all ranks once they are told so.
    session.ranks().wait("the end")?;
    callbacks.each(&mut session, |callback, session| callback.on_end(session))?;
    state?;
    let best = session.looks().best.map(|(step, loss)| {
        let lora = session.save_path(&best_name(session.config()));
        Best { step, loss, lora: Some(lora).filter(|path| session.config().save_best && path.exists()) }
    });
    Ok(RunResult { lora, steps: session.steps_done(), stopped, best })
}

/// Steps until the end, a callback's wish or `stop`; the reason where it is not the end.
fn drive(
    session: &mut Session,
    planned_peak: Option<u64>,
    callbacks: &mut Callbacks,
    stop: &AtomicBool,
) -> Result<Option<String>> {
    let summary = session.summary();
    let started = Started { planned_peak, ..session.started(&summary) };
    callbacks.tell(&Event::Started(Box::new(started)));
    summary.findings(session.steps_done()).for_each(|finding| callbacks.tell(&finding));
    let mut stopped = callbacks.ask(session, |callback, session| callback.on_start(session))?;
    let mut pace = Pace::new(session.data().unit);
    loop {
        let reason = steer(session, callbacks, stop, stopped, &mut pace)?;
        if reason.is_some() {
            return Ok(reason);
        }
        let Some(report) = session.step()? else { return Ok(None) };
        callbacks.pass_on(session);
        callbacks.tell(&Event::Step(Box::new(pace.step(report.clone()))));
        stopped = callbacks.ask(session, |callback, session| callback.on_step(session, &report))?;
    }
}

/// How long a run that is held waits before it looks for commands again.
const HOLD: Duration = Duration::from_millis(50);

/// Does what the run was told to since the last step, and holds it while it is paused; the reason where it is to end. Of several
/// ranks all do what one of them was told.
fn steer(
    session: &mut Session,
    callbacks: &mut Callbacks,
    stop: &AtomicBool,
    mut stopped: Option<String>,
    pace: &mut Pace,
) -> Result<Option<String>> {
    let mut held: Option<Instant> = None;
    loop {
        if stop.load(Ordering::Relaxed) {
            stopped.get_or_insert_with(|| "interrupted".to_owned());
        }
        let commands = if stopped.is_some() { Vec::new() } else { callbacks.commands() };
        for command in commands {
            if let Some(reason) = obey(session, callbacks, &command, &mut held, pace)? {
                stopped = Some(reason);
                break;
            }
        }
        let wish = match (&stopped, held) {
            (Some(_), _) => Wish::Stop,
            (None, Some(_)) => Wish::Hold,
            (None, None) => Wish::GoOn,
        };
        match session.agree(wish)? {
            Wish::Stop => return Ok(Some(stopped.unwrap_or_else(|| "another rank was stopped".to_owned()))),
            Wish::Hold => std::thread::sleep(HOLD),
            Wish::GoOn => return Ok(None),
        }
    }
}

/// Does a command; the reason where the run is to end by it.
fn obey(
    session: &mut Session,
    callbacks: &mut Callbacks,
    command: &Command,
    held: &mut Option<Instant>,
    pace: &mut Pace,
) -> Result<Option<String>> {
    let step = session.steps_done();
    let (answer, event) = match command {
        Command::Pause if held.is_some() => (Err("the run is paused already".to_owned()), None),
        Command::Pause => {
            *held = Some(Instant::now());
            (Ok("the run is paused".to_owned()), Some(Event::Paused { step }))
        }
        Command::Resume => match held.take() {
            Some(since) => {
                pace.pause(since.elapsed());
                (Ok("the run goes on".to_owned()), Some(Event::Resumed { step }))
            }
            None => (Err("the run is not paused".to_owned()), None),
        },
        Command::Stop => (Ok("the run ends, and saves what it has".to_owned()), None),
        Command::Sample | Command::Save => (ask_callbacks(session, callbacks, command)?, None),
        Command::Unknown(_) => (Err(Command::advice()), None),
    };
    let done = answer.is_ok();
    let message = answer.unwrap_or_else(|reason| reason);
    callbacks.tell(&Event::Command { command: command.to_string(), done, message });
    event.iter().for_each(|event| callbacks.tell(event));
    Ok((*command == Command::Stop).then(|| "stopped by a command".to_owned()))
}

/// Has callbacks do a command; what each says that did. One that could not outweighs those that could.
fn ask_callbacks(session: &mut Session, callbacks: &mut Callbacks, command: &Command) -> Result<Answer> {
    let mut answers: Vec<Answer> = Vec::new();
    callbacks.each(session, |callback, session| {
        answers.extend(callback.on_command(session, command)?);
        Ok(())
    })?;
    let failed = answers.iter().any(Answer::is_err);
    let said: Vec<String> = answers
        .into_iter()
        .filter(|answer| answer.is_err() == failed)
        .map(|answer| answer.unwrap_or_else(|reason| reason))
        .collect();
    Ok(if failed { Err(said.join("; ")) } else { Ok(said.join("; ")) })
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

/// Saves the state after an error, if the configuration asks for states or ranks lost each other; where that fails, the state
/// before stays.
fn rescue_state(session: &mut Session) {
    if !session.config().save_state && session.ranks().count() == 1 {
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
