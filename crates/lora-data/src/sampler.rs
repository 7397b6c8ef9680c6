//! The order of items: every item its number of times an epoch, in batches of one shape, shuffled by (seed, epoch), with a
//! position that is two numbers and restores exactly.

use std::collections::BTreeMap;

use lora_core::random::Stream;
use serde::{Deserialize, Serialize};

use crate::source::Shape;

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

impl Visit {
    /// Everything random about this visit in a run of this seed.
    pub fn draws(&self, seed: u64) -> Stream {
        Stream::new(seed).at("visit").with(self.epoch).with(self.index as u64).with(self.repeat as u64)
    }
}

/// What the order needs to know of an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visits {
    /// Number per epoch.
    pub count: usize,
    /// What it is trained at.
    pub shape: Shape,
    /// Items at once; those of equal shape and batch size share batches.
    pub batch_size: usize,
}

/// Visits items in shuffled batches of one shape each, epoch after epoch, without end.
#[derive(Debug, Clone)]
pub struct EpochSampler {
    /// Items by shape and batch size, each with its number of visits per epoch.
    buckets: BTreeMap<(Shape, usize), Vec<(usize, usize)>>,
    seed: u64,
    position: Position,
    order: Vec<Visit>,
    /// Where in the order each batch ends.
    ends: Vec<usize>,
}

impl EpochSampler {
    /// One entry for each item. The sum of the visits must not be 0 (then there are no batches). The last batch of a bucket
    /// may be smaller; none is dropped.
    pub fn new(items: impl IntoIterator<Item = Visits>, seed: u64) -> Self {
        let mut buckets = BTreeMap::<_, Vec<_>>::new();
        for (index, Visits { count, shape, batch_size }) in items.into_iter().enumerate() {
            buckets.entry((shape, batch_size.max(1))).or_default().push((index, count));
        }
        let position = Position { epoch: 0, item: 0 };
        let mut sampler = Self { buckets, seed, position, order: Vec::new(), ends: Vec::new() };
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

    /// Batches in an epoch.
    pub fn batches_per_epoch(&self) -> usize {
        self.ends.len()
    }

    /// Visits per epoch of the items of each shape.
    pub(crate) fn visits_by_shape(&self) -> BTreeMap<Shape, usize> {
        let mut visits = BTreeMap::new();
        for ((shape, _), items) in &self.buckets {
            *visits.entry(*shape).or_default() += items.iter().map(|(_, repeats)| repeats).sum::<usize>();
        }
        visits
    }

    /// The next batch: of one shape and one epoch. Empty only without items.
    pub fn next_batch(&mut self) -> Vec<Visit> {
        if self.position.item >= self.order.len() {
            self.position = Position { epoch: self.position.epoch + 1, item: 0 };
            self.shuffle();
        }
        // A position of a run with another batch size may lie inside a batch: its rest comes next.
        let next = self.ends.partition_point(|&end| end <= self.position.item);
        let end = self.ends.get(next).copied().unwrap_or(self.order.len());
        let batch = self.order[self.position.item..end].to_vec();
        self.position.item = end;
        batch
    }

    fn shuffle(&mut self) {
        let epoch = self.position.epoch;
        let random = Stream::new(self.seed).at("order").with(epoch);
        let mut batches = Vec::new();
        for ((_, batch_size), items) in &self.buckets {
            let visits =
                |&(index, count): &(usize, usize)| (0..count).map(move |repeat| Visit { index, repeat, epoch });
            let mut own: Vec<Visit> = items.iter().flat_map(visits).collect();
            // One stream per bucket, told apart by its first item; with a single bucket it is the epoch's own.
            let first = items.first().map_or(0, |&(index, _)| index as u64);
            let mut stream = if self.buckets.len() == 1 { random.clone() } else { random.at("bucket").with(first) };
            stream.shuffle(&mut own);
            batches.extend(own.chunks(*batch_size).map(<[Visit]>::to_vec));
        }
        if self.buckets.len() > 1 {
            random.at("batches").shuffle(&mut batches);
        }
        self.ends = batches
            .iter()
            .scan(0, |end, batch| {
                *end += batch.len();
                Some(*end)
            })
            .collect();
        self.order = batches.into_iter().flatten().collect();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ONE: Shape = Shape::Picture(512, 512);

    fn sampler(repeats: &[usize], batch: usize, seed: u64) -> EpochSampler {
        EpochSampler::new(repeats.iter().map(|&count| Visits { count, shape: ONE, batch_size: batch }), seed)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn every_item_its_number_of_times_an_epoch_in_batches_of_one_shape(
            items in proptest::collection::vec((1usize..4, 0usize..4), 1..20), batch in 1usize..7, seed: u64,
        ) {
            let shapes = [Shape::Picture(64, 64), Shape::Picture(128, 64), Shape::Tokens(64), Shape::Unmeasured];
            let visits = items.iter().map(|&(count, own)| Visits { count, shape: shapes[own], batch_size: batch });
            let mut sampler = EpochSampler::new(visits, seed);
            let visits: usize = items.iter().map(|(repeats, _)| repeats).sum();
            let full: usize = sampler.visits_by_shape().values().map(|visits| visits.div_ceil(batch)).sum();
            prop_assert_eq!((sampler.epoch_length(), sampler.batches_per_epoch()), (visits, full));
            for epoch in 0..3 {
                let mut counts = vec![0; items.len()];
                for _ in 0..sampler.batches_per_epoch() {
                    let visits = sampler.next_batch();
                    prop_assert!(!visits.is_empty() && visits.len() <= batch);
                    for visit in &visits {
                        prop_assert_eq!(visit.epoch, epoch);
                        prop_assert_eq!(items[visit.index].1, items[visits[0].index].1);
                        counts[visit.index] += 1;
                    }
                }
                prop_assert_eq!(&counts, &items.iter().map(|(repeats, _)| *repeats).collect::<Vec<_>>());
            }
        }

        #[test]
        fn one_buckets_order_does_not_depend_on_batches_and_resumes_anywhere(items in 1usize..30, stop in 0usize..80, seed: u64) {
            let repeats = vec![2; items];
            let mut whole = sampler(&repeats, 1, seed);
            let all: Vec<_> = (0..100).flat_map(|_| whole.next_batch()).collect();
            let mut first = sampler(&repeats, 3, seed);
            let mut seen = Vec::new();
            while seen.len() < stop {
                seen.extend(first.next_batch());
            }
            let mut second = sampler(&repeats, 5, seed);
            second.restore(first.position());
            while seen.len() < 100 {
                seen.extend(second.next_batch());
            }
            prop_assert_eq!(&seen[..100], &all[..]);
        }
    }

    /// The order of a saved run is the order of its continuation, whatever becomes of this file: taken down when it was new.
    #[test]
    fn the_order_stays_what_it_was() {
        let bucket = |index: usize| [ONE, Shape::Picture(640, 384), Shape::Picture(384, 640)][index % 3];
        let items = (0..7).map(|index| Visits { count: 1 + index % 2, shape: bucket(index), batch_size: 2 });
        let mut sampler = EpochSampler::new(items, 42);
        let mut batches = || -> Vec<Vec<(usize, usize)>> {
            let batch = |_| sampler.next_batch().iter().map(|visit| (visit.index, visit.repeat)).collect();
            (0..6).map(batch).collect()
        };
        let first: [&[(usize, usize)]; 6] =
            [&[(4, 0), (1, 1)], &[(1, 0)], &[(3, 1), (6, 0)], &[(0, 0), (3, 0)], &[(2, 0), (5, 0)], &[(5, 1)]];
        assert_eq!(batches(), first);
        let second: [&[(usize, usize)]; 6] =
            [&[(5, 1), (5, 0)], &[(1, 0), (1, 1)], &[(0, 0), (3, 1)], &[(4, 0)], &[(2, 0)], &[(3, 0), (6, 0)]];
        assert_eq!(batches(), second);
        let mut single = self::sampler(&[1, 2, 1, 1, 2], 3, 7);
        let visits: Vec<usize> = (0..6).flat_map(|_| single.next_batch()).map(|visit| visit.index).collect();
        assert_eq!(visits, [2, 4, 1, 3, 1, 4, 0, 0, 4, 1, 2, 1, 4, 3]);
    }

    #[test]
    fn epochs_differ() {
        let mut whole = sampler(&[1; 50], 50, 1);
        let (first, second) = (whole.next_batch(), whole.next_batch());
        assert_ne!(
            first.iter().map(|v| v.index).collect::<Vec<_>>(),
            second.iter().map(|v| v.index).collect::<Vec<_>>()
        );
        assert!(sampler(&[], 4, 1).next_batch().is_empty());
    }

    #[test]
    fn buckets_take_turns() {
        let bucket = |index: usize| if index.is_multiple_of(2) { ONE } else { Shape::Picture(640, 384) };
        let items = (0..40).map(|index| Visits { count: 1, shape: bucket(index), batch_size: 4 });
        let mut mixed = EpochSampler::new(items, 1);
        let parities: Vec<usize> = (0..10).map(|_| mixed.next_batch()[0].index % 2).collect();
        let changes = parities.windows(2).filter(|pair| pair[0] != pair[1]).count();
        assert!(changes > 1, "{parities:?}");
    }
}
