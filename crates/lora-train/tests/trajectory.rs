//! Twenty AdamW steps against PyTorch and PEFT on saved noise and timesteps (see lora-models' golden files, whose own
//! spread between one thread and two, and between float32 and float64, is below 4e-7).

use std::collections::BTreeMap;

use lora_core::target::Targets;
use lora_core::variant::VariantRegistry;
use lora_core::{Adapter, AdapterModule, Component, HostTensor};
use lora_io::safetensors::SafetensorsFile;
use lora_models::diffusion::{NoiseSchedule, Prediction};
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::{ClipTextEncoder, Conditions, Unet};
use lora_models::synthetic::SyntheticModel;
use lora_models::weights::{SyntheticWeights, Weights, synthetic_uniform};
use lora_torch::tch::{Device, Kind, Tensor};
use lora_torch::tensor::from_host;
use lora_train::loss::{Denoising, LossWeights};
use lora_train::optimiser::OptimiserState;
use lora_train::parameters::ParameterList;
use lora_train::trainable::{AdapterOptions, TrainableAdapter};

const CPU: Device = Device::Cpu;

fn given(name: &str, shape: &[usize]) -> Tensor {
    let scale = 3f64.sqrt() as f32;
    let values = synthetic_uniform(name, shape.iter().product()).map(|u| scale * u).collect();
    from_host(&HostTensor::from_f32(shape, values).unwrap(), CPU).unwrap()
}

/// The 8-byte elements of a golden tensor.
fn words(file: &SafetensorsFile, name: &str) -> Vec<[u8; 8]> {
    file.get(name).unwrap().bytes().as_chunks::<8>().0.to_vec()
}

/// A tiny model, what it predicts, and where its golden files are.
struct Reference {
    model: SyntheticModel,
    prediction: Prediction,
    folder: &'static str,
}

fn sd1() -> Reference {
    Reference { model: SyntheticModel::tiny(), prediction: Prediction::Epsilon, folder: "golden" }
}

fn sd2() -> Reference {
    Reference { model: SyntheticModel::tiny_sd2(), prediction: Prediction::Velocity, folder: "golden/sd2" }
}

fn sdxl() -> Reference {
    Reference { model: SyntheticModel::tiny_sdxl(), prediction: Prediction::Epsilon, folder: "golden/sdxl" }
}

/// What the golden run tells a U-Net that reads sizes, of its two items.
const SIZES: [[f64; 6]; 2] = [[128.0, 128.0, 0.0, 0.0, 128.0, 128.0], [96.0, 160.0, 8.0, 0.0, 128.0, 128.0]];

fn trajectory(reference: Reference, variant: &str, min_snr_gamma: Option<f64>, noise_offset: f64, limit: f64) {
    let Reference { model, prediction, folder } = reference;
    let folder = format!("{}/../lora-models/tests/{folder}", env!("CARGO_MANIFEST_DIR"));
    let golden = SafetensorsFile::open(format!("{folder}/tiny_trajectory.safetensors")).unwrap();
    let (unet_weights, text_weights) = (SyntheticWeights::new("unet"), SyntheticWeights::new("text_encoder"));
    let mut unet = Unet::new(&Weights::new(&unet_weights, Kind::Float, CPU), model.unet).unwrap();
    let mut text = ClipTextEncoder::new(&Weights::new(&text_weights, Kind::Float, CPU), model.text_encoder).unwrap();

    let second_weights = SyntheticWeights::new("text_encoder_2");
    let second = |config| ClipTextEncoder::new(&Weights::new(&second_weights, Kind::Float, CPU), config).unwrap();
    let mut second = model.text_encoder_2.map(|config| second(config).of(Component::TEXT_ENCODER_2));

    // The golden files' first values (`down` by formula, `up` zero), handed over as an adapter to go on from.
    let options = AdapterOptions::lora(4, 2.0, 0);
    let (mut trained, mut parameters) = (TrainableAdapter::default(), ParameterList::new(OptimiserState::adamw(), 0.0));
    let networks = [Some(&mut unet as &mut dyn Adaptable), Some(&mut text), second.as_mut().map(|own| own as _)];
    for network in networks.into_iter().flatten() {
        let targets = Targets::parse(&["attention"]).unwrap().select(&network.adaptable_layers().unwrap()).unwrap();
        let mut from = Adapter::default();
        for target in &targets {
            let shape = target.geometry.with_outputs(4).weight_shape();
            let bound = (3.0 / target.geometry.fan_in() as f64).sqrt() as f32;
            let values =
                synthetic_uniform(&format!("lora.{}.down", target.path), shape.iter().product()).map(|u| bound * u);
            let tensors = BTreeMap::from([
                ("down".to_owned(), HostTensor::from_f32(shape.clone(), values.collect()).unwrap()),
                ("up".to_owned(), HostTensor::zeros(target.geometry.pointwise_from(4).weight_shape())),
            ]);
            from.modules
                .insert(target.path.clone(), AdapterModule { variant: "lora".into(), tensors, rank: 4, alpha: 2.0 });
        }
        trained.attach(network, &targets, &VariantRegistry::default(), &options, Some(&from), &mut parameters).unwrap();
    }

    let schedule = NoiseSchedule::new(prediction);
    let integers = |name: &str| words(&golden, name).into_iter().map(i64::from_le_bytes).collect::<Vec<_>>();
    let tokens = Tensor::from_slice(&integers("input_ids")).view([2, 77]);
    // The second encoder's rows are filled up with token 0 behind the end.
    let end = |row: usize| tokens.get(row as i64).eq(49407).to_kind(Kind::Int64).argmax(0, false);
    let ends = Tensor::stack(&[end(0), end(1) + 77], 0);
    let places = Tensor::arange(2 * 77, (Kind::Int64, CPU)).view([2, 77]);
    let zero_padded = tokens.where_scalarother(&places.le_tensor(&ends.unsqueeze(-1)), 0);
    let timesteps = integers("timesteps");
    let latents = given("input.train.latents", &[2, 4, 16, 16]);
    let losses = words(&golden, &format!("{variant}.losses")).into_iter().map(f64::from_le_bytes);
    for (step, expected) in losses.enumerate() {
        let mut noise = given(&format!("input.trajectory.{step}.noise"), &[2, 4, 16, 16]);
        if noise_offset > 0.0 {
            noise += noise_offset * given(&format!("input.trajectory.{step}.offset"), &[2, 4, 1, 1]);
        }
        let times: Vec<usize> = timesteps[2 * step..2 * step + 2].iter().map(|&t| t as usize).collect();
        let pass = Pass::default();
        let (context, added) = match &second {
            None => (text.forward(&tokens, 1, &pass).unwrap(), None),
            Some(second) => {
                let first = text.penultimate(&tokens, &ends, 1, &pass).unwrap();
                let second = second.penultimate(&zero_padded, &ends, 1, &pass).unwrap();
                let sizes = Unet::size_embedding(&SIZES, CPU).unwrap();
                let added = Tensor::cat(&[second.pooled.unwrap(), sizes], -1);
                (Tensor::cat(&[first.states, second.states], -1), Some(added))
            }
        };
        let weights = LossWeights { min_snr_gamma, ..LossWeights::default() };
        let denoising = Denoising::new(&unet, &schedule, &latents, [&noise; 2], &times, &weights).unwrap();
        let conditions = Conditions { context: &context, added: added.as_ref() };
        let loss = denoising.loss(&unet, conditions, &pass).unwrap();
        loss.backward();
        parameters.settle(&loss.detach(), 1.0, limit).unwrap();
        parameters.step(|_| 1e-3).unwrap();
        parameters.clear_gradients().unwrap();
        let found = f64::try_from(&loss).unwrap();
        assert!((found / expected - 1.0).abs() < 1e-5, "{variant}, step {step}: {found} {expected}");
    }

    let names: Vec<&str> = golden.metadata()["names"].split('\n').collect();
    let expected = golden.get(&format!("{variant}.final_norms")).unwrap().to_host().unwrap();
    let norms: BTreeMap<String, f64> =
        parameters.iter().map(|parameter| (format!("lora.{}", parameter.name), parameter.norm().unwrap())).collect();
    assert_eq!(norms.len(), names.len());
    for (name, &expected) in names.iter().zip(&*expected.to_f32()) {
        let found = norms[*name];
        assert!(
            (found - f64::from(expected)).abs() <= 1e-3 * f64::from(expected),
            "{variant} {name}: {found} {expected}"
        );
    }
}

#[test]
fn twenty_plain_steps() {
    trajectory(sd1(), "plain", None, 0.0, 1.0);
}

#[test]
fn twenty_steps_with_min_snr_noise_offset_and_clipping() {
    trajectory(sd1(), "weighted", Some(5.0), 0.05, 0.05);
}

#[test]
fn twenty_plain_steps_toward_velocity() {
    trajectory(sd2(), "plain", None, 0.0, 1.0);
}

#[test]
fn twenty_steps_toward_velocity_with_min_snr_noise_offset_and_clipping() {
    trajectory(sd2(), "weighted", Some(5.0), 0.05, 0.05);
}

#[test]
fn twenty_plain_steps_of_two_text_encoders() {
    trajectory(sdxl(), "plain", None, 0.0, 1.0);
}

#[test]
fn twenty_steps_of_two_text_encoders_with_min_snr_noise_offset_and_clipping() {
    trajectory(sdxl(), "weighted", Some(5.0), 0.05, 0.05);
}
