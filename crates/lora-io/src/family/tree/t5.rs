//! Names of T5 encoders: transformers', which are the same in every layout (some files name the table of tokens twice), and
//! llama.cpp's.

use super::{Depths, InGguf, Piece, Tree, numbered};

/// transformers' names.
#[derive(Debug)]
pub struct T5;

impl Tree for T5 {
    fn weights(&self, stored: &str, _depths: &Depths) -> Option<Vec<(String, Piece)>> {
        let known = stored == "shared.weight" || stored.starts_with("encoder.");
        // The same table as `shared.weight`; marks of files in 8 bits hold nothing.
        if stored == "encoder.embed_tokens.weight" || !stored.contains('.') || stored.starts_with("decoder.") {
            return Some(Vec::new());
        }
        known.then(|| vec![(stored.to_owned(), Piece::All)])
    }

    fn stored(&self, canonical: &str, _depths: &Depths) -> Option<(String, Piece)> {
        Some((canonical.to_owned(), Piece::All))
    }

    fn in_gguf(&self) -> Option<InGguf> {
        Some(InGguf::Tree(&T5InGguf))
    }
}

/// llama.cpp's names.
#[derive(Debug)]
struct T5InGguf;

/// Outside of blocks.
const AROUND: &[(&str, &str)] =
    &[("token_embd.weight", "shared.weight"), ("enc.output_norm.weight", "encoder.final_layer_norm.weight")];

/// In a block, behind `enc.blk.0.` and `encoder.block.0.`.
const WITHIN: &[(&str, &str)] = &[
    ("attn_q.weight", "layer.0.SelfAttention.q.weight"),
    ("attn_k.weight", "layer.0.SelfAttention.k.weight"),
    ("attn_v.weight", "layer.0.SelfAttention.v.weight"),
    ("attn_o.weight", "layer.0.SelfAttention.o.weight"),
    ("attn_rel_b.weight", "layer.0.SelfAttention.relative_attention_bias.weight"),
    ("attn_norm.weight", "layer.0.layer_norm.weight"),
    ("ffn_gate.weight", "layer.1.DenseReluDense.wi_0.weight"),
    ("ffn_up.weight", "layer.1.DenseReluDense.wi_1.weight"),
    ("ffn_down.weight", "layer.1.DenseReluDense.wo.weight"),
    ("ffn_norm.weight", "layer.1.layer_norm.weight"),
];

impl Tree for T5InGguf {
    fn weights(&self, stored: &str, _depths: &Depths) -> Option<Vec<(String, Piece)>> {
        if stored.starts_with("dec.") {
            return Some(Vec::new());
        }
        let canonical = match stored.strip_prefix("enc.blk.").and_then(numbered) {
            Some((block, own)) => {
                let (_, canonical) = WITHIN.iter().find(|(name, _)| *name == own)?;
                format!("encoder.block.{block}.{canonical}")
            }
            None => AROUND.iter().find(|(name, _)| *name == stored)?.1.to_owned(),
        };
        Some(vec![(canonical, Piece::All)])
    }

    fn stored(&self, canonical: &str, _depths: &Depths) -> Option<(String, Piece)> {
        let stored = match canonical.strip_prefix("encoder.block.").and_then(numbered) {
            Some((block, own)) => {
                let (stored, _) = WITHIN.iter().find(|(_, name)| *name == own)?;
                format!("enc.blk.{block}.{stored}")
            }
            None => AROUND.iter().find(|(_, name)| *name == canonical)?.0.to_owned(),
        };
        Some((stored, Piece::All))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_tokens_is_there_once() {
        let weights = |name: &str| T5.weights(name, &Depths::default());
        let own = |name: &str| Some(vec![(name.to_owned(), Piece::All)]);
        let bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";
        assert_eq!(weights(bias), own(bias));
        assert_eq!(weights("shared.weight"), own("shared.weight"));
        assert_eq!(weights("encoder.embed_tokens.weight"), Some(Vec::new()));
        assert_eq!(weights("text_model.final_layer_norm.weight"), None);
    }

    #[test]
    fn names_of_llama_cpp_lead_both_ways() {
        for (stored, canonical) in [
            ("token_embd.weight", "shared.weight"),
            ("enc.blk.11.attn_rel_b.weight", "encoder.block.11.layer.0.SelfAttention.relative_attention_bias.weight"),
            ("enc.blk.3.ffn_gate.weight", "encoder.block.3.layer.1.DenseReluDense.wi_0.weight"),
            ("enc.output_norm.weight", "encoder.final_layer_norm.weight"),
        ] {
            let depths = Depths::default();
            assert_eq!(T5InGguf.weights(stored, &depths), Some(vec![(canonical.to_owned(), Piece::All)]));
            assert_eq!(T5InGguf.stored(canonical, &depths), Some((stored.to_owned(), Piece::All)));
        }
        assert_eq!(T5InGguf.weights("dec.blk.0.attn_q.weight", &Depths::default()), Some(Vec::new()));
        assert_eq!(T5InGguf.weights("blk.0.attn_q.weight", &Depths::default()), None);
    }
}
