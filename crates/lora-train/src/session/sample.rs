//! Samples of what is trained as it is.

use std::collections::BTreeMap;

use lora_core::Component;
use lora_models::weights::{Frozen, Held};
use lora_torch::tch::no_grad_guard;

use super::Session;
use crate::Result;
use crate::base::{Base, Encoded, Prompt, Sample, Subject, Tensors, shallow};

impl Session {
    /// Makes a sample of each prompt with what is trained as it is now; with its running average, where there is one.
    ///
    /// # Errors
    /// Where the base makes none, and where memory runs out.
    pub fn sample(&mut self, prompts: &[String]) -> Result<Vec<Sample>> {
        let _scope = self.scope()?;
        self.with_averages(|session| session.beside_recordings(|session| session.draw(prompts)))
    }

    fn draw(&mut self, prompts: &[String]) -> Result<Vec<Sample>> {
        let _guard = no_grad_guard();
        let config = self.config.samples.clone();
        let mut all = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let without = self.caption_encodings(&config.negative_prompt)?;
            all.push(Prompt { text: prompt.clone(), with: self.caption_encodings(prompt)?, without });
        }
        let recordings = self.recorded_shapes() > 0;
        self.base.sample(&all, &config, recordings)
    }

    /// What the base's networks make of a caption: as it was kept, or made now.
    pub(super) fn caption_encodings(&mut self, caption: &str) -> Result<BTreeMap<Component, Tensors>> {
        let mut all = BTreeMap::new();
        for network in self.base.networks().to_vec() {
            if network.encodes != Some(Subject::Captions) {
                continue;
            }
            let component = network.component;
            let kept = self.kept.get(&component).and_then(|kept| kept.get(caption));
            let tensors = match kept {
                Some(kept) => shallow(kept),
                None => self.with_network(component, |base| base.encode(component, Encoded::Caption(caption)))?,
            };
            all.insert(component, tensors);
        }
        Ok(all)
    }

    /// Does something with a network, which comes back for it where it has left the device.
    pub(super) fn with_network<T>(
        &mut self,
        network: Component,
        work: impl FnOnce(&mut dyn Base) -> Result<T>,
    ) -> Result<T> {
        if self.base.is_loaded(network) {
            return work(&mut *self.base);
        }
        self.load(network)?;
        let result = work(&mut *self.base);
        self.base.unload(network);
        result
    }

    /// Loads a network that does not train.
    pub(super) fn load(&mut self, network: Component) -> Result<()> {
        let _label = super::label(&*self.base, network);
        self.base.load(network, Held::Frozen(Frozen::stored(self.config.base_storage)))
    }
}
