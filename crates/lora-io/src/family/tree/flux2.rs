//! Names of FLUX.2's transformer: the original's and diffusers', which leaves a single block's layers in one. And those of its
//! autoencoder, which are the original tree's of other autoencoders, but for the convolutions beside its latents and their
//! statistics.

use super::ldm::{DiffusersVae, LdmVae};
use super::table::{Module, Order, Table};
use super::{Depths, Piece, Tree, swap_prefix};

/// The transformer.
pub static FLUX2: Table = Table { modules: MODULES, tensors: &[], blocks: "transformer_blocks." };

/// The autoencoder in the original tree.
#[derive(Debug)]
pub struct Flux2Vae;

/// The autoencoder in diffusers' folders.
#[derive(Debug)]
pub struct DiffusersFlux2Vae;

/// Modules beside the latents: of the original tree, of diffusers'.
const BESIDE_LATENTS: [(&str, &str); 2] =
    [("encoder.quant_conv.", "quant_conv."), ("decoder.post_quant_conv.", "post_quant_conv.")];

/// How many batches the statistics are of, which nothing reads.
const BATCHES: &str = "bn.num_batches_tracked";

impl Tree for Flux2Vae {
    fn depths_of_stored(&self, names: &[&str]) -> Depths {
        LdmVae.depths_of_stored(names)
    }

    fn depths_of_canonical(&self, names: &[&str]) -> Depths {
        LdmVae.depths_of_canonical(names)
    }

    fn weights(&self, stored: &str, depths: &Depths) -> Option<Vec<(String, Piece)>> {
        if stored == BATCHES {
            return Some(Vec::new());
        }
        LdmVae.weights(&swap_prefix(stored, &BESIDE_LATENTS, false).unwrap_or_else(|| stored.to_owned()), depths)
    }

    fn stored(&self, canonical: &str, depths: &Depths) -> Option<(String, Piece)> {
        match swap_prefix(canonical, &BESIDE_LATENTS, true) {
            Some(stored) => Some((stored, Piece::All)),
            None => LdmVae.stored(canonical, depths),
        }
    }
}

impl Tree for DiffusersFlux2Vae {
    fn weights(&self, stored: &str, depths: &Depths) -> Option<Vec<(String, Piece)>> {
        if stored == BATCHES { Some(Vec::new()) } else { DiffusersVae.weights(stored, depths) }
    }

    fn stored(&self, canonical: &str, depths: &Depths) -> Option<(String, Piece)> {
        DiffusersVae.stored(canonical, depths)
    }
}

/// Words with underscores, and those between them, in module paths of either tree, beside FLUX.1's.
pub(crate) const WORDS: &[&str] = &[
    "double_stream_modulation_img",
    "double_stream_modulation_txt",
    "single_stream_modulation",
    "time_guidance_embed",
    "to_qkv_mlp_proj",
    "linear_in",
    "linear_out",
];

const MODULES: &[Module] = &[
    Module::new("img_in", &[("x_embedder", 1)]),
    Module::new("txt_in", &[("context_embedder", 1)]),
    Module::new("time_in.in_layer", &[("time_guidance_embed.timestep_embedder.linear_1", 1)]),
    Module::new("time_in.out_layer", &[("time_guidance_embed.timestep_embedder.linear_2", 1)]),
    Module::new("guidance_in.in_layer", &[("time_guidance_embed.guidance_embedder.linear_1", 1)]),
    Module::new("guidance_in.out_layer", &[("time_guidance_embed.guidance_embedder.linear_2", 1)]),
    Module::new("double_stream_modulation_img.lin", &[("double_stream_modulation_img.linear", 1)]),
    Module::new("double_stream_modulation_txt.lin", &[("double_stream_modulation_txt.linear", 1)]),
    Module::new("single_stream_modulation.lin", &[("single_stream_modulation.linear", 1)]),
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
    Module::new("double_blocks.#.img_mlp.0", &[("transformer_blocks.#.ff.linear_in", 1)]),
    Module::new("double_blocks.#.img_mlp.2", &[("transformer_blocks.#.ff.linear_out", 1)]),
    Module::new("double_blocks.#.txt_mlp.0", &[("transformer_blocks.#.ff_context.linear_in", 1)]),
    Module::new("double_blocks.#.txt_mlp.2", &[("transformer_blocks.#.ff_context.linear_out", 1)]),
    Module::new("single_blocks.#.linear1", &[("single_transformer_blocks.#.attn.to_qkv_mlp_proj", 1)]),
    Module::new("single_blocks.#.linear2", &[("single_transformer_blocks.#.attn.to_out", 1)]),
    Module::new("single_blocks.#.norm.query_norm", &[("single_transformer_blocks.#.attn.norm_q", 1)])
        .with_weight("scale"),
    Module::new("single_blocks.#.norm.key_norm", &[("single_transformer_blocks.#.attn.norm_k", 1)])
        .with_weight("scale"),
];
