//! Samples of what is trained as it is.

use std::collections::BTreeMap;

use lora_core::Component;
use lora_data::PromptLine;
use lora_models::weights::{Frozen, Held};
use lora_torch::tch::no_grad_guard;

use super::Session;
use crate::Result;
use crate::base::{Base, Encoded, Prompt, Sample, Subject, Tensors, shallow};
use crate::config::SampleConfig;

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
        let recordings = self.recorded_shapes() > 0;
        if !self.origin.checkpoint.family().image {
            let prompts: Vec<Prompt> = prompts.iter().map(|prompt| Prompt::plain(prompt)).collect();
            return self.base.sample(&prompts, &self.config.samples, recordings);
        }
        // Those that are drawn alike are drawn together: the autoencoder comes once.
        let mut alike: Vec<(SampleConfig, Vec<Prompt>)> = Vec::new();
        for prompt in prompts {
            let line = PromptLine::parse(prompt);
            let config = self.config.samples.for_prompt(&line)?;
            let with = self.caption_encodings(&line.text)?;
            let without = self.caption_encodings(&config.negative_prompt)?;
            let prompt = Prompt { text: line.text, with, without };
            match alike.last_mut().filter(|(known, _)| *known == config) {
                Some((_, together)) => together.push(prompt),
                None => alike.push((config, vec![prompt])),
            }
        }
        let drawn = alike.iter().map(|(config, prompts)| self.base.sample(prompts, config, recordings));
        Ok(drawn.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    /// What the base's networks make of a caption: as it was kept, or made now.
    pub(super) fn caption_encodings(&mut self, caption: &str) -> Result<BTreeMap<Component, Tensors>> {
        let mut all = BTreeMap::new();
        for network in self.base.networks().to_vec() {
            if network.encodes != Some(Subject::Captions) {
                continue;
            }
            let component = network.component;
            let kept = self.feed.kept.get(&component).and_then(|kept| kept.get(caption));
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
