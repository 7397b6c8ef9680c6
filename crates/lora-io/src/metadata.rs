//! What an adapter file says of its training, in the words that the field's tools read: sd-scripts' `ss_*` keys and the
//! Stability `modelspec.*` keys (version 1.0.1). Every value is text; booleans are `True` and `False`, nothing is
//! `None`.
//!
//! Times and session numbers are left out, so that the same run gives the same bytes.

use std::collections::BTreeMap;
use std::fmt::Display;

use lora_core::{Adapter, AdapterModule, ModulePath};

use crate::family::Family;

/// A run as its file describes it. `None` leaves a key out or writes `None`, as sd-scripts does for it.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct TrainingRecord {
    /// What kind of base was trained on; without it the keys that name the base are left out.
    pub family: Option<&'static Family>,
    /// File stem of the adapter; the WebUI offers it as an alias.
    pub output_name: String,
    /// Rank.
    pub rank: usize,
    /// Alpha.
    pub alpha: f64,
    /// Dropout inside the adapter.
    pub dropout: Option<f64>,
    /// Base learning rate, and those of the parts that were trained.
    pub learning_rate: f64,
    /// Learning rate of the U-Net's adapter.
    pub unet_lr: Option<f64>,
    /// Learning rate of the text encoder's adapter.
    pub text_encoder_lr: Option<f64>,
    /// Pictures, repeats included.
    pub pictures: usize,
    /// Batches of an epoch.
    pub batches_per_epoch: usize,
    /// Epochs planned, and the one this file was saved in.
    pub epochs: usize,
    /// Epoch at the time of saving, from 1.
    pub epoch: usize,
    /// Optimiser steps done.
    pub steps: usize,
    /// Optimiser steps planned.
    pub max_train_steps: usize,
    /// Pictures of a micro-batch.
    pub batch_size: usize,
    /// Micro-batches of a step.
    pub gradient_accumulation_steps: usize,
    /// `no`, `fp16` or `bf16`.
    pub mixed_precision: String,
    /// Seed.
    pub seed: u64,
    /// Width and height in pixels.
    pub resolution: (usize, usize),
    /// The aspect-ratio buckets, where there are any.
    pub buckets: Option<BucketRecord>,
    /// Clip skip; `None` for 1.
    pub clip_skip: Option<usize>,
    /// Tokens of a caption; `None` for 75.
    pub max_token_length: Option<usize>,
    /// Schedule of the learning rate.
    pub lr_scheduler: String,
    /// Warm-up steps.
    pub lr_warmup_steps: usize,
    /// Optimiser and its arguments.
    pub optimizer: String,
    /// Limit of the gradient's norm.
    pub max_grad_norm: f64,
    /// Noise offset.
    pub noise_offset: Option<f64>,
    /// Min-SNR γ.
    pub min_snr_gamma: Option<f64>,
    /// Share of captions dropped.
    pub caption_dropout_rate: f64,
    /// All captions are left out every so many epochs; 0 for never.
    pub caption_dropout_every_n_epochs: u64,
    /// Probability of leaving out a tag.
    pub caption_tag_dropout_rate: f64,
    /// Whether tags are shuffled.
    pub shuffle_caption: bool,
    /// Tags at the front that stay.
    pub keep_tokens: usize,
    /// Whether latents were cached.
    pub cache_latents: bool,
    /// File name of the base model, without its folder.
    pub base_name: String,
    /// AutoV1 of the base model's file.
    pub base_legacy_hash: Option<String>,
    /// SHA-256 of the base model's file.
    pub base_sha256: Option<String>,
    /// Whether the base predicts the velocity instead of the noise.
    pub velocity: bool,
    /// Whether it is trained by flow matching, which `modelspec.prediction_type` has no word for.
    pub flow: bool,
    /// Further keys with their values.
    pub further: Vec<(&'static str, String)>,
    /// Per folder: repeats and pictures.
    pub folders: BTreeMap<String, (usize, usize)>,
    /// Whether activations were computed again in the backward pass.
    pub gradient_checkpointing: bool,
    /// Visits of regularisation pictures in an epoch.
    pub regularisation_pictures: usize,
    /// Per folder of regularisation pictures: repeats and pictures.
    pub regularisation_folders: BTreeMap<String, (usize, usize)>,
    /// How much regularisation pictures count in the loss.
    pub prior_loss_weight: f64,
    /// Per folder: how often each comma-separated tag, in lower case, occurs.
    pub tag_frequency: BTreeMap<String, BTreeMap<String, usize>>,
    /// Words that stand for the subject in all captions of a dataset; empty for none.
    pub trigger_phrase: String,
    /// How captions were cleaned before tokenising, `ftfy` or `none`.
    pub text_cleaning: String,
    /// Adapter that training went on from: its file name and `sshs_model_hash`.
    pub init_from: Option<(String, String)>,
    /// Adapters in the base that it was trained on, as [`crate::merge::record`] makes it.
    pub fused: Option<String>,
    /// Name and version of this program.
    pub program: String,
}

/// The aspect-ratio buckets of a run.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BucketRecord {
    /// Shortest side that a bucket may have.
    pub min: usize,
    /// Longest side that a bucket may have.
    pub max: usize,
    /// Whether small pictures were left at their size.
    pub no_upscale: bool,
    /// Visits per epoch by width and height.
    pub visits: BTreeMap<(usize, usize), usize>,
}

impl TrainingRecord {
    /// The metadata of the file.
    pub fn to_metadata(&self) -> BTreeMap<String, String> {
        let mut map = BTreeMap::new();
        let mut set = |key: &str, value: String| {
            map.insert(key.to_owned(), value);
        };
        // The six that sd-scripts writes even when asked for no metadata (arguments only where there are any).
        if let Some(labels) = self.family.and_then(|family| family.labels) {
            set("ss_v2", python_bool(labels.second_version));
            set("ss_base_model_version", labels.version(self.velocity).into());
            set("modelspec.architecture", format!("{}/lora", labels.architecture(self.velocity)));
            set("modelspec.implementation", labels.implementation.into());
        }
        set("ss_network_module", "networks.lora".into());
        set("ss_network_dim", self.rank.to_string());
        set("ss_network_alpha", python_float(self.alpha));
        set("ss_network_dropout", optional(self.dropout.map(python_float)));

        set("ss_output_name", self.output_name.clone());
        set("ss_learning_rate", python_float(self.learning_rate));
        set("ss_unet_lr", optional(self.unet_lr.map(python_float)));
        set("ss_text_encoder_lr", optional(self.text_encoder_lr.map(python_float)));
        set("ss_num_train_images", self.pictures.to_string());
        set("ss_num_reg_images", self.regularisation_pictures.to_string());
        set("ss_num_batches_per_epoch", self.batches_per_epoch.to_string());
        set("ss_num_epochs", self.epochs.to_string());
        set("ss_epoch", self.epoch.to_string());
        set("ss_steps", self.steps.to_string());
        set("ss_max_train_steps", self.max_train_steps.to_string());
        set("ss_batch_size_per_device", self.batch_size.to_string());
        set("ss_total_batch_size", (self.batch_size * self.gradient_accumulation_steps).to_string());
        set("ss_gradient_accumulation_steps", self.gradient_accumulation_steps.to_string());
        set("ss_gradient_checkpointing", python_bool(self.gradient_checkpointing));
        set("ss_mixed_precision", self.mixed_precision.clone());
        set("ss_seed", self.seed.to_string());
        set("ss_resolution", format!("({}, {})", self.resolution.0, self.resolution.1));
        set("ss_enable_bucket", python_bool(self.buckets.is_some()));
        if let Some(buckets) = &self.buckets {
            set("ss_min_bucket_reso", buckets.min.to_string());
            set("ss_max_bucket_reso", buckets.max.to_string());
            set("ss_bucket_no_upscale", python_bool(buckets.no_upscale));
            let list = buckets.visits.iter().enumerate().map(|(index, ((width, height), visits))| {
                (index.to_string(), serde_json::json!({ "resolution": [width, height], "count": visits }))
            });
            let list: serde_json::Map<_, _> = list.collect();
            set("ss_bucket_info", serde_json::json!({ "buckets": list }).to_string());
        }
        set("ss_clip_skip", optional(self.clip_skip));
        set("ss_max_token_length", optional(self.max_token_length));
        set("ss_lr_scheduler", self.lr_scheduler.clone());
        set("ss_lr_warmup_steps", self.lr_warmup_steps.to_string());
        set("ss_optimizer", self.optimizer.clone());
        set("ss_max_grad_norm", python_float(self.max_grad_norm));
        set("ss_noise_offset", optional(self.noise_offset.map(python_float)));
        set("ss_min_snr_gamma", optional(self.min_snr_gamma.map(python_float)));
        set("ss_shuffle_caption", python_bool(self.shuffle_caption));
        set("ss_keep_tokens", self.keep_tokens.to_string());
        set("ss_caption_dropout_every_n_epochs", self.caption_dropout_every_n_epochs.to_string());
        set("ss_caption_tag_dropout_rate", python_float(self.caption_tag_dropout_rate));
        set("ss_caption_dropout_rate", python_float(self.caption_dropout_rate));
        set("ss_cache_latents", python_bool(self.cache_latents));
        set("ss_sd_model_name", self.base_name.clone());
        if let Some(hash) = &self.base_legacy_hash {
            set("ss_sd_model_hash", hash.clone());
        }
        if let Some(hash) = &self.base_sha256 {
            set("ss_new_sd_model_hash", hash.clone());
        }
        let folders = |folders: &BTreeMap<String, (usize, usize)>| {
            let entry = |(folder, (repeats, pictures)): (&String, &(usize, usize))| {
                (folder.clone(), serde_json::json!({ "n_repeats": repeats, "img_count": pictures }))
            };
            json(&folders.iter().map(entry).collect::<BTreeMap<_, _>>())
        };
        set("ss_dataset_dirs", folders(&self.folders));
        if !self.regularisation_folders.is_empty() {
            set("ss_reg_dataset_dirs", folders(&self.regularisation_folders));
            set("ss_prior_loss_weight", python_float(self.prior_loss_weight));
        }
        set("ss_tag_frequency", json(&self.tag_frequency));
        set("lora_text_cleaning", self.text_cleaning.clone());
        if let Some((name, hash)) = &self.init_from {
            set("lora_init_from", name.clone());
            set("lora_init_from_hash", hash.clone());
        }
        if let Some(fused) = &self.fused {
            set(FUSED, fused.clone());
        }

        set("modelspec.sai_model_spec", "1.0.1".into());
        set("modelspec.implementation_version", self.program.clone());
        set("modelspec.title", self.output_name.clone());
        if !self.trigger_phrase.is_empty() {
            set("modelspec.trigger_phrase", self.trigger_phrase.clone());
        }
        set("modelspec.resolution", format!("{}x{}", self.resolution.0, self.resolution.1));
        if !self.flow {
            set("modelspec.prediction_type", if self.velocity { "v" } else { "epsilon" }.into());
        }
        for (key, value) in &self.further {
            set(key, value.clone());
        }
        if let Some(clip_skip) = self.clip_skip {
            set("modelspec.encoder_layer", clip_skip.to_string());
        }
        map
    }
}

/// Keys that say which base an adapter was made for.
const OF_BASE: &[&str] = &[
    "ss_base_model_version",
    "ss_v2",
    "modelspec.architecture",
    "modelspec.implementation",
    "base_model_name_or_path",
    "task_type",
];

/// What a LoRA that was not trained says of itself: the base's family, where its labels do not depend on what it
/// predicts, and rank and alpha where all modules have the same.
pub fn describe(adapter: &mut Adapter, family: Option<&Family>) {
    let mut set = |key: &str, value: &str| {
        adapter.metadata.insert(key.to_owned(), value.to_owned());
    };
    if let Some(labels) = family.and_then(|family| family.labels) {
        if labels.version[0] == labels.version[1] {
            set("ss_base_model_version", labels.version[0]);
        }
        if labels.architecture[0] == labels.architecture[1] {
            set("modelspec.architecture", &format!("{}/lora", labels.architecture[0]));
        }
        set("modelspec.implementation", labels.implementation);
        set("ss_v2", &python_bool(labels.second_version));
    }
    set("ss_network_module", "networks.lora");
    // Values that `refresh` puts right or takes away.
    set("ss_network_dim", "");
    set("ss_network_alpha", "");
    refresh(adapter);
}

/// What adapters say of their base, where none of them says otherwise: each key of the first that has it.
pub fn of_base<'a>(adapters: impl IntoIterator<Item = &'a Adapter>) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for adapter in adapters {
        for key in OF_BASE {
            if let Some(value) = adapter.metadata.get(*key) {
                all.entry((*key).to_owned()).or_insert_with(|| value.clone());
            }
        }
    }
    all
}

/// The key of the adapters in the base that an adapter was trained on, as [`crate::merge::record`] makes it.
pub const FUSED: &str = "lora_fused";

/// The key of a hash over a file's tensors, which is none of another file's.
pub(crate) const HASH: &str = "modelspec.hash_sha256";

/// Puts right what an adapter's metadata says of its network, after its tensors changed: rank, alpha, module and the
/// hash of its tensors. What one number cannot say any more is left out.
pub fn refresh(adapter: &mut Adapter) {
    let alphas = adapter.modules.values().map(|module| module.alpha).collect::<Vec<_>>();
    refresh_with(&mut adapter.metadata, &adapter.modules, &alphas);
}

/// The same for modules that are written with other alphas than they have, in their order.
pub(crate) fn refresh_with(
    metadata: &mut BTreeMap<String, String>,
    modules: &BTreeMap<ModulePath, AdapterModule>,
    alphas: &[f64],
) {
    metadata.remove(HASH);
    // The layers that trainers name this rank and alpha of; kernels have their own among the arguments.
    let is_spatial = |module: &AdapterModule| {
        module.tensors.get("down").is_some_and(|down| down.shape().get(2).is_some_and(|&kernel| kernel > 1))
    };
    let spatial = modules.values().filter(|module| is_spatial(module)).count();
    let named: Vec<(usize, f64)> = modules
        .values()
        .zip(alphas)
        .filter(|(module, _)| !module.is_of_vectors() && (spatial == modules.len() || !is_spatial(module)))
        .map(|(module, &alpha)| (module.rank, alpha))
        .collect();
    let Some(&(rank, alpha)) = named.first() else { return };
    let mut set = |key: &str, value: Option<String>| {
        if let Some(old) = metadata.remove(key)
            && let Some(value) = value
        {
            // `4` and `4.0` say the same.
            let same = old.trim().parse::<f64>().is_ok_and(|old| value.parse() == Ok(old));
            metadata.insert(key.to_owned(), if same { old } else { value });
        }
    };
    set("ss_network_dim", named.iter().all(|own| own.0 == rank).then(|| rank.to_string()));
    set("ss_network_alpha", named.iter().all(|own| own.1 == alpha).then(|| python_float(alpha)));
    let plain = modules.values().all(AdapterModule::is_lora);
    set("ss_network_module", plain.then(|| "networks.lora".to_owned()));
    set("ss_network_args", None);
}

fn python_bool(value: bool) -> String {
    if value { "True" } else { "False" }.into()
}

/// A float as Python prints it: whole numbers keep their `.0`, small and large ones have an exponent of two digits.
fn python_float(value: f64) -> String {
    if value == 0.0 || (1e-4..1e16).contains(&value.abs()) {
        return format!("{value:?}");
    }
    let text = format!("{value:e}");
    let Some((mantissa, exponent)) = text.split_once('e') else { return text };
    match exponent.strip_prefix('-') {
        Some(digits) => format!("{mantissa}e-{digits:0>2}"),
        None => format!("{mantissa}e+{exponent:0>2}"),
    }
}

fn optional(value: Option<impl Display>) -> String {
    value.map_or_else(|| "None".into(), |value| value.to_string())
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("maps of text and numbers always serialise")
}

#[cfg(test)]
mod tests {
    use lora_core::{Component, HostTensor};

    use super::*;
    use crate::family::{sd1, sd2, sdxl};

    #[test]
    fn values_are_python_text() {
        assert_eq!(python_float(1e-5), "1e-05");
        assert_eq!(python_float(2.5e-6), "2.5e-06");
        assert_eq!(python_float(0.0001), "0.0001");
        assert_eq!(python_float(16.0), "16.0");
        assert_eq!(python_float(1e20), "1e+20");
        assert_eq!(python_float(0.0), "0.0");
        let record = |family| TrainingRecord { family: Some(family), rank: 8, alpha: 4.0, ..TrainingRecord::default() };
        let map = record(&sd1::FAMILY).to_metadata();
        assert_eq!(map["ss_v2"], "False");
        assert_eq!(map["ss_clip_skip"], "None");
        assert_eq!(map["ss_network_alpha"], "4.0");
        assert_eq!(map["modelspec.architecture"], "stable-diffusion-v1/lora");
        assert_eq!(
            (map["ss_base_model_version"].as_str(), map["modelspec.implementation"].as_str()),
            ("sd_v1", "diffusers")
        );
        let map = TrainingRecord { velocity: true, ..record(&sd2::FAMILY) }.to_metadata();
        assert_eq!((map["ss_v2"].as_str(), map["ss_base_model_version"].as_str()), ("True", "sd_v2_v"));
        assert_eq!(map["modelspec.architecture"], "stable-diffusion-v2-768-v/lora");
        let map = record(&sdxl::FAMILY).to_metadata();
        assert_eq!((map["ss_v2"].as_str(), map["ss_base_model_version"].as_str()), ("False", "sdxl_base_v1-0"));
        assert_eq!(map["modelspec.architecture"], "stable-diffusion-xl-v1-base/lora");
    }

    #[test]
    fn changed_tensors_are_what_the_metadata_says_or_it_says_nothing() {
        let module = |rank: usize, kernel: &[usize]| {
            let down = HostTensor::zeros([&[rank, 3], kernel].concat());
            AdapterModule::of_factors(down, HostTensor::zeros([5, rank]), false, rank, rank as f64 / 2.0)
        };
        let path = |name: &str| ModulePath::new(Component::UNET, name);
        let said = [
            ("ss_network_dim", "8"),
            ("ss_network_alpha", "8"),
            ("ss_network_args", "{\"conv_dim\": 4}"),
            ("ss_network_module", "lycoris.kohya"),
            ("modelspec.hash_sha256", "0xabc"),
            ("ss_output_name", "cats"),
        ];
        let metadata: BTreeMap<String, String> = said.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let mut adapter = Adapter { metadata: metadata.clone(), ..Adapter::default() };
        adapter.modules.insert(path("a"), module(2, &[]));
        adapter.modules.insert(path("b"), module(2, &[]));
        adapter.modules.insert(path("c"), module(1, &[3, 3]));
        refresh(&mut adapter);
        let found: Vec<_> = adapter.metadata.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let expected = [
            ("ss_network_alpha", "1.0"),
            ("ss_network_dim", "2"),
            ("ss_network_module", "networks.lora"),
            ("ss_output_name", "cats"),
        ];
        assert_eq!(found, expected);
        adapter.modules.insert(path("b"), module(4, &[]));
        refresh(&mut adapter);
        assert_eq!(adapter.metadata.keys().collect::<Vec<_>>(), ["ss_network_module", "ss_output_name"]);
    }
}
