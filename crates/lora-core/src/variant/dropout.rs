//! Dropout masks that depend on the data item and the step, not on the order of calls: another micro-batch size or a
//! resumed run drops the same activations.

use crate::random::Stream;
use crate::{Error, HostTensor, Result};

/// Dropout of one forward pass through one module.
#[derive(Debug, Clone)]
pub struct Dropout {
    probability: f64,
    items: Vec<Stream>,
}

impl Dropout {
    /// Drops each activation with `probability` in `(0, 1)`; `items` holds one stream per item of the batch.
    pub fn new(probability: f64, items: Vec<Stream>) -> Self {
        Self { probability, items }
    }

    /// The mask for activations of `shape` (`[batch, ...]`; the batch may hold several rows per item, consecutive):
    /// zero, or `1 / (1 - probability)`.
    pub(super) fn mask(&self, shape: &[usize]) -> Result<HostTensor> {
        let batch = shape.first().copied().unwrap_or(0);
        if self.items.is_empty() || batch % self.items.len() != 0 {
            return Err(Error::Shape {
                what: "batch under dropout".into(),
                expected: format!("a multiple of {} items", self.items.len()),
                found: format!("{shape:?}"),
            });
        }
        let rows_per_item = batch / self.items.len();
        let row: usize = shape[1..].iter().product();
        let kept = (1.0 / (1.0 - self.probability)) as f32;
        let threshold = self.probability as f32;
        let mut mask = Vec::with_capacity(batch * row);
        for item in &self.items {
            let mut stream = item.clone();
            mask.extend((0..rows_per_item * row).map(|_| if stream.uniform() < threshold { 0.0 } else { kept }));
        }
        HostTensor::from_f32(shape, mask)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_items_mask_does_not_depend_on_its_batch() {
        let (a, b) = (Stream::new(1), Stream::new(2));
        let both = Dropout::new(0.5, vec![a, b.clone()]).mask(&[2, 100]).unwrap();
        let alone = Dropout::new(0.5, vec![b]).mask(&[1, 100]).unwrap();
        assert_eq!(both.to_f32()[100..], alone.to_f32()[..]);
        let dropped = both.to_f32().iter().filter(|&&value| value == 0.0).count();
        assert!((60..140).contains(&dropped), "{dropped}");
        assert!(Dropout::new(0.5, vec![Stream::new(1), Stream::new(2)]).mask(&[3, 4]).is_err());
    }
}
