//! Time and memory of training steps on a U-Net of Stable Diffusion 1.5's or XL's size, the same work as
//! `tools/bench/peft_step.py`, with the same arguments:
//!
//! `cargo run --release --example unet_step [model=sd1|sdxl] [pixels=256] [rank=8] [steps=5] [batch=1] [dtype=fp32|bf16|fp16]
//! [checkpointing=0|1] [feed_forward=0|1] [storage=fp16|fp8|int8|nf4] [offload_base=0|1] [graphs=0|1]`
//!
//! The last line is JSON, for `tools/bench/side_by_side.py`; `kept_by_block` are the bytes that each block of the U-Net adds to
//! what a forward pass leaves for the backward pass. With `steps=0`: bytes of the weights and memory of loading them.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use lora_core::target::Targets;
use lora_core::variant::VariantRegistry;
use lora_models::diffusion::{NoiseSchedule, Prediction};
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::{Conditions, Unet};
use lora_models::synthetic::SyntheticModel;
use lora_models::weights::{Frozen, Held, SyntheticWeights, Weights};
use lora_torch::frozen::Storage;
use lora_torch::graph::{Graph, Recorder};
use lora_torch::profile::{Count, operations};
use lora_torch::staging::Staging;
use lora_torch::tch::{Device, Kind, Tensor};
use lora_torch::{device, foreach, memory};
use lora_train::base::Inputs;
use lora_train::loss::{Denoising, LossWeights};
use lora_train::optimiser::OptimiserState;
use lora_train::parameters::ParameterList;
use lora_train::trainable::{AdapterOptions, TrainableAdapter};
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

/// The names of the arguments.
const ARGUMENTS: [&str; 11] = [
    "model",
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
    let sizes = match text("model") {
        "" | "sd1" => SyntheticModel::full().unet,
        "sdxl" => SyntheticModel::full_sdxl().unet,
        other => return Err(format!("model={other}: sd1 or sdxl").into()),
    };
    let device = device::resolve("auto")?;
    memory::count_host_allocations()?;
    let weights = SyntheticWeights::new("unet");
    let staging = (number("offload_base", 0)? != 0).then(|| Staging::new(device)).transpose()?;
    let mut unet = Unet::new(
        &Weights::new(&weights, kind, device).held(Held::Frozen(Frozen { staging, ..Frozen::stored(storage) })),
        sizes.clone(),
    )?;
    let mut bytes = 0;
    unet.visit_layers(&mut |layer| bytes += layer.weight_bytes())?;
    if let Some(loaded) = memory::host_memory() {
        let (weights, resident, peak) = (bytes >> 20, loaded.resident >> 20, loaded.peak >> 20);
        println!("weights of layers {weights} MiB; after loading {resident} MiB resident, peak {peak} MiB");
    }
    let targets = Targets::parse(&["attention"])?.select(&unet.adaptable_layers()?)?;
    let mut adapter = TrainableAdapter::default();
    let options = AdapterOptions::lora(rank as usize, rank as f64, 0);
    let mut parameters = ParameterList::new(OptimiserState::adamw(), 0.0);
    adapter.attach(&mut unet, &targets, &VariantRegistry::default(), &options, None, &mut parameters)?;

    let schedule = NoiseSchedule::new(Prediction::Epsilon);
    let latents = Tensor::randn([batch, 4, pixels / 8, pixels / 8], (Kind::Float, device));
    let random = |shape: [i64; 2]| Tensor::randn(shape, (Kind::Float, device));
    let context = random([batch, 77 * sizes.context as i64]).f_view([batch, 77, -1])?;
    let added = sizes.added.map(|width| random([batch, width as i64]));
    let conditions = Conditions { context: &context, added: added.as_ref() };
    let timesteps = vec![500; batch as usize];
    let scale = if kind == Kind::Half { 65536.0 } else { 1.0 };
    let batch_of = || -> lora_train::Result<Inputs> {
        let noise = latents.randn_like();
        let weights = LossWeights::default();
        Ok(Denoising::new(&unet, &schedule, &latents, &noise, &timesteps, &weights)?.into_inputs())
    };
    let backward = |batch: &Inputs, parameters: &ParameterList| -> lora_train::Result<Tensor> {
        let loss = Denoising::of(batch)?.loss(&unet, conditions, &pass)?;
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
        let batch = batch_of()?;
        let loss = match &mut recorded {
            Some((graph, own, loss)) => {
                own.assign(&batch)?;
                graph.replay()?;
                loss.shallow_clone()
            }
            None => backward(&batch, &parameters)?,
        };
        parameters.settle(&loss, scale, 1.0)?;
        parameters.step(|_, _| 1e-4)?;
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
        counted = operations(|| backward(&batch_of()?, &parameters))?.1.total();
        left = kept(device, || Denoising::of(&batch_of()?)?.loss(&unet, conditions, &pass))?;
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
