//! CLIP's byte-pair encoding (Radford et al., 2021; Sennrich et al., 2016), its vocabulary inside the crate. What text
//! becomes before it is split, and how rows are laid out, is here; pairs are merged by the `tokenizers` crate. The numbers are
//! held against both of transformers' implementations in `tests/golden`.

use std::io::Read;
use std::sync::OnceLock;

use flate2::read::GzDecoder;
use serde_json::json;

use super::clean::TextCleaning;
use crate::caption::weights;

/// Begin of text.
pub(crate) const BEGIN: u32 = 49406;
/// End of text.
pub const END: u32 = 49407;
/// Tokens of text in one row.
pub const CHUNK: usize = 75;
/// Tokens of a row: begin, text, end.
pub const ROW: usize = CHUNK + 2;

const MERGES: &[u8] = include_bytes!("../../assets/clip_merges.txt.gz");
/// What stands for one token wherever it is written.
const SPECIALS: [(&str, u32); 2] = [("<|startoftext|>", BEGIN), ("<|endoftext|>", END)];

/// What fills a row after the end of its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Padding {
    /// The end of text again, as the text encoders of OpenAI's CLIP have it.
    #[default]
    End,
    /// Token 0, as those of OpenCLIP have it. It is written `!`, so that every `!` of a caption becomes token 0 too: so do
    /// transformers and sd-scripts with the published tokenizers.
    Zero,
}

impl Padding {
    /// Its token.
    pub fn token(self) -> u32 {
        match self {
            Padding::End => END,
            Padding::Zero => 0,
        }
    }

    /// How it is written, where it stands for itself wherever it is written.
    fn special(self) -> Option<(&'static str, u32)> {
        match self {
            Padding::End => None,
            Padding::Zero => Some(("!", self.token())),
        }
    }
}

/// CLIP's tokenizer.
#[derive(Debug, Clone, Copy)]
pub struct ClipTokenizer {
    cleaning: TextCleaning,
    padding: Padding,
}

impl ClipTokenizer {
    /// With the given treatment of text before it is split; rows are padded with the end of text.
    pub fn new(cleaning: TextCleaning) -> Self {
        Self { cleaning, padding: Padding::default() }
    }

    /// Rows are padded with this.
    #[must_use]
    pub fn padded_with(self, padding: Padding) -> Self {
        Self { padding, ..self }
    }

    /// The tokens of a text, without begin, end and padding.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut tokens = Vec::new();
        let mut rest = text;
        // The special tokens are recognised as written, before any cleaning.
        while let Some((at, special, id)) = SPECIALS
            .into_iter()
            .chain(self.padding.special())
            .filter_map(|(special, id)| Some((rest.find(special)?, special, id)))
            .min_by_key(|found| found.0)
        {
            encode_plain(&self.cleaning.apply(&rest[..at]), &mut tokens);
            tokens.push(id);
            rest = &rest[at + special.len()..];
        }
        encode_plain(&self.cleaning.apply(rest), &mut tokens);
        tokens
    }

    /// Rows of 77 for a limit of `chunks` × 75 tokens, always `chunks` of them, as sd-scripts lays them out: the tokens (cut at
    /// the limit) in chunks of 75, each between begin and end and padded.
    pub fn rows(&self, text: &str, chunks: usize) -> Vec<[u32; ROW]> {
        self.rows_of(&self.encode(text), chunks)
    }

    /// The same for a prompt with weights ([`weights::parse`]), each part split into tokens by itself, and the weight of every
    /// place in the rows joined to one begin, `chunks` × 75 places and one end; 1 where there is no text.
    pub fn weighted_rows(&self, prompt: &str, chunks: usize) -> (Vec<[u32; ROW]>, Vec<f32>) {
        let mut tokens = Vec::new();
        let mut places = vec![1.0];
        for (text, weight) in weights::parse(prompt) {
            tokens.extend(self.encode(&text));
            places.resize(1 + tokens.len(), weight);
        }
        places.truncate(1 + chunks * CHUNK);
        places.resize(chunks * CHUNK + 2, 1.0);
        (self.rows_of(&tokens, chunks), places)
    }

    fn rows_of(&self, tokens: &[u32], chunks: usize) -> Vec<[u32; ROW]> {
        let row = |chunk: usize| {
            let rest = tokens.get(chunk * CHUNK..).unwrap_or_default();
            let text = &rest[..rest.len().min(CHUNK)];
            let mut row = [self.padding.token(); ROW];
            row[0] = BEGIN;
            row[1..=text.len()].copy_from_slice(text);
            row[1 + text.len()] = END;
            row
        };
        (0..chunks).map(row).collect()
    }
}

fn encode_plain(text: &str, tokens: &mut Vec<u32>) {
    let encoding = merger().encode_fast(text, false).expect("every byte has a token");
    tokens.extend(encoding.get_ids());
}

/// Words of a text, each as bytes that are merged.
fn merger() -> &'static tokenizers::Tokenizer {
    static MERGER: OnceLock<tokenizers::Tokenizer> = OnceLock::new();
    MERGER.get_or_init(|| {
        let mut merges = String::new();
        GzDecoder::new(MERGES).read_to_string(&mut merges).expect("the vocabulary is part of the program");
        let pairs: Vec<(&str, &str)> = merges.lines().filter_map(|line| line.split_once(' ')).collect();
        // Numbers: the printable bytes in their order, then the others, then all of them at the end of a word, then merges.
        let alphabet = alphabet();
        let ends = alphabet.iter().map(|symbol| format!("{symbol}</w>"));
        let symbols =
            alphabet.iter().map(char::to_string).chain(ends).chain(pairs.iter().map(|(a, b)| format!("{a}{b}")));
        let ids: serde_json::Map<_, _> = symbols.zip((0..).map(|id: u32| json!(id))).collect();
        let words = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+";
        let whole = json!({
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": words}, "behavior": "Removed", "invert": true},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
            ]},
            "model": {
                "type": "BPE", "vocab": ids, "merges": pairs, "end_of_word_suffix": "</w>", "fuse_unk": false,
                "byte_fallback": false,
            },
        });
        tokenizers::Tokenizer::from_bytes(whole.to_string()).expect("the vocabulary is part of the program")
    })
}

/// GPT-2's byte alphabet: printable bytes stand for themselves, the others, which follow them, for the characters from 256 on.
fn alphabet() -> Vec<char> {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let shown = (0..=255u8).filter(printable).map(char::from);
    shown.chain(('\u{100}'..).take((0..=255u8).filter(|byte| !printable(byte)).count())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_laid_out_as_sd_scripts_does() {
        let tokenizer = ClipTokenizer::new(TextCleaning::Ftfy);
        let text = vec!["a"; 80].join(" ");
        let a = tokenizer.encode("a")[0];
        let rows = tokenizer.rows(&text, 2);
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[0][0], BEGIN);
        assert!(rows[0][1..76].iter().all(|&token| token == a));
        assert_eq!(rows[0][76], END);
        assert_eq!(rows[1][..8], [BEGIN, a, a, a, a, a, END, END]);
        assert_eq!(tokenizer.rows(&text, 1), [rows[0]]);
        assert_eq!(tokenizer.rows("", 1)[0][..3], [BEGIN, END, END]);
    }

    /// Rows of transformers 5.17.0's `CLIPTokenizer` with `pad_token` `!`, as the published tokenizer of Stable Diffusion 2.1 has it.
    #[test]
    fn rows_are_padded_with_token_0_as_openclip_has_it() {
        let tokenizer = ClipTokenizer::new(TextCleaning::None).padded_with(Padding::Zero);
        let row = |text: &str| tokenizer.rows(text, 1)[0];
        assert_eq!(row("a photo of a cat")[..8], [BEGIN, 320, 1125, 539, 320, 2368, END, 0]);
        assert_eq!(row("")[..3], [BEGIN, END, 0]);
        assert_eq!(row("...!!! (((red:1.3)))")[..12], [BEGIN, 678, 0, 0, 0, 33287, 736, 281, 272, 269, 274, 18305]);
        assert_eq!(row(&"cat ".repeat(75))[74..], [2368, 2368, END]);
        // What sd-scripts makes of longer texts: each chunk with an end of its own.
        let rows = tokenizer.rows(&"cat ".repeat(80), 3);
        assert_eq!((rows[0][75..].to_vec(), rows[1][4..8].to_vec()), (vec![2368, END], vec![2368, 2368, END, 0]));
        assert_eq!(rows[2][..3], [BEGIN, END, 0]);
    }

    #[test]
    fn every_place_has_its_weight() {
        let tokenizer = ClipTokenizer::new(TextCleaning::Ftfy);
        let (rows, places) = tokenizer.weighted_rows("a (red apple:1.5) [x]", 1);
        assert_eq!(rows, tokenizer.rows("a red apple x", 1));
        assert_eq!((places.len(), &places[..6]), (77, [1.0, 1.0, 1.5, 1.5, 1.0 / 1.1, 1.0].as_slice()));
        let (rows, places) = tokenizer.weighted_rows(&format!("({}:2)", "a ".repeat(100)), 1);
        assert_eq!((rows.len(), places.len(), places[75], places[76]), (1, 77, 2.0, 1.0));
        assert_eq!(tokenizer.weighted_rows("", 2).1, vec![1.0; 152]);
    }
}
