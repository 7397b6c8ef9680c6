//! Transformers that denoise by flow matching: weights and adapters in diffusers' tree and in the original one
//! (`tools/golden/make_transformer_layouts.py`, which holds them against diffusers' own converter).

use std::collections::BTreeMap;
use std::path::PathBuf;

use lora_core::variant::VariantRegistry;
use lora_core::{Adapter, AdapterModule, Component, DType, HostTensor, ModulePath, Strength};
use lora_io::adapter::{self, Format};
use lora_io::checkpoint::{Checkpoint, ComponentWeights, Replaced, write_single_file};
use lora_io::gguf;
use lora_io::merge::{self, MergeOptions, Weighted};
use lora_io::safetensors::SafetensorsFile;

fn golden(name: &str) -> PathBuf {
    format!("{}/tests/golden/transformers/{name}.safetensors", env!("CARGO_MANIFEST_DIR")).into()
}

const FAMILIES: [&str; 3] = ["flux", "flux2", "sd3"];

#[test]
fn files_in_both_trees_hold_the_same_weights() {
    let folder = tempfile::tempdir().unwrap();
    for name in FAMILIES {
        let expected = SafetensorsFile::open(golden(name)).unwrap();
        for layout in [name.to_owned(), format!("{name}_original")] {
            let checkpoint = Checkpoint::open(golden(&layout)).unwrap();
            assert_eq!(checkpoint.family().name, name, "{layout}");
            assert!(checkpoint.unused().is_empty(), "{layout}: {:?}", checkpoint.unused());
            let found = checkpoint.component(Component::TRANSFORMER).unwrap();
            assert_eq!(found.names().collect::<Vec<_>>(), expected.names().collect::<Vec<_>>(), "{layout}");
            for weight in expected.names() {
                let view = expected.get(weight).unwrap();
                let own = found.tensor(weight).unwrap();
                assert_eq!((own.shape(), own.bytes()), (view.shape(), view.bytes()), "{layout}: {weight}");
            }
        }
        // And what is written in the original tree is the original's file.
        let checkpoint = Checkpoint::open(golden(name)).unwrap();
        let path = folder.path().join(format!("{name}.safetensors"));
        let source = Replaced { checkpoint: &checkpoint, weights: Default::default() };
        write_single_file(&path, &source, DType::F16, &Default::default()).unwrap();
        let (written, original) = (
            SafetensorsFile::open(&path).unwrap(),
            SafetensorsFile::open(golden(&format!("{name}_original"))).unwrap(),
        );
        assert_eq!(written.names().collect::<Vec<_>>(), original.names().collect::<Vec<_>>());
        for weight in original.names() {
            assert_eq!(written.get(weight).unwrap().bytes(), original.get(weight).unwrap().bytes(), "{name}: {weight}");
        }
    }
}

/// The values of a component's weights, in f32.
fn numbers(weights: &ComponentWeights, name: &str) -> (Vec<usize>, Vec<f32>) {
    let values = weights.values(name).unwrap();
    (values.shape().to_vec(), values.to_f32().into_owned())
}

fn expected(file: &SafetensorsFile, name: &str) -> (Vec<usize>, Vec<f32>) {
    let values = file.get(name).unwrap().to_host().unwrap();
    (values.shape().to_vec(), values.to_f32().into_owned())
}

/// `tools/golden/make_quantised_transformers.py` makes the files, with gguf's own arithmetic.
#[test]
fn quantised_transformers_under_their_own_names_hold_what_gguf_reads_out_of_them() {
    let path = golden("flux_quantised").with_extension("gguf");
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!((checkpoint.family().name, checkpoint.unused().len()), ("flux", 0));
    let found = checkpoint.component(Component::TRANSFORMER).unwrap();
    let values = SafetensorsFile::open(golden("flux_quantised")).unwrap();
    for name in values.names() {
        assert_eq!(numbers(found, name), expected(&values, name), "{name}");
    }
    // Blocks stay blocks: of a part of a fused matrix, and of halves that change places.
    for (name, blocks) in [
        ("transformer_blocks.0.attn.to_k.weight", Some("Q8_0")),
        ("norm_out.linear.weight", Some("Q5_1")),
        ("context_embedder.weight", None),
        ("x_embedder.weight", None),
        ("transformer_blocks.0.attn.norm_q.weight", None),
    ] {
        let packed = found.packed(name).unwrap();
        assert_eq!(packed.as_ref().map(|own| own.kind.to_string()).as_deref(), blocks, "{name}");
        if let Some(own) = packed {
            let values = gguf::values(own.kind, &own.bytes).unwrap();
            assert_eq!((own.shape.to_vec(), values), numbers(found, name), "{name}");
        }
    }
    let mut changed = std::fs::read(&path).unwrap();
    *changed.last_mut().unwrap() ^= 1;
    let folder = tempfile::tempdir().unwrap();
    let other = folder.path().join("other.gguf");
    std::fs::write(&other, changed).unwrap();
    let hash = |path| Checkpoint::open(path).unwrap().component(Component::TRANSFORMER).unwrap().sha256().unwrap();
    assert_ne!(hash(path.as_path()), hash(other.as_path()));
}

#[test]
fn an_encoder_under_the_names_of_llama_cpp_is_a_part_of_a_base() {
    let mut checkpoint = Checkpoint::open(golden("flux")).unwrap();
    checkpoint.replace(Component::TEXT_ENCODER_2, golden("t5").with_extension("gguf")).unwrap();
    let found = checkpoint.component(Component::TEXT_ENCODER_2).unwrap();
    let values = SafetensorsFile::open(golden("t5")).unwrap();
    assert_eq!(found.names().collect::<Vec<_>>(), values.names().collect::<Vec<_>>());
    for name in values.names() {
        assert_eq!(numbers(found, name), expected(&values, name), "{name}");
    }
}

#[test]
fn weights_in_8_bits_are_read_with_their_scales() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(golden("flux_scaled")).unwrap();
    assert_eq!((checkpoint.unused().len(), checkpoint.unread_scale()), (0, None));
    let found = checkpoint.component(Component::TRANSFORMER).unwrap();
    let values = SafetensorsFile::open(golden("flux_scaled_values")).unwrap();
    assert_eq!(found.names().collect::<Vec<_>>(), values.names().collect::<Vec<_>>());
    for name in values.names() {
        assert_eq!(numbers(found, name), expected(&values, name), "{name}");
    }
    // What is merged into them is merged into their products.
    let path = folder.path().join("whole.safetensors");
    let source = Replaced { checkpoint: &checkpoint, weights: Default::default() };
    write_single_file(&path, &source, DType::F32, &Default::default()).unwrap();
    let whole = Checkpoint::open(&path).unwrap();
    let whole = whole.component(Component::TRANSFORMER).unwrap();
    values.names().for_each(|name| assert_eq!(numbers(whole, name), numbers(found, name), "{name}"));
}

/// What a module adds to its layer's weight, `[outputs, inputs]`.
fn update(adapter: &Adapter, path: &ModulePath) -> Vec<f32> {
    let module = &adapter.modules[path];
    let (down, up) = (&module.tensors["down"], &module.tensors["up"]);
    let (rank, inputs) = (down.shape()[0], down.shape()[1]);
    let (down, up) = (down.to_f32(), up.to_f32());
    let entry = |row: &[f32], column: usize| -> f32 {
        (0..rank).map(|k| row[k] * down[k * inputs + column]).sum::<f32>() * module.scale() as f32
    };
    up.chunks(rank)
        .flat_map(|row| (0..inputs).map(move |column| (row, column)))
        .map(|(row, column)| entry(row, column))
        .collect()
}

fn same(found: &Adapter, expected: &Adapter, what: &str) {
    let paths = |adapter: &Adapter| adapter.modules.keys().cloned().collect::<Vec<_>>();
    assert_eq!(paths(found), paths(expected), "{what}");
    for path in expected.modules.keys() {
        let (found, expected) = (update(found, path), update(expected, path));
        assert_eq!(found.len(), expected.len(), "{what}: {path}");
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
        assert!(worst < 1e-6, "{what}: {path}: {worst:e}");
    }
}

#[test]
fn adapters_in_all_layouts_are_the_same() {
    let folder = tempfile::tempdir().unwrap();
    for name in FAMILIES {
        let read = |layout: &str| adapter::read(golden(&format!("{name}_lora_{layout}"))).unwrap();
        let expected = read("diffusers");
        assert_eq!(expected.format, Format::Diffusers);
        for layout in ["kohya", "comfyui"] {
            let found = read(layout);
            assert_eq!(found.family.map(|family| family.name), Some(name), "{layout}");
            same(&found.adapter, &expected.adapter, &format!("{name}, {layout}"));
        }
        // Factors that layers share are written once, and come back as they were.
        let kohya = SafetensorsFile::open(golden(&format!("{name}_lora_kohya"))).unwrap();
        let path = folder.path().join(format!("{name}.safetensors"));
        let family = read("kohya").family;
        adapter::kohya::write(&path, &read("kohya").adapter, family, DType::F16).unwrap();
        let written = SafetensorsFile::open(&path).unwrap();
        assert_eq!(written.names().collect::<Vec<_>>(), kohya.names().collect::<Vec<_>>(), "{name}");
        for tensor in kohya.names().filter(|tensor| !tensor.ends_with("alpha")) {
            assert_eq!(written.get(tensor).unwrap().bytes(), kohya.get(tensor).unwrap().bytes(), "{name}: {tensor}");
        }
        // diffusers' layout comes back too.
        adapter::write(&path, &expected.adapter, Format::Diffusers, DType::F32).unwrap();
        same(&adapter::read(&path).unwrap().adapter, &expected.adapter, name);
    }
}

/// Merged into either tree an adapter of any layout changes the same weights by the same numbers.
#[test]
fn merges_into_both_trees_are_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let variants = VariantRegistry::default();
    for name in FAMILIES {
        let mut merged = Vec::new();
        for (base, layout) in [
            (name.to_owned(), "diffusers"),
            (format!("{name}_original"), "kohya"),
            (format!("{name}_original"), "diffusers"),
        ] {
            let adapter = adapter::read(golden(&format!("{name}_lora_{layout}"))).unwrap().adapter;
            let weighted = Weighted { name: layout.into(), adapter, strength: Strength::from(0.75) };
            let out = folder.path().join(format!("{base}_{layout}.safetensors"));
            merge::merge(golden(&base), &[weighted], &out, &MergeOptions::default(), &variants, &|_, _| {}).unwrap();
            merged.push(Checkpoint::open(&out).unwrap());
        }
        let before = Checkpoint::open(golden(name)).unwrap();
        let transformer = |checkpoint: &Checkpoint, weight: &str| {
            checkpoint.component(Component::TRANSFORMER).unwrap().values(weight).unwrap()
        };
        let mut changed = 0;
        for weight in before.component(Component::TRANSFORMER).unwrap().names() {
            let first = transformer(&merged[0], weight);
            changed += usize::from(first != transformer(&before, weight));
            for other in &merged[1..] {
                assert_eq!(transformer(other, weight), first, "{name}: {weight}");
            }
        }
        let modules = adapter::read(golden(&format!("{name}_lora_diffusers"))).unwrap().adapter.modules.len();
        assert_eq!(changed, modules, "{name}");
    }
}

/// Layers that were trained with factors of their own lie in one layer in kohya's tree: the file's module has the ranks
/// of all, each on its rows, and reading gives them back.
#[test]
fn separate_factors_are_put_into_one_module_and_taken_out_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let mut separate = adapter::read(golden("flux_lora_diffusers")).unwrap().adapter;
    for (index, module) in separate.modules.values_mut().enumerate() {
        let down = &module.tensors["down"];
        let values = down.to_f32().iter().map(|value| value + index as f32 / 16.0).collect();
        let changed = lora_core::HostTensor::from_f32(down.shape(), values).unwrap();
        module.tensors.insert("down".into(), changed);
        // And scales of their own.
        module.alpha = 1.0 + (index % 3) as f64;
    }
    // One of three is not adapted.
    let left_out = ModulePath::new(Component::TRANSFORMER, "transformer_blocks.0.attn.to_k");
    separate.modules.remove(&left_out).unwrap();
    let family = adapter::family(&separate);
    assert_eq!(family.map(|family| family.name), Some("flux"));
    let notes = adapter::kohya::write(&path, &separate, family, DType::F32).unwrap();
    assert!(notes[0].contains("one module of their ranks together"), "{notes:?}");
    let file = SafetensorsFile::open(&path).unwrap();
    assert_eq!(file.shape("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"), Some([8, 8].as_slice()));
    assert_eq!(file.shape("lora_unet_single_blocks_0_linear1.lora_down.weight"), Some([16, 8].as_slice()));
    assert_eq!(file.shape("lora_unet_single_blocks_0_linear1.lora_up.weight"), Some([56, 16].as_slice()));
    let back = adapter::read(&path).unwrap().adapter;
    same(&back, &separate, "separate");
    let ranks = |adapter: &Adapter| adapter.modules.values().map(|module| module.rank).collect::<Vec<_>>();
    assert_eq!(ranks(&back), ranks(&separate));
}

#[test]
fn adapters_are_held_against_image_models_in_gguf() {
    let base = golden("flux_quantised").with_extension("gguf");
    let matches = |module: &str, width: usize| {
        let tensor = |shape: [usize; 2]| HostTensor::zeros(shape);
        let lora = AdapterModule::of_factors(tensor([2, width]), tensor([32, 2]), false, 2, 2.0);
        let path = ModulePath::new(Component::TRANSFORMER, module);
        let adapter = Adapter { modules: BTreeMap::from([(path, lora)]), ..Adapter::default() };
        merge::matches(&base, adapter).map_err(|error| error.to_string())
    };
    matches("transformer_blocks.0.attn.to_out.0", 32).unwrap();
    let error = matches("transformer_blocks.99.attn.to_out.0", 32).unwrap_err();
    assert!(error.contains("transformer_blocks.99"), "{error}");
    let error = matches("transformer_blocks.0.attn.to_out.0", 33).unwrap_err();
    assert!(error.contains("do not fit"), "{error}");
}
