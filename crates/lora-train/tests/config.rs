//! Configurations, good and bad: every problem is named with its line, its key and what would be right.

use lora_core::DType;
use lora_data::caption::CaptionLines;
use lora_train::config::keys::Keys;
use lora_train::config::{Format, LrScheduler, RunLength, TrainConfig, Warmup};

const NONE: &[&str] = &[];

fn toml(text: &str) -> Result<TrainConfig, String> {
    let base = "base_model = \"b\"\ntrain_data_dir = \"d\"\noutput_dir = \"o\"\n";
    TrainConfig::from_text(&format!("{base}{text}"), Format::Toml, NONE).map_err(|error| error.to_string())
}

#[test]
fn the_flat_config_that_people_know_works_in_both_formats() {
    let yaml = r#"
train_data_dir: ./images
base_model: v1-5-pruned.safetensors
lora_rank: 8
lora_alpha: 16
target_modules: ["q_proj", "v_proj"]
batch_size: 2
gradient_accumulation_steps: 4
precision: fp16
max_resolution: "512,512"
learning_rate: 1e-4
output_dir: out
"#;
    let toml = yaml.lines().filter(|line| !line.is_empty()).map(|line| {
        let (key, value) = line.split_once(": ").unwrap();
        let plain = value.chars().next().is_some_and(|c| c.is_ascii_digit() || c == '[' || c == '"');
        if plain { format!("{key} = {value}\n") } else { format!("{key} = \"{value}\"\n") }
    });
    let toml = TrainConfig::from_text(&toml.collect::<String>(), Format::Toml, NONE).unwrap();
    let yaml = TrainConfig::from_text(yaml, Format::Yaml, NONE).unwrap();
    assert_eq!(format!("{yaml:?}"), format!("{toml:?}"));
    assert_eq!((yaml.lora_rank, yaml.lora_alpha, yaml.precision), (8, 16.0, DType::F16));
    assert_eq!((yaml.max_resolution, yaml.text_encoder_lr), ((512, 512), 5e-5));
    assert_eq!(
        (yaml.length, yaml.lr_scheduler, yaml.lr_warmup),
        (RunLength::Epochs(10), LrScheduler::Constant, Warmup::Steps(0))
    );
}

#[test]
fn alpha_is_the_rank_by_default_and_overrides_win() {
    assert_eq!(toml("lora_rank = 4").unwrap().lora_alpha, 4.0);
    let text = "base_model: b\ntrain_data_dir: d\noutput_dir: o\nlora_rank: 4\nepochs: 3\n";
    let set = ["lora_rank=8", "precision=bf16", "max_resolution=[256, 320]", "max_train_steps=7"];
    let config = TrainConfig::from_text(text, Format::Yaml, &set).unwrap();
    assert_eq!((config.lora_rank, config.precision, config.max_resolution), (8, DType::BF16, (256, 320)));
    assert_eq!(config.length, RunLength::Steps(7));
}

#[test]
fn every_mistake_is_named_with_what_would_be_right() {
    let cases: &[(&str, &[&str])] = &[
        ("lora_rnk = 4", &[":4", "`lora_rnk`", "did you mean `lora_rank`"]),
        ("network_dim = 4", &["`network_dim`", "called `lora_rank`"]),
        ("pretrained_model_name_or_path = 4", &["called `base_model`"]),
        ("something_else_entirely = 4", &["unknown key"]),
        ("lora_rank = 0", &["`lora_rank`", "from 1", "found 0"]),
        ("lora_rank = 1000000000000", &["`lora_rank`", "from 1 to 1000000", "found 1000000000000"]),
        ("rank_pattern = { to_q = 2.5 }", &[":4", "`rank_pattern`", "`to_q`", "whole number", "2.5"]),
        ("alpha_pattern = { to_q = -1 }", &["`alpha_pattern`", "`to_q`", "above 0"]),
        ("batch_size = 10000000000", &["`batch_size`", "to 65536"]),
        ("repeats = 10000000000", &["`repeats`", "to 1000000"]),
        ("epochs = 10000000000", &["`epochs`", "10000000000"]),
        ("enable_bucket = true\nmax_bucket_reso = 1000000000", &["`max_bucket_reso`", "32768"]),
        ("learning_rate = nan", &[":4: `learning_rate`", "finite number", "nan or inf"]),
        ("lora_alpha = 4\nrank_pattern = { q = 4, k = inf }", &[":5: `rank_pattern.k`", "finite number"]),
        ("auto_label = { tagger = \"t\", threshold = \"high\" }", &[":4", "`auto_label`", "`threshold`", "high"]),
        ("auto_label = { tagger = \"t\", prompt = \"{tags}\" }", &["`auto_label`", "server: model and prompt"]),
        ("caption_encoding = \"klingon\"", &["`caption_encoding`", "klingon", "shift_jis"]),
        ("output_name = \"a\\q\"\nloss = 1", &[":4: `output_name`", "TOML"]),
        ("lora_rank = \"four\"", &["`lora_rank`", "whole number", "\"four\""]),
        ("lora_alpha = -1", &["`lora_alpha`", "above 0"]),
        ("lora_dropout = 1.0", &["`lora_dropout`", "below 1"]),
        ("learning_rate = nan", &["`learning_rate`"]),
        ("epochs = 2\nmax_train_steps = 100", &["not both"]),
        ("train_unet = false\ntrain_text_encoder = false", &["nothing to train"]),
        ("max_resolution = \"512,500\"", &["500", "496 and 504"]),
        ("enable_bucket = true\nmin_bucket_reso = 600", &["min_bucket_reso", "600", "512×512"]),
        ("max_resolution = \"big\"", &["width,height", "big"]),
        ("target_modules = []", &["`target_modules`"]),
        ("target_modules = [\"re:(\"]", &["re:("]),
        ("precision = \"fp8\"", &["fp8", "fp32, fp16, bf16"]),
        ("optimizer = [1]", &["expected text"]),
        ("optimizer_args = { betas = \"high\" }", &["by name"]),
        ("optimizer_args = [\"betas 0.9\"]", &["name=value"]),
        ("weight_decay = 0.1\noptimizer_args = { weight_decay = 0.2 }", &["give one of them"]),
        ("lr_scheduler = \"cosin\"", &["did you mean `cosine`"]),
        ("lr_warmup_steps = 1.5", &["1.5"]),
        ("adam_betas = [0.9]", &["two numbers"]),
        ("background = \"#12\"", &["#12", "#rrggbb"]),
        ("output_name = \"a/b\"", &["a/b"]),
        ("max_token_length = 100", &["75, 150 or 225"]),
        ("device = \"gpu\"", &["cuda:N", "gpu"]),
        ("sample_every_n_steps = 5", &["sample_prompts"]),
        ("sample_steps = 2000", &["1 to 1000"]),
        ("seed = -1", &["`seed`", "from 0"]),
        ("strict = \"yes\"", &["true or false"]),
        ("lora_rank = 4\nlora_rank = 8", &["duplicate"]),
        ("lora_rank = ", &[":4"]),
        ("[optimizer]\nname = 1", &["`optimizer`"]),
    ];
    for (text, fragments) in cases {
        let error = toml(text).expect_err(text);
        for fragment in *fragments {
            assert!(error.contains(fragment), "`{text}` gives `{error}`, which lacks `{fragment}`");
        }
    }
}

#[test]
fn what_a_library_refuses_is_told_with_its_key_and_in_words_of_this_program() {
    let cases: &[(&str, &[&str])] = &[
        ("learning_rate: .nan", &[":4: `learning_rate`: expected a finite number, found .nan"]),
        ("unet_lr: 1e400", &[":4: `unet_lr`: expected a finite number, found 1e400"]),
        ("rank_pattern:\n  to_q: -.inf", &[":5: `to_q`: expected a finite number, found -.inf"]),
        ("lora_rank: 4\nlora_rank: 5", &[":5: `lora_rank`: duplicate", "twice"]),
        ("trigger_word: a: b", &[":4: `trigger_word`", "not valid YAML", "in quotes"]),
        ("trigger_word: *x", &[":4: `trigger_word`", "not valid YAML", "in quotes"]),
        ("background: #ffffff", &[":4: `background`", "found nothing", "comment"]),
    ];
    for (text, fragments) in cases {
        let text = format!("base_model: b\ntrain_data_dir: d\noutput_dir: o\n{text}\n");
        let error = TrainConfig::from_text(&text, Format::Yaml, NONE).expect_err(&text).to_string();
        assert!(!error.contains("policy") && !error.contains("Policy"), "{error}");
        for fragment in *fragments {
            assert!(error.contains(fragment), "`{text}` gives `{error}`, which lacks `{fragment}`");
        }
    }
    let error = TrainConfig::from_text("", Format::Toml, &["learning_rate=nan"]).unwrap_err().to_string();
    assert!(error.contains("`learning_rate`: expected a number") && error.contains("nan"), "{error}");
    // Of several that are none, all are told.
    let error = toml("learning_rate = inf\nlora_alpha = nan\nlora_rank = 0").unwrap_err();
    assert_eq!(error.lines().count(), 3, "{error}");
}

#[test]
fn a_byte_order_mark_is_no_part_of_any_text() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, format!("\u{feff}{text}")).unwrap();
        path.display().to_string()
    };
    let json = write("d.json", r#"{"datasets": [{"resolution": 64, "subsets": [{"image_dir": "d"}]}]}"#);
    let table = write("d.TOML", "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'd'\n");
    for (name, dataset) in [("c.toml", &json), ("c.toml", &table), ("c.yaml", &json), ("C.JSON", &json)] {
        let text = match name {
            "c.toml" => format!("base_model = 'b'\noutput_dir = 'o'\ndataset_config = '{dataset}'\n"),
            "c.yaml" => format!("base_model: b\noutput_dir: o\ndataset_config: {dataset}\n"),
            _ => serde_json::json!({ "base_model": "b", "output_dir": "o", "dataset_config": dataset }).to_string(),
        };
        let config = TrainConfig::from_file(write(name, &text), NONE).unwrap();
        assert_eq!(config.datasets[0].framing.resolution(), (64, 64), "{name}");
    }
    std::fs::write(folder.path().join("u.yaml"), b"\xff\xfeb\0").unwrap();
    let error = TrainConfig::from_file(folder.path().join("u.yaml"), NONE).unwrap_err().to_string();
    assert!(error.contains("u.yaml") && error.contains("save the file as UTF-8"), "{error}");
}

#[test]
fn all_problems_come_at_once() {
    let error = TrainConfig::from_text("lora_rank: 0\nlearning_rte: 1\n", Format::Yaml, &["oops"]).unwrap_err();
    let keys: Vec<_> = error.problems.iter().filter_map(|problem| problem.key.as_deref()).collect();
    for key in ["lora_rank", "learning_rte", "base_model", "train_data_dir", "output_dir"] {
        assert!(keys.contains(&key), "{key} in {error}");
    }
    assert!(error.to_string().contains("key=value"));
}

#[test]
fn hostile_text_is_an_error() {
    for text in ["", "- a\n- b", "a: &x [*x]", "\u{0}", "{", "a: b: c", "text"] {
        assert!(TrainConfig::from_text(text, Format::Yaml, NONE).is_err(), "{text:?}");
    }
    assert!(
        TrainConfig::from_file("no/such/config.toml", NONE).unwrap_err().to_string().contains("no/such/config.toml")
    );
    assert!(TrainConfig::from_file("config.ini", NONE).unwrap_err().to_string().contains(".toml"));
}

/// A key that is only documented would pass unread: a value of the wrong type must be noticed.
#[test]
fn every_key_of_the_reference_is_read() {
    for key in Keys::default().iter() {
        if ["base_model", "train_data_dir", "output_dir"].contains(&key.name) {
            continue;
        }
        let error = toml(&format!("{} = {{ x = \"one\" }}", key.name)).expect_err(key.name);
        assert!(error.contains(&format!("`{}`", key.name)), "{}: {error}", key.name);
    }
}

#[test]
fn the_written_reference_is_up_to_date() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/config.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, Keys::default().reference()).unwrap();
    }
    assert_eq!(std::fs::read_to_string(path).unwrap(), Keys::default().reference(), "run the tests with UPDATE_DOCS=1");
}

/// What a dataset came to: folder, repeats, largest area, batch size.
fn seen(config: &TrainConfig) -> Vec<(String, usize, (usize, usize), usize)> {
    let target = |dataset: &lora_data::DatasetOptions| dataset.framing.plan((500, 500)).unwrap().target;
    let row = |dataset: &lora_data::DatasetOptions| {
        (dataset.path.display().to_string(), dataset.scan.repeats, target(dataset), dataset.batch_size)
    };
    config.datasets.iter().map(row).collect()
}

#[test]
fn several_datasets_have_their_own_keys_and_inherit_the_others() {
    let text = "base_model = \"b\"\noutput_dir = \"o\"\nrepeats = 2\nbatch_size = 3\nshuffle_caption = true\nprior_loss_weight = 0.5\n\
                [[datasets]]\ntrain_data_dir = \"one\"\n\
                [[datasets]]\ntrain_data_dir = \"two\"\nrepeats = 5\nmax_resolution = 768\nbatch_size = 1\nshuffle_caption = false\n\
                [[datasets]]\ntrain_data_dir = \"reg\"\nis_reg = true\nloss_weight = 0.5\n";
    let config = TrainConfig::from_text(text, Format::Toml, NONE).unwrap();
    let expected = [("one", 2, (512, 512), 3), ("two", 5, (768, 768), 1), ("reg", 2, (512, 512), 3)];
    assert_eq!(seen(&config), expected.map(|(path, repeats, size, batch)| (path.to_owned(), repeats, size, batch)));
    let shuffled: Vec<bool> = config.datasets.iter().map(|dataset| dataset.captions.shuffle).collect();
    assert_eq!(shuffled, [true, false, true]);
    assert_eq!(config.datasets[2].loss_weight, 0.25);

    let error = |text: &str| {
        let text = format!("base_model = \"b\"\noutput_dir = \"o\"\n{text}");
        TrainConfig::from_text(&text, Format::Toml, NONE).unwrap_err().to_string()
    };
    for (text, fragments) in [
        ("", &["train_data_dir", "missing"] as &[&str]),
        ("train_data_dir = \"a\"\n[[datasets]]\ntrain_data_dir = \"b\"", &["only one of them"]),
        ("[[datasets]]\nrepeats = 2", &["datasets[0]", "train_data_dir", "missing"]),
        ("[[datasets]]\ntrain_data_dir = \"a\"\nrepeat = 2", &["datasets[0]", "`repeat`", "did you mean `repeats`"]),
        ("[[datasets]]\ntrain_data_dir = \"a\"\nlora_rank = 2", &["datasets[0]", "`lora_rank`", "whole run"]),
        ("[[datasets]]\ntrain_data_dir = \"a\"\nrepeats = 0", &["datasets[0]", "`repeats`", "from 1"]),
        ("datasets = \"a\"", &["`datasets`", "list of tables"]),
        ("dataset_config = \"none.toml\"", &["none.toml", "cannot read"]),
    ] {
        let error = error(text);
        for fragment in fragments {
            assert!(error.contains(fragment), "`{text}` gives `{error}`, which lacks `{fragment}`");
        }
    }
}

#[test]
fn a_file_of_prompts_that_is_not_read_is_no_prompt() {
    let error = toml("sample_prompts = [\"prompts.json\"]").unwrap_err();
    assert!(error.contains("`sample_prompts`") && error.contains("prompts.json is not read"), "{error}");
    let config = toml("sample_prompts = [\"a page of package.json\"]").unwrap();
    assert_eq!(config.samples.prompts, ["a page of package.json"]);
}

#[test]
fn regularisation_pictures_do_not_inherit_what_is_the_subjects() {
    let subject = "trigger_word = \"ohwx\"\nclass_tokens = \"ohwx man\"\nmetadata_file = \"m.json\"\nmask_dir = \"m\"\n\
                   caption_prefix = \"photo of\"\n";
    let seen = |config: &TrainConfig, index: usize| {
        let own = &config.datasets[index];
        let scan = &own.scan;
        let files = (scan.metadata_file.is_some(), scan.mask_dir.is_some());
        (own.captions.trigger_word.clone(), scan.class.clone(), files, own.captions.prefix.clone())
    };
    let told = |word: &str, class: &str, files| (word.to_owned(), class.to_owned(), files, "photo of".to_owned());
    let config = toml(&format!("{subject}reg_data_dir = \"reg\"")).unwrap();
    assert_eq!(seen(&config, 0), told("ohwx", "ohwx man", (true, true)));
    assert_eq!(seen(&config, 1), told("", "", (false, false)));
    let tables = "[[datasets]]\ntrain_data_dir = \"s\"\n[[datasets]]\ntrain_data_dir = \"r\"\nis_reg = true\n\
                  class_tokens = \"man\"\n";
    let text = format!("base_model = \"b\"\noutput_dir = \"o\"\n{subject}{tables}");
    let config = TrainConfig::from_text(&text, Format::Toml, NONE).unwrap();
    assert_eq!(seen(&config, 0), told("ohwx", "ohwx man", (true, true)));
    assert_eq!(seen(&config, 1), told("", "man", (false, false)), "a key of the table itself counts");
}

#[test]
fn lines_that_musubi_tuners_dataset_files_imply_give_way_to_what_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dataset.toml");
    std::fs::write(&path, "[general]\nresolution = 64\n[[datasets]]\nimage_directory = 'a'\n").unwrap();
    let lines = |key: &str| {
        let own = format!("base_model = \"b\"\noutput_dir = \"o\"\ndataset_config = {path:?}\n{key}");
        TrainConfig::from_text(&own, Format::Toml, NONE).unwrap().datasets[0].captions.lines
    };
    assert_eq!((lines(""), lines("caption_lines = \"first\"")), (CaptionLines::All, CaptionLines::First));
}

#[test]
fn dataset_files_of_sd_scripts_are_read_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dataset.toml");
    let config = |text: &str| {
        std::fs::write(&path, text).unwrap();
        let own = format!("base_model = \"b\"\noutput_dir = \"o\"\ndataset_config = {path:?}\n");
        TrainConfig::from_text(&own, Format::Toml, NONE)
    };
    let text = r#"
[general]
shuffle_caption = true
caption_extension = ".txt"
keep_tokens = 1
flip_aug = true
token_warmup_step = 0.25

[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = "hoge"
  class_tokens = "hoge girl"
  num_repeats = 10

  [[datasets.subsets]]
  is_reg = true
  image_dir = "reg"
  class_tokens = "human"
  keep_tokens = 3
  flip_aug = false

[[datasets]]
resolution = [768, 768]
batch_size = 2
enable_bucket = true

  [[datasets.subsets]]
  image_dir = "piyo"
  metadata_file = "piyo.json"
  random_crop = true
"#;
    let read = config(text).unwrap();
    let expected = [("hoge", 10, (512, 512), 4), ("reg", 1, (512, 512), 4), ("piyo", 1, (768, 768), 2)];
    assert_eq!(seen(&read), expected.map(|(path, repeats, size, batch)| (path.to_owned(), repeats, size, batch)));
    let [hoge, reg, piyo] = read.datasets.as_slice() else { panic!("{:?}", read.datasets) };
    assert_eq!((hoge.captions.keep_tokens, reg.captions.keep_tokens, piyo.captions.keep_tokens), (2, 3, 1));
    assert_eq!(hoge.processors, ["center_crop", "flip"]);
    assert_eq!(
        (reg.processors.as_slice(), piyo.processors.as_slice()),
        (&["center_crop".to_owned()][..], &["random_crop".to_owned(), "flip".to_owned()][..])
    );
    assert_eq!((hoge.scan.class.as_str(), hoge.scan.caption_extension.as_deref()), ("hoge girl", Some(".txt")));
    assert_eq!((hoge.group, reg.group, piyo.group), (0, 0, 1));
    assert_eq!(piyo.scan.metadata_file.as_deref(), Some(std::path::Path::new("piyo.json")));
    assert_eq!(hoge.captions.warmup, lora_data::caption::WarmupLength::Share(0.25));
    assert!(hoge.captions.shuffle && reg.scan.role == lora_data::dataset::Role::Regularisation);

    for (text, fragment) in [
        ("[general]\nx = 1\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = \"a\"", "`general.x`: unknown key"),
        ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 1", "datasets[0].subsets[0]"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = \"a\"\nnetwork_multiplier = 0.5", "no counterpart"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = \"a\"\nnum_repeats = 0", "`repeats`"),
        ("[general]\n", "no [[datasets.subsets]]"),
        ("[other]\n", "`other`: unknown section"),
        ("[general\n", ":1: not valid TOML"),
    ] {
        let error = config(text).unwrap_err().to_string();
        assert!(error.contains(fragment), "`{text}` gives `{error}`, which lacks `{fragment}`");
    }
}

#[test]
fn a_dataset_of_which_nothing_is_said_is_the_libraries_own() {
    let (datasets, tokens) = TrainConfig::datasets_of::<&str>(None, Some("pictures".as_ref()), &[]).unwrap();
    let own = lora_data::DatasetOptions::of("pictures");
    // Each of them as text: their parts cannot be compared.
    assert_eq!((format!("{datasets:?}"), tokens), (format!("{:?}", [own]), 75));
}
