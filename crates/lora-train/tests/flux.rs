//! FLUX.1: whole runs on a tiny model of its kind, twenty steps against PyTorch, diffusers and PEFT, and memory at the
//! published sizes. The numbers of its networks are held by lora-models' test of the same name.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lora_core::target::Targets;
use lora_core::variant::VariantRegistry;
use lora_core::{Adapter, AdapterModule, Component, DType, HostTensor};
use lora_io::adapter;
use lora_io::checkpoint::{Checkpoint, Replaced, write_single_file};
use lora_io::family::flux;
use lora_io::safetensors::{SafetensorsFile, write};
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::{Flux, FluxConditions};
use lora_models::synthetic::SyntheticFlux;
use lora_models::weights::{SyntheticWeights, Weights, synthetic_uniform};
use lora_torch::tch::{Device, Kind, Tensor};
use lora_torch::tensor::from_host;
use lora_train::Plugins;
use lora_train::optimiser::OptimiserState;
use lora_train::parameters::ParameterList;
use lora_train::plan::plan;
use lora_train::trainable::{AdapterOptions, TrainableAdapter};
use lora_train::velocity::VelocityLoss;

use common::{config, finish, losses, prepare, refusal};

const CPU: Device = Device::Cpu;
const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../lora-models/tests/golden/transformers");
const TOKENIZER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../lora-data/tests/golden/t5");

/// Pictures, and a base of FLUX.1's kind in a diffusers folder.
fn workspace() -> tempfile::TempDir {
    let folder = common::workspace();
    std::fs::remove_file(folder.path().join("base.safetensors")).unwrap();
    SyntheticFlux::tiny().write(&base(folder.path()), DType::F32).unwrap();
    add_tokenizer(&base(folder.path()));
    folder
}

fn base(folder: &Path) -> PathBuf {
    folder.join("base.safetensors")
}

fn add_tokenizer(base: &Path) {
    std::fs::create_dir_all(base.join("tokenizer_2")).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(format!("{TOKENIZER}/{file}"), base.join("tokenizer_2").join(file)).unwrap();
    }
}

fn tensor(file: &SafetensorsFile, name: &str) -> Tensor {
    from_host(&file.get(name).unwrap().to_host().unwrap(), CPU).unwrap()
}

fn given(name: &str, shape: &[usize]) -> Tensor {
    let scale = 3f64.sqrt() as f32;
    let values = synthetic_uniform(name, shape.iter().product()).map(|u| scale * u).collect();
    from_host(&HostTensor::from_f32(shape, values).unwrap(), CPU).unwrap()
}

#[test]
fn twenty_steps_are_those_of_pytorch() {
    let golden = SafetensorsFile::open(format!("{GOLDEN}/flux_dev.safetensors")).unwrap();
    let weights = SyntheticWeights::new("transformer");
    let config = SyntheticFlux::tiny().transformer;
    let mut network = Flux::new(&Weights::new(&weights, Kind::Float, CPU), config).unwrap();
    let targets = Targets::parse(&["attention-mlp"]).unwrap().select(&network.adaptable_layers().unwrap()).unwrap();
    // The golden file's first values: `down` by formula, `up` zero.
    let mut from = Adapter::default();
    for target in &targets {
        let shape = target.geometry.with_outputs(4).weight_shape();
        let bound = (3.0 / target.geometry.fan_in() as f64).sqrt() as f32;
        let values = synthetic_uniform(&format!("lora.{}.down", target.path), shape.iter().product());
        let down = HostTensor::from_f32(shape, values.map(|u| bound * u).collect()).unwrap();
        let up = HostTensor::zeros(target.geometry.pointwise_from(4).weight_shape());
        from.modules.insert(target.path.clone(), AdapterModule::of_factors(down, up, false, 4, 2.0));
    }
    let (mut trained, mut parameters) = (TrainableAdapter::default(), ParameterList::new(OptimiserState::adamw(), 0.0));
    let options = AdapterOptions::lora(4, 2.0, 0);
    let variants = VariantRegistry::default();
    trained.attach(&mut network, &targets, &variants, &options, Some(&from), &mut parameters).unwrap();

    let (latents, context) = (given("input.train.latents", &[2, 16, 8, 8]), given("input.train.context", &[2, 12, 48]));
    let pooled = given("input.train.pooled", &[2, 40]);
    let expected = golden.get("trajectory.losses").unwrap();
    let expected = expected.bytes().as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes));
    for (step, expected) in expected.enumerate() {
        let noise = given(&format!("input.trajectory.{step}.noise"), &[2, 16, 8, 8]);
        let levels = [(step as f64 + 0.5) / 20.0, ((7 * step) % 20) as f64 / 20.0 + 0.025];
        let loss = VelocityLoss::new(&latents, &noise, &levels, &[], None).unwrap();
        let guidance = Tensor::from_slice(&[3.5f32; 2]);
        let loss = loss
            .loss(|noised, sigmas| {
                let (context, pooled, guidance) = (&context, &pooled, Some(&guidance));
                Ok(network.forward(noised, &FluxConditions { sigmas, context, pooled, guidance }, &Pass::default())?)
            })
            .unwrap();
        loss.backward();
        parameters.settle(&loss.detach(), 1.0, f64::INFINITY).unwrap();
        parameters.step(|_: Component, _| 1e-3).unwrap();
        parameters.clear_gradients().unwrap();
        let found = f64::try_from(&loss).unwrap();
        assert!((found / expected - 1.0).abs() < 1e-6, "step {step}: {found} {expected}");
    }
    let found = trained.export().unwrap();
    assert_eq!(found.modules.len(), 34);
    for (path, module) in &found.modules {
        for (name, own) in &module.tensors {
            let expected = tensor(&golden, &format!("trajectory.lora.{path}.{name}"));
            let own = from_host(own, CPU).unwrap();
            let error = f64::try_from((&own - &expected).norm() / expected.norm()).unwrap();
            assert!(error < 1e-4, "{path} {name}: {error:e}");
        }
    }
}

#[test]
fn runs_are_trained_saved_resumed_planned_and_sampled() {
    let folder = workspace();
    let keys = ["max_train_steps=4", "target_modules=attention-mlp", "batch_size=2", "max_sequence_length=40"];
    let (session, mut resumed) = common::in_one_go_and_resumed(folder.path(), &keys);
    let picture = resumed.sample(&["a cat".to_owned()]).unwrap().remove(0).into_picture().unwrap();
    assert_eq!((picture.width(), picture.height()), (64, 64));

    let path = folder.path().join("out/lora.safetensors");
    let read = adapter::read(&path).unwrap();
    assert_eq!(read.family, Some(&flux::FAMILY));
    assert_eq!(read.adapter.modules.len(), session.targets().len());
    assert_eq!(session.targets().len(), 34);
    let said = |key: &str| read.adapter.metadata.get(key).map(String::as_str);
    assert_eq!(said("ss_base_model_version"), Some("flux1"));
    assert_eq!(said("modelspec.architecture"), Some("flux-1-dev/lora"));
    assert_eq!((said("modelspec.prediction_type"), said("ss_guidance_scale")), (None, Some("1")));
    // The original tree, where queries, keys and values are one layer, with the ranks of all of them.
    let stored = SafetensorsFile::open(&path).unwrap();
    assert_eq!(stored.shape("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"), Some([12, 64].as_slice()));
    assert_eq!(stored.shape("lora_unet_single_blocks_1_linear1.lora_down.weight"), Some([16, 64].as_slice()));
    assert!(stored.names().all(|name| name.starts_with("lora_unet_")));

    let plan = plan(&config(folder.path(), &keys), &Plugins::default()).unwrap();
    assert!(plan.as_configured.phases.len() >= 4 && plan.as_configured.peak() > 0);
}

#[test]
fn weights_in_few_bytes_checkpoints_masks_and_captions_that_change_all_train() {
    let folder = workspace();
    let losses = |keys: &[&str]| losses(folder.path(), &[&["max_sequence_length=24"], keys].concat());
    for keys in [
        &["base_storage=nf4", "gradient_checkpointing=true", "recompute_feed_forward=true"][..],
        &["base_storage=int8", "offload_base=true", "precision=bf16"],
        &["base_storage=fp8", "cache_latents=false", "shuffle_caption=true", "batch_size=2"],
        &["caption_dropout_rate=0.5", "batch_size=4", "alpha_mask=true", "masked_loss=true"],
        &["target_modules=all-linear"],
    ] {
        let losses = losses(keys);
        assert!(losses.iter().all(|loss| loss.is_finite() && *loss > 0.0), "{keys:?}: {losses:?}");
    }
    let plain = losses(&[]);
    assert_eq!(losses(&["gradient_checkpointing=true"]), plain);
    assert_ne!(losses(&["guidance_scale=3.5"]), plain);
}

/// Files as they are published: each part by itself, the transformer in the original tree; and all in one.
fn single_files(folder: &Path) -> [PathBuf; 5] {
    let checkpoint = Checkpoint::open(base(folder)).unwrap();
    let whole = folder.join("all.safetensors");
    let source = Replaced { checkpoint: &checkpoint, weights: BTreeMap::new() };
    write_single_file(&whole, &source, DType::F32, &BTreeMap::new()).unwrap();
    let stored = SafetensorsFile::open(&whole).unwrap();
    let prefixes = ["text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer.", "vae."];
    let part = |name: &str, own: &dyn Fn(&str) -> Option<String>| {
        let path = folder.join(format!("{name}.safetensors"));
        let named = |name: &str| Some((own(name)?, stored.get(name).unwrap().to_host().unwrap()));
        write(&path, &stored.names().filter_map(named).collect::<BTreeMap<_, _>>(), &BTreeMap::new()).unwrap();
        path
    };
    let behind = |prefix: &'static str| move |name: &str| name.strip_prefix(prefix).map(str::to_owned);
    let of_none = |name: &str| (!prefixes.iter().any(|prefix| name.starts_with(prefix))).then(|| name.to_owned());
    let [clip, t5, vae] = [("clip_l", prefixes[0]), ("t5xxl", prefixes[1]), ("ae", prefixes[2])]
        .map(|(name, prefix)| part(name, &behind(prefix)));
    [part("flux1-dev", &of_none), clip, t5, vae, whole]
}

#[test]
fn files_of_every_layout_are_the_same_base() {
    let folder = workspace();
    let [transformer, clip, t5, vae, all] = single_files(folder.path()).map(|file| file.display().to_string());
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

    let says = |keys: &[&str], words: &[&str]| {
        let error = refusal(folder.path(), keys);
        assert!(words.iter().all(|word| error.contains(word)), "{keys:?}: {error}");
    };
    says(&[&transformer], &["FLUX.1 without an autoencoder", "set vae to"]);
    says(&[&transformer, &vae], &["without a text encoder", "set text_encoder to", "CLIP-L"]);
    says(&[&transformer, &vae, &clip], &["without a text encoder", "set text_encoder_2 to", "T5-XXL"]);
    says(&[&transformer, &vae, &clip, &t5], &["without a tokenizer", "set tokenizer to"]);
}

#[test]
fn a_run_goes_on_from_its_own_file() {
    let folder = workspace();
    let keys = ["target_modules=attention-mlp", "save_precision=fp32", "max_sequence_length=24"];
    let first = finish(&mut prepare(folder.path(), &keys));
    let own = format!("init_from={}", folder.path().join("out/lora.safetensors").display());
    let (second, reports) = common::trained(folder.path(), &[&own, keys[0], keys[2]]);
    assert_eq!((reports.len(), second.modules.len()), (2, first.modules.len()));
    assert!(first.modules.values().all(|module| module.rank == 4));
}

/// A plan at the published model's sizes, in GiB, batch 1, rank 16, with samples.
fn planned(side: usize, keys: &[&str]) -> f64 {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    SyntheticFlux::full().write_headers(&base).unwrap();
    add_tokenizer(&base);
    let (resolution, sample) = (format!("max_resolution={side}"), format!("sample_resolution={side}"));
    let own = [
        &format!("base_model={}", base.display()),
        "lora_rank=16",
        &resolution,
        "precision=bf16",
        "target_modules=attention-mlp",
        "gradient_checkpointing=true",
        "base_storage=nf4",
        "device=cuda",
        "sample_prompts=a",
        &sample,
        "vram_budget=100GiB",
    ];
    let plan = plan(&config(workspace().path(), &[&own[..], keys].concat()), &Plugins::default()).unwrap();
    for phase in &plan.as_configured.phases {
        println!("{side} {keys:?} {:?}: {:.2} GiB", phase.phase, phase.parts.total() as f64 / f64::from(1 << 30));
        println!("    {:?}", phase.parts);
    }
    plan.as_configured.peak() as f64 / f64::from(1 << 30)
}

#[test]
fn the_published_model_fits_small_cards() {
    let (eight_bits, in_host) = ("optimizer=adamw8bit", "cpu_offload_checkpointing=true");
    let (offload, tiles) = ("offload_base=true", "vae_tiling=true");
    for (side, keys, most) in [
        (512, &[][..], 8.6),
        (512, &[eight_bits, in_host], 8.0),
        (512, &[offload, tiles], 3.1),
        (1024, &[eight_bits, tiles], 9.7),
        (1024, &[eight_bits, in_host, tiles], 8.0),
        (1024, &[offload, tiles], 4.5),
    ] {
        let found = planned(side, keys);
        println!("{side} {keys:?}: {found:.2} GiB");
        assert!(found <= most, "{side} {keys:?}: {found:.2} GiB of {most}");
    }
}
