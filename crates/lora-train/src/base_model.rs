//! Opening the base model of a run: which families can be trained.

use std::path::Path;

use lora_io::checkpoint::Checkpoint;
use lora_io::family::sd1;

use crate::{Error, Result};

/// Opens a base that can be trained.
pub(crate) fn open(path: &Path) -> Result<Checkpoint> {
    let refused = |found: String| Error::Base { path: path.to_owned(), found };
    match Checkpoint::open(path) {
        Ok(checkpoint) if *checkpoint.family() == sd1::FAMILY => Ok(checkpoint),
        Ok(checkpoint) => {
            Err(refused(format!("{}, which can be merged into and converted, not trained", checkpoint.family())))
        }
        Err(lora_io::Error::Family { found, .. }) => Err(refused(found)),
        Err(other) => Err(other.into()),
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
            open(&path).map(drop).map_err(|error| error.to_string())
        };
        let rest = ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.quant_conv.bias"];
        let one = "cond_stage_model.transformer.text_model.final_layer_norm.weight";
        assert_eq!(write(&[&[one], &rest[..]].concat()), Ok(()));
        let error = write(&[&["cond_stage_model.model.ln_final.weight"], &rest[..]].concat()).unwrap_err();
        assert!(error.contains("Stable Diffusion 2.x, which can be merged into"), "{error}");
        assert!(error.contains("expected a Stable Diffusion 1.x checkpoint"), "{error}");
        let error = write(&["something.weight"]).unwrap_err();
        assert!(error.contains("`something`") && error.contains("expected a Stable Diffusion 1.x"), "{error}");
    }
}
