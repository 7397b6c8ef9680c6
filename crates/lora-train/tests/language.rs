//! Language models from the configuration to PEFT's folder: a tiny Qwen2 with random weights, twelve conversations.
//! Losses are transformers' and PEFT's (`golden/language/README.md`).

#[path = "common/language.rs"]
mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use common::{golden, loss, prepare, refusal, steps, try_config, workspace};
use lora_core::HostTensor;
use lora_io::adapter;
use lora_io::safetensors::{self, SafetensorsFile};
use lora_train::base::Sample;
use lora_train::config::TrainConfig;
use lora_train::inference::{EvaluationOptions, TextModel, TextModelOptions};
use lora_train::{Plugins, train};

/// Mean cross entropy of all conversations' answers without an adapter.
const LOSS: f64 = 6.576780228273052;
/// The same with PEFT's adapter.
const LOSS_WITH_ADAPTER: f64 = 5.760379094902991;

#[test]
fn losses_are_those_of_transformers_and_peft() {
    let folder = workspace();
    let bare = loss(&mut prepare(folder.path(), &[]));
    assert!((bare - LOSS).abs() < 1e-5, "{bare}");
    let init_from = format!("init_from={}", golden("adapter").display());
    for keys in [&[][..], &["packing=true"], &["gradient_checkpointing=true", "batch_size=1"]] {
        let keys = [&[&*init_from], keys].concat();
        let with = loss(&mut prepare(folder.path(), &keys));
        assert!((with - LOSS_WITH_ADAPTER).abs() < 1e-5, "{keys:?}: {with}");
    }
    let both = loss(&mut prepare(folder.path(), &["train_on_inputs=true"]));
    assert!((both - LOSS).abs() > 1e-2, "{both}");
}

/// What is written is what was trained: PEFT's layout, read back.
#[test]
fn a_run_learns_and_its_folder_gives_the_same_loss() {
    let folder = workspace();
    let mut session = prepare(folder.path(), &["epochs=8", "max_train_steps=40"]);
    let before = loss(&mut session);
    let reports = steps(&mut session);
    let after = loss(&mut session);
    assert!(after < before - 1.0, "{before} to {after}");
    // The trained tokens of a step are what it measures: 239 in each of the epochs.
    let measured: f64 = reports.iter().take(session.plan().steps_per_epoch).map(|report| report.measure).sum();
    assert_eq!(measured, 239.0);

    let saved = session.save("voice").unwrap();
    assert_eq!(saved, folder.path().join("out/voice"));
    let file = adapter::read(&saved).unwrap();
    assert_eq!((file.format.name(), file.adapter.modules.len()), ("peft", session.targets().len()));
    let init_from = format!("init_from={}", saved.display());
    let again = loss(&mut prepare(folder.path(), &[&init_from]));
    assert!((again - after).abs() < 1e-6, "{after} against {again}");

    let options = EvaluationOptions::new(golden("chat.jsonl"));
    let mut model = TextModelOptions::new(folder.path().join("base"));
    model.device = "cpu".into();
    let mut judged = |adapters: &[(&Path, f64)]| {
        model.adapters = adapters.iter().map(|(path, strength)| ((*path).to_owned(), *strength)).collect();
        TextModel::open(&model, &Plugins::default()).unwrap().evaluate(&options, &mut |_, _| {}).unwrap()
    };
    let (bare, with) = (judged(&[]), judged(&[(&saved, 1.0)]));
    assert!((bare.loss - LOSS).abs() < 1e-5 && (with.loss - after).abs() < 1e-5, "{bare} and {with}");
    assert_eq!((with.tokens, with.rows), (239, 12));
    assert!((with.perplexity - after.exp()).abs() < 1e-2);
    // Half of it twice is all of it.
    let halves = judged(&[(&saved, 0.5), (&saved, 0.5)]);
    assert!((halves.loss - after).abs() < 1e-5, "{halves}");
}

/// The loss is divided by all trained tokens of a step, however they are split.
#[test]
fn rows_that_are_accumulated_give_the_step_of_a_whole_batch() {
    let folder = workspace();
    // Rows of one length share batches, so that both ways take the same rows.
    let keys = &["packing=true", "max_train_steps=3"][..];
    let one = steps(&mut prepare(folder.path(), &[keys, &["batch_size=4"]].concat()));
    for split in [
        &["batch_size=2", "gradient_accumulation_steps=2"][..],
        &["batch_size=1", "gradient_accumulation_steps=4"],
        &["batch_size=4", "gradient_checkpointing=true"],
    ] {
        let other = steps(&mut prepare(folder.path(), &[keys, split].concat()));
        for (a, b) in one.iter().zip(&other) {
            assert!((a.loss - b.loss).abs() < 1e-5, "{split:?}: {} and {}", a.loss, b.loss);
            assert_eq!((a.measure, a.items), (b.measure, b.items));
            let [a, b] = [a, b].map(|report| report.gradient_norm.unwrap());
            assert!((a / b - 1.0).abs() < 1e-4, "{split:?}: {a} and {b}");
        }
    }
}

#[test]
fn a_resumed_run_ends_with_the_same_bits() {
    let folder = workspace();
    let keys = ["max_train_steps=8", "lora_dropout=0.1", "neftune_noise_alpha=5", "label_smoothing=0.1"];
    common::goes_on_as_if_never_stopped(folder.path(), &keys);
    let error = refusal(folder.path(), &[&keys[..], &["resume=true", "max_seq_length=128"]].concat());
    assert!(error.contains("max_seq_length"), "{error}");
}

#[test]
fn answers_to_prompts_are_samples() {
    let folder = workspace();
    let keys = ["sample_max_new_tokens=12", "sample_prompts=[\"What is a fathom?\", \"2 + 2?\"]", "max_train_steps=2"];
    let config = try_config(folder.path(), &keys).unwrap();
    let mut session = prepare(folder.path(), &keys);
    let prompts = config.samples.prompts.clone();
    let answers = session.sample(&prompts).unwrap();
    assert!(answers.iter().all(|answer| matches!(answer, Sample::Text(text) if !text.is_empty())), "{answers:?}");
    assert_eq!(answers, session.sample(&prompts).unwrap());
    let conversation = "[{\"role\": \"user\", \"content\": \"What is a fathom?\"}]".to_owned();
    assert_eq!(session.sample(&[conversation]).unwrap()[0], answers[0]);
    drop(session);

    let stop = std::sync::Arc::default();
    let result = train(config, &Plugins::default(), Vec::new(), &stop, &mut |_| {}).unwrap();
    assert_eq!(result.steps, 2);
    let page = fs::read_to_string(folder.path().join("out/samples.md")).unwrap();
    assert!(page.contains("## 2 + 2?") && page.contains("**before**") && page.contains("**step 2**"), "{page}");
    assert!(result.lora.join("adapter_config.json").exists() && result.lora.join("README.md").exists());
}

/// A base of texts alone has a template whose turns end with a token that is not among those that its files name.
#[test]
fn an_answer_ends_with_the_templates_own_token_too() {
    let folder = workspace();
    let base = folder.path().join("base");
    fs::remove_file(base.join("generation_config.json")).unwrap();
    let settings = fs::read_to_string(base.join("tokenizer_config.json")).unwrap();
    let settings = settings.replace("\"eos_token\": \"<|im_end|>\"", "\"eos_token\": \"<|endoftext|>\"");
    fs::write(base.join("tokenizer_config.json"), settings).unwrap();
    let config = fs::read_to_string(base.join("config.json")).unwrap();
    fs::write(base.join("config.json"), config.replace("\"eos_token_id\": 2", "\"eos_token_id\": 0")).unwrap();
    let model = TextModel::open(&on_the_cpu(folder.path()), &Plugins::default()).unwrap();
    let writer = model.writer();
    let ends: Vec<_> = writer.ends().collect();
    let of = |token: &str| i64::from(writer.tokenizer().id_of(token).unwrap());
    assert!(ends.contains(&of("<|im_end|>")) && ends.contains(&of("<|endoftext|>")), "{ends:?}");
    // A user's own end of a turn stays where a text is continued.
    let tokens = writer.plain("hi there<|endoftext|>").unwrap();
    assert_eq!(tokens.last(), Some(&of("<|endoftext|>")));
    assert_ne!(writer.plain("hi there").unwrap().last(), Some(&of("<|endoftext|>")));
}

#[test]
fn a_text_is_judged_alike_in_a_file_of_its_own_and_in_a_record() {
    let folder = workspace();
    let text = "The lighthouse stands on a rock. Its keeper counts ships, and writes their names into a book.";
    fs::create_dir(folder.path().join("texts")).unwrap();
    fs::write(folder.path().join("texts/one.txt"), text).unwrap();
    fs::write(folder.path().join("one.jsonl"), serde_json::json!({ "text": text }).to_string()).unwrap();
    let model = TextModel::open(&on_the_cpu(folder.path()), &Plugins::default()).unwrap();
    let judged = |data: &str, length: usize| {
        let mut options = EvaluationOptions::new(folder.path().join(data));
        options.max_seq_length = length;
        model.evaluate(&options, &mut |_, _| {}).unwrap()
    };
    let (file, record) = (judged("texts/one.txt", 2048), judged("one.jsonl", 2048));
    assert_eq!((file, file), (record, judged("texts", 2048)));
    // Nothing is left out behind the last whole window.
    let windows = judged("texts/one.txt", 16);
    assert_eq!(windows.tokens, file.tokens + 1 - windows.rows);
    // Nothing judged is no perfect model.
    fs::write(folder.path().join("empty.txt"), "").unwrap();
    let options = EvaluationOptions::new(folder.path().join("empty.txt"));
    let error = model.evaluate(&options, &mut |_, _| {}).unwrap_err().to_string();
    assert!(error.contains("empty.txt") && error.contains("nothing in it can be judged"), "{error}");
}

/// As Gemma 3 1B's tokenizer, which has a token for pictures beyond the rows of its embedding.
#[test]
fn a_tokenizer_may_have_tokens_that_no_text_has() {
    let folder = workspace();
    let path = folder.path().join("base/tokenizer.json");
    let mut tokenizer: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let added = tokenizer["added_tokens"].as_array_mut().unwrap();
    for number in 0..64 {
        let mut picture = added[0].clone();
        picture["id"] = (487 + number).into();
        picture["content"] = format!("<picture {number}>").into();
        added.push(picture);
    }
    fs::write(&path, tokenizer.to_string()).unwrap();
    let bare = loss(&mut prepare(folder.path(), &[]));
    assert!((bare - LOSS).abs() < 1e-5, "{bare}");
    let own = folder.path().join("own.jsonl");
    fs::write(&own, "{\"text\": \"a <picture 63> b\"}\n").unwrap();
    let error = refusal(folder.path(), &[&format!("train_data_dir={}", own.display())]);
    assert!(error.contains("own.jsonl: token <picture 63> is not one of the model"), "{error}");
}

/// What `lora dataset --config` shows is what the run would learn.
#[test]
fn texts_are_looked_at_as_the_configuration_lays_them_out() {
    let folder = workspace();
    let (base, path) = (folder.path().join("base"), folder.path().join("run.yaml"));
    let text = format!(
        "base_model: {}\ntrain_data_dir: chats.jsonl\noutput_dir: out\nmax_seq_length: 96\nchat_template: chatml\n\
         system_prompt: Be brief.\ntrain_on_inputs: true\nlong_documents: truncate\n",
        base.display()
    );
    fs::write(&path, text).unwrap();
    let (of, texts) = TrainConfig::texts_of(Some(&path), None, &["packing=true"]).unwrap().unwrap();
    let [own] = &texts[..] else { panic!("{texts:?}") };
    assert_eq!((of, &*own.path), (base, Path::new("chats.jsonl")));
    assert_eq!((own.max_seq_length, own.packing, own.train_on_inputs), (96, true, true));
    assert_eq!((own.chat_template.as_deref(), own.system_prompt.as_deref()), (Some("chatml"), Some("Be brief.")));
    assert_eq!((own.long_documents.name(), own.pairs), ("truncate", Some(false)));
    let other =
        TrainConfig::texts_of(Some(&path), Some(Path::new("more.jsonl")), &["objective=dpo"]).unwrap().unwrap().1;
    assert_eq!((&*other[0].path, other[0].pairs), (Path::new("more.jsonl"), Some(true)));
    let pictures = TrainConfig::texts_of::<&str>(None, Some(Path::new("pictures")), &[]).unwrap();
    assert!(pictures.is_none(), "{pictures:?}");
    // Texts want their base; pictures are looked at without.
    let error = TrainConfig::texts_of(Some(&path), None, &["base_model=no-one/has-this"]).unwrap_err().to_string();
    assert!(error.contains("base_model") && error.contains("hf download no-one/has-this"), "{error}");
    let keys = ["base_model=no-one/has-this", "train_data_dir=pictures"];
    assert!(TrainConfig::texts_of(Some(&path), None, &keys).unwrap().is_none());
}

/// The base of a workspace, to be asked.
fn on_the_cpu(folder: &Path) -> TextModelOptions {
    let mut model = TextModelOptions::new(folder.join("base"));
    model.device = "cpu".into();
    model
}

#[test]
fn what_means_nothing_for_a_language_model_is_refused() {
    let folder = workspace();
    for (keys, said) in [
        (&["max_resolution=64"][..], "max_resolution"),
        (&["clip_skip=2"], "clip_skip"),
        (&["variant=loha"], "PEFT"),
        (&["chat_template=nowhere"], "chat_template"),
        (&["long_documents=error", "max_seq_length=32"], "long_documents"),
    ] {
        let error = refusal(folder.path(), keys);
        assert!(error.contains(said), "{keys:?}: {error}");
    }
}

/// What PEFT saves and merging applies, and training cannot go on with.
#[test]
fn adapters_that_training_cannot_go_on_with_are_refused_before_anything_is_loaded() {
    let folder = workspace();
    let adapter = folder.path().join("adapter");
    let weights = golden("adapter/adapter_model.safetensors");
    let config = fs::read_to_string(golden("adapter/adapter_config.json")).unwrap();
    let bias = "base_model.model.model.layers.0.self_attn.q_proj.bias";
    let norm = "base_model.model.model.norm.weight";
    let initial = r#""init_lora_weights": true"#;
    let cases = [
        (initial, r#""init_lora_weights": "pissa""#, None, "is pissa as PEFT saves it"),
        (initial, r#""init_lora_weights": "olora""#, None, "is olora as PEFT saves it"),
        (r#""bias": "none""#, r#""bias": "lora_only""#, Some(bias), "has a trained bias"),
        (r#""modules_to_save": null"#, r#""modules_to_save": ["norm"]"#, Some(norm), "is a layer saved whole"),
    ];
    for (from, to, tensor, what) in cases {
        let _ = fs::remove_dir_all(&adapter);
        fs::create_dir(&adapter).unwrap();
        assert!(config.contains(from));
        fs::write(adapter.join("adapter_config.json"), config.replace(from, to)).unwrap();
        let file = SafetensorsFile::open(&weights).unwrap();
        let mut tensors: BTreeMap<String, HostTensor> =
            file.names().map(|name| (name.to_owned(), file.get(name).unwrap().to_host().unwrap())).collect();
        tensors.extend(tensor.map(|name: &str| (name.to_owned(), HostTensor::zeros([64]))));
        safetensors::write(adapter.join("adapter_model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
        let error = refusal(folder.path(), &[&format!("init_from={}", adapter.display())]);
        let told = error.contains(what) && error.contains("`lora merge`") && error.contains("adapter");
        assert!(told && error.contains("`init_from`"), "{what}: {error}");
    }
}
