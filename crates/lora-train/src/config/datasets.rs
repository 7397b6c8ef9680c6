//! The part of a configuration that says what is trained on. The same keys stand at the top, where they are defaults,
//! and in each table of `datasets`; sd-scripts' dataset files become such tables in [`lora_import::sd_scripts`].

use std::path::{Path, PathBuf};

use lora_data::DatasetOptions;
use lora_data::bucket::{BucketOptions, Buckets, Framing};
use lora_data::dataset::Role;
use serde_json::{Map, Value};

use super::read::Reader;

/// What the keys of a dataset say, before it is known whether its sizes fit each other.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DatasetValues {
    /// What needs no look at other keys. `framing` is not among it.
    pub options: DatasetOptions,
    /// Whether each picture goes to the bucket nearest to its aspect.
    pub enable_bucket: bool,
    /// The limits of buckets; their resolution is the size of pictures without buckets, too.
    pub buckets: BucketOptions,
    /// What the loss of regularisation pictures is multiplied with.
    pub prior_loss_weight: f64,
}

/// One dataset's own keys.
pub(super) struct Table {
    /// How messages call it.
    pub(super) label: String,
    /// Datasets of one group share their regularisation pictures.
    pub(super) group: usize,
    pub(super) keys: Map<String, Value>,
}

/// Keys that say what the subject's pictures are. Regularisation pictures, which show what is not the subject, do not
/// inherit them. Prefix and suffix they do, as in sd-scripts (`config_util.py` falls back to the arguments for every
/// subset).
const OF_THE_SUBJECT: &[&str] = &["trigger_word", "class_tokens", "metadata_file", "mask_dir"];

/// The reader of a table of regularisation pictures, which has of these keys its own.
fn of_the_class(mut nested: Reader, own: &Map<String, Value>) -> Reader {
    nested.values.retain(|key, _| own.contains_key(key) || !OF_THE_SUBJECT.contains(&key.as_str()));
    nested
}

/// All datasets of a configuration. Without `required`, one that names none is no problem.
pub(super) fn read(reader: &mut Reader, required: bool) -> Vec<DatasetOptions> {
    let values = DatasetValues::read(reader, 0);
    let top = values.options(reader);
    let mut tables = Vec::new();
    if reader.has("datasets") {
        tables.extend(reader.given("datasets").tables().into_iter().enumerate().map(|(index, keys)| Table {
            label: format!("datasets[{index}]"),
            group: 0,
            keys,
        }));
    }
    if let Some(path) = reader.given("dataset_config").text() {
        match lora_import::sd_scripts::subsets(Path::new(&path)) {
            Ok(subsets) => tables.extend(subsets.into_iter().map(|mut subset| {
                // No such file has this key: what it implies gives way to what is said.
                if reader.has("caption_lines") {
                    subset.keys.remove("caption_lines");
                }
                Table { label: subset.label, group: subset.group, keys: subset.keys }
            })),
            Err(problems) => problems.into_iter().for_each(|problem| reader.problem(Some("dataset_config"), problem)),
        }
    }
    let named = reader.has("train_data_dir");
    let others = reader.has("datasets") || reader.has("dataset_config");
    if named && others {
        reader.problem(Some("train_data_dir"), "give it, or datasets, or dataset_config; only one of them");
    } else if required && !others {
        reader.given("train_data_dir").required_text();
    }
    let mut all = if named { vec![top] } else { Vec::new() };
    if let Some(path) = reader.given("reg_data_dir").text() {
        let mut nested = of_the_class(reader.nested(&Map::new()), &Map::new());
        let mut regularisation = DatasetValues::read(&mut nested, 0);
        regularisation.options.path = path.into();
        regularisation.options.scan.repeats = 1;
        regularisation.options.scan.role = Role::Regularisation;
        all.push(regularisation.options(&mut nested));
    }
    for table in tables {
        let mut nested = reader.nested(&table.keys);
        if nested.values.get("is_reg") == Some(&Value::Bool(true)) {
            nested = of_the_class(nested, &table.keys);
        }
        let options = DatasetValues::read(&mut nested, table.group).options(&mut nested);
        nested.given("train_data_dir").required_text();
        reader.absorb(nested, &table.label, &table.keys);
        all.push(options);
    }
    all
}

impl DatasetValues {
    /// The keys of a table, or of the configuration itself.
    fn read(reader: &mut Reader, group: usize) -> Self {
        let options = DatasetOptions { group, ..DatasetOptions::of(PathBuf::new()) };
        let buckets = BucketOptions { resolution: (0, 0), min: 0, max: 0, step: 0, no_upscale: false };
        let mut values = Self { options, enable_bucket: false, buckets, prior_loss_weight: 1.0 };
        let keys = reader.keys().clone();
        keys.read_dataset(reader, &mut values);
        values
    }

    /// The dataset, with its buckets and its share in the loss.
    fn options(self, reader: &mut Reader) -> DatasetOptions {
        let mut options = self.options;
        options.framing = match Buckets::new(self.buckets) {
            Ok(buckets) if self.enable_bucket => Framing::Buckets(buckets),
            Err(lora_data::Error::Option { key, value, reason }) if self.enable_bucket => {
                reader.problem(Some(key), format!("{value}: {reason}"));
                Framing::Fixed(self.buckets.resolution)
            }
            _ => Framing::Fixed(self.buckets.resolution),
        };
        if options.scan.role == Role::Regularisation {
            options.loss_weight *= self.prior_loss_weight;
        }
        options
    }
}
