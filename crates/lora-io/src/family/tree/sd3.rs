//! Names of Stable Diffusion 3's and 3.5's transformer: the original's, with queries, keys and values in one tensor, and
//! diffusers'.

use super::table::{Module, Order, Table};

/// The transformer.
pub static SD3: Table =
    Table { modules: MODULES, tensors: &[("pos_embed", "pos_embed.pos_embed")], blocks: "transformer_blocks." };

/// Words with underscores, and those between them, in module paths of either tree, beside FLUX.1's.
pub(crate) const WORDS: &[&str] = &[
    "joint_blocks",
    "x_block",
    "context_block",
    "t_embedder",
    "y_embedder",
    "pos_embed",
    "attn2",
    "mlp",
    "fc1",
    "fc2",
];

const MODULES: &[Module] = &[
    Module::new("x_embedder.proj", &[("pos_embed.proj", 1)]),
    Module::new("context_embedder", &[("context_embedder", 1)]),
    Module::new("t_embedder.mlp.0", &[("time_text_embed.timestep_embedder.linear_1", 1)]),
    Module::new("t_embedder.mlp.2", &[("time_text_embed.timestep_embedder.linear_2", 1)]),
    Module::new("y_embedder.mlp.0", &[("time_text_embed.text_embedder.linear_1", 1)]),
    Module::new("y_embedder.mlp.2", &[("time_text_embed.text_embedder.linear_2", 1)]),
    Module::new("final_layer.linear", &[("proj_out", 1)]),
    Module::new("final_layer.adaLN_modulation.1", &[("norm_out.linear", 1)]).in_order(Order::Swapped),
    Module::fused(
        "joint_blocks.#.x_block.attn.qkv",
        &[
            ("transformer_blocks.#.attn.to_q", 1),
            ("transformer_blocks.#.attn.to_k", 1),
            ("transformer_blocks.#.attn.to_v", 1),
        ],
    ),
    Module::fused(
        "joint_blocks.#.x_block.attn2.qkv",
        &[
            ("transformer_blocks.#.attn2.to_q", 1),
            ("transformer_blocks.#.attn2.to_k", 1),
            ("transformer_blocks.#.attn2.to_v", 1),
        ],
    ),
    Module::fused(
        "joint_blocks.#.context_block.attn.qkv",
        &[
            ("transformer_blocks.#.attn.add_q_proj", 1),
            ("transformer_blocks.#.attn.add_k_proj", 1),
            ("transformer_blocks.#.attn.add_v_proj", 1),
        ],
    ),
    Module::new("joint_blocks.#.x_block.attn.proj", &[("transformer_blocks.#.attn.to_out.0", 1)]),
    Module::new("joint_blocks.#.x_block.attn2.proj", &[("transformer_blocks.#.attn2.to_out.0", 1)]),
    Module::new("joint_blocks.#.context_block.attn.proj", &[("transformer_blocks.#.attn.to_add_out", 1)]),
    Module::new("joint_blocks.#.x_block.attn.ln_q", &[("transformer_blocks.#.attn.norm_q", 1)]),
    Module::new("joint_blocks.#.x_block.attn.ln_k", &[("transformer_blocks.#.attn.norm_k", 1)]),
    Module::new("joint_blocks.#.x_block.attn2.ln_q", &[("transformer_blocks.#.attn2.norm_q", 1)]),
    Module::new("joint_blocks.#.x_block.attn2.ln_k", &[("transformer_blocks.#.attn2.norm_k", 1)]),
    Module::new("joint_blocks.#.context_block.attn.ln_q", &[("transformer_blocks.#.attn.norm_added_q", 1)]),
    Module::new("joint_blocks.#.context_block.attn.ln_k", &[("transformer_blocks.#.attn.norm_added_k", 1)]),
    Module::new("joint_blocks.#.x_block.mlp.fc1", &[("transformer_blocks.#.ff.net.0.proj", 1)]),
    Module::new("joint_blocks.#.x_block.mlp.fc2", &[("transformer_blocks.#.ff.net.2", 1)]),
    Module::new("joint_blocks.#.context_block.mlp.fc1", &[("transformer_blocks.#.ff_context.net.0.proj", 1)]),
    Module::new("joint_blocks.#.context_block.mlp.fc2", &[("transformer_blocks.#.ff_context.net.2", 1)]),
    Module::new("joint_blocks.#.x_block.adaLN_modulation.1", &[("transformer_blocks.#.norm1.linear", 1)]),
    // The text's last block has no gates, and diffusers another order of the two parts that are left.
    Module::new("joint_blocks.#.context_block.adaLN_modulation.1", &[("transformer_blocks.#.norm1_context.linear", 1)])
        .in_order(Order::SwappedInLast),
];

#[cfg(test)]
mod tests {
    use super::super::{Piece, Tree};
    use super::*;

    #[test]
    fn the_texts_last_block_is_shifted_in_another_order() {
        let name = |block: usize| format!("joint_blocks.{block}.context_block.adaLN_modulation.1.bias");
        let names = [name(0), name(1), "joint_blocks.2.x_block.attn.proj.weight".into(), "pos_embed".into()];
        let depths = SD3.depths_of_stored(&names.each_ref().map(String::as_str));
        assert_eq!(depths.layers, 3);
        let piece = |block: usize| SD3.weights(&name(block), &depths).unwrap()[0].1;
        assert_eq!((piece(1), piece(2)), (Piece::All, Piece::Swapped));
        let stored = SD3.stored("transformer_blocks.2.norm1_context.linear.bias", &depths);
        assert_eq!(stored, Some((name(2), Piece::Swapped)));
        assert_eq!(SD3.weights("pos_embed", &depths), Some(vec![("pos_embed.pos_embed".into(), Piece::All)]));
    }
}
