//! Stable Diffusion 3.5: whole runs on a tiny model of its kind, every layout of its files, and memory at the published sizes. The
//! numbers of its network are held by lora-models' test of the same name.

mod common;

use lora_core::DType;
use lora_io::family::sd3;
use lora_io::safetensors::SafetensorsFile;
use lora_models::synthetic::SyntheticSd3;

use common::flow::{
    T5, add_tokenizer, base, every_way_trains, fits, goes_on_from_its_own_file, is_refused, phases, single_files,
    whole_run,
};
use common::losses;

/// Pictures, and a base of Stable Diffusion 3.5's kind in a diffusers folder.
fn workspace() -> tempfile::TempDir {
    let write = |folder: &std::path::Path| SyntheticSd3::tiny().write(folder, DType::F32).unwrap();
    common::flow::workspace(write, T5, "tokenizer_3")
}

#[test]
fn runs_are_trained_saved_resumed_planned_and_sampled() {
    let folder = workspace();
    // In the first block 8 layers of attention, 4 of the picture's second one, 4 of feed-forwards; in the last one, whose text ends
    // with queries, keys and values, 7 and 2.
    let (stored, _) = whole_run(folder.path(), &["max_sequence_length=40"], &sd3::FAMILY, 25);
    assert!(stored.contains("transformer.transformer_blocks.0.attn2.to_q.lora_A.weight"));
    assert!(stored.names().all(|name| name.starts_with("transformer.")));
}

#[test]
fn a_file_says_which_of_the_published_models_it_was_made_for() {
    for (norms, dual_blocks, version, architecture) in [
        (false, 0, "medium", "stable-diffusion-3-medium/lora"),
        (true, 1, "5-medium", "stable-diffusion-3-5-medium/lora"),
        (true, 0, "5-large", "stable-diffusion-3-5-large/lora"),
    ] {
        let write = |folder: &std::path::Path| {
            let mut model = SyntheticSd3::tiny();
            model.transformer.norms = norms;
            model.transformer.dual_blocks = dual_blocks;
            model.write(folder, DType::F32).unwrap();
        };
        let folder = common::flow::workspace(write, T5, "tokenizer_3");
        let mut session = common::prepare(folder.path(), &["max_sequence_length=24"]);
        let file = SafetensorsFile::open(session.save("lora").unwrap()).unwrap();
        let said = |key: &str| file.metadata().get(key).map(String::as_str);
        assert_eq!(
            (said("ss_base_model_version"), said("modelspec.architecture")),
            (Some(version), Some(architecture))
        );
    }
}

#[test]
fn weights_in_few_bytes_checkpoints_masks_and_captions_that_change_all_train() {
    every_way_trains(workspace().path(), &["max_sequence_length=24"], &[], "discrete_flow_shift=8");
}

#[test]
fn a_run_goes_on_from_its_own_file() {
    goes_on_from_its_own_file(workspace().path(), &["max_sequence_length=24"]);
}

/// Parts that are published as files of their own, and their prefixes in files of all.
const PARTS: [(&str, &str); 4] = [
    ("clip_l", "text_encoders.clip_l.transformer."),
    ("clip_g", "text_encoders.clip_g.transformer."),
    ("t5xxl", "text_encoders.t5xxl.transformer."),
    ("ae", "first_stage_model."),
];

#[test]
fn files_of_every_layout_are_the_same_base() {
    let folder = workspace();
    let [transformer, first, second, t5, vae, all] = single_files(folder.path(), &PARTS).try_into().unwrap();
    let length = "max_sequence_length=24";
    let expected = losses(folder.path(), &[length]);
    let tokenizer = format!("tokenizer={}", base(folder.path()).join("tokenizer_3").display());
    let of = |base: &str, keys: &[&str]| losses(folder.path(), &[&[base, length], keys].concat());
    let (first, second) = (format!("text_encoder={first}"), format!("text_encoder_2={second}"));
    let (t5, vae, transformer) =
        (format!("text_encoder_3={t5}"), format!("vae={vae}"), format!("base_model={transformer}"));
    assert_eq!(of(&transformer, &[&first, &second, &t5, &vae, &tokenizer]), expected);
    assert_eq!(of(&format!("base_model={all}"), &[&tokenizer]), expected);

    let says = |keys: &[&str], words: &[&str]| is_refused(folder.path(), keys, words);
    says(&[&transformer], &["without an autoencoder", "set vae to"]);
    says(&[&transformer, &vae, &first], &["without a text encoder", "set text_encoder_2 to", "bigG"]);
    says(&[&transformer, &vae, &first, &second], &["without a text encoder", "set text_encoder_3 to", "T5-XXL"]);
    says(&[&transformer, &vae, &first, &second, &t5], &["without a tokenizer", "set tokenizer to"]);
}

#[test]
fn the_published_model_fits_small_cards() {
    let (folder, workspace) = (tempfile::tempdir().unwrap(), workspace());
    SyntheticSd3::full().write_headers(folder.path()).unwrap();
    add_tokenizer(folder.path(), T5, "tokenizer_3");
    let plans: &[(usize, &[&str], f64)] =
        &[(512, &[], 3.0), (1024, &["vae_tiling=true"], 3.1), (1024, &["vae_tiling=true", "offload_base=true"], 2.9)];
    fits(workspace.path(), folder.path(), plans);
    // The table of positions, of 0.42 GiB, is not on the device: the part that such a picture takes is.
    let (phases, _) = phases(workspace.path(), folder.path(), 1024, &["vae_tiling=true", "offload_base=true"]);
    assert!(phases["Loading"] < 0.4 && phases["Training"] < 1.1, "{phases:?}");
}
