//! Networks that are trained whole: every weight gets the gradient of the loss. Held against differences of the loss
//! itself; the forward passes are held against diffusers in `parity.rs`.

use lora_models::layers::Pass;
use lora_models::networks::{ClipTextEncoder, Unet, Vae};
use lora_models::synthetic::SyntheticModel;
use lora_models::weights::{Held, SyntheticWeights, TrainedWeights, Weights};
use lora_torch::tch::{Device, Kind, Tensor, manual_seed, no_grad};

const CPU: Device = Device::Cpu;

fn number(tensor: &Tensor) -> f64 {
    f64::try_from(tensor.to_kind(Kind::Double)).unwrap()
}

/// The slope of a loss along its own gradient is the gradient's norm.
fn gradients_are_slopes(name: &str, list: &TrainedWeights, loss: &dyn Fn() -> Tensor) {
    loss().backward();
    let leaves = list.all();
    let without: Vec<_> = leaves.iter().filter(|(_, leaf)| !leaf.grad().defined()).map(|(name, _)| name).collect();
    assert!(without.is_empty(), "{name}: no gradient for {without:?}");
    let norm = leaves.iter().map(|(_, leaf)| number(&leaf.grad().square().sum(Kind::Double))).sum::<f64>().sqrt();
    assert!(norm > 1e-3, "{name}: {norm}");
    let at = |step: f64| {
        let walk = |step: f64| {
            for (_, leaf) in &leaves {
                let _ = leaf.detach().f_add_(&(leaf.grad() * (step / norm))).unwrap();
            }
        };
        no_grad(|| {
            walk(step);
            let found = number(&loss());
            walk(-step);
            found
        })
    };
    let step = 2e-3;
    let slope = (at(step) - at(-step)) / (2.0 * step);
    // Two numbers in f32, a step apart: their difference has three digits.
    assert!((slope / norm - 1.0).abs() < 2e-2, "{name}: slope {slope}, norm of the gradient {norm}");
}

#[test]
fn every_weight_of_a_whole_network_gets_its_gradient() {
    manual_seed(3);
    let model = SyntheticModel::tiny();
    let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, CPU));

    let list = TrainedWeights::default();
    let source = SyntheticWeights::new("unet");
    let weights = Weights::new(&source, Kind::Float, CPU).held(Held::Trained(list.clone()));
    let unet = Unet::new(&weights, model.unet.clone()).unwrap();
    assert_eq!(list.all().len(), source.made().len());
    let (latents, context) = (random(&[2, 4, 16, 16]), random(&[2, 77, 128]));
    for (recompute, recompute_feed_forward) in [(false, false), (true, false), (false, true), (true, true)] {
        list.all().iter_mut().for_each(|(_, leaf)| leaf.zero_grad());
        let pass = Pass { recompute, recompute_feed_forward, ..Pass::default() };
        gradients_are_slopes("U-Net", &list, &|| {
            unet.forward(&latents, &[10.0, 700.0], &context, &pass).unwrap().square().mean(Kind::Float)
        });
    }

    let list = TrainedWeights::default();
    let source = SyntheticWeights::new("text_encoder");
    let weights = Weights::new(&source, Kind::Float, CPU).held(Held::Trained(list.clone()));
    let text = ClipTextEncoder::new(&weights, model.text_encoder).unwrap();
    let (tokens, toward) = (Tensor::from_slice(&(0..154i64).collect::<Vec<_>>()).view([2, 77]), random(&[2, 77, 128]));
    gradients_are_slopes("text encoder", &list, &|| {
        (text.forward(&tokens, 1, &Pass::default()).unwrap() - &toward).square().mean(Kind::Float)
    });

    let list = TrainedWeights::default();
    let source = SyntheticWeights::new("vae");
    let weights = Weights::new(&source, Kind::Float, CPU).held(Held::Trained(list.clone()));
    let vae = Vae::new(&weights, model.vae).unwrap();
    let pictures = random(&[1, 3, 64, 64]).clamp(-1.0, 1.0);
    gradients_are_slopes("autoencoder", &list, &|| {
        let latents = vae.encode(&pictures).unwrap();
        (vae.decode(&(&latents.mean + 0.1 * &latents.log_variance)).unwrap() - &pictures).square().mean(Kind::Float)
    });
}

#[test]
fn leaves_are_single_precision_whatever_computes() {
    let list = TrainedWeights::default();
    let source = SyntheticWeights::new("unet");
    let weights = Weights::new(&source, Kind::BFloat16, CPU).held(Held::Trained(list.clone()));
    let unet = Unet::new(&weights, SyntheticModel::tiny().unet).unwrap();
    manual_seed(3);
    let (latents, context) =
        (Tensor::randn([1, 4, 16, 16], (Kind::Float, CPU)), Tensor::randn([1, 77, 128], (Kind::Float, CPU)));
    unet.forward(&latents, &[10.0], &context, &Pass::default()).unwrap().square().mean(Kind::Float).backward();
    for (name, leaf) in list.all() {
        assert_eq!((leaf.kind(), leaf.grad().kind()), (Kind::Float, Kind::Float), "{name}");
    }
    assert_eq!(unet.kind(), Kind::BFloat16);
}
