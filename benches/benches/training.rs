//! Training steps: a small model by default; `LORA_BENCH_FULL=1` adds Stable Diffusion 1.5's own sizes with random weights
//! (it needs 8 GB of memory and minutes on a CPU). On CUDA where there is a device.

use std::collections::BTreeMap;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use lora_core::target::Targets;
use lora_core::variant::VariantRegistry;
use lora_models::layers::{Adaptable, Pass};
use lora_models::stable_diffusion::{NoiseSchedule, Prediction, Unet};
use lora_models::synthetic::SyntheticModel;
use lora_models::weights::{SyntheticWeights, Weights};
use lora_torch::device;
use lora_torch::tch::{Device, Kind, Tensor};
use lora_train::loss::{LossWeights, denoising_loss};
use lora_train::optimiser::OptimiserState;
use lora_train::parameters::ParameterList;
use lora_train::trainable::{AdapterOptions, TrainableAdapter};

/// A U-Net with a LoRA, a batch, and everything a step takes.
struct Step {
    unet: Unet,
    parameters: ParameterList,
    schedule: NoiseSchedule,
    latents: Tensor,
    context: Tensor,
}

impl Step {
    fn new(model: &SyntheticModel, device: Device, rank: usize, side: i64, batch: i64) -> Self {
        let weights = SyntheticWeights::new("unet");
        let kind = if device == Device::Cpu { Kind::Float } else { Kind::BFloat16 };
        let mut unet =
            Unet::new(&Weights::new(&weights, kind, device), model.unet.clone()).expect("a synthetic model builds");
        let layers = unet.adaptable_layers();
        let targets = Targets::parse(&["attention"]).and_then(|targets| targets.select(&layers)).expect("a preset");
        let options = AdapterOptions::lora(rank, rank as f64, 0);
        let mut adapter = TrainableAdapter::default();
        let mut parameters = ParameterList::new(OptimiserState::adamw(), 0.0);
        adapter
            .attach(&mut unet, &targets, &VariantRegistry::default(), &options, None, &mut parameters)
            .expect("LoRA attaches");
        let latents = Tensor::randn([batch, 4, side, side], (Kind::Float, device));
        let context = Tensor::randn([batch, 77, model.unet.context as i64], (Kind::Float, device));
        Self { unet, parameters, schedule: NoiseSchedule::new(Prediction::Epsilon), latents, context }
    }

    fn run(&mut self) {
        let noise = self.latents.randn_like();
        let timesteps = vec![500; self.latents.size()[0] as usize];
        let pass = Pass::default();
        let loss = denoising_loss(
            &self.unet,
            &self.schedule,
            &self.latents,
            &noise,
            &timesteps,
            &self.context,
            &LossWeights::default(),
            &pass,
        );
        loss.expect("a step runs").backward();
        self.parameters.clip(1.0).expect("gradients are there");
        self.parameters.step(|_, _| 1e-4).expect("AdamW steps");
        self.parameters.clear_gradients().expect("gradients clear");
    }
}

fn steps(criterion: &mut Criterion) {
    let device = device::resolve("auto").expect("auto always resolves");
    let mut models = BTreeMap::from([("tiny", (SyntheticModel::tiny(), 8))]);
    if std::env::var_os("LORA_BENCH_FULL").is_some() {
        models.insert("sd15", (SyntheticModel::full(), 32));
    }
    let mut group = criterion.benchmark_group(format!("step on {device:?}"));
    group.sample_size(10);
    for (name, (model, side)) in &models {
        for rank in [8, 16] {
            let mut step = Step::new(model, device, rank, *side, 1);
            group.bench_function(BenchmarkId::new(*name, format!("rank {rank}, {} px", side * 8)), |bencher| {
                bencher.iter(|| step.run());
            });
        }
    }
    group.finish();
}

criterion_group!(benches, steps);
criterion_main!(benches);
