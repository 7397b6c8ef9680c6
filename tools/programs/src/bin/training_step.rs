//! Time and memory of training steps on a network of Stable Diffusion 1.5's, XL's, Z-Image's, FLUX.1's or Stable Diffusion 3.5
//! medium's size, the same work as `tools/bench/peft_step.py`, with the same arguments:
//!
//! `cargo run --release --bin training_step [model=sd1|sdxl|z_image|flux|sd3] [layers=N] [pixels=256] [rank=8] [steps=5] [batch=1] [dtype=fp32|bf16|fp16]
//! [checkpointing=0|1] [feed_forward=0|1] [storage=fp16|fp8|int8|nf4] [offload_base=0|1] [graphs=0|1]`
//!
//! The last line is JSON, for `tools/bench/side_by_side.py`; `kept_by_block` are the bytes that each block of the U-Net adds to
//! what a forward pass leaves for the backward pass. `layers` are the transformer's
//! (of FLUX.1 double blocks, with twice as many single ones), as many as published without. With `steps=0`: bytes of the weights and memory of loading them.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use lora_core::target::Targets;
use lora_core::variant::VariantRegistry;
use lora_models::diffusion::{NoiseSchedule, Prediction};
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::{
    Conditions, Flux, FluxConditions, FluxConfig, Sd3, Sd3Conditions, Sd3Config, Unet, UnetConfig, ZImage,
    ZImageCaptions, ZImageConfig,
};
use lora_models::synthetic::{SyntheticFlux, SyntheticModel, SyntheticSd3, SyntheticZImage};
use lora_models::weights::{Frozen, Held, SyntheticWeights, Weights};
use lora_torch::frozen::Storage;
use lora_torch::graph::{Graph, Recorder};
use lora_torch::profile::{Count, operations};
use lora_torch::staging::Staging;
use lora_torch::tch::{Device, Kind, Tensor};
use lora_torch::{device, foreach, memory};
use lora_train::base::Inputs;
use lora_train::difference::{Difference, LossType};
use lora_train::loss::{Denoising, LossWeights};
use lora_train::optimiser::OptimiserState;
use lora_train::parameters::ParameterList;
use lora_train::trainable::{AdapterOptions, TrainableAdapter};
use lora_train::velocity::VelocityLoss;
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

/// The names of the arguments.
const ARGUMENTS: [&str; 12] = [
    "model",
    "layers",
    "pixels",
    "rank",
    "steps",
    "batch",
    "dtype",
    "checkpointing",
    "feed_forward",
    "storage",
    "offload_base",
    "graphs",
];

/// Bytes that are held after each block of a forward pass.
type Blocks = Arc<Mutex<Vec<(String, i64)>>>;

/// Looks at the memory whenever the U-Net says that a block is done.
struct Watch {
    device: Device,
    blocks: Blocks,
}

impl<S: tracing::Subscriber> Layer<S> for Watch {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let mut name = Name(None);
        event.record(&mut name);
        if let (Some(name), Ok(mut blocks)) = (name.0, self.blocks.lock()) {
            blocks.push((name, held(self.device)));
        }
    }
}

/// The field `block` of an event.
struct Name(Option<String>);

impl Visit for Name {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "block" {
            self.0 = Some(format!("{value:?}"));
        }
    }
}

/// Bytes of live tensors.
fn held(device: Device) -> i64 {
    let bytes = match memory::device_memory(device) {
        Ok(Some(own)) => own.allocated,
        _ => memory::host_allocations().map_or(0, |host| host.live),
    };
    bytes as i64
}

/// Bytes that a forward pass leaves for the backward pass, and how many of them each block of the U-Net adds: fewer than none
/// where it uses up what waited for it.
fn kept(
    device: Device,
    forward: impl Fn() -> lora_train::Result<Tensor>,
) -> lora_train::Result<(i64, BTreeMap<String, i64>)> {
    let (blocks, before) = (Blocks::default(), held(device));
    let watch = Watch { device, blocks: Arc::clone(&blocks) };
    let loss = tracing::subscriber::with_default(tracing_subscriber::registry().with(watch), forward)?;
    let all = held(device) - before;
    drop(loss);
    let (mut own, mut last) = (BTreeMap::new(), before);
    for (block, after) in blocks.lock().map(|mut blocks| std::mem::take(&mut *blocks)).unwrap_or_default() {
        own.insert(block, after - last);
        last = after;
    }
    Ok((all, own))
}

/// A network, and what a step gives it.
trait Model {
    fn adaptable(&mut self) -> &mut dyn Adaptable;
    fn batch(&self) -> lora_train::Result<Inputs>;
    fn loss(&self, batch: &Inputs, pass: &Pass) -> lora_train::Result<Tensor>;
}

/// A U-Net that predicts noise.
struct Noise {
    unet: Unet,
    schedule: NoiseSchedule,
    latents: Tensor,
    context: Tensor,
    added: Option<Tensor>,
}

impl Noise {
    fn new(
        weights: &Weights<'_>,
        sizes: UnetConfig,
        [batch, pixels]: [i64; 2],
        device: Device,
    ) -> lora_train::Result<Self> {
        let random = |shape: &[i64]| Tensor::f_randn(shape, (Kind::Float, device));
        Ok(Self {
            latents: random(&[batch, 4, pixels / 8, pixels / 8])?,
            context: random(&[batch, 77, sizes.context as i64])?,
            added: sizes.added.map(|width| random(&[batch, width as i64])).transpose()?,
            unet: Unet::new(weights, sizes)?,
            schedule: NoiseSchedule::new(Prediction::Epsilon),
        })
    }
}

impl Model for Noise {
    fn adaptable(&mut self) -> &mut dyn Adaptable {
        &mut self.unet
    }

    fn batch(&self) -> lora_train::Result<Inputs> {
        let noise = self.latents.f_randn_like()?;
        let timesteps = vec![500; self.latents.size()[0] as usize];
        let weights = LossWeights::default();
        Ok(Denoising::new(&self.unet, &self.schedule, &self.latents, [&noise; 2], &timesteps, &weights)?.into_inputs())
    }

    fn loss(&self, batch: &Inputs, pass: &Pass) -> lora_train::Result<Tensor> {
        let conditions = Conditions { context: &self.context, added: self.added.as_ref() };
        Denoising::of(batch, LossType::L2)?.loss(&self.unet, conditions, pass)
    }
}

/// A transformer that predicts velocities.
struct Velocity<N> {
    network: N,
    latents: Tensor,
    /// What it is told of captions.
    told: Vec<Tensor>,
    velocity: Answer<N>,
}

/// A network's answer to noised latents and noise levels, and to what it is told.
type Answer<N> = fn(&N, [&Tensor; 2], &[Tensor], &Pass) -> lora_models::Result<Tensor>;

/// Tokens of a caption for Z-Image.
const CAPTION: i64 = 128;
/// Rows of text states that FLUX.1 and Stable Diffusion 3 read, whatever the caption.
const FLUX_ROWS: i64 = 512;
const SD3_ROWS: i64 = 77 + 256;

impl<N> Velocity<N> {
    /// Of a network and latents of 16 channels; what it is told has these shapes.
    fn new(
        network: N,
        [batch, pixels]: [i64; 2],
        device: Device,
        told: &[&[i64]],
        velocity: Answer<N>,
    ) -> lora_train::Result<Self> {
        let random = |shape: &[i64]| Tensor::f_randn(shape, (Kind::Float, device));
        Ok(Self {
            latents: random(&[batch, 16, pixels / 8, pixels / 8])?,
            told: told.iter().map(|shape| random(&[&[batch], *shape].concat())).collect::<Result<_, _>>()?,
            network,
            velocity,
        })
    }
}

impl<N: Adaptable> Model for Velocity<N> {
    fn adaptable(&mut self) -> &mut dyn Adaptable {
        &mut self.network
    }

    fn batch(&self) -> lora_train::Result<Inputs> {
        let noise = self.latents.f_randn_like()?;
        let levels = vec![0.5; self.latents.size()[0] as usize];
        Ok(VelocityLoss::new(&self.latents, [&noise; 2], &levels, &[], None, &Difference::default())?.into_inputs())
    }

    fn loss(&self, batch: &Inputs, pass: &Pass) -> lora_train::Result<Tensor> {
        VelocityLoss::of(batch, LossType::L2)?
            .loss(|noised, levels| Ok((self.velocity)(&self.network, [noised, levels], &self.told, pass)?))
    }
}

fn z_image(weights: &Weights<'_>, layers: Option<usize>, batch: [i64; 2], device: Device) -> Made {
    let published = SyntheticZImage::full().transformer;
    let sizes = ZImageConfig { layers: layers.unwrap_or(published.layers), ..published };
    let caption = sizes.caption as i64;
    let network = ZImage::new(weights, sizes)?;
    let mut model =
        Velocity::new(network, batch, device, &[&[CAPTION, caption]], |network, [noised, levels], told, pass| {
            let captions = ZImageCaptions { states: &told[0], lengths: &told[1], ragged: false };
            network.forward(noised, levels, captions, pass)
        })?;
    model.told.push(Tensor::f_full([batch[0]], CAPTION, (Kind::Int64, device))?);
    Ok(Box::new(model))
}

/// Of so many double blocks and twice as many single ones.
fn flux(weights: &Weights<'_>, layers: Option<usize>, batch: [i64; 2], device: Device) -> Made {
    let published = SyntheticFlux::full();
    let (double_blocks, pooled) = (layers.unwrap_or(published.transformer.double_blocks), published.text_encoder.width);
    let sizes = FluxConfig { double_blocks, single_blocks: 2 * double_blocks, ..published.transformer };
    let told: [&[i64]; 3] = [&[FLUX_ROWS, sizes.context as i64], &[pooled as i64], &[]];
    let network = Flux::new(weights, sizes)?;
    Ok(Box::new(Velocity::new(network, batch, device, &told, |network, [noised, sigmas], told, pass| {
        let (pooled, guidance) = (Some(&told[1]), Some(&told[2]));
        network.forward(noised, &FluxConditions { sigmas, context: &told[0], pooled, guidance, lengths: None }, pass)
    })?))
}

/// Of Stable Diffusion 3.5 medium's kind, of whose blocks the first half and one attend twice.
fn sd3(weights: &Weights<'_>, layers: Option<usize>, batch: [i64; 2], device: Device) -> Made {
    let published = SyntheticSd3::full().transformer;
    let blocks = layers.unwrap_or(published.blocks);
    let sizes = Sd3Config { blocks, dual_blocks: blocks / 2 + 1, ..published };
    let told: [&[i64]; 2] = [&[SD3_ROWS, sizes.context as i64], &[sizes.pooled as i64]];
    let network = Sd3::new(weights, sizes)?;
    Ok(Box::new(Velocity::new(network, batch, device, &told, |network, [noised, sigmas], told, pass| {
        network.forward(noised, &Sd3Conditions { sigmas, context: &told[0], pooled: &told[1] }, pass)
    })?))
}

type Made = lora_train::Result<Box<dyn Model>>;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = BTreeMap::new();
    for argument in std::env::args().skip(1) {
        match argument.split_once('=') {
            Some((name, value)) if ARGUMENTS.contains(&name) => arguments.insert(name.to_owned(), value.to_owned()),
            _ => return Err(format!("{argument}: expected {}, each with =value", ARGUMENTS.join(", ")).into()),
        };
    }
    let text = |name: &str| arguments.get(name).map_or("", String::as_str);
    let number = |name: &str, default| if text(name).is_empty() { Ok(default) } else { text(name).parse::<i64>() };
    let (pixels, rank, batch) = (number("pixels", 256)?, number("rank", 8)?, number("batch", 1)?);
    let steps = number("steps", 5)?;
    let kind = match text("dtype") {
        "" | "fp32" => Kind::Float,
        "bf16" => Kind::BFloat16,
        "fp16" => Kind::Half,
        other => return Err(format!("dtype={other}: fp32, bf16 or fp16").into()),
    };
    let storage = match text("storage") {
        "" => None,
        "fp16" => Some(Storage::Half),
        "fp8" => Some(Storage::Float8),
        "int8" => Some(Storage::Int8),
        "nf4" => Some(Storage::Nf4),
        other => return Err(format!("storage={other}: fp16, fp8, int8 or nf4").into()),
    };
    let pass = Pass {
        recompute: number("checkpointing", 0)? != 0,
        recompute_feed_forward: number("feed_forward", 0)? != 0,
        ..Pass::default()
    };
    let device = device::resolve("auto")?;
    memory::count_host_allocations()?;
    let weights = SyntheticWeights::new("network");
    let staging = (number("offload_base", 0)? != 0).then(|| Staging::new(device)).transpose()?;
    let held = Held::Frozen(Frozen { staging, ..Frozen::stored(storage) });
    let weights = Weights::new(&weights, kind, device).held(held);
    let layers = (!text("layers").is_empty()).then(|| text("layers").parse::<usize>()).transpose()?;
    let mut model: Box<dyn Model> = match text("model") {
        "" | "sd1" => Box::new(Noise::new(&weights, SyntheticModel::full().unet, [batch, pixels], device)?),
        "sdxl" => Box::new(Noise::new(&weights, SyntheticModel::full_sdxl().unet, [batch, pixels], device)?),
        "z_image" => z_image(&weights, layers, [batch, pixels], device)?,
        "flux" => flux(&weights, layers, [batch, pixels], device)?,
        "sd3" => sd3(&weights, layers, [batch, pixels], device)?,
        other => return Err(format!("model={other}: sd1, sdxl, z_image, flux or sd3").into()),
    };
    let mut bytes = 0;
    model.adaptable().visit_layers(&mut |layer| bytes += layer.weight_bytes())?;
    if let Some(loaded) = memory::host_memory() {
        let (weights, resident, peak) = (bytes >> 20, loaded.resident >> 20, loaded.peak >> 20);
        println!("weights of layers {weights} MiB; after loading {resident} MiB resident, peak {peak} MiB");
    }
    let targets = Targets::parse(&["attention"])?.select(&model.adaptable().adaptable_layers()?)?;
    let mut adapter = TrainableAdapter::default();
    let options = AdapterOptions::lora(rank as usize, rank as f64, 0);
    let mut parameters = ParameterList::new(OptimiserState::adamw(), 0.0);
    adapter.attach(model.adaptable(), &targets, &VariantRegistry::default(), &options, None, &mut parameters)?;

    let scale = if kind == Kind::Half { 65536.0 } else { 1.0 };
    let model = &*model;
    let backward = |batch: &Inputs, parameters: &ParameterList| -> lora_train::Result<Tensor> {
        let loss = model.loss(batch, &pass)?;
        (&loss * scale).f_backward()?;
        parameters.collect()?;
        Ok(loss.detach())
    };
    let recorder = (number("graphs", 0)? != 0).then(|| Recorder::new(device)).transpose()?;
    let scope = recorder.as_ref().map(Recorder::enter).transpose()?;
    // The tensors that the graph reads, and where it leaves the loss.
    let mut recorded: Option<(Graph, Inputs, Tensor)> = None;
    let mut times = Vec::new();
    for step in 0..steps {
        let start = Instant::now();
        let batch = model.batch()?;
        let loss = match &mut recorded {
            Some((graph, own, loss)) => {
                own.assign(&batch)?;
                graph.replay()?;
                loss.shallow_clone()
            }
            None => backward(&batch, &parameters)?,
        };
        parameters.settle(&loss, scale, 1.0)?;
        parameters.step(|_| 1e-4)?;
        match &recorder {
            None => parameters.clear_gradients()?,
            Some(recorder) => {
                foreach::zero(&parameters.gradients())?;
                if step == 0 {
                    memory::empty_cache(device)?;
                    let loss = loss.f_zeros_like()?;
                    let graph = recorder.record(|| -> lora_train::Result<()> {
                        loss.shallow_clone().f_copy_(&backward(&batch, &parameters)?)?;
                        Ok(())
                    })?;
                    recorded = Some((graph, batch, loss));
                }
            }
        }
        if let Device::Cuda(index) = device {
            lora_torch::tch::Cuda::synchronize(index as i64);
        }
        times.push(start.elapsed().as_secs_f64());
    }
    // On a GPU what its allocator gave out, as torch.cuda.max_memory_allocated; on the CPU the process.
    let peak = match memory::device_memory(device)? {
        Some(own) => own.allocated_peak,
        None => memory::host_memory().map_or(0, |host| host.peak),
    };
    let reserved = memory::device_memory(device)?.map_or(0, |own| own.reserved_peak);
    drop((recorded, scope));
    // Both apart from the steps that are timed.
    let (mut counted, mut left) = (Count::default(), (0, BTreeMap::new()));
    if steps > 0 {
        counted = operations(|| backward(&model.batch()?, &parameters))?.1.total();
        left = kept(device, || model.loss(&model.batch()?, &pass))?;
    }
    let (kept, kept_by_block) = left;
    let seconds: Vec<String> = times.iter().map(|time| format!("{time:.3}")).collect();
    println!("ours on {device:?}: {} s a step", seconds.join(" "));
    let mut later = times.get(1..).unwrap_or_default().to_vec();
    later.sort_by(f64::total_cmp);
    println!(
        "{}",
        serde_json::json!({
            "seconds": later.get(later.len() / 2),
            "peak_mib": peak >> 20,
            "reserved_mib": reserved >> 20,
            "kept_mib": kept >> 20,
            "kept_by_block": kept_by_block,
            "operations": counted.work,
        })
    );
    Ok(())
}
