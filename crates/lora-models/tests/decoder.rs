//! Decoders of language models against transformers and PEFT on tiny models of many families (see `golden/llm/README.md`).
//!
//! Tolerances: an honest f32 implementation is within 1e-5 of the references (gradients: 1e-5 of their norm); 1e-4 and
//! 1e-3 leave room for other kernels and none for another formula.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use lora_core::variant::{Lora, Parameters};
use lora_core::{Component, LayerGeometry};
use lora_io::checkpoint::Checkpoint;
use lora_io::safetensors::SafetensorsFile;
use lora_models::layers::{Adaptable, AdaptableLayer, AttachedAdapter, Pass};
use lora_models::networks::decoder::{LookedUp, LossOptions, NO_LABEL, Rows, Sampling};
use lora_models::networks::{Decoder, DecoderConfig, load_decoder};
use lora_models::weights::{Frozen, Held, Weights};
use lora_torch::dry::{DryRun, Platform};
use lora_torch::frozen::Storage;
use lora_torch::tch::{Device, Kind, Tensor, no_grad};
use lora_torch::tensor::from_host;
use serde_json::Value;

const CPU: Device = Device::Cpu;

const FAMILIES: [&str; 12] = [
    "llama3",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "smollm3",
    "phi3",
    "qwen3_moe",
    "olmo2",
    "granite",
    "gemma4",
];

/// Those whose hidden states are here.
const WITH_STATES: [&str; 5] = ["llama3", "gemma2", "phi3", "olmo2", "gemma4"];

/// A tiny model with its expected numbers.
struct Reference {
    folder: PathBuf,
    expected: SafetensorsFile,
    info: Value,
}

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llm").join(name)
}

fn json(path: PathBuf) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

impl Reference {
    fn of(family: &str) -> Self {
        let folder = golden(family);
        let expected = SafetensorsFile::open(folder.join("expected.safetensors")).unwrap();
        let info = json(folder.join("expected.json"));
        Self { folder, expected, info }
    }

    fn checkpoint(&self) -> Checkpoint {
        Checkpoint::open(self.folder.join("model")).unwrap()
    }

    fn decoder(&self) -> Decoder {
        load_decoder(&self.checkpoint(), Kind::Float, CPU, Held::default()).unwrap()
    }

    fn floats(&self, name: &str) -> Tensor {
        floats(&self.expected, name)
    }

    fn integers(&self, name: &str) -> Tensor {
        integers(&self.expected, name)
    }

    /// The tokens of each record.
    fn lengths(&self) -> Vec<i64> {
        self.info["tokens_per_record"].as_array().unwrap().iter().map(|count| count.as_i64().unwrap()).collect()
    }
}

fn floats(file: &SafetensorsFile, name: &str) -> Tensor {
    from_host(&file.get(name).unwrap().to_host().unwrap(), CPU).unwrap().to_kind(Kind::Float)
}

fn integers(file: &SafetensorsFile, name: &str) -> Tensor {
    let view = file.get(name).unwrap();
    let values: Vec<i64> =
        view.bytes().chunks_exact(4).map(|bytes| i32::from_le_bytes(bytes.try_into().unwrap()).into()).collect();
    Tensor::from_slice(&values).view(view.shape().iter().map(|&side| side as i64).collect::<Vec<_>>().as_slice())
}

fn worst(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.size(), expected.size());
    f64::try_from((found - expected).abs().max()).unwrap()
}

#[test]
fn hidden_states_logits_and_losses_are_transformers() {
    for family in FAMILIES {
        let reference = Reference::of(family);
        let decoder = reference.decoder();
        no_grad(|| {
            let (ids, labels) = (reference.integers("ids"), reference.integers("labels"));
            let rows = Rows::of(&ids, 0).unwrap();
            let states = decoder.states(&rows, &[1, decoder.config().layers.len()], &Pass::default()).unwrap();
            if WITH_STATES.contains(&family) {
                let chosen = reference.integers("logits_rows");
                let length = reference.lengths()[chosen.int64_value(&[0]) as usize];
                // What lies behind a record's end is padding.
                let upto = |all: &Tensor| all.narrow(1, 0, length);
                for (name, state) in ["hidden_first_layer", "hidden_last"].into_iter().zip(&states) {
                    let error = worst(&upto(&state.index_select(0, &chosen)), &upto(&reference.floats(name)));
                    assert!(error < 1e-4, "{family}, {name}: {error:e}");
                }
            }
            let losses = decoder.token_losses(&states[1], &labels, 0.0, &Pass::default()).unwrap();
            let error = worst(&losses, &reference.floats("nll_per_token"));
            assert!(error < 1e-4, "{family}, losses of tokens: {error:e}");
            let long = Rows::of(&reference.integers("long.ids"), 0).unwrap();
            let hidden = decoder.hidden(&long, &Pass::default()).unwrap();
            let logits = decoder.logits(&hidden.narrow(1, 178, 2), &Pass::default()).unwrap();
            let error = worst(&logits, &reference.floats("long.logits_last2"));
            assert!(error < 1e-4, "{family}, logits beyond windows and first lengths: {error:e}");
        });
    }
}

/// Sinks, windows on every other layer, experts in one tensor: the rows by themselves, and packed into one.
#[test]
fn logits_of_gpt_oss_are_transformers() {
    let expected = SafetensorsFile::open(golden("gpt_oss/expected.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(golden("gpt_oss/model")).unwrap();
    let decoder = load_decoder(&checkpoint, Kind::Float, CPU, Held::default()).unwrap();
    let ids = integers(&expected, "ids");
    no_grad(|| {
        let alone = Rows::of(&ids, 0).unwrap();
        let documents = Tensor::from_slice(&[0i64, 1]).repeat_interleave_self_int(24, 0, None).view([1, 48]);
        let positions = alone.positions.repeat([1, 2]);
        let packed = Rows {
            tokens: ids.view([1, 48]),
            positions,
            documents: Some(documents),
            unpadded: None,
            noise: None,
            looked_up: LookedUp::default(),
        };
        for rows in [alone, packed] {
            let hidden = decoder.hidden(&rows, &Pass::default()).unwrap();
            let logits = decoder.logits(&hidden, &Pass::default()).unwrap().view([2, 24, -1]);
            let error = worst(&logits, &floats(&expected, "logits"));
            assert!(error < 1e-4, "{error:e}");
        }
    });
}

/// A token after its keys and values sees of them what it sees in a row: its window, and the first of the text.
#[test]
fn what_is_written_with_a_window_is_what_rows_with_it_foretell() {
    for family in ["llama3", "mistral", "gemma2"] {
        let checkpoint = Reference::of(family).checkpoint();
        let component = checkpoint.component(Component::LANGUAGE_MODEL).unwrap();
        let mut config = DecoderConfig::detect(component).unwrap();
        config.see_a_window(7, 2);
        let decoder = Decoder::load(&Weights::new(component, Kind::Float, CPU), config).unwrap();
        let whole = Reference::of(family).decoder();
        let prompt: Vec<i64> = (0..12).map(|place| 20 + 3 * place).collect();
        let written = decoder.generate(&prompt, &Sampling::greedy(16), &mut |_| ControlFlow::Continue(())).unwrap();
        let all = Tensor::from_slice(&[&prompt[..], &written].concat()).unsqueeze(0);
        let foretold = |decoder: &Decoder| {
            no_grad(|| {
                let hidden = decoder.hidden(&Rows::of(&all, 0).unwrap(), &Pass::default()).unwrap();
                decoder.logits(&hidden.narrow(1, 11, 16), &Pass::default()).unwrap()
            })
        };
        let (own, others) = (foretold(&decoder), foretold(&whole));
        assert_eq!(Vec::<i64>::try_from(own.argmax(-1, false).view([-1])).unwrap(), written, "{family}");
        assert!(worst(&own, &others) > 1e-3, "{family}: a window makes a difference");
    }
}

/// Tables in host memory are read before the pass; whatever reads them afterwards computes with these rows alone.
#[test]
fn rows_that_were_looked_up_before_the_pass_give_the_same_states() {
    for family in ["llama3", "gemma4"] {
        let reference = Reference::of(family);
        let decoder = reference.decoder();
        let ids = reference.integers("ids");
        no_grad(|| {
            let rows = Rows::of(&ids, 0).unwrap();
            let plain = decoder.hidden(&rows, &Pass::default()).unwrap();
            let none = decoder.look_up(&ids).unwrap();
            assert!(none.tokens.is_none() && none.layer_inputs.is_none(), "on the CPU nothing waits elsewhere");
            let checkpoint = Checkpoint::open(golden(family).join("model")).unwrap();
            let weights = checkpoint.component(Component::LANGUAGE_MODEL).unwrap();
            let of = |name: &str| -> Option<Tensor> {
                let name = format!("model.{name}.weight");
                let shape: Vec<i64> = weights.shape(&name)?.iter().map(|&side| side as i64).collect();
                let table = from_host(&weights.tensor(&name).unwrap().to_host().unwrap(), CPU).unwrap();
                let rows = table.to_kind(Kind::Float).index_select(0, &ids.view([-1]));
                Some(rows.view([ids.size()[0], ids.size()[1], shape[1]]))
            };
            let looked_up = LookedUp { tokens: of("embed_tokens"), layer_inputs: of("embed_tokens_per_layer") };
            // The tokens themselves are not read.
            let rows = Rows { tokens: ids.zeros_like(), looked_up, ..rows };
            assert_eq!(decoder.hidden(&rows, &Pass::default()).unwrap(), plain, "{family}");
        });
    }
}

/// transformers 5 writes other keys than published files have.
#[test]
fn both_spellings_of_a_config_are_the_same_decoder() {
    for family in FAMILIES {
        let model = golden(family).join("model");
        let [old, new] = ["config.json", "config.v5.json"]
            .map(|name| DecoderConfig::read(&json(model.join(name)), family).unwrap_or_else(|error| panic!("{error}")));
        assert_eq!(old, new, "{family}");
    }
}

/// As Gemma 3's files of 4B and more say it: what equals transformers' defaults is not there.
#[test]
fn of_a_wrapper_the_sizes_that_are_left_out_are_the_familys() {
    let inner = serde_json::json!({
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": { "factor": 8.0, "rope_type": "linear" }, "sliding_window": 1024,
    });
    let config =
        DecoderConfig::read(&serde_json::json!({ "model_type": "gemma3", "text_config": inner }), "x").unwrap();
    assert_eq!((config.vocabulary, config.width, config.layers.len(), config.tied), (262_208, 2560, 34, true));
    let [sliding, full] = [&config.layers[0], &config.layers[5]];
    assert_eq!((sliding.heads, sliding.kv_heads, sliding.head, sliding.window), (8, 4, 256, Some(1024)));
    assert_eq!((full.window, config.ropes[0].frequencies[0], config.ropes[1].frequencies[0]), (None, 0.125, 1.0));
    let error = DecoderConfig::read(&inner, "x").unwrap_err().to_string();
    assert!(error.contains("num_attention_heads is missing") || error.contains("vocab_size is missing"), "{error}");
}

/// The records in rows, each seeing itself alone.
fn packed(reference: &Reference) -> (Rows, Tensor) {
    let (ids, labels, lengths) = (reference.integers("ids"), reference.integers("labels"), reference.lengths());
    let packing = &reference.info["packing"];
    let width = packing["max_tokens"].as_i64().unwrap();
    let (mut tokens, mut positions, mut documents, mut targets) = (vec![], vec![], vec![], vec![]);
    let filler = |count: i64, value: i64| vec![value; count as usize];
    for row in packing["rows"].as_array().unwrap() {
        let mut used = 0;
        for (document, record) in row.as_array().unwrap().iter().enumerate() {
            let record = record.as_i64().unwrap();
            let count = lengths[record as usize];
            let of = |all: &Tensor| Vec::<i64>::try_from(all.get(record).narrow(0, 0, count)).unwrap();
            tokens.extend(of(&ids));
            targets.push(NO_LABEL);
            targets.extend(&of(&labels)[1..]);
            positions.extend(0..count);
            documents.extend(filler(count, document as i64));
            used += count;
        }
        let left = width - used;
        tokens.extend(filler(left, 3));
        targets.extend(filler(left, NO_LABEL));
        positions.extend(0..left);
        documents.extend(filler(left, width - 1));
    }
    let shaped = |values: Vec<i64>| Tensor::from_slice(&values).view([-1, width]);
    let rows = Rows {
        tokens: shaped(tokens),
        positions: shaped(positions),
        documents: Some(shaped(documents)),
        unpadded: None,
        noise: None,
        looked_up: LookedUp::default(),
    };
    (rows, shaped(targets))
}

#[test]
fn records_that_share_a_row_have_the_losses_they_have_by_themselves() {
    for family in FAMILIES {
        let reference = Reference::of(family);
        let decoder = reference.decoder();
        let (rows, labels) = packed(&reference);
        no_grad(|| {
            let hidden = decoder.hidden(&rows, &Pass::default()).unwrap();
            let found = decoder.token_losses(&hidden, &labels, 0.0, &Pass::default()).unwrap();
            let trained = found.masked_select(&labels.narrow(1, 1, labels.size()[1] - 1).ne(NO_LABEL));
            let alone = decoder.hidden(&Rows::of(&reference.integers("ids"), 0).unwrap(), &Pass::default()).unwrap();
            let own = reference.integers("labels");
            let alone = decoder.token_losses(&alone, &own, 0.0, &Pass::default()).unwrap();
            let alone = alone.masked_select(&own.narrow(1, 1, own.size()[1] - 1).ne(NO_LABEL));
            // Rows take records out of order only where one did not fit; sums are those of the same records.
            let sorted = |losses: &Tensor| losses.sort(0, false).0;
            let error = worst(&sorted(&trained), &sorted(&alone));
            assert!(error < 2e-5, "{family}: {error:e}");
            let loss = decoder.loss(&hidden, &labels, &LossOptions::default(), &Pass::default()).unwrap();
            let mean = f64::try_from(loss).unwrap() / trained.numel() as f64;
            let expected = reference.info["loss"].as_f64().unwrap();
            assert!((mean - expected).abs() < 1e-5, "{family}: {mean}, expected {expected}");
        });
    }
}

#[test]
fn the_likeliest_tokens_are_transformers() {
    for family in FAMILIES {
        let reference = Reference::of(family);
        let decoder = reference.decoder();
        let prompt = Vec::<i64>::try_from(reference.integers("generation.prompt").view([-1])).unwrap();
        let expected = Vec::<i64>::try_from(reference.integers("generation.new")).unwrap();
        let mut seen = Vec::new();
        let found = decoder.generate(&prompt, &Sampling::greedy(20), &mut |token| {
            seen.push(token);
            ControlFlow::Continue(())
        });
        assert_eq!(found.unwrap(), expected, "{family}");
        assert_eq!(seen, expected, "{family}");
        let stop = Sampling { stop: vec![expected[3]], ..Sampling::greedy(20) };
        let found = decoder.generate(&prompt, &stop, &mut |_| ControlFlow::Continue(())).unwrap();
        let first = expected.iter().position(|token| *token == expected[3]).unwrap();
        assert_eq!(found, expected[..=first], "{family}");
        let found = decoder.generate(&prompt, &Sampling::greedy(20), &mut |_| ControlFlow::Break(())).unwrap();
        assert_eq!(found, expected[..1], "{family}");
    }
}

/// Hangs the reference's adapter on the layers that it names; gives the factors by their names in the file.
fn adapt(decoder: &mut Decoder, reference: &Reference) -> BTreeMap<String, Tensor> {
    let file = SafetensorsFile::open(reference.folder.join("lora_init.safetensors")).unwrap();
    let scale =
        reference.info["training"]["alpha"].as_f64().unwrap() / reference.info["training"]["rank"].as_f64().unwrap();
    let leaves = adapt_from(decoder, &file, scale);
    assert_eq!(leaves.len(), file.len(), "every module of the adapter is a layer");
    leaves
}

/// The same of a file by PEFT's names.
fn adapt_from(decoder: &mut Decoder, file: &SafetensorsFile, scale: f64) -> BTreeMap<String, Tensor> {
    let mut leaves = BTreeMap::new();
    let mut attach = |layer: &mut AdaptableLayer| {
        let (geometry, mut path) = (layer.geometry(), layer.path().to_owned());
        let experts = matches!(geometry, LayerGeometry::Experts { .. });
        // PEFT wraps a mixture once for each of its parameters, the first innermost.
        for (parameter, wrapper) in [(".gate_up_proj", ".base_layer"), (".down_proj", "")] {
            if let Some(mixture) = path.strip_suffix(parameter).filter(|_| experts) {
                path = format!("{mixture}{wrapper}");
            }
        }
        if !file.contains(&format!("{path}.lora_A.weight")) {
            return;
        }
        let mut factor = |part: &str, own: &str| {
            let name = format!("{path}.{part}.weight");
            let leaf = floats(file, &name).set_requires_grad(true);
            leaves.insert(name, leaf.shallow_clone());
            (own.to_owned(), leaf)
        };
        let mut tensors = [factor("lora_A", "down"), factor("lora_B", "up")];
        if let LayerGeometry::Experts { experts, in_features, out_features } = geometry {
            let [experts, inputs, outputs] = [experts, in_features, out_features].map(|side| side as i64);
            let [(_, down), (_, up)] = &tensors;
            tensors = [
                ("experts_down".to_owned(), down.view([experts, -1, inputs])),
                ("experts_up".to_owned(), up.view([outputs, -1, experts]).permute([2, 0, 1])),
            ];
        }
        let parameters = Parameters { tensors: tensors.into(), scale };
        layer.attach(AttachedAdapter { variant: Arc::new(Lora), parameters });
    };
    decoder.visit_layers(&mut attach).unwrap();
    leaves
}

/// The mean loss of some records' labels, one record after the other.
fn mean_loss(decoder: &Decoder, reference: &Reference, records: &[i64], pass: &Pass) -> Tensor {
    let (ids, labels, lengths) = (reference.integers("ids"), reference.integers("labels"), reference.lengths());
    let (mut sum, mut count) = (Tensor::zeros([], (Kind::Float, CPU)), 0);
    for &record in records {
        let of = |all: &Tensor| all.narrow(0, record, 1).narrow(1, 0, lengths[record as usize]);
        let hidden = decoder.hidden(&Rows::of(&of(&ids), 0).unwrap(), pass).unwrap();
        sum += decoder.loss(&hidden, &of(&labels), &LossOptions::default(), pass).unwrap();
        count += i64::try_from(of(&labels).narrow(1, 1, lengths[record as usize] - 1).ne(NO_LABEL).sum(Kind::Int64))
            .unwrap();
    }
    sum / count
}

#[test]
fn lora_gradients_are_pefts() {
    for family in FAMILIES {
        let reference = Reference::of(family);
        let golden = SafetensorsFile::open(reference.folder.join("lora_grads_step1.safetensors")).unwrap();
        let kept = Pass { recompute: true, recompute_feed_forward: true, ..Pass::default() };
        for pass in [Pass::default(), kept] {
            let mut decoder = reference.decoder();
            let leaves = adapt(&mut decoder, &reference);
            mean_loss(&decoder, &reference, &[0, 1], &pass).backward();
            for (name, leaf) in &leaves {
                let expected = floats(&golden, name);
                let distance = f64::try_from((leaf.grad() - &expected).norm()).unwrap();
                let allowed = 1e-3 * f64::try_from(expected.norm()).unwrap() + 1e-9;
                assert!(distance < allowed, "{family}, {name}, {pass:?}: {distance:e} of {allowed:e}");
            }
        }
    }
}

/// Experts in one tensor, inputs before outputs, gate and up-projection in turn.
#[test]
fn gradients_of_adapters_on_the_experts_of_gpt_oss_are_pefts() {
    let [golden, expected] = ["adapter", "expected"]
        .map(|name| SafetensorsFile::open(golden(&format!("gpt_oss/{name}.safetensors"))).unwrap());
    let checkpoint = Checkpoint::open(self::golden("gpt_oss/model")).unwrap();
    let number = |key: &str| golden.metadata()[key].parse::<f64>().unwrap();
    let ids = integers(&expected, "ids");
    for recompute in [false, true] {
        let mut decoder = load_decoder(&checkpoint, Kind::Float, CPU, Held::default()).unwrap();
        let leaves = adapt_from(&mut decoder, &golden, number("scale"));
        assert_eq!(2 * leaves.len(), golden.len());
        let pass = Pass { recompute, ..Pass::default() };
        let hidden = decoder.hidden(&Rows::of(&ids, 0).unwrap(), &pass).unwrap();
        let loss = decoder.loss(&hidden, &ids, &LossOptions::default(), &pass).unwrap() / (2 * 23);
        assert!((f64::try_from(&loss).unwrap() / number("loss") - 1.0).abs() < 1e-5, "{loss}");
        loss.backward();
        for (name, leaf) in &leaves {
            let expected = floats(&golden, &format!("grad.{name}"));
            let distance = f64::try_from((leaf.grad() - &expected).norm()).unwrap();
            let allowed = 1e-3 * f64::try_from(expected.norm()).unwrap() + 1e-9;
            assert!(distance < allowed, "{name}: {distance:e} of {allowed:e}");
        }
    }
}

/// qwen2's token of padding, which is its end of texts too.
const PADDING: i64 = 2;

/// Adapters of either end of a tied model: each changes its own end alone.
#[test]
fn embeddings_and_heads_carry_adapters_as_pefts() {
    for case in ["embed_lora", "head_lora"] {
        let golden = SafetensorsFile::open(golden(&format!("tied/{case}.safetensors"))).unwrap();
        let reference = Reference::of("qwen2");
        let mut decoder = reference.decoder();
        let mut leaves = BTreeMap::new();
        let mut attach = |layer: &mut AdaptableLayer| {
            let path = layer.path().to_owned();
            let names = [["lora_embedding_A", "embedding_down"], ["lora_embedding_B", "embedding_up"]];
            let linear = [["lora_A.weight", "down"], ["lora_B.weight", "up"]];
            for names in [names, linear] {
                if !golden.contains(&format!("{path}.{}", names[0][0])) {
                    continue;
                }
                let tensors = names.map(|[stored, own]| {
                    let name = format!("{path}.{stored}");
                    let leaf = floats(&golden, &name).set_requires_grad(true);
                    leaves.insert(name, leaf.shallow_clone());
                    (own.to_owned(), leaf)
                });
                let parameters = Parameters { tensors: tensors.into(), scale: 2.0 };
                layer.attach(AttachedAdapter { variant: Arc::new(Lora), parameters });
            }
        };
        decoder.visit_layers(&mut attach).unwrap();
        assert_eq!(2 * leaves.len(), golden.len(), "{case}");
        let loss = mean_loss(&decoder, &reference, &(0..12).collect::<Vec<_>>(), &Pass::default());
        loss.backward();
        let (found, expected) = (f64::try_from(&loss).unwrap(), golden.metadata()["loss"].parse::<f64>().unwrap());
        assert!((found - expected).abs() < 1e-5, "{case}: {found}, expected {expected}");
        for (name, leaf) in &leaves {
            let expected = floats(&golden, &format!("grad.{name}"));
            let found = leaf.grad();
            if name.ends_with("lora_embedding_A") {
                // PEFT gives the token of padding no gradient here, even where it also ends texts as any other token.
                assert!(f64::try_from(expected.select(1, PADDING).norm()).unwrap() == 0.0);
                let _ = found.select(1, PADDING).zero_();
            }
            let apart = f64::try_from((found - &expected).norm() / expected.norm()).unwrap();
            assert!(apart < 1e-3, "{case}, {name}: {apart:e}");
        }
    }
}

/// Where layers are in few bytes, tables are in a byte a number and a factor a row; a tied one is there once.
#[test]
fn tables_of_words_in_few_bytes_are_looked_up_by_row_and_carry_adapters() {
    for (family, tied) in [("llama3", true), ("mistral", false)] {
        let reference = Reference::of(family);
        let whole = reference.decoder();
        let ids = reference.integers("ids");
        let embedded = |decoder: &Decoder| {
            no_grad(|| decoder.states(&Rows::of(&ids, 0).unwrap(), &[0], &Pass::default()).unwrap().remove(0))
        };
        for storage in [Storage::Nf4, Storage::Float8, Storage::Int8] {
            let held = Held::Frozen(Frozen::stored(Some(storage)));
            let mut decoder = load_decoder(&reference.checkpoint(), Kind::Float, CPU, held).unwrap();
            assert_eq!(decoder.config().tied, tied);
            // Half a step of 127 to a row's largest number.
            let (found, expected) = (embedded(&decoder), embedded(&whole));
            let steps = (&found - &expected).abs() / expected.abs().amax([-1i64], true) * 127.0;
            let most = f64::try_from(steps.max()).unwrap();
            assert!((0.3..0.501).contains(&most), "{family}, {storage}: {most} steps");

            let loss = |decoder: &Decoder| mean_loss(decoder, &reference, &[0, 1], &Pass::default());
            let before = no_grad(|| f64::try_from(loss(&decoder)).unwrap());
            let (width, words) = (decoder.config().width, decoder.config().vocabulary);
            let mut leaves = Vec::new();
            let mut attach = |layer: &mut AdaptableLayer| {
                let names = match layer.path() {
                    "model.embed_tokens" => ["embedding_down", "embedding_up"],
                    "lm_head" => ["down", "up"],
                    _ => return,
                };
                assert_eq!(layer.weight_bytes(), words * (width + 4), "{family}, {storage}: {}", layer.path());
                let [down, up] = match layer.geometry() {
                    LayerGeometry::Embedding { .. } => [[2, words], [width, 2]],
                    _ => [[2, width], [words, 2]],
                };
                let leaf = |shape: [usize; 2], value: f64| {
                    let shape = shape.map(|side| side as i64);
                    Tensor::full(shape, value, (Kind::Float, CPU)).set_requires_grad(true)
                };
                let tensors = [leaf(down, 0.1), leaf(up, 0.0)];
                leaves.extend(tensors.iter().map(Tensor::shallow_clone));
                let tensors = names.map(str::to_owned).into_iter().zip(tensors).collect();
                layer.attach(AttachedAdapter {
                    variant: Arc::new(Lora),
                    parameters: Parameters { tensors, scale: 1.0 },
                });
            };
            decoder.visit_layers(&mut attach).unwrap();
            assert_eq!(leaves.len(), 4);
            // With up at 0 nothing changes yet: the loss comes another way.
            let after = loss(&decoder);
            after.backward();
            let after = f64::try_from(after).unwrap();
            assert!((after / before - 1.0).abs() < 1e-5, "{family}, {storage}: {after}, without adapters {before}");
            for up in [&leaves[1], &leaves[3]] {
                assert!(f64::try_from(up.grad().abs().max()).unwrap() > 0.0, "{family}, {storage}");
            }
        }
    }
}

/// All weights of a network may be trained: each is one leaf, and a tied table is one with the gradients of both ends.
#[test]
fn whole_decoders_train() {
    for family in ["llama3", "gemma4", "phi3", "qwen3_moe"] {
        let reference = Reference::of(family);
        let checkpoint = reference.checkpoint();
        let trained = lora_models::weights::TrainedWeights::default();
        let held = Held::Trained(trained.clone());
        let decoder = load_decoder(&checkpoint, Kind::BFloat16, CPU, held).unwrap();
        let names: Vec<String> = trained.all().into_iter().map(|(name, _)| name).collect();
        let mut sorted = names.clone();
        sorted.sort();
        let weights = checkpoint.component(Component::LANGUAGE_MODEL).unwrap();
        assert!(weights.names().eq(sorted.iter().map(String::as_str)), "{family}: every weight of the file, once");
        for pass in [Pass::default(), Pass { recompute: true, ..Pass::default() }] {
            let loss = mean_loss(&decoder, &reference, &[0, 11], &pass);
            let expected = f64::try_from(
                reference.floats("nll_per_token").index_select(0, &Tensor::from_slice(&[0i64, 11])).sum(Kind::Double),
            )
            .unwrap();
            let labels = reference.integers("labels").index_select(0, &Tensor::from_slice(&[0i64, 11]));
            let count = i64::try_from(labels.narrow(1, 1, labels.size()[1] - 1).ne(NO_LABEL).sum(Kind::Int64)).unwrap();
            let (found, expected) = (f64::try_from(&loss).unwrap(), expected / count as f64);
            assert!((found / expected - 1.0).abs() < 2e-2, "{family} in bf16: {found}, in f32 {expected}");
            loss.backward();
            for (name, leaf) in trained.all() {
                assert!(leaf.grad().defined() && leaf.grad().kind() == Kind::Float, "{family}: {name}");
            }
        }
    }
}

/// Twenty steps of AdamW as the reference takes them.
#[test]
fn twenty_steps_have_the_losses_of_peft() {
    for family in FAMILIES {
        let reference = Reference::of(family);
        let mut decoder = reference.decoder();
        let leaves = adapt(&mut decoder, &reference);
        let zeros = |leaf: &Tensor| leaf.zeros_like();
        let mut moments: Vec<[Tensor; 2]> = leaves.values().map(|leaf| [zeros(leaf), zeros(leaf)]).collect();
        let expected = reference.info["losses"]["f32"].as_array().unwrap();
        for (step, expected) in expected.iter().enumerate() {
            let records = [(2 * step as i64) % 12, (2 * step as i64 + 1) % 12];
            let loss = mean_loss(&decoder, &reference, &records, &Pass::default());
            let (found, expected) = (f64::try_from(&loss).unwrap(), expected.as_f64().unwrap());
            assert!((found / expected - 1.0).abs() < 1e-4, "{family}, step {step}: {found}, expected {expected}");
            loss.backward();
            let rate = 5e-3 * ((step + 1) as f64 / 5.0).min(1.0) * (1.0 - step as f64 / 20.0);
            let [first, second] = [0.9f64, 0.999].map(|beta| 1.0 - beta.powi(step as i32 + 1));
            no_grad(|| {
                for (leaf, [mean, square]) in leaves.values().zip(&mut moments) {
                    let (mut leaf, mut gradient) = (leaf.shallow_clone(), leaf.grad());
                    let _ = leaf.f_mul_scalar_(1.0 - rate * 0.01).unwrap();
                    *mean = &*mean * 0.9 + &gradient * 0.1;
                    *square = &*square * 0.999 + gradient.square() * 0.001;
                    let _ = leaf.f_sub_(&(&*mean / first * rate / ((&*square / second).sqrt() + 1e-8))).unwrap();
                    let _ = gradient.zero_();
                }
            });
        }
    }
}

#[test]
fn models_in_gguf_have_the_logits_of_their_weights() {
    let expected = SafetensorsFile::open(golden("gguf/expected.safetensors")).unwrap();
    for (family, scheme) in [("llama3", "mixed"), ("qwen3", "q8_0")] {
        let checkpoint = Checkpoint::open(golden(&format!("gguf/{family}.{scheme}.gguf"))).unwrap();
        let rows = Rows::of(&integers(&expected, &format!("{family}.ids")), 0).unwrap();
        // In numbers, and all of it in the file's blocks, embedding and head too.
        for held in [Held::default(), Held::Frozen(Frozen::stored(None))] {
            let decoder = load_decoder(&checkpoint, Kind::Float, CPU, held).unwrap();
            no_grad(|| {
                let hidden = decoder.hidden(&rows, &Pass::default()).unwrap();
                let logits = decoder.logits(&hidden.narrow(1, 88, 8), &Pass::default()).unwrap();
                let error = worst(&logits, &floats(&expected, &format!("{family}.{scheme}.logits_last8")));
                assert!(error < 1e-4, "{family}, {scheme}: {error:e}");
            });
        }
        // What is packed is what is dequantised: a row at a time has as many blocks as the whole.
        let weights = checkpoint.component(Component::LANGUAGE_MODEL).unwrap();
        let packed = weights.packed("model.layers.0.self_attn.q_proj.weight").unwrap().unwrap();
        let (elements, bytes) = packed.kind.block();
        assert_eq!(packed.bytes.len(), packed.shape.iter().product::<usize>() / elements * bytes);
        assert!(weights.packed("model.norm.weight").unwrap().is_none());
    }
}

/// A plan runs the network on a device without memory: no numbers can be read there, and no shape depends on any.
#[test]
fn every_family_runs_on_the_device_without_memory() {
    for platform in [Platform::Cpu { threads: 1 }, Platform::Cuda] {
        for family in FAMILIES {
            let reference = Reference::of(family);
            let checkpoint = reference.checkpoint();
            let (rows, labels) = packed(&reference);
            let run = DryRun::begin(platform).unwrap();
            let before = run.live();
            {
                let mut decoder = load_decoder(&checkpoint, Kind::BFloat16, run.device(), Held::default()).unwrap();
                let mut leaves = Vec::new();
                let mut attach = |layer: &mut AdaptableLayer| {
                    let geometry = layer.geometry();
                    let is_linear = matches!(geometry, LayerGeometry::Linear { .. });
                    if !is_linear || layer.path().ends_with("lm_head") {
                        return;
                    }
                    let mut factor = |name: &str, shape: [usize; 2]| {
                        let shape = shape.map(|side| side as i64);
                        let leaf = Tensor::zeros(shape, (Kind::Float, run.device())).set_requires_grad(true);
                        leaves.push(leaf.shallow_clone());
                        (name.to_owned(), leaf)
                    };
                    let tensors = [factor("down", [4, geometry.inputs()]), factor("up", [geometry.outputs(), 4])];
                    let parameters = Parameters { tensors: tensors.into(), scale: 2.0 };
                    layer.attach(AttachedAdapter { variant: Arc::new(Lora), parameters });
                };
                decoder.visit_layers(&mut attach).unwrap();
                let there = |own: &Tensor| own.to_device(run.device());
                let documents = rows.documents.as_ref().map(there);
                let rows = Rows {
                    tokens: there(&rows.tokens),
                    positions: there(&rows.positions),
                    documents,
                    unpadded: None,
                    noise: None,
                    looked_up: LookedUp::default(),
                };
                for recompute in [false, true] {
                    let pass = Pass { recompute, ..Pass::default() };
                    let hidden = decoder.hidden(&rows, &pass).unwrap_or_else(|error| panic!("{family}: {error}"));
                    let loss = decoder.loss(&hidden, &there(&labels), &LossOptions::default(), &pass);
                    let loss = loss.unwrap_or_else(|error| panic!("{family}: {error}"));
                    loss.f_backward().unwrap_or_else(|error| panic!("{family}, {platform:?}: {error}"));
                    assert!(leaves.iter().all(|leaf| leaf.grad().defined()), "{family}");
                }
            }
            assert_eq!(run.live(), before, "{family}: nothing is left behind");
        }
    }
}

#[test]
fn unknown_architectures_and_broken_configs_are_refused_by_name() {
    let config = json(golden("llama3").join("model/config.json"));
    let read = |change: &dyn Fn(&mut Value)| {
        let mut changed = config.clone();
        change(&mut changed);
        DecoderConfig::read(&changed, "folder").map(drop).unwrap_err().to_string()
    };
    let unknown = read(&|config| config["model_type"] = "deepseek_v3".into());
    assert!(
        unknown.contains("folder") && unknown.contains("`deepseek_v3`") && unknown.contains("qwen3_moe"),
        "{unknown}"
    );
    type Change = fn(&mut Value);
    let cases: [(Change, &str); 9] = [
        (|config| config["hidden_size"] = "wide".into(), "hidden_size is \"wide\""),
        (|config| config["num_hidden_layers"] = 1_000_000.into(), "num_hidden_layers is 1000000"),
        (|config| drop(config.as_object_mut().unwrap().remove("vocab_size")), "vocab_size is missing"),
        (|config| config["num_key_value_heads"] = 3.into(), "no multiple of 3"),
        (|config| config["hidden_act"] = "xielu".into(), "`xielu`"),
        (|config| config["rope_scaling"]["rope_type"] = "dynamic".into(), "rope_type is `dynamic`"),
        (|config| config["rope_scaling"]["factor"] = Value::Null, "factor is missing"),
        (|config| config["quantization_config"] = serde_json::json!({"quant_method": "gptq"}), "gptq"),
        (|config| config["layer_types"] = serde_json::json!(vec!["linear_attention"; 4]), "\"linear_attention\""),
    ];
    for (change, expected) in cases {
        let error = read(&change);
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn missing_weights_are_named() {
    let reference = Reference::of("llama3");
    let checkpoint = reference.checkpoint();
    let component = checkpoint.component(Component::LANGUAGE_MODEL).unwrap();
    let mut config = DecoderConfig::detect(component).unwrap();
    config.tied = false;
    let error = Decoder::load(&Weights::new(component, Kind::Float, CPU), config.clone()).unwrap_err().to_string();
    assert!(error.contains("`lm_head.weight` is missing"), "{error}");
    (config.tied, config.vocabulary) = (true, 7);
    let error = Decoder::load(&Weights::new(component, Kind::Float, CPU), config).unwrap_err().to_string();
    assert!(error.contains("model.embed_tokens.weight") && error.contains("expected [7, 64]"), "{error}");
}
