//! `lora_models::networks::Unet` on the tape: the same calls in the same order, with the same names.

use std::rc::Rc;

use lora_models::networks::UnetConfig;
use lora_torch::tch::Kind;

use super::blocks::resnet;
use super::layers::Layers;
use super::tape::Value;

/// The prediction for noised latents, in fp32.
pub(super) fn forward(layers: &Rc<Layers>, config: &UnetConfig, latents: &Value, context: &Value) -> Value {
    let tape = &layers.tape;
    let (kind, batch, channels) = (layers.kind, latents.shape()[0], config.channels.clone());
    let levels = channels.len();
    let first = channels[0];
    let context = tape.cast(context, kind);
    let time = tape.cast(&tape.value(&[batch, first], Kind::Float), kind);
    let time = tape.activation(&layers.linear("time_embedding.linear_1", &time, 4 * first, true));
    let time = tape.activation(&layers.linear("time_embedding.linear_2", &time, 4 * first, true));

    let stage = |hidden: &Value, scope: &str, index: usize, level: usize, attention: bool| {
        let (scope, config) = (scope.to_owned(), config.clone());
        layers.block(&[hidden, &time, &context], move |layers, inputs| {
            let outputs = config.channels[level];
            let hidden = resnet(
                layers,
                &format!("{scope}.resnets.{index}"),
                &inputs[0],
                outputs,
                Some(&inputs[1]),
                config.norm_groups,
            );
            match attention {
                true => {
                    transformer(layers, &format!("{scope}.attentions.{index}"), &config, level, &hidden, &inputs[2])
                }
                false => hidden,
            }
        })
    };

    let mut hidden = layers.conv2d("conv_in", &tape.cast(latents, kind), first, 3, 1);
    let mut skips = vec![hidden.clone()];
    for (level, &outputs) in channels.iter().enumerate() {
        let scope = format!("down_blocks.{level}");
        for index in 0..config.layers_per_block {
            hidden = stage(&hidden, &scope, index, level, config.attention[level]);
            skips.push(hidden.clone());
        }
        if level + 1 < levels {
            hidden = layers.conv2d(&format!("{scope}.downsamplers.0.conv"), &hidden, outputs, 3, 2);
            skips.push(hidden.clone());
        }
    }

    hidden = stage(&stage(&hidden, "mid_block", 0, levels - 1, true), "mid_block", 1, levels - 1, false);

    for (up, level) in (0..levels).rev().enumerate() {
        let scope = format!("up_blocks.{up}");
        for index in 0..=config.layers_per_block {
            let skip = skips.pop().unwrap_or_else(|| hidden.clone());
            // The network lets go of both when the stage is done.
            let both = (hidden, skip);
            hidden = stage(&tape.concatenate(&both.0, &both.1), &scope, index, level, config.attention[level]);
        }
        if level > 0 {
            let size = skips.last().map_or([1, 1], |skip| [skip.shape()[2], skip.shape()[3]]);
            let larger = tape.upsample(&hidden, size);
            hidden = layers.conv2d(&format!("{scope}.upsamplers.0.conv"), &larger, channels[level], 3, 1);
        }
    }
    let output = layers.conv2d("conv_out", &tape.norm_silu(&hidden, config.norm_groups), config.latent_channels, 3, 1);
    tape.cast(&output, Kind::Float)
}

/// The spatial transformer: `[batch, channels, height, width]` with text states `[batch, states, context]`.
fn transformer(
    layers: &Rc<Layers>,
    path: &str,
    config: &UnetConfig,
    level: usize,
    input: &Value,
    context: &Value,
) -> Value {
    let tape = &layers.tape;
    let [batch, channels, height, width] = *input.shape() else { return input.clone() };
    let to_tokens = |pixels: &Value| pixels.permute(&[batch, height * width, channels]);
    let to_pixels = |tokens: &Value| tokens.permute(&[batch, channels, height, width]);
    let projection = |name: &str, input: &Value| match config.linear_projection {
        true => layers.linear(&format!("{path}.{name}"), input, channels, true),
        false => layers.conv2d(&format!("{path}.{name}"), input, channels, 1, 1),
    };
    let normed = tape.group_norm(input, config.norm_groups);
    let mut tokens = if config.linear_projection {
        projection("proj_in", &to_tokens(&normed))
    } else {
        to_tokens(&projection("proj_in", &normed))
    };
    for depth in 0..config.transformer_depth {
        tokens = block(layers, &format!("{path}.transformer_blocks.{depth}"), config.heads[level], tokens, context);
    }
    let update = if config.linear_projection {
        to_pixels(&projection("proj_out", &tokens))
    } else {
        projection("proj_out", &to_pixels(&tokens))
    };
    tape.add(&update, input)
}

fn block(layers: &Rc<Layers>, path: &str, heads: usize, tokens: Value, context: &Value) -> Value {
    let tape = &layers.tape;
    let width = tokens.shape()[2];
    let normed = tape.layer_norm(&tokens);
    let tokens = tape.add(&attention(layers, &format!("{path}.attn1"), heads, &normed, &normed), &tokens);
    let normed = tape.layer_norm(&tokens);
    let tokens = tape.add(&attention(layers, &format!("{path}.attn2"), heads, &normed, context), &tokens);
    let inner = format!("{path}.ff.net.0.proj");
    let gated = layers.feed_forward(&tokens, move |layers, tokens| {
        layers.tape.geglu(&layers.linear(&inner, &layers.tape.layer_norm(tokens), 8 * width, true))
    });
    tape.add(&layers.linear(&format!("{path}.ff.net.2"), &gated, width, true), &tokens)
}

fn attention(layers: &Rc<Layers>, path: &str, heads: usize, tokens: &Value, context: &Value) -> Value {
    let width = tokens.shape()[2];
    let query = layers.linear(&format!("{path}.to_q"), tokens, width, false);
    let key = layers.linear(&format!("{path}.to_k"), context, width, false);
    let value = layers.linear(&format!("{path}.to_v"), context, width, false);
    layers.linear(&format!("{path}.to_out.0"), &layers.tape.attention(&query, &key, &value, heads), width, true)
}
