//! Whole runs on a tiny model: what becomes of pictures, masks and captions on their way into a step. On the device that
//! `LORA_TEST_DEVICE` names, the CPU by default.

mod common;

use std::path::Path;

use common::{config, distance, exact, prepare, trained, workspace};
use lora_io::safetensors::SafetensorsFile;
use lora_train::{Plugins, Session, StepReport};

#[test]
fn latents_encoded_at_each_step_train_as_well() {
    let folder = workspace();
    let (_, cached) = trained(folder.path(), &["batch_size=4"]);
    let (_, encoded) = trained(folder.path(), &["batch_size=4", "cache_latents=false"]);
    // Each visit draws its own sample of the latent distribution, so losses are close, not equal.
    assert!((cached[0].loss / encoded[0].loss - 1.0).abs() < 0.2, "{} {}", cached[0].loss, encoded[0].loss);
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
    assert_eq!(reports.iter().map(|report| report.items).sum::<usize>(), 11);
    assert!(reports.iter().all(|report| report.loss.is_finite() && report.items <= 2));
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
    let again = distance(&shuffled, &trained(folder.path(), &keys).0);
    assert!(!exact() || again == 0.0, "the same seed, the same captions: {again}");
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
    // It is by the bits that what is stale would show.
    if !exact() {
        return;
    }
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
fn pictures_pass_through_the_autoencoder_in_tiles() {
    let folder = workspace();
    let cache = format!("cache_dir={}", folder.path().join("cache").display());
    // 40 latents a side: two tiles of 24 each way.
    let keys = ["max_resolution=320", "sample_resolution=320", "sample_steps=2", "train_text_encoder=false", &*cache];
    let whole = &mut prepare(folder.path(), &keys);
    let keys = [&keys[..], &["vae_tiling=true"]].concat();
    let tiled = &mut prepare(folder.path(), &keys);
    let prompts = ["a".to_owned()];
    let mean_difference = |session: &mut Session, other: &mut Session| {
        let draw = |session: &mut Session| session.sample(&prompts).unwrap().remove(0).into_picture().unwrap();
        let (a, b) = (draw(session), draw(other));
        assert_eq!((a.width(), a.height()), (320, 320));
        let differences = a.data().iter().zip(b.data()).map(|(&a, &b)| f64::from(a.abs_diff(b)));
        differences.sum::<f64>() / a.data().len() as f64
    };
    let off = mean_difference(whole, tiled);
    assert!((0.01..10.0).contains(&off), "{off} of 255");

    // Nor are latents of the one taken for the other's.
    let loss = |session: &mut Session| session.step().unwrap().unwrap().loss;
    let (of_whole, of_tiles) = (loss(whole), loss(tiled));
    assert!(of_whole != of_tiles && (of_whole / of_tiles - 1.0).abs() < 0.1, "{of_whole} {of_tiles}");
    let again = loss(&mut prepare(folder.path(), &keys));
    assert!(if exact() { again == of_tiles } else { (again / of_tiles - 1.0).abs() < 1e-3 }, "{again} {of_tiles}");
}
