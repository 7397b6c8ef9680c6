//! `lora_models::networks::ClipTextEncoder` on the tape.

use std::rc::Rc;

use lora_models::networks::ClipConfig;
use lora_torch::tch::Kind;

use super::layers::Layers;
use super::tape::Value;

/// Tokens of one row.
const ROW: usize = 77;

/// States of captions of `chunks` rows each, `[captions, chunks · 75 + 2, width]`.
pub(super) fn encode(
    layers: &Rc<Layers>,
    config: &ClipConfig,
    captions: usize,
    chunks: usize,
    clip_skip: usize,
) -> Value {
    let tape = &layers.tape;
    let (rows, width) = (captions * chunks, config.width);
    let _tokens = tape.value(&[rows, ROW], Kind::Int64);
    let states = {
        let embedded = tape.value(&[rows, ROW, width], layers.kind);
        let mut hidden = tape.like(&embedded);
        for index in 0..(config.layers + 1).saturating_sub(clip_skip) {
            let config = *config;
            hidden = layers.block(&[&hidden], move |layers, inputs| layer(layers, index, &config, &inputs[0]));
        }
        tape.layer_norm(&hidden)
    };
    match chunks {
        1 => states,
        _ => {
            let mut joined = tape.value(&[captions, chunks * (ROW - 2) + 2, width], layers.kind);
            let (shape, kind) = (states.shape().to_vec(), layers.kind);
            tape.record(&[&states], &mut [&mut joined], &[], move |tape, _given| vec![Some(tape.value(&shape, kind))]);
            joined
        }
    }
}

fn layer(layers: &Layers, index: usize, config: &ClipConfig, hidden: &Value) -> Value {
    let tape = &layers.tape;
    let path = |name: &str| format!("text_model.encoder.layers.{index}.{name}");
    let square =
        |name: &str, input: &Value| layers.linear(&path(&format!("self_attn.{name}")), input, config.width, true);
    let normed = tape.layer_norm(hidden);
    let query = square("q_proj", &normed);
    let key = square("k_proj", &normed);
    let value = square("v_proj", &normed);
    let mixed = tape.attention(&query, &key, &value, config.heads);
    let hidden = tape.add(hidden, &square("out_proj", &mixed));

    let inner = layers.linear(&path("mlp.fc1"), &tape.layer_norm(&hidden), config.intermediate, true);
    let inner = match config.exact_gelu {
        true => tape.activation(&inner),
        false => tape.multiply(&inner, &tape.sigmoid(&tape.scale(&inner))),
    };
    tape.add(&hidden, &layers.linear(&path("mlp.fc2"), &inner, config.width, true))
}
