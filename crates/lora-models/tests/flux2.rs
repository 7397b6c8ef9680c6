//! FLUX.2's transformer against diffusers and PEFT on a tiny model (`tools/golden/make_transformers.py`).

mod common;

use common::CPU;
use common::flow::{CONTEXT, Call, matches};
use lora_models::layers::Pass;
use lora_models::networks::{Flux2, Flux2Conditions, Flux2Config};
use lora_models::weights::{SyntheticWeights, Weights};
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
