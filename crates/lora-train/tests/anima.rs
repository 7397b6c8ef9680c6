//! Anima: whole runs on a tiny model of its kind, twenty steps against PyTorch, diffusers and PEFT, and memory at the published
//! sizes. The numbers of its networks are held by lora-models' test of the same name, those of captions and samples beside the base.

mod common;

use lora_core::DType;
use lora_io::family::anima;
use lora_io::safetensors::SafetensorsFile;
use lora_models::layers::Pass;
use lora_models::networks::{Cosmos, CosmosConditions};
use lora_models::synthetic::SyntheticAnima;
use lora_models::weights::{SyntheticWeights, Weights};
use lora_torch::tch::{Device, Kind};

use common::flow::{
    QWEN, T5, Trajectory, add_tokenizer, base, every_way_trains, fits, given, goes_on_from_its_own_file, is_refused,
    rows_are_as_long_as_captions, single_files, whole_run,
};
use common::losses;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../lora-models/tests/golden/anima/expected.safetensors");

/// Pictures, and a base of Anima's kind in a diffusers folder.
fn workspace() -> tempfile::TempDir {
    let write = |folder: &std::path::Path| SyntheticAnima::tiny().write(folder, DType::F32).unwrap();
    let folder = common::flow::workspace(write, QWEN, "tokenizer");
    add_tokenizer(&base(folder.path()), T5, "t5_tokenizer");
    folder
}

#[test]
fn twenty_steps_are_those_of_pytorch() {
    let golden = SafetensorsFile::open(GOLDEN).unwrap();
    let weights = SyntheticWeights::new("transformer");
    let config = SyntheticAnima::tiny().transformer;
    let network = Cosmos::new(&Weights::new(&weights, Kind::Float, Device::Cpu), config).unwrap();
    let (context, levels) = (given("input.train.context", &[2, 12, 32]), common::flow::levels(&golden));
    let run = Trajectory { golden: &golden, last: "trajectory.final", latents: [2, 16, 8, 8], levels: &levels };
    let trained = run.is_followed(network, |network, noised, sigmas| {
        Ok(network.forward(noised, &CosmosConditions { sigmas, context: &context }, &Pass::default())?)
    });
    assert_eq!(trained, 20);
}

#[test]
fn runs_are_trained_saved_resumed_planned_and_sampled() {
    let folder = workspace();
    let (stored, metadata) = whole_run(folder.path(), &[], &anima::FAMILY, 20);
    let said = |key: &str| metadata.get(key).map(String::as_str);
    assert_eq!(said("ss_base_model_version"), Some("anima"));
    assert_eq!(said("modelspec.architecture"), Some("anima-preview/lora"));
    for name in ["self_attn_q_proj", "cross_attn_output_proj", "mlp_layer2"] {
        assert!(stored.contains(&format!("lora_unet_blocks_1_{name}.lora_down.weight")), "{name}");
    }
    assert!(stored.names().all(|name| name.starts_with("lora_unet_blocks_")));
}

#[test]
fn weights_in_few_bytes_checkpoints_masks_and_captions_that_change_all_train() {
    every_way_trains(workspace().path(), &[], &[], "max_sequence_length=4");
}

#[test]
fn empty_captions_and_those_of_other_lengths_train() {
    rows_are_as_long_as_captions(workspace().path());
}

/// Parts that are published as files of their own, and their prefixes in files of all.
const PARTS: [(&str, &str); 2] = [("qwen_3_06b", "text_encoders.qwen3_06b.transformer."), ("vae", "vae.")];

#[test]
fn files_of_every_layout_are_the_same_base() {
    let folder = workspace();
    let [transformer, text, vae, all] = single_files(folder.path(), &PARTS).try_into().unwrap();
    let original = SafetensorsFile::open(&transformer).unwrap();
    for name in ["blocks.0.adaln_modulation_mlp.2.weight", "llm_adapter.blocks.1.cross_attn.k_proj.weight"] {
        assert!(original.contains(name), "{name}");
    }
    let expected = losses(folder.path(), &[]);
    let own = |name: &str| base(folder.path()).join(name).display().to_string();
    let tokenizer = format!("tokenizer={}", own("tokenizer"));
    let t5 = format!("t5_tokenizer={}", own("t5_tokenizer"));
    let (text, vae) = (format!("text_encoder={text}"), format!("vae={vae}"));
    let of = |base: &str, keys: &[&str]| losses(folder.path(), &[&[base], keys].concat());
    let transformer = format!("base_model={transformer}");
    assert_eq!(of(&transformer, &[&text, &vae, &tokenizer, &t5]), expected);
    assert_eq!(of(&format!("base_model={all}"), &[&tokenizer, &t5]), expected);

    let says = |keys: &[&str], words: &[&str]| is_refused(folder.path(), keys, words);
    says(&[&transformer], &["Anima without an autoencoder", "set vae to"]);
    says(&[&transformer, &vae], &["without a text encoder", "set text_encoder to", "Qwen3 0.6B"]);
    says(&[&transformer, &vae, &text], &["without a tokenizer", "set tokenizer to"]);
    says(&[&transformer, &vae, &text, &tokenizer], &["without T5's tokenizer", "set t5_tokenizer to"]);
}

#[test]
fn a_run_goes_on_from_its_own_file() {
    goes_on_from_its_own_file(workspace().path(), &[]);
}

#[test]
fn the_published_model_fits_small_cards() {
    let (folder, workspace) = (tempfile::tempdir().unwrap(), workspace());
    SyntheticAnima::full().write_headers(folder.path()).unwrap();
    add_tokenizer(folder.path(), QWEN, "tokenizer");
    add_tokenizer(folder.path(), T5, "t5_tokenizer");
    let (offload, tiles) = ("offload_base=true", "vae_tiling=true");
    let plans: &[(usize, &[&str], f64)] =
        &[(512, &[], 2.1), (512, &[offload, tiles], 1.1), (1024, &[tiles], 2.8), (1024, &[offload, tiles], 1.8)];
    fits(workspace.path(), folder.path(), plans);
}
