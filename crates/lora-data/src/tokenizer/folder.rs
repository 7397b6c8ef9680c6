//! A tokenizer in the layout of Hugging Face: `tokenizer.json` with the vocabulary, `tokenizer_config.json` and
//! `special_tokens_map.json` with the names of special tokens, `generation_config.json` and `config.json` with the numbers of
//! those that end a text, and chat templates in a file of their own or in `tokenizer_config.json`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use lora_io::json::without_mark;
use serde_json::Value;

use super::language::{Parts, SpecialToken, SpecialTokens, digest};
use crate::guard::guarded;
use crate::{Error, Result};

pub(super) fn read(folder: &Path) -> Result<Parts> {
    let path = folder.join("tokenizer.json");
    if !path.is_file() {
        let reason = match folder.join("tokenizer.model").is_file() {
            true => {
                "there is a tokenizer.model and no tokenizer.json; write one with Python's transformers: \
                 AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            }
            false => "there is no tokenizer.json; take it, and tokenizer_config.json, from where the model is from",
        };
        return Err(Error::tokenizer(folder, reason));
    }
    let bytes = fs::read(&path).map_err(Error::io(&path, "read"))?;
    let damaged = |reason: &str| Error::tokenizer(&path, format!("{reason}; is the download complete?"));
    let inner = guarded(
        || damaged("it is damaged"),
        || tokenizers::Tokenizer::from_bytes(without_mark(&bytes)).map_err(|failure| damaged(&failure.to_string())),
    )?;
    let settings = json(&folder.join("tokenizer_config.json"))?;
    let map = json(&folder.join("special_tokens_map.json"))?;
    let named = |key: &str| -> Result<Option<SpecialToken>> {
        let Some(text) = token_text(&settings[key]).or_else(|| token_text(&map[key])) else { return Ok(None) };
        let id = inner.token_to_id(&text).ok_or_else(|| {
            let reason = format!("`{key}` is {text:?}, which the vocabulary of tokenizer.json lacks");
            Error::tokenizer(&folder.join("tokenizer_config.json"), reason)
        })?;
        Ok(Some(SpecialToken { id, text }))
    };
    let numbered = |id: u32| inner.id_to_token(id).map(|text| SpecialToken { id, text });
    let (generation, model) = (json(&folder.join("generation_config.json"))?, json(&folder.join("config.json"))?);
    let (generated, configured) = (numbers(&generation["eos_token_id"]), numbers(&model["eos_token_id"]));
    let mut special = SpecialTokens {
        bos: named("bos_token")?,
        eos: named("eos_token")?,
        pad: named("pad_token")?,
        unk: named("unk_token")?,
    };
    if special.eos.is_none() {
        special.eos = generated.iter().chain(&configured).find_map(|id| numbered(*id));
    }
    let mut ends: BTreeSet<u32> = special.eos.iter().map(|token| token.id).collect();
    ends.extend(if generated.is_empty() { configured } else { generated });
    Ok(Parts {
        path: folder.to_owned(),
        templates: templates(folder, &settings)?,
        digest: digest(&[&bytes, format!("{special:?}").as_bytes()]),
        inner,
        special,
        ends,
    })
}

/// A file's JSON; `null` where there is no such file.
fn json(path: &Path) -> Result<Value> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(without_mark(&bytes))
            .map_err(|error| Error::tokenizer(path, format!("line {}: not valid JSON: {error}", error.line()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(error) => Err(Error::io(path, "read")(error)),
    }
}

/// A token by its text, or as an object that has it as `content`.
fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned)
}

/// A number, or a list of them.
fn numbers(value: &Value) -> Vec<u32> {
    let number = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(values) => values.iter().filter_map(number).collect(),
        value => number(value).into_iter().collect(),
    }
}

/// Chat templates by name. A file of its own wins over the configuration's.
fn templates(folder: &Path, settings: &Value) -> Result<Vec<(String, String)>> {
    let path = folder.join("chat_template.jinja");
    if path.is_file() {
        return Ok(vec![("default".to_owned(), crate::dataset::read_text(&path)?)]);
    }
    let one = |entry: &Value| Some((entry["name"].as_str()?.to_owned(), entry["template"].as_str()?.to_owned()));
    Ok(match &settings["chat_template"] {
        Value::String(template) => vec![("default".to_owned(), template.clone())],
        Value::Array(entries) => entries.iter().filter_map(one).collect(),
        _ => Vec::new(),
    })
}
