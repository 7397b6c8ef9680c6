//! What happens to a picture between decoding and training: processors by name. A user's crate registers its own and
//! names it in the config.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use lora_core::random::Stream;

use crate::crop::CropPlan;
use crate::{Error, Result, RgbPicture};

/// What a processor knows besides the picture.
#[derive(Debug, Clone)]
pub struct ProcessContext {
    /// The size that training wants, width and height in pixels.
    pub target: (usize, usize),
    /// Random numbers that belong to this item and epoch, whatever the order of processing.
    pub random: Stream,
}

/// One step on the way of a picture.
pub trait PictureProcessor: fmt::Debug + Send + Sync {
    /// The processed picture. After the last processor it must have the target's size.
    fn process(&self, picture: RgbPicture, context: &ProcessContext) -> Result<RgbPicture>;
}

/// `center_crop`: the smallest scaling that covers the target, then its middle.
#[derive(Debug, Clone, Copy, Default)]
pub struct CenterCrop;

impl PictureProcessor for CenterCrop {
    fn process(&self, picture: RgbPicture, context: &ProcessContext) -> Result<RgbPicture> {
        CropPlan::center((picture.width(), picture.height()), context.target).apply(&picture)
    }
}

/// Processors by name.
#[derive(Debug, Clone)]
pub struct ProcessorRegistry(BTreeMap<String, Arc<dyn PictureProcessor>>);

impl Default for ProcessorRegistry {
    /// This crate's processors.
    fn default() -> Self {
        let crop: Arc<dyn PictureProcessor> = Arc::new(CenterCrop);
        Self(BTreeMap::from([("center_crop".to_owned(), crop)]))
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

    #[test]
    fn outsiders_register_and_chain() {
        let mut registry = ProcessorRegistry::default();
        registry.register("invert", Invert).unwrap();
        assert!(registry.register("invert", Invert).is_err());
        assert!(registry.chain(&["nothing"]).unwrap_err().to_string().contains("center_crop, invert"));
        let context = ProcessContext { target: (2, 2), random: Stream::new(0) };
        let picture = RgbPicture::new(4, 2, vec![10; 24]).unwrap();
        let result = registry
            .chain(&["invert", "center_crop"])
            .unwrap()
            .iter()
            .try_fold(picture, |picture, step| step.process(picture, &context));
        assert_eq!(result.unwrap(), RgbPicture::new(2, 2, vec![245; 12]).unwrap());
    }
}
