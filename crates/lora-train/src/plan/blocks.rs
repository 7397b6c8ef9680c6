//! `lora_models::networks::blocks` on the tape.

use super::layers::Layers;
use super::tape::Value;

/// norm · SiLU · conv, twice, with the time embedding in between and a shortcut around.
pub(super) fn resnet(
    layers: &Layers,
    path: &str,
    input: &Value,
    outputs: usize,
    time: Option<&Value>,
    groups: usize,
) -> Value {
    let tape = &layers.tape;
    let mut hidden = layers.conv2d(&format!("{path}.conv1"), &tape.norm_silu(input, groups), outputs, 3, 1);
    if let Some(time) = time {
        hidden = tape.add_to_channels(&hidden, &layers.linear(&format!("{path}.time_emb_proj"), time, outputs, true));
    }
    let hidden = layers.conv2d(&format!("{path}.conv2"), &tape.norm_silu(&hidden, groups), outputs, 3, 1);
    match input.shape()[1] == outputs {
        true => tape.add(&hidden, input),
        false => tape.add(&hidden, &layers.conv2d(&format!("{path}.conv_shortcut"), input, outputs, 1, 1)),
    }
}
