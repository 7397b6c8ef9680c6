//! Inventories for the tests: small adapters in each layout, and ways to change them.

use serde_json::{Value, json};

use super::{Consumer, Fate, Inventory, Opinion, opinions};
use crate::safetensors::StoredDType;

impl Inventory {
    pub(super) fn tensor(mut self, name: &str, shape: &[usize]) -> Self {
        self.tensors.insert(name.to_owned(), (StoredDType::F16, shape.to_vec()));
        self
    }

    pub(super) fn without(mut self, part: &str) -> Self {
        self.tensors.retain(|name, _| !name.contains(part));
        self.scalars.retain(|name, _| !name.contains(part));
        self
    }

    /// A module with down, up and alpha (rank 4).
    pub(super) fn lora(self, name: &str, inputs: usize, outputs: usize) -> Self {
        self.tensor(&format!("{name}.lora_down.weight"), &[4, inputs])
            .tensor(&format!("{name}.lora_up.weight"), &[outputs, 4])
            .alpha(name, 2.0)
    }

    pub(super) fn alpha(mut self, name: &str, alpha: f64) -> Self {
        self.scalars.insert(format!("{name}.alpha"), alpha);
        self.tensor(&format!("{name}.alpha"), &[])
    }

    /// A pair without alpha, in PEFT's spelling (rank 8).
    pub(super) fn pair(self, name: &str) -> Self {
        self.tensor(&format!("{name}.lora_A.weight"), &[8, 64]).tensor(&format!("{name}.lora_B.weight"), &[64, 8])
    }

    /// With a field of the config set; null removes it.
    pub(super) fn set(mut self, field: &str, value: Value) -> Self {
        let config = self.config.get_or_insert_with(|| json!({})).as_object_mut().unwrap();
        config.insert(field.to_owned(), value);
        config.retain(|_, value| !value.is_null());
        self
    }

    /// With every name changed.
    pub(super) fn renamed(&self, rename: impl Fn(&str) -> String) -> Self {
        Self {
            tensors: self.tensors.iter().map(|(name, tensor)| (rename(name), tensor.clone())).collect(),
            scalars: self.scalars.iter().map(|(name, value)| (rename(name), *value)).collect(),
            ..self.clone()
        }
    }
}

const ATTENTION: [&str; 4] = ["to_q", "to_k", "to_v", "to_out_0"];
const TEXT: [&str; 5] = ["self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1"];

fn kohya(block: &str, context: usize, texts: &[&str]) -> Inventory {
    let mut inventory = Inventory::default();
    let unet = format!("lora_unet_{block}_transformer_blocks_0");
    for name in ATTENTION {
        inventory = inventory.lora(&format!("{unet}_attn1_{name}"), 640, 640);
    }
    inventory = inventory.lora(&format!("{unet}_attn2_to_k"), context, 640);
    for text in texts {
        for name in TEXT {
            inventory = inventory.lora(&format!("{text}_{name}"), 768, 768);
        }
    }
    inventory
}

pub(super) const SD1_TEXT: &str = "lora_te_text_model_encoder_layers_0";
pub(super) const SD1_BLOCK: &str = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0";

pub(super) fn sd1() -> Inventory {
    kohya("down_blocks_1_attentions_0", 768, &[SD1_TEXT]).lora("lora_unet_down_blocks_0_resnets_0_conv1", 320, 320)
}

pub(super) fn sd2() -> Inventory {
    kohya("down_blocks_1_attentions_0", 1024, &["lora_te_text_model_encoder_layers_22"])
}

pub(super) fn sdxl() -> Inventory {
    let texts = ["lora_te1_text_model_encoder_layers_0", "lora_te2_text_model_encoder_layers_31"];
    kohya("input_blocks_4_1", 2048, &texts)
}

/// SD1 in diffusers' dotted names, q, k, v and out in `lora_A`/`lora_B`.
pub(super) fn dotted_sd1(prefix: &str) -> Inventory {
    let mut inventory = Inventory::default();
    for name in ["attn1.to_q", "attn1.to_out.0", "ff.net.2"] {
        inventory = inventory.pair(&format!("{prefix}down_blocks.1.attentions.0.transformer_blocks.0.{name}"));
    }
    inventory
}

pub(super) const QUERY: &str = "base_model.model.model.layers.0.self_attn.q_proj";

pub(super) fn language_model() -> Inventory {
    let mut inventory = Inventory::default();
    for layer in 0..2 {
        for name in ["q_proj", "v_proj"] {
            inventory = inventory.pair(&format!("base_model.model.model.layers.{layer}.self_attn.{name}"));
        }
    }
    inventory.config = Some(json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "some/model", "r": 8,
        "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none", "use_rslora": false,
        "use_dora": false, "modules_to_save": null, "init_lora_weights": true, "rank_pattern": {}, "alpha_pattern": {},
    }));
    inventory
}

/// One consumer's opinion.
pub(super) fn opinion_of(consumer: Consumer, inventory: &Inventory) -> Opinion {
    opinions(inventory).into_iter().find(|opinion| opinion.consumer == consumer).unwrap()
}

pub(super) fn is_ignored(opinion: &Opinion, key: &str) -> bool {
    matches!(opinion.keys[key], Fate::Ignored { .. })
}

pub(super) fn is_refused(opinion: &Opinion, key: &str) -> bool {
    matches!(opinion.keys[key], Fate::Refused { .. })
}

/// The cure of the worst problem, in words.
pub(super) fn cure(opinion: &Opinion) -> Option<String> {
    opinion.problems.first()?.cure.as_ref().map(ToString::to_string)
}
