//! Names of Z-Image's transformer in single files: those that ComfyUI repacked, which have queries, keys and values in one
//! tensor, and diffusers' own, which people save by themselves. Either may stand behind a prefix.

use super::{Depths, Piece, Share, Tree, swap_prefix};

/// What tensors stand behind in files that hold other parts too, or once did.
const PREFIXES: &[&str] = &["model.diffusion_model.", "diffusion_model.", "model."];

/// Layers outside of blocks: repacked, diffusers'.
const ENDS: &[(&str, &str)] = &[("x_embedder.", "all_x_embedder.2-1."), ("final_layer.", "all_final_layer.2-1.")];

/// Parts of an attention: repacked, diffusers'.
const ATTENTION: &[(&str, &str)] = &[("out.", "to_out.0."), ("q_norm.", "norm_q."), ("k_norm.", "norm_k.")];

/// Queries, keys and values: in one tensor, and each.
const FUSED: &str = "qkv.";
const SEPARATE: [&str; 3] = ["to_q.", "to_k.", "to_v."];

/// How names begin that both have.
const COMMON: &[&str] = &["cap_embedder.", "t_embedder.", "noise_refiner.", "context_refiner.", "layers."];
const FILLERS: &[&str] = &["cap_pad_token", "x_pad_token"];

/// Words with underscores in module paths, and those between them.
pub(crate) const WORDS: &[&str] = &[
    "context_refiner",
    "noise_refiner",
    "layers",
    "attention",
    "feed_forward",
    "adaLN_modulation",
    "cap_embedder",
    "t_embedder",
    "x_embedder",
    "final_layer",
    "linear",
    "mlp",
    "qkv",
    "out",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "w1",
    "w2",
    "w3",
];

/// The transformer.
#[derive(Debug)]
pub struct ZImage;

impl Tree for ZImage {
    fn weights(&self, stored: &str, _depths: &Depths) -> Option<Vec<(String, Piece)>> {
        let name = PREFIXES.iter().find_map(|prefix| stored.strip_prefix(prefix)).unwrap_or(stored);
        if name == "norm_final.weight" {
            // Published, and read by nothing.
            return Some(Vec::new());
        }
        let all = |name: String| Some(vec![(name, Piece::All)]);
        if let Some(canonical) = swap_prefix(name, ENDS, false) {
            return all(canonical);
        }
        let is_canonical = ENDS.iter().any(|(_, canonical)| name.starts_with(canonical));
        if !is_canonical && !FILLERS.contains(&name) && !COMMON.iter().any(|start| name.starts_with(start)) {
            return None;
        }
        let Some((block, part)) = name.split_once(".attention.") else { return all(name.to_owned()) };
        if let Some(end) = part.strip_prefix(FUSED) {
            let piece = |(part, name): (usize, &&str)| {
                (format!("{block}.attention.{name}{end}"), Piece::Rows(Share::one(part, SEPARATE.len())))
            };
            return Some(SEPARATE.iter().enumerate().map(piece).collect());
        }
        all(match swap_prefix(part, ATTENTION, false) {
            Some(part) => format!("{block}.attention.{part}"),
            None => name.to_owned(),
        })
    }

    fn stored(&self, canonical: &str, _depths: &Depths) -> Option<(String, Piece)> {
        if let Some(name) = swap_prefix(canonical, ENDS, true) {
            return Some((name, Piece::All));
        }
        let Some((block, part)) = canonical.split_once(".attention.") else {
            return Some((canonical.to_owned(), Piece::All));
        };
        let separate = SEPARATE.iter().enumerate().find_map(|(index, name)| Some((index, part.strip_prefix(name)?)));
        if let Some((part, end)) = separate {
            let piece = Piece::Rows(Share::one(part, SEPARATE.len()));
            return Some((format!("{block}.attention.{FUSED}{end}"), piece));
        }
        let part = swap_prefix(part, ATTENTION, true).unwrap_or_else(|| part.to_owned());
        Some((format!("{block}.attention.{part}"), Piece::All))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repacked_names_map_both_ways() {
        for (stored, canonical) in [
            ("x_embedder.weight", "all_x_embedder.2-1.weight"),
            ("final_layer.adaLN_modulation.1.bias", "all_final_layer.2-1.adaLN_modulation.1.bias"),
            ("layers.29.attention.out.weight", "layers.29.attention.to_out.0.weight"),
            ("noise_refiner.0.attention.k_norm.weight", "noise_refiner.0.attention.norm_k.weight"),
            ("layers.0.adaLN_modulation.0.weight", "layers.0.adaLN_modulation.0.weight"),
            ("cap_pad_token", "cap_pad_token"),
            ("t_embedder.mlp.2.bias", "t_embedder.mlp.2.bias"),
        ] {
            let depths = Depths::default();
            assert_eq!(ZImage.weights(stored, &depths), Some(vec![(canonical.into(), Piece::All)]));
            assert_eq!(ZImage.stored(canonical, &depths), Some((stored.into(), Piece::All)));
            for prefix in PREFIXES {
                let behind = ZImage.weights(&format!("{prefix}{stored}"), &depths);
                assert_eq!(behind, Some(vec![(canonical.into(), Piece::All)]), "{prefix}{stored}");
            }
            // diffusers' own names in a file of their own.
            assert_eq!(ZImage.weights(canonical, &depths), Some(vec![(canonical.into(), Piece::All)]));
        }
        let fused = ZImage.weights("layers.3.attention.qkv.weight", &Depths::default()).unwrap();
        for (part, (canonical, piece)) in fused.iter().enumerate() {
            assert_eq!(*piece, Piece::Rows(Share::one(part, 3)));
            let stored = ZImage.stored(canonical, &Depths::default());
            assert_eq!(stored, Some(("layers.3.attention.qkv.weight".into(), *piece)));
        }
        assert_eq!(fused[1].0, "layers.3.attention.to_k.weight");
        assert_eq!(ZImage.weights("norm_final.weight", &Depths::default()), Some(Vec::new()));
        assert_eq!(ZImage.weights("double_blocks.0.img_attn.qkv.weight", &Depths::default()), None);
    }
}
