//! FLUX.1: whole runs on a tiny model of its kind, twenty steps against PyTorch, diffusers and PEFT, and memory at the
//! published sizes. The numbers of its networks are held by lora-models' test of the same name.

mod common;

use lora_core::DType;
use lora_io::family::flux;
use lora_io::safetensors::SafetensorsFile;
use lora_models::layers::Pass;
use lora_models::networks::{Flux, FluxConditions};
use lora_models::synthetic::SyntheticFlux;
use lora_models::weights::{SyntheticWeights, Weights};
use lora_torch::tch::{Device, Kind, Tensor};

use common::flow::{
    T5, Trajectory, add_tokenizer, base, every_way_trains, fits, given, goes_on_from_its_own_file, is_refused,
    single_files, whole_run,
};
use common::losses;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../lora-models/tests/golden/transformers");

/// Pictures, and a base of FLUX.1's kind in a diffusers folder.
fn workspace() -> tempfile::TempDir {
    let write = |folder: &std::path::Path| SyntheticFlux::tiny().write(folder, DType::F32).unwrap();
    common::flow::workspace(write, T5, "tokenizer_2")
}

#[test]
fn twenty_steps_are_those_of_pytorch() {
    let golden = SafetensorsFile::open(format!("{GOLDEN}/flux_dev.safetensors")).unwrap();
    let weights = SyntheticWeights::new("transformer");
    let config = SyntheticFlux::tiny().transformer;
    let network = Flux::new(&Weights::new(&weights, Kind::Float, Device::Cpu), config).unwrap();
    let (context, pooled) = (given("input.train.context", &[2, 12, 48]), given("input.train.pooled", &[2, 40]));
    let guidance = Tensor::from_slice(&[3.5f32; 2]);
    let levels = |step: usize| [(step as f64 + 0.5) / 20.0, ((7 * step) % 20) as f64 / 20.0 + 0.025];
    let run = Trajectory { golden: &golden, last: "trajectory", latents: [2, 16, 8, 8], levels: &levels };
    let trained = run.is_followed(network, |network, noised, sigmas| {
        let (context, pooled, guidance) = (&context, Some(&pooled), Some(&guidance));
        let conditions = FluxConditions { sigmas, context, pooled, guidance, lengths: None };
        Ok(network.forward(noised, &conditions, &Pass::default())?)
    });
    assert_eq!(trained, 34);
}

#[test]
fn runs_are_trained_saved_resumed_planned_and_sampled() {
    let folder = workspace();
    let (stored, metadata) = whole_run(folder.path(), &["max_sequence_length=40"], &flux::FAMILY, 34);
    let said = |key: &str| metadata.get(key).map(String::as_str);
    assert_eq!(said("ss_base_model_version"), Some("flux1"));
    assert_eq!(said("modelspec.architecture"), Some("flux-1-dev/lora"));
    assert_eq!((said("modelspec.prediction_type"), said("ss_guidance_scale")), (None, Some("1")));
    // The original tree, where queries, keys and values are one layer, with the ranks of all of them.
    assert_eq!(stored.shape("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"), Some([12, 64].as_slice()));
    assert_eq!(stored.shape("lora_unet_single_blocks_1_linear1.lora_down.weight"), Some([16, 64].as_slice()));
    assert!(stored.names().all(|name| name.starts_with("lora_unet_")));
}

#[test]
fn weights_in_few_bytes_checkpoints_masks_and_captions_that_change_all_train() {
    every_way_trains(workspace().path(), &["max_sequence_length=24"], &[], "guidance_scale=3.5");
}

/// Parts that are published as files of their own, and their prefixes in files of all.
const PARTS: [(&str, &str); 3] =
    [("clip_l", "text_encoders.clip_l.transformer."), ("t5xxl", "text_encoders.t5xxl.transformer."), ("ae", "vae.")];

#[test]
fn files_of_every_layout_are_the_same_base() {
    let folder = workspace();
    let [transformer, clip, t5, vae, all] = single_files(folder.path(), &PARTS).try_into().unwrap();
    assert!(SafetensorsFile::open(&transformer).unwrap().contains("double_blocks.0.img_attn.qkv.weight"));
    let length = "max_sequence_length=24";
    let expected = losses(folder.path(), &[length]);
    let tokenizer = format!("tokenizer={}", base(folder.path()).join("tokenizer_2").display());
    let (clip, t5) = (format!("text_encoder={clip}"), format!("text_encoder_2={t5}"));
    let vae = format!("vae={vae}");
    let of = |base: &str, keys: &[&str]| losses(folder.path(), &[&[base, length], keys].concat());
    let transformer = format!("base_model={transformer}");
    assert_eq!(of(&transformer, &[&clip, &t5, &vae, &tokenizer]), expected);
    assert_eq!(of(&format!("base_model={all}"), &[&tokenizer]), expected);

    let says = |keys: &[&str], words: &[&str]| is_refused(folder.path(), keys, words);
    says(&[&transformer], &["FLUX.1 without an autoencoder", "set vae to"]);
    says(&[&transformer, &vae], &["without a text encoder", "set text_encoder to", "CLIP-L"]);
    says(&[&transformer, &vae, &clip], &["without a text encoder", "set text_encoder_2 to", "T5-XXL"]);
    says(&[&transformer, &vae, &clip, &t5], &["without a tokenizer", "set tokenizer to"]);
    says(&[&transformer, &vae, &clip, &t5, "tokenizer=elsewhere"], &["`tokenizer`: elsewhere", "no tokenizer.json"]);
    says(&[&transformer, &vae, &clip, &t5, "tokenizer=some-one/elsewhere"], &["hf download some-one/elsewhere"]);
    says(&["tokenizer=elsewhere"], &["no tokenizer.json"]);
}

#[test]
fn a_run_goes_on_from_its_own_file() {
    goes_on_from_its_own_file(workspace().path(), &["max_sequence_length=24"]);
}

#[test]
fn the_published_model_fits_small_cards() {
    let (folder, workspace) = (tempfile::tempdir().unwrap(), workspace());
    SyntheticFlux::full().write_headers(folder.path()).unwrap();
    add_tokenizer(folder.path(), T5, "tokenizer_2");
    let (eight_bits, in_host) = ("optimizer=adamw8bit", "cpu_offload_checkpointing=true");
    let (offload, tiles) = ("offload_base=true", "vae_tiling=true");
    let plans: &[(usize, &[&str], f64)] = &[
        (512, &[], 8.4),
        (512, &[eight_bits], 8.0),
        (512, &[eight_bits, in_host], 7.6),
        (512, &[offload, tiles], 3.0),
        (1024, &[eight_bits, tiles], 9.5),
        (1024, &[eight_bits, in_host, tiles], 8.0),
        (1024, &[offload, tiles], 4.5),
    ];
    fits(workspace.path(), folder.path(), plans);
}
