//! Qwen-Image: whole runs on a tiny model of its kind, twenty steps against PyTorch, diffusers and PEFT, and memory at the
//! published sizes. The numbers of its networks are held by lora-models' test of the same name, those of captions and samples
//! beside the base.

mod common;

use lora_core::DType;
use lora_io::family::qwen_image;
use lora_io::safetensors::SafetensorsFile;
use lora_models::layers::Pass;
use lora_models::networks::{QwenImage, QwenImageConditions};
use lora_models::synthetic::SyntheticQwenImage;
use lora_models::weights::{SyntheticWeights, Weights};
use lora_torch::tch::{Device, Kind, Tensor};

use common::flow::{
    QWEN, Trajectory, add_tokenizer, base, every_way_trains, fits, given, goes_on_from_its_own_file, is_refused,
    single_files, whole_run,
};
use common::losses;

const GOLDEN: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../lora-models/tests/golden/qwen_image/expected.safetensors");

/// Pictures, and a base of Qwen-Image's kind in a diffusers folder.
fn workspace() -> tempfile::TempDir {
    common::flow::workspace(|folder| SyntheticQwenImage::tiny().write(folder, DType::F32).unwrap(), QWEN, "tokenizer")
}

#[test]
fn twenty_steps_are_those_of_pytorch() {
    let golden = SafetensorsFile::open(GOLDEN).unwrap();
    let weights = SyntheticWeights::new("transformer");
    let config = SyntheticQwenImage::tiny().transformer;
    let network = QwenImage::new(&Weights::new(&weights, Kind::Float, Device::Cpu), config).unwrap();
    let (context, lengths) = (given("input.train.context", &[2, 12, 32]), Tensor::from_slice(&[12i64, 9]));
    let levels = common::flow::levels(&golden);
    let run = Trajectory { golden: &golden, last: "trajectory.final", latents: [2, 16, 8, 8], levels: &levels };
    let trained = run.is_followed(network, |network, noised, sigmas| {
        let conditions = QwenImageConditions { sigmas, context: &context, lengths: Some(&lengths) };
        Ok(network.forward(noised, &conditions, &Pass::default())?)
    });
    assert_eq!(trained, 24);
}

#[test]
fn runs_are_trained_saved_resumed_planned_and_sampled() {
    let folder = workspace();
    let (stored, metadata) = whole_run(folder.path(), &["max_sequence_length=64"], &qwen_image::FAMILY, 24);
    let said = |key: &str| metadata.get(key).map(String::as_str);
    assert_eq!(said("ss_base_model_version"), Some("qwen_image"));
    assert_eq!(said("modelspec.architecture"), Some("Qwen-Image/lora"));
    assert_eq!((said("modelspec.prediction_type"), said("ss_timestep_sampling")), (None, Some("flux_shift")));
    assert!(stored.contains("lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight"));
    assert!(stored.names().all(|name| name.starts_with("lora_unet_")));
}

#[test]
fn weights_in_few_bytes_checkpoints_masks_and_captions_that_change_all_train() {
    every_way_trains(workspace().path(), &[], &[], "discrete_flow_shift=8");
}

/// Parts that are published as files of their own, and their prefixes in files of all.
const PARTS: [(&str, &str); 2] = [("qwen_2.5_vl", "text_encoders.qwen25_7b.transformer."), ("vae", "vae.")];

#[test]
fn files_of_every_layout_are_the_same_base() {
    let folder = workspace();
    let [transformer, _, vae, _] = single_files(folder.path(), &PARTS).try_into().unwrap();
    let stored = |file: &str, name: &str| SafetensorsFile::open(file).unwrap().contains(name);
    assert!(
        stored(&vae, "encoder.downsamples.0.residual.2.weight") && stored(&vae, "decoder.upsamples.3.resample.1.bias")
    );
    let expected = losses(folder.path(), &[]);
    let (vae, base_model) = (format!("vae={vae}"), format!("base_model={transformer}"));
    let of = |keys: &[&str]| losses(folder.path(), &[&[&*base_model], keys].concat());
    // The text encoder's folder: no shape of its file shows how wide a head is where that is not the published one's 128.
    let folder_of = |name: &str| base(folder.path()).join(name).display().to_string();
    let text = format!("text_encoder={}", folder_of("text_encoder"));
    let tokenizer = format!("tokenizer={}", folder_of("tokenizer"));
    assert_eq!(of(&[&text, &vae, &tokenizer]), expected);
    let own = base(folder.path()).display().to_string();
    assert_eq!(of(&[&format!("text_encoder={own}"), &format!("vae={own}")]), expected);

    let says = |keys: &[&str], words: &[&str]| is_refused(folder.path(), keys, words);
    says(&[&base_model], &["Qwen-Image without an autoencoder", "set vae to"]);
    says(&[&base_model, &vae], &["without a text encoder", "set text_encoder to", "Qwen2.5-VL 7B"]);
}

#[test]
fn a_run_goes_on_from_its_own_file() {
    goes_on_from_its_own_file(workspace().path(), &[]);
}

#[test]
fn the_published_model_fits_small_cards_from_host_memory() {
    let (folder, workspace) = (tempfile::tempdir().unwrap(), workspace());
    SyntheticQwenImage::full().write_headers(folder.path()).unwrap();
    add_tokenizer(folder.path(), QWEN, "tokenizer");
    let (offload, tiles) = ("offload_base=true", "vae_tiling=true");
    let plans: &[(usize, &[&str], f64)] = &[
        (512, &[offload, tiles], 5.0),
        (1024, &[offload, tiles], 5.0),
        (512, &[], 14.0),
        (1024, &[tiles, "optimizer=adamw8bit"], 15.0),
    ];
    fits(workspace.path(), folder.path(), plans);
}
