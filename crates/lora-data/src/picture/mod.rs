//! Decoding: any picture file to upright 8-bit sRGB. Cutting and scaling live in [`crate::crop`].

mod complete;
mod jpeg;

use std::io::{BufRead, Cursor, Seek};
use std::path::Path;
use std::sync::Mutex;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use crate::crop::CropPlan;
use crate::guard::guarded;
use crate::sample::Mask;
use crate::{Error, Result};

/// The most pixels a side may have, and the most memory a decoder may take: beyond any camera, far below any bomb.
const MAX_SIDE: u32 = 65_535;
const MAX_DECODED_BYTES: u64 = 2 << 30;

/// Files larger than this are no pictures for training.
pub(crate) const MAX_FILE_BYTES: u64 = 1 << 30;

/// Pictures of more pixels are decoded one at a time, so that several threads together stay within bounds.
const LARGE: u64 = 50_000_000;
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// An upright sRGB picture with 8 bits a channel.
#[derive(Clone, PartialEq, Eq)]
pub struct RgbPicture {
    width: usize,
    height: usize,
    data: Vec<u8>,
}

impl std::fmt::Debug for RgbPicture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RgbPicture({}×{})", self.width, self.height)
    }
}

impl RgbPicture {
    /// From interleaved RGB bytes, row by row; `None` where their number does not fit the size.
    pub fn new(width: usize, height: usize, data: Vec<u8>) -> Option<Self> {
        (width > 0 && height > 0 && width.checked_mul(height)?.checked_mul(3)? == data.len()).then_some(Self {
            width,
            height,
            data,
        })
    }

    /// Pixels in a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Interleaved RGB bytes.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// Decodes the bytes of a picture file by their content: upright, in sRGB, transparency laid over `background`. `name` is for
    /// errors. Where a smaller picture will do, of at least the sides `enough`, a JPEG is decoded at a fraction of its size.
    ///
    /// # Errors
    /// [`Error::Picture`] where the bytes are no picture that can be decoded.
    pub fn decode(name: &Path, bytes: &[u8], background: [u8; 3], enough: Option<(usize, usize)>) -> Result<Self> {
        decode_bytes(name, bytes, background, enough).map(|decoded| decoded.picture)
    }

    /// The whole picture with its longer side at most `longest` pixels, in its aspect.
    ///
    /// # Errors
    /// [`Error::Option`] where the picture cannot be scaled.
    pub fn scaled_to(&self, longest: usize) -> Result<Self> {
        let side = |side: usize| (side * longest / self.width.max(self.height).max(longest)).max(1);
        CropPlan::squash((side(self.width), side(self.height))).apply(self)
    }

    /// As the bytes of a JPEG file, of a quality from 1 to 100. Sides above 65,535 pixels, which JPEG cannot have, give none.
    pub fn to_jpeg(&self, quality: u8) -> Vec<u8> {
        let mut bytes = Vec::new();
        let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, quality);
        let (width, height) = (self.width as u32, self.height as u32);
        // Writing into memory fails for no picture that was decoded.
        match image::ImageEncoder::write_image(encoder, &self.data, width, height, image::ExtendedColorType::Rgb8) {
            Ok(()) => bytes,
            Err(_) => Vec::new(),
        }
    }

    pub(crate) fn data_mut(&mut self) -> &mut [u8] {
        &mut self.data
    }

    /// As `[3, height, width]`, row-major, red first, in [-1, 1]: what Stable Diffusion's autoencoder takes.
    pub fn to_planar(&self) -> Vec<f32> {
        let pixels = self.width * self.height;
        let mut planes = vec![0.0; 3 * pixels];
        for (index, pixel) in self.data.as_chunks::<3>().0.iter().enumerate() {
            for (channel, &value) in pixel.iter().enumerate() {
                planes[channel * pixels + index] = f32::from(value) / 127.5 - 1.0;
            }
        }
        planes
    }

    /// The reverse of [`Self::to_planar`]: clamps, rounds; `None` where the number of values does not fit.
    pub fn from_planar(width: usize, height: usize, planes: &[f32]) -> Option<Self> {
        let pixels = width.checked_mul(height)?;
        if planes.len() != pixels.checked_mul(3)? {
            return None;
        }
        let byte = |value: f32| ((value + 1.0) * 127.5).round().clamp(0.0, 255.0) as u8;
        let data = (0..3 * pixels).map(|index| byte(planes[index % 3 * pixels + index / 3])).collect();
        Self::new(width, height, data)
    }
}

/// A decoded picture with its transparency, where it has one.
pub(crate) struct Decoded {
    pub(crate) picture: RgbPicture,
    /// 255 where opaque.
    pub(crate) alpha: Option<Mask>,
}

/// What a picture's header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// Width and height as seen (EXIF orientation applied).
    pub(crate) size: (usize, usize),
    /// Extensions of its format, the usual one first.
    pub(crate) extensions: &'static [&'static str],
}

/// The bytes of a picture file.
pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>> {
    let length = std::fs::metadata(path).map_err(Error::io(path, "open"))?.len();
    if length > MAX_FILE_BYTES {
        return Err(Error::picture(path, format!("{length} bytes are more than any picture for training has")));
    }
    std::fs::read(path).map_err(Error::io(path, "read"))
}

/// Decodes a picture by its content: EXIF orientation applied, a colour profile converted to sRGB, grey and 16-bit pictures
/// brought to 8-bit RGB, transparency laid over `background`. `name` is for errors. Where a smaller picture will do, of at least
/// the sides `enough`, a JPEG is decoded at a half, a quarter or an eighth of its size.
pub(crate) fn decode_bytes(
    name: &Path,
    bytes: &[u8],
    background: [u8; 3],
    enough: Option<(usize, usize)>,
) -> Result<Decoded> {
    guarded(
        || gave_up(name),
        || {
            let failed = |error: image::ImageError| Error::picture(name, error.to_string());
            let reader = reader(name, Cursor::new(bytes))?;
            let is_jpeg = reader.format() == Some(ImageFormat::Jpeg);
            let mut decoder = reader.into_decoder().map_err(failed)?;
            let (width, height) = decoder.dimensions();
            let _turn = (u64::from(width) * u64::from(height) > LARGE)
                .then(|| ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
            let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
            let profile = decoder.icc_profile().unwrap_or_default();
            let cut_short = |error: complete::CutShort| Error::picture(name, error.to_string());
            if is_jpeg {
                complete::check_end(bytes).map_err(cut_short)?;
            }
            let factor = enough.filter(|_| is_jpeg).and_then(|(across, down)| {
                // A quarter turn swaps the sides.
                let (across, down) = if is_turned(orientation) { (down, across) } else { (across, down) };
                let bytes_at = |factor: usize| 6 * (width as u64 * height as u64) / (factor * factor) as u64;
                let fits = |&factor: &usize| {
                    let large = width as usize / factor >= across && height as usize / factor >= down;
                    large && bytes_at(factor) <= MAX_DECODED_BYTES
                };
                [8, 4, 2].into_iter().find(fits)
            });
            let reduced = match factor {
                Some(factor) => jpeg::decode(bytes, factor).map_err(cut_short)?,
                None => None,
            };
            let reduced = reduced.and_then(|own| {
                let (width, height) = (own.width as u32, own.height as u32);
                image::RgbImage::from_raw(width, height, own.data).map(DynamicImage::ImageRgb8)
            });
            let mut picture = match reduced {
                Some(picture) => picture,
                None => {
                    if is_jpeg {
                        complete::check_data(bytes).map_err(cut_short)?;
                    }
                    DynamicImage::from_decoder(decoder).map_err(failed)?
                }
            };
            picture.apply_orientation(orientation);
            let (width, height) = (picture.width() as usize, picture.height() as usize);
            let (data, alpha) = match picture.color().has_alpha() {
                false => {
                    let mut rgb = picture.into_rgb8().into_raw();
                    to_srgb(profile.as_deref(), moxcms::Layout::Rgb, &mut rgb);
                    (rgb, None)
                }
                true => {
                    let mut rgba = picture.into_rgba8().into_raw();
                    to_srgb(profile.as_deref(), moxcms::Layout::Rgba, &mut rgba);
                    let pixels = rgba.as_chunks::<4>().0;
                    let mut data = vec![0; 3 * pixels.len()];
                    for (out, &[red, green, blue, alpha]) in data.as_chunks_mut::<3>().0.iter_mut().zip(pixels) {
                        let over = |value: u8, under: u8| {
                            let (alpha, value, under) = (u32::from(alpha), u32::from(value), u32::from(under));
                            ((value * alpha + under * (255 - alpha) + 127) / 255) as u8
                        };
                        *out = [over(red, background[0]), over(green, background[1]), over(blue, background[2])];
                    }
                    (data, Mask::new(width, height, pixels.iter().map(|pixel| pixel[3]).collect()))
                }
            };
            let picture =
                RgbPicture::new(width, height, data).ok_or_else(|| Error::picture(name, "it has no pixels"))?;
            Ok(Decoded { picture, alpha })
        },
    )
}

/// The header of a picture; `name` is for errors.
pub(crate) fn header(name: &Path, source: impl BufRead + Seek) -> Result<Header> {
    guarded(
        || gave_up(name),
        || {
            let reader = reader(name, source)?;
            let extensions = reader.format().map_or(&[] as &[&str], ImageFormat::extensions_str);
            let mut decoder = reader.into_decoder().map_err(|error| Error::picture(name, error.to_string()))?;
            let (width, height) = decoder.dimensions();
            let turned = decoder.orientation().is_ok_and(is_turned);
            let (width, height) = (width as usize, height as usize);
            if width == 0 || height == 0 {
                return Err(Error::picture(name, "it has no pixels"));
            }
            Ok(Header { size: if turned { (height, width) } else { (width, height) }, extensions })
        },
    )
}

/// Whether width and height are exchanged.
fn is_turned(orientation: Orientation) -> bool {
    use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    matches!(orientation, Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH)
}

fn reader<R: BufRead + Seek>(name: &Path, mut source: R) -> Result<ImageReader<R>> {
    if source.fill_buf().map_err(Error::io(name, "read"))?.is_empty() {
        return Err(Error::picture(name, "the file is empty"));
    }
    let mut reader = ImageReader::new(source).with_guessed_format().map_err(Error::io(name, "read"))?;
    if reader.format().is_none() {
        return Err(Error::picture(name, "its content is none of JPEG, PNG, WebP, BMP, GIF and TIFF"));
    }
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_DECODED_BYTES);
    reader.limits(limits);
    Ok(reader)
}

fn gave_up(path: &Path) -> Error {
    Error::picture(path, "the decoder gave up on damaged data")
}

/// Converts bytes from an embedded RGB profile; a profile that cannot be used leaves them as they are, as every viewer
/// does.
fn to_srgb(profile: Option<&[u8]>, layout: moxcms::Layout, bytes: &mut Vec<u8>) {
    use moxcms::{ColorProfile, DataColorSpace, TransformOptions};
    let Some(Ok(source)) = profile.map(ColorProfile::new_from_slice) else { return };
    if source.color_space != DataColorSpace::Rgb {
        return;
    }
    let target = ColorProfile::new_srgb();
    let Ok(transform) = source.create_transform_8bit(layout, &target, layout, TransformOptions::default()) else {
        return;
    };
    let mut converted = vec![0; bytes.len()];
    if transform.transform(bytes, &mut converted).is_ok() {
        *bytes = converted;
    }
}

#[cfg(test)]
mod tests {
    use image::{ImageFormat, Rgb, RgbImage, Rgba, RgbaImage};

    use super::*;

    fn saved(picture: &DynamicImage, name: &str, format: ImageFormat) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        picture.save_with_format(&path, format).unwrap();
        (folder, path)
    }

    fn decode(path: impl AsRef<Path>, background: [u8; 3]) -> Result<RgbPicture> {
        Ok(decode_bytes(path.as_ref(), &read_file(path.as_ref())?, background, None)?.picture)
    }

    fn dimensions(path: impl AsRef<Path>) -> Result<(usize, usize)> {
        Ok(header(path.as_ref(), Cursor::new(read_file(path.as_ref())?))?.size)
    }

    #[test]
    fn every_kind_of_pixel_becomes_rgb() {
        let rgb = RgbImage::from_fn(5, 3, |x, y| Rgb([40 * x as u8, 80 * y as u8, 7]));
        let whole = DynamicImage::ImageRgb8(rgb);
        for (picture, name) in [
            (whole.clone(), "rgb.png"),
            (DynamicImage::ImageRgb16(whole.to_rgb16()), "rgb16.png"),
            (DynamicImage::ImageRgba8(whole.to_rgba8()), "rgba.png"),
        ] {
            let (_folder, path) = saved(&picture, name, ImageFormat::Png);
            let decoded = decode(&path, [255; 3]).unwrap();
            assert_eq!(decoded.data(), whole.as_bytes(), "{name}");
            assert_eq!(dimensions(&path).unwrap(), (5, 3));
        }
        let (_folder, path) = saved(&DynamicImage::ImageLuma8(whole.to_luma8()), "grey.webp", ImageFormat::WebP);
        assert_eq!(
            decode(&path, [0; 3]).unwrap().data()[..3].iter().min(),
            decode(&path, [0; 3]).unwrap().data()[..3].iter().max()
        );
    }

    #[test]
    fn transparency_lies_over_the_background() {
        let picture = RgbaImage::from_fn(2, 1, |x, _| Rgba([255, 0, 0, if x == 0 { 0 } else { 128 }]));
        let (_folder, path) = saved(&DynamicImage::ImageRgba8(picture), "a.png", ImageFormat::Png);
        assert_eq!(decode(&path, [255; 3]).unwrap().data(), [255, 255, 255, 255, 127, 127]);
        assert_eq!(decode(&path, [0, 0, 255]).unwrap().data()[..3], [0, 0, 255]);
    }

    #[test]
    fn exif_orientation_is_applied() {
        // A JPEG with an EXIF segment that says "rotate by 90 degrees" behind the start marker.
        let mut jpeg = Vec::new();
        let picture = RgbImage::from_fn(32, 16, |x, _| if x < 16 { Rgb([255, 0, 0]) } else { Rgb([0, 0, 255]) });
        picture.write_to(&mut std::io::Cursor::new(&mut jpeg), ImageFormat::Jpeg).unwrap();
        let tiff = [b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0".as_slice()].concat();
        let mut segment = vec![0xff, 0xe1];
        segment.extend_from_slice(&((tiff.len() + 8) as u16).to_be_bytes());
        segment.extend_from_slice(b"Exif\0\0");
        segment.extend_from_slice(&tiff);
        jpeg.splice(2..2, segment);
        let folder = tempfile::tempdir().unwrap();
        // The content decides, not the extension.
        let path = folder.path().join("photo.png");
        std::fs::write(&path, &jpeg).unwrap();
        assert_eq!(dimensions(&path).unwrap(), (16, 32));
        let decoded = decode(&path, [255; 3]).unwrap();
        assert_eq!((decoded.width(), decoded.height()), (16, 32));
        assert!(decoded.data()[0] > 200, "the left side comes to the top");
        assert!(decoded.data()[decoded.data().len() - 1] > 200);
    }

    #[test]
    fn damaged_files_are_named() {
        let noisy = RgbImage::from_fn(40, 40, |x, y| Rgb([(x * 37 + y * 91) as u8, (x * y) as u8, (x ^ y) as u8]));
        for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP] {
            let (_folder, path) = saved(&DynamicImage::ImageRgb8(noisy.clone()), "broken.bin", format);
            let whole = std::fs::read(&path).unwrap();
            for length in [0, 1, 10, whole.len() / 4] {
                std::fs::write(&path, &whole[..length]).unwrap();
                let error = decode(&path, [0; 3]).expect_err("cut short").to_string();
                assert!(error.contains("broken.bin"), "{error}");
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notes.jpg");
        std::fs::write(&path, "this is text").unwrap();
        assert!(decode(&path, [0; 3]).unwrap_err().to_string().contains("none of JPEG"));
    }

    #[test]
    fn an_absurd_size_is_refused_before_memory_is_taken() {
        let (_folder, path) = saved(&DynamicImage::new_rgb8(1, 1), "bomb.bmp", ImageFormat::Bmp);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[18..22].copy_from_slice(&60_000u32.to_le_bytes());
        bytes[22..26].copy_from_slice(&60_000u32.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        assert!(decode(&path, [0; 3]).unwrap_err().to_string().contains("bomb.bmp"));
    }

    #[test]
    fn planar_form_round_trips() {
        let picture = RgbPicture::new(2, 2, (0..12).map(|value| value * 20).collect()).unwrap();
        let planes = picture.to_planar();
        assert_eq!(planes[0], -1.0);
        assert_eq!(RgbPicture::from_planar(2, 2, &planes).unwrap(), picture);
        assert!(RgbPicture::new(2, 2, vec![0; 11]).is_none());
        assert!(RgbPicture::from_planar(2, 2, &planes[1..]).is_none());
    }
}
