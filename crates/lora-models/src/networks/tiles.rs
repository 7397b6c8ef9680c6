//! A picture or its latents worked on in overlapping tiles, whose answers fade into each other: memory for a tile
//! instead of the picture. What is done with a tile is not here.
//!
//! Diffusers' `enable_vae_tiling` does the same with tiles of one size from the left and the top, which leaves strips
//! at the other ends whose group norms see few numbers. Here all tiles of an axis are equally long.

use lora_torch::tch::{Device, Kind, Tensor};

use crate::Result;

/// Beginning and end of the tiles along an axis: none longer than `most`, neighbours overlap by a quarter of that or
/// more, and no third tile lies where two overlap.
pub(crate) fn tiles_along(length: usize, most: usize) -> Vec<(usize, usize)> {
    let most = most.max(4);
    if length <= most {
        return vec![(0, length)];
    }
    let overlap = most / 4;
    let count = (length - overlap).div_ceil(most - overlap);
    let side = (length + (count - 1) * overlap).div_ceil(count);
    let begin = |index: usize| index * (length - side) / (count - 1);
    (0..count).map(|index| (begin(index), begin(index) + side)).collect()
}

/// What `run` makes of `[batch, channels, height, width]`: a new tensor, f32. Of its input `input_scale` numbers along
/// an axis are one latent, of its output `output_scale`; tiles are at most `most` latents high and wide.
pub(super) fn in_tiles(
    input: &Tensor,
    most: usize,
    (input_scale, output_scale): (usize, usize),
    run: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (batch, _, height, width) = input.size4()?;
    let (rows, columns) =
        (tiles_along(height as usize / input_scale, most), tiles_along(width as usize / input_scale, most));
    if rows.len() == 1 && columns.len() == 1 {
        return run(input);
    }
    let part = |tensor: &Tensor, axis: i64, (begin, end): (usize, usize), scale: usize| {
        tensor.f_narrow(axis, (begin * scale) as i64, ((end - begin) * scale) as i64)
    };
    let mut output: Option<Tensor> = None;
    for (index, &row) in rows.iter().enumerate() {
        let down = weights(&rows, index, output_scale, input.device())?.f_unsqueeze(1)?;
        for (index, &column) in columns.iter().enumerate() {
            let tile = part(&part(input, 2, row, input_scale)?, 3, column, input_scale)?.f_contiguous()?;
            let mut answer = run(&tile)?;
            let _ = answer.f_mul_(&down)?.f_mul_(&weights(&columns, index, output_scale, input.device())?)?;
            let output = match &output {
                Some(output) => output,
                None => {
                    let side = |axis: i64| axis / input_scale as i64 * output_scale as i64;
                    let shape = [batch, answer.size()[1], side(height), side(width)];
                    output.insert(Tensor::f_zeros(shape, (Kind::Float, input.device()))?)
                }
            };
            let _ = part(&part(output, 2, row, output_scale)?, 3, column, output_scale)?.f_add_(&answer)?;
        }
    }
    // There is at least one tile.
    Ok(output.unwrap_or_else(|| input.shallow_clone()))
}

/// How much a tile counts along an axis: less and less towards a neighbour, so that both together count 1.
fn weights(places: &[(usize, usize)], index: usize, scale: usize, device: Device) -> Result<Tensor> {
    let (begin, end) = places[index];
    let before = index.checked_sub(1).map_or(0, |before| scale * (places[before].1 - begin));
    let after = places.get(index + 1).map_or(0, |next| scale * (end - next.0));
    let length = scale * (end - begin);
    let ramp = |distance: usize, overlap: usize| ((distance as f32 + 0.5) / overlap as f32).min(1.0);
    let of = |position: usize| match (position < before, length - position <= after) {
        (true, _) => ramp(position, before),
        (_, true) => ramp(length - position - 1, after),
        _ => 1.0,
    };
    let all: Vec<f32> = (0..length).map(of).collect();
    Ok(Tensor::f_from_slice(&all)?.f_to_device(device)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_an_axis_and_overlap_in_pairs() {
        for most in [4, 5, 8, 32] {
            for length in 1..300 {
                let places = tiles_along(length, most);
                assert_eq!((places[0].0, places[places.len() - 1].1), (0, length), "{length} in {most}");
                assert!(places.iter().all(|(begin, end)| end - begin <= most && begin < end));
                for pair in places.windows(2) {
                    assert!(pair[0].1 >= pair[1].0 + most / 4, "{places:?}");
                }
                for three in places.windows(3) {
                    assert!(three[0].1 <= three[2].0, "{places:?}");
                }
            }
        }
    }

    #[test]
    fn what_tiles_leave_alone_comes_back_as_it_was() {
        let input = Tensor::randn([2, 3, 90, 44], (Kind::Float, Device::Cpu));
        let output = in_tiles(&input, 16, (2, 2), |tile| Ok(tile.copy())).unwrap();
        assert!(output.allclose(&input, 1e-6, 1e-6, false));
        // Twice as large, as a decoder's is.
        let twice = |tile: &Tensor| tile.repeat_interleave_self_int(2, 2, None).repeat_interleave_self_int(2, 3, None);
        let output = in_tiles(&input, 16, (1, 2), |tile| Ok(twice(tile))).unwrap();
        assert!(output.allclose(&twice(&input), 1e-6, 1e-6, false));
    }
}
