//! Sessions that are driven by hand.

use std::path::Path;

use lora_data::sampler::Visit;
use lora_models::synthetic::SyntheticModel;
use lora_torch::fault::Fault;

use super::*;
use crate::base::Tensors;
use crate::config::Format;
use crate::plugins::Plugins;

/// A tiny base, pictures of two shapes, and a run on them with further keys.
fn session(folder: &Path, keys: &[&str]) -> Session {
    Session::prepare(config(folder, keys), &Plugins::default(), &mut |_| {}).unwrap()
}

fn config(folder: &Path, keys: &[&str]) -> TrainConfig {
    SyntheticModel::tiny().write(folder.join("base.safetensors"), DType::F16).unwrap();
    std::fs::create_dir_all(folder.join("data")).unwrap();
    for (index, (width, height)) in [(64, 64), (128, 64), (64, 64), (128, 64), (64, 64)].into_iter().enumerate() {
        let picture = image::RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8, y as u8, index as u8]));
        picture.save(folder.join(format!("data/{index}.png"))).unwrap();
        std::fs::write(folder.join(format!("data/{index}.txt")), format!("a (shape:1.3) {index}")).unwrap();
    }
    let path = |name: &str| folder.join(name).display().to_string();
    let text = format!(
        "base_model: {}\ntrain_data_dir: {}\noutput_dir: {}\ndevice: cpu\nprecision: fp32\nmax_resolution: 64\n\
         target_modules: attention\nmax_train_steps: 40\n",
        path("base.safetensors"),
        path("data"),
        path("out")
    );
    TrainConfig::from_text(&text, Format::Yaml, keys).unwrap()
}

/// What a graph computes again on the same tensors, computed again on the same tensors.
#[test]
fn steps_on_the_same_tensors_are_the_same_steps() {
    for keys in [
        &["batch_size=2", "max_train_steps=8", "enable_bucket=true", "min_bucket_reso=64", "weighted_captions=true"][..],
        &["batch_size=2", "max_train_steps=8", "prior_prompt=a thing", "prior_blank_weight=0.5"],
        &["gradient_accumulation_steps=2", "train_text_encoder=false", "min_snr_gamma=5", "max_train_steps=6"],
    ] {
        let folder = tempfile::tempdir().unwrap();
        let run = |graphs: Option<StepGraphs>| {
            let mut session = session(folder.path(), keys);
            session.graphs = graphs;
            let losses: Vec<f64> = std::iter::from_fn(|| session.step().unwrap()).map(|report| report.loss).collect();
            (losses, session.recorded_shapes(), session.adapter().unwrap().export().unwrap())
        };
        let (plain, none, adapter) = run(None);
        let (same, shapes, recorded) = run(Some(StepGraphs::new(None)));
        assert_eq!((plain, none), (same, 0), "{keys:?}");
        assert!(shapes > 0, "{keys:?}");
        assert_eq!(adapter, recorded, "{keys:?}");
    }
}

/// Of cached latents each picture is seen both ways, as often the one as the other.
#[test]
fn a_mirrored_picture_is_kept_beside_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let kept = |session: &Session, index: usize, epoch: u64| {
        let visit = Visit { index, repeat: 0, epoch };
        let (_, tensors) = session.feed.examples.kept(&visit, &*session.feed.source, session.config.seed).unwrap();
        tensors
    };
    let cache = format!("cache_dir={}", folder.path().join("cache").display());
    let flip = "processors=[\"center_crop\", \"flip\"]";
    let flipped = session(folder.path(), &[flip, &cache]);
    let plain = session(folder.path(), &[]);
    // What the latents are drawn from is what the autoencoder makes of the picture, mirrored or not.
    let same = |a: &Tensors, b: &Tensors| a.iter().all(|(name, tensor)| *tensor == b[name]);
    let mut firsts = 0;
    for index in 0..5 {
        let [first, second, third] = [0, 1, 2].map(|epoch| kept(&flipped, index, epoch));
        assert!(same(&first, &third) && !same(&first, &second));
        let own = kept(&plain, index, 0);
        assert!(same(&own, &kept(&plain, index, 1)));
        firsts += usize::from(same(&own, &first));
        let mirrored = [&first, &second].map(|tensors| !same(&own, tensors));
        assert_ne!(mirrored[0], mirrored[1], "one of the two is the picture as it is");
    }
    assert!((1..5).contains(&firsts), "pictures begin one way or the other: {firsts}");
    assert!(flipped.notes.iter().all(|note| !note.contains("image_variations")), "{:?}", flipped.notes);
    // From the files of the cache they are the same.
    let again = session(folder.path(), &[flip, &cache]);
    assert!((0..2).all(|epoch| same(&kept(&flipped, 3, epoch), &kept(&again, 3, epoch))));
    let several = session(folder.path(), &["processors=[\"random_crop\", \"flip\"]", "image_variations=3"]);
    assert!(several.notes.iter().any(|note| note.contains("3 variation(s)")), "{:?}", several.notes);
    // Where a plan has switched it on, too.
    let keys = ["processors=[\"random_crop\", \"flip\"]", "image_variations=3", "cache_latents=false"];
    let mut planned = config(folder.path(), &keys);
    planned.cache_latents = true;
    let planned = Session::prepare(planned, &Plugins::default(), &mut |_| {}).unwrap();
    assert_eq!((0..5).map(|item| planned.feed.source.variations(item)).collect::<Vec<_>>(), [3; 5]);
    assert_eq!(session(folder.path(), &keys).feed.source.variations(0), 1);
    let fixed = session(folder.path(), &["image_variations=3"]);
    assert!(fixed.notes.iter().any(|note| note.contains("without a random processor")), "{:?}", fixed.notes);
}

/// What is beside training has precedence, and the recordings come back.
#[test]
fn samples_that_do_not_fit_beside_recordings_take_their_place() {
    let folder = tempfile::tempdir().unwrap();
    let run = |recorded: bool, fails: bool| {
        let keys = ["max_train_steps=6", "sample_resolution=64", "sample_steps=2"];
        let mut session = session(folder.path(), &keys);
        session.graphs = recorded.then(|| StepGraphs::new(None));
        let validation = session.load_validation(&folder.path().join("data")).unwrap();
        let mut shapes = Vec::new();
        for _ in 0..2 {
            session.step().unwrap();
        }
        let fault = fails.then(|| Fault::of_allocation(100));
        let pictures = session.sample(&["a".to_owned()]);
        shapes.push(session.recorded_shapes());
        drop(fault);
        session.step().unwrap();
        shapes.push(session.recorded_shapes());
        let fault = fails.then(|| Fault::of_allocation(100));
        let loss = session.validation_loss(&validation);
        shapes.push(session.recorded_shapes());
        drop(fault);
        while session.step().unwrap().is_some() {}
        (pictures, loss, shapes, session.adapter().unwrap().export().unwrap())
    };
    let (pictures, loss, none, adapter) = run(false, false);
    let (pictures, loss) = (pictures.unwrap(), loss.unwrap());
    assert_eq!(none, [0, 0, 0]);
    let (again, again_loss, kept, same) = run(true, false);
    assert_eq!((again.unwrap(), again_loss.unwrap(), same), (pictures.clone(), loss, adapter.clone()));
    assert!(kept[0] > 0 && kept[1] >= kept[0] && kept[2] == kept[1], "{kept:?}");
    let (again, again_loss, left, same) = run(true, true);
    assert_eq!((again.unwrap(), again_loss.unwrap(), same), (pictures, loss, adapter));
    assert!(left[0] == 0 && left[1] > 0 && left[2] == 0, "{left:?}");
    // Without recordings there is nothing that could make room.
    let (pictures, loss, ..) = run(false, true);
    assert!(pictures.unwrap_err().is_out_of_memory() && loss.unwrap_err().is_out_of_memory());
}

#[test]
fn samples_that_are_too_large_are_decoded_in_tiles() {
    let folder = tempfile::tempdir().unwrap();
    let session =
        |keys: &[&str]| session(folder.path(), &[&["sample_resolution=320", "sample_steps=1"], keys].concat());
    let draw = |session: &mut Session| session.sample(&["a".to_owned()]).unwrap();
    let tiled = draw(&mut session(&["vae_tiling=true"]));
    let mut own = session(&[]);
    let fault = Fault::none();
    let whole = draw(&mut own);
    let largest = fault.largest();
    drop(fault);
    let fault = Fault::from_bytes(largest);
    assert_eq!(draw(&mut own), tiled);
    assert!(fault.failed() > 0 && whole != tiled);
}

/// What an overflow in fp16 does, on a device without fp16: the loss scale alone makes the gradients overflow.
#[test]
fn a_step_that_overflows_is_skipped_and_the_scale_recovers() {
    let folder = tempfile::tempdir().unwrap();
    let mut session = session(folder.path(), &[]);
    session.scaler = LossScaler::dynamic_from(f64::powi(2.0, 140), 2000);

    let before = session.adapter().unwrap().export().unwrap();
    let first = session.step().unwrap().unwrap();
    assert!(first.skipped && first.gradient_norm.is_none() && first.loss.is_finite());
    assert_eq!((first.skipped_steps, first.loss_scale), (1, f64::powi(2.0, 139)));
    assert_eq!(session.adapter().unwrap().export().unwrap(), before, "a skipped step changes nothing");

    let healed = std::iter::from_fn(|| session.step().unwrap()).find(|report| !report.skipped).unwrap();
    assert!(
        healed.skipped_steps > 5 && healed.gradient_norm.is_some_and(|norm| norm > 0.0 && norm < 1e3),
        "{healed:?}"
    );
    assert_ne!(session.adapter().unwrap().export().unwrap(), before);
}
