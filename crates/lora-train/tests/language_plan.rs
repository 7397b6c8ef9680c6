//! Plans of language models at their real sizes, from headers alone: on which cards they train. Whether the numbers are true is
//! `language_memory`'s to say.

use lora_models::synthetic::write_language_headers;
use lora_train::Plugins;
use lora_train::config::{Format, TrainConfig};
use lora_train::plan::{Plan, plan};
use serde_json::{Value, json};

const GIB: f64 = (1u64 << 30) as f64;

/// Llama 3.1's `config.json`, of the sizes that its models differ in.
fn llama(width: usize, inner: usize, layers: usize, heads: usize) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": false,
    })
}

/// The plan of a QLoRA of rank 16 on all linear layers, rows of 2,048 tokens.
fn planned(config: &Value, keys: &[&str]) -> Plan {
    let base = tempfile::tempdir().unwrap();
    write_language_headers(base.path(), config).unwrap();
    let text = format!(
        "base_model: {}\ntrain_data_dir: none\noutput_dir: none\ndevice: cuda\nprecision: bf16\nbase_storage: nf4\n\
         lora_rank: 16\ntarget_modules: all-linear\nmax_seq_length: 2048\nbatch_size: 1\n\
         gradient_checkpointing: true\n",
        base.path().display()
    );
    let plan = plan(&TrainConfig::from_text(&text, Format::Yaml, keys).unwrap(), &Plugins::default()).unwrap();
    println!("{keys:?}:\n{plan}");
    plan
}

/// Of a configuration as it stands: within a budget that is enough, alternatives are not looked for.
fn peak(config: &Value, keys: &[&str]) -> f64 {
    planned(config, &[keys, &["vram_budget=100GiB"]].concat()).as_configured.peak() as f64 / GIB
}

#[test]
fn a_model_of_eight_billion_trains_in_six_gib_and_in_three_with_its_layers_in_host_memory() {
    let base = llama(4096, 14_336, 32, 32);
    let [resident, offloaded] = [&[][..], &["offload_base=true"]].map(|keys| peak(&base, keys));
    assert!(resident <= 6.0 && offloaded < 2.8, "{resident:.2} and {offloaded:.2} GiB");
    // Weights, adapter and its optimiser take 4.7 GiB: less than that needs the layers in host memory, 5.5 GiB does not.
    let within = planned(&base, &["vram_budget=5.5GiB"]);
    assert!(!within.config().offload_base && within.planned.peak() as f64 <= 5.5 * GIB, "{within}");
}

#[test]
fn a_model_of_seventy_billion_trains_in_eight_gib_with_its_layers_in_host_memory_and_in_six_with_their_inputs() {
    let base = llama(8192, 28_672, 80, 64);
    let keys = ["offload_base=true", "cpu_offload_checkpointing=true"];
    let [layers, inputs_too] = [&keys[..1], &keys].map(|keys| peak(&base, keys));
    assert!(layers <= 8.0 && inputs_too < 6.2, "{layers:.2} and {inputs_too:.2} GiB");
}
