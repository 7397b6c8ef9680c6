//! Several sources as one: their items one after the other. What each says of itself is said by its number.

use std::path::Path;

use lora_core::random::Stream;
use lora_io::metadata::TrainingRecord;

use crate::cache::DiskCache;
use crate::caption::Done;
use crate::finding::Finding;
use crate::sampler::{Visit, Visits};
use crate::source::{Example, HeldOut, Identity, Overview, Source};
use crate::{Error, Result};

/// Several sources as one.
#[derive(Debug)]
pub struct Joined {
    sources: Vec<Box<dyn Source>>,
    findings: Vec<Finding>,
}

impl Joined {
    /// One after the other; a single one as it is.
    pub fn of(mut sources: Vec<Box<dyn Source>>) -> Box<dyn Source> {
        if sources.len() == 1 {
            return sources.remove(0);
        }
        let findings = findings(&sources);
        Box::new(Self { sources, findings })
    }

    /// The source of an item, and its number there.
    ///
    /// # Panics
    /// Where there is no such item, as a slice does.
    fn at(&self, mut item: usize) -> (&dyn Source, usize) {
        for source in &self.sources {
            match item.checked_sub(source.count()) {
                Some(rest) => item = rest,
                None => return (&**source, item),
            }
        }
        panic!("item {item} beyond the last of {} items", self.count())
    }
}

fn findings(sources: &[Box<dyn Source>]) -> Vec<Finding> {
    sources.iter().flat_map(|source| source.findings()).cloned().collect()
}

impl Source for Joined {
    fn count(&self) -> usize {
        self.sources.iter().map(|source| source.count()).sum()
    }

    fn visits(&self, item: usize) -> Visits {
        let (source, item) = self.at(item);
        source.visits(item)
    }

    fn path(&self, item: usize) -> &Path {
        let (source, item) = self.at(item);
        source.path(item)
    }

    fn example(&self, item: usize, draw: &Stream) -> Result<Example> {
        let (source, item) = self.at(item);
        source.example(item, draw)
    }

    fn is_random(&self) -> bool {
        self.sources.iter().any(|source| source.is_random())
    }

    fn variations(&self, item: usize) -> usize {
        let (source, item) = self.at(item);
        source.variations(item)
    }

    fn variations_are_all(&self) -> bool {
        self.sources.iter().all(|source| source.variations_are_all())
    }

    fn variation(&self, item: usize, variation: usize, draw: &Stream) -> Result<Example> {
        let (source, item) = self.at(item);
        source.variation(item, variation, draw)
    }

    fn caption(&self, visit: &Visit, draw: &Stream) -> String {
        let (source, index) = self.at(visit.index);
        source.caption(&Visit { index, ..*visit }, draw)
    }

    fn caption_when(&self, visit: &Visit, done: Done, draw: &Stream) -> String {
        let (source, index) = self.at(visit.index);
        source.caption_when(&Visit { index, ..*visit }, done, draw)
    }

    fn plain_caption(&self, item: usize) -> String {
        let (source, item) = self.at(item);
        source.plain_caption(item)
    }

    fn captions_are_fixed(&self) -> bool {
        self.sources.iter().all(|source| source.captions_are_fixed())
    }

    fn loss_weight(&self, item: usize) -> f64 {
        let (source, item) = self.at(item);
        source.loss_weight(item)
    }

    fn measure(&self, item: usize) -> f64 {
        let (source, item) = self.at(item);
        source.measure(item)
    }

    fn amount(&self, item: usize) -> f64 {
        let (source, item) = self.at(item);
        source.amount(item)
    }

    fn key_parts(
        &self,
        item: usize,
        variation: Option<usize>,
        draw: &Stream,
        cache: &DiskCache,
    ) -> Result<Vec<String>> {
        let (source, item) = self.at(item);
        source.key_parts(item, variation, draw, cache)
    }

    fn identity(&self) -> Identity {
        let mut all = Identity::default();
        for (number, source) in self.sources.iter().enumerate() {
            let named = |(name, value): (String, String)| (format!("{name} (dataset {})", number + 1), value);
            let own = source.identity();
            all.options.extend(own.options.into_iter().map(named));
            all.items.extend(own.items.into_iter().map(named));
        }
        all
    }

    fn findings(&self) -> &[Finding] {
        &self.findings
    }

    fn leave_out(&mut self, unusable: Vec<(usize, Error)>) {
        let mut of: Vec<Vec<(usize, Error)>> = self.sources.iter().map(|_| Vec::new()).collect();
        for (mut item, error) in unusable {
            for (source, own) in self.sources.iter().zip(&mut of) {
                match item.checked_sub(source.count()) {
                    Some(rest) => item = rest,
                    None => {
                        own.push((item, error));
                        break;
                    }
                }
            }
        }
        for (source, own) in self.sources.iter_mut().zip(of) {
            source.leave_out(own);
        }
        self.findings = findings(&self.sources);
    }

    /// Treated as the first source's are.
    fn of_another(&self, path: &Path) -> Result<Box<dyn Source>> {
        match self.sources.first() {
            Some(first) => first.of_another(path),
            None => Ok(Self::of(Vec::new())),
        }
    }

    /// Of each source its share; one that has a single item keeps it.
    fn hold_out(&mut self, held_out: HeldOut, seed: u64) -> Result<Box<dyn Source>> {
        let all = self.count();
        held_out.choose(all, seed)?;
        let mut others = Vec::new();
        for source in &mut self.sources {
            let own = source.count();
            let held_out = match held_out {
                HeldOut::Records(count) => HeldOut::Records((count * own / all).clamp(1, own.max(2) - 1)),
                share => share,
            };
            if own > 1 {
                others.push(source.hold_out(held_out, seed)?);
            }
        }
        Ok(Self::of(others))
    }

    fn overview(&self) -> Overview {
        let mut all = Overview::default();
        for (number, source) in self.sources.iter().enumerate() {
            let own = source.overview();
            all.noun = own.noun;
            all.items += own.items;
            all.left_out += own.left_out;
            all.lines.extend(own.lines);
            all.notes.extend(own.notes.into_iter().map(|note| format!("dataset {}: {note}", number + 1)));
        }
        all
    }

    fn record(&self, record: &mut TrainingRecord) {
        self.sources.iter().for_each(|source| source.record(record));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Shape;
    use crate::texts::{TextOptions, Texts};

    /// Stand-ins of several lengths.
    fn joined(rows: &[(usize, usize)]) -> Box<dyn Source> {
        let of = |&(rows, length): &(usize, usize)| -> Box<dyn Source> {
            let options = TextOptions { max_seq_length: length, batch_size: rows, ..TextOptions::default() };
            Box::new(Texts::stand_in(options, rows))
        };
        Joined::of(rows.iter().map(of).collect())
    }

    #[test]
    fn items_are_those_of_the_sources_one_after_the_other() {
        let source = joined(&[(2, 64), (3, 128)]);
        assert_eq!(source.count(), 5);
        let lengths =
            |source: &dyn Source| (0..source.count()).map(|item| source.visits(item).shape).collect::<Vec<_>>();
        let [short, long] = [64, 128].map(Shape::Tokens);
        assert_eq!(lengths(&*source), [short, short, long, long, long]);
        assert_eq!((source.measure(1), source.measure(2)), (63.0, 127.0));
        assert_eq!((source.visits(1).batch_size, source.visits(2).batch_size), (2, 3));
        assert_eq!(source.overview().items, 5);
        let names: Vec<String> = source.identity().items.into_iter().map(|(name, _)| name).collect();
        assert!(names.iter().any(|name| name == "texts (dataset 2)"), "{names:?}");
    }

    #[test]
    fn what_is_left_out_is_left_out_of_its_own_source() {
        let mut source = joined(&[(2, 64), (3, 128)]);
        let error = || Error::Picture { path: "x".into(), reason: "broken".into() };
        source.leave_out(vec![(1, error()), (4, error())]);
        let lengths: Vec<Shape> = (0..source.count()).map(|item| source.visits(item).shape).collect();
        assert_eq!(lengths, [64, 128, 128].map(Shape::Tokens));
        assert_eq!(source.findings().len(), 2);
    }
}
