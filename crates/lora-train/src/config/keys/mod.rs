//! Every configuration key as a value: its name, what the reference says of it, how it is read into the configuration, and
//! what a resumed run may do with it. The reference in `docs/config.md`, the advice on unknown keys and the check of a
//! resumed run are made from these values; a key stands nowhere else but as a field of [`TrainConfig`].
//!
//! Keys are grouped by subject, a file each. A base model brings those that only it has, as [`stable_diffusion`] does, and a
//! program registers its own in [`Keys`].

mod adapter;
mod data;
pub mod denoising;
pub mod flow_matching;
mod idle;
pub mod language;
mod memory;
mod optimisation;
pub mod pictures;
mod prior;
mod saving;
pub mod sdxl;
mod slider;
pub mod stable_diffusion;
mod table;

use std::fmt::Debug;

pub use super::datasets::DatasetValues;
pub use super::extra::{Extra, Setting};
pub use super::given::Given;
pub use table::Keys;

use super::TrainConfig;

/// One key.
#[derive(Debug)]
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// What values it takes.
    pub values: &'static str,
    /// Its default, `required` where there is none.
    pub default: &'static str,
    /// What it does.
    pub meaning: &'static str,
    /// What it does to video memory; empty where nothing.
    pub memory: &'static str,
    /// What a resumed run may do with it.
    pub resumed: Resumed,
    /// Where its value goes. It is called whether the key is given or not.
    pub reads: Reads,
}

/// Shows the value of a key as the state of a run records it.
pub type Show = fn(&TrainConfig) -> String;

/// What a resumed run may do with a key.
#[derive(Debug, Clone, Copy)]
pub enum Resumed {
    /// The value must stay: with another the run would be another run.
    Fixed(Show),
    /// The same, recorded where it is not this value: that is what states mean which were written before there was the key.
    FixedSince(&'static str, Show),
    /// The value may change, which is noted.
    Free(Show),
    /// The same, under a name that is not the key's.
    FreeAs(&'static str, Show),
    /// It is recorded with something else: another key, the data ([`lora_data::source::Identity`]), the base's digest.
    Elsewhere,
    /// It does not touch what is trained.
    Unrecorded,
}

/// Reads a key into the configuration of the run.
pub type ReadRun = fn(&mut Given<'_>, &mut TrainConfig);
/// Reads a key into the settings of a dataset.
pub type ReadDataset = fn(&mut Given<'_>, &mut DatasetValues);

/// Where the value of a key goes.
#[derive(Debug, Clone, Copy)]
pub enum Reads {
    /// Into the configuration.
    Run(ReadRun),
    /// Into the configuration; it means nothing where whole networks are trained, and is a mistake there.
    Adapter(ReadRun),
    /// Into the settings of every dataset; each may have a value of its own.
    Dataset(ReadDataset),
    /// Into both; each dataset may have a value of its own.
    Both(ReadRun, ReadDataset),
    /// Into both; one value holds for all datasets.
    Common(ReadRun, ReadDataset),
    /// It says which datasets there are; all such keys are read together.
    WhichDatasets,
    /// Into [`TrainConfig::extra`], under the key's name: for keys that a program registers.
    Extra(fn(&mut Given<'_>) -> Setting),
}

impl Reads {
    /// How it is read into the configuration, if it is.
    fn run(self) -> Option<ReadRun> {
        match self {
            Reads::Run(read) | Reads::Adapter(read) | Reads::Both(read, _) | Reads::Common(read, _) => Some(read),
            Reads::Dataset(_) | Reads::WhichDatasets | Reads::Extra(_) => None,
        }
    }

    /// How it is read into a dataset's settings, if it is.
    fn dataset(self) -> Option<ReadDataset> {
        match self {
            Reads::Dataset(read) | Reads::Both(_, read) | Reads::Common(_, read) => Some(read),
            Reads::Run(_) | Reads::Adapter(_) | Reads::WhichDatasets | Reads::Extra(_) => None,
        }
    }
}

/// Keys that stand together in the reference.
#[derive(Debug)]
pub struct Group {
    /// The section's title.
    pub section: &'static str,
    /// The key of that section that they stand behind; at its end without one.
    pub behind: Option<&'static str>,
    /// The keys, in their order.
    pub keys: &'static [Key],
}

/// A value as the state of a run records it.
pub fn shown(value: &dyn Debug) -> String {
    let text = format!("{value:?}");
    match text.strip_prefix("Some(").and_then(|inner| inner.strip_suffix(')')) {
        Some(inner) => inner.to_owned(),
        None if text == "None" => "none".to_owned(),
        None => text,
    }
}

/// Width and height as the state of a run records them.
fn size((width, height): (usize, usize)) -> String {
    format!("{width}×{height}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_shown_as_people_write_them() {
        assert_eq!(
            (shown(&Some(5.0)), shown(&None::<f64>), shown(&1e-4), size((64, 128))),
            ("5.0".into(), "none".into(), "0.0001".into(), "64×128".into())
        );
    }
}
