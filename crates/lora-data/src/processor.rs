//! What happens to a picture between decoding and training: processors by name. A user's crate registers its own and
//! names it in the config.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use lora_core::random::Stream;

use crate::crop::CropPlan;
use crate::focus::focus;
use crate::{Error, Result, RgbPicture};

/// What a processor knows besides the picture.
#[derive(Debug, Clone)]
pub struct ProcessContext {
    /// Width and height of the picture as it was decoded.
    pub source: (usize, usize),
    /// How that is scaled and cut to the size that training wants.
    pub plan: CropPlan,
    /// Random numbers that belong to this item and epoch, whatever the order of processing.
    pub random: Stream,
}

impl ProcessContext {
    /// The plan for a picture that other processors may have given another size.
    fn plan_of(&self, picture: &RgbPicture) -> CropPlan {
        let size = (picture.width(), picture.height());
        if size == self.source { self.plan } else { CropPlan::center(size, self.plan.target) }
    }
}

/// One step on the way of a picture.
pub trait PictureProcessor: fmt::Debug + Send + Sync {
    /// The processed picture. After the last processor it must have the size of the plan's target.
    fn process(&self, picture: RgbPicture, context: &ProcessContext) -> Result<RgbPicture>;

    /// Whether it does something else at each visit. Where latents are cached, it acts once.
    fn is_random(&self) -> bool {
        false
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
    /// `focus_crop`: the most salient part, see [`crate::focus`].
    Focus,
}

impl PictureProcessor for Crop {
    fn process(&self, picture: RgbPicture, context: &ProcessContext) -> Result<RgbPicture> {
        let plan = context.plan_of(&picture);
        let room = (plan.resized.0 - plan.target.0, plan.resized.1 - plan.target.1);
        let plan = match self {
            Crop::Center => plan,
            Crop::TopLeft => CropPlan { offset: (0, 0), ..plan },
            Crop::Random => {
                let mut random = context.random.at("crop");
                let mut below = |room: usize| random.below(room as u64 + 1) as usize;
                CropPlan { offset: (below(room.0), below(room.1)), ..plan }
            }
            Crop::Focus => focus(&picture, &plan),
        };
        plan.apply(&picture)
    }

    fn is_random(&self) -> bool {
        *self == Crop::Random
    }
}

/// `flip`: mirrored left to right at every second visit, by chance.
#[derive(Debug, Clone, Copy)]
pub struct Flip;

impl PictureProcessor for Flip {
    fn process(&self, picture: RgbPicture, context: &ProcessContext) -> Result<RgbPicture> {
        if context.random.at("flip").below(2) == 0 {
            return Ok(picture);
        }
        let (width, height) = (picture.width(), picture.height());
        let pixels = picture.data().as_chunks::<3>().0;
        let mirrored = pixels.chunks(width.max(1)).flat_map(|row| row.iter().rev().copied().flatten()).collect();
        Ok(RgbPicture::new(width, height, mirrored).unwrap_or(picture))
    }

    fn is_random(&self) -> bool {
        true
    }
}

/// Processors by name.
#[derive(Debug, Clone)]
pub struct ProcessorRegistry(BTreeMap<String, Arc<dyn PictureProcessor>>);

impl Default for ProcessorRegistry {
    /// This crate's processors.
    fn default() -> Self {
        let ours: [(&str, Arc<dyn PictureProcessor>); 5] = [
            ("center_crop", Arc::new(Crop::Center)),
            ("top_left_crop", Arc::new(Crop::TopLeft)),
            ("random_crop", Arc::new(Crop::Random)),
            ("focus_crop", Arc::new(Crop::Focus)),
            ("flip", Arc::new(Flip)),
        ];
        Self(ours.map(|(name, processor)| (name.to_owned(), processor)).into())
    }
}

impl ProcessorRegistry {
    /// Adds a processor under a name, which must be free.
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

    #[derive(Debug)]
    struct Invert;

    impl PictureProcessor for Invert {
        fn process(&self, picture: RgbPicture, _context: &ProcessContext) -> Result<RgbPicture> {
            let data = picture.data().iter().map(|value| 255 - value).collect();
            Ok(RgbPicture::new(picture.width(), picture.height(), data).expect("the size is unchanged"))
        }
    }

    fn context(source: (usize, usize), target: (usize, usize), seed: u64) -> ProcessContext {
        ProcessContext { source, plan: CropPlan::center(source, target), random: Stream::new(seed) }
    }

    /// A picture of six columns, each of its own value.
    fn columns() -> RgbPicture {
        RgbPicture::new(6, 2, [0u8, 1, 2, 3, 4, 5].map(|value| [value; 3]).concat().repeat(2)).unwrap()
    }

    #[test]
    fn crops_keep_the_part_that_they_say() {
        let cut = |crop: Crop, seed| crop.process(columns(), &context((6, 2), (2, 2), seed)).unwrap().data()[0];
        assert_eq!((cut(Crop::Center, 0), cut(Crop::TopLeft, 0)), (2, 0));
        let mut seen: Vec<u8> = (0..100).map(|seed| cut(Crop::Random, seed)).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, [0, 1, 2, 3, 4], "every place, and none outside");
    }

    #[test]
    fn about_half_are_mirrored() {
        let first = |seed| Flip.process(columns(), &context((6, 2), (6, 2), seed)).unwrap().data()[0];
        let mirrored = (0..200).filter(|&seed| first(seed) == 5).count();
        assert!((70..130).contains(&mirrored) && (0..200).all(|seed| matches!(first(seed), 0 | 5)), "{mirrored}");
    }

    #[test]
    fn a_picture_of_another_size_than_decoded_is_not_squashed() {
        let context = context((600, 200), (2, 2), 0);
        assert_eq!(Crop::Center.process(columns(), &context).unwrap().data()[0], 2);
    }

    #[test]
    fn outsiders_register_and_chain() {
        let mut registry = ProcessorRegistry::default();
        registry.register("invert", Invert).unwrap();
        assert!(registry.register("invert", Invert).is_err());
        assert!(
            registry.chain(&["nothing"]).unwrap_err().to_string().contains("center_crop, flip, focus_crop, invert")
        );
        let picture = RgbPicture::new(4, 2, vec![10; 24]).unwrap();
        let context = context((4, 2), (2, 2), 0);
        let result = registry
            .chain(&["invert", "center_crop"])
            .unwrap()
            .iter()
            .try_fold(picture, |picture, step| step.process(picture, &context));
        assert_eq!(result.unwrap(), RgbPicture::new(2, 2, vec![245; 12]).unwrap());
    }
}
