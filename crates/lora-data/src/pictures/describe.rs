//! What a run says of its pictures: to people before the first step, and in the metadata of the adapter's file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lora_io::metadata::{BucketRecord, TrainingRecord};

use super::Pictures;
use crate::bucket::Framing;
use crate::dataset::{CaptionSource, Role, tag_frequency};
use crate::finding::FindingKind;
use crate::source::{Overview, Shape, Source};

/// Pictures whose captions are shown.
const SHOWN: usize = 3;

pub(super) fn overview(pictures: &Pictures) -> Overview {
    let items = pictures.items();
    let mut sources: BTreeMap<CaptionSource, usize> = BTreeMap::new();
    items.iter().for_each(|item| *sources.entry(item.caption_source).or_default() += 1);
    let sources: Vec<String> =
        sources.iter().map(|(source, count)| format!("{count} from {}", source.name())).collect();
    let shown = items.iter().enumerate().take(SHOWN).map(|(index, item)| {
        let caption = pictures.plain_caption(index);
        format!("{}: {}", name(&item.file.path), if caption.is_empty() { "(no caption)" } else { &caption })
    });
    Overview {
        noun: "pictures",
        items: items.len(),
        left_out: pictures.lost().count(),
        lines: vec![("captions", std::iter::once(sources.join(", ")).chain(shown).collect())],
        notes: notes(pictures),
    }
}

fn notes(pictures: &Pictures) -> Vec<String> {
    let items = pictures.items();
    let mut notes: Vec<String> = enlarged(pictures).into_iter().chain(buckets(pictures)).collect();
    let left_out: Vec<_> = pictures.lost().collect();
    if let Some(first) = left_out.first() {
        let (path, reason) = (name(&first.path), &first.detail);
        notes.push(format!("skipped {} picture(s), the first {path}: {reason}", left_out.len()));
    }
    let cut = |item: usize| !items[item].more_lines.is_empty() && pictures.options(item).captions.cuts_lines();
    match (0..items.len()).filter(|&item| cut(item)).count() {
        0 => {}
        cut => notes.push(format!(
            "{cut} caption file(s) have more than one line; the first is used, caption_lines = \"all\" takes them all"
        )),
    }
    let of_kind = |kind: FindingKind| -> Vec<String> {
        let findings = pictures.findings().iter();
        findings.filter(|finding| finding.kind == kind).map(|finding| name(&finding.path)).collect()
    };
    let ignored = of_kind(FindingKind::FolderIgnored);
    if !ignored.is_empty() {
        notes.push(format!("folders that are not read: {}", ignored.join(", ")));
    }
    let numbers = pictures.findings().iter().filter(|finding| finding.kind == FindingKind::FolderNumber);
    notes.extend(numbers.map(|finding| format!("{}: {}", finding.path.display(), finding.detail)));
    for (kind, what) in [
        (FindingKind::OrphanCaption, "caption(s) without a picture"),
        (FindingKind::DuplicateStem, "picture(s) that share their caption with another of the same name"),
        (FindingKind::MissingMask, "picture(s) without a file in mask_dir"),
        (FindingKind::SharedMask, "picture(s) with the mask of a picture of the same name in another folder"),
    ] {
        if let (count @ 1.., Some(first)) = (of_kind(kind).len(), of_kind(kind).first()) {
            notes.push(format!("{count} {what}, the first {first}; `lora dataset` lists them"));
        }
    }
    let unused_mask = |item: usize| items[item].mask.is_some() && !pictures.options(item).masks.enabled;
    match (0..items.len()).filter(|&item| unused_mask(item)).count() {
        0 => {}
        masked => {
            notes.push(format!("{masked} picture(s) have a mask, which is not used; masked_loss = true uses it"));
        }
    }
    notes
}

/// How many pictures are enlarged, and which the most.
fn enlarged(pictures: &Pictures) -> Option<String> {
    let scale = |index: usize| pictures.plan(index).scale(pictures.items()[index].size);
    let enlarged: Vec<usize> = (0..pictures.items().len()).filter(|&index| scale(index) > 1.0).collect();
    let most = enlarged.iter().copied().max_by(|&a, &b| scale(a).total_cmp(&scale(b)))?;
    Some(format!(
        "{} picture(s) are smaller than the size that they are trained at and were enlarged, {} the most, {:.1} times",
        enlarged.len(),
        name(&pictures.items()[most].file.path),
        scale(most)
    ))
}

/// Which buckets are in use, where there are any.
fn buckets(pictures: &Pictures) -> Option<String> {
    pictures.datasets().find(|dataset| matches!(dataset.framing, Framing::Buckets(_)))?;
    let buckets = pictures.sampler(0).visits_by_shape();
    let list: Vec<_> = buckets.iter().map(|(shape, visits)| format!("{shape}: {visits}")).collect();
    Some(format!("{} bucket(s), visits an epoch: {}", buckets.len(), list.join(", ")))
}

pub(super) fn record(pictures: &Pictures, record: &mut TrainingRecord) {
    let visits = || pictures.sampler(0).visits_by_shape().into_iter().filter_map(picture_size);
    record.buckets = pictures.datasets().find_map(|dataset| match &dataset.framing {
        Framing::Buckets(buckets) => Some(BucketRecord {
            min: buckets.options().min,
            max: buckets.options().max,
            no_upscale: buckets.options().no_upscale,
            visits: visits().collect(),
        }),
        _ => None,
    });
    // One place for them in the file: the first dataset's.
    if let Some(dataset) = pictures.datasets().next() {
        let captions = &dataset.captions;
        record.caption_dropout_rate = captions.dropout;
        record.caption_dropout_every_n_epochs = captions.dropout_every_n_epochs;
        record.caption_tag_dropout_rate = captions.tag_dropout;
        record.shuffle_caption = captions.shuffle;
        record.keep_tokens = captions.keep_tokens;
    }
    for item in pictures.items() {
        let (folders, visits) = match item.role {
            Role::Regularisation => (&mut record.regularisation_folders, &mut record.regularisation_pictures),
            _ => (&mut record.folders, &mut record.pictures),
        };
        folders.entry(item.folder.to_string()).or_insert((item.repeats, 0)).1 += 1;
        *visits += item.repeats;
    }
    record.tag_frequency = tag_frequency(pictures.with_captions());
    for (item, captions) in pictures.with_captions() {
        let word = captions.trigger_word.to_lowercase();
        if !word.is_empty() && !item.tags(captions).any(|tag| tag == word) {
            *record.tag_frequency.entry(item.folder.to_string()).or_default().entry(word).or_default() += 1;
        }
    }
    let words = pictures.datasets().map(|dataset| dataset.captions.trigger_word.as_str());
    let words: BTreeSet<&str> = words.filter(|word| !word.is_empty()).collect();
    record.trigger_phrase = words.into_iter().collect::<Vec<_>>().join(", ");
}

/// Visits of pictures of one size.
fn picture_size((shape, visits): (Shape, usize)) -> Option<((usize, usize), usize)> {
    match shape {
        Shape::Picture(width, height) => Some(((width, height), visits)),
        _ => None,
    }
}

fn name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
