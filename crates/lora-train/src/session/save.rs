//! Writing what is trained, with what its file says of the run.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::Write;
use std::path::PathBuf;

use lora_core::DType;
use lora_io::adapter::{peft, write_for};
use lora_io::atomic;
use lora_io::metadata::TrainingRecord;

use super::{Session, Trained};
use crate::event::{Event, Holds, Saved};
use crate::{Error, Result};

impl Session {
    /// Writes what is trained, as it is now, into the output folder under `name` (no extension): the LoRA in the layout that
    /// most programs load for its base, kohya's file for image models, PEFT's folder for language models, read back and
    /// checked; or a whole checkpoint where whole networks are trained.
    ///
    /// # Errors
    /// Where a trained number is not finite, or the file cannot be written.
    pub fn save(&mut self, name: &str) -> Result<PathBuf> {
        if !self.parameters.is_finite()? {
            return Err(Error::NotFinite {
                stage: "the trained weights".into(),
                place: format!(" at step {}", self.progress.step),
                remedy: "use a lower learning_rate; nothing was written",
            });
        }
        let (peft, path) = (self.is_folder(), self.save_path(name));
        self.with_averages(|session| {
            match &session.trained {
                Trained::Adapter(trained) => {
                    let mut adapter = trained.adapter.export()?;
                    adapter.metadata = session.record(name).to_metadata();
                    let precision = session.config.save_precision;
                    if peft {
                        let base_model = session.config.base_model.display().to_string();
                        let dropout = session.config.lora_dropout;
                        let extra = peft::Extra { base_model: Some(base_model), dropout };
                        peft::write(&path, &adapter, precision, &extra)?;
                        let card = session.card(name);
                        atomic::write(path.join("README.md"), |file| file.write_all(card.as_bytes()))?;
                    } else {
                        write_for(&path, &adapter, session.origin.checkpoint.family(), precision)?;
                    }
                }
                Trained::Whole(whole) => {
                    let mut metadata = BTreeMap::from([("modelspec.title".to_owned(), name.to_owned())]);
                    if let Some(labels) = session.origin.checkpoint.family().labels {
                        let architecture = labels.architecture(session.record(name).velocity);
                        metadata.insert("modelspec.architecture".to_owned(), architecture.to_owned());
                    }
                    whole.write(&path, &session.origin.checkpoint, session.config.save_precision, &metadata)?;
                }
            }
            Ok(())
        })?;
        let weights = if peft { path.join("adapter_model.safetensors") } else { path.clone() };
        let bytes = std::fs::metadata(&weights).map_or(0, |file| file.len());
        let sha256 = Some(lora_io::hash::file_sha256(&weights)?);
        let step = self.progress.step;
        self.tell(Event::Saved(Saved { step, holds: Holds::Weights, path: path.clone(), bytes, sha256 }));
        Ok(path)
    }

    /// Whether what is saved is a folder of PEFT's.
    fn is_folder(&self) -> bool {
        self.adapter().is_some() && !self.origin.checkpoint.family().image
    }

    /// Where [`Session::save`] writes what it saves under a name.
    pub fn save_path(&self, name: &str) -> PathBuf {
        let name = if self.is_folder() { name.to_owned() } else { format!("{name}.safetensors") };
        self.config.output_dir.join(name)
    }

    /// Does something with the running averages in place of the trained values, where there are any.
    pub(super) fn with_averages<T>(&mut self, action: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.parameters.exchange_averages()?;
        let result = action(self);
        self.parameters.exchange_averages()?;
        result
    }

    /// The model card of a folder: what it is an adapter of, and how it was trained.
    fn card(&self, name: &str) -> String {
        let config = &self.config;
        let base = &config.base_model;
        let base = lora_io::hub::name(base).map(Into::into).or_else(|| base.file_name().map(OsStr::to_string_lossy));
        let base = base.unwrap_or_default();
        let modules = config.target_modules.join(", ");
        format!(
            "---\nlibrary_name: peft\nbase_model: {base}\ntags:\n- lora\n---\n\n# {name}\n\nAn adapter ({}) for {base}, of rank \
             {} and alpha {}, on {modules}. Trained for {} of {} steps with {} at a learning rate of {:e}, on {} rows of \
             text, by lora {}.\n\nLoad it with `PeftModel.from_pretrained(model, \"{name}\")`.\n",
            config.variant,
            config.lora_rank,
            config.lora_alpha,
            self.progress.step,
            self.plan.steps,
            config.optimizer,
            config.learning_rate,
            self.feed.source.count(),
            env!("CARGO_PKG_VERSION"),
        )
    }

    fn record(&self, name: &str) -> TrainingRecord {
        let config = &self.config;
        let mut record = TrainingRecord::default();
        record.family = Some(self.origin.checkpoint.family());
        record.output_name = name.to_owned();
        record.rank = config.lora_rank;
        record.alpha = config.lora_alpha;
        record.dropout = (config.lora_dropout > 0.0).then_some(config.lora_dropout);
        record.learning_rate = config.learning_rate;
        record.batches_per_epoch = self.plan.batches_per_epoch;
        record.epochs = self.plan.epochs;
        record.epoch = self.progress.step.div_ceil(self.plan.steps_per_epoch);
        record.steps = self.progress.step;
        record.max_train_steps = self.plan.steps;
        record.batch_size = config.batch_size;
        record.gradient_accumulation_steps = self.plan.accumulation;
        record.mixed_precision = if self.precision == DType::F32 { "no".into() } else { self.precision.to_string() };
        record.seed = config.seed;
        record.resolution = config.max_resolution;
        record.lr_scheduler = format!("{:?}", config.lr_scheduler).to_lowercase();
        record.lr_warmup_steps = self.lr_schedule.warmup();
        record.optimizer = self.parameters.optimiser().record().to_owned();
        record.max_grad_norm = config.max_grad_norm;
        record.cache_latents = self.feed.examples.are_kept();
        record.gradient_checkpointing = config.gradient_checkpointing;
        record.base_name =
            config.base_model.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        record.base_legacy_hash = self.origin.base_hashes.as_ref().map(|(legacy, _)| legacy.clone());
        record.base_sha256 = self.origin.base_hashes.as_ref().map(|(_, sha256)| sha256.clone());
        self.feed.source.record(&mut record);
        record.prior_loss_weight = config.prior_loss_weight;
        record.init_from = self.origin.init_from.clone();
        record.fused = self.origin.checkpoint.fused_record().map(str::to_owned);
        self.base.record(&mut record);
        record.program = concat!("lora/", env!("CARGO_PKG_VERSION")).into();
        record
    }
}
