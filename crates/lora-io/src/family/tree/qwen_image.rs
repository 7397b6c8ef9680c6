//! Names of Qwen-Image's transformer, whose original tree is diffusers'.

use super::table::{Module, Table};

/// The transformer.
pub static QWEN_IMAGE: Table = Table { modules: MODULES, tensors: &[], blocks: "transformer_blocks." };

/// Words with underscores in module paths, beside FLUX.1's.
pub(crate) const WORDS: &[&str] = &["txt_norm"];

macro_rules! same {
    ($($name:literal),* $(,)?) => {
        &[$(Module::new($name, &[($name, 1)])),*]
    };
}

const MODULES: &[Module] = same![
    "img_in",
    "txt_norm",
    "txt_in",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "norm_out.linear",
    "proj_out",
    "transformer_blocks.#.img_mod.1",
    "transformer_blocks.#.txt_mod.1",
    "transformer_blocks.#.img_mlp.net.0.proj",
    "transformer_blocks.#.img_mlp.net.2",
    "transformer_blocks.#.txt_mlp.net.0.proj",
    "transformer_blocks.#.txt_mlp.net.2",
    "transformer_blocks.#.attn.to_q",
    "transformer_blocks.#.attn.to_k",
    "transformer_blocks.#.attn.to_v",
    "transformer_blocks.#.attn.to_out.0",
    "transformer_blocks.#.attn.add_q_proj",
    "transformer_blocks.#.attn.add_k_proj",
    "transformer_blocks.#.attn.add_v_proj",
    "transformer_blocks.#.attn.to_add_out",
    "transformer_blocks.#.attn.norm_q",
    "transformer_blocks.#.attn.norm_k",
    "transformer_blocks.#.attn.norm_added_q",
    "transformer_blocks.#.attn.norm_added_k",
];
