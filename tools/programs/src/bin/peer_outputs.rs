//! What the networks answer with and without a LoRA file, written for `tools/compat/check_peers.py`, which compares it
//! with diffusers and PEFT: `cargo run --release --bin peer_outputs BASE LORA OUTPUTS`.

use std::collections::BTreeMap;
use std::error::Error;

use lora_core::HostTensor;
use lora_core::random::Stream;
use lora_core::target::TargetLayer;
use lora_core::variant::VariantRegistry;
use lora_io::adapter;
use lora_io::checkpoint::Checkpoint;
use lora_io::safetensors::write;
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::{ClipTextEncoder, Unet, load_text_encoder, load_unet};
use lora_models::weights::Held;
use lora_torch::tch::{Device, Kind, Tensor, no_grad};
use lora_torch::tensor::{from_host, to_host};
use lora_train::optimiser::OptimiserState;
use lora_train::parameters::ParameterList;
use lora_train::trainable::{AdapterOptions, TrainableAdapter};

type Answer = Result<Tensor, Box<dyn Error>>;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [base, lora, outputs] = arguments.as_slice() else { return Err("expected BASE LORA OUTPUTS".into()) };
    let checkpoint = Checkpoint::open(base)?;
    let mut unet = load_unet(&checkpoint, Kind::Float, Device::Cpu, Held::default())?;
    let mut text = load_text_encoder(&checkpoint, Kind::Float, Device::Cpu, Held::default())?;

    let width = unet.config().context;
    let sample = HostTensor::from_f32([2, 4, 16, 16], Stream::new(1).at("sample").normals(2 * 4 * 16 * 16))?;
    let context = HostTensor::from_f32([2, 77, width], Stream::new(1).at("context").normals(2 * 77 * width))?;
    let (sample, context) = (from_host(&sample, Device::Cpu)?, from_host(&context, Device::Cpu)?);
    let mut ids = vec![49407i64; 154];
    for (index, id) in [49406, 320, 10631, 539, 320, 736, 3055].into_iter().enumerate() {
        (ids[index], ids[77 + index]) = (id, id);
    }
    ids[80] = 1579;
    let ids = Tensor::from_slice(&ids).view([2, 77]);
    let timesteps = [10.0, 800.0];
    let picture =
        |unet: &Unet| -> Answer { Ok(no_grad(|| unet.forward(&sample, &timesteps, &context, &Pass::default()))?) };
    let words = |text: &ClipTextEncoder| -> Answer { Ok(no_grad(|| text.forward(&ids, 1, &Pass::default()))?) };

    let mut made = vec![("sample", sample.shallow_clone()), ("context", context.shallow_clone())];
    made.push(("timestep", Tensor::from_slice(&[10f32, 800.0])));
    made.extend([
        ("output_base", picture(&unet)?),
        ("text_base", words(&text)?),
        ("input_ids", ids.to_kind(Kind::Float)),
    ]);

    let layers: Vec<TargetLayer> = [unet.adaptable_layers()?, text.adaptable_layers()?].concat();
    let mut adapter = adapter::read(lora)?.adapter;
    adapter::fit(lora.as_ref(), &mut adapter, &layers)?;
    let options = AdapterOptions::lora(1, 1.0, 0);
    let targets: Vec<TargetLayer> =
        layers.into_iter().filter(|layer| adapter.modules.contains_key(&layer.path)).collect();
    let mut trained = TrainableAdapter::default();
    for network in [&mut unet as &mut dyn Adaptable, &mut text] {
        trained.attach(
            network,
            &targets,
            &VariantRegistry::default(),
            &options,
            Some(&adapter),
            &mut ParameterList::new(OptimiserState::adamw(), 0.0),
        )?;
    }
    made.extend([("output_lora", picture(&unet)?), ("text_lora", words(&text)?)]);
    let tensors: BTreeMap<String, HostTensor> = made
        .iter()
        .map(|(name, tensor)| Ok(((*name).to_owned(), to_host(tensor)?)))
        .collect::<lora_torch::Result<_>>()?;
    write(outputs, &tensors, &BTreeMap::new())?;
    println!("{} modules; outputs in {outputs}", trained.modules());
    Ok(())
}
