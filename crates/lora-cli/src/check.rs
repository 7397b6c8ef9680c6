//! `lora check`: what other programs would make of an adapter, and whether its numbers are healthy.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lora_core::health::{ModuleHealth, health};
use lora_data::figure::norms;
use lora_io::adapter;
use lora_io::consumers::{Inventory, Verdict, opinions};
use lora_io::family;
use lora_io::merge;

use crate::Failure;
use crate::adapters::apart;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// LoRA file (.safetensors) or PEFT folder.
    file: PathBuf,
    /// A base model, to see whether it has every layer that the adapter names.
    #[arg(long, value_parser = lora_cli::arguments::base())]
    base: Option<PathBuf>,
    /// Show every tensor's fate.
    #[arg(long)]
    keys: bool,
    /// Draw the norms of the updates, blocks by layers, as a picture (PNG).
    #[arg(long)]
    picture: Option<PathBuf>,
    /// Print everything as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    if let Some(path) = &arguments.picture {
        apart(std::iter::once(&arguments.file).chain(&arguments.base), path)?;
    }
    let inventory = Inventory::read(&arguments.file)?;
    let opinions = opinions(&inventory);
    let read = adapter::read(&arguments.file);
    let modules: Vec<ModuleHealth> = read.as_ref().map(|read| health(&read.adapter)).unwrap_or_default();
    let fit = match (&arguments.base, &read) {
        (Some(base), Ok(read)) => Some(merge::matches(base, read.adapter.clone()).map_err(|error| error.to_string())),
        _ => None,
    };
    let of_file = read.as_ref().map(|read| read.notes.as_slice()).unwrap_or_default();
    let of_base = fit.as_ref().and_then(|fit| fit.as_ref().ok()).map(Vec::as_slice).unwrap_or_default();
    let notes: Vec<&String> = of_file.iter().chain(of_base).collect();
    if let Some(path) = &arguments.picture {
        norms::write(path, &modules)?;
        eprintln!("drawn: {}", path.display());
    }
    let blocks = norms::by_block(&modules);
    let damaged: Vec<&ModuleHealth> = modules.iter().filter(|module| module.not_finite > 0).collect();
    let dead = modules.iter().filter(|module| module.is_dead()).count();
    if arguments.json {
        let norms: BTreeMap<_, _> = blocks.iter().map(|(block, (_, norm))| (block, norm)).collect();
        let json = serde_json::json!({
            "opinions": opinions, "base": family::title(inventory.base()), "problem": read.as_ref().err().map(ToString::to_string),
            "fits": fit.as_ref().map(Result::is_ok), "misfit": fit.as_ref().and_then(|fit| fit.as_ref().err()),
            "notes": notes,
            "norm_by_block": norms, "dead": dead,
            "not_finite": damaged.iter().map(|module| module.module.to_string()).collect::<Vec<_>>(),
        });
        println!("{json:#}");
        return Ok(());
    }
    println!("made for {}", family::title(inventory.base()));
    for opinion in &opinions {
        let verdict = match opinion.verdict {
            Verdict::Loads => "loads",
            Verdict::LoadsPart => "loads a part",
            Verdict::LoadsWrong => "LOADS WRONGLY",
            Verdict::NothingLoaded => "loads nothing",
            Verdict::Refuses => "refuses",
            _ => "not known",
        };
        println!("{:<11} {:<14} {}", opinion.consumer.name(), verdict, opinion.consumer.version());
        for problem in &opinion.problems {
            let tensors = if problem.keys > 0 {
                format!(" ({} tensors, {})", problem.keys, problem.examples.join(", "))
            } else {
                String::new()
            };
            println!("{:<11} - {}{tensors}", "", problem.what);
            if let Some(cure) = &problem.cure {
                println!("{:<11}   cure: {cure}", "");
            }
        }
        if arguments.keys {
            for (key, fate) in &opinion.keys {
                println!("{:<11}   {key}: {fate:?}", "");
            }
        }
    }
    if let Err(error) = &read {
        println!("this program refuses it: {error}");
    }
    match &fit {
        Some(Ok(_)) => println!("every module names a layer of the base and fits it"),
        Some(Err(reason)) => println!("DOES NOT FIT the base: {reason}"),
        None => {}
    }
    notes.iter().for_each(|note| println!("note: {note}"));
    println!("norms of the updates by block:");
    let largest = blocks.values().map(|(_, norm)| *norm).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    for (block, (count, norm)) in &blocks {
        let bar = "█".repeat((30.0 * norm / largest).round() as usize);
        println!("  {block:<42} {count:>4} modules {norm:>10.4} {bar}");
    }
    let (used, ranks) = modules
        .iter()
        .filter_map(|module| Some((module.used_ranks?, module.rank)))
        .fold((0, 0), |(used, ranks), (own, rank)| (used + own, ranks + rank));
    if ranks > 0 {
        println!(
            "ranks in use: {:.0}% (singular values above a hundredth of the largest)",
            100.0 * used as f64 / ranks as f64
        );
    }
    let zeros = modules.iter().map(|module| module.zeros).sum::<f64>() / modules.len().max(1) as f64;
    if zeros > 0.01 {
        println!("{:.0}% of the numbers are zero", 100.0 * zeros);
    }
    if dead > 0 {
        println!("{dead} modules do nothing (all zero)");
    }
    if let Some(first) = damaged.first() {
        println!("DAMAGED: {} modules hold NaN or infinity, {} among them", damaged.len(), first.module);
    }
    Ok(())
}
