//! Names of Anima's transformer and of its text conditioner in single files: NVIDIA's of Cosmos-Predict2, with the conditioner's
//! behind `llm_adapter.`. Either may stand behind a prefix.

use super::table::{Module, PREFIXES, Table};
use super::{Depths, Piece, Tree};

/// The transformer.
pub static ANIMA: Table = Table { modules: MODULES, tensors: &[], blocks: "transformer_blocks." };

/// Words with underscores in module paths, and those between them.
pub(crate) const WORDS: &[&str] = &[
    "blocks",
    "self_attn",
    "cross_attn",
    "mlp",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "output_proj",
    "layer1",
    "layer2",
    "adaln_modulation",
    "adaln_modulation_self_attn",
    "adaln_modulation_cross_attn",
    "adaln_modulation_mlp",
    "final_layer",
    "linear",
    "linear_1",
    "linear_2",
    "x_embedder",
    "t_embedder",
    "proj",
    "in_proj",
    "out_proj",
    "embed",
];

/// NVIDIA's, diffusers'.
const MODULES: &[Module] = &[
    Module::new("x_embedder.proj.1", &[("patch_embed.proj", 1)]),
    Module::new("t_embedder.1.linear_1", &[("time_embed.t_embedder.linear_1", 1)]),
    Module::new("t_embedder.1.linear_2", &[("time_embed.t_embedder.linear_2", 1)]),
    Module::new("t_embedding_norm", &[("time_embed.norm", 1)]),
    Module::new("final_layer.adaln_modulation.1", &[("norm_out.linear_1", 1)]),
    Module::new("final_layer.adaln_modulation.2", &[("norm_out.linear_2", 1)]),
    Module::new("final_layer.linear", &[("proj_out", 1)]),
    Module::new("blocks.#.adaln_modulation_self_attn.1", &[("transformer_blocks.#.norm1.linear_1", 1)]),
    Module::new("blocks.#.adaln_modulation_self_attn.2", &[("transformer_blocks.#.norm1.linear_2", 1)]),
    Module::new("blocks.#.self_attn.q_proj", &[("transformer_blocks.#.attn1.to_q", 1)]),
    Module::new("blocks.#.self_attn.k_proj", &[("transformer_blocks.#.attn1.to_k", 1)]),
    Module::new("blocks.#.self_attn.v_proj", &[("transformer_blocks.#.attn1.to_v", 1)]),
    Module::new("blocks.#.self_attn.output_proj", &[("transformer_blocks.#.attn1.to_out.0", 1)]),
    Module::new("blocks.#.self_attn.q_norm", &[("transformer_blocks.#.attn1.norm_q", 1)]),
    Module::new("blocks.#.self_attn.k_norm", &[("transformer_blocks.#.attn1.norm_k", 1)]),
    Module::new("blocks.#.adaln_modulation_cross_attn.1", &[("transformer_blocks.#.norm2.linear_1", 1)]),
    Module::new("blocks.#.adaln_modulation_cross_attn.2", &[("transformer_blocks.#.norm2.linear_2", 1)]),
    Module::new("blocks.#.cross_attn.q_proj", &[("transformer_blocks.#.attn2.to_q", 1)]),
    Module::new("blocks.#.cross_attn.k_proj", &[("transformer_blocks.#.attn2.to_k", 1)]),
    Module::new("blocks.#.cross_attn.v_proj", &[("transformer_blocks.#.attn2.to_v", 1)]),
    Module::new("blocks.#.cross_attn.output_proj", &[("transformer_blocks.#.attn2.to_out.0", 1)]),
    Module::new("blocks.#.cross_attn.q_norm", &[("transformer_blocks.#.attn2.norm_q", 1)]),
    Module::new("blocks.#.cross_attn.k_norm", &[("transformer_blocks.#.attn2.norm_k", 1)]),
    Module::new("blocks.#.adaln_modulation_mlp.1", &[("transformer_blocks.#.norm3.linear_1", 1)]),
    Module::new("blocks.#.adaln_modulation_mlp.2", &[("transformer_blocks.#.norm3.linear_2", 1)]),
    Module::new("blocks.#.mlp.layer1", &[("transformer_blocks.#.ff.net.0.proj", 1)]),
    Module::new("blocks.#.mlp.layer2", &[("transformer_blocks.#.ff.net.2", 1)]),
];

/// The text conditioner, whose names behind the prefix are diffusers'.
#[derive(Debug)]
pub struct Conditioner;

/// What its names stand behind.
const CONDITIONER: &str = "llm_adapter.";

/// How they begin.
const PARTS: &[&str] = &["embed.", "in_proj.", "blocks.", "out_proj.", "norm."];

impl Tree for Conditioner {
    fn weights(&self, stored: &str, _depths: &Depths) -> Option<Vec<(String, Piece)>> {
        let bare = PREFIXES.iter().find_map(|prefix| stored.strip_prefix(prefix)).unwrap_or(stored);
        let name = bare.strip_prefix(CONDITIONER)?;
        PARTS.iter().any(|part| name.starts_with(part)).then(|| vec![(name.to_owned(), Piece::All)])
    }

    fn stored(&self, canonical: &str, _depths: &Depths) -> Option<(String, Piece)> {
        Some((format!("{CONDITIONER}{canonical}"), Piece::All))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_both_map_both_ways_behind_every_prefix() {
        let depths = Depths::default();
        for (tree, original, canonical) in [
            (
                &ANIMA as &dyn Tree,
                "blocks.27.cross_attn.output_proj.weight",
                "transformer_blocks.27.attn2.to_out.0.weight",
            ),
            (&ANIMA, "blocks.3.adaln_modulation_mlp.2.weight", "transformer_blocks.3.norm3.linear_2.weight"),
            (&ANIMA, "x_embedder.proj.1.weight", "patch_embed.proj.weight"),
            (&Conditioner, "llm_adapter.blocks.5.mlp.0.bias", "blocks.5.mlp.0.bias"),
        ] {
            for prefix in ["", "net.", "model.diffusion_model.", "diffusion_model."] {
                let found = tree.weights(&format!("{prefix}{original}"), &depths);
                assert_eq!(found, Some(vec![(canonical.to_owned(), Piece::All)]), "{prefix}{original}");
            }
            assert_eq!(tree.stored(canonical, &depths), Some((original.to_owned(), Piece::All)));
        }
        assert_eq!(ANIMA.weights("net.llm_adapter.blocks.0.self_attn.q_proj.weight", &depths), None);
        assert_eq!(Conditioner.weights("net.blocks.0.self_attn.q_proj.weight", &depths), None);
    }
}
