//! What each family of decoders decides: the switches that no key of its `config.json` names, and the defaults of keys
//! that its files leave out, as transformers has them.

use lora_torch::norm::RmsWeight;
use lora_torch::rotary::RotaryLayout;

use super::config::{LayerNorms, QueryKeyNorm};
use super::keys::Reader;
use super::rotary::RopeDefaults;
use crate::Result;

const BEFORE: LayerNorms = LayerNorms {
    before_attention: Some("input_layernorm"),
    after_attention: None,
    before_feed_forward: Some("post_attention_layernorm"),
    after_feed_forward: None,
};

const AFTER: LayerNorms = LayerNorms {
    before_attention: None,
    after_attention: Some("post_attention_layernorm"),
    before_feed_forward: None,
    after_feed_forward: Some("post_feedforward_layernorm"),
};

const GEMMA_NORMS: LayerNorms = LayerNorms {
    before_attention: Some("input_layernorm"),
    after_attention: Some("post_attention_layernorm"),
    before_feed_forward: Some("pre_feedforward_layernorm"),
    after_feed_forward: Some("post_feedforward_layernorm"),
};

const GLM_NORMS: LayerNorms = LayerNorms {
    before_attention: Some("input_layernorm"),
    after_attention: Some("post_self_attn_layernorm"),
    before_feed_forward: Some("post_attention_layernorm"),
    after_feed_forward: Some("post_mlp_layernorm"),
};

/// What a family decides before the general keys are read: the switches that no key names, and defaults of keys.
pub(super) struct Switches {
    pub(super) norm: RmsWeight,
    pub(super) norms: LayerNorms,
    pub(super) query_key_norm: QueryKeyNorm,
    pub(super) value_norm: bool,
    pub(super) fused_attention: bool,
    pub(super) fused_feed_forward: bool,
    pub(super) tied: bool,
    pub(super) epsilon: f64,
    /// Width of a head where the file names none; else the width over the heads.
    pub(super) head: Option<usize>,
    pub(super) scale: Option<f64>,
    pub(super) embedding_scale: f64,
    pub(super) residual_scale: f64,
    pub(super) logits_scale: f64,
    pub(super) attention_cap: Option<f64>,
    pub(super) logits_cap: Option<f64>,
    pub(super) rope: RopeDefaults,
    /// Width of the window, and the layers that have one where the file does not list the layers' types.
    pub(super) window: Option<usize>,
    pub(super) slides: Vec<bool>,
    /// The file's list of layers' types counts.
    pub(super) reads_types: bool,
    /// Layers without positions.
    pub(super) no_rope: Vec<bool>,
}

/// A family: transformers' `model_type` and its switches.
pub(super) type Family = (&'static str, fn(&Reader<'_>, &mut Switches) -> Result<()>);

pub(super) const GPT_OSS: &str = "gpt_oss";

/// The families that are known here.
pub(super) const FAMILIES: &[Family] = &[
    ("llama", |_, _| Ok(())),
    ("mistral", |config, own| {
        own.window = config.window(Some(4096))?;
        own.reads_types = false;
        Ok(())
    }),
    ("ministral", |config, own| {
        own.window = config.window(Some(4096))?;
        Ok(())
    }),
    ("ministral3", |config, own| {
        (own.rope.theta, own.epsilon) = (1e6, 1e-5);
        (own.head, own.window, own.reads_types) = (Some(128), config.window(None)?, false);
        Ok(())
    }),
    ("qwen2", qwen),
    // The language model of Qwen2.5-VL, as part of the whole and by itself.
    ("qwen2_5_vl", qwen),
    ("qwen2_5_vl_text", qwen),
    ("qwen3", |config, own| {
        (own.head, own.query_key_norm) = (Some(128), QueryKeyNorm::Heads);
        qwen(config, own)
    }),
    ("qwen3_moe", |config, own| {
        own.query_key_norm = QueryKeyNorm::Heads;
        qwen(config, own)?;
        own.slides.fill(true);
        own.reads_types = false;
        Ok(())
    }),
    ("smollm3", smollm3),
    ("gemma", |config, own| {
        gemma(config, own)?;
        (own.norms, own.scale) = (BEFORE, None);
        Ok(())
    }),
    ("gemma2", |config, own| {
        gemma(config, own)?;
        own.attention_cap = config.cap("attn_logit_softcapping", Some(50.0))?;
        own.logits_cap = config.cap("final_logit_softcapping", Some(30.0))?;
        own.window = config.window(Some(4096))?;
        own.slide(|layer| layer % 2 == 0);
        Ok(())
    }),
    ("gemma3_text", |config, own| {
        gemma(config, own)?;
        own.query_key_norm = QueryKeyNorm::Heads;
        own.rope.theta = 1e6;
        own.attention_cap = config.cap("attn_logit_softcapping", None)?;
        own.logits_cap = config.cap("final_logit_softcapping", None)?;
        own.window = config.window(Some(4096))?;
        let pattern = config.size_or("sliding_window_pattern", 6)?;
        own.slide(|layer| (layer + 1) % pattern != 0);
        Ok(())
    }),
    ("gemma4_text", gemma4),
    ("phi3", |config, own| {
        (own.fused_attention, own.fused_feed_forward, own.reads_types) = (true, true, false);
        (own.rope.always_longrope, own.epsilon) = (true, 1e-5);
        own.window = config.window(None)?;
        Ok(())
    }),
    ("olmo2", |_, own| {
        (own.norm, own.norms, own.query_key_norm) = (RmsWeight::Single, AFTER, QueryKeyNorm::All);
        (own.epsilon, own.rope.in_f32) = (1e-5, true);
        Ok(())
    }),
    ("olmo3", |config, own| {
        (own.norm, own.norms, own.query_key_norm) = (RmsWeight::Single, AFTER, QueryKeyNorm::All);
        own.epsilon = 1e-5;
        (own.rope.theta, own.rope.in_f32) = (5e5, true);
        own.window = config.window(Some(4096))?;
        own.slide(|layer| (layer + 1) % 4 != 0);
        Ok(())
    }),
    ("granite", |config, own| {
        own.embedding_scale = config.real("embedding_multiplier")?.unwrap_or(1.0);
        own.residual_scale = config.real("residual_multiplier")?.unwrap_or(1.0);
        own.scale = Some(config.real("attention_multiplier")?.unwrap_or(1.0));
        own.logits_scale = 1.0 / config.real("logits_scaling")?.unwrap_or(1.0);
        Ok(())
    }),
    ("glm", |_, own| {
        glm(own);
        Ok(())
    }),
    ("glm4", |_, own| {
        glm(own);
        own.norms = GLM_NORMS;
        Ok(())
    }),
    (GPT_OSS, |config, own| {
        (own.norm, own.head, own.epsilon) = (RmsWeight::Single, Some(64), 1e-5);
        own.rope.theta = 1.5e5;
        own.window = config.window(Some(128))?;
        own.slide(|layer| layer % 2 == 0);
        Ok(())
    }),
    ("seed_oss", |_, own| {
        own.head = Some(128);
        Ok(())
    }),
];

/// The sizes that files leave out of a language model's configuration inside of a wrapper's: transformers' defaults.
pub(super) fn sizes(architecture: &str) -> &'static [(&'static str, usize)] {
    match architecture {
        "gemma3_text" => &[
            ("vocab_size", 262_208),
            ("hidden_size", 2304),
            ("intermediate_size", 9216),
            ("num_hidden_layers", 26),
            ("num_attention_heads", 8),
            ("num_key_value_heads", 4),
            ("max_position_embeddings", 131_072),
        ],
        "gemma4_text" => &[
            ("vocab_size", 262_144),
            ("hidden_size", 2304),
            ("intermediate_size", 9216),
            ("num_hidden_layers", 30),
            ("num_attention_heads", 8),
            ("num_key_value_heads", 4),
            ("max_position_embeddings", 131_072),
        ],
        "mistral" => &[
            ("vocab_size", 32_000),
            ("hidden_size", 4096),
            ("intermediate_size", 14_336),
            ("num_hidden_layers", 32),
            ("num_attention_heads", 32),
            ("num_key_value_heads", 8),
            ("max_position_embeddings", 131_072),
        ],
        "ministral3" => &[
            ("vocab_size", 131_072),
            ("hidden_size", 4096),
            ("intermediate_size", 14_336),
            ("num_hidden_layers", 34),
            ("num_attention_heads", 32),
            ("num_key_value_heads", 8),
            ("max_position_embeddings", 262_144),
        ],
        _ => &[],
    }
}

fn qwen(config: &Reader<'_>, own: &mut Switches) -> Result<()> {
    // Most files have a window and say that it is not used.
    if config.flag("use_sliding_window")?.unwrap_or(false) {
        own.window = config.window(Some(4096))?;
        let first = config.count_or("max_window_layers", 28)?;
        own.slide(|layer| layer >= first);
    }
    Ok(())
}

fn smollm3(config: &Reader<'_>, own: &mut Switches) -> Result<()> {
    own.tied = true;
    own.rope.theta = 2e6;
    let interval = config.size_or("no_rope_layer_interval", 4)?;
    let layers = own.slides.len();
    own.no_rope = match config.list("no_rope_layers")? {
        // 1 is a layer with positions, despite the key's name.
        Some(list) if list.len() == layers => list.iter().map(|has| has.as_u64() == Some(0)).collect(),
        Some(list) => {
            return Err(config.wrong(format!("no_rope_layers has {} entries for {layers} layers", list.len())));
        }
        None => (1..=layers).map(|layer| layer % interval == 0).collect(),
    };
    if config.flag("use_sliding_window")?.unwrap_or(false) {
        own.window = config.window(None)?;
        own.slides = own.no_rope.clone();
    }
    Ok(())
}

fn gemma(config: &Reader<'_>, own: &mut Switches) -> Result<()> {
    (own.norm, own.norms, own.tied, own.head) = (RmsWeight::OnePlus, GEMMA_NORMS, true, Some(256));
    own.embedding_scale = (config.size("hidden_size")? as f64).sqrt();
    own.scale = Some(config.real("query_pre_attn_scalar")?.unwrap_or(256.0).powf(-0.5));
    Ok(())
}

fn gemma4(config: &Reader<'_>, own: &mut Switches) -> Result<()> {
    gemma(config, own)?;
    if config.flag("enable_moe_block")?.unwrap_or(false) {
        return Err(config.wrong("enable_moe_block is true: Gemma 4 with experts is not built here".into()));
    }
    (own.norm, own.query_key_norm, own.value_norm) = (RmsWeight::Single, QueryKeyNorm::Heads, true);
    own.scale = Some(1.0);
    own.logits_cap = config.cap("final_logit_softcapping", None)?;
    own.window = config.window(Some(512))?;
    let last = own.slides.len().saturating_sub(1);
    own.slide(|layer| (layer + 1) % 6 != 0 && layer != last);
    Ok(())
}

fn glm(own: &mut Switches) {
    (own.fused_feed_forward, own.epsilon) = (true, 1.5625e-7);
    own.head = Some(128);
    (own.rope.layout, own.rope.share) = (RotaryLayout::Interleaved, 0.5);
}

impl Switches {
    pub(super) fn new(layers: usize) -> Self {
        Self {
            norm: RmsWeight::Rounded,
            norms: BEFORE,
            query_key_norm: QueryKeyNorm::None,
            value_norm: false,
            fused_attention: false,
            fused_feed_forward: false,
            tied: false,
            epsilon: 1e-6,
            head: None,
            scale: None,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logits_scale: 1.0,
            attention_cap: None,
            logits_cap: None,
            rope: RopeDefaults {
                theta: 10000.0,
                share: 1.0,
                layout: RotaryLayout::Halves,
                in_f32: false,
                always_longrope: false,
            },
            window: None,
            slides: vec![true; layers],
            reads_types: true,
            no_rope: vec![false; layers],
        }
    }

    fn slide(&mut self, slides: impl Fn(usize) -> bool) {
        self.slides = (0..self.slides.len()).map(slides).collect();
    }
}
