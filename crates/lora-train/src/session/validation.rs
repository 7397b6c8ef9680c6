//! The loss on items that are not trained on, with the same draws at every look, so that two looks can be compared.

use std::collections::BTreeMap;
use std::path::Path;

use lora_core::random::Stream;
use lora_data::source::Source;
use lora_models::layers::Pass;
use lora_torch::tch::no_grad_guard;

use super::Session;
use super::encoded::to_memory;
use super::step::loss_of;
use crate::base::{Encoded, Item, Subject};
use crate::event::About;
use crate::{Error, Result};

/// Items to validate with, encoded.
#[derive(Debug)]
pub struct Validation {
    items: Vec<Item>,
    /// How much each makes up of the mean.
    measures: Vec<f64>,
}

impl Validation {
    /// Their captions, in order.
    pub fn captions(&self) -> impl Iterator<Item = &str> {
        self.items.iter().map(|item| item.caption.as_str())
    }
}

impl Session {
    /// Encodes the items of another place, treated as those that are trained on are, without what is random in them:
    /// random processors are left out, and pictures that lose their crop with them are cut in the middle.
    ///
    /// # Errors
    /// Where there are none, none can be read, or one cannot and the configuration is strict; and where memory runs
    /// out.
    pub fn load_validation(&mut self, folder: &Path) -> Result<Validation> {
        let source = self.feed.source.of_another(folder)?;
        self.encode_validation(&*source)
    }

    /// What the configuration says is not trained on, encoded: `validation_data_dir`, or what `validation_split` holds
    /// out.
    ///
    /// # Errors
    /// As [`Session::load_validation`].
    pub fn load_held_out(&mut self) -> Result<Option<Validation>> {
        if let Some(folder) = self.config.validation_data_dir.clone() {
            return self.load_validation(&folder).map(Some);
        }
        let Some(source) = self.feed.held_out.take() else { return Ok(None) };
        let encoded = self.encode_validation(&*source);
        self.feed.held_out = Some(source);
        encoded.map(Some)
    }

    fn encode_validation(&mut self, source: &dyn Source) -> Result<Validation> {
        let _scope = self.scope()?;
        let _guard = no_grad_guard();
        let (seed, device) = (self.config.seed, self.device);
        let measures = (0..source.count()).map(|item| source.measure(item)).collect();
        let encoder = self.base.networks().iter().find(|network| network.encodes == Some(Subject::Examples)).copied();
        let item = |index: usize, caption: String| Item {
            caption,
            encoded: BTreeMap::new(),
            beside: BTreeMap::new(),
            example: None,
            weight: 1.0,
            draw: Stream::new(seed).at("validation").with(index as u64),
        };
        let mut items: Vec<Item> = (0..source.count()).map(|index| item(index, source.plain_caption(index))).collect();
        let strict = self.config.strict;
        let mut unusable = BTreeMap::new();
        let mut example = |index: usize, draw: &Stream| match source.example(index, draw) {
            Err(error @ lora_data::Error::Picture { .. }) if !strict => {
                unusable.insert(index, error);
                Ok(None)
            }
            example => example.map(Some).map_err(Error::from),
        };
        match encoder.map(|network| network.component) {
            None => {
                for (index, item) in items.iter_mut().enumerate() {
                    item.example = example(index, &item.draw)?;
                }
            }
            Some(encoder) => self.with_network(encoder, |base| {
                for (index, item) in items.iter_mut().enumerate() {
                    let Some(example) = example(index, &item.draw)? else { continue };
                    let encoded = base.encode(encoder, Encoded::Example(&example, source.path(index)))?;
                    let drawn = base.draw(encoder, &encoded, &item.draw)?;
                    item.encoded.insert(encoder, to_memory(&drawn, device)?);
                }
                Ok(())
            })?,
        }
        let validation = Validation { items, measures };
        if unusable.is_empty() { Ok(validation) } else { self.usable(validation, unusable) }
    }

    /// Leaves out what could not be read, as is done with what is trained on; an error where nothing is left.
    fn usable(
        &mut self,
        validation: Validation,
        mut unusable: BTreeMap<usize, lora_data::Error>,
    ) -> Result<Validation> {
        let (count, all) = (unusable.len(), validation.items.len());
        let first = unusable.first_entry().map(|entry| entry.get().to_string()).unwrap_or_default();
        if count == all
            && let Some((_, error)) = unusable.pop_first()
        {
            return Err(error.into());
        }
        let told = format!("{count} of {all} that are held out cannot be read and are left out, the first: {first}");
        self.warn(About::Data, "left_out", told);
        let own = validation.items.into_iter().zip(validation.measures).enumerate();
        let (items, measures) =
            own.filter(|(index, _)| !unusable.contains_key(index)).map(|(_, validation)| validation).unzip();
        Ok(Validation { items, measures })
    }

    /// The mean loss of each item at the same draws at every look, unweighted, without dropout. `caption` says which
    /// caption an item is looked at with, by its index; its own is the second argument.
    ///
    /// # Errors
    /// Where memory runs out.
    pub fn validation_losses(
        &mut self,
        validation: &Validation,
        caption: impl Fn(usize, &str) -> String,
    ) -> Result<Vec<f64>> {
        let _scope = self.scope()?;
        let _guard = no_grad_guard();
        self.with_averages(|session| {
            session.beside_recordings(|session| {
                let mut losses = Vec::with_capacity(validation.items.len());
                for (index, item) in validation.items.iter().enumerate() {
                    let mut looked_at = item.again();
                    looked_at.encoded.extend(session.caption_encodings(&caption(index, &item.caption))?);
                    let inputs = session.base.validation_inputs(&looked_at)?;
                    losses.push(f64::try_from(loss_of(&session.base.loss(&inputs, &Pass::default())?)?)?);
                }
                Ok(losses)
            })
        })
    }

    /// The mean of [`Session::validation_losses`] with the items' own captions, over all that the items measure.
    ///
    /// # Errors
    /// As [`Session::validation_losses`].
    pub fn validation_loss(&mut self, validation: &Validation) -> Result<f64> {
        let losses = self.validation_losses(validation, |_, own| own.to_owned())?;
        let weighted = losses.iter().zip(&validation.measures).map(|(loss, measure)| loss * measure);
        Ok(weighted.sum::<f64>() / validation.measures.iter().sum::<f64>())
    }
}
