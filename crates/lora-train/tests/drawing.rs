//! Pictures with finished adapters: what is applied live draws what the merged base draws; prompts say how they are drawn.

mod common;

use std::path::Path;

use lora_core::Strength;
use lora_core::variant::VariantRegistry;
use lora_data::{PromptLine, RgbPicture};
use lora_io::adapter;
use lora_io::merge::{MergeOptions, Weighted, merge};
use lora_train::config::{Format, TrainConfig};
use lora_train::inference::{AppliedAdapter, PictureModel, PictureModelOptions, PictureRequest};
use lora_train::{Error, Plugins};

/// An adapter of a few large steps, as a file.
fn adapter(folder: &Path, name: &str, keys: &[&str]) -> AppliedAdapter {
    let usual = ["learning_rate=0.05", "max_train_steps=3", "train_text_encoder=true"];
    let mut session = common::prepare(folder, &[&usual[..], keys].concat());
    while session.step().unwrap().is_some() {}
    AppliedAdapter { path: session.save(name).unwrap(), strength: Strength::default() }
}

fn model(base: &Path) -> PictureModel {
    let mut options = PictureModelOptions::new(base);
    let keys = [&format!("device={}", common::device()), "precision=fp32", "sample_resolution=64", "sample_steps=4"];
    options.keys = keys.map(str::to_owned).to_vec();
    PictureModel::open(&options, &Plugins::default()).unwrap()
}

fn draw(model: &mut PictureModel, requests: &[PictureRequest]) -> Vec<RgbPicture> {
    let mut told = Vec::new();
    let pictures = model.draw(requests, &mut |index, picture| told.push((index, picture.clone()))).unwrap();
    told.sort_by_key(|(index, _)| *index);
    assert_eq!(told.into_iter().map(|(_, picture)| picture).collect::<Vec<_>>(), pictures);
    pictures
}

/// The mean difference of two pictures' values, of 255.
fn difference(a: &RgbPicture, b: &RgbPicture) -> f64 {
    let each = a.data().iter().zip(b.data()).map(|(x, y)| f64::from(x.abs_diff(*y)));
    each.sum::<f64>() / a.data().len() as f64
}

#[test]
fn adapters_of_any_variant_applied_live_draw_what_the_merged_base_draws() {
    let folder = common::workspace();
    let base = folder.path().join("base.safetensors");
    let mut all = [
        adapter(folder.path(), "plain", &[]),
        adapter(folder.path(), "other", &["seed=5", "lora_rank=2"]),
        adapter(folder.path(), "dora", &["variant=dora"]),
        adapter(folder.path(), "lokr", &["variant=lokr"]),
    ];
    all[1].strength = Strength::of_text_and_others(0.3, -0.7);
    all[2].strength = Strength::from(0.6);
    all[3].strength = Strength::from(0.5);
    let request = |adapters: &[AppliedAdapter]| PictureRequest {
        prompt: PromptLine::parse("picture number 3 --d 9"),
        adapters: adapters.to_vec(),
    };
    let mut live = model(&base);
    // The base comes between: what hung on its layers is gone.
    let drawn = draw(&mut live, &[request(&all), request(&[]), request(&all[..1]), request(&[])]);
    assert_eq!(drawn[1], drawn[3]);
    for (adapters, live) in [(&all[..], &drawn[0]), (&all[..1], &drawn[2])] {
        let weighted: Vec<Weighted> = adapters
            .iter()
            .map(|own| Weighted {
                name: "own".into(),
                adapter: adapter::read(&own.path).unwrap().adapter,
                strength: own.strength.clone(),
            })
            .collect();
        let merged = folder.path().join(format!("merged-{}.safetensors", adapters.len()));
        let options = MergeOptions { dtype: Some(lora_core::DType::F32), ..MergeOptions::default() };
        merge(&base, &weighted, &merged, &options, &VariantRegistry::default(), &|_, _| {}).unwrap();
        let expected = &draw(&mut model(&merged), &[request(&[])])[0];
        // Values are whole numbers: where one lies at the edge, rounding may move it by one.
        let (apart, effect) = (difference(live, expected), difference(live, &drawn[1]));
        assert!(apart < 0.1 && effect > 1.0, "{} adapters: {apart} apart, {effect} from the base", adapters.len());
    }
}

#[test]
fn prompts_say_how_they_are_drawn_and_seeds_tell_pictures_apart() {
    let folder = common::workspace();
    let mut model = model(&folder.path().join("base.safetensors"));
    let lines = ["a --d 1", "a --d 2", "a --d 1", "a --d 1 --w 72", "a --d 1 --ss euler_a", "a --d 1 --l 3 --n b"];
    let requests = lines.map(|line| PictureRequest { prompt: PromptLine::parse(line), adapters: Vec::new() });
    let drawn = draw(&mut model, &requests);
    assert_eq!(drawn[0], drawn[2]);
    assert_eq!((drawn[3].width(), drawn[3].height()), (72, 64));
    for other in [1, 4, 5] {
        assert_ne!(drawn[0], drawn[other], "{}", lines[other]);
    }
    let error =
        model.draw(&[PictureRequest { prompt: PromptLine::parse("a --ss x"), adapters: Vec::new() }], &mut |_, _| {});
    assert!(matches!(error, Err(Error::NoSampler { .. })));
}

#[test]
fn samples_in_training_take_what_their_prompts_say() {
    let folder = common::workspace();
    let prompts = folder.path().join("prompts.txt");
    std::fs::write(&prompts, "# of the first\na --d 3\na --d 3 --w 128\nb\n").unwrap();
    let keys = [&format!("sample_prompts={}", prompts.display()), "sample_steps=2", "sample_resolution=64"];
    let mut session = common::prepare(folder.path(), &keys);
    let lines = session.config().samples.prompts.clone();
    assert_eq!(lines, ["a --d 3", "a --d 3 --w 128", "b"]);
    let samples = session.sample(&lines).unwrap();
    let sizes: Vec<_> = samples.into_iter().map(|sample| sample.into_picture().unwrap().width()).collect();
    assert_eq!(sizes, [64, 128, 64]);
    let missing = "base_model: b\ntrain_data_dir: d\noutput_dir: o\nsample_prompts: none.txt\n";
    let error = TrainConfig::from_text::<&str>(missing, Format::Yaml, &[]).unwrap_err().to_string();
    assert!(error.contains("none.txt") && error.contains("`sample_prompts`"), "{error}");
}
