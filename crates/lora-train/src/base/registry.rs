//! Which families of base models can be trained: those of this crate, and those that a program registers.

use std::path::Path;
use std::sync::Arc;

use lora_core::{Component, DType};
use lora_io::checkpoint::Checkpoint;
use lora_io::family::{FAMILIES, Family};
use lora_torch::tch::Device;

use super::data::SLIDERS;
use super::{Base, Data, flow_matching, language, stable_diffusion};
use crate::config::TrainConfig;
use crate::config::keys::{Group, Keys};
use crate::fuse::fuse;
use crate::{Error, Result};

/// How bases of a family are opened, and what they add to the configuration.
#[derive(Debug, Clone, Copy)]
pub struct Registration {
    /// The family: how its files are told, and its names. A family that `lora_io` does not know is told before those that it does.
    pub family: &'static Family,
    /// Configuration keys that only such bases have.
    pub keys: &'static [&'static Group],
    /// What they are trained on.
    pub data: Data,
    /// What of their keys helps where memory runs out, for people: "a lower max_resolution".
    pub remedies: &'static str,
    /// Opens one; no network is loaded yet.
    pub open: fn(&Opening<'_>) -> Result<Box<dyn Base>>,
}

/// What a run gives to the function that opens its base.
#[derive(Debug)]
#[non_exhaustive]
pub struct Opening<'o> {
    /// The configuration of the run.
    pub config: &'o TrainConfig,
    /// The base's files.
    pub checkpoint: Arc<Checkpoint>,
    /// Where its networks go.
    pub device: Device,
    /// What they compute in.
    pub precision: DType,
}

impl Registration {
    /// What a run of such a base is trained on: pictures give way to the prompts of sliders.
    pub(crate) fn data_of(&self, config: &TrainConfig) -> Data {
        if config.sliders.is_empty() { self.data } else { SLIDERS }
    }

    /// Whether a configuration gives only keys that such a base has.
    ///
    /// # Errors
    /// [`Error::KeyOfAnotherBase`] where it gives another's.
    pub(crate) fn check(&self, config: &TrainConfig) -> Result<()> {
        let own: Vec<&Group> = self.groups().collect();
        match config.keys_of_other_bases(&own).first() {
            Some(key) => Err(Error::KeyOfAnotherBase { key, family: self.family.title }),
            None => Ok(()),
        }
    }

    /// The keys of such bases and of their data.
    pub(crate) fn groups(&self) -> impl Iterator<Item = &'static Group> {
        self.data.keys.iter().chain(self.keys).copied()
    }
}

impl<'o> Opening<'o> {
    pub(crate) fn new(config: &'o TrainConfig, checkpoint: &Arc<Checkpoint>, device: Device, precision: DType) -> Self {
        Self { config, checkpoint: Arc::clone(checkpoint), device, precision }
    }
}

/// The families that can be trained.
#[derive(Debug, Clone)]
pub struct Bases(Vec<Registration>);

impl Default for Bases {
    fn default() -> Self {
        Self(vec![
            stable_diffusion::SD1,
            stable_diffusion::SD2,
            stable_diffusion::SDXL,
            flow_matching::ANIMA,
            flow_matching::CHROMA,
            flow_matching::FLUX,
            flow_matching::FLUX2,
            flow_matching::QWEN_IMAGE,
            flow_matching::SD3,
            flow_matching::Z_IMAGE,
            language::LANGUAGE,
        ])
    }
}

impl Bases {
    /// Adds a family; one of the same name takes its place. `keys` gets its keys.
    ///
    /// # Errors
    /// [`Error::DuplicateKey`] where another base has a key of the same name.
    pub(crate) fn register(&mut self, registration: Registration, keys: &mut Keys) -> Result<()> {
        keys.register(registration.keys)?;
        keys.register(registration.data.keys)?;
        self.0.retain(|known| known.family != registration.family);
        self.0.push(registration);
        Ok(())
    }

    /// All families that are known, in the order in which files are told: a program's own, then [`FAMILIES`].
    pub fn families(&self) -> Vec<&'static Family> {
        let added = self.0.iter().map(|known| known.family).filter(|family| !FAMILIES.contains(family));
        added.chain(FAMILIES).collect()
    }

    /// Keys that bases bring.
    pub(crate) fn groups(&self) -> impl Iterator<Item = &'static Group> {
        self.0.iter().flat_map(Registration::groups)
    }

    /// Opens the files of a base that can be trained.
    ///
    /// # Errors
    /// [`Error::Base`] for any other, which says what it is.
    pub fn checkpoint(&self, path: &Path) -> Result<Checkpoint> {
        let expected = || self.0.iter().map(|known| known.family.title).collect::<Vec<_>>().join(", ");
        let refused = |found: String| Error::Base { path: path.to_owned(), found, expected: expected() };
        match Checkpoint::open_among(path, &self.families()) {
            Ok(checkpoint) if self.of(&checkpoint).is_some() => match checkpoint.unread_scale() {
                None => Ok(checkpoint),
                Some(scale) => Err(refused(format!(
                    "{} in few bits that are not 8-bit floats (`{scale}` scales them): take it in fp16, bf16, 8-bit floats or GGUF",
                    checkpoint.family()
                ))),
            },
            Ok(checkpoint) => {
                Err(refused(format!("{}, which can be merged into and converted, not trained", checkpoint.family())))
            }
            Err(lora_io::Error::Family { found, .. }) => Err(refused(found)),
            Err(other) => Err(other.into()),
        }
    }

    /// The same for the base of a configuration, with the parts that it takes from elsewhere and the adapters that are merged
    /// into it.
    ///
    /// # Errors
    /// As [`Bases::checkpoint`], and where a part is not what it has to be.
    pub(crate) fn configured(&self, config: &TrainConfig) -> Result<Checkpoint> {
        let mut checkpoint = self.checkpoint(&config.base_model)?;
        self.registration(&checkpoint)?.check(config)?;
        let parts = [
            ("vae", Component::VAE),
            ("text_encoder", Component::TEXT_ENCODER),
            ("text_encoder_2", Component::TEXT_ENCODER_2),
            ("text_encoder_3", Component::TEXT_ENCODER_3),
        ];
        for (key, component) in parts {
            if let Some(path) = config.extra.text(key) {
                checkpoint.replace(component, path)?;
            }
        }
        flow_matching::check_parts(&checkpoint, config)?;
        fuse(checkpoint, config, self)
    }

    /// How bases of a checkpoint's family are opened.
    ///
    /// # Errors
    /// [`Error::Base`] where they are not trained.
    pub(crate) fn registration(&self, checkpoint: &Checkpoint) -> Result<&Registration> {
        self.of(checkpoint).ok_or_else(|| Error::Base {
            path: checkpoint.path().to_owned(),
            found: checkpoint.family().to_string(),
            expected: "another".into(),
        })
    }

    /// Opens a base.
    ///
    /// # Errors
    /// Where keys are given that only other bases have, or the base is not what its family promises.
    pub(crate) fn open(&self, opening: &Opening<'_>) -> Result<Box<dyn Base>> {
        let registration = self.registration(&opening.checkpoint)?;
        registration.check(opening.config)?;
        (registration.open)(opening)
    }

    fn of(&self, checkpoint: &Checkpoint) -> Option<&Registration> {
        self.0.iter().find(|known| known.family == checkpoint.family())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use lora_core::HostTensor;

    use super::*;

    #[test]
    fn a_known_base_that_is_not_trained_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("base.safetensors");
        let write = |names: &[&str]| {
            let tensor = |name: &&str| ((*name).to_owned(), HostTensor::zeros([1]));
            let tensors: BTreeMap<_, _> = names.iter().map(tensor).collect();
            lora_io::safetensors::write(&path, &tensors, &BTreeMap::new()).unwrap();
            // As if nobody trained one that is known.
            let all = Bases::default().0.into_iter().filter(|known| known.family.name != "qwen_image");
            Bases(all.collect()).checkpoint(&path).map(drop).map_err(|error| error.to_string())
        };
        let rest = ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.quant_conv.bias"];
        let one = "cond_stage_model.transformer.text_model.final_layer_norm.weight";
        assert_eq!(write(&[&[one], &rest[..]].concat()), Ok(()));
        let error =
            write(&[&["txt_norm.weight", "transformer_blocks.0.img_mod.1.weight"], &rest[..1]].concat()).unwrap_err();
        assert!(
            error.contains("this is Qwen-Image") && error.contains("expected Stable Diffusion 1.x, Stable"),
            "{error}"
        );
        let error = write(&["something.weight"]).unwrap_err();
        assert!(error.contains("`something`") && error.contains("expected Stable Diffusion 1.x"), "{error}");
    }
}
