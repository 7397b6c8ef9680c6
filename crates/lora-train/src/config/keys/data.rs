//! What is trained on and where the result goes: datasets, roles of pictures, output. How pictures are cut and
//! captioned is in [`super::pictures`].

use std::path::PathBuf;

use lora_core::Strength;
use lora_data::dataset::{Role, Strictness, TextEncoding};

use super::{Given, Group, Key, Reads, Resumed, shown};
use crate::inference::AppliedAdapter;

/// The keys, in the order of the reference.
pub(super) static KEYS: Group = Group {
    section: "What to train on",
    behind: None,
    keys: &[
        Key {
            name: "base_model",
            values: "path",
            default: "required",
            meaning: "The base: an image model as one file in the original layout (`.safetensors`, or GGUF) or a diffusers folder, or a language model as a Hugging Face folder or a GGUF file; or the name (`owner/name`) of one that Hugging Face's programs have fetched.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Run(|given, config| config.base_model = given.required_text().into()),
        },
        Key {
            name: "train_data_dir",
            values: "path",
            default: "required",
            meaning: "Folder of pictures with captions (`.txt`, `.caption`, `metadata.csv` or `metadata.jsonl`), of `N_name` folders or of any folders; a `.tar` in WebDataset's form; a `.parquet`. Not needed with `datasets` or `dataset_config`.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| {
                dataset.options.path = given.text().map(PathBuf::from).unwrap_or_default()
            }),
        },
        Key {
            name: "datasets",
            values: "list of tables",
            default: "none",
            meaning: "Several datasets, each with its own `train_data_dir` and whatever else differs from the keys outside: repeats, resolution, buckets, batch size, captions, processors, masks, `is_reg`.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::WhichDatasets,
        },
        Key {
            name: "dataset_config",
            values: "path",
            default: "none",
            meaning: "A dataset file of sd-scripts (`[general]`, `[[datasets]]`, `[[datasets.subsets]]`), as it is.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::WhichDatasets,
        },
        Key {
            name: "output_dir",
            values: "path",
            default: "required",
            meaning: "Folder for the LoRA, samples, loss curve and metrics; made if it is not there.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.output_dir = given.required_text().into()),
        },
        Key {
            name: "output_name",
            values: "text",
            default: "\"lora\"",
            meaning: "File name of the LoRA without its extension; the WebUI shows it.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.output_name = output_name(given)),
        },
        Key {
            name: "init_from",
            values: "path",
            default: "none",
            meaning: "An adapter of any layout to go on from. Another rank or alpha begins with the same update (new ranks change nothing, of too many the largest singular values stay), another variant with its update at this rank where `variant` is `lora`, and targeted layers that it lacks begin anew; a note says what was lost. Layers of it that the run does not train are refused, or merged into the base where `fuse_adapters` names the file too.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Adapter(|given, config| config.init_from = given.text().map(PathBuf::from)),
        },
        Key {
            name: "fuse_adapters",
            values: "list of `FILE`, `FILE:0.7` or `FILE:0.7:1` (text encoders, others)",
            default: "none",
            meaning: "Adapters that are merged into the frozen base as it is read, before it is quantised. Training, samples and plans see them; the saved file is to be used together with them, and says so (`lora_fused`).",
            memory: "Of a GGUF base the weights that they change are held as `base_storage` says, not in the file's blocks.",
            resumed: Resumed::Elsewhere,
            reads: Reads::Adapter(|given, config| config.fuse_adapters = fuse_adapters(given)),
        },
        Key {
            name: "strict",
            values: "true/false",
            default: "false",
            meaning: "Unreadable pictures end the run instead of being skipped with a count.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Common(
                |given, config| config.strict = given.boolean(false),
                |given, dataset| {
                    dataset.options.scan.strictness = match given.boolean(false) {
                        true => Strictness::Strict,
                        false => Strictness::Normal,
                    }
                },
            ),
        },
    ],
};

/// Which pictures there are, what they are for, and where their captions stand.
pub(super) static PICTURES: Group = Group {
    section: "What to train on",
    behind: Some("dataset_config"),
    keys: &[
        Key {
            name: "reg_data_dir",
            values: "path",
            default: "none",
            meaning: "Folder of regularisation pictures, which keep what the model knows of the class; as many visits as the others have. `trigger_word`, `class_tokens`, `metadata_file` and `mask_dir` do not hold for them.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::WhichDatasets,
        },
        Key {
            name: "is_reg",
            values: "true/false",
            default: "false",
            meaning: "In `datasets`: these are regularisation pictures. `trigger_word`, `class_tokens`, `metadata_file` and `mask_dir` hold for them only where they stand in the table itself.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| {
                dataset.options.scan.role = match given.boolean(false) {
                    true => Role::Regularisation,
                    false => Role::Training,
                }
            }),
        },
        Key {
            name: "prior_loss_weight",
            values: "0 …",
            default: "1",
            meaning: "How much regularisation pictures count in the loss.",
            memory: "",
            resumed: Resumed::Fixed(|config| shown(&config.prior_loss_weight)),
            reads: Reads::Common(
                |given, config| config.prior_loss_weight = given.not_negative().unwrap_or(1.0),
                |given, dataset| dataset.prior_loss_weight = given.not_negative().unwrap_or(1.0),
            ),
        },
        Key {
            name: "loss_weight",
            values: "0 …",
            default: "1",
            meaning: "How much a dataset's pictures count in the loss.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| dataset.options.loss_weight = given.not_negative().unwrap_or(1.0)),
        },
        Key {
            name: "recursive",
            values: "true/false",
            default: "false",
            meaning: "Read folders below one that has pictures of its own too.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| dataset.options.scan.recursive = given.boolean(false)),
        },
        Key {
            name: "caption_extension",
            values: "extension",
            default: ".txt, then .caption",
            meaning: "Extension of caption files, where it is another.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| dataset.options.scan.caption_extension = given.text()),
        },
        Key {
            name: "caption_encoding",
            values: "name of an encoding",
            default: "none",
            meaning: "What captions and lists of them are in that are not UTF-8: `windows-1252`, `shift_jis`, `gbk`, `euc-kr`, `big5`, `windows-1251`, … UTF-16 with its mark is read without.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| dataset.options.scan.caption_encoding = encoding(given)),
        },
        Key {
            name: "auto_label",
            values: "table",
            default: "none",
            meaning: "Before training, pictures without a caption get one, which is written beside them: `{ tagger = \"FOLDER\" }`, `{ server = \"http://localhost:11434\", model = \"NAME\" }` or both, with the options of [captions.md](captions.md). The name of an `N_name` folder and `class_tokens` are no captions; regularisation pictures are left alone.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.auto_label = auto_label(given)),
        },
        Key {
            name: "class_tokens",
            values: "text",
            default: "the `name` of an `N_name` folder",
            meaning: "Caption of pictures that have none.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| dataset.options.scan.class = given.text().unwrap_or_default()),
        },
        Key {
            name: "metadata_file",
            values: "path",
            default: "none",
            meaning: "Metadata of sd-scripts (JSON by path, or JSON lines); its pictures are trained on, relative ones in `train_data_dir`.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| {
                dataset.options.scan.metadata_file = given.text().map(PathBuf::from)
            }),
        },
    ],
};

fn auto_label(given: &mut Given<'_>) -> Option<lora_caption::Settings> {
    let settings: lora_caption::Settings = given.table()?;
    match settings.check() {
        Ok(()) => Some(settings),
        Err(error) => {
            given.problem(error.to_string());
            None
        }
    }
}

fn encoding(given: &mut Given<'_>) -> Option<TextEncoding> {
    let name = given.text()?;
    let encoding = TextEncoding::named(&name);
    if encoding.is_none() {
        given.problem(format!(
            "no encoding is called `{name}`; expected a name such as windows-1252, shift_jis, gbk or euc-kr"
        ));
    }
    encoding
}

fn output_name(given: &mut Given<'_>) -> String {
    let name = given.text().unwrap_or_else(|| "lora".into());
    if name.is_empty() || name.contains(['/', '\\', ':', '>', '<']) || name.starts_with('.') {
        given.problem(format!("`{name}` cannot name a file that prompts call (no / \\ : < >)"));
    }
    name
}

fn fuse_adapters(given: &mut Given<'_>) -> Vec<AppliedAdapter> {
    let mut adapters = Vec::new();
    for text in given.texts().unwrap_or_default() {
        match Strength::split(&text) {
            Ok((path, strength)) => adapters.push(AppliedAdapter { path: path.into(), strength }),
            Err(error) => given.problem(format!("{text}: {error}")),
        }
    }
    adapters
}
