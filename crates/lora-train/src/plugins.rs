//! What a user's own crate adds without touching ours: adapter variants, picture processors, optimisers, callbacks,
//! base models and configuration keys, by name.

use std::collections::BTreeMap;
use std::fmt;

use lora_core::variant::VariantRegistry;
use lora_data::processor::ProcessorRegistry;
use lora_torch::TchBackend;

use crate::base::{Bases, Registration};
use crate::callback::Callback;
use crate::config::keys::Keys;
use crate::optimiser::OptimiserRegistry;
use crate::{Error, Result};

type Factory = Box<dyn Fn() -> Box<dyn Callback> + Send + Sync>;

/// Everything that a configuration can name.
#[derive(Default)]
pub struct Plugins {
    /// Adapter variants, for the key `variant`.
    pub variants: VariantRegistry<TchBackend>,
    /// Picture processors, for the key `processors`.
    pub processors: ProcessorRegistry,
    /// Optimisers, for the key `optimizer`.
    pub optimisers: OptimiserRegistry,
    /// Families of base models, for the key `base_model`; [`Plugins::register_base`] adds one with its keys.
    pub bases: Bases,
    /// Keys of the configuration itself; [`crate::config::TrainConfig::from_file_with`] reads those that are added.
    pub keys: Keys,
    callbacks: BTreeMap<String, Factory>,
}

impl Plugins {
    /// Registers a callback for the key `callbacks`; a run makes its own with `make`.
    pub fn register_callback<C: Callback + 'static>(
        &mut self,
        name: impl Into<String>,
        make: impl Fn() -> C + Send + Sync + 'static,
    ) {
        self.callbacks.insert(name.into(), Box::new(move || Box::new(make())));
    }

    /// Registers a family of base models with the keys that it brings.
    ///
    /// # Errors
    /// [`Error::DuplicateKey`] where another base has a key of the same name.
    pub fn register_base(&mut self, registration: Registration) -> Result<()> {
        self.bases.register(registration, &mut self.keys)
    }

    /// The callbacks of a list of names.
    pub(crate) fn callbacks(&self, names: &[String]) -> Result<Vec<Box<dyn Callback>>> {
        let make = |name: &String| {
            let known = || match self.callbacks.is_empty() {
                true => "none".to_owned(),
                false => self.callbacks.keys().cloned().collect::<Vec<_>>().join(", "),
            };
            self.callbacks
                .get(name)
                .map(|make| make())
                .ok_or_else(|| Error::UnknownCallback { name: name.clone(), known: known() })
        };
        names.iter().map(make).collect()
    }
}

impl fmt::Debug for Plugins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plugins")
            .field("variants", &self.variants)
            .field("processors", &self.processors)
            .field("optimisers", &self.optimisers)
            .field("bases", &self.bases)
            .field("keys", &self.keys)
            .field("callbacks", &self.callbacks.keys())
            .finish()
    }
}
