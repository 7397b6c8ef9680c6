//! FLUX.1's and Chroma's transformers against diffusers and PEFT on tiny models (`tools/golden/make_transformers.py`).

mod common;

use common::flow::{CONTEXT, Call, POOLED, latents_match, matches};
use common::{CPU, distance, whole};
use lora_core::{Component, DType};
use lora_io::checkpoint::Checkpoint;
use lora_models::layers::Pass;
use lora_models::networks::{ApproximatorConfig, Flux, FluxConditioning, FluxConditions, FluxConfig, load_vae};
use lora_models::synthetic::SyntheticChroma;
use lora_models::weights::{Frozen, Held, SyntheticWeights, Weights, synthetic_uniform};
use lora_torch::tch::{Kind, Tensor, no_grad};

fn network(conditioning: FluxConditioning) -> Flux {
    let config = FluxConfig {
        latent_channels: 16,
        width: 64,
        heads: 2,
        inner: 256,
        context: CONTEXT as usize,
        conditioning,
        double_blocks: 2,
        single_blocks: 2,
        axes: vec![4, 14, 14],
    };
    Flux::new(&Weights::new(&SyntheticWeights::new("transformer"), Kind::Float, CPU), config).unwrap()
}

fn velocity(network: &Flux, call: &Call, pass: &Pass) -> Tensor {
    let guidance = network.config().is_guided().then(|| call.sigmas.full_like(3.5));
    let conditions = FluxConditions {
        sigmas: &call.sigmas,
        context: &call.context,
        pooled: call.pooled.as_ref(),
        guidance: guidance.as_ref(),
        lengths: None,
    };
    network.forward(&call.latents, &conditions, pass).unwrap()
}

const TARGETS: &[&str] = &["re:transformer_blocks\\..*(attn|ff).*", "re:single_transformer_blocks\\..*(attn|proj).*"];

#[test]
fn velocities_and_gradients_match_diffusers_and_peft() {
    for (name, guidance) in [("flux_dev", true), ("flux_schnell", false)] {
        let conditioning = FluxConditioning::Embedded { pooled: POOLED as usize, guidance };
        matches(name, network(conditioning), true, TARGETS, velocity);
    }
}

const CHROMA: FluxConditioning =
    FluxConditioning::Approximated(ApproximatorConfig { channels: 32, inner: 40, layers: 3 });

#[test]
fn velocities_and_gradients_of_chroma_match_diffusers_and_peft() {
    matches("chroma", network(CHROMA), false, TARGETS, velocity);
}

/// Its autoencoder is FLUX.1's, as Z-Image's is.
#[test]
fn latents_of_chroma_are_those_of_diffusers() {
    let folder = tempfile::tempdir().unwrap();
    SyntheticChroma::tiny().write(folder.path(), DType::F32).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    latents_match(&whole("z_image"), &load_vae(&checkpoint, Kind::Float, CPU, Held::default()).unwrap());
}

/// What stands behind a caption's end changes nothing: the second item has as much of it as the first has text.
#[test]
fn captions_of_a_batch_may_differ_in_length() {
    let network = network(CHROMA);
    let (latents, context) = (given("latents", &[2, 16, 4, 4]), given("context", &[2, 9, CONTEXT]));
    let (sigmas, lengths) = (Tensor::from_slice(&[0.3f32, 0.8]), Tensor::from_slice(&[9i64, 5]));
    let told = |items: i64, tokens: i64, lengths: Option<&Tensor>, from: i64| {
        let conditions = FluxConditions {
            sigmas: &sigmas.narrow(0, from, items),
            context: &context.narrow(0, from, items).narrow(1, 0, tokens),
            pooled: None,
            guidance: None,
            lengths,
        };
        no_grad(|| network.forward(&latents.narrow(0, from, items), &conditions, &Pass::default())).unwrap()
    };
    let together = told(2, 9, Some(&lengths), 0);
    for (item, alone) in [told(1, 9, None, 0), told(1, 5, None, 1)].into_iter().enumerate() {
        let error = distance(&together.narrow(0, item as i64, 1), &alone);
        assert!(error < 1e-5, "item {item}: {error:e}");
    }
    assert!(distance(&told(1, 9, None, 1), &told(1, 5, None, 1)) > 1e-3, "more text is another answer");
}

/// Numbers between −1 and 1 by a name.
fn given(name: &str, shape: &[i64]) -> Tensor {
    let values = synthetic_uniform(name, shape.iter().product::<i64>() as usize);
    Tensor::from_slice(&values.collect::<Vec<f32>>()).view(shape)
}

/// Blocks of GGUF, parts of fused matrices and exchanged halves among them, beside the numbers that they stand for.
#[test]
fn a_transformer_in_blocks_computes_what_its_numbers_do() {
    let path = "../lora-io/tests/golden/transformers/flux_quantised.gguf";
    let checkpoint = Checkpoint::open(path).unwrap();
    let component = checkpoint.component(Component::TRANSFORMER).unwrap();
    let config = FluxConfig::detect(component).unwrap();
    let network = |held: Held| {
        let weights = Weights::new(component, Kind::Float, CPU).held(held);
        Flux::new(&weights, config.clone()).unwrap()
    };
    let call = Call {
        latents: given("latents", &[1, 2, 4, 6]),
        sigmas: Tensor::from_slice(&[0.7f32]),
        context: given("context", &[1, 5, 32]),
        pooled: Some(given("pooled", &[1, 32])),
    };
    let told = |held| no_grad(|| velocity(&network(held), &call, &Pass::default()));
    let (blocks, numbers) = (told(Held::Frozen(Frozen::stored(None))), told(Held::default()));
    let apart = f64::try_from((&blocks - &numbers).norm() / numbers.norm()).unwrap();
    assert!(apart < 1e-5, "{apart:e}");
}

#[test]
fn inputs_that_do_not_fit_are_named() {
    let network = network(FluxConditioning::Embedded { pooled: POOLED as usize, guidance: true });
    let (sigmas, context) = (Tensor::from_slice(&[0.5f32]), Tensor::zeros([1, 3, CONTEXT], (Kind::Float, CPU)));
    let pooled = Tensor::zeros([1, POOLED], (Kind::Float, CPU));
    let error = |latents: &[i64], guidance: Option<&Tensor>| {
        let pooled = Some(&pooled);
        let conditions = FluxConditions { sigmas: &sigmas, context: &context, pooled, guidance, lengths: None };
        let latents = Tensor::zeros(latents, (Kind::Float, CPU));
        no_grad(|| network.forward(&latents, &conditions, &Pass::default())).unwrap_err().to_string()
    };
    assert!(error(&[1, 16, 4, 4], None).contains("one guidance each"));
    assert!(error(&[1, 4, 4, 4], Some(&sigmas)).contains("[1, 16, …]"));
    assert!(error(&[1, 16, 5, 4], Some(&sigmas)).contains("even height and width"));
}
