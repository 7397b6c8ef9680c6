//! Z-Image's networks against diffusers, transformers and PEFT on a tiny model of its kind
//! (`tools/golden/make_z_image.py`), and the noise levels of training against other trainers' (`make_noise_levels.py`).
//!
//! Tolerances: the references move by 2e-6 between float32 and float64, gradients by up to 3e-5 between kernels for other
//! processors and numbers of threads.

mod common;

use common::adapt;
use lora_core::target::Targets;
use lora_core::{Component, HostTensor};
use lora_io::safetensors::SafetensorsFile;
use lora_models::diffusion::flow::{self, Density, NoiseLevels, Shift};
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::{Vae, ZImage, ZImageCaptions};
use lora_models::synthetic::SyntheticZImage;
use lora_models::weights::{SyntheticWeights, Weights, synthetic_uniform};
use lora_torch::tch::{Device, Kind, Tensor, no_grad};
use lora_torch::tensor::from_host;

const CPU: Device = Device::Cpu;
const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

fn golden() -> SafetensorsFile {
    SafetensorsFile::open(format!("{FOLDER}/z_image/expected.safetensors")).unwrap()
}

fn tensor(file: &SafetensorsFile, name: &str) -> Tensor {
    from_host(&file.get(name).unwrap().to_host().unwrap(), CPU).unwrap()
}

/// An input that both sides make from its name.
fn given(name: &str, shape: &[usize]) -> Tensor {
    let scale = 3f64.sqrt() as f32;
    let values = synthetic_uniform(name, shape.iter().product()).map(|u| scale * u).collect();
    from_host(&HostTensor::from_f32(shape, values).unwrap(), CPU).unwrap()
}

/// Length of the difference over that of the reference.
fn distance(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.size(), expected.size());
    f64::try_from((found - expected).norm()).unwrap() / f64::try_from(expected.norm()).unwrap()
}

fn transformer() -> ZImage {
    let weights = SyntheticWeights::new("transformer");
    ZImage::new(&Weights::new(&weights, Kind::Float, CPU), SyntheticZImage::tiny().transformer).unwrap()
}

/// Captions of these lengths in one tensor, with numbers behind them that must not be read.
struct Captions {
    states: Tensor,
    lengths: Tensor,
    ragged: bool,
}

impl Captions {
    fn new(name: &str, lengths: &[i64]) -> Self {
        let longest = lengths.iter().copied().max().unwrap() as usize;
        let states = given(name, &[lengths.len(), longest, 32]);
        let parts = |length: &i64| (length + 31) / 32;
        let ragged = lengths.iter().any(|length| parts(length) != parts(&lengths[0]));
        Self { states, lengths: Tensor::from_slice(lengths), ragged }
    }

    fn as_inputs(&self) -> ZImageCaptions<'_> {
        ZImageCaptions { states: &self.states, lengths: &self.lengths, ragged: self.ragged }
    }
}

#[test]
fn velocities_are_those_of_diffusers_with_captions_of_any_length() {
    let (golden, network) = (golden(), transformer());
    for (call, shape, lengths, sigmas) in [
        ("square", [1, 16, 6, 10], &[24i64][..], &[0.5f32][..]),
        ("wide", [2, 16, 8, 16], &[40, 11], &[0.0625, 0.984375]),
    ] {
        let captions = Captions::new(&format!("input.{call}.captions"), lengths);
        let latents = given(&format!("input.{call}.latents"), &shape);
        let sigmas = Tensor::from_slice(sigmas);
        let found = no_grad(|| network.forward(&latents, &sigmas, captions.as_inputs(), &Pass::default()).unwrap());
        let error = distance(&found, &tensor(&golden, &format!("velocity.{call}")));
        assert!(error < 1e-5, "{call}: {error:e}");
        // One by one, and with the mask where it changes nothing, the same.
        for (index, &length) in lengths.iter().enumerate() {
            let index = index as i64;
            let own = captions.states.narrow(0, index, 1).narrow(1, 0, length);
            let own = ZImageCaptions { states: &own, lengths: &captions.lengths.narrow(0, index, 1), ragged: true };
            let (latents, sigma) = (latents.narrow(0, index, 1), sigmas.narrow(0, index, 1));
            let alone = no_grad(|| network.forward(&latents, &sigma, own, &Pass::default()).unwrap());
            let error = distance(&alone, &found.narrow(0, index, 1));
            assert!(error < 1e-5, "{call}, item {index} alone: {error:e}");
        }
    }
}

#[test]
fn gradients_are_those_of_peft_with_activations_kept_and_computed_again() {
    let (golden, mut network) = (golden(), transformer());
    let leaves = adapt(&mut network, &["re:layers\\..*\\.(to_[qkv]|to_out\\.0|w[123])"]);
    let latents = given("input.train.latents", &[2, 16, 8, 8]);
    let noise = given("input.train.noise", &[2, 16, 8, 8]);
    let sigmas = Tensor::from_slice(&[0.25f32, 0.75]);
    let captions = Captions::new("input.train.captions", &[24, 9]);
    for recompute in [false, true] {
        let pass = Pass { recompute, recompute_feed_forward: recompute, ..Pass::default() };
        let mixture = flow::noised(&latents, &noise, &sigmas).unwrap();
        let answer = network.forward(&mixture, &sigmas, captions.as_inputs(), &pass).unwrap();
        let loss = (answer - flow::velocity(&latents, &noise).unwrap()).square().mean(Kind::Float);
        loss.backward();
        let (found, expected) = (f64::try_from(&loss).unwrap(), golden.get("loss").unwrap().scalar().unwrap());
        assert!((found / expected - 1.0).abs() < 1e-6, "{found} {expected}");
        for (name, leaf) in &leaves {
            let mut gradient = leaf.grad();
            let error = distance(&gradient, &tensor(&golden, name));
            assert!(error < 1e-4, "{name}, computed again {recompute}: {error:e}");
            let _ = gradient.zero_();
        }
    }
    assert_eq!(leaves.len(), golden.names().filter(|name| name.starts_with("lora.")).count());
}

#[test]
fn latents_are_those_of_diffusers() {
    let golden = golden();
    let weights = SyntheticWeights::new("vae");
    let vae = Vae::new(&Weights::new(&weights, Kind::Float, CPU), SyntheticZImage::tiny().vae).unwrap();
    no_grad(|| {
        let encoded = vae.encode(&given("input.vae.pixels", &[2, 3, 64, 48])).unwrap();
        let normalised = vae.config().normalised(&encoded.mean).unwrap();
        let decoded = vae.decode(&given("input.vae.latents", &[2, 16, 8, 6])).unwrap();
        for (name, found) in [
            ("vae.mean", &encoded.mean),
            ("vae.logvar", &encoded.log_variance),
            ("vae.normalised", &normalised),
            ("vae.decoded", &decoded),
        ] {
            let error = distance(found, &tensor(&golden, name));
            assert!(error < 1e-5, "{name}: {error:e}");
        }
        assert!(distance(&vae.config().denormalised(&normalised).unwrap(), &encoded.mean) < 1e-6);
    });
}

#[test]
fn inputs_that_do_not_fit_are_named() {
    let network = transformer();
    let error = |latents: &[i64], states: &[i64], sigmas: &[f32]| {
        let (latents, states) = (Tensor::zeros(latents, (Kind::Float, CPU)), Tensor::zeros(states, (Kind::Float, CPU)));
        let lengths = Tensor::from_slice(&[3i64]);
        let captions = ZImageCaptions { states: &states, lengths: &lengths, ragged: false };
        let sigmas = Tensor::from_slice(sigmas);
        no_grad(|| network.forward(&latents, &sigmas, captions, &Pass::default())).unwrap_err().to_string()
    };
    assert!(error(&[1, 4, 4, 4], &[1, 3, 32], &[0.5]).contains("[batch, 16, height, width] of even sides"));
    assert!(error(&[1, 16, 5, 4], &[1, 3, 32], &[0.5]).contains("[1, 16, 5, 4]"));
    assert!(error(&[1, 16, 4, 4], &[1, 0, 32], &[0.5]).contains("1 or more"));
    assert!(error(&[1, 16, 4, 4], &[1, 3, 40], &[0.5]).contains("[1, 3, 40]"));
    assert!(error(&[1, 16, 4, 4], &[1, 3, 32], &[0.5, 0.5]).contains("noise levels [2]"));
}

#[test]
fn its_layers_can_carry_adapters_and_are_of_the_transformer() {
    let mut network = transformer();
    let layers = network.adaptable_layers().unwrap();
    assert!(layers.iter().all(|layer| layer.path.component == Component::TRANSFORMER));
    let preset = |name: &str| Targets::parse(&[name]).unwrap().select(&layers).unwrap().len();
    // The refiners and what modulates are left alone.
    assert_eq!((preset("attention"), preset("attention-mlp")), (2 * 4, 2 * 7));
    assert_eq!(preset("all-linear"), layers.len());
}

#[test]
fn noise_levels_are_those_that_other_trainers_draw() {
    let rows: serde_json::Value =
        serde_json::from_slice(&std::fs::read(format!("{FOLDER}/noise_levels.json")).unwrap()).unwrap();
    let numbers = |value: &serde_json::Value| -> Vec<f64> {
        value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
    };
    let mut compared = 0;
    for row in rows["rows"].as_array().unwrap() {
        let number = |key: &str| row[key].as_f64();
        let density = match row["density"].as_str().unwrap() {
            "uniform" => Density::Uniform,
            "mode" => Density::Mode { scale: number("scale").unwrap() },
            _ => Density::LogitNormal { mean: number("mean").unwrap(), deviation: number("deviation").unwrap() },
        };
        let shift = match row["shift"].as_str() {
            Some("flux") => Shift::FLUX,
            Some(_) => Shift::QWEN_IMAGE,
            None => Shift::Factor(number("shift").unwrap()),
        };
        let drawn = NoiseLevels { density, shift, range: (0.0, 1.0) };
        let draws = numbers(&rows[if density.is_normal() { "z" } else { "u" }]);
        let tokens = number("tokens").unwrap_or(1.0) as usize;
        for (draw, expected) in draws.into_iter().zip(numbers(&row["levels"])) {
            let found = drawn.level(draw, tokens);
            assert!((found - expected).abs() < 1e-6, "{row}: {found} {expected}");
            compared += 1;
        }
    }
    assert!(compared >= 120);
}

#[test]
fn samples_go_through_the_levels_of_diffusers() {
    let expected = Vec::<f64>::try_from(tensor(&golden(), "sample.sigmas").to_kind(Kind::Double)).unwrap();
    let found = flow::levels(4, 3.0).unwrap();
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-7), "{found:?}");
}
