//! What the tests of networks share: golden files, inputs and adapters that both sides make from names, distances.

#![allow(dead_code, reason = "each test uses some of it")]

pub(crate) mod flow;

use std::collections::BTreeMap;
use std::sync::Arc;

use lora_core::HostTensor;
use lora_core::target::{TargetLayer, Targets};
use lora_core::variant::{Lora, Parameters};
use lora_io::safetensors::SafetensorsFile;
use lora_models::layers::{Adaptable, AdaptableLayer, AttachedAdapter};
use lora_models::weights::synthetic_uniform;
use lora_torch::tch::{Device, Tensor};
use lora_torch::tensor::from_host;

pub(crate) const CPU: Device = Device::Cpu;

/// A golden file of a transformer.
pub(crate) fn transformers(name: &str) -> SafetensorsFile {
    let folder = format!("{}/tests/golden/transformers", env!("CARGO_MANIFEST_DIR"));
    SafetensorsFile::open(format!("{folder}/{name}.safetensors")).unwrap()
}

/// A golden file of a whole base.
pub(crate) fn whole(name: &str) -> SafetensorsFile {
    SafetensorsFile::open(format!("{}/tests/golden/{name}/expected.safetensors", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

pub(crate) fn tensor(file: &SafetensorsFile, name: &str) -> Tensor {
    from_host(&file.get(name).unwrap().to_host().unwrap(), CPU).unwrap()
}

pub(crate) fn integers(file: &SafetensorsFile, name: &str) -> Tensor {
    let view = file.get(name).unwrap();
    let values: Vec<i64> =
        view.bytes().chunks_exact(8).map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap())).collect();
    Tensor::from_slice(&values).view(view.shape().iter().map(|&side| side as i64).collect::<Vec<_>>().as_slice())
}

/// An input that both sides make from its name.
pub(crate) fn given(name: &str, shape: &[usize]) -> Tensor {
    let scale = 3f64.sqrt() as f32;
    let values = synthetic_uniform(name, shape.iter().product()).map(|u| scale * u).collect();
    from_host(&HostTensor::from_f32(shape, values).unwrap(), CPU).unwrap()
}

/// Largest difference over the reference's standard deviation.
pub(crate) fn relative(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.size(), expected.size());
    let worst = f64::try_from((found - expected).abs().max()).unwrap();
    worst / f64::try_from(expected.std(false)).unwrap()
}

/// Length of the difference over that of the reference.
pub(crate) fn distance(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.size(), expected.size());
    f64::try_from((found - expected).norm()).unwrap() / f64::try_from(expected.norm()).unwrap()
}

/// Adapts layers with the golden files' factors; returns them by their names there.
pub(crate) fn adapt(network: &mut dyn Adaptable, targets: &[&str]) -> BTreeMap<String, Tensor> {
    adapt_beside(network, targets, "lora", 1.0)
}

/// The same beside what the layers carry, of factors whose names begin so, at a strength.
pub(crate) fn adapt_beside(
    network: &mut dyn Adaptable,
    targets: &[&str],
    begin: &str,
    strength: f64,
) -> BTreeMap<String, Tensor> {
    let chosen: Vec<TargetLayer> =
        Targets::parse(targets).unwrap().select(&network.adaptable_layers().unwrap()).unwrap();
    let component = network.component();
    let mut leaves = BTreeMap::new();
    let mut attach = |layer: &mut AdaptableLayer| {
        if !chosen.iter().any(|target| target.path.path == layer.path()) {
            return;
        }
        let geometry = layer.geometry();
        let mut factor = |part: &str, shape: Vec<usize>, scale: f64| {
            let name = format!("{begin}.{component}.{}.{part}", layer.path());
            let values = synthetic_uniform(&name, shape.iter().product()).map(|u| scale as f32 * u).collect();
            let leaf = from_host(&HostTensor::from_f32(shape, values).unwrap(), CPU).unwrap().set_requires_grad(true);
            leaves.insert(name, leaf.shallow_clone());
            (part.to_owned(), leaf)
        };
        let tensors = [
            factor("down", geometry.with_outputs(4).weight_shape(), (3.0 / geometry.fan_in() as f64).sqrt()),
            factor("up", geometry.pointwise_from(4).weight_shape(), 0.02),
        ];
        let parameters = Parameters { tensors: tensors.into(), scale: 0.5 };
        layer.attach_beside(AttachedAdapter { variant: Arc::new(Lora), parameters }, strength);
    };
    network.visit_layers(&mut attach).unwrap();
    leaves
}
