//! The norms of an adapter's updates: summed up by block, and as a picture of blocks by layers.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use image::{ImageFormat, RgbImage};
use lora_core::ModulePath;
use lora_core::health::ModuleHealth;

use super::heat_map::{self, Cell};

/// By block of a network, `unet down_blocks.0`: how many modules there are, and the norm of their updates together.
pub fn by_block(modules: &[ModuleHealth]) -> BTreeMap<String, (usize, f64)> {
    let mut blocks: BTreeMap<String, (usize, f64)> = BTreeMap::new();
    for module in modules {
        let name = format!("{} {}", module.module.component, block(&module.module.path));
        let (count, squares) = blocks.entry(name).or_default();
        *count += 1;
        *squares += module.norm.powi(2);
    }
    blocks.values_mut().for_each(|(_, norm)| *norm = norm.sqrt());
    blocks
}

/// Writes a picture (PNG) of all modules, blocks by layers; those that hold NaN or infinity are drawn as damaged.
///
/// # Errors
/// Where the file cannot be written.
pub fn write(path: impl AsRef<Path>, modules: &[ModuleHealth]) -> lora_io::Result<()> {
    let picture = draw(modules);
    lora_io::atomic::write(path, |file| picture.write_to(file, ImageFormat::Png).map_err(std::io::Error::other))
}

fn draw(modules: &[ModuleHealth]) -> RgbImage {
    let places: Vec<(String, String)> = modules.iter().map(|module| place(&module.module)).collect();
    let sorted = |labels: BTreeSet<&String>| {
        let mut labels: Vec<String> = labels.into_iter().cloned().collect();
        labels.sort_by_key(|label| natural(label));
        labels
    };
    let rows = sorted(places.iter().map(|(row, _)| row).collect());
    let columns = sorted(places.iter().map(|(_, column)| column).collect());
    let index = |labels: &[String], label: &String| labels.iter().position(|own| own == label).unwrap_or(0);
    let cells: Vec<Cell> = modules
        .iter()
        .zip(&places)
        .map(|(module, (row, column))| Cell {
            row: index(&rows, row),
            column: index(&columns, column),
            value: if module.not_finite > 0 { f64::NAN } else { module.norm },
        })
        .collect();
    heat_map::draw("norms of the updates", &rows, &columns, &cells)
}

/// The block of a module: its path up to the numbers that tell blocks apart.
fn block(path: &str) -> String {
    let parts: Vec<&str> = path.split('.').collect();
    let last = match parts.first() {
        Some(&("down_blocks" | "up_blocks")) => 2,
        Some(&"mid_block") => 1,
        _ => parts.iter().position(|part| part.parse::<u32>().is_ok()).map_or(1, |place| place + 1),
    };
    parts[..last.min(parts.len())].join(".")
}

/// The row and the column of a module in the picture: blocks, and what repeats in each of them.
fn place(path: &ModulePath) -> (String, String) {
    const REPEATED: [&str; 10] = [
        "down_blocks",
        "up_blocks",
        "mid_block",
        "attentions",
        "resnets",
        "downsamplers",
        "upsamplers",
        "transformer_blocks",
        "layers",
        "blocks",
    ];
    let parts: Vec<&str> = path.path.split('.').collect();
    let end = parts
        .iter()
        .rposition(|part| REPEATED.contains(part))
        .map_or(0, |last| last + 1 + usize::from(parts.get(last + 1).is_some_and(|next| next.parse::<u32>().is_ok())));
    let row = parts[..end].join(".").replace(".transformer_blocks.0", "").replace("text_model.encoder.", "");
    let row = if row.is_empty() { path.component.to_string() } else { format!("{} {row}", path.component) };
    (row, parts[end.min(parts.len() - 1)..].join("."))
}

/// Digits as numbers, so that block 10 comes after block 9.
fn natural(label: &str) -> Vec<Result<u32, String>> {
    label.split(['.', ' ']).map(|part| part.parse().map_err(|_| part.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use lora_core::Component;

    use super::*;

    #[test]
    fn modules_are_placed_by_block_and_layer() {
        let of = |path: &str| (block(path), place(&ModulePath::new(Component::UNET, path)));
        let (own, (row, column)) = of("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q");
        assert_eq!(
            (own.as_str(), row.as_str(), column.as_str()),
            ("down_blocks.1", "unet down_blocks.1.attentions.0", "attn1.to_q")
        );
        assert_eq!(of("mid_block.resnets.1.conv1").0, "mid_block");
        assert_eq!(block("model.layers.10.mlp.up_proj"), "model.layers.10");
        let mut labels = ["model.layers.10", "model.layers.9"];
        labels.sort_by_key(|label| natural(label));
        assert_eq!(labels, ["model.layers.9", "model.layers.10"]);
    }
}
