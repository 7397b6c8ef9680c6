//! Stable Diffusion XL: whole runs on a tiny model of its kind. The numbers of its networks, gradients and steps are held by
//! `trajectory` and by lora-models' parity tests.

mod common;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use common::{config, finish, losses, prepare, refusal};
use lora_core::{Component, DType, HostTensor};
use lora_io::adapter;
use lora_io::safetensors::{Entry, SafetensorsFile, StoredDType, TensorSource, write};
use lora_models::synthetic::SyntheticModel;
use lora_train::Plugins;
use lora_train::plan::plan;

/// Pictures, and a base of SDXL's kind in one file.
fn workspace() -> tempfile::TempDir {
    let folder = common::workspace();
    SyntheticModel::tiny_sdxl().write(folder.path().join("base.safetensors"), DType::F16).unwrap();
    folder
}

/// Adds tensors without elements to the base.
fn mark(folder: &Path, marks: &[&str]) {
    let path = folder.join("base.safetensors");
    let file = SafetensorsFile::open(&path).unwrap();
    let mut tensors: BTreeMap<_, _> =
        file.names().map(|name| (name.to_owned(), file.get(name).unwrap().to_host().unwrap())).collect();
    tensors.extend(marks.iter().map(|mark| ((*mark).to_owned(), HostTensor::zeros([0]))));
    drop(file);
    write(&path, &tensors, &BTreeMap::new()).unwrap();
}

#[test]
fn runs_are_trained_saved_resumed_planned_and_sampled() {
    let folder = workspace();
    let keys = ["min_snr_gamma=5", "max_train_steps=4", "target_modules=attention-mlp"];
    let (session, mut resumed) = common::in_one_go_and_resumed(folder.path(), &keys);
    let picture = resumed.sample(&["a cat".to_owned()]).unwrap().remove(0).into_picture().unwrap();
    assert_eq!((picture.width(), picture.height()), (64, 64));

    let path = folder.path().join("out/lora.safetensors");
    let file = adapter::read(&path).unwrap().adapter;
    assert_eq!(file.modules.len(), session.targets().len());
    let said = |key: &str| file.metadata.get(key).map(String::as_str).unwrap_or_default();
    assert_eq!((said("ss_base_model_version"), said("ss_v2")), ("sdxl_base_v1-0", "False"));
    assert_eq!(said("modelspec.architecture"), "stable-diffusion-xl-v1-base/lora");
    // Kohya's names: the U-Net's in the original tree, two text encoders.
    let stored = SafetensorsFile::open(&path).unwrap();
    let has = |start: &str| stored.names().any(|name| name.starts_with(start));
    assert!(has("lora_unet_input_blocks_4_1_") && has("lora_te1_text_model_") && has("lora_te2_text_model_"));

    let plan = plan(&config(folder.path(), &keys), &Plugins::default()).unwrap();
    assert!(plan.as_configured.phases.len() >= 4 && plan.as_configured.peak() > 0);
}

#[test]
fn either_text_encoder_both_or_none_trains() {
    let folder = workspace();
    let components = |keys: &[&str]| -> Vec<Component> {
        let adapter = finish(&mut prepare(folder.path(), keys));
        let mut components: Vec<_> = adapter.modules.keys().map(|path| path.component).collect();
        components.dedup();
        components
    };
    let (first, second, unet) = (Component::TEXT_ENCODER, Component::TEXT_ENCODER_2, Component::UNET);
    assert_eq!(components(&[]), [first, second, unet]);
    assert_eq!(components(&["train_text_encoder=false"]), [unet]);
    assert_eq!(components(&["train_text_encoder_1=false"]), [second, unet]);
    assert_eq!(components(&["train_text_encoder=false", "train_text_encoder_1=true", "train_unet=false"]), [first]);
    let error =
        refusal(folder.path(), &["train_unet=false", "train_text_encoder_1=false", "train_text_encoder_2=false"]);
    assert!(error.contains("nothing is trained"), "{error}");

    // A learning rate of its own: what does not move stays as it began, where the pair of factors has no effect.
    let adapter = finish(&mut prepare(folder.path(), &["text_encoder_2_lr=0", "text_encoder_1_lr=0.01"]));
    for (path, module) in &adapter.modules {
        let moved = module.tensors["up"].to_f32().iter().any(|&value| value != 0.0);
        // The first encoder's last layer is read by nobody.
        let read = path.component != first || path.path.contains("layers.0.");
        assert_eq!(moved, path.component != second && read, "{path}");
    }
}

#[test]
fn what_the_base_predicts_is_told_by_marks_and_by_keys() {
    let folder = workspace();
    let keys = ["max_train_steps=3", "train_text_encoder=false"];
    let with = |own: &[&str]| losses(folder.path(), &[&keys[..], own].concat());
    let noise = with(&[]);
    let velocity = with(&["v_parameterization=true"]);
    let zero = with(&["v_parameterization=true", "zero_terminal_snr=true"]);
    assert!(noise != velocity && velocity != zero);
    let said = |notes: &[String], text: &str| assert!(notes.iter().any(|note| note.contains(text)), "{notes:?}");
    said(&prepare(folder.path(), &keys).summary().notes, "predicts the noise");
    let error = refusal(folder.path(), &["zero_terminal_snr=true"]);
    assert!(error.contains("zero terminal SNR"), "{error}");

    mark(folder.path(), &["v_pred"]);
    assert_eq!(with(&[]), velocity);
    mark(folder.path(), &["v_pred", "ztsnr"]);
    assert_eq!(with(&[]), zero);
    said(&prepare(folder.path(), &keys).summary().notes, "velocity with zero terminal SNR, as the mark `v_pred`");
    // Keys win over marks.
    assert_eq!(with(&["zero_terminal_snr=false"]), velocity);
    assert_eq!(with(&["v_parameterization=false"]), noise);
}

#[test]
fn networks_train_whole_in_few_bytes_and_checkpointed_too() {
    let folder = workspace();
    for keys in [
        &["train=full"][..],
        &["train_text_encoder=false", "base_storage=nf4", "debiased_estimation_loss=true"],
        &["gradient_checkpointing=true", "precision=bf16", "max_token_length=150", "weighted_captions=true"],
        &["offload_base=true", "base_storage=int8", "cache_latents=false", "v_pred_like_loss=0.5"],
    ] {
        let losses = losses(folder.path(), keys);
        assert!(losses.iter().all(|loss| loss.is_finite() && *loss > 0.0), "{keys:?}: {losses:?}");
    }
}

/// Tensors as they are to be stored.
#[derive(Default)]
struct Raw(Vec<(Entry, Vec<u8>)>);

impl Raw {
    fn with(mut self, name: &str, dtype: StoredDType, shape: &[usize], bytes: Vec<u8>) -> Self {
        self.0.push((Entry { name: name.into(), dtype, shape: shape.to_vec() }, bytes));
        self
    }
}

impl TensorSource for Raw {
    fn entries(&self) -> Vec<Entry> {
        self.0.iter().map(|(entry, _)| entry.clone()).collect()
    }

    fn bytes(&self, entry: &Entry) -> lora_io::Result<Cow<'_, [u8]>> {
        Ok(Cow::Borrowed(&self.0.iter().find(|(own, _)| own.name == entry.name).unwrap().1))
    }
}

/// Writes the base again with its U-Net in 8-bit floats, each cut to its upper byte as E5M2, and with further tensors.
fn in_eight_bits(folder: &Path, others: &[&str]) {
    let path = folder.join("base.safetensors");
    let file = SafetensorsFile::open(&path).unwrap();
    let mut raw = Raw::default();
    for name in file.names() {
        let view = file.get(name).unwrap();
        let is_unet = name.starts_with("model.diffusion_model.");
        let upper = view.bytes().chunks_exact(2).map(|bytes| bytes[1]).collect();
        raw = match is_unet {
            true => raw.with(name, StoredDType::F8E5M2, view.shape(), upper),
            false => raw.with(name, view.dtype(), view.shape(), view.bytes().to_vec()),
        };
    }
    for name in others {
        raw = raw.with(name, StoredDType::F32, &[1], 1f32.to_le_bytes().to_vec());
    }
    drop(file);
    write(&path, &raw, &BTreeMap::new()).unwrap();
}

#[test]
fn bases_in_eight_bits_are_read_with_their_scales_and_refused_with_others() {
    let folder = workspace();
    let keys = ["train_text_encoder=false", "max_train_steps=2"];
    let full = losses(folder.path(), &keys);
    in_eight_bits(folder.path(), &[]);
    let found = losses(folder.path(), &keys);
    // Two bits of mantissa are left, so losses move, but little.
    let near = found.iter().zip(&full).all(|(found, full)| (found / full - 1.0).abs() < 0.2);
    assert!(near && found != full, "{found:?} {full:?}");
    let folder = workspace();
    in_eight_bits(folder.path(), &["model.diffusion_model.input_blocks.0.0.scale_weight"]);
    assert_eq!(losses(folder.path(), &keys), found, "a scale of 1");
    // That of a weight that is not in 8 bits says of something else.
    let folder = workspace();
    in_eight_bits(folder.path(), &["first_stage_model.encoder.conv_in.scale_weight"]);
    let error = refusal(folder.path(), &keys);
    assert!(error.contains("scale_weight") && error.contains("base.safetensors"), "{error}");
    let folder = workspace();
    in_eight_bits(folder.path(), &["model.diffusion_model.input_blocks.0.0.weight.absmax"]);
    let error = refusal(folder.path(), &keys);
    assert!(error.contains("absmax") && error.contains("GGUF"), "{error}");
}

#[test]
fn an_adapter_of_another_family_is_refused_before_anything_is_loaded() {
    let (folder, other) = (workspace(), common::workspace());
    let save = |folder: &Path| {
        let path = prepare(folder, &["train_text_encoder=false"]).save("own").unwrap();
        format!("init_from={}", path.display())
    };
    let error = refusal(folder.path(), &[&save(other.path())]);
    assert!(error.contains("Stable Diffusion 1.x") && error.contains("Stable Diffusion XL"), "{error}");
    let error = refusal(other.path(), &[&save(folder.path())]);
    assert!(error.contains("Stable Diffusion 1.x") && error.contains("Stable Diffusion XL"), "{error}");
}

#[test]
fn an_autoencoder_comes_from_elsewhere() {
    let folder = workspace();
    let keys = ["max_train_steps=2", "train_text_encoder=false"];
    let with = |vae: &str| {
        losses(folder.path(), &[&keys[..], &[&format!("vae={}", folder.path().join(vae).display())]].concat())
    };
    let own = losses(folder.path(), &keys);
    let base = SafetensorsFile::open(folder.path().join("base.safetensors")).unwrap();
    let part = |change: &dyn Fn(&str) -> String, factor: f32| -> BTreeMap<String, HostTensor> {
        let names = base.names().filter(|name| name.starts_with("first_stage_model."));
        let scaled = |name: &str| {
            let tensor = base.get(name).unwrap().to_host().unwrap();
            let values = tensor.to_f32().iter().map(|value| factor * value).collect();
            HostTensor::from_f32(tensor.shape(), values).unwrap()
        };
        names.map(|name| (change(name), scaled(name))).collect()
    };
    let save = |name: &str, tensors| write(folder.path().join(name), &tensors, &BTreeMap::new()).unwrap();
    let bare = |name: &str| name.trim_start_matches("first_stage_model.").to_owned();
    save("same.safetensors", part(&bare, 1.0));
    save("prefixed.safetensors", part(&str::to_owned, 1.0));
    save("other.safetensors", part(&bare, 0.5));
    assert_eq!(
        (with("same.safetensors"), with("prefixed.safetensors"), with("base.safetensors")),
        (own.clone(), own.clone(), own.clone())
    );
    assert!(with("other.safetensors") != own);

    let mut wide = part(&bare, 1.0);
    wide.insert("decoder.conv_in.weight".into(), HostTensor::zeros([64, 16, 3, 3]));
    save("wide.safetensors", wide);
    let refused = |vae: &str| refusal(folder.path(), &[&format!("vae={}", folder.path().join(vae).display())]);
    let error = refused("wide.safetensors");
    assert!(error.contains("16 latent channels") && error.contains("wide.safetensors"), "{error}");
    save("strange.safetensors", BTreeMap::from([("text_model.weight".to_owned(), HostTensor::zeros([1]))]));
    let error = refused("strange.safetensors");
    assert!(error.contains("strange.safetensors"), "{error}");
}

/// A plan at the published model's sizes, in GiB, 1024 px, batch 1, rank 8, U-Net only.
fn planned(keys: &[&str]) -> f64 {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    SyntheticModel::full_sdxl().write_headers(&base).unwrap();
    let own = [
        &format!("base_model={}", base.display()),
        "lora_rank=8",
        "max_resolution=1024",
        "precision=fp16",
        "target_modules=attention-mlp",
        "train_text_encoder=false",
        "gradient_checkpointing=true",
        "device=cuda",
        "sample_prompts=a",
        "sample_resolution=1024",
        "vram_budget=100GiB",
    ];
    let plan = plan(&config(common::workspace().path(), &[&own[..], keys].concat()), &Plugins::default()).unwrap();
    for phase in &plan.as_configured.phases {
        println!("{keys:?} {:?}: {:.2} GiB", phase.phase, phase.parts.total() as f64 / f64::from(1 << 30));
    }
    plan.as_configured.peak() as f64 / f64::from(1 << 30)
}

#[test]
fn the_published_model_fits_small_cards() {
    for (keys, most) in [
        (&[][..], 7.0),
        (&["base_storage=nf4", "vae_tiling=true"], 3.0),
        (&["base_storage=nf4", "vae_tiling=true", "offload_base=true"], 2.0),
    ] {
        let found = planned(keys);
        assert!(found <= most, "{keys:?}: {found:.2} GiB of {most}");
    }
}
