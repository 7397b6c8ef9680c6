//! What a configuration means where it trains sliders: which keys say nothing then, and which have other defaults.

use super::keys::Keys;
use super::read::Reader;
use super::{RunLength, TrainConfig};

/// Keys that are about pictures.
const OF_PICTURES: &[&str] = &[
    "train_data_dir",
    "datasets",
    "dataset_config",
    "reg_data_dir",
    "validation_data_dir",
    "validation_split",
    "auto_label",
    "masked_loss",
    "adaptive_noise_scale",
    "ip_noise_gamma",
];

/// Keys that are about the loss of pictures.
const OF_THE_LOSS: &[&str] = &[
    "prior_prompt",
    "prior_blank_weight",
    "prior_mask_weight",
    "min_snr_gamma",
    "debiased_estimation_loss",
    "scale_v_pred_loss_like_noise_pred",
    "v_pred_like_loss",
    "loss_type",
];

/// The names of keys that train text encoders.
const ENCODERS: [&str; 3] = ["train_text_encoder", "train_text_encoder_1", "train_text_encoder_2"];

/// Steps of a run that says nothing of its length: as the paper's published configuration has it.
const STEPS: usize = 1000;

/// Settles the rest of a configuration that has sliders.
pub(super) fn settle(reader: &mut Reader, keys: &Keys, config: &mut TrainConfig) {
    for (names, message) in [
        (OF_PICTURES, "means nothing for sliders, which are trained on prompts alone; take one of the two out"),
        (OF_THE_LOSS, "is of the loss of pictures, and sliders have one of their own; take it out"),
    ] {
        let given: Vec<&str> =
            names.iter().filter(|name| keys.get(name).is_some() && reader.gives(name)).copied().collect();
        given.into_iter().for_each(|name| reader.problem(Some(name), message));
    }
    if !config.train_unet {
        reader.problem(Some("train_unet"), "a slider is trained in the U-Net; take it out");
    }
    for name in ENCODERS {
        if reader.gives(name) && reader.given(name).boolean(false) {
            reader.problem(Some(name), "a slider is trained in the U-Net alone; take it out");
        }
    }
    config.train_text_encoder = false;
    if !reader.gives("epochs") && !reader.gives("max_train_steps") {
        config.length = RunLength::Steps(STEPS);
    }
}
