//! Keys of concept sliders: an attribute by prompts alone, in the place of pictures.

use lora_data::sliders::Slider;

use super::{Given, Group, Key, Reads, Resumed, shown, size};

/// All of them.
pub(super) static SLIDERS: Group = Group {
    section: "What to train on",
    behind: Some("dataset_config"),
    keys: &[
        Key {
            name: "sliders",
            values: "list of tables",
            default: "none",
            meaning: "Attributes to train a concept slider of, without pictures. Each has `target`, what is moved (`person`), `positive` and `negative`, what it is moved to at a strength of 1 and of −1 (`old person`, `young person`), and where they differ from the defaults `guidance_scale` (4), how many times the difference between the two, `weight` (1) in the loss, and `preserve`, a list of concepts that are not to move with it. In the place of `train_data_dir`.",
            memory: "Activations of two passes, of the adapter and of its opposite, and passes of the base without gradients; no autoencoder, and no text encoder once prompts are encoded.",
            resumed: Resumed::FixedSince("none", |config| shown_sliders(&config.sliders)),
            reads: Reads::Adapter(|given, config| config.sliders = sliders(given)),
        },
        Key {
            name: "slider_resolutions",
            values: "list of \"W,H\" or sides",
            default: "[max_resolution]",
            meaning: "Sizes that sliders are trained at; an epoch is one step for each slider at each size.",
            memory: "Activations grow with the area of the largest.",
            resumed: Resumed::FixedSince("", |config| {
                config.slider_resolutions.iter().map(|own| size(*own)).collect::<Vec<_>>().join(", ")
            }),
            reads: Reads::Adapter(|given, config| config.slider_resolutions = given.sizes().unwrap_or_default()),
        },
        Key {
            name: "slider_steps",
            values: "1 … 1000",
            default: "50",
            meaning: "What a slider is trained on is denoised from noise to the drawn timestep, by the base with the slider as it is then: in so many steps for the whole way. A step of training takes half of them on average.",
            memory: "",
            resumed: Resumed::FixedSince("50", |config| shown(&config.slider_steps)),
            reads: Reads::Adapter(|given, config| config.slider_steps = given.count_to(1, 1000).unwrap_or(50)),
        },
        Key {
            name: "slider_sample_guidance",
            values: "1 …",
            default: "3",
            meaning: "Guidance on that way; 1 halves its time.",
            memory: "",
            resumed: Resumed::FixedSince("3.0", |config| shown(&config.slider_sample_guidance)),
            reads: Reads::Adapter(|given, config| {
                config.slider_sample_guidance =
                    given.number("a number from 1 on", |number| number >= 1.0).unwrap_or(3.0);
            }),
        },
    ],
};

fn sliders(given: &mut Given<'_>) -> Vec<Slider> {
    let sliders: Vec<Slider> = given.entries();
    for (index, slider) in sliders.iter().enumerate() {
        if let Some((key, message)) = slider.problem() {
            given.problem(format!("[{index}]: `{key}`: {message}"));
        }
    }
    sliders
}

fn shown_sliders(sliders: &[Slider]) -> String {
    match sliders {
        [] => "none".to_owned(),
        several => serde_json::to_string(several).unwrap_or_default(),
    }
}
