//! What the transformers that denoise pictures by flow matching share: tokens of text and picture that attend to each
//! other, under layers that a time scales and shifts. The networks are files beside this folder: `flux`, `sd3` …
//!
//! | here | what |
//! |---|---|
//! | `attention` | queries, keys and values of one kind of token, and attention over all of them |
//! | `cross` | attention of tokens to others, or to themselves alone |
//! | `conditioning` | times, guidance and pooled text as one vector |
//! | `feed_forward` | the GELU of a block |
//! | `modulation` | shift, scale and gate, made of that vector |
//! | `patches` | latents as tokens and back |

mod attention;
mod conditioning;
mod cross;
mod feed_forward;
mod modulation;
mod patches;

pub(super) use attention::{HeadSizes, Heads, Projections, QueryKeyNorms, attend, text_mask};
pub(super) use conditioning::{Embedder, SINUSOIDS, Sinusoids};
pub(super) use cross::{Attention, AttentionNames};
pub(super) use feed_forward::FeedForward;
pub(super) use modulation::{Modulation, Modulator, gated_sum, layer_norm, modulated};
pub(super) use patches::{pack, positions, unpack};

use lora_torch::tch::{Kind, Tensor};

use crate::Result;

/// Text tokens and those behind them, `[batch, tokens, width]`, of a sequence that begins with so many of text.
pub(super) fn parted(joined: &Tensor, text: i64) -> Result<(Tensor, Tensor)> {
    let tokens = joined.size3()?.1;
    Ok((joined.f_narrow(1, 0, text)?, joined.f_narrow(1, text, tokens - text)?))
}

/// The stream as a block hands it on: in fp16 within that type's range, which published models leave.
pub(super) fn in_range(stream: Tensor) -> Result<Tensor> {
    const LARGEST: f64 = 65_504.0;
    if stream.kind() == Kind::Half { Ok(stream.f_clamp(-LARGEST, LARGEST)?) } else { Ok(stream) }
}
