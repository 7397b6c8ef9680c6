//! All pictures of a folder: which need a caption, what becomes of the caption that they have, and where it is written. How a
//! picture gets its caption is [`crate::captioner`]'s business.

mod journal;
mod lists;
mod report;

pub use report::{Captioned, Failure, Report};

use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lora_data::dataset::{CaptionSource, ImageDataset, Item, ScanOptions, Strictness};
use lora_data::finding::FindingKind;
use lora_data::prefetch::ahead;
use lora_data::report::html::SheetCard;
use lora_io::atomic::{self, Durability};
use serde::Deserialize;

use crate::captioner::{Captioner, Described, Problem};
use crate::choose::plain;
use crate::{Error, Result};
use journal::Journal;
use lists::List;

/// So many pictures without one success at a run's beginning end it.
const HOPELESS: usize = 20;
/// Between writes of a list.
const LIST_EVERY: Duration = Duration::from_secs(10);
/// Longest side of thumbnails, in pixels.
const THUMBNAIL: usize = 224;

/// What becomes of a caption that a picture has. The name of an `N_name` folder is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Existing {
    /// It stays as it is, and the picture is not looked at.
    #[default]
    Skip,
    /// The new one is put behind it; of tags, those that it lacks.
    Append,
    /// The new one is put before it; of tags, those that it lacks.
    Prepend,
    /// The new one takes its place.
    Overwrite,
}

/// Where captions are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Output {
    /// A text file beside each picture.
    #[default]
    Files,
    /// `metadata.csv` in the folder, with `filename` and `prompt`.
    Csv,
    /// `metadata.jsonl` in the folder, with what the tagger said.
    Jsonl,
}

/// What is done with a folder.
#[derive(Debug, Clone, Default)]
pub struct FolderOptions {
    /// The folder.
    pub folder: PathBuf,
    /// How it is read: recursion, the extension of caption files, their encoding. Strictness does not count.
    pub scan: ScanOptions,
    /// What becomes of captions that are there.
    pub existing: Existing,
    /// Where captions are written.
    pub output: Output,
    /// Nothing is written.
    pub dry_run: bool,
    /// The most pictures of which there are cards in the report.
    pub cards: usize,
}

/// How far a run is.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Progress<'p> {
    /// Pictures done.
    pub done: usize,
    /// Pictures that are looked at.
    pub of: usize,
    /// The last one, by its path from the folder.
    pub name: &'p str,
    /// Its caption, or why there is none.
    pub caption: &'p std::result::Result<String, Problem>,
}

/// Gives captions to the pictures of a folder. `stop` ends the run after the pictures that are being looked at; a later run
/// goes on from there. `progress` is told of every picture.
///
/// # Errors
/// Where the folder cannot be read or written, a list in it is damaged, the tagger fails, the server cannot be used at all, or
/// none of the first 20 pictures gets a caption. What was written before stays.
pub fn caption_folder(
    captioner: &Arc<Captioner>,
    options: &FolderOptions,
    stop: &Arc<AtomicBool>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Report> {
    let mut run = Run::open(captioner, options)?;
    let todo = Arc::new(std::mem::take(&mut run.todo));
    let over = Arc::new(AtomicBool::new(false));
    let ends = {
        let (stop, over) = (Arc::clone(stop), Arc::clone(&over));
        move || stop.load(Ordering::Relaxed) || over.load(Ordering::Relaxed)
    };
    let jobs = {
        let ends = ends.clone();
        (0..todo.len()).take_while(move |_| !ends())
    };
    let work = {
        let (captioner, todo, cards) = (Arc::clone(captioner), Arc::clone(&todo), options.cards);
        move |index: usize| {
            let Todo { item, name, .. } = &todo[index];
            let thumbnail = if index < cards { THUMBNAIL } else { 0 };
            captioner.describe(item, name, thumbnail, &ends).map(|described| (index, described))
        }
    };
    let threads = captioner.threads().min(todo.len());
    let (mut done, mut failure) = (0, None);
    // What is under way when something fails is waited for and written.
    for result in ahead(jobs, threads, 4 * threads, work) {
        let written = result.and_then(|(index, described)| {
            // Without an answer the run is stopping.
            let Some(described) = described else { return Ok(()) };
            let own = &todo[index];
            let caption = run.take(own, described)?;
            done += 1;
            progress(Progress { done, of: todo.len(), name: &own.name, caption: &caption });
            run.is_hopeless()
        });
        if let Err(error) = written {
            over.store(true, Ordering::Relaxed);
            failure.get_or_insert(error);
        }
    }
    run.close(done < todo.len(), failure)
}

/// A picture that needs a caption.
#[derive(Debug)]
struct Todo {
    item: Item,
    /// Its path from the folder.
    name: String,
    /// Its caption file.
    beside: PathBuf,
}

impl Todo {
    /// What it is called in reports.
    fn path(&self) -> PathBuf {
        self.item.file.path.clone()
    }

    /// The lines of the caption that it has.
    fn lines(&self) -> Vec<&str> {
        match has_caption(&self.item) {
            true => self.item.lines(),
            false => Vec::new(),
        }
    }
}

/// A run at work.
struct Run {
    captioner: Arc<Captioner>,
    options: FolderOptions,
    todo: Vec<Todo>,
    list: Option<List>,
    journal: Option<Journal>,
    /// Pictures in the list that are not in its file yet.
    unwritten: Vec<String>,
    written: Instant,
    report: Report,
}

impl Run {
    fn open(captioner: &Arc<Captioner>, options: &FolderOptions) -> Result<Self> {
        let folder = &options.folder;
        if folder.is_file() {
            return Err(Error::option(
                "folder",
                format!("{} is a file; captions are written beside pictures", folder.display()),
            ));
        }
        if !options.dry_run {
            atomic::clear_partial(folder);
        }
        let list = match options.output {
            Output::Files => None,
            Output::Csv => Some(List::csv(folder)?),
            Output::Jsonl => Some(List::jsonl(folder)?),
        };
        let changes = options.existing != Existing::Skip && !options.dry_run;
        let mut run = Self {
            captioner: Arc::clone(captioner),
            options: options.clone(),
            todo: Vec::new(),
            list,
            journal: None,
            unwritten: Vec::new(),
            written: Instant::now(),
            report: Report::default(),
        };
        let mut scan = options.scan.clone();
        scan.strictness = Strictness::Inspect;
        let dataset = ImageDataset::scan(folder, &scan)?;
        if !options.dry_run {
            // A folder that takes no file is found before anything is looked at.
            atomic::check_writable(folder)?;
        }
        if changes {
            let identity = format!("{:?} {:?} {}", options.existing, options.output, captioner.identity());
            run.journal = Some(Journal::open(folder, &identity)?);
        }
        run.sort_out(&dataset)?;
        let unreadable = dataset.findings().iter().filter(|finding| finding.kind == FindingKind::Unreadable).count();
        run.report.pictures = dataset.items().len() + unreadable;
        Ok(run)
    }

    /// Which pictures are to be looked at, and what keeps others from it.
    fn sort_out(&mut self, dataset: &ImageDataset) -> Result<()> {
        let mut damaged = HashSet::new();
        for finding in dataset.findings() {
            let own = finding.path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
            match finding.kind {
                FindingKind::Unreadable | FindingKind::UnreadableFolder => {
                    self.report.fail(&finding.path, Problem::Unreadable(finding.detail.clone()));
                }
                FindingKind::CaptionFile if own == "metadata.csv" || own == "metadata.jsonl" => {
                    let (path, reason) = (finding.path.clone(), finding.detail.clone());
                    return Err(Error::Data(lora_data::Error::Caption { path, line: None, reason }));
                }
                FindingKind::CaptionFile => {
                    damaged.insert(finding.path.with_extension(""));
                }
                FindingKind::FolderIgnored | FindingKind::PictureIgnored => {
                    self.report.notes.push(format!("{}: {}", finding.path.display(), finding.detail));
                }
                _ => {}
            }
        }
        let mut taken = HashSet::new();
        let mut archived = 0;
        for item in dataset.items() {
            let Some(path) = item.file.own_file() else {
                archived += 1;
                continue;
            };
            let beside = path.with_extension(self.extension());
            let name = normal_name(path, &self.options.folder);
            let first = taken.insert(beside.clone());
            if has_caption(item) && self.options.existing == Existing::Skip
                || self.journal.as_ref().is_some_and(|journal| journal.is_done(&name))
            {
                self.report.kept += 1;
            } else if damaged.contains(&path.with_extension("")) && self.options.existing != Existing::Overwrite {
                let reason = "its caption file cannot be read and is left as it is; correct it, or remove it";
                self.report.fail(path, Problem::Caption(reason.into()));
            } else if !first && self.options.output == Output::Files {
                let reason = format!("another picture has the same caption file, {}; rename one", beside.display());
                self.report.fail(path, Problem::Caption(reason));
            } else {
                self.todo.push(Todo { item: item.clone(), name, beside });
            }
        }
        if archived > 0 {
            self.report.notes.push(format!("{archived} pictures in archives or tables are left out; unpack them"));
        }
        let hidden = self.todo.iter().filter(|own| self.list.is_some() && is_beside(&own.item)).count();
        if hidden > 0 {
            self.report.notes.push(format!("{hidden} pictures have caption files, which count before a list"));
        }
        if self.options.output == Output::Files && !self.options.dry_run {
            let folders: HashSet<&Path> = self.todo.iter().filter_map(|own| own.beside.parent()).collect();
            folders.into_iter().try_for_each(atomic::check_writable)?;
        }
        Ok(())
    }

    fn extension(&self) -> &str {
        self.options.scan.caption_extension.as_deref().map_or("txt", |extension| extension.trim_start_matches('.'))
    }

    /// Takes in what a picture has got; gives the caption that it has now.
    fn take(&mut self, own: &Todo, described: Described) -> Result<std::result::Result<String, Problem>> {
        let Described { caption, is_tags, probabilities, thumbnail } = described;
        let caption = caption.map(|caption| {
            if is_tags {
                self.report.count(&caption, &self.captioner.settings().separator);
            }
            let separator = &self.captioner.settings().separator;
            merged(&own.lines(), &caption, self.options.existing, separator, is_tags)
        });
        if self.report.cards.len() < self.options.cards {
            let problem = caption.as_ref().err().map(ToString::to_string).unwrap_or_default();
            let caption = caption.as_ref().cloned().unwrap_or_else(|_| own.lines().join(" "));
            self.report.cards.push(SheetCard { name: own.name.clone(), caption, problem, jpeg: thumbnail });
        }
        match &caption {
            Ok(text) => {
                if !self.options.dry_run {
                    let least = self.captioner.least();
                    self.write(own, text, probabilities.as_ref().map(|own| (own, least)))?;
                }
                self.report.captioned.push(Captioned { path: own.path(), caption: text.clone() });
            }
            Err(problem) => self.report.fail(&own.path(), problem.clone()),
        }
        Ok(caption)
    }

    fn write(&mut self, own: &Todo, text: &str, tags: Option<(&crate::Probabilities, f32)>) -> Result<()> {
        match &mut self.list {
            Some(list) => {
                list.set(&own.name, text, tags);
                self.unwritten.push(own.name.clone());
                if self.written.elapsed() >= LIST_EVERY { self.write_list() } else { Ok(()) }
            }
            None => {
                // What takes the place of a caption must be on the disk before that one is gone; a new one can be made again.
                let durability = if own.beside.exists() { Durability::Synced } else { Durability::Unsynced };
                atomic::write_with(&own.beside, durability, |file| writeln!(file, "{text}"))?;
                self.journal.as_mut().map_or(Ok(()), |journal| journal.note([own.name.clone()]))
            }
        }
    }

    fn write_list(&mut self) -> Result<()> {
        let Some(list) = self.list.as_ref().filter(|_| !self.unwritten.is_empty()) else { return Ok(()) };
        list.write()?;
        self.written = Instant::now();
        let names = std::mem::take(&mut self.unwritten);
        self.journal.as_mut().map_or(Ok(()), |journal| journal.note(names))
    }

    fn is_hopeless(&self) -> Result<()> {
        let tried: Vec<&Failure> = self.report.failed.iter().filter(|own| own.tells_of_source()).collect();
        // Where pictures have captions already, those that are left may well be those that a model refuses.
        let works = self.report.kept > 0 || !self.report.captioned.is_empty();
        match (!works, tried.as_slice()) {
            (true, [.., last]) if tried.len() >= HOPELESS => {
                Err(Error::NothingWorks { count: tried.len(), last: last.problem.to_string() })
            }
            _ => Ok(()),
        }
    }

    /// Writes what is not written yet.
    fn close(mut self, stopped: bool, failure: Option<Error>) -> Result<Report> {
        let list = self.write_list();
        if let Some(error) = failure {
            return Err(error);
        }
        list?;
        self.report.stopped = stopped;
        let again = stopped || self.report.failed.iter().any(Failure::tells_of_source);
        if let Some(journal) = self.journal.take_if(|_| !again) {
            journal.remove();
        }
        Ok(self.report)
    }
}

/// Whether a picture has a caption of its own; the name of its folder is none.
pub fn has_caption(item: &Item) -> bool {
    !item.caption.is_empty() && !matches!(item.caption_source, CaptionSource::Folder | CaptionSource::None)
}

fn is_beside(item: &Item) -> bool {
    matches!(item.caption_source, CaptionSource::Txt | CaptionSource::Caption | CaptionSource::File)
}

/// A picture's path from the folder, with slashes.
fn normal_name(path: &Path, folder: &Path) -> String {
    let inside = path.strip_prefix(folder).unwrap_or(path);
    inside.components().map(|part| part.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/")
}

/// The caption that a picture has then. Lines behind the first, which some trainers choose among, stay.
fn merged(lines: &[&str], new: &str, existing: Existing, separator: &str, is_tags: bool) -> String {
    let Some((&first, others)) = lines.split_first().filter(|_| existing != Existing::Overwrite) else {
        return new.to_owned();
    };
    let had: HashSet<String> = first.split(',').map(plain).collect();
    let new = match is_tags {
        true => {
            let tags = new.split(separator).filter(|tag| !had.contains(&plain(tag)));
            tags.collect::<Vec<_>>().join(separator)
        }
        false => new.to_owned(),
    };
    let parts = match existing {
        Existing::Prepend => [new.as_str(), first],
        _ => [first, new.as_str()],
    };
    let line = parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(separator);
    std::iter::once(line.as_str()).chain(others.iter().copied()).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caption_that_is_there_is_kept_as_the_policy_says() {
        let of = |existing, is_tags| {
            merged(&["1girl, Long_hair", "another line"], "long hair, sky", existing, ", ", is_tags)
        };
        assert_eq!(of(Existing::Append, true), "1girl, Long_hair, sky\nanother line");
        assert_eq!(of(Existing::Prepend, true), "sky, 1girl, Long_hair\nanother line");
        assert_eq!(of(Existing::Append, false), "1girl, Long_hair, long hair, sky\nanother line");
        assert_eq!(of(Existing::Overwrite, true), "long hair, sky");
        assert_eq!(merged(&[], "sky", Existing::Append, ", ", true), "sky");
        assert_eq!(merged(&["sky"], "sky", Existing::Append, ", ", true), "sky");
    }
}
