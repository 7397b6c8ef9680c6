//! JPEG at a half, a quarter or an eighth of its size, straight from its frequencies (ITU-T T.81): a training picture is
//! several times smaller than a photograph, and the frequencies that it cannot show need not be computed.
//!
//! Only what cameras write: baseline, Huffman-coded, grey or YCbCr in one scan. Everything else, and everything damaged, is
//! `None`: the general decoder has the last word, but for data that end early, which it would fill up with grey. A block of
//! n × n pixels comes from the lowest n × n of its 64 frequencies; subsampled colours keep more of theirs and need no
//! interpolation, as in libjpeg.

use super::RgbPicture;
use super::complete::CutShort;

/// Order of frequencies in the file: row · 8 + column.
const ZIGZAG: [u8; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21,
    28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54,
    47, 55, 62, 63,
];

/// Place of frequencies that are not needed.
const UNUSED: u8 = 64;

/// Bits that are looked up at once.
const LOOKUP: u32 = 11;

/// Decodes at `1 / factor` of the size, sides rounded up. Factors are 2, 4 and 8, and 1 where colours are not subsampled.
///
/// # Errors
/// Where the data end before the last block.
pub(super) fn decode(bytes: &[u8], factor: usize) -> Result<Option<RgbPicture>, CutShort> {
    let mut header = Header::default();
    let Some(scan) = header.read(bytes) else { return Ok(None) };
    let mut bits = Bits::new(scan);
    let picture = header.picture(&mut bits, factor);
    // Zeros behind the end may read as a wrong code: what was read decides, not whether it could be.
    if bits.is_exhausted() { Err(CutShort) } else { Ok(picture) }
}

/// The planes' pixels next to each other.
fn interleaved(planes: &[Plane<'_>], width: usize, height: usize) -> Option<RgbPicture> {
    let mut data = vec![0; 3 * width * height];
    for (row, out) in data.chunks_exact_mut(3 * width).enumerate() {
        let line = |plane: &Plane<'_>| plane.pixels[row * plane.stride..row * plane.stride + width].to_vec();
        match planes {
            [grey] => {
                out.as_chunks_mut::<3>().0.iter_mut().zip(line(grey)).for_each(|(pixel, value)| *pixel = [value; 3]);
            }
            [luma, blue, red] => colours(out, &line(luma), &line(blue), &line(red)),
            _ => return None,
        }
    }
    RgbPicture::new(width, height, data)
}

/// Where each frequency of the file's order goes in a block of so many pixels, and its step.
fn places(quantisation: &[f32; 64], (width, height): (usize, usize)) -> [(u8, f32); 64] {
    std::array::from_fn(|index| {
        let place = ZIGZAG[index];
        let needed = usize::from(place & 7) < width && usize::from(place >> 3) < height;
        (if needed { place } else { UNUSED }, quantisation[index])
    })
}

/// YCbCr as JFIF has it to RGB, in 16 bits behind the point.
fn colours(out: &mut [u8], luma: &[u8], blue: &[u8], red: &[u8]) {
    let pixels = out.as_chunks_mut::<3>().0.iter_mut();
    for (((pixel, &y), &cb), &cr) in pixels.zip(luma).zip(blue).zip(red) {
        let (y, cb, cr) = ((i32::from(y) << 16) + 32768, i32::from(cb) - 128, i32::from(cr) - 128);
        let byte = |value: i32| (value >> 16).clamp(0, 255) as u8;
        *pixel = [byte(y + 91881 * cr), byte(y - 22554 * cb - 46802 * cr), byte(y + 116130 * cb)];
    }
}

/// The inverse cosine transform of the lowest `size` frequencies: `[frequency][pixel]`.
fn transform(size: usize) -> [[f32; 8]; 8] {
    let value = |frequency: usize, pixel: usize| {
        if frequency >= size || pixel >= size {
            return 0.0;
        }
        let angle = (2 * pixel + 1) as f64 * frequency as f64 * std::f64::consts::PI / (2 * size) as f64;
        let scale = if frequency == 0 { 0.5f64.sqrt() } else { 1.0 };
        (0.5 * scale * angle.cos()) as f32
    };
    std::array::from_fn(|frequency| std::array::from_fn(|pixel| value(frequency, pixel)))
}

struct Plane<'h> {
    component: Component,
    /// Width and height of a block.
    block: (usize, usize),
    transforms: ([[f32; 8]; 8], [[f32; 8]; 8]),
    /// In the file's order: where a frequency goes (the last place is for those that are not needed), and its step.
    places: [(u8, f32); 64],
    dc: &'h Huffman,
    ac: &'h Huffman,
    stride: usize,
    pixels: Vec<u8>,
    /// Constant part of the block before.
    previous: i32,
}

/// Frequencies of a block, row · 8 + column, and a place for those that are not needed.
type Frequencies = [f32; 65];

impl Plane<'_> {
    /// Reads a block and puts its pixels into place.
    #[inline]
    fn block(&mut self, bits: &mut Bits<'_>, (column, row): (usize, usize)) -> Option<()> {
        let (width, height) = self.block;
        bits.fill();
        let length = u32::from(self.dc.symbol(bits)?);
        self.previous = self.previous.wrapping_add(bits.value(length)?);
        let mut frequencies: Frequencies = [0.0; 65];
        frequencies[0] = self.previous as f32 * self.places[0].1;
        // The bits of all rows and columns that are needed and have anything in them.
        let mut seen = 0;
        let mut index = 1;
        while index < 64 {
            bits.fill();
            let known = self.ac.values[bits.peek(LOOKUP) as usize & ((1 << LOOKUP) - 1)];
            let value = if known != 0 {
                bits.skip(known & 0xff);
                index += (known >> 8 & 0xff) as usize;
                known as i32 >> 16
            } else {
                let symbol = self.ac.symbol(bits)?;
                let length = u32::from(symbol & 15);
                if length == 0 {
                    if symbol >> 4 < 15 {
                        break;
                    }
                    index += 16;
                    continue;
                }
                index += usize::from(symbol >> 4);
                bits.value(length)?
            };
            let Some(&(place, step)) = self.places.get(index) else { break };
            frequencies[usize::from(place)] = value as f32 * step;
            seen |= place & 63;
            index += 1;
        }
        let start = row * height * self.stride + column * width;
        let out = &mut self.pixels[start..];
        if seen == 0 {
            let value = byte(frequencies[0] / 8.0);
            (0..height).for_each(|y| out[y * self.stride..y * self.stride + width].fill(value));
            return Some(());
        }
        // A power of two above all of them.
        let bound = |bits: u8| (usize::from(bits) + 1).next_power_of_two();
        let (rows, columns) = (bound(seen >> 3), bound(seen & 7));
        let own = &self.transforms.0;
        match width {
            8 if height == 8 => match (rows, columns) {
                (1 | 2, 1 | 2) => eighth::<2, 2>(&frequencies, own, out, self.stride),
                (1 | 2, 4) => eighth::<2, 4>(&frequencies, own, out, self.stride),
                (4, 1 | 2) => eighth::<4, 2>(&frequencies, own, out, self.stride),
                (4, 4) => eighth::<4, 4>(&frequencies, own, out, self.stride),
                _ => eighth::<8, 8>(&frequencies, own, out, self.stride),
            },
            8 => inverse::<8>(&frequencies, rows, &self.transforms, height, out, self.stride),
            4 if height == 4 => quarter(&frequencies, &self.transforms.0, out, self.stride),
            4 => inverse::<4>(&frequencies, rows, &self.transforms, height, out, self.stride),
            2 => inverse::<2>(&frequencies, rows, &self.transforms, height, out, self.stride),
            _ => inverse::<1>(&frequencies, rows, &self.transforms, height, out, self.stride),
        }
        Some(())
    }
}

/// Brightness around 0 as a byte. Rounding by adding 2²³, whose last bit counts ones, does many at once where a cast would
/// do them one by one.
#[inline]
fn byte(value: f32) -> u8 {
    let value = value + 128.0;
    let value = if value > 0.0 { value } else { 0.0 };
    let value = if value < 255.0 { value } else { 255.0 };
    (value + 8_388_608.0).to_bits() as u8
}

/// Columns of frequencies to columns of pixels, then rows; `W` pixels in a row.
#[inline]
fn inverse<const W: usize>(
    frequencies: &Frequencies,
    rows: usize,
    (across, down): &([[f32; 8]; 8], [[f32; 8]; 8]),
    height: usize,
    out: &mut [u8],
    stride: usize,
) {
    for y in 0..height {
        let mut half = [0.0f32; W];
        for row in 0..rows {
            let weight = down[row][y];
            for (value, frequency) in half.iter_mut().zip(&frequencies[8 * row..]) {
                *value += weight * frequency;
            }
        }
        let mut line = [0.0f32; W];
        for (frequency, weights) in half.iter().zip(across) {
            for (value, weight) in line.iter_mut().zip(weights) {
                *value += frequency * weight;
            }
        }
        for (pixel, value) in out[y * stride..y * stride + W].iter_mut().zip(line) {
            *pixel = byte(value);
        }
    }
}

/// Blocks of 4 × 4, the most frequent ones, without a loop that depends on them: even and odd frequencies apart, as the
/// second half of the pixels mirrors the first.
#[inline]
fn quarter(frequencies: &Frequencies, transform: &[[f32; 8]; 8], out: &mut [u8], stride: usize) {
    let mut half = [[0.0f32; 4]; 4];
    for lane in 0..4 {
        let own = [frequencies[lane], frequencies[8 + lane], frequencies[16 + lane], frequencies[24 + lane]];
        let four = four(own, transform);
        for (line, value) in half.iter_mut().zip(four) {
            line[lane] = value;
        }
    }
    // The same the other way round, with lanes next to each other.
    let mut turned = [[0.0f32; 4]; 4];
    for row in 0..4 {
        for column in 0..4 {
            turned[column][row] = half[row][column];
        }
    }
    let mut pixels = [[0.0f32; 4]; 4];
    for lane in 0..4 {
        let four = four([turned[0][lane], turned[1][lane], turned[2][lane], turned[3][lane]], transform);
        for (line, value) in pixels.iter_mut().zip(four) {
            line[lane] = value;
        }
    }
    for y in 0..4 {
        let line = [byte(pixels[0][y]), byte(pixels[1][y]), byte(pixels[2][y]), byte(pixels[3][y])];
        out[y * stride..y * stride + 4].copy_from_slice(&line);
    }
}

/// Four pixels of four frequencies.
#[inline]
fn four([a, b, c, d]: [f32; 4], weights: &[[f32; 8]; 8]) -> [f32; 4] {
    let even = [weights[0][0] * a + weights[2][0] * c, weights[0][1] * a + weights[2][1] * c];
    let odd = [weights[1][0] * b + weights[3][0] * d, weights[1][1] * b + weights[3][1] * d];
    [even[0] + odd[0], even[1] + odd[1], even[1] - odd[1], even[0] - odd[0]]
}

/// Blocks of 8 × 8 with nothing beyond the first `R` rows and `C` columns of frequencies.
fn eighth<const R: usize, const C: usize>(
    frequencies: &Frequencies,
    weights: &[[f32; 8]; 8],
    out: &mut [u8],
    stride: usize,
) {
    let mut half = [[0.0f32; 8]; R];
    for (row, line) in half.iter_mut().enumerate() {
        for column in 0..C {
            for x in 0..8 {
                line[x] += frequencies[8 * row + column] * weights[column][x];
            }
        }
    }
    for y in 0..4 {
        let (mut even, mut odd) = ([0.0f32; 8], [0.0f32; 8]);
        for pair in 0..R / 2 {
            for x in 0..8 {
                even[x] += half[2 * pair][x] * weights[2 * pair][y];
                odd[x] += half[2 * pair + 1][x] * weights[2 * pair + 1][y];
            }
        }
        let mut line = [0u8; 8];
        for (x, pixel) in line.iter_mut().enumerate() {
            *pixel = byte(even[x] + odd[x]);
        }
        out[y * stride..y * stride + 8].copy_from_slice(&line);
        for (x, pixel) in line.iter_mut().enumerate() {
            *pixel = byte(even[x] - odd[x]);
        }
        out[(7 - y) * stride..(7 - y) * stride + 8].copy_from_slice(&line);
    }
}

#[derive(Clone, Copy)]
struct Component {
    id: u8,
    h: usize,
    v: usize,
    quantisation: usize,
    dc: usize,
    ac: usize,
}

struct Frame {
    width: usize,
    height: usize,
    components: Vec<Component>,
}

#[derive(Default)]
struct Header {
    frame: Option<Frame>,
    quantisation: [Option<[f32; 64]>; 4],
    dc: [Table; 4],
    ac: [Table; 4],
    restart_interval: usize,
}

/// A Huffman table that may not have been there.
#[derive(Default)]
struct Table(Option<Box<Huffman>>);

impl Table {
    fn take_ref(&self) -> Option<&Huffman> {
        self.0.as_deref()
    }
}

impl Header {
    /// The picture whose data follow in `bits`.
    fn picture(&self, bits: &mut Bits<'_>, factor: usize) -> Option<RgbPicture> {
        let frame = self.frame.as_ref()?;
        let h_max = frame.components.iter().map(|own| own.h).max()?;
        let v_max = frame.components.iter().map(|own| own.v).max()?;
        let units = (frame.width.div_ceil(8 * h_max), frame.height.div_ceil(8 * v_max));
        let plane = |component: &Component| {
            // Pixels of a block: more for colours that are subsampled, so that all planes end up equally large.
            let size = 8 / factor;
            let (x, y) = (size * h_max / component.h, size * v_max / component.v);
            if x > 8 || y > 8 || h_max % component.h != 0 || v_max % component.v != 0 {
                return None;
            }
            Some(Plane {
                block: (x, y),
                transforms: (transform(x), transform(y)),
                places: places(&self.quantisation[component.quantisation]?, (x, y)),
                dc: self.dc[component.dc].take_ref()?,
                ac: self.ac[component.ac].take_ref()?,
                stride: units.0 * component.h * x,
                pixels: vec![0; units.0 * component.h * x * units.1 * component.v * y],
                component: *component,
                previous: 0,
            })
        };
        let mut planes = frame.components.iter().map(plane).collect::<Option<Vec<_>>>()?;
        self.blocks(bits, units, &mut planes)?;
        interleaved(&planes, frame.width.div_ceil(factor), frame.height.div_ceil(factor))
    }

    /// Reads the blocks of a scan of so many units across and down.
    fn blocks(&self, bits: &mut Bits<'_>, (across, down): (usize, usize), planes: &mut [Plane<'_>]) -> Option<()> {
        let mut until_restart = self.restart_interval;
        for row in 0..down {
            for column in 0..across {
                if self.restart_interval > 0 {
                    if until_restart == 0 {
                        bits.restart()?;
                        planes.iter_mut().for_each(|plane| plane.previous = 0);
                        until_restart = self.restart_interval;
                    }
                    until_restart -= 1;
                }
                for plane in planes.iter_mut() {
                    for y in 0..plane.component.v {
                        for x in 0..plane.component.h {
                            let place = (column * plane.component.h + x, row * plane.component.v + y);
                            plane.block(bits, place)?;
                        }
                    }
                }
            }
            if bits.is_exhausted() {
                return None;
            }
        }
        Some(())
    }

    /// Reads the segments up to the scan; gives what comes behind its header.
    fn read<'b>(&mut self, bytes: &'b [u8]) -> Option<&'b [u8]> {
        let mut rest = bytes.strip_prefix(&[0xff, 0xd8])?;
        loop {
            rest = rest.strip_prefix(&[0xff])?;
            // Any number of filling bytes may come before a marker.
            while let Some(after) = rest.strip_prefix(&[0xff]) {
                rest = after;
            }
            let (&marker, after) = rest.split_first()?;
            let length = usize::from(u16::from_be_bytes([*after.first()?, *after.get(1)?]));
            let segment = after.get(2..length)?;
            rest = after.get(length..)?;
            match marker {
                // Baseline, and extended with 8 bits.
                0xc0 | 0xc1 => self.frame = Some(frame(segment)?),
                0xc4 => self.huffman(segment)?,
                0xdb => self.quantisation(segment)?,
                0xdd => self.restart_interval = usize::from(u16::from_be_bytes(segment.try_into().ok()?)),
                // Adobe's: 1 is YCbCr, others are RGB or inks.
                0xee if segment.starts_with(b"Adobe") && segment.get(11) != Some(&1) => return None,
                0xda => return self.scan(segment).map(|()| rest),
                // Progressive, lossless, arithmetic; lines counted later.
                0xc2..=0xcf | 0xdc => return None,
                _ => {}
            }
        }
    }

    fn quantisation(&mut self, mut segment: &[u8]) -> Option<()> {
        while let Some((&kind, rest)) = segment.split_first() {
            let wide = kind >> 4 == 1;
            let bytes = rest.get(..if wide { 128 } else { 64 })?;
            let value = |index: usize| match wide {
                true => f32::from(u16::from_be_bytes([bytes[2 * index], bytes[2 * index + 1]])),
                false => f32::from(bytes[index]),
            };
            *self.quantisation.get_mut(usize::from(kind & 15))? = Some(std::array::from_fn(value));
            segment = &rest[bytes.len()..];
        }
        Some(())
    }

    fn huffman(&mut self, mut segment: &[u8]) -> Option<()> {
        while let Some((&kind, rest)) = segment.split_first() {
            let counts: &[u8; 16] = rest.first_chunk()?;
            let total: usize = counts.iter().map(|&count| usize::from(count)).sum();
            let symbols = rest.get(16..16 + total)?;
            let tables = if kind >> 4 == 0 { &mut self.dc } else { &mut self.ac };
            *tables.get_mut(usize::from(kind & 15))? = Table(Some(Box::new(Huffman::new(counts, symbols)?)));
            segment = &rest[16 + total..];
        }
        Some(())
    }

    fn scan(&mut self, segment: &[u8]) -> Option<()> {
        let components = &mut self.frame.as_mut()?.components;
        let count = usize::from(*segment.first()?);
        if count != components.len() {
            return None;
        }
        for (component, choice) in components.iter_mut().zip(segment.get(1..1 + 2 * count)?.as_chunks::<2>().0) {
            if component.id != choice[0] {
                return None;
            }
            (component.dc, component.ac) = (usize::from(choice[1] >> 4), usize::from(choice[1] & 15));
            if component.dc > 3 || component.ac > 3 {
                return None;
            }
        }
        Some(())
    }
}

fn frame(segment: &[u8]) -> Option<Frame> {
    let [8, a, b, c, d, count, rest @ ..] = segment else { return None };
    let (height, width) = (usize::from(u16::from_be_bytes([*a, *b])), usize::from(u16::from_be_bytes([*c, *d])));
    let mut components = Vec::new();
    for own in rest.get(..3 * usize::from(*count))?.as_chunks::<3>().0 {
        let (h, v) = (usize::from(own[1] >> 4), usize::from(own[1] & 15));
        if !matches!(h, 1 | 2 | 4) || !matches!(v, 1 | 2 | 4) || own[2] > 3 {
            return None;
        }
        components.push(Component { id: own[0], h, v, quantisation: own[2].into(), dc: 0, ac: 0 });
    }
    // One component is never interleaved: its sampling does not count.
    if let [only] = components.as_mut_slice() {
        (only.h, only.v) = (1, 1);
    }
    let is_rgb = components.iter().map(|component| component.id).eq(*b"RGB");
    let fits = matches!(components.len(), 1 | 3) && width > 0 && height > 0 && !is_rgb;
    fits.then_some(Frame { width, height, components })
}

/// A table of codes, canonical as the standard has them.
struct Huffman {
    /// By the next bits: the code's length (0 where it is longer) and its symbol.
    lookup: [(u8, u8); 1 << LOOKUP],
    /// By the next bits, for codes of values that lie within them: the value, the zeros before it and the length of both,
    /// from the top; 64 zeros for the end of a block. 0 where more bits are needed.
    values: [u32; 1 << LOOKUP],
    /// By length: the first code that is longer, aligned to 16 bits, and what leads from a code to its symbol's place.
    ends: [(u32, i32); 17],
    symbols: Vec<u8>,
}

impl Huffman {
    fn new(counts: &[u8; 16], symbols: &[u8]) -> Option<Self> {
        let mut table = Self {
            lookup: [(0, 0); 1 << LOOKUP],
            values: [0; 1 << LOOKUP],
            ends: [(0, 0); 17],
            symbols: symbols.to_vec(),
        };
        let (mut code, mut place) = (0u32, 0usize);
        for length in 1..=16u32 {
            let count = usize::from(counts[length as usize - 1]);
            table.ends[length as usize].1 = place as i32 - code as i32;
            for _ in 0..count {
                if code >= 1 << length {
                    return None;
                }
                if length <= LOOKUP {
                    let start = (code << (LOOKUP - length)) as usize;
                    let entry = (length as u8, symbols[place]);
                    table.lookup[start..start + (1 << (LOOKUP - length))].fill(entry);
                }
                code += 1;
                place += 1;
            }
            table.ends[length as usize].0 = code << (16 - length);
            code <<= 1;
        }
        for (next, known) in table.values.iter_mut().enumerate() {
            let (code, symbol) = table.lookup[next];
            let (code, zeros, length) = (u32::from(code), u32::from(symbol >> 4), u32::from(symbol & 15));
            if code > 0 && symbol == 0 {
                *known = 64 << 8 | code;
            } else if code > 0 && length > 0 && code + length <= LOOKUP {
                let bits = (next as u32 >> (LOOKUP - code - length)) & ((1 << length) - 1);
                let value = extended(bits, length);
                *known = (value as u32) << 16 | zeros << 8 | (code + length);
            }
        }
        Some(table)
    }

    #[inline]
    fn symbol(&self, bits: &mut Bits<'_>) -> Option<u8> {
        let (length, symbol) = self.lookup[bits.peek(LOOKUP) as usize & ((1 << LOOKUP) - 1)];
        if length > 0 {
            bits.skip(u32::from(length));
            return Some(symbol);
        }
        let next = bits.peek(16);
        let length = (LOOKUP + 1..=16).find(|&length| next < self.ends[length as usize].0)?;
        let place = (next >> (16 - length)) as i32 + self.ends[length as usize].1;
        bits.skip(length);
        self.symbols.get(usize::try_from(place).ok()?).copied()
    }
}

/// A value of so many bits, as the standard extends it: the lower half is negative.
#[inline]
fn extended(bits: u32, length: u32) -> i32 {
    let value = bits as i32;
    if value < 1 << (length - 1) { value - (1 << length) + 1 } else { value }
}

/// The bits of a scan, the next one on top.
struct Bits<'b> {
    data: &'b [u8],
    at: usize,
    buffer: u64,
    count: u32,
    /// Zeros that were put behind the end of the data.
    padding: u32,
}

impl<'b> Bits<'b> {
    fn new(data: &'b [u8]) -> Self {
        Self { data, at: 0, buffer: 0, count: 0, padding: 0 }
    }

    /// At least 32 bits, enough for a code and its value.
    #[inline]
    fn fill(&mut self) {
        if self.count >= 32 {
            return;
        }
        if let Some(chunk) = self.data.get(self.at..self.at + 8) {
            let word = chunk.iter().fold(0u64, |word, &byte| word << 8 | u64::from(byte));
            let inverted = !word;
            let has_marker = inverted.wrapping_sub(0x0101_0101_0101_0101) & word & 0x8080_8080_8080_8080;
            if has_marker == 0 {
                // Bits beyond the bytes that count are the next ones all the same: they are put in place again later.
                self.buffer |= word >> self.count;
                let bytes = (63 - self.count) >> 3;
                self.at += bytes as usize;
                self.count += 8 * bytes;
                return;
            }
        }
        self.fill_slowly();
    }

    #[cold]
    fn fill_slowly(&mut self) {
        // What the fast way left beyond the counted bits would not fit bytes that are skipped.
        if self.count > 0 {
            self.buffer &= u64::MAX << (64 - self.count);
        } else {
            self.buffer = 0;
        }
        while self.count <= 56 {
            let byte = match (self.data.get(self.at), self.data.get(self.at + 1)) {
                (Some(0xff), Some(0)) => {
                    self.at += 2;
                    0xff
                }
                (Some(0xff), _) | (None, _) => {
                    self.padding += 8;
                    0
                }
                (Some(&byte), _) => {
                    self.at += 1;
                    byte
                }
            };
            self.buffer |= u64::from(byte) << (56 - self.count);
            self.count += 8;
        }
    }

    #[inline]
    fn peek(&self, count: u32) -> u32 {
        (self.buffer >> (64 - count)) as u32
    }

    #[inline]
    fn skip(&mut self, count: u32) {
        self.buffer <<= count;
        self.count -= count;
    }

    /// A value of so many bits.
    #[inline]
    fn value(&mut self, length: u32) -> Option<i32> {
        if length == 0 {
            return Some(0);
        }
        if length > 15 {
            return None;
        }
        let value = extended(self.peek(length), length);
        self.skip(length);
        Some(value)
    }

    /// Whether more was read than there is.
    fn is_exhausted(&self) -> bool {
        self.count < self.padding
    }

    /// The next restart marker.
    fn restart(&mut self) -> Option<()> {
        // Whole bytes that were read ahead are behind the marker only if they are padding.
        if self.is_exhausted() || (self.count - self.padding) >= 8 {
            return None;
        }
        match (self.data.get(self.at), self.data.get(self.at + 1)) {
            (Some(0xff), Some(0xd0..=0xd7)) => {
                *self = Self { at: self.at + 2, ..Self::new(self.data) };
                Some(())
            }
            // Another marker where more blocks are due.
            (Some(0xff), Some(1..)) | (None, _) => {
                self.padding = self.count + 1;
                None
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;

    fn golden(name: &str) -> PathBuf {
        [env!("CARGO_MANIFEST_DIR"), "tests/golden/jpeg", name].iter().collect()
    }

    /// Largest and mean difference to a golden picture.
    fn apart(picture: &RgbPicture, name: &str) -> (u8, f64) {
        let expected = image::open(golden(name)).unwrap().into_rgb8();
        assert_eq!(
            (expected.width() as usize, expected.height() as usize),
            (picture.width(), picture.height()),
            "{name}"
        );
        let pairs = || picture.data().iter().zip(expected.as_raw()).map(|(a, b)| a.abs_diff(*b));
        (pairs().max().unwrap(), pairs().map(f64::from).sum::<f64>() / picture.data().len() as f64)
    }

    #[test]
    fn reduced_pictures_are_libjpegs() {
        for name in ["444", "422", "420", "grey", "restart", "optimised"] {
            let bytes = std::fs::read(golden(&format!("{name}.jpg"))).unwrap();
            for factor in [1, 2, 4, 8] {
                let Some(picture) = decode(&bytes, factor).unwrap() else {
                    assert!(factor == 1 && !["444", "grey"].contains(&name), "{name} {factor}");
                    continue;
                };
                // At full size there is one right answer, up to libjpeg's rounding. Below, libjpeg averages the pixels of the
                // full size, where this takes the lower frequencies alone: the same but for the sharpness.
                let (most, mean) = apart(&picture, &format!("{name}-{factor}.png"));
                let limits = [(1, 3, 0.5), (2, 6, 1.0), (4, 12, 2.5), (8, 12, 3.0)];
                let (_, highest, average) = limits[factor.ilog2() as usize];
                // Of 4:2:2 libjpeg takes colours at half the width and interpolates them; see below.
                if name == "422" {
                    continue;
                }
                assert!(most <= highest && mean < average, "{name} at 1/{factor}: {most}, {mean:.3}");
            }
        }
    }

    /// Colours of 4:2:2 against libjpeg's full size, averaged.
    #[test]
    fn colours_at_half_the_width_are_those_of_the_full_size() {
        let bytes = std::fs::read(golden("422.jpg")).unwrap();
        let full = image::open(golden("422-1.png")).unwrap().into_rgb8();
        for factor in [2, 4, 8usize] {
            let picture = decode(&bytes, factor).unwrap().unwrap();
            let (width, height) = (150 / factor, 117 / factor);
            let mut sum = 0.0;
            for (y, x, channel) in (0..height).flat_map(|y| (0..3 * width).map(move |x| (y, x / 3, x % 3))) {
                let places = (0..factor * factor).map(|at| (x * factor + at % factor, y * factor + at / factor));
                let own = |(x, y): (usize, usize)| f64::from(full.get_pixel(x as u32, y as u32).0[channel]);
                let mean = places.map(own).sum::<f64>() / (factor * factor) as f64;
                sum += (mean - f64::from(picture.data()[3 * (y * picture.width() + x) + channel])).abs();
            }
            let mean = sum / (3 * width * height) as f64;
            assert!(mean < 3.0, "1/{factor}: {mean:.3}");
        }
    }

    #[test]
    fn other_forms_are_left_to_the_general_decoder() {
        for name in ["progressive.jpg", "cmyk.jpg"] {
            assert!(decode(&std::fs::read(golden(name)).unwrap(), 2).unwrap().is_none(), "{name}");
        }
        let path = golden("cmyk.jpg");
        let bytes = std::fs::read(&path).unwrap();
        let decoded = super::super::decode_bytes(path.as_ref(), &bytes, [0; 3], None).unwrap().picture;
        let (most, mean) = apart(&decoded, "cmyk-1.png");
        assert!(most <= 4 && mean < 1.0, "inks: {most}, {mean:.3}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn damage_never_panics_and_a_cut_is_noticed(
            which in 0usize..6, at in 0usize..6000, byte: u8, cut in 0usize..6000, factor in 1u32..4,
        ) {
            let name = ["444", "422", "420", "grey", "restart", "optimised"][which];
            let whole = std::fs::read(golden(&format!("{name}.jpg"))).unwrap();
            let mut damaged = whole.clone();
            let place = at % damaged.len();
            damaged[place] = byte;
            let _ = decode(&damaged, 1 << factor);
            let cut = cut % (whole.len() - 40);
            prop_assert!(!matches!(decode(&whole[..cut], 1 << factor), Ok(Some(_))));
        }
    }
}
