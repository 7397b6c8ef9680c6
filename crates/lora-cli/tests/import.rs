//! `lora import` as a user meets it.

use std::process::Command;

use assert_cmd::prelude::*;
use predicates::prelude::*;
use predicates::str::contains;

fn lora() -> Command {
    Command::cargo_bin("lora").unwrap()
}

const RUN: &str = "pretrained_model_name_or_path = \"base.safetensors\"\ntrain_data_dir = \"data\"\noutput_dir = \"out\"\nresolution = 64\n\
                   network_module = \"networks.lora\"\nnetwork_dim = 2\nmax_train_steps = 2\nlearning_rate = 1e-4\ncaption_extension = \".txt\"\n\
                   dim_from_weights = true\nxformers = true\n";

#[test]
fn a_configuration_is_written_and_each_key_is_told() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("run.toml"), RUN).unwrap();
    let import = |arguments: &[&str]| lora().current_dir(folder.path()).arg("import").args(arguments).assert();
    import(&["run.toml", "--out", "config.toml"]).success().stdout(
        contains("sd-scripts, 11 keys")
            .and(contains("network_dim → lora_rank = 2"))
            .and(contains("no counterpart (1):"))
            .and(contains("dim_from_weights"))
            .and(contains("network_alpha → lora_alpha = 1")),
    );
    let config = std::fs::read_to_string(folder.path().join("config.toml")).unwrap();
    assert!(config.contains("lora_rank = 2  # network_dim") && config.contains("# No counterpart here:"), "{config}");
    import(&["run.toml"]).success().stdout(contains("lora_rank = 2")).stderr(contains("taken ("));
    let json = import(&["run.toml", "--json"]).success().get_output().stdout.clone();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["no_counterpart"][0]["key"], "dim_from_weights");
    let words = ["--", "accelerate", "launch", "train_network.py", "--network_dim", "4"];
    import(&words).success().stdout(contains("lora_rank = 4").and(contains("# base_model")));

    std::fs::write(folder.path().join("run.toml"), RUN.replace("network_dim", "network_dimm")).unwrap();
    import(&["run.toml"])
        .code(2)
        .stderr(contains("run.toml:6: `network_dimm`").and(contains("did you mean `network_dim`")));
    import(&["run.toml", "--allow-unknown"]).success();
    import(&["run.toml", "--from", "axolotl"]).code(2);
    import(&[]).code(2);
}
