//! Writing a tokenizer as the files that stand beside a model in Hugging Face's layout.

use std::io::Write;
use std::path::{Path, PathBuf};

use lora_io::atomic;
use serde_json::{Map, Value, json};

use super::language::Tokenizer;
use crate::{Error, Result};

impl Tokenizer {
    /// Writes `tokenizer.json`, `tokenizer_config.json` with the chat templates, and `generation_config.json` with the tokens
    /// that end an answer, into a folder. Returns the files.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<Vec<PathBuf>> {
        let folder = folder.as_ref();
        let files = [
            ("tokenizer.json", self.to_json()?),
            ("tokenizer_config.json", format!("{:#}\n", self.configuration())),
            ("generation_config.json", format!("{:#}\n", self.generation())),
        ];
        files
            .into_iter()
            .map(|(name, text)| {
                let path = folder.join(name);
                atomic::write(&path, |file| file.write_all(text.as_bytes()))?;
                Ok(path)
            })
            .collect()
    }

    fn to_json(&self) -> Result<String> {
        self.inner().to_string(true).map_err(|failure| Error::tokenizer(self.path(), failure.to_string()))
    }

    fn configuration(&self) -> Value {
        let special = self.special_tokens();
        let mut config = Map::new();
        for (name, token) in [
            ("bos_token", &special.bos),
            ("eos_token", &special.eos),
            ("pad_token", &special.pad),
            ("unk_token", &special.unk),
        ] {
            config.insert(name.into(), json!(token.as_ref().map(|token| &token.text)));
        }
        config.insert("clean_up_tokenization_spaces".into(), json!(false));
        config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        let template = match self.templates() {
            [] => None,
            [(_, only)] => Some(json!(only)),
            several => {
                Some(several.iter().map(|(name, template)| json!({ "name": name, "template": template })).collect())
            }
        };
        config.extend(template.map(|template| ("chat_template".to_owned(), template)));
        Value::Object(config)
    }

    fn generation(&self) -> Value {
        let special = self.special_tokens();
        let ends: Vec<u32> = self.ends().collect();
        let mut config = json!({ "eos_token_id": ends });
        for (name, token) in [("bos_token_id", &special.bos), ("pad_token_id", &special.pad)] {
            if let Some(token) = token {
                config[name] = json!(token.id);
            }
        }
        config
    }
}
