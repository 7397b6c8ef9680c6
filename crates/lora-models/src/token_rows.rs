//! Trained rows of single tokens in the place of a table's (PEFT's trainable tokens): what an embedding looks up, and the logits
//! of a head that reads the same table. How such rows change a weight, for merging, is lora-core's variant `full`.

use lora_core::LayerGeometry;
use lora_core::variant::{Parameters, TOKEN_ROWS, TOKENS};
use lora_torch::TchBackend;
use lora_torch::tch::{Kind, Tensor};

use crate::Result;

/// Rows and the tokens that they belong to.
pub(crate) struct TokenRows<'p> {
    /// `[tokens]`, whole numbers in f32, each once.
    tokens: &'p Tensor,
    /// `[tokens, width]`, f32.
    rows: &'p Tensor,
}

impl<'p> TokenRows<'p> {
    pub(crate) fn of(parameters: &'p Parameters<TchBackend>) -> Option<Self> {
        Some(Self { tokens: parameters.tensors.get(TOKENS)?, rows: parameters.tensors.get(TOKEN_ROWS)? })
    }

    /// A layer's output with these rows in the place of the table's: of an embedding `[…, width]` for numbers `[…]`, of a
    /// head `[…, entries]` for hidden states `[…, width]`. Gradients are sums of matrix products, which add up in the same
    /// order each time, where a scattered sum on a GPU does not.
    pub(crate) fn applied(&self, geometry: LayerGeometry, output: &Tensor, input: &Tensor) -> Result<Tensor> {
        let tokens = self.tokens.f_to_kind(Kind::Int64)?;
        let rows = self.rows.f_to_kind(output.kind())?;
        if !matches!(geometry, LayerGeometry::Embedding { .. }) {
            return Ok(output.f_index_copy(-1, &tokens, &input.f_linear(&rows, None::<&Tensor>)?)?);
        }
        // `[…, tokens]`: 1 where a number is the token.
        let chosen = input.f_unsqueeze(-1)?.f_eq_tensor(&tokens)?;
        let others = chosen.f_any_dim(-1, true)?.f_logical_not()?;
        let own = chosen.f_to_kind(output.kind())?.f_matmul(&rows)?;
        Ok(output.f_mul(&others.f_to_kind(output.kind())?)?.f_add(&own)?)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use lora_torch::tch::Device;

    use super::*;

    #[test]
    fn both_ends_compute_as_with_the_rows_in_the_table() {
        let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
        let (table, rows) = (random(&[9, 4]), random(&[2, 4]).set_requires_grad(true));
        let tokens = Tensor::from_slice(&[7f32, 2.0]);
        let tensors = BTreeMap::from([
            (TOKENS.to_owned(), tokens.shallow_clone()),
            (TOKEN_ROWS.to_owned(), rows.shallow_clone()),
        ]);
        let parameters = Parameters { tensors, scale: 1.0 };
        let own = TokenRows::of(&parameters).unwrap();
        let whole = table.index_copy(0, &tokens.to_kind(Kind::Int64), &rows);
        let words = Tensor::from_slice(&[2i64, 0, 7, 7, 8, 2]).view([2, 3]);
        let embedding = LayerGeometry::Embedding { entries: 9, width: 4 };
        let found = own.applied(embedding, &table.index_select(0, &words.view([-1])).view([2, 3, 4]), &words).unwrap();
        let expected = whole.index_select(0, &words.view([-1])).view([2, 3, 4]);
        assert_eq!(found, expected);
        let hidden = random(&[2, 3, 4]);
        let logits = own.applied(LayerGeometry::linear(4, 9), &hidden.matmul(&table.tr()), &hidden).unwrap();
        let expected_logits = hidden.matmul(&whole.tr());
        assert!(f64::try_from((&logits - &expected_logits).abs().max()).unwrap() < 1e-6);
        let (toward, toward_logits) = (random(&[2, 3, 4]), random(&[2, 3, 9]));
        let loss = |rows: &Tensor, logits: &Tensor| {
            (rows * &toward).sum(Kind::Float) + (logits * &toward_logits).sum(Kind::Float)
        };
        loss(&found, &logits).backward();
        let mut leaf = rows.shallow_clone();
        let gradient = leaf.grad().copy();
        leaf.zero_grad();
        loss(&expected, &expected_logits).backward();
        assert!(f64::try_from((gradient - leaf.grad()).abs().max()).unwrap() < 1e-5);
    }
}
