//! A transformer that denoises by flow matching against its golden file: velocities of two calls, and a LoRA's gradients. An
//! autoencoder against another: latents both ways.

use lora_io::safetensors::SafetensorsFile;
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::Vae;
use lora_torch::tch::{Kind, Tensor, no_grad};

use super::{adapt, distance, given, tensor, transformers};

/// What one call of a network is told.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) latents: Tensor,
    pub(crate) sigmas: Tensor,
    pub(crate) context: Tensor,
    pub(crate) pooled: Option<Tensor>,
}

/// Numbers of a text state and of pooled text.
pub(crate) const CONTEXT: i64 = 48;
pub(crate) const POOLED: i64 = 40;

/// Noise levels, and shapes of latents and number of text tokens, of the calls: `tools/golden/make_transformers.py`.
fn call(name: &str, pooled: bool) -> Call {
    let (latents, tokens, sigmas) = match name {
        "square" => ([1, 16, 8, 8], 12, vec![0.5f32]),
        "wide" => ([2, 16, 4, 12], 20, vec![0.0625, 0.984375]),
        _ => ([2, 16, 8, 8], 12, vec![0.25, 0.75]),
    };
    let batch = latents[0];
    Call {
        latents: given(&format!("input.{name}.latents"), &latents),
        sigmas: Tensor::from_slice(&sigmas),
        context: given(&format!("input.{name}.context"), &[batch, tokens, CONTEXT as usize]),
        pooled: pooled.then(|| given(&format!("input.{name}.pooled"), &[batch, POOLED as usize])),
    }
}

/// Holds velocities against a golden file's, then gradients of a LoRA on `targets`, with activations kept and computed
/// again.
pub(crate) fn matches<N: Adaptable>(
    name: &str,
    mut network: N,
    pooled: bool,
    targets: &[&str],
    velocity: impl Fn(&N, &Call, &Pass) -> Tensor,
) {
    let golden = transformers(name);
    for kind in ["square", "wide"] {
        let found = no_grad(|| velocity(&network, &call(kind, pooled), &Pass::default()));
        let error = distance(&found, &tensor(&golden, &format!("velocity.{kind}")));
        // 5e-6 with kernels for AVX-512, 1.1e-5 with those for AVX2.
        assert!(error < 5e-5, "{name}, {kind}: {error:e}");
    }

    let leaves = adapt(&mut network, targets);
    let with_gradient = golden.names().filter(|key| key.starts_with("lora.")).count();
    for recompute in [false, true] {
        let mut call = call("train", pooled);
        let noise = given("input.train.noise", &[2, 16, 8, 8]);
        let target = &noise - &call.latents;
        let sigmas = call.sigmas.view([-1, 1, 1, 1]);
        call.latents = &call.latents * (1.0 - &sigmas) + &noise * &sigmas;
        let pass = Pass { recompute, recompute_feed_forward: recompute, ..Pass::default() };
        let loss = (velocity(&network, &call, &pass) - target).square().mean(Kind::Float);
        loss.backward();
        let expected = golden.get("loss").unwrap().scalar().unwrap();
        let found = f64::try_from(&loss).unwrap();
        assert!((found / expected - 1.0).abs() < 1e-5, "{name}: loss {found}, expected {expected}");
        let mut compared = 0;
        for (key, leaf) in &leaves {
            let mut gradient = leaf.grad();
            assert_eq!(gradient.defined(), golden.contains(key), "{name}, {key}: whether anything reads it");
            if gradient.defined() {
                let expected = tensor(&golden, key);
                let error = f64::try_from((&gradient - &expected).norm()).unwrap();
                let allowed = 1e-3 * f64::try_from(expected.norm()).unwrap() + 1e-9;
                assert!(error < allowed, "{name}, {key}: {error:e} of {allowed:e}");
                let _ = gradient.zero_();
                compared += 1;
            }
        }
        assert_eq!(compared, with_gradient, "{name}: the same modules are adapted");
    }
}

/// Holds what an autoencoder makes of pictures and of latents against a golden file's.
pub(crate) fn latents_match(golden: &SafetensorsFile, vae: &Vae) {
    let channels = vae.config().latent_channels;
    no_grad(|| {
        let encoded = vae.encode(&given("input.vae.pixels", &[2, 3, 64, 48])).unwrap();
        let normalised = vae.config().normalised(&encoded.mean).unwrap();
        let decoded = vae.decode(&given("input.vae.latents", &[2, channels, 8, 6])).unwrap();
        for (name, found) in [
            ("vae.mean", &encoded.mean),
            ("vae.logvar", &encoded.log_variance),
            ("vae.normalised", &normalised),
            ("vae.decoded", &decoded),
        ] {
            let error = distance(found, &tensor(golden, name));
            assert!(error < 1e-5, "{name}: {error:e}");
        }
        assert!(distance(&vae.config().denormalised(&normalised).unwrap(), &encoded.mean) < 1e-6);
    });
}
