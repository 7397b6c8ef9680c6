//! `auto_label`: captions by machine for the pictures of a run that have none, before its data are opened. How a picture gets
//! its caption is `lora-caption`'s business.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use lora_caption::{Captioner, Existing, FolderOptions, Output, Report, caption_folder, has_caption};
use lora_data::dataset::{ImageDataset, Role, ScanOptions, Strictness};

use crate::config::TrainConfig;
use crate::{Error, Plugins, Preparing, Result};

/// Writes captions for pictures without one, where the configuration asks for it; the next run has them. [`crate::train`] calls
/// it; a program that drives a [`crate::Session`] of its own does so before [`crate::Session::prepare`].
///
/// # Errors
/// [`Error::Captions`] where no captions can be made at all, [`Error::NoCaption`] where a picture gets none and the run is
/// strict, [`Error::StoppedLabelling`] where `stop` became true on the way; whatever is wrong with the base's headers, since
/// hours of captions are of no use to a run that cannot begin.
pub fn auto_label(
    config: &TrainConfig,
    plugins: &Plugins,
    stop: &Arc<AtomicBool>,
    progress: &mut dyn FnMut(Preparing),
) -> Result<()> {
    let Some(settings) = &config.auto_label else { return Ok(()) };
    let checkpoint = plugins.bases.configured(config)?;
    plugins.bases.registration(&checkpoint)?.check(config)?;
    let folders: Vec<FolderOptions> = folders(config).into_iter().filter(lacks_captions).collect();
    if folders.is_empty() {
        return Ok(());
    }
    let captioner = Arc::new(Captioner::open(settings.clone())?);
    for options in folders {
        let mut told = |own: lora_caption::Progress<'_>| progress(Preparing::Labels(own.done, own.of));
        let report = caption_folder(&captioner, &options, stop, &mut told)?;
        tell(&options.folder, &report);
        if report.stopped {
            return Err(Error::StoppedLabelling);
        }
        if let Some(first) = report.failed.first().filter(|_| config.strict) {
            let first = format!("{}: {}", first.path.display(), first.problem);
            return Err(Error::NoCaption { count: report.failed.len(), first });
        }
    }
    Ok(())
}

/// The folders of a run whose pictures need captions of their own.
fn folders(config: &TrainConfig) -> Vec<FolderOptions> {
    let options = |folder: &Path, scan: &ScanOptions| FolderOptions {
        folder: folder.to_owned(),
        scan: scan.clone(),
        existing: Existing::Skip,
        output: Output::Files,
        ..FolderOptions::default()
    };
    let datasets = config.datasets.iter();
    let trained = datasets.filter(|own| own.scan.role == Role::Training && own.scan.metadata_file.is_none());
    let mut folders: Vec<_> = trained.map(|own| options(&own.path, &own.scan)).collect();
    if let (Some(validation), Some(first)) = (&config.validation_data_dir, config.datasets.first()) {
        let scan = ScanOptions { metadata_file: None, role: Role::Training, ..first.scan.clone() };
        folders.push(options(validation, &scan));
    }
    // Archives and tables have no place for a caption.
    folders.retain(|options| options.folder.is_dir());
    folders
}

/// Whether a picture of a folder has none. What cannot be scanned is told when the data are opened.
fn lacks_captions(options: &FolderOptions) -> bool {
    let scan = ScanOptions { strictness: Strictness::Inspect, ..options.scan.clone() };
    let lacks =
        |dataset: ImageDataset| dataset.items().iter().any(|item| item.file.own_file().is_some() && !has_caption(item));
    ImageDataset::scan(&options.folder, &scan).is_ok_and(lacks)
}

fn tell(folder: &Path, report: &Report) {
    let folder = folder.display();
    tracing::info!(
        "auto_label: {folder}: {} of {} pictures have got a caption",
        report.captioned.len(),
        report.pictures
    );
    for failure in &report.failed {
        tracing::warn!("auto_label: {}: {}", failure.path.display(), failure.problem);
    }
}
