//! An adapter variant of your own: it registers by name, trains, saves, loads and merges, and passes the conformance suite.
//! This one learns a factor for each output of a layer, `W' = (1 + gain) ⊙ W`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use lora_core::backend::{Backend, CpuBackend};
use lora_core::conformance::{Layer, Row, check};
use lora_core::variant::{BaseLayer, Parameters, Request, Variant, VariantRegistry};
use lora_core::{HostTensor, LayerGeometry, Result, Strength};
use lora_io::adapter;
use lora_io::merge::{MergeOptions, Weighted, merge};
use lora_train::config::{Format, TrainConfig};
use lora_train::{Plugins, train};

#[derive(Debug)]
struct OutputGain;

impl<B: Backend> Variant<B> for OutputGain {
    fn name(&self) -> &str {
        "output-gain"
    }

    fn shapes(&self, geometry: &LayerGeometry, _: &Request) -> Result<BTreeMap<String, Vec<usize>>> {
        let mut shape = vec![1; geometry.weight_shape().len()];
        shape[0] = geometry.weight_shape()[0];
        Ok(BTreeMap::from([("gain".to_owned(), shape)]))
    }

    fn is_additive(&self) -> bool {
        false
    }

    fn delta_weight(&self, backend: &B, base: &dyn BaseLayer<B>, parameters: &Parameters<B>) -> Result<B::Tensor> {
        let gain = backend.scale(parameters.get("output-gain", "gain")?, parameters.scale)?;
        backend.mul(&backend.cast_like(&base.weight()?, &gain)?, &gain)
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let row = Row { variant: "output-gain", rank: 1, scale: 0.5, options: &[], layers: &Layer::ALL };
    check(&CpuBackend, &HostTensor::zeros([1]), &OutputGain, &row)?;

    let mut plugins = Plugins::default();
    plugins.variants.register(OutputGain)?;
    let text = std::fs::read_to_string("examples/quickstart.toml")?;
    let settings = ["variant=output-gain", "max_train_steps=5", "sample_prompts=[]", "output_name=output-gain"];
    let config = TrainConfig::from_text(&text, Format::Toml, &settings)?;
    let base = config.base_model.clone();
    let result = train(config, &plugins, Vec::new(), &Arc::new(AtomicBool::new(false)), &mut |_| {})?;

    let mut variants = VariantRegistry::<CpuBackend>::default();
    variants.register(OutputGain)?;
    let adapter = adapter::read(&result.lora)?.adapter;
    let weighted = Weighted { name: "output-gain".into(), adapter, strength: Strength::from(1.0) };
    let merged = result.lora.with_file_name("merged.safetensors");
    let report = merge(base, &[weighted], &merged, &MergeOptions::default(), &variants, &|_, _| {})?;
    println!("{}: {} tensors changed", merged.display(), report.changed);
    Ok(())
}
