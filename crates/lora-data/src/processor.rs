//! What happens to a picture between decoding and training: processors by name. A user's crate registers its own and
//! names it in the config.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use lora_core::random::Stream;

use crate::crop::CropPlan;
use crate::focus::focus;
use crate::sample::Sample;
use crate::{Error, Result};

/// What a processor knows besides the picture.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ProcessContext {
    /// Width and height of the picture as it was decoded, which may be at a fraction of the file's size.
    pub source: (usize, usize),
    /// How that is scaled and cut to the size that training wants.
    pub plan: CropPlan,
    /// Random numbers that belong to this visit or variation of the item, whatever the order of processing.
    pub random: Stream,
    /// Which variation of the picture is wanted, from 0, where several are kept of it. A processor takes the remainder
    /// by the number of its own outcomes: those of the processors before it are divided out.
    pub variation: Option<usize>,
}

impl ProcessContext {
    /// The plan for a sample that other processors may have given another size.
    fn plan_of(&self, sample: &Sample) -> CropPlan {
        if sample.size() == self.source { self.plan } else { CropPlan::center(sample.size(), self.plan.target) }
    }
}

/// One step on the way of a picture.
pub trait PictureProcessor: fmt::Debug + Send + Sync {
    /// The processed sample. After the last processor its picture must have the size of the plan's target; its mask,
    /// where there is one, always has the picture's ([`Sample::crop`], [`Sample::mirror`] and [`Sample::map`] see to
    /// it).
    ///
    /// # Errors
    /// The processor's own. A run ends with it; [`Error::Picture`] names the file where one picture is to blame.
    fn process(&self, sample: Sample, context: &ProcessContext) -> Result<Sample>;

    /// Whether it does something else at each visit. Where latents are cached, it acts once for each variation that is
    /// kept.
    fn is_random(&self) -> bool {
        false
    }

    /// How many different results it has for a picture; `None` where there are too many to keep all of them. Of `flip`,
    /// which has two, the variations of a picture are one and the other by turns ([`ProcessContext::variation`]).
    fn outcomes(&self) -> Option<usize> {
        (!self.is_random()).then_some(1)
    }

    /// Whether it does as well with a picture that was decoded at a fraction of its size (still more than half as large
    /// again as what it becomes). Only the first processor is asked.
    fn accepts_reduced(&self) -> bool {
        false
    }

    /// What its result depends on besides the picture: cached latents are kept apart by it. By default all its fields;
    /// a processor whose code changes should name a version here.
    fn settings(&self) -> String {
        format!("{self:?}")
    }
}

/// Which part of a picture is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crop {
    /// `center_crop`: the middle.
    Center,
    /// `top_left_crop`: the top left corner.
    TopLeft,
    /// `random_crop`: any part, another at each visit.
    Random,
    /// `focus_crop`: the most salient part.
    Focus,
    /// `no_crop`: all of it, squashed or stretched where the aspect differs.
    None,
}

impl PictureProcessor for Crop {
    fn process(&self, sample: Sample, context: &ProcessContext) -> Result<Sample> {
        let plan = context.plan_of(&sample);
        let room = (plan.resized.0 - plan.target.0, plan.resized.1 - plan.target.1);
        let plan = match self {
            Crop::Center => plan,
            Crop::TopLeft => CropPlan { offset: (0, 0), ..plan },
            Crop::Random => {
                let mut random = context.random.at("crop");
                let mut below = |room: usize| random.below(room as u64 + 1) as usize;
                CropPlan { offset: (below(room.0), below(room.1)), ..plan }
            }
            Crop::Focus => focus(&sample.picture, &plan),
            Crop::None => CropPlan::squash(plan.target),
        };
        sample.crop(&plan)
    }

    fn is_random(&self) -> bool {
        *self == Crop::Random
    }

    fn accepts_reduced(&self) -> bool {
        true
    }
}

/// The end of a chain of which what is random was left out: the middle is cut where none of the others brought the
/// picture to its size.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fit;

impl PictureProcessor for Fit {
    fn process(&self, sample: Sample, context: &ProcessContext) -> Result<Sample> {
        if sample.size() == context.plan.target && sample.size() != context.source {
            return Ok(sample);
        }
        Crop::Center.process(sample, context)
    }

    fn accepts_reduced(&self) -> bool {
        true
    }
}

/// `flip`: mirrored left to right at every second visit, by chance, or every second variation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flip;

impl PictureProcessor for Flip {
    fn process(&self, sample: Sample, context: &ProcessContext) -> Result<Sample> {
        let mirrored = match context.variation {
            Some(variation) => variation % 2 == 1,
            None => context.random.at("flip").below(2) == 1,
        };
        Ok(if mirrored { sample.mirror() } else { sample })
    }

    fn is_random(&self) -> bool {
        true
    }

    fn outcomes(&self) -> Option<usize> {
        Some(2)
    }
}

/// `color_jitter`: brightness, contrast and saturation multiplied by up to 1 ± their amount and the hue turned by up to
/// its share of the circle, in this order, another at each visit. The four operations are torchvision's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ColorJitter {
    /// Amount of brightness.
    pub brightness: f32,
    /// Amount of contrast.
    pub contrast: f32,
    /// Amount of saturation.
    pub saturation: f32,
    /// Share of the colour circle, at most 0.5.
    pub hue: f32,
}

impl Default for ColorJitter {
    /// Small: what another camera or lamp would do.
    fn default() -> Self {
        Self { brightness: 0.1, contrast: 0.1, saturation: 0.1, hue: 0.02 }
    }
}

impl PictureProcessor for ColorJitter {
    fn process(&self, sample: Sample, context: &ProcessContext) -> Result<Sample> {
        let mut random = context.random.at("color_jitter");
        let mut around = |middle: f32, amount: f32| middle + amount * (2.0 * random.uniform() - 1.0);
        let (brightness, contrast) = (around(1.0, self.brightness), around(1.0, self.contrast));
        let (saturation, turn) = (around(1.0, self.saturation), around(0.0, self.hue));
        let grey = |[red, green, blue]: [f32; 3]| 0.2989 * red + 0.587 * green + 0.114 * blue;
        let brighter = |pixel: [u8; 3]| pixel.map(|value| (brightness * f32::from(value)).clamp(0.0, 255.0));
        let pixels = sample.picture.data().as_chunks::<3>().0;
        let sum: f64 = pixels.iter().map(|&pixel| f64::from(grey(brighter(pixel)))).sum();
        let mean = (sum / pixels.len() as f64) as f32;
        let blend = |value: f32, other: f32, factor: f32| (factor * value + (1.0 - factor) * other).clamp(0.0, 255.0);
        Ok(sample.map(|pixel| {
            let pixel = brighter(pixel).map(|value| blend(value, mean, contrast));
            let own = grey(pixel);
            turned(pixel.map(|value| blend(value, own, saturation)), turn).map(|value| value.round() as u8)
        }))
    }

    fn is_random(&self) -> bool {
        true
    }
}

/// A colour with its hue turned by a share of the circle; value and saturation of HSV stay.
fn turned(pixel: [f32; 3], turn: f32) -> [f32; 3] {
    let [red, green, blue] = pixel;
    let most = red.max(green).max(blue);
    let range = most - red.min(green).min(blue);
    if range <= 0.0 || turn == 0.0 {
        return pixel;
    }
    let sextant = if most == red {
        (green - blue) / range
    } else if most == green {
        2.0 + (blue - red) / range
    } else {
        4.0 + (red - green) / range
    };
    let hue = (sextant + 6.0 * turn).rem_euclid(6.0);
    // Each channel is a trapezium of the hue.
    [5.0, 3.0, 1.0].map(|shift: f32| {
        let place = (shift + hue).rem_euclid(6.0);
        most - range * place.min(4.0 - place).clamp(0.0, 1.0)
    })
}

/// Processors by name.
#[derive(Debug, Clone)]
pub struct ProcessorRegistry(BTreeMap<String, Arc<dyn PictureProcessor>>);

impl Default for ProcessorRegistry {
    /// This crate's processors.
    fn default() -> Self {
        let ours: [(&str, Arc<dyn PictureProcessor>); 7] = [
            ("center_crop", Arc::new(Crop::Center)),
            ("top_left_crop", Arc::new(Crop::TopLeft)),
            ("random_crop", Arc::new(Crop::Random)),
            ("focus_crop", Arc::new(Crop::Focus)),
            ("no_crop", Arc::new(Crop::None)),
            ("flip", Arc::new(Flip)),
            ("color_jitter", Arc::new(ColorJitter::default())),
        ];
        Self(ours.map(|(name, processor)| (name.to_owned(), processor)).into())
    }
}

impl ProcessorRegistry {
    /// Adds a processor under a name, which must be free.
    ///
    /// # Errors
    /// [`Error::Option`] where it is not free.
    pub fn register(&mut self, name: impl Into<String>, processor: impl PictureProcessor + 'static) -> Result<()> {
        let name = name.into();
        if self.0.contains_key(&name) {
            return Err(Error::Option {
                key: "processors",
                value: name,
                reason: "a processor of this name is registered already".into(),
            });
        }
        self.0.insert(name, Arc::new(processor));
        Ok(())
    }

    /// The processors of a list of names, in its order.
    ///
    /// # Errors
    /// [`Error::Option`] for an unknown name, with those that are known.
    pub fn chain<S: AsRef<str>>(&self, names: &[S]) -> Result<Vec<Arc<dyn PictureProcessor>>> {
        let find = |name: &S| {
            self.0.get(name.as_ref()).cloned().ok_or_else(|| Error::Option {
                key: "processors",
                value: name.as_ref().to_owned(),
                reason: format!(
                    "no processor has this name; known are {}",
                    self.0.keys().cloned().collect::<Vec<_>>().join(", ")
                ),
            })
        };
        names.iter().map(find).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RgbPicture;

    #[derive(Debug)]
    struct Invert;

    impl PictureProcessor for Invert {
        fn process(&self, sample: Sample, _context: &ProcessContext) -> Result<Sample> {
            Ok(sample.map(|pixel| pixel.map(|value| 255 - value)))
        }
    }

    fn context(source: (usize, usize), target: (usize, usize), seed: u64) -> ProcessContext {
        ProcessContext { source, plan: CropPlan::center(source, target), random: Stream::new(seed), variation: None }
    }

    fn sample(width: usize, height: usize, data: Vec<u8>) -> Sample {
        Sample::new(RgbPicture::new(width, height, data).unwrap(), None).unwrap()
    }

    /// A picture of six columns, each of its own value.
    fn columns() -> Sample {
        sample(6, 2, [0u8, 1, 2, 3, 4, 5].map(|value| [value; 3]).concat().repeat(2))
    }

    fn first(processor: &dyn PictureProcessor, context: &ProcessContext) -> u8 {
        processor.process(columns(), context).unwrap().picture.data()[0]
    }

    #[test]
    fn crops_keep_the_part_that_they_say() {
        let cut = |crop: Crop, seed| first(&crop, &context((6, 2), (2, 2), seed));
        assert_eq!((cut(Crop::Center, 0), cut(Crop::TopLeft, 0)), (2, 0));
        let mut seen: Vec<u8> = (0..100).map(|seed| cut(Crop::Random, seed)).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, [0, 1, 2, 3, 4], "every place, and none outside");
        let whole = Crop::None.process(columns(), &context((6, 2), (2, 2), 0)).unwrap();
        assert!(whole.picture.data()[0] <= 1 && whole.picture.data()[3] >= 4, "{:?}", whole.picture.data());
    }

    #[test]
    fn about_half_are_mirrored() {
        let first = |seed| first(&Flip, &context((6, 2), (6, 2), seed));
        let mirrored = (0..200).filter(|&seed| first(seed) == 5).count();
        assert!((70..130).contains(&mirrored) && (0..200).all(|seed| matches!(first(seed), 0 | 5)), "{mirrored}");
    }

    #[test]
    fn colours_jitter_within_their_amounts() {
        let picture = || sample(2, 1, vec![150, 100, 50, 20, 90, 120]);
        let run = |jitter: ColorJitter, seed| {
            jitter.process(picture(), &context((2, 1), (2, 1), seed)).unwrap().picture.data().to_vec()
        };
        let none = ColorJitter { brightness: 0.0, contrast: 0.0, saturation: 0.0, hue: 0.0 };
        assert_eq!(run(none, 1), picture().picture.data());
        for seed in 0..50 {
            let brighter = run(ColorJitter { brightness: 0.5, ..none }, seed);
            let factor = f32::from(brighter[0]) / 150.0;
            assert!((0.5..=1.5).contains(&factor) && (f32::from(brighter[1]) - 100.0 * factor).abs() < 1.1);
            // A turned hue keeps the largest and the smallest of the three.
            let turned = run(ColorJitter { hue: 0.5, ..none }, seed);
            let ends = |pixel: &[u8]| (pixel.iter().min().copied(), pixel.iter().max().copied());
            assert_eq!((ends(&turned[..3]), ends(&turned[3..])), ((Some(50), Some(150)), (Some(20), Some(120))));
        }
        assert_eq!(
            turned([200.0, 100.0, 50.0], 1.0 / 3.0).map(f32::round),
            [50.0, 200.0, 100.0],
            "a third of the circle"
        );
    }

    #[test]
    fn a_picture_of_another_size_than_decoded_is_not_squashed() {
        assert_eq!(first(&Crop::Center, &context((600, 200), (2, 2), 0)), 2);
    }

    #[test]
    fn outsiders_register_and_chain() {
        let mut registry = ProcessorRegistry::default();
        registry.register("invert", Invert).unwrap();
        assert!(registry.register("invert", Invert).is_err());
        assert!(registry.chain(&["nothing"]).unwrap_err().to_string().contains("flip, focus_crop, invert"));
        let context = context((4, 2), (2, 2), 0);
        let result = registry
            .chain(&["invert", "center_crop"])
            .unwrap()
            .iter()
            .try_fold(sample(4, 2, vec![10; 24]), |sample, step| step.process(sample, &context));
        assert_eq!(result.unwrap().picture, RgbPicture::new(2, 2, vec![245; 12]).unwrap());
    }
}
