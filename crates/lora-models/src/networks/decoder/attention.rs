//! Attention of a decoder: which tokens see which, and the sums. Layers' projections, norms and positions are
//! [`super::layer`]'s.
//!
//! Tokens see themselves and earlier ones of their document, at most a window of them, and with it the document's first
//! few where these are attention sinks (Xiao et al., 2023, arXiv:2309.17453). Where that is all earlier tokens of a
//! row, libtorch's kernels know it without a mask. Otherwise queries are taken in blocks, each with the keys that any
//! of them may see, so that a mask is made for a block: `[batch, 1, queries, keys]`, once for all layers and heads of a
//! kind; with a window its size does not grow with the row. Scores of all queries and keys exist nowhere; those of a
//! block only where they have to be looked at (soft caps), and then they are computed again in the backward pass.

use std::ops::Range;

use lora_torch::checkpoint::{Inputs, Shared, checkpoint};
use lora_torch::dry::{Platform, platform};
use lora_torch::tch::{Device, Kind, Tensor};

use crate::Result;
use crate::layers::torch;

/// Queries that one mask is made for.
pub(super) const BLOCK: i64 = 1024;

/// Width of the heads that CUDA's flash attention takes at most.
const FLASH: i64 = 256;

/// Which keys the queries of a row see.
#[derive(Debug)]
pub(super) enum Mask {
    /// All that are not after them.
    Causal,
    /// All: a query by itself, behind its keys.
    All,
    /// Block by block.
    Blocks(Shared<Vec<Block>>),
}

/// How far back tokens see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Sight {
    /// Tokens, the token itself among them; all without.
    pub(super) window: Option<usize>,
    /// The first tokens of the document, beside the window.
    pub(super) first: usize,
}

/// Some queries, the keys that any of them sees, and which ones each does.
#[derive(Debug)]
pub(super) struct Block {
    queries: Range<i64>,
    keys: Range<i64>,
    /// Places of keys before those, `[batch or 1, count]` i64: the first of the document that the keys begin in.
    first: Option<Tensor>,
    /// Added to scores, `[batch or 1, 1, queries, keys]` in the compute dtype, those of `first` before the others: 0, or so
    /// little that nothing remains.
    bias: Tensor,
}

impl Block {
    /// The keys or values of a block, of all `[batch, heads, tokens, head]`.
    fn of(&self, all: &Tensor) -> Result<Tensor> {
        let near = all.f_narrow(2, self.keys.start, self.keys.end - self.keys.start)?;
        let Some(first) = &self.first else { return Ok(near) };
        let (batch, heads, _, head) = all.size4()?;
        let places = first.f_unsqueeze(1)?.f_unsqueeze(3)?.f_expand([batch, heads, first.size2()?.1, head], false)?;
        Ok(Tensor::f_cat(&[all.f_gather(2, &places, false)?, near], 2)?)
    }
}

/// What masks of a batch are made from.
#[derive(Debug)]
pub(super) struct Rows<'r> {
    /// `[batch, tokens]`: equal numbers are a document. Without, a row is one.
    pub(super) documents: Option<&'r Tensor>,
    /// Tokens of a row that can be seen; all without.
    pub(super) unpadded: Option<i64>,
    pub(super) tokens: i64,
    pub(super) kind: Kind,
    pub(super) device: Device,
    /// Queries of a block.
    pub(super) block: i64,
}

impl Rows<'_> {
    /// The mask of layers that see so far. `looked_at`: scores pass through a function of their own, which is done block
    /// by block.
    pub(super) fn mask(&self, sight: Sight, looked_at: bool) -> Result<Mask> {
        let window = sight.window.map(|window| window as i64).filter(|window| *window < self.tokens);
        let first = if window.is_some() { sight.first.min(self.tokens as usize) as i64 } else { 0 };
        if self.documents.is_none() && self.unpadded.is_none() && window.is_none() && !looked_at {
            return Ok(Mask::Causal);
        }
        let beginnings = self.beginnings(first)?;
        let mut blocks = Vec::new();
        for start in (0..self.tokens).step_by(self.block as usize) {
            let queries = start..self.tokens.min(start + self.block);
            let keys = window.map_or(0, |window| (start + 1 - window).max(0))..queries.end;
            let far = self.first_before(keys.start, first)?;
            let bias = self.bias(&queries, &keys, window, beginnings.as_ref(), far.as_ref())?;
            blocks.push(Block { queries, keys, first: far, bias });
        }
        Ok(Mask::Blocks(Shared::new(blocks)))
    }

    /// Which tokens are among the first so many of their document, `[batch or 1, tokens]`.
    fn beginnings(&self, count: i64) -> Result<Option<Tensor>> {
        if count == 0 {
            return Ok(None);
        }
        let Some(documents) = self.documents else {
            return Ok(Some(Tensor::f_arange(self.tokens, (Kind::Int64, self.device))?.f_lt(count)?.f_unsqueeze(0)?));
        };
        // A document's tokens lie side by side: one whose like is not found so many places before is among the first.
        let row = documents.f_narrow(1, 0, count)?.f_ones_like()?.f_to_kind(Kind::Bool)?;
        let left = self.tokens - count;
        let others = documents.f_narrow(1, count, left)?.f_ne_tensor(&documents.f_narrow(1, 0, left)?)?;
        Ok(Some(Tensor::f_cat(&[row, others], 1)?))
    }

    /// Places of the first so many tokens of the document that goes on at a token, `[batch or 1, count]`; those that are not
    /// before that token are the token's own place.
    fn first_before(&self, token: i64, count: i64) -> Result<Option<Tensor>> {
        if count == 0 || token == 0 {
            return Ok(None);
        }
        let places = Tensor::f_arange(count, (Kind::Int64, self.device))?.f_unsqueeze(0)?;
        let places = match self.documents {
            None => places,
            Some(documents) => {
                let before = documents.f_narrow(1, 0, token)?.f_eq_tensor(&documents.f_narrow(1, token, 1)?)?;
                let start =
                    before.f_sum_dim_intlist([1i64].as_slice(), true, Kind::Int64)?.f_neg()?.f_add_scalar(token)?;
                places.f_add(&start)?
            }
        };
        Ok(Some(places.f_clamp_max(token)?))
    }

    fn bias(
        &self,
        queries: &Range<i64>,
        keys: &Range<i64>,
        window: Option<i64>,
        beginnings: Option<&Tensor>,
        far: Option<&Tensor>,
    ) -> Result<Tensor> {
        let places = |range: &Range<i64>| Tensor::f_arange_start(range.start, range.end, (Kind::Int64, self.device));
        let (rows, columns) = (places(queries)?.f_unsqueeze(1)?, places(keys)?.f_unsqueeze(0)?);
        let mut seen = columns.f_le_tensor(&rows)?;
        let part = |all: &Tensor, range: &Range<i64>| all.f_narrow(1, range.start, range.end - range.start);
        if let Some(window) = window {
            let near = rows.f_sub(&columns)?.f_lt(window)?.f_unsqueeze(0)?;
            let near = match beginnings {
                Some(all) => near.f_bitwise_or_tensor(&part(all, keys)?.f_unsqueeze(1)?)?,
                None => near,
            };
            seen = seen.f_unsqueeze(0)?.f_bitwise_and_tensor(&near)?;
        } else {
            seen = seen.f_unsqueeze(0)?;
        }
        if let Some(unpadded) = self.unpadded {
            seen = seen.f_bitwise_and_tensor(&columns.f_lt(unpadded)?.f_unsqueeze(0)?)?;
        }
        let of_queries = self.documents.map(|documents| part(documents, queries)?.f_unsqueeze(2)).transpose()?;
        if let (Some(documents), Some(own)) = (self.documents, &of_queries) {
            seen = seen.f_bitwise_and_tensor(&own.f_eq_tensor(&part(documents, keys)?.f_unsqueeze(1)?)?)?;
        }
        if let Some(places) = far {
            let mut first = places.f_lt(keys.start)?.f_unsqueeze(1)?;
            if let (Some(documents), Some(own)) = (self.documents, &of_queries) {
                let theirs = documents.f_gather(1, places, false)?.f_unsqueeze(1)?;
                first = first.f_bitwise_and_tensor(&own.f_eq_tensor(&theirs)?)?;
            }
            let shape = [seen.size()[0], queries.end - queries.start, places.size2()?.1];
            seen = Tensor::f_cat(&[first.f_expand(shape, false)?, seen], 2)?;
        }
        // A finite number: infinities in a whole tile of keys are nothing less infinities, which is no number.
        let least = if self.kind == Kind::Half { -3e4 } else { -1e30 };
        let bias = Tensor::f_zeros(seen.size(), (self.kind, self.device))?;
        Ok(bias.f_masked_fill(&seen.f_logical_not()?, least)?.f_unsqueeze(1)?)
    }
}

/// What scores go through before they are weighed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scores<'s> {
    /// They are multiplied by this,
    pub(super) scale: f64,
    /// and squashed to within ± this.
    pub(super) cap: Option<f64>,
    /// A score of each head, `[heads]`, that takes part and leads nowhere.
    pub(super) sinks: Option<&'s Tensor>,
}

impl Scores<'_> {
    /// Whether no kernel knows them.
    fn are_looked_at(&self) -> bool {
        self.cap.is_some() || self.sinks.is_some()
    }
}

/// Values weighed by what queries see: `[batch, heads, queries, head]`, of keys and values `[batch, kv heads, keys, head]`.
pub(super) fn attend(query: &Tensor, key: &Tensor, value: &Tensor, mask: &Mask, scores: Scores<'_>) -> Result<Tensor> {
    let groups = query.size4()?.1 / key.size4()?.1;
    // CUDA's flash attention reads the keys of a group of heads where they are; other kernels want a copy for each head.
    let as_they_are = matches!(platform(query.device()), Platform::Cuda)
        && query.kind() != Kind::Float
        && query.size4()?.3 <= FLASH
        && !matches!(mask, Mask::Blocks(_))
        && !scores.are_looked_at();
    let (key, value) = if groups == 1 || as_they_are {
        (key.shallow_clone(), value.shallow_clone())
    } else {
        (repeated(key, groups)?, repeated(value, groups)?)
    };
    match mask {
        Mask::Causal => fused(query, &key, &value, None, true, scores.scale, groups > 1 && as_they_are),
        Mask::All if scores.are_looked_at() => looked_at(query, &key, &value, None, scores),
        Mask::All => fused(query, &key, &value, None, false, scores.scale, groups > 1 && as_they_are),
        Mask::Blocks(blocks) => {
            let part = |index: usize| -> Result<Tensor> {
                let block = &blocks[index];
                let Block { queries, bias, .. } = block;
                let query = query.f_narrow(2, queries.start, queries.end - queries.start)?;
                let (key, value) = (block.of(&key)?, block.of(&value)?);
                if !scores.are_looked_at() {
                    return fused(&query, &key, &value, Some(bias), false, scores.scale, false);
                }
                let blocks = blocks.clone();
                let inputs: Vec<&Tensor> = [&query, &key, &value].into_iter().chain(scores.sinks).collect();
                let Scores { scale, cap, .. } = scores;
                Ok(checkpoint(&inputs, Inputs::Kept, move |inputs| {
                    let [query, key, value, sinks @ ..] = inputs else { return Ok(inputs[0].shallow_clone()) };
                    let scores = Scores { scale, cap, sinks: sinks.first() };
                    looked_at(query, key, value, Some(&blocks[index].bias), scores).map_err(torch)
                })?)
            };
            let parts: Vec<Tensor> = (0..blocks.len()).map(part).collect::<Result<_>>()?;
            Ok(if let [one] = parts.as_slice() { one.shallow_clone() } else { Tensor::f_cat(&parts, 2)? })
        }
    }
}

/// Each head as often as there are queries' heads to it, side by side.
fn repeated(heads: &Tensor, groups: i64) -> Result<Tensor> {
    let (batch, count, tokens, width) = heads.size4()?;
    let each = heads.f_unsqueeze(2)?.f_expand([batch, count, groups, tokens, width], false)?;
    Ok(each.f_reshape([batch, count * groups, tokens, width])?)
}

fn fused(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    bias: Option<&Tensor>,
    causal: bool,
    scale: f64,
    grouped: bool,
) -> Result<Tensor> {
    Ok(Tensor::f_scaled_dot_product_attention(query, key, value, bias, 0.0, causal, Some(scale), grouped)?)
}

/// The same operation by operation, for scores that no kernel knows.
fn looked_at(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    bias: Option<&Tensor>,
    scores: Scores<'_>,
) -> Result<Tensor> {
    let mut own = query.f_matmul(&key.f_transpose(2, 3)?)?.f_mul_scalar(scores.scale)?;
    if let Some(cap) = scores.cap {
        own = own.f_div_scalar(cap)?.f_tanh()?.f_mul_scalar(cap)?;
    }
    if let Some(bias) = bias {
        own = own.f_add(bias)?;
    }
    let Some(sinks) = scores.sinks else {
        return Ok(own.f_softmax(-1, Kind::Float)?.f_to_kind(value.kind())?.f_matmul(value)?);
    };
    let (batch, heads, queries, keys) = own.size4()?;
    let sinks = sinks.f_to_kind(own.kind())?.f_view([1, heads, 1, 1])?.f_expand([batch, heads, queries, 1], false)?;
    let weights = Tensor::f_cat(&[own, sinks], -1)?.f_softmax(-1, Kind::Float)?.f_narrow(-1, 0, keys)?;
    Ok(weights.f_to_kind(value.kind())?.f_matmul(value)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu))
    }

    fn worst(a: &Tensor, b: &Tensor) -> f64 {
        f64::try_from((a - b).abs().max()).unwrap()
    }

    /// What a mask takes grows with a row's tokens, and not with their square.
    #[test]
    fn masks_of_a_window_grow_with_the_tokens_alone() {
        let numbers = |tokens: i64| {
            let rows =
                Rows { documents: None, unpadded: None, tokens, kind: Kind::Float, device: Device::Cpu, block: 64 };
            let Mask::Blocks(blocks) = rows.mask(Sight { window: Some(32), first: 4 }, false).unwrap() else {
                panic!("a window is a mask")
            };
            blocks.iter().map(|block| block.bias.numel()).sum::<usize>()
        };
        assert!(numbers(4096) <= 2 * numbers(2048) + 64 * 100, "{} {}", numbers(2048), numbers(4096));
    }

    /// Against a loop over queries that looks at each key by the rule.
    #[test]
    fn queries_see_their_document_and_window_whatever_the_blocks() {
        lora_torch::tch::manual_seed(1);
        let (tokens, scale) = (11, 0.4);
        let (query, key, value) = (random(&[2, 4, tokens, 8]), random(&[2, 2, tokens, 8]), random(&[2, 2, tokens, 8]));
        let documents = Tensor::from_slice(&[0i64, 0, 0, 1, 1, 1, 1, 1, 2, 2, 3, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 9]);
        let documents = documents.view([2, tokens]);
        let sinks = random(&[4]);
        for (documents, unpadded, window, first, cap, sinks) in [
            (None, None, None, 0, None, None),
            (Some(&documents), None, None, 0, None, None),
            (None, None, Some(3), 0, None, None),
            (None, None, Some(3), 2, None, None),
            (None, None, Some(2), 20, None, None),
            (Some(&documents), None, Some(4), 0, None, None),
            (Some(&documents), None, Some(2), 1, None, None),
            (Some(&documents), None, Some(3), 2, Some(2.0), None),
            (Some(&documents), None, Some(1), 3, None, Some(&sinks)),
            (Some(&documents), None, Some(4), 0, Some(2.0), None),
            (None, None, None, 0, Some(2.0), None),
            (Some(&documents), None, Some(4), 0, None, Some(&sinks)),
            (None, Some(5), None, 0, None, None),
            (None, Some(1), None, 0, Some(2.0), None),
        ] {
            let document = |row: i64, at: i64| documents.map_or(0, |all: &Tensor| all.int64_value(&[row, at]));
            let place = |row: i64, at: i64| (0..at).filter(|&other| document(row, other) == document(row, at)).count();
            let expected = Tensor::zeros([2, 4, tokens, 8], (Kind::Float, Device::Cpu));
            for (row, head, at) in (0..2).flat_map(|r| (0..4).flat_map(move |h| (0..tokens).map(move |q| (r, h, q)))) {
                let seen: Vec<i64> = (0..=at)
                    .filter(|&other| unpadded.is_none_or(|count| other < count))
                    .filter(|&other| {
                        window.is_none_or(|window: usize| at - other < window as i64 || place(row, other) < first)
                    })
                    .filter(|&other| document(row, other) == document(row, at))
                    .collect();
                let seen = Tensor::from_slice(&seen);
                let keys = key.get(row).get(head / 2).index_select(0, &seen);
                let mut scores = keys.mv(&query.get(row).get(head).get(at)) * scale;
                if let Some(cap) = cap {
                    scores = (scores / cap).tanh() * cap;
                }
                let values = value.get(row).get(head / 2).index_select(0, &seen);
                let sink = sinks.map(|sinks| sinks.narrow(0, head, 1));
                let weights = Tensor::cat(&[Some(scores), sink].into_iter().flatten().collect::<Vec<_>>(), 0);
                let weights = weights.softmax(0, Kind::Float).narrow(0, 0, seen.numel() as i64);
                let mixed = values.tr().mv(&weights);
                expected.get(row).get(head).get(at).copy_(&mixed);
            }
            for block in [1, 4, 64] {
                let rows = Rows { documents, unpadded, tokens, kind: Kind::Float, device: Device::Cpu, block };
                let mask = rows.mask(Sight { window, first }, cap.is_some() || sinks.is_some()).unwrap();
                let found = attend(&query, &key, &value, &mask, Scores { scale, cap, sinks }).unwrap();
                let apart = worst(&found, &expected);
                assert!(apart < 1e-5, "{documents:?} {unpadded:?} {window:?} {first} {cap:?} {block}: {apart:e}");
            }
        }
    }
}
