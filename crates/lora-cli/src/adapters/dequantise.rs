//! `lora dequantise`: a language model in GGUF as safetensors.

use std::path::PathBuf;

use lora_cli::arguments::Precision;
use lora_core::DType;
use lora_io::gguf::{self, LanguageModel};

use super::{apart, bytes_bar, save_tokenizer};
use crate::Failure;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Language model in GGUF.
    file: PathBuf,
    /// Output: a new folder with weights, configuration and tokenizer, or a .safetensors file.
    #[arg(long)]
    out: PathBuf,
    /// Type of the output's numbers.
    #[arg(long, default_value = "bf16")]
    dtype: Precision,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    apart([&arguments.file], &arguments.out)?;
    let model = LanguageModel::open(&arguments.file)?;
    let dtype = DType::from(arguments.dtype);
    let elements = |name: &str| model.shape(name).unwrap_or_default().iter().product::<usize>();
    let bytes = model.names().map(elements).sum::<usize>() * dtype.size();
    let bar = bytes_bar("writing", bytes as u64);
    let progress = |bytes| bar.inc(bytes);
    let is_file = arguments.out.extension().is_some_and(|extension| extension == "safetensors");
    let written = match is_file {
        true => gguf::dequantise(&arguments.file, &arguments.out, dtype, &progress)?,
        false => gguf::dequantise_to_folder(&arguments.file, &arguments.out, dtype, &progress)?,
    };
    bar.finish_and_clear();
    println!("{}: {} tensors, {} bytes", arguments.out.display(), model.names().count(), written);
    if !is_file {
        let mut notes = Vec::new();
        save_tokenizer(&arguments.file, &arguments.out, &mut notes);
        notes.iter().for_each(|note| eprintln!("note: {note}"));
        return Ok(());
    }
    match model.rope_scaling() {
        Ok(None) => {}
        Ok(Some(scaling)) => {
            let note = gguf::rope::add_to_config(&arguments.out.with_file_name("config.json"), &scaling)?;
            note.iter().for_each(|note| eprintln!("note: {note}"));
        }
        Err(error) => eprintln!("note: {error}"),
    }
    Ok(())
}
