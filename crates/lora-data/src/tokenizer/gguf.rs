//! The tokenizer inside a GGUF file, as the `tokenizer.json` that says the same: `gpt2` (byte-level pairs by the order of
//! their merges) and `llama` (SentencePiece, pairs by their scores). What a model's texts were split by before pairs were
//! merged is only a name there (`tokenizer.ggml.pre`), which has to be known: another rule gives other numbers.
//!
//! Format: github.com/ggml-org/ggml, `docs/gguf.md`; rules of splitting: github.com/ggml-org/llama.cpp, `llama-vocab.cpp`.

use std::collections::{BTreeSet, HashMap};

use lora_io::gguf::{GgufFile, Value as Stored};
use serde_json::{Value, json};

use super::language::{Parts, SpecialToken, SpecialTokens, digest};
use crate::guard::guarded;
use crate::{Error, Result};

/// What kind of token one is, by the numbers of the format.
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const UNUSED: u64 = 5;

/// The vocabulary of a file.
struct Vocabulary {
    /// `gpt2` or `llama`.
    model: String,
    /// The name of the rule that splits texts.
    pre: String,
    tokens: Vec<String>,
    kinds: Vec<u64>,
    scores: Vec<f64>,
    merges: Vec<String>,
    special: SpecialTokens,
    begins: bool,
    blank_in_front: bool,
}

pub(super) fn read(file: &GgufFile) -> Result<Parts> {
    let vocabulary = vocabulary(file)?;
    let failed = |reason: String| Error::tokenizer(file.path(), reason);
    let json = vocabulary.to_json().map_err(failed)?.to_string();
    let inner = guarded(
        || failed("it is damaged".to_owned()),
        || tokenizers::Tokenizer::from_bytes(json.as_bytes()).map_err(|failure| failed(failure.to_string())),
    )?;
    let mut ends: BTreeSet<u32> = vocabulary.special.eos.iter().map(|token| token.id).collect();
    let others = ["eot", "eom"].map(|name| format!("tokenizer.ggml.{name}_token_id"));
    ends.extend(others.iter().filter_map(|key| u32::try_from(file.number(key)?).ok()));
    let mut templates = Vec::new();
    for name in ["default", "tool_use"] {
        let key = match name {
            "default" => "tokenizer.chat_template".to_owned(),
            other => format!("tokenizer.chat_template.{other}"),
        };
        templates.extend(file.text(&key).map(|template| (name.to_owned(), template.to_owned())));
    }
    Ok(Parts {
        path: file.path().to_owned(),
        digest: digest(&[json.as_bytes(), format!("{:?}", vocabulary.special).as_bytes()]),
        inner,
        special: vocabulary.special,
        ends,
        templates,
    })
}

fn vocabulary(file: &GgufFile) -> Result<Vocabulary> {
    let failed = |reason: String| Error::tokenizer(file.path(), reason);
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let model = file.text(&key("model")).ok_or_else(|| failed("there is no tokenizer in it".into()))?.to_owned();
    if !matches!(&*model, "gpt2" | "llama") {
        return Err(failed(format!(
            "its tokenizer is of the kind `{model}`; known are gpt2 and llama: take the tokenizer.json of the model"
        )));
    }
    let texts = |name: &str| {
        let lacks = || failed(format!("`{}` is missing or holds something else than UTF-8", key(name)));
        file.texts(&key(name)).ok_or_else(lacks)
    };
    let numbers = |name: &str, of: fn(&Stored) -> Option<f64>| -> Option<Vec<f64>> {
        file.elements(&key(name))?.iter().map(of).collect()
    };
    let whole = |value: &Stored| match value {
        Stored::Unsigned(number) => Some(*number as f64),
        Stored::Signed(number) => Some(*number as f64),
        _ => None,
    };
    let float = |value: &Stored| if let Stored::Float(number) = value { Some(*number) } else { None };
    let tokens = texts("tokens")?;
    let kinds = numbers("token_type", whole).unwrap_or_else(|| vec![1.0; tokens.len()]);
    let scores = match &*model {
        "llama" => numbers("scores", float).ok_or_else(|| failed(format!("`{}` is missing", key("scores"))))?,
        _ => vec![0.0; tokens.len()],
    };
    if kinds.len() != tokens.len() || scores.len() != tokens.len() {
        return Err(failed(format!(
            "there are {} tokens, {} types and {} scores; expected as many of each",
            tokens.len(),
            kinds.len(),
            scores.len()
        )));
    }
    let token = |name: &str, usual: Option<u32>| {
        let number = file.number(&key(name)).and_then(|id| u32::try_from(id).ok());
        let id = number.or(usual.filter(|_| model == "llama"))?;
        Some(SpecialToken { id, text: tokens.get(id as usize)?.clone() })
    };
    let special = SpecialTokens {
        bos: token("bos_token_id", Some(1)),
        eos: token("eos_token_id", Some(2)),
        pad: token("padding_token_id", None),
        unk: token("unknown_token_id", Some(0)),
    };
    let pre = file.text(&key("pre")).unwrap_or("default").to_owned();
    let usually = model == "llama" || rule(&pre).is_some_and(|rule| rule.begins);
    Ok(Vocabulary {
        begins: file.truth(&key("add_bos_token")).unwrap_or(usually) && special.bos.is_some(),
        blank_in_front: file.truth(&key("add_space_prefix")).unwrap_or(true),
        merges: if model == "gpt2" { texts("merges")? } else { Vec::new() },
        kinds: kinds.into_iter().map(|kind| kind as u64).collect(),
        model,
        pre,
        tokens,
        scores,
        special,
    })
}

impl Vocabulary {
    /// The same tokenizer in the layout of Hugging Face.
    fn to_json(&self) -> Result<Value, String> {
        let mut ids: HashMap<&str, u32> = HashMap::with_capacity(self.tokens.len());
        let mut added = Vec::new();
        for ((token, kind), id) in self.tokens.iter().zip(&self.kinds).zip(0u32..) {
            if *kind == UNUSED {
                continue;
            }
            ids.entry(token).or_insert(id);
            if matches!(*kind, UNKNOWN | CONTROL | USER_DEFINED) {
                added.push(json!({
                    "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": *kind != USER_DEFINED,
                }));
            }
        }
        let begin = self.special.bos.as_ref().filter(|_| self.begins).map(|bos| {
            let text = json!({"Sequence": {"id": "A", "type_id": 0}});
            let second = json!({"Sequence": {"id": "B", "type_id": 1}});
            let begin = json!({"SpecialToken": {"id": bos.text, "type_id": 0}});
            json!({
                "type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text, begin, second],
                "special_tokens": {&bos.text: {"id": bos.text, "ids": [bos.id], "tokens": [bos.text]}},
            })
        });
        let mut whole = match &*self.model {
            "llama" => self.sentence_pieces(&ids),
            _ => self.byte_pairs()?,
        };
        whole["model"]["vocab"] = json!(ids);
        whole["added_tokens"] = json!(added);
        whole["version"] = json!("1.0");
        if let Some(begin) = begin {
            whole["post_processor"] = begin;
        }
        Ok(whole)
    }

    /// Pairs of bytes, merged in the order of the file.
    fn byte_pairs(&self) -> Result<Value, String> {
        let rule = rule(&self.pre).ok_or_else(|| {
            let known: Vec<&str> = RULES.iter().flat_map(|(names, _)| names.iter().copied()).collect();
            format!(
                "its texts are split by the rule `{}`, which is not known here (known are {}); take the tokenizer.json of the \
                 model",
                self.pre,
                known.join(", ")
            )
        })?;
        let merges: Option<Vec<_>> = self
            .merges
            .iter()
            // A blank stands between the two; neither holds one, but the first may be one byte that looks like it.
            .map(|merge| {
                merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| (&merge[..at], &merge[at + 1..]))
            })
            .collect();
        let merges = merges.ok_or("`tokenizer.ggml.merges` holds something else than pairs")?;
        let mut steps: Vec<Value> = rule
            .patterns
            .iter()
            .map(|pattern| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false}))
            .collect();
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
        steps.push(bytes.clone());
        Ok(json!({
            "normalizer": if rule.composes { json!({"type": "NFC"}) } else { Value::Null },
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "post_processor": bytes,
            "decoder": bytes,
            "model": {
                "type": "BPE", "merges": merges, "ignore_merges": rule.whole_tokens, "fuse_unk": false,
                "byte_fallback": false,
            },
        }))
    }

    /// Pieces of SentencePiece: of all pairs that are a piece together, the one with the highest score is merged first. Bytes
    /// stand for what has no piece.
    fn sentence_pieces(&self, ids: &HashMap<&str, u32>) -> Value {
        let mut merges: Vec<(f64, &str, &str)> = Vec::new();
        for (piece, score) in self.tokens.iter().zip(&self.scores) {
            let pairs = piece.char_indices().skip(1).map(|(at, _)| piece.split_at(at));
            let mut own: Vec<_> =
                pairs.filter_map(|(a, b)| Some(((ids.get(a)?, ids.get(b)?), (*score, a, b)))).collect();
            own.sort_by_key(|(ids, _)| *ids);
            merges.extend(own.into_iter().map(|(_, merge)| merge));
        }
        // Of equal scores the longer first part goes first, as transformers orders them.
        let length = |text: &str| text.chars().count();
        merges.sort_by(|(score, a, b), (other, c, d)| {
            other.total_cmp(score).then_with(|| (length(c), length(d)).cmp(&(length(a), length(b))))
        });
        let merges: Vec<(&str, &str)> = merges.into_iter().map(|(_, a, b)| (a, b)).collect();
        let blanks = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        let mut normalizers = vec![blanks];
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if self.blank_in_front {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        json!({
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE", "merges": merges, "unk_token": self.special.unk.as_ref().map(|token| &token.text),
                "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            },
        })
    }
}

/// How texts are split before pairs are merged.
struct Rule {
    /// One after the other.
    patterns: &'static [&'static str],
    /// A part that is a token is that token, whatever the merges say.
    whole_tokens: bool,
    /// A text begins with a token where the file does not say.
    begins: bool,
    /// Characters are composed first (NFC).
    composes: bool,
}

const PLAIN: Rule = Rule { patterns: &[], whole_tokens: false, begins: false, composes: false };

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Numbers in threes.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Numbers one by one.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Marks belong to letters.
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Words begin with capitals.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The rules by the names that files have for them.
const RULES: &[(&[&str], Rule)] = &[
    (&["gpt-2", "phi-2", "olmo"], Rule { patterns: &[GPT2], ..PLAIN }),
    // Every number is a part of its own before GPT-2's rule.
    (&["smollm", "refact", "starcoder", "command-r", "exaone"], Rule { patterns: &[r"\p{N}", GPT2], ..PLAIN }),
    (&["llama-bpe", "llama3", "llama-v3"], Rule { patterns: &[LLAMA3], whole_tokens: true, begins: true, ..PLAIN }),
    (&["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"], Rule { patterns: &[LLAMA3], ..PLAIN }),
    (&["qwen2", "deepseek-r1-qwen"], Rule { patterns: &[QWEN2], composes: true, ..PLAIN }),
    (&["stablelm2"], Rule { patterns: &[QWEN2], ..PLAIN }),
    (&["qwen35"], Rule { patterns: &[QWEN35], composes: true, ..PLAIN }),
    (&["tekken"], Rule { patterns: &[TEKKEN], whole_tokens: true, begins: true, ..PLAIN }),
    (&["gpt-4o"], Rule { patterns: &[GPT4O], ..PLAIN }),
];

fn rule(name: &str) -> Option<&'static Rule> {
    RULES.iter().find(|(names, _)| names.contains(&name)).map(|(_, rule)| rule)
}
