//! Time and memory of training steps on a U-Net of Stable Diffusion 1.5's size, the same work as
//! `tools/bench/peft_step.py`: `cargo run --release --example unet_step [PIXELS] [RANK] [STEPS] [CHECKPOINTING 0|1] [STORAGE]`,
//! storage 0 for fp32, 1 for fp16, 2 for fp8, 3 for int8, 4 for nf4. With 0 steps: bytes of the weights and memory of loading them.

use std::time::Instant;

use lora_core::target::Targets;
use lora_core::variant::VariantRegistry;
use lora_models::layers::{Adaptable, Pass};
use lora_models::stable_diffusion::{NoiseSchedule, Prediction, Unet};
use lora_models::synthetic::SyntheticModel;
use lora_models::weights::{Frozen, Held, SyntheticWeights, Weights};
use lora_torch::frozen::Storage;
use lora_torch::tch::{Kind, Tensor};
use lora_torch::{device, memory};
use lora_train::loss::{LossWeights, denoising_loss};
use lora_train::optimiser::OptimiserState;
use lora_train::parameters::ParameterList;
use lora_train::trainable::{AdapterOptions, TrainableAdapter};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let numbers = std::env::args().skip(1).map(|number| number.parse()).collect::<Result<Vec<i64>, _>>()?;
    let number = |index: usize, default| numbers.get(index).copied().unwrap_or(default);
    let (pixels, rank, steps) = (number(0, 256), number(1, 8) as usize, number(2, 5));
    let pass = Pass { recompute: number(3, 0) != 0, ..Pass::default() };

    let storage = [None, Some(Storage::Half), Some(Storage::Float8), Some(Storage::Int8), Some(Storage::Nf4)];
    let storage = storage[number(4, 0).clamp(0, 4) as usize];
    let device = device::resolve("auto")?;
    memory::count_host_allocations()?;
    let weights = SyntheticWeights::new("unet");
    let mut unet = Unet::new(
        &Weights::new(&weights, Kind::Float, device).held(Held::Frozen(Frozen::stored(storage))),
        SyntheticModel::full().unet,
    )?;
    let mut bytes = 0;
    unet.visit_layers(&mut |layer| bytes += layer.weight_bytes());
    let loaded = memory::host_memory();
    let targets = Targets::parse(&["attention"])?.select(&unet.adaptable_layers())?;
    let mut adapter = TrainableAdapter::default();
    let options = AdapterOptions::lora(rank, rank as f64, 0);
    let mut parameters = ParameterList::new(OptimiserState::adamw(), 0.0);
    adapter.attach(&mut unet, &targets, &VariantRegistry::default(), &options, None, &mut parameters)?;

    let schedule = NoiseSchedule::new(Prediction::Epsilon);
    let latents = Tensor::randn([1, 4, pixels / 8, pixels / 8], (Kind::Float, device));
    let context = Tensor::randn([1, 77, 768], (Kind::Float, device));
    let held = || match memory::device_memory(device) {
        Ok(Some(own)) => own.allocated,
        _ => memory::host_allocations().map_or(0, |host| host.live),
    };
    let (mut times, mut kept) = (Vec::new(), 0);
    for _ in 0..steps {
        let start = Instant::now();
        let noise = latents.randn_like();
        let before = held();
        let loss =
            denoising_loss(&unet, &schedule, &latents, &noise, &[500], &context, &LossWeights::default(), &pass)?;
        kept = held().saturating_sub(before);
        loss.f_backward()?;
        parameters.settle(&loss.detach(), 1.0, 1.0)?;
        drop(loss);
        parameters.step(|_, _| 1e-4)?;
        parameters.clear_gradients()?;
        times.push(format!("{:.2}", start.elapsed().as_secs_f64()));
    }
    let peak = memory::host_memory().map_or(0, |host| host.peak >> 20);
    let recomputed = if pass.recompute { ", checkpointed" } else { "" };
    let stored = storage.map_or_else(String::new, |storage| format!(", stored as {storage:?}"));
    if let Some(loaded) = loaded {
        let (weights, resident, peak) = (bytes >> 20, loaded.resident >> 20, loaded.peak >> 20);
        println!("weights of layers {weights} MiB; after loading {resident} MiB resident, peak {peak} MiB");
    }
    println!(
        "ours {pixels} px rank {rank}{recomputed}{stored} on {device:?}: {} s a step; kept for the backward pass {} MiB, peak RSS {peak} MiB",
        times.join(", "),
        kept >> 20
    );
    Ok(())
}
