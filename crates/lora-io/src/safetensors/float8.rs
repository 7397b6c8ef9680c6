//! The two 8-bit floating-point types of safetensors as the numbers they are. Factors that some files keep beside such
//! tensors are not applied here.

/// One `F8_E4M3` number: sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities, NaN where all seven bits are
/// set (Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433).
pub(crate) fn from_e4m3(byte: u8) -> f32 {
    let magnitude = match (byte >> 3 & 0xF, byte & 7) {
        (0xF, 7) => f32::NAN,
        (0, mantissa) => f32::from(mantissa) * 2f32.powi(-9),
        (exponent, mantissa) => f32::from(8 + mantissa) * 2f32.powi(i32::from(exponent) - 10),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// One `F8_E5M2` number: the upper byte of a binary16, infinities and NaN included.
pub(crate) fn from_e5m2(byte: u8) -> f32 {
    half::f16::from_bits(u16::from(byte) << 8).to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_torchs() {
        // torch 2.11.0: torch.tensor(bytes, dtype=torch.uint8).view(torch.float8_e4m3fn or float8_e5m2).float()
        let e4m3 =
            [(0x00, 0.0), (0x01, 0.001953125), (0x07, 0.013671875), (0x08, 0.015625), (0x38, 1.0), (0x7E, 448.0)];
        for (byte, value) in e4m3 {
            assert_eq!(from_e4m3(byte), value, "{byte:#x}");
            assert_eq!(from_e4m3(byte | 0x80), -value, "{byte:#x}");
        }
        let e5m2 = [(0x01, 2f32.powi(-16)), (0x04, 2f32.powi(-14)), (0x3C, 1.0), (0x7B, 57344.0)];
        for (byte, value) in e5m2 {
            assert_eq!(from_e5m2(byte), value, "{byte:#x}");
            assert_eq!(from_e5m2(byte | 0x80), -value, "{byte:#x}");
        }
        assert!(from_e4m3(0x7F).is_nan() && from_e4m3(0xFF).is_nan());
        assert!(from_e5m2(0x7C).is_infinite() && from_e5m2(0x7D).is_nan());
    }
}
