//! Every variant and every format: what is written reads back as the same adapter, and what a format cannot hold is
//! refused by name.

use std::collections::BTreeMap;
use std::path::Path;

use lora_core::backend::CpuBackend;
use lora_core::conformance::{Layer, ROWS, distance};
use lora_core::variant::{FrozenLayer, Parameters, VariantRegistry};
use lora_core::{Adapter, AdapterModule, Component, DType, HostTensor, ModulePath};
use lora_io::adapter::{self, Format};
use lora_io::safetensors::{SafetensorsFile, write as write_file};

/// The update that a module makes on a layer of the conformance suite.
fn update(module: &AdapterModule, layer: Layer) -> HostTensor {
    let like = HostTensor::zeros([1]);
    let base: FrozenLayer<CpuBackend> = layer.frozen(&CpuBackend, &like).unwrap();
    let variant = VariantRegistry::<CpuBackend>::default().get(&module.variant).unwrap();
    let parameters = Parameters::upload(&CpuBackend, module, &like).unwrap();
    variant.delta_weight(&CpuBackend, &base, &parameters).unwrap()
}

fn path_of(layer: Layer) -> ModulePath {
    let path = match layer {
        Layer::Linear => "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
        Layer::Square => "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        Layer::Conv => "down_blocks.0.downsamplers.0.conv",
        Layer::Pointwise => "mid_block.attentions.0.proj_in",
        Layer::Grouped => "mid_block.resnets.0.conv1",
        Layer::Embedding => return ModulePath::new(Component::LANGUAGE_MODEL, "model.embed_tokens"),
    };
    ModulePath::new(Component::UNET, path)
}

/// An adapter of one row of the suite on all layers that it adapts.
fn of_row(row: &lora_core::conformance::Row, keep: impl Fn(Layer) -> bool) -> Adapter {
    let like = HostTensor::zeros([1]);
    let variant = VariantRegistry::<CpuBackend>::default().get(row.variant).unwrap();
    let mut adapter = Adapter::default();
    for &layer in row.layers.iter().filter(|layer| keep(**layer)) {
        let base: FrozenLayer<CpuBackend> = layer.frozen(&CpuBackend, &like).unwrap();
        let tensors = row.trained(&CpuBackend, &*variant, &base).unwrap();
        let request = row.request();
        let (rank, alpha) = variant.rank_and_alpha(&base.geometry, &request, row.scale * row.rank as f64);
        let module = AdapterModule { variant: row.variant.into(), tensors, rank, alpha };
        adapter.modules.insert(path_of(layer), variant.export(module).unwrap());
    }
    adapter
}

#[test]
fn every_variant_that_the_kohya_layout_has_reads_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let mut refused = Vec::new();
    for row in ROWS {
        let adapter = of_row(row, |layer| layer != Layer::Embedding);
        match adapter::write(&path, &adapter, Format::Kohya, DType::F32) {
            Ok(_) => {}
            Err(error) => {
                assert!(error.to_string().contains("flatten"), "{error}");
                refused.push(row.variant);
                continue;
            }
        }
        let back = adapter::read(&path).unwrap();
        assert_eq!(back.format, Format::Kohya);
        for layer in row.layers.iter().filter(|layer| **layer != Layer::Embedding) {
            let (before, after) = (&adapter.modules[&path_of(*layer)], &back.adapter.modules[&path_of(*layer)]);
            let apart = distance(&update(after, *layer), &update(before, *layer));
            assert!(apart < 1e-5, "{row:?} on {layer:?}: {apart:e}");
        }
        assert_eq!(back.adapter.modules.len(), adapter.modules.len());
    }
    refused.dedup();
    assert_eq!(
        refused,
        ["peft-oft", "peft-oft-neumann", "peft-boft", "ia3", "vera", "peft-glora", "peft-hra"],
        "exactly the variants that kohya's and LyCORIS' files have no form of"
    );
}

#[test]
fn folders_for_several_networks_are_all_there_or_none_is() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("both");
    let mut adapter = of_row(&ROWS[0], |layer| layer == Layer::Square);
    let module = adapter.modules[&path_of(Layer::Square)].clone();
    let encoder = ModulePath::new(Component::TEXT_ENCODER, "text_model.encoder.layers.0.self_attn.q_proj");
    adapter.modules.insert(encoder.clone(), module.clone());
    for _ in 0..2 {
        // Over what is there, too.
        adapter::write(&folder, &adapter, Format::Peft, DType::F32).unwrap();
        for component in ["unet", "text_encoder"] {
            assert_eq!(adapter::read(folder.join(component)).unwrap().adapter.modules.len(), 1, "{component}");
        }
    }
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1);

    // The text encoder is written first, the U-Net is refused.
    let refused = AdapterModule { variant: "loha".into(), ..module };
    adapter.modules.insert(path_of(Layer::Square), refused);
    let other = place.path().join("other");
    adapter::write(&other, &adapter, Format::Peft, DType::F32).unwrap_err();
    assert!(!other.exists() && std::fs::read_dir(place.path()).unwrap().count() == 1);
}

#[test]
fn plain_lora_passes_through_every_format() {
    let folder = tempfile::tempdir().unwrap();
    let unet =
        of_row(&ROWS[0], |layer| matches!(layer, Layer::Linear | Layer::Square | Layer::Pointwise | Layer::Conv));
    for format in [Format::Kohya, Format::Diffusers, Format::Peft] {
        let path = folder.path().join(format.name());
        adapter::write(&path, &unet, format, DType::F32).unwrap();
        let back = adapter::read(&path).unwrap();
        assert_eq!(back.format, format);
        assert_eq!(back.adapter.modules.keys().collect::<Vec<_>>(), unet.modules.keys().collect::<Vec<_>>());
        for layer in [Layer::Linear, Layer::Square, Layer::Pointwise, Layer::Conv] {
            let (before, after) = (&unet.modules[&path_of(layer)], &back.adapter.modules[&path_of(layer)]);
            assert!(distance(&update(after, layer), &update(before, layer)) < 1e-6, "{format} {layer:?}");
        }
    }
    // The old layout knows attention alone.
    let path = folder.path().join("old");
    let error = adapter::write(&path, &unet, Format::DiffusersOld, DType::F32).unwrap_err().to_string();
    assert!(error.contains("no name for it"), "{error}");
    let attention = of_row(&ROWS[0], |layer| layer == Layer::Square);
    adapter::write(&path, &attention, Format::DiffusersOld, DType::F32).unwrap();
    let back = adapter::read(&path).unwrap();
    assert_eq!(back.format, Format::DiffusersOld);
    assert_eq!(back.adapter.modules.keys().next(), Some(&path_of(Layer::Square)));
}

#[test]
fn peft_folders_keep_dora_embeddings_and_patterns() {
    let folder = tempfile::tempdir().unwrap();
    let mut adapter = of_row(&ROWS[2], |layer| matches!(layer, Layer::Embedding));
    let mut linear = of_row(&ROWS[2], |layer| layer == Layer::Linear).modules.into_values().next().unwrap();
    linear.alpha = 7.0;
    adapter.modules.insert(ModulePath::new(Component::LANGUAGE_MODEL, "model.layers.0.self_attn.q_proj"), linear);
    adapter::write(folder.path(), &adapter, Format::Peft, DType::F32).unwrap();
    let back = adapter::read(folder.path()).unwrap().adapter;
    assert_eq!(back.modules, adapter.modules);
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["use_dora"], true);
    assert_eq!(config["task_type"], "CAUSAL_LM");
    assert_eq!(config["target_modules"], serde_json::json!(["embed_tokens", "q_proj"]));
    assert_eq!(config["alpha_pattern"].as_object().unwrap().len(), 1);
}

#[test]
fn fields_that_change_the_mathematics_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let adapter = of_row(&ROWS[0], |layer| layer == Layer::Square);
    adapter::write(folder.path(), &adapter, Format::Peft, DType::F32).unwrap();
    let config_path = folder.path().join("adapter_config.json");
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(&config_path).unwrap()).unwrap();
    let read_with = |field: &str, value: serde_json::Value| {
        let mut changed = config.clone();
        changed[field] = value;
        std::fs::write(&config_path, changed.to_string()).unwrap();
        adapter::read(folder.path())
    };
    for (field, value) in [
        ("peft_type", "PROMPT_TUNING".into()),
        ("trainable_token_indices", serde_json::json!([1])),
        ("init_lora_weights", "corda".into()),
        ("lora_alpha", "much".into()),
        ("rank_pattern", serde_json::json!({"(?=x)": 3})),
        ("num_cayley_neumann_terms", "many".into()),
    ] {
        let error = read_with(field, value).unwrap_err().to_string();
        assert!(error.contains(field) && error.contains("adapter_config.json"), "{field}: {error}");
    }
    let error = read_with("use_dora", true.into()).unwrap_err().to_string();
    assert!(error.contains("`lora_magnitude_vector` is missing"), "{error}");
    let plain = read_with("use_rslora", false.into()).unwrap().adapter;
    let stabilised = read_with("use_rslora", true.into()).unwrap().adapter;
    let scale = |adapter: &Adapter| adapter.modules.values().next().unwrap().scale();
    assert!((scale(&stabilised) / scale(&plain) - 2.0).abs() < 1e-9, "√4 at rank 4");
}

#[test]
fn what_is_not_understood_is_listed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let name = "lora_unet_mid_block_attentions_0_proj_in";
    let (down, up) = (HostTensor::zeros([2, 6]), HostTensor::zeros([8, 2]));
    let file = |tensors: Vec<(String, HostTensor)>| {
        write_file(&path, &tensors.into_iter().collect::<BTreeMap<_, _>>(), &BTreeMap::new()).unwrap();
        adapter::read(&path)
    };
    let pair =
        || vec![(format!("{name}.lora_down.weight"), down.clone()), (format!("{name}.lora_up.weight"), up.clone())];
    assert_eq!(file(pair()).unwrap().adapter.modules.len(), 1);
    for (extra, expected) in [
        (format!("{name}.unheard_of"), "no part of an adapter"),
        (format!("{name}.lora_A.weight"), "another spelling"),
        (format!("{name}.hada_w1_a"), "`hada_w1_a` is no part of lora"),
        ("lora_unet_mid_block_attentions_0_proj_out.lora_up.weight".into(), "`lora_down` is missing"),
        ("unet.mid_block.attentions.0.proj_out.lora_A.weight".into(), "`lora_up` is missing"),
    ] {
        let mut tensors = pair();
        tensors.push((extra.clone(), down.clone()));
        let error = file(tensors).unwrap_err().to_string();
        assert!(error.contains(expected), "{extra}: {error}");
    }
    let bare = vec![
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight".into(), down.clone()),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight".into(), up.clone()),
    ];
    assert!(file(bare).unwrap_err().to_string().contains("adapter_config.json"));
}

#[test]
fn a_users_own_variant_keeps_its_names() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let tensors = BTreeMap::from([("gain".to_owned(), HostTensor::from_f32([3], vec![1.0, 2.0, 3.0]).unwrap())]);
    let module = AdapterModule { variant: "sine".into(), tensors, rank: 4, alpha: 2.0 };
    let mut adapter = of_row(&ROWS[0], |layer| layer == Layer::Square);
    adapter.modules.insert(path_of(Layer::Linear), module.clone());
    adapter::write(&path, &adapter, Format::Kohya, DType::F32).unwrap();
    let back = adapter::read(&path).unwrap().adapter;
    let read = &back.modules[&path_of(Layer::Linear)];
    assert_eq!((&read.variant, &read.tensors, read.scale()), (&module.variant, &module.tensors, 0.5));
    assert_eq!(back.modules.len(), 2);
}

#[test]
fn metadata_passes_through() {
    let folder = tempfile::tempdir().unwrap();
    let mut adapter = of_row(&ROWS[0], |layer| layer == Layer::Square);
    adapter.metadata.insert("ss_output_name".into(), "mine".into());
    let mut path = folder.path().join("first");
    adapter::write(&path, &adapter, Format::Kohya, DType::F16).unwrap();
    for format in [Format::Diffusers, Format::Peft, Format::Kohya] {
        let read = adapter::read(&path).unwrap();
        assert_eq!(read.dtype(), DType::F16);
        path = folder.path().join(format.name());
        adapter::write(&path, &read.adapter, format, read.dtype()).unwrap();
    }
    assert_eq!(adapter::read(&path).unwrap().adapter.metadata["ss_output_name"], "mine");
}

/// Portable files: one rank, one alpha, the same update.
#[test]
fn portable_files_have_one_rank_and_one_alpha() {
    let mut adapter = of_row(&ROWS[0], |layer| matches!(layer, Layer::Linear | Layer::Square));
    adapter.modules.get_mut(&path_of(Layer::Square)).unwrap().alpha = 3.0;
    let (portable, notes) = adapter::portable::portable(&adapter).unwrap();
    assert!(notes.iter().any(|note| note.contains("rank 8")), "{notes:?}");
    for layer in [Layer::Linear, Layer::Square] {
        let module = &portable.modules[&path_of(layer)];
        assert_eq!((module.rank, module.alpha), (8, 8.0));
        assert!(distance(&update(module, layer), &update(&adapter.modules[&path_of(layer)], layer)) < 1e-6);
    }
    let loha = of_row(ROWS.iter().find(|row| row.variant == "loha").unwrap(), |layer| layer == Layer::Linear);
    assert!(adapter::portable::portable(&loha).unwrap_err().to_string().contains("flatten"));
}

/// The text encoder's zero partners do not come back as modules.
#[test]
fn names_in_files_are_those_of_the_family() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let mut adapter = of_row(&ROWS[0], |layer| matches!(layer, Layer::Square | Layer::Conv));
    adapter.metadata.insert("ss_base_model_version".into(), "sdxl_base_v1-0".into());
    adapter::write(&path, &adapter, Format::Kohya, DType::F32).unwrap();
    let names = |path: &Path| SafetensorsFile::open(path).unwrap().names().map(str::to_owned).collect::<Vec<_>>();
    assert!(names(&path).contains(&"lora_unet_input_blocks_3_0_op.lora_down.weight".to_owned()), "{:?}", names(&path));
    assert_eq!(
        adapter::read(&path).unwrap().adapter.modules.keys().collect::<Vec<_>>(),
        adapter.modules.keys().collect::<Vec<_>>()
    );
}
