//! Latents as tokens of 2×2 patches, and where these stand in the picture.

use lora_torch::tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// Side of a patch in latents.
const PATCH: i64 = 2;

/// Latents `[batch, channels, height, width]` as tokens `[batch, height/2 · width/2, channels · 4]`, row by row, the
/// numbers of each by channel, row and column.
pub(in super::super) fn pack(latents: &Tensor) -> Result<Tensor> {
    let (batch, channels, height, width) = latents.size4()?;
    if height % PATCH != 0 || width % PATCH != 0 {
        return Err(Error::Input {
            what: "transformer",
            expected: "latents of an even height and width".into(),
            found: format!("{height} × {width}"),
        });
    }
    let patches = latents.f_view([batch, channels, height / PATCH, PATCH, width / PATCH, PATCH])?;
    let tokens = patches.f_permute([0, 2, 4, 1, 3, 5])?;
    Ok(tokens.f_reshape([batch, height / PATCH * (width / PATCH), channels * PATCH * PATCH])?)
}

/// The way back to latents of a height and width.
pub(in super::super) fn unpack(tokens: &Tensor, height: i64, width: i64) -> Result<Tensor> {
    let (batch, _, numbers) = tokens.size3()?;
    let channels = numbers / (PATCH * PATCH);
    let patches = tokens.f_reshape([batch, height / PATCH, width / PATCH, channels, PATCH, PATCH])?;
    Ok(patches.f_permute([0, 3, 1, 4, 2, 5])?.f_reshape([batch, channels, height, width])?)
}

/// Rows and columns of a grid's places, `[rows · columns, 2]` int64, the first place at `(top, left)`.
pub(in super::super) fn positions(rows: i64, columns: i64, (top, left): (i64, i64), device: Device) -> Result<Tensor> {
    let along = |start: i64, count: i64| Tensor::f_arange_start(start, start + count, (Kind::Int64, device));
    let row = along(top, rows)?.f_unsqueeze(1)?.f_expand([rows, columns], false)?;
    let column = along(left, columns)?.f_unsqueeze(0)?.f_expand([rows, columns], false)?;
    Ok(Tensor::f_stack(&[row, column], -1)?.f_flatten(0, 1)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_is_a_token_by_channel_row_and_column() {
        let latents = Tensor::arange(2 * 4 * 6, (Kind::Float, Device::Cpu)).view([1, 2, 4, 6]);
        let tokens = pack(&latents).unwrap();
        assert_eq!(tokens.size(), [1, 6, 8]);
        let second = Vec::<f32>::try_from(tokens.get(0).get(1)).unwrap();
        assert_eq!(second, [2.0, 3.0, 8.0, 9.0, 26.0, 27.0, 32.0, 33.0]);
        assert_eq!(unpack(&tokens, 4, 6).unwrap(), latents);
        assert!(pack(&latents.narrow(3, 0, 5)).is_err());
        let places = positions(2, 3, (5, 0), Device::Cpu).unwrap();
        assert_eq!(Vec::<i64>::try_from(places.view([-1])).unwrap(), [5, 0, 5, 1, 5, 2, 6, 0, 6, 1, 6, 2]);
    }
}
