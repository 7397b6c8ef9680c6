//! Several sources as one: their items one after the other. What each says of itself is said by its number.

use std::path::Path;

use lora_core::random::Stream;
use lora_io::metadata::TrainingRecord;

use crate::cache::DiskCache;
use crate::finding::Finding;
use crate::sampler::{Visit, Visits};
use crate::source::{Example, Identity, Overview, Source};
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

    fn caption(&self, visit: &Visit, draw: &Stream) -> String {
        let (source, index) = self.at(visit.index);
        source.caption(&Visit { index, ..*visit }, draw)
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

    fn key_parts(&self, item: usize, draw: &Stream, cache: &DiskCache) -> Result<Vec<String>> {
        let (source, item) = self.at(item);
        source.key_parts(item, draw, cache)
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
