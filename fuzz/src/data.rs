//! Readers of pictures and of what is written about them.

use std::fs;
use std::io::Cursor;
use std::path::Path;
use std::sync::OnceLock;

use lora_core::random::Stream;
use lora_data::bucket::Framing;
use lora_data::caption::{CaptionOptions, Done, WarmupLength, weights};
use lora_data::dataset::{ImageDataset, ScanOptions, Strictness, TextEncoding};
use lora_data::processor::ProcessorRegistry;
use lora_data::tokenizer::{ClipTokenizer, TextCleaning};
use lora_data::{DatasetOptions, MaskOptions, Pictures};

use crate::{choose, empty_folder, file};

fn scan(path: &Path, options: ScanOptions) {
    if let Ok(dataset) = ImageDataset::scan(path, &options) {
        for item in dataset.items() {
            let _ = item.file.read();
        }
    }
}

/// All that is found is reported and nothing ends the reading.
fn inspect() -> ScanOptions {
    ScanOptions { strictness: Strictness::Inspect, recursive: true, ..ScanOptions::default() }
}

/// Any bytes as a picture: its header, whole, and at the fraction of its size that a small training size asks for.
pub fn picture(bytes: &[u8]) {
    let folder = empty_folder("pictures");
    fs::write(folder.join("a.jpg"), bytes).expect("written");
    let reader = image::ImageReader::new(Cursor::new(bytes)).with_guessed_format().expect("bytes are read");
    if reader.into_dimensions().is_ok_and(|(width, height)| u64::from(width) * u64::from(height) > 1 << 22) {
        // Large pictures may take memory and time.
        return;
    }
    let _ = lora_data::RgbPicture::decode(Path::new("a.jpg"), bytes, [255; 3], None);
    let options = DatasetOptions {
        scan: inspect(),
        framing: Framing::Fixed((8, 8)),
        background: [0; 3],
        masks: MaskOptions { enabled: true, alpha: true, ..MaskOptions::default() },
        ..DatasetOptions::of(folder.clone())
    };
    if let Ok(pictures) = Pictures::open(vec![options], &ProcessorRegistry::default()) {
        for index in 0..pictures.items().len() {
            let _ = pictures.load(index, &Stream::new(1));
        }
    }
}

/// Any bytes as an archive of pictures.
pub fn archive(bytes: &[u8]) {
    scan(&file("a.tar", bytes), inspect());
}

/// Any bytes as a table of pictures.
pub fn table(bytes: &[u8]) {
    scan(&file("a.parquet", bytes), inspect());
}

fn one_pixel() -> &'static [u8] {
    static PICTURE: OnceLock<Vec<u8>> = OnceLock::new();
    PICTURE.get_or_init(|| {
        let mut bytes = Cursor::new(Vec::new());
        image::RgbImage::new(1, 1).write_to(&mut bytes, image::ImageFormat::Bmp).expect("written");
        bytes.into_inner()
    })
}

/// Any bytes as captions, beside pictures or as a list of them.
pub fn captions(bytes: &[u8]) {
    let kinds =
        ["a.txt", "a.caption", "metadata.csv", "metadata.jsonl", "list.json", "list.jsonl", "a.json", "gbk.txt"];
    let Some((name, bytes)) = choose(bytes, &kinds) else { return };
    let folder = empty_folder("captions");
    fs::write(folder.join("a.bmp"), one_pixel()).expect("written");
    fs::write(folder.join(if name == "gbk.txt" { "a.txt" } else { name }), bytes).expect("written");
    for strictness in [Strictness::Strict, Strictness::Inspect] {
        let mut options = ScanOptions { strictness, ..inspect() };
        if name.starts_with("list") {
            options.metadata_file = Some(folder.join(name));
        }
        if name == "gbk.txt" {
            options.caption_encoding = TextEncoding::named("gbk");
        }
        scan(&folder, options);
    }
}

/// Any text as a caption or a prompt: treated, weighted, as CLIP's tokens.
pub fn prompt(bytes: &[u8]) {
    static TOKENIZER: OnceLock<ClipTokenizer> = std::sync::OnceLock::new();
    let tokenizer = TOKENIZER.get_or_init(|| ClipTokenizer::new(TextCleaning::default()));
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    weights::parse(text);
    let options = CaptionOptions {
        wildcards: true,
        shuffle: true,
        tag_dropout: 0.5,
        keep_tokens: 1,
        warmup: WarmupLength::Share(0.5),
        ..CaptionOptions::default()
    };
    options.process(&text.lines().collect::<Vec<_>>(), 3, Done { steps: 2, of: 5 }, &Stream::new(1));
    tokenizer.weighted_rows(text, 2);
}
