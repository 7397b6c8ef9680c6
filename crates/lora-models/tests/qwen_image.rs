//! Qwen-Image's transformer against diffusers and PEFT on a tiny model (`tools/golden/make_transformers.py`), its autoencoder and
//! the noise levels of its samples on another (`make_qwen_image.py`).

mod common;

use common::flow::{CONTEXT, Call, latents_match, matches};
use common::{CPU, tensor, whole};
use lora_core::DType;
use lora_io::checkpoint::Checkpoint;
use lora_models::diffusion::flow::{self, Shift};
use lora_models::layers::Pass;
use lora_models::networks::{QwenImage, QwenImageConditions, QwenImageConfig, load_vae};
use lora_models::synthetic::SyntheticQwenImage;
use lora_models::weights::{Held, SyntheticWeights, Weights};
use lora_torch::tch::{Kind, Tensor};

/// Of a second item the last three text tokens are no caption's.
fn velocity(network: &QwenImage, call: &Call, pass: &Pass) -> Tensor {
    let (batch, tokens, _) = call.context.size3().unwrap();
    let lengths = (batch > 1).then(|| Tensor::from_slice(&[tokens, tokens - 3]));
    let conditions = QwenImageConditions { sigmas: &call.sigmas, context: &call.context, lengths: lengths.as_ref() };
    network.forward(&call.latents, &conditions, pass).unwrap()
}

#[test]
fn velocities_and_gradients_match_diffusers_and_peft() {
    let config = QwenImageConfig {
        latent_channels: 16,
        width: 64,
        heads: 2,
        inner: 256,
        context: CONTEXT as usize,
        blocks: 2,
        axes: vec![4, 14, 14],
    };
    let weights = SyntheticWeights::new("transformer");
    let network = QwenImage::new(&Weights::new(&weights, Kind::Float, CPU), config).unwrap();
    matches("qwen_image", network, false, &["re:transformer_blocks\\..*(attn|mlp).*"], velocity);
}

#[test]
fn latents_are_those_of_diffusers() {
    let folder = tempfile::tempdir().unwrap();
    SyntheticQwenImage::tiny().write(folder.path(), DType::F32).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    latents_match(&whole("qwen_image"), &load_vae(&checkpoint, Kind::Float, CPU, Held::default()).unwrap());
}

#[test]
fn statistics_that_are_not_those_of_the_channels_are_named() {
    let folder = tempfile::tempdir().unwrap();
    SyntheticQwenImage::tiny().write(folder.path(), DType::F32).unwrap();
    for (config, word) in
        [("{\"latents_mean\": [0.5]}", "latents_mean has 1"), ("{\"latents_std\": \"x\"}", "latents_std has 0")]
    {
        std::fs::write(folder.path().join("vae/config.json"), config).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let error = load_vae(&checkpoint, Kind::Float, CPU, Held::default()).unwrap_err().to_string();
        assert!(error.contains(word) && error.contains("16 channels"), "{error}");
    }
}

#[test]
fn samples_go_through_the_levels_of_diffusers() {
    let expected = Vec::<f64>::try_from(tensor(&whole("qwen_image"), "sample.sigmas").to_kind(Kind::Double)).unwrap();
    let found = flow::levels_to(0.02, 4, Shift::QWEN_IMAGE.factor(4 * 6)).unwrap();
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-6), "{found:?}");
    assert_eq!(flow::levels_to(0.02, 1, 2.0).unwrap(), [1.0, 0.0]);
}
