//! `lora info`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lora_io::{AdapterInfo, family};

use crate::Failure;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// LoRA file (.safetensors) or PEFT folder.
    file: PathBuf,
    /// Print everything as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let info = AdapterInfo::read(&arguments.file)?;
    let weights = match arguments.file.is_dir() {
        true => arguments.file.join("adapter_model.safetensors"),
        false => arguments.file.clone(),
    };
    let sha256 = lora_io::hash::file_sha256(&weights)?;
    let bytes = std::fs::metadata(&weights).map_or(0, |file| file.len());
    if arguments.json {
        let json = serde_json::json!({
            "format": info.format.name(), "family": family::title(info.family), "variants": info.variants,
            "targets": info.targets, "modules": info.modules, "ranks": info.ranks, "alphas": info.alphas, "dtypes": info.dtypes,
            "parameters": info.parameters, "not_finite": info.not_finite, "notes": info.notes, "metadata": info.metadata,
            "sshs_model_hash": info.model_hash, "sha256": sha256, "bytes": bytes,
        });
        println!("{json:#}");
        return Ok(());
    }
    let counted = |counts: &BTreeMap<String, usize>| {
        counts.iter().map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(", ")
    };
    println!("format:     {}   base: {}   size: {bytes} bytes", info.format, family::title(info.family));
    println!("modules:    {}   variant: {}", counted(&info.modules), counted(&info.variants));
    println!("layers:     {}", counted(&info.targets));
    println!("rank:       {:?}   alpha: {:?}   dtype: {:?}", info.ranks, info.alphas, info.dtypes);
    println!("parameters: {}", info.parameters);
    println!("hashes:     AutoV2 {}   AutoV3 {}", &sha256[..10], &info.model_hash[..12]);
    if !info.not_finite.is_empty() {
        println!(
            "DAMAGED:    {} tensor(s) hold NaN or infinity, {} among them",
            info.not_finite.len(),
            info.not_finite[0]
        );
    }
    info.notes.iter().for_each(|note| println!("note:       {note}"));
    for (key, value) in &info.metadata {
        let shown: String = value.chars().take(100).collect();
        println!("  {key} = {shown}{}", if shown.len() < value.len() { " …" } else { "" });
    }
    Ok(())
}
