//! `lora info`: what an adapter or a base model is.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lora_io::checkpoint::Checkpoint;
use lora_io::consumers::Inventory;
use lora_io::{AdapterInfo, family};

use crate::Failure;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// LoRA file (.safetensors) or PEFT folder; or a base model, file or folder.
    file: PathBuf,
    /// Print everything as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let info = match AdapterInfo::read(&arguments.file) {
        Ok(info) => info,
        // Control LoRAs and others that are not read have names of a base's layers, too.
        Err(error) if Inventory::read(&arguments.file).is_ok() => return Err(error.into()),
        // What is no adapter may be a base, or a base that is refused for a reason of its own.
        Err(error) => match Checkpoint::open(&arguments.file) {
            Ok(base) => return show_base(&base, arguments.json),
            Err(refused) if matches!(error, lora_io::Error::Family { .. }) => return Err(refused.into()),
            Err(_) => return Err(error.into()),
        },
    };
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
    show_metadata(&info.metadata);
    Ok(())
}

/// The header's free text, a line each.
fn show_metadata(metadata: &BTreeMap<String, String>) {
    for (key, value) in metadata {
        let shown: String = value.chars().take(100).collect();
        println!("  {key} = {shown}{}", if shown.len() < value.len() { " …" } else { "" });
    }
}

/// Empty tensors by which bases say how they were trained.
const MARKS: [&str; 2] = ["v_pred", "ztsnr"];

/// What a base model is: its family, its components, and what it says of itself.
fn show_base(base: &Checkpoint, json: bool) -> Result<(), Failure> {
    let numbers = |own: &lora_io::checkpoint::ComponentWeights| -> usize {
        own.names().filter_map(|name| own.shape(name)).map(|shape| shape.iter().product::<usize>()).sum()
    };
    let components: Vec<_> =
        base.components().map(|(name, own)| (name.name(), own.names().count(), numbers(own))).collect();
    let marks: Vec<&str> = MARKS.into_iter().filter(|mark| base.is_marked(mark)).collect();
    let predicts = base.scheduler().and_then(|scheduler| scheduler["prediction_type"].as_str());
    if json {
        let components: BTreeMap<_, _> = components
            .iter()
            .map(|(name, tensors, numbers)| (name, serde_json::json!({ "tensors": tensors, "parameters": numbers })))
            .collect();
        let json = serde_json::json!({
            "base": base.family().name, "family": base.family().title, "components": components, "marks": marks,
            "prediction_type": predicts, "unused": base.unused(), "metadata": base.metadata(),
        });
        println!("{json:#}");
        return Ok(());
    }
    println!("base model: {}", base.family());
    for (name, tensors, numbers) in components {
        println!("  {:<16} {tensors} tensors, {numbers} parameters", name.replace('_', " "));
    }
    if !marks.is_empty() {
        println!("marks:      {}", marks.join(", "));
    }
    if let Some(predicts) = predicts {
        println!("predicts:   {predicts}, as its scheduler says");
    }
    if let Some(first) = base.unused().first() {
        println!("note:       {} tensors are not used, {first} among them", base.unused().len());
    }
    show_metadata(base.metadata());
    Ok(())
}
