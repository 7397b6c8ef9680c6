//! Names of FLUX.1's transformer, and of what Chroma's has instead of some of it: the original's, with queries, keys and values in
//! one tensor, and diffusers'.

use super::table::{Module, Order, Table};

/// The transformer.
pub static FLUX: Table = Table { modules: MODULES, tensors: &[], blocks: "transformer_blocks." };

/// Words with underscores, and those between them, in module paths of either tree.
pub(crate) const WORDS: &[&str] = &[
    "double_blocks",
    "single_blocks",
    "single_transformer_blocks",
    "transformer_blocks",
    "img_attn",
    "txt_attn",
    "img_mlp",
    "txt_mlp",
    "img_mod",
    "txt_mod",
    "img_in",
    "txt_in",
    "time_in",
    "vector_in",
    "guidance_in",
    "in_layer",
    "out_layer",
    "final_layer",
    "adaLN_modulation",
    "modulation",
    "linear1",
    "linear2",
    "linear_1",
    "linear_2",
    "linear",
    "lin",
    "qkv",
    "proj",
    "attn",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "to_add_out",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "proj_mlp",
    "proj_out",
    "norm",
    "norm1",
    "norm1_context",
    "norm_out",
    "ff",
    "ff_context",
    "net",
    "x_embedder",
    "context_embedder",
    "time_text_embed",
    "timestep_embedder",
    "text_embedder",
    "guidance_embedder",
    "distilled_guidance_layer",
    "in_proj",
    "out_proj",
];

const MODULES: &[Module] = &[
    Module::new("img_in", &[("x_embedder", 1)]),
    Module::new("txt_in", &[("context_embedder", 1)]),
    Module::new("time_in.in_layer", &[("time_text_embed.timestep_embedder.linear_1", 1)]),
    Module::new("time_in.out_layer", &[("time_text_embed.timestep_embedder.linear_2", 1)]),
    Module::new("vector_in.in_layer", &[("time_text_embed.text_embedder.linear_1", 1)]),
    Module::new("vector_in.out_layer", &[("time_text_embed.text_embedder.linear_2", 1)]),
    Module::new("guidance_in.in_layer", &[("time_text_embed.guidance_embedder.linear_1", 1)]),
    Module::new("guidance_in.out_layer", &[("time_text_embed.guidance_embedder.linear_2", 1)]),
    Module::new("distilled_guidance_layer.in_proj", &[("distilled_guidance_layer.in_proj", 1)]),
    Module::new("distilled_guidance_layer.layers.#.in_layer", &[("distilled_guidance_layer.layers.#.linear_1", 1)]),
    Module::new("distilled_guidance_layer.layers.#.out_layer", &[("distilled_guidance_layer.layers.#.linear_2", 1)]),
    Module::new("distilled_guidance_layer.norms.#", &[("distilled_guidance_layer.norms.#", 1)]).with_weight("scale"),
    Module::new("distilled_guidance_layer.out_proj", &[("distilled_guidance_layer.out_proj", 1)]),
    Module::new("final_layer.linear", &[("proj_out", 1)]),
    Module::new("final_layer.adaLN_modulation.1", &[("norm_out.linear", 1)]).in_order(Order::Swapped),
    Module::fused(
        "double_blocks.#.img_attn.qkv",
        &[
            ("transformer_blocks.#.attn.to_q", 1),
            ("transformer_blocks.#.attn.to_k", 1),
            ("transformer_blocks.#.attn.to_v", 1),
        ],
    ),
    Module::fused(
        "double_blocks.#.txt_attn.qkv",
        &[
            ("transformer_blocks.#.attn.add_q_proj", 1),
            ("transformer_blocks.#.attn.add_k_proj", 1),
            ("transformer_blocks.#.attn.add_v_proj", 1),
        ],
    ),
    Module::new("double_blocks.#.img_attn.proj", &[("transformer_blocks.#.attn.to_out.0", 1)]),
    Module::new("double_blocks.#.txt_attn.proj", &[("transformer_blocks.#.attn.to_add_out", 1)]),
    Module::new("double_blocks.#.img_attn.norm.query_norm", &[("transformer_blocks.#.attn.norm_q", 1)])
        .with_weight("scale"),
    Module::new("double_blocks.#.img_attn.norm.key_norm", &[("transformer_blocks.#.attn.norm_k", 1)])
        .with_weight("scale"),
    Module::new("double_blocks.#.txt_attn.norm.query_norm", &[("transformer_blocks.#.attn.norm_added_q", 1)])
        .with_weight("scale"),
    Module::new("double_blocks.#.txt_attn.norm.key_norm", &[("transformer_blocks.#.attn.norm_added_k", 1)])
        .with_weight("scale"),
    Module::new("double_blocks.#.img_mlp.0", &[("transformer_blocks.#.ff.net.0.proj", 1)]),
    Module::new("double_blocks.#.img_mlp.2", &[("transformer_blocks.#.ff.net.2", 1)]),
    Module::new("double_blocks.#.txt_mlp.0", &[("transformer_blocks.#.ff_context.net.0.proj", 1)]),
    Module::new("double_blocks.#.txt_mlp.2", &[("transformer_blocks.#.ff_context.net.2", 1)]),
    Module::new("double_blocks.#.img_mod.lin", &[("transformer_blocks.#.norm1.linear", 1)]),
    Module::new("double_blocks.#.txt_mod.lin", &[("transformer_blocks.#.norm1_context.linear", 1)]),
    // The feed-forward is four times as wide as each of the others.
    Module::fused(
        "single_blocks.#.linear1",
        &[
            ("single_transformer_blocks.#.attn.to_q", 1),
            ("single_transformer_blocks.#.attn.to_k", 1),
            ("single_transformer_blocks.#.attn.to_v", 1),
            ("single_transformer_blocks.#.proj_mlp", 4),
        ],
    ),
    Module::new("single_blocks.#.linear2", &[("single_transformer_blocks.#.proj_out", 1)]),
    Module::new("single_blocks.#.modulation.lin", &[("single_transformer_blocks.#.norm.linear", 1)]),
    Module::new("single_blocks.#.norm.query_norm", &[("single_transformer_blocks.#.attn.norm_q", 1)])
        .with_weight("scale"),
    Module::new("single_blocks.#.norm.key_norm", &[("single_transformer_blocks.#.attn.norm_k", 1)])
        .with_weight("scale"),
];

#[cfg(test)]
mod tests {
    use super::super::{Depths, Piece, Share, Tree};
    use super::*;

    #[test]
    fn one_layer_of_a_single_block_is_four() {
        let depths = Depths::default();
        let weights = FLUX.weights("model.diffusion_model.single_blocks.7.linear1.bias", &depths).unwrap();
        let found: Vec<(&str, Piece)> = weights.iter().map(|(name, piece)| (name.as_str(), *piece)).collect();
        let share = |first, count| Piece::Rows(Share { first, count, of: 7 });
        let expected = [
            ("single_transformer_blocks.7.attn.to_q.bias", share(0, 1)),
            ("single_transformer_blocks.7.attn.to_k.bias", share(1, 1)),
            ("single_transformer_blocks.7.attn.to_v.bias", share(2, 1)),
            ("single_transformer_blocks.7.proj_mlp.bias", share(3, 4)),
        ];
        assert_eq!(found, expected);
        for (canonical, piece) in expected {
            assert_eq!(FLUX.stored(canonical, &depths), Some(("single_blocks.7.linear1.bias".into(), piece)));
        }
    }

    #[test]
    fn names_map_both_ways_and_canonical_ones_stay() {
        let depths = Depths::default();
        for (stored, canonical, piece) in [
            ("img_in.weight", "x_embedder.weight", Piece::All),
            ("final_layer.adaLN_modulation.1.weight", "norm_out.linear.weight", Piece::Swapped),
            (
                "double_blocks.18.txt_attn.norm.key_norm.scale",
                "transformer_blocks.18.attn.norm_added_k.weight",
                Piece::All,
            ),
            ("single_blocks.0.modulation.lin.bias", "single_transformer_blocks.0.norm.linear.bias", Piece::All),
        ] {
            assert_eq!(FLUX.weights(stored, &depths), Some(vec![(canonical.to_owned(), piece)]));
            assert_eq!(FLUX.stored(canonical, &depths), Some((stored.to_owned(), piece)));
            assert_eq!(FLUX.weights(canonical, &depths), Some(vec![(canonical.to_owned(), Piece::All)]));
        }
        // Newer repacks call the norms' weights like all others.
        let newer = FLUX.weights("single_blocks.3.norm.query_norm.weight", &depths).unwrap();
        assert_eq!(newer[0].0, "single_transformer_blocks.3.attn.norm_q.weight");
        assert_eq!(FLUX.weights("double_blocks.+1.img_mlp.0.weight", &depths), None);
        assert_eq!(FLUX.weights("joint_blocks.0.x_block.attn.qkv.weight", &depths), None);
    }
}
