//! FLUX.2 klein: whole runs on a tiny model of its kind, twenty steps against PyTorch, diffusers and PEFT, and memory at the
//! published sizes. The numbers of its networks are held by lora-models' test of the same name, those of captions and samples
//! beside the base.

mod common;

use lora_core::DType;
use lora_io::family::flux2;
use lora_io::safetensors::SafetensorsFile;
use lora_models::layers::Pass;
use lora_models::networks::{Flux2, Flux2Conditions};
use lora_models::synthetic::SyntheticFlux2;
use lora_models::weights::{SyntheticWeights, Weights};
use lora_torch::tch::{Device, Kind};

use common::flow::{
    QWEN, Trajectory, add_tokenizer, base, every_way_trains, given, goes_on_from_its_own_file, is_refused, planned,
    single_files, whole_run,
};
use common::{losses, prepare, refusal};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../lora-models/tests/golden/flux2/expected.safetensors");

/// Pictures, and a base of FLUX.2 klein's kind in a diffusers folder.
fn workspace() -> tempfile::TempDir {
    common::flow::workspace(|folder| SyntheticFlux2::tiny().write(folder, DType::F32).unwrap(), QWEN, "tokenizer")
}

#[test]
fn twenty_steps_are_those_of_pytorch() {
    let golden = SafetensorsFile::open(GOLDEN).unwrap();
    let weights = SyntheticWeights::new("transformer");
    let config = SyntheticFlux2::tiny().transformer;
    let network = Flux2::new(&Weights::new(&weights, Kind::Float, Device::Cpu), config).unwrap();
    let (context, levels) = (given("input.train.context", &[2, 12, 96]), common::flow::levels(&golden));
    let run = Trajectory { golden: &golden, last: "trajectory.final", latents: [2, 32, 8, 8], levels: &levels };
    let trained = run.is_followed(network, |network, noised, sigmas| {
        let conditions = Flux2Conditions { sigmas, context: &context, guidance: None };
        Ok(network.forward(noised, &conditions, &Pass::default())?)
    });
    assert_eq!(trained, 16);
}

#[test]
fn runs_are_trained_saved_resumed_planned_and_sampled() {
    let folder = workspace();
    let (stored, metadata) = whole_run(folder.path(), &["max_sequence_length=40"], &flux2::FAMILY, 16);
    let said = |key: &str| metadata.get(key).map(String::as_str);
    assert_eq!(said("ss_base_model_version"), Some("flux_2_klein_4b"));
    assert_eq!(said("modelspec.architecture"), Some("Flux.2-klein-4b/lora"));
    assert_eq!((said("modelspec.prediction_type"), said("ss_timestep_sampling")), (None, Some("flux_shift")));
    // The original tree, where queries, keys and values are one layer, with the ranks of all of them.
    assert_eq!(stored.shape("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"), Some([12, 64].as_slice()));
    assert_eq!(stored.shape("lora_unet_single_blocks_1_linear1.lora_down.weight"), Some([4, 64].as_slice()));
    assert!(stored.names().all(|name| name.starts_with("lora_unet_")));
}

#[test]
fn weights_in_few_bytes_checkpoints_masks_and_captions_that_change_all_train() {
    every_way_trains(workspace().path(), &["max_sequence_length=40"], &[], "discrete_flow_shift=8");
}

/// Parts that are published as files of their own, and their prefixes in files of all.
const PARTS: [(&str, &str); 2] = [("qwen_3_4b", "text_encoders.qwen3_4b.transformer."), ("ae", "vae.")];

#[test]
fn files_of_every_layout_are_the_same_base() {
    let folder = workspace();
    let [transformer, text, vae, all] = single_files(folder.path(), &PARTS).try_into().unwrap();
    let stored = |file: &str, name: &str| SafetensorsFile::open(file).unwrap().contains(name);
    assert!(stored(&transformer, "double_blocks.0.img_attn.qkv.weight"));
    assert!(stored(&vae, "encoder.quant_conv.weight") && stored(&vae, "bn.running_mean"));
    let length = "max_sequence_length=24";
    let expected = losses(folder.path(), &[length]);
    let tokenizer = format!("tokenizer={}", base(folder.path()).join("tokenizer").display());
    let (text, vae) = (format!("text_encoder={text}"), format!("vae={vae}"));
    let of = |base: &str, keys: &[&str]| losses(folder.path(), &[&[base, length], keys].concat());
    let transformer = format!("base_model={transformer}");
    assert_eq!(of(&transformer, &[&text, &vae, &tokenizer]), expected);
    assert_eq!(of(&format!("base_model={all}"), &[&tokenizer]), expected);

    let says = |keys: &[&str], words: &[&str]| is_refused(folder.path(), keys, words);
    says(&[&transformer], &["FLUX.2 without an autoencoder", "set vae to"]);
    says(&[&transformer, &vae], &["without a text encoder", "set text_encoder to", "Qwen3 4B"]);
    says(&[&transformer, &vae, &text], &["without a tokenizer", "set tokenizer to"]);
}

#[test]
fn bases_that_are_not_to_be_trained_are_refused_or_named() {
    let folder = workspace();
    let notes = |of_folder: &[(&str, &str)]| {
        of_folder.iter().for_each(|(name, text)| std::fs::write(base(folder.path()).join(name), text).unwrap());
        prepare(folder.path(), &["max_sequence_length=24"]).summary().notes.join("\n")
    };
    assert!(!notes(&[]).contains("distilled"));
    let said = notes(&[("model_index.json", "{\"is_distilled\": true}")]);
    assert!(said.contains("distilled to four steps") && said.contains("FLUX.2-klein-base"), "{said}");
    assert!(!notes(&[("model_index.json", "{\"is_distilled\": false}")]).contains("distilled"));

    let mut dev = SyntheticFlux2::tiny();
    dev.transformer.guidance = true;
    dev.write(&base(folder.path()), DType::F32).unwrap();
    let error = refusal(folder.path(), &[]);
    assert!(error.contains("FLUX.2 dev") && error.contains("klein 4B and 9B"), "{error}");
}

#[test]
fn a_text_encoder_and_a_vocabulary_of_another_base_are_named_before_anything_is_loaded() {
    let folder = workspace();
    let other = folder.path().join("other");
    let mut model = SyntheticFlux2::tiny();
    model.text_encoder["hidden_size"] = 48.into();
    model.write(&other, DType::F32).unwrap();
    add_tokenizer(&other, QWEN, "tokenizer");
    let error = refusal(folder.path(), &[&format!("text_encoder={}", other.join("text_encoder").display())]);
    for words in ["other/text_encoder: a text encoder of 48", "one of 32", "set text_encoder"] {
        assert!(error.contains(words), "{error}");
    }
    // Qwen2.5's has no such token.
    let vocabulary = other.join("tokenizer/tokenizer.json");
    let text = std::fs::read_to_string(&vocabulary).unwrap().replace("<think>", "<thank>");
    std::fs::write(&vocabulary, text).unwrap();
    let error = refusal(folder.path(), &[&format!("tokenizer={}", other.join("tokenizer").display())]);
    for words in ["without `<think>`", "Qwen3 4B", "set tokenizer"] {
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_run_goes_on_from_its_own_file() {
    goes_on_from_its_own_file(workspace().path(), &["max_sequence_length=24"]);
}

#[test]
fn the_published_models_fit_small_cards() {
    let workspace = workspace();
    let of = |model: SyntheticFlux2, bounds: &[(usize, &[&str], f64)]| {
        let folder = tempfile::tempdir().unwrap();
        model.write_headers(folder.path()).unwrap();
        add_tokenizer(folder.path(), QWEN, "tokenizer");
        for &(side, keys, most) in bounds {
            let found = planned(workspace.path(), folder.path(), side, keys);
            assert!(found <= most, "{side} {keys:?}: {found:.2} GiB of {most}");
        }
    };
    let (offload, tiles) = ("offload_base=true", "vae_tiling=true");
    of(
        SyntheticFlux2::klein_4b(),
        &[(512, &[], 4.0), (1024, &[tiles], 5.0), (512, &[offload, tiles], 2.6), (1024, &[offload, tiles], 3.2)],
    );
    of(SyntheticFlux2::klein_9b(), &[(512, &[], 8.0), (1024, &[tiles], 9.0)]);
}
