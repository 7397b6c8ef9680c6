//! Whole runs on a tiny model: what saves memory does not change what is learnt. On the device that `LORA_TEST_DEVICE` names,
//! the CPU by default. That it saves memory is in `plan_memory.rs`, what happens without in `survive.rs`.

mod common;

use common::{distance, exact, prepare, tolerance, trained, workspace};

#[test]
fn checkpointing_gives_the_same_update() {
    let folder = workspace();
    // A large ε: AdamW with a small one blows rounding up. At 64 pixels the middle of the tiny network has groups of two numbers,
    // whose normalisation is a sign that rounding may flip.
    let keys = [
        "lora_dropout=0.2",
        "rank_dropout=0.1",
        "max_train_steps=2",
        "batch_size=2",
        "adam_eps=1",
        "learning_rate=0.01",
        "max_resolution=128",
    ];
    let run = |own: &[&str]| trained(folder.path(), &[&keys[..], &["target_modules=attention-mlp"], own].concat());
    let (plain, reports) = run(&[]);
    for own in [
        &["gradient_checkpointing=true"][..],
        &["recompute_feed_forward=true"],
        &["gradient_checkpointing=true", "recompute_feed_forward=true"],
    ] {
        let (again, others) = run(own);
        for (a, b) in reports.iter().zip(&others) {
            assert!((a.loss / b.loss - 1.0).abs() < tolerance(1e-5), "{own:?}: {} {}", a.loss, b.loss);
            let norms = (a.gradient_norm.unwrap(), b.gradient_norm.unwrap());
            assert!((norms.0 / norms.1 - 1.0).abs() < tolerance(1e-3), "{own:?}: {norms:?}");
        }
        // AdamW blows up what is nearly zero.
        assert!(!exact() || distance(&plain, &again) < 1e-4, "{own:?}: {}", distance(&plain, &again));
    }
    // A frozen text encoder, and a frozen U-Net.
    for own in ["train_text_encoder=false", "train_unet=false"] {
        let loss = |checkpointing: &str| {
            let reports = trained(folder.path(), &[own, checkpointing, keys[4], keys[5], keys[6]]).1;
            (reports[1].loss, reports[1].gradient_norm.unwrap())
        };
        let (plain, again) = (loss("gradient_checkpointing=false"), loss("gradient_checkpointing=true"));
        assert!(
            (plain.0 / again.0 - 1.0).abs() < tolerance(1e-6) && (plain.1 / again.1 - 1.0).abs() < tolerance(1e-5),
            "{own} {plain:?} {again:?}"
        );
    }
    // No graph is left between steps.
    let mut session = prepare(folder.path(), &["gradient_checkpointing=true", "sample_steps=2"]);
    session.step().unwrap();
    session.sample(&["a".into()]).unwrap();
    session.step().unwrap();
}

#[test]
fn a_base_in_few_bytes_trains_nearly_as_the_whole_one() {
    let folder = workspace();
    let run = |keys: &[&str]| {
        let report =
            trained(folder.path(), &[keys, &["batch_size=4", "max_resolution=128", "max_train_steps=1"]].concat()).1[0]
                .clone();
        (report.loss, report.gradient_norm.unwrap())
    };
    let whole = run(&[]);
    // The layers themselves are held against the whole weights in lora-torch. (Resolution: as for checkpointing.)
    for (storage, bound) in [("fp16", 1e-5), ("bf16", 5e-3), ("fp8", 8e-2), ("int8", 3e-3), ("nf4", 2e-1)] {
        let storage = format!("base_storage={storage}");
        let (loss, norm) = run(&[&storage]);
        let apart = (loss / whole.0 - 1.0).abs().max((norm / whole.1 - 1.0).abs());
        assert!(apart < tolerance(bound), "{storage}: {apart}");
        let again = run(&[&storage, "gradient_checkpointing=true"]);
        let close = |own: f64, other: f64, bound| (own / other - 1.0).abs() < tolerance(bound);
        assert!(close(loss, again.0, 1e-6) && close(norm, again.1, 1e-5), "{storage}");
    }
    // Variants that need the whole weight get it.
    for storage in ["base_storage=int8", "base_storage=nf4"] {
        assert!(run(&[storage, "variant=dora"]).0.is_finite());
    }
}

#[test]
fn what_waits_in_host_memory_changes_nothing() {
    let folder = workspace();
    let run = |keys: &[&str]| {
        let common = ["batch_size=4", "max_resolution=128", "max_train_steps=3", "sample_steps=2"];
        let mut session = prepare(folder.path(), &[keys, &common].concat());
        let mut steps = Vec::new();
        while let Some(report) = session.step().unwrap() {
            steps.push((report.loss, report.gradient_norm.unwrap()));
            // Another order of the layers in between.
            session.sample(&["a".into()]).unwrap();
        }
        steps
    };
    for keys in [
        &[][..],
        &["base_storage=nf4", "train_text_encoder=false"],
        &["base_storage=int8", "gradient_checkpointing=true"],
        &["variant=dora"],
    ] {
        let plain = run(keys);
        let mut others = vec!["offload_base=true"];
        if keys.contains(&"gradient_checkpointing=true") {
            others.push("cpu_offload_checkpointing=true");
        }
        let other = run(&[keys, &others].concat());
        for (plain, other) in plain.iter().zip(&other) {
            let apart = (plain.0 / other.0 - 1.0).abs().max((plain.1 / other.1 - 1.0).abs());
            // The same sums in another order: a staged linear layer flattens its axes.
            assert!(apart < tolerance(1e-4), "{keys:?}: {plain:?} {other:?}");
        }
    }
}

#[test]
fn recorded_steps_give_the_same_update() {
    let folder = workspace();
    let run = |keys: &[&str]| {
        let common = ["batch_size=2", "max_resolution=128", "max_train_steps=4", "sample_steps=2"];
        let mut session = prepare(folder.path(), &[keys, &common].concat());
        let mut steps = Vec::new();
        while let Some(report) = session.step().unwrap() {
            steps.push((report.loss, report.gradient_norm.unwrap()));
            // What runs in between, on another stream.
            session.sample(&["a".into()]).unwrap();
        }
        (steps, session.recorded_shapes())
    };
    for keys in [
        &[][..],
        &["gradient_accumulation_steps=2", "gradient_checkpointing=true"],
        &["base_storage=nf4", "train_text_encoder=false", "min_snr_gamma=5"],
        &["base_storage=int8", "optimizer=prodigy"],
        &["base_storage=fp8", "optimizer=adamw8bit", "variant=dora"],
        &["variant=lokr", "ema_decay=0.9"],
    ] {
        let (plain, none) = run(&[keys, &["cuda_graphs=false"]].concat());
        let (recorded, shapes) = run(&[keys, &["cuda_graphs=true"]].concat());
        // The CPU records nothing.
        assert_eq!((none, shapes), (0, usize::from(!exact())), "{keys:?}");
        for (plain, other) in plain.iter().zip(&recorded) {
            let apart = (plain.0 / other.0 - 1.0).abs().max((plain.1 / other.1 - 1.0).abs());
            assert!(apart <= if exact() { 0.0 } else { 2e-2 }, "{keys:?}: {plain:?} {other:?}");
        }
    }
    // Dropout is drawn anew each time.
    assert_eq!(run(&["lora_dropout=0.1"]).1, 0);
}
