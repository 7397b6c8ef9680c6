//! What tests of bases share that are trained by flow matching: a tiny base in a diffusers folder and in single files, twenty
//! steps against a golden file, and plans at published sizes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lora_core::target::Targets;
use lora_core::variant::VariantRegistry;
use lora_core::{Adapter, AdapterModule, DType, HostTensor};
use lora_io::adapter;
use lora_io::checkpoint::{Checkpoint, Replaced, write_single_file};
use lora_io::family::Family;
use lora_io::safetensors::{SafetensorsFile, write};
use lora_models::layers::{Adaptable, AdaptableLayer};
use lora_models::weights::synthetic_uniform;
use lora_torch::tch::{Device, Tensor};
use lora_torch::tensor::from_host;
use lora_train::Plugins;
use lora_train::difference::Difference;
use lora_train::optimiser::OptimiserState;
use lora_train::parameters::ParameterList;
use lora_train::plan::plan;
use lora_train::trainable::{AdapterOptions, TrainableAdapter};
use lora_train::velocity::VelocityLoss;

/// A vocabulary with Qwen's special tokens.
pub(crate) const QWEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../lora-models/tests/golden/z_image/tokenizer");

/// One of T5's kind.
pub(crate) const T5: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../lora-data/tests/golden/t5");

/// Pictures, and a base that `write` puts into a diffusers folder, with a tokenizer in a folder of its own.
pub(crate) fn workspace(write: impl FnOnce(&Path), tokenizer: &str, name: &str) -> tempfile::TempDir {
    let folder = super::workspace();
    std::fs::remove_file(folder.path().join("base.safetensors")).unwrap();
    write(&base(folder.path()));
    add_tokenizer(&base(folder.path()), tokenizer, name);
    folder
}

pub(crate) fn base(folder: &Path) -> PathBuf {
    folder.join("base.safetensors")
}

pub(crate) fn add_tokenizer(base: &Path, tokenizer: &str, name: &str) {
    std::fs::create_dir_all(base.join(name)).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(format!("{tokenizer}/{file}"), base.join(name).join(file)).unwrap();
    }
}

pub(crate) fn tensor(file: &SafetensorsFile, name: &str) -> Tensor {
    from_host(&file.get(name).unwrap().to_host().unwrap(), Device::Cpu).unwrap()
}

/// An input that both sides make from its name.
pub(crate) fn given(name: &str, shape: &[usize]) -> Tensor {
    let scale = 3f64.sqrt() as f32;
    let values = synthetic_uniform(name, shape.iter().product()).map(|u| scale * u).collect();
    from_host(&HostTensor::from_f32(shape, values).unwrap(), Device::Cpu).unwrap()
}

fn apart(found: &Tensor, expected: &Tensor) -> f64 {
    // What stays zero is zero on both sides.
    f64::try_from((found - expected).norm()).unwrap() / f64::try_from(expected.norm()).unwrap().max(1e-12)
}

/// The noise levels that a golden file has for each step's two items.
pub(crate) fn levels(golden: &SafetensorsFile) -> impl Fn(usize) -> [f64; 2] + use<> {
    let sigmas = tensor(golden, "trajectory.sigmas");
    move |step| [0, 1].map(|item| sigmas.double_value(&[step as i64, item]))
}

/// A golden file's run: twenty steps of AdamW on latents of a shape.
pub(crate) struct Trajectory<'g> {
    pub(crate) golden: &'g SafetensorsFile,
    /// How the trained factors' names begin in it.
    pub(crate) last: &'g str,
    pub(crate) latents: [usize; 4],
    /// The noise levels of a step's two items.
    pub(crate) levels: &'g dyn Fn(usize) -> [f64; 2],
}

impl Trajectory<'_> {
    /// Trains a LoRA on the attention and feed-forwards of a network and holds losses (1e-6), where the file has them the first
    /// step's gradients (1e-3), and the trained factors (1e-4) against the file's. Returns how many layers were trained.
    pub(crate) fn is_followed<N: Adaptable>(
        &self,
        mut network: N,
        velocity: impl Fn(&N, &Tensor, &Tensor) -> lora_train::Result<Tensor>,
    ) -> usize {
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
        let mut trained = TrainableAdapter::default();
        let mut parameters = ParameterList::new(OptimiserState::adamw(), 0.0);
        let (options, variants) = (AdapterOptions::lora(4, 2.0, 0), VariantRegistry::default());
        trained.attach(&mut network, &targets, &variants, &options, Some(&from), &mut parameters).unwrap();

        let latents = given("input.train.latents", &self.latents);
        let expected = self.golden.get("trajectory.losses").unwrap();
        let expected = expected.bytes().as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes));
        for (step, expected) in expected.enumerate() {
            let noise = given(&format!("input.trajectory.{step}.noise"), &self.latents);
            let loss =
                VelocityLoss::new(&latents, [&noise; 2], &(self.levels)(step), &[], None, &Difference::default())
                    .unwrap();
            let loss = loss.loss(|noised, levels| velocity(&network, noised, levels)).unwrap();
            loss.backward();
            if step == 0 {
                self.holds_gradients(&mut network);
            }
            parameters.settle(&loss.detach(), 1.0, f64::INFINITY).unwrap();
            parameters.step(|_| 1e-3).unwrap();
            parameters.clear_gradients().unwrap();
            let found = f64::try_from(&loss).unwrap();
            // 1e-6 with the kernels that the file was made with, half as much again with those of AVX2.
            assert!((found / expected - 1.0).abs() < 5e-6, "step {step}: {found} {expected}");
        }
        let found = trained.export().unwrap();
        for (path, module) in &found.modules {
            for (name, own) in &module.tensors {
                let expected = tensor(self.golden, &format!("{}.lora.{path}.{name}", self.last));
                let error = apart(&from_host(own, Device::Cpu).unwrap(), &expected);
                // AdamW makes as much of a gradient near 0, whose last bits depend on the processor, as of a large
                // one: up to 5e-4 between kernels for AVX2, AVX-512 and those of other makers.
                assert!(error < 2e-3, "{path} {name}: {error:e}");
            }
        }
        found.modules.len()
    }

    fn holds_gradients(&self, network: &mut dyn Adaptable) {
        let (component, mut compared) = (network.component(), 0);
        let mut hold = |layer: &mut AdaptableLayer| {
            for (name, leaf) in layer.adapter().iter().flat_map(|adapter| &adapter.parameters.tensors) {
                let name = format!("gradient.lora.{component}.{}.{name}", layer.path());
                if self.golden.contains(&name) {
                    let error = apart(&leaf.grad(), &tensor(self.golden, &name));
                    assert!(error < 1e-3, "{name}: {error:e}");
                    compared += 1;
                }
            }
        };
        network.visit_layers(&mut hold).unwrap();
        assert_eq!(compared, self.golden.names().filter(|name| name.starts_with("gradient.")).count());
    }
}

/// A base's folder as files: all in one, parts by themselves with their prefixes taken off, and what is left, the
/// transformer. Returns their paths: the transformer's, the parts', that of all.
pub(crate) fn single_files(folder: &Path, parts: &[(&str, &str)]) -> Vec<String> {
    let checkpoint = Checkpoint::open(base(folder)).unwrap();
    let whole = folder.join("all.safetensors");
    let source = Replaced { checkpoint: &checkpoint, weights: BTreeMap::new() };
    write_single_file(&whole, &source, DType::F32, &BTreeMap::new()).unwrap();
    let stored = SafetensorsFile::open(&whole).unwrap();
    let part = |name: &str, own: &dyn Fn(&str) -> Option<String>| {
        let path = folder.join(format!("{name}.safetensors"));
        let named = |name: &str| Some((own(name)?, stored.get(name).unwrap().to_host().unwrap()));
        write(&path, &stored.names().filter_map(named).collect::<BTreeMap<_, _>>(), &BTreeMap::new()).unwrap();
        path.display().to_string()
    };
    let is_rest = |name: &str| !parts.iter().any(|(_, prefix)| name.starts_with(prefix));
    let rest = part("transformer", &|name| is_rest(name).then(|| name.to_owned()));
    let own = parts.iter().map(|(file, prefix)| part(file, &|name| name.strip_prefix(prefix).map(str::to_owned)));
    std::iter::once(rest).chain(own.collect::<Vec<_>>()).chain([whole.display().to_string()]).collect()
}

/// The keys of a whole run, with those of its base.
pub(crate) fn whole<'k>(of_base: &[&'k str]) -> Vec<&'k str> {
    [&["max_train_steps=4", "target_modules=attention-mlp", "batch_size=2"], of_base].concat()
}

/// A run in one go and resumed, planned, and a picture of the cat that it then draws; the LoRA's file and what its header says.
/// `modules` layers of the family are trained.
pub(crate) fn whole_run(
    folder: &Path,
    of_base: &[&str],
    family: &Family,
    modules: usize,
) -> (SafetensorsFile, BTreeMap<String, String>) {
    let keys = whole(of_base);
    let (session, mut resumed) = super::in_one_go_and_resumed(folder, &keys);
    let picture = resumed.sample(&["a cat".to_owned()]).unwrap().remove(0).into_picture().unwrap();
    assert_eq!((picture.width(), picture.height()), (64, 64));

    let path = folder.join("out/lora.safetensors");
    let read = adapter::read(&path).unwrap();
    assert_eq!(read.family, Some(family));
    assert_eq!((read.adapter.modules.len(), session.targets().len()), (modules, modules));

    let plan = plan(&super::config(folder, &keys), &Plugins::default()).unwrap();
    assert!(plan.as_configured.phases.len() >= 4 && plan.as_configured.peak() > 0);
    (SafetensorsFile::open(&path).unwrap(), read.adapter.metadata)
}

/// Weights in few bytes, checkpoints, masks, captions that change and whole networks all train; checkpoints change nothing, and the keys of the base
/// that are named last do.
pub(crate) fn every_way_trains(folder: &Path, of_base: &[&str], more: &[&[&str]], changes: &str) {
    let losses = |keys: &[&str]| super::losses(folder, &[of_base, keys].concat());
    let ways: [&[&str]; 6] = [
        &["base_storage=nf4", "gradient_checkpointing=true", "recompute_feed_forward=true"],
        &["base_storage=int8", "offload_base=true", "precision=bf16"],
        &["base_storage=fp8", "cache_latents=false", "shuffle_caption=true", "batch_size=2"],
        &["caption_dropout_rate=0.5", "batch_size=4", "alpha_mask=true", "masked_loss=true"],
        &["target_modules=all-linear"],
        // Its own weights, in f32, beside a network that computes in half precision.
        &["train=full", "precision=bf16"],
    ];
    for keys in ways.iter().chain(more) {
        let losses = losses(keys);
        assert!(losses.iter().all(|loss| loss.is_finite() && *loss > 0.0), "{keys:?}: {losses:?}");
    }
    let plain = losses(&[]);
    assert_eq!(losses(&["gradient_checkpointing=true"]), plain);
    assert_ne!(losses(&[changes]), plain);
}

/// A run goes on from the LoRA that another one wrote.
pub(crate) fn goes_on_from_its_own_file(folder: &Path, of_base: &[&str]) {
    let keys = [&["target_modules=attention-mlp"], of_base].concat();
    let first = super::finish(&mut super::prepare(folder, &[&keys[..], &["save_precision=fp32"]].concat()));
    let own = format!("init_from={}", folder.join("out/lora.safetensors").display());
    let (second, reports) = super::trained(folder, &[&keys[..], &[&own]].concat());
    assert_eq!((reports.len(), second.modules.len()), (2, first.modules.len()));
    assert!(first.modules.values().all(|module| module.rank == 4));
}

/// A configuration is refused in words that have these among them.
pub(crate) fn is_refused(folder: &Path, keys: &[&str], words: &[&str]) {
    let error = super::refusal(folder, keys);
    assert!(words.iter().all(|word| error.contains(word)), "{keys:?}: {error}");
}

/// Rows of text states are as long as captions are, whatever their greatest length; empty captions train too, and a batch's differ in
/// length.
pub(crate) fn rows_are_as_long_as_captions(folder: &Path) {
    let of = |keys: &[&str]| super::losses(folder, keys);
    assert_eq!(of(&["max_sequence_length=300"]), of(&[]));
    for rate in ["caption_dropout_rate=0", "caption_dropout_rate=1"] {
        assert!(of(&["batch_size=4", rate]).iter().all(|loss| loss.is_finite()), "{rate}");
    }
}

/// Plans of pictures of so many pixels a side need so many GiB at most.
pub(crate) fn fits(folder: &Path, base: &Path, plans: &[(usize, &[&str], f64)]) {
    for &(side, keys, most) in plans {
        let found = planned(folder, base, side, keys);
        assert!(found <= most, "{side} {keys:?}: {found:.2} GiB of {most}");
    }
}

/// A plan of a base of headers alone, in GiB: pictures of so many pixels a side, batch 1, rank 16 on attention and feed-forwards,
/// bf16 on an NF4 base with `gradient_checkpointing`, samples of the same size.
pub(crate) fn planned(folder: &Path, base: &Path, side: usize, keys: &[&str]) -> f64 {
    phases(folder, base, side, keys).1
}

/// The same, and beside it what the tensors of each phase take, by its name.
pub(crate) fn phases(folder: &Path, base: &Path, side: usize, keys: &[&str]) -> (BTreeMap<String, f64>, f64) {
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
    let plan = plan(&super::config(folder, &[&own[..], keys].concat()), &Plugins::default()).unwrap();
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let phases = plan.as_configured.phases.iter();
    let phases: BTreeMap<String, f64> =
        phases.map(|own| (format!("{:?}", own.phase), gib(own.parts.total()))).collect();
    let peak = gib(plan.as_configured.peak());
    println!("{side} {keys:?}: {peak:.2} GiB, {phases:.2?}");
    (phases, peak)
}
