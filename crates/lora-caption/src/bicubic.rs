//! Scaling of square pictures as Pillow does it, to the byte: taggers were trained on pictures that Pillow scaled, and a
//! probability near its threshold tells one rounding from another. Everything else that scales uses `lora-data`'s resizer.

/// Bits behind the point of a weight.
const BITS: u32 = 22;
/// Pixels from the centre on that the filter reads where it does not shrink.
const SUPPORT: f64 = 2.0;

/// The weights of one output pixel, from the first input pixel on that it reads.
struct Window {
    first: usize,
    weights: Vec<i32>,
}

/// Interleaved RGB bytes of a square at another size. The filter is the cubic one with a = −0.5; where it shrinks it widens, so
/// that it averages.
pub(crate) fn scaled(data: &[u8], from: usize, to: usize) -> Vec<u8> {
    if from == to {
        return data.to_vec();
    }
    let windows: Vec<Window> = (0..to).map(|place| window(place, from, to)).collect();
    // Rows first; what is between both passes is bytes, too.
    let mut narrow = vec![0u8; 3 * from * to];
    for (row, line) in data.chunks_exact(3 * from).zip(narrow.chunks_exact_mut(3 * to)) {
        for (Window { first, weights }, pixel) in windows.iter().zip(line.as_chunks_mut::<3>().0) {
            let mut sums = [1i32 << (BITS - 1); 3];
            for (source, weight) in row.as_chunks::<3>().0[*first..].iter().zip(weights) {
                for (sum, value) in sums.iter_mut().zip(source) {
                    *sum += i32::from(*value) * weight;
                }
            }
            *pixel = sums.map(byte);
        }
    }
    let mut scaled = vec![0u8; 3 * to * to];
    let mut sums = vec![0i32; 3 * to];
    for (Window { first, weights }, line) in windows.iter().zip(scaled.chunks_exact_mut(3 * to)) {
        sums.fill(1 << (BITS - 1));
        for (row, weight) in narrow[3 * to * first..].chunks_exact(3 * to).zip(weights) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += i32::from(*value) * weight;
            }
        }
        for (out, sum) in line.iter_mut().zip(&sums) {
            *out = byte(*sum);
        }
    }
    scaled
}

fn window(place: usize, from: usize, to: usize) -> Window {
    let scale = from as f64 / to as f64;
    let widened = scale.max(1.0);
    let centre = (place as f64 + 0.5) * scale;
    let reach = SUPPORT * widened;
    let first = (centre - reach + 0.5).max(0.0) as usize;
    let end = ((centre + reach + 0.5) as usize).min(from);
    let weights: Vec<f64> = (first..end).map(|pixel| cubic((pixel as f64 - centre + 0.5) * (1.0 / widened))).collect();
    let sum: f64 = weights.iter().sum();
    let fixed = |weight: f64| (weight / sum * f64::from(1u32 << BITS)).round() as i32;
    Window { first, weights: weights.into_iter().map(fixed).collect() }
}

fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

fn byte(sum: i32) -> u8 {
    (sum >> BITS).clamp(0, 255) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By Pillow: `Image.frombytes("RGB", (5, 5), bytes((i * i * 7 + i * 31) % 256 for i in range(75))).resize((n, n), BICUBIC)`.
    #[test]
    fn bytes_are_pillows() {
        let data: Vec<u8> = (0..75u32).map(|index| ((index * index * 7 + index * 31) % 256) as u8).collect();
        assert_eq!(scaled(&data, 5, 5), data);
        assert_eq!(
            scaled(&data, 5, 3),
            [
                97, 137, 126, 145, 140, 130, 94, 135, 108, 152, 111, 171, 152, 166, 94, 97, 136, 135, 160, 112, 98, 68,
                152, 119, 133, 89, 132
            ]
        );
        assert_eq!(
            scaled(&data, 5, 7)[..42],
            [
                0, 13, 81, 85, 164, 69, 186, 206, 102, 184, 37, 191, 98, 212, 186, 79, 174, 94, 104, 28, 0, 156, 169,
                185, 94, 138, 120, 81, 124, 79, 163, 150, 120, 148, 123, 155, 105, 125, 127, 67, 144, 78
            ]
        );
    }
}
