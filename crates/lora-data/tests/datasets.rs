//! Datasets as people have them on disk: layouts, captions, masks, archives, tables, and what is wrong with them.

use std::fs;

use lora_data::caption::{CaptionLines, CaptionOptions};
use lora_data::dataset::{CaptionSource, ImageDataset, ScanOptions, Strictness, tag_frequency};

fn folder(pictures: &[&str], files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in pictures {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        image::RgbImage::new(9, 7).save_with_format(path, image::ImageFormat::Png).unwrap();
    }
    for (name, content) in files {
        fs::write(folder.path().join(name), content).unwrap();
    }
    folder
}

#[test]
fn captions_by_precedence() {
    let folder = folder(
        &["a.png", "b.JPG", "c.webp", "d.png", "e.png"],
        &[
            ("a.txt", "\u{feff}from txt\r\nsecond line".as_bytes()),
            ("a.caption", b"from caption"),
            ("b.caption", b"  from caption \n"),
            ("metadata.csv", b"filename,prompt\na.png,from csv\nc.webp,\"from csv, quoted\"\n"),
            (
                "metadata.jsonl",
                b"{\"file_name\":\"c.webp\",\"text\":\"x\"}\n\n{\"file_name\":\"d.png\",\"text\":\"from jsonl\"}\n",
            ),
        ],
    );
    let dataset = ImageDataset::scan(folder.path(), &ScanOptions::default()).unwrap();
    let captions: Vec<_> = dataset.items().iter().map(|item| item.caption.as_str()).collect();
    assert_eq!(captions, ["from txt", "from caption", "from csv, quoted", "from jsonl", ""]);
    assert_eq!(dataset.items()[0].lines(), ["from txt", "second line"]);
    assert_eq!(dataset.items()[0].size, (9, 7));
    assert_eq!(dataset.items()[4].caption_source, CaptionSource::None);
    let plain = CaptionOptions::default();
    assert_eq!(
        tag_frequency(dataset.items().iter().map(|item| (item, &plain))).into_values().next().unwrap()["quoted"],
        1
    );
    // Of lines that count all tags do.
    let all = CaptionOptions { lines: CaptionLines::All, ..CaptionOptions::default() };
    for (captions, lines) in [(&plain, None), (&all, Some(&1))] {
        let tags = tag_frequency(dataset.items().iter().map(|item| (item, captions))).into_values().next().unwrap();
        assert_eq!((tags.get("from txt"), tags.get("second line")), (Some(&1), lines));
    }
}

#[test]
fn kohya_folders_repeat_and_name() {
    let folder = folder(
        &["3_red apple/a.png", "3_red apple/b.png", "1_x/c.png", "logs/d.png"],
        &[("3_red apple/b.txt", b"own")],
    );
    let dataset = ImageDataset::scan(
        folder.path(),
        &ScanOptions { repeats: 2, strictness: Strictness::Strict, ..ScanOptions::default() },
    )
    .unwrap();
    let seen: Vec<_> = dataset.items().iter().map(|item| (item.caption.as_str(), item.repeats)).collect();
    assert_eq!(seen, [("x", 2), ("red apple", 6), ("own", 6)]);
    assert_eq!(kinds(&dataset), ["folder-ignored"]);
    assert!(dataset.findings()[0].path.ends_with("logs"));
}

#[test]
fn broken_pictures_are_skipped_or_refused() {
    let folder = folder(&["a.png"], &[("b.png", b"no picture"), ("c.jpg", b"")]);
    let dataset = ImageDataset::scan(folder.path(), &ScanOptions::default()).unwrap();
    assert_eq!((dataset.items().len(), kinds(&dataset)), (1, vec!["unreadable", "unreadable"]));
    assert!(dataset.findings()[0].path.ends_with("b.png"));
    let error =
        ImageDataset::scan(folder.path(), &ScanOptions { strictness: Strictness::Strict, ..ScanOptions::default() })
            .unwrap_err();
    assert!(error.to_string().contains("b.png"));
}

#[test]
fn errors_name_file_and_line() {
    let scan = |pictures: &[&str], files: &[(&str, &[u8])]| {
        ImageDataset::scan(folder(pictures, files).path(), &ScanOptions::default()).unwrap_err().to_string()
    };
    let cases: [(String, &[&str]); 10] = [
        (scan(&[], &[]), &["folder is empty", "webp"]),
        (scan(&[], &[("notes.md", b"x")]), &["1 other file"]),
        (scan(&[], &[("a.png", b"x")]), &["could not be read", "a.png"]),
        (scan(&["a.png"], &[("a.txt", b"one\ntwo \xff")]), &["a.txt, line 2", "UTF-8"]),
        (
            scan(&["a.png"], &[("metadata.csv", b"file,words\na.png,x\n")]),
            &["metadata.csv, line 1", "filename", "words"],
        ),
        (scan(&["a.png"], &[("metadata.csv", b"filename,prompt\nb.png,x\n")]), &["metadata.csv, line 2", "b.png"]),
        (scan(&["a.png"], &[("metadata.csv", b"filename,prompt\na.png,x\na.png,y\n")]), &["line 3", "already"]),
        (scan(&["a.png"], &[("metadata.csv", b"filename,prompt\na.png,x,y\n")]), &["metadata.csv, line 2"]),
        (
            scan(&["a.png"], &[("metadata.jsonl", b"{\"file_name\":\"../a.png\",\"text\":\"x\"}")]),
            &["metadata.jsonl, line 1", "../a.png"],
        ),
        (scan(&["a.png"], &[("metadata.jsonl", b"{\"file_name\":")]), &["metadata.jsonl, line 1", "JSON"]),
    ];
    for (error, fragments) in cases {
        for fragment in fragments {
            assert!(error.contains(fragment), "`{error}` lacks `{fragment}`");
        }
    }
    assert!(
        ImageDataset::scan("does/not/exist", &ScanOptions::default())
            .unwrap_err()
            .to_string()
            .contains("does/not/exist")
    );
}

#[test]
fn pictures_beside_kohyas_folders_are_left_out_and_named() {
    let folder = folder(&["10_sks cat/a.png", "10_sks cat/b.png", "preview.png"], &[]);
    let dataset = ImageDataset::scan(folder.path(), &ScanOptions::default()).unwrap();
    let visits: Vec<_> = dataset.items().iter().map(|item| (item.caption.as_str(), item.repeats)).collect();
    assert_eq!(visits, [("sks cat", 10), ("sks cat", 10)]);
    assert_eq!(kinds(&dataset), ["picture-ignored"]);
    assert!(dataset.findings()[0].path.ends_with("preview.png"));
    let strict = ScanOptions { strictness: Strictness::Strict, ..ScanOptions::default() };
    assert!(ImageDataset::scan(folder.path(), &strict).unwrap_err().to_string().contains("preview.png"));
    let all = ImageDataset::scan(folder.path(), &ScanOptions { recursive: true, ..ScanOptions::default() }).unwrap();
    assert_eq!(all.items().len(), 3);
}

#[test]
fn a_number_in_the_given_folders_own_name_is_said_to_be_out_of_force() {
    let folder = folder(&["10_sks cat/a.png"], &[]);
    let own = folder.path().join("10_sks cat");
    let dataset = ImageDataset::scan(&own, &ScanOptions::default()).unwrap();
    assert_eq!((kinds(&dataset), dataset.items()[0].repeats), (vec!["folder-number"], 1));
    let told = dataset.findings()[0].to_string();
    assert!(told.contains("10 repeats") && told.contains("`sks cat`"), "{told}");
    // As sd-scripts' dataset files have it: the number stands in the configuration too.
    let options = ScanOptions { repeats: 10, class: "sks cat".into(), ..ScanOptions::default() };
    assert!(ImageDataset::scan(&own, &options).unwrap().findings().is_empty());
}

#[test]
fn more_visits_than_can_be_ordered_are_refused() {
    let folder = folder(&["999999999_x/a.png"], &[]);
    for repeats in [1, usize::MAX / 2] {
        let options = ScanOptions { repeats, ..ScanOptions::default() };
        let error = ImageDataset::scan(folder.path(), &options).unwrap_err().to_string();
        assert!(error.contains("repeats") && error.contains("50000000"), "{error}");
    }
}

#[test]
fn companions_are_found_whichever_case_their_names_have() {
    let folder = folder(
        &["IMG_1.PNG", "IMG_1-Mask.PNG", "b.png", "c.jpg", "d.png"],
        &[
            ("IMG_1.TXT", b"upper"),
            ("b.Txt", b"mixed"),
            ("c.txt", b"exact"),
            ("c.TXT", b"other"),
            ("D.txt", b"another stem"),
            ("METADATA.CSV", b"file_name,text\nd.png,from csv\n"),
        ],
    );
    let dataset = ImageDataset::scan(folder.path(), &ScanOptions::default()).unwrap();
    let captions: Vec<_> = dataset.items().iter().map(|item| item.caption.as_str()).collect();
    assert_eq!(captions, ["upper", "mixed", "exact", "from csv"]);
    assert!(dataset.items()[0].mask.as_ref().unwrap().path.ends_with("IMG_1-Mask.PNG"));
    let orphans: Vec<_> = dataset.findings().iter().filter(|own| own.kind.name() == "orphan-caption").collect();
    assert!(orphans.len() == 1 && orphans[0].path.ends_with("D.txt"), "{:?}", dataset.findings());
    let options = ScanOptions { caption_extension: Some(".TXT".into()), ..ScanOptions::default() };
    assert_eq!(ImageDataset::scan(folder.path(), &options).unwrap().items()[1].caption, "mixed");
}

#[test]
fn lists_name_pictures_as_people_and_programs_write_them() {
    let named = |name: &str, pictures: &[&str]| {
        let folder = folder(pictures, &[]);
        let root = folder.path().join("train");
        let name = name.replace("ROOT", root.to_str().unwrap());
        let line = serde_json::json!({ "file_name": name, "text": "found" });
        fs::write(root.join("metadata.jsonl"), line.to_string()).unwrap();
        let options = ScanOptions { recursive: true, ..ScanOptions::default() };
        ImageDataset::scan(&root, &options)
            .map(|dataset| dataset.items().iter().map(|item| item.caption.clone()).collect::<String>())
            .map_err(|error| error.to_string())
    };
    for name in ["a.png", "./a.png", ".\\a.png", "train/a.png", "./train/a.png", "train\\a.png", "ROOT/a.png"] {
        assert_eq!(named(name, &["train/a.png"]), Ok("found".into()), "{name}");
    }
    for name in ["sub/a.png", "./sub/./a.png", "sub\\a.png", "train/sub/a.png", "ROOT/sub/a.png"] {
        assert_eq!(named(name, &["train/sub/a.png"]), Ok("found".into()), "{name}");
    }
    for name in ["../train/a.png", "other/a.png", "/etc/a.png", "sub/gone.png", ".", "", "C:\\train\\a.png"] {
        let error = named(name, &["train/a.png", "other/a.png"]).unwrap_err();
        assert!(error.contains("line 1") && error.contains("count from the folder of this list"), "{name}: {error}");
    }
}

#[test]
fn captions_that_cannot_be_read_are_told_together_or_in_their_encoding() {
    let folder = folder(
        &["a.png", "b.png", "c.png", "d.png"],
        &[("a.txt", b"caf\xe9"), ("b.txt", b"na\xefve"), ("c.txt", b"plain"), ("d.txt", b"\xff\xfed\0")],
    );
    let error = ImageDataset::scan(folder.path(), &ScanOptions::default()).unwrap_err().to_string();
    for fragment in ["2 captions", "a.txt, line 1", "b.txt, line 1", "not UTF-8 at byte 2", "caption_encoding"] {
        assert!(error.contains(fragment), "`{error}` lacks `{fragment}`");
    }
    let caption_encoding = lora_data::dataset::TextEncoding::named("windows-1252");
    let options = ScanOptions { caption_encoding, ..ScanOptions::default() };
    let dataset = ImageDataset::scan(folder.path(), &options).unwrap();
    let captions: Vec<_> = dataset.items().iter().map(|item| item.caption.as_str()).collect();
    assert_eq!(captions, ["café", "naïve", "plain", "d"]);
}

fn kinds(dataset: &ImageDataset) -> Vec<&'static str> {
    dataset.findings().iter().map(|finding| finding.kind.name()).collect()
}

fn names(dataset: &ImageDataset) -> Vec<String> {
    dataset.items().iter().map(|item| item.file.path.file_name().unwrap().to_string_lossy().into_owned()).collect()
}

#[test]
fn folders_below_are_read_where_there_is_nothing_else_or_when_asked() {
    let folder = folder(&["sub/a.png", "sub/deep/b.png", "x/c.png"], &[("sub/a.txt", b"one")]);
    let dataset = ImageDataset::scan(folder.path(), &ScanOptions::default()).unwrap();
    assert_eq!(names(&dataset), ["a.png", "b.png", "c.png"]);
    assert_eq!(dataset.items()[0].caption, "one");

    image::RgbImage::new(3, 3).save(folder.path().join("top.png")).unwrap();
    let top = ImageDataset::scan(folder.path(), &ScanOptions::default()).unwrap();
    assert_eq!((names(&top), kinds(&top)), (vec!["top.png".to_owned()], vec!["folder-ignored"; 2]));
    let all = ImageDataset::scan(folder.path(), &ScanOptions { recursive: true, ..ScanOptions::default() }).unwrap();
    assert_eq!(all.items().len(), 4);
}

#[test]
fn metadata_at_the_top_may_name_pictures_below() {
    let line = b"{\"file_name\":\"sub/a.png\",\"text\":\"deep\"}";
    let folder = folder(&["sub/a.png"], &[("metadata.jsonl", line)]);
    let dataset = ImageDataset::scan(folder.path(), &ScanOptions::default()).unwrap();
    assert_eq!(
        (dataset.items()[0].caption.as_str(), dataset.items()[0].caption_source),
        ("deep", CaptionSource::Jsonl)
    );
}

#[test]
fn masks_and_companions_are_told_apart_from_pictures() {
    let folder = folder(
        &["a.png", "a-mask.png", "b.jpg", "b-masklabel.png", "b-condlabel.png", "face-mask.png", "m/a.png"],
        &[],
    );
    let dataset = ImageDataset::scan(folder.path(), &ScanOptions::default()).unwrap();
    assert_eq!(names(&dataset), ["a.png", "b.jpg", "face-mask.png"]);
    let masks = |dataset: &ImageDataset| -> Vec<Option<String>> {
        let name = |item: &lora_data::dataset::Item| item.mask.as_ref().map(|mask| mask.path.display().to_string());
        dataset.items().iter().map(name).collect()
    };
    let found = masks(&dataset);
    assert!(
        found[0].as_ref().unwrap().ends_with("a-mask.png") && found[1].as_ref().unwrap().ends_with("b-masklabel.png")
    );
    assert_eq!(found[2], None);
    let options = ScanOptions { mask_dir: Some(folder.path().join("m")), ..ScanOptions::default() };
    let dataset = ImageDataset::scan(folder.path(), &options).unwrap();
    assert!(masks(&dataset)[0].as_ref().unwrap().ends_with("m/a.png"));
    assert_eq!(kinds(&dataset).iter().filter(|kind| **kind == "missing-mask").count(), 2);
}

#[test]
fn masks_of_one_name_belong_to_the_folder_that_they_lie_in() {
    let folder = folder(&["d/3_cat/1.png", "d/2_dog/1.png", "tree/3_cat/1.png", "tree/2_dog/1.png", "flat/1.png"], &[]);
    let scan = |masks: &str, metadata_file| {
        let mask_dir = Some(folder.path().join(masks));
        let options = ScanOptions { mask_dir, metadata_file, ..ScanOptions::default() };
        ImageDataset::scan(folder.path().join("d"), &options).unwrap()
    };
    let masks = |dataset: &ImageDataset| -> Vec<String> {
        let below = |path: &std::path::Path| path.strip_prefix(folder.path()).unwrap().to_str().unwrap().to_owned();
        dataset.items().iter().map(|item| below(&item.mask.as_ref().unwrap().path)).collect()
    };
    let tree = scan("tree", None);
    assert_eq!((masks(&tree), kinds(&tree)), (vec!["tree/2_dog/1.png".into(), "tree/3_cat/1.png".into()], vec![]));
    // The same file for both is what the other trainers take, and seldom what is meant.
    let flat = scan("flat", None);
    assert_eq!((masks(&flat), kinds(&flat)), (vec!["flat/1.png".to_owned(); 2], vec!["shared-mask"]));
    let told = flat.findings()[0].to_string();
    assert!(told.contains("3_cat") && told.contains("2_dog"), "{told}");

    let list = folder.path().join("list.json");
    fs::write(&list, r#"{"3_cat/1.png": {"caption": "a cat"}, "2_dog/1.png": {"caption": "a dog"}}"#).unwrap();
    let listed = scan("tree", Some(list));
    let captions = listed.items().iter().map(|item| item.caption.as_str());
    let expected = [("a cat", "tree/3_cat/1.png"), ("a dog", "tree/2_dog/1.png")];
    let found = masks(&listed);
    let found: std::collections::BTreeSet<_> = captions.zip(found.iter().map(String::as_str)).collect();
    assert_eq!(found, expected.into());
}

#[test]
fn a_given_class_is_the_caption_in_folders_below_too() {
    let folder = folder(&["3_cat/a.png"], &[]);
    for recursive in [false, true] {
        let options = ScanOptions { recursive, class: "a pet".into(), ..ScanOptions::default() };
        let dataset = ImageDataset::scan(folder.path(), &options).unwrap();
        assert_eq!((dataset.items()[0].caption.as_str(), dataset.items()[0].repeats), ("a pet", 3), "{recursive}");
    }
}

#[test]
fn what_people_have_lying_about_is_reported_by_name() {
    let folder = folder(
        &["a.png", "a.jpg", "c.png"],
        &[("b.txt", b"no picture"), ("c.txt", b"\xff"), ("d.png", b""), ("e.avif", b"x")],
    );
    let options = ScanOptions { strictness: Strictness::Inspect, ..ScanOptions::default() };
    let mut expected =
        vec!["caption-file", "duplicate-stem", "orphan-caption", "unreadable", "unreadable", "wrong-extension"];
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        use std::os::unix::fs::symlink;
        std::fs::create_dir(folder.path().join("sub")).unwrap();
        symlink(folder.path(), folder.path().join("sub/loop")).unwrap();
        symlink("nowhere.png", folder.path().join("gone.png")).unwrap();
        let odd = std::ffi::OsStr::from_bytes(b"odd\xff.png");
        image::RgbImage::new(2, 2).save_with_format(folder.path().join(odd), image::ImageFormat::Png).unwrap();
        expected.extend(["folder-loop", "name-encoding", "unreadable"]);
    }
    let options = ScanOptions { recursive: true, ..options };
    let dataset = ImageDataset::scan(folder.path(), &options).unwrap();
    let mut found = kinds(&dataset);
    found.sort_unstable();
    expected.sort_unstable();
    assert_eq!(found, expected, "{:#?}", dataset.findings());
    for finding in dataset.findings() {
        assert!(!finding.kind.remedy().is_empty() && finding.path.starts_with(folder.path()), "{finding}");
    }
}

#[test]
fn the_caption_extension_and_the_class_can_be_given() {
    let folder = folder(&["a.png", "b.png"], &[("a.txt", b"txt"), ("a.tags", b"tags")]);
    let options =
        ScanOptions { caption_extension: Some(".tags".into()), class: "a cat".into(), ..ScanOptions::default() };
    let dataset = ImageDataset::scan(folder.path(), &options).unwrap();
    let captions: Vec<_> = dataset.items().iter().map(|item| (item.caption.as_str(), item.caption_source)).collect();
    assert_eq!(captions, [("tags", CaptionSource::File), ("a cat", CaptionSource::Folder)]);
}

#[test]
fn metadata_of_sd_scripts_lists_the_pictures() {
    let folder = folder(&["a.png", "b.png", "other.png"], &[]);
    let metadata = folder.path().join("meta.json");
    let b = folder.path().join("b.png");
    let text =
        serde_json::json!({"a": {"caption": "a cat", "tags": "cat, sofa"}, b.to_str().unwrap(): {"tags": "dog"}});
    std::fs::write(&metadata, text.to_string()).unwrap();
    let options = ScanOptions { metadata_file: Some(metadata.clone()), ..ScanOptions::default() };
    let dataset = ImageDataset::scan(folder.path(), &options).unwrap();
    let mut captions: Vec<_> = dataset.items().iter().map(|item| item.caption.as_str()).collect();
    captions.sort_unstable();
    assert_eq!(captions, ["a cat, cat, sofa", "dog"]);

    std::fs::write(&metadata, "{\"image_path\":\"a.png\",\"caption\":\"line\"}\n").unwrap();
    std::fs::rename(&metadata, folder.path().join("meta.jsonl")).unwrap();
    let options = ScanOptions { metadata_file: Some(folder.path().join("meta.jsonl")), ..ScanOptions::default() };
    assert_eq!(ImageDataset::scan(folder.path(), &options).unwrap().items()[0].caption, "line");
    std::fs::write(folder.path().join("meta.jsonl"), "{\"a\": [").unwrap();
    let error = ImageDataset::scan(folder.path(), &options).unwrap_err().to_string();
    assert!(error.contains("meta.jsonl, line 1") && error.contains("JSON"), "{error}");
}

fn png(width: u32) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image::RgbImage::new(width, 5).write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

#[test]
fn archives_are_read_in_place() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("set.tar");
    let mut archive = tar::Builder::new(std::fs::File::create(&path).unwrap());
    let mut put = |name: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, bytes).unwrap();
    };
    put("d/0001.png", &png(11));
    put("d/0001.json", "\u{feff}{\"caption\":\"from json\",\"score\":3}".as_bytes());
    put("d/0002.jpg", &png(12));
    put("d/0002.json", b"{\"caption\":\"json\"}");
    put("d/0002.txt", b"from txt\nsecond");
    put("d/0002.mask.png", &png(12));
    put("d/0003.txt", b"alone");
    put("d/0004.png", b"broken");
    archive.finish().unwrap();
    drop(archive);
    // As the dataset itself, and as one of the files in a folder.
    for root in [path.as_path(), folder.path()] {
        let dataset = ImageDataset::scan(root, &ScanOptions::default()).unwrap();
        let items = dataset.items();
        assert_eq!(items.len(), 2);
        assert_eq!((items[0].caption.as_str(), items[0].size), ("from json", (11, 5)));
        assert_eq!((items[1].caption.as_str(), items[1].lines().len()), ("from txt", 2));
        assert_eq!(items[1].file.read().unwrap(), png(12));
        assert_eq!(items[1].mask.as_ref().unwrap().read().unwrap(), png(12));
        assert!(items[0].file.path.ends_with("set.tar/d/0001.png"));
        assert_eq!(kinds(&dataset), ["orphan-caption", "unreadable"]);
    }
    // Cut in the middle of the last member: what came before it is used.
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..5 * 1024 + 530]).unwrap();
    let cut = ImageDataset::scan(&path, &ScanOptions::default()).unwrap();
    assert!(!cut.items().is_empty() && kinds(&cut).contains(&"unreadable"));
    std::fs::rename(&path, folder.path().join("set.tar.gz")).unwrap();
    let error = ImageDataset::scan(folder.path().join("set.tar.gz"), &ScanOptions::default()).unwrap_err();
    assert!(error.to_string().contains("gunzip"), "{error}");
}

#[test]
fn tables_are_read_row_by_row() {
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("set.parquet");
    let schema = "message m { optional group image { optional binary bytes; optional binary path (UTF8); } \
                  optional binary text (UTF8); }";
    let schema = std::sync::Arc::new(parse_message_type(schema).unwrap());
    let file = std::fs::File::create(&path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Default::default()).unwrap();
    // Two groups of twenty rows; the third picture is broken, the fourth has no caption.
    for group in 0..2u32 {
        let mut rows = writer.next_row_group().unwrap();
        let pictures = (0..20).map(|row| if row == 2 { b"broken".to_vec() } else { png(10 + 20 * group + row) });
        let pictures: Vec<ByteArray> = pictures.map(ByteArray::from).collect();
        let names: Vec<ByteArray> = (0..20).map(|row| ByteArray::from(format!("{row}.png").into_bytes())).collect();
        let captions = (0..20).filter(|row| *row != 3);
        let captions: Vec<ByteArray> = captions.map(|row| format!("text {row}").into_bytes().into()).collect();
        let inner = vec![2i16; 20];
        let outer: Vec<i16> = (0..20).map(|row| i16::from(row != 3)).collect();
        for (values, levels) in [(&pictures, &inner), (&names, &inner), (&captions, &outer)] {
            let mut column = rows.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(values, Some(levels), None).unwrap();
            column.close().unwrap();
        }
        rows.close().unwrap();
    }
    writer.close().unwrap();

    let dataset = ImageDataset::scan(&path, &ScanOptions::default()).unwrap();
    let items = dataset.items();
    assert_eq!((items.len(), kinds(&dataset)), (38, vec!["unreadable"; 2]));
    assert_eq!((items[0].caption.as_str(), items[2].caption.as_str(), items[37].size), ("text 0", "", (49, 5)));
    // In order, out of order, and again.
    for index in (0..38).chain([20, 3, 30, 29, 28, 0]) {
        assert_eq!(items[index].file.read().unwrap(), png(items[index].size.0 as u32), "{index}");
    }
    // Damaged ones are errors or lack rows, wherever the damage is.
    let whole = std::fs::read(&path).unwrap();
    for at in (0..whole.len()).step_by(7) {
        let mut damaged = whole.clone();
        damaged[at] ^= 0xff;
        std::fs::write(&path, damaged).unwrap();
        if let Ok(dataset) = ImageDataset::scan(&path, &ScanOptions::default()) {
            assert!(dataset.items().len() <= 40, "{at}");
        }
    }
    std::fs::write(&path, b"PAR1 nonsense PAR1").unwrap();
    let error = ImageDataset::scan(&path, &ScanOptions::default()).unwrap_err().to_string();
    assert!(error.contains("set.parquet"), "{error}");
}
