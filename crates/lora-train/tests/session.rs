//! Whole runs on a tiny model: what a step's update may not depend on, and what must never be lost. On the device that
//! `LORA_TEST_DEVICE` names, the CPU by default.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use common::{config, device, distance, exact, prepare, tolerance, trained, workspace};
use lora_core::Component;
use lora_io::adapter::kohya;
use lora_io::safetensors::SafetensorsFile;
use lora_train::config::{Format, TrainConfig};
use lora_train::{Plugins, Session, StepReport, train};

#[test]
fn accumulation_gives_the_same_update_as_a_large_batch() {
    let folder = workspace();
    let run = |batch: &str, accumulation: &str| {
        let keys = [
            batch,
            accumulation,
            "lora_dropout=0.2",
            "noise_offset=0.05",
            "caption_dropout_rate=0.3",
            "min_snr_gamma=5",
            "adam_eps=1",
            // Steps small enough that the second does not blow the first one's rounding up.
            "learning_rate=0.1",
        ];
        trained(folder.path(), &keys)
    };
    let (whole, reports) = run("batch_size=8", "gradient_accumulation_steps=1");
    for (batch, accumulation) in
        [("batch_size=4", "gradient_accumulation_steps=2"), ("batch_size=1", "gradient_accumulation_steps=8")]
    {
        let (split, others) = run(batch, accumulation);
        for (a, b) in reports.iter().zip(&others) {
            assert!((a.loss / b.loss - 1.0).abs() < tolerance(1e-5), "{batch}: {} {}", a.loss, b.loss);
            assert_eq!(a.items, b.items);
        }
        // With ε = 1 the update is the gradient. (With a small ε AdamW blows rounding up: where a gradient is nearly zero
        // its first steps have the size of the learning rate all the same.)
        assert!(f64::from(distance(&whole, &split)) < tolerance(1e-4), "{batch}: {}", distance(&whole, &split));
    }
    // Five of eight pictures are left for a second, smaller micro-batch: nothing is dropped.
    let (_, uneven) = run("batch_size=5", "gradient_accumulation_steps=2");
    assert_eq!(uneven[0].items, 8);
    assert!((uneven[0].loss / reports[0].loss - 1.0).abs() < tolerance(1e-5));
}

#[test]
fn the_same_configuration_gives_the_same_bytes() {
    let folder = workspace();
    let bytes = |keys: &[&str]| {
        let mut session = prepare(folder.path(), keys);
        while session.step().unwrap().is_some() {}
        std::fs::read(session.save("same").unwrap()).unwrap()
    };
    let first = bytes(&[]);
    assert!(!exact() || first == bytes(&[]));
    assert_ne!(first, bytes(&["seed=7"]));
}

#[test]
fn each_network_trains_alone_or_with_the_other() {
    let folder = workspace();
    for (keys, unet, text) in [
        (vec!["train_text_encoder=false"], true, false),
        (vec!["train_unet=false"], false, true),
        (vec!["text_encoder_lr=0"], true, true),
        (vec!["target_modules=[\"q_proj\", \"v_proj\"]", "max_token_length=150"], true, true),
        (vec!["target_modules=all-conv", "precision=bf16"], true, true),
    ] {
        // At 64 px the innermost attention sees one position, and a softmax over one leaves q and k without gradient.
        let (adapter, reports) = trained(folder.path(), &[keys.as_slice(), &["max_resolution=128"]].concat());
        let moved = |component: Component| {
            let modules = adapter.modules.iter().filter(|(path, _)| path.component == component);
            modules
                .map(|(_, module)| module.tensors["up"].to_f32().iter().any(|&value| value != 0.0))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            (!moved(Component::UNET).is_empty(), !moved(Component::TEXT_ENCODER).is_empty()),
            (unet, text),
            "{keys:?}"
        );
        // One step moves every module, unless its learning rate is 0.
        assert!(moved(Component::UNET).iter().all(|&moved| moved), "{keys:?}");
        let still = keys.contains(&"text_encoder_lr=0");
        assert!(moved(Component::TEXT_ENCODER).iter().all(|&moved| moved != still), "{keys:?}");
        assert!(reports.iter().all(|report| report.loss.is_finite() && !report.skipped));
    }
}

/// With clip skip 2 the last text layer computes nothing that counts: its adapter must not even decay.
#[test]
fn an_adapter_without_gradient_is_left_alone() {
    let folder = workspace();
    let keys = ["clip_skip=2", "max_resolution=128", "weight_decay=0.5"];
    let before = prepare(folder.path(), &keys).adapter().unwrap().export().unwrap();
    let (after, _) = trained(folder.path(), &keys);
    let text = after.modules.iter().filter(|(path, _)| path.component == Component::TEXT_ENCODER);
    for (path, module) in text {
        assert_eq!(*module == before.modules[path], path.path.contains("layers.2."), "{path}");
    }
}

#[test]
fn the_loss_falls_on_pictures_that_are_seen_again_and_again() {
    let folder = workspace();
    let keys =
        ["batch_size=8", "max_train_steps=40", "learning_rate=5e-3", "target_modules=all-conv", "min_snr_gamma=1"];
    let (_, reports) = trained(folder.path(), &keys);
    let mean = |reports: &[StepReport]| reports.iter().map(|report| report.loss).sum::<f64>() / reports.len() as f64;
    let (start, end) = (mean(&reports[..8]), mean(&reports[32..]));
    assert!(end < 0.9 * start, "{start} {end}");
}

#[test]
fn training_goes_on_from_a_saved_lora() {
    let folder = workspace();
    let mut session = prepare(folder.path(), &["save_precision=fp32"]);
    while session.step().unwrap().is_some() {}
    let saved = session.save("first").unwrap();
    let before = session.adapter().unwrap().export().unwrap();

    let from = format!("init_from={}", saved.display());
    let mut next = prepare(folder.path(), &[&from, "save_precision=fp32"]);
    assert_eq!(distance(&before, &next.adapter().unwrap().export().unwrap()), 0.0);
    next.step().unwrap();
    let again = next.save("second").unwrap();
    let metadata = SafetensorsFile::open(again).unwrap().metadata().clone();
    assert_eq!(metadata["lora_init_from"], "first.safetensors");
    assert_eq!(metadata["lora_init_from_hash"], SafetensorsFile::open(saved).unwrap().metadata()["sshs_model_hash"]);
}

#[test]
fn a_run_leaves_lora_metrics_curve_and_samples() {
    let folder = workspace();
    let keys = [
        "sample_prompts=[\"a\", \"b\"]",
        "sample_steps=2",
        "sample_every_n_steps=1",
        "save_every_n_steps=1",
        "output_name=x",
    ];
    let stop = Arc::new(AtomicBool::new(false));
    let result = train(config(folder.path(), &keys), &Plugins::default(), Vec::new(), &stop, &mut |_| {}).unwrap();
    assert_eq!((result.steps, result.stopped.as_deref()), (2, None));
    let out = folder.path().join("out");
    for name in ["x.safetensors", "x-step000001.safetensors", "loss.png", "samples.png"] {
        assert!(out.join(name).metadata().unwrap().len() > 100, "{name}");
    }
    let lines = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    assert_eq!(lines.lines().count(), 2);
    // Three rows (before, step 1, step 2) of two pictures.
    let grid = image::open(out.join("samples.png")).unwrap();
    assert!(grid.height() > 3 * 128 && grid.width() > 2 * 128);

    let layers = [prepare(folder.path(), &[]).targets().to_vec()].concat();
    let mut adapter = kohya::read(out.join("x.safetensors")).unwrap().adapter;
    lora_io::adapter::fit(&out.join("x.safetensors"), &mut adapter, &layers).unwrap();
    assert_eq!(adapter.modules.len(), layers.len());
    assert_eq!(adapter.metadata["ss_network_dim"], "4");
    assert_eq!(adapter.metadata["ss_steps"], "2");
}

#[test]
fn what_cannot_work_is_said_before_training() {
    let folder = workspace();
    let error = |keys: &[&str]| {
        Session::prepare(config(folder.path(), keys), &Plugins::default(), &mut |_| {}).unwrap_err().to_string()
    };
    let set = |key: &str, name: &str| format!("{key}={}", folder.path().join(name).display());
    assert!(error(&[&set("base_model", "nothing.safetensors")]).contains("nothing.safetensors"));
    assert!(error(&[&set("train_data_dir", "nothing")]).contains("nothing"));
    assert!(error(&["target_modules=q_porj"]).contains("q_proj"));
    assert!(error(&["variant=lokr2"]).contains("known are boft"));
    assert!(error(&["processors=[\"sharpen\"]"]).contains("center_crop"));
    assert!(error(&["clip_skip=9"]).contains("1 to 3"));
    assert!(error(&["device=cuda:99"]).contains("cuda:99"));
    std::fs::write(folder.path().join("file"), "").unwrap();
    assert!(error(&[&set("output_dir", "file/below")]).contains("file"));
    // A LoRA is no base, and is named as what it is.
    let mut session = prepare(folder.path(), &[]);
    let lora = session.save("a").unwrap();
    assert!(error(&[&format!("base_model={}", lora.display())]).contains("a LoRA, not a base model"));
    // A picture whose header is whole and whose pixels are not: skipped with a count, an error where strict.
    let path = folder.path().join("data/3.png");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let session = prepare(folder.path(), &[]);
    let data = session.summary().data;
    assert_eq!((data.items, data.left_out), (7, 1));
    assert!(error(&["strict=true"]).contains("3.png"));
}

#[test]
fn nan_is_named_by_the_stage_it_comes_from() {
    let folder = workspace();
    let mut session = prepare(folder.path(), &["learning_rate=1e30", "max_grad_norm=0"]);
    let error = loop {
        match session.step() {
            Ok(Some(_)) => {}
            Ok(None) => panic!("a learning rate of 1e30 went unnoticed"),
            Err(error) => break error.to_string(),
        }
    };
    assert!(
        error.contains("NaN or infinity in") && error.contains("step 2") && error.contains("learning_rate"),
        "{error}"
    );

    // The same base with one NaN in a network: the network is named before the first step.
    let base = folder.path().join("base.safetensors");
    let file = SafetensorsFile::open(&base).unwrap();
    let whole: std::collections::BTreeMap<_, _> =
        file.names().map(|name| (name.to_owned(), file.get(name).unwrap().to_host().unwrap())).collect();
    drop(file);
    for (name, keys, stage) in [
        ("first_stage_model.quant_conv.bias", vec![], "the VAE for "),
        (
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            vec!["train_text_encoder=false"],
            "the text encoder",
        ),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", vec![], "the text encoder at step 1"),
        ("model.diffusion_model.out.2.bias", vec![], "the U-Net at step 1"),
    ] {
        let mut damaged = whole.clone();
        let shape = damaged[name].shape().to_vec();
        let values = vec![f32::NAN; shape.iter().product()];
        damaged.insert(name.into(), lora_core::HostTensor::from_f32(shape, values).unwrap());
        lora_io::safetensors::write(&base, &damaged, &Default::default()).unwrap();
        let result = Session::prepare(config(folder.path(), &keys), &Plugins::default(), &mut |_| {});
        let error = result.and_then(|mut session| session.step()).unwrap_err().to_string();
        assert!(error.contains(stage), "{name}: {error}");
    }
}

#[test]
fn whole_networks_train_into_a_checkpoint() {
    let folder = workspace();
    let text = |name: &str| folder.path().join(name).display().to_string();
    let own = format!(
        "base_model: {}\ntrain_data_dir: {}\noutput_dir: {}\nmax_resolution: 64\ndevice: {}\nprecision: fp32\n\
         train: full\nlearning_rate: 1e-3\nmax_train_steps: 3\nsave_precision: fp32\nbatch_size: 4\n",
        text("base.safetensors"),
        text("data"),
        text("out"),
        device()
    );
    let run = |keys: &[&str]| {
        let config = TrainConfig::from_text(&own, Format::Yaml, keys).unwrap();
        let mut session = Session::prepare(config, &Plugins::default(), &mut |_| {}).unwrap();
        assert!(session.adapter().is_none() && session.targets().is_empty());
        let mut losses = Vec::new();
        while let Some(report) = session.step().unwrap() {
            losses.push(report.loss);
        }
        (losses, session.save("whole").unwrap())
    };
    let read = |path: &Path| -> std::collections::BTreeMap<String, Vec<f32>> {
        let file = SafetensorsFile::open(path).unwrap();
        let values = |name: &str| file.get(name).unwrap().to_host().unwrap().to_f32().into_owned();
        file.names().map(|name| (name.to_owned(), values(name))).collect()
    };
    let base = read(&folder.path().join("base.safetensors"));
    let (losses, path) = run(&[]);
    let trained = read(&path);
    assert_eq!(trained.keys().collect::<Vec<_>>(), base.keys().collect::<Vec<_>>());
    for (name, values) in &trained {
        // The autoencoder has no part in it, and words that no caption has stay as they are.
        let changes = !name.starts_with("first_stage_model.");
        assert_eq!(values != &base[name], changes, "{name}");
    }
    let changed = |other: &std::collections::BTreeMap<String, Vec<f32>>| -> f32 {
        let apart = |name: &String| trained[name].iter().zip(&other[name]).map(|(a, b)| (a - b).abs()).sum::<f32>();
        trained.keys().map(apart).sum()
    };
    // An average that hardly moves is nearer to the base than what is trained; the run itself is the same.
    let (same, path) = run(&["ema_decay=0.999"]);
    for (one, other) in losses.iter().zip(&same) {
        assert!((one / other - 1.0).abs() <= if exact() { 0.0 } else { 2e-2 }, "{losses:?} {same:?}");
    }
    let averaged = read(&path);
    assert!(changed(&averaged) > 0.1 * changed(&base) && changed(&averaged) < changed(&base));
    // It is a base like any other.
    let whole = prepare(folder.path(), &[&format!("base_model={}", path.display()), "train_text_encoder=false"]).step();
    assert!(whole.unwrap().unwrap().loss.is_finite());
    let error = TrainConfig::from_text(&own, Format::Yaml, &["lora_rank=4"]).unwrap_err().to_string();
    assert!(error.contains("lora_rank") && error.contains("train = lora"), "{error}");
}
