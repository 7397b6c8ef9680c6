//! `lora convert`: an adapter in another format.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use lora_cli::arguments::Precision;
use lora_core::compose::{self, ExtractOptions};
use lora_core::rank::RankPolicy;
use lora_core::variant::VariantRegistry;
use lora_core::{Adapter, DType};
use lora_io::adapter::{self, AdapterFile, Format};
use lora_io::family::Family;
use lora_io::gguf::names::Architecture;
use lora_io::{merge, metadata};

use super::{apart, checked, sound, summary, write};
use crate::Failure;

/// Formats on the command line.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Layout {
    Kohya,
    Diffusers,
    DiffusersOld,
    Peft,
    /// llama.cpp's; needs --base for the model's attention heads.
    Gguf,
    /// A PEFT folder that the strictest consumers take: plain LoRA, one rank, one alpha.
    Portable,
}

impl Layout {
    pub(crate) fn format(self) -> Format {
        match self {
            Layout::Kohya => Format::Kohya,
            Layout::Diffusers => Format::Diffusers,
            Layout::DiffusersOld => Format::DiffusersOld,
            Layout::Peft | Layout::Portable => Format::Peft,
            Layout::Gguf => Format::Gguf,
        }
    }

    /// Writes an adapter so, and says what was written.
    pub(crate) fn write(
        self,
        path: &Path,
        mut adapter: Adapter,
        family: Option<&Family>,
        dtype: DType,
    ) -> Result<(), Failure> {
        if matches!(self, Layout::Portable) {
            let (portable, notes) = adapter::portable::portable(&adapter)?;
            notes.iter().for_each(|note| eprintln!("note: {note}"));
            adapter = portable;
        }
        write(path, &adapter, self.format(), family, dtype)
    }
}

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Adapter: a .safetensors or .gguf file or a PEFT folder.
    file: PathBuf,
    /// Format of the output.
    #[arg(long)]
    to: Layout,
    /// Output: a file, or a folder for PEFT.
    #[arg(long)]
    out: PathBuf,
    /// Type of the output's numbers (default: the input's).
    #[arg(long)]
    dtype: Option<Precision>,
    /// Write this alpha, with the same effect.
    #[arg(long)]
    alpha: Option<f64>,
    /// Turn other variants into plain LoRA of this rank first; needs --base.
    #[arg(long, requires = "base")]
    flatten: Option<usize>,
    /// The base model, for --flatten and for GGUF.
    #[arg(long, value_parser = lora_cli::arguments::base())]
    base: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    apart(std::iter::once(&arguments.file).chain(&arguments.base), &arguments.out)?;
    // Rows of a llama model are in another order in GGUF, by heads that only the base knows.
    let architecture = match (&arguments.base, arguments.to, is_gguf(&arguments.file)) {
        (Some(base), Layout::Gguf, _) | (Some(base), _, true) => Some(Architecture::of_base(base)?),
        _ => None,
    };
    let read = sound(match &architecture {
        Some(architecture) if is_gguf(&arguments.file) => adapter::gguf::read_for(&arguments.file, architecture)?,
        _ => adapter::read(&arguments.file)?,
    })?;
    let dtype = arguments.dtype.map_or(read.dtype(), DType::from);
    let AdapterFile { mut adapter, .. } = read;
    if let Some(architecture) = &architecture {
        adapter::gguf::set_architecture(&mut adapter, architecture);
    }
    if let (Some(rank), Some(base)) = (arguments.flatten, &arguments.base) {
        // What does not fit is an error below where the base is needed for it.
        let notes = merge::matches(base, adapter.clone()).unwrap_or_default();
        notes.iter().for_each(|note| eprintln!("note: {note}"));
        let policy = checked(RankPolicy::Fixed(rank))?;
        let options = ExtractOptions { policy, limit: rank, ..ExtractOptions::default() };
        let (flat, outcomes) = merge::flatten(base, &adapter, &options, &VariantRegistry::default())?;
        adapter = flat;
        metadata::refresh(&mut adapter);
        summary(&outcomes, &adapter, dtype);
    }
    if let Some(alpha) = arguments.alpha {
        if !(alpha.is_finite() && alpha > 0.0) {
            return Err(Failure::Usage(format!("--alpha {alpha}: expected a number above 0")));
        }
        compose::set_alpha(&mut adapter, alpha).map_err(|error| Failure::Work(error.to_string()))?;
        metadata::refresh(&mut adapter);
    }
    let family = adapter::family(&adapter);
    arguments.to.write(&arguments.out, adapter, family, dtype)
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "gguf")
}
