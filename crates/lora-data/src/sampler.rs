//! The order of items: every item its number of times an epoch, shuffled by (seed, epoch), with a position that is two
//! numbers and restores exactly.

use lora_core::random::Stream;
use serde::{Deserialize, Serialize};

/// Where a run stands in its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Epochs done.
    pub epoch: u64,
    /// Items of the current epoch done.
    pub item: usize,
}

/// One visit of an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visit {
    /// Index of the item in the dataset.
    pub index: usize,
    /// Which of the item's repeats in this epoch, from 0.
    pub repeat: usize,
    /// The epoch, from 0.
    pub epoch: u64,
}

/// Visits items in shuffled order, epoch after epoch, without end.
#[derive(Debug, Clone)]
pub struct EpochSampler {
    repeats: Vec<usize>,
    seed: u64,
    position: Position,
    order: Vec<Visit>,
}

impl EpochSampler {
    /// `repeats` holds each item's number of visits per epoch; their sum must not be 0 (then there are no visits).
    pub fn new(repeats: Vec<usize>, seed: u64) -> Self {
        let mut sampler = Self { repeats, seed, position: Position { epoch: 0, item: 0 }, order: Vec::new() };
        sampler.shuffle();
        sampler
    }

    /// Where it stands.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Goes on from a position taken earlier, of the same dataset and seed.
    pub fn restore(&mut self, position: Position) {
        self.position = position;
        self.shuffle();
    }

    /// Visits in an epoch.
    pub fn epoch_length(&self) -> usize {
        self.order.len()
    }

    /// The next `size` visits, fewer at the end of an epoch: a batch never spans two. Empty only without items.
    pub fn next_batch(&mut self, size: usize) -> Vec<Visit> {
        if self.position.item >= self.order.len() {
            self.position = Position { epoch: self.position.epoch + 1, item: 0 };
            self.shuffle();
        }
        let end = (self.position.item + size.max(1)).min(self.order.len());
        let batch = self.order[self.position.item..end].to_vec();
        self.position.item = end;
        batch
    }

    fn shuffle(&mut self) {
        let epoch = self.position.epoch;
        let visits = |(index, &count): (usize, &usize)| (0..count).map(move |repeat| Visit { index, repeat, epoch });
        self.order = self.repeats.iter().enumerate().flat_map(visits).collect();
        Stream::new(self.seed).at("order").with(epoch).shuffle(&mut self.order);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn every_item_its_number_of_times_an_epoch(repeats in proptest::collection::vec(1usize..4, 1..20), batch in 1usize..7, seed: u64) {
            let mut sampler = EpochSampler::new(repeats.clone(), seed);
            for epoch in 0..3 {
                let mut counts = vec![0; repeats.len()];
                let mut left = sampler.epoch_length();
                while left > 0 {
                    let visits = sampler.next_batch(batch);
                    prop_assert!(visits.len() == batch || visits.len() == left);
                    left -= visits.len();
                    for visit in visits {
                        prop_assert_eq!(visit.epoch, epoch);
                        counts[visit.index] += 1;
                    }
                }
                prop_assert_eq!(&counts, &repeats);
            }
        }

        #[test]
        fn the_order_does_not_depend_on_batches_and_resumes_anywhere(items in 1usize..30, stop in 0usize..80, seed: u64) {
            let mut whole = EpochSampler::new(vec![2; items], seed);
            let all: Vec<_> = (0..100).flat_map(|_| whole.next_batch(1)).collect();
            let mut first = EpochSampler::new(vec![2; items], seed);
            let mut seen = Vec::new();
            while seen.len() < stop {
                seen.extend(first.next_batch(3));
            }
            let mut second = EpochSampler::new(vec![2; items], seed);
            second.restore(first.position());
            while seen.len() < 100 {
                seen.extend(second.next_batch(5));
            }
            prop_assert_eq!(&seen[..100], &all[..]);
        }
    }

    #[test]
    fn epochs_differ() {
        let mut sampler = EpochSampler::new(vec![1; 50], 1);
        let (first, second) = (sampler.next_batch(50), sampler.next_batch(50));
        assert_ne!(
            first.iter().map(|v| v.index).collect::<Vec<_>>(),
            second.iter().map(|v| v.index).collect::<Vec<_>>()
        );
        assert!(EpochSampler::new(vec![], 1).next_batch(4).is_empty());
    }
}
