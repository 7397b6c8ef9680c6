//! Adapter files as other programs and failed downloads leave them: odd, and with a clear meaning; or no adapters at
//! all, which is said. Files are made here, after real ones that were reported to other projects.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lora_core::{Component, DType, ModulePath};
use lora_io::adapter::{self, Format};
use lora_io::consumers::Inventory;
use lora_io::safetensors::{SafetensorsFile, StoredDType, write};
use support::{Raw, file, random};

const KOHYA: &str = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q";

fn to_q() -> ModulePath {
    ModulePath::new(Component::UNET, "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
}

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    (folder, path)
}

/// A pair of rank 4 on a layer of 8 × 8.
fn pair(module: &str, down: &str, up: &str) -> Vec<(String, lora_core::HostTensor)> {
    vec![(format!("{module}{down}"), random(&[4, 8], 1)), (format!("{module}{up}"), random(&[8, 4], 2))]
}

fn kohya() -> Vec<(String, lora_core::HostTensor)> {
    pair(KOHYA, ".lora_down.weight", ".lora_up.weight")
}

fn put(path: &Path, tensors: Vec<(String, lora_core::HostTensor)>, metadata: &[(&str, &str)]) {
    let metadata = metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    write(path, &tensors.into_iter().collect::<BTreeMap<_, _>>(), &metadata).unwrap();
}

#[test]
fn a_header_may_be_as_long_as_a_pickle_begins() {
    let (_folder, path) = scratch();
    let tensors: BTreeMap<_, _> = kohya().into_iter().collect();
    // 0x0280, as protocol 2 of pickles; 0x213C, `<!`; 0x8B1F, gzip.
    for length in [0x0280, 0x213C, 0x8B1F_usize] {
        write(&path, &tensors, &BTreeMap::new()).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let old = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut padded = (length as u64).to_le_bytes().to_vec();
        padded.extend_from_slice(&bytes[8..8 + old]);
        padded.resize(8 + length, b' ');
        padded.extend_from_slice(&bytes[8 + old..]);
        std::fs::write(&path, padded).unwrap();
        assert_eq!(adapter::read(&path).unwrap().adapter.modules.len(), 1, "{length:#x}");
    }
}

#[test]
fn eight_bits_are_read_as_the_numbers_they_are() {
    let (folder, path) = scratch();
    // 1, -0.5, 0.875, -448 and 0.001953125, 1.75, 57344, -0.25: see `safetensors/float8.rs` for where these are from.
    let raw = Raw::default()
        .with(&format!("{KOHYA}.lora_down.weight"), StoredDType::F8E4M3, &[1, 4], vec![0x38, 0xB0, 0x36, 0xFE])
        .with(&format!("{KOHYA}.lora_up.weight"), StoredDType::F8E5M2, &[4, 1], vec![0x18, 0x3F, 0x7B, 0xB4]);
    write(&path, &raw, &BTreeMap::new()).unwrap();
    let read = adapter::read(&path).unwrap();
    let module = &read.adapter.modules[&to_q()];
    assert_eq!(*module.tensors["down"].to_f32(), [1.0, -0.5, 0.875, -448.0]);
    assert_eq!(*module.tensors["up"].to_f32(), [0.001953125, 1.75, 57344.0, -0.25]);
    assert_eq!(read.dtype(), DType::F16, "which holds all of them");
    let out = folder.path().join("b.safetensors");
    adapter::write(&out, &read.adapter, Format::Kohya, read.dtype()).unwrap();
    assert_eq!(adapter::read(&out).unwrap().adapter.modules[&to_q()].tensors, module.tensors);
    let nan = Raw::default().with(&format!("{KOHYA}.lora_down.weight"), StoredDType::F8E4M3, &[1, 1], vec![0x7F]).with(
        &format!("{KOHYA}.lora_up.weight"),
        StoredDType::F8E5M2,
        &[1, 1],
        vec![0x3C],
    );
    write(&path, &nan, &BTreeMap::new()).unwrap();
    assert!(adapter::read(&path).unwrap().undamaged().is_err());
}

#[test]
fn embeddings_packed_beside_a_lora_are_left_out_and_named() {
    let (_folder, path) = scratch();
    let mut tensors = kohya();
    for part in ["string_to_param.*", "clip_l"] {
        tensors.push((format!("bundle_emb.mycat.{part}"), random(&[2, 8], 3)));
    }
    put(&path, tensors, &[]);
    let read = adapter::read(&path).unwrap();
    assert_eq!(read.adapter.modules.keys().collect::<Vec<_>>(), [&to_q()]);
    assert!(read.notes[0].contains("`mycat`"), "{:?}", read.notes);
}

#[test]
fn a_base_embedding_that_peft_saved_beside_a_lora_is_read_over() {
    let folder = tempfile::tempdir().unwrap();
    let name = "base_model.model.model.embed_tokens";
    let tensors = [
        (format!("{name}.base_layer.weight"), random(&[16, 8], 1)),
        (format!("{name}.lora_embedding_A"), random(&[2, 16], 2)),
        (format!("{name}.lora_embedding_B"), random(&[8, 2], 3)),
    ];
    put(&folder.path().join("adapter_model.safetensors"), tensors.into(), &[]);
    std::fs::write(folder.path().join("adapter_config.json"), r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4}"#)
        .unwrap();
    let read = adapter::read(folder.path()).unwrap();
    assert_eq!(read.adapter.modules.len(), 1);
    assert!(read.notes[0].contains("base_layer"), "{:?}", read.notes);
}

#[test]
fn names_of_two_conventions_in_one_file_are_all_read() {
    let (folder, path) = scratch();
    let mut tensors = kohya();
    tensors.push((format!("{KOHYA}.alpha"), lora_core::HostTensor::from_f32([], vec![2.0]).unwrap()));
    tensors.extend(pair("unet.mid_block.attentions.0.proj_in", ".lora_A.weight", ".lora_B.weight"));
    put(&path, tensors, &[]);
    let read = adapter::read(&path).unwrap();
    let scales: Vec<_> =
        read.adapter.modules.iter().map(|(path, module)| (path.path.as_str(), module.scale())).collect();
    assert_eq!(scales, [(to_q().path.as_str(), 0.5), ("mid_block.attentions.0.proj_in", 1.0)]);
    let out = folder.path().join("b.safetensors");
    adapter::write(&out, &read.adapter, Format::Kohya, DType::F32).unwrap();
    let back = adapter::read(&out).unwrap().adapter;
    assert_eq!(back.modules.keys().collect::<Vec<_>>(), read.adapter.modules.keys().collect::<Vec<_>>());
}

#[test]
fn sd_scripts_oft_has_a_prefix_of_its_own() {
    let (_folder, path) = scratch();
    let name = KOHYA.replace("lora_unet_", "oft_unet_");
    let alpha = lora_core::HostTensor::from_f32([], vec![0.5]).unwrap();
    put(&path, vec![(format!("{name}.oft_blocks"), random(&[2, 4, 4], 1)), (format!("{name}.alpha"), alpha)], &[]);
    let read = adapter::read(&path).unwrap();
    assert_eq!(read.format, Format::Kohya);
    let module = &read.adapter.modules[&to_q()];
    assert_eq!((module.variant.as_str(), module.alpha), ("oft", 0.5));
    assert_eq!(Inventory::read(&path).unwrap().base().map(|family| family.name), Some("sd1"));
}

#[test]
fn an_alpha_in_the_header_that_no_tensor_has_is_told() {
    let (_folder, path) = scratch();
    for (alpha, told) in [("1", true), ("4", false), ("4.0", false), ("None", false)] {
        put(&path, kohya(), &[("ss_network_alpha", alpha)]);
        let read = adapter::read(&path).unwrap();
        assert_eq!(read.adapter.modules[&to_q()].scale(), 1.0, "as all loaders take it");
        let notes = read.notes.join("; ");
        assert_eq!(notes.contains("ss_network_alpha") && notes.contains("0.25"), told, "{alpha}: {notes}");
    }
    // A tensor says it: nothing to tell.
    let mut tensors = kohya();
    tensors.push((format!("{KOHYA}.alpha"), lora_core::HostTensor::from_f32([], vec![1.0]).unwrap()));
    put(&path, tensors, &[("ss_network_alpha", "4")]);
    assert!(adapter::read(&path).unwrap().notes.is_empty());
}

#[test]
fn diffusers_record_of_alphas_does_not_stay_in_other_layouts() {
    let (folder, path) = scratch();
    put(
        &path,
        pair("unet.mid_block.attentions.0.proj_in", ".lora_A.weight", ".lora_B.weight"),
        &[("lora_adapter_metadata", r#"{"unet.r": 4, "unet.lora_alpha": 2}"#)],
    );
    let read = adapter::read(&path).unwrap();
    assert_eq!(read.adapter.modules.values().next().unwrap().scale(), 0.5);
    let out = folder.path().join("b.safetensors");
    adapter::write(&out, &read.adapter, Format::Kohya, DType::F32).unwrap();
    assert!(!SafetensorsFile::open(&out).unwrap().metadata().contains_key("lora_adapter_metadata"));
}

#[test]
fn patterns_of_diffusers_record_are_expressions_as_pefts_are() {
    // The scales are those that diffusers 0.42 with PEFT 0.21 applied to files of its own.
    let (_folder, path) = scratch();
    let name = |module: &str| format!("transformer.{module}.attn.to_q");
    for (pattern, scales) in [
        (r#"{"to_q": 3}"#, [0.75, 0.75]),
        (r#"{"transformer_blocks\\.\\d+\\.attn\\.to_q": 3}"#, [2.0, 0.75]),
        (r#"{"^transformer_blocks.0.attn.to_q": 3}"#, [2.0, 0.75]),
        (r#"{".*to_q": 16}"#, [4.0, 4.0]),
        (r#"{"blocks.0.attn.to_q": 3}"#, [2.0, 2.0]),
    ] {
        let record = format!(r#"{{"transformer.lora_alpha": 8, "transformer.alpha_pattern": {pattern}}}"#);
        let modules = ["single_transformer_blocks.0", "transformer_blocks.0"];
        let pairs = modules.iter().flat_map(|module| pair(&name(module), ".lora_A.weight", ".lora_B.weight"));
        put(&path, pairs.collect(), &[("lora_adapter_metadata", &record)]);
        let read = adapter::read(&path).unwrap();
        let found: Vec<f64> = read.adapter.modules.values().map(lora_core::AdapterModule::scale).collect();
        assert_eq!(found, scales, "{pattern}");
    }
}

#[test]
fn a_pattern_of_one_module_names_no_other() {
    // FLUX.1's last layer and the last of its single blocks, in whose names PEFT finds `proj_out` too.
    let (folder, path) = scratch();
    for (rank, alpha) in [(4, 16.0), (8, 8.0)] {
        let mut tensors = Vec::new();
        for (name, rank, alpha) in [
            ("final_layer_linear", rank, alpha),
            ("single_blocks_0_linear2", 4, 4.0),
            ("single_blocks_1_linear2", 4, 4.0),
        ] {
            let module = format!("lora_unet_{name}");
            tensors.push((format!("{module}.lora_down.weight"), random(&[rank, 8], 1)));
            tensors.push((format!("{module}.lora_up.weight"), random(&[8, rank], 2)));
            tensors.push((format!("{module}.alpha"), lora_core::HostTensor::from_f32([], vec![alpha]).unwrap()));
        }
        put(&path, tensors, &[]);
        let read = adapter::read(&path).unwrap().adapter;
        let scale = |adapter: &lora_core::Adapter| {
            adapter.modules.iter().map(|(path, module)| (path.clone(), module.scale())).collect::<Vec<_>>()
        };
        let folder = folder.path().join(format!("peft{rank}"));
        adapter::write(&folder, &read, Format::Peft, DType::F32).unwrap();
        assert_eq!(scale(&adapter::read(&folder).unwrap().adapter), scale(&read));
        let config = lora_io::json::read(folder.join("adapter_config.json")).unwrap();
        let (own, field) = if rank == 8 { (8, "rank_pattern") } else { (16, "alpha_pattern") };
        assert_eq!(config[field], serde_json::json!({ "^proj_out": own }));

        let out = folder.join("d.safetensors");
        adapter::write(&out, &read, Format::Diffusers, DType::F32).unwrap();
        let back = adapter::read(&out).unwrap().adapter;
        assert!(back.modules.values().all(|module| module.scale() == 1.0), "scales are folded in");
    }
}

#[test]
fn what_is_no_adapter_is_named() {
    let (_folder, path) = scratch();
    let whole = [
        "cond_stage_model.transformer.text_model.x",
        "model.diffusion_model.input_blocks.0.0.weight",
        "alphas_cumprod",
    ];
    for (names, expected) in [
        (&whole[..], "a whole model (Stable Diffusion 1.x), not a LoRA"),
        (&["model.layers.0.mlp.up_proj.weight"], "a whole model (a language model), not a LoRA"),
        (&["down_blocks.0.resnets.0.conv1.weight"], "not a LoRA, but a U-Net alone"),
        (&["emb_params"], "a textual inversion embedding"),
        (&["clip_l", "clip_g"], "a textual inversion embedding"),
    ] {
        let tensors: Vec<_> = names.iter().map(|name| (*name, random(&[2, 2], 1))).collect();
        file(&path, &tensors);
        for error in [adapter::read(&path).unwrap_err(), Inventory::read(&path).unwrap_err()] {
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}

#[test]
fn a_model_in_gguf_is_no_adapter() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf/llama.gguf");
    for error in [adapter::read(&model).unwrap_err(), Inventory::read(&model).unwrap_err()] {
        assert!(error.to_string().contains("a whole model in GGUF, not a LoRA"), "{error}");
    }
}

#[test]
fn a_folder_that_is_no_adapters_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = || adapter::read(folder.path()).unwrap_err().to_string();
    assert!(error().contains("has no adapter_config.json"), "{}", error());
    std::fs::write(folder.path().join("config.json"), "{}").unwrap();
    assert!(error().contains("a whole model"), "{}", error());
    for name in ["unet", "text_encoder"] {
        std::fs::create_dir(folder.path().join(name)).unwrap();
        std::fs::write(folder.path().join(name).join("adapter_config.json"), "{}").unwrap();
    }
    assert!(error().contains("name one of them: text_encoder, unet"), "{}", error());
}

#[test]
fn a_damaged_module_is_named_and_nothing_is_made_of_it() {
    let (folder, path) = scratch();
    let mut tensors = kohya();
    let mut up = tensors[1].1.to_f32().into_owned();
    up[5] = f32::NAN;
    tensors[1].1 = lora_core::HostTensor::from_f32([8, 4], up).unwrap();
    put(&path, tensors, &[]);
    let read = adapter::read(&path).unwrap();
    let error = read.undamaged().unwrap_err().to_string();
    assert!(error.contains("a.safetensors") && error.contains("to_q") && error.contains("`up`"), "{error}");
    for format in Format::ALL {
        let error =
            adapter::write(folder.path().join("out"), &read.adapter, format, DType::F32).unwrap_err().to_string();
        assert!(!error.contains("fp32"), "no advice that is followed already: {error}");
    }
}

/// The paths of a file of such modules.
fn paths_of(modules: &[&str]) -> Vec<String> {
    let (_folder, path) = scratch();
    put(&path, modules.iter().flat_map(|module| pair(module, ".lora_down.weight", ".lora_up.weight")).collect(), &[]);
    let read = adapter::read(&path).unwrap().adapter;
    read.modules.keys().map(ToString::to_string).collect()
}

#[test]
fn comfyuis_names_of_text_encoders_are_those_of_their_components() {
    let layer = "encoder.layers.0.mlp.fc1";
    let t5 = "encoder.block.0.layer.0.SelfAttention.q";
    let clip = |name: &str| format!("text_encoders.{name}.transformer.text_model.{layer}");
    let t5xxl = format!("text_encoders.t5xxl.transformer.{t5}");
    let flux = ["diffusion_model.double_blocks.0.img_attn.proj", &clip("clip_l"), &t5xxl];
    assert_eq!(
        paths_of(&flux),
        [
            format!("text_encoder.text_model.{layer}"),
            format!("text_encoder_2.{t5}"),
            "transformer.transformer_blocks.0.attn.to_out.0".into()
        ]
    );
    let sd3 = ["diffusion_model.joint_blocks.0.x_block.attn.proj", &clip("clip_g"), &t5xxl];
    assert_eq!(paths_of(&sd3)[..2], [format!("text_encoder_2.text_model.{layer}"), format!("text_encoder_3.{t5}")]);
    let sd2 = ["diffusion_model.input_blocks.1.1.proj_in", &clip("clip_h")];
    assert_eq!(paths_of(&sd2)[0], format!("text_encoder.text_model.{layer}"));
}

#[test]
fn a_bias_that_comfyui_saves_beside_factors_counts_without_alpha() {
    let (folder, path) = scratch();
    let module = "diffusion_model.double_blocks.0.img_attn.qkv";
    let bias = random(&[24], 3);
    let tensors = vec![
        (format!("{module}.lora_down.weight"), random(&[4, 8], 1)),
        (format!("{module}.lora_up.weight"), random(&[24, 4], 2)),
        (format!("{module}.alpha"), lora_core::HostTensor::from_f32([], vec![2.0]).unwrap()),
        (format!("{module}.diff_b"), bias.clone()),
    ];
    put(&path, tensors, &[]);
    let read = adapter::read(&path).unwrap().adapter;
    let own: Vec<f32> = read
        .modules
        .values()
        .flat_map(|module| {
            let scale = module.scale() as f32;
            module.tensors["bias"].to_f32().iter().map(|value| value * scale).collect::<Vec<_>>()
        })
        .collect();
    // Three modules in diffusers' tree, k, q and v in the order of their names.
    let all = bias.to_f32();
    assert_eq!(own, [&all[8..16], &all[..8], &all[16..]].concat());
    let out = folder.path().join("b.safetensors");
    adapter::write(&out, &read, Format::Kohya, DType::F32).unwrap();
    let kept = SafetensorsFile::open(&out)
        .unwrap()
        .get("lora_unet_double_blocks_0_img_attn_qkv.diff_b")
        .unwrap()
        .to_host()
        .unwrap();
    assert_eq!(kept.to_f32(), all);
}

#[test]
fn the_second_encoders_folder_is_the_second_encoders() {
    let folder = tempfile::tempdir().unwrap();
    let name = |component: &str| format!("{component}.text_model.encoder.layers.0.mlp.fc1");
    let path = folder.path().join("a.safetensors");
    let names = [name("text_encoder"), name("text_encoder_2")];
    put(&path, names.iter().flat_map(|name| pair(name, ".lora_A.weight", ".lora_B.weight")).collect(), &[]);
    adapter::write(folder.path(), &adapter::read(&path).unwrap().adapter, Format::Peft, DType::F32).unwrap();
    for component in ["text_encoder", "text_encoder_2"] {
        let back = adapter::read(folder.path().join(component)).unwrap().adapter;
        assert_eq!(back.modules.keys().next().unwrap().to_string(), name(component));
    }
}

#[test]
fn alphas_of_whole_numbers_and_headers_without_metadata_are_read() {
    let (_folder, path) = scratch();
    for (dtype, bytes) in [("I32", &[2, 0, 0, 0][..]), ("U8", &[2]), ("I64", &[2, 0, 0, 0, 0, 0, 0, 0])] {
        let factors = [0u8; 4 * 8 * 4];
        let end = 2 * factors.len();
        let header = format!(
            r#"{{"__metadata__":null,"{KOHYA}.lora_down.weight":{{"dtype":"F32","shape":[4,8],"data_offsets":[0,128]}},"{KOHYA}.lora_up.weight":{{"dtype":"F32","shape":[8,4],"data_offsets":[128,256]}},"{KOHYA}.alpha":{{"dtype":"{dtype}","shape":[],"data_offsets":[{end},{}]}}}}"#,
            end + bytes.len()
        );
        let parts = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &factors, &factors, bytes];
        std::fs::write(&path, parts.concat()).unwrap();
        assert_eq!(adapter::read(&path).unwrap().adapter.modules[&to_q()].scale(), 0.5, "{dtype}");
    }
}

#[test]
fn a_control_lora_is_named() {
    let (_folder, path) = scratch();
    let mut tensors = pair("double_blocks.0.img_attn.proj", ".lora_A.weight", ".lora_B.weight");
    tensors.push(("double_blocks.0.img_attn.norm.query_norm.scale".into(), random(&[8], 3)));
    put(&path, tensors, &[]);
    let error = adapter::read(&path).unwrap_err().to_string();
    assert!(error.contains("control LoRA"), "{error}");
}
