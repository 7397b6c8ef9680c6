//! The networks against diffusers, transformers and PEFT on tiny models of Stable Diffusion 1.5's, 2.1's and XL's kinds (see
//! `golden/README.md` and `tools/golden`).
//!
//! Tolerances: the references themselves move by up to 3e-6 between one thread and two, and by 1e-5 (gradients) between
//! float32 and float64 weights; 1e-4 and 1e-3 leave room for other kernels and none for another formula.

mod common;

use common::{CPU, adapt, adapt_beside, given, integers, relative, tensor};
use lora_core::Component;
use lora_io::safetensors::SafetensorsFile;
use lora_models::diffusion::{NoiseSchedule, Prediction, Sampler, SamplerKind};
use lora_models::layers::Pass;
use lora_models::networks::{ClipTextEncoder, Conditions, Unet, Vae};
use lora_models::synthetic::SyntheticModel;
use lora_models::weights::{SyntheticWeights, Weights};
use lora_torch::tch::{Kind, Tensor, no_grad};

/// A tiny model with its golden files.
struct Reference {
    folder: &'static str,
    model: SyntheticModel,
    schedule: NoiseSchedule,
}

fn references() -> [Reference; 3] {
    [
        Reference {
            folder: "golden",
            model: SyntheticModel::tiny(),
            schedule: NoiseSchedule::new(Prediction::Epsilon),
        },
        Reference {
            folder: "golden/sd2",
            model: SyntheticModel::tiny_sd2(),
            schedule: NoiseSchedule::new(Prediction::Velocity),
        },
        Reference {
            folder: "golden/sdxl",
            model: SyntheticModel::tiny_sdxl(),
            schedule: NoiseSchedule::new(Prediction::Epsilon),
        },
    ]
}

/// Height and width of a picture, top and left edge of the part that is shown, its height and width, of the two items of a
/// batch: `SIZES` of `tools/golden/tiny.py`.
const SIZES: [[f64; 6]; 2] = [[128.0, 128.0, 0.0, 0.0, 128.0, 128.0], [96.0, 160.0, 8.0, 0.0, 128.0, 128.0]];

impl Reference {
    fn golden(&self, name: &str) -> SafetensorsFile {
        let folder = format!("{}/tests/{}", env!("CARGO_MANIFEST_DIR"), self.folder);
        SafetensorsFile::open(format!("{folder}/{name}.safetensors")).unwrap()
    }

    fn text_encoder(&self) -> ClipTextEncoder {
        let weights = SyntheticWeights::new("text_encoder");
        ClipTextEncoder::new(&Weights::new(&weights, Kind::Float, CPU), self.model.text_encoder).unwrap()
    }

    /// The second text encoder of a model that has one.
    fn second_text_encoder(&self) -> Option<ClipTextEncoder> {
        let weights = SyntheticWeights::new("text_encoder_2");
        let encoder =
            ClipTextEncoder::new(&Weights::new(&weights, Kind::Float, CPU), self.model.text_encoder_2?).unwrap();
        Some(encoder.of(Component::TEXT_ENCODER_2))
    }

    /// What the U-Net reads beside states, of pooled text, where it reads any.
    fn added(&self, pooled: &Tensor) -> Option<Tensor> {
        self.model.unet.added?;
        let sizes = Unet::size_embedding(&SIZES[..pooled.size()[0] as usize], CPU).unwrap();
        Some(Tensor::cat(&[pooled, &sizes], -1))
    }

    fn unet(&self) -> Unet {
        let weights = SyntheticWeights::new("unet");
        Unet::new(&Weights::new(&weights, Kind::Float, CPU), self.model.unet.clone()).unwrap()
    }
}

/// Token rows, and the places of their first end tokens over all rows.
fn rows(file: &SafetensorsFile, name: &str) -> (Tensor, Tensor) {
    let tokens = integers(file, name);
    let flat = Vec::<i64>::try_from(tokens.view([-1])).unwrap();
    let end =
        |(row, tokens): (usize, &[i64])| (77 * row + tokens.iter().position(|&token| token == 49407).unwrap()) as i64;
    (tokens, Tensor::from_slice(&flat.chunks(77).enumerate().map(end).collect::<Vec<_>>()))
}

#[test]
fn text_encoders_match_transformers() {
    for reference in references().into_iter().filter(|own| own.model.text_encoder_2.is_none()) {
        let golden = reference.golden("tiny");
        let (encoder, tokens) = (reference.text_encoder(), integers(&golden, "text_encoder.input_ids"));
        for skip in [1, 2] {
            let found = no_grad(|| encoder.forward(&tokens, skip, &Pass::default()).unwrap());
            let error = relative(&found, &tensor(&golden, &format!("text_encoder.clip_skip_{skip}")));
            assert!(error < 1e-4, "{}, clip skip {skip}: {error:e}", reference.folder);
        }
        assert!(encoder.forward(&tokens, 0, &Pass::default()).is_err());
        assert!(encoder.forward(&tokens, 5, &Pass::default()).is_err());
    }
}

#[test]
fn states_before_the_last_layer_and_pooled_vectors_match_transformers() {
    let [_, _, reference] = references();
    let golden = reference.golden("tiny");
    let encoders =
        [("text_encoder", Some(reference.text_encoder())), ("text_encoder_2", reference.second_text_encoder())];
    for (name, encoder) in encoders {
        let (tokens, ends) = rows(&golden, &format!("{name}.input_ids"));
        let found = no_grad(|| encoder.unwrap().penultimate(&tokens, &ends, 1, &Pass::default()).unwrap());
        let error = relative(&found.states, &tensor(&golden, &format!("{name}.penultimate")));
        assert!(error < 1e-4, "{name}: {error:e}");
        assert_eq!(found.pooled.is_some(), name == "text_encoder_2");
        if let Some(pooled) = found.pooled {
            let error = relative(&pooled, &tensor(&golden, "text_encoder_2.pooled"));
            assert!(error < 1e-4, "pooled: {error:e}");
        }
    }
}

#[test]
fn long_captions_join_as_documented() {
    let [reference, ..] = references();
    let encoder = reference.text_encoder();
    let tokens = Tensor::randint(49406, [6, 77], (Kind::Int64, CPU));
    no_grad(|| {
        let states = encoder.forward(&tokens, 1, &Pass::default()).unwrap();
        let joined = encoder.encode(&tokens, 3, 1, &Pass::default()).unwrap();
        assert_eq!(joined.size(), [2, 227, 128]);
        // The second caption's rows are 3, 4 and 5.
        assert_eq!(joined.get(1).get(0), states.get(3).get(0));
        assert_eq!(joined.get(1).get(76), states.get(4).get(1));
        assert_eq!(joined.get(1).get(226), states.get(5).get(76));
    });
}

#[test]
fn vae_matches_diffusers() {
    let [reference, other, _] = references();
    assert_eq!(reference.model.vae, other.model.vae);
    let golden = reference.golden("tiny");
    let weights = SyntheticWeights::new("vae");
    let vae = Vae::new(&Weights::new(&weights, Kind::Float, CPU), reference.model.vae).unwrap();
    no_grad(|| {
        let (pixels, latents) = (given("input.vae.pixels", &[2, 3, 64, 48]), given("input.vae.latents", &[2, 4, 8, 6]));
        let untiled = (vae.encode(&pixels).unwrap(), vae.decode(&latents).unwrap());
        let tiled = (vae.encode_in_tiles(&pixels, 5).unwrap(), vae.decode_in_tiles(&latents, 5).unwrap());
        for (kind, (encoded, decoded)) in [("vae", &untiled), ("vae.tiled", &tiled)] {
            for (name, found) in [("mean", &encoded.mean), ("logvar", &encoded.log_variance), ("decoded", decoded)] {
                let error = relative(found, &tensor(&golden, &format!("{kind}.{name}")));
                assert!(error < 1e-4, "{kind}.{name}: {error:e}");
            }
        }
        // Where one tile takes all, nothing is cut.
        assert_eq!(vae.decode_in_tiles(&latents, 8).unwrap(), untiled.1);
    });
    let odd = Tensor::zeros([1, 3, 60, 64], (Kind::Float, CPU));
    assert!(vae.encode(&odd).is_err() && vae.encode_in_tiles(&odd, 5).is_err());
}

#[test]
fn unets_match_diffusers() {
    for reference in references() {
        let (golden, unet) = (reference.golden("tiny"), reference.unet());
        let cases = [
            ("square", "input.unet", vec![2, 4, 8, 8], vec![10.0, 999.0], 77),
            ("wide", "input.unet.wide", vec![1, 4, 8, 16], vec![500.0], 77),
            ("long", "input.unet.long", vec![1, 4, 8, 8], vec![250.0], 227),
        ];
        for (name, input, shape, timesteps, states) in cases {
            let sample = given(&format!("{input}.sample"), &shape);
            let context = given(&format!("{input}.context"), &[shape[0], states, reference.model.unet.context]);
            let pooled =
                reference.model.unet.pooled().map(|width| given(&format!("{input}.pooled"), &[shape[0], width]));
            let added = pooled.and_then(|pooled| reference.added(&pooled));
            let conditions = Conditions { context: &context, added: added.as_ref() };
            let found = no_grad(|| unet.forward(&sample, &timesteps, conditions, &Pass::default()).unwrap());
            let error = relative(&found, &tensor(&golden, &format!("unet.{name}")));
            assert!(error < 1e-4, "{}, {name}: {error:e}", reference.folder);
        }
    }
}

/// Guided latents from the golden files' noise.
fn sampled(reference: &Reference, unet: &Unet, sampler: &Sampler) -> Tensor {
    let of = |name: &str| given(&format!("input.sampler.{name}"), &[2, 77, reference.model.unet.context]);
    let context = Tensor::cat(&[of("uncond"), of("cond")], 0);
    let fresh = |step| Ok(given(&format!("input.sampler.fresh.{step}"), &[2, 4, 8, 8]));
    let found = no_grad(|| {
        sampler.sample(&given("input.sampler.noise", &[2, 4, 8, 8]), fresh, |latents, timestep| {
            let both = Tensor::cat(&[latents, latents], 0);
            let halves = unet.forward(&both, &[timestep; 4], &context, &Pass::default())?.chunk(2, 0);
            sampler.guided(&halves[0], &halves[1], 7.5)
        })
    });
    found.unwrap()
}

#[test]
fn samplers_match_diffusers() {
    // A sampler knows nothing of what the third model's network is told beside the text.
    for reference in references().into_iter().take(2) {
        let (golden, unet) = (reference.golden("tiny_samplers"), reference.unet());
        let mut schedules = vec![("", reference.schedule.clone())];
        if reference.schedule.prediction() == Prediction::Velocity {
            schedules.push(("_zero_snr", reference.schedule.clone().with_zero_terminal_snr().unwrap()));
        }
        for (suffix, schedule) in schedules {
            for kind in SamplerKind::ALL {
                let (name, sampler) = (kind.name(), Sampler::new(kind, &schedule, 10).unwrap());
                let found = sampled(&reference, &unet, &sampler);
                // Ten guided steps multiply rounding by up to 7.5 each.
                let error = relative(&found, &tensor(&golden, &format!("{name}{suffix}.final")));
                assert!(error < 1e-3, "{}, {name}{suffix}: {error:e}", reference.folder);
            }
        }
    }
}

#[test]
fn two_loras_at_once_draw_what_a_pipeline_draws_with_both() {
    for reference in references().into_iter().take(2) {
        let (golden, mut unet) = (reference.golden("tiny_samplers"), reference.unet());
        for (begin, strength) in [("lora", 0.8), ("other", 0.5)] {
            adapt_beside(&mut unet, &["attention"], begin, strength);
        }
        let sampler = Sampler::new(SamplerKind::Euler, &reference.schedule, 20).unwrap();
        let found = sampled(&reference, &unet, &sampler);
        let error = relative(&found, &tensor(&golden, "two_loras.final"));
        assert!(error < 1e-3, "{}: {error:e}", reference.folder);
        let without = sampled(&reference, &reference.unet(), &sampler);
        let effect = relative(&found, &without);
        assert!(effect > 0.05, "{}: the adapters change nothing: {effect:e}", reference.folder);
    }
}

/// The reference computes the schedule in f32: 1e-5 of a spread. Of 1 − ᾱ, which is 8.5e-4 at the first timestep, that
/// leaves it four digits, and so of the SNR.
#[test]
fn noise_schedules_match_diffusers() {
    let [_, reference, _] = references();
    let golden = reference.golden("tiny_schedules");
    let timesteps = Vec::<i64>::try_from(integers(&golden, "timesteps")).unwrap();
    let timesteps: Vec<usize> = timesteps.into_iter().map(|timestep| timestep as usize).collect();
    let shape = [timesteps.len(), 4, 4, 4];
    let (latents, noise) = (given("input.schedule.latents", &shape), given("input.schedule.noise", &shape));
    let zero = reference.schedule.clone().with_zero_terminal_snr().unwrap();
    for (name, schedule) in [("published", reference.schedule), ("zero_snr", zero)] {
        let numbers = |values: Vec<f64>| Tensor::from_slice(&values).to_kind(Kind::Float);
        let of = |number: &dyn Fn(usize) -> f64| numbers(timesteps.iter().map(|&timestep| number(timestep)).collect());
        let all = [
            ("alphas", numbers((0..NoiseSchedule::TIMESTEPS).map(|t| schedule.alpha_cumulative(t)).collect())),
            ("snr", of(&|timestep| schedule.snr(timestep))),
            ("min_snr_weights", of(&|timestep| schedule.min_snr_weight(timestep, 5.0))),
            ("noised", schedule.add_noise(&latents, &noise, &timesteps).unwrap()),
            ("velocity", schedule.target(&latents, &noise, &timesteps).unwrap()),
        ];
        for (what, found) in all {
            let error = relative(&found, &tensor(&golden, &format!("{name}.{what}")));
            assert!(error < if what == "snr" { 2e-4 } else { 1e-5 }, "{name}.{what}: {error:e}");
        }
    }
}

/// Rows with token 0 after their ends.
fn padded_with_zero(tokens: &Tensor, ends: &Tensor) -> Tensor {
    let places = Tensor::arange(tokens.numel() as i64, (Kind::Int64, CPU)).view_as(tokens);
    tokens.where_scalarother(&places.le_tensor(&ends.unsqueeze(-1)), 0)
}

#[test]
fn lora_gradients_match_peft() {
    for (reference, targets) in references().into_iter().zip(["all-conv", "attention-mlp", "attention-mlp"]) {
        let golden = reference.golden("tiny_lora_grads");
        let (mut unet, mut encoder) = (reference.unet(), reference.text_encoder());
        let mut leaves = adapt(&mut unet, &[targets]);
        leaves.extend(adapt(&mut encoder, &["attention-mlp"]));
        let mut second = reference.second_text_encoder();
        if let Some(second) = &mut second {
            leaves.extend(adapt(second, &["attention-mlp"]));
            // Nothing reads the first encoder's last layer.
            leaves.retain(|name, _| !name.starts_with("lora.text_encoder.text_model.encoder.layers.1."));
        }
        assert_eq!(leaves.len() + 3, golden.len(), "the same modules are adapted");

        let timesteps = [100, 700];
        let (latents, noise) =
            (given("input.train.latents", &[2, 4, 16, 16]), given("input.train.noise", &[2, 4, 16, 16]));
        let (tokens, ends) = rows(&golden, "input_ids");
        let (context, added) = match &second {
            None => (encoder.forward(&tokens, 1, &Pass::default()).unwrap(), None),
            Some(second) => {
                let first = encoder.penultimate(&tokens, &ends, 1, &Pass::default()).unwrap();
                let second = second.penultimate(&padded_with_zero(&tokens, &ends), &ends, 1, &Pass::default()).unwrap();
                (Tensor::cat(&[first.states, second.states], -1), reference.added(&second.pooled.unwrap()))
            }
        };
        let conditions = Conditions { context: &context, added: added.as_ref() };
        let noised = reference.schedule.add_noise(&latents, &noise, &timesteps).unwrap();
        let target = reference.schedule.target(&latents, &noise, &timesteps).unwrap();
        let answer = unet.forward(&noised, &[100.0, 700.0], conditions, &Pass::default()).unwrap();
        let loss = (answer - &target).square().mean(Kind::Float);
        loss.backward();

        let expected = golden.get("loss").unwrap().scalar().unwrap();
        let found = f64::try_from(&loss).unwrap();
        assert!((found / expected - 1.0).abs() < 1e-4, "{}: loss {found}, expected {expected}", reference.folder);
        for (name, leaf) in &leaves {
            let expected = tensor(&golden, name);
            let distance = f64::try_from((leaf.grad() - &expected).norm()).unwrap();
            // Ten true gradients are zero (a norm removes what the layer adds): theirs is rounding only, hence the
            // floor.
            let allowed = 1e-3 * f64::try_from(expected.norm()).unwrap() + 1e-7;
            assert!(distance < allowed, "{}, {name}: {distance:e} of {allowed:e}", reference.folder);
        }
    }
}
