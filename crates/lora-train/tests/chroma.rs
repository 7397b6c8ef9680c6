//! Chroma: whole runs on a tiny model of its kind, captions of other lengths, twenty steps against PyTorch, diffusers and PEFT, and
//! memory at the published sizes. The numbers of its networks are held by lora-models' tests `flux` and `t5`, those of captions and
//! samples beside the base.

mod common;

use lora_core::DType;
use lora_io::family::chroma;
use lora_io::safetensors::SafetensorsFile;
use lora_models::layers::Pass;
use lora_models::networks::{Flux, FluxConditions};
use lora_models::synthetic::SyntheticChroma;
use lora_models::weights::{SyntheticWeights, Weights};
use lora_torch::tch::{Device, Kind, Tensor};

use common::flow::{
    T5, Trajectory, add_tokenizer, base, every_way_trains, fits, given, goes_on_from_its_own_file, is_refused,
    rows_are_as_long_as_captions, single_files, whole_run,
};
use common::losses;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../lora-models/tests/golden/chroma/expected.safetensors");

/// Pictures, and a base of Chroma's kind in a diffusers folder.
fn workspace() -> tempfile::TempDir {
    let write = |folder: &std::path::Path| SyntheticChroma::tiny().write(folder, DType::F32).unwrap();
    common::flow::workspace(write, T5, "tokenizer")
}

#[test]
fn twenty_steps_are_those_of_pytorch() {
    let golden = SafetensorsFile::open(GOLDEN).unwrap();
    let weights = SyntheticWeights::new("transformer");
    let config = SyntheticChroma::tiny().transformer;
    let network = Flux::new(&Weights::new(&weights, Kind::Float, Device::Cpu), config).unwrap();
    let (context, lengths) = (given("input.train.context", &[2, 12, 48]), Tensor::from_slice(&[12i64, 9]));
    let levels = common::flow::levels(&golden);
    let run = Trajectory { golden: &golden, last: "trajectory.final", latents: [2, 16, 8, 8], levels: &levels };
    let trained = run.is_followed(network, |network, noised, sigmas| {
        let (context, lengths) = (&context, Some(&lengths));
        let conditions = FluxConditions { sigmas, context, pooled: None, guidance: None, lengths };
        Ok(network.forward(noised, &conditions, &Pass::default())?)
    });
    assert_eq!(trained, 34);
}

#[test]
fn runs_are_trained_saved_resumed_planned_and_sampled() {
    let folder = workspace();
    let (stored, metadata) = whole_run(folder.path(), &[], &chroma::FAMILY, 34);
    let said = |key: &str| metadata.get(key).map(String::as_str);
    assert_eq!(said("ss_base_model_version"), Some("chroma"));
    assert_eq!(said("modelspec.architecture"), Some("chroma/lora"));
    assert_eq!(stored.shape("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"), Some([12, 64].as_slice()));
    assert!(stored.names().all(|name| name.starts_with("lora_unet_")));
}

#[test]
fn weights_in_few_bytes_checkpoints_masks_and_captions_that_change_all_train() {
    every_way_trains(workspace().path(), &[], &[], "max_sequence_length=4");
}

#[test]
fn rows_are_as_long_as_captions_whatever_their_greatest_length() {
    rows_are_as_long_as_captions(workspace().path());
}

/// Parts that are published as files of their own, and their prefixes in files of all.
const PARTS: [(&str, &str); 2] = [("t5xxl", "text_encoders.t5xxl.transformer."), ("ae", "vae.")];

#[test]
fn files_of_every_layout_are_the_same_base() {
    let folder = workspace();
    let [transformer, t5, vae, all] = single_files(folder.path(), &PARTS).try_into().unwrap();
    let original = SafetensorsFile::open(&transformer).unwrap();
    for name in ["double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.norms.1.scale"] {
        assert!(original.contains(name), "{name}");
    }
    let expected = losses(folder.path(), &[]);
    let tokenizer = format!("tokenizer={}", base(folder.path()).join("tokenizer").display());
    let (t5, vae) = (format!("text_encoder={t5}"), format!("vae={vae}"));
    let of = |base: &str, keys: &[&str]| losses(folder.path(), &[&[base], keys].concat());
    let transformer = format!("base_model={transformer}");
    assert_eq!(of(&transformer, &[&t5, &vae, &tokenizer]), expected);
    assert_eq!(of(&format!("base_model={all}"), &[&tokenizer]), expected);

    let says = |keys: &[&str], words: &[&str]| is_refused(folder.path(), keys, words);
    says(&[&transformer], &["Chroma without an autoencoder", "set vae to"]);
    says(&[&transformer, &vae], &["without a text encoder", "set text_encoder to", "T5-XXL"]);
    says(&[&transformer, &vae, &t5], &["without a tokenizer", "set tokenizer to"]);
}

#[test]
fn a_run_goes_on_from_its_own_file() {
    goes_on_from_its_own_file(workspace().path(), &[]);
}

#[test]
fn the_published_model_fits_small_cards() {
    let (folder, workspace) = (tempfile::tempdir().unwrap(), workspace());
    SyntheticChroma::full().write_headers(folder.path()).unwrap();
    add_tokenizer(folder.path(), T5, "tokenizer");
    let (offload, tiles) = ("offload_base=true", "vae_tiling=true");
    let plans: &[(usize, &[&str], f64)] =
        &[(512, &[], 6.9), (512, &[offload, tiles], 3.0), (1024, &[tiles], 8.5), (1024, &[offload, tiles], 3.8)];
    fits(workspace.path(), folder.path(), plans);
}
