//! Whole runs on a tiny model with callbacks and optimisers, ours and those of other crates, that the configuration names. On
//! the device that `LORA_TEST_DEVICE` names, the CPU by default.

mod common;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use common::{config, distance, prepare, trained, workspace};
use lora_io::adapter::kohya;
use lora_train::callback::{Callback, Control};
use lora_train::optimiser::{Entry, Optimiser, StatePart};
use lora_train::{Plugins, Session, StepReport, train};

struct StopAtOnce;

impl Callback for StopAtOnce {
    fn on_step(&mut self, _session: &mut Session, _report: &StepReport) -> lora_train::Result<Control> {
        Ok(Control::Stop("enough".into()))
    }
}

struct Fail;

impl Callback for Fail {
    fn on_step(&mut self, _session: &mut Session, _report: &StepReport) -> lora_train::Result<Control> {
        Err(lora_train::Error::Callback { name: "fail".into(), reason: "on purpose".into() })
    }
}

#[test]
fn callbacks_of_outsiders_are_named_in_the_configuration() {
    let folder = workspace();
    let mut plugins = Plugins::default();
    plugins.register_callback("stop_at_once", || StopAtOnce);
    let stop = Arc::new(AtomicBool::new(false));
    let result =
        train(config(folder.path(), &["callbacks=stop_at_once"]), &plugins, Vec::new(), &stop, &mut |_| {}).unwrap();
    assert_eq!((result.steps, result.stopped.as_deref()), (1, Some("enough")));
    assert!(result.lora.exists());
    let error =
        train(config(folder.path(), &["callbacks=nobody"]), &plugins, Vec::new(), &stop, &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("stop_at_once"), "{error}");
    // An error after some steps costs nothing of what was learnt.
    plugins.register_callback("fail", || Fail);
    let keys = ["callbacks=fail", "output_name=failing"];
    let error = train(config(folder.path(), &keys), &plugins, Vec::new(), &stop, &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("callback `fail`: on purpose"), "{error}");
    assert!(folder.path().join("out/failing-rescued.safetensors").exists());
    // An interrupt before the first step still leaves a LoRA.
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let result =
        train(config(folder.path(), &["output_name=stopped"]), &plugins, Vec::new(), &stop, &mut |_| {}).unwrap();
    assert_eq!((result.steps, result.stopped.as_deref()), (0, Some("interrupted")));
    assert!(result.lora.exists());
}

/// Saving in the middle draws and writes other values than those that train (schedule-free), and leaves no trace.
#[test]
fn every_optimiser_trains_and_saving_does_not_disturb_it() {
    let folder = workspace();
    for optimizer in ["adamw", "AdamW8bit", "adafactor", "lion", "prodigy", "adamw_schedulefree"] {
        let key = format!("optimizer={optimizer}");
        let run = |save: bool| {
            let mut session =
                prepare(folder.path(), &[&key, "max_train_steps=4", "optimizer_args={ weight_decay = 0.01 }"]);
            while session.step().unwrap().is_some() {
                if save {
                    session.save("on_the_way").unwrap();
                }
            }
            let file = session.save("lora").unwrap();
            (session.adapter().unwrap().export().unwrap(), kohya::read(&file).unwrap())
        };
        let ((trained, saved), (again, _)) = (run(false), run(true));
        assert_eq!(distance(&trained, &again), 0.0, "{optimizer}");
        let record = &saved.adapter.metadata["ss_optimizer"];
        assert!(record.contains("weight_decay=0.01"), "{record}");
        let moved =
            trained.modules.values().map(|module| module.tensors["up"].to_f32().iter().map(|x| x.abs()).sum::<f32>());
        assert!(moved.sum::<f32>() > 0.0, "{optimizer}");
    }
}

/// Plain gradient descent.
#[derive(Debug)]
struct Descent;

impl Optimiser for Descent {
    fn parts(&self, _: &[i64]) -> Vec<StatePart> {
        Vec::new()
    }

    fn step(&mut self, entries: &[Entry<'_>]) -> lora_train::Result<()> {
        for Entry { parameter, gradient, learning_rate, .. } in entries {
            let _ = parameter.shallow_clone().f_sub_(&gradient.f_mul_scalar(*learning_rate)?)?;
        }
        Ok(())
    }
}

#[test]
fn optimisers_of_outsiders_are_named_in_the_configuration() {
    let folder = workspace();
    let mut plugins = Plugins::default();
    plugins.optimisers.register("descent", |_| Box::new(Descent)).unwrap();
    assert!(plugins.optimisers.register("AdamW", |_| Box::new(Descent)).is_err());
    let mut session =
        Session::prepare(config(folder.path(), &["optimizer=descent", "max_grad_norm=0"]), &plugins, &mut |_| {})
            .unwrap();
    while session.step().unwrap().is_some() {}
    // With ε far above all gradients AdamW without averaging or decay is descent at a rate of 1 / ε.
    let keys = ["adam_eps=1e3", "adam_betas=[0.0, 0.0]", "weight_decay=0", "learning_rate=1", "max_grad_norm=0"];
    let (expected, _) = trained(folder.path(), &keys);
    let apart = distance(&expected, &session.adapter().unwrap().export().unwrap());
    assert!(apart < 1e-4, "{apart}");
}
