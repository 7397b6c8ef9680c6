//! FLUX.2's transformer against diffusers and PEFT on a tiny model (`tools/golden/make_transformers.py`), its autoencoder and
//! the noise levels of its samples on another (`make_flux2.py`).

mod common;

use common::flow::{CONTEXT, Call, latents_match, matches};
use common::{CPU, tensor, whole};
use lora_core::{Component, DType};
use lora_io::checkpoint::Checkpoint;
use lora_models::diffusion::flow;
use lora_models::layers::Pass;
use lora_models::networks::{Flux2, Flux2Conditions, Flux2Config, load_vae};
use lora_models::synthetic::SyntheticFlux2;
use lora_models::weights::{Held, SyntheticWeights, Weights};
use lora_torch::tch::{Kind, Tensor};

fn velocity(network: &Flux2, call: &Call, pass: &Pass) -> Tensor {
    let conditions = Flux2Conditions { sigmas: &call.sigmas, context: &call.context, guidance: None };
    network.forward(&call.latents, &conditions, pass).unwrap()
}

#[test]
fn velocities_and_gradients_match_diffusers_and_peft() {
    let config = Flux2Config {
        latent_channels: 16,
        width: 64,
        heads: 2,
        inner: 192,
        context: CONTEXT as usize,
        double_blocks: 2,
        single_blocks: 2,
        guidance: false,
        axes: vec![8; 4],
    };
    let weights = SyntheticWeights::new("transformer");
    let network = Flux2::new(&Weights::new(&weights, Kind::Float, CPU), config).unwrap();
    matches("flux2", network, false, &["re:(single_)?transformer_blocks\\..*"], velocity);
}

#[test]
fn latents_are_those_of_diffusers() {
    let folder = tempfile::tempdir().unwrap();
    SyntheticFlux2::tiny().write(folder.path(), DType::F32).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    latents_match(&whole("flux2"), &load_vae(&checkpoint, Kind::Float, CPU, Held::default()).unwrap());
}

#[test]
fn an_autoencoder_without_its_statistics_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = SyntheticFlux2::tiny();
    model.vae.statistics = None;
    model.write(folder.path(), DType::F32).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert!(checkpoint.component(Component::VAE).is_ok());
    let error = load_vae(&checkpoint, Kind::Float, CPU, Held::default()).unwrap_err().to_string();
    assert!(error.contains("bn.running_var") && error.contains("[128]"), "{error}");
}

#[test]
fn samples_go_through_the_levels_of_diffusers() {
    let expected = Vec::<f64>::try_from(tensor(&whole("flux2"), "sample.sigmas").to_kind(Kind::Double)).unwrap();
    let found = flow::levels(4, flow::flux2_factor(4 * 6, 4)).unwrap();
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-6), "{found:?}");
    // Above 4300 tokens the number of steps says nothing.
    assert_eq!(flow::flux2_factor(4301, 4), flow::flux2_factor(4301, 50));
}
