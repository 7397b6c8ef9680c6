//! Writing what is trained, with what its file says of the run.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lora_core::DType;
use lora_data::bucket::Framing;
use lora_data::dataset::{Role, tag_frequency};
use lora_data::source::Shape;
use lora_io::adapter::kohya;
use lora_io::metadata::{BucketRecord, TrainingRecord};

use super::{Session, Trained};
use crate::{Error, Result};

impl Session {
    /// Writes what is trained, as it is now, into the output folder under `name` (no extension): the LoRA, read back and
    /// checked, or a whole checkpoint where whole networks are trained.
    pub fn save(&mut self, name: &str) -> Result<PathBuf> {
        if !self.parameters.is_finite()? {
            return Err(Error::NotFinite {
                stage: "the trained weights".into(),
                place: format!(" at step {}", self.step),
                remedy: "use a lower learning_rate; nothing was written",
            });
        }
        let path = self.config.output_dir.join(format!("{name}.safetensors"));
        self.with_averages(|session| {
            match &session.trained {
                Trained::Adapter(trained) => {
                    let mut adapter = trained.adapter.export()?;
                    adapter.metadata = session.record(name).to_metadata();
                    let family = session.checkpoint.family();
                    kohya::write(&path, &adapter, Some(family), session.config.save_precision)?;
                }
                Trained::Whole(whole) => {
                    let mut metadata = BTreeMap::from([("modelspec.title".to_owned(), name.to_owned())]);
                    if let Some(labels) = session.checkpoint.family().labels {
                        let architecture = labels.architecture(session.record(name).velocity);
                        metadata.insert("modelspec.architecture".to_owned(), architecture.to_owned());
                    }
                    whole.write(&path, &session.checkpoint, session.config.save_precision, &metadata)?;
                }
            }
            Ok(path.clone())
        })
    }

    /// Does something with the running averages in place of the trained values, where there are any.
    pub(super) fn with_averages<T>(&mut self, action: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.parameters.exchange_averages()?;
        let result = action(self);
        self.parameters.exchange_averages()?;
        result
    }

    fn record(&self, name: &str) -> TrainingRecord {
        let config = &self.config;
        let mut record = TrainingRecord::default();
        record.family = Some(self.checkpoint.family());
        record.output_name = name.to_owned();
        record.rank = config.lora_rank;
        record.alpha = config.lora_alpha;
        record.dropout = (config.lora_dropout > 0.0).then_some(config.lora_dropout);
        record.learning_rate = config.learning_rate;
        record.batches_per_epoch = self.plan.batches_per_epoch;
        record.epochs = self.plan.epochs;
        record.epoch = self.step.div_ceil(self.plan.steps_per_epoch);
        record.steps = self.step;
        record.max_train_steps = self.plan.steps;
        record.batch_size = config.batch_size;
        record.gradient_accumulation_steps = config.gradient_accumulation_steps;
        record.mixed_precision = if self.precision == DType::F32 { "no".into() } else { self.precision.to_string() };
        record.seed = config.seed;
        record.resolution = config.max_resolution;
        record.buckets = self.pictures.datasets().find_map(|dataset| match &dataset.framing {
            Framing::Buckets(buckets) => Some(BucketRecord {
                min: buckets.options().min,
                max: buckets.options().max,
                no_upscale: buckets.options().no_upscale,
                visits: self.sampler.visits_by_shape().into_iter().filter_map(picture_size).collect(),
            }),
            _ => None,
        });
        record.lr_scheduler = format!("{:?}", config.lr_scheduler).to_lowercase();
        record.lr_warmup_steps = self.lr_schedule.warmup();
        record.optimizer = self.parameters.optimiser().record().to_owned();
        record.max_grad_norm = config.max_grad_norm;
        // One place for them in the file: the first dataset's.
        if let Some(dataset) = self.pictures.datasets().next() {
            let captions = &dataset.captions;
            record.caption_dropout_rate = captions.dropout;
            record.caption_dropout_every_n_epochs = captions.dropout_every_n_epochs;
            record.caption_tag_dropout_rate = captions.tag_dropout;
            record.shuffle_caption = captions.shuffle;
            record.keep_tokens = captions.keep_tokens;
        }
        record.cache_latents = self.examples.are_kept();
        record.gradient_checkpointing = config.gradient_checkpointing;
        record.base_name =
            config.base_model.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        record.base_legacy_hash = self.base_hashes.as_ref().map(|(legacy, _)| legacy.clone());
        record.base_sha256 = self.base_hashes.as_ref().map(|(_, sha256)| sha256.clone());
        for item in self.pictures.items() {
            let (folders, visits) = match item.role {
                Role::Regularisation => (&mut record.regularisation_folders, item.repeats),
                _ => (&mut record.folders, 0),
            };
            folders.entry(item.folder.to_string()).or_insert((item.repeats, 0)).1 += 1;
            record.regularisation_pictures += visits;
        }
        record.pictures = self.plan.visits_per_epoch - record.regularisation_pictures;
        record.prior_loss_weight = config.prior_loss_weight;
        record.tag_frequency = tag_frequency(self.pictures.items());
        record.init_from = self.init_from.clone();
        self.base.record(&mut record);
        record.program = concat!("lora/", env!("CARGO_PKG_VERSION")).into();
        record
    }
}

/// Visits of pictures of one size.
fn picture_size((shape, visits): (Shape, usize)) -> Option<((usize, usize), usize)> {
    match shape {
        Shape::Picture(width, height) => Some(((width, height), visits)),
        _ => None,
    }
}
