//! `lora merge`: adapters into a base model.

use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Instant;

use indicatif::ProgressBar;
use lora_cli::arguments::Precision;
use lora_core::DType;
use lora_core::variant::VariantRegistry;
use lora_io::adapter;
use lora_io::merge::{self, MergeOptions};

use super::{bytes_bar, save_tokenizer, weighted};
use crate::Failure;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Base model: a .safetensors file, a folder, or a language model in GGUF.
    #[arg(long, value_parser = lora_cli::arguments::base())]
    base: PathBuf,
    /// Adapter and strength, `FILE:0.8`; `FILE:0.8:0.6` for text encoder and U-Net; a third list gives factors by block.
    #[arg(long, required = true)]
    lora: Vec<String>,
    /// Output: a file for a file, a new folder for a folder; for GGUF a .gguf file or a new folder.
    #[arg(long)]
    out: PathBuf,
    /// Type of the output's numbers (default: the base's).
    #[arg(long)]
    dtype: Option<Precision>,
    /// Take the adapter out of a model that it was merged into.
    #[arg(long)]
    unmerge: bool,
    /// From GGUF into GGUF: quantise the tensors again that the adapter changes, in the types that they have.
    #[arg(long, conflicts_with = "dtype")]
    requantise: bool,
    /// The base is what PEFT's PiSSA or OLoRA left of the original model, for adapters that were saved unconverted.
    #[arg(long)]
    residual: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let (mut adapters, _) = weighted(&arguments.lora, &arguments.out)?;
    if arguments.residual {
        adapters.iter_mut().for_each(|weighted| adapter::on_residual(&mut weighted.adapter));
    }
    let (unmerge, requantise) = (arguments.unmerge, arguments.requantise);
    let options = MergeOptions { dtype: arguments.dtype.map(DType::from), unmerge, requantise };
    let started = Instant::now();
    let bar = Mutex::new(None::<ProgressBar>);
    let progress = |done: u64, of: u64| {
        let Ok(mut bar) = bar.lock() else { return };
        bar.get_or_insert_with(|| bytes_bar("merging", of)).set_position(done);
    };
    let mut report =
        merge::merge(&arguments.base, &adapters, &arguments.out, &options, &VariantRegistry::default(), &progress)?;
    if arguments.base.is_file() && arguments.out.is_dir() {
        save_tokenizer(&arguments.base, &arguments.out, &mut report.notes);
    }
    if let Ok(Some(bar)) = bar.into_inner() {
        bar.finish_and_clear();
    }
    if arguments.json {
        let json = serde_json::json!({ "files": report.files, "changed": report.changed, "copied": report.copied,
            "notes": report.notes, "seconds": started.elapsed().as_secs_f64() });
        println!("{json:#}");
        return Ok(());
    }
    report.notes.iter().for_each(|note| eprintln!("note: {note}"));
    println!(
        "{}: {} tensors changed, {} copied, {:.1} s",
        arguments.out.display(),
        report.changed,
        report.copied,
        started.elapsed().as_secs_f64()
    );
    Ok(())
}
