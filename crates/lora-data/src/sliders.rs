//! Concept sliders (Gandikota et al., "Concept Sliders", 2023): data without pictures. A slider is an attribute between two
//! prompts that a target prompt is to be moved along; an item is one such triple at one size. What is learned of it is the
//! base model's business.

use std::path::Path;

use lora_core::random::Stream;
use serde::{Deserialize, Serialize};

use crate::cache::DiskCache;
use crate::finding::Finding;
use crate::sampler::{Visit, Visits};
use crate::source::{Example, Identity, Overview, Shape, Source};
use crate::{Error, Result};

/// An attribute, by the prompts between which it lies.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slider {
    /// What is to be moved: `person`.
    pub target: String,
    /// What it is to be more like at a strength of 1: `old person`.
    pub positive: String,
    /// What it is to be more like at a strength of −1: `young person`. Empty for the empty caption.
    pub negative: String,
    /// How many times the base's own difference between the two makes up a strength of 1.
    #[serde(default = "four")]
    pub guidance_scale: f64,
    /// How much it counts in the loss.
    #[serde(default = "one")]
    pub weight: f64,
    /// Concepts that are not to move with it: each is put in front of all three prompts.
    #[serde(default)]
    pub preserve: Vec<String>,
}

/// What the paper's published configurations have.
fn four() -> f64 {
    4.0
}

fn one() -> f64 {
    1.0
}

/// What is trained on at a visit of an item: three prompts and a size.
#[derive(Debug, Clone, PartialEq)]
pub struct Contrast {
    /// What is moved.
    pub target: String,
    /// Where to.
    pub positive: String,
    /// Away from what.
    pub negative: String,
    /// How many times the difference between the two.
    pub guidance_scale: f64,
    /// Width and height in pixels.
    pub size: (usize, usize),
}

impl Slider {
    /// What cannot be trained, if anything: the entry, and why.
    pub fn problem(&self) -> Option<(&'static str, String)> {
        let blank = |text: &str| text.trim().is_empty();
        if blank(&self.positive) {
            return Some(("positive", "is empty; expected what the target is to be more like".into()));
        }
        if self.positive.trim() == self.negative.trim() {
            return Some(("negative", "is the same as positive; between the two there is nothing to learn".into()));
        }
        if !(self.guidance_scale.is_finite() && self.guidance_scale != 0.0) {
            return Some(("guidance_scale", format!("{}; expected a number other than 0", self.guidance_scale)));
        }
        if !(self.weight.is_finite() && self.weight > 0.0) {
            return Some(("weight", format!("{}; expected a number above 0", self.weight)));
        }
        self.preserve.iter().any(|concept| blank(concept)).then(|| ("preserve", "has an empty entry".into()))
    }

    /// Its triples of prompts at a size: one, or one for each concept that is preserved.
    pub fn contrasts(&self, size: (usize, usize)) -> Vec<Contrast> {
        let with = |concept: &str| {
            let before = |prompt: &str| [concept, prompt].join(" ").trim().to_owned();
            Contrast {
                target: before(&self.target),
                positive: before(&self.positive),
                negative: before(&self.negative),
                guidance_scale: self.guidance_scale,
                size,
            }
        };
        match self.preserve.as_slice() {
            [] => vec![with("")],
            several => several.iter().map(|concept| with(concept)).collect(),
        }
    }
}

/// The items of several sliders at several sizes.
#[derive(Debug)]
pub struct Sliders {
    /// Each with how much it counts.
    items: Vec<(Contrast, f64)>,
    /// Items at once.
    batch_size: usize,
    /// Visits of each item in an epoch.
    visits: usize,
}

impl Sliders {
    /// Every triple of prompts of every slider at every size. An item comes `visits` times an epoch: as often as a step has items,
    /// so that a step is of one triple and one size.
    pub fn new(sliders: &[Slider], sizes: &[(usize, usize)], batch_size: usize, visits: usize) -> Self {
        let of = |slider: &Slider, size| {
            let weight = slider.weight;
            slider.contrasts(size).into_iter().map(move |contrast| (contrast, weight))
        };
        let items = sliders.iter().flat_map(|slider| sizes.iter().flat_map(move |&size| of(slider, size)));
        Self { items: items.collect(), batch_size, visits }
    }

    /// For each size the item with the most words alone: what takes the most memory.
    #[must_use]
    pub fn largest(self) -> Self {
        let mut items: Vec<(Contrast, f64)> = Vec::new();
        let length = |own: &Contrast| own.target.len() + own.positive.len() + own.negative.len();
        for item in self.items {
            match items.iter_mut().find(|known| known.0.size == item.0.size) {
                Some(known) if length(&known.0) < length(&item.0) => *known = item,
                Some(_) => {}
                None => items.push(item),
            }
        }
        Self { items, ..self }
    }
}

impl Source for Sliders {
    fn count(&self) -> usize {
        self.items.len()
    }

    fn visits(&self, item: usize) -> Visits {
        let (width, height) = self.items[item].0.size;
        Visits { count: self.visits, shape: Shape::Picture(width, height), batch_size: self.batch_size }
    }

    fn path(&self, _item: usize) -> &Path {
        Path::new("sliders")
    }

    fn example(&self, item: usize, _draw: &Stream) -> Result<Example> {
        Ok(Example::Contrast(self.items[item].0.clone()))
    }

    fn caption(&self, visit: &Visit, _draw: &Stream) -> String {
        self.plain_caption(visit.index)
    }

    fn plain_caption(&self, item: usize) -> String {
        self.items[item].0.target.clone()
    }

    fn loss_weight(&self, item: usize) -> f64 {
        self.items[item].1
    }

    fn key_parts(
        &self,
        _item: usize,
        _variation: Option<usize>,
        _draw: &Stream,
        _cache: &DiskCache,
    ) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn identity(&self) -> Identity {
        Identity { options: vec![("items of a step".to_owned(), self.visits.to_string())], items: Vec::new() }
    }

    fn findings(&self) -> &[Finding] {
        &[]
    }

    fn leave_out(&mut self, unusable: Vec<(usize, Error)>) {
        let mut number = 0..;
        self.items.retain(|_| number.next().is_some_and(|own| unusable.iter().all(|(item, _)| *item != own)));
    }

    fn of_another(&self, path: &Path) -> Result<Box<dyn Source>> {
        let reason = "sliders are trained on prompts, and have no pictures that could be held out".to_owned();
        Err(Error::Option { key: "validation_data_dir", value: path.display().to_string(), reason })
    }

    fn overview(&self) -> Overview {
        let line = |(own, _): &(Contrast, f64)| {
            let Contrast { target, positive, negative, guidance_scale, size: (width, height) } = own;
            format!("{target:?}: from {negative:?} to {positive:?}, {guidance_scale} times, at {width}×{height}")
        };
        let lines = vec![("sliders", self.items.iter().map(line).collect())];
        Overview { noun: "prompts", items: self.items.len(), lines, ..Overview::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slider(text: &str) -> Result<Slider, String> {
        serde_json::from_str(text).map_err(|error| error.to_string())
    }

    const AGE: &str = r#"{"target": "person", "positive": "old person", "negative": "young person""#;

    #[test]
    fn items_are_all_prompts_at_all_sizes_and_a_step_is_of_one_of_them() {
        let age = slider(&format!(r#"{AGE}, "preserve": ["female", "male"], "weight": 2}}"#)).unwrap();
        let ice = slider(r#"{"target": "road", "positive": "icy road", "negative": ""}"#).unwrap();
        let sliders = Sliders::new(&[age, ice], &[(512, 512), (64, 128)], 2, 4);
        let of = |item: usize| match sliders.example(item, &Stream::new(0)).unwrap() {
            Example::Contrast(own) => own,
            other => panic!("{other:?}"),
        };
        assert_eq!((sliders.count(), sliders.loss_weight(3), sliders.loss_weight(4)), (6, 2.0, 1.0));
        let Contrast { target, positive, negative, guidance_scale, size } = of(3);
        assert_eq!((&*target, &*positive, &*negative), ("male person", "male old person", "male young person"));
        assert_eq!((guidance_scale, size, of(0).size), (4.0, (64, 128), (512, 512)));
        assert_eq!((of(5).negative.as_str(), sliders.plain_caption(5).as_str()), ("", "road"));
        let order = sliders.sampler(3);
        assert_eq!((order.epoch_length(), order.batches_per_epoch()), (24, 12));
        assert!(sliders.overview().to_string().contains("\"male person\": from \"male young person\" to"));
        let largest = sliders.largest();
        assert_eq!((largest.count(), largest.plain_caption(0).as_str()), (2, "female person"));
    }

    #[test]
    fn what_cannot_be_trained_is_named() {
        assert!(slider(r#"{"target": "a", "positive": "b"}"#).unwrap_err().contains("missing field `negative`"));
        assert!(slider(&format!(r#"{AGE}, "guidance": 1}}"#)).unwrap_err().contains("unknown field `guidance`"));
        let problem = |text: &str| slider(&format!("{AGE}{text}}}")).unwrap().problem().map(|(key, _)| key);
        assert_eq!(problem(""), None);
        assert_eq!(problem(r#", "guidance_scale": 0"#), Some("guidance_scale"));
        assert_eq!(problem(r#", "weight": -1"#), Some("weight"));
        assert_eq!(problem(r#", "preserve": [" "]"#), Some("preserve"));
        let same = Slider { negative: "old person".into(), ..slider(&format!("{AGE}}}")).unwrap() };
        assert_eq!(same.problem().unwrap().0, "negative");
        let none = Slider { positive: String::new(), ..same };
        assert_eq!(none.problem().unwrap().0, "positive");
    }
}
