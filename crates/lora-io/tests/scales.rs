//! A scale that stands beside the tensors, in a configuration or an alpha, comes through every format that takes the
//! module: what is written and read back is the same update, for every variant and whatever alpha and rank.

mod support;

use std::collections::BTreeMap;

use lora_core::backend::CpuBackend;
use lora_core::conformance::{Layer, ROWS, distance};
use lora_core::variant::{BaseLayer, FrozenLayer, Parameters, VariantRegistry};
use lora_core::{Adapter, AdapterModule, Component, DType, HostTensor, ModulePath};
use lora_io::adapter::{self, Format};
use lora_io::gguf::names::Architecture;
use lora_io::safetensors::write;
use support::{Golden, random};

/// The update on a layer, or nothing where the variant is none of this crate's.
fn update(module: &AdapterModule, base: &FrozenLayer<CpuBackend>) -> HostTensor {
    let variant = VariantRegistry::<CpuBackend>::default().get(&module.variant).unwrap();
    let parameters = Parameters::upload(&CpuBackend, module, &HostTensor::zeros([1])).unwrap();
    variant.delta_weight(&CpuBackend, base, &parameters).unwrap()
}

fn frozen(layer: Layer) -> FrozenLayer<CpuBackend> {
    layer.frozen(&CpuBackend, &HostTensor::zeros([1])).unwrap()
}

/// Writes a module in every format that takes it, and holds what is read back against it. Returns the formats.
fn round_trips(module: &AdapterModule, base: &FrozenLayer<CpuBackend>, what: &str) -> Vec<Format> {
    let folder = tempfile::tempdir().unwrap();
    let expected = update(module, base);
    let architecture = Architecture { name: "qwen3".into(), heads: 1, kv_heads: 1 };
    let mut taken = Vec::new();
    for format in Format::ALL {
        let path = match format {
            Format::Gguf => ModulePath::new(Component::LANGUAGE_MODEL, "model.layers.0.mlp.down_proj"),
            _ => ModulePath::new(Component::UNET, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"),
        };
        let mut adapter = Adapter { modules: BTreeMap::from([(path, module.clone())]), ..Adapter::default() };
        adapter::gguf::set_architecture(&mut adapter, &architecture);
        let file = folder.path().join(format.name());
        if adapter::write(&file, &adapter, format, DType::F32).is_err() {
            continue;
        }
        let back = adapter::read(&file).unwrap();
        let found = update(back.adapter.modules.values().next().unwrap(), base);
        let apart = distance(&found, &expected);
        assert!(apart < 2e-5, "{what} as {format}: {apart:e}");
        taken.push(format);
    }
    taken
}

#[test]
fn every_variant_keeps_its_scale_in_every_format() {
    let registry = VariantRegistry::<CpuBackend>::default();
    let mut kept = BTreeMap::<&str, usize>::new();
    for row in ROWS {
        let variant = registry.get(row.variant).unwrap();
        for &layer in row.layers.iter().filter(|layer| **layer != Layer::Embedding) {
            let base = frozen(layer);
            let tensors = row.trained(&CpuBackend, &*variant, &base).unwrap();
            for alpha in [0.25, 1.0, 3.0 * row.rank as f64] {
                let (rank, _) = variant.rank_and_alpha(&base.geometry, &row.request(), alpha);
                let module = AdapterModule { variant: row.variant.into(), tensors: tensors.clone(), rank, alpha };
                let module = variant.export(module).unwrap();
                let what = format!("{row:?} on {layer:?} with alpha {alpha}");
                *kept.entry(row.variant).or_default() += round_trips(&module, &base, &what).len();
            }
        }
    }
    for variant in
        ["lora", "dora", "lycoris-dora", "loha", "lokr", "oft", "boft", "glora", "full", "lycoris-ia3", "pissa"]
    {
        assert!(kept[variant] > 0, "{variant}");
    }
}

#[test]
fn files_of_the_peers_keep_their_scale_when_they_are_converted() {
    let mut converted = 0;
    for golden in Golden::all("peft-").into_iter().chain(Golden::all("lycoris-")) {
        let Ok(module) = golden.module(false) else { continue };
        let base = FrozenLayer {
            backend: CpuBackend,
            geometry: golden.geometry(),
            weight: golden.tensors["weight"].clone(),
            bias: golden.tensors.get("bias").cloned(),
        };
        if module.variant == "full" || golden.metadata["kind"] == "embedding" || base.weight().is_err() {
            continue;
        }
        let variant = VariantRegistry::<CpuBackend>::default().get(&module.variant).unwrap();
        let parameters = Parameters::upload(&CpuBackend, &module, &HostTensor::zeros([1])).unwrap();
        if variant.delta_weight(&CpuBackend, &base, &parameters).is_ok() {
            converted += round_trips(&module, &base, &golden.name).len();
        }
    }
    assert!(converted > 60, "{converted}");
}

/// PEFT divides by its configured rank even where both factors are whole; LyCORIS and ComfyUI apply no scale there.
#[test]
fn a_lokr_of_two_whole_factors_takes_its_scale_into_a_factor() {
    let folder = tempfile::tempdir().unwrap();
    let name = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";
    let (w1, w2) = (random(&[4, 4], 1), random(&[4, 4], 2));
    let tensors = BTreeMap::from([(format!("{name}.lokr_w1"), w1.clone()), (format!("{name}.lokr_w2"), w2.clone())]);
    write(folder.path().join("adapter_model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    let config = r#"{"peft_type": "LOKR", "r": 8, "alpha": 2, "target_modules": ["to_q"]}"#;
    std::fs::write(folder.path().join("adapter_config.json"), config).unwrap();
    let path = folder.path().join("kohya.safetensors");
    let read = adapter::read(folder.path()).unwrap();
    adapter::write(&path, &read.adapter, Format::Kohya, DType::F32).unwrap();
    // What LyCORIS 4.1 makes of the file: the Kronecker product of the two as they are.
    let back = adapter::read(&path).unwrap().adapter.modules.into_values().next().unwrap();
    let (w1_back, w2_back) = (back.tensors["w1"].to_f32().into_owned(), back.tensors["w2"].to_f32().into_owned());
    for place in 0..256 {
        let (row, column) = (place / 16, place % 16);
        let (small, large) = (row / 4 * 4 + column / 4, row % 4 * 4 + column % 4);
        let expected = 0.25 * w1.to_f32()[small] * w2.to_f32()[large];
        assert!((w1_back[small] * w2_back[large] - expected).abs() < 1e-6);
    }
    assert_eq!(back.scale(), 1.0);
}
