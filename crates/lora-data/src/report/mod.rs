//! A look at a dataset before hours are spent on it: what there is, what training will make of it, and what is the
//! matter with which file. Pictures are looked at here, texts in [`texts`]; the pages for people are in [`html`].

mod duplicates;
pub mod html;
mod measure;
pub mod texts;

pub use measure::Measures;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use lora_core::random::Stream;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::caption::Done;
use crate::dataset::{CaptionSource, Role};
use crate::finding::{Finding, FindingKind};
use crate::prefetch::{ahead, cores};
use crate::source::{Shape, Source};
use crate::tokenizer::ClipTokenizer;
use crate::{Pictures, Result, Sample};

use duplicates::Fingerprint;

/// JPEG quality of pictures on pages.
const QUALITY: u8 = 80;

/// What is looked for, and from where on it is reported. The defaults were set on photographs and drawings.
#[derive(Debug, Clone)]
pub struct ReportOptions {
    /// Longest side of thumbnails, in pixels.
    pub thumbnail: usize,
    /// The most pictures that are shown: the first ones, those with findings before the others.
    pub shown: usize,
    /// Samples as training sees them, spread over the dataset.
    pub samples: usize,
    /// The tokenizer and the number of tokens that captions may have.
    pub tokens: Option<(ClipTokenizer, usize)>,
    /// Longer sides of so many shorter ones are extreme.
    pub aspect: f64,
    /// Share of the scaled picture that may be cut away.
    pub trimmed: f64,
    /// Sharpness (see [`Measures::sharpness`]) below which a picture counts as blurred.
    pub sharpness: f64,
    /// Mean brightness, from 0 to 1, below which a picture counts as dark.
    pub dark: f64,
    /// Share of burnt-out pixels, a plain background aside, above which it counts as too bright.
    pub bright: f64,
    /// Bits of 64 in which the perceptual hashes of near duplicates may differ.
    pub near: u32,
}

impl Default for ReportOptions {
    fn default() -> Self {
        Self {
            thumbnail: 160,
            shown: 200,
            samples: 24,
            tokens: None,
            aspect: 3.0,
            trimmed: 0.25,
            sharpness: 0.07,
            dark: 0.12,
            bright: 0.4,
            near: 6,
        }
    }
}

/// One picture.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct PictureReport {
    /// The file.
    #[serde(serialize_with = "crate::finding::lossy")]
    pub path: PathBuf,
    /// Number of its dataset.
    pub dataset: usize,
    /// Width and height.
    pub size: (usize, usize),
    /// The size that it is trained at.
    pub bucket: (usize, usize),
    /// Factor by which it is scaled; above 1 it is enlarged.
    pub scale: f64,
    /// Share of the scaled picture that is cut away.
    pub trimmed: f64,
    /// Visits per epoch.
    pub repeats: usize,
    /// Its caption.
    pub caption: String,
    /// What was measured; `None` where it cannot be decoded.
    pub measures: Option<Measures>,
    /// The part that is kept, as shares of the picture: left, top, width, height.
    pub kept: [f64; 4],
    /// A small JPEG.
    #[serde(skip)]
    pub thumbnail: Vec<u8>,
}

/// One picture as training sees it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Preview {
    /// The file's name.
    pub name: String,
    /// Width and height of the sample.
    pub size: (usize, usize),
    /// The caption as training gets it.
    pub caption: String,
    /// A small JPEG; what a mask leaves out is darkened.
    pub jpeg: Vec<u8>,
}

/// Counts of captions.
#[derive(Debug, Clone, Default, Serialize)]
#[non_exhaustive]
pub struct CaptionCounts {
    /// By where they come from.
    pub sources: BTreeMap<&'static str, usize>,
    /// Pictures without any text.
    pub empty: usize,
    /// Longer than the model reads; `None` where no tokenizer was given.
    pub long: Option<usize>,
    /// Different captions.
    pub different: usize,
}

/// What a look at a dataset gives.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct DatasetReport {
    /// Pictures of the run, in the order of the datasets.
    pub pictures: Vec<PictureReport>,
    /// Visits per epoch, repeats included.
    pub visits: usize,
    /// Of these, visits of regularisation pictures.
    pub regularisation_visits: usize,
    /// Visits per epoch by bucket, `width×height`.
    pub buckets: BTreeMap<String, usize>,
    /// Steps per epoch before accumulation.
    pub batches: usize,
    /// Captions.
    pub captions: CaptionCounts,
    /// The most frequent tags with their number.
    pub tags: Vec<(String, usize)>,
    /// What is the matter with which file, worst first.
    pub findings: Vec<Finding>,
    /// Samples as training sees them.
    #[serde(skip)]
    pub previews: Vec<Preview>,
}

impl DatasetReport {
    /// Findings by kind.
    pub fn counts(&self) -> BTreeMap<FindingKind, usize> {
        let mut counts = BTreeMap::new();
        for finding in &self.findings {
            *counts.entry(finding.kind).or_default() += 1;
        }
        counts
    }
}

/// What one thread finds of one picture.
struct Looked {
    measures: Measures,
    fingerprint: Fingerprint,
    sha256: [u8; 32],
    thumbnail: Vec<u8>,
    kept: [f64; 4],
    size: (usize, usize),
}

/// Looks at every picture, on all cores. `progress` is told how many are done, of how many.
///
/// # Errors
/// None for a single picture or caption: each becomes a finding.
pub fn inspect(
    pictures: Arc<Pictures>,
    options: &ReportOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<DatasetReport> {
    let count = pictures.items().len();
    let mut findings: Vec<Finding> = pictures.findings().to_vec();
    let (own, thumbnail) = (Arc::clone(&pictures), options.thumbnail);
    let looked = ahead(0..count, cores(), 4 * cores(), move |index| look(&own, index, thumbnail));
    let (mut all, mut reports) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for (index, looked) in looked.enumerate() {
        let item = &pictures.items()[index];
        let plan = pictures.plan(index);
        let looked = looked.map_err(|error| {
            findings.push(Finding::new(&item.file.path, FindingKind::Unreadable, error.reason()));
        });
        let mut looked = looked.ok();
        // Thumbnails of a large dataset are not kept: memory stays bounded.
        let few = reports.len() < options.shown;
        let thumbnail = looked.as_mut().map(|looked| std::mem::take(&mut looked.thumbnail)).filter(|_| few);
        reports.push(PictureReport {
            path: item.file.path.clone(),
            dataset: pictures.dataset_of(index),
            size: item.size,
            bucket: plan.target,
            scale: plan.scale(item.size),
            trimmed: plan.trimmed(),
            repeats: item.repeats,
            caption: item.caption.clone(),
            measures: looked.as_ref().map(|looked| looked.measures),
            kept: looked.as_ref().map_or([0.0, 0.0, 1.0, 1.0], |looked| looked.kept),
            thumbnail: thumbnail.unwrap_or_default(),
        });
        all.push(looked);
        progress(index + 1, count);
    }
    for (report, looked) in reports.iter().zip(&all) {
        if let Some(looked) = looked {
            judge(report, looked, options, &mut findings);
        }
    }
    duplicates::find(&reports, &all, options.near, &mut findings);
    let captions = captions(&pictures, options, &mut findings);
    findings.sort_by(|a, b| (a.kind.severity(), a.kind, &a.path).cmp(&(b.kind.severity(), b.kind, &b.path)));
    let sampler = pictures.sampler(0);
    let name = |(shape, visits): (Shape, usize)| (shape.to_string(), visits);
    let items = pictures.items().iter();
    Ok(DatasetReport {
        visits: sampler.epoch_length(),
        regularisation_visits: items.filter(|item| item.role == Role::Regularisation).map(|item| item.repeats).sum(),
        buckets: sampler.visits_by_shape().into_iter().map(name).collect(),
        batches: sampler.batches_per_epoch(),
        captions,
        tags: tags(&pictures),
        findings,
        previews: previews(&pictures, options),
        pictures: reports,
    })
}

fn look(pictures: &Pictures, index: usize, thumbnail: usize) -> Result<Looked> {
    let bytes = pictures.items()[index].file.read()?;
    let sample = pictures.decode(index, &bytes)?;
    let size = sample.size();
    let small = sample.picture.scaled_to(thumbnail)?;
    let processed = pictures.process(index, sample.clone(), &Stream::new(0))?;
    let frame = processed.frame;
    // A frame belongs to the picture as it was decoded unless a processor gave it another size in between.
    let kept = match frame.source == size {
        true => {
            let share = |part: usize, whole: usize| part as f64 / whole.max(1) as f64;
            let (scaled, offset, part) = (frame.scaled, frame.offset, processed.size());
            [share(offset.0, scaled.0), share(offset.1, scaled.1), share(part.0, scaled.0), share(part.1, scaled.1)]
        }
        false => [0.0, 0.0, 1.0, 1.0],
    };
    Ok(Looked {
        measures: Measures::of(&sample.picture)?,
        fingerprint: Fingerprint::of(&sample.picture)?,
        sha256: Sha256::digest(&bytes).into(),
        thumbnail: small.to_jpeg(QUALITY),
        kept,
        size,
    })
}

fn judge(report: &PictureReport, looked: &Looked, options: &ReportOptions, findings: &mut Vec<Finding>) {
    let mut find = |kind, detail: String| findings.push(Finding::new(&report.path, kind, detail));
    let (width, height) = looked.size;
    let aspect = width.max(height) as f64 / width.min(height).max(1) as f64;
    if report.scale > 1.01 {
        let (w, h) = report.bucket;
        find(
            FindingKind::LowResolution,
            format!("{width}×{height} pixels are enlarged {:.1} times to cover {w}×{h}", report.scale),
        );
    }
    if aspect > options.aspect {
        find(FindingKind::ExtremeAspect, format!("{width}×{height} pixels are {aspect:.1} to 1"));
    }
    if report.trimmed > options.trimmed {
        find(FindingKind::HeavyCrop, format!("{:.0}% of it are cut away", 100.0 * report.trimmed));
    }
    let measures = &looked.measures;
    if measures.sharpness < options.sharpness {
        find(
            FindingKind::Blurred,
            format!("sharpness {:.4}, usual is above {}", measures.sharpness, options.sharpness),
        );
    }
    if measures.brightness < options.dark {
        find(FindingKind::Dark, format!("mean brightness {:.0}%", 100.0 * measures.brightness));
    }
    if measures.burnt > options.bright {
        find(FindingKind::Bright, format!("{:.0}% of it are burnt out", 100.0 * measures.burnt));
    }
}

fn captions(pictures: &Pictures, options: &ReportOptions, findings: &mut Vec<Finding>) -> CaptionCounts {
    let mut counts = CaptionCounts { long: options.tokens.as_ref().map(|_| 0), ..CaptionCounts::default() };
    let mut same: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (index, item) in pictures.items().iter().enumerate() {
        *counts.sources.entry(item.caption_source.name()).or_default() += 1;
        let mut find = |kind, detail: String| findings.push(Finding::new(&item.file.path, kind, detail));
        let triggered = !pictures.options(index).captions.trigger_word.is_empty();
        if item.caption.is_empty() {
            counts.empty += 1;
            match item.caption_source {
                _ if triggered => {}
                CaptionSource::None => find(FindingKind::MissingCaption, "there is no caption".into()),
                source => find(FindingKind::EmptyCaption, format!("its caption ({}) is empty", source.name())),
            }
        } else if item.caption_source != CaptionSource::Folder {
            same.entry(&item.caption).or_default().push(index);
        }
        if let Some((tokenizer, limit)) = &options.tokens {
            let captions = &pictures.options(index).captions;
            let lines = item.lines();
            let count = |lines: &[&str]| tokenizer.encode(&captions.kept(lines, Done::ALL, &Stream::new(0))).len();
            let tokens = match captions.wildcards {
                // Any of them may be chosen.
                true => lines.iter().map(|line| count(&[line])).max().unwrap_or(0),
                false => count(&lines),
            };
            if tokens > *limit {
                counts.long = counts.long.map(|long| long + 1);
                find(FindingKind::LongCaption, format!("{tokens} tokens, {limit} are read"));
            }
        }
    }
    counts.different = same.len();
    for (caption, own) in same.iter().filter(|(_, own)| own.len() > 1) {
        let shown: String = caption.chars().take(60).collect();
        let path = &pictures.items()[own[0]].file.path;
        let detail = format!("{} pictures have the caption “{shown}”", own.len());
        findings.push(Finding::new(path, FindingKind::DuplicateCaption, detail));
    }
    counts
}

fn tags(pictures: &Pictures) -> Vec<(String, usize)> {
    let mut tags: BTreeMap<String, usize> = BTreeMap::new();
    for (tag, count) in crate::dataset::tag_frequency(pictures.with_captions()).into_values().flatten() {
        *tags.entry(tag).or_default() += count;
    }
    let mut tags: Vec<_> = tags.into_iter().collect();
    tags.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    tags.truncate(50);
    tags
}

fn previews(pictures: &Pictures, options: &ReportOptions) -> Vec<Preview> {
    let count = pictures.items().len();
    let shown = options.samples.min(count);
    let preview = |number: usize| {
        let index = number * count / shown.max(1);
        let item = &pictures.items()[index];
        // The draws of a first visit: random crops and flips show.
        let draw = Stream::new(0).at("preview").with(index as u64);
        let sample = pictures.load(index, &draw).ok()?;
        let size = sample.size();
        let picture = darkened(sample).picture.scaled_to(options.thumbnail).ok()?;
        Some(Preview {
            name: item.file.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
            size,
            caption: pictures.options(index).captions.process(&item.lines(), 0, Done::ALL, &draw),
            jpeg: picture.to_jpeg(QUALITY),
        })
    };
    (0..shown).filter_map(preview).collect()
}

/// What a mask leaves out at a quarter of its brightness.
fn darkened(mut sample: Sample) -> Sample {
    if let Some(mask) = &sample.mask {
        let weights = mask.data().to_vec();
        for (pixel, weight) in sample.picture.data_mut().as_chunks_mut::<3>().0.iter_mut().zip(weights) {
            *pixel = pixel.map(|value| (u32::from(value) * (85 + 2 * u32::from(weight) / 3) / 255) as u8);
        }
    }
    sample
}
