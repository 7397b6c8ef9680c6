//! Dropout masks that depend on the data item and the step, not on the order of calls: another micro-batch size or a
//! resumed run drops the same things.

use crate::random::Stream;
use crate::{Error, HostTensor, Result};

/// Dropout of one forward pass through one module: of single activations, of whole ranks, of the whole module. What is
/// kept of activations and ranks is scaled up so that the mean stays; a module that is kept stays as it is (sd-scripts).
#[derive(Debug, Clone)]
pub struct Dropout {
    /// Probability for each activation between the factors, in `[0, 1)` (sd-scripts' `network_dropout`).
    pub activations: f64,
    /// Probability for each rank (sd-scripts' `rank_dropout`).
    pub ranks: f64,
    /// Probability for the module's whole update (sd-scripts' `module_dropout`).
    pub module: f64,
    /// One stream per item of the batch.
    pub items: Vec<Stream>,
}

impl Dropout {
    /// The masks for what lies between the factors, of `shape` (`[batch, ...]`; the batch may hold several rows per
    /// item, consecutive). `channels` is the axis of the ranks (anything beyond the last axis means the last).
    pub(super) fn hidden_masks(&self, shape: &[usize], channels: usize, rank: usize) -> Result<Vec<HostTensor>> {
        let rows = self.rows_per_item(shape)?;
        let mut masks = Vec::new();
        if self.activations > 0.0 {
            let row: usize = shape[1..].iter().product();
            masks.push(HostTensor::from_f32(shape, self.draw("activations", self.activations, rows * row, 1))?);
        }
        let mut narrow = vec![1; shape.len()];
        narrow[0] = shape[0];
        if self.ranks > 0.0 {
            let mut shape = narrow.clone();
            shape[channels.min(narrow.len() - 1)] = rank;
            masks.push(HostTensor::from_f32(shape, self.draw("ranks", self.ranks, rank, rows))?);
        }
        masks.extend(self.module_mask(shape)?);
        Ok(masks)
    }

    /// Zero or one for each row of the batch, `[batch, 1, ...]`; none if modules are never dropped.
    pub(super) fn module_mask(&self, shape: &[usize]) -> Result<Option<HostTensor>> {
        if self.module == 0.0 {
            return Ok(None);
        }
        let rows = self.rows_per_item(shape)?;
        let mut narrow = vec![1; shape.len()];
        narrow[0] = shape[0];
        let mut mask = self.draw("module", self.module, 1, rows);
        mask.iter_mut().for_each(|kept| *kept = f32::from(u8::from(*kept > 0.0)));
        HostTensor::from_f32(narrow, mask).map(Some)
    }

    /// The error of a variant that can only drop whole modules, if more is asked for.
    pub(super) fn modules_only(&self, variant: &str) -> Result<()> {
        for (key, probability) in [("lora_dropout", self.activations), ("rank_dropout", self.ranks)] {
            if probability > 0.0 {
                return Err(Error::Option {
                    key,
                    value: probability.to_string(),
                    reason: format!("variant `{variant}` has no ranks in between; only module_dropout applies"),
                });
            }
        }
        Ok(())
    }

    fn rows_per_item(&self, shape: &[usize]) -> Result<usize> {
        let batch = shape.first().copied().unwrap_or(0);
        if self.items.is_empty() || batch % self.items.len() != 0 {
            return Err(Error::Shape {
                what: "batch under dropout".into(),
                expected: format!("a multiple of {} items", self.items.len()),
                found: format!("{shape:?}"),
            });
        }
        Ok(batch / self.items.len())
    }

    /// For each item `count` draws, repeated `times`: zero, or `1 / (1 - probability)`.
    fn draw(&self, what: &str, probability: f64, count: usize, times: usize) -> Vec<f32> {
        let (kept, threshold) = ((1.0 / (1.0 - probability)) as f32, probability as f32);
        let mut mask = Vec::with_capacity(count * times * self.items.len());
        for item in &self.items {
            let mut stream = item.at(what);
            let first = mask.len();
            mask.extend((0..count).map(|_| if stream.uniform() < threshold { 0.0 } else { kept }));
            for _ in 1..times {
                mask.extend_from_within(first..first + count);
            }
        }
        mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_items_masks_do_not_depend_on_its_batch() {
        let (a, b) = (Stream::new(1), Stream::new(2));
        let dropout = |items| Dropout { activations: 0.5, ranks: 0.5, module: 0.5, items };
        let both = dropout(vec![a, b.clone()]).hidden_masks(&[2, 100], 1, 100).unwrap();
        let alone = dropout(vec![b]).hidden_masks(&[1, 100], 1, 100).unwrap();
        assert_eq!((both.len(), alone.len()), (3, 3));
        for (both, alone) in both.iter().zip(&alone).take(2) {
            assert_eq!(both.to_f32()[100..], alone.to_f32()[..]);
            let dropped = both.to_f32().iter().filter(|&&value| value == 0.0).count();
            assert!((60..140).contains(&dropped), "{dropped}");
            assert!(both.to_f32().iter().all(|&value| value == 0.0 || value == 2.0));
        }
        assert!(dropout(vec![Stream::new(1), Stream::new(2)]).hidden_masks(&[3, 4], 1, 4).is_err());
    }

    #[test]
    fn rows_of_one_item_share_its_ranks_and_its_module() {
        let items = (0..40).map(Stream::new).collect();
        let dropout = Dropout { activations: 0.0, ranks: 0.5, module: 0.3, items };
        let masks = dropout.hidden_masks(&[80, 5, 4], 9, 4).unwrap();
        assert_eq!((masks[0].shape(), masks[1].shape()), (&[80, 1, 4][..], &[80, 1, 1][..]));
        let ranks = masks[0].to_f32();
        assert!(ranks.chunks_exact(8).all(|rows| rows[..4] == rows[4..]));
        let modules = masks[1].to_f32();
        assert!(modules.iter().all(|&kept| kept == 0.0 || kept == 1.0));
        let dropped = modules.iter().filter(|&&kept| kept == 0.0).count();
        assert!((8..=44).contains(&dropped), "{dropped}");
    }
}
