//! AdamW with its state in 8 bits, by blocks (Dettmers et al., ICLR 2022; see [`super::dynamic_map`]). Tensors of fewer than
//! 4096 numbers keep 32 bits, as in bitsandbytes: they cost little and suffer most.

use lora_torch::foreach;
use lora_torch::tch::{Device, Kind, Tensor};

use super::dynamic_map::{BLOCK, DynamicMap};
use super::{AdamW, Entry, First, Optimiser, Settings, StatePart, WORKING_SET, batches_by, bias_correction};
use crate::Result;

/// AdamW with 8-bit state.
#[derive(Debug)]
pub(crate) struct AdamW8bit {
    formula: AdamW,
    least: i64,
    /// Signed for means, unsigned for squares; made at the first step, on its device.
    maps: Option<(DynamicMap, DynamicMap)>,
}

/// Codes and largest magnitudes, in the order of the parts.
const MEAN: usize = 0;
const SQUARE: usize = 1;
const MEAN_LARGEST: usize = 2;
const SQUARE_LARGEST: usize = 3;

impl AdamW8bit {
    /// From the configuration's numbers.
    pub(crate) fn new(settings: &mut Settings) -> Self {
        let whole = |value: f64| value >= 0.0 && value.fract() == 0.0;
        let least = settings.number("min_8bit_size", 4096.0, "a whole number from 0 on", whole) as i64;
        Self { formula: AdamW::new(settings), least, maps: None }
    }

    fn is_narrow(&self, elements: i64) -> bool {
        elements >= self.least
    }

    fn narrow_step(&self, pieces: &[Piece], maps: &(DynamicMap, DynamicMap), rate: f64, steps: u64) -> Result<()> {
        let AdamW { betas, epsilon, weight_decay } = self.formula;
        let list = |part: fn(&Piece) -> &Tensor| -> Vec<&Tensor> { pieces.iter().map(part).collect() };
        let largest = |part: fn(&Piece) -> &Tensor| Tensor::f_cat(&list(part), 0);
        let gradients = blocks(&list(|piece| &piece.gradient), 0)?;
        let mut means = maps
            .0
            .dequantised(&blocks(&list(|piece| &piece.mean), maps.0.zero())?, &largest(|piece| &piece.mean_largest)?)?;
        let _ = means.f_mul_scalar_(betas.0)?.f_add_(&gradients.f_mul_scalar(1.0 - betas.0)?)?;
        let mut squares = maps.1.dequantised(
            &blocks(&list(|piece| &piece.square), maps.1.zero())?,
            &largest(|piece| &piece.square_largest)?,
        )?;
        let _ = squares.f_mul_scalar_(betas.1)?.f_add_(&gradients.f_square()?.f_mul_scalar_(1.0 - betas.1)?)?;
        drop(gradients);

        let mut divisor = squares.f_sqrt()?;
        let _ = divisor.f_div_scalar_(bias_correction(betas.1, steps).sqrt())?.f_add_scalar_(epsilon)?;
        let parameters = list(|piece| &piece.parameter);
        if weight_decay != 0.0 {
            foreach::scale(&parameters, 1.0 - rate * weight_decay)?;
        }
        let factor = -rate / bias_correction(betas.0, steps);
        foreach::add_quotient(&parameters, &unblocked(&means, pieces)?, &unblocked(&divisor, pieces)?, factor)?;
        drop(divisor);

        for (map, numbers, codes, largest) in [
            (&maps.0, means, list(|piece| &piece.mean), list(|piece| &piece.mean_largest)),
            (&maps.1, squares, list(|piece| &piece.square), list(|piece| &piece.square_largest)),
        ] {
            let (new_codes, new_largest) = map.quantised(&numbers)?;
            foreach::copy(&codes, &unblocked(&new_codes, pieces)?)?;
            let counts: Vec<i64> = largest.iter().map(|tensor| tensor.numel() as i64).collect();
            foreach::copy(&largest, &new_largest.f_split_with_sizes(counts.as_slice(), 0)?)?;
        }
        Ok(())
    }
}

impl Optimiser for AdamW8bit {
    fn parts(&self, shape: &[i64]) -> Vec<StatePart> {
        let elements = shape.iter().product::<i64>();
        if !self.is_narrow(elements) {
            return AdamW::wide_parts(shape);
        }
        let codes = |name| StatePart { name, shape: shape.to_vec(), kind: Kind::Uint8, first: First::Zeros };
        let count = [elements.max(0).unsigned_abs().div_ceil(BLOCK as u64) as i64];
        vec![
            codes("mean"),
            codes("square"),
            StatePart::zeros("mean_largest", &count),
            StatePart::zeros("square_largest", &count),
        ]
    }

    fn step(&mut self, entries: &[Entry<'_>]) -> Result<()> {
        let device = entries.first().map_or(Device::Cpu, |entry| entry.parameter.device());
        let maps = match self.maps.take() {
            Some(maps) if maps.0.device() == device => maps,
            _ => (DynamicMap::new(true, device)?, DynamicMap::new(false, device)?),
        };
        for batch in batches_by(entries, WORKING_SET, |entry| self.is_narrow(entry.parameter.numel() as i64)) {
            if !self.is_narrow(batch.parameters()[0].numel() as i64) {
                self.formula.wide_step(&batch)?;
                continue;
            }
            let mut pieces = Vec::with_capacity(batch.entries.len());
            for entry in &batch.entries {
                pieces.extend(Piece::of(entry)?);
            }
            // Tensors larger than the working set come in several pieces, one after the other.
            let at_once = if batch.entries.len() > 1 { pieces.len() } else { 1 };
            for pieces in pieces.chunks(at_once.max(1)) {
                self.narrow_step(pieces, &maps, batch.learning_rate(), batch.steps())?;
            }
        }
        self.maps = Some(maps);
        Ok(())
    }
}

/// StatePart of a tensor, flat, from the beginning of a block on; views of the tensors themselves.
#[derive(Debug)]
struct Piece {
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    mean_largest: Tensor,
    square_largest: Tensor,
}

impl Piece {
    fn of(entry: &Entry<'_>) -> Result<Vec<Self>> {
        let elements = entry.parameter.numel() as i64;
        // Trained tensors are contiguous; a gradient need not be.
        let flat = |tensor: &Tensor| tensor.f_view([-1]);
        let (parameter, gradient) = (flat(entry.parameter)?, entry.gradient.f_reshape(-1)?);
        let (mean, square) = (flat(&entry.state[MEAN])?, flat(&entry.state[SQUARE])?);
        let piece = |start: i64| {
            let end = (start + WORKING_SET as i64).min(elements);
            let numbers = |tensor: &Tensor| tensor.f_slice(0, start, end, 1);
            let blocks = |tensor: &Tensor| tensor.f_slice(0, start / BLOCK, (end + BLOCK - 1) / BLOCK, 1);
            Ok(Self {
                parameter: numbers(&parameter)?,
                gradient: numbers(&gradient)?,
                mean: numbers(&mean)?,
                square: numbers(&square)?,
                mean_largest: blocks(&entry.state[MEAN_LARGEST])?,
                square_largest: blocks(&entry.state[SQUARE_LARGEST])?,
            })
        };
        (0..elements).step_by(WORKING_SET).map(piece).collect()
    }
}

/// Flat tensors as blocks, `[blocks, 256]`, each tensor filled up to whole ones.
fn blocks(tensors: &[&Tensor], filling: i64) -> Result<Tensor> {
    let mut parts: Vec<Tensor> = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        parts.push(tensor.shallow_clone());
        let missing = padding(tensor);
        if missing > 0 {
            parts.push(Tensor::f_full([missing], filling, (tensor.f_kind()?, tensor.device()))?);
        }
    }
    Ok(Tensor::f_cat(&parts, 0)?.f_view([-1, BLOCK])?)
}

/// The pieces' own numbers out of blocks.
fn unblocked(blocks: &Tensor, pieces: &[Piece]) -> Result<Vec<Tensor>> {
    let flat = blocks.f_view([-1])?;
    let mut start = 0;
    let own = |piece: &Piece| {
        let length = piece.parameter.numel() as i64;
        let view = flat.f_narrow(0, start, length)?;
        start += length + padding(&piece.parameter);
        Ok(view)
    };
    pieces.iter().map(own).collect()
}

fn padding(tensor: &Tensor) -> i64 {
    let elements = tensor.numel() as i64;
    (BLOCK - elements % BLOCK) % BLOCK
}
