//! Writes the files that each target starts from into `corpus/TARGET`: those of the repository's tests that are small, and
//! archives, tables and pictures made here.
//!
//!     cargo run --bin seeds

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use image::{DynamicImage, ImageFormat};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;

/// Larger files make a target slow and say little more.
const LARGEST: u64 = 16 << 10;

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Adds bytes to a target's corpus; a kind goes before them, where the target takes several.
fn add(target: &str, kind: Option<u8>, name: &str, bytes: &[u8]) {
    let folder = here("corpus").join(target);
    fs::create_dir_all(&folder).expect("created");
    let bytes = [kind.as_slice(), bytes].concat();
    fs::write(folder.join(format!("{}{name}", kind.map_or_else(String::new, |kind| format!("{kind}-")))), bytes)
        .expect("written");
}

/// The files of a folder and of those in it, whose names end so.
fn files(folder: &str, end: &str) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    let mut folders = vec![here("../crates").join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of the repository").map(|entry| entry.expect("read")) {
            let (path, length) = (entry.path(), entry.metadata().expect("read").len());
            if path.is_dir() {
                folders.push(path);
            } else if path.to_string_lossy().ends_with(end) && length <= LARGEST {
                let inside = path.strip_prefix(here("../crates")).expect("in it").to_string_lossy().replace('/', "-");
                found.push((inside, fs::read(&path).expect("read")));
            }
        }
    }
    found.sort();
    found
}

fn picture(format: ImageFormat, picture: &DynamicImage) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, format).expect("written");
    bytes.into_inner()
}

fn pictures() {
    let drawn =
        image::RgbaImage::from_fn(20, 13, |x, y| image::Rgba([(x * 12) as u8, (y * 19) as u8, 9, 255 - x as u8]));
    let drawn = DynamicImage::from(drawn);
    let formats = [ImageFormat::Png, ImageFormat::Gif, ImageFormat::WebP, ImageFormat::Bmp, ImageFormat::Tiff];
    for format in formats {
        add("picture", None, format.extensions_str()[0], &picture(format, &drawn));
    }
    add("picture", None, "grey16.png", &picture(ImageFormat::Png, &DynamicImage::from(drawn.to_luma16())));
    for (name, bytes) in files("lora-data/tests/golden/jpeg", ".jpg") {
        add("picture", None, &name, &bytes);
    }
    add("picture", None, "small.jpg", &picture(ImageFormat::Jpeg, &DynamicImage::from(drawn.to_rgb8())));
}

fn archives() {
    let mut archive = tar::Builder::new(Vec::new());
    let png = picture(ImageFormat::Png, &DynamicImage::new_rgb8(3, 2));
    let members: [(&str, &[u8]); 5] = [
        ("a/0001.png", &png),
        ("a/0001.txt", b"a caption"),
        ("a/0002.png", &png),
        ("a/0002.json", br#"{"caption": "another", "n": 3}"#),
        ("a/0001.mask.png", &png),
    ];
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        archive.append_data(&mut header, name, bytes).expect("written");
    }
    add("archive", None, "pictures.tar", &archive.into_inner().expect("written"));
}

/// A table of two text columns.
fn table(names: [&str; 2], rows: &[[&[u8]; 2]], compression: parquet::basic::Compression) -> Vec<u8> {
    let [first, second] = names;
    let schema = format!("message m {{ optional binary {first}; optional binary {second} (UTF8); }}");
    let schema = Arc::new(parquet::schema::parser::parse_message_type(&schema).expect("a schema"));
    let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, properties).expect("begun");
    let mut group = writer.next_row_group().expect("begun");
    for column in 0..2 {
        let values: Vec<ByteArray> = rows.iter().map(|row| ByteArray::from(row[column].to_vec())).collect();
        let mut written = group.next_column().expect("begun").expect("a column");
        written.typed::<ByteArrayType>().write_batch(&values, Some(&vec![1; rows.len()]), None).expect("written");
        written.close().expect("written");
    }
    group.close().expect("written");
    writer.into_inner().expect("written")
}

fn tables() {
    use parquet::basic::{Compression, GzipLevel};
    let png = picture(ImageFormat::Png, &DynamicImage::new_rgb8(3, 2));
    let rows: [[&[u8]; 2]; 3] = [[&png, b"one"], [&png, b"two"], [b"broken", b""]];
    let texts: [[&[u8]; 2]; 2] = [[b"What is it?", b"A table."], [b"And?", b"Nothing."]];
    let compressions = [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::GZIP(GzipLevel::default())];
    for (number, compression) in compressions.into_iter().enumerate() {
        add("table", None, &format!("{number}.parquet"), &table(["image", "text"], &rows, compression));
        add("texts", Some(3), &format!("{number}.parquet"), &table(["prompt", "completion"], &texts, compression));
    }
}

fn captions() {
    let list = br#"{"a.bmp": {"caption": "one", "tags": "two, three", "train_resolution": [64, 64]}}"#;
    let lines = br#"{"image_path": "a.bmp", "caption": "one"}"#;
    let row = br#"{"file_name": "a.bmp", "text": "one"}"#;
    let texts: [&[u8]; 8] = [
        b"one\ntwo, three\n",
        b"one",
        b"file_name,text\na.bmp,\"one, two\"\n",
        row,
        list,
        lines,
        row,
        b"\xc4\xe3\xba\xc3",
    ];
    for (kind, text) in texts.into_iter().enumerate() {
        add("captions", Some(kind as u8), "text", text);
    }
    let prompt =
        "masterpiece, (a fox:1.3), [two], {red|blue} cat \\(x\\), __wild__ BREAK caf\u{e9} &amp; \u{1f980} <b>";
    add("prompt", None, "text", prompt.as_bytes());
}

fn texts() {
    let lines: [&[u8]; 7] = [
        br#"{"text": "plain"}"#,
        br#"{"prompt": "a", "completion": "b"}"#,
        br#"{"instruction": "a", "input": "", "output": "b"}"#,
        br#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes", "weight": 0}]}"#,
        br#"{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}], "tools": "[]"}"#,
        br#"{"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "Y"}], "rejected": []}"#,
        br#"{"messages": [{"role": "assistant", "content": null, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]}], "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}"#,
    ];
    for (number, line) in lines.iter().enumerate() {
        add("texts", Some(0), &format!("{number}.jsonl"), line);
        add("texts", Some(1), &format!("{number}.json"), &[b"[", *line, b"]"].concat());
    }
    add("texts", Some(0), "all.jsonl", &lines.join(&b'\n'));
    add("texts", Some(2), "a.txt", b"Some text.\n\nMore.");
}

fn language() {
    for (name, bytes) in files("lora-data/tests/golden/chat", "tokenizer.json") {
        add("tokenizer", Some(0), &name, &bytes);
    }
    for (name, bytes) in files("lora-data/tests/golden/chat", "tokenizer_config.json") {
        add("tokenizer", Some(1), &name, &bytes);
    }
    add("tokenizer", Some(2), "map.json", br#"{"eos_token": {"content": "<|im_end|>"}, "unk_token": "<unk>"}"#);
    add("tokenizer", Some(3), "generation.json", br#"{"eos_token_id": [1, 2], "bos_token_id": 0}"#);
    for (name, bytes) in files("lora-data/tests/golden/gguf", ".gguf") {
        add("tokenizer_gguf", None, &name, &bytes);
    }
    for (name, bytes) in files("lora-data/tests/golden/chat", ".jinja") {
        add("chat_template", None, &name, &bytes);
    }
}

fn weights() {
    for (name, bytes) in files("lora-io/tests/golden", ".safetensors") {
        add("safetensors", None, &name, &bytes);
        add("adapter", None, &name, &bytes);
    }
    for (name, bytes) in
        files("lora-io/tests/golden", ".gguf").into_iter().chain(files("lora-data/tests/golden", ".gguf"))
    {
        add("gguf", None, &name, &bytes);
    }
    for (name, bytes) in files("lora-io/tests/golden", "adapter_config.json") {
        add("peft_folder", None, &name, &bytes);
    }
    let config = br#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {"q": 1}, "alpha_pattern": {"^layers.0": 3}, "use_rslora": true, "bias": "none", "fan_in_fan_out": false}"#;
    add("peft_folder", None, "lora", config);
    let index = br#"{"metadata": {"total_size": 8}, "weight_map": {"a.weight": "model-00001-of-00001.safetensors"}}"#;
    add("checkpoint_folder", Some(0), "index", index);
    add(
        "checkpoint_folder",
        Some(1),
        "part",
        br#"{"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768}"#,
    );
    add("checkpoint_folder", Some(2), "model", br#"{"model_type": "llama"}"#);
    for (name, bytes) in files("lora-models/tests/golden/llm", "config.json") {
        add("checkpoint_folder", Some(3), &name, &bytes);
    }
}

fn configurations() {
    for (name, bytes) in files("lora-train/tests/golden/settings", ".yaml") {
        add("config", Some(0), &name, &bytes);
    }
    let yaml = b"base_model: a\ntrain_data_dir: b\nlora_rank: 4\nlearning_rate: 1e-4\nrank_pattern: {to_q: 8}\nsample_prompts:\n  - a cat\n  - {prompt: b, seed: 3}\nresolution: [512, 768]\n";
    add("config", Some(0), "a.yaml", yaml);
    let toml = b"base_model = \"a\"\nlora_rank = 4\n[optimizer_args]\nd0 = 1e-6\n[[datasets]]\ntrain_data_dir = \"b\"\nrepeats = 2\n";
    add("config", Some(1), "a.toml", toml);
    add("config", Some(2), "a.json", br#"{"base_model": "a", "lora_rank": 4, "target_modules": ["to_q", "to_k"]}"#);
    add("config", Some(3), "set", b"lora_rank=4\nrank_pattern={to_q: 8}\ntarget_modules=[a, b]");
    let datasets = b"[general]\nshuffle_caption = true\n[[datasets]]\nresolution = [64, 64]\n[[datasets.subsets]]\nimage_dir = \"a\"\nnum_repeats = 2\n";
    add("config", Some(4), "datasets.toml", datasets);
    add("config", Some(5), "datasets.json", br#"{"datasets": [{"resolution": 64, "subsets": [{"image_dir": "a"}]}]}"#);
}

fn main() {
    pictures();
    archives();
    tables();
    captions();
    texts();
    language();
    weights();
    configurations();
}
