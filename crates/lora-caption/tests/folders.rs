//! Folders of pictures and a tagger: every option of writing, and what is in the way. Needs ONNX Runtime: `make setup-onnx`.

mod mock;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lora_caption::{Captioner, Existing, FolderOptions, Output, Report, Settings, caption_folder};
use lora_data::dataset::ScanOptions;
use lora_data::report::html;
use mock::{Server, caption};

const PICTURES: [&str; 5] = ["chelsea.png", "coffee.png", "collins.png", "rocket.png", "transparent.png"];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// The photographs of the golden folder.
fn pictures() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in PICTURES {
        fs::copy(golden().join(name), folder.path().join(name)).unwrap();
    }
    folder
}

fn tagger() -> Settings {
    Settings { tagger: Some(golden().join("tagger")), ..Settings::default() }
}

fn options(folder: &Path) -> FolderOptions {
    FolderOptions { folder: folder.to_owned(), ..FolderOptions::default() }
}

fn run(settings: Settings, options: &FolderOptions) -> lora_caption::Result<Report> {
    caption_folder(&Arc::new(Captioner::open(settings)?), options, &Arc::default(), &mut |_| {})
}

fn text(folder: &Path, name: &str) -> String {
    fs::read_to_string(folder.join(name)).unwrap()
}

/// Takes away the captions beside the photographs.
fn written(folder: &Path) -> Vec<Option<String>> {
    let path = |name: &str| folder.join(name).with_extension("txt");
    let take = |name| {
        let text = fs::read_to_string(path(name)).ok()?;
        fs::remove_file(path(name)).unwrap();
        Some(text)
    };
    PICTURES.into_iter().map(take).collect()
}

/// By the golden outputs: from 0.35 on general tags, from 0.85 on characters.
const COLLINS: &str = "1girl, long hair, cat, ^_^\n";
const CHELSEA: &str = "1girl, long hair\n";

#[test]
fn captions_are_the_golden_outputs_above_their_thresholds() {
    let folder = pictures();
    let report = run(tagger(), &options(folder.path())).unwrap();
    assert_eq!((report.pictures, report.kept, report.captioned.len(), report.failed.len()), (5, 0, 5, 0));
    assert_eq!(
        (text(folder.path(), "collins.txt"), text(folder.path(), "chelsea.txt")),
        (COLLINS.into(), CHELSEA.into())
    );
    let tags = report.ranked_tags();
    assert_eq!(tags[0], ("1girl", 5), "{tags:?}");
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["tags"].as_object().unwrap().keys().next().unwrap(), "1girl");

    let again = run(tagger(), &options(folder.path())).unwrap();
    assert_eq!((again.kept, again.captioned.len()), (5, 0), "they have captions now");
}

#[test]
fn a_dry_run_tells_and_writes_nothing() {
    let folder = pictures();
    let options = FolderOptions { dry_run: true, output: Output::Jsonl, cards: 2, ..options(folder.path()) };
    let report = run(tagger(), &options).unwrap();
    assert_eq!(format!("{}\n", report.captioned[2].caption), COLLINS);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 5);
    let page = html::contact_sheet("photographs <1>", "5 pictures", &report.cards);
    assert!(
        page.contains("photographs &lt;1&gt;") && page.contains("chelsea.png") && page.contains("1girl, long hair")
    );
    assert_eq!(page.matches("data:image/jpeg;base64,/9j/").count(), 2);
}

#[test]
fn a_list_with_probabilities_gives_other_thresholds_without_the_tagger() {
    let folder = pictures();
    let options = |output| FolderOptions { output, existing: Existing::Overwrite, ..options(folder.path()) };
    run(tagger(), &options(Output::Jsonl)).unwrap();
    let list = folder.path().join("metadata.jsonl");
    let rows = fs::read_to_string(&list).unwrap();
    let row: serde_json::Value = serde_json::from_str(rows.lines().nth(2).unwrap()).unwrap();
    assert_eq!(
        (&row["file_name"], format!("{}\n", row["text"].as_str().unwrap())),
        (&"collins.png".into(), COLLINS.into())
    );
    let kept = row["tags"]["general"]["1girl"].as_f64().unwrap();
    let golden: serde_json::Value = serde_json::from_str(&text(&golden(), "outputs.json")).unwrap();
    assert!((kept - golden["tagger"]["collins.png"][4].as_f64().unwrap()).abs() < 1e-5);

    for threshold in [0.1, 0.35, 0.6, 0.95] {
        let change = |settings: Settings| Settings { threshold, character_threshold: threshold, ..settings };
        run(change(tagger()), &options(Output::Files)).unwrap();
        let by_tagger = written(folder.path());
        let recorded = Settings { tagger: Some(list.clone()), ..Settings::default() };
        run(change(recorded), &options(Output::Files)).unwrap();
        assert_eq!(written(folder.path()), by_tagger);
    }
    let recorded = Settings { tagger: Some(list), threshold: 0.01, ..Settings::default() };
    let error = run(recorded, &options(Output::Files)).unwrap_err();
    assert!(error.is_usage() && error.to_string().contains("0.01 lies below 0.05"), "{error}");
}

#[test]
fn lists_hold_paths_from_the_folder_and_are_read_as_captions() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("a/b")).unwrap();
    fs::copy(golden().join("chelsea.png"), folder.path().join("a/b/cat.png")).unwrap();
    fs::copy(golden().join("collins.png"), folder.path().join("her.png")).unwrap();
    let scan = ScanOptions { recursive: true, ..ScanOptions::default() };
    let options = FolderOptions { scan, output: Output::Csv, ..options(folder.path()) };
    run(tagger(), &options).unwrap();
    assert_eq!(
        text(folder.path(), "metadata.csv"),
        format!("filename,prompt\nher.png,\"{}\"\na/b/cat.png,\"{}\"\n", COLLINS.trim(), CHELSEA.trim())
    );
    assert_eq!(run(tagger(), &options).unwrap().kept, 2);
    // Without recursion the folder below is named, and nothing of it is read.
    let flat =
        FolderOptions { scan: ScanOptions::default(), existing: Existing::Overwrite, output: Output::Files, ..options };
    fs::remove_file(folder.path().join("metadata.csv")).unwrap();
    let report = run(tagger(), &flat).unwrap();
    assert_eq!((report.captioned.len(), report.notes.len()), (1, 1));
    assert!(report.notes[0].contains("not read") && folder.path().join("her.txt").exists());
}

#[test]
fn existing_captions_are_treated_as_asked_and_extension_and_separator_too() {
    let folder = pictures();
    let mine = "a woman, Long_hair\nanother line";
    let with = |existing| {
        fs::write(folder.path().join("collins.caption"), mine).unwrap();
        let scan = ScanOptions { caption_extension: Some(".caption".into()), ..ScanOptions::default() };
        let settings = Settings { separator: "; ".into(), ..tagger() };
        run(settings, &FolderOptions { scan, existing, ..options(folder.path()) }).unwrap();
        text(folder.path(), "collins.caption")
    };
    assert_eq!(with(Existing::Skip), mine);
    assert_eq!(with(Existing::Append), "a woman, Long_hair; 1girl; cat; ^_^\nanother line\n");
    assert_eq!(with(Existing::Prepend), "1girl; cat; ^_^; a woman, Long_hair\nanother line\n");
    assert_eq!(with(Existing::Overwrite), "1girl; long hair; cat; ^_^\n");
    assert_eq!(text(folder.path(), "chelsea.caption"), "1girl; long hair\n");
    assert!(!folder.path().join("chelsea.txt").exists());
}

#[test]
fn the_taggers_answer_stands_in_the_servers_prompt() {
    let server = Server::start(|request| caption(&format!("Said: {}", request.prompt())));
    let folder = pictures();
    let mut settings = tagger();
    (settings.server, settings.model) = (Some(server.url()), Some("m".into()));
    settings.prompt = Some("[{tags}] What is {name}?".into());
    let report = run(settings.clone(), &options(folder.path())).unwrap();
    assert_eq!(report.captioned.len(), 5);
    assert_eq!(text(folder.path(), "collins.txt"), format!("Said: [{}] What is collins?\n", COLLINS.trim()));
    settings.prompt = None;
    run(settings, &FolderOptions { existing: Existing::Overwrite, ..options(folder.path()) }).unwrap();
    let caption = text(folder.path(), "chelsea.txt");
    assert!(caption.contains("A tagger found, and may be wrong: 1girl, long hair. Answer"), "{caption}");
}

#[test]
fn what_cannot_be_read_or_told_apart_is_named_and_the_rest_is_done() {
    let folder = pictures();
    let damaged = fs::read(golden().join("rocket.png")).unwrap();
    fs::write(folder.path().join("rocket.png"), &damaged[..damaged.len() / 2]).unwrap();
    fs::write(folder.path().join("text.jpg"), "no picture").unwrap();
    fs::write(folder.path().join("chelsea.txt"), b"caf\xe9").unwrap();
    fs::write(folder.path().join("coffee.txt"), "").unwrap();
    fs::copy(folder.path().join("collins.png"), folder.path().join("collins.jpg")).unwrap();
    let report = run(tagger(), &options(folder.path())).unwrap();
    let failed = |name: &str| {
        let found = report.failed.iter().find(|own| own.path.ends_with(name));
        found.map(|own| own.problem.to_string()).unwrap_or_default()
    };
    assert_eq!((report.pictures, report.captioned.len(), report.failed.len()), (7, 3, 4));
    assert!(failed("text.jpg").contains("none of JPEG"), "{}", failed("text.jpg"));
    assert!(!failed("rocket.png").is_empty());
    assert!(failed("chelsea.png").contains("cannot be read and is left as it is"));
    assert!(failed("collins.png").contains("collins.txt; rename one"), "{}", failed("collins.png"));
    assert_eq!(fs::read(folder.path().join("chelsea.txt")).unwrap(), b"caf\xe9");
    assert!(text(folder.path(), "coffee.txt").contains("1girl"), "an empty caption is none");
    // A list that cannot be read is never written over.
    fs::write(folder.path().join("metadata.csv"), "filename,prompt\nnowhere.png,x\n").unwrap();
    for output in [Output::Files, Output::Csv] {
        let error = run(tagger(), &FolderOptions { output, ..options(folder.path()) }).unwrap_err().to_string();
        assert!(error.contains("metadata.csv") && error.contains("nowhere.png"), "{error}");
    }
}

#[cfg(unix)]
#[test]
fn a_folder_that_takes_no_captions_is_told_before_anything_is_looked_at() {
    use std::os::unix::fs::PermissionsExt;
    let folder = pictures();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o555)).unwrap();
    if fs::write(folder.path().join("probe"), "").is_ok() {
        // This user may write anywhere.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        return;
    }
    let error = run(tagger(), &options(folder.path())).unwrap_err().to_string();
    assert!(error.contains(&folder.path().display().to_string()) && error.contains("cannot write into it"), "{error}");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn a_folder_that_is_none_is_refused() {
    let folder = pictures();
    let error = run(tagger(), &options(&folder.path().join("chelsea.png"))).unwrap_err();
    assert!(error.is_usage() && error.to_string().contains("is a file"), "{error}");
    assert!(run(tagger(), &options(&folder.path().join("nowhere"))).unwrap_err().to_string().contains("nowhere"));
}
