//! A new base model from nothing: trains a small autoencoder on pictures and writes it, with a U-Net and a text encoder
//! that have learnt nothing yet, as one checkpoint in the original layout. `lora train` with `train = "full"` does the rest
//! (`examples/emoji_base.toml`).
//!
//! `cargo run --release --bin new_base -- PICTURES OUT.safetensors [STEPS] [bf16]`
//!
//! PICTURES has folders `train`, `more` and `held_out` of 64 × 64 pictures (`tools/assets/prepare_emoji.py base PICTURES`). Where OUT
//! is there already, its autoencoder is trained further.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use lora_core::random::Stream;
use lora_core::{Component, DType, HostTensor};
use lora_io::checkpoint::{Checkpoint, CheckpointSource, write_single_file};
use lora_io::family::{Family, sd1};
use lora_models::networks::{ClipConfig, UnetConfig, Vae, VaeConfig, load_vae};
use lora_models::synthetic::{NamedShape, SyntheticModel};
use lora_models::weights::{Held, SyntheticWeights, TrainedWeights, WeightSource, Weights};
use lora_tools::{Answer, decibels, load_pictures, psnr, scaled};
use lora_torch::tch::{Device, Kind, Tensor, no_grad};
use lora_torch::tensor::{from_f32, from_host, to_host};
use lora_train::optimiser::{Arguments, OptimiserRegistry, OptimiserState};
use lora_train::parameters::ParameterList;

const BATCH: usize = 8;
const LEARNING_RATE: f64 = 1e-3;
/// Weight of the divergence between latents and a standard normal; small, as in latent diffusion.
const DIVERGENCE: f64 = 1e-4;
const SEED: u64 = 20;

/// Stable Diffusion 1.5's architecture at small widths: four levels in the U-Net with one block each, three in the
/// autoencoder (a latent stands for 4 × 4 pixels), the whole vocabulary of CLIP.
fn sizes() -> SyntheticModel {
    SyntheticModel {
        family: &sd1::FAMILY,
        text_encoder_2: None,
        text_encoder: ClipConfig {
            vocabulary: 49408,
            width: 64,
            intermediate: 256,
            layers: 3,
            heads: 1,
            exact_gelu: false,
            projection: None,
        },
        unet: UnetConfig {
            latent_channels: 4,
            channels: vec![64, 96, 128, 128],
            transformer_depths: vec![1, 1, 1, 0],
            middle_depth: 1,
            heads: vec![8; 4],
            layers_per_block: 1,
            context: 64,
            norm_groups: 32,
            linear_projection: false,
            added: None,
        },
        vae: VaeConfig {
            latent_channels: 4,
            channels: vec![32, 64, 64],
            layers_per_block: 1,
            norm_groups: 32,
            scaling_factor: VaeConfig::SCALING_FACTOR,
            shift_factor: 0.0,
            quant_convs: true,
            overflows_in_half: false,
            statistics: None,
            causal: false,
        },
    }
}

fn main() -> Answer<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [pictures, output, rest @ ..] = arguments.as_slice() else {
        return Err("expected PICTURES OUT.safetensors [STEPS] [bf16]".into());
    };
    let steps: usize = rest.iter().find_map(|text| text.parse().ok()).unwrap_or(3000);
    let kind = if rest.iter().any(|text| text == "bf16") { Kind::BFloat16 } else { Kind::Float };
    let (pictures, output) = (Path::new(pictures), Path::new(output));
    let training =
        Tensor::f_cat(&[load_pictures(&pictures.join("train"))?, load_pictures(&pictures.join("more"))?], 0)?;
    let held_out = load_pictures(&pictures.join("held_out"))?;
    println!("{} pictures, {} held out", training.size()[0], held_out.size()[0]);

    let model = sizes();
    let lists = model.weight_shapes()?;
    for (component, list) in &lists {
        let count: usize = list.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        println!("{}: {count} numbers", component.name());
    }
    let trained = TrainedWeights::default();
    let held = Held::Trained(trained.clone());
    let vae = match output.exists() {
        true => load_vae(&Checkpoint::open(output)?, kind, Device::Cpu, held)?,
        false => Vae::new(&Weights::new(&Untrained(Component::VAE), kind, Device::Cpu).held(held), model.vae.clone())?,
    };
    let numbers = Arguments::from([("betas".into(), vec![0.9, 0.99]), ("weight_decay".into(), vec![0.0])]);
    let optimiser = OptimiserState::new(OptimiserRegistry::default().make("adamw", LEARNING_RATE, &numbers)?);
    let mut parameters = ParameterList::new(optimiser, 0.995);
    for (name, leaf) in trained.all() {
        parameters.add(Component::UNET, name, false, &leaf)?;
    }
    train(&vae, &mut parameters, &training, steps)?;
    parameters.exchange_averages()?;

    // What is saved and measured is in f32 and has latents of mean 0 and the deviation that the factor stands for.
    let weights: BTreeMap<String, Tensor> = trained.all().into_iter().collect();
    no_grad(|| standardise(&vae, &weights, &training))?;
    let vae = weights.iter().map(|(name, leaf)| Ok((name.clone(), to_host(leaf)?))).collect::<Answer<_>>()?;
    write_single_file(output, &NewBase { lists, vae }, DType::F32, &BTreeMap::new())?;
    let vae = load_vae(&Checkpoint::open(output)?, Kind::Float, Device::Cpu, Held::default())?;
    println!("held out: {:.2} dB; saved {}", no_grad(|| psnr(&vae, &held_out))?, output.display());
    Ok(())
}

fn train(vae: &Vae, parameters: &mut ParameterList, training: &Tensor, steps: usize) -> Answer<()> {
    let count = training.size()[0] as u64;
    let (start, mut recent) = (Instant::now(), 0.0);
    for step in 0..steps {
        let random = Stream::new(SEED).with(step as u64);
        let chosen: Vec<i64> =
            (0..BATCH).map(|_| ()).scan(random.at("pictures"), |random, ()| Some(random.below(count) as i64)).collect();
        let pixels = scaled(&training.f_index_select(0, &Tensor::from_slice(&chosen))?)?;
        let pixels = recoloured(&pixels, &mut random.at("colours"))?;
        let latents = vae.encode(&pixels)?;
        let noise = from_f32(
            &random.at("noise").normals(latents.mean.numel()),
            &latents.mean.size().iter().map(|&side| side as usize).collect::<Vec<_>>(),
            Device::Cpu,
        )?;
        let error = vae.decode(&latents.sample(&noise)?)?.f_sub(&pixels)?;
        let divergence = (latents.mean.f_square()? + latents.log_variance.f_exp()? - 1.0 - &latents.log_variance) * 0.5;
        let squares = error.f_square()?.f_mean(Kind::Float)?;
        let loss = &squares + error.f_abs()?.f_mean(Kind::Float)? * 0.2 + divergence.f_mean(Kind::Float)? * DIVERGENCE;
        loss.f_backward()?;
        parameters.settle(&loss.detach(), 1.0, 1.0)?;
        let warm = ((step + 1) as f64 / 50.0).min(1.0);
        let factor = warm * 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / steps as f64).cos());
        parameters.step(|_| LEARNING_RATE * factor)?;
        parameters.clear_gradients()?;
        // Read every hundred steps only.
        if step % 100 == 99 {
            recent = f64::try_from(&squares)?;
            let rate = start.elapsed().as_secs_f64() / (step + 1) as f64;
            println!("step {} of {steps}: {:.2} dB, {rate:.2} s a step", step + 1, decibels(recent));
        }
    }
    if !recent.is_finite() {
        return Err("the autoencoder's loss is not finite".into());
    }
    Ok(())
}

/// Colours exchanged and inverted, pictures mirrored: the autoencoder shall know shapes and colours, not these pictures.
fn recoloured(pixels: &Tensor, random: &mut Stream) -> Answer<Tensor> {
    let mut changed = Vec::new();
    for index in 0..pixels.size()[0] {
        let mut picture = pixels.f_get(index)?;
        if random.uniform() < 0.5 {
            let mut order = [0i64, 1, 2];
            random.shuffle(&mut order);
            picture = picture.f_index_select(0, &Tensor::from_slice(&order))?;
        }
        if random.uniform() < 0.15 {
            picture = picture.f_mean_dim(0, true, Kind::Float)?.f_repeat([3, 1, 1])?;
        }
        if random.uniform() < 0.15 {
            picture = picture.f_neg()?;
        }
        if random.uniform() < 0.5 {
            picture = picture.f_flip([2])?;
        }
        changed.push(picture);
    }
    Ok(Tensor::f_stack(&changed, 0)?)
}

/// Folds into the convolutions next to the latents what gives each of their channels mean 0 and deviation
/// `1 / scaling factor`; pictures stay the same.
fn standardise(vae: &Vae, weights: &BTreeMap<String, Tensor>, training: &Tensor) -> Answer<()> {
    let (mut means, mut variances) = (Vec::new(), Vec::new());
    for chunk in training.f_slice(0, 0, 512, 1)?.f_split(32, 0)? {
        let latents = vae.encode(&scaled(&chunk)?)?;
        means.push(latents.mean);
        variances.push(latents.log_variance.f_exp()?);
    }
    let (means, variances) = (Tensor::f_cat(&means, 0)?, Tensor::f_cat(&variances, 0)?);
    let axes = [0i64, 2, 3];
    let mean = means.f_mean_dim(&axes[..], false, Kind::Float)?;
    let spread = means.f_var_dim(&axes[..], false, false)? + variances.f_mean_dim(&axes[..], false, Kind::Float)?;
    let factor = spread.f_sqrt()?.f_reciprocal()? / VaeConfig::SCALING_FACTOR;
    let channels = factor.size()[0];
    let own = |name: &str| weights[name].detach();

    let (kernel, bias) = (own("quant_conv.weight"), own("quant_conv.bias"));
    let _ = kernel.f_narrow(0, 0, channels)?.f_mul_(&factor.f_view([-1, 1, 1, 1])?)?;
    let mut shift = bias.f_narrow(0, 0, channels)?;
    shift.f_copy_(&((&shift - &mean) * &factor))?;
    let _ = bias.f_narrow(0, channels, channels)?.f_add_(&(factor.f_log()? * 2.0))?;

    let (kernel, mut bias) = (own("post_quant_conv.weight"), own("post_quant_conv.bias"));
    let _ = bias.f_add_(&kernel.f_view([channels, channels])?.f_mv(&mean)?)?;
    let _ = kernel.shallow_clone().f_div_(&factor.f_view([1, -1, 1, 1])?)?;
    Ok(())
}

/// First values: uniform with the variance 1 / inputs; the last layer of each residual part is zero, so that the network
/// begins as the identity; norms are 1, biases 0. Positions and the tokens that begin and end a caption are zero: what the
/// text encoder gives for the seventy places that no word fills is then the caption's words from the first step on. (Else
/// these places drown the few words, and the U-Net learns for thousands of steps to leave the text alone.)
struct Untrained(Component);

impl Untrained {
    fn values(&self, name: &str, shape: &[usize]) -> HostTensor {
        let zero = name.ends_with(".bias")
            || name.ends_with("position_embedding.weight")
            || self.0 == Component::UNET
                && [".conv2.weight", ".proj_out.weight", "conv_out.weight"].iter().any(|end| name.ends_with(end));
        let made = SyntheticWeights::new(self.0.name()).values(name, shape).to_f32().into_owned();
        let mut values = match shape.len() {
            _ if zero => vec![0.0; made.len()],
            1 => vec![1.0; made.len()],
            _ => made,
        };
        if name.ends_with("token_embedding.weight") {
            // The last two of CLIP's vocabulary.
            let words = (shape[0] - 2) * shape[1];
            values[words..].fill(0.0);
        }
        HostTensor::from_f32(shape, values).expect("as many values as the shape has")
    }
}

impl WeightSource for Untrained {
    fn name(&self) -> String {
        format!("untrained {}", self.0.name())
    }
    fn contains(&self, _name: &str) -> bool {
        true
    }
    fn shape(&self, _name: &str) -> Option<Vec<usize>> {
        None
    }
    fn load(&self, name: &str, shape: &[usize], kind: Kind, device: Device) -> lora_models::Result<Tensor> {
        Ok(from_host(&self.values(name, shape), device)?.f_to_kind(kind)?)
    }
}

/// The checkpoint: a trained autoencoder, the rest untrained.
struct NewBase {
    lists: BTreeMap<Component, Vec<NamedShape>>,
    vae: BTreeMap<String, HostTensor>,
}

impl CheckpointSource for NewBase {
    fn family(&self) -> &'static Family {
        &sd1::FAMILY
    }

    fn components(&self) -> Vec<Component> {
        self.lists.keys().copied().collect()
    }

    fn weights(&self, component: Component) -> Vec<NamedShape> {
        self.lists[&component].clone()
    }

    fn values(&self, component: Component, name: &str, shape: &[usize]) -> lora_io::Result<HostTensor> {
        match self.vae.get(name).filter(|_| component == Component::VAE) {
            Some(own) => Ok(own.clone()),
            None => Ok(Untrained(component).values(name, shape)),
        }
    }
}
