//! Names of CLIP text encoders: transformers' own and OpenCLIP's, which keeps query, key and value of a layer in one
//! tensor.
//!
//! | OpenCLIP | transformers |
//! |---|---|
//! | `token_embedding.weight`, `positional_embedding` | `text_model.embeddings.{token,position}_embedding.weight` |
//! | `transformer.resblocks.i.attn.in_proj_weight` | `text_model.encoder.layers.i.self_attn.{q,k,v}_proj.weight`, by rows |
//! | `transformer.resblocks.i.{ln_1,ln_2}` | `text_model.encoder.layers.i.layer_norm{1,2}` |
//! | `transformer.resblocks.i.mlp.{c_fc,c_proj}` | `text_model.encoder.layers.i.mlp.{fc1,fc2}` |
//! | `ln_final` | `text_model.final_layer_norm` |
//! | `text_projection` | `text_projection.weight`, transposed |

use super::{Depths, Piece, Share, Tree, numbered, swap_prefix};

/// Words with underscores in module paths of CLIP text encoders, in transformers' tree.
pub(crate) const WORDS: &[&str] = &[
    "position_embedding",
    "final_layer_norm",
    "token_embedding",
    "text_projection",
    "layer_norm1",
    "layer_norm2",
    "embeddings",
    "text_model",
    "self_attn",
    "out_proj",
    "encoder",
    "k_proj",
    "layers",
    "q_proj",
    "v_proj",
    "fc1",
    "fc2",
    "mlp",
];

/// transformers' names, with or without their `text_model.` level.
#[derive(Debug)]
pub struct Clip;

impl Tree for Clip {
    fn weights(&self, stored: &str, _depths: &Depths) -> Option<Vec<(String, Piece)>> {
        if stored.ends_with("position_ids") {
            return Some(Vec::new());
        }
        Some(vec![(with_text_model(stored), Piece::All)])
    }

    fn stored(&self, canonical: &str, _depths: &Depths) -> Option<(String, Piece)> {
        Some((canonical.to_owned(), Piece::All))
    }
}

/// The name with the level that some writers leave out. The projection lies beside the encoder, not in it.
pub(crate) fn with_text_model(name: &str) -> String {
    if name.starts_with("text_model.") || name.starts_with("text_projection") {
        name.to_owned()
    } else {
        format!("text_model.{name}")
    }
}

/// OpenCLIP's names.
#[derive(Debug)]
pub struct OpenClip {
    /// Whether the model reads the states before the last layer, and nothing of that layer and the projection.
    pub stops_before_last: bool,
}

/// Tensors outside the layers: OpenCLIP's name, transformers'.
const ENDS: &[(&str, &str)] = &[
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."),
];

/// Parts of a layer that are tensors of their own: OpenCLIP's name, transformers'.
const LAYER: &[(&str, &str)] = &[
    ("attn.out_proj.", "self_attn.out_proj."),
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
];

/// The projections of a layer that lie in one tensor, in the order of its rows.
const FUSED: [&str; 3] = ["q_proj", "k_proj", "v_proj"];

const BLOCKS: &str = "transformer.resblocks.";
const LAYERS: &str = "text_model.encoder.layers.";
const PROJECTION: (&str, &str) = ("text_projection", "text_projection.weight");

/// One more than the highest layer that begins a name after the prefix.
fn count(names: &[&str], prefix: &str) -> usize {
    let layer = |name: &&str| Some(numbered(name.strip_prefix(prefix)?)?.0 + 1);
    names.iter().filter_map(layer).max().unwrap_or(0)
}

impl Tree for OpenClip {
    fn depths_of_stored(&self, names: &[&str]) -> Depths {
        let layers = count(names, BLOCKS).saturating_sub(usize::from(self.stops_before_last));
        Depths { layers, ..Depths::default() }
    }

    fn depths_of_canonical(&self, names: &[&str]) -> Depths {
        Depths { layers: count(names, LAYERS), ..Depths::default() }
    }

    fn weights(&self, stored: &str, _depths: &Depths) -> Option<Vec<(String, Piece)>> {
        if stored == "logit_scale" {
            return Some(Vec::new());
        }
        if stored == PROJECTION.0 {
            return Some(vec![(PROJECTION.1.to_owned(), Piece::Transposed)]);
        }
        if let Some(name) = swap_prefix(stored, ENDS, false) {
            return Some(vec![(name, Piece::All)]);
        }
        let (layer, rest) = numbered(stored.strip_prefix(BLOCKS)?)?;
        if let Some(kind) = rest.strip_prefix("attn.in_proj_") {
            let part = |(part, name)| {
                (format!("{LAYERS}{layer}.self_attn.{name}.{kind}"), Piece::Rows(Share::one(part, FUSED.len())))
            };
            return Some(FUSED.iter().enumerate().map(part).collect());
        }
        let rest = swap_prefix(rest, LAYER, false)?;
        Some(vec![(format!("{LAYERS}{layer}.{rest}"), Piece::All)])
    }

    fn stored(&self, canonical: &str, _depths: &Depths) -> Option<(String, Piece)> {
        if canonical == PROJECTION.1 {
            return Some((PROJECTION.0.to_owned(), Piece::Transposed));
        }
        if let Some(name) = swap_prefix(canonical, ENDS, true) {
            return Some((name, Piece::All));
        }
        let (layer, rest) = numbered(canonical.strip_prefix(LAYERS)?)?;
        if let Some((name, kind)) = rest.strip_prefix("self_attn.").and_then(|rest| rest.split_once('.'))
            && let Some(part) = FUSED.iter().position(|fused| *fused == name)
        {
            let piece = Piece::Rows(Share::one(part, FUSED.len()));
            return Some((format!("{BLOCKS}{layer}.attn.in_proj_{kind}"), piece));
        }
        Some((format!("{BLOCKS}{layer}.{}", swap_prefix(rest, LAYER, true)?), Piece::All))
    }

    fn is_used(&self, stored: &str, depths: &Depths) -> bool {
        let layer = stored.strip_prefix(BLOCKS).and_then(numbered).map(|(layer, _)| layer);
        !self.stops_before_last || stored != PROJECTION.0 && layer.is_none_or(|layer| layer < depths.layers)
    }

    fn copy_of(&self, stored: &str, depths: &Depths) -> Option<String> {
        let (layer, rest) = numbered(stored.strip_prefix(BLOCKS)?)?;
        (self.stops_before_last && layer + 1 == depths.layers).then(|| format!("{BLOCKS}{}.{rest}", layer + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAST_UNUSED: OpenClip = OpenClip { stops_before_last: true };
    const ALL_USED: OpenClip = OpenClip { stops_before_last: false };

    #[test]
    fn open_clip_names_map_both_ways() {
        for (stored, canonical) in [
            ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
            ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
            ("ln_final.bias", "text_model.final_layer_norm.bias"),
            ("transformer.resblocks.3.ln_2.weight", "text_model.encoder.layers.3.layer_norm2.weight"),
            ("transformer.resblocks.0.mlp.c_proj.bias", "text_model.encoder.layers.0.mlp.fc2.bias"),
            ("transformer.resblocks.11.attn.out_proj.weight", "text_model.encoder.layers.11.self_attn.out_proj.weight"),
        ] {
            let depths = Depths { layers: 12, ..Depths::default() };
            assert_eq!(ALL_USED.weights(stored, &depths), Some(vec![(canonical.to_owned(), Piece::All)]));
            assert_eq!(ALL_USED.stored(canonical, &depths), Some((stored.to_owned(), Piece::All)));
        }
        let projection = Some(("text_projection".to_owned(), Piece::Transposed));
        assert_eq!(ALL_USED.stored("text_projection.weight", &Depths::default()), projection);
    }

    #[test]
    fn one_tensor_holds_query_key_and_value() {
        let depths = Depths { layers: 2, ..Depths::default() };
        let stored = "transformer.resblocks.1.attn.in_proj_bias";
        let weights = ALL_USED.weights(stored, &depths).unwrap();
        let names: Vec<_> = weights.iter().map(|(name, _)| name.rsplit("self_attn.").next().unwrap()).collect();
        assert_eq!(names, ["q_proj.bias", "k_proj.bias", "v_proj.bias"]);
        for (part, (name, piece)) in weights.iter().enumerate() {
            assert_eq!(*piece, Piece::Rows(Share::one(part, 3)));
            assert_eq!(ALL_USED.stored(name, &depths), Some((stored.to_owned(), *piece)));
        }
    }

    #[test]
    fn a_last_layer_that_is_not_used_is_no_weight_and_is_written_as_a_copy() {
        let names = ["transformer.resblocks.0.ln_1.bias", "transformer.resblocks.1.ln_1.bias", "ln_final.bias"];
        let depths = LAST_UNUSED.depths_of_stored(&names);
        assert_eq!((depths.layers, ALL_USED.depths_of_stored(&names).layers), (1, 2));
        let used = |tree: &OpenClip, name| tree.is_used(name, &tree.depths_of_stored(&names));
        assert_eq!(names.map(|name| used(&LAST_UNUSED, name)), [true, false, true]);
        assert!(!used(&LAST_UNUSED, "text_projection") && used(&ALL_USED, "text_projection"));
        assert!(names.iter().all(|name| used(&ALL_USED, name)));
        assert_eq!(LAST_UNUSED.copy_of(names[0], &depths).as_deref(), Some(names[1]));
        assert_eq!(LAST_UNUSED.copy_of(names[1], &depths), None);
        assert_eq!(ALL_USED.copy_of(names[0], &depths), None);
        assert_eq!(LAST_UNUSED.weights("transformer.resblocks.99999999999.ln_1.bias", &depths), None);
    }
}
