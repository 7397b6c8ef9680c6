//! From a module's tensors as files name them to the canonical module, and back. Which module a key belongs to is
//! [`super::names`]'s business.
//!
//! A part is named after its LyCORIS suffix here, whatever the file's own spelling.

use std::collections::BTreeMap;

use lora_core::variant::{BIAS_VALUE, TOKEN_ROWS, TOKENS, WEIGHT_VALUE};
use lora_core::{AdapterModule, DType, HostTensor};

/// Spellings of parts: the suffix after the module's name, and the part. The longest that fits counts.
const SPELLINGS: &[(&str, &str)] = &[
    (".lora_down.weight", "lora_down"),
    (".lora_up.weight", "lora_up"),
    (".lora_mid.weight", "lora_mid"),
    (".lora_A.weight", "lora_down"),
    (".lora_B.weight", "lora_up"),
    (".lora_A.default.weight", "lora_down"),
    (".lora_B.default.weight", "lora_up"),
    (".lora_A", "lora_down"),
    (".lora_B", "lora_up"),
    (".lora.down.weight", "lora_down"),
    (".lora.up.weight", "lora_up"),
    (".lora_linear_layer.down.weight", "lora_down"),
    (".lora_linear_layer.up.weight", "lora_up"),
    ("_lora.down.weight", "lora_down"),
    ("_lora.up.weight", "lora_up"),
    (".lora_B.bias", "lora_bias"),
    (".lora_B.default.bias", "lora_bias"),
    (".lora_embedding_A", "embedding_down"),
    (".lora_embedding_B", "embedding_up"),
    (".lora_embedding_A.default", "embedding_down"),
    (".lora_embedding_B.default", "embedding_up"),
    (".lora_magnitude_vector", "magnitude"),
    (".lora_magnitude_vector.weight", "magnitude"),
    (".lora_magnitude_vector.default.weight", "magnitude"),
    (".token_adapter.trainable_tokens_delta", "token_rows"),
    (".trainable_tokens_delta", "token_rows"),
    (".alpha", "alpha"),
    (".scalar", "scalar"),
    (".dora_scale", "dora_scale"),
    (".hada_w1_a", "hada_w1_a"),
    (".hada_w1_b", "hada_w1_b"),
    (".hada_w2_a", "hada_w2_a"),
    (".hada_w2_b", "hada_w2_b"),
    (".hada_t1", "hada_t1"),
    (".hada_t2", "hada_t2"),
    (".lokr_w1", "lokr_w1"),
    (".lokr_w1_a", "lokr_w1_a"),
    (".lokr_w1_b", "lokr_w1_b"),
    (".lokr_w2", "lokr_w2"),
    (".lokr_w2_a", "lokr_w2_a"),
    (".lokr_w2_b", "lokr_w2_b"),
    (".lokr_t2", "lokr_t2"),
    (".oft_blocks", "oft_blocks"),
    (".rescale", "rescale"),
    (".a1.weight", "a1"),
    (".a2.weight", "a2"),
    (".b1.weight", "b1"),
    (".b2.weight", "b2"),
    (".diff", "diff"),
    (".diff_b", "diff_b"),
    (".w_norm", "w_norm"),
    (".b_norm", "b_norm"),
    (".on_input", "on_input"),
    (".oft_R.weight", "oft_r"),
    (".boft_R", "boft_r"),
    (".boft_s", "boft_s"),
    (".ia3_l", "ia3_l"),
    (".hra_u", "hra_u"),
    (".vera_lambda_b", "vera_lambda_b"),
    (".vera_lambda_d", "vera_lambda_d"),
    (".glora_A.X", "glora_a"),
    (".glora_A.Xd", "glora_a_up"),
    (".glora_A.Xu", "glora_a_down"),
    (".glora_B.X", "glora_b"),
    (".glora_B.Xd", "glora_b_up"),
    (".glora_B.Xu", "glora_b_down"),
    (".glora_C.X", "glora_c"),
    (".glora_C.Xd", "glora_c_up"),
    (".glora_C.Xu", "glora_c_down"),
    (".glora_D.X", "glora_d"),
    (".glora_E.X", "glora_e"),
];

/// A key cut into the module's name and the part; `None` if no part is spelt so.
pub(crate) fn split(key: &str) -> Option<(&str, &'static str)> {
    spelt(key).or_else(|| {
        // Some tools leave the adapter's name in: `lora_A.NAME.weight`.
        let (rest, name) = key.strip_suffix(".weight")?.rsplit_once('.')?;
        let parts = [(".lora_A", "lora_down"), (".lora_B", "lora_up")];
        let (module, part) = parts.into_iter().find_map(|(end, part)| Some((rest.strip_suffix(end)?, part)))?;
        (!module.is_empty() && !name.is_empty()).then_some((module, part))
    })
}

fn spelt(key: &str) -> Option<(&str, &'static str)> {
    let fits = SPELLINGS.iter().filter_map(|&(suffix, part)| Some((key.strip_suffix(suffix)?, suffix.len(), part)));
    let (module, _, part) = fits.filter(|(module, ..)| !module.is_empty()).max_by_key(|&(_, length, _)| length)?;
    Some((module, part))
}

/// What a PEFT configuration says of a module beyond its tensors.
#[derive(Debug, Clone, Default)]
pub(super) struct PeftContext {
    /// `lora_alpha` (or `alpha`) with its pattern, times √rank for rsLoRA.
    pub(super) alpha: Option<f64>,
    /// `use_cayley_neumann` of OFT.
    pub(super) neumann: bool,
    /// Whether IA3 scales this module's inputs.
    pub(super) feedforward: bool,
    /// VeRA's shared matrices `A` and `B`.
    pub(super) vera: Option<(HostTensor, HostTensor)>,
    /// `eps` of OFT with `coft`: the norm that the skew matrices of all blocks are limited to, each to its part.
    pub(super) limit: Option<f64>,
    /// `use_dora`.
    pub(super) dora: bool,
    /// `apply_GS` of HRA.
    pub(super) orthogonal: bool,
    /// The variant whose first values were taken out of the base, where the file does not hold them.
    pub(super) residual: Option<&'static str>,
    /// The numbers of the trained tokens.
    pub(super) tokens: Option<Vec<u32>>,
}

/// The parts that a trained weight or bias is, which takes the place of the base's.
pub(super) const BIAS: &str = BIAS_VALUE;
pub(super) const WEIGHT: &str = WEIGHT_VALUE;
/// The tensor that a LoRA adds to the bias, with its scale.
pub(super) const LORA_BIAS: &str = "bias";

/// One module's tensors by part.
pub(super) type Parts = BTreeMap<&'static str, HostTensor>;

/// Which tool's conventions hold.
#[derive(Debug, Clone)]
pub(super) enum Tool {
    /// kohya's and LyCORIS' (and diffusers', whose tensors are the same).
    Lycoris,
    /// PEFT's.
    Peft(PeftContext),
}

/// The module that the parts make up, or what is wrong with them.
pub(super) fn assemble(mut parts: Parts, tool: &Tool) -> Result<AdapterModule, String> {
    let scalar = |tensor: Option<HostTensor>| tensor.and_then(|tensor| tensor.to_f32().first().copied()).map(f64::from);
    let stored_alpha = scalar(parts.remove("alpha"));
    let factor = scalar(parts.remove("scalar")).unwrap_or(1.0);
    let peft = match tool {
        Tool::Peft(context) => Some(context),
        Tool::Lycoris => None,
    };
    // 0 stands for "as the rank" in files of some tools.
    let alpha = stored_alpha.filter(|&alpha| alpha != 0.0).or(peft.and_then(|context| context.alpha));
    let has = |parts: &Parts, part: &str| parts.contains_key(part);
    let side = |tensor: &HostTensor, axis: usize| tensor.shape().get(axis).copied().unwrap_or(0);

    let mut module = AdapterModule { variant: String::new(), tensors: BTreeMap::new(), rank: 1, alpha: 1.0 };
    let mut take = |part: &'static str, name: &str, parts: &mut Parts| match parts.remove(part) {
        Some(tensor) => {
            module.tensors.insert(name.to_owned(), tensor);
            Ok(())
        }
        None => Err(format!("`{part}` is missing")),
    };

    if has(&parts, "lora_down") || has(&parts, "lora_up") || has(&parts, "lora_mid") {
        take("lora_down", "down", &mut parts)?;
        take("lora_up", "up", &mut parts)?;
        if has(&parts, "lora_mid") {
            take("lora_mid", "mid", &mut parts)?;
        }
        if has(&parts, "lora_bias") {
            take("lora_bias", LORA_BIAS, &mut parts)?;
        }
        module.variant = peft.and_then(|context| context.residual).unwrap_or("lora").into();
        module.rank = side(&module.tensors["down"], 0);
        module.alpha = alpha.unwrap_or(module.rank as f64) * factor;
        if let Some(bias) = parts.remove("diff_b") {
            // ComfyUI adds it without alpha (`comfy/lora.py`); what a module holds counts with alpha by rank.
            if module.scale() == 0.0 || module.tensors.contains_key(LORA_BIAS) {
                return Err("`diff_b` goes beside factors that count, and beside no other bias".into());
            }
            module.tensors.insert(LORA_BIAS.into(), super::scaled(&bias, module.scale().recip()));
        }
    } else if has(&parts, "embedding_down") || has(&parts, "embedding_up") {
        take("embedding_down", "embedding_down", &mut parts)?;
        take("embedding_up", "embedding_up", &mut parts)?;
        module.variant = "lora".into();
        module.rank = side(&module.tensors["embedding_down"], 0);
        module.alpha = alpha.unwrap_or(module.rank as f64) * factor;
    } else if has(&parts, "hada_w1_a") || has(&parts, "hada_w2_a") {
        for (part, name) in [("hada_w1_a", "w1_a"), ("hada_w1_b", "w1_b"), ("hada_w2_a", "w2_a"), ("hada_w2_b", "w2_b")]
        {
            take(part, name, &mut parts)?;
        }
        if has(&parts, "hada_t1") || has(&parts, "hada_t2") {
            take("hada_t1", "t1", &mut parts)?;
            take("hada_t2", "t2", &mut parts)?;
        }
        module.variant = "loha".into();
        module.rank = side(&module.tensors["w1_b"], 0);
        module.alpha = alpha.unwrap_or(module.rank as f64) * factor;
    } else if parts.keys().any(|part| part.starts_with("lokr_")) {
        for (whole, a, b) in [("lokr_w1", "lokr_w1_a", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a", "lokr_w2_b")] {
            if has(&parts, whole) {
                take(whole, &whole["lokr_".len()..], &mut parts)?;
            } else {
                take(a, &a["lokr_".len()..], &mut parts)?;
                take(b, &b["lokr_".len()..], &mut parts)?;
            }
        }
        if has(&parts, "lokr_t2") {
            take("lokr_t2", "t2", &mut parts)?;
        }
        module.variant = "lokr".into();
        let low_rank = ["w2_b", "w1_b"].iter().find_map(|name| module.tensors.get(*name)).map(|tensor| side(tensor, 0));
        (module.rank, module.alpha) = match (low_rank, peft) {
            (Some(rank), _) => (rank, alpha.unwrap_or(rank as f64) * factor),
            // PEFT divides by its configured rank even so; LyCORIS and ComfyUI apply no scale.
            (None, Some(context)) => (1, context.alpha.unwrap_or(1.0) * factor),
            (None, None) => (1, factor),
        };
    } else if has(&parts, "oft_blocks") {
        take("oft_blocks", "blocks", &mut parts)?;
        if has(&parts, "rescale") {
            take("rescale", "rescale", &mut parts)?;
        }
        module.variant = if module.tensors["blocks"].shape().len() == 4 { "boft" } else { "oft" }.into();
        // The constraint, in which 0 is none.
        module.alpha = stored_alpha.unwrap_or(0.0);
    } else if has(&parts, "oft_r") {
        let skew = parts.remove("oft_r").ok_or("`oft_r` is missing")?;
        let limit = peft.and_then(|context| context.limit);
        module.tensors.insert("skew".into(), limit.map_or(Ok(skew.clone()), |limit| shortened(&skew, limit))?);
        let neumann = peft.is_some_and(|context| context.neumann);
        module.variant = if neumann { "peft-oft-neumann" } else { "peft-oft" }.into();
    } else if has(&parts, "boft_r") {
        take("boft_r", "blocks", &mut parts)?;
        take("boft_s", "rescale", &mut parts)?;
        module.variant = "peft-boft".into();
    } else if has(&parts, "hra_u") {
        let orthogonal = peft.is_some_and(|context| context.orthogonal);
        take("hra_u", if orthogonal { "orthogonal" } else { "u" }, &mut parts)?;
        module.variant = "peft-hra".into();
    } else if has(&parts, "a1") {
        for name in ["a1", "a2", "b1", "b2"] {
            take(name, name, &mut parts)?;
        }
        module.variant = "glora".into();
        module.rank = side(&module.tensors["a2"], 0);
        module.alpha = alpha.unwrap_or(module.rank as f64) * factor;
    } else if parts.keys().any(|part| part.starts_with("glora_")) {
        let glora: Vec<&'static str> = parts.keys().copied().filter(|part| part.starts_with("glora_")).collect();
        for part in glora {
            take(part, &part["glora_".len()..], &mut parts)?;
        }
        module.variant = "peft-glora".into();
    } else if has(&parts, "diff") || has(&parts, "diff_b") || has(&parts, "w_norm") || has(&parts, "b_norm") {
        for (part, name) in [("diff", "weight"), ("w_norm", "weight"), ("diff_b", "bias"), ("b_norm", "bias")] {
            if has(&parts, part) {
                take(part, name, &mut parts)?;
            }
        }
        module.variant = "full".into();
    } else if has(&parts, "on_input") {
        let on_input = scalar(parts.remove("on_input")).unwrap_or(0.0) != 0.0;
        let weight = parts.remove("weight").ok_or("`weight` is missing")?;
        module.variant = "lycoris-ia3".into();
        module.tensors.insert(if on_input { "input" } else { "output" }.into(), flat(weight)?);
    } else if let Some(factors) = parts.remove("ia3_l") {
        let input = peft.is_some_and(|context| context.feedforward);
        let offsets = factors.to_f32().iter().map(|factor| factor - 1.0).collect();
        let offsets = HostTensor::from_f32([factors.elements()], offsets).map_err(|error| error.to_string())?;
        module.variant = "ia3".into();
        module.tensors.insert(if input { "input" } else { "output" }.into(), offsets);
    } else if has(&parts, "vera_lambda_b") || has(&parts, "vera_lambda_d") {
        take("vera_lambda_b", "lambda_b", &mut parts)?;
        take("vera_lambda_d", "lambda_d", &mut parts)?;
        let (a, b) = peft
            .and_then(|context| context.vera.as_ref())
            .ok_or("the shared matrices vera_A and vera_B are not in the file (save with save_projection=True)")?;
        // The layer cuts its own width and height out of them.
        module.tensors.insert("a".into(), a.clone());
        module.tensors.insert("b".into(), b.clone());
        module.variant = "vera".into();
    } else if has(&parts, TOKEN_ROWS) {
        take(TOKEN_ROWS, TOKEN_ROWS, &mut parts)?;
        let tokens = peft.and_then(|context| context.tokens.as_ref());
        let tokens = tokens.ok_or("the configuration does not say which tokens were trained")?;
        let rows = side(&module.tensors[TOKEN_ROWS], 0);
        if tokens.len() != rows {
            return Err(format!("{rows} rows are there for the {} tokens of the configuration", tokens.len()));
        }
        let numbers = tokens.iter().map(|token| *token as f32).collect();
        let numbers = HostTensor::from_f32([rows], numbers).map_err(|error| error.to_string())?;
        module.tensors.insert(TOKENS.into(), numbers);
        module.variant = "full".into();
    } else if has(&parts, WEIGHT) || has(&parts, BIAS) {
        if has(&parts, WEIGHT) {
            take(WEIGHT, WEIGHT, &mut parts)?;
        }
        module.variant = "full".into();
    } else {
        return Err(format!("its tensors {:?} make up no adapter", parts.keys().collect::<Vec<_>>()));
    }

    if let Some(magnitude) = parts.remove("dora_scale") {
        module.variant = match module.variant.as_str() {
            "lora" => "lycoris-dora",
            "loha" => "lycoris-dora-loha",
            "lokr" => "lycoris-dora-lokr",
            other => return Err(format!("`dora_scale` goes with LoRA, LoHa or LoKr, not with {other}")),
        }
        .into();
        module.tensors.insert("magnitude".into(), magnitude);
    }
    if let Some(magnitude) = parts.remove("magnitude") {
        if module.variant != "lora" {
            return Err(format!("`lora_magnitude_vector` goes with LoRA, not with {}", module.variant));
        }
        module.variant = "dora".into();
        module.tensors.insert("magnitude".into(), flat(magnitude)?);
    }
    if let Some(bias) = parts.remove(BIAS) {
        if !["lora", "full"].contains(&module.variant.as_str()) {
            return Err(format!("a trained bias goes with LoRA, not with {}", module.variant));
        }
        module.tensors.insert(BIAS_VALUE.into(), bias);
    }
    if module.variant == "lora" && peft.is_some_and(|context| context.dora) {
        return Err("`lora_magnitude_vector` is missing, and the configuration says `use_dora`".into());
    }
    match parts.keys().next() {
        Some(part) => Err(format!("`{part}` is no part of {}", module.variant)),
        None if module.rank == 0 => Err("its factors show no rank".into()),
        None if !module.alpha.is_finite() => Err("its alpha is not finite".into()),
        None => Ok(module),
    }
}

/// Whether alpha divided by the rank is a factor on a module's update.
pub(super) fn has_scale(module: &AdapterModule) -> bool {
    match module.variant.as_str() {
        "lora" | "dora" | "lycoris-dora" | "loha" | "lycoris-dora-loha" | "glora" => true,
        "lokr" | "lycoris-dora-lokr" => !has_whole_factors(module),
        _ => false,
    }
}

/// Whether both factors of a LoKr are whole matrices. LyCORIS and what follows it then apply no scale.
fn has_whole_factors(module: &AdapterModule) -> bool {
    ["w1", "w2"].iter().all(|name| module.tensors.contains_key(*name))
}

/// Whether a module is PEFT's DoRA, which the kohya layout has in LyCORIS' form alone.
pub(super) fn is_respelt_dora(module: &AdapterModule) -> bool {
    module.variant == "dora"
}

/// The suffixes and tensors of a module in the kohya and LyCORIS spelling, alpha among them (always F32), in `dtype`.
pub(super) fn spell(module: &AdapterModule, dtype: DType) -> Result<Vec<(String, HostTensor)>, String> {
    const LORA: &[(&str, &str)] = &[
        ("down", "lora_down.weight"),
        ("mid", "lora_mid.weight"),
        ("up", "lora_up.weight"),
        (LORA_BIAS, "diff_b"),
        ("magnitude", "dora_scale"),
    ];
    const LOHA: &[(&str, &str)] = &[
        ("w1_a", "hada_w1_a"),
        ("w1_b", "hada_w1_b"),
        ("w2_a", "hada_w2_a"),
        ("w2_b", "hada_w2_b"),
        ("t1", "hada_t1"),
        ("t2", "hada_t2"),
        ("magnitude", "dora_scale"),
    ];
    const LOKR: &[(&str, &str)] = &[
        ("w1", "lokr_w1"),
        ("w1_a", "lokr_w1_a"),
        ("w1_b", "lokr_w1_b"),
        ("w2", "lokr_w2"),
        ("w2_a", "lokr_w2_a"),
        ("w2_b", "lokr_w2_b"),
        ("t2", "lokr_t2"),
        ("magnitude", "dora_scale"),
    ];
    const OFT: &[(&str, &str)] = &[("blocks", "oft_blocks"), ("rescale", "rescale")];
    const GLORA: &[(&str, &str)] =
        &[("a1", "a1.weight"), ("a2", "a2.weight"), ("b1", "b1.weight"), ("b2", "b2.weight")];
    let in_factor = without_scale(module);
    let module = in_factor.as_ref().unwrap_or(module);
    let is_norm = module.tensors.get("weight").is_some_and(|weight| weight.shape().len() == 1);
    let names: &[(&str, &str)] = match module.variant.as_str() {
        "lora" | "dora" | "lycoris-dora" => LORA,
        "loha" | "lycoris-dora-loha" => LOHA,
        "lokr" | "lycoris-dora-lokr" => LOKR,
        "oft" | "boft" => OFT,
        "glora" => GLORA,
        "full" if is_norm => &[("weight", "w_norm"), ("bias", "b_norm")],
        "full" => &[("weight", "diff"), ("bias", "diff_b")],
        "lycoris-ia3" => &[("input", "weight"), ("output", "weight")],
        "peft-oft" | "peft-oft-neumann" | "peft-boft" | "peft-glora" | "peft-hra" | "ia3" | "vera" | "pissa"
        | "pissa-fast" | "olora" => {
            return Err(format!(
                "the layout has no form of {}; merge it, or flatten it to a plain LoRA (`lora convert --flatten RANK --base …`)",
                module.variant
            ));
        }
        // A user's variant: its own names behind its own.
        custom => {
            let mut spelt: Vec<_> = module
                .tensors
                .iter()
                .map(|(name, tensor)| (format!("{custom}.{name}"), tensor.to_dtype(dtype)))
                .collect();
            spelt.push(("alpha".into(), alpha(module.scale())?));
            return Ok(spelt);
        }
    };
    let mut spelt = Vec::with_capacity(module.tensors.len() + 1);
    for (name, tensor) in &module.tensors {
        let Some((_, suffix)) = names.iter().find(|(known, _)| known == name) else {
            return Err(format!("the layout has no form of its tensor `{name}`"));
        };
        let tensor = match (module.variant.as_str(), name.as_str()) {
            // LyCORIS keeps one axis of the weight; this one goes along the outputs.
            ("dora", "magnitude") => {
                let axes = module.tensors.get("up").map_or(2, |up| up.shape().len());
                let mut shape = vec![1; axes];
                shape[0] = tensor.elements();
                tensor.clone().reshape(shape).map_err(|error| error.to_string())?
            }
            ("lora", LORA_BIAS) => super::scaled(tensor, module.scale()),
            _ => tensor.clone(),
        };
        spelt.push(((*suffix).to_owned(), tensor.to_dtype(dtype)));
    }
    match module.variant.as_str() {
        "lycoris-ia3" => {
            let on_input = f32::from(u8::from(module.tensors.contains_key("input")));
            spelt.push(("on_input".into(), scalar_tensor(on_input)?));
        }
        "full" => {}
        _ => spelt.push(("alpha".into(), alpha(module.alpha)?)),
    }
    Ok(spelt)
}

/// A module whose layout has no scale for it, with its scale in a tensor; `None` where nothing is to be done.
fn without_scale(module: &AdapterModule) -> Option<AdapterModule> {
    let names: &[&str] = match module.variant.as_str() {
        "lokr" | "lycoris-dora-lokr" if has_whole_factors(module) => &["w1"],
        "full" => &["weight", "bias"],
        "lycoris-ia3" => &["input", "output"],
        _ => return None,
    };
    let scale = module.scale();
    let mut scaled = module.clone();
    for name in names {
        if let Some(tensor) = scaled.tensors.get_mut(*name) {
            *tensor = super::scaled(tensor, scale);
        }
    }
    scaled.alpha = scaled.rank as f64;
    Some(scaled)
}

fn alpha(value: f64) -> Result<HostTensor, String> {
    scalar_tensor(value as f32)
}

fn scalar_tensor(value: f32) -> Result<HostTensor, String> {
    HostTensor::from_f32([], vec![value]).map_err(|error| error.to_string())
}

/// Upper triangles of skew matrices, `[blocks, b(b-1)/2]`, each no longer than its part of a limit: PEFT shortens them
/// so whenever it computes with them.
fn shortened(skew: &HostTensor, limit: f64) -> Result<HostTensor, String> {
    let blocks = skew.shape().first().copied().unwrap_or(1).max(1);
    let limit = limit / (blocks as f64).sqrt();
    let mut values = skew.to_f32().into_owned();
    for block in values.chunks_mut((skew.elements() / blocks).max(1)) {
        // Each number stands in its matrix twice.
        let norm = (2.0 * block.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>()).sqrt();
        if norm > limit {
            block.iter_mut().for_each(|value| *value = (f64::from(*value) * limit / norm) as f32);
        }
    }
    HostTensor::from_f32(skew.shape(), values).map_err(|error| error.to_string())
}

fn flat(tensor: HostTensor) -> Result<HostTensor, String> {
    let count = tensor.elements();
    tensor.reshape([count]).map_err(|error| error.to_string())
}
