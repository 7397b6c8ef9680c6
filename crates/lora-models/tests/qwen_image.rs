//! Qwen-Image's transformer against diffusers and PEFT on a tiny model (`tools/golden/make_transformers.py`).

mod common;

use common::CPU;
use common::flow::{CONTEXT, Call, matches};
use lora_models::layers::Pass;
use lora_models::networks::{QwenImage, QwenImageConditions, QwenImageConfig};
use lora_models::weights::{SyntheticWeights, Weights};
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
