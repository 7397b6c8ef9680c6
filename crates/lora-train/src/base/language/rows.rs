//! Rows of tokens as tensors. All rows of a batch are filled up to one length. Nothing is learned from what fills them: it
//! follows the tokens that are learned, or is a document of its own.

use lora_data::texts::{LENGTH_STEP, TokenRow};
use lora_models::networks::decoder::{LookedUp, NO_LABEL};
use lora_torch::tch::{Device, Tensor};
use lora_torch::tensor::from_f32;

use crate::Result;
use crate::base::{Inputs, Item};

/// To what length rows are filled up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Filled {
    /// Every row has several documents, and is filled up to the most tokens; otherwise to the next multiple of a step.
    pub(super) packing: bool,
    /// `max_seq_length`.
    pub(super) most: usize,
}

/// The tensors of a micro-batch of rows:
///
/// | name | shape | what |
/// |---|---|---|
/// | `tokens` | `[batch, tokens]` int64 | |
/// | `labels` | `[batch, tokens]` int64 | the tokens that are learned, [`NO_LABEL`] elsewhere |
/// | `positions` | `[batch, tokens]` int64 | the place of each in its document |
/// | `documents` | `[batch, tokens]` int64 | the number of its document in the row, where rows have several |
/// | `weights` | `[batch, tokens]` f32 | how much each row counts, where that differs |
/// | `noise` | `[batch, tokens, width]` f32 | added to embeddings, where there is noise: its α and their width |
/// | `share` | a number, f32 | 1 / the number of learned tokens |
/// | `embedded`, `layer_inputs` | `[batch, tokens, …]` | what tokens look up in tables that are in host memory |
pub(super) fn lay_out(
    rows: &[&TokenRow],
    items: &[Item],
    filled: Filled,
    noise: Option<(f64, usize)>,
    device: Device,
    look_up: &dyn Fn(&Tensor) -> Result<LookedUp>,
) -> Result<Inputs> {
    let longest = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
    let length = if filled.packing { filled.most } else { longest.next_multiple_of(LENGTH_STEP).min(filled.most) };
    // A row longer than that would have been split.
    let length = length.max(longest);
    let several = filled.packing || rows.iter().any(|row| row.documents.len() > 1);
    let (mut tokens, mut labels, mut positions, mut documents) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for row in rows {
        let filling = length - row.ids.len();
        tokens.extend(row.ids.iter().map(|&id| i64::from(id)).chain(std::iter::repeat_n(0, filling)));
        labels.extend(labels_of(row).chain(std::iter::repeat_n(NO_LABEL, filling)));
        let lengths = row.documents.iter().copied().chain((filling > 0).then_some(filling));
        for (number, length) in lengths.enumerate() {
            positions.extend(0..length as i64);
            documents.extend(std::iter::repeat_n(number as i64, length));
        }
    }
    let shape = [rows.len() as i64, length as i64];
    let here = |values: &[i64]| -> Result<Tensor> { Ok(Tensor::f_from_slice(values)?.f_view(shape)?) };
    let put = |values: &[i64]| -> Result<Tensor> { Ok(here(values)?.f_to_device(device)?) };
    let looked_up = look_up(&here(&tokens)?)?;
    let learned = rows.iter().flat_map(|row| &row.trained).filter(|&&trained| trained).count();
    // Where one document fills a row from its beginning, positions are what they are without being told.
    let positions = if several { positions } else { (0..rows.len()).flat_map(|_| 0..length as i64).collect() };
    Ok(Inputs::default()
        .with("tokens", Some(put(&tokens)?))
        .with("labels", Some(put(&labels)?))
        .with("positions", Some(put(&positions)?))
        .with("documents", several.then(|| put(&documents)).transpose()?)
        .with("weights", weights(items, length, device)?)
        .with("noise", noise.map(|noise| embedding_noise(rows, items, length, noise, device)).transpose()?)
        .with("share", Some(from_f32(&[1.0 / learned.max(1) as f32], &[], device)?))
        .with("embedded", looked_up.tokens)
        .with("layer_inputs", looked_up.layer_inputs))
}

/// The tokens of a row that are learned, [`NO_LABEL`] in place of the others.
pub(crate) fn labels_of(row: &TokenRow) -> impl Iterator<Item = i64> {
    let label = |(&id, &trained): (&u32, &bool)| if trained { i64::from(id) } else { NO_LABEL };
    row.ids.iter().zip(&row.trained).map(label)
}

/// How much each token's loss counts; `None` where all count alike.
fn weights(items: &[Item], length: usize, device: Device) -> Result<Option<Tensor>> {
    if items.iter().all(|item| item.weight == 1.0) {
        return Ok(None);
    }
    let weights: Vec<f32> = items.iter().flat_map(|item| std::iter::repeat_n(item.weight as f32, length)).collect();
    Ok(Some(from_f32(&weights, &[items.len(), length], device)?))
}

/// NEFTune's noise (arXiv 2310.05914): uniform in ± α / √(tokens · width), by the length of each row.
fn embedding_noise(
    rows: &[&TokenRow],
    items: &[Item],
    length: usize,
    (alpha, width): (f64, usize),
    device: Device,
) -> Result<Tensor> {
    let mut values = Vec::with_capacity(items.len() * length * width);
    for (row, item) in rows.iter().zip(items) {
        let bound = (alpha / ((row.ids.len() * width) as f64).sqrt()) as f32;
        let mut draw = item.draw.at("neftune");
        values.extend((0..row.ids.len() * width).map(|_| bound * (2.0 * draw.uniform() - 1.0)));
        values.resize(values.len() + (length - row.ids.len()) * width, 0.0);
    }
    Ok(from_f32(&values, &[items.len(), length, width], device)?)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use lora_core::random::Stream;

    use super::*;

    fn item(weight: f64) -> Item {
        Item {
            caption: String::new(),
            encoded: BTreeMap::new(),
            beside: BTreeMap::new(),
            example: None,
            weight,
            draw: Stream::new(1).with(weight.to_bits()),
        }
    }

    fn laid_out(rows: &[&TokenRow], items: &[Item], filled: Filled, noise: Option<(f64, usize)>) -> Inputs {
        lay_out(rows, items, filled, noise, Device::Cpu, &|_| Ok(LookedUp::default())).unwrap()
    }

    fn numbers(tensor: &Tensor, row: i64) -> Vec<i64> {
        Vec::try_from(tensor.get(row)).unwrap()
    }

    #[test]
    fn rows_are_filled_and_what_fills_them_is_not_learned() {
        let short = TokenRow { ids: vec![7, 8, 9], trained: vec![false, true, true], documents: vec![3] };
        let long = TokenRow { ids: vec![5; 65], trained: vec![false; 65], documents: vec![65] };
        let inputs = laid_out(&[&short, &long], &[item(1.0), item(1.0)], Filled { packing: false, most: 512 }, None);
        let of = |name: &'static str| numbers(inputs.get(name).unwrap(), 0);
        assert_eq!((of("tokens").len(), &of("tokens")[..4]), (128, &[7, 8, 9, 0][..]));
        assert_eq!(&of("labels")[..4], [NO_LABEL, 8, 9, NO_LABEL]);
        assert!(of("positions").iter().copied().eq(0..128));
        assert!(inputs.find("documents").is_none() && inputs.find("weights").is_none());
        assert!(inputs.find("embedded").is_none() && inputs.find("layer_inputs").is_none());
        assert_eq!(f64::try_from(inputs.get("share").unwrap()).unwrap(), 0.5);
    }

    #[test]
    fn packed_documents_begin_anew_and_the_filling_is_one_of_its_own() {
        let row = TokenRow { ids: vec![1, 2, 3, 4, 5], trained: vec![true; 5], documents: vec![2, 3] };
        let inputs = laid_out(&[&row], &[item(0.5)], Filled { packing: true, most: 64 }, Some((5.0, 4)));
        let of = |name: &'static str| numbers(inputs.get(name).unwrap(), 0);
        assert_eq!(&of("positions")[..7], [0, 1, 0, 1, 2, 0, 1]);
        assert_eq!(&of("documents")[..7], [0, 0, 1, 1, 1, 2, 2]);
        assert_eq!(f64::try_from(inputs.get("weights").unwrap().get(0).get(0)).unwrap(), 0.5);
        let noise = inputs.get("noise").unwrap();
        let bound = 5.0 / 20f64.sqrt();
        let most = f64::try_from(noise.abs().max()).unwrap();
        assert!(most <= bound && most > 0.7 * bound, "{most} of {bound}");
        assert_eq!(f64::try_from(noise.narrow(1, 5, 59).abs().max()).unwrap(), 0.0);
    }
}
