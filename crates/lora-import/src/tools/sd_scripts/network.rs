//! The network of sd-scripts and LyCORIS: which algorithm, which layers, which numbers. The GUI makes the same out of its fields.

use std::ops::Range;

use serde_json::{Value, json};

use super::{Base, base, is_flow};
use crate::engine::{Field, Scope};
use crate::outcome::{Outcome, Settings, becomes, lost, no_effect, refused, taken, translated};
use crate::row::{Kind, OFF, Row, arguments, by, gone, nothing, same};
use crate::values;

pub(in crate::tools) static ROWS: &[Row] = &[
    by("network_weights", &["init_from"], "a LoRA to go on from", |field| taken("init_from", field.text())),
    by(
        "network_module",
        &["variant", "target_modules", "train"],
        "`networks.lora` and its like: LoRA; `lycoris.kohya`: by `algo`",
        module,
    ),
    by("network_dim", &["lora_rank"], "the rank", |field| field.count_as("lora_rank")).default("4"),
    by("network_alpha", &["lora_alpha"], "1 where none is given, 0 is the rank", |field| alpha(field, "network_dim"))
        .default("1"),
    by("network_train_unet_only", &["train_text_encoder"], "off there", |field| match field.on() {
        true if field.root.on("network_train_text_encoder_only") => {
            refused("contradicts network_train_text_encoder_only; keep one of them")
        }
        true if is_flow(&field.root) => no_effect("text encoders of this base are never trained here"),
        true => becomes("train_text_encoder", false, "the U-Net alone"),
        false => no_effect("off, as without it"),
    }),
    by("network_train_text_encoder_only", &["train_unet"], "off there", |field| match field.on() {
        true if is_flow(&field.root) => refused("text encoders of this base cannot be trained here"),
        true => becomes("train_unet", false, "the text encoders alone"),
        false => no_effect("off, as without it"),
    }),
    arguments("network_args", ARGUMENTS),
    by("scale_weight_norms", &["scale_weight_norms"], "of plain LoRA", |field| match field.number() {
        Some(norm) if norm <= 0.0 => no_effect("off, as without it"),
        Some(_) if !is_plain(&field.root) => lost("norms are limited of plain LoRA alone"),
        _ => field.number_as("scale_weight_norms"),
    }),
    by("network_dropout", &["lora_dropout"], "between a LoRA's factors", |field| between(field, "lora_dropout")),
    gone("dim_from_weights", OFF, "lora_rank says the rank; init_from is brought to it"),
    by("base_weights", &["fuse_adapters"], "each with its base_weights_multiplier", base_weights),
    nothing("base_weights_multiplier", "with base_weights"),
];

/// `networks.lora`'s and LyCORIS' numbers.
pub(in crate::tools) static ARGUMENTS: &[Row] = &[
    by("algo", &["variant"], "LyCORIS' algorithm", |field| algorithm(&field.text(), dora(field, "dora_wd"))),
    by("preset", &["target_modules"], "LyCORIS' choice of layers", |field| targets(field, &field.text())),
    by("conv_dim", &["target_modules", "rank_pattern"], "convolutions too, with this rank", |field| {
        convolutions(field, "conv_dim")
    }),
    by("conv_alpha", &["alpha_pattern"], "of convolutions", |field| {
        match field.here.count("conv_dim").unwrap_or(0) > 0 || is_lycoris(&field.root) {
            true => conv_alpha(field),
            false => no_effect("only with conv_dim"),
        }
    }),
    by("dropout", &["lora_dropout"], "between a LoRA's factors", |field| between(field, "lora_dropout")),
    by("rank_dropout", &["rank_dropout"], "of a LoRA's ranks", |field| between(field, "rank_dropout")),
    same("module_dropout", "module_dropout", Kind::Positive),
    by("factor", &["variant_options"], "of LoKr", |field| option(field, "factor")),
    by("decompose_both", &["variant_options"], "of LoKr", |field| option(field, "decompose_both")),
    by("full_matrix", &["variant_options"], "of LoKr", |field| option(field, "full_matrix")),
    by("use_tucker", &["variant_options"], "`tucker`", |field| option(field, "tucker")),
    by("use_cp", &["variant_options"], "`tucker`", |field| option(field, "tucker")),
    by("constraint", &["variant_options"], "of OFT", |field| option(field, "constraint")),
    by("constrain", &["variant_options"], "of OFT", |field| option(field, "constraint")),
    by("rescaled", &["variant_options"], "of OFT", |field| option(field, "rescale")),
    by("train_on_input", &["variant_options"], "of IA3", |field| option(field, "on_input")),
    by("rs_lora", &["use_rslora"], "scales by alpha / √rank", |field| field.when_on(taken("use_rslora", true))),
    by("dora_wd", &["variant"], "with magnitudes", |field| {
        field.when_on(algorithm(&field.here.text("algo").unwrap_or_else(|| "lora".to_owned()), dora(field, "dora_wd")))
    }),
    gone("wd_on_output", OFF, "magnitudes have the axis of their algorithm"),
    gone("use_scalar", OFF, "no factor that is trained beside the update"),
    gone("rank_dropout_scale", OFF, "what is left of the ranks is scaled up"),
    gone("train_norm", OFF, "norms are not trained"),
    nothing("bypass_mode", "how the update is computed"),
    same("loraplus_lr_ratio", "loraplus_lr_ratio", Kind::Positive),
    gone("loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio", OFF, "loraplus_lr_ratio holds for all networks"),
    gone("block_dims", OFF, "ranks by block are given by rank_pattern"),
    gone("block_alphas", OFF, "alphas by block are given by alpha_pattern"),
    gone("conv_block_dims", OFF, "ranks by block are given by rank_pattern"),
    gone("conv_block_alphas", OFF, "alphas by block are given by alpha_pattern"),
    by("down_lr_weight", &["learning_rate_pattern"], "numbers, of Stable Diffusion 1, 2 and XL", |field| {
        block_rates(field, Side::Down, has_convolutions(field))
    }),
    by("mid_lr_weight", &["learning_rate_pattern"], "a number, of Stable Diffusion XL three", |field| {
        block_rates(field, Side::Middle, has_convolutions(field))
    }),
    by("up_lr_weight", &["learning_rate_pattern"], "numbers, of Stable Diffusion 1, 2 and XL", |field| {
        block_rates(field, Side::Up, has_convolutions(field))
    }),
    nothing("block_lr_zero_threshold", "with weights of blocks"),
    gone("unit", &["1"], "ranks are not trained one after the other (DyLoRA)"),
    gone("block_size", OFF, "ranks are not trained one after the other (DyLoRA)"),
    gone("exclude_patterns include_patterns", OFF, "layers are chosen by target_modules"),
    gone("network_reg_dims", OFF, "ranks by layer are given by rank_pattern"),
    by("network_reg_lrs", &["learning_rate_pattern"], "of LoHa and LoKr on Stable Diffusion 1", expression_rates),
    nothing("verbose", "what is printed"),
    gone("train_t5xxl", OFF, "text encoders of this base are never trained here"),
    gone("in_dims", OFF, "ranks by layer are given by rank_pattern"),
    by("train_blocks", &["target_modules"], "of FLUX.1: `all`, `single` or `double`", blocks),
    gone("train_double_block_indices train_single_block_indices", &["\"all\""], "blocks are chosen by target_modules"),
];

/// The linear layers of FLUX.1's and Stable Diffusion 3's blocks, those that scale and shift too.
pub(in crate::tools) const BLOCKS: &str = r"re:(single_)?transformer_blocks\..*";

/// The linear layers of blocks of one of FLUX.1's kinds.
pub(in crate::tools) fn blocks(field: &Field<'_>) -> Outcome {
    let blocks = match field.text().as_str() {
        "all" => BLOCKS,
        "single" => r"re:single_transformer_blocks\..*",
        "double" => r"re:transformer_blocks\..*",
        _ => return field.expected("all, single or double"),
    };
    becomes("target_modules", json!([blocks]), "all linear layers of these blocks")
}

/// The scale is alpha / rank in both; 0 stands for the rank.
pub(in crate::tools) fn alpha(field: &Field<'_>, rank: &str) -> Outcome {
    match field.number() {
        Some(0.0) => becomes(
            "lora_alpha",
            field.root.number(rank).map_or(Value::Null, values::of_number),
            "0 stands for the rank",
        ),
        Some(alpha) if alpha > 0.0 => taken("lora_alpha", values::of_number(alpha)),
        _ => field.expected("a number from 0 on"),
    }
}

pub(in crate::tools) fn is_lycoris(root: &Scope<'_>) -> bool {
    root.text("network_module").is_some_and(|module| module.starts_with("lycoris"))
        || root.text("LoRA_type").is_some_and(|kind| kind.starts_with("LyCORIS"))
}

pub(in crate::tools) fn module(field: &Field<'_>) -> Outcome {
    match field.text().as_str() {
        "networks.lora_flux" | "networks.lora_sd3" if network_arg(&field.root, "train_blocks").is_none() => {
            becomes("target_modules", json!([BLOCKS]), "all linear layers of blocks, those of their modulation too")
        }
        "networks.lora"
        | "networks.lora_flux"
        | "networks.lora_sd3"
        | "networks.lora_lumina"
        | "networks.lora_anima"
        | "networks.lora_qwen_image"
        | "networks.lora_zimage" => no_effect("a LoRA, as without it"),
        "networks.loha" => taken("variant", "loha"),
        "networks.lokr" => taken("variant", "lokr"),
        "networks.oft" | "networks.oft_flux" => taken("variant", "oft"),
        "networks.lora_fa" => lost("no LoRA-FA; both factors of a LoRA are trained"),
        "networks.dylora" => lost("no DyLoRA; all ranks of a LoRA are trained together"),
        "lycoris.kohya" => {
            let algo = network_arg(&field.root, "algo").unwrap_or_else(|| "lora".to_owned());
            match network_arg(&field.root, "preset") {
                Some(_) => no_effect(format!("LyCORIS' {algo}, on the layers of its preset")),
                None => becomes("target_modules", full(&field.root), format!("LyCORIS' {algo} with its preset full")),
            }
        }
        other => lost(format!("no network {other}; a LoRA is trained")),
    }
}

/// Whether the update is a product of two factors, with magnitudes or without.
fn has_factors(root: &Scope<'_>) -> bool {
    let module = root.text("network_module").unwrap_or_default();
    let name = match root.text("LoRA_type") {
        Some(kind) => kind,
        None if module.starts_with("lycoris") => network_arg(root, "algo").unwrap_or_default(),
        None => module,
    };
    let name = name.to_ascii_lowercase();
    let name = ["lycoris/", "networks."].iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(&name);
    let others = [
        "loha",
        "lokr",
        "ia3",
        "diag-oft",
        "oft",
        "oft_flux",
        "flux1 oft",
        "boft",
        "glora",
        "full",
        "native fine-tuning",
    ];
    !others.contains(&name)
}

/// Whether it is a LoRA without magnitudes.
fn is_plain(root: &Scope<'_>) -> bool {
    let dora = match root.given("LoRA_type") {
        Some(_) => is_lycoris(root) && root.on("dora_wd"),
        None => network_arg(root, "dora_wd").is_some_and(|on| values::switch(&on.into()) == Some(true)),
    };
    has_factors(root) && !dora
}

/// A dropout of what lies between a LoRA's factors.
pub(in crate::tools) fn between(field: &Field<'_>, ours: &'static str) -> Outcome {
    match field.number() {
        Some(share) if share <= 0.0 => no_effect("off, as without it"),
        Some(_) if !has_factors(&field.root) => lost("of this kind whole modules alone are dropped: module_dropout"),
        _ => field.number_as(ours),
    }
}

/// A number of the network from the list of texts that it stands in.
fn network_arg(root: &Scope<'_>, name: &str) -> Option<String> {
    let texts = values::texts(&root.given("network_args")?)?;
    let pair = |text: &String| text.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
    texts.iter().filter_map(pair).find(|(key, _)| key == name).map(|(_, value)| value)
}

fn dora(field: &Field<'_>, key: &str) -> bool {
    field.here.on(key)
}

/// What LyCORIS calls an algorithm, with magnitudes or without.
pub(in crate::tools) fn algorithm(name: &str, dora: bool) -> Outcome {
    let name = name.to_ascii_lowercase();
    match (name.as_str(), dora) {
        ("lora" | "locon", false) => no_effect("a LoRA, as without it"),
        ("lora" | "locon", true) => becomes("variant", "lycoris-dora", "with LyCORIS' magnitudes"),
        ("loha", false) => taken("variant", "loha"),
        ("loha", true) => becomes("variant", "lycoris-dora-loha", "with LyCORIS' magnitudes"),
        ("lokr", false) => taken("variant", "lokr"),
        ("lokr", true) => becomes("variant", "lycoris-dora-lokr", "with LyCORIS' magnitudes"),
        ("ia3", _) => becomes("variant", "lycoris-ia3", "LyCORIS' own"),
        ("diag-oft" | "oft", _) => taken("variant", "oft"),
        ("boft", _) => taken("variant", "boft"),
        ("glora", _) => taken("variant", "glora"),
        ("full", _) => becomes("variant", "full", "the difference itself"),
        ("dylora", _) => lost("no DyLoRA; all ranks of a LoRA are trained together"),
        (other, _) => refused(format!("no algorithm `{other}` is known")),
    }
}

/// Layers of LyCORIS' preset `full`.
pub(in crate::tools) fn full(root: &Scope<'_>) -> Value {
    match base(root) {
        // The rest has other names in the U-Net that sd-scripts trains there.
        Base::Sdxl => json!(["all-conv"]),
        _ => json!(["all-conv", "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"]),
    }
}

pub(in crate::tools) fn targets(field: &Field<'_>, preset: &str) -> Outcome {
    match preset {
        "full" => becomes("target_modules", full(&field.root), "LyCORIS' preset full"),
        "full-lin" => becomes("target_modules", json!(["all-linear"]), "LyCORIS' preset full-lin"),
        "attn-mlp" => becomes("target_modules", json!(["attention-mlp"]), "LyCORIS' preset attn-mlp"),
        "attn-only" => becomes("target_modules", json!(["attention"]), "LyCORIS' preset attn-only"),
        "ia3" => becomes(
            "target_modules",
            json!(["to_k", "to_v", "ff.net.2", "k_proj", "v_proj", "fc2"]),
            "LyCORIS' preset ia3",
        ),
        "unet-transformer-only" => {
            becomes("target_modules", json!(["attention-mlp"]), "LyCORIS' preset; see to train_text_encoder")
        }
        "unet-convblock-only" => becomes("target_modules", json!(["*.resnets.*", "*samplers*"]), "LyCORIS' preset"),
        other => lost(format!("no file of layers ({other}) is read; set target_modules")),
    }
}

/// A part of the U-Net whose blocks have weights.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::tools) enum Side {
    Down,
    Middle,
    Up,
}

/// How the blocks of a kind of U-Net are counted for their weights.
struct Blocks {
    /// Levels, of three weights each.
    levels: usize,
    /// Levels with attention, of the down and of the up blocks.
    attend: [Range<usize>; 2],
    /// The parts of the middle that have a weight each, and whether they are convolutions; all of it under one without.
    middle: &'static [(&'static str, bool)],
}

static SD: Blocks = Blocks { levels: 4, attend: [0..3, 1..4], middle: &[] };
static SDXL: Blocks = Blocks {
    levels: 3,
    attend: [1..3, 0..2],
    middle: &[("resnets.0", true), ("attentions.0", false), ("resnets.1", true)],
};

fn has_convolutions(field: &Field<'_>) -> bool {
    is_lycoris(&field.root) || field.here.count("conv_dim").unwrap_or(0) > 0
}

/// Weights of blocks of the learning rate as patterns; 1 needs none. Blocks without a LoRA, by `convolutions` in resnets and samplers
/// or in attentions alone, need none either, as a pattern has to match a layer.
pub(in crate::tools) fn block_rates(field: &Field<'_>, side: Side, convolutions: bool) -> Outcome {
    let weights: Option<Vec<f64>> = match values::number(&field.value) {
        Some(weight) => Some(vec![weight]),
        None => values::texts(&field.value)
            .map(|texts| texts.iter().flat_map(|text| text.split(',').map(str::to_owned)).collect::<Vec<_>>())
            .and_then(|texts| texts.iter().map(|text| text.trim().parse().ok()).collect()),
    };
    let Some(weights) = weights else {
        return lost("a shape by its name is not read: write its numbers out, or set learning_rate_pattern");
    };
    if weights.iter().all(|&weight| weight == 1.0) {
        return no_effect("1 for each block, as without it");
    }
    let blocks = match base(&field.root) {
        Base::Sd => &SD,
        Base::Sdxl => &SDXL,
        _ => return lost("weights of blocks are read for Stable Diffusion 1, 2 and XL: set learning_rate_pattern"),
    };
    let number = |key| field.root.number(key);
    let Some(rate) = number("unet_lr").or_else(|| number("learning_rate")) else {
        return lost("needs unet_lr or learning_rate");
    };
    let threshold = field.here.number("block_lr_zero_threshold").unwrap_or(0.0);
    let mut patterns = serde_json::Map::new();
    for (index, &weight) in weights.iter().take(3 * blocks.levels).enumerate().filter(|(_, weight)| **weight != 1.0) {
        if let Some(pattern) = block(blocks, side, index, convolutions) {
            let own = if weight <= threshold { 0.0 } else { rate * weight };
            patterns.insert(pattern, values::of_number(own));
        }
    }
    match patterns.is_empty() {
        true => no_effect("these blocks have no LoRA"),
        false => {
            becomes("learning_rate_pattern", patterns, "the learning rate of the U-Net times the weight of each block")
        }
    }
}

/// The layers of a block that carry a LoRA, as a pattern.
fn block(blocks: &Blocks, side: Side, index: usize, convolutions: bool) -> Option<String> {
    let Blocks { levels, attend: [down, up], middle } = blocks;
    let (side, level, part, attend, layers) = match side {
        Side::Middle if middle.is_empty() => return (index == 0).then(|| r"re:mid_block\..*".to_owned()),
        Side::Middle => {
            let (layers, _) = middle.get(index).filter(|(_, is_convolution)| convolutions || !is_convolution)?;
            return Some(format!(r"re:mid_block\.{}\..*", layers.replace('.', r"\.")));
        }
        // Of the first of the down blocks' weights there is no LoRA.
        Side::Down => ("down", index.checked_sub(1)? / 3, (index - 1) % 3, down, 2),
        Side::Up => ("up", index / 3, index % 3, up, 3),
    };
    let mut kinds = Vec::new();
    if attend.contains(&level) && part < layers {
        kinds.push(format!(r"attentions\.{part}"));
    }
    if convolutions {
        kinds.extend((part < layers).then(|| format!(r"resnets\.{part}")));
        kinds.extend((part == 2 && level + 1 < *levels).then(|| format!(r"{side}samplers\.0")));
    }
    (!kinds.is_empty()).then(|| format!(r"re:{side}_blocks\.{level}\.({})\..*", kinds.join("|")))
}

/// Learning rates by regular expressions, `EXPRESSION=RATE,EXPRESSION=RATE`, of which the first that is all of a layer's name counts:
/// here the longest does, so that those before others are filled up.
fn expression_rates(field: &Field<'_>) -> Outcome {
    let module = field.root.text("network_module").unwrap_or_default();
    if base(&field.root) != Base::Sd || !["networks.loha", "networks.lokr"].contains(&&*module) {
        return lost("layers have other names here: give their learning rates by learning_rate_pattern");
    }
    let (mut patterns, mut longest) = (serde_json::Map::new(), 0);
    let text = field.text();
    let pairs: Vec<&str> = text.split(',').map(str::trim).filter(|pair| !pair.is_empty()).collect();
    for pair in pairs.into_iter().rev() {
        let Some((expression, rate)) = pair.split_once('=') else { return field.expected("EXPRESSION=RATE, …") };
        let Ok(rate) = rate.trim().parse::<f64>() else { return field.expected("EXPRESSION=RATE, …") };
        let mut expression = expression.trim().to_owned();
        if ["(?=", "(?!", "(?<"].iter().any(|look| expression.contains(look)) {
            return lost("expressions that look ahead or behind are not read: set learning_rate_pattern");
        }
        while expression.len() <= longest {
            expression.push_str("(?:)");
        }
        longest = expression.len();
        patterns.insert(format!("re:{expression}"), values::of_number(rate));
    }
    match patterns.is_empty() {
        true => no_effect("none, as without it"),
        false => becomes("learning_rate_pattern", patterns, "each has to match a layer; the first that does counts"),
    }
}

/// The convolutions that have a rank of their own.
pub(in crate::tools) const SPATIAL: &str = r"re:.*\.(conv1|conv2|conv)";

/// sd-scripts' `conv_dim`, and LyCORIS'.
pub(in crate::tools) fn convolutions(field: &Field<'_>, dim: &str) -> Outcome {
    let Some(rank) = field.here.count(dim) else { return field.expected("a whole number") };
    if rank == 0 && !is_lycoris(&field.root) {
        return no_effect("off, as without it");
    }
    let own: Settings = match rank == field.root.count("network_dim").unwrap_or(4) {
        true => vec![],
        false => vec![("rank_pattern", json!({ SPATIAL: rank }))],
    };
    let mut settings = own;
    if !is_lycoris(&field.root) {
        settings.push(("target_modules", json!(["all-conv"])));
    }
    translated(settings, "convolutions of resnets and samplers, with this rank where they are 3×3")
}

pub(in crate::tools) fn conv_alpha(field: &Field<'_>) -> Outcome {
    match field.number() {
        Some(alpha) if Some(alpha) == field.root.number("network_alpha") => no_effect("that of the other layers"),
        Some(alpha) if alpha > 0.0 => {
            becomes("alpha_pattern", json!({ SPATIAL: values::of_number(alpha) }), "of 3×3 convolutions")
        }
        _ => field.expected("a number above 0"),
    }
}

/// One of the variant's own numbers and switches.
pub(in crate::tools) fn option(field: &Field<'_>, ours: &str) -> Outcome {
    match (&field.value, values::switch(&field.value), field.number()) {
        (_, _, Some(number)) if !field.value.is_boolean() => match number {
            0.0 => no_effect("off, as without it"),
            // The largest factor, as without it.
            -1.0 => no_effect("the largest factor, as without it"),
            number => {
                becomes("variant_options", json!({ ours: values::of_number(number) }), "the variant's own number")
            }
        },
        (_, Some(true), _) => becomes("variant_options", json!({ ours: true }), "the variant's own switch"),
        (_, Some(false), _) => no_effect("off, as without it"),
        _ => field.expected("a number or a switch"),
    }
}

/// LoRAs in the base, each with its strength; 1 where there is none.
fn base_weights(field: &Field<'_>) -> Outcome {
    let Some(files) = values::texts(&field.value) else { return field.expected("files") };
    if files.is_empty() {
        return no_effect("no file");
    }
    let strengths = field.root.get("base_weights_multiplier");
    let of = |place: usize| match &strengths {
        Some(Value::Array(all)) => all.get(place).and_then(values::number),
        Some(one) if place == 0 => values::number(one),
        _ => None,
    };
    let fused = files.iter().enumerate().map(|(place, file)| match of(place) {
        Some(strength) => format!("{file}:{strength}"),
        None => file.clone(),
    });
    taken("fuse_adapters", fused.collect::<Vec<_>>())
}
