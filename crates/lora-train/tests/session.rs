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
        assert!(f64::from(distance(&whole, &split)) < tolerance(2e-4), "{batch}: {}", distance(&whole, &split));
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

/// An interval that each step is longer than.
#[test]
fn saves_and_samples_come_by_time() {
    let folder = workspace();
    let keys = [
        "sample_prompts=[\"a\"]",
        "sample_steps=1",
        "sample_every_minutes=1e-6",
        "save_every_minutes=1e-6",
        "save_every_n_steps=2",
        "max_train_steps=4",
        "output_name=x",
    ];
    let run = |keys: &[&str]| {
        let stop = Arc::new(AtomicBool::new(false));
        lora_train::train(config(folder.path(), keys), &Plugins::default(), Vec::new(), &stop, &mut |_| {}).unwrap();
        let saves = std::fs::read_dir(folder.path().join("out")).unwrap().flatten();
        let saves = saves.filter(|entry| entry.file_name().to_string_lossy().starts_with("x-step")).count();
        (saves, image::open(folder.path().join("out/samples.png")).unwrap().height())
    };
    let (saves, high) = run(&keys);
    // The last step is the run's own file.
    assert_eq!(saves, 3);
    std::fs::remove_dir_all(folder.path().join("out")).unwrap();
    let late = keys.map(|key| key.replace("1e-6", "1e6"));
    let (saves, low) = run(&late.each_ref().map(String::as_str));
    assert!(saves == 1 && low < high, "{saves} {low} {high}");
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

#[test]
fn noise_timesteps_and_losses_of_every_kind_are_those_of_a_large_batch() {
    let folder = workspace();
    let options = [
        "adam_eps=1",
        "learning_rate=0.1",
        "noise_offset=0.05",
        "noise_offset_random_strength=true",
        "adaptive_noise_scale=0.01",
        "multires_noise_iterations=4",
        "ip_noise_gamma=0.1",
        "ip_noise_gamma_random_strength=true",
        "timestep_sampling=shift",
        "min_timestep=100",
        "max_timestep=900",
        "loss_type=huber",
        "shuffle_caption=true",
        "token_warmup_step=2",
    ];
    let run = |keys: [&str; 2]| trained(folder.path(), &[&options[..], &keys[..]].concat());
    let (whole, reports) = run(["batch_size=8", "gradient_accumulation_steps=1"]);
    let (split, others) = run(["batch_size=2", "gradient_accumulation_steps=4"]);
    for (a, b) in reports.iter().zip(&others) {
        assert!((a.loss / b.loss - 1.0).abs() < tolerance(1e-5), "{} {}", a.loss, b.loss);
    }
    assert!(f64::from(distance(&whole, &split)) < tolerance(1e-4), "{}", distance(&whole, &split));
    // Before the first step, what the run will draw is shown, and nothing below the lowest timestep is.
    let session = prepare(folder.path(), &[&options[..], &["batch_size=8"][..]].concat());
    let shown = session.summary().to_string();
    assert!(shown.contains("timesteps of ") && shown.contains("   0 … 99    0"), "{shown}");
    let error = common::refusal(folder.path(), &["timestep_sampling=flux_shift"]);
    assert!(error.contains("timestep_sampling") && error.contains("flow matching"), "{error}");
}

#[test]
fn layers_have_learning_rates_of_their_own() {
    let folder = workspace();
    let up = |name: &str, adapter: &lora_core::Adapter| {
        let of = |(path, module): (&lora_core::ModulePath, &lora_core::AdapterModule)| {
            path.path.contains(name).then(|| module.tensors["up"].to_f32().into_owned())
        };
        adapter.modules.iter().filter_map(of).flatten().map(f32::abs).fold(0.0, f32::max)
    };
    let keys = ["train_text_encoder=false", "max_train_steps=1", "learning_rate=0.01", "weight_decay=0"];
    let patterns = r#"learning_rate_pattern={"re:mid_block\\..*" = 0, "re:up_blocks\\..*" = 0.001}"#;
    let (adapter, _) = trained(folder.path(), &[&keys[..], &[patterns][..]].concat());
    // The first step of AdamW has the size of the learning rate.
    assert_eq!(up("mid_block.", &adapter), 0.0);
    let (other, usual) = (up("up_blocks.", &adapter), up("down_blocks.", &adapter));
    assert!((other / 0.001 - 1.0).abs() < 0.02 && (usual / 0.01 - 1.0).abs() < 0.02, "{other} {usual}");
    let error = common::refusal(folder.path(), &[r#"learning_rate_pattern={"no_such_layer" = 0.1}"#]);
    assert!(error.contains("learning_rate_pattern") && error.contains("no_such_layer"), "{error}");
}

#[test]
fn norms_of_updates_are_kept_to_their_limit_and_counted() {
    let folder = workspace();
    let keys = ["learning_rate=0.05", "max_train_steps=3"];
    let (free, _) = trained(folder.path(), &keys);
    let limited = [&keys[..], &["scale_weight_norms=0.02"][..]].concat();
    let (adapter, reports) = trained(folder.path(), &limited);
    let largest = |adapter: &lora_core::Adapter| {
        let norm = |module: &lora_core::AdapterModule| {
            let (up, down) = (module.tensors["up"].to_f32(), module.tensors["down"].to_f32());
            let (rank, scale) = (module.rank, module.alpha / module.rank as f64);
            let (rows, columns) = (up.len() / rank, down.len() / rank);
            let entry = |row: usize, column: usize| -> f64 {
                (0..rank).map(|r| f64::from(up[row * rank + r]) * f64::from(down[r * columns + column])).sum()
            };
            let all = (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column)));
            scale * all.map(|(row, column)| entry(row, column).powi(2)).sum::<f64>().sqrt()
        };
        adapter.modules.values().map(norm).fold(0.0, f64::max)
    };
    assert!(largest(&free) > 0.1, "{}", largest(&free));
    assert!((largest(&adapter) / 0.02 - 1.0).abs() < 1e-3, "{}", largest(&adapter));
    assert!(reports.iter().all(|report| report.figures["scaled_layers"] > 0.0), "{reports:?}");
    for (keys, named) in [(["variant=loha"], "loha"), (["optimizer=adamw_schedulefree"], "adamw_schedulefree")] {
        let error = common::refusal(folder.path(), &[&limited[..], &keys[..]].concat());
        assert!(error.contains("scale_weight_norms") && error.contains(named), "{error}");
    }
}
