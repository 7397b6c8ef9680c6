//! Names of T5 encoders, which are the same in every layout; some files name the table of tokens twice.

use super::{Depths, Piece, Tree};

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
}
