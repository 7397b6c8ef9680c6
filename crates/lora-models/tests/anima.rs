//! Anima's transformer against diffusers and PEFT, and its text conditioner against diffusers, on tiny models
//! (`tools/golden/make_transformers.py`). Its autoencoder is Qwen-Image's, and held against what diffusers makes of that.

mod common;

use common::flow::{CONTEXT, Call, latents_match, matches};
use common::{CPU, distance, given, tensor, transformers, whole};
use lora_core::DType;
use lora_io::checkpoint::Checkpoint;
use lora_models::layers::Pass;
use lora_models::networks::{Cosmos, CosmosConditions, CosmosConfig, TextConditioner, TextConditionerConfig, load_vae};
use lora_models::synthetic::SyntheticAnima;
use lora_models::weights::{Held, SyntheticWeights, Weights};
use lora_torch::tch::{Kind, Tensor, no_grad};

fn velocity(network: &Cosmos, call: &Call, pass: &Pass) -> Tensor {
    let conditions = CosmosConditions { sigmas: &call.sigmas, context: &call.context };
    network.forward(&call.latents, &conditions, pass).unwrap()
}

#[test]
fn velocities_and_gradients_match_diffusers_and_peft() {
    let config = CosmosConfig {
        latent_channels: 16,
        width: 64,
        heads: 2,
        inner: 256,
        context: CONTEXT as usize,
        modulation: 24,
        blocks: 2,
        rope_scale: CosmosConfig::ROPE_SCALE,
    };
    let weights = SyntheticWeights::new("transformer");
    let network = Cosmos::new(&Weights::new(&weights, Kind::Float, CPU), config).unwrap();
    matches("anima", network, false, &["re:transformer_blocks\\..*(attn|ff).*"], velocity);
}

#[test]
fn latents_are_those_of_diffusers() {
    let folder = tempfile::tempdir().unwrap();
    SyntheticAnima::tiny().write(folder.path(), DType::F32).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    latents_match(&whole("qwen_image"), &load_vae(&checkpoint, Kind::Float, CPU, Held::default()).unwrap());
}

#[test]
fn text_states_match_diffusers() {
    let config =
        TextConditionerConfig { vocabulary: 160, source: 32, target: 48, width: 64, heads: 2, inner: 256, blocks: 2 };
    let weights = SyntheticWeights::new("text_conditioner");
    let conditioner = TextConditioner::new(&Weights::new(&weights, Kind::Float, CPU), config).unwrap();
    let tokens = Tensor::from_slice(&(0..11).map(|at| (31 * at * at) % 160).collect::<Vec<i64>>()).view([1, 11]);
    let source = given("input.conditioner.source", &[1, 7, 32]);
    let golden = transformers("text_conditioner");
    for (name, source) in [("states", Some(&source)), ("states.empty", None)] {
        let found = no_grad(|| conditioner.forward(&tokens, source, &Pass::default()).unwrap());
        let error = distance(&found, &tensor(&golden, name));
        assert!(error < 1e-5, "{name}: {error:e}");
    }
    let error = conditioner.forward(&tokens, Some(&source.narrow(2, 0, 31)), &Pass::default()).unwrap_err();
    assert!(error.to_string().contains("states of 32 numbers"), "{error}");
}
