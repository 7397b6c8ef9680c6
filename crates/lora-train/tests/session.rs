//! Whole runs on a tiny model: what a step's update may not depend on, and what must never be lost. On the device that
//! `LORA_TEST_DEVICE` names, the CPU by default.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use lora_core::{Adapter, Component, DType};
use lora_io::adapter::kohya;
use lora_io::safetensors::SafetensorsFile;
use lora_models::synthetic::SyntheticModel;
use lora_train::callback::{Callback, Control};
use lora_train::config::{Format, TrainConfig};
use lora_train::optimiser::{Entry, Optimiser, Part};
use lora_train::session::StepReport;
use lora_train::{Plugins, Session, train};

/// A tiny base and eight coloured pictures with captions.
fn workspace() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    SyntheticModel::tiny().write(folder.path().join("base.safetensors"), DType::F16).unwrap();
    let data = folder.path().join("data");
    std::fs::create_dir(&data).unwrap();
    for index in 0..8u8 {
        let picture = image::RgbImage::from_fn(70, 64, |x, y| image::Rgb([index * 30, x as u8, y as u8]));
        picture.save(data.join(format!("{index}.png"))).unwrap();
        std::fs::write(data.join(format!("{index}.txt")), format!("picture number {index}")).unwrap();
    }
    folder
}

fn config(folder: &Path, keys: &[&str]) -> TrainConfig {
    let path = |name: &str| folder.join(name).display().to_string();
    let text = format!(
        "base_model: {}\ntrain_data_dir: {}\noutput_dir: {}\nmax_resolution: 64\ndevice: {}\nprecision: fp32\n\
         lora_rank: 4\ntarget_modules: attention\nlearning_rate: 1e-3\nmax_train_steps: 2\n",
        path("base.safetensors"),
        path("data"),
        path("out"),
        std::env::var("LORA_TEST_DEVICE").unwrap_or_else(|_| "cpu".into())
    );
    TrainConfig::from_text(&text, Format::Yaml, keys).unwrap()
}

fn prepare(folder: &Path, keys: &[&str]) -> Session {
    Session::prepare(config(folder, keys), &Plugins::default(), &mut |_| {}).unwrap()
}

fn trained(folder: &Path, keys: &[&str]) -> (Adapter, Vec<StepReport>) {
    let mut session = prepare(folder, keys);
    let mut reports = Vec::new();
    while let Some(report) = session.step().unwrap() {
        reports.push(report);
    }
    (session.adapter().unwrap().export().unwrap(), reports)
}

/// Largest difference between two adapters over the largest value.
fn distance(a: &Adapter, b: &Adapter) -> f32 {
    let (mut worst, mut largest) = (0.0f32, 0.0f32);
    for (path, module) in &a.modules {
        for (name, tensor) in &module.tensors {
            for (x, y) in tensor.to_f32().iter().zip(&*b.modules[path].tensors[name].to_f32()) {
                (worst, largest) = (worst.max((x - y).abs()), largest.max(x.abs()));
            }
        }
    }
    worst / largest
}

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
            assert!((a.loss / b.loss - 1.0).abs() < 1e-5, "{batch}: {} {}", a.loss, b.loss);
            assert_eq!(a.pictures, b.pictures);
        }
        // With ε = 1 the update is the gradient. (With a small ε AdamW blows rounding up: where a gradient is nearly zero
        // its first steps have the size of the learning rate all the same.)
        assert!(distance(&whole, &split) < 1e-4, "{batch}: {}", distance(&whole, &split));
    }
    // Five of eight pictures are left for a second, smaller micro-batch: nothing is dropped.
    let (_, uneven) = run("batch_size=5", "gradient_accumulation_steps=2");
    assert_eq!(uneven[0].pictures, 8);
    assert!((uneven[0].loss / reports[0].loss - 1.0).abs() < 1e-5);
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
    assert_eq!(first, bytes(&[]));
    assert_ne!(first, bytes(&["seed=7"]));
}

#[test]
fn latents_encoded_at_each_step_train_as_well() {
    let folder = workspace();
    let (_, cached) = trained(folder.path(), &["batch_size=4"]);
    let (_, encoded) = trained(folder.path(), &["batch_size=4", "cache_latents=false"]);
    // Each visit draws its own sample of the latent distribution, so losses are close, not equal.
    assert!((cached[0].loss / encoded[0].loss - 1.0).abs() < 0.2, "{} {}", cached[0].loss, encoded[0].loss);
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
            (!moved(Component::Unet).is_empty(), !moved(Component::TextEncoder).is_empty()),
            (unet, text),
            "{keys:?}"
        );
        // One step moves every module, unless its learning rate is 0.
        assert!(moved(Component::Unet).iter().all(|&moved| moved), "{keys:?}");
        let still = keys.contains(&"text_encoder_lr=0");
        assert!(moved(Component::TextEncoder).iter().all(|&moved| moved != still), "{keys:?}");
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
    let text = after.modules.iter().filter(|(path, _)| path.component == Component::TextEncoder);
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

    for (keys, fragment) in [
        (vec![from.as_str(), "lora_rank=8"], "lora_rank"),
        (vec![from.as_str(), "lora_alpha=1"], "lora_alpha"),
        (vec![from.as_str(), "target_modules=attention-mlp"], "target_modules"),
        (vec![from.as_str(), "train_text_encoder=false"], "no such layer"),
    ] {
        let error =
            Session::prepare(config(folder.path(), &keys), &Plugins::default(), &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains(fragment) && error.contains("first.safetensors"), "{error}");
    }
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
    fn parts(&self, _: &[i64]) -> Vec<Part> {
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
    assert!(error(&["device=cuda"]).contains("cuda"));
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
    assert_eq!(session.summary().pictures, (7, 1));
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
fn pictures_of_other_aspects_train_in_buckets_of_their_own() {
    let folder = workspace();
    for index in 0..3u8 {
        let picture = image::RgbImage::from_fn(240, 60, |x, y| image::Rgb([x as u8, index * 60, y as u8]));
        picture.save(folder.path().join(format!("data/wide-{index}.png"))).unwrap();
    }
    let keys = [
        "max_resolution=128",
        "enable_bucket=true",
        "min_bucket_reso=64",
        "max_bucket_reso=256",
        "batch_size=2",
        "epochs=1",
        "processors=[\"focus_crop\"]",
    ];
    let mut session = prepare(folder.path(), &keys);
    // 8 pictures of nearly a square in four batches, 3 wide ones in two.
    assert_eq!((session.plan().visits_per_epoch, session.plan().steps), (11, 6));
    let reports: Vec<StepReport> = std::iter::from_fn(|| session.step().unwrap()).collect();
    assert_eq!(reports.iter().map(|report| report.pictures).sum::<usize>(), 11);
    assert!(reports.iter().all(|report| report.loss.is_finite() && report.pictures <= 2));
    let saved = session.save("buckets").unwrap();
    let metadata = SafetensorsFile::open(saved).unwrap().metadata().clone();
    assert_eq!((&*metadata["ss_enable_bucket"], &*metadata["ss_min_bucket_reso"]), ("True", "64"));
    let info: serde_json::Value = serde_json::from_str(&metadata["ss_bucket_info"]).unwrap();
    let expected = serde_json::json!({ "buckets": {
        "0": { "resolution": [128, 128], "count": 8 }, "1": { "resolution": [256, 64], "count": 3 } } });
    assert_eq!(info, expected);

    // Without enlarging, pictures below a step have no bucket: skipped by name, or the end of a strict run.
    let keys = [&keys[..], &["bucket_no_upscale=true"]].concat();
    assert_eq!(prepare(folder.path(), &keys).plan().visits_per_epoch, 8);
    let strict = config(folder.path(), &[&keys[..], &["strict=true"]].concat());
    let error = Session::prepare(strict, &Plugins::default(), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("wide-0.png") && error.contains("bucket_no_upscale"), "{error}");
}

#[test]
fn captions_that_change_are_encoded_anew_by_a_frozen_text_encoder() {
    let folder = workspace();
    for index in 0..8u8 {
        std::fs::write(folder.path().join(format!("data/{index}.txt")), "one, two, three, four\nanother line").unwrap();
    }
    let frozen = ["train_text_encoder=false", "max_train_steps=3", "trigger_word=ohwx"];
    let (fixed, _) = trained(folder.path(), &frozen);
    let keys = [&frozen[..], &["shuffle_caption=true", "keep_tokens=1", "enable_wildcard=true"]].concat();
    let (shuffled, reports) = trained(folder.path(), &keys);
    assert!(reports.iter().all(|report| report.loss.is_finite()));
    assert!(shuffled.modules.keys().eq(fixed.modules.keys()), "the text encoder stays frozen");
    assert!(distance(&shuffled, &fixed) > 1e-3, "other captions, other updates");
    assert_eq!(distance(&shuffled, &trained(folder.path(), &keys).0), 0.0, "the same seed, the same captions");
    let saved = prepare(folder.path(), &keys).save("shuffled").unwrap();
    let metadata = SafetensorsFile::open(saved).unwrap().metadata().clone();
    assert_eq!((&*metadata["ss_shuffle_caption"], &*metadata["ss_keep_tokens"]), ("True", "1"));
}

/// A grey picture with a mask beside it whose left half counts.
fn masked(folder: &Path) {
    for index in 0..8u8 {
        let mask = image::GrayImage::from_fn(70, 64, |x, _| image::Luma([if x < 35 { 255 } else { 0 }]));
        mask.save(folder.join(format!("data/{index}-mask.png"))).unwrap();
    }
}

#[test]
fn what_a_mask_leaves_out_does_not_count() {
    let folder = workspace();
    masked(folder.path());
    let loss = |keys: &[&str]| trained(folder.path(), keys).1[0].loss;
    let plain = loss(&[]);
    let (half, least, inverted) = (
        loss(&["masked_loss=true"]),
        loss(&["masked_loss=true", "unmasked_weight=1.0"]),
        loss(&["masked_loss=true", "invert_mask=true"]),
    );
    // The mean is over all elements: the halves add up to the whole, the border column of latents lying in both in part.
    assert!((half + inverted - plain).abs() < 1e-3 * plain, "{half} + {inverted} ≠ {plain}");
    assert!(half > 0.2 * plain && half < 0.8 * plain && (least - plain).abs() < 1e-6);
    // With latents encoded at each visit the masks are the same.
    let fresh = loss(&["masked_loss=true", "cache_latents=false"]);
    assert!(fresh > 0.2 * plain && fresh < 0.8 * plain, "{fresh}");
    let note = prepare(folder.path(), &[]).summary().notes.join(" ");
    assert!(note.contains("8 picture(s) have a mask"), "{note}");
}

#[test]
fn datasets_and_regularisation_weigh_in() {
    let folder = workspace();
    let reg = folder.path().join("reg");
    std::fs::create_dir(&reg).unwrap();
    for index in 0..3u8 {
        image::RgbImage::from_pixel(64, 64, image::Rgb([20 * index, 200, 9]))
            .save(reg.join(format!("{index}.png")))
            .unwrap();
    }
    let reg = format!("reg_data_dir={:?}", reg.display().to_string());
    let mut session = prepare(folder.path(), &[&reg, "batch_size=16", "prior_loss_weight=0.5"]);
    assert_eq!(session.plan().visits_per_epoch, 16, "as many visits as there are to learn");
    let path = session.save("reg").unwrap();
    let metadata = SafetensorsFile::open(&path).unwrap().metadata().clone();
    assert_eq!((metadata["ss_num_train_images"].as_str(), metadata["ss_num_reg_images"].as_str()), ("8", "8"));
    assert!(metadata["ss_reg_dataset_dirs"].contains("reg") && !metadata["ss_dataset_dirs"].contains("reg"));
    let whole = trained(folder.path(), &[&reg, "batch_size=16", "prior_loss_weight=1.0"]).1[0].loss;
    let less = trained(folder.path(), &[&reg, "batch_size=16", "prior_loss_weight=0.0"]).1[0].loss;
    let half = trained(folder.path(), &[&reg, "batch_size=16", "prior_loss_weight=0.5"]).1[0].loss;
    assert!(less < half && half < whole && (half - (less + whole) / 2.0).abs() < 1e-4 * whole, "{less} {half} {whole}");
}

#[test]
fn a_cache_changes_nothing_and_is_never_stale() {
    let folder = workspace();
    masked(folder.path());
    let cache = format!("cache_dir={:?}", folder.path().join("cache").display().to_string());
    let bytes = |keys: &[&str]| {
        let mut session = prepare(folder.path(), keys);
        while session.step().unwrap().is_some() {}
        std::fs::read(session.save("same").unwrap()).unwrap()
    };
    let entries = || {
        let shards =
            std::fs::read_dir(folder.path().join("cache")).unwrap().flatten().filter(|entry| entry.path().is_dir());
        shards.map(|shard| std::fs::read_dir(shard.path()).unwrap().count()).sum::<usize>()
    };
    let frozen = ["train_text_encoder=false", "masked_loss=true", "max_train_steps=8"];
    let plain = bytes(&frozen);
    assert!(plain == bytes(&[frozen[0], frozen[1], frozen[2], &cache]));
    // Eight pictures, eight captions and two empty texts of the samples that are one.
    assert_eq!(entries(), 17);
    assert!(plain == bytes(&[frozen[0], frozen[1], frozen[2], &cache]), "from the cache");
    assert_eq!(entries(), 17);
    // Another size, another setting, another picture: each is encoded anew.
    bytes(&[frozen[0], &cache]);
    assert_eq!(entries(), 25, "masks that are not used are a setting");
    bytes(&[frozen[0], &cache, "background=black"]);
    assert_eq!(entries(), 33);
    let changed = image::RgbImage::from_fn(70, 64, |x, y| image::Rgb([7, x as u8, y as u8]));
    changed.save(folder.path().join("data/3.png")).unwrap();
    let fresh = bytes(&frozen);
    assert!(fresh != plain);
    assert!(fresh == bytes(&[frozen[0], frozen[1], frozen[2], &cache]));
    assert_eq!(entries(), 34);
}

#[test]
fn pictures_decoded_ahead_are_those_of_their_visits() {
    let folder = workspace();
    let keys = ["cache_latents=false", "processors=[\"random_crop\", \"flip\"]", "max_train_steps=6"];
    let run = |batch: &str, accumulation: &str| {
        let more = [batch, accumulation, "adam_eps=1", "learning_rate=0.1"];
        trained(folder.path(), &[&keys[..], &more].concat())
    };
    // The draws of crops and flips belong to the visit, so the batch size changes nothing.
    let (whole, reports) = run("batch_size=4", "gradient_accumulation_steps=1");
    let (split, others) = run("batch_size=1", "gradient_accumulation_steps=4");
    for (a, b) in reports.iter().zip(&others) {
        assert!((a.loss / b.loss - 1.0).abs() < 1e-4, "{} {}", a.loss, b.loss);
    }
    assert!(distance(&whole, &split) < 1e-3);
}

#[test]
fn weighted_words_change_the_states() {
    let folder = workspace();
    std::fs::write(folder.path().join("data/0.txt"), "a (red:1.5) [thing]").unwrap();
    let loss = |keys: &[&str]| trained(folder.path(), &[keys, &["batch_size=8"]].concat()).1[0].loss;
    let (plain, weighted) = (loss(&[]), loss(&["weighted_captions=true"]));
    assert!(plain != weighted && (plain / weighted - 1.0).abs() < 0.1, "{plain} {weighted}");
    for index in 0..8 {
        std::fs::write(folder.path().join(format!("data/{index}.txt")), "no brackets").unwrap();
    }
    assert_eq!(loss(&[]), loss(&["weighted_captions=true"]));
}

#[test]
fn checkpointing_gives_the_same_update() {
    let folder = workspace();
    // ε as above: without it AdamW blows rounding up. At 64 pixels the middle of the tiny network has groups of two numbers,
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
    let run = |own: &str| trained(folder.path(), &[&keys[..], &[own]].concat());
    let (plain, reports) = run("gradient_checkpointing=false");
    let (again, others) = run("gradient_checkpointing=true");
    for (a, b) in reports.iter().zip(&others) {
        assert!((a.loss / b.loss - 1.0).abs() < 1e-5 && a.gradient_norm.is_some(), "{} {}", a.loss, b.loss);
        let norms = (a.gradient_norm.unwrap(), b.gradient_norm.unwrap());
        assert!((norms.0 / norms.1 - 1.0).abs() < 1e-3, "{norms:?}");
    }
    assert!(distance(&plain, &again) < 1e-4, "{}", distance(&plain, &again));
    // A frozen text encoder, and a frozen U-Net.
    for own in ["train_text_encoder=false", "train_unet=false"] {
        let loss = |checkpointing: &str| {
            let reports = trained(folder.path(), &[own, checkpointing, keys[4], keys[5], keys[6]]).1;
            (reports[1].loss, reports[1].gradient_norm.unwrap())
        };
        let (plain, again) = (loss("gradient_checkpointing=false"), loss("gradient_checkpointing=true"));
        assert!(
            (plain.0 / again.0 - 1.0).abs() < 1e-6 && (plain.1 / again.1 - 1.0).abs() < 1e-5,
            "{own} {plain:?} {again:?}"
        );
    }
    // No graph is left between steps.
    let mut session = prepare(folder.path(), &["gradient_checkpointing=true"]);
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
    // The layers themselves are held against the whole weights in lora-torch. (Resolution: see above.)
    for (storage, tolerance) in [("fp16", 1e-5), ("bf16", 5e-3), ("fp8", 8e-2), ("int8", 3e-3), ("nf4", 2e-1)] {
        let storage = format!("base_storage={storage}");
        let (loss, norm) = run(&[&storage]);
        let apart = (loss / whole.0 - 1.0).abs().max((norm / whole.1 - 1.0).abs());
        assert!(apart < tolerance, "{storage}: {apart}");
        let again = run(&[&storage, "gradient_checkpointing=true"]);
        assert!((loss / again.0 - 1.0).abs() < 1e-6 && (norm / again.1 - 1.0).abs() < 1e-5, "{storage}");
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
        let common = ["batch_size=4", "max_resolution=128", "max_train_steps=3", "sample_prompts=a"];
        let mut session = prepare(folder.path(), &[keys, &common].concat());
        // Another order of the layers in between.
        let sampled = |session: &mut Session, report| {
            session.sample(&["a".into()]).unwrap();
            report
        };
        std::iter::from_fn(|| session.step().unwrap().map(|report| sampled(&mut session, report)))
            .map(|report| (report.loss, report.gradient_norm.unwrap()))
            .collect::<Vec<_>>()
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
            // The sums are the same; the first three axes of a linear layer are flattened or not.
            assert!(apart < 1e-4, "{keys:?}: {plain:?} {other:?}");
        }
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
        std::env::var("LORA_TEST_DEVICE").unwrap_or_else(|_| "cpu".into())
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
    assert_eq!(losses, same);
    let averaged = read(&path);
    assert!(changed(&averaged) > 0.1 * changed(&base) && changed(&averaged) < changed(&base));
    // It is a base like any other.
    let whole = prepare(folder.path(), &[&format!("base_model={}", path.display()), "train_text_encoder=false"]).step();
    assert!(whole.unwrap().unwrap().loss.is_finite());
    let error = TrainConfig::from_text(&own, Format::Yaml, &["lora_rank=4"]).unwrap_err().to_string();
    assert!(error.contains("lora_rank") && error.contains("train = lora"), "{error}");
}
