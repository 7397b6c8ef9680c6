//! Stable Diffusion 3's and 3.5's transformers against diffusers and PEFT on tiny models
//! (`tools/golden/make_transformers.py`).

mod common;

use common::CPU;
use common::flow::{CONTEXT, Call, POOLED, matches};
use lora_models::layers::Pass;
use lora_models::networks::{Sd3, Sd3Conditions, Sd3Config};
use lora_models::weights::{SyntheticWeights, Weights};
use lora_torch::tch::{Kind, Tensor};

fn network(norms: bool, dual_blocks: usize) -> Sd3 {
    let config = Sd3Config {
        latent_channels: 16,
        width: 64,
        heads: 2,
        inner: 256,
        context: CONTEXT as usize,
        pooled: POOLED as usize,
        blocks: 2,
        dual_blocks,
        positions: 12,
        norms,
    };
    Sd3::new(&Weights::new(&SyntheticWeights::new("transformer"), Kind::Float, CPU), config).unwrap()
}

fn velocity(network: &Sd3, call: &Call, pass: &Pass) -> Tensor {
    let pooled = call.pooled.as_ref().unwrap();
    let conditions = Sd3Conditions { sigmas: &call.sigmas, context: &call.context, pooled };
    network.forward(&call.latents, &conditions, pass).unwrap()
}

#[test]
fn velocities_and_gradients_match_diffusers_and_peft() {
    for (name, norms, dual) in [("sd3", false, 0), ("sd35", true, 1)] {
        matches(name, network(norms, dual), true, &["re:transformer_blocks\\..*(attn|ff).*"], velocity);
    }
}
