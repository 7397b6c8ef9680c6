//! Opening language models: folders of one file or of shards, wrappers of several kinds of input, GGUF, and what is missing.

use std::collections::BTreeMap;
use std::path::Path;

use lora_core::{Component, DType, HostTensor};
use lora_io::checkpoint::Checkpoint;
use lora_io::gguf::{self, Value};
use lora_io::safetensors::write;
use tempfile::tempdir;

fn numbers(shape: [usize; 2], from: usize) -> HostTensor {
    let values = (0..shape[0] * shape[1]).map(|index| (from + index) as f32).collect();
    HostTensor::from_f32(shape, values).unwrap()
}

fn file(path: &Path, names: &[&str]) {
    let tensors: BTreeMap<_, _> =
        names.iter().enumerate().map(|(at, name)| ((*name).to_owned(), numbers([2, 3], at))).collect();
    write(path, &tensors, &BTreeMap::new()).unwrap();
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const LAYER: &str = "model.layers.0.mlp.up_proj.weight";

#[test]
fn shards_are_one_model_and_missing_ones_are_listed() {
    let at = tempdir().unwrap();
    let at = at.path();
    std::fs::write(at.join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    let shard = |number: usize| format!("model-0000{number}-of-00003.safetensors");
    let map = format!(
        r#"{{"weight_map": {{"{EMBEDDING}": "{}", "{LAYER}": "{}", "lm_head.weight": "{}"}}}}"#,
        shard(1),
        shard(2),
        shard(3)
    );
    std::fs::write(at.join("model.safetensors.index.json"), map).unwrap();
    file(&at.join(shard(1)), &[EMBEDDING]);
    let error = Checkpoint::open(at).unwrap_err().to_string();
    assert!(error.contains("model.safetensors.index.json: names 2 of 3 files that are not there"), "{error}");
    assert!(error.contains(&shard(2)) && error.contains(&shard(3)) && !error.contains(&shard(1)), "{error}");
    file(&at.join(shard(2)), &[LAYER]);
    file(&at.join(shard(3)), &["lm_head.weight"]);
    let checkpoint = Checkpoint::open(at).unwrap();
    assert_eq!((checkpoint.family().name, checkpoint.path()), ("language", at));
    let weights = checkpoint.component(Component::LANGUAGE_MODEL).unwrap();
    assert!(weights.names().eq(["lm_head.weight", EMBEDDING, LAYER]));
    assert_eq!(weights.config().unwrap()["model_type"], "llama");
    assert_eq!(weights.values(LAYER).unwrap(), numbers([2, 3], 0));
    assert!(weights.packed(LAYER).unwrap().is_none() && weights.gguf().is_none());
    std::fs::remove_file(at.join("config.json")).unwrap();
    assert!(Checkpoint::open(at).unwrap_err().to_string().contains("config.json: cannot open"));
}

#[test]
fn of_a_wrapper_the_language_model_is_read() {
    for (layer, embedding, vision) in [
        (
            "model.language_model.layers.0.mlp.up_proj.weight",
            "model.language_model.embed_tokens.weight",
            "model.vision.a",
        ),
        ("language_model.model.layers.0.mlp.up_proj.weight", "language_model.model.embed_tokens.weight", "vision.a"),
    ] {
        let at = tempdir().unwrap();
        std::fs::write(at.path().join("config.json"), "{}").unwrap();
        file(&at.path().join("model.safetensors"), &[layer, embedding, vision]);
        let checkpoint = Checkpoint::open(at.path()).unwrap();
        let weights = checkpoint.component(Component::LANGUAGE_MODEL).unwrap();
        assert!(weights.names().eq([EMBEDDING, LAYER]));
        assert_eq!(checkpoint.unused(), [vision]);
        assert_eq!((weights.stored_name(LAYER), weights.stored_name("lm_head.weight")), (Some(layer), None));
    }
}

/// A file as llama.cpp's converter writes it: rows of query and key in its order, no head, divisors of frequencies.
#[test]
fn gguf_has_hugging_faces_names_order_and_configuration() {
    let at = tempdir().unwrap();
    let path = at.path().join("x.gguf");
    let values = [
        ("general.architecture", Value::Text("llama".into())),
        ("llama.embedding_length", Value::Unsigned(4)),
        ("llama.block_count", Value::Unsigned(1)),
        ("llama.feed_forward_length", Value::Unsigned(6)),
        ("llama.attention.head_count", Value::Unsigned(1)),
        ("llama.attention.layer_norm_rms_epsilon", Value::Float(1e-5)),
        ("llama.rope.freq_base", Value::Float(5e5)),
        ("llama.context_length", Value::Unsigned(128)),
        ("tokenizer.ggml.eos_token_id", Value::Unsigned(2)),
    ];
    let values: BTreeMap<String, Value> = values.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    let mut tensors = BTreeMap::from([
        ("token_embd.weight".to_owned(), numbers([5, 4], 0)),
        ("blk.0.attn_q.weight".to_owned(), numbers([4, 4], 0)),
        ("rope_freqs.weight".to_owned(), HostTensor::from_f32([2], vec![1.0, 8.0]).unwrap()),
    ]);
    gguf::write(&path, &values, &tensors).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let weights = checkpoint.component(Component::LANGUAGE_MODEL).unwrap();
    assert!(weights.names().eq([EMBEDDING, "model.layers.0.self_attn.q_proj.weight"]));
    let rows = weights.values("model.layers.0.self_attn.q_proj.weight").unwrap();
    let first: Vec<f32> = rows.to_f32().chunks(4).map(|row| row[0]).collect();
    assert_eq!(first, [0.0, 8.0, 4.0, 12.0], "the halves of a head apart");
    let expected = serde_json::json!({
        "model_type": "llama", "hidden_size": 4, "num_hidden_layers": 1, "intermediate_size": 6,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 5, "tie_word_embeddings": true,
        "rope_theta": 5e5, "max_position_embeddings": 128, "eos_token_id": 2, "rms_norm_eps": f64::from(1e-5f32),
        "rope_scaling": {
            "rope_type": "longrope", "short_factor": [1.0, 8.0], "long_factor": [1.0, 8.0], "attention_factor": 1.0,
            "original_max_position_embeddings": 128,
        },
    });
    assert_eq!(weights.config().unwrap(), &expected);
    assert_eq!(weights.gguf().unwrap().number("llama.block_count"), Some(1));
    assert_eq!(weights.values(EMBEDDING).unwrap().dtype(), DType::F32);
    let before = weights.sha256().unwrap();
    // Whoever asks for a view is told that there is none.
    assert!(weights.tensor(EMBEDDING).unwrap_err().to_string().contains("is in GGUF"));

    tensors.insert("token_embd.weight".to_owned(), numbers([5, 4], 1));
    gguf::write(&path, &values, &tensors).unwrap();
    let other = Checkpoint::open(&path).unwrap();
    assert_ne!(other.component(Component::LANGUAGE_MODEL).unwrap().sha256().unwrap(), before);
    let mut short = values.clone();
    short.remove("llama.block_count");
    gguf::write(&path, &short, &tensors).unwrap();
    assert!(Checkpoint::open(&path).unwrap_err().to_string().contains("the header has no `llama.block_count`"));
}

/// A GGUF file of an architecture with these values and tensors, opened.
fn opened(at: &Path, architecture: &str, values: &[(&str, Value)], tensors: &[(&str, HostTensor)]) -> Checkpoint {
    let own = |(key, value): &(&str, Value)| (format!("{architecture}.{key}"), value.clone());
    let sizes = [("embedding_length", 4), ("block_count", 1), ("feed_forward_length", 6), ("attention.head_count", 2)];
    let sizes = sizes.map(|(key, number)| (key, Value::Unsigned(number)));
    let mut values: BTreeMap<String, Value> = sizes.iter().chain(values).map(own).collect();
    values.insert("general.architecture".into(), Value::Text(architecture.into()));
    let tensors = tensors.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect();
    let path = at.join(format!("{architecture}.gguf"));
    gguf::write(&path, &values, &tensors).unwrap();
    Checkpoint::open(path).unwrap()
}

#[test]
fn gemmas_norms_are_stored_with_one_added_and_have_other_names() {
    let at = tempdir().unwrap();
    let norm = |value: f32| HostTensor::from_f32([4], vec![value; 4]).unwrap();
    let tensors = [
        ("token_embd.weight", numbers([5, 4], 0)),
        ("output_norm.weight", norm(1.5)),
        ("blk.0.attn_norm.weight", norm(1.25)),
        ("blk.0.post_attention_norm.weight", norm(1.0)),
        ("blk.0.ffn_norm.weight", norm(0.5)),
        ("blk.0.post_ffw_norm.weight", norm(2.0)),
        ("blk.0.attn_q.weight", numbers([8, 4], 0)),
    ];
    let values = [
        ("attention.key_length", Value::Unsigned(4)),
        ("attention.sliding_window", Value::Unsigned(16)),
        ("attn_logit_softcapping", Value::Float(50.0)),
        ("final_logit_softcapping", Value::Float(30.0)),
    ];
    let checkpoint = opened(at.path(), "gemma2", &values, &tensors);
    let weights = checkpoint.component(Component::LANGUAGE_MODEL).unwrap();
    for (name, value) in [
        ("model.norm", 0.5),
        ("model.layers.0.input_layernorm", 0.25),
        ("model.layers.0.post_attention_layernorm", 0.0),
        ("model.layers.0.pre_feedforward_layernorm", -0.5),
        ("model.layers.0.post_feedforward_layernorm", 1.0),
    ] {
        assert_eq!(weights.values(&format!("{name}.weight")).unwrap(), norm(value), "{name}");
    }
    let query = weights.values("model.layers.0.self_attn.q_proj.weight").unwrap();
    assert_eq!(query, numbers([8, 4], 0), "in Hugging Face's order already");
    let config = weights.config().unwrap();
    assert_eq!((&config["query_pre_attn_scalar"], &config["sliding_window"]), (&4.into(), &16.into()));
    assert_eq!((&config["attn_logit_softcapping"], &config["final_logit_softcapping"]), (&50.0.into(), &30.0.into()));
}

#[test]
fn phis_layers_are_fused_and_its_factors_are_longropes() {
    let at = tempdir().unwrap();
    let factors = |values: [f32; 1]| HostTensor::from_f32([1], values.to_vec()).unwrap();
    let tensors = [
        ("token_embd.weight", numbers([5, 4], 0)),
        ("output.weight", numbers([5, 4], 1)),
        ("blk.0.attn_qkv.weight", numbers([12, 4], 0)),
        ("blk.0.ffn_up.weight", numbers([12, 4], 1)),
        ("rope_factors_short.weight", factors([1.0])),
        ("rope_factors_long.weight", factors([4.0])),
    ];
    let values = [
        ("context_length", Value::Unsigned(512)),
        ("rope.scaling.original_context_length", Value::Unsigned(64)),
        ("rope.scaling.attn_factor", Value::Float(1.25)),
        ("attention.sliding_window", Value::Unsigned(0)),
    ];
    let checkpoint = opened(at.path(), "phi3", &values, &tensors);
    let weights = checkpoint.component(Component::LANGUAGE_MODEL).unwrap();
    let layer = "model.layers.0";
    assert!(weights.names().eq([
        "lm_head.weight",
        EMBEDDING,
        &format!("{layer}.mlp.gate_up_proj.weight"),
        &format!("{layer}.self_attn.qkv_proj.weight"),
    ]));
    let config = weights.config().unwrap();
    assert_eq!((&config["tie_word_embeddings"], &config["sliding_window"]), (&false.into(), &serde_json::Value::Null));
    let expected = serde_json::json!({
        "rope_type": "longrope", "short_factor": [1.0], "long_factor": [4.0], "attention_factor": 1.25,
        "original_max_position_embeddings": 64,
    });
    assert_eq!(config["rope_scaling"], expected);
}
