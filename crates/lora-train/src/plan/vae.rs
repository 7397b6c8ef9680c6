//! `lora_models::networks::Vae` on the tape. It never trains.

use std::rc::Rc;

use lora_core::LayerGeometry;
use lora_models::networks::{VaeConfig, tiles_along};
use lora_torch::tch::Kind;

use super::blocks::resnet;
use super::layers::Layers;
use super::tape::{Tape, Value};

/// Mean and logarithm of the variance of pictures `[batch, 3, height, width]`, in fp32.
pub(super) fn encode(layers: &Rc<Layers>, config: &VaeConfig, pictures: &Value) -> Value {
    let tape = &layers.tape;
    let encoded = {
        let pictures = tape.cast(pictures, layers.kind);
        let mut hidden = layers.conv2d("encoder.conv_in", &pictures, config.channels[0], 3, 1);
        for (level, &channels) in config.channels.iter().enumerate() {
            let scope = format!("encoder.down_blocks.{level}");
            for index in 0..config.layers_per_block {
                hidden =
                    resnet(layers, &format!("{scope}.resnets.{index}"), &hidden, channels, None, config.norm_groups);
            }
            if level + 1 < config.channels.len() {
                let [batch, _, height, width] = *hidden.shape() else { return hidden };
                let padded =
                    tape.value(&[batch, channels, height + 1, width + 1], layers.kind).permuted(hidden.is_permuted());
                let geometry = LayerGeometry::conv2d(channels, channels, 3, 2, 0);
                hidden = layers.layer(&format!("{scope}.downsamplers.0.conv"), &padded, &geometry, true);
            }
        }
        finish(layers, config, "encoder", &middle(layers, config, "encoder", &hidden), 2 * config.latent_channels)
    };
    let moments = layers.conv2d("quant_conv", &encoded, 2 * config.latent_channels, 1, 1);
    tape.cast(&moments, Kind::Float)
}

/// Pictures of latents, in fp32.
pub(super) fn decode(layers: &Rc<Layers>, config: &VaeConfig, latents: &Value) -> Value {
    let tape = &layers.tape;
    let hidden = layers.conv2d("post_quant_conv", &tape.cast(latents, layers.kind), config.latent_channels, 1, 1);
    let last = config.channels.last().copied().unwrap_or(1);
    let mut hidden = middle(layers, config, "decoder", &layers.conv2d("decoder.conv_in", &hidden, last, 3, 1));
    for (index, &channels) in config.channels.iter().rev().enumerate() {
        let scope = format!("decoder.up_blocks.{index}");
        for layer in 0..=config.layers_per_block {
            hidden = resnet(layers, &format!("{scope}.resnets.{layer}"), &hidden, channels, None, config.norm_groups);
        }
        if index + 1 < config.channels.len() {
            let larger = tape.upsample(&hidden, [2 * hidden.shape()[2], 2 * hidden.shape()[3]]);
            hidden = layers.conv2d(&format!("{scope}.upsamplers.0.conv"), &larger, channels, 3, 1);
        }
    }
    let decoded = finish(layers, config, "decoder", &hidden, 3);
    tape.cast(&decoded, Kind::Float)
}

/// Work in tiles of at most `most` latents: `lora_models`' own.
pub(super) fn in_tiles(
    tape: &Tape,
    input: &Value,
    most: usize,
    (input_scale, output_scale): (usize, usize),
    run: impl Fn(&Value) -> Value,
) -> Value {
    let [batch, channels, height, width] = *input.shape() else { return input.clone() };
    let (rows, columns) = (tiles_along(height / input_scale, most), tiles_along(width / input_scale, most));
    if rows.len() == 1 && columns.len() == 1 {
        return run(input);
    }
    let weights = |length: usize| tape.value(&[length * output_scale], Kind::Float);
    let mut whole: Option<Value> = None;
    for (top, bottom) in rows {
        let _down = weights(bottom - top);
        for &(left, right) in &columns {
            let sides = [bottom - top, right - left];
            let tile = tape.value(&[batch, channels, sides[0] * input_scale, sides[1] * input_scale], Kind::Float);
            let answer = run(&tile);
            let _across = weights(sides[1]);
            let side = |length: usize| length / input_scale * output_scale;
            let shape = [batch, answer.shape()[1], side(height), side(width)];
            whole.get_or_insert_with(|| tape.value(&shape, Kind::Float));
        }
    }
    whole.unwrap_or_else(|| input.clone())
}

fn middle(layers: &Rc<Layers>, config: &VaeConfig, scope: &str, input: &Value) -> Value {
    let tape = &layers.tape;
    let path = |name: &str| format!("{scope}.mid_block.{name}");
    let input = resnet(layers, &path("resnets.0"), input, input.shape()[1], None, config.norm_groups);
    let [batch, channels, height, width] = *input.shape() else { return input };
    let tokens = tape.group_norm(&input, config.norm_groups).permute(&[batch, height * width, channels]);
    let square =
        |name: &str, input: &Value| layers.linear(&path(&format!("attentions.0.{name}")), input, channels, true);
    let query = square("to_q", &tokens);
    let key = square("to_k", &tokens);
    let value = square("to_v", &tokens);
    let mixed = square("to_out.0", &tape.attention(&query, &key, &value, 1));
    let sum = tape.add(&mixed.permute(&[batch, channels, height, width]), &input);
    resnet(layers, &path("resnets.1"), &sum, channels, None, config.norm_groups)
}

fn finish(layers: &Rc<Layers>, config: &VaeConfig, scope: &str, hidden: &Value, outputs: usize) -> Value {
    let tape = &layers.tape;
    let out = format!("{scope}.conv_out");
    layers.conv2d(&out, &tape.norm_silu(hidden, config.norm_groups), outputs, 3, 1)
}
