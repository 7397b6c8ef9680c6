//! Z-Image: whole runs on a tiny model of its kind, and twenty steps against PyTorch, diffusers and PEFT. The numbers of its
//! networks are held by lora-models' test of the same name, those of captions and samples beside the base.

mod common;

use std::collections::BTreeMap;

use lora_core::{Adapter, AdapterModule, Component, DType, HostTensor, ModulePath};
use lora_io::adapter;
use lora_io::family::z_image;
use lora_io::safetensors::{SafetensorsFile, write};
use lora_models::layers::Pass;
use lora_models::networks::{ZImage, ZImageCaptions};
use lora_models::synthetic::{SyntheticModel, SyntheticZImage};
use lora_models::weights::{SyntheticWeights, Weights};
use lora_torch::tch::{Device, Kind, Tensor};

use common::flow::{
    QWEN, Trajectory, add_tokenizer, base, every_way_trains, fits, is_refused, single_files, tensor, whole_run,
};
use common::{finish, losses, prepare};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../lora-models/tests/golden/z_image");

/// Pictures, and a base of Z-Image's kind in a diffusers folder.
fn workspace() -> tempfile::TempDir {
    common::flow::workspace(|folder| SyntheticZImage::tiny().write(folder, DType::F32).unwrap(), QWEN, "tokenizer")
}

#[test]
fn twenty_steps_are_those_of_pytorch() {
    let golden = SafetensorsFile::open(format!("{GOLDEN}/expected.safetensors")).unwrap();
    let weights = SyntheticWeights::new("transformer");
    let config = SyntheticZImage::tiny().transformer;
    let network = ZImage::new(&Weights::new(&weights, Kind::Float, Device::Cpu), config).unwrap();
    let texts = [tensor(&golden, "text.0"), tensor(&golden, "text.2")];
    let lengths: Vec<i64> = texts.iter().map(|text| text.size()[0]).collect();
    let longest = lengths.iter().copied().max().unwrap();
    let states: Vec<Tensor> =
        texts.iter().map(|text| text.constant_pad_nd([0, 0, 0, longest - text.size()[0]])).collect();
    let (states, lengths) = (Tensor::stack(&states, 0), Tensor::from_slice(&lengths));
    let levels = common::flow::levels(&golden);
    let run = Trajectory { golden: &golden, last: "trajectory.final", latents: [2, 16, 8, 8], levels: &levels };
    let trained = run.is_followed(network, |network, noised, levels| {
        let captions = ZImageCaptions { states: &states, lengths: &lengths, ragged: true };
        Ok(network.forward(noised, levels, captions, &Pass::default())?)
    });
    assert_eq!(trained, 14);
}

#[test]
fn runs_are_trained_saved_resumed_planned_and_sampled() {
    let folder = workspace();
    let (stored, metadata) = whole_run(folder.path(), &[], &z_image::FAMILY, 14);
    let said = |key: &str| metadata.get(key).map(String::as_str);
    assert_eq!(said("ss_base_model_version"), Some("z_image"));
    assert_eq!(said("modelspec.architecture"), Some("Z-Image/lora"));
    assert_eq!((said("modelspec.prediction_type"), said("ss_timestep_sampling")), (None, Some("flux_shift")));
    // Names that diffusers and ComfyUI read both.
    assert!(stored.contains("diffusion_model.layers.0.attention.to_q.lora_down.weight"));
    assert!(stored.names().all(|name| name.starts_with("diffusion_model.layers.")));

    let error = prepare(folder.path(), &[]).sample(&["a cat --w 72".to_owned()]).unwrap_err().to_string();
    assert!(error.contains("72 by 64") && error.contains("multiples of 16"), "{error}");
}

#[test]
fn weights_in_few_bytes_checkpoints_masks_and_captions_that_change_all_train() {
    let folder = workspace();
    let drawn =
        ["timestep_sampling=logit_normal", "logit_mean=-0.5", "logit_std=1.2", "min_timestep=100", "max_timestep=900"];
    let more: [&[&str]; 2] = [&drawn, &["variant=lokr"]];
    every_way_trains(folder.path(), &[], &more, "discrete_flow_shift=8");
    let other = losses(folder.path(), &["timestep_sampling=shift"]);
    assert_eq!(losses(folder.path(), &["discrete_flow_shift=3"]), other);
}

/// Parts that are published as files of their own, and their prefixes in files of all.
const PARTS: [(&str, &str); 2] = [("qwen_3_4b", "text_encoders.qwen3_4b.transformer."), ("ae", "vae.")];

#[test]
fn files_of_every_layout_are_the_same_base() {
    let folder = workspace();
    let [transformer, text, vae, all] = single_files(folder.path(), &PARTS).try_into().unwrap();
    assert!(SafetensorsFile::open(&transformer).unwrap().contains("layers.0.attention.qkv.weight"));
    let expected = losses(folder.path(), &[]);
    let tokenizer = format!("tokenizer={}", base(folder.path()).join("tokenizer").display());
    let (text, vae) = (format!("text_encoder={text}"), format!("vae={vae}"));
    let of = |base: &str, keys: &[&str]| losses(folder.path(), &[&[base], keys].concat());
    let transformer = format!("base_model={transformer}");
    assert_eq!(of(&transformer, &[&text, &vae, &tokenizer]), expected);
    assert_eq!(of(&format!("base_model={all}"), &[&tokenizer]), expected);
    // Parts of a diffusers folder.
    let own = base(folder.path()).display().to_string();
    assert_eq!(of(&transformer, &[&format!("text_encoder={own}"), &format!("vae={own}")]), expected);
    let folder_of = |name: &str| base(folder.path()).join(name).display().to_string();
    let (text, vae) = (folder_of("text_encoder"), folder_of("vae"));
    assert_eq!(of(&transformer, &[&format!("text_encoder={text}"), &format!("vae={vae}")]), expected);
}

#[test]
fn what_is_missing_or_of_another_family_is_named_with_the_key_that_helps() {
    let folder = workspace();
    let [transformer, text, vae, _] = single_files(folder.path(), &PARTS).try_into().unwrap();
    let base_model = format!("base_model={transformer}");
    let (text, vae) = (format!("text_encoder={text}"), format!("vae={vae}"));
    let says = |keys: &[&str], words: &[&str]| is_refused(folder.path(), keys, words);
    says(&[&base_model], &["Z-Image without an autoencoder", "set vae to", "ae.safetensors"]);
    says(&[&base_model, &vae], &["without a text encoder", "set text_encoder to", "Qwen3 4B"]);
    says(&[&base_model, &vae, &text], &["without a tokenizer", "set tokenizer to"]);

    // Parts of other families.
    let sd1 = folder.path().join("sd1.safetensors");
    SyntheticModel::tiny().write(&sd1, DType::F16).unwrap();
    let sd1 = sd1.display().to_string();
    says(&[&base_model, &text, &format!("vae={sd1}")], &["sd1.safetensors", "Stable Diffusion 1.x"]);
    says(&[&base_model, &vae, &format!("text_encoder={sd1}")], &["sd1.safetensors", "Stable Diffusion 1.x"]);

    // Keys of other bases.
    says(&["clip_skip=2"], &["clip_skip", "Z-Image has no such key"]);
    says(&["min_snr_gamma=5"], &["min_snr_gamma", "Z-Image has no such key"]);
    says(&["train_text_encoder=true"], &["train_text_encoder", "Z-Image has no such key"]);
    says(&["discrete_flow_shift=3", "timestep_sampling=flux_shift"], &["discrete_flow_shift", "take one of both out"]);
    says(&["min_timestep=600", "max_timestep=500"], &["max_timestep", "not above"]);
    says(&["max_resolution=72"], &["max_resolution", "multiples of 16"]);
    says(
        &["enable_bucket=true", "bucket_reso_steps=8", "min_bucket_reso=32"],
        &["bucket_reso_steps", "multiple of 16"],
    );

    // A LoRA of another family.
    let mut foreign = Adapter::default();
    let path = ModulePath::new(Component::UNET, "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k");
    let tensors = BTreeMap::from([
        ("down".to_owned(), HostTensor::zeros([4, 768])),
        ("up".to_owned(), HostTensor::zeros([320, 4])),
    ]);
    foreign.modules.insert(path, AdapterModule { variant: "lora".into(), tensors, rank: 4, alpha: 4.0 });
    let file = folder.path().join("foreign.safetensors");
    adapter::write(&file, &foreign, adapter::Format::Kohya, DType::F32).unwrap();
    let init = format!("init_from={}", file.display());
    says(&[&init], &["init_from", "made for Stable Diffusion 1.x, the base is Z-Image"]);
}

#[test]
fn a_run_goes_on_from_its_own_file_and_from_fused_ones() {
    let folder = workspace();
    let first = finish(&mut prepare(folder.path(), &["target_modules=attention-mlp", "save_precision=fp32"]));
    let own = format!("init_from={}", folder.path().join("out/lora.safetensors").display());
    let (_, reports) = common::trained(folder.path(), &[&own, "target_modules=attention-mlp"]);
    assert_eq!(reports.len(), 2);

    // Queries, keys and values share their `down` in the original tree, as trainers write it there.
    let fused = folder.path().join("fused.safetensors");
    let mut tensors = BTreeMap::new();
    for layer in 0..2 {
        let of = |name: &str| {
            let path = ModulePath::new(Component::TRANSFORMER, format!("layers.{layer}.attention.{name}"));
            first.modules[&path].tensors.clone()
        };
        let ups: Vec<f32> = ["to_q", "to_k", "to_v"].iter().flat_map(|name| of(name)["up"].to_f32().to_vec()).collect();
        let name = format!("lora_unet_layers_{layer}_attention_qkv");
        tensors.insert(format!("{name}.lora_down.weight"), of("to_q")["down"].clone());
        tensors.insert(format!("{name}.lora_up.weight"), HostTensor::from_f32([192, 4], ups).unwrap());
        tensors.insert(format!("{name}.alpha"), HostTensor::from_f32([], vec![2.0]).unwrap());
        let out = of("to_out.0");
        let name = format!("lora_unet_layers_{layer}_attention_out");
        tensors.insert(format!("{name}.lora_down.weight"), out["down"].clone());
        tensors.insert(format!("{name}.lora_up.weight"), out["up"].clone());
        tensors.insert(format!("{name}.alpha"), HostTensor::from_f32([], vec![2.0]).unwrap());
    }
    write(&fused, &tensors, &BTreeMap::new()).unwrap();
    let read = adapter::read(&fused).unwrap();
    assert_eq!((read.adapter.modules.len(), read.family), (8, Some(&z_image::FAMILY)));
    for (path, module) in &read.adapter.modules {
        assert_eq!(module.tensors["up"], first.modules[path].tensors["up"], "{path}");
    }
    let init = format!("init_from={}", fused.display());
    let keys = [&*init, "lora_alpha=2", "target_modules=attention"];
    assert_eq!(common::trained(folder.path(), &keys).1.len(), 2);
}

#[test]
fn the_published_model_fits_small_cards() {
    let (folder, workspace) = (tempfile::tempdir().unwrap(), workspace());
    SyntheticZImage::full().write_headers(folder.path()).unwrap();
    add_tokenizer(folder.path(), QWEN, "tokenizer");
    let plans: &[(usize, &[&str], f64)] = &[
        (512, &[], 5.0),
        (512, &["optimizer=adamw8bit"], 4.8),
        (512, &["recompute_feed_forward=true"], 4.9),
        (1024, &["vae_tiling=true"], 6.3),
        (1024, &["vae_tiling=true", "recompute_feed_forward=true"], 6.0),
        (1024, &["vae_tiling=true", "recompute_feed_forward=true", "optimizer=adamw8bit"], 5.7),
        (1024, &["vae_tiling=true", "cpu_offload_checkpointing=true"], 5.3),
        (512, &["offload_base=true", "vae_tiling=true"], 2.8),
    ];
    fits(workspace.path(), folder.path(), plans);
}
