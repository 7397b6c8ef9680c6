//! Out of memory in the middle of a run: the step is run again in smaller pieces, and the result is that of a run which had
//! them from the start, bit for bit.

mod common;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use common::{config, prepare, run, workspace};
use lora_core::Adapter;
use lora_torch::fault::Fault;
use lora_train::callback::{Callback, Control};
use lora_train::{Event, Plugins, Session, StepReport, train};

const DRAWS: [&str; 4] = ["lora_dropout=0.2", "caption_dropout_rate=0.3", "noise_offset=0.05", "max_train_steps=3"];

fn trained(folder: &std::path::Path, keys: &[&str]) -> (Adapter, Vec<StepReport>) {
    run(&mut prepare(folder, &[&DRAWS[..], keys].concat()))
}

/// Bytes of the largest allocation of a run's first step.
fn largest(folder: &std::path::Path, keys: &[&str]) -> u64 {
    let mut session = prepare(folder, &[&DRAWS[..], keys].concat());
    let fault = Fault::none();
    session.step().unwrap();
    fault.largest()
}

fn same(a: &(Adapter, Vec<StepReport>), b: &(Adapter, Vec<StepReport>)) {
    assert_eq!(a.1.len(), b.1.len());
    for (a, b) in a.1.iter().zip(&b.1) {
        assert_eq!((a.loss, a.gradient_norm, a.items), (b.loss, b.gradient_norm, b.items), "step {}", a.step);
    }
    assert!(a.0 == b.0);
}

#[test]
fn a_run_that_outgrows_memory_goes_on_in_smaller_pieces_to_the_same_result() {
    let folder = workspace();
    let four = ["batch_size=4", "gradient_accumulation_steps=2"];
    let two = ["batch_size=2", "gradient_accumulation_steps=4"];
    let one = ["batch_size=1", "gradient_accumulation_steps=8"];
    let sizes = [largest(folder.path(), &four), largest(folder.path(), &two), largest(folder.path(), &one)];
    assert!(sizes[0] > sizes[1] && sizes[1] > sizes[2], "{sizes:?}");
    for (limit, smaller, micro) in [(sizes[1] + 1, &two, 2), (sizes[2] + 1, &one, 1)] {
        let expected = trained(folder.path(), smaller);
        let mut session = prepare(folder.path(), &[&DRAWS[..], &four].concat());
        let fault = Fault::from_bytes(limit);
        let survived = run(&mut session);
        // Each halving failed once, in the first step; then it fits.
        assert_eq!(fault.failed(), if micro == 2 { 1 } else { 2 });
        assert!(survived.1.iter().all(|report| report.micro_batch == micro && report.items == 8));
        same(&survived, &expected);
        drop(fault);
        let told: Vec<Event> = session.take_events();
        assert_eq!(told.len(), if micro == 2 { 1 } else { 2 });
        assert!(
            matches!(&told[0], Event::OutOfMemory { step: 1, permanent, .. } if permanent.contains("batch_size = 2"))
        );
        // And it is the large batch's update to rounding.
        let whole = trained(folder.path(), &four);
        for (a, b) in survived.1.iter().zip(&whole.1) {
            assert!((a.loss / b.loss - 1.0).abs() < 1e-3, "{} {}", a.loss, b.loss);
        }
    }
}

/// Wherever it is that an allocation fails, in the forward or the backward pass or between them.
#[test]
fn no_matter_where_in_the_step_it_fails() {
    let folder = workspace();
    let keys = [&DRAWS[..], &["batch_size=2", "max_train_steps=2"]].concat();
    let small = ["batch_size=1", "gradient_accumulation_steps=2", "max_train_steps=2"];
    let expected = trained(folder.path(), &small);
    let again = trained(folder.path(), &[&small[..], &["recompute_feed_forward=true"]].concat());
    let mut session = prepare(folder.path(), &keys);
    let fault = Fault::none();
    session.step().unwrap();
    let allocations = fault.allocations();
    drop(fault);
    assert!(allocations > 1000, "{allocations}");
    let (mut in_optimiser, mut by_itself) = (0, 0);
    for number in (0..allocations).step_by(allocations as usize / 16) {
        let mut session = prepare(folder.path(), &keys);
        let fault = Fault::of_allocation(number);
        let first = session.step();
        assert_eq!(fault.failed(), 1, "{number}");
        drop(fault);
        match first {
            Ok(first) => {
                let mut survived = run(&mut session);
                survived.1.insert(0, first.unwrap());
                // libtorch has a second way of its own where oneDNN fails in some convolutions: then nobody learns of it.
                if survived.1[0].micro_batch == 2 {
                    let (loss, whole) = (survived.1[0].loss, expected.1[0].loss);
                    assert!((loss / whole - 1.0).abs() < 1e-3, "{number}: {loss} {whole}");
                    by_itself += 1;
                } else {
                    same(&survived, &expected);
                }
            }
            // What it changes cannot be taken back: no state can be made of it.
            Err(error) => {
                assert!(error.to_string().contains("in the optimiser at step 1"), "{number}: {error}");
                assert!(session.save_state().unwrap_err().to_string().contains("in the middle of a step"));
                in_optimiser += 1;
            }
        }
    }
    // Its kernels take no memory but for numbers beside tensors, a few bytes each.
    assert!(in_optimiser <= 4 && by_itself <= 4, "{in_optimiser} {by_itself}");
    // With one picture at once, recomputing is what is left, of feed-forwards, then of blocks; also inside of the recomputation.
    let keys = [&DRAWS[..], &small].concat();
    for number in [3, allocations / 3, allocations / 2] {
        let mut session = prepare(folder.path(), &keys);
        let fault = Fault::of_allocation(number);
        let survived = run(&mut session);
        assert_eq!(fault.failed(), 1);
        drop(fault);
        same(&survived, &again);
    }
    let again = trained(folder.path(), &[&small[..], &["gradient_checkpointing=true"]].concat());
    let keys = [&keys[..], &["gradient_checkpointing=true", "batch_size=2", "gradient_accumulation_steps=1"]].concat();
    for number in [allocations / 2, allocations * 3 / 4] {
        let mut session = prepare(folder.path(), &keys);
        let fault = Fault::of_allocation(number);
        let survived = run(&mut session);
        assert_eq!(fault.failed(), 1);
        drop(fault);
        same(&survived, &again);
    }
}

/// What was done when memory ran out belongs to the state: the run goes on as it was.
#[test]
fn a_run_in_smaller_pieces_is_taken_up_as_such() {
    let folder = workspace();
    let keys = [&DRAWS[..], &["batch_size=2"]].concat();
    let expected = trained(folder.path(), &["batch_size=1", "gradient_accumulation_steps=2"]);
    let mut session = prepare(folder.path(), &keys);
    let fault = Fault::of_allocation(500);
    session.step().unwrap();
    drop(fault);
    session.save_state().unwrap();
    let mut session = prepare(folder.path(), &[&keys[..], &["resume=true"]].concat());
    assert!(session.summary().notes.join(" ").contains("memory ran out before"));
    let reports = run(&mut session);
    assert!(reports.1.iter().all(|report| report.micro_batch == 1));
    assert!(reports.0 == expected.0);
}

/// One failure in each of four steps: fewer pictures, recomputing twice, the autoencoder away. Crops, flips and latents are drawn
/// as before; recomputing rounds differently.
#[test]
fn latents_of_each_visit_are_the_same_after_a_failure() {
    let folder = workspace();
    let keys = [
        "cache_latents=false",
        "processors=[\"random_crop\", \"flip\"]",
        "adam_eps=1",
        "learning_rate=0.1",
        "max_train_steps=4",
    ];
    let small = ["batch_size=1", "gradient_accumulation_steps=2"];
    let expected = trained(folder.path(), &[&keys[..], &small].concat());
    let mut session = prepare(folder.path(), &[&DRAWS[..], &keys, &["batch_size=2"]].concat());
    for step in 0..4 {
        let fault = Fault::of_allocation(2000);
        let report = session.step().unwrap().unwrap();
        assert_eq!((fault.failed(), report.step), (1, step + 1));
        let loss = expected.1[step].loss;
        assert!((report.loss / loss - 1.0).abs() < 1e-5, "{} {loss}", report.loss);
    }
    // From here on each picture's autoencoder comes and goes.
    let error = {
        let _fault = Fault::of_all();
        session.step()
    };
    assert!(error.is_ok(), "the run is complete");
}

/// From a step on, nothing fits.
struct Exhaust {
    bytes: u64,
    fault: Option<Fault>,
}

impl Callback for Exhaust {
    fn on_step(&mut self, _session: &mut Session, report: &StepReport) -> lora_train::Result<Control> {
        if report.step == 2 {
            self.fault = Some(Fault::from_bytes(self.bytes));
        }
        Ok(Control::Continue)
    }
}

#[test]
fn when_nothing_is_left_it_stops_with_what_was_learnt_and_what_was_tried() {
    let folder = workspace();
    let keys = ["batch_size=4", "max_train_steps=9", "save_state=true", "output_name=x"];
    let bytes = largest(folder.path(), &["batch_size=1"]) / 4;
    let stop = Arc::new(AtomicBool::new(false));
    let exhaust = Box::new(Exhaust { bytes, fault: None });
    let error =
        train(config(folder.path(), &keys), &Plugins::default(), vec![exhaust], &stop, &mut |_| {}).unwrap_err();
    assert!(error.is_out_of_memory());
    let text = error.to_string();
    for part in [
        "out of memory at step 3",
        "can't allocate memory",
        "1. step 3",
        "2 picture(s) at once instead of 4, accumulated to the same 4 a step",
        "2. step 3",
        "1 picture(s) at once instead of 2",
        "3. step 3",
        "the inner part of feed-forwards is computed again",
        "4. step 3",
        "within blocks are computed again",
        "base_storage",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let out = folder.path().join("out");
    assert!(out.join("x-rescued.safetensors").exists() && !out.join("x.safetensors").exists());
    // The state is that of the last whole step, and goes on from there to the end of a run that had memory.
    let session = prepare(folder.path(), &[&keys[..], &["resume=true"]].concat());
    assert_eq!(session.steps_done(), 2);
}

#[test]
fn out_of_memory_before_the_first_step_says_where() {
    let folder = workspace();
    let fault = Fault::from_bytes(20_000);
    let error = Session::prepare(config(folder.path(), &[]), &Plugins::default(), &mut |_| {}).unwrap_err();
    drop(fault);
    let text = error.to_string();
    assert!(error.is_out_of_memory() && text.contains("while loading the") && text.contains("base_storage"), "{text}");
}

#[test]
fn samples_are_worth_less_than_the_run() {
    let folder = workspace();
    let keys = ["sample_prompts=[\"a\"]", "sample_steps=2", "sample_resolution=2560"];
    let fault = Fault::none();
    let mut session = prepare(folder.path(), &keys);
    session.step().unwrap();
    let bytes = fault.largest();
    drop(fault);
    // Its preparation and its steps fit, its samples do not, in the U-Net: they are passed over, before and after.
    let fault = Fault::from_bytes(bytes + 1);
    assert!(session.sample(&["a".into()]).unwrap_err().is_out_of_memory());
    drop(session);
    let stop = Arc::new(AtomicBool::new(false));
    let result = train(config(folder.path(), &keys), &Plugins::default(), Vec::new(), &stop, &mut |_| {});
    let failed = fault.failed();
    drop(fault);
    // Three of the run's own; the dry run that its report is held against asks for the pictures' memory, too.
    assert_eq!(result.unwrap().steps, 2);
    assert!(failed >= 3, "{failed}");
    assert!(!folder.path().join("out/samples.png").exists());
}
