//! `lora info`.

use std::path::PathBuf;

use lora_io::AdapterInfo;

use crate::Failure;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// LoRA file (.safetensors).
    file: PathBuf,
    /// Print everything as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let info = AdapterInfo::read(&arguments.file)?;
    let sha256 = lora_io::hash::file_sha256(&arguments.file)?;
    if arguments.json {
        let json = serde_json::json!({
            "modules": info.modules, "ranks": info.ranks, "alphas": info.alphas, "dtypes": info.dtypes,
            "parameters": info.parameters, "not_finite": info.not_finite, "metadata": info.metadata,
            "sshs_model_hash": info.model_hash, "sha256": sha256,
        });
        println!("{json:#}");
        return Ok(());
    }
    let modules: Vec<_> = info.modules.iter().map(|(prefix, count)| format!("{count} {prefix}")).collect();
    println!("modules:    {}", modules.join(", "));
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
    for (key, value) in &info.metadata {
        let shown: String = value.chars().take(100).collect();
        println!("  {key} = {shown}{}", if shown.len() < value.len() { " …" } else { "" });
    }
    Ok(())
}
